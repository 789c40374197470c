"""Mean and variance of the weights on the noisy quadratic model, under SGD and under Lookahead around it.

In closed form, for learning rates with which SGD converges. `noisy_quadratic` states the model.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

import numpy as np

from lightning_lookahead._arguments import check_alpha, check_integer, check_k, check_momentum

from ._checks import check_curvature, check_learning_rate, check_modes, check_positive, check_variance
from .outer_momentum import noise_vector, outer_matrix, settled_variance, way_gone

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Moments(NamedTuple):
    """Mean and variance of each weight: a row for each point in time, a column for each mode."""

    mean: NDArray[np.float64]
    variance: NDArray[np.float64]


def sgd_variance(*, learning_rate: float, curvature: ArrayLike, noise_variance: ArrayLike) -> NDArray[np.float64]:
    """The variance that the weights settle at under SGD: ``x s2 / (2 - x)`` with ``x = learning_rate * curvature``.

    The variance grows with the learning rate. A mode without curvature does not move: its variance is 0.

    Args:
        learning_rate: Of SGD, in (0, 2 / max(curvature)).
        curvature: ``a``, of shape (d,), at least 0; or a number.
        noise_variance: ``s2``, of shape (d,), at least 0; or a number.

    Returns:
        Variances of shape (d,).

    Raises:
        ValueError: If an argument is out of range, or shapes do not match.

    Example:
        >>> sgd_variance(learning_rate=0.5, curvature=[1.0, 2.0], noise_variance=3.0)
        array([1., 3.])

    Source: Zhang, Lucas, Hinton, Ba 2019, noisy quadratic model, with the noise's variance where the
    paper prints its square.
    """
    a = check_curvature(curvature)
    x = check_learning_rate(learning_rate, a) * a
    return x * check_variance(noise_variance, "noise_variance", a) / (2 - x)


def lookahead_variance(
    *,
    learning_rate: float,
    curvature: ArrayLike,
    noise_variance: ArrayLike,
    k: SupportsIndex,
    alpha: float,
    momentum: float = 0.0,
    nesterov: bool = True,
    workers: SupportsIndex = 1,
) -> NDArray[np.float64]:
    """The variance that phi settles at under Lookahead around SGD: `sgd_variance` times a factor below 1.

    The factor is ``alpha (1 + r^k) / (2 - alpha + alpha r^k)``, and 1 for ``alpha=1``. The variance grows with the
    learning rate and with alpha. With outer momentum the factor is that of `lightning_lookahead.theory.outer_momentum`,
    and may be above 1.

    Args:
        learning_rate: Of SGD, in (0, 2 / max(curvature)).
        curvature: ``a``, of shape (d,), at least 0; or a number.
        noise_variance: ``s2``, of shape (d,), at least 0; or a number.
        k: Inner steps between two syncs; at least 1.
        alpha: Slow weights step size, in (0, 1]; with momentum above 0.
        momentum: Outer momentum mu, in [0, 1); 0 is Lookahead.
        nesterov: Whether it is Nesterov's.
        workers: Runs that train apart, of whose weights a sync takes the mean; at least 1. It divides the noise.

    Returns:
        Variances of phi, of shape (d,).

    Raises:
        ValueError: If an argument is out of range, shapes do not match, or the outer loop diverges.

    Example:
        >>> lookahead_variance(learning_rate=0.5, curvature=[1.0, 2.0], noise_variance=3.0, k=5, alpha=0.5).round(4)
        array([0.3402, 1.    ])

    Source: Zhang, Lucas, Hinton, Ba 2019, noisy quadratic model.
    """
    variance = sgd_variance(learning_rate=learning_rate, curvature=curvature, noise_variance=noise_variance)
    variance /= check_integer(workers, "workers", 1, "the runs that train apart")
    if check_momentum(momentum):
        c = way_gone(learning_rate * check_curvature(curvature), check_k(k))
        alpha = check_positive(alpha, "alpha")
        return settled_variance(variance, c, alpha=alpha, momentum=momentum, nesterov=nesterov)
    alpha = check_alpha(alpha)
    power = (1 - learning_rate * check_curvature(curvature)) ** check_k(k)
    # The fraction first: at alpha=1 it is exactly 1.
    return variance * (alpha * (1 + power) / (2 - alpha + alpha * power))


def sgd_trajectory(
    *,
    learning_rate: float,
    curvature: ArrayLike,
    noise_variance: ArrayLike,
    steps: SupportsIndex,
    initial_mean: ArrayLike,
    initial_variance: ArrayLike = 0.0,
) -> Moments:
    """Mean and variance of the weights under SGD, from the start to after the last step.

    Args:
        learning_rate: Of SGD, in (0, 2 / max(curvature)).
        curvature: ``a``, of shape (d,), at least 0; or a number.
        noise_variance: ``s2``, of shape (d,), at least 0; or a number.
        steps: Inner steps; at least 0.
        initial_mean: Of the weights at the start, of shape (d,); or a number.
        initial_variance: Of the weights at the start, of shape (d,), at least 0; or a number.

    Returns:
        Two arrays of shape (steps + 1, d), a row for each inner step.

    Raises:
        ValueError: If an argument is out of range, or shapes do not match.

    Example:
        >>> sgd_trajectory(learning_rate=0.5, curvature=1.0, noise_variance=4.0, steps=2, initial_mean=8.0)
        Moments(mean=array([[8.],
               [4.],
               [2.]]), variance=array([[0.  ],
               [1.  ],
               [1.25]]))

    Source: Zhang, Lucas, Hinton, Ba 2019, noisy quadratic model.
    """
    limit = sgd_variance(learning_rate=learning_rate, curvature=curvature, noise_variance=noise_variance)
    a = check_curvature(curvature)
    times = check_integer(steps, "steps", 0, "the inner steps")
    return _trajectory(1 - learning_rate * a, limit, times, initial_mean, initial_variance)


def lookahead_trajectory(
    *,
    learning_rate: float,
    curvature: ArrayLike,
    noise_variance: ArrayLike,
    k: SupportsIndex,
    alpha: float,
    syncs: SupportsIndex,
    initial_mean: ArrayLike,
    initial_variance: ArrayLike = 0.0,
    momentum: float = 0.0,
    nesterov: bool = True,
    workers: SupportsIndex = 1,
) -> Moments:
    """Mean and variance of phi under Lookahead around SGD, from the start to after the last sync.

    Args:
        learning_rate: Of SGD, in (0, 2 / max(curvature)).
        curvature: ``a``, of shape (d,), at least 0; or a number.
        noise_variance: ``s2``, of shape (d,), at least 0; or a number.
        k: Inner steps between two syncs; at least 1.
        alpha: Slow weights step size, in (0, 1]; with momentum above 0.
        syncs: Syncs, ``k`` inner steps each; at least 0.
        initial_mean: Of the weights at the start, of shape (d,); or a number.
        initial_variance: Of the weights at the start, of shape (d,), at least 0; or a number.
        momentum: Outer momentum mu, in [0, 1); 0 is Lookahead.
        nesterov: Whether it is Nesterov's.
        workers: Runs that train apart, of whose weights a sync takes the mean; at least 1. It divides the noise.

    Returns:
        Two arrays of shape (syncs + 1, d), a row for each sync, ``k`` inner steps apart.

    Raises:
        ValueError: If an argument is out of range, shapes do not match, or the outer loop diverges.

    Example:
        >>> lookahead_trajectory(
        ...     learning_rate=0.5, curvature=1.0, noise_variance=4.0, k=2, alpha=0.5, syncs=1, initial_mean=8.0
        ... )
        Moments(mean=array([[8.],
               [5.]]), variance=array([[0.    ],
               [0.3125]]))

    Source: Zhang, Lucas, Hinton, Ba 2019, noisy quadratic model.
    """
    times = check_integer(syncs, "syncs", 0, "the syncs")
    limit = lookahead_variance(
        learning_rate=learning_rate,
        curvature=curvature,
        noise_variance=noise_variance,
        k=k,
        alpha=alpha,
        momentum=momentum,
        nesterov=nesterov,
        workers=workers,
    )
    if momentum:
        matrix = outer_matrix(
            learning_rate=learning_rate, curvature=curvature, k=k, alpha=alpha, momentum=momentum, nesterov=nesterov
        )
        g = noise_vector(alpha, momentum, nesterov=nesterov)
        variance = sgd_variance(learning_rate=learning_rate, curvature=curvature, noise_variance=noise_variance)
        c = matrix[:, 1, 0]
        noise = variance * c * (2 - c) / operator.index(workers)
        return _outer_trajectory(matrix, noise, g, times, initial_mean, initial_variance)
    contraction = 1 - alpha + alpha * (1 - learning_rate * check_curvature(curvature)) ** check_k(k)
    return _trajectory(contraction, limit, times, initial_mean, initial_variance)


def _outer_trajectory(  # noqa: PLR0917 (private)
    matrix: NDArray[np.float64],
    noise: NDArray[np.float64],
    g: NDArray[np.float64],
    times: int,
    initial_mean: ArrayLike,
    initial_variance: ArrayLike,
) -> Moments:
    """With outer momentum: mean and covariance of (phi, b), from the start, where b is zero; returned are phi's."""
    state, covariance = np.zeros((len(matrix), 2)), np.zeros_like(matrix)
    state[:, 0] = check_modes(initial_mean, "initial_mean", noise)
    covariance[:, 0, 0] = check_variance(initial_variance, "initial_variance", noise)
    means, variances = [state[:, 0]], [covariance[:, 0, 0]]
    for _ in range(times):
        state = (matrix @ state[..., None])[..., 0]
        covariance = matrix @ covariance @ matrix.transpose(0, 2, 1) + noise[:, None, None] * np.outer(g, g)
        means.append(state[:, 0])
        variances.append(covariance[:, 0, 0])
    return Moments(np.array(means), np.array(variances))


def _trajectory(
    contraction: NDArray[np.float64],
    limit: NDArray[np.float64],
    times: int,
    initial_mean: ArrayLike,
    initial_variance: ArrayLike,
) -> Moments:
    mean = check_modes(initial_mean, "initial_mean", limit)
    variance = check_variance(initial_variance, "initial_variance", limit)
    power = contraction ** np.arange(times + 1)[:, None]
    return Moments(power * mean, power**2 * variance + (1 - power**2) * limit)
