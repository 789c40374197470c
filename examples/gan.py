"""A small GAN on a ring of eight Gaussians, with and without Lookahead over both players.

    python examples/gan.py

trains the same generator and discriminator from the same seeds with Adam alone, with Lookahead around each player by
itself, and around both together (Lookahead-Minmax: `sync_optimizers="together"`). It ends in a table: how many of the
eight Gaussians the generator reaches, and how many of its samples lie near one.
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from command_line import at_least_one, parser_of, stoppable
from common import ALONE, parse, quietly
from lightning_lookahead import LookaheadCallback

if TYPE_CHECKING:
    from argparse import Namespace

SPREAD = 0.05
RUNS = {"Adam": None, "Lookahead, each by itself": "independently", "Lookahead, together": "together"}


def centers() -> Tensor:
    """The eight means, on the unit circle: shape (8, 2)."""
    angles = torch.arange(8) * math.pi / 4
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, outputs))


class Gan(LightningModule):
    """Both players take a step in each batch, one after the other, by hand."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = network(8, 2), network(2, 1)
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        (real,) = batch
        first, second = self.optimizers()
        fake = self.generator(torch.randn(len(real), 8))
        scores = self.discriminator(real), self.discriminator(fake.detach())
        first.zero_grad()
        self.manual_backward(nn.functional.softplus(-scores[0]).mean() + nn.functional.softplus(scores[1]).mean())
        first.step()
        second.zero_grad()
        self.manual_backward(nn.functional.softplus(-self.discriminator(fake)).mean())
        second.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        players = (self.discriminator, self.generator)
        return [torch.optim.Adam(player.parameters(), lr=self.lr, betas=(0.5, 0.999)) for player in players]


def train(seed: int, sync_optimizers: str | None, args: Namespace) -> tuple[int, float]:
    """One run: Gaussians reached by at least 1% of the samples, and the share of samples near one."""
    seed_everything(seed, verbose=False)
    lookahead = [LookaheadCallback(args.k, args.alpha, sync_optimizers=sync_optimizers)] if sync_optimizers else []
    real = centers()[torch.randint(8, (args.steps * 128,))]
    trainer = Trainer(
        max_epochs=1,
        callbacks=[*lookahead, RichProgressBar(leave=False)],
        **ALONE,
    )
    model = Gan(args.lr)
    trainer.fit(model, DataLoader(TensorDataset(real + SPREAD * torch.randn_like(real)), batch_size=128))
    with torch.no_grad():
        distances = torch.cdist(model.generator(torch.randn(10_000, 8)), centers())
    near = distances.min(dim=1).values < 3 * SPREAD
    reached = distances.argmin(dim=1)[near].bincount(minlength=8) >= 100  # noqa: PLR2004 (1% of the samples)
    return int(reached.sum()), near.float().mean().item()


@stoppable()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=at_least_one, default=3, help="runs of each kind, from seeds 0, 1, ... (3)")
    parser.add_argument("--steps", type=at_least_one, default=3000, help="batches of 128 samples (3000)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of Adam, for both players (0.002)")
    args = parse(parser)
    quietly()

    console = Console()
    table = Table("", title=f"Ring of 8 Gaussians, lr {args.lr}, k {args.k}, alpha {args.alpha}, {args.steps} steps")
    for heading in (
        "Gaussians reached",
        "samples near one: mean",
        "std",
        *(f"seed {seed}" for seed in range(args.seeds)),
    ):
        table.add_column(heading, justify="right")
    for name, sync_optimizers in RUNS.items():
        console.print(name)
        runs = [train(seed, sync_optimizers, args) for seed in range(args.seeds)]
        near = [share for _, share in runs]
        spread = statistics.stdev(near) if len(near) > 1 else 0.0
        reached = ", ".join(str(number) for number, _ in runs)
        table.add_row(name, reached, *(f"{value:.1%}" for value in (statistics.mean(near), spread, *near)))
    console.print(table)


if __name__ == "__main__":
    main()
