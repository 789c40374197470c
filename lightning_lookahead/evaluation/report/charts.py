"""Charts as SVG that is as wide as there is room: its text has one size on every screen.

The lines are drawn in a coordinate system of their own, which is stretched, and keep their width. All else is placed in
percents.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from .markup import Markup, element

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

WIDTH, HEIGHT = 1000, 220
"""Of the coordinate system of the lines; a unit of the height is a pixel."""

_LARGEST = 1e300  # the difference of two larger numbers may be infinite
_MARGIN = 0.06  # above and below the points, of their range


class Point(NamedTuple):
    """A value at a step, and what is said of it when it is pointed at."""

    step: float
    value: float
    label: str

    @property
    def drawable(self) -> bool:
        """Whether it has a place on axes: NaN, infinite and huge numbers have none."""
        return all(math.isfinite(number) and abs(number) <= _LARGEST for number in (self.step, self.value))


@dataclass(frozen=True)
class Marks:
    """Points of one kind.

    Args:
        kind: The class that the style sheet knows: ``"fast"``, ``"slow"`` or ``"plain"``.
        name: What the legend says; empty: nothing.
        lines: Points that are joined.
        dots: Points that stand alone.
    """

    kind: str
    name: str = ""
    lines: Sequence[Sequence[Point]] = ()
    dots: Sequence[Point] = ()

    @property
    def points(self) -> list[Point]:
        """All points that are drawn, each once."""
        joined = (point for line in self.lines for point in line)
        return [point for point in dict.fromkeys([*joined, *self.dots]) if point.drawable]


class Axis(NamedTuple):
    """A range of numbers that is drawn ``size`` long."""

    low: float
    high: float
    size: float

    def at(self, value: float) -> float:
        """The place of a number, from 0 to ``size``."""
        return round(self.size * (value - self.low) / (self.high - self.low), 1)

    def ticks(self, most: int, *, whole: bool = False) -> list[tuple[float, str]]:
        """Round numbers on the axis, at most one more than ``most``, each with its text; ``whole``: integers alone."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next((power * factor for factor in (1, 2, 5) if power * factor >= rough), power * 10)
        if whole:
            step = max(step, 1.0)
        numbers = [n * step + 0.0 for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        exponent, largest = math.floor(math.log10(step) + 1e-9), max(abs(self.low), abs(self.high))
        if exponent > -5 and largest < 1e6:  # noqa: PLR2004 (beyond it is shorter with an exponent)
            texts = [f"{number:.{max(0, -exponent)}f}" for number in numbers]
        else:
            digits = max(1, math.floor(math.log10(largest)) - exponent + 1)
            texts = [f"{number:.{digits}g}" for number in numbers]
        return list(zip(numbers, texts, strict=True))


def axis(values: Iterable[float], size: float, margin: float = 0.0) -> Axis:
    """An axis with all values on it, and a part ``margin`` of their range on both sides."""
    seen = list(values)
    low, high = min(seen), max(seen)
    largest = max(abs(low), abs(high))
    if largest < 1 / _LARGEST:
        spare = 0.5
    elif high - low <= 1e-9 * largest:  # as good as one value
        spare = largest / 20
    else:
        spare = (high - low) * margin
    return Axis(low - spare, high + spare, size)


class Chart:
    """Marks with their axes.

    Args:
        title: What is drawn.
        step_name: What the steps are called.
        marks: The points; those without a finite value are left out.
    """

    def __init__(self, title: str, step_name: str, marks: Sequence[Marks]) -> None:
        self.title, self.step_name, self.marks = title, step_name, marks
        self.points = list(dict.fromkeys(point for part in marks for point in part.points))
        if self.points:
            self._across = axis((point.step for point in self.points), WIDTH)
            self._up = axis((point.value for point in self.points), HEIGHT, _MARGIN)

    def svg(self) -> Markup:
        """The chart; a sentence if there is nothing to draw."""
        if not self.points:
            return element("p", "There is no finite value to draw.", class_="soft")
        places = [(*self._place(point), point.label) for point in self.points]
        stretched = element(
            "svg",
            *(element("path", class_=kind, d=path, vector_effect="non-scaling-stroke") for kind, path in self._paths()),
            viewBox=f"0 0 {WIDTH} {HEIGHT}",
            preserveAspectRatio="none",
            width="100%",
            height=HEIGHT,
            overflow="visible",
        )
        return element(
            "svg",
            element("title", self.title),
            element("desc", self._description()),
            *self._grid(),
            stretched,
            *self._dots(),
            element("circle", class_="pointed", r=7, visibility="hidden"),
            role="img",
            width="100%",
            height=HEIGHT + 44,
            data_points=json.dumps(places),
        )

    def legend(self) -> Markup:
        """The names of the marks, each with its colour and shape."""
        keys = (
            element("span", element("i", class_=f"{'line' if part.lines else 'dot'} {part.kind}"), part.name)
            for part in self.marks
            if part.name and part.points
        )
        return element("p", *keys, class_="legend")

    def _place(self, point: Point) -> tuple[float, float]:
        return self._across.at(point.step), round(HEIGHT - self._up.at(point.value), 1)

    def _description(self) -> str:
        steps, values = [point.step for point in self.points], [point.value for point in self.points]
        return (
            f"{len(self.points)} values at {self.step_name} {min(steps):g} to {max(steps):g}, from {min(values):.6g} to"
            f" {max(values):.6g}."
        )

    def _grid(self) -> Iterator[Markup]:
        for number, text in self._up.ticks(5):
            y = round(HEIGHT - self._up.at(number), 1)
            yield element("line", class_="grid", x1=0, x2="100%", y1=y, y2=y)
            yield element("text", text, class_="left", x=-8, y=y + 4)
        whole = all(float(point.step).is_integer() for point in self.points)
        for number, text in self._across.ticks(5, whole=whole):
            yield element("text", text, class_="below", x=_percent(self._across.at(number)), y=HEIGHT + 20)
        yield element("text", self.step_name, class_="below soft", x="50%", y=HEIGHT + 40)

    def _paths(self) -> Iterator[tuple[str, str]]:
        """The lines of each kind, broken where a point cannot be drawn."""
        for part in self.marks:
            path = ""
            for line in part.lines:
                joins = False
                for point in line:
                    if point.drawable:
                        x, y = self._place(point)
                        path += f"{'L' if joins else 'M'}{x:g} {y:g}"
                    joins = point.drawable
            if path:
                yield part.kind, path

    def _dots(self) -> Iterator[Markup]:
        for part in self.marks:
            for point in part.dots:
                if point.drawable:
                    x, y = self._place(point)
                    yield element("circle", class_=part.kind, r=4, cx=_percent(x), cy=y)


def _percent(x: float) -> str:
    return f"{100 * x / WIDTH:g}%"


def thinned(points: Sequence[Point], most: int = 400) -> Sequence[Point]:
    """Of so many points at most: of each stretch the lowest and the highest, in order."""
    if len(points) <= most:
        return points
    stretches = most // 2
    kept: list[int] = []
    for begin, end in pairwise(len(points) * n // stretches for n in range(stretches + 1)):
        seen = [n for n in range(begin, end) if points[n].drawable] or [begin]
        kept += sorted({min(seen, key=lambda n: points[n].value), max(seen, key=lambda n: points[n].value)})
    return [points[n] for n in kept]
