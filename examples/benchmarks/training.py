"""How much longer does a fit take with the callback than without?

    python examples/benchmarks/training.py

The same fit, validation after every epoch included, without a callback and with one, taking turns. On a CPU
scikit-learn's digits and the small network of `examples/common.py`; on a GPU a ResNet-18 on random images of 32x32 that
are on the GPU already, and a small network whose steps are over before the next is launched: there it would show if a
sync waits for the device, which it does to see that all weights are finite, unless `nonfinite="ignore"`. Logger,
progress bar and checkpoints are off: their time would hide the callback's. A Trainer takes time for the hooks of any
callback, also of one that has none: that is measured beside.
"""

from __future__ import annotations

import copy
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from examples.lab.bench.fits import trainer
from examples.lab.bench.program import arguments, run
from examples.lab.bench.timing import ratios, seconds, summary, text
from examples.lab.images import load
from examples.lab.models import resnet18
from examples.lab.progress import track
from examples.lab.report import Table
from examples.lab.training import quietly
from lightning_lookahead import LookaheadCallback

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from examples.lab.bench.program import Report

K = 5
MOST = 1.02
"""Time of a fit with the callback to that of one without, at most."""
WITHOUT = "without"
KINDS: dict[str, Callable[[], list[Callback]]] = {
    WITHOUT: list,
    "one without hooks of its own": lambda: [Callback()],
    "Lookahead": lambda: [LookaheadCallback(K)],
    "Lookahead, eval_weights='fast'": lambda: [LookaheadCallback(K, eval_weights="fast")],
    "Lookahead, log_syncs=True": lambda: [LookaheadCallback(K, log_syncs=True)],
    "Lookahead, nonfinite='ignore'": lambda: [LookaheadCallback(K, nonfinite="ignore")],
}
"""Makes the callbacks of a fit."""


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        name: For the table.
        net: Makes the network.
        train: Training batches.
        validation: Batches to validate on.
        epochs: Passes over the training batches.
    """

    name: str
    net: Callable[[], nn.Module]
    train: DataLoader
    validation: DataLoader
    epochs: int


class Classifier(LightningModule):
    """A network trained by SGD with momentum; loss and accuracy are logged as most people do it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        scores = self.net(x)
        self.accuracy(scores, y)
        self.log("accuracy", self.accuracy)
        self.log("loss", nn.functional.cross_entropy(scores, y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def digits(*, smoke: bool) -> Task:
    """A fit of some seconds on a CPU."""

    def net() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )

    images = load("digits")
    train, test = (TensorDataset(x.float() / 255, y) for x, y in (images.train, images.test))
    return Task(
        "digits, small network",
        net,
        DataLoader(train, batch_size=32, shuffle=True),
        DataLoader(test, batch_size=len(test)),
        epochs=1 if smoke else 40,
    )


def images32(*, smoke: bool) -> Task:
    """A fit of some seconds on a GPU, which has enough to do."""
    width, size, count = (8, 16, 4) if smoke else (64, 128, 60)
    name = f"ResNet-18 of width {width}, 32x32 images, batches of {size}"
    return _on_gpu(name, lambda: resnet18(width), (3, 32, 32), size, count, epochs=1 if smoke else 4)


def launches(*, smoke: bool) -> Task:
    """A fit of some seconds on a GPU that waits for the next launch most of the time: 50 small layers."""
    name = "50 linear layers of width 64, batches of 32"
    layers = [layer for _ in range(50) for layer in (nn.Linear(64, 64), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(64, 10))
    return _on_gpu(name, lambda: copy.deepcopy(net), (64,), 32, 10 if smoke else 200, epochs=1 if smoke else 4)


def _on_gpu(
    name: str, net: Callable[[], nn.Module], shape: tuple[int, ...], size: int, count: int, *, epochs: int
) -> Task:
    batches = [
        (torch.randn(size, *shape, device="cuda"), torch.randint(10, (size,), device="cuda")) for _ in range(count)
    ]
    held_out = DataLoader(batches[: max(1, count // 5)], batch_size=None)
    return Task(name, net, DataLoader(batches, batch_size=None, shuffle=True), held_out, epochs)


def fit(task: Task, kind: str, device: str) -> float:
    """Seconds of one fit, from ``Trainer.fit`` until it returns."""
    seed_everything(0, verbose=False)
    model = Classifier(task.net())
    fitting = trainer(device, KINDS[kind](), max_epochs=task.epochs, num_sanity_val_steps=0)
    gc.collect()  # what earlier fits left
    return seconds(lambda: fitting.fit(model, task.train, task.validation))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each task and kind of callback."""
    quietly()
    if args.device == "cpu":
        torch.set_num_threads(1)  # in a network this small more threads only wait for one another
    tasks = (images32, launches) if args.device == "cuda" else (digits,)
    return [row for task in tasks for row in _measure(task(smoke=args.smoke), args)]


def _measure(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every round of fits begins with the next kind."""
    for kind in KINDS:
        fit(task, kind, args.device)  # does not count
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    kinds = list(KINDS)
    for turn in track(range(args.rounds), "rounds of fits"):
        first = turn % len(kinds)
        for kind in kinds[first:] + kinds[:first]:
            times[kind].append(fit(task, kind, args.device))
    return [
        {
            "task": task.name,
            "steps": task.epochs * len(task.train),
            "k": K,
            "callback": kind,
            "without": summary(times[WITHOUT]),
            "with": summary(taken),
            "ratio": summary(ratios(taken, times[WITHOUT])),
        }
        for kind, taken in times.items()
        if kind != WITHOUT
    ]


def tables(report: Report) -> list[Table]:
    """Time of a fit with a callback to that of one without."""
    table = Table(
        f"Time of a fit with a callback (Lookahead's k {report['rows'][0]['k']}) / time of the same fit without; to"
        f" reach with everything at its default: {MOST}",
        ["task", "callback", "with / without", "without, s", "with, s", "steps"],
    )
    for row in report["rows"]:
        times = [text(row[name]) for name in ("without", "with")]
        ratio = text(row["ratio"], "{:.3f}")
        table.rows.append([row["task"], row["callback"], ratio, *times, f"{row['steps']:,}"])
    return [table]


if __name__ == "__main__":
    run(arguments(__doc__, rounds=12).parse_args(), measure, tables)
