"""Algorithm 1's outer step: the rule that everything here is about."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .tensors import copy_, interpolate_

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from .cpu_buckets import CpuBuckets


@torch.no_grad()
def outer_step(
    fast: Collection[Tensor], slow: Collection[Tensor], alpha: float, *, buckets: CpuBuckets | None = None
) -> None:
    """Move the slow weights part of the way to the fast ones, and put the fast ones there.

    ::

        phi   <- phi + alpha * (theta - phi)
        theta <- phi

    The second line copies and never recomputes, so that theta and phi are equal bit for bit in every dtype. With an
    alpha of 1 both are what theta was. No collective is issued, and nothing waits for the device.

    Args:
        fast: theta. Of a sharded tensor, this rank's piece.
        slow: phi: for each fast tensor one of its shape. Its dtype may be wider, and its device another.
        alpha: Slow weights step size, in (0, 1].
        buckets: ``fast`` and ``slow`` arranged for a CPU: equal values in fewer calls.

    Source: Zhang, Lucas, Hinton, Ba 2019, Algorithm 1.
    """
    if buckets is not None:
        buckets.outer_step(alpha)
        return
    interpolate_(slow, fast, alpha)
    copy_(fast, slow)
