"""A sync's arithmetic: its fast forms give the rule's bits, in as few operations as it takes."""

import copy
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lookahead import SlowWeights
from lightning_lookahead.outer_loop import fused_momentum, moving, tensors
from lightning_lookahead.outer_loop.algorithm import outer_step
from lightning_lookahead.outer_loop.moving import Moving
from lightning_lookahead.outer_loop.tensors import OuterMomentum
from tests.helpers import strategies as some

DTYPES = some.DTYPES


class Ops(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def using(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@given(
    some.kinds_of_tensors,
    some.alphas,
    some.settings(SMALL=[1, 10, moving.SMALL], BLOCK=[2, moving.BLOCK]),
    some.threads,
)
def test_in_portions_a_sync_gives_the_same_bits(kinds, alpha, sizes, threads):
    with pytest.MonkeyPatch.context() as patch, using(threads):
        for name, size in sizes.items():
            patch.setattr(moving, name, size)
        fast, slow = made(kinds)
        expected = [[torch.clone(tensor) for tensor in own] for own in (fast, slow)]
        for theta, phi in zip(*expected, strict=True):
            phi.lerp_(theta, alpha)
            theta.copy_(phi)
        own = Moving(fast, slow)
        assert own.not_finite() == []
        outer_step(fast, slow, alpha, portions=own.portions())
    assert_equal((fast, slow), expected)


@given(
    some.kinds_of_tensors,
    some.alphas,
    some.settings(FEW=[1, fused_momentum.FEW], BLOCK=[64, 130, tensors.BLOCK]),
    some.threads,
    some.outer_momenta.filter(bool),
)
def test_with_momentum_in_blocks_a_sync_gives_the_bits_of_sgd(kinds, alpha, sizes, threads, momentum):
    mu, nesterov = momentum
    with pytest.MonkeyPatch.context() as patch, using(threads):
        patch.setattr(fused_momentum, "FEW", sizes["FEW"])
        patch.setattr(tensors, "BLOCK", sizes["BLOCK"])
        fast, slow = made(kinds)
        b = [torch.randn_like(tensor) for tensor in slow]
        expected = [[torch.clone(tensor) for tensor in own] for own in (fast, slow, b)]
        for theta, phi, moved in zip(*expected, strict=True):
            s = phi - theta
            moved.mul_(mu).add_(s)
            phi.add_(s.add_(moved, alpha=mu) if nesterov else moved, alpha=-alpha)
            theta.copy_(phi)
        outer_step(fast, slow, alpha, OuterMomentum(b, mu, nesterov))
    assert_equal((fast, slow, b), expected)


def made(kinds):
    """Slow weights of these kinds, and fast ones like them."""
    slow = [torch.randn(shape, dtype=dtype) for shape, dtype, _ in kinds]
    slow = [t.T if turned and t.ndim == 2 else t for t, (_, _, turned) in zip(slow, kinds, strict=True)]
    return [torch.randn_like(tensor) for tensor in slow], slow


def assert_equal(ours, others):
    for own, other in zip(ours, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, moving.SMALL, moving.SMALL + 1])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(value, dtype, size):
    fast = [torch.ones(size, dtype=dtype), torch.ones(2, dtype=dtype), torch.ones(2, 3, dtype=dtype), torch.ones(())]
    own = Moving(fast, [tensor.clone() for tensor in fast])
    for index, tensor in enumerate(fast):
        place = (-1,) * tensor.ndim
        before, tensor[place] = tensor[place].clone(), value
        assert own.not_finite() == [index]
        tensor[place] = before
    fast[0][-1], fast[1][0] = value, -value
    assert own.not_finite() == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES[:4])
def test_a_sum_that_overflows_is_no_value_that_is_not_finite(dtype):
    most = torch.finfo(dtype).max
    fast = [torch.full((4,), most, dtype=dtype), torch.full((moving.SMALL + 1,), most, dtype=dtype)]
    assert Moving(fast, [tensor.clone() for tensor in fast]).not_finite() == []


def trained(*sizes):
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return parameters, optimizer, SlowWeights(optimizer, k=10**6)


def counted(slow, threads=1):
    """Operations of one sync, by name."""
    with Ops() as ops, using(threads):
        slow.sync()
    return {name: number for name, number in ops.counts.items() if name not in {"detach", "view", "split", "alias"}}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("count", "joins"), [(1, 1), (50, 2), (400, 2)])
def test_small_tensors_cost_two_calls_together_and_to_look_a_sum_or_one_for_each_shape(count, joins, threads):
    _, optimizer, slow = trained(*(count * [(40,), (5, 8)]))
    optimizer.step()
    slow.sync()
    found = counted(slow, threads)
    assert found.pop("_local_scalar_dense") == joins
    assert found == {"_foreach_lerp_": 1, "_foreach_copy_": 1, "cat": joins, "sum": joins}


@pytest.mark.parametrize(("threads", "calls"), [(1, 1 + 2 + 3), (2, 3)])
def test_large_tensors_are_read_once_to_look_and_moved_by_two_calls_each_or_for_each_block(threads, calls):
    _, optimizer, slow = trained(moving.BLOCK, 2 * moving.BLOCK, 2 * moving.BLOCK + 1)
    optimizer.step()
    slow.sync()
    found = counted(slow, threads)
    assert found.pop("_local_scalar_dense") == 3
    assert found == {"sum": 3, "_foreach_lerp_": calls, "_foreach_copy_": calls}


@pytest.mark.parametrize("options", [{}, {"buffers": "sync"}])
def test_a_sync_that_ignores_what_is_not_finite_reads_nothing_twice_and_no_number(options):
    module = nn.Sequential(nn.Linear(300, 200), nn.BatchNorm1d(200))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    slow = SlowWeights(optimizer, k=10**6, module=module, nonfinite="ignore", **options)
    optimizer.step()
    slow.sync()
    assert not counted(slow).keys() & {"_local_scalar_dense", "sum", "cat", "_foreach_norm", "isfinite"}


def test_an_ordinary_step_adds_no_operation():
    plain = trained(40, 20_000)
    plain[2].close()
    counted = []
    for optimizer in (plain[1], trained(40, 20_000)[1]):
        optimizer.step()
        with Ops() as ops:
            optimizer.step()
        counted.append(ops.counts)
    assert counted[0] == counted[1]


def test_parameters_whose_values_are_put_elsewhere_are_synced_where_they_are():
    parameters, optimizer, slow = trained(4, 20_000)
    optimizer.step()
    slow.sync()
    for parameter in parameters:
        parameter.data = torch.full_like(parameter, 3.0)
    before = [slow.values("slow")[parameter].clone() for parameter in parameters]
    slow.sync()
    for parameter, phi in zip(parameters, before, strict=True):
        assert torch.equal(parameter, torch.lerp(phi, torch.full_like(phi, 3.0), 0.5))


@pytest.mark.parametrize("threads", [1, 2])
def test_parameters_that_are_turned_in_place_are_synced_as_they_are_seen(threads):
    parameters, optimizer, slow = trained((3, 3), (200, 200))
    optimizer.step()
    slow.sync()
    optimizer.step()
    expected = []
    for parameter in parameters:
        parameter.data = parameter.data.T  # where it was
        expected.append(torch.lerp(slow.values("slow")[parameter], parameter.detach(), 0.5))
    with using(threads):
        slow.sync()
    for parameter, phi in zip(parameters, expected, strict=True):
        assert torch.equal(parameter, phi)
        assert torch.equal(slow.values("slow")[parameter], phi)


def test_a_copy_of_slow_weights_syncs_its_own_parameters():
    parameters, optimizer, slow = trained(4, 20_000)
    optimizer.step()
    slow.sync()
    before = [parameter.detach().clone() for parameter in parameters]
    others, copied = copy.deepcopy((parameters, slow))
    for other in others:
        other.grad = torch.ones_like(other)
    copied.optimizer.step()
    copied.sync()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))


def test_a_swap_right_after_a_sync_moves_nothing():
    parameters, optimizer, slow = trained(4, 20_000)
    optimizer.step()
    slow.sync()
    versions = [tensor._version for tensor in (*parameters, *slow.values("slow").values())]
    with Ops() as ops, slow.use("slow"):
        assert slow.active == "slow"
    assert not ops.counts.keys() & {"clone", "copy_", "_foreach_copy_"}
    assert [tensor._version for tensor in (*parameters, *slow.values("slow").values())] == versions


def test_what_was_changed_after_a_sync_is_in_both_sets_unless_it_is_not_finite():
    parameters, optimizer, slow = trained(4, 5, 6)
    optimizer.step()
    slow.sync()
    phi = [parameter.detach().clone() for parameter in parameters]
    parameters[0].data.clamp_(0, 0.1)  # which raises no version
    parameters[2].data.fill_(float("inf"))
    theta = [parameter.detach().clone() for parameter in parameters]
    with slow.use("slow"):
        assert all(torch.equal(a, b) for a, b in zip(parameters, [theta[0], *phi[1:]], strict=True))
        parameters[1].data.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(parameters, [theta[0], phi[1] + 1, *theta[2:]], strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(slow.values("slow").values(), [theta[0], phi[1] + 1, *phi[2:]], strict=True)
    )
