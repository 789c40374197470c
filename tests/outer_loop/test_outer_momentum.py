"""Momentum in the outer loop: torch's SGD on phi, with the way from theta to phi for the gradient."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_lookahead import AdaptiveAlpha, Linear, LookaheadCallback, SlowWeights
from lightning_lookahead._arguments import largest_alpha
from lightning_lookahead.outer_loop import tensors
from lightning_lookahead.outer_loop.algorithm import outer_step
from lightning_lookahead.outer_loop.settings import Settings
from lightning_lookahead.outer_loop.tensors import OuterMomentum
from lightning_lookahead.theory.noisy_quadratic import outer_matrix
from tests.helpers.problem import Problem, push, slow_values, two_weights
from tests.helpers.runs import equal

SHAPES = [(3,), (4, 5), (), (300, 400), (9000,), (0, 2), (1000, 700)]


class Network:
    """Weights of many shapes under Adam; the gradient is the same for every object that is made."""

    def __init__(self, dtype):
        torch.manual_seed(0)
        self.weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
        self.optimizer = torch.optim.Adam(self.weights, lr=0.01)
        self.generator = torch.Generator().manual_seed(1)

    def step(self):
        for weight in self.weights:
            weight.grad = torch.randn(weight.shape, generator=self.generator).to(weight.dtype)
        self.optimizer.step()


def by_sgd(network, steps, k, alphas, mu, *, nesterov):
    """theta and phi where torch's SGD takes the outer steps."""
    phi = [nn.Parameter(weight.detach().clone()) for weight in network.weights]
    outer = torch.optim.SGD(phi, momentum=mu, nesterov=nesterov, foreach=False)
    for step in range(1, steps + 1):
        network.step()
        if step % k == 0:
            for slow, fast in zip(phi, network.weights, strict=True):
                slow.grad = slow.detach() - fast.detach()
            outer.param_groups[0]["lr"] = alphas(step // k - 1)
            outer.step()
            with torch.no_grad():
                for slow, fast in zip(phi, network.weights, strict=True):
                    fast.copy_(slow)
    return network.weights, phi, [outer.state[slow].get("momentum_buffer") for slow in phi]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("alpha", [0.7, Linear(1.2, 0.3, 3)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_phi_and_b_are_the_parameter_and_the_buffer_of_torchs_sgd(dtype, nesterov, alpha, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        network = Network(dtype)
        slow = SlowWeights(
            network.optimizer,
            k=2,
            alpha=alpha,
            outer_momentum=0.9,
            outer_nesterov=nesterov,
            slow_dtype=str(dtype).removeprefix("torch."),
        )
        for _ in range(11):
            network.step()
        alphas = alpha if callable(alpha) else lambda _: alpha
        theta, phi, b = by_sgd(Network(dtype), 11, 2, alphas, 0.9, nesterov=nesterov)
    finally:
        torch.set_num_threads(before)
    assert slow.syncs == 5
    assert equal(network.weights, theta)
    assert equal(slow_values(slow), phi)
    assert equal(slow.pairs.outer_momentum.b.values(), b)


def test_known_numbers():
    a, b, optimizer = two_weights()
    slow = SlowWeights(optimizer, k=1, alpha=0.5, outer_momentum=0.5)
    push(optimizer, a=(a, 0.5), b=(b, -1.0))  # theta .5 and 2: s .5 and -1, b the same, s + b / 2 is .75 and -1.5
    assert (a.item(), b.item()) == (1 - 0.375, 1 + 0.75)
    push(optimizer, a=(a, 0.5), b=(b, 0.0))  # s .5 and 0, b .75 and -.5, s + b / 2 is .875 and -.25
    assert (a.item(), b.item()) == (0.625 - 0.4375, 1.75 + 0.125)
    assert [one.item() for one in slow.pairs.outer_momentum.b.values()] == [0.75, -0.5]


def test_known_numbers_of_heavy_ball():
    a, b, optimizer = two_weights()
    SlowWeights(optimizer, k=1, alpha=0.5, outer_momentum=0.5, outer_nesterov=False)
    push(optimizer, a=(a, 0.5), b=(b, -1.0))
    assert (a.item(), b.item()) == (0.75, 1.5)
    push(optimizer, a=(a, 0.5), b=(b, 0.0))  # b is .75 and -.5
    assert (a.item(), b.item()) == (0.75 - 0.375, 1.5 + 0.25)


def test_large_weights_move_in_portions(monkeypatch):
    """Where no buckets are, on a GPU, say: so that the way from theta to phi needs little memory."""
    torch.manual_seed(0)
    fast, slow, b = ([torch.randn(shape) for shape in SHAPES] for _ in range(3))
    found = []
    for size in (1, 5000, tensors.PORTION):
        monkeypatch.setattr(tensors, "PORTION", size)
        own = [[one.clone() for one in of] for of in (fast, slow, b)]
        outer_step(own[0], own[1], 0.7, OuterMomentum(own[2], 0.9, nesterov=True))
        found.append([*own[0], *own[1], *own[2]])
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])
    assert not equal(found[0][: len(fast)], fast)


# -- options


def test_without_momentum_nothing_of_it_is_in_a_checkpoint_and_no_memory_is_taken():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=2, outer_nesterov=False)
    for index in range(5):
        problem.step(index)
    assert not [key for key in slow.state_dict() if "outer" in key or key == "momentum"]
    assert not slow.pairs.outer_momentum.b


def test_the_buffer_is_one_more_copy_from_the_first_sync_on():
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=2, outer_momentum=0.9)
    problem.step(0)
    assert not slow.pairs.outer_momentum.b
    for index in range(1, 5):
        problem.step(index)
    kept = [*slow.values("slow").values(), *slow.pairs.outer_momentum.b.values()]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept}
    assert sum(storages.values()) == 2 * sum(weight.nbytes for weight in problem.parameters)


@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_memory_does_not_grow_where_other_weights_are_idle_in_each_cycle(mu):
    weights = [nn.Parameter(torch.randn(50)) for _ in range(8)]
    optimizer = torch.optim.SGD(weights, lr=0.1)
    slow = SlowWeights(optimizer, k=1, outer_momentum=mu)
    for step in range(20):
        for index, weight in enumerate(weights):
            weight.grad = None if index in {step % 8, (3 * step + 1) % 8} else torch.ones_like(weight)
        optimizer.step()
    for kept in (slow.values("slow").values(), slow.pairs.outer_momentum.b.values()):
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in kept}
        assert sum(storages.values()) == (sum(weight.nbytes for weight in weights) if kept else 0)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mu", [0.1, 0.5, 0.9, 0.99])
def test_from_the_largest_alpha_on_the_outer_loop_diverges_where_the_inner_one_arrives(mu, nesterov):
    limit = largest_alpha(mu, nesterov=nesterov)
    for factor, converges in ((0.999, True), (1.001, False)):
        arrives = {"learning_rate": 1.0, "curvature": 1.0, "k": 1, "alpha": factor * limit}
        matrix = outer_matrix(**arrives, momentum=mu, nesterov=nesterov)
        assert (np.abs(np.linalg.eigvals(matrix)).max() < 1) == converges


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outer_momentum": 1.0}, r"outer_momentum=1.0 is out of range: it must be a number in \[0, 1\)"),
        ({"outer_momentum": -0.1}, "outer_momentum=-0.1 is out of range"),
        ({"outer_momentum": True}, "outer_momentum=True is out of range"),
        ({"outer_momentum": "0.9"}, "outer_momentum='0.9' is out of range"),
        ({"outer_momentum": float("nan")}, "outer_momentum=nan is out of range"),
        (
            {"outer_momentum": 0.9, "alpha": 1.4},
            r"alpha=1.4 is out of range: with an outer .*\(0, 1.357\)",
        ),
        ({"outer_momentum": 0.9, "alpha": 0.0}, "alpha=0.0 is out of range: with an outer momentum of 0.9"),
        ({"outer_momentum": 0.9, "alpha": Linear(1.4, 1, 2)}, "alpha at sync 0=1.4 is out of range"),
        ({"alpha": 1.1}, r"alpha=1.1 is out of range.*\(0, 1\]"),
        (
            {"outer_momentum": 0.5, "alpha": AdaptiveAlpha()},
            r"alpha=AdaptiveAlpha\(.*does not work with outer_momentum",
        ),
        ({"outer_momentum": 0.5, "pullback_momentum": "pullback"}, "pullback_momentum='pullback' does not work with"),
    ],
)
@pytest.mark.parametrize("make", [lambda **o: SlowWeights(Problem().optimizer, **o), LookaheadCallback])
def test_what_does_not_go_together_is_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_above_one_an_alpha_needs_momentum_in_a_group_and_in_a_schedule_too():
    problem = Problem()
    problem.optimizer.param_groups[0]["lookahead_alpha"] = 1.3
    with pytest.raises(ValueError, match="lookahead_alpha=1.3 is out of range"):
        SlowWeights(problem.optimizer)
    assert SlowWeights(problem.optimizer, outer_momentum=0.9).settings.takes_theta is False
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=1, alpha=Linear(1.0, 1.5, 2), outer_momentum=0.9)
    problem.step(0)
    problem.step(1)
    phi = slow_values(slow)
    with pytest.raises(ValueError, match="alpha at sync 2=1.5 is out of range"):
        problem.step(2)
    assert equal(slow_values(slow), phi)


def test_a_step_size_out_of_range_leaves_the_other_groups_as_they_were():
    a, b, _ = two_weights()
    optimizer = torch.optim.SGD([{"params": [a], "lookahead_alpha": 0.5}, {"params": [b]}], lr=1.0)
    SlowWeights(optimizer, k=1, alpha=lambda sync: 1.0 + sync, outer_momentum=0.5)
    push(optimizer, a=(a, -1.0), b=(b, -1.0))
    with pytest.raises(ValueError, match="alpha at sync 1=2.0 is out of range"):
        push(optimizer, a=(a, -1.0), b=(b, -1.0))
    assert a.item() == 1 + 0.5 * 1.5 + 1  # theta, not synced


def test_numbers_of_numpy_are_numbers():
    settings = Settings(outer_momentum=np.float32(0.5), alpha=np.float64(1.1))
    assert (type(settings.outer_momentum), type(settings.alpha)) == (float, float)


# -- what becomes of b


def two_syncs(**options):
    """Two weights after two syncs with momentum."""
    a, b, optimizer = two_weights()
    slow = SlowWeights(optimizer, k=1, alpha=0.5, outer_momentum=0.5, **options)
    for _ in range(2):
        push(optimizer, a=(a, -1.0), b=(b, -1.0))
    return a, b, optimizer, slow


def test_a_frozen_weight_loses_its_momentum_and_begins_anew_when_it_is_unfrozen():
    a, b, optimizer, slow = two_syncs()
    b.requires_grad_(False)
    before = b.item()
    push(optimizer, a=(a, -1.0), b=(b, None))
    assert b.item() == before
    assert list(slow.pairs.outer_momentum.b) == [a]
    b.requires_grad_(True)
    push(optimizer, a=(a, -1.0), b=(b, -1.0))
    assert b.item() == before + 0.75  # as in a first sync


def test_a_weight_without_a_gradient_in_a_cycle_stays_and_keeps_its_momentum_as_in_torchs_sgd():
    a, b, optimizer, slow = two_syncs()
    before, momentum = b.item(), slow.pairs.outer_momentum.b[b].item()
    push(optimizer, a=(a, -1.0), b=(b, None))
    assert (b.item(), slow.pairs.outer_momentum.b[b].item()) == (before, momentum)


def test_an_added_group_begins_without_momentum_and_one_that_is_gone_leaves_none():
    a, b, optimizer, slow = two_syncs()
    c = nn.Parameter(torch.tensor([1.0]))
    optimizer.add_param_group({"params": [c]})
    push(optimizer, a=(a, -1.0), b=(b, -1.0), c=(c, -1.0))
    assert c.item() == 1.75
    optimizer.param_groups[0]["params"] = [a]
    push(optimizer, a=(a, -1.0), c=(c, -1.0))
    assert set(slow.pairs.outer_momentum.b) == {a, c}


@pytest.mark.parametrize("nonfinite", ["raise", "skip", "restore"])
def test_values_that_are_not_finite_leave_the_momentum_or_restore_it_to_zero(nonfinite):
    a, b, optimizer, slow = two_syncs(nonfinite=nonfinite)
    before = [one.clone() for one in slow.pairs.outer_momentum.b.values()]
    if nonfinite == "raise":
        with pytest.raises(RuntimeError, match="NaN or infinite"):
            push(optimizer, a=(a, float("nan")), b=(b, -1.0))
    else:
        with pytest.warns(UserWarning, match="no sync"):
            push(optimizer, a=(a, float("nan")), b=(b, -1.0))
    assert equal(slow.pairs.outer_momentum.b.values(), [] if nonfinite == "restore" else before)


def test_low_precision_weights_have_momentum_of_float32_and_ways_that_they_could_not_hold():
    weight = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    slow = SlowWeights(optimizer, k=1, alpha=0.5, outer_momentum=0.5)
    phi = next(iter(slow.values("slow").values()))
    phi.fill_(1.001)  # which bfloat16 rounds to 1
    weight.grad = torch.zeros_like(weight)
    slow.pairs.two_sets = True
    slow.sync()
    (b,) = slow.pairs.outer_momentum.b.values()
    assert b.dtype == torch.float32
    assert torch.equal(b, torch.full((4,), 1.001) - 1)


def test_a_swap_and_a_copy_leave_the_momentum_as_it_is():
    a, b, optimizer, slow = two_syncs()
    before = [one.clone() for one in slow.pairs.outer_momentum.b.values()]
    with slow.use("slow"):
        pass
    other = copy.deepcopy((a, b, optimizer, slow))
    assert equal(slow.pairs.outer_momentum.b.values(), before)
    for one in ((a, b, optimizer, slow), other):
        push(one[2], a=(one[0], -1.0), b=(one[1], -1.0))
    assert equal((a, b), other[:2])
    assert not {one.data_ptr() for one in slow.pairs.outer_momentum.b.values()}.intersection(
        one.data_ptr() for one in other[3].pairs.outer_momentum.b.values()
    )


def test_a_sync_by_hand_does_not_move_what_is_frozen():
    a, b, _, slow = two_syncs()
    b.requires_grad_(False)
    before = a.item(), b.item()
    slow.sync()
    assert b.item() == before[1]
    assert a.item() != before[0]
    assert list(slow.pairs.outer_momentum.b) == [a]


def test_a_sync_by_hand_without_a_step_goes_on_with_the_momentum():
    a, _, _, slow = two_syncs()
    before, momentum = a.item(), slow.pairs.outer_momentum.b[a].item()
    slow.sync()
    assert a.item() == before - 0.5 * 0.5 * (0.5 * momentum)


# -- saving


def trained(steps, load=None, **options):
    problem = Problem()
    slow = SlowWeights(problem.optimizer, k=2, alpha=0.5, module=problem.net, **options)
    if load is not None:
        problem.net.load_state_dict(load[0])
        problem.optimizer.load_state_dict(load[1])
        slow.load_state_dict(load[2])
    for index in range(load[3] if load else 0, steps):
        problem.step(index)
    return problem, slow


def saved(problem, slow, at):
    return copy.deepcopy((problem.net.state_dict(), problem.optimizer.state_dict(), slow.state_dict(), at))


@pytest.mark.parametrize("steps", range(1, 8))
def test_a_loop_resumes_bit_for_bit(steps):
    expected, whole = trained(9, outer_momentum=0.9)
    problem, slow = trained(9, saved(*trained(steps, outer_momentum=0.9), steps), outer_momentum=0.9)
    assert equal(problem.parameters, expected.parameters)
    assert equal(slow_values(slow), slow_values(whole))
    assert equal(slow.pairs.outer_momentum.b.values(), whole.pairs.outer_momentum.b.values())


def test_a_run_that_is_given_momentum_begins_it_at_zero_with_one_warning():
    with pytest.warns(UserWarning, match=r"outer_momentum was 0.0 and is 0.9.*starts at zero") as warned:
        problem, slow = trained(7, saved(*trained(5), 5), outer_momentum=0.9)
    assert len(warned) == 1
    fast = trained(6, saved(*trained(5), 5))[0]  # one more sync
    assert slow.syncs == 3
    assert not equal(problem.parameters, fast.parameters)


def test_a_run_without_momentum_leaves_it_aside_with_one_warning():
    state = saved(*trained(5, outer_momentum=0.9), 5)
    with pytest.warns(UserWarning, match="outer_momentum was 0.9 and is 0.0") as warned:
        _, slow = trained(7, state)
    assert len(warned) == 1
    assert not slow.pairs.outer_momentum.b


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("steps", [4, 5])
def test_a_weight_that_was_changed_while_loading_begins_without_momentum(steps, lean):
    problem, slow = trained(steps, outer_momentum=0.9)
    state = list(saved(problem, slow, steps))
    state[2] = copy.deepcopy(slow.persistence.state_dict(whole=False, lean=lean))
    state[0]["0.bias"] += 1
    problem, slow = trained(steps, state, outer_momentum=0.9)
    with pytest.warns(UserWarning, match="1 of 4 parameters do not have the values"):
        slow.swap_to("fast")
    assert problem.net[0].bias not in slow.pairs.outer_momentum.b
    assert len(slow.pairs.outer_momentum.b) == 3
