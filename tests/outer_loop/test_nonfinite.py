"""Values that are not finite, in a plain loop."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lookahead import SlowWeights
from lightning_lookahead.outer_loop.weight_pairs import Moving
from tests.helpers.problem import Problem


def test_a_plain_loop_names_the_place_of_the_parameter():
    problem = Problem()
    SlowWeights(problem.optimizer, k=1)
    with torch.no_grad():
        problem.parameters[1][0] = float("inf")
    with pytest.raises(RuntimeError, match=r"Parameter \d of the optimizer, of shape"):
        problem.step(0)


def test_the_check_for_values_that_are_not_finite_is_made_once_in_a_sync_and_never_between(monkeypatch):
    class Reads(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    looks, look = [], Moving.not_finite
    monkeypatch.setattr(Moving, "not_finite", lambda moving: looks.append(len(moving.fast)) or look(moving))
    problem = Problem()
    SlowWeights(problem.optimizer, k=3)
    for index in range(9):
        with Reads() as reads:
            problem.step(index)
        assert len(looks) == (index + 1) // 3
        assert reads.number == 0 or index % 3 == 2, "an ordinary step waits for the device"
    assert set(looks) == {sum(len(group["params"]) for group in problem.optimizer.param_groups)}
