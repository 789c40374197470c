"""Writes OPTIMIZERS.md: with which optimizer classes a run with Lookahead is stopped and resumed, bit for bit.

Usage: ``python examples/optimizers/table.py``, with what ``pip install -c constraints.txt -e '.[dev]'`` installs. It
takes minutes.
"""

from __future__ import annotations

import os
import textwrap
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is published is of runs on the CPU

from examples.command_line import stoppable
from examples.lab.progress import track
from tests.helpers import optimizer_zoo as zoo  # the runs are those of the tests

if TYPE_CHECKING:
    from collections.abc import Iterator

STATUSES = (zoo.RESUMES, zoo.ALONE, zoo.REFUSED, zoo.NOT_HERE, zoo.FAILS)

HEADER = f"""# Optimizers

Every optimizer class of some packages, with Lookahead around it: in a plain loop with `SlowWeights`, and in a Trainer
with `LookaheadCallback`. A run of {zoo.STEPS} steps with k={zoo.K} is stopped right after a sync, and one and two steps
into a cycle, and goes on in new objects from what was saved. It "{zoo.RESUMES}" if it ends with the fast and slow
weights of the run that was not stopped, bit for bit, and these are those of Algorithm 1. A class
"{zoo.ALONE}" if its runs without Lookahead do not resume bit for bit. The classes are taken from the
packages as they are installed; how each is made and takes a step is found out by trying. All is on the CPU, and in
float32 but where that rounds the steps away.

Made by `python examples/optimizers/table.py`; `tests/outer_loop/test_optimizers.py` makes sure that it is so.

The first number is of plain loops, the second of Trainers.
"""


def table() -> str:
    """Run everything that has not been run in this process; the text of OPTIMIZERS.md."""
    found = {package: list(_outcomes(package)) for package in track(zoo.PACKAGES, "packages")}
    return "\n".join([HEADER, *_summary(found), "", *_others(found), "", *_resuming(found), ""])


def _outcomes(package: str) -> Iterator[tuple[str, Any, Any]]:
    for name, cls in track(sorted(zoo.optimizers_of(package).items()), package):
        yield name, zoo.in_a_loop(cls), zoo.in_a_trainer(cls)


def _title(package: str) -> str:
    distribution = packages_distributions()[package.partition(".")[0]][0]
    return f"{package} {version(distribution).partition('+')[0]}"


def _summary(found: dict[str, Any]) -> Iterator[str]:
    yield f"| package | classes | {' | '.join(STATUSES)} |"
    yield f"| --- | ---: |{' ---: |' * len(STATUSES)}"
    for package, outcomes in found.items():
        counts = [[sum(row[at].status == status for row in outcomes) for at in (1, 2)] for status in STATUSES]
        cells = [f"{loop}, {trainer}" if loop or trainer else "" for loop, trainer in counts]
        yield f"| {_title(package)} | {len(outcomes)} | {' | '.join(cells)} |"


def _others(found: dict[str, Any]) -> Iterator[str]:
    yield "## What does not simply resume"
    yield ""
    yield "| package | class | plain loop | Trainer |"
    yield "| --- | --- | --- | --- |"
    for package, outcomes in found.items():
        for name, *both in outcomes:
            if any(outcome.status != zoo.RESUMES for outcome in both):
                loop, trainer = (textwrap.shorten(str(outcome), 200).replace("|", "\\|") for outcome in both)
                yield f"| {package} | `{name}` | {loop} | {'the same' if loop == trainer else trainer} |"


def _resuming(found: dict[str, Any]) -> Iterator[str]:
    yield "## What resumes"
    yield ""
    yield "In both, unless the table above says otherwise. Of those with a star, the state in a file has objects in it"
    yield "that only `weights_only=False` loads, with Lookahead and without."
    for package, outcomes in found.items():
        names = [
            f"`{name}`{'*' if any(outcome.pickled for outcome in both) else ''}"
            for name, *both in outcomes
            if any(outcome.status == zoo.RESUMES for outcome in both)
        ]
        if names:
            yield ""
            yield textwrap.fill(f"**{_title(package)}**: {', '.join(names)}", 118, break_on_hyphens=False)


@stoppable()
def main() -> None:
    path = Path(__file__).with_name("OPTIMIZERS.md")
    path.write_text(table())
    print(f"Wrote {path}.")


if __name__ == "__main__":
    main()
