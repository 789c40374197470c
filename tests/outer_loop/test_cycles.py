"""Cycles of groups with settings of their own, and syncs by hand."""

import copy

import pytest
import torch
from torch import nn

from lightning_lookahead import SlowWeights
from tests.helpers.oracle import lookahead
from tests.helpers.problem import Problem, slow_values
from tests.helpers.runs import equal


def test_a_sync_by_hand_begins_a_new_cycle():
    problem, other = Problem(), Problem()
    slow = SlowWeights(problem.optimizer, k=3)
    for index in range(2):
        problem.step(index)
    slow.sync()
    for index in range(2, 5):
        problem.step(index)
    phi = lookahead(other.parameters, other.step, k=2, alpha=0.5, steps=2)
    phi = lookahead(other.parameters, lambda index: other.step(2 + index), k=3, alpha=0.5, steps=3)
    assert equal(problem.parameters, other.parameters)
    assert equal(slow_values(slow), phi)
    assert slow.syncs == 2


def test_a_group_with_a_bad_value_is_refused():
    for wrong in ({"lookahead_k": 0}, {"lookahead_alpha": 2.0}):
        ((name, value),) = wrong.items()
        optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], **wrong}], lr=0.1)
        with pytest.raises(ValueError, match=f"{name}={value} is out of range"):
            SlowWeights(optimizer)


def test_a_sync_before_the_first_cycle_leaves_its_beginning_where_it_is():
    problem, other = Problem(), Problem()
    slow, plain = (SlowWeights(it.optimizer, k=3, start_step=5) for it in (problem, other))
    for index in range(10):
        if index == 2:
            slow.sync()
        problem.step(index)
        other.step(index)
    assert equal(problem.parameters, other.parameters)
    assert (plain.syncs, slow.syncs) == (1, 2)


def test_a_group_s_own_settings_are_those_of_the_run_and_not_of_the_file():
    def build(own):
        torch.manual_seed(3)
        weights = [nn.Parameter(torch.randn(2)) for _ in range(2)]
        optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:], **own}], lr=0.1)
        return optimizer, SlowWeights(optimizer, k=3)

    saved, slow = build({"lookahead_k": 4})
    optimizer, other = build({"lookahead_k": 2})
    with pytest.warns(UserWarning, match="'lookahead_k': 4.*'lookahead_k': 2"):
        optimizer.load_state_dict(saved.state_dict())
    other.load_state_dict(slow.state_dict())
    assert optimizer.param_groups[1]["lookahead_k"] == 2
    assert [cycle.ends for cycle in other.cycles] == [3, 2]
    bare, third = build({})
    with pytest.warns(UserWarning, match="settings of a group"):
        optimizer.load_state_dict(bare.state_dict())
    assert optimizer.param_groups[1]["lookahead_k"] == 2
    assert third.syncs == 0


def test_a_group_that_was_added_is_resumed_in_its_cycle():
    def build():
        torch.manual_seed(3)
        first, second = nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(2))
        optimizer = torch.optim.SGD([first], lr=0.1)
        return first, second, optimizer, SlowWeights(optimizer, k=10)

    def step(optimizer, *weights):
        optimizer.zero_grad()
        sum((weight**2).sum() for weight in weights).backward()
        optimizer.step()

    first, second, optimizer, slow = build()
    for _ in range(3):
        step(optimizer, first, second)
    optimizer.add_param_group({"params": [second], "lookahead_k": 2})
    step(optimizer, first, second)
    saved = copy.deepcopy(([first.data, second.data], optimizer.state_dict(), slow.state_dict()))
    twin_first, twin_second, twin, other = build()
    twin.add_param_group({"params": [twin_second], "lookahead_k": 2})
    for parameter, value in zip((twin_first, twin_second), saved[0], strict=True):
        parameter.data.copy_(value)
    twin.load_state_dict(saved[1])
    other.load_state_dict(saved[2])
    for _ in range(4):
        step(optimizer, first, second)
        step(twin, twin_first, twin_second)
    assert torch.equal(second, twin_second)
    assert torch.equal(first, twin_first)
