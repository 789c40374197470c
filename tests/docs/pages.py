"""The pages of the documentation and the blocks of code in them."""

import re
from textwrap import dedent

from tests.helpers.places import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))

_FENCE = re.compile(r'^( *)```(\w+)(?: title="(\S+)")?\n(.*?)^\1```$', re.DOTALL | re.MULTILINE)
_INSERTED = re.compile(r"<!-- (?:code|module): (\S+) -->")


def text(page):
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page, language):
    """The blocks of a language: line, file name or None, and what is in each."""
    found = _FENCE.finditer(text(page))
    return [(text(page).count("\n", 0, f.start(4)), f[3], dedent(f[4])) for f in found if f[2] == language]


def commands(page):
    """The commands in blocks of shell."""
    parts = (part.strip() for _, _, block in blocks(page, "sh") for part in re.split(r"&&|\n", block))
    return [part for part in parts if part]


def program_of(page):
    """The snippets of Python as one program, each line where the page has it: a traceback names the page's lines."""
    lines = [""] * (text(page).count("\n") + 1)
    for first, _, block in blocks(page, "python"):
        lines[first : first + block.count("\n")] = block.splitlines()
    for found in _INSERTED.finditer(text(page)):
        lines[text(page).count("\n", 0, found.start())] = f"exec(open({str(DOCS / 'snippets' / found[1])!r}).read())"
    return "\n".join(lines) + "\n"
