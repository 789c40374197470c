"""The noisy quadratic model by Monte Carlo: many particles take the steps that `moments` has formulas for."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from lightning_lookahead._arguments import check_alpha, check_integer, check_k, check_momentum

from ._checks import check_curvature, check_learning_rate, check_modes, check_positive, check_variance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def simulate(
    *,
    learning_rate: float,
    curvature: ArrayLike,
    noise_variance: ArrayLike,
    k: SupportsIndex = 1,
    alpha: float = 1.0,
    syncs: SupportsIndex,
    initial_mean: ArrayLike,
    particles: SupportsIndex,
    seed: int,
    momentum: float = 0.0,
    nesterov: bool = True,
    workers: SupportsIndex = 1,
) -> NDArray[np.float64]:
    """The slow weights of many independent runs of Algorithm 1 around SGD; with ``k=1, alpha=1`` of SGD itself.

    Equal arguments give equal numbers. All particles start at ``initial_mean``.

    Args:
        learning_rate: Of SGD, in (0, 2 / max(curvature)).
        curvature: ``a``, of shape (d,), at least 0; or a number.
        noise_variance: ``s2``, of shape (d,), at least 0; or a number.
        k: Inner steps between two syncs; at least 1.
        alpha: Slow weights step size, in (0, 1]; with momentum above 0.
        syncs: Syncs to do, ``k`` inner steps each; at least 0.
        initial_mean: Where the weights start, of shape (d,); or a number.
        particles: How many runs; at least 1. A variance that is estimated from n has a relative error of sqrt(2 / n).
        seed: Of the random numbers.
        momentum: Outer momentum mu, in [0, 1); 0 is Lookahead.
        nesterov: Whether it is Nesterov's.
        workers: Runs that train apart, of whose weights a sync takes the mean; at least 1.

    Returns:
        phi after the last sync, of shape (particles, d).

    Raises:
        ValueError: If an argument is out of range, or shapes do not match.

    Example:
        >>> phi = simulate(
        ...     learning_rate=0.5, curvature=1.0, noise_variance=3.0, syncs=30, initial_mean=1.0, particles=9999, seed=0
        ... )
        >>> phi.shape, round(float(phi.var()), 1)  # `sgd_variance` says 1
        ((9999, 1), 1.0)

    Source: Zhang, Lucas, Hinton, Ba 2019, Algorithm 1 on the noisy quadratic model.
    """
    a = check_curvature(curvature)
    rate, k, mu = check_learning_rate(learning_rate, a), check_k(k), check_momentum(momentum)
    alpha = check_positive(alpha, "alpha") if mu else check_alpha(alpha)
    deviation = np.sqrt(check_variance(noise_variance, "noise_variance", a))
    start = check_modes(initial_mean, "initial_mean", a)
    rows = check_integer(particles, "particles", 1, "the number of runs")
    random = np.random.default_rng(seed)
    phi, b = np.tile(start, (rows, 1)), np.zeros((rows, len(start)))
    apart = check_integer(workers, "workers", 1, "the runs that train apart")
    for _ in range(check_integer(syncs, "syncs", 0, "the syncs")):
        theta = np.tile(phi, (apart, 1, 1))
        for _ in range(k):
            theta -= rate * a * (theta - deviation * random.standard_normal(theta.shape))
        s = phi - theta.mean(0)
        b = mu * b + s
        phi -= alpha * (s + mu * b if nesterov else b)
    return phi
