"""Records as tables and figures: means and spreads over seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.table import Table as RichTable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes

    from examples.lab.study import Record

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "legend.frameon": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 120,
}
COLOURS = {
    "SGD": "tab:gray",
    "Polyak": "tab:green",
    "AdamW": "tab:orange",
    "Adam": "tab:orange",
    "Lookahead": "tab:blue",
}


@dataclass
class Table:
    """Headings and rows of text, for a terminal or a Markdown file."""

    title: str
    headings: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)

    def rich(self) -> RichTable:
        """For a terminal."""
        table = RichTable(title=self.title)
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For a file."""
        lines = [self.headings, ["---", *("---:" for _ in self.headings[1:])], *self.rows]
        return f"{self.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def groups(
    records: Iterable[Record], by: Callable[[Record], Any], order: Iterable[Any] = ()
) -> dict[Any, list[Record]]:
    """Records with the same ``by``: those of ``order`` first, then the others by size.

    The order of the records themselves is that in which runs ended, which is another one each time.
    """
    found: dict[Any, list[Record]] = {}
    for record in records:
        found.setdefault(by(record), []).append(record)
    first = [name for name in order if name in found]
    return {name: found[name] for name in [*first, *sorted(found.keys() - set(first))]}


def values(records: Iterable[Record], name: str) -> list[float]:
    """One result of the runs that did not diverge."""
    found = (record["results"].get(name) for record in records)
    return [value for value in found if value is not None]


def spread(numbers: Sequence[float], form: str = "{:.2f}", *, scale: float = 1.0) -> str:
    """Mean and standard deviation, the latter from two values on."""
    if not numbers:
        return "-"
    mean = form.format(scale * statistics.mean(numbers))
    return f"{mean} ± {form.format(scale * statistics.stdev(numbers))}" if len(numbers) > 1 else mean


def cell(records: Sequence[Record], name: str, form: str = "{:.2f}", *, scale: float = 1.0) -> str:
    """Mean and standard deviation of one result over seeds, and how many runs diverged."""
    finished = values(records, name)
    parts = [spread(finished, form, scale=scale)] if finished else []
    if len(finished) < len(records):
        parts.append(f"{len(records) - len(finished)} of {len(records)} diverged")
    return ", ".join(parts)


def band(axes: Axes, curves: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """The mean of curves of the same length, from 1 on, within one standard deviation."""
    points = list(zip(*curves, strict=True))
    middle = [statistics.mean(point) for point in points]
    around = [statistics.stdev(point) if len(point) > 1 else 0.0 for point in points]
    steps = range(1, len(points) + 1)
    (line,) = axes.plot(steps, middle, label=label, **style)
    low, high = ([m + sign * a for m, a in zip(middle, around, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def learning_curves(kinds: dict[str, list[Record]], colours: dict[str, str]) -> Figure:
    """Training loss and test accuracy after every epoch, mean and standard deviation over seeds of each kind of run."""
    with style():
        result = figure(7.2, 3.0)
        panels = result.subplots(1, 2)
        for panel, curve, text in zip(
            panels, ("train_loss", "accuracy"), ("training loss", "test accuracy"), strict=True
        ):
            for kind, runs in kinds.items():
                bands(panel, runs, curve, kind, colours.get(kind))
            panel.set(xlabel="epoch", ylabel=text)
        panels[1].yaxis.set_major_formatter("{x:.0%}")
        panels[1].legend()
    return result


def bands(axes: Axes, runs: Sequence[Record], curve: str, label: str, colour: str | None = None) -> None:
    """One curve of the runs that did not diverge, after every epoch."""
    finished = [run["results"]["curves"][curve] for run in runs if "curves" in run["results"]]
    if finished:
        band(axes, finished, label, color=colour, marker="o", markersize=3)
    axes.xaxis.get_major_locator().set_params(integer=True)


def style() -> AbstractContextManager[None]:
    """The look of all figures, inside a ``with``."""
    return mpl.rc_context(STYLE)


def figure(width: float = 6.4, height: float = 3.2) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height))
