r"""Formulas: what arithmatex marks, ``\(...\)`` and ``\[...\]``, becomes MathML at build time.

Browsers draw MathML by themselves, so that no script and no font is loaded from anywhere.
"""

from __future__ import annotations

import re
from html import unescape

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\[(\[](.*?)\\[)\]]\s*</\1>', re.DOTALL)


def on_page_content(html: str, **_: object) -> str:
    """Convert the formulas of a page."""
    return _FORMULA.sub(_converted, html)


def _converted(found: re.Match[str]) -> str:
    latex = unescape(found[2]).strip()
    if found[1] == "span":
        return convert(latex)
    return f'<div class="formula">{convert(latex, display="block")}</div>'
