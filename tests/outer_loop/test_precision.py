"""Slow weights of more precision than the parameters have."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightning_lookahead import LookaheadCallback, SlowWeights
from tests.helpers.problem import Problem
from tests.helpers.runs import equal


def creeping(dtype=torch.bfloat16, steps=40, **settings):
    """A weight at 1 whose phi goes up by a tenth of an ulp of bfloat16, or so, in every cycle of one step."""
    weight = nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    slow = SlowWeights(optimizer, k=1, alpha=0.1, **settings)
    for _ in range(steps):
        weight.grad = torch.full_like(weight, -0.01)
        optimizer.step()
    return weight, slow


def test_slow_weights_keep_progress_that_is_smaller_than_an_ulp_of_the_parameter():
    weight, slow = creeping()
    (phi,) = slow.values("slow").values()
    assert phi.dtype == torch.float32
    assert torch.equal(weight, phi.bfloat16())
    exact, rise = torch.ones(4), torch.full((4,), 0.01).bfloat16()
    for _ in range(40):  # theta steps from the rounded phi, as bfloat16 rounds
        exact.lerp_((exact.bfloat16() + rise).float(), 0.1)
    assert torch.equal(phi, exact)
    assert phi[0] > 1.01
    rounded, _ = creeping(slow_dtype="bfloat16")
    assert (rounded == 1).all()  # lost, each time


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_swap_never_rounds_phi(dtype):
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    slow = SlowWeights(optimizer, k=3, alpha=0.3, slow_dtype=dtype)
    for _ in range(4):  # one step into the second cycle, so that theta is not phi rounded
        weight.grad = torch.full_like(weight, 0.07)
        optimizer.step()
    (phi,), theta = [value.clone() for value in slow.values("slow").values()], weight.detach().clone()
    assert not torch.equal(phi.bfloat16().to(phi), phi)
    assert not torch.equal(phi.bfloat16(), theta)
    for _ in range(3):
        with slow.use("slow"):
            assert torch.equal(weight, phi.bfloat16())
            (inside,) = slow.values("slow").values()
            assert torch.equal(inside, phi)
            (fast,) = slow.values("fast").values()
            assert torch.equal(fast, theta)
        (after,) = slow.values("slow").values()
        assert torch.equal(after, phi)
        assert torch.equal(weight, theta)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_keeps_the_precision(duplicate):
    weight, slow = creeping()
    optimizer, other = duplicate((slow.optimizer, slow))
    assert equal(other.values("slow").values(), slow.values("slow").values())
    (twin,) = optimizer.param_groups[0]["params"]
    for parameter, inner in ((weight, slow.optimizer), (twin, optimizer)):
        parameter.grad = torch.full_like(parameter, -0.01)
        inner.step()
    assert equal(other.values("slow").values(), slow.values("slow").values())


def test_names_of_types_and_devices_that_are_none_are_refused():
    for make in (lambda **wrong: SlowWeights(Problem().optimizer, **wrong), LookaheadCallback):
        with pytest.raises(ValueError, match="slow_dtype='float33' is unknown"):
            make(slow_dtype="float33")
        with pytest.raises(ValueError, match="slow_dtype='int64' is unknown"):
            make(slow_dtype="int64")
        with pytest.raises(ValueError, match="slow_device='moon' is unknown"):
            make(slow_device="moon")


def test_fast_weights_set_aside_come_back_where_the_module_has_been_moved_in_between():
    weight, slow = creeping(steps=3)
    weight.grad = torch.full_like(weight, 0.3)
    slow.swap_to("slow")
    theta = next(iter(slow.values("fast").values())).clone()
    weight.data = weight.data.float()  # as after a fit, where the module is moved to what is kept
    slow.swap_to("fast")
    assert torch.equal(weight, theta.float())
