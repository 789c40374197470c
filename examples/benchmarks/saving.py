"""What does the callback add to saving and restoring a checkpoint?

    python examples/benchmarks/saving.py

A checkpoint with the callback holds two sets of weights, so it is compared with one of Lightning alone for a module of
twice the parameters: as many bytes. It is saved in the middle of a cycle, when the sets differ, and once more after the
fit. Restoring is what a Trainer does from `fit(ckpt_path=...)` to the first batch. Beside the times: the most memory in
a save above that before it. Files go to a temporary folder (`TMPDIR`), which should be where checkpoints go.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.lab.bench.allocated import held
from examples.lab.bench.fits import trainer
from examples.lab.bench.program import arguments, run
from examples.lab.bench.timing import ratios, seconds, summary, text
from examples.lab.progress import track
from examples.lab.report import Table
from examples.lab.training import quietly
from lightning_lookahead import LookaheadCallback

if TYPE_CHECKING:
    import argparse

    from lightning.pytorch import Trainer

    from examples.lab.bench.program import Report

SIZES, SMOKE_SIZES = (10_000_000, 300_000_000), (1000,)
TENSORS = 50
"""Trained tensors of a module."""
STEPS = 3
"""Training steps before a save: in the middle of a cycle."""
PLAIN, OURS = "twice the parameters, without the callback", "with the callback"
WHAT = ("saving in a fit", "saving after it", "restoring")


class Weights(LightningModule):
    """Trained tensors of equal sizes."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(parameters // TENSORS) for _ in range(TENSORS))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return sum(weight[0] for weight in self.weights)  # type: ignore[return-value]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Clock(Callback):
    """Saves a checkpoint in the middle of a cycle, and takes the time of it.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begins = 0.0
        """When training begins."""
        self.saving: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        self.begins = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write the file anew, when the disk has written what was saved before."""
        self.path.unlink(missing_ok=True)
        os.sync()
        self.saving.append(seconds(lambda: trainer.save_checkpoint(self.path)))


def fit(kind: str, module: Weights, clock: Clock, device: str, *, resumes: bool) -> Trainer:
    """Train for some steps, or resume from the clock's file and take one more."""
    ours = [LookaheadCallback(2)] if kind == OURS else []
    made = trainer(device, [*ours, clock], max_steps=STEPS + resumes)
    loader = DataLoader(torch.zeros(STEPS + 1, 1), batch_size=1)
    made.fit(module, loader, ckpt_path=clock.path if resumes else None)
    module.zero_grad()  # whose memory the next one needs
    return made


def one(count: int, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Times of saving and restoring, and memory in a save, for so many trained parameters."""
    modules = {PLAIN: Weights(2 * count), OURS: Weights(count)}
    paths = {kind: folder / f"{at}.ckpt" for at, kind in enumerate(modules)}
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in modules} for name in WHAT}
    row: dict[str, Any] = {"parameters": count, "gigabytes": {}, "copies": {}}
    for turn in track(range(-1, args.rounds), "rounds"):  # the first one does not count
        for kind in list(modules)[:: 1 if turn % 2 else -1]:
            clock = Clock(paths[kind])
            done = fit(kind, modules[kind], clock, args.device, resumes=False)
            if turn < 0:
                row["gigabytes"][kind] = paths[kind].stat().st_size / 1e9
                row["copies"][kind] = held(lambda own=clock, of=done: own.save(of), args.device)[0] / (4 * count)
            clock.save(done)
            os.sync()
            start = time.perf_counter()
            fit(kind, modules[kind], clock, args.device, resumes=True)
            if turn >= 0:
                measured = clock.saving[0], clock.saving[-1], clock.begins - start
                for name, value in zip(WHAT, measured, strict=True):
                    times[name][kind].append(value)
    for name, taken in times.items():
        row[name] = {kind: summary(values) for kind, values in taken.items()}
        row[name]["ratio"] = summary(ratios(taken[OURS], taken[PLAIN]))
    return row


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of parameters."""
    quietly()
    with tempfile.TemporaryDirectory() as folder:
        return [one(count, args, Path(folder)) for count in track(SMOKE_SIZES if args.smoke else SIZES, "sizes")]


def tables(report: Report) -> list[Table]:
    """Times with and without, and memory."""
    table = Table(
        "Time with the callback / time without it for as many bytes",
        [
            "parameters",
            *WHAT,
            "without, s",
            "with, s",
            "file, GB",
            "memory in a save without, copies of the weights",
            "with",
        ],
    )
    for row in report["rows"]:
        taken = ["; ".join(f"{row[name][kind]['median']:.3f}" for name in WHAT) for kind in (PLAIN, OURS)]
        ratio = [text(row[name]["ratio"]) for name in WHAT]
        copies = [f"{row['copies'][kind]:.2f}" for kind in (PLAIN, OURS)]
        size = f"{row['gigabytes'][OURS]:.3f}"
        table.rows.append([f"{row['parameters']:,}", *ratio, *taken, size, *copies])
    return [table]


if __name__ == "__main__":
    run(arguments(__doc__, rounds=5).parse_args(), measure, tables)
