"""Algorithm 1's outer step: the rule that everything here is about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .tensors import copy_, difference, in_blocks, interpolate_, sgd_step_

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import Tensor

    from .tensors import OuterMomentum


@torch.no_grad()
def outer_step(
    fast: Collection[Tensor],
    slow: Collection[Tensor],
    alpha: float,
    momentum: OuterMomentum | None = None,
    *,
    portions: Iterable[tuple[list[Tensor], list[Tensor]]] | None = None,
) -> None:
    """Move the slow weights part of the way to the fast ones, and put the fast ones there.

    ::

        phi   <- phi + alpha * (theta - phi)
        theta <- phi

    With momentum, take a step of gradient descent instead whose gradient is ``s``, the way from theta to phi::

        s     <- phi - theta
        b     <- mu * b + s
        phi   <- phi - alpha * (s + mu * b)    with Nesterov's momentum
        phi   <- phi - alpha * b               without
        theta <- phi

    The last line copies and never recomputes, so that theta and phi are equal bit for bit in every dtype. Without
    momentum and with an alpha of 1 both are what theta was. With momentum phi and b are equal, bit for bit, to the
    parameter and the momentum buffer of `torch.optim.SGD` with the gradient ``s``, which is formed in phi's dtype. No
    collective is issued, and nothing waits for the device.

    Args:
        fast: theta. Of a sharded tensor, this rank's piece.
        slow: phi: for each fast tensor one of its shape. Its dtype may be wider, and its device another.
        alpha: Slow weights step size: in (0, 1], or above 0 with momentum.
        momentum: ``None``: Lookahead.
        portions: ``fast`` and ``slow`` as ordinary tensors of equal dtypes and devices, in portions to move one after
            the other: equal values, sooner. With momentum it is not used.

    Source: Zhang, Lucas, Hinton, Ba 2019, Algorithm 1. With momentum: SNOO (arXiv 2510.15830), DiLoCo (arXiv
    2311.08105).
    """
    if momentum is not None:
        for theta, phi, b in in_blocks(fast, slow, momentum.b):
            sgd_step_(phi, difference(phi, theta), b, momentum, alpha)
            copy_(theta, phi)
    elif portions is not None:
        for theta, phi in portions:
            torch._foreach_lerp_(phi, theta, alpha)
            torch._foreach_copy_(theta, phi)
    else:
        interpolate_(slow, fast, alpha)
        copy_(fast, slow)
