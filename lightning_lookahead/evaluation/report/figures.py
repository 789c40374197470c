"""The figures of the page: each a chart with a caption, and the numbers behind it in a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_lookahead.evaluation.records import inner_loops, segments

from .charts import Chart, Marks, Point, thinned
from .markup import Markup, element, folded, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_lookahead.evaluation.records import InnerLoop, Record

    from .logs import Series

_MOST_RECORDS = 2000  # of a window
_FEW_VALUES = 30  # each of which has a dot
_WEIGHTS = {"inner": "fast", "outer": "slow"}


def window_figure(window: Sequence[Record], metric: str) -> Markup:
    """A window of the monitor as in the paper's Figure 10: inner loops as lines, the slow weights as dots."""
    shown = window[:_MOST_RECORDS]
    points = {record: Point(record.step, record.value, _said_of(record, metric)) for record in shown}
    chart = Chart(
        f"{metric} at inner steps {shown[0].step} to {shown[-1].step}",
        "inner steps",
        [
            Marks("fast", "fast weights, an inner loop", [[points[r] for r in line] for line in segments(shown)]),
            Marks("slow", "slow weights, after a sync", dots=[points[r] for r in shown if r.weights == "outer"]),
        ],
    )
    cut = f"The first {len(shown)} of {len(window)} values" if len(shown) < len(window) else "All values"
    rows = [(record.step, _WEIGHTS[record.weights], record.value, record.loss) for record in shown]
    numbers = folded(cut, table(["inner steps", "weights", metric, "loss"], rows))
    return _figure(chart, _done_by_syncs(inner_loops(shown), metric), numbers)


def _done_by_syncs(loops: Sequence[InnerLoop], metric: str) -> str:
    if not loops:
        return "No whole inner loop."
    fell, raised = sum(loop.fell for loop in loops), sum(loop.raised for loop in loops)
    return f"Whole inner loops: {len(loops)}. {metric} lower at their end: {fell}. Raised by the sync: {raised}."


def series_figure(name: str, series: Series) -> Markup:
    """A logged metric over the steps that its logger was given."""
    kept = thinned([Point(step, value, "") for step, value in series])
    shown = [point._replace(label=f"step {point.step:g}\n{name} {point.value:.6g}") for point in kept]
    chart = Chart(name, "step", [Marks("plain", lines=[shown], dots=shown if len(shown) <= _FEW_VALUES else ())])
    thin = f"{len(shown)} of {len(series)} values: of each stretch the lowest and the highest"
    cut = thin if len(shown) < len(series) else "All values"
    rows = [(_whole(point.step), point.value) for point in shown]
    return _figure(chart, f"Last value: {series[-1][1]:.6g}", folded(cut, table(["step", name], rows)))


def _figure(chart: Chart, caption: str, numbers: Markup) -> Markup:
    heading = element("figcaption", element("h3", chart.title), element("p", caption))
    return element("figure", heading, chart.legend(), element("div", chart.svg(), class_="plot"), numbers)


def _said_of(record: Record, metric: str) -> str:
    loss = "" if record.loss is None else f"\nloss {record.loss:.6g}"
    return f"step {record.step}, {_WEIGHTS[record.weights]} weights\n{metric} {record.value:.6g}{loss}"


def _whole(number: float) -> float:
    return int(number) if float(number).is_integer() else number
