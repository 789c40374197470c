"""Docstrings for mkdocstrings: their one example is a section of its own, and a literal block is a block of code."""

from __future__ import annotations

import re

import griffe


class Plain(griffe.Extension):
    """Turns the package's ``Example:``, ``Example::`` and ``::`` into what Google style and Markdown have for them."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Change the docstring of each object."""
        if obj.docstring is not None:
            value = re.sub(r"(?m)^Example:(:?)$", r"Examples:\1", obj.docstring.value)
            obj.docstring.value = re.sub(r"(?m):{2}$", ":", value)
