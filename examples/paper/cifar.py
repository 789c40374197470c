"""The paper's Table 1: SGD, averaged weights, AdamW and Lookahead on small images.

    python examples/paper/cifar.py                          # Fashion-MNIST, a narrow network, hours on a CPU
    python examples/paper/cifar.py --data FOLDER --full     # CIFAR as in the paper, on a GPU

Each optimizer is tuned on training images that are held out, on the grid that is printed: SGD first and alone, then
Lookahead around SGD on the same grid. The best of each is trained on all training images from several seeds and looked
at on the test images. May be stopped and started again, and run several times at once to share the work.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from examples.command_line import stoppable
from examples.lab.report import COLOURS, Table, cell, groups, learning_curves
from examples.lab.study import GOES_ON, show
from examples.lab.sweep import best, sweep, title

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from examples.lab.study import Record
    from examples.lab.sweep import Sweep
    from examples.lab.training import Settings

TUNING_SEED = 100
SGD = {"lr": (0.03, 0.05, 0.1, 0.2), "weight_decay": (3e-4, 1e-3, 3e-3)}
ADAMW = {"lr": (3e-4, 1e-3, 3e-3), "weight_decay": (0.1, 1.0)}
AVERAGE = {"average": (0.9, 0.99, 0.999)}
PAPER = {
    "SGD": "95.23 ± .19 / 78.24 ± .18",
    "Polyak": "95.26 ± .04 / 77.99 ± .42",
    "AdamW": "94.84 ± .16 / 76.88 ± .39",
    "Lookahead": "95.27 ± .06 / 78.34 ± .05",
}
"""Table 1: test accuracy of the wide ResNet-18 after 200 epochs, three seeds."""


def run(runs: Sweep) -> list[Record]:
    """Tune each optimizer, then train the best of each from every seed. Returns the records of all runs."""
    tuning: list[Record] = []

    def tune(start: Settings, choices: dict[str, Sequence[Any]]) -> Settings:
        records = runs.complete(runs.grid(start, choices))
        tuning.extend(records)
        return best(records)

    base = replace(runs.base, seed=TUNING_SEED)
    sgd = tune(base, SGD)
    polyak = tune(sgd, AVERAGE)
    adamw = tune(replace(base, optimizer="adamw"), ADAMW)
    lookahead = tune(replace(base, k=5, alpha=0.8), SGD)
    finals = [replace(settings, held_out=0) for settings in (sgd, polyak, adamw, lookahead)]
    return tuning + runs.complete(runs.repeat(finals))


def name(settings: Record) -> str:
    """The optimizer's, as in the paper's table."""
    if settings["k"]:
        return "Lookahead"
    if settings["average"]:
        return "Polyak"
    return {"sgd": "SGD", "adamw": "AdamW"}[settings["optimizer"]]


def chosen(settings: Record) -> str:
    """What tuning has chosen."""
    text = f"lr {settings['lr']:g}, weight decay {settings['weight_decay']:g}"
    return f"{text}, decay of the average {settings['average']:g}" if settings["average"] else text


def final(records: list[Record]) -> dict[str, list[Record]]:
    """The runs of each optimizer that were looked at on the test images."""
    return groups((r for r in records if not r["settings"]["held_out"]), lambda r: name(r["settings"]), PAPER)


def tables(records: list[Record]) -> list[Table]:
    """What tuning saw, and the test accuracies."""
    tuning = groups((r for r in records if r["settings"]["held_out"]), lambda r: name(r["settings"]))
    grids = [grid_table({name: tuning[name] for name in names}) for names in (("SGD", "Lookahead"), ("AdamW",))]
    return [*grids, average_table(tuning["Polyak"]), table(final(records))]


def grid_table(tuning: dict[str, list[Record]]) -> Table:
    """A row for each learning rate, a column for each weight decay."""
    decays = sorted({r["settings"]["weight_decay"] for runs in tuning.values() for r in runs})
    title = f"Tuning {' and '.join(tuning)}: accuracy on held-out training images, %, one seed"
    result = Table(title, ["", "lr", *(f"weight decay {decay:g}" for decay in decays)])
    for optimizer, runs in tuning.items():
        for lr, row in groups(runs, lambda r: r["settings"]["lr"]).items():
            by_decay = groups(row, lambda r: r["settings"]["weight_decay"])
            cells = [cell(by_decay[decay], "accuracy", scale=100) for decay in decays]
            result.rows.append([optimizer, f"{lr:g}", *cells])
    return result


def average_table(tuning: list[Record]) -> Table:
    """A column for each decay of the average."""
    by_decay = groups(tuning, lambda r: r["settings"]["average"])
    headings = ["", *(f"decay {decay:g}" for decay in by_decay)]
    cells = [cell(runs, "accuracy", scale=100) for runs in by_decay.values()]
    return Table("Tuning Polyak's average around the chosen SGD, in the same way", headings, [["Polyak", *cells]])


def table(runs: dict[str, list[Record]]) -> Table:
    """Test accuracy and losses at the end, a row for each optimizer."""
    headings = ["optimizer", "chosen", "test accuracy, %", "test loss", "training loss", "paper: CIFAR-10 / -100, %"]
    result = Table(title(next(iter(runs.values()))[0]["settings"]), headings)
    for optimizer, of in runs.items():
        losses = [cell(of, loss, "{:.4f}") for loss in ("loss", "train_loss")]
        accuracy = cell(of, "accuracy", scale=100)
        result.rows.append([optimizer, chosen(of[0]["settings"]), accuracy, *losses, PAPER[optimizer]])
    return result


def draw(records: list[Record]) -> Figure:
    """Training loss and test accuracy after every epoch."""
    return learning_curves(final(records), COLOURS)


@stoppable(GOES_ON)
def main() -> None:
    runs = sweep(__doc__, "cifar", small={"epochs": 5, "held_out": 10_000}, full={"held_out": 5000})
    records = run(runs)
    show(runs.study, tables(records), draw(records))


if __name__ == "__main__":
    main()
