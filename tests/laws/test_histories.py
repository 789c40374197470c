"""Any history of steps, swaps, saves and copies: the run is that of its steps alone."""

import copy

import torch
from hypothesis import given, settings

from lightning_lookahead import SlowWeights
from tests.helpers import strategies as some
from tests.helpers.oracle import lookahead
from tests.helpers.problem import Problem, slow_values
from tests.helpers.runs import equal


@settings(max_examples=60)
@given(
    some.histories,
    some.cycle_lengths,
    some.either(0.25, 0.5, 0.8, 1.0),
    some.either(torch.optim.SGD, torch.optim.Adam),
    some.either(None, "slow", "fast"),
)
def test_swapping_saving_and_copying_never_change_the_run(history, k, alpha, optimizer_class, model_weights):
    problem, reference = Problem(optimizer_class), Problem(optimizer_class)
    slow = SlowWeights(problem.optimizer, k, alpha, model_weights=model_weights)
    steps = 0
    for event in history:
        if event == "step":
            problem.step(steps)
            steps += 1
        elif event == "swap":
            with slow.use("slow"):
                slow.swap_to("slow")
        elif event == "copy":
            problem, slow = copy.deepcopy((problem, slow))
        else:
            with slow.use(model_weights or "fast"):  # what the model's own state_dict then holds
                saved = copy.deepcopy((problem.net.state_dict(), problem.optimizer.state_dict(), slow.state_dict()))
            problem = Problem(optimizer_class)
            slow = SlowWeights(problem.optimizer, k, alpha, model_weights=model_weights)
            problem.optimizer.load_state_dict(saved[1])
            problem.net.load_state_dict(saved[0])
            slow.load_state_dict(saved[2])
            slow.swap_to("fast")  # the first use puts both sets in their places
    phi = lookahead(reference.parameters, reference.step, k=k, alpha=alpha, steps=steps)
    assert equal(problem.parameters, reference.parameters)
    assert equal(slow_values(slow), phi)
    assert (slow.steps, slow.syncs) == (steps, steps // k)
