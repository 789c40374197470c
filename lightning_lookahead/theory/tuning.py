"""The learning rate and momentum with which heavy ball, or Lookahead around it, converges fastest on a quadratic."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, SupportsIndex

import numpy as np

from lightning_lookahead._arguments import check_k, check_momentum

from ._checks import check_curvature, check_finite
from ._search import lowest
from .quadratic import lookahead_matrix, rate

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from lightning_lookahead._arguments import PullbackMomentum


class Best(NamedTuple):
    """The settings with the best rate that a search has found."""

    learning_rate: float
    momentum: float
    rate: float


def best_parameters(
    *,
    curvature: ArrayLike,
    momentum: ArrayLike,
    k: SupportsIndex = 1,
    alpha: float = 1.0,
    mode: PullbackMomentum = "none",
) -> Best:
    """The learning rate, and of some momenta the one, with the best rate over all eigenvalues of the Hessian.

    For each momentum, learning rates in (0, 2 (1 + momentum) / max(curvature)), with which heavy ball converges, are
    tried on a grid that is finest at both ends, with 100 points for each of the ``k`` half turns that ``M^k`` may make,
    and then more finely around the best. Where several are equally good, it is any of them.

    For a figure of the rate against the condition number kappa, hold the momentum and tune the learning rate. Heavy
    ball's rate is then ``1 - sqrt(momentum)``, whatever kappa is, while it is under-damped: up to a kappa of
    ``((1 + sqrt(momentum)) / (1 - sqrt(momentum)))^2``, 158,000 for a momentum of 0.99. Above it is over-damped, and
    the rate falls. Say which spectrum it is. With that momentum, ``k=20, alpha=0.5``, and the momentum left alone by
    syncs, Lookahead is faster up to a kappa of some 60,000 if there are the two eigenvalues 1 and 1/kappa, and up to
    some 1,500 if there are 50 in geometric progression.

    Args:
        curvature: The eigenvalues, of shape (d,), at least 0; or a number.
        momentum: In [0, 1): a number, or a vector to choose from.
        k: Inner steps between two syncs; at least 1.
        alpha: Slow weights step size, in (0, 1].
        mode: ``"none"``, ``"pullback"`` or ``"reset"``, as for `lookahead_matrix`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> two = [1.0, 1 / 100]
        >>> round(best_parameters(curvature=two, momentum=0.99).rate, 4)
        0.005
        >>> round(best_parameters(curvature=two, momentum=0.99, k=20, alpha=0.5).rate, 4)
        0.0516
        >>> best_parameters(curvature=two, momentum=[0.0, 0.6, 0.99]).momentum
        0.6

    Source: Zhang, Lucas, Hinton, Ba 2019, deterministic quadratic and its figure.
    """
    a, k = check_curvature(curvature), check_k(k)
    momenta = np.atleast_1d(check_finite(momentum, "momentum"))
    if momenta.ndim > 1 or momenta.size == 0:
        message = f"momentum has shape {momenta.shape}: it must be a number, or a vector with at least one."
        raise ValueError(message)
    return max(
        (_tune(a, check_momentum(beta), k, alpha, mode) for beta in momenta.tolist()), key=lambda best: best.rate
    )


def _tune(a: NDArray[np.float64], momentum: float, k: int, alpha: float, mode: PullbackMomentum) -> Best:
    largest = 2 * (1 + momentum) / a.max()

    def learning_rates(angles: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(largest * np.sin(angles / 2) ** 2)

    def losses(angles: NDArray[np.float64]) -> NDArray[np.float64]:
        matrices = lookahead_matrix(np.outer(learning_rates(angles), a), momentum, k=k, alpha=alpha, mode=mode)
        return np.asarray(-rate(matrices, k).min(-1))

    points = 100 * (k + 20)
    edge = np.pi / points
    best = lowest(losses, edge, np.pi - edge, points)
    return Best(float(learning_rates(np.asarray(best))), momentum, -float(losses(np.array([best]))[0]))
