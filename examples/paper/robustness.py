"""The paper's Figure 8 and Table 5: Lookahead where learning rate, momentum, k and alpha are not the best ones.

    python examples/paper/robustness.py                          # Fashion-MNIST, a narrow network
    python examples/paper/robustness.py --data FOLDER --full     # CIFAR as in the paper, on a GPU

Figure 8 is the training loss for learning rates {.1, .2, .3} and momenta {.9, .95, .98}, with Lookahead at k 5 and
alpha .5 and without. Table 5 is the test accuracy for k {5, 10} and alpha {.5, .8} at learning rate .1 and momentum .9.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from examples.command_line import stoppable
from examples.lab.report import COLOURS, Table, band, cell, figure, groups, style
from examples.lab.study import GOES_ON, show
from examples.lab.sweep import sweep, title
from examples.lab.training import Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from examples.lab.study import Record
    from examples.lab.sweep import Sweep

INNER = {"lr": (0.1, 0.2, 0.3), "momentum": (0.9, 0.95, 0.98)}
OUTER = {"k": (5, 10), "alpha": (0.5, 0.8)}
PAPER = {
    "SGD": "77.72",
    "k 5, alpha 0.5": "78.24",
    "k 5, alpha 0.8": "78.27",
    "k 10, alpha 0.5": "78.19",
    "k 10, alpha 0.8": "77.94",
}
"""Table 5."""


def run(runs: Sweep) -> list[Record]:
    """Every inner setting with and without Lookahead, and every outer one, from every seed."""
    inner = runs.grid(runs.base, INNER)
    outer = runs.grid(replace(runs.base, lr=0.1, momentum=0.9), OUTER)
    todo = [*inner, *(replace(settings, k=5, alpha=0.5) for settings in inner), *outer]
    return runs.complete(dict.fromkeys(runs.repeat(todo)))  # one of the last is among the others


def inner(records: list[Record]) -> dict[tuple[float, float], dict[str, list[Record]]]:
    """By learning rate and momentum: the runs of SGD and of Lookahead at k 5 and alpha .5."""
    chosen = [r for r in records if not r["settings"]["k"] or (r["settings"]["k"], r["settings"]["alpha"]) == (5, 0.5)]
    return {
        at: groups(runs, lambda r: "Lookahead" if r["settings"]["k"] else "SGD", ["SGD"])
        for at, runs in groups(chosen, lambda r: (r["settings"]["lr"], r["settings"]["momentum"])).items()
    }


def tables(records: list[Record]) -> list[Table]:
    """Figure 8's numbers, and Table 5."""
    return [inner_table(records), outer_table(records)]


def inner_table(records: list[Record]) -> Table:
    """Training loss and test accuracy at the end, a row for each learning rate and momentum."""
    title_ = f"{title(records[0]['settings'])}; Lookahead with k 5, alpha 0.5"
    headings = [
        "lr, momentum",
        "SGD: training loss",
        "Lookahead: training loss",
        "SGD: accuracy, %",
        "Lookahead: accuracy, %",
    ]
    result = Table(title_, headings)
    for (lr, momentum), runs in inner(records).items():
        losses = [cell(runs[name], "train_loss", "{:.3f}") for name in ("SGD", "Lookahead")]
        accuracies = [cell(runs[name], "accuracy", scale=100) for name in ("SGD", "Lookahead")]
        result.rows.append([f"{lr}, {momentum}", *losses, *accuracies])
    return result


def outer_table(records: list[Record]) -> Table:
    """Test accuracy for each k and alpha, and without Lookahead."""
    base = [r for r in records if (r["settings"]["lr"], r["settings"]["momentum"]) == (0.1, 0.9)]
    headings = ["", "slow weights", "fast weights", "paper: CIFAR-100"]
    result = Table("Test accuracy, %, at lr 0.1 and momentum 0.9", headings)
    for (k, alpha), runs in groups(base, lambda r: (r["settings"]["k"], r["settings"]["alpha"])).items():
        name = f"k {k}, alpha {alpha}" if k else "SGD"
        fast = cell(runs, "fast_accuracy", scale=100) if k else "-"
        result.rows.append([name, cell(runs, "accuracy", scale=100), fast, PAPER[name]])
    return result


def draw(records: list[Record]) -> Figure:
    """Figure 8: training loss all through training, a panel for each learning rate and momentum."""
    cells = inner(records)
    rows, columns = (sorted({at[index] for at in cells}) for index in (1, 0))
    with style():
        result = figure(2.4 * len(columns), 1.9 * len(rows))
        panels = result.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
        for (lr, momentum), runs in cells.items():
            panel = panels[rows.index(momentum)][columns.index(lr)]
            for name, of in runs.items():
                if losses := [run["results"]["losses"] for run in of if "losses" in run["results"]]:
                    band(panel, losses, name, color=COLOURS[name])
            panel.set_title(f"lr {lr}, momentum {momentum}")
        panels[0][0].legend()
        for row in panels:
            row[0].set_ylabel("training loss")
        for panel in panels[-1]:
            panel.set_xlabel(f"training, in {Progress.PARTS} parts")
    return result


@stoppable(GOES_ON)
def main() -> None:
    runs = sweep(__doc__, "robustness", small={"epochs": 2}, full={})
    records = run(runs)
    show(runs.study, tables(records), draw(records))


if __name__ == "__main__":
    main()
