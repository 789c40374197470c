"""Which calls of an optimizer's step are inner steps."""

import pytest
import torch
from torch import nn

from lightning_lookahead import SlowWeights
from lightning_lookahead.outer_loop.weight_pairs import Moving
from tests.helpers.oracle import lookahead
from tests.helpers.problem import Decayed, Problem, push, slow_values, two_weights
from tests.helpers.runs import equal


def test_a_step_before_which_nothing_had_a_gradient_does_not_count():
    a, b, optimizer = two_weights()
    slow = SlowWeights(optimizer, k=2)
    push(optimizer, a=(a, -1.0), b=(b, None))
    push(optimizer, a=(a, None), b=(b, None))
    assert slow.steps == 1
    push(optimizer, a=(a, None), b=(b, -1.0))
    assert slow.syncs == 1


def test_an_optimizer_that_calls_the_step_of_its_parent_counts_once():
    class Parent(torch.optim.SGD):
        pass

    class Child(Parent):
        def step(self, closure=None):
            return super().step(closure)

    Parent([nn.Parameter(torch.ones(1))])  # torch hooks a class's step when the first one is made
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    optimizer = Child([parameter])
    fired = []
    optimizer.register_step_post_hook(lambda *_: fired.append(1))
    slow = SlowWeights(optimizer, k=4)
    for _ in range(3):
        optimizer.step()
    assert len(fired) > 3, "torch no longer fires twice: this test shows nothing"
    assert slow.steps == 3


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_do_not_count(fused):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    slow = SlowWeights(optimizer, k=2)
    syncs = []
    for scale in (1.0, float("inf"), 1.0, float("nan"), 1.0, 1.0):
        optimizer.zero_grad()
        scaler.scale((parameter * scale).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        syncs.append(slow.syncs)
    assert syncs == [0, 0, 1, 1, 1, 2]
    assert slow.steps == 4


def test_what_a_fused_kernel_skipped_is_read_once_in_a_cycle(monkeypatch):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter], lr=0.1, fused=True)
    slow, steps, reads, read = SlowWeights(optimizer, k=4), [], [], torch.Tensor.item

    def item(tensor):
        reads.append(len(steps))
        return read(tensor)

    monkeypatch.setattr(Moving, "not_finite", lambda _: [])  # which reads sums of weights
    monkeypatch.setattr(torch.Tensor, "item", item)
    for step in range(8):
        steps.append(step)
        parameter.grad = torch.ones(3)
        optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.ones(())  # as a scaler leaves them
        optimizer.step()
    assert slow.syncs == 2
    assert reads == [4, 8]


@pytest.mark.parametrize("fused", [False, True])
def test_the_counters_saved_are_right_when_the_last_step_was_skipped(fused):
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    slow = SlowWeights(optimizer, k=5)
    for scale in (1.0, float("inf")):
        scaler.scale((parameter * scale).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    counters = {"k": 5, "alpha": 0.5, "steps": 1, "steps_since_sync": 1, "syncs": 0}
    more = {"trained": ["[0]"], "idle": [], "saved_with": "fast"}
    assert slow.persistence.counters() == {**slow.settings.saved(), **counters, **more}


class ComputesItsGradients(torch.optim.SGD):
    """Takes a step, or none, without gradients that were there before it and without a closure."""

    idle = False

    def step(self, closure=None):
        self.zero_grad()
        if not self.idle:
            with torch.enable_grad():
                sum(parameter.square().sum() for parameter in self.param_groups[0]["params"]).backward()
        return super().step(closure)


@pytest.mark.parametrize("idle", [(), (0, 1)])
def test_a_step_that_computes_its_gradients_without_a_closure_counts_from_the_first_one(idle):
    parameter = nn.Parameter(torch.linspace(1.0, 2.0, 3))
    optimizer = ComputesItsGradients([parameter], lr=0.1)
    slow = SlowWeights(optimizer, k=3)
    for step in range(5 + len(idle)):
        optimizer.idle = step in idle
        optimizer.step()
    twin = nn.Parameter(torch.linspace(1.0, 2.0, 3))
    plain = ComputesItsGradients([twin], lr=0.1)
    (phi,) = lookahead([twin], lambda _: plain.step(), k=3, alpha=0.5, steps=5)
    assert (slow.steps, slow.syncs) == (5, 1)
    assert equal([parameter, slow.values("slow")[parameter]], [twin, phi])


def test_the_step_that_distributed_checkpoints_rehearse_with_does_not_count():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict  # noqa: PLC0415

    problem = Problem(torch.optim.SGD)  # without momentum: its state stays empty, so that every save rehearses
    fired = []
    problem.optimizer.register_step_post_hook(lambda *_: fired.append(1))
    slow = SlowWeights(problem.optimizer, k=2)
    for index in range(3):
        problem.step(index)
        problem.optimizer.zero_grad()
        with slow.use("slow"):
            get_optimizer_state_dict(problem.net, problem.optimizer)
        get_optimizer_state_dict(problem.net, problem.optimizer)
    assert len(fired) > 3, "torch no longer rehearses: this test shows nothing"
    assert (slow.steps, slow.syncs) == (3, 1)
    reference = Problem(torch.optim.SGD)
    lookahead(reference.parameters, reference.step, k=2, alpha=0.5, steps=3)
    assert equal(problem.parameters, reference.parameters)


def test_a_real_step_with_a_learning_rate_of_zero_counts():
    problem = Problem(torch.optim.Adam, lr=0.0)
    slow = SlowWeights(problem.optimizer, k=5)
    problem.step(0)
    assert slow.steps == 1


@pytest.mark.parametrize("parent_first", [False, True])
def test_a_step_that_extends_its_parents_is_synced_at_its_end_and_counts_once(parent_first):
    if parent_first:  # torch wraps the step of a class when its first instance is made
        torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    problem, reference = Problem(Decayed), Problem(Decayed)
    slow = SlowWeights(problem.optimizer, k=2)
    for index in range(5):
        problem.step(index)
    phi = lookahead(reference.parameters, reference.step, k=2, alpha=0.5, steps=5)
    assert (slow.steps, slow.syncs) == (5, 2)
    assert equal(problem.parameters, reference.parameters)
    assert equal(slow_values(slow), phi)


def test_counting_goes_on_after_a_step_that_raised():
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    problem = Problem(Decayed)
    slow = SlowWeights(problem.optimizer, k=3)
    problem.step(0)
    problem.optimizer.raises = True
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            problem.step(1)
    problem.optimizer.raises = False
    problem.step(2)
    assert slow.steps == 2
    problem.step(3)
    assert (slow.steps, slow.syncs) == (3, 1)


def test_an_optimizer_that_clears_its_gradients_is_counted_in_a_plain_loop():
    class Clears(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            self.zero_grad()
            return loss

    problem = Problem(Clears)
    slow = SlowWeights(problem.optimizer, k=2)
    for index in range(4):
        (problem.net(problem.inputs[index]) - 1).square().mean().backward()
        problem.optimizer.step()
    assert (slow.steps, slow.syncs) == (4, 2)
