"""Checks of arguments that only the theory has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lightning_lookahead._arguments import check_real

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def check_positive(value: float, name: str) -> float:
    """Return ``value`` as a float; raise unless it is a finite number above 0."""
    return check_real(value, name, lambda v: 0 < v < float("inf"), "it must be a finite number above 0")


def check_learning_rate(learning_rate: float, curvature: NDArray[np.float64]) -> float:
    """Return ``learning_rate`` as a float; raise unless SGD converges with it."""
    largest = curvature.max()
    what = f"it must be a number in (0, 2 / max(curvature)), which is (0, {2 / largest:g}) here"
    converges = lambda rate: rate > 0 and rate * largest < 2  # noqa: E731, PLR2004 (|1 - rate * a| < 1)
    return check_real(learning_rate, "learning_rate", converges, what)


def check_finite(value: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return ``value`` as an array; raise unless it holds finite real numbers."""
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.asarray(np.nan)
    if not np.isfinite(array).all():
        message = f"{name}={value!r} is out of range: it must hold finite real numbers only."
        raise ValueError(message)
    return array


def check_curvature(curvature: ArrayLike) -> NDArray[np.float64]:
    """Return ``curvature`` with shape (d,); raise unless it can be the eigenvalues of a Hessian that is not zero."""
    array = check_finite(curvature, "curvature")
    if array.ndim > 1 or array.size == 0:
        message = (
            f"curvature has shape {array.shape}: it must be a number, or a vector of shape (d,) with d at least 1."
        )
        raise ValueError(message)
    if (array < 0).any() or not array.any():
        message = f"curvature={curvature!r} is out of range: each must be at least 0, and one of them above 0."
        raise ValueError(message)
    return np.atleast_1d(array)


def check_modes(value: ArrayLike, name: str, curvature: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``value`` with the shape of ``curvature``, (d,); raise unless it is a number or one for each mode."""
    array = check_finite(value, name)
    if array.shape not in {(), curvature.shape}:
        message = f"{name} has shape {array.shape}: it must be a number, or have curvature's shape, {curvature.shape}."
        raise ValueError(message)
    return np.broadcast_to(array, curvature.shape)


def check_variance(value: ArrayLike, name: str, curvature: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``value`` with the shape of ``curvature``, (d,); raise if one is below 0."""
    array = check_modes(value, name, curvature)
    if (array < 0).any():
        message = f"{name}={value!r} is out of range: a variance must be at least 0."
        raise ValueError(message)
    return array
