import ast
import copy
import inspect
import io
import pickle
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_lookahead import SlowWeights, slow_weights
from tests.helpers.oracle import lookahead

DOUBLE = torch.float64
OPTIMIZERS = [
    entry
    for entry in vars(torch.optim).values()
    if inspect.isclass(entry) and issubclass(entry, torch.optim.Optimizer) and entry is not torch.optim.Optimizer
]


class Problem:
    """A small network whose gradient depends on the step, the same for every object that is made."""

    def __init__(self, optimizer_class=torch.optim.SGD, **settings):
        torch.manual_seed(1)
        sparse = optimizer_class is torch.optim.SparseAdam
        if sparse:
            self.net = nn.Embedding(5, 3, sparse=True, dtype=DOUBLE)
        elif optimizer_class is torch.optim.Muon:  # takes matrices only
            self.net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False)).to(DOUBLE)
        else:
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(DOUBLE)
        settings.setdefault("lr", 0.05)
        self.optimizer = optimizer_class(self.net.parameters(), **settings)
        self.closures = 0
        inputs = torch.Generator().manual_seed(2)
        self.inputs = [
            torch.randint(5, (4,), generator=inputs) if sparse else torch.randn(4, 3, dtype=DOUBLE, generator=inputs)
            for _ in range(50)
        ]

    def step(self, index):
        def closure():
            self.closures += 1
            self.optimizer.zero_grad()
            loss = (self.net(self.inputs[index]) - 1).square().mean()
            loss.backward()
            return loss

        self.optimizer.step(closure)

    @property
    def parameters(self):
        return list(self.net.parameters())

    def values(self):
        return [parameter.detach().clone() for parameter in self.parameters]


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def slow_values(slow):
    return [value.detach().clone() for value in slow.values("slow").values()]


# -- trajectory


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


# -- which parameters


def two_weights(**settings):
    weights = [nn.Parameter(torch.tensor([1.0])), nn.Parameter(torch.tensor([1.0]))]
    return (*weights, torch.optim.SGD(weights, lr=1.0, **settings))


def push(optimizer, **gradients):
    for parameter, gradient in gradients.values():
        parameter.grad = None if gradient is None else torch.tensor([gradient])
    optimizer.step()


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


# -- counting


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

    monkeypatch.setattr("lightning_lookahead._pairs.seem_finite", lambda _: True)  # which reads sums of weights
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
    more = {"trained": ["[0]"], "idle": [], "saved_with": "fast", "slow_dtype": None}
    assert slow.counters() == {**counters, **more}


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


# -- either set of weights


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


# -- the laws, over arbitrary histories


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["step", "swap", "save", "copy"]), max_size=25),
    st.integers(1, 6),
    st.sampled_from([0.25, 0.5, 0.8, 1.0]),
    st.sampled_from([torch.optim.SGD, torch.optim.Adam]),
    st.sampled_from([None, "slow", "fast"]),
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
                slow.put("slow")
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
            slow.put("fast")  # the first use puts both sets in their places
    phi = lookahead(reference.parameters, reference.step, k=k, alpha=alpha, steps=steps)
    assert equal(problem.parameters, reference.parameters)
    assert equal(slow_values(slow), phi)
    assert (slow.steps, slow.syncs) == (steps, steps // k)


# -- saving


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
        slow.put("fast")
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
        again.put("fast")
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
            with pytest.raises(RuntimeError, match=r"Call put\('fast'\) when all is loaded"):
                step(resumed, 3)
            again.put("fast")
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
    before = slow.counters()
    for bad in ({}, {**before, "steps": -1}, {**before, "syncs": 1.5}, {**before, "steps_since_sync": True}):
        with pytest.raises(ValueError, match="must be an integer of at least 0"):
            slow.load_state_dict(bad)
    with pytest.raises(ValueError, match="steps_since_sync=5 and steps=1; it cannot be more"):
        slow.load_state_dict({**before, "steps_since_sync": 5})
    for bad in ({"weights": [1]}, {"weights": {"slow": {"[0]": 3}}}, {"checksums": {"slow": {"[0]": "a"}}}):
        with pytest.raises(ValueError, match="is damaged: it must be a dict of"):
            slow.load_state_dict({**before, **bad})
    assert slow.counters() == before


def test_more_syncs_than_steps_are_no_damage():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    slow = SlowWeights(torch.optim.SGD([{"params": weights[:1], "lookahead_k": 1}, {"params": weights[1:]}], lr=0.1))
    slow.sync()
    slow.sync()
    assert slow.counters()["groups"] == [{"steps_since_sync": 0, "syncs": 2}]
    slow.load_state_dict(slow.state_dict())
    assert slow.syncs == 2


def test_other_settings_in_a_checkpoint_give_way_with_one_warning():
    problem = Problem()
    saved = SlowWeights(problem.optimizer, k=5, alpha=0.5).state_dict()
    slow = SlowWeights(Problem().optimizer, k=3, alpha=0.8)
    with pytest.warns(UserWarning, match=r"k was 5 and is 3; alpha was 0.5 and is 0.8") as caught:
        slow.load_state_dict(saved)
    assert len(caught) == 1
    assert (slow.k, slow.alpha) == (3, 0.8)


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


# -- copies, hooks


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_trains_on_by_itself(duplicate):
    problem = Problem(torch.optim.Adam)
    slow = SlowWeights(problem.optimizer, k=2)
    problem.step(0)
    twin, twin_slow = duplicate((problem, slow))
    before = problem.values()
    for index in range(1, 5):
        twin.step(index)
    assert twin_slow.syncs == 2
    assert (slow.steps, slow.syncs) == (1, 0)
    assert equal(problem.parameters, before)
    for index in range(1, 5):
        problem.step(index)
    assert equal(problem.parameters, twin.parameters)
    assert equal(slow_values(slow), slow_values(twin_slow))


def hooks(optimizer):
    return sum(len(entry) for name, entry in vars(optimizer).items() if name.startswith("_optimizer_"))


def test_close_ends_counting_leaves_no_hook_and_keeps_both_sets():
    problem = Problem()
    before = hooks(problem.optimizer)
    slow = SlowWeights(problem.optimizer, k=2)
    problem.step(0)
    slow.close()
    assert hooks(problem.optimizer) == before
    theta, phi = problem.values(), slow_values(slow)
    problem.step(1)
    assert (slow.steps, slow.syncs) == (1, 0)
    assert not equal(problem.parameters, theta)
    assert equal(slow_values(slow), phi)
    with slow.use("slow"):
        assert equal(problem.parameters, phi)


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


def test_a_learning_rate_scheduler_sees_no_difference():
    ours, plain = Problem(), Problem()
    SlowWeights(ours.optimizer, k=2)
    schedulers = [torch.optim.lr_scheduler.OneCycleLR(p.optimizer, 0.1, total_steps=9) for p in (ours, plain)]
    for index in range(8):
        for problem, scheduler in zip((ours, plain), schedulers, strict=True):
            problem.step(index)
            scheduler.step()
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr()


# -- what may be given


@pytest.mark.parametrize("k", [0, -1, 2.0, "5", None, True])
def test_a_bad_k_is_refused(k):
    with pytest.raises(ValueError, match=r"k=.* integer of at least 1"):
        SlowWeights(Problem().optimizer, k=k)


@pytest.mark.parametrize("alpha", [0, -0.5, 1.01, float("nan"), float("inf"), "0.5", None, True])
def test_a_bad_alpha_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha=.*\(0, 1\]"):
        SlowWeights(Problem().optimizer, alpha=alpha)


def test_optimizers_that_cannot_be_looked_ahead_with_are_refused():
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    with pytest.raises(TypeError, match="must be a torch.optim.Optimizer"):
        SlowWeights([frozen])

    class Lookahead(torch.optim.SGD):
        pass

    class ZeroRedundancyOptimizer(torch.optim.SGD):
        _overlap_with_ddp = True

    with pytest.raises(ValueError, match="meta device"):
        SlowWeights(torch.optim.SGD(nn.Linear(2, 2, device="meta").parameters()))
    for refused, reason in (
        (Lookahead, "pull back twice"),
        (ZeroRedundancyOptimizer, "moves the weights within the backward"),
    ):
        with pytest.raises(ValueError, match=reason):
            SlowWeights(refused([nn.Parameter(torch.ones(1))]))


def test_a_second_one_on_the_same_optimizer_is_refused_until_the_first_is_closed():
    problem = Problem()
    first = SlowWeights(problem.optimizer)
    with pytest.raises(ValueError, match="has slow weights already"):
        SlowWeights(problem.optimizer)
    first.close()
    SlowWeights(problem.optimizer)


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="model_weights='ema' is unknown"):
        SlowWeights(Problem().optimizer, model_weights="ema")
    slow = SlowWeights(Problem().optimizer)
    with pytest.raises(ValueError, match="'ema' is unknown: give 'slow'"):
        slow.put("ema")


def test_the_module_imports_torch_and_nothing_of_lightning():
    tree = ast.parse(inspect.getsource(slow_weights))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(name.split(".")[0] in {"lightning", "pytorch_lightning"} for name in imported)
    program = (
        "import sys; from lightning_lookahead import SlowWeights;"
        "sys.exit(any(n.startswith(('lightning.', 'pytorch_lightning')) for n in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# -- in other people's optimizers


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


class Decayed(torch.optim.SGD):
    """Extends ``super().step()``, after which it moves the weights once more."""

    raises = False

    @torch.no_grad()
    def step(self, closure=None):
        loss = super().step(closure)
        if self.raises:
            raise ZeroDivisionError
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        return loss


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


def test_an_optimizer_goes_from_one_to_the_next_and_each_starts_its_own_phi():
    problem = Problem()
    first = SlowWeights(problem.optimizer, k=3)
    problem.step(0)
    first.close()
    start = problem.values()
    second = SlowWeights(problem.optimizer, k=3)
    problem.step(1)
    assert equal(slow_values(second), start)
    assert second.steps == 1
