"""Which parameters have slow weights, and from when on."""

import copy

import pytest
import torch
from torch import nn

from lightning_lookahead import SlowWeights
from tests.helpers.oracle import lookahead
from tests.helpers.problem import Problem, push, slow_values, two_weights
from tests.helpers.runs import equal


def test_a_parameter_without_gradient_at_the_sync_step_is_synced():
    a, b, optimizer = two_weights()
    SlowWeights(optimizer, k=2, alpha=0.5)
    push(optimizer, a=(a, -1.0), b=(b, -1.0))
    push(optimizer, a=(a, -1.0), b=(b, None))
    assert (a.item(), b.item()) == (2.0, 1.5)


def test_a_parameter_whose_first_gradient_comes_late_is_not_pulled_to_zero():
    a, b, optimizer = two_weights()
    SlowWeights(optimizer, k=2, alpha=0.5)
    for gradient in (None, None, None, -1.0):
        push(optimizer, a=(a, -1.0), b=(b, gradient))
    assert b.item() == 1.5


def test_a_frozen_parameter_is_never_touched_and_joins_when_it_is_unfrozen():
    a, b, optimizer = two_weights()
    b.requires_grad_(False)
    slow = SlowWeights(optimizer, k=2, alpha=0.5)
    assert list(slow.values("slow")) == [a]
    push(optimizer, a=(a, -1.0))
    with torch.no_grad():
        b.fill_(5.0)
    push(optimizer, a=(a, -1.0))
    assert b.item() == 5.0
    push(optimizer, a=(a, -1.0))
    b.requires_grad_(True)
    push(optimizer, a=(a, -1.0), b=(b, -1.0))  # one step of b from 5, in the middle of a cycle
    assert b.item() == 5.5


@pytest.mark.parametrize("trained_first", [True, False])
def test_what_had_a_gradient_in_a_cycle_is_pulled_back_whether_it_is_frozen_since_or_was_before(trained_first):
    a, b, optimizer = two_weights()
    slow = SlowWeights(optimizer, k=2, alpha=0.5)
    for trained in (trained_first, not trained_first):
        b.requires_grad_(trained)
        push(optimizer, a=(a, -1.0), b=(b, -1.0 if trained else None))
        b.requires_grad_(False)
    assert (a.item(), b.item()) == (2.0, 1.5)
    with slow.use("slow"):
        assert b.item() == 1.5


def test_what_had_no_gradient_in_a_cycle_keeps_the_value_that_was_written_into_it():
    a, b, optimizer = two_weights()
    slow = SlowWeights(optimizer, k=2, alpha=0.5)
    for step in range(4):
        push(optimizer, a=(a, -1.0), b=(b, -1.0 if step < 2 else None))
        if step == 2:  # of an average of another network, say
            b.requires_grad_(False)
            with torch.no_grad():
                b.fill_(7.0)
    assert b.item() == slow.values("slow")[b].item() == 7.0


def test_an_added_group_starts_its_phi_when_it_appears():
    a, b, _ = two_weights()
    optimizer = torch.optim.SGD([a], lr=1.0)
    SlowWeights(optimizer, k=2, alpha=0.5)
    push(optimizer, a=(a, -1.0))
    with torch.no_grad():
        b.fill_(9.0)
    optimizer.add_param_group({"params": [b]})
    push(optimizer, a=(a, -1.0), b=(b, -1.0))
    assert (a.item(), b.item()) == (2.0, 9.5)


def test_tied_parameters_count_once():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    slow = SlowWeights(torch.optim.SGD(net.parameters(), lr=0.1))
    assert len(slow.values("slow")) == 3


def test_two_parameters_on_one_storage_are_one():
    a, b = nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([0.0]))
    b.data = a.data
    optimizer = torch.optim.SGD([a, b], lr=1.0)
    slow = SlowWeights(optimizer, k=2, alpha=0.5)
    push(optimizer, a=(a, -1.0), b=(b, None))
    with slow.use("slow"):
        assert (a.item(), b.item()) == (1.0, 1.0)
    assert (a.item(), b.item()) == (2.0, 2.0)
    push(optimizer, a=(a, None), b=(b, -1.0))
    assert (a.item(), b.item()) == (2.0, 2.0)


def test_a_parameter_put_in_anothers_place_joins_at_the_next_sync():
    a, b, optimizer = two_weights()
    slow = SlowWeights(optimizer, k=2, alpha=0.5)
    new = nn.Parameter(torch.tensor([7.0]))
    push(optimizer, a=(a, -1.0), b=(b, -1.0))
    optimizer.param_groups[0]["params"][1] = new
    push(optimizer, a=(a, -1.0), new=(new, -1.0))
    assert (a.item(), new.item()) == (2.0, 8.0)
    for _ in range(2):
        push(optimizer, a=(a, -1.0), new=(new, -1.0))
    assert new.item() == 9.0
    assert b not in slow.values("slow")


def test_a_parameter_put_into_the_list_of_a_group_joins_at_the_next_sync():
    a, b, optimizer = two_weights()
    slow = SlowWeights(optimizer, k=2, alpha=0.5)
    new = nn.Parameter(torch.tensor([7.0]))
    push(optimizer, a=(a, -1.0), b=(b, -1.0))
    optimizer.param_groups[0]["params"].append(new)
    push(optimizer, a=(a, -1.0), b=(b, -1.0), new=(new, -1.0))
    assert (a.item(), new.item()) == (2.0, 8.0)
    for _ in range(2):
        push(optimizer, a=(a, -1.0), b=(b, -1.0), new=(new, -1.0))
    assert new.item() == 9.0
    del optimizer.param_groups[0]["params"][1]
    push(optimizer, a=(a, -1.0), new=(new, -1.0))
    slow.sync()
    assert set(slow.values("slow")) == {a, new}


def test_buffers_are_left_alone():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    slow = SlowWeights(optimizer, k=1)
    net(torch.randn(8, 3)).sum().backward()
    before = copy.deepcopy(dict(net.named_buffers()))
    optimizer.step()
    with slow.use("slow"):
        assert all(torch.equal(before[name], value) for name, value in net.named_buffers())
    assert all(torch.equal(before[name], value) for name, value in net.named_buffers())


def test_parameters_that_are_all_frozen_at_first_get_slow_weights_where_they_are_unfrozen():
    problem, reference = Problem(), Problem()
    problem.net.requires_grad_(False)
    slow = SlowWeights(problem.optimizer, k=2)
    assert slow.values("slow") == {}
    problem.optimizer.step()
    with slow.use("slow"):
        pass
    assert slow.steps == 0
    problem.net.requires_grad_(True)
    for index in range(5):
        problem.step(index)
    phi = lookahead(reference.parameters, reference.step, k=2, alpha=0.5, steps=5)
    assert equal(problem.parameters, reference.parameters)
    assert equal(slow_values(slow), phi)
