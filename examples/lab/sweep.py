"""Many runs on images: the arguments of the programs that do them, and choosing the best of a grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from examples.command_line import at_least_one, stop
from examples.lab.images import Images, load
from examples.lab.study import Study, parser
from examples.lab.training import Settings, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from examples.lab.study import Record

FULL = {"width": 64, "epochs": 200}
"""The paper's network and length."""
SMALL = {"width": 8, "size": 14}
"""What two CPU cores do in hours."""
SMOKE = {"width": 8, "size": 0, "epochs": 1, "batch_size": 32, "limit": 256}
"""A few steps."""


@dataclass
class Sweep:
    """Runs on the same images, from the command line's arguments.

    Attributes:
        study: Where their records are.
        images: What they train on and look at.
        base: The settings that they start from.
        seeds: Runs of each kind.
        smoke: Whether only to see that it works.
    """

    study: Study
    images: Images
    base: Settings
    seeds: int
    smoke: bool

    def complete(
        self, todo: Iterable[Settings], run: Callable[[Settings, Images, Path], Record] = train
    ) -> list[Record]:
        """The records of these runs; those that are missing are done."""
        return self.study.complete(list(todo), lambda settings, folder: run(settings, self.images, folder))

    def repeat(self, todo: Iterable[Settings]) -> list[Settings]:
        """Each of the settings from every seed, seed by seed: who stops early has something of each kind."""
        settings = list(todo)
        return [replace(one, seed=seed) for seed in range(self.seeds) for one in settings]

    def few(self, values: Sequence[Any]) -> Sequence[Any]:
        """All of them, or the first and the last for a smoke run."""
        return (values[0], values[-1]) if self.smoke and len(values) > 1 else values

    def grid(self, start: Settings, choices: dict[str, Sequence[Any]]) -> list[Settings]:
        """All combinations of some settings."""
        points = product(*map(self.few, choices.values()))
        return [replace(start, **dict(zip(choices, point, strict=True))) for point in points]


def sweep(doc: str, name: str, *, seeds: int = 3, data: str = "fashion-mnist", small: Record, full: Record) -> Sweep:
    """Read the command line, load the images, and set what all runs have in common.

    Args:
        doc: The program's description.
        name: What its records are called.
        seeds: Runs of each kind, unless the user says otherwise.
        data: What `examples.lab.images.load` takes, unless the user says otherwise.
        small: Settings for a CPU, besides `SMALL`.
        full: Settings for ``--full``, besides `FULL`.
    """
    arguments = parser(doc, seeds=seeds, data=data)
    arguments.add_argument("--full", action="store_true", help="the paper's network, image size and epochs: for a GPU")
    arguments.add_argument("--epochs", type=at_least_one, help="passes over the training images, if not those of above")
    args = arguments.parse_args()
    try:
        images = load("digits" if args.smoke else args.data)
    except (FileNotFoundError, ValueError) as error:
        stop(error)
    torch.set_num_threads(1)  # processes that share the work gain more than threads
    budget = {**FULL, **full} if args.full else {**SMALL, **small}
    if args.smoke:
        budget |= SMOKE
    if args.epochs:
        budget["epochs"] = args.epochs
    number, size = len(images.train[0]), images.train[0].shape[-1]
    budget["held_out"] = min(budget.get("held_out", 0), number // 5)
    budget["size"] = 0 if size <= budget.get("size", 0) else budget.get("size", 0)
    base = Settings(images.name, **budget)
    return Sweep(Study(name, args.out), images, base, args.seeds, args.smoke)


def title(settings: Record) -> str:
    """What was trained on what, and for how long."""
    s = settings
    size = f", images averaged to {s['size']}x{s['size']}" if s["size"] else ""
    return f"{s['data']}{size}: {s['model']} of width {s['width']}, {s['epochs']} epochs"


def best(records: Iterable[Record]) -> Settings:
    """The settings of the run with the highest accuracy; the first of equals."""
    return Settings(**max(records, key=lambda record: record["results"].get("accuracy", 0.0))["settings"])
