"""What a sync should do to the inner optimizer's momentum: leave it alone, pull it back, or reset it.

    python examples/paper/momentum_at_sync.py                          # Fashion-MNIST, a narrow network
    python examples/paper/momentum_at_sync.py --data FOLDER --full     # CIFAR as in the paper, on a GPU

The paper's words for the three are maintain ("none"), interpolate ("pullback") and reset ("reset"). The inner optimizer
is the paper's: SGD with learning rate .1, momentum .9 and weight decay 1e-3; k 5, alpha .8.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from examples.command_line import stoppable
from examples.lab.report import COLOURS, Table, cell, groups, learning_curves
from examples.lab.study import GOES_ON, show
from examples.lab.sweep import sweep, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from examples.lab.study import Record
    from examples.lab.sweep import Sweep

PAPER = {"SGD": "below", "none": "95.15", "pullback": "95.16", "reset": "94.91"}
"""Test accuracy after 200 epochs. Of SGD the paper says only that all three are above it."""


def run(runs: Sweep) -> list[Record]:
    """SGD alone and Lookahead with each of the three, from every seed."""
    modes = [replace(runs.base, k=5, alpha=0.8, pullback_momentum=mode) for mode in PAPER if mode != "SGD"]
    return runs.complete(runs.repeat([runs.base, *modes]))


def kinds(records: list[Record]) -> dict[str, list[Record]]:
    """Runs by what happened to momentum."""
    return groups(records, lambda r: r["settings"]["pullback_momentum"] if r["settings"]["k"] else "SGD", PAPER)


def tables(records: list[Record]) -> list[Table]:
    """Test accuracy and losses at the end."""
    headings = ["momentum at a sync", "test accuracy, %", "test loss", "training loss", "paper: CIFAR-10, %"]
    result = Table(f"{title(records[0]['settings'])}; Lookahead with k 5, alpha 0.8", headings)
    for kind, runs in kinds(records).items():
        losses = [cell(runs, name, "{:.4f}") for name in ("loss", "train_loss")]
        result.rows.append([kind, cell(runs, "accuracy", scale=100), *losses, PAPER[kind]])
    return [result]


def draw(records: list[Record]) -> Figure:
    """Training loss and test accuracy after every epoch."""
    return learning_curves(kinds(records), COLOURS)


@stoppable(GOES_ON)
def main() -> None:
    runs = sweep(__doc__, "momentum_at_sync", small={"epochs": 3}, full={})
    records = run(runs)
    show(runs.study, tables(records), draw(records))


if __name__ == "__main__":
    main()
