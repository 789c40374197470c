"""Handwritten digits at a learning rate that plain SGD does not survive, with and without Lookahead.

    python examples/digits.py

trains the same small network from the same seeds with SGD alone and with Lookahead around it, ends in a table of test
accuracies (slow and fast weights apart) and saves a plot. The digits are scikit-learn's: nothing is downloaded.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from command_line import at_least_one, parser_of, stoppable
from common import ALONE, Digits, DigitsData, parse, quietly
from lightning_lookahead import LookaheadCallback, compare_weights

if TYPE_CHECKING:
    from argparse import Namespace

NAMES = {"sgd": "SGD", "slow": "Lookahead, slow weights", "fast": "Lookahead, fast weights"}


class Curve(Callback):
    """Keeps the test accuracy after each epoch."""

    def __init__(self) -> None:
        self.accuracy: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self.accuracy.append(trainer.callback_metrics["accuracy"].item())


def train(seed: int, lookahead: LookaheadCallback | None, args: Namespace) -> tuple[dict[str, float], list]:
    """One run: its final test accuracies, and the accuracy after every epoch."""
    seed_everything(seed, verbose=False)
    data = DigitsData()
    model, curve = Digits(args.lr, args.momentum), Curve()
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[curve, RichProgressBar(leave=False), *([lookahead] if lookahead else [])],
        **ALONE,
    )
    trainer.fit(model, data)

    if lookahead is None:
        return {"sgd": trainer.validate(model, data, verbose=False)[0]["accuracy"]}, curve.accuracy
    final = compare_weights(trainer, model, datamodule=data)
    return {"slow": final.slow["accuracy"], "fast": final.fast["accuracy"]}, curve.accuracy


def table(final: dict[str, list[float]], args: Namespace) -> Table:
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


def plot(curves: dict[str, list[list[float]]], args: Namespace) -> Figure:
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


@stoppable()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--seeds", type=at_least_one, default=3, help="runs with and without Lookahead, from seeds 0, 1, ... (3)"
    )
    parser.add_argument("--epochs", type=at_least_one, default=8, help="passes over the 1,347 training images (8)")
    parser.add_argument("--lr", type=float, default=0.2, help="learning rate of SGD (0.2)")
    parser.add_argument("--momentum", type=float, default=0.9, help="momentum of SGD (0.9)")
    parser.add_argument("--out", type=Path, default=Path("outputs/digits.png"), help="file for the plot")
    args = parse(parser)
    quietly()

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
