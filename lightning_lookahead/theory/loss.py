"""The expected loss of weights on the noisy quadratic model, from their mean and variance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._checks import check_curvature, check_finite, check_variance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def excess_loss(mean: ArrayLike, variance: ArrayLike, *, curvature: ArrayLike) -> NDArray[np.float64]:
    """The part of the expected loss that depends on the weights: ``1/2 sum a (E^2 + V)``.

    With a mean of 0 and the variance that an optimizer settles at, this is its steady-state risk.

    Args:
        mean: ``E``, of shape (..., d); or a number.
        variance: ``V``, of shape (..., d), at least 0; or a number.
        curvature: ``a``, of shape (d,), at least 0; or a number.

    Returns:
        An array of shape (...), without the axis of the modes.

    Raises:
        ValueError: If an argument is out of range, or shapes do not match.

    Example:
        >>> excess_loss([[2.0, 1.0], [0.0, 0.0]], [1.0, 0.5], curvature=[1.0, 2.0])
        array([4., 1.])

    Source: Zhang, Lucas, Hinton, Ba 2019, noisy quadratic model.
    """
    a = check_curvature(curvature)
    moments = {"mean": check_finite(mean, "mean"), "variance": check_finite(variance, "variance")}
    for name, moment in moments.items():
        if moment.ndim and moment.shape[-1:] != a.shape:
            message = (
                f"{name} has shape {moment.shape}: it must be a number, or of shape (..., {a.size}) as curvature is."
            )
            raise ValueError(message)
    if (moments["variance"] < 0).any():
        message = f"variance={variance!r} is out of range: a variance must be at least 0."
        raise ValueError(message)
    return np.asarray((a * (moments["mean"] ** 2 + moments["variance"])).sum(-1) / 2)


def expected_loss(
    mean: ArrayLike, variance: ArrayLike, *, curvature: ArrayLike, noise_variance: ArrayLike
) -> NDArray[np.float64]:
    """The expected loss of weights with this mean and variance: ``1/2 sum a (E^2 + V + s2)``.

    It is `excess_loss` plus ``1/2 sum a s2``, the loss at the optimum's mean: the optimum itself moves.

    Args:
        mean: ``E``, of shape (..., d); or a number.
        variance: ``V``, of shape (..., d), at least 0; or a number.
        curvature: ``a``, of shape (d,), at least 0; or a number.
        noise_variance: ``s2``, of shape (d,), at least 0; or a number.

    Returns:
        An array of shape (...), without the axis of the modes.

    Raises:
        ValueError: If an argument is out of range, or shapes do not match.

    Example:
        >>> expected_loss([[2.0, 1.0], [0.0, 0.0]], [1.0, 0.5], curvature=[1.0, 2.0], noise_variance=1.0)
        array([5.5, 2.5])

    Source: Zhang, Lucas, Hinton, Ba 2019, noisy quadratic model.
    """
    a = check_curvature(curvature)
    floor = (a * check_variance(noise_variance, "noise_variance", a)).sum() / 2
    return np.asarray(excess_loss(mean, variance, curvature=curvature) + floor)
