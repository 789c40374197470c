"""What a sync does to the inner optimizer's state: hand-written references, and what no mode may do."""

import copy

import pytest
import torch
from torch import nn

from lightning_lookahead import LookaheadCallback, SlowWeights
from lightning_lookahead.outer_loop.momentum import FIRST_MOMENTS, Momentum, state_names
from tests.helpers.problem import OPTIMIZERS, Problem
from tests.helpers.runs import Regression, equal, make_trainer

ALPHA, K, STEPS = 0.6, 2, 7


def gradient(weight, step):
    """That of a bowl that moves."""
    return weight - torch.sin(torch.arange(3.0, dtype=torch.float64) + step)


def sgd(mode):
    """Three syncs of SGD with momentum, written out."""
    weight, velocity = torch.zeros(3, dtype=torch.float64), None
    phi, before = weight.clone(), torch.zeros(3, dtype=torch.float64)
    for step in range(1, STEPS + 1):
        slope = gradient(weight, step)
        velocity = slope.clone() if velocity is None else 0.9 * velocity + slope
        weight = weight - 0.1 * velocity
        if step % K == 0:
            phi = phi.lerp(weight, ALPHA)
            weight = phi.clone()
            if mode == "reset":
                velocity = None
            if mode == "pullback":
                before = before.lerp(velocity, ALPHA)
                velocity = before.clone()
    return weight, velocity


def adam(mode):
    """Three syncs of Adam, written out."""
    weight = torch.zeros(3, dtype=torch.float64)
    zero = torch.zeros_like(weight)
    m, v, count, phi, before = zero, zero, 0, zero, zero
    for step in range(1, STEPS + 1):
        slope = gradient(weight, step)
        count += 1
        m, v = 0.9 * m + 0.1 * slope, 0.999 * v + 0.001 * slope**2
        weight = weight - 0.1 * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
        if step % K == 0:
            phi = phi.lerp(weight, ALPHA)
            weight = phi.clone()
            if mode == "reset":
                m, v, count = zero, zero, 0
            if mode == "pullback":
                before = before.lerp(m, ALPHA)
                m = before.clone()
    return weight, m


@pytest.mark.parametrize("mode", ["none", "reset", "pullback"])
@pytest.mark.parametrize("reference", [sgd, adam])
def test_three_syncs_are_those_of_the_reference(reference, mode):
    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    settings = {"momentum": 0.9} if reference is sgd else {}
    optimizer = (torch.optim.SGD if reference is sgd else torch.optim.Adam)([weight], lr=0.1, **settings)
    SlowWeights(optimizer, K, ALPHA, pullback_momentum=mode)
    for step in range(1, STEPS + 1):
        weight.grad = gradient(weight.detach(), step)
        optimizer.step()
    expected, moment = reference(mode)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-13, atol=1e-13)
    name = "momentum_buffer" if reference is sgd else "exp_avg"
    torch.testing.assert_close(optimizer.state[weight][name], moment, rtol=1e-13, atol=1e-13)
    assert (expected - reference("none" if mode != "none" else "reset")[0]).abs().max() > 1e-3


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=lambda entry: entry.__name__)
def test_reset_makes_the_state_that_of_a_new_optimizer(optimizer_class):
    problem = Problem(optimizer_class)
    if not any(state_names(problem.optimizer, group) for group in problem.optimizer.param_groups):
        with pytest.raises(ValueError, match="does nothing: SGD as it is set keeps no state"):
            SlowWeights(problem.optimizer, 3, pullback_momentum="reset")
        return
    SlowWeights(problem.optimizer, 3, pullback_momentum="reset")
    for index in range(3):
        problem.step(index)
    other = Problem(optimizer_class)
    with torch.no_grad():
        for mine, its in zip(problem.parameters, other.parameters, strict=True):
            its.copy_(mine)
    assert len(problem.optimizer.state) == len(other.optimizer.state)
    for index in range(3, 5):  # a new optimizer goes on in the same way
        problem.step(index)
        other.step(index)
    assert equal(problem.parameters, other.parameters)


@pytest.mark.parametrize(
    "optimizer_class",
    [entry for entry in OPTIMIZERS if entry is not torch.optim.LBFGS],  # one state for all, which no strategy shards
    ids=lambda entry: entry.__name__,
)
def test_reset_in_place_as_of_shards_is_the_same(optimizer_class):
    """Sharded parameters themselves are in the tests of several processes."""
    settings = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    removed, written = Problem(optimizer_class, **settings), Problem(optimizer_class, **settings)
    for problem, sharded in ((removed, False), (written, True)):
        momentum = Momentum(problem.optimizer, "reset", sharded=sharded)
        for index in range(3):
            problem.step(index)
        momentum.reset(problem.parameters)
        assert any(problem.optimizer.state.values()) or not sharded
        for index in range(3, 6):
            problem.step(index)
    assert equal(removed.parameters, written.parameters)


def test_what_a_new_optimizer_does_differently_is_refused_for_shards():
    optimizer = Problem(torch.optim.SGD, momentum=0.9, dampening=0.5).optimizer
    with pytest.raises(ValueError, match="SGD as it is set, whose state cannot be written back"):
        Momentum(optimizer, "reset", sharded=True)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=lambda entry: entry.__name__)
def test_pullback_moves_first_moments_and_nothing_else(optimizer_class):
    ours, plain = Problem(optimizer_class), Problem(optimizer_class)
    names = [state_names(ours.optimizer, group) for group in ours.optimizer.param_groups]
    if not any(own.intersection(FIRST_MOMENTS) for own in names):
        with pytest.raises(
            ValueError, match=f"does nothing: {optimizer_class.__name__} as it is set keeps no momentum"
        ):
            SlowWeights(ours.optimizer, 3, pullback_momentum="pullback")
        return
    SlowWeights(ours.optimizer, 3, ALPHA, pullback_momentum="pullback")
    for index in range(3):
        ours.step(index)
        plain.step(index)
    for mine, its in zip(ours.parameters, plain.parameters, strict=True):
        own, expected = ours.optimizer.state[mine], plain.optimizer.state[its]
        assert own.keys() == expected.keys()  # no key is added
        for name, value in expected.items():
            if name in FIRST_MOMENTS and value is not None:
                assert torch.equal(own[name], torch.zeros_like(value).lerp(value, ALPHA))
            elif isinstance(value, torch.Tensor):
                assert torch.equal(own[name], value), name


def test_what_is_kept_of_the_momentum_is_no_alias():
    problem = Problem(torch.optim.SGD, momentum=0.9)
    slow = SlowWeights(problem.optimizer, 2, ALPHA, pullback_momentum="pullback")
    for index in range(5):
        problem.step(index)
    kept = slow._momentum.previous["momentum_buffer"]
    for parameter, value in kept.items():
        buffer = problem.optimizer.state[parameter]["momentum_buffer"]
        assert buffer.data_ptr() != value.data_ptr()
        assert not torch.equal(buffer, value)


def test_a_mode_that_would_do_nothing_is_refused_also_by_the_callback_before_the_first_step():
    with pytest.raises(ValueError, match="pullback_momentum='half' is unknown: give 'none' or 'pullback' or 'reset'"):
        LookaheadCallback(pullback_momentum="half")
    module = Regression(momentum=0.0)
    before = module.weights()
    with pytest.raises(ValueError, match="Give 'none', or the optimizer momentum"):
        make_trainer(LookaheadCallback(pullback_momentum="pullback"), max_steps=2).fit(module)
    assert equal(module.weights(), before)


def test_a_class_that_cannot_be_tried_is_believed():
    class Odd(torch.optim.SGD):
        def __init__(self, parameters, secret):
            super().__init__(parameters, lr=0.1, momentum=0.9)
            self.secret = secret

    weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = Odd([weight], 3)
    SlowWeights(optimizer, K, ALPHA, pullback_momentum="reset")
    for step in range(1, STEPS + 1):
        weight.grad = gradient(weight.detach(), step)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), sgd("reset")[0], rtol=1e-13, atol=1e-13)


def test_a_copy_goes_on_by_itself():
    problem = Problem(torch.optim.Adam)
    slow = SlowWeights(problem.optimizer, 2, pullback_momentum="pullback")
    for index in range(3):
        problem.step(index)
    other, slow_copy = copy.deepcopy((problem, slow))
    for index in range(3, 7):
        problem.step(index)
        other.step(index)
    assert equal(problem.parameters, other.parameters)
    assert slow_copy.syncs == slow.syncs == 3
