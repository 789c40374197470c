"""The paper's Figure 10: test accuracy after every inner step and every sync, just after the learning rate has fallen.

    python examples/paper/figure10.py                          # Fashion-MNIST, a narrow network
    python examples/paper/figure10.py --data FOLDER --full     # CIFAR as in the paper, on a GPU

The window is 60 inner steps long and begins a fortieth of training after the first decay, at k 5 and alpha .8: epoch 65
of 200 in the paper.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from examples.command_line import stoppable
from examples.lab.report import Table, style
from examples.lab.study import GOES_ON, show
from examples.lab.sweep import sweep, title
from examples.lab.training import MILESTONES, Settings, train
from lightning_lookahead import InnerOuterMonitor, LookaheadCallback, Record, inner_loops, plot_inner_outer

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

    from examples.lab import study
    from examples.lab.images import Images
    from examples.lab.sweep import Sweep


@dataclass(frozen=True)
class Windowed(Settings):
    """A run that is looked at after every inner step for a while.

    Args:
        updates: Inner steps that are looked at.
    """

    updates: int = 60


def watched(settings: Windowed, images: Images, folder: Path) -> study.Record:
    """One run, with the monitor's ``history`` among its results."""
    steps = settings.epochs * ((settings.limit or len(images.train[0])) // settings.batch_size)
    monitor = InnerOuterMonitor(updates=settings.updates, start=round((MILESTONES[0] + 1 / 40) * steps))
    lookahead = LookaheadCallback(settings.k, settings.alpha, monitor=monitor)
    results = train(settings, images, folder, lookahead)
    return {**results, "history": [list(record) for record in monitor.history]}


def run(runs: Sweep) -> list[study.Record]:
    """A run from every seed."""
    base = Windowed(**{**asdict(runs.base), "k": 5, "alpha": 0.8})
    return runs.complete(runs.repeat([replace(base, epochs=3, updates=10) if runs.smoke else base]), watched)


def history(record: study.Record) -> list[Record]:
    """What the monitor saw in one run."""
    return [Record(*values) for values in record["results"]["history"]]


def tables(records: list[study.Record]) -> list[Table]:
    """A row for each seed: how inner loops ended, and what the sync made of it."""
    window = records[0]["settings"]["updates"]
    headings = [
        "seed",
        "inner loops",
        "accuracy fell",
        "sync raised it",
        "to where it was, or higher",
        "mean fall",
        "mean rise",
    ]
    result = Table(f"{title(records[0]['settings'])}, a window of {window} inner steps", headings)
    loops = {str(record["settings"]["seed"]): inner_loops(history(record)) for record in records}
    for seed, of in {**loops, "all": [loop for each in loops.values() for loop in each]}.items():
        fallen = [loop for loop in of if loop.fell]
        raised = [loop for loop in fallen if loop.raised]
        recovered = [loop for loop in fallen if loop.recovered]
        changes = [sum(loop.before - loop.end for loop in fallen), sum(loop.after - loop.end for loop in fallen)]
        means = [f"{change / max(len(fallen), 1):.2%}" for change in changes]
        result.rows.append([seed, *map(str, (len(of), len(fallen), len(raised), len(recovered))), *means])
    return [result]


def draw(records: list[study.Record]) -> Figure:
    """The window of the first seed."""
    with style():
        figure = plot_inner_outer(history(records[0]), name="test accuracy")
        figure.axes[0].yaxis.set_major_formatter("{x:.1%}")
    return figure


@stoppable(GOES_ON)
def main() -> None:
    runs = sweep(__doc__, "figure10", small={"epochs": 5}, full={})
    records = run(runs)
    show(runs.study, tables(records), draw(records))


if __name__ == "__main__":
    main()
