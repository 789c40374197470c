"""What pages take from elsewhere: tables that are made of the package itself, code, drawings.

Where a page wants one it has a comment::

    <!-- options: trainer.callback.LookaheadCallback -->     the arguments of a class, from its docstring
    <!-- keys: outer_loop.saved_format -->                   the keys of a checkpoint, from the docstring of the module
    <!-- version: outer_loop.saved_format -->                the version of the format
    <!-- table: examples/optimizers/OPTIMIZERS.md -->        the first table of a file
    <!-- code: classifier.py -->                             a file of docs/snippets
    <!-- module: classifier.py -->                           a file of docs/snippets, folded
    <!-- drawing: packages.svg -->                           a file of docs/drawings, to take the page's colours

Nothing is imported: griffe reads the sources.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import dropwhile, takewhile
from pathlib import Path
from textwrap import indent

import griffe

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent

_MARK = re.compile(r"<!-- (\w+): (\S+) -->")


def on_page_markdown(markdown: str, **_: object) -> str:
    """Put each in the place of its comment."""
    return _MARK.sub(lambda found: KINDS[found[1]](found[2]) if found[1] in KINDS else found[0], markdown)


@cache
def package() -> griffe.Object:
    """The sources of the package."""
    return griffe.load("lightning_lookahead", search_paths=[ROOT])


def options(path: str) -> str:
    """The arguments of a class: name, default and what its docstring says."""
    documented = package()[path]
    defaults = {parameter.name: parameter.default for parameter in documented.parameters}
    sections = documented.docstring.parse("google")
    (arguments,) = (s.value for s in sections if s.kind is griffe.DocstringSectionKind.parameters)
    said = [str(defaults[a.name]).replace("'", '"') for a in arguments]
    rows = [(f"`{a.name}`", f"`{d}`", " ".join(a.description.split())) for a, d in zip(arguments, said, strict=True)]
    return _table(("option", "default", "what it does"), rows)


def keys(path: str) -> str:
    """The keys in a module's docstring, where they stand in a table between lines of equals signs."""
    documented = package()[path]
    value = re.sub(r"(?<!`)`([A-Z_]+)`", lambda found: f"`{documented[found[1]].value}`", documented.docstring.value)
    _, body, _ = re.split(r"(?m)^(?==+ +=+$)", value)
    ruler, *lines = body.splitlines()
    width = ruler.rindex(" ") + 1
    rows: list[list[str]] = []
    for line in lines:
        key, text = line[:width].strip(), line[width:].strip()
        if key:
            rows.append([key, text])
        else:
            rows[-1][1] += f" {text}"
    return _table(("key", "what it holds"), rows)


def version(path: str) -> str:
    """The version of the format of checkpoints."""
    return str(package()[path]["VERSION"].value)


def table(path: str) -> str:
    """The first table of a Markdown file."""
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    of_table = lambda line: line.startswith("|")  # noqa: E731
    return "\n".join(takewhile(of_table, dropwhile(lambda line: not of_table(line), lines)))


def code(name: str) -> str:
    """A snippet that several pages show."""
    return f"```python\n{(DOCS / 'snippets' / name).read_text(encoding='utf-8')}```"


def module(name: str) -> str:
    """A snippet, folded."""
    return f'??? example "The module of this page"\n\n{indent(code(name), "    ")}'


def drawing(name: str) -> str:
    """A drawing."""
    return (DOCS / "drawings" / name).read_text(encoding="utf-8")


KINDS = {
    "options": options,
    "keys": keys,
    "version": version,
    "table": table,
    "code": code,
    "module": module,
    "drawing": drawing,
}


def _table(heading: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
