"""Numbers and schedules for alpha and k."""

import pytest
import torch

from lightning_lookahead import Cosine, Linear, LookaheadCallback, SlowWeights
from lightning_lookahead.outer_loop.schedules import describe
from tests.helpers.problem import Problem, slow_values
from tests.helpers.runs import equal


def by_hand(alphas, lengths, steps):
    """theta and phi with an alpha and a k for each cycle."""
    problem = Problem()
    phi, cycle, since = problem.values(), 0, 0
    for index in range(steps):
        problem.step(index)
        since += 1
        if since == lengths[cycle]:
            with torch.no_grad():
                for slow, fast in zip(phi, problem.parameters, strict=True):
                    fast.copy_(slow.lerp_(fast, alphas[cycle]))
            cycle, since = cycle + 1, 0
    return problem.values(), phi


@pytest.mark.parametrize(
    ("alpha", "alphas"),
    [
        (Linear(start=0.5, end=1.0, syncs=2), [0.5, 0.75, 1.0, 1.0]),
        (Cosine(start=1.0, end=0.25, syncs=2), [1.0, 0.625, 0.25, 0.25]),
        (lambda sync: 1 / (1 + sync), [1, 1 / 2, 1 / 3, 1 / 4]),
    ],
)
def test_alpha_follows_its_schedule(alpha, alphas):
    problem = Problem()
    slow = SlowWeights(problem.optimizer, 3, alpha)
    used = []
    for index in range(13):
        problem.step(index)
        used += [slow.alpha.last] if slow.syncs > len(used) else []
    assert used == pytest.approx(alphas)
    theta, phi = by_hand(used, [3] * 5, 13)
    assert equal(problem.parameters, theta)
    assert equal(slow_values(slow), phi)


@pytest.mark.parametrize(
    ("k", "lengths"),
    [(Linear(start=1, end=4, syncs=3), [1, 2, 3, 4, 4]), (lambda sync: 2 if sync else 5, [5, 2, 2, 2, 2])],
)
def test_k_follows_its_schedule_also_after_a_resume(k, lengths):
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k, 0.5)
    for index in range(12):
        if index in {4, 7}:  # go on from saved counters
            state = slow.state_dict()
            assert state["k"] == describe(k)
            slow.load_state_dict(state)
        problem.step(index)
    theta, phi = by_hand([0.5] * 9, [*lengths, 9], 12)
    assert equal(problem.parameters, theta)
    assert equal(slow_values(slow), phi)


def test_a_schedule_is_named_in_a_checkpoint_and_another_is_warned_of():
    slow = SlowWeights(Problem().optimizer, alpha=Linear(start=0.5, end=1.0, syncs=2))
    state = slow.state_dict()
    assert state["alpha"] == "Linear(start=0.5, end=1.0, syncs=2)"
    with pytest.warns(UserWarning, match="alpha was 'Linear.* and is 0.5"):
        SlowWeights(Problem().optimizer).load_state_dict(state)


@pytest.mark.parametrize("make", [lambda **wrong: SlowWeights(Problem().optimizer, **wrong), LookaheadCallback])
def test_values_out_of_range_are_refused_at_once_or_when_they_come(make):
    for wrong, message in (
        ({"alpha": Linear(start=0.0, end=1.0, syncs=2)}, "alpha at sync 0=0.0 is out of range"),
        ({"alpha": lambda _: 2}, "alpha at sync 0=2 is out of range"),
        ({"k": lambda _: 0}, "k at sync 0=0 is out of range"),
        ({"k": lambda _: float("nan")}, "k at sync 0=nan is out of range"),
        ({"k": lambda _: "two"}, "k at sync 0='two' is out of range"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**wrong)
    for kind in (Linear, Cosine):
        with pytest.raises(ValueError, match="syncs=0 is out of range"):
            kind(start=0.5, end=1.0, syncs=0)
        with pytest.raises(ValueError, match="end=inf is out of range"):
            kind(start=0.5, end=float("inf"), syncs=2)
        with pytest.raises(ValueError, match="start='half' is out of range"):
            kind(start="half", end=1.0, syncs=2)


def test_a_schedule_that_leaves_its_range_is_refused_and_phi_stays():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, 1, alpha=lambda sync: 0.5 if sync < 2 else 1.5)
    problem.step(0)
    problem.step(1)
    before = slow_values(slow)
    with pytest.raises(ValueError, match="alpha at sync 2=1.5 is out of range"):
        problem.step(2)
    assert equal(slow_values(slow), before)
