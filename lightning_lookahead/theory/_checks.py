"""What may be given to the theory: every check of an argument that it has alone, and what it says."""

from __future__ import annotations

import operator
from numbers import Real
from typing import TYPE_CHECKING, SupportsIndex

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def check_count(value: SupportsIndex, name: str, what: str, least: int) -> int:
    """Return ``value`` as an int; raise unless it is an integer of at least ``least``."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < least:
        message = f"{name}={value!r} is out of range: {what} must be an integer of at least {least}."
        raise ValueError(message)
    return operator.index(value)


def check_momentum(momentum: float) -> float:
    """Return ``momentum`` as a float; raise unless it is a number in [0, 1)."""
    if isinstance(momentum, bool) or not isinstance(momentum, Real) or not 0 <= momentum < 1:
        message = f"momentum={momentum!r} is out of range: it must be a number in [0, 1)."
        raise ValueError(message)
    return float(momentum)


def check_positive(value: float, name: str) -> float:
    """Return ``value`` as a float; raise unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < float("inf"):
        message = f"{name}={value!r} is out of range: it must be a finite number above 0."
        raise ValueError(message)
    return float(value)


def check_learning_rate(learning_rate: float, curvature: NDArray[np.float64]) -> float:
    """Return ``learning_rate`` as a float; raise unless SGD converges with it."""
    largest = curvature.max()
    if (
        isinstance(learning_rate, bool)
        or not isinstance(learning_rate, Real)
        or not (learning_rate > 0 and learning_rate * largest < 2)  # noqa: PLR2004 (|1 - learning_rate * a| < 1)
    ):
        message = (
            f"learning_rate={learning_rate!r} is out of range: it must be a number in (0, 2 / max(curvature)), which is"
            f" (0, {2 / largest:g}) here."
        )
        raise ValueError(message)
    return float(learning_rate)


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
