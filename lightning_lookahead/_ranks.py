"""Whether the ranks that hold the same weights still agree on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed

from lightning_lookahead._tensors import bit_sum

if TYPE_CHECKING:
    from torch import Tensor


def check_ranks(named: dict[str, Tensor]) -> None:
    """Compare a checksum of each tensor over all ranks, in one collective of two integers for each.

    Raises:
        RuntimeError: On every rank, with the name of the first tensor that differs.
    """
    sums = torch.stack([bit_sum(tensor) for tensor in named.values()])
    extremes = torch.stack([sums, -sums])
    distributed.all_reduce(extremes, op=distributed.ReduceOp.MAX)
    different = (extremes[0] != -extremes[1]).nonzero()
    if len(different):
        message = (
            f"Parameter {list(named)[int(different[0])]!r} differs between ranks, and so do {len(different) - 1} others"
            f" of {len(named)}: a rank has drifted (its weights were changed alone, or gradients were not averaged)."
            " Start again from a checkpoint saved before that."
        )
        raise RuntimeError(message)
