"""Whether the ranks that hold the same weights still agree on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed

if TYPE_CHECKING:
    from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_ranks(named: dict[str, Tensor]) -> None:
    """Compare a checksum of each tensor over all ranks, in one collective of two integers for each.

    Raises:
        RuntimeError: On every rank, with the name of the first tensor that differs.
    """
    sums = torch.stack([_bit_sum(tensor) for tensor in named.values()])
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


def _bit_sum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's values read as integers: exact, and so the same in whatever order it is taken."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.detach().reshape(-1).view(_BITS[real.element_size()]).sum(dtype=torch.int64)
