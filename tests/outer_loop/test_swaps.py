"""Either set of weights in the parameters."""

import pytest
import torch

from lightning_lookahead import SlowWeights
from tests.helpers.oracle import lookahead
from tests.helpers.problem import Problem, slow_values
from tests.helpers.runs import equal


def test_a_swap_undone_leaves_everything_as_it_was_whatever_was_raised_inside():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=5)
    problem.step(0)
    before, phi = problem.values(), slow_values(slow)
    identity = [(id(p), p.data_ptr(), p.requires_grad, p.grad) for p in problem.parameters]
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), slow.use("slow"):
            assert equal(problem.parameters, phi)
            raise error
    assert equal(problem.parameters, before)
    assert equal(slow_values(slow), phi)
    assert [(id(p), p.data_ptr(), p.requires_grad, p.grad) for p in problem.parameters] == identity


def test_swaps_nest():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=5)
    problem.step(0)
    theta, phi = problem.values(), slow_values(slow)
    with slow.use("slow"), slow.use("slow"), slow.use("fast"):
        assert equal(problem.parameters, theta)
        with slow.use("slow"):
            assert equal(problem.parameters, phi)
        assert equal(problem.parameters, theta)
    assert equal(problem.parameters, theta)
    assert equal(slow_values(slow), phi)


def test_a_step_or_a_sync_with_the_slow_weights_in_place_is_refused():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=5)
    problem.step(0)
    theta, phi = problem.values(), slow_values(slow)
    with slow.use("slow"):
        with pytest.raises(RuntimeError, match="hold the slow weights"):
            problem.step(1)
        with pytest.raises(RuntimeError, match="hold the slow weights"):
            slow.sync()
    assert equal(problem.parameters, theta)
    assert equal(slow_values(slow), phi)
    problem.step(1)
    assert slow.steps == 2


def test_swaps_work_in_inference_mode_and_training_goes_on():
    problem, reference = Problem(), Problem()
    slow = SlowWeights(problem.optimizer, k=2)
    for index in range(4):
        problem.step(index)
        with torch.inference_mode(), slow.use("slow"):
            problem.net(problem.inputs[0])
    lookahead(reference.parameters, reference.step, k=2, alpha=0.5, steps=4)
    assert equal(problem.parameters, reference.parameters)


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="model_weights='ema' is unknown"):
        SlowWeights(Problem().optimizer, model_weights="ema")
    slow = SlowWeights(Problem().optimizer)
    with pytest.raises(ValueError, match="'ema' is unknown: give 'slow'"):
        slow.swap_to("ema")


def test_what_was_written_from_outside_right_after_a_sync_belongs_to_both_sets():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=2)
    problem.step(0)
    problem.step(1)
    problem.net[0].weight.data.clamp_(-0.1, 0.1)
    clamped = problem.values()
    with slow.use("slow"):
        assert equal(problem.parameters, clamped)
    assert equal(problem.parameters, clamped)
    assert equal(slow_values(slow), clamped)
