"""Momentum in the outer loop on the noisy quadratic model: what a cycle does to phi and its momentum b.

In a mode with curvature ``a``, k steps of SGD take phi to ``r phi`` plus noise of variance N. With ``x`` for the
learning rate times ``a``::

    r = (1 - x)^k,    N = x^2 s2 (1 + (1 - x)^2 + ... + (1 - x)^(2k - 2))

So ``s = phi - theta`` is ``c phi`` minus that noise, ``c = 1 - r``, and an outer step takes ``(phi, b)`` to
``P (phi, b)`` plus the noise times ``g``. With Nesterov's momentum mu, and with heavy ball::

    P = [[1 - alpha c (1 + mu), -alpha mu^2], [c, mu]],    g = (alpha (1 + mu), -1)
    P = [[1 - alpha c,          -alpha mu  ], [c, mu]],    g = (alpha,          -1)

The outer loop is stable, the spectral radius of P below 1, where ``alpha c`` is below ``2 (1 + mu) / (1 + 2 mu)`` or
``2 (1 + mu)``. The covariance of ``(phi, b)`` settles where ``S = P S P^T + N g g^T``; solved for the variance of phi,
with ``V`` for that of SGD::

    V (1 + r) alpha (1 + mu + alpha c mu (1 + 2 mu)) / ((1 - mu + alpha c mu) (2 (1 + mu) - alpha c (1 + 2 mu)))
    V (1 + r) alpha (1 + mu)                         / ((1 - mu)              (2 (1 + mu) - alpha c))

Workers that train apart and meet at the sync: phi goes towards the mean of their weights. So the noise N is divided by
their number, and the variance with it.

Source: derived for this package from SNOO's outer step (arXiv 2510.15830) and the noisy quadratic model of Zhang,
Lucas, Hinton, Ba 2019; with a mu of 0 it is the paper's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

from lightning_lookahead._arguments import check_k, check_momentum, largest_alpha

from ._checks import check_curvature, check_positive
from .quadratic import rate

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def outer_matrix(
    *,
    learning_rate: float,
    curvature: ArrayLike,
    k: SupportsIndex,
    alpha: float,
    momentum: float,
    nesterov: bool = True,
) -> NDArray[np.float64]:
    """What one cycle, k steps of SGD and an outer step with momentum, does to the mean of ``(phi, b)``.

    Args:
        learning_rate: Of SGD, above 0.
        curvature: ``a``, of shape (d,), at least 0; or a number.
        k: Inner steps between two syncs; at least 1.
        alpha: Slow weights step size, above 0.
        momentum: mu, in [0, 1).
        nesterov: Whether it is Nesterov's momentum.

    Returns:
        ``P`` of shape (d, 2, 2).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> outer_matrix(learning_rate=0.5, curvature=1.0, k=1, alpha=0.5, momentum=0.5)
        array([[[ 0.625, -0.125],
                [ 0.5  ,  0.5  ]]])

    Source: the top of this module.
    """
    alpha, mu = check_positive(alpha, "alpha"), check_momentum(momentum)
    a = check_curvature(curvature)
    c = way_gone(check_positive(learning_rate, "learning_rate") * a, check_k(k))
    own, past = (1 + mu, mu * mu) if nesterov else (1.0, mu)
    rows = [[1 - alpha * c * own, np.full_like(c, -alpha * past)], [c, np.full_like(c, mu)]]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def outer_rate(
    *,
    learning_rate: float,
    curvature: ArrayLike,
    k: SupportsIndex,
    alpha: float,
    momentum: float,
    nesterov: bool = True,
) -> float:
    """The rate per inner step of SGD with this outer loop, of the slowest mode: ``1 - rho(P)^(1/k)``.

    Below 0 the weights diverge.

    Args:
        learning_rate: Of SGD, above 0.
        curvature: ``a``, of shape (d,), at least 0; or a number.
        k: Inner steps between two syncs; at least 1.
        alpha: Slow weights step size, above 0.
        momentum: mu, in [0, 1).
        nesterov: Whether it is Nesterov's momentum.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> slow = {"learning_rate": 0.5, "curvature": [1.0, 0.01], "k": 5, "alpha": 0.5}
        >>> f"{outer_rate(**slow, momentum=0.0):.4f} {outer_rate(**slow, momentum=0.8):.4f}"
        '0.0025 0.0233'

    Source: the top of this module.
    """
    matrix = outer_matrix(
        learning_rate=learning_rate, curvature=curvature, k=k, alpha=alpha, momentum=momentum, nesterov=nesterov
    )
    return float(rate(matrix, k).min())


def noise_vector(alpha: float, momentum: float, *, nesterov: bool) -> NDArray[np.float64]:
    """``g``, of shape (2,): what the noise of a cycle does to ``(phi, b)``."""
    return np.array([alpha * (1 + momentum if nesterov else 1), -1.0])


def settled_variance(
    variance: NDArray[np.float64], c: NDArray[np.float64], *, alpha: float, momentum: float, nesterov: bool
) -> NDArray[np.float64]:
    """The variance that phi settles at.

    Args:
        variance: ``V`` of shape (d,), what SGD alone settles at.
        c: Of shape (d,): the part of the way to the optimum that an inner loop goes.
        alpha: Slow weights step size, above 0.
        momentum: mu, in [0, 1).
        nesterov: Whether it is Nesterov's momentum.

    Raises:
        ValueError: If the outer loop diverges in a mode.
    """
    mu, step = momentum, alpha * c
    largest = largest_alpha(mu, nesterov=nesterov)
    if (step >= largest).any():
        message = (
            f"alpha={alpha!r} is out of range: with momentum={mu} and inner loops that go {c.max():.4g} times the way"
            f" to the optimum it must be below {largest / c.max():.4g}, as from there on the outer loop diverges."
        )
        raise ValueError(message)
    if nesterov:
        past = 1 + 2 * mu
        factor = (1 + mu + step * mu * past) / ((1 - mu + step * mu) * past)
    else:
        factor = np.full_like(step, (1 + mu) / (1 - mu))
    return variance * (2 - c) * alpha * factor / (largest - step)


def way_gone(x: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """``c = 1 - (1 - x)^k``, exact to rounding also where x is tiny."""
    small = np.minimum(x, 0.5)
    return np.where(x < 0.5, -np.expm1(k * np.log1p(-small)), 1 - (1 - x) ** k)  # noqa: PLR2004 (where both are exact)
