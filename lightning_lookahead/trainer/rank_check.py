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

    from lightning_lookahead.outer_loop.saved_format import Weights
    from lightning_lookahead.outer_loop.slow_weights import SlowWeights


class RankCheck:
    """Compares the weights of all ranks after each sync."""

    def __init__(self) -> None:
        self._checked: list[int] = []  # for each optimizer the syncs at the last look

    def begin(self, slow_weights: Sequence[SlowWeights]) -> None:
        """Pass over syncs that were done before."""
        self._checked = [slow.syncs for slow in slow_weights]

    def look(
        self, trainer: Trainer, pl_module: LightningModule, slow_weights: Sequence[SlowWeights], weights: Weights
    ) -> None:
        """Compare the weights of optimizers that have synced since the last look, and their outer momentum.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            slow_weights: The slow weights of each optimizer.
            weights: The set that all ranks have alike.

        Raises:
            RuntimeError: If a rank has drifted.
        """
        for before, slow in zip(self._checked, slow_weights, strict=True):
            if slow.syncs != before and trainer.world_size > 1:
                names = {p: its[0] for p, its in names_in(pl_module).items()}
                named = {names.get(p, "(of another module)"): value for p, value in slow.values(weights).items()}
                momentum = slow.pairs.outer_momentum.b.items()
                named |= {f"{names.get(p, '(of another module)')} (outer momentum)": b for p, b in momentum}
                check_ranks(named, trainer.strategy.root_device)
        self.begin(slow_weights)


def check_ranks(named: dict[str, Tensor], device: torch.device) -> None:
    """Compare a checksum of each tensor over all ranks, in one collective of two integers for each, on this device.

    Raises:
        RuntimeError: On every rank, with the name of the first tensor that differs.
    """
    if not named:
        return
    sums = torch.stack([bit_sum(tensor).to(device) for tensor in named.values()])
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
