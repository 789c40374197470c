"""SGD and Lookahead with the same steady-state risk on the noisy quadratic model: which is further after some steps?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import numpy as np

from lightning_lookahead._arguments import check_alpha, check_integer, check_k, check_momentum, largest_alpha

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
    risk: float,
    *,
    curvature: ArrayLike,
    noise_variance: ArrayLike,
    k: SupportsIndex = 1,
    alpha: float = 1.0,
    momentum: float = 0.0,
    nesterov: bool = True,
) -> float:
    """The learning rate with which Lookahead around SGD settles at a risk; with ``k=1, alpha=1`` SGD itself.

    The risk is `excess_loss` of the variance that phi settles at. In each mode it grows with the learning rate, so that
    there is one at most, which bisection finds to the last bit.

    Args:
        risk: The steady-state excess loss, above 0.
        curvature: ``a``, of shape (d,), at least 0; or a number.
        noise_variance: ``s2``, of shape (d,), at least 0; or a number.
        k: Inner steps between two syncs; at least 1.
        alpha: Slow weights step size, in (0, 1]; with momentum above 1, too.
        momentum: Outer momentum mu, in [0, 1); 0 is Lookahead.
        nesterov: Whether it is Nesterov's.

    Returns:
        A learning rate with which SGD and the outer loop converge: in (0, 2 / max(curvature)) without momentum.

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
    risk = check_positive(risk, "risk")
    alpha = check_alpha(alpha, momentum=check_momentum(momentum), nesterov=nesterov)
    problem = _Problem(curvature, noise_variance, check_k(k), momentum, nesterov)
    end = problem.largest(alpha)
    most = problem.risk(end, alpha)
    if risk > most:
        message = (
            f"risk={risk!r} cannot be reached with k={k}, alpha={alpha} and momentum={momentum}: learning rates in"
            f" (0, {end:.6g}) give less than {most:.6g}."
        )
        raise ValueError(message)
    return problem.learning_rate(risk, alpha)


def compare_at_risk(
    risk: float,
    *,
    curvature: ArrayLike,
    noise_variance: ArrayLike,
    initial_mean: ArrayLike,
    k: SupportsIndex,
    steps: SupportsIndex,
    momentum: float = 0.0,
    nesterov: bool = True,
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
        momentum: Outer momentum mu, in [0, 1); 0 is Lookahead.
        nesterov: Whether it is Nesterov's.

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
    lookahead = _Problem(curvature, noise_variance, k, momentum, nesterov)
    alone = _Problem(curvature, noise_variance, 1)
    whole = int(steps)

    def loss(alpha: float) -> float:
        if risk > lookahead.risk(lookahead.largest(alpha), alpha):
            return math.inf
        return lookahead.setting(risk, alpha, initial_mean, whole).excess_loss

    def losses(exponents: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([loss(alpha) for alpha in 10.0**exponents])

    matched_learning_rate(risk, curvature=curvature, noise_variance=noise_variance)  # raises if SGD cannot reach it
    best = 10.0 ** lowest(losses, math.log10(_LEAST_ALPHA), 0.0, _ALPHAS)
    return Comparison(alone.setting(risk, 1.0, initial_mean, whole), lookahead.setting(risk, best, initial_mean, whole))


class _Problem:
    """A quadratic, and an outer loop but for its alpha: risk by learning rate, and learning rate by risk."""

    def __init__(
        self,
        curvature: ArrayLike,
        noise_variance: ArrayLike,
        k: int,
        momentum: float = 0.0,
        nesterov: bool = True,  # noqa: FBT001, FBT002
    ) -> None:
        self.curvature = check_curvature(curvature)
        noise = check_variance(noise_variance, "noise_variance", self.curvature)
        self.outer: dict[str, Any] = {"k": k, "momentum": momentum, "nesterov": nesterov}
        self.settings = {"curvature": self.curvature, "noise_variance": noise, **self.outer}

    def largest(self, alpha: float) -> float:
        """The end of the interval of learning rates, less a bit: at the end itself variances may be infinite.

        With an odd k and momentum the outer loop may diverge before SGD does: where inner loops pass the optimum.
        """
        mu, odd = self.outer["momentum"], self.outer["k"] % 2
        past = largest_alpha(mu, nesterov=self.outer["nesterov"]) / alpha - 1 if mu and odd else 1.0
        return float((1 + min(past, 1.0) ** (1 / self.outer["k"])) / self.curvature.max() * (1 - 1e-12))

    def risk(self, learning_rate: float, alpha: float) -> float:
        """The steady-state excess loss."""
        variance = lookahead_variance(learning_rate=learning_rate, alpha=alpha, **self.settings)
        return float(self.curvature @ variance) / 2

    def learning_rate(self, risk: float, alpha: float) -> float:
        """The one with this risk, to the last bit."""
        low, high = 0.0, self.largest(alpha)
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if self.risk(middle, alpha) < risk else (low, middle)
        return high

    def setting(self, risk: float, alpha: float, initial_mean: ArrayLike, steps: int) -> Setting:
        """The learning rate with this risk, and the excess loss after some steps."""
        rate = self.learning_rate(risk, alpha)
        syncs = steps // self.outer["k"]
        mean, variance = lookahead_trajectory(
            learning_rate=rate, alpha=alpha, syncs=syncs, initial_mean=initial_mean, **self.settings
        )
        return Setting(rate, alpha, float(excess_loss(mean[-1], variance[-1], curvature=self.curvature)))
