"""`plot_inner_outer`: the monitor's records as a figure like the paper's Figure 10. Needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .records import segments, windows

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .records import Record


def plot_inner_outer(history: Iterable[Record], *, name: str = "accuracy") -> Figure:
    """Draw what an `InnerOuterMonitor` has seen: inner loops as segments, the slow weights after each sync as dots.

    A segment begins at the dot of the sync before it, where theta is phi, and ends at the fast weights just before the
    next sync: segments are not connected. Windows stand side by side.

    Args:
        history: ``monitor.history``, or a part of it.
        name: What the metric is called, for the label of the axis.

    Returns:
        A matplotlib Figure; nothing is shown or saved.

    Raises:
        ValueError: If there is nothing to draw.
        ModuleNotFoundError: If matplotlib is not installed.

    Example::

        plot_inner_outer(monitor.history).savefig("figure10.png")

    Source: Zhang, Lucas, Hinton, Ba 2019, Figure 10.
    """
    from matplotlib import rc_context  # noqa: PLC0415 (optional)
    from matplotlib.figure import Figure  # noqa: PLC0415

    seen = windows(history)
    if not seen:
        message = "history is empty: there is nothing to draw. Has the monitor's window been reached?"
        raise ValueError(message)
    with rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(6.4 if len(seen) == 1 else 3.6 * len(seen), 3.4), layout="constrained")
        panels = figure.subplots(1, len(seen), squeeze=False)[0]
        for panel, window in zip(panels, seen, strict=True):
            _draw(panel, window)
            panel.set_xlabel("inner steps")
            panel.xaxis.get_major_locator().set_params(integer=True)
        panels[0].set_ylabel(name)
        panels[0].legend(frameon=False)
    return figure


def _draw(axes: Axes, window: Sequence[Record]) -> None:
    for number, segment in enumerate(segments(window)):
        label = None if number else "inner loop (fast weights)"
        axes.plot(*_points(segment), "-", color="tab:blue", linewidth=1.2, label=label)
    outer = [record for record in window if record.weights == "outer"]
    axes.plot(*_points(outer), "o", color="tab:red", markersize=4.5, label="slow weights, after each sync")


def _points(records: Sequence[Record]) -> tuple[list[int], list[float]]:
    return [record.step for record in records], [record.value for record in records]
