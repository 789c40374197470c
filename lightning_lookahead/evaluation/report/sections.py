"""The sections of the page; one that has nothing to say is empty."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from lightning_lookahead.evaluation.records import inner_loops, windows

from .figures import series_figure, window_figure
from .markup import Markup, Number, element, folded, listed, table, together
from .saved import DEFAULTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lightning_lookahead.evaluation.records import InnerLoop

    from .logs import Series
    from .run import Run
    from .saved import Saved

_OPEN_FIGURES = 8  # of a section; more have to be opened
_LONGEST = 300  # characters of a setting


def section(title: str, *children: Markup) -> Markup:
    """A section with its heading; nothing if nothing is in it."""
    return element("section", element("h2", title), *children) if any(children) else Markup()


def key_figures(run: Run) -> Markup:
    """Where the run is, in a few numbers."""
    newest = run.newest
    if newest is None:
        return Markup()
    settings = newest.settings
    momentum = {"outer momentum": settings["outer_momentum"]} if settings["outer_momentum"] else {}
    counts = {
        "inner steps": " / ".join(str(loop.steps) for loop in newest.loops),
        "syncs": " / ".join(str(loop.syncs) for loop in newest.loops),
    }
    shown = {"k": settings["k"], "alpha": settings["alpha"], **momentum, **counts}
    return element("div", listed(list(shown), list(shown.values())), class_="figures")


def problems(run: Run) -> Markup:
    """What could not be read, and what would let the page show more."""
    unread = (element("p", element("b", name), " could not be read: ", reason) for name, reason in run.problems)
    said = together(*unread, *(element("p", hint) for hint in run.hints))
    return element("aside", said, class_="problems") if said else Markup()


def slow_and_fast(run: Run) -> Markup:
    """What was measured with slow and with fast weights, side by side."""
    rows = [(name, *values, source) for compared in run.compared for name, values, source in _compared_rows(compared)]
    pairs = [
        (a, b) for a, b in pairwise(run.history) if (a.weights, b.weights) == ("inner", "outer") and a.step == b.step
    ]
    number = f"the monitor: mean of {len(pairs)} syncs"
    losses = [(a.loss, b.loss) for a, b in pairs if a.loss is not None and b.loss is not None]
    for name, values in ((run.metric, [(a.value, b.value) for a, b in pairs]), ("loss", losses)):
        if values:
            fast, slow = (sum(part) / len(values) for part in zip(*values, strict=True))
            rows.append((name, slow, fast, number))
    shown = [(name, _short(slow), _short(fast), _difference(slow, fast), source) for name, slow, fast, source in rows]
    if not shown:
        return Markup()
    text = (
        "The monitor measures the fast weights just before a sync and the slow weights just after it." if pairs else ""
    )
    return section(
        "Slow and fast weights", table(["metric", "slow", "fast", "slow - fast", "from"], shown), element("p", text)
    )


def _compared_rows(compared: Any) -> Iterable[tuple[str, tuple[float | None, float | None], str]]:
    for name in dict.fromkeys([*compared.slow, *compared.fast]):
        yield name, (compared.slow.get(name), compared.fast.get(name)), compared.name


def inner_and_outer(run: Run) -> Markup:
    """The windows of the monitor, and what the syncs in them did."""
    seen = windows(run.history)
    if not seen:
        return Markup()
    text = (
        "A line is one inner loop of the fast weights: it begins at a sync, where both sets are equal, and ends just"
        " before the next one. A dot is the slow weights after a sync. The records are those of "
    )
    headings = ["inner steps", "whole loops", "lower at the end", "raised by the sync", "to where it was, or higher"]
    rows = [_loops_row(f"{part[0].step} to {part[-1].step}", inner_loops(part)) for part in seen]
    if len(seen) > 1:
        rows.append(_loops_row("all", [loop for part in seen for loop in inner_loops(part)]))
    return section(
        "Between syncs",
        element("p", text, run.history_from, "."),
        figures([lambda part=part: window_figure(part, run.metric) for part in seen]),  # type: ignore[misc]
        element("h3", f"What happens to {run.metric} in an inner loop"),
        table([*headings, "mean change in the loop", "mean change at the sync"], rows),
    )


def _loops_row(name: str, loops: Sequence[InnerLoop]) -> tuple[object, ...]:
    counts = (
        sum(loop.fell for loop in loops),
        sum(loop.raised for loop in loops),
        sum(loop.recovered for loop in loops),
    )
    means = [sum(part) / len(loops) if loops else None for part in _changes(loops)]
    return name, len(loops), *counts, *(_short(mean, "+") for mean in means)


def _changes(loops: Sequence[InnerLoop]) -> tuple[list[float], list[float]]:
    return [loop.end - loop.before for loop in loops], [loop.after - loop.end for loop in loops]


def outer_loop(run: Run) -> Markup:
    """alpha, distance and syncs over training."""
    own = {name: series for name, series in run.series.items() if _is_ours(name)}
    return section("The outer loop", figures(_drawn(own))) if own else Markup()


def metrics(run: Run) -> Markup:
    """What else the run has logged."""
    others = {name: series for name, series in run.series.items() if not _is_ours(name)}
    return section("Metrics", figures(_drawn(others))) if others else Markup()


def _is_ours(name: str) -> bool:
    return name.startswith("lookahead/") or "-lookahead/" in name  # after a logger's prefix


def _drawn(series: dict[str, Series]) -> list[Callable[[], Markup]]:
    return [lambda name=name, own=own: series_figure(name, own) for name, own in series.items()]  # type: ignore[misc]


def figures(drawn: Sequence[Callable[[], Markup]]) -> Markup:
    """Figures in a grid; of many the first ones, and the others to be opened."""
    first, others = drawn[:_OPEN_FIGURES], drawn[_OPEN_FIGURES:]
    grid = element("div", *(draw() for draw in first), class_="grid")
    if not others:
        return grid
    return together(grid, folded(f"{len(others)} more", element("div", *(draw() for draw in others), class_="grid")))


def settings(run: Run) -> Markup:
    """The settings of the newest checkpoint, those that are not the defaults first."""
    if run.newest is None:
        return Markup()
    own = run.newest.settings
    changed = [name for name in own if own[name] != DEFAULTS[name]]
    headings = ["setting", "value", "default"]
    rows = [(name, _value(own[name]), _value(DEFAULTS[name])) for name in changed]
    groups = [
        (f"optimizer {at}: {name}", _value(value), "")
        for at, loop in enumerate(run.newest.loops)
        for group in loop.groups
        for name, value in group.items()
    ]
    different = table(headings, [*rows, *groups], "changed") if rows or groups else Markup()
    same = [(name, _value(own[name]), _value(DEFAULTS[name])) for name in own if name not in changed]
    text = "These differ from the defaults:" if different else "All are the defaults."
    others = folded(f"{len(same)} settings have their defaults", table(headings, same)) if same else Markup()
    return section("Settings", element("p", f"As {run.newest.name} has them. {text}"), different, others)


def checkpoints(run: Run) -> Markup:
    """The counts in each checkpoint."""
    if run.newest is None:
        return Markup()
    rows: list[tuple[object, ...]] = []
    for saved in run.saved:
        lightning = (saved.name, saved.epoch, saved.global_step)
        for at, loop in enumerate(saved.loops):
            counts = (loop.steps, loop.syncs, loop.steps_since_sync, loop.trained)
            held = {"slow": "slow weights", "fast": "fast weights"}[loop.saved_with]
            rows.append((*lightning, at, *counts, held))
        if not saved.loops:
            rows.append((*lightning, *[None] * 5, "one set alone"))
    headings = ["file", "epoch", "global step", "optimizer", "inner steps", "syncs", "steps since sync"]
    shown = table([*headings, "trained parameters", "state_dict holds"], rows)
    return section("Checkpoints", shown, *_other_settings(run.saved, run.newest.settings))


def _other_settings(saved: Sequence[Saved], settings: dict[str, Any]) -> Iterable[Markup]:
    for part in saved:
        others = [f"{name}: {_value(value)}" for name, value in part.settings.items() if value != settings[name]]
        if others:
            yield element("p", f"{part.name} was saved with {', '.join(others)}.")


def versions(run: Run) -> Markup:
    """What wrote the checkpoint, where it says so, and what wrote this page."""
    written = "" if run.newest is None or run.newest.lightning is None else run.newest.lightning
    rows = [
        ("Python", "", platform.python_version()),
        ("torch", "", torch.__version__),
        ("Lightning", written, _installed("lightning") or _installed("pytorch-lightning")),
        ("lightning-lookahead", "", _installed("lightning-lookahead")),
    ]
    text = "A checkpoint names the version of Lightning alone."
    return section(
        "Versions", table(["", "in the newest checkpoint", "where this page was written"], rows), element("p", text)
    )


def texts(run: Run) -> Markup:
    """Hyperparameters and configuration, as they are in their files."""
    shown = (folded(name, element("pre", text)) for name, text in run.texts.items())
    return section("Hyperparameters and configuration", *shown)


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _value(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def _short(value: float | None, sign: str = "") -> Number:
    return Number("" if value is None else f"{value:{sign}.6g}")


def _difference(slow: float | None, fast: float | None) -> Number:
    return _short(None if slow is None or fast is None else slow - fast, "+")
