"""The deterministic quadratic: how fast heavy ball converges, and Lookahead around it.

Along an eigenvector of the Hessian with eigenvalue ``a``, all that matters is ``x = learning_rate * a``. One step of
heavy ball takes theta and its last move ``v``, as distances from the optimum, to ``M (theta, v)``::

    M = [[1 - x, momentum],
         [   -x, momentum]]

``v`` is the momentum buffer of `torch.optim.SGD`, times minus the learning rate. One cycle of Lookahead, k steps and a
sync, takes ``(phi, v)`` to ``P (phi, v)``::

    P = diag(alpha, c) M^k + diag(1 - alpha, e)

where c and e are what the sync does to the momentum, the callback's ``pullback_momentum``. In brackets is the paper's
word:

- ``"none"`` (maintain): it stays as it is; c = 1, e = 0.
- ``"pullback"`` (interpolate): it moves as the weights do; c = alpha, e = 1 - alpha.
- ``"reset"`` (reset): it becomes zero; c = e = 0.

Source: Zhang, Lucas, Hinton, Ba 2019, deterministic quadratic, with heavy ball as inner optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex, get_args

import numpy as np

from lightning_lookahead._arguments import PullbackMomentum, check_alpha, check_choice, check_k, check_momentum

from ._checks import check_curvature, check_finite, check_positive

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

MODES = get_args(PullbackMomentum)


def heavy_ball_matrix(x: ArrayLike, momentum: float) -> NDArray[np.float64]:
    """What one step of heavy ball (classical momentum) does to ``(theta, v)``.

    Args:
        x: Learning rate times curvature, at least 0; a number or an array of any shape (...).
        momentum: In [0, 1).

    Returns:
        ``M`` of shape (..., 2, 2).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> heavy_ball_matrix(0.5, 0.25)
        array([[ 0.5 ,  0.25],
               [-0.5 ,  0.25]])

    Source: Zhang, Lucas, Hinton, Ba 2019, deterministic quadratic.
    """
    products, momentum = check_finite(x, "x"), check_momentum(momentum)
    if (products < 0).any():
        message = f"x={x!r} is out of range: learning rate times curvature must be at least 0."
        raise ValueError(message)
    same = np.full_like(products, momentum)
    return np.stack([np.stack([1 - products, same], -1), np.stack([-products, same], -1)], -2)


def lookahead_matrix(
    x: ArrayLike, momentum: float, *, k: SupportsIndex, alpha: float, mode: PullbackMomentum = "none"
) -> NDArray[np.float64]:
    """What one cycle of Lookahead around heavy ball does to ``(phi, v)``: k steps and a sync.

    In mode ``"reset"`` the second row is zero, as ``v`` is after the sync. From then on phi is multiplied by the upper
    left entry, ``1 - alpha + alpha (M^k)[0, 0]``, which is the one eigenvalue beside 0.

    Args:
        x: Learning rate times curvature, at least 0; a number or an array of any shape (...).
        momentum: In [0, 1).
        k: Inner steps between two syncs; at least 1.
        alpha: Slow weights step size, in (0, 1].
        mode: What the sync does to ``v``: ``"none"`` leaves it, ``"pullback"`` moves it as the weights, ``"reset"``
            makes it zero.

    Returns:
        ``P`` of shape (..., 2, 2).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> lookahead_matrix(0.5, 0.25, k=1, alpha=0.5)
        array([[ 0.75 ,  0.125],
               [-0.5  ,  0.25 ]])
        >>> lookahead_matrix(0.5, 0.25, k=1, alpha=0.5, mode="reset")
        array([[0.75 , 0.125],
               [0.   , 0.   ]])

    Source: Zhang, Lucas, Hinton, Ba 2019, deterministic quadratic, with the entries corrected.
    """
    alpha = check_alpha(alpha)
    check_choice("mode", mode, MODES)
    to, stay = {"none": (1.0, 0.0), "pullback": (alpha, 1 - alpha), "reset": (0.0, 0.0)}[mode]
    power = np.linalg.matrix_power(heavy_ball_matrix(x, momentum), check_k(k))
    return np.asarray(np.diag([alpha, to]) @ power + np.diag([1 - alpha, stay]))


def rate(matrix: ArrayLike, k: SupportsIndex = 1) -> NDArray[np.float64]:
    """The part of the distance to the optimum that an inner step takes away in the long run: ``1 - rho(P)^(1/k)``.

    ``rho`` is the largest absolute value of an eigenvalue. Below 0 the weights diverge.

    Args:
        matrix: ``P`` of shape (..., n, n), which is what ``k`` steps do.
        k: Inner steps that it stands for; at least 1.

    Returns:
        An array of shape (...).

    Raises:
        ValueError: If an argument is out of range, or the matrix is not square.

    Example:
        >>> round(float(rate(heavy_ball_matrix(1.0, 0.25))), 4)  # 1 - sqrt(momentum)
        0.5
        >>> float(rate(lookahead_matrix(0.785, 0.99, k=20, alpha=0.5, mode="reset"), k=20)) < 0
        True

    Source: Zhang, Lucas, Hinton, Ba 2019, deterministic quadratic.
    """
    square = check_finite(matrix, "matrix")
    if square.ndim < 2 or square.shape[-1] != square.shape[-2] or not square.size:  # noqa: PLR2004 (a matrix)
        message = f"matrix has shape {square.shape}: it must be (..., n, n)."
        raise ValueError(message)
    radius = np.abs(np.linalg.eigvals(square)).max(-1)
    return np.asarray(1 - radius ** (1 / check_k(k)))


def spectrum_rate(
    *,
    learning_rate: float,
    curvature: ArrayLike,
    momentum: float,
    k: SupportsIndex = 1,
    alpha: float = 1.0,
    mode: PullbackMomentum = "none",
) -> float:
    """The rate per inner step over all eigenvalues of the Hessian: that of the slowest mode.

    With ``k=1, alpha=1`` it is that of heavy ball itself.

    Args:
        learning_rate: Above 0.
        curvature: The eigenvalues, of shape (d,), at least 0; or a number.
        momentum: In [0, 1).
        k: Inner steps between two syncs; at least 1.
        alpha: Slow weights step size, in (0, 1].
        mode: ``"none"``, ``"pullback"`` or ``"reset"``, as for `lookahead_matrix`.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> round(spectrum_rate(learning_rate=1.0, curvature=[1.0, 0.1], momentum=0.0), 4)
        0.1

    Source: Zhang, Lucas, Hinton, Ba 2019, deterministic quadratic.
    """
    x = check_positive(learning_rate, "learning_rate") * check_curvature(curvature)
    return float(rate(lookahead_matrix(x, momentum, k=k, alpha=alpha, mode=mode), k).min())
