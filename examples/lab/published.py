"""Markdown files whose tables a program writes, between ``<!-- records: NAME -->`` and ``<!-- end -->``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from examples.command_line import parser_of, stop

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

BLOCK = re.compile(r"(<!-- records: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def arguments(doc: str) -> argparse.Namespace:
    """Only ``--check``."""
    parser = parser_of(doc)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the file would change")
    return parser.parse_args()


def publish(results: Path, block: Callable[[str], str], program: str, *, check: bool) -> None:
    """Write each block anew from its name; or, to check, end with an error if that would change the file."""

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        return f"{begin}{block(name)}{end}"

    text = results.read_text()
    filled = BLOCK.sub(fill, text)
    if not check:
        results.write_text(filled)
    elif filled != text:
        stop(f"{results.name} is not what the records give: run {program}")
