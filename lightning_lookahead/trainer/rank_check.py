"""Whether the ranks that hold the same weights still agree on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed

from lightning_lookahead.outer_loop.names import names_in
from lightning_lookahead.outer_loop.tensors import bit_sum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import LightningModule, Trainer
    from torch import Tensor

    from lightning_lookahead.outer_loop.slow_weights import SlowWeights


class RankCheck:
    """Compares the weights of all ranks after each sync."""

    def __init__(self) -> None:
        self._checked: list[int] = []  # for each optimizer the syncs at the last look

    def begin(self, slow_weights: Sequence[SlowWeights]) -> None:
        """Pass over syncs that were done before."""
        self._checked = [slow.syncs for slow in slow_weights]

    def look(self, trainer: Trainer, pl_module: LightningModule, slow_weights: Sequence[SlowWeights]) -> None:
        """Compare the weights of optimizers that have synced since the last look.

        Raises:
            RuntimeError: If a rank has drifted.
        """
        for before, slow in zip(self._checked, slow_weights, strict=True):
            if slow.syncs != before and trainer.world_size > 1:
                names = names_in(pl_module)
                check_ranks({names.get(p, ["(of another module)"])[0]: p for p in slow.values("fast")})
        self.begin(slow_weights)


def check_ranks(named: dict[str, Tensor]) -> None:
    """Compare a checksum of each tensor over all ranks, in one collective of two integers for each.

    Raises:
        RuntimeError: On every rank, with the name of the first tensor that differs.
    """
    if not named:
        return
    sums = torch.stack([bit_sum(tensor) for tensor in named.values()])
    extremes = torch.stack([sums, -sums])
    distributed.all_reduce(extremes, op=distributed.ReduceOp.MAX)
    different = (extremes[0] != -extremes[1]).nonzero()
    if len(different):
        message = (
            f"Parameter {list(named)[int(different[0])]!r} differs between ranks, one of {len(different)} of"
            f" {len(named)}: a rank has drifted (its weights were changed alone, or gradients were not averaged). Start"
            " again from a checkpoint saved before that."
        )
        raise RuntimeError(message)
