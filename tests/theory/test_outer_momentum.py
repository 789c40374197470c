"""Momentum in the outer loop on the noisy quadratic model: closed forms against algebra, particles and the callback."""

from fractions import Fraction

import numpy as np
import pytest
import sympy

from lightning_lookahead import LookaheadCallback
from lightning_lookahead.theory.matched_risk import compare_at_risk, matched_learning_rate
from lightning_lookahead.theory.moments import lookahead_trajectory, lookahead_variance
from lightning_lookahead.theory.outer_momentum import outer_matrix, outer_rate
from lightning_lookahead.theory.simulation import simulate
from tests.helpers.particles import Particles
from tests.helpers.runs import make_trainer

MODEL = {"learning_rate": 0.8, "curvature": [1.0, 0.5, 0.25], "noise_variance": [2.0, 0.5, 1.0]}
PARTICLES = 200_000  # a variance has a standard error of 0.32%
LOOPS = [(5, 0.7, 0.6, True), (5, 0.7, 0.6, False), (1, 0.3, 0.9, True), (3, 1.2, 0.5, False), (4, 0.05, 0.95, True)]


def options(k, alpha, momentum, nesterov):
    return {"k": k, "alpha": alpha, "momentum": momentum, "nesterov": nesterov}


def cycle(phi, b, noise, c, *, alpha, momentum, nesterov):
    """One cycle: phi and b, where the inner loop ends at ``(1 - c) phi`` plus the noise."""
    s = c * phi - noise
    b = momentum * b + s
    return phi - alpha * (s + momentum * b if nesterov else b), b


@pytest.mark.parametrize("nesterov", [True, False])
def test_algebra_gives_the_matrix_and_the_noise_vector(nesterov):
    phi, b, noise, alpha, mu, c = sympy.symbols("phi b noise alpha mu c", real=True)
    after = sympy.Matrix(cycle(phi, b, noise, c, alpha=alpha, momentum=mu, nesterov=nesterov))
    jacobian, g = after.jacobian([phi, b]), after.jacobian([noise])
    assert sympy.simplify(after - jacobian * sympy.Matrix([phi, b]) - g * noise) == sympy.zeros(2, 1)
    numbers = {alpha: 0.7, mu: 0.6, c: 1 - 0.6**3}
    ours = outer_matrix(learning_rate=0.4, curvature=1.0, k=3, alpha=0.7, momentum=0.6, nesterov=nesterov)
    np.testing.assert_allclose(ours[0], np.array(jacobian.subs(numbers), dtype=float), rtol=1e-14)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mu", [Fraction(1, 2), Fraction(9, 10)])
def test_the_settled_covariance_is_the_fixed_point_in_rational_numbers(mu, nesterov):
    c, alpha, noise = Fraction(3, 4), Fraction(7, 10), Fraction(2)
    rows = [cycle(*unit, 0, c, alpha=alpha, momentum=mu, nesterov=nesterov) for unit in ((1, 0), (0, 1))]
    p = sympy.Matrix(2, 2, [rows[0][0], rows[1][0], rows[0][1], rows[1][1]])
    g = sympy.Matrix(cycle(0, 0, 1, c, alpha=alpha, momentum=mu, nesterov=nesterov))
    x, y, z = sympy.symbols("x y z")
    s = sympy.Matrix([[x, y], [y, z]])
    (solution,) = sympy.solve(list(p * s * p.T + noise * g * g.T - s), [x, y, z], dict=True)
    # one step of SGD with a curvature of 1 and a learning rate of 3/4 leaves c = 3/4, and noise (3/4)^2 s2
    model = {"learning_rate": 0.75, "curvature": 1.0, "noise_variance": float(noise / c**2)}
    ours = lookahead_variance(**model, k=1, alpha=float(alpha), momentum=float(mu), nesterov=nesterov)
    assert ours[0] == pytest.approx(float(solution[x]), rel=1e-12)


@pytest.mark.parametrize("loop", LOOPS)
def test_variances_are_those_of_many_particles(loop):
    phi = simulate(**MODEL, **options(*loop), syncs=120, initial_mean=0.0, particles=PARTICLES, seed=1)
    predicted = lookahead_variance(**MODEL, **options(*loop))
    np.testing.assert_allclose(phi.var(axis=0), predicted, rtol=0.015)


@pytest.mark.parametrize("loop", LOOPS[:2])
def test_means_and_variances_on_the_way_are_those_of_many_particles(loop):
    way = lookahead_trajectory(**MODEL, **options(*loop), syncs=4, initial_mean=[3.0, -2.0, 1.0])
    for syncs in range(5):
        phi = simulate(
            **MODEL, **options(*loop), syncs=syncs, initial_mean=[3.0, -2.0, 1.0], particles=PARTICLES, seed=2
        )
        np.testing.assert_allclose(phi.mean(axis=0), way.mean[syncs], atol=0.012)
        np.testing.assert_allclose(phi.var(axis=0), way.variance[syncs], rtol=0.015, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@pytest.mark.parametrize("workers", [3, 8])
def test_workers_that_train_apart_divide_the_variance(workers, momentum):
    loop = {"k": 5, "alpha": 0.7, "momentum": momentum}
    phi = simulate(**MODEL, **loop, syncs=40, initial_mean=1.0, particles=PARTICLES // 4, seed=0, workers=workers)
    predicted = lookahead_variance(**MODEL, **loop, workers=workers)
    np.testing.assert_allclose(phi.var(0), predicted, rtol=0.04)
    np.testing.assert_allclose(predicted, lookahead_variance(**MODEL, **loop) / workers, rtol=1e-14)
    way = lookahead_trajectory(**MODEL, **loop, syncs=40, initial_mean=1.0, workers=workers)
    np.testing.assert_allclose(way.variance[-1], predicted, rtol=1e-6)
    np.testing.assert_array_equal(way.mean, lookahead_trajectory(**MODEL, **loop, syncs=40, initial_mean=1.0).mean)


def test_a_known_number():
    one = {"learning_rate": 0.5, "curvature": 1.0, "noise_variance": 1.0, "k": 5, "alpha": 0.7, "momentum": 0.6}
    assert lookahead_variance(**one)[0] == pytest.approx(0.4356, abs=5e-5)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_a_momentum_that_goes_to_zero_gives_the_papers_formulas_and_zero_gives_them_exactly(alpha, nesterov):
    start = {"initial_mean": 2.0, "syncs": 5}
    paper = lookahead_trajectory(**MODEL, k=5, alpha=alpha, **start)
    none = lookahead_trajectory(**MODEL, **options(5, alpha, 0.0, nesterov), **start)
    tiny = lookahead_trajectory(**MODEL, **options(5, alpha, 1e-13, nesterov), **start)
    for a, b, c in zip(paper, none, tiny, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(a, c, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        lookahead_variance(**MODEL, k=5, alpha=alpha),
        lookahead_variance(**MODEL, **options(5, alpha, 1e-13, nesterov)),
        rtol=1e-9,
    )


@pytest.mark.parametrize("loop", LOOPS)
def test_a_trajectory_settles_at_the_variance_and_the_rate_is_that_of_the_largest_eigenvalue(loop):
    way = lookahead_trajectory(**MODEL, **options(*loop), syncs=2000, initial_mean=1.0)
    np.testing.assert_allclose(way.variance[-1], lookahead_variance(**MODEL, **options(*loop)), rtol=1e-9)
    model = {"learning_rate": MODEL["learning_rate"], "curvature": MODEL["curvature"]}
    rate = outer_rate(**model, **options(*loop))
    assert 0 < rate < 1
    matrices = outer_matrix(**model, **options(*loop))
    half, product = np.trace(matrices, axis1=1, axis2=2) / 2, np.linalg.det(matrices)
    under = half**2 - product  # below 0 the two eigenvalues are complex, of the same size
    radius = np.where(under < 0, np.sqrt(np.abs(product)), np.abs(half) + np.sqrt(np.maximum(under, 0.0)))
    assert rate == pytest.approx(1 - radius.max() ** (1 / loop[0]), rel=1e-9)


def test_a_mode_without_curvature_stays_and_one_without_noise_settles_at_nothing():
    model = {"learning_rate": 0.5, "curvature": [0.0, 1.0], "noise_variance": [1.0, 0.0]}
    loop = options(3, 0.5, 0.9, nesterov=True)
    np.testing.assert_array_equal(lookahead_variance(**model, **loop), [0.0, 0.0])
    way = lookahead_trajectory(**model, **loop, syncs=3, initial_mean=2.0, initial_variance=1.0)
    np.testing.assert_array_equal(way.mean[:, 0], 2.0)
    np.testing.assert_array_equal(way.variance[:, 0], 1.0)


@pytest.mark.parametrize("nesterov", [True, False])
def test_tiny_steps_and_curvatures_have_the_variance_of_the_paper_where_there_is_hardly_momentum(nesterov):
    model = {"learning_rate": 0.01, "curvature": [1e-17, 1e-6, 1e-3, 1.0], "noise_variance": 1.0}
    for alpha in (1e-12, 1e-8, 0.5):
        ours = lookahead_variance(**model, **options(5, alpha, 1e-12, nesterov))
        paper = lookahead_variance(**model, k=5, alpha=alpha)
        np.testing.assert_allclose(ours[1:], paper[1:], rtol=1e-9)
        # An inner loop goes hardly any way: SGD's variance is x / 2, and phi has the part alpha of it.
        assert ours[0] == pytest.approx(alpha * 0.01 * 1e-17 / 2, rel=1e-6, abs=0)
    assert (lookahead_variance(**model, **options(5, 1e-12, 0.9, nesterov)) > 0).all()


@pytest.mark.parametrize(("k", "alpha", "mu"), [(1, 0.9, 0.9), (3, 1.0, 0.5), (1, 1.3, 0.9)])
def test_where_inner_loops_pass_the_optimum_the_learning_rate_has_an_earlier_end(k, alpha, mu):
    model = {"curvature": [1.0, 0.3], "noise_variance": 1.0, "k": k, "alpha": alpha, "momentum": mu}
    rate = matched_learning_rate(1e6, **model)
    assert rate < 2
    assert lookahead_variance(learning_rate=rate, **model) @ model["curvature"] / 2 == pytest.approx(1e6, rel=1e-3)
    with pytest.raises(ValueError, match="the outer loop diverges"):
        lookahead_variance(learning_rate=rate * 1.001, **model)


# -- at the same risk


@pytest.mark.parametrize(("risk", "mu", "expected"), [(0.03, 0.95, 0.0433), (0.01, 0.9, 0.206)])
def test_with_momentum_the_loss_at_the_same_risk_is_lower(risk, mu, expected):
    problem = {"curvature": 1 / np.arange(1.0, 101.0), "noise_variance": 1.0, "initial_mean": 1.0, "k": 5}
    plain = compare_at_risk(risk, **problem, steps=1000)
    with_momentum = compare_at_risk(risk, **problem, steps=1000, momentum=mu)
    assert with_momentum.sgd == plain.sgd
    assert with_momentum.lookahead.excess_loss == pytest.approx(expected, rel=0.02)
    assert with_momentum.lookahead.excess_loss < plain.lookahead.excess_loss
    rate, alpha, _ = with_momentum.lookahead
    model = {"curvature": problem["curvature"], "noise_variance": 1.0}
    variance = lookahead_variance(learning_rate=rate, **model, k=5, alpha=alpha, momentum=mu)
    assert problem["curvature"] @ variance / 2 == pytest.approx(risk, rel=1e-9)


@pytest.mark.parametrize("k", [1, 4, 5])
@pytest.mark.parametrize("mu", [0.5, 0.9])
def test_the_risk_grows_with_the_learning_rate_so_that_there_is_one_for_each(mu, k):
    model = {"curvature": [1.0, 0.1], "noise_variance": 1.0}
    rates = [matched_learning_rate(risk, **model, k=k, alpha=0.4, momentum=mu) for risk in (0.01, 0.05, 0.1, 0.2)]
    assert rates == sorted(rates)
    loop = {"k": k, "alpha": 0.4, "momentum": mu}
    risks = [model["curvature"] @ lookahead_variance(learning_rate=rate, **model, **loop) / 2 for rate in rates]
    np.testing.assert_allclose(risks, [0.01, 0.05, 0.1, 0.2], rtol=1e-9)
    grid = np.linspace(0.01, rates[-1], 50)
    found = [model["curvature"] @ lookahead_variance(learning_rate=rate, **model, **loop) for rate in grid]
    assert (np.diff(found) > 0).all()


# -- what is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"workers": 0}, "workers=0 is out of range"),
        ({"momentum": 1.0}, r"momentum=1.0 is out of range: it must be a number in \[0, 1\)"),
        ({"momentum": -0.5}, "momentum=-0.5 is out of range"),
        ({"alpha": 0.0}, "alpha=0.0 is out of range: it must be a finite number above 0"),
        ({"alpha": 1.4, "momentum": 0.9}, "alpha=1.4 is out of range.*the outer loop diverges"),
        ({"k": 0}, "k=0 is out of range"),
    ],
)
def test_what_is_out_of_range_is_refused(wrong, message):
    loop = {"k": 50, "alpha": 0.7, "momentum": 0.5, **wrong}
    for function in (lookahead_variance, lambda **o: lookahead_trajectory(**o, syncs=2, initial_mean=0.0)):
        with pytest.raises(ValueError, match=message):
            function(**MODEL, **loop)


# -- the callback itself


def test_the_callback_in_a_trainer_settles_at_the_predicted_variance():
    module, callback = Particles(PARTICLES, 150, **MODEL), LookaheadCallback(k=5, alpha=0.7, outer_momentum=0.6)
    make_trainer(callback, max_epochs=1).fit(module)
    with callback.use_weights("slow"):  # after the 30th sync
        predicted = lookahead_variance(**MODEL, k=5, alpha=0.7, momentum=0.6)
        np.testing.assert_allclose(module.variance(), predicted, rtol=0.015)
