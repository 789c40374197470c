"""Values that are not finite, in a plain loop."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lookahead import SlowWeights
from tests.helpers.problem import Problem


def test_a_plain_loop_names_the_place_of_the_parameter():
    problem = Problem()
    SlowWeights(problem.optimizer, k=1)
    with torch.no_grad():
        problem.parameters[1][0] = float("inf")
    with pytest.raises(RuntimeError, match=r"Parameter \d of the optimizer, of shape"):
        problem.step(0)


def test_the_check_for_values_that_are_not_finite_is_made_once_in_a_sync_and_never_between():
    class Looks(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.number += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    problem = Problem()
    SlowWeights(problem.optimizer, k=3)
    seen = []
    for index in range(9):
        with Looks() as looks:
            problem.step(index)
        seen.append(looks.number)
    assert seen == [0, 0, 3] * 3  # sums read: of biases, of weights for 3 inputs and of those for 4
