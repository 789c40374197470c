"""Fine-tuning: a backbone that is frozen at first, and has no slow weights until it is trained.

    python examples/fine_tuning.py

trains a small network on scikit-learn's digits 0 to 4, gives it a new head, and goes on with all ten: at first the head
alone, then everything. It ends in a table, a row for each epoch: the tensors that have slow weights, and whether the
backbone is still the one that was trained before, bit for bit.
"""

from __future__ import annotations

import copy

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Subset

from command_line import stoppable
from common import ALONE, Digits, DigitsData, quietly
from lightning_lookahead import LookaheadCallback

EPOCHS, UNFREEZE = 6, 3
FEW = 5
"""Digits to train the backbone on."""


class FewDigits(DigitsData):
    """The images of 0 to 4."""

    def train_dataloader(self) -> DataLoader:
        few = [at for at, (_, digit) in enumerate(self.train) if digit < FEW]
        return DataLoader(Subset(self.train, few), batch_size=32, shuffle=True)


class FineTuned(Digits):
    """A trained backbone, frozen until an epoch begins, and a new head. The optimizer has all parameters at once."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(lr=0.05)
        self.net = nn.Sequential(copy.deepcopy(backbone).requires_grad_(requires_grad=False), self.net[-1])

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == UNFREEZE:
            self.net[0].requires_grad_(requires_grad=True)


class Rows(Callback):
    """A row for each epoch."""

    def __init__(self, table: Table, backbone: nn.Module, lookahead: LookaheadCallback) -> None:
        self.table, self.backbone, self.lookahead = table, backbone, lookahead

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (slow,) = self.lookahead.slow_weights
        sets = self.backbone.parameters(), pl_module.net[0].parameters()
        same = all(torch.equal(before, now) for before, now in zip(*sets, strict=True))
        kept = slow.values("slow")
        cells = len(kept), f"{sum(value.numel() for value in kept.values()):,}", "yes" if same else "no"
        accuracy = f"{trainer.callback_metrics['accuracy'].item():.1%}"
        self.table.add_row(*map(str, (trainer.current_epoch + 1, *cells, accuracy)))


@stoppable()
def main() -> None:
    quietly()
    seed_everything(0, verbose=False)
    first = Digits()
    Trainer(max_epochs=3, **ALONE).fit(first, FewDigits())
    backbone = first.net[:-1]

    table = Table("epoch", title=f"Digits, the backbone frozen for {UNFREEZE} epochs")
    for heading in (
        "tensors with slow weights",
        "numbers in them",
        "backbone as before",
        "test accuracy",
    ):
        table.add_column(heading, justify="right")
    lookahead = LookaheadCallback(k=5, alpha=0.5)
    callbacks = [lookahead, Rows(table, backbone, lookahead)]
    Trainer(max_epochs=EPOCHS, callbacks=callbacks, **ALONE).fit(FineTuned(backbone), DigitsData())
    Console().print(table)


if __name__ == "__main__":
    main()
