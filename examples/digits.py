"""Handwritten digits at a learning rate that plain SGD does not survive, with and without Lookahead.

    python examples/digits.py

trains the same small network from the same seeds with SGD alone and with Lookahead around it, ends in a table of test
accuracies (slow and fast weights apart) and saves a plot. The digits are scikit-learn's: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from pathlib import Path

import matplotlib as mpl
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_lookahead import LookaheadCallback, compare_weights

NAMES = {"sgd": "SGD", "slow": "Lookahead, slow weights", "fast": "Lookahead, fast weights"}


class Digits(LightningModule):
    """A small convolutional network for 8x8 images, trained by SGD with momentum."""

    def __init__(self, lr: float, momentum: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, digits = batch
        return nn.functional.cross_entropy(self(images), digits)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, digits = batch
        scores = self(images)
        self.accuracy(scores, digits)
        self.log("accuracy", self.accuracy, prog_bar=True)
        self.log("loss", nn.functional.cross_entropy(scores, digits))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        return self(images).argmax(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"], momentum=self.hparams["momentum"])


class Curve(Callback):
    """Keeps the test accuracy after each epoch."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.accuracy.append(trainer.callback_metrics["accuracy"].item())


class DigitsData(LightningDataModule):
    """1,347 images to train on and 450 to test on, the same in every run.

    That makes 43 batches, so that 8 epochs end four steps after a sync and slow and fast weights differ.
    """

    def setup(self, stage: str) -> None:
        images, digits = load_digits(return_X_y=True)
        split = train_test_split(images, digits, test_size=0.25, random_state=0, stratify=digits)
        x, x_test, y, y_test = (torch.as_tensor(part) for part in split)
        self.train, self.held_out = (
            TensorDataset(a.float().reshape(-1, 1, 8, 8) / 16, b) for a, b in ((x, y), (x_test, y_test))
        )

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.held_out, batch_size=450)

    test_dataloader = predict_dataloader = val_dataloader


def train(seed: int, lookahead: LookaheadCallback | None, args: argparse.Namespace) -> tuple[dict[str, float], list]:
    """One run: its final test accuracies, and the accuracy after every epoch."""
    seed_everything(seed, verbose=False)
    data = DigitsData()
    model, curve = Digits(args.lr, args.momentum), Curve()
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[curve, RichProgressBar(leave=False), *([lookahead] if lookahead else [])],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, data)

    if lookahead is None:
        return {"sgd": trainer.validate(model, data, verbose=False)[0]["accuracy"]}, curve.accuracy
    final = compare_weights(trainer, model, datamodule=data)
    return {"slow": final.slow["accuracy"], "fast": final.fast["accuracy"]}, curve.accuracy


def table(final: dict[str, list[float]], args: argparse.Namespace) -> Table:
    """Test accuracies at the end, a row for each set of weights."""
    title = f"Digits, lr {args.lr}, momentum {args.momentum}, k {args.k}, alpha {args.alpha}, {args.epochs} epochs"
    result = Table(title=title)
    result.add_column("weights")
    for heading in ("mean", "std", *(f"seed {seed}" for seed in range(args.seeds))):
        result.add_column(heading, justify="right")
    for weights, values in final.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        result.add_row(NAMES[weights], *(f"{value:.1%}" for value in (statistics.mean(values), spread, *values)))
    return result


def plot(curves: dict[str, list[list[float]]], args: argparse.Namespace) -> Figure:
    """Test accuracy after each epoch, a line for each seed."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.add_subplot()
        for (name, runs), colour in zip(curves.items(), ("tab:gray", "tab:blue"), strict=True):
            for index, run in enumerate(runs):
                axes.plot(range(1, len(run) + 1), run, "o-", color=colour, alpha=0.8, label=None if index else name)
        axes.set(xlabel="epoch", ylabel="test accuracy", ylim=(0, 1.02))
        axes.set_title(f"Digits, SGD with learning rate {args.lr} and momentum {args.momentum}", fontsize=10)
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.legend(frameon=False, loc="lower left")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="runs with and without Lookahead, from seeds 0, 1, ...")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the 1,347 training images")
    parser.add_argument("--lr", type=float, default=0.2, help="learning rate of SGD")
    parser.add_argument("--momentum", type=float, default=0.9, help="momentum of SGD")
    parser.add_argument("--k", type=int, default=5, help="inner steps between two syncs")
    parser.add_argument("--alpha", type=float, default=0.5, help="slow weights step size, in (0, 1]")
    parser.add_argument("--out", type=Path, default=Path("outputs/digits.png"), help="file for the plot")
    args = parser.parse_args()
    if args.seeds < 1 or args.epochs < 1:
        parser.error(f"--seeds {args.seeds} --epochs {args.epochs}: both must be at least 1")
    try:
        LookaheadCallback(args.k, args.alpha)
    except ValueError as error:
        parser.error(str(error))
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(num_workers|LeafSpec).*")

    torch.set_num_threads(1)  # in a network this small more threads only wait for one another

    console = Console()
    final: dict[str, list[float]] = {}
    curves: dict[str, list[list[float]]] = {}
    for seed in range(args.seeds):
        for lookahead in (None, LookaheadCallback(args.k, args.alpha)):
            name = "Lookahead" if lookahead else "SGD"
            console.print(f"seed {seed}: {name}")
            accuracies, curve = train(seed, lookahead, args)
            curves.setdefault(f"{name}, slow weights" if lookahead else name, []).append(curve)
            for weights, accuracy in accuracies.items():
                final.setdefault(weights, []).append(accuracy)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot(curves, args).savefig(args.out, dpi=130)
    console.print(table(final, args))
    console.print(f"Plot: {args.out}", highlight=False)


if __name__ == "__main__":
    main()
