"""HTML in which nothing from a file is more than text: whatever is not `Markup` is escaped."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class Markup(str):
    """A string that is HTML already."""

    __slots__ = ()


def together(*parts: object) -> Markup:
    """The parts one after the other, escaped unless they are `Markup`."""
    return Markup("".join(part if isinstance(part, Markup) else escape(str(part)) for part in parts))


def element(name: str, *children: object, **attributes: object) -> Markup:
    """An element of HTML or SVG.

    Args:
        name: Its tag.
        children: What is in it, escaped unless it is `Markup`.
        attributes: Their values, which are escaped; one that is ``None`` is left out. In a name ``_`` stands for ``-``,
            and at its end for nothing: ``class_``.
    """
    written = (
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{''.join(written)}>{together(*children)}</{name}>")


class Number(str):
    """A number as text, for a table."""

    __slots__ = ()


def table(headings: Sequence[object], rows: Sequence[Sequence[object]], class_: str | None = None) -> Markup:
    """A table whose rows begin with a heading; columns of numbers stand to the right."""
    right = [any(_is_number(row[at]) for row in rows) for at in range(len(headings))]
    sides = ["number" if side else None for side in right]
    head = (element("th", text, scope="col", class_=side) for text, side in zip(headings, sides, strict=True))
    body = (element("tr", *_cells(row, sides)) for row in rows)
    whole = element("table", element("thead", element("tr", *head)), element("tbody", *body), class_=class_)
    return element("div", whole, class_="wide")


def _cells(row: Sequence[object], sides: Sequence[str | None]) -> Iterable[Markup]:
    for at, (value, side) in enumerate(zip(row, sides, strict=True)):
        text = "" if value is None else value
        yield element("td", text, class_=side) if at else element("th", text, scope="row", class_=side)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, Number)) and not isinstance(value, bool)


def listed(names: Sequence[object], texts: Sequence[object]) -> Markup:
    """A list of names, each with a text beside it."""
    pairs = (element("div", element("dt", n), element("dd", t)) for n, t in zip(names, texts, strict=True))
    return element("dl", *pairs)


def folded(summary: object, *children: object) -> Markup:
    """What is shown when its summary is opened."""
    return element("details", element("summary", summary), *children)
