"""phi and theta in a plain loop: those of Algorithm 1, bit for bit."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from lightning_lookahead import SlowWeights
from tests.helpers.oracle import lookahead
from tests.helpers.problem import OPTIMIZERS, Problem, push, slow_values, two_weights
from tests.helpers.runs import equal


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("optimizer_class", OPTIMIZERS, ids=lambda entry: entry.__name__)
def test_every_optimizer_follows_algorithm_1_bit_for_bit(optimizer_class, k):
    for alpha in (0.2, 0.5, 0.8, 1.0):
        ours, reference = Problem(optimizer_class), Problem(optimizer_class)
        start = ours.values()
        slow = SlowWeights(ours.optimizer, k, alpha)
        assert equal(slow_values(slow), start)
        steps = 3 * k + k // 2
        for index in range(steps):
            ours.step(index)
        phi = lookahead(reference.parameters, reference.step, k=k, alpha=alpha, steps=steps)
        assert equal(ours.parameters, reference.parameters)
        assert equal(slow_values(slow), phi)
        assert not equal(slow_values(slow), start)
        assert ours.closures == reference.closures
        assert slow.syncs == 3


def test_syncs_come_after_k_and_2k_and_never_in_between():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=3)
    syncs = []
    for index in range(10):
        problem.step(index)
        syncs.append(slow.syncs)
    assert syncs == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


def test_alpha_one_leaves_the_inner_optimizer_as_it_is():
    ours, plain = Problem(torch.optim.Adam), Problem(torch.optim.Adam)
    SlowWeights(ours.optimizer, k=2, alpha=1.0)
    for index in range(7):
        ours.step(index)
        plain.step(index)
        assert equal(ours.parameters, plain.parameters)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("alpha", [0.1, 0.5, 0.9])
def test_after_a_sync_the_fast_weights_are_a_copy_of_the_slow_ones(dtype, alpha):
    parameter = nn.Parameter(torch.randn(37, dtype=dtype))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    slow = SlowWeights(optimizer, k=1, alpha=alpha)
    for _ in range(3):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        (phi,) = slow.values("slow").values()
        assert torch.equal(phi.to(dtype), parameter)
        assert phi.data_ptr() != parameter.data_ptr()
        assert phi.dtype == (dtype if dtype.is_complex else torch.promote_types(dtype, torch.float32))


def test_phi_starts_from_the_weights_that_training_starts_from_whatever_came_before():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=2)
    with slow.use("slow"):
        pass
    with torch.no_grad():
        for parameter in problem.parameters:  # weights loaded after the optimizer was made
            parameter.fill_(3.0)
    problem.step(0)
    assert all((phi == 3).all() for phi in slow_values(slow))


def test_an_infinite_fast_value_does_not_reach_phi_before_a_sync():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=3)
    start = slow_values(slow)
    problem.step(0)
    with torch.no_grad():
        problem.parameters[0][0, 0] = float("inf")
    with slow.use("slow"):
        assert equal(problem.parameters, start)
    assert equal(slow_values(slow), start)


def test_one_copy_of_the_trained_parameters_and_storage_of_its_own():
    problem = Problem()
    slow = SlowWeights(problem.optimizer)
    theta = problem.parameters
    kept, trained = (
        {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        for tensors in (slow.values("slow").values(), theta)
    )
    assert not kept.keys() & trained.keys()
    assert sum(kept.values()) == sum(t.nbytes for t in theta)
    ranges = sorted((phi.data_ptr(), phi.data_ptr() + phi.nbytes) for phi in slow.values("slow").values())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ranges))  # and none lies over another


def test_the_distance_is_that_of_theta_and_phi_just_before_a_sync():
    a, b, optimizer = two_weights()
    slow = SlowWeights(optimizer, k=2, measure_distance=True)
    push(optimizer, a=(a, -1.0), b=(b, -2.0))
    assert slow.last_distance is None
    push(optimizer, a=(a, -2.0), b=(b, -2.0))
    assert slow.last_distance == 5  # (3, 4) away


def test_a_learning_rate_scheduler_sees_no_difference():
    ours, plain = Problem(), Problem()
    SlowWeights(ours.optimizer, k=2)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(p.optimizer, 0.1, total_steps=9) for p in (ours, plain)]
    for index in range(8):
        for problem, scheduler in zip((ours, plain), schedulers, strict=True):
            problem.step(index)
            scheduler.step()
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()
