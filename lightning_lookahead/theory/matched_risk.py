"""SGD and Lookahead with the same steady-state risk on the noisy quadratic model: which is further after some steps?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

import numpy as np

from lightning_lookahead._arguments import check_alpha, check_integer, check_k

from ._checks import check_curvature, check_positive, check_variance
from ._search import lowest
from .loss import excess_loss
from .moments import lookahead_trajectory, lookahead_variance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_LEAST_ALPHA, _ALPHAS = 1e-5, 51  # 10 for each power of ten


class Setting(NamedTuple):
    """A learning rate and an alpha (1 for SGD), and the excess loss that they lead to."""

    learning_rate: float
    alpha: float
    excess_loss: float


class Comparison(NamedTuple):
    """SGD and the best Lookahead around it, with the same steady-state risk."""

    sgd: Setting
    lookahead: Setting


def matched_learning_rate(
    risk: float, *, curvature: ArrayLike, noise_variance: ArrayLike, k: SupportsIndex = 1, alpha: float = 1.0
) -> float:
    """The learning rate with which Lookahead around SGD settles at a risk; with ``k=1, alpha=1`` SGD itself.

    The risk is `excess_loss` of the variance that phi settles at. In each mode it grows with the learning rate, so that
    there is one at most, which bisection finds to the last bit.

    Args:
        risk: The steady-state excess loss, above 0.
        curvature: ``a``, of shape (d,), at least 0; or a number.
        noise_variance: ``s2``, of shape (d,), at least 0; or a number.
        k: Inner steps between two syncs; at least 1.
        alpha: Slow weights step size, in (0, 1].

    Returns:
        A learning rate in (0, 2 / max(curvature)).

    Raises:
        ValueError: If an argument is out of range, shapes do not match, or no learning rate with which SGD converges
            gives this much risk. With an odd ``k`` and an ``alpha`` below 1 the risk is bounded: phi averages what
            jumps from side to side.

    Example:
        >>> round(matched_learning_rate(1.5, curvature=1.0, noise_variance=3.0), 12)
        1.0
        >>> round(matched_learning_rate(0.5, curvature=1.0, noise_variance=3.0, k=5, alpha=0.5), 12)
        1.0

    Source: Zhang, Lucas, Hinton, Ba 2019, noisy quadratic model.
    """
    risk, k, alpha = check_positive(risk, "risk"), check_k(k), check_alpha(alpha)
    a = check_curvature(curvature)
    noise = check_variance(noise_variance, "noise_variance", a)
    most = _risk(_largest(a), a, noise, k, alpha)
    if risk > most:
        message = (
            f"risk={risk!r} cannot be reached with k={k} and alpha={alpha}: learning rates in (0, 2 / max(curvature))"
            f" give less than {most:.6g}."
        )
        raise ValueError(message)
    return _bisect(risk, a, noise, k, alpha)


def compare_at_risk(
    risk: float,
    *,
    curvature: ArrayLike,
    noise_variance: ArrayLike,
    initial_mean: ArrayLike,
    k: SupportsIndex,
    steps: SupportsIndex,
) -> Comparison:
    """SGD, and Lookahead with the alpha that leads to the lowest excess loss, both with the same steady-state risk.

    Each alpha has one learning rate that gives this risk. Alphas from 0.00001 to 1 are tried on a logarithmic grid, and
    then more finely around the best; one with which the risk cannot be reached is passed over.

    Args:
        risk: The steady-state excess loss, above 0.
        curvature: ``a``, of shape (d,), at least 0; or a number.
        noise_variance: ``s2``, of shape (d,), at least 0; or a number.
        initial_mean: Where the weights start, of shape (d,); or a number.
        k: Inner steps between two syncs; at least 1.
        steps: Inner steps after which the loss is looked at; a multiple of ``k``, at least 0.

    Raises:
        ValueError: If an argument is out of range, shapes do not match, or the risk cannot be reached.

    Example:
        >>> sgd, lookahead = compare_at_risk(
        ...     0.01, curvature=[1.0, 0.01], noise_variance=1.0, initial_mean=1.0, k=5, steps=1000
        ... )
        >>> f"{sgd.excess_loss:.4f} {lookahead.excess_loss:.4f}"
        '0.0123 0.0117'

    Source: Zhang, Lucas, Hinton, Ba 2019, noisy quadratic model and its figure.
    """
    k = check_k(k)
    if check_integer(steps, "steps", 0, "the inner steps") % k:
        message = f"steps={steps!r} is out of range: with k={k} it must be a multiple of {k}, for phi to be looked at."
        raise ValueError(message)
    a = check_curvature(curvature)
    noise = check_variance(noise_variance, "noise_variance", a)

    def setting(learning_rate: float, alpha: float, k: int) -> Setting:
        mean, variance = lookahead_trajectory(
            learning_rate=learning_rate,
            curvature=a,
            noise_variance=noise,
            k=k,
            alpha=alpha,
            syncs=int(steps) // k,
            initial_mean=initial_mean,
        )
        return Setting(learning_rate, alpha, float(excess_loss(mean[-1], variance[-1], curvature=a)))

    def loss(alpha: float) -> float:
        if risk > _risk(_largest(a), a, noise, k, alpha):
            return math.inf
        return setting(_bisect(risk, a, noise, k, alpha), alpha, k).excess_loss

    def losses(exponents: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([loss(alpha) for alpha in 10.0**exponents])

    sgd = setting(matched_learning_rate(risk, curvature=a, noise_variance=noise), 1.0, 1)
    best = 10.0 ** lowest(losses, math.log10(_LEAST_ALPHA), 0.0, _ALPHAS)
    return Comparison(sgd, setting(_bisect(risk, a, noise, k, best), best, k))


def _largest(a: NDArray[np.float64]) -> float:
    """The end of the interval of learning rates, less a bit: at the end itself variances may be infinite."""
    return float(2 / a.max() * (1 - 1e-12))


def _risk(rate: float, a: NDArray[np.float64], noise: NDArray[np.float64], k: int, alpha: float) -> float:
    variance = lookahead_variance(learning_rate=rate, curvature=a, noise_variance=noise, k=k, alpha=alpha)
    return float(a @ variance) / 2


def _bisect(risk: float, a: NDArray[np.float64], noise: NDArray[np.float64], k: int, alpha: float) -> float:
    low, high = 0.0, _largest(a)
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _risk(middle, a, noise, k, alpha) < risk else (low, middle)
    return high
