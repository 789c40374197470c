import copy
import shutil
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lookahead import SlowWeights
from lightning_lookahead.outer_loop import cpu_buckets
from lightning_lookahead.outer_loop.algorithm import outer_step
from lightning_lookahead.outer_loop.tensors import OuterMomentum
from tests.helpers import strategies as some
from tests.helpers.places import ROOT

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


def lines(tensors):
    """Where each tensor's bytes begin and end."""
    return sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors if tensor.numel())


@given(
    some.kinds_of_tensors,
    some.alphas,
    some.settings(
        SMALL=[1, 10, cpu_buckets.SMALL],
        JOINED=[20, cpu_buckets.JOINED],
        BLOCK=[2, cpu_buckets.BLOCK],
        MOMENTUM_BLOCK=[2, cpu_buckets.MOMENTUM_BLOCK],
    ),
    some.threads,
    some.outer_momenta,
)
def test_joined_or_cut_a_sync_gives_the_same_bits(kinds, alpha, sizes, threads, momentum):
    with pytest.MonkeyPatch.context() as patch, using(threads):
        for name, size in sizes.items():
            patch.setattr(cpu_buckets, name, size)
        start = [torch.randn(shape, dtype=dtype) for shape, dtype, _ in kinds]
        start = [t.T if turned and t.ndim == 2 else t for t, (_, _, turned) in zip(start, kinds, strict=True)]
        fast = [torch.randn_like(tensor) for tensor in start]
        slow = [tensor.clone() for tensor in start]
        b = [torch.randn_like(tensor) for tensor in start] if momentum else []
        expected = [[torch.clone(tensor) for tensor in tensors] for tensors in (fast, slow, b)]
        outer_step(*expected[:2], alpha, OuterMomentum(expected[2], *momentum) if momentum else None)
        own_momentum = OuterMomentum(b, *momentum) if momentum else None
        buckets = cpu_buckets.CpuBuckets.arranged(fast, slow, own_momentum)
        assert buckets.not_finite() == []
        outer_step(fast, slow, alpha, own_momentum, buckets=buckets)
    for own, others in zip((fast, slow, b), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_slow_weights_of_small_tensors_share_a_storage_and_nothing_else(dtype):
    joined = [(3,), (7,)], [(2, 2), (1, 2), (3, 2)], [(5, 1)]
    apart = [(), (cpu_buckets.SMALL + 1,), (0,)]
    fast = [torch.randn(shape, dtype=dtype) for shapes in (*joined, apart) for shape in shapes]
    slow = [tensor.clone() for tensor in fast]
    cpu_buckets.CpuBuckets(fast, slow)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(slow, fast, strict=True))
    assert all(end <= begin for (_, end), (begin, _) in pairwise(lines([*slow, *fast])))
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in slow}
    assert sum(storages.values()) == sum(tensor.nbytes for tensor in fast)
    assert len(storages) == len(joined) + len(apart)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 3, cpu_buckets.SMALL, cpu_buckets.SMALL + 1])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(value, dtype, size):
    fast = [torch.ones(size, dtype=dtype), torch.ones(2, dtype=dtype)]
    slow = [tensor.clone() for tensor in fast]
    for index, tensor in enumerate(fast):
        before, tensor[-1] = tensor[-1].clone(), value
        assert cpu_buckets.CpuBuckets(fast, slow).not_finite() == [index]
        tensor[-1] = before
    fast[0][-1], fast[1][0] = value, -value
    assert cpu_buckets.CpuBuckets(fast, slow).not_finite() == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES[:4])
def test_a_sum_that_overflows_is_no_value_that_is_not_finite(dtype):
    fast = [torch.full((4,), torch.finfo(dtype).max, dtype=dtype), torch.full((9000,), 100.0, dtype=dtype)]
    assert cpu_buckets.CpuBuckets(fast, [tensor.clone() for tensor in fast]).not_finite() == []


def trained(*sizes):
    parameters = [nn.Parameter(torch.randn(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    return parameters, optimizer, SlowWeights(optimizer, k=10**6)


@pytest.mark.parametrize("shape", [(40,), (5, 8)])
@pytest.mark.parametrize("count", [1, 50, 400])
def test_small_tensors_cost_no_operation_each_but_one_copy_together(count, shape):
    _, optimizer, slow = trained(*(count * [shape]))
    optimizer.step()
    slow.sync()
    with Ops() as ops:
        slow.sync()
    buckets = ops.counts["lerp_"]
    assert buckets == -(-count // (cpu_buckets.JOINED // 40))
    assert ops.counts["cat"] == ops.counts["sum"] == ops.counts["_foreach_copy_"] == buckets
    assert ops.counts.total() <= 4 * buckets + 8  # the rest reads the sums


@pytest.mark.parametrize(
    ("threads", "moves"),
    [(1, {"lerp_": 1 + 2 + 3, "copy_": 1 + 2 + 3}), (2, {"_foreach_lerp_": 1, "_foreach_copy_": 1})],
)
def test_large_tensors_are_read_once_to_look_and_moved_by_two_calls_or_two_for_each_block(threads, moves):
    _, optimizer, slow = trained(cpu_buckets.BLOCK, 2 * cpu_buckets.BLOCK, 2 * cpu_buckets.BLOCK + 1)
    optimizer.step()
    slow.sync()
    with Ops() as ops, using(threads):
        slow.sync()
    moving = {name: number for name, number in ops.counts.items() if "lerp" in name or "copy" in name or name == "sum"}
    assert moving == {"sum": 3, **moves}
    assert not ops.counts.keys() & {"clone", "cat", "_to_copy", "empty_like", "_foreach_norm"}


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


@pytest.mark.slow
def test_without_the_module_and_its_one_call_every_test_but_its_own_passes(tmp_path):
    for folder in ("lightning_lookahead", "tests", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "lightning_lookahead/outer_loop/cpu_buckets.py").unlink()
    (tmp_path / "tests/outer_loop/test_cpu_buckets.py").unlink()
    cycles = tmp_path / "lightning_lookahead/outer_loop/cycles.py"
    source = cycles.read_text(encoding="utf-8")
    for part in ("from .cpu_buckets import CpuBuckets\n", ", CpuBuckets.arranged(fast, slow, momentum)"):
        assert source.count(part) == 1
        source = source.replace(part, "")
    cycles.write_text(source, encoding="utf-8")
    with (tmp_path / "tests/conftest.py").open("a", encoding="utf-8") as file:  # the copy is what is tested
        file.write("\nfrom lightning_lookahead.outer_loop import cycles\n\nassert not hasattr(cycles, 'CpuBuckets')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/laws", "tests/outer_loop"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
