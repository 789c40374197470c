import weakref
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import example, given
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lookahead.outer_loop import tensors
from tests.helpers import strategies as some


@example(0.0, 2.2e-311, 0.25)  # subnormal: of those, neighbours are as far apart as the smallest is from zero
@given(some.weights, some.weights, some.small_alphas)
def test_interpolation_is_the_formula_of_the_paper_to_rounding(slow, fast, alpha):
    result = torch.tensor([slow], dtype=torch.float64)
    tensors.interpolate_([result], [torch.tensor([fast], dtype=torch.float64)], alpha)
    exact = Fraction(slow) + Fraction(alpha) * (Fraction(fast) - Fraction(slow))
    scale = max(abs(Fraction(slow)), abs(Fraction(fast)))
    assert abs(Fraction(result.item()) - exact) <= 4 * max(Fraction(2) ** -53 * scale, Fraction(2) ** -1074)


@given(some.lists_of_weights, some.lists_of_weights)
def test_alpha_one_gives_the_fast_weights_exactly(slow, fast):
    size = min(len(slow), len(fast))
    slow, fast = torch.tensor(slow[:size]), torch.tensor(fast[:size])
    tensors.interpolate_([slow], [fast], 1.0)
    assert torch.equal(slow, fast)


def test_an_empty_list_is_no_error():
    tensors.interpolate_([], [], 0.5)
    tensors.copy_([], [])
    assert tensors.distance([], []) == 0


def test_exchange_moves_values_and_nothing_else():
    left, right = [torch.tensor([1.0]), torch.tensor(2.0)], [torch.tensor([3.0]), torch.tensor(4.0)]
    pointers = [tensor.data_ptr() for tensor in left + right]
    tensors.exchange_(left, right)
    assert [tensor.item() for tensor in left + right] == [3, 4, 1, 2]
    assert [tensor.data_ptr() for tensor in left + right] == pointers


class Live(TorchDispatchMode):
    """The most bytes alive at once in tensors made while it is on, but for views of those that are ``given``."""

    def __init__(self, *given):
        super().__init__()
        self.made, self.peak = [], 0
        self.given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not any(result is argument for argument in args):
            self.made.append(weakref.ref(result))
        alive = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in (r() for r in self.made)
            if t is not None
        }
        self.peak = max(self.peak, sum(size for at, size in alive.items() if at not in self.given))
        return result


def test_an_exchange_needs_one_block_more_and_a_sync_none():
    sizes = (tensors.BLOCK // 2, tensors.BLOCK // 2, tensors.BLOCK, 3 * tensors.BLOCK)
    left, right = ([torch.full((size,), value) for size in sizes] for value in (0.0, 1.0))
    with Live(*left, *right) as live:
        tensors.exchange_(left, right)
    assert all(a.eq(1).all() and b.eq(0).all() for a, b in zip(left, right, strict=True))
    assert live.peak == 4 * tensors.BLOCK  # bytes of as many float32
    with Live() as live:
        tensors.interpolate_(left, right, 0.5)
        tensors.copy_(right, left)
    assert live.peak == 0


@pytest.mark.parametrize(("most", "fails_at"), [*product([2], range(9)), *product([4], range(6))])
def test_an_exchange_that_fails_is_undone(monkeypatch, most, fails_at):
    left, right = [torch.full((2,), float(i)) for i in range(3)], [torch.full((2,), 10.0 + i) for i in range(3)]
    calls = iter(range(100))
    monkeypatch.setattr(tensors, "BLOCK", most)

    def failing(operation):
        def call(*lists):
            if next(calls) == fails_at:
                operation(*([own[0]] for own in lists))  # of several tensors the first
                raise torch.OutOfMemoryError
            return operation(*lists)

        return call

    for name in ("copies", "copy_"):
        monkeypatch.setattr(tensors, name, failing(getattr(tensors, name)))
    with pytest.raises(torch.OutOfMemoryError):
        tensors.exchange_(left, right)
    assert [tensor[0].item() for tensor in left + right] == [0, 1, 2, 10, 11, 12]


def test_copies_can_be_updated_later_although_they_were_made_in_inference_mode():
    source = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        (copy,) = tensors.copies([source])
    tensors.interpolate_([copy], [torch.zeros(2)], 0.5)
    assert copy.tolist() == [0.5, 0.5]
    assert not copy.requires_grad


def test_copies_keep_strides():
    source = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert tensors.copies([source])[0].stride() == source.stride()


def test_distance_is_the_norm_of_all_differences_together():
    left, right = [torch.zeros(2), torch.zeros(1)], [torch.tensor([2.0, 3.0]), torch.tensor([6.0])]
    assert tensors.distance(left, right) == 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64, torch.int8])
def test_checksums_tell_bits_and_their_places_apart(dtype):
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    assert tensors.checksum(tensor) == tensors.checksum(tensor.clone())
    assert tensors.checksum(tensor.T.contiguous().T) == tensors.checksum(tensor)
    assert tensors.checksum(tensor.flip(0)) != tensors.checksum(tensor)
    assert tensors.checksum(torch.zeros(0, dtype=dtype)) == 0
    assert tensors.checksum(torch.ones((), dtype=dtype)) != 0
