"""The page: one HTML document with its style, its script and its charts in it. It loads nothing."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from . import sections
from .markup import Markup, element, together

if TYPE_CHECKING:
    from .run import Run


def page(run: Run) -> str:
    """The document about a run."""
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    # Nothing but these two is allowed to act, whatever a file of the run has in it.
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}"
    title = f"Lookahead: {run.name}"
    head = element(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", title),
        element("style", Markup(style)),
    )
    parts = (
        sections.key_figures,
        sections.problems,
        sections.slow_and_fast,
        sections.inner_and_outer,
        sections.outer_loop,
        sections.metrics,
        sections.settings,
        sections.checkpoints,
        sections.versions,
        sections.texts,
    )
    body = element(
        "body",
        element("header", element("p", "Lookahead", class_="soft"), element("h1", run.name)),
        element("main", *(part(run) for part in parts)),
        element("div", id="tip", role="status", hidden="hidden"),
        element("script", Markup(script)),
    )
    return together(Markup("<!doctype html>\n"), element("html", head, body, lang="en"), Markup("\n"))


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
