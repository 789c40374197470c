"""The deterministic quadratic: matrices and rates against torch's SGD with slow weights around it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

from lightning_lookahead import SlowWeights
from lightning_lookahead.theory._search import lowest
from lightning_lookahead.theory.quadratic import MODES, heavy_ball_matrix, lookahead_matrix, rate, spectrum_rate
from lightning_lookahead.theory.tuning import best_parameters
from tests.helpers import strategies as some

LEARNING_RATE = 0.25
XS = np.array([0.0, 0.003, 0.1, 0.5, 1.0, 1.9, 2.8])


def run(momentum, steps, *, k=None, alpha=None, mode="none", xs=XS, start=1.0):
    """What torch makes of (phi, v), from (start, 0), after each cycle or step; of shape (times, 2, len(xs))."""
    curvature = torch.tensor(xs / LEARNING_RATE)
    weight = nn.Parameter(torch.full((len(xs),), start, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=LEARNING_RATE, momentum=momentum)
    if k is not None:
        SlowWeights(optimizer, k, alpha, pullback_momentum=mode)
    states = []
    for step in range(1, steps + 1):
        weight.grad = curvature * weight.detach()
        optimizer.step()
        if step % (k or 1) == 0:
            buffer = optimizer.state[weight].get("momentum_buffer")  # removed by a reset
            move = torch.zeros_like(weight) if buffer is None else -LEARNING_RATE * buffer
            states.append(torch.stack([weight.detach(), move]).numpy())
    return np.array(states)


def powers(matrix, times, start=1.0):
    """(phi, v) from (start, 0) after each of some applications of the matrices; of shape (times, 2, len(matrix))."""
    states = [np.stack([np.full(len(matrix), start), np.zeros(len(matrix))], -1)]
    for _ in range(times):
        states.append(np.einsum("nij,nj->ni", matrix, states[-1]))
    return np.swapaxes(np.array(states[1:]), 1, 2)


# -- matrices
# Products of matrices round in another order than steps do: equal to 1e-12 of the start, and not bit for bit.


@pytest.mark.parametrize("momentum", [0.5, 0.9, 0.99])
def test_the_matrix_of_heavy_ball_does_what_torch_does(momentum):
    found = run(momentum, 12)
    np.testing.assert_allclose(found, powers(heavy_ball_matrix(XS, momentum), 12), rtol=1e-12, atol=1e-12)
    assert (np.abs(found[-3:, :, 1:]).max(axis=0) > 1e-6).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("k", "alpha"), [(1, 0.5), (3, 0.8), (5, 0.5), (4, 1.0)])
def test_the_matrix_of_a_cycle_does_what_slow_weights_do(mode, k, alpha):
    found = run(0.9, 5 * k, k=k, alpha=alpha, mode=mode)
    expected = powers(lookahead_matrix(XS, 0.9, k=k, alpha=alpha, mode=mode), 5)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    for other in MODES:
        differs = np.abs(expected - powers(lookahead_matrix(XS, 0.9, k=k, alpha=alpha, mode=other), 5)).max() > 1e-3
        assert differs == (other != mode and not (alpha == 1 and "reset" not in {mode, other}))


@given(some.momenta, some.few_xs, some.small_ks)
def test_with_alpha_one_a_cycle_is_k_steps_of_heavy_ball_unless_it_resets(momentum, xs, k):
    steps = np.linalg.matrix_power(heavy_ball_matrix(xs, momentum), k)
    for mode in ("none", "pullback"):
        np.testing.assert_array_equal(lookahead_matrix(xs, momentum, k=k, alpha=1.0, mode=mode), steps)
    reset = lookahead_matrix(xs, momentum, k=k, alpha=1.0, mode="reset")
    np.testing.assert_array_equal(reset[:, 0], steps[:, 0])
    np.testing.assert_array_equal(reset[:, 1], 0.0)


@given(some.xs, some.large_alphas, some.small_ks, some.either(*MODES))
def test_without_momentum_every_mode_is_gradient_descent_with_slow_weights(x, alpha, k, mode):
    contraction = 1 - alpha + alpha * (1 - x) ** k
    found = powers(lookahead_matrix([x], 0.0, k=k, alpha=alpha, mode=mode), 3)[:, 0, 0]
    np.testing.assert_allclose(found, contraction ** np.arange(1, 4), rtol=1e-12, atol=1e-12)


def test_shapes_are_those_of_x_and_two_by_two():
    x = np.linspace(0.1, 1.5, 6).reshape(3, 2)
    matrices = lookahead_matrix(x, 0.9, k=4, alpha=0.5, mode="pullback")
    assert heavy_ball_matrix(x, 0.9).shape == matrices.shape == (3, 2, 2, 2)
    assert rate(matrices, 4).shape == (3, 2)
    for index in np.ndindex(3, 2):
        one = lookahead_matrix(x[index], 0.9, k=4, alpha=0.5, mode="pullback")
        np.testing.assert_allclose(matrices[index], one, rtol=1e-13)


# -- rates


def measured_rate(states, k):
    """From the slope of the logarithm of the size of (phi, v), past the first 20 cycles, without its swings."""
    sizes = np.log(np.linalg.norm(states[20:], axis=1))
    return 1 - np.exp(np.polyfit(np.arange(len(sizes)), sizes, 1)[0] / k)


@pytest.mark.parametrize("mode", MODES)
def test_the_rate_is_how_fast_slow_weights_converge_in_many_cycles(mode):
    k, alpha, momentum, xs = 5, 0.5, 0.9, np.array([0.02, 0.1, 0.5, 1.0, 1.7, 2.6])
    states = run(momentum, 150 * k, k=k, alpha=alpha, mode=mode, xs=xs)
    expected = rate(lookahead_matrix(xs, momentum, k=k, alpha=alpha, mode=mode), k)
    np.testing.assert_allclose(measured_rate(states, k), expected, atol=5e-4)
    assert expected.max() - expected.min() > 0.1


def test_the_rate_of_heavy_ball_is_how_fast_torch_converges():
    xs = np.array([0.001, 0.1, 1.0, 3.0, 3.82])  # over-damped at both ends
    expected = rate(heavy_ball_matrix(xs, 0.9))
    np.testing.assert_allclose(measured_rate(run(0.9, 600, xs=xs), 1), expected, atol=5e-4)
    np.testing.assert_allclose(expected[1:4], 1 - np.sqrt(0.9), rtol=1e-9)
    assert (expected[[0, 4]] < 0.9 * expected[1]).all()


def test_reset_diverges_where_the_other_modes_converge():
    setting = {"k": 20, "alpha": 0.5}
    matrix = lookahead_matrix(0.785, 0.99, **setting, mode="reset")
    assert matrix[0, 0] == pytest.approx(1.0034, abs=1e-4)
    assert -1e-3 < float(rate(matrix, 20)) < 0
    states = run(0.99, 20 * 200, **setting, mode="reset", xs=np.array([0.785]))
    assert states[199, 0, 0] == pytest.approx(matrix[0, 0] ** 200, rel=1e-9)
    for mode in ("none", "pullback"):
        assert float(rate(lookahead_matrix(0.785, 0.99, **setting, mode=mode), 20)) > 1e-3


@given(some.momenta, some.large_alphas, some.small_ks, some.either(*MODES))
def test_the_rate_over_a_spectrum_is_that_of_the_slowest_mode(momentum, alpha, k, mode):
    curvature = [1.0, 0.3, 0.05]
    setting = {"momentum": momentum, "k": k, "alpha": alpha, "mode": mode, "learning_rate": 0.8}
    alone = [spectrum_rate(curvature=a, **setting) for a in curvature]
    # Where two eigenvalues meet, they are as exact as a square root is near 0.
    assert spectrum_rate(curvature=curvature, **setting) == pytest.approx(min(alone), abs=1e-6)
    for a, found in zip(curvature, alone, strict=True):
        one = rate(lookahead_matrix(0.8 * a, momentum, k=k, alpha=alpha, mode=mode), k)
        assert found == pytest.approx(float(one), abs=1e-6)


# -- the best settings


def test_the_search_finds_a_narrow_minimum_that_looks_higher_than_a_wide_one_at_first():
    def function(points):
        return np.minimum(np.abs(points - 0.5) - 0.9, 50 * np.abs(points - 0.213) - 1.0)

    grid = np.linspace(0, 1, 101)
    assert grid[function(grid).argmin()] == 0.5
    assert lowest(function, 0.0, 1.0, 101) == pytest.approx(0.213, abs=1e-6)
    assert lowest(np.abs, -3.0, 4.0, 8) == 0.0
    assert lowest(lambda points: points, 2.0, 4.0, 8) == 2.0
    assert lowest(lambda points: -points, 2.0, 4.0, 8) == 4.0


@pytest.mark.parametrize("kappa", [4.0, 100.0, 1e4])
def test_the_best_heavy_ball_is_polyaks(kappa):
    root = np.sqrt(kappa)
    momentum = ((root - 1) / (root + 1)) ** 2
    curvature = np.geomspace(3 / kappa, 3, 9)
    found = best_parameters(curvature=curvature, momentum=[0.2 * momentum, momentum, (1 + momentum) / 2])
    assert found.momentum == momentum
    # There both ends of the spectrum are critically damped: a rate is as exact as a square root is near 0.
    assert found.rate == pytest.approx(2 / (root + 1), rel=0.01)
    assert found.rate <= 2 / (root + 1) + 1e-7
    assert found.learning_rate == pytest.approx(4 / (3 * (1 + 1 / root) ** 2), rel=1e-3)


@pytest.mark.parametrize("kappa", [3.0, 40.0])
def test_the_best_gradient_descent_is_the_textbooks(kappa):
    found = best_parameters(curvature=[2.0, 2.0 / kappa], momentum=0.0)
    assert found.learning_rate == pytest.approx(1 / (1 + 1 / kappa), rel=1e-5)
    assert found.rate == pytest.approx(2 / (kappa + 1), rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spectrum", [[1.0, 0.01], list(np.geomspace(0.01, 1, 7))], ids=["two", "dense"])
def test_no_learning_rate_on_a_fine_grid_is_better_than_the_one_found(mode, spectrum):
    setting = {"k": 20, "alpha": 0.5, "mode": mode}
    found = best_parameters(curvature=spectrum, momentum=0.99, **setting)
    exact = spectrum_rate(learning_rate=found.learning_rate, curvature=spectrum, momentum=0.99, **setting)
    assert found.rate == pytest.approx(exact, abs=1e-12)
    x = np.outer(np.linspace(1e-4, 3.9799, 20_000), spectrum)
    others = rate(lookahead_matrix(x, 0.99, **setting), 20).min(axis=1)
    assert others.max() <= found.rate + 1e-9
    assert others.max() > 0.9 * found.rate


def rates(curvature, mode="none"):
    """Of heavy ball, and of Lookahead around it, with a momentum of 0.99."""
    heavy_ball = best_parameters(curvature=curvature, momentum=0.99).rate
    return heavy_ball, best_parameters(curvature=curvature, momentum=0.99, k=20, alpha=0.5, mode=mode).rate


UNDER_DAMPED = 1 - np.sqrt(0.99)  # up to a condition number of 158,000


def test_with_two_eigenvalues_lookahead_is_faster_up_to_high_condition_numbers():
    for kappa, faster in ((10, True), (1e3, True), (5e4, True), (1e5, False)):
        heavy_ball, lookahead = rates([1, 1 / kappa])
        assert heavy_ball == pytest.approx(UNDER_DAMPED, rel=1e-6)
        assert (lookahead > 1.02 * heavy_ball) == faster
    heavy_ball, lookahead = rates([1, 1e-6])
    assert lookahead < heavy_ball < 0.1 * UNDER_DAMPED


def test_on_a_dense_spectrum_it_is_faster_only_up_to_a_condition_number_of_about_a_thousand():
    for kappa, faster in ((10, True), (300, True), (1000, True), (3000, False), (1e4, False)):
        heavy_ball, lookahead = rates(np.geomspace(1 / kappa, 1, 50))
        assert heavy_ball == pytest.approx(UNDER_DAMPED, rel=1e-6)
        assert (lookahead > 1.02 * heavy_ball) == faster


# -- what is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"momentum": 1.0}, "momentum=1.0 is out of range: it must be a number in [0, 1)"),
        ({"momentum": -0.1}, "momentum=-0.1 is out of range"),
        ({"momentum": float("nan")}, "momentum=nan is out of range"),
        ({"k": 0}, "k=0 is out of range: the inner steps between two syncs must be an integer of at least 1"),
        ({"k": 1.5}, "k=1.5 is out of range"),
        ({"alpha": 0.0}, "alpha=0.0 is out of range: the slow weights step size must be a number in (0, 1]"),
        ({"alpha": 1.5}, "alpha=1.5 is out of range"),
        ({"mode": "maintain"}, "mode='maintain' is unknown: give 'none' or 'pullback' or 'reset'"),
    ],
)
def test_settings_out_of_range_are_refused_wherever_they_are_given(wrong, message):
    setting = {"momentum": 0.9, "k": 5, "alpha": 0.5, "mode": "none"}
    assert lookahead_matrix(0.5, **setting).shape == (2, 2)
    for function in (
        lambda **given: lookahead_matrix(0.5, **given),
        lambda **given: spectrum_rate(learning_rate=0.5, curvature=1.0, **given),
        lambda **given: best_parameters(curvature=1.0, **given),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011 (looked at below)
            function(**{**setting, **wrong})
        assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: heavy_ball_matrix(-0.1, 0.9),
            "x=-0.1 is out of range: learning rate times curvature must be at least 0",
        ),
        (lambda: heavy_ball_matrix([0.1, float("inf")], 0.9), "x=[0.1, inf] is out of range: it must hold finite real"),
        (lambda: heavy_ball_matrix(0.1, True), "momentum=True is out of range: it must be a number in [0, 1)"),
        (lambda: rate([[1.0, 2.0]]), "matrix has shape (1, 2): it must be (..., n, n)"),
        (lambda: rate(0.5), "matrix has shape (): it must be (..., n, n)"),
        (lambda: rate([[float("nan")]]), "matrix=[[nan]] is out of range: it must hold finite real numbers only"),
        (lambda: rate([[0.5]], k=0), "k=0 is out of range: the inner steps between two syncs must be an integer of at"),
        (
            lambda: spectrum_rate(learning_rate=0.0, curvature=1.0, momentum=0.9),
            "learning_rate=0.0 is out of range: it must be a finite number above 0",
        ),
        (
            lambda: spectrum_rate(learning_rate=float("inf"), curvature=1.0, momentum=0.9),
            "learning_rate=inf is out of range: it must be a finite number above 0",
        ),
        (
            lambda: spectrum_rate(learning_rate=0.1, curvature=[1.0, -1.0], momentum=0.9),
            "curvature=[1.0, -1.0] is out of range: each must be at least 0, and one of them above 0",
        ),
        (
            lambda: best_parameters(curvature=[[1.0]], momentum=0.9),
            "curvature has shape (1, 1): it must be a number, or a vector of shape (d,) with d at least 1",
        ),
        (
            lambda: best_parameters(curvature=1.0, momentum=[]),
            "momentum has shape (0,): it must be a number, or a vector with at least one",
        ),
        (lambda: best_parameters(curvature=1.0, momentum=[0.5, 1.0]), "momentum=1.0 is out of range: it must be a"),
    ],
)
def test_what_else_is_out_of_range_is_refused(call, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (looked at below)
        call()
    assert str(error.value).startswith(message)
