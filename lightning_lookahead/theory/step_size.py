"""The step size that is best on a quadratic. `lightning_lookahead.AdaptiveAlpha` estimates it in training."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ._checks import check_finite

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def optimal_alpha(
    A: ArrayLike,  # noqa: N803 (what the paper calls it)
    b: ArrayLike,
    theta_0: ArrayLike,
    theta_k: ArrayLike,
) -> float:
    """The alpha with which phi lands where ``1/2 x·A x - b·x`` is lowest on the line from ``theta_0`` to ``theta_k``.

    The optimum ``theta*`` is not needed, as ``A theta* = b``, and ``A`` need not have an inverse::

        alpha* = (theta_0 - theta_k)·(A theta_0 - b) / ((theta_0 - theta_k)·A (theta_0 - theta_k))

    It is not clipped: above 1 the line should be followed further than ``theta_k``, below 0 the other way.

    Args:
        A: Curvature of shape (d, d), symmetric and positive semi-definite.
        b: Minus the gradient at the origin, of shape (d,).
        theta_0: Weights at the start of the inner loop, of shape (d,).
        theta_k: Weights at its end, of shape (d,).

    Raises:
        ValueError: If shapes do not match, a value is not finite, ``A`` is not symmetric and positive semi-definite, or
            the loss is not curved along the line, so that no point of it is lowest.

    Example:
        >>> optimal_alpha([[4.0, 0.0], [0.0, 1.0]], [0.0, 0.0], theta_0=[1.0, 1.0], theta_k=[-1.0, 1.0])
        0.5

    Source: Zhang, Lucas, Hinton, Ba 2019, Proposition 1.
    """
    matrix = check_finite(A, "A")
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:  # noqa: PLR2004 (a matrix)
        message = f"A has shape {matrix.shape}: it must be (d, d) with d at least 1."
        raise ValueError(message)
    vectors = {"b": b, "theta_0": theta_0, "theta_k": theta_k}
    slope, start, end = (check_finite(value, name) for name, value in vectors.items())
    for name, vector in zip(vectors, (slope, start, end), strict=True):
        if vector.shape != matrix.shape[:1]:
            message = f"{name} has shape {vector.shape}: it must be {matrix.shape[:1]}, as A has shape {matrix.shape}."
            raise ValueError(message)
    rounding = matrix.shape[0] * np.finfo(np.float64).eps
    eigenvalues = np.linalg.eigvalsh(matrix)
    if not np.allclose(matrix, matrix.T) or eigenvalues.min() < -10 * rounding * np.abs(eigenvalues).max():
        message = f"A={A!r} is out of range: it must be symmetric, with no eigenvalue below 0."
        raise ValueError(message)
    way = start - end
    if not way.any():
        message = f"theta_k={theta_k!r} equals theta_0: the inner loop went nowhere, and every alpha leads there."
        raise ValueError(message)
    bend = way @ matrix @ way
    if bend <= rounding * (np.abs(way) @ np.abs(matrix) @ np.abs(way)):
        message = (
            f"theta_k={theta_k!r} is out of range: the loss is not curved on the line from theta_0 to there, so that no"
            " alpha is best. Give weights that differ where A is not 0."
        )
        raise ValueError(message)
    return float(way @ (matrix @ start - slope) / bend)
