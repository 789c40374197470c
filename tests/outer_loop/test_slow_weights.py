"""`SlowWeights` itself: copies of it, the hooks that it leaves on an optimizer, and what it takes."""

import ast
import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from lightning_lookahead import SlowWeights
from lightning_lookahead.outer_loop import slow_weights
from tests.helpers.problem import Problem, slow_values
from tests.helpers.runs import hooks


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# -- copies, hooks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_trains_on_by_itself(duplicate):
    problem = Problem(torch.optim.Adam)
    slow = SlowWeights(problem.optimizer, k=2)
    problem.step(0)
    twin, twin_slow = duplicate((problem, slow))
    before = problem.values()
    for index in range(1, 5):
        twin.step(index)
    assert twin_slow.syncs == 2
    assert (slow.steps, slow.syncs) == (1, 0)
    assert equal(problem.parameters, before)
    for index in range(1, 5):
        problem.step(index)
    assert equal(problem.parameters, twin.parameters)
    assert equal(slow_values(slow), slow_values(twin_slow))


def test_close_ends_counting_leaves_no_hook_and_keeps_both_sets():
    problem = Problem()
    before = hooks(problem.optimizer)
    slow = SlowWeights(problem.optimizer, k=2)
    problem.step(0)
    slow.close()
    assert hooks(problem.optimizer) == before
    theta, phi = problem.values(), slow_values(slow)
    problem.step(1)
    assert (slow.steps, slow.syncs) == (1, 0)
    assert not equal(problem.parameters, theta)
    assert equal(slow_values(slow), phi)
    with slow.use("slow"):
        assert equal(problem.parameters, phi)


# -- what may be given


@pytest.mark.parametrize("k", [0, -1, 2.0, "5", None, True])
def test_a_bad_k_is_refused(k):
    with pytest.raises(ValueError, match=r"k=.* integer of at least 1"):
        SlowWeights(Problem().optimizer, k=k)


@pytest.mark.parametrize("alpha", [0, -0.5, 1.01, float("nan"), float("inf"), "0.5", None, True])
def test_a_bad_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha=.*\(0, 1\]"):
        SlowWeights(Problem().optimizer, alpha=alpha)


def test_optimizers_that_cannot_be_looked_ahead_with_are_refused():
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer"):
        SlowWeights([frozen])

    class Lookahead(torch.optim.SGD):
        pass

    class ZeroRedundancyOptimizer(torch.optim.SGD):
        _overlap_with_ddp = True

    with pytest.raises(ValueError, match="meta device"):
        SlowWeights(torch.optim.SGD(nn.Linear(2, 2, device="meta").parameters()))
    for refused, reason in (
        (Lookahead, "pull back twice"),
        (ZeroRedundancyOptimizer, "moves the weights within the backward"),
    ):
        with pytest.raises(ValueError, match=reason):
            SlowWeights(refused([nn.Parameter(torch.ones(1))]))


def test_a_second_one_on_the_same_optimizer_is_refused_until_the_first_is_closed():
    problem = Problem()
    first = SlowWeights(problem.optimizer)
    with pytest.raises(ValueError, match="has slow weights already"):
        SlowWeights(problem.optimizer)
    first.close()
    SlowWeights(problem.optimizer)


def test_the_module_imports_torch_and_nothing_of_lightning(bare_program):
    tree = ast.parse(inspect.getsource(slow_weights))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.split(".")[0] in {"lightning", "pytorch_lightning"} for name in imported)
    program = (
        "import sys; from lightning_lookahead import SlowWeights;"
        "sys.exit(any(n.startswith(('lightning.', 'pytorch_lightning')) for n in sys.modules))"
    )
    assert bare_program("-c", program).returncode == 0


def test_an_optimizer_goes_from_one_to_the_next_and_each_starts_its_own_phi():
    problem = Problem()
    first = SlowWeights(problem.optimizer, k=3)
    problem.step(0)
    first.close()
    start = problem.values()
    second = SlowWeights(problem.optimizer, k=3)
    problem.step(1)
    assert equal(slow_values(second), start)
    assert second.steps == 1
