"""State dicts of plain loops: what they hold, and what becomes of it when it is loaded."""

import copy
import io
import pickle
import sys

import pytest
import torch
from torch import nn

from lightning_lookahead import SlowWeights
from tests.helpers.oracle import lookahead
from tests.helpers.problem import DOUBLE, Problem, push, slow_values
from tests.helpers.runs import equal


def calls_to_go_on(count):
    """Calls, of Python's functions and of C's, from a saved state of so many tensors to the first look at it."""

    def build():
        weights = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(count))
        optimizer = torch.optim.SGD(weights, lr=0.1)
        return weights, optimizer, SlowWeights(optimizer, k=3, module=weights, model_weights="slow")

    weights, optimizer, slow = build()
    sum(weight.sum() for weight in weights).backward()
    optimizer.step()
    with slow.use("slow"):
        saved = copy.deepcopy([weights.state_dict(), optimizer.state_dict(), slow.state_dict()])
    calls = 0

    def count_call(_, event, __):
        nonlocal calls
        calls += event in {"call", "c_call"}

    weights, optimizer, slow = build()
    weights.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    before = sys.getprofile()
    sys.setprofile(count_call)
    try:
        slow.load_state_dict(saved[2])
        slow.values("slow")
    finally:
        sys.setprofile(before)
    assert weights[0].item() == pytest.approx(0.9)  # theta is in its place
    return calls


def test_what_loading_takes_grows_as_the_number_of_tensors_does():
    few, twice, more = (calls_to_go_on(count) for count in (100, 200, 400))
    assert more - twice <= 2.1 * (twice - few)


@pytest.mark.parametrize("order", ["model, optimizer", "optimizer, model", "before there are slow weights"])
@pytest.mark.parametrize("offset", range(4))
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_a_plain_loop_resumes_from_files_in_any_order(optimizer_class, offset, order):
    problem = Problem(optimizer_class)
    slow = SlowWeights(problem.optimizer, k=3)
    for index in range(3 + offset):
        problem.step(index)
    file = io.BytesIO()
    torch.save([problem.net.state_dict(), problem.optimizer.state_dict(), slow.state_dict()], file)
    for index in range(3 + offset, 10):
        problem.step(index)

    file.seek(0)
    model_state, optimizer_state, counters = torch.load(file, weights_only=True)
    resumed = Problem(optimizer_class)
    with torch.no_grad():
        for parameter in resumed.parameters:
            parameter.fill_(7.0)
    if order == "before there are slow weights":
        resumed.optimizer.load_state_dict(optimizer_state)
    again = SlowWeights(resumed.optimizer, k=3)
    if order == "optimizer, model":
        resumed.optimizer.load_state_dict(optimizer_state)
    resumed.net.load_state_dict(model_state)
    if order == "model, optimizer":
        resumed.optimizer.load_state_dict(optimizer_state)
    again.load_state_dict(counters)
    for index in range(3 + offset, 10):
        resumed.step(index)
    assert equal(resumed.parameters, problem.parameters)
    assert equal(slow_values(again), slow_values(slow))
    assert not any("lookahead" in key for state in resumed.optimizer.state.values() for key in state)


def test_a_state_dict_holds_no_live_tensor_of_ours_and_loading_leaves_it_as_it_was():
    problem = Problem(torch.optim.Adam)
    slow = SlowWeights(problem.optimizer, k=5)
    problem.step(0)
    state = slow.state_dict()
    live = {t.data_ptr() for weights in ("slow", "fast") for t in slow.values(weights).values()}
    assert list(state["weights"]) == ["slow"]
    assert list(state["weights"]["slow"]) == ["[0]", "[1]", "[2]", "[3]"]
    assert live.isdisjoint(value.data_ptr() for value in state["weights"]["slow"].values())
    snapshot = copy.deepcopy(state)
    for _ in range(2):
        slow.load_state_dict(state)
        slow.swap_to("fast")
        assert state.keys() == snapshot.keys()
        assert equal(state["weights"]["slow"].values(), snapshot["weights"]["slow"].values())


def test_an_optimizers_state_and_its_state_dict_are_what_they_are_without_us():
    for optimizer_class in (torch.optim.SGD, torch.optim.Adam):
        ours, plain = Problem(optimizer_class), Problem(optimizer_class)
        SlowWeights(ours.optimizer, k=2, alpha=1.0)
        for problem in (ours, plain):
            for index in range(3):
                problem.step(index)
        state, expected = ours.optimizer.state_dict(), plain.optimizer.state_dict()
        assert state["param_groups"] == expected["param_groups"]
        assert state["state"].keys() == expected["state"].keys()
        for index, entry in expected["state"].items():
            assert list(state["state"][index]) == list(entry)
            assert all(torch.equal(value, state["state"][index][name]) for name, value in entry.items())


def test_a_saved_optimizer_loads_into_one_without_lookahead_and_trains_on():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Adam([a, b])
    SlowWeights(optimizer, k=5)
    push(optimizer, a=(a, 1.0))  # b has no state yet, and Adam must still find none
    plain = torch.optim.Adam([a, b])
    plain.load_state_dict(optimizer.state_dict())
    push(plain, a=(a, 1.0), b=(b, 1.0))
    assert plain.state[b]["step"] == 1


def test_weights_changed_while_loading_are_what_training_goes_on_with():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=5, model_weights="slow")
    problem.step(0)
    with slow.use("slow"):
        model_state = copy.deepcopy(problem.net.state_dict())
    state = slow.state_dict()
    resumed = Problem()
    again = SlowWeights(resumed.optimizer, k=5, model_weights="slow")
    again.load_state_dict(state)
    model_state["0.weight"] *= 2
    resumed.net.load_state_dict(model_state)
    with pytest.warns(UserWarning, match="1 of 4 parameters"):
        again.swap_to("fast")
    assert torch.equal(resumed.net[0].weight, model_state["0.weight"])
    assert torch.equal(slow_values(again)[0], model_state["0.weight"])
    assert equal(resumed.parameters[1:], problem.parameters[1:])
    assert not equal(resumed.parameters[1:], slow_values(again)[1:])


def test_the_state_of_another_model_is_refused_and_changes_nothing():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=5)
    problem.step(0)
    theta, phi = problem.values(), slow_values(slow)
    wider = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).to(DOUBLE)
    other = torch.optim.SGD(wider.parameters(), lr=0.1)
    wide = SlowWeights(other)
    wider(problem.inputs[0]).sum().backward()
    other.step()
    with pytest.raises(ValueError, match=r"of shape \(8, 3\) for parameter '\[0\]' of shape .* of another model"):
        slow.load_state_dict(wide.state_dict())
    shallow = torch.optim.SGD(wider[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match="parameter group"):
        problem.optimizer.load_state_dict(shallow.state_dict())
    assert equal(problem.parameters, theta)
    assert equal(slow_values(slow), phi)
    assert wide.steps == 1


def test_the_keys_of_a_state_dict_do_not_depend_on_what_has_happened():
    problem = Problem(torch.optim.Adam)
    slow = SlowWeights(problem.optimizer, k=2, pullback_momentum="pullback")
    seen = []
    for index in range(3):
        state = slow.state_dict()
        seen.append((list(state), list(state["weights"]["slow"]), list(state["momentum"]["exp_avg"])))
        problem.step(index)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("order", ["model, slow", "slow, model"])
def test_the_first_gradient_after_loading_is_that_of_the_fast_weights(order, given):
    def make():
        problem = Problem()
        module = {"module": problem.net} if given else {}
        return problem, SlowWeights(problem.optimizer, k=2, model_weights="slow", **module)

    def step(problem, index):  # without a closure, which would be called when all is in its place
        problem.optimizer.zero_grad()
        (problem.net(problem.inputs[index]) - 1).square().mean().backward()
        problem.optimizer.step()

    problem, slow = make()
    for index in range(3):
        step(problem, index)
    with slow.use("slow"):
        saved = copy.deepcopy((problem.net.state_dict(), problem.optimizer.state_dict(), slow.state_dict()))
    step(problem, 3)
    resumed, again = make()
    resumed.optimizer.load_state_dict(saved[1])
    if order == "model, slow":
        resumed.net.load_state_dict(saved[0])
        again.load_state_dict(saved[2])
    else:
        again.load_state_dict(saved[2])
        resumed.net.load_state_dict(saved[0])
        if not given:  # nobody tells: rather than to go on from a wrong gradient
            with pytest.raises(RuntimeError, match=r"Call swap_to\('fast'\) when all is loaded"):
                step(resumed, 3)
            again.swap_to("fast")
    step(resumed, 3)
    assert equal(resumed.parameters, problem.parameters)
    assert equal(slow_values(again), slow_values(slow))


def test_a_copied_or_pickled_module_no_longer_tells_of_its_loading():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=5, module=problem.net)
    before = slow_values(slow)
    for twin in (copy.deepcopy(problem.net), pickle.loads(pickle.dumps(problem.net))):
        twin.load_state_dict({name: value * 2 for name, value in twin.state_dict().items()})
    assert equal(slow_values(slow), before)
    slow.close()
    assert not problem.net._load_state_dict_post_hooks


def test_loading_while_the_slow_weights_are_in_place_ends_the_swap():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=5)
    problem.step(0)
    state, model_state = slow.state_dict(), copy.deepcopy(problem.net.state_dict())
    theta, phi = problem.values(), slow_values(slow)
    with slow.use("slow"):
        problem.net.load_state_dict(model_state)
        slow.load_state_dict(state)
    assert equal(problem.parameters, theta)
    assert equal(slow_values(slow), phi)


def test_bad_counters_are_refused_and_change_nothing():
    problem = Problem()
    slow = SlowWeights(problem.optimizer)
    problem.step(0)
    before = slow.persistence.counters()
    for bad in ({}, {**before, "steps": -1}, {**before, "syncs": 1.5}, {**before, "steps_since_sync": True}):
        with pytest.raises(ValueError, match="must be an integer of at least 0"):
            slow.load_state_dict(bad)
    with pytest.raises(ValueError, match="steps_since_sync=5 and steps=1; it cannot be more"):
        slow.load_state_dict({**before, "steps_since_sync": 5})
    for bad in ({"weights": [1]}, {"weights": {"slow": {"[0]": 3}}}, {"checksums": {"slow": {"[0]": "a"}}}):
        with pytest.raises(ValueError, match="is damaged: it must be a dict of"):
            slow.load_state_dict({**before, **bad})
    assert slow.persistence.counters() == before


def test_more_syncs_than_steps_are_no_damage():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    slow = SlowWeights(torch.optim.SGD([{"params": weights[:1], "lookahead_k": 1}, {"params": weights[1:]}], lr=0.1))
    slow.sync()
    slow.sync()
    assert slow.persistence.counters()["groups"] == [{"steps_since_sync": 0, "syncs": 2}]
    slow.load_state_dict(slow.state_dict())
    assert slow.syncs == 2


def test_other_settings_in_a_checkpoint_give_way_with_one_warning():
    problem = Problem()
    saved = SlowWeights(problem.optimizer, k=5, alpha=0.5).state_dict()
    slow = SlowWeights(Problem().optimizer, k=3, alpha=0.8)
    with pytest.warns(UserWarning, match=r"k was 5 and is 3; alpha was 0.5 and is 0.8") as caught:
        slow.load_state_dict(saved)
    assert len(caught) == 1
    assert (slow.settings.k, slow.settings.alpha) == (3, 0.8)


def test_fabric_syncs_by_itself_and_resumes():
    from lightning.fabric import Fabric  # noqa: PLC0415 (the module under test must do without)

    fabric = Fabric(accelerator="cpu", devices=1)

    def prepare():
        problem = Problem(torch.optim.Adam)
        problem.net, problem.optimizer = fabric.setup(problem.net, problem.optimizer)
        return problem, SlowWeights(problem.optimizer, k=2)

    def step(problem, index):
        problem.optimizer.zero_grad()
        fabric.backward((problem.net(problem.inputs[index]) - 1).square().mean())
        problem.optimizer.step()

    problem, slow = prepare()
    for index in range(3):
        step(problem, index)
    fabric.save("state.ckpt", {"net": problem.net, "optimizer": problem.optimizer, "slow": slow})
    resumed, again = prepare()
    fabric.load("state.ckpt", {"net": resumed.net, "optimizer": resumed.optimizer, "slow": again})
    reference = Problem(torch.optim.Adam)
    phi = lookahead(reference.parameters, reference.step, k=2, alpha=0.5, steps=5)
    for index in (3, 4):
        step(problem, index)
        step(resumed, index)
    for net, weights in ((problem, slow), (resumed, again)):
        assert equal(net.parameters, reference.parameters)
        assert equal(slow_values(weights), phi)
