"""Pages and pictures that programs of `examples` have made: taken from there at each build, and nowhere else kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "results/paper.md": "examples/paper/RESULTS.md",
    "results/costs.md": "examples/benchmarks/RESULTS.md",
    "results/optimizers.md": "examples/optimizers/OPTIMIZERS.md",
}
PICTURES = ("digits.png", "figure10.png")

_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\((?!https?:|#)([^)]+)\)")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages and the pictures."""
    for name in PICTURES:
        files.append(_copied(config, f"images/{name}", ROOT / "examples/images" / name))
    for target, source in PAGES.items():
        folder = (ROOT / source).parent
        text = (ROOT / source).read_text(encoding="utf-8")
        for picture in _PICTURE.findall(text):
            files.append(_copied(config, f"{Path(target).parent}/{picture}", folder / picture))
        # What a link leads to in the repository is not on the site.
        text = _LINK.sub(rf"`{folder.relative_to(ROOT)}/\1`", text)
        files.append(File.generated(config, target, content=text))


def _copied(config: MkDocsConfig, target: str, source: Path) -> File:
    return File.generated(config, target, abs_src_path=str(source))
