"""Bars with the time that is left, one below the other: what a program does, and the part of it that is under way."""

from __future__ import annotations

import atexit
import time
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

T = TypeVar("T")
INTERVAL = 0.2
"""Seconds from one drawing to the next, at least."""

console = Console(highlight=False)


class TimeLeft(ProgressColumn):
    """By the mean time of what was done since the bar began."""

    def render(self, task: Task) -> Text:
        done = task.completed - task.fields["before"]
        if done <= 0 or task.elapsed is None or task.remaining is None:
            return Text("-:--:-- left")
        return Text(f"{timedelta(seconds=round(task.elapsed / done * task.remaining))} left")


_bars = Progress(
    *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeLeft()),
    console=console,
    auto_refresh=False,  # no thread draws: what is measured between two calls is not disturbed
    transient=True,
)


@contextmanager
def bar(name: str, total: int, before: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar below those that are there, on a terminal; nothing elsewhere.

    Args:
        name: What is counted.
        total: How many there are.
        before: How many were done before.

    Yields:
        What is to be called with how many are done.
    """
    task = _bars.add_task(name, total=total, completed=before, before=before)
    if console.is_terminal:
        _bars.start()
    drawn = time.monotonic()

    def show(done: int) -> None:
        nonlocal drawn
        _bars.update(task, completed=done)
        if time.monotonic() - drawn > INTERVAL:
            _bars.refresh()
            drawn = time.monotonic()

    try:
        yield show
    finally:
        _bars.remove_task(task)
        if _bars.tasks:
            _bars.refresh()
        else:
            _end()


@atexit.register  # an interrupt may leave a generator where it is, and the cursor hidden
def _end() -> None:
    if _bars.live.is_started:  # where it is not, rich would print an empty line
        _bars.stop()


def track(items: Collection[T], name: str) -> Iterator[T]:
    """The items one after the other, with a bar that counts them."""
    with bar(name, len(items)) as show:
        for done, item in enumerate(items):
            show(done)
            yield item
