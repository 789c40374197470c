"""The noisy quadratic model: formulas against chance, exact arithmetic, algebra, and the callback in a Trainer."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import sympy
import torch
from hypothesis import given, settings
from torch import nn

from lightning_lookahead import LookaheadCallback, SlowWeights
from lightning_lookahead.theory.loss import excess_loss, expected_loss
from lightning_lookahead.theory.matched_risk import compare_at_risk, matched_learning_rate
from lightning_lookahead.theory.noisy_quadratic import (
    lookahead_trajectory,
    lookahead_variance,
    sgd_trajectory,
    sgd_variance,
)
from lightning_lookahead.theory.simulation import simulate
from lightning_lookahead.theory.step_size import optimal_alpha
from tests.helpers import strategies as some
from tests.helpers.particles import Particles
from tests.helpers.runs import make_trainer

MODEL = {"learning_rate": 0.8, "curvature": [1.0, 0.5, 0.25], "noise_variance": [2.0, 0.5, 1.0]}
PARTICLES = 200_000  # a variance has a standard error of 0.32%, a mean of 0.22% of the standard deviation


def moments_by_steps(*, learning_rate, curvature, noise_variance, k, alpha, syncs, mean, variance):
    """The recursions, step by step, in whatever arithmetic the arguments have; of one mode."""
    r = 1 - learning_rate * curvature
    rows = [(mean, variance)]
    for _ in range(syncs):
        theta_mean, theta_variance, covariance = mean, variance, variance  # with phi
        for _ in range(k):
            theta_mean, covariance = r * theta_mean, r * covariance
            theta_variance = r**2 * theta_variance + learning_rate**2 * curvature**2 * noise_variance
        mean = (1 - alpha) * mean + alpha * theta_mean
        variance = (1 - alpha) ** 2 * variance + 2 * alpha * (1 - alpha) * covariance + alpha**2 * theta_variance
        rows.append((mean, variance))
    return rows


# -- what it needs


def test_the_theory_imports_neither_torch_nor_lightning():
    program = (
        "import importlib, pkgutil, sys\n"
        "import lightning_lookahead.theory as theory\n"
        "names = [entry.name for entry in pkgutil.iter_modules(theory.__path__)]\n"
        "for name in names: importlib.import_module(f'lightning_lookahead.theory.{name}')\n"
        "heavy = {'torch', 'lightning', 'lightning_fabric', 'pytorch_lightning', 'torchmetrics'}\n"
        "print(sorted(names), sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    names, heavy = done.stdout.strip().rsplit(" [", 1)
    assert "'noisy_quadratic', 'outer_momentum'" in names
    assert heavy == "]"


# -- the formulas against chance


@pytest.mark.parametrize(("k", "alpha", "syncs"), [(1, 1.0, 40), (5, 0.5, 12), (3, 0.8, 10), (2, 0.4, 30)])
def test_variances_that_weights_settle_at_are_those_of_many_particles(k, alpha, syncs):
    phi = simulate(**MODEL, k=k, alpha=alpha, syncs=syncs, initial_mean=0.0, particles=PARTICLES, seed=1)
    assert phi.shape == (PARTICLES, 3)
    expected = lookahead_variance(**MODEL, k=k, alpha=alpha)
    np.testing.assert_allclose(phi.var(axis=0), expected, rtol=0.01)
    if alpha == 1:
        np.testing.assert_array_equal(expected, sgd_variance(**MODEL))
    else:
        assert (phi.var(axis=0) < 0.98 * sgd_variance(**MODEL)).all()


@pytest.mark.parametrize(("k", "alpha"), [(1, 1.0), (4, 0.6)])
def test_mean_and_variance_on_the_way_are_those_of_many_particles(k, alpha):
    start = np.array([3.0, -2.0, 1.0])
    way = lookahead_trajectory(**MODEL, k=k, alpha=alpha, syncs=2, initial_mean=start)
    for syncs in (1, 2):
        phi = simulate(**MODEL, k=k, alpha=alpha, syncs=syncs, initial_mean=start, particles=PARTICLES, seed=syncs)
        np.testing.assert_allclose(phi.mean(axis=0), way.mean[syncs], atol=0.01)
        np.testing.assert_allclose(phi.var(axis=0), way.variance[syncs], rtol=0.01)


def test_the_expected_loss_is_that_of_many_particles():
    a, noise = np.array(MODEL["curvature"]), np.array(MODEL["noise_variance"])
    phi = simulate(**MODEL, k=5, alpha=0.5, syncs=2, initial_mean=2.0, particles=PARTICLES, seed=3)
    optimum = np.sqrt(noise) * np.random.default_rng(4).standard_normal(phi.shape)
    losses = (a * (phi - optimum) ** 2).sum(axis=1) / 2
    way = lookahead_trajectory(**MODEL, k=5, alpha=0.5, syncs=2, initial_mean=2.0)
    expected = expected_loss(*way, curvature=a, noise_variance=noise)
    assert expected.shape == (3,)
    assert losses.mean() == pytest.approx(float(expected[2]), rel=0.01)
    floor = (a * noise).sum() / 2
    np.testing.assert_allclose(expected - excess_loss(*way, curvature=a), floor, rtol=1e-14)


def test_the_same_seed_gives_the_same_particles_and_another_seed_others():
    first, again, other = (
        simulate(**MODEL, k=2, alpha=0.5, syncs=3, initial_mean=1.0, particles=4, seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).all()
    np.testing.assert_array_equal(
        simulate(**MODEL, syncs=0, initial_mean=[1.0, 2.0, 3.0], particles=2, seed=0), [[1.0, 2.0, 3.0]] * 2
    )


# -- the callback itself


def test_the_callback_in_a_trainer_settles_at_the_predicted_variance_and_sgd_at_its_own():
    module = Particles(PARTICLES, 60, **MODEL)
    make_trainer(max_epochs=1).fit(module)
    np.testing.assert_allclose(module.variance(), sgd_variance(**MODEL), rtol=0.01)

    module, callback = Particles(PARTICLES, 60, **MODEL), LookaheadCallback(k=5, alpha=0.5)
    make_trainer(callback, max_epochs=1).fit(module)
    with callback.use_weights("slow"):  # after the 12th sync
        np.testing.assert_allclose(module.variance(), lookahead_variance(**MODEL, k=5, alpha=0.5), rtol=0.01)


# -- exact arithmetic and algebra


@given(
    some.exact_xs,
    some.exact_alphas,
    some.cycle_lengths,
)
@settings(max_examples=50)
def test_the_fixed_points_are_those_of_the_recursions_in_rational_numbers(x, alpha, k):
    model = {"learning_rate": x / 2, "curvature": Fraction(2), "noise_variance": Fraction(3)}
    cycle = {**model, "k": k, "alpha": alpha, "syncs": 1, "mean": Fraction(0)}
    added = moments_by_steps(**cycle, variance=Fraction(0))[1][1]
    kept = moments_by_steps(**cycle, variance=Fraction(1))[1][1] - added
    fixed = added / (1 - kept)
    assert moments_by_steps(**cycle, variance=fixed)[1][1] == fixed
    floats = {name: float(value) for name, value in model.items()}
    assert lookahead_variance(**floats, k=k, alpha=float(alpha)) == pytest.approx(float(fixed), rel=1e-12)
    if alpha == 1:
        assert sgd_variance(**floats) == pytest.approx(float(fixed), rel=1e-12)


def test_algebra_gives_the_factor_between_the_variances_for_any_k():
    r, alpha, noise = sympy.symbols("r alpha s2", positive=True)
    k = sympy.symbols("k", integer=True, positive=True)
    power = r**k
    added_by_a_step = (1 - r) ** 2 * noise  # learning_rate * a is 1 - r
    sgd = added_by_a_step / (1 - r**2)
    assert sympy.simplify(sgd - (1 - r) * noise / (2 - (1 - r))) == 0
    factor = alpha * (1 + power) / (2 - alpha + alpha * power)
    paper = alpha**2 * (1 - power**2) / (alpha**2 * (1 - power**2) + 2 * alpha * (1 - alpha) * (1 - power))
    assert sympy.simplify(factor - paper) == 0
    slow = factor * sgd
    # Var(theta_k) and cov(phi, theta_k), if Var(phi) is what it settles at
    fast, covariance = power**2 * slow + (1 - power**2) * sgd, power * slow
    after = (1 - alpha) ** 2 * slow + 2 * alpha * (1 - alpha) * covariance + alpha**2 * fast
    assert sympy.simplify(after - slow) == 0


@pytest.mark.parametrize(("k", "alpha"), [(1, 1.0), (1, 0.3), (4, 0.5), (7, 0.9)])
def test_trajectories_are_those_of_the_recursions(k, alpha):
    model = {**MODEL, "learning_rate": 1.7}  # past the optimum in the first mode, on this side in the others
    start, spread = np.array([3.0, -2.0, 0.0]), np.array([0.0, 1.0, 9.0])
    mean, variance = lookahead_trajectory(
        **model, k=k, alpha=alpha, syncs=6, initial_mean=start, initial_variance=spread
    )
    assert mean.shape == variance.shape == (7, 3)
    for mode in range(3):
        one = {name: np.broadcast_to(value, 3)[mode] for name, value in model.items()}
        rows = moments_by_steps(**one, k=k, alpha=alpha, syncs=6, mean=start[mode], variance=spread[mode])
        np.testing.assert_allclose(np.stack([mean, variance], -1)[:, mode], rows, rtol=1e-12, atol=1e-14)
    if k == 1 and alpha == 1:
        plain = sgd_trajectory(**model, steps=6, initial_mean=start, initial_variance=spread)
        np.testing.assert_array_equal(plain.mean, mean)
        np.testing.assert_array_equal(plain.variance, variance)


def test_a_mode_without_curvature_or_without_noise_has_no_variance():
    model = {"learning_rate": 0.5, "curvature": [0.0, 1.0], "noise_variance": [1.0, 0.0]}
    np.testing.assert_array_equal(lookahead_variance(**model, k=3, alpha=0.5), [0.0, 0.0])
    way = lookahead_trajectory(**model, k=3, alpha=0.5, syncs=2, initial_mean=2.0, initial_variance=1.0)
    np.testing.assert_array_equal(way.mean[:, 0], 2.0)
    np.testing.assert_array_equal(way.variance[:, 0], 1.0)
    assert (np.diff(way.variance[:, 1]) < 0).all()


# -- laws


@given(some.xs_of_sgd, some.alphas, some.ks)
def test_lookahead_has_less_variance_than_sgd_unless_alpha_is_one(x, alpha, k):
    model = {"learning_rate": x, "curvature": 1.0, "noise_variance": 2.0}
    (slow,), (plain,) = lookahead_variance(**model, k=k, alpha=alpha), sgd_variance(**model)
    assert slow <= plain
    if alpha < 0.99:
        assert slow < plain
    assert lookahead_variance(**model, k=k, alpha=1.0) == plain


@given(some.xs_of_sgd, some.factors, some.alphas, some.ks)
def test_the_variance_grows_with_the_learning_rate_and_with_alpha(x, factor, alpha, k):
    def variance(x, alpha):
        return lookahead_variance(learning_rate=x, curvature=1.0, noise_variance=2.0, k=k, alpha=alpha)[0]

    assert variance(min(x * factor, 1.9999), alpha) > variance(x, alpha)
    if alpha * factor <= 1:
        assert variance(x, alpha * factor) > variance(x, alpha)


@given(some.xs_of_sgd, some.alphas, some.steps)
def test_with_one_inner_step_lookahead_is_sgd_with_a_learning_rate_of_alpha_times_its_own(x, alpha, steps):
    model = {"curvature": 1.0, "noise_variance": 2.0, "initial_mean": 3.0, "initial_variance": 0.5}
    slow = lookahead_trajectory(learning_rate=x, **model, k=1, alpha=alpha, syncs=steps)
    plain = sgd_trajectory(learning_rate=alpha * x, **model, steps=steps)
    np.testing.assert_allclose(slow.mean, plain.mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(slow.variance, plain.variance, rtol=1e-10, atol=1e-12)


@given(some.xs_of_sgd, some.alphas, some.ks, some.syncs, some.syncs)
def test_a_trajectory_goes_on_from_its_own_end(x, alpha, k, first, then):
    model = {"learning_rate": x, "curvature": 1.0, "noise_variance": 2.0, "k": k, "alpha": alpha}
    whole = lookahead_trajectory(**model, syncs=first + then, initial_mean=3.0, initial_variance=0.5)
    middle = lookahead_trajectory(**model, syncs=first, initial_mean=3.0, initial_variance=0.5)
    rest = lookahead_trajectory(**model, syncs=then, initial_mean=middle.mean[-1], initial_variance=middle.variance[-1])
    np.testing.assert_allclose(rest.mean, whole.mean[first:], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(rest.variance, whole.variance[first:], rtol=1e-10, atol=1e-12)


# -- matched risk

PAPER = {"curvature": 1 / np.arange(1, 101), "noise_variance": 1.0}


def loss_by_steps(setting, k, syncs):
    """Excess loss after some syncs, and in the long run, by recursion in all 100 modes."""
    model = {**PAPER, "learning_rate": setting.learning_rate, "k": k, "alpha": setting.alpha}
    losses = []
    for cycles, mean in ((syncs, 1.0), (200_000 // k, 0.0)):
        e, v, a = mean, np.zeros(100), PAPER["curvature"]
        r = 1 - setting.learning_rate * a
        whole = 1 - setting.alpha + setting.alpha * r**k
        noise = (setting.alpha * setting.learning_rate * a) ** 2 * sum(r ** (2 * i) for i in range(k))
        for _ in range(cycles):
            e, v = whole * e, whole**2 * v + noise
        losses.append((a * (e**2 + v)).sum() / 2)
    assert lookahead_variance(**model) == pytest.approx(v, rel=1e-6)
    return losses


@pytest.mark.parametrize(
    ("risk", "sgd", "lookahead"),
    [(0.003, 0.7476, 0.6386), (0.01, 0.3006, 0.2206), (0.03, 0.08610, 0.06064), (0.1, 0.1011, 0.1004)],
)
def test_with_the_same_risk_the_best_lookahead_is_ahead_of_sgd(risk, sgd, lookahead):
    found = compare_at_risk(risk, **PAPER, initial_mean=1.0, k=5, steps=1000)
    assert found.sgd.excess_loss == pytest.approx(sgd, abs=6e-5)
    assert found.lookahead.excess_loss == pytest.approx(lookahead, abs=6e-5)
    assert found.sgd.alpha == 1
    assert 0 < found.lookahead.alpha < 1
    for alpha in np.linspace(0.05, 1, 20):
        rate = matched_learning_rate(risk, **PAPER, k=5, alpha=alpha)
        end = lookahead_trajectory(**PAPER, learning_rate=rate, k=5, alpha=alpha, syncs=200, initial_mean=1.0)
        assert excess_loss(*end, curvature=PAPER["curvature"])[-1] >= found.lookahead.excess_loss - 1e-12


def test_a_risk_that_both_have_reached_leaves_no_difference():
    found = compare_at_risk(0.3, **PAPER, initial_mean=1.0, k=5, steps=1000)
    assert found.sgd.excess_loss == pytest.approx(0.3, abs=1e-6)
    assert found.lookahead.excess_loss == pytest.approx(0.3, abs=1e-6)
    early = compare_at_risk(0.3, **PAPER, initial_mean=1.0, k=5, steps=100)
    assert early.lookahead.excess_loss < 0.98 * early.sgd.excess_loss


def test_a_minimum_far_from_alpha_one_is_found_across_a_plateau():
    """With a small alpha the risk is still far off after these steps; with others it has been reached."""
    found = compare_at_risk(3.0, **PAPER, initial_mean=1.0, k=20, steps=1000)
    assert found.lookahead.alpha < 0.02
    assert found.lookahead.excess_loss == pytest.approx(1.4407, abs=6e-5)


def test_the_settings_that_are_found_have_the_loss_and_the_risk_by_recursion():
    found = compare_at_risk(0.03, **PAPER, initial_mean=1.0, k=5, steps=1000)
    for setting, k in ((found.sgd, 1), (found.lookahead, 5)):
        loss, risk = loss_by_steps(setting, k, 1000 // k)
        assert loss == pytest.approx(setting.excess_loss, rel=1e-9)
        assert risk == pytest.approx(0.03, rel=1e-6)


@given(some.risks, some.alphas, some.ks)
@settings(max_examples=50)
def test_the_matched_learning_rate_gives_the_risk_or_there_is_none(risk, alpha, k):
    model = {"curvature": [1.0, 0.1], "noise_variance": 1.0}

    def risk_of(rate):
        variance = lookahead_variance(learning_rate=rate, **model, k=k, alpha=alpha)
        return float(excess_loss(0.0, variance, curvature=model["curvature"]))

    try:
        rate = matched_learning_rate(risk, **model, k=k, alpha=alpha)
    except ValueError:
        assert k % 2 == 1
        assert risk_of(2 - 1e-11) < risk
    else:
        assert risk_of(rate) == pytest.approx(risk, rel=1e-6)


def test_a_risk_out_of_reach_is_refused_with_the_most_that_there_is():
    with pytest.raises(
        ValueError, match=r"risk=5.0 cannot be reached with k=5, alpha=0.5 and momentum=0.0: .* give less than 4\."
    ):
        matched_learning_rate(5.0, curvature=1.0, noise_variance=1.6, k=5, alpha=0.5)
    with pytest.raises(ValueError, match=r"risk=1.0 cannot be reached .* give less than 0\."):
        compare_at_risk(1.0, curvature=1.0, noise_variance=0.0, initial_mean=1.0, k=5, steps=10)


# -- the step size of Proposition 1


def test_algebra_gives_proposition_1_as_the_lowest_point_of_the_line():
    alpha = sympy.symbols("alpha", real=True)
    start, end, best = (sympy.Matrix(sympy.symbols(f"{name}:2", real=True)) for name in ("s", "e", "o"))
    p, q, s = sympy.symbols("p q s", positive=True)
    matrix = sympy.Matrix([[p, s], [s, q]])
    slope = matrix * best  # A theta* = b
    point = start + alpha * (end - start)
    loss = (point.T * matrix * point)[0] / 2 - (slope.T * point)[0]
    way = start - end
    formula = (way.T * (matrix * start - slope))[0] / (way.T * matrix * way)[0]
    assert sympy.simplify(sympy.diff(loss, alpha).subs(alpha, formula)) == 0
    assert sympy.simplify(sympy.diff(loss, alpha, 2) - (way.T * matrix * way)[0]) == 0
    paper = ((start - best).T * matrix * way)[0] / (way.T * matrix * way)[0]
    assert sympy.simplify(formula - paper) == 0


@pytest.mark.parametrize(
    ("theta_k", "expected"),
    [([0.0, 1.0], 11 / 7), ([-3.0, -2.0], 11 / 28), ([9.0, 9.0], -80 / 387)],  # computed by hand
)
def test_the_optimal_alpha_is_not_clipped(theta_k, expected):
    found = optimal_alpha([[2.0, 1.0], [1.0, 3.0]], [1.0, -1.0], [1.0, 2.0], theta_k)
    assert found == pytest.approx(expected, rel=1e-14)


@given(some.seeds, some.sizes, some.sizes)
def test_no_alpha_is_better_than_the_optimal_one_whatever_the_rank(seed, size, rank):
    random = np.random.default_rng(seed)
    root = random.standard_normal((size, min(rank, size)))
    matrix, best, start, end = root @ root.T, *random.standard_normal((3, size))
    slope = matrix @ best

    def loss(alpha):
        point = start + alpha * (end - start)
        return point @ matrix @ point / 2 - slope @ point

    alpha = optimal_alpha(matrix, slope, start, end)
    bend = (end - start) @ matrix @ (end - start)
    for other in (-0.3, 0.01, 2.0):
        # A parabola: what is lost by another alpha is known.
        assert loss(alpha + other) - loss(alpha) == pytest.approx(bend * other**2 / 2, rel=1e-6, abs=1e-9)


# -- the slow weights as an average of the fast ones


def test_the_slow_weights_are_the_average_of_all_fast_ones_that_equation_0_1_says():
    alpha = Fraction(3, 7)
    start = phi = Fraction(5, 3)
    ends = [Fraction(n**2 - 7 * n, n + 2) for n in range(1, 9)]  # theta_{t,k} for t = 1, 2, ...
    for t, theta in enumerate(ends, start=1):
        phi += alpha * (theta - phi)
        weighted = sum((1 - alpha) ** (t - j) * ends[j - 1] for j in range(1, t + 1))
        assert phi == alpha * weighted + (1 - alpha) ** t * start


def test_slow_weights_are_that_average_too():
    alpha, k = 0.3, 3
    weight = nn.Parameter(torch.tensor([5.0, -1.0], dtype=torch.float64))
    start, ends = weight.detach().clone(), []
    optimizer = torch.optim.SGD([weight], lr=1.0)
    slow = SlowWeights(optimizer, k, alpha)
    for step in range(6 * k):
        before = weight.detach().clone()
        weight.grad = torch.randn_like(weight)
        if (step + 1) % k == 0:
            ends.append(before - weight.grad)
        optimizer.step()
    weighted = sum((1 - alpha) ** (6 - j) * ends[j - 1] for j in range(1, 7))
    (phi,) = slow.values("slow").values()
    torch.testing.assert_close(phi, alpha * weighted + (1 - alpha) ** 6 * start, rtol=1e-13, atol=1e-13)


# -- what is refused

FUNCTIONS = {
    sgd_variance: {},
    lookahead_variance: {"k": 5, "alpha": 0.5},
    sgd_trajectory: {"steps": 3, "initial_mean": 1.0},
    lookahead_trajectory: {"k": 5, "alpha": 0.5, "syncs": 3, "initial_mean": 1.0},
    simulate: {"k": 5, "alpha": 0.5, "syncs": 3, "initial_mean": 1.0, "particles": 2, "seed": 0},
    matched_learning_rate: {"risk": 0.1, "k": 5, "alpha": 0.5},
    compare_at_risk: {"risk": 0.1, "initial_mean": 1.0, "k": 5, "steps": 10},
    expected_loss: {"mean": 1.0, "variance": 1.0},
    excess_loss: {"mean": 1.0, "variance": 1.0},
}
WRONG = [
    ({"learning_rate": 2.0}, "learning_rate=2.0 is out of range: it must be a number in (0, 2 / max(curvature))"),
    ({"learning_rate": 0}, "learning_rate=0 is out of range: it must be a number in (0, 2 / max(curvature))"),
    ({"learning_rate": True}, "learning_rate=True is out of range"),
    ({"learning_rate": float("nan")}, "learning_rate=nan is out of range"),
    ({"learning_rate": "0.1"}, "learning_rate='0.1' is out of range"),
    ({"curvature": [1.0, -0.5]}, "curvature=[1.0, -0.5] is out of range: each must be at least 0, and one of them"),
    ({"curvature": [0.0]}, "curvature=[0.0] is out of range: each must be at least 0, and one of them above 0"),
    ({"curvature": [float("inf")]}, "curvature=[inf] is out of range: it must hold finite real numbers only"),
    ({"curvature": "steep"}, "curvature='steep' is out of range: it must hold finite real numbers only"),
    ({"curvature": 1j}, "curvature=1j is out of range: it must hold finite real numbers only"),
    ({"curvature": [[1.0]]}, "curvature has shape (1, 1): it must be a number, or a vector of shape (d,)"),
    ({"curvature": []}, "curvature has shape (0,): it must be a number, or a vector of shape (d,) with d at least 1"),
    ({"noise_variance": -1.0}, "noise_variance=-1.0 is out of range: a variance must be at least 0"),
    ({"noise_variance": [float("nan"), 1.0]}, "noise_variance=[nan, 1.0] is out of range: it must hold finite"),
    ({"noise_variance": [1.0] * 3}, "noise_variance has shape (3,): it must be a number, or have curvature's shape"),
    ({"k": 0}, "k=0 is out of range: the inner steps between two syncs must be an integer of at least 1"),
    ({"k": 2.0}, "k=2.0 is out of range"),
    ({"k": True}, "k=True is out of range"),
    ({"alpha": 0.0}, "alpha=0.0 is out of range: the slow weights step size must be a number in (0, 1]"),
    ({"alpha": 1.1}, "alpha=1.1 is out of range"),
    ({"alpha": True}, "alpha=True is out of range"),
    ({"alpha": float("nan")}, "alpha=nan is out of range"),
    ({"steps": -1}, "steps=-1 is out of range: the inner steps must be an integer of at least 0"),
    ({"syncs": -1}, "syncs=-1 is out of range: the syncs must be an integer of at least 0"),
    ({"syncs": 1.5}, "syncs=1.5 is out of range"),
    ({"particles": 0}, "particles=0 is out of range: the number of runs must be an integer of at least 1"),
    ({"initial_mean": [1.0] * 3}, "initial_mean has shape (3,): it must be a number, or have curvature's shape, (2,)"),
    ({"initial_mean": float("inf")}, "initial_mean=inf is out of range: it must hold finite real numbers only"),
    ({"initial_variance": -1.0}, "initial_variance=-1.0 is out of range: a variance must be at least 0"),
    ({"risk": 0.0}, "risk=0.0 is out of range: it must be a finite number above 0"),
    ({"risk": float("inf")}, "risk=inf is out of range: it must be a finite number above 0"),
    ({"mean": [1.0] * 3}, "mean has shape (3,): it must be a number, or of shape (..., 2) as curvature is"),
    ({"variance": [[1.0], [2.0]]}, "variance has shape (2, 1): it must be a number, or of shape (..., 2)"),
    ({"variance": -1.0}, "variance=-1.0 is out of range: a variance must be at least 0"),
    ({"mean": float("nan")}, "mean=nan is out of range: it must hold finite real numbers only"),
]


def takes(function, name):
    return name in function.__code__.co_varnames[: function.__code__.co_argcount + function.__code__.co_kwonlyargcount]


def arguments(function):
    model = {"learning_rate": 0.1, "curvature": [1.0, 0.5], "noise_variance": 1.0}
    return {**{name: value for name, value in model.items() if takes(function, name)}, **FUNCTIONS[function]}


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_in_range_is_taken(function):
    assert np.isfinite(
        np.concatenate([np.ravel(part) for part in np.atleast_1d(function(**arguments(function)))])
    ).all()


@pytest.mark.parametrize(
    ("wrong", "message"), WRONG, ids=lambda value: str(value)[:40] if isinstance(value, dict) else ""
)
def test_what_is_out_of_range_is_refused_by_every_function_that_takes_it(wrong, message):
    (name,) = wrong
    asked = [function for function in FUNCTIONS if takes(function, name)]
    assert asked
    for function in asked:
        with pytest.raises(ValueError) as error:  # noqa: PT011 (looked at below)
            function(**{**arguments(function), **wrong})
        assert str(error.value).startswith(message), function


def test_steps_that_end_within_a_cycle_are_refused():
    with pytest.raises(ValueError, match="steps=12 is out of range: with k=5 it must be a multiple of 5"):
        compare_at_risk(0.1, curvature=1.0, noise_variance=1.0, initial_mean=1.0, k=5, steps=12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"A": [1.0, 2.0]}, "A has shape (2,): it must be (d, d) with d at least 1"),
        ({"A": np.zeros((2, 3))}, "A has shape (2, 3): it must be (d, d)"),
        ({"A": np.zeros((0, 0))}, "A has shape (0, 0): it must be (d, d) with d at least 1"),
        ({"A": [[1.0, 2.0], [0.0, 1.0]]}, "A=[[1.0, 2.0], [0.0, 1.0]] is out of range: it must be symmetric"),
        (
            {"A": [[1.0, 0.0], [0.0, -0.1]]},
            "A=[[1.0, 0.0], [0.0, -0.1]] is out of range: it must be symmetric, with no",
        ),
        ({"b": [1.0]}, "b has shape (1,): it must be (2,), as A has shape (2, 2)"),
        ({"theta_0": [1.0, float("nan")]}, "theta_0=[1.0, nan] is out of range: it must hold finite real numbers only"),
        ({"theta_k": 1.0}, "theta_k has shape (): it must be (2,)"),
        ({"theta_k": [1.0, 1.0]}, "theta_k=[1.0, 1.0] equals theta_0: the inner loop went nowhere"),
        ({"A": [[0.01, 0.03], [0.03, 0.09]], "theta_k": [1.3, 0.9]}, "theta_k=[1.3, 0.9] is out of range: the loss is"),
    ],
)
def test_lines_on_which_no_alpha_is_best_and_shapes_that_do_not_match_are_refused(wrong, message):
    good = {"A": np.eye(2), "b": [0.0, 0.0], "theta_0": [1.0, 1.0], "theta_k": [0.5, 0.0]}
    assert optimal_alpha(**good) == pytest.approx(1.2)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (looked at below)
        optimal_alpha(**{**good, **wrong})
    assert str(error.value).startswith(message)
