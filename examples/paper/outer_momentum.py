"""Momentum in the outer loop: what SNOO's outer step buys beside Lookahead's, around an inner optimizer tuned alone.

    python examples/paper/outer_momentum.py                          # images and words, small networks, hours on a CPU
    python examples/paper/outer_momentum.py --task words --data FOLDER

Images: a narrow ResNet-18 and SGD on Fashion-MNIST. Words: the LSTM of the language experiment, narrower, and Adam on
the King James Bible. The learning rate of the inner optimizer is tuned alone, from one seed, on data that are held out.
Around it, and around one with half and one with twice its rate, every k {5, 20, 100}, alpha {.3, .5, .7, 1} and outer
momentum {0, .5, .75, .9} (Nesterov's) is run from that seed. The best with momentum and the best without, the defaults
of each, and the inner optimizer alone are then run from every seed, and looked at on test data. May be stopped and
started again, and run several times at once to share the work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from examples.command_line import stop, stoppable
from examples.lab import images, text, training, word_training
from examples.lab.report import Table, cell, figure, groups, style, values
from examples.lab.study import GOES_ON, Study, console, parser, show
from lightning_lookahead import LookaheadCallback
from lightning_lookahead.theory.noisy_quadratic import compare_at_risk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from matplotlib.figure import Figure

    from examples.lab.study import Record

TUNING_SEED = 100
FACTORS = (1.0, 0.5, 2.0)
"""Of the tuned learning rate: what outer momentum buys an inner optimizer that is not tuned is no gain of its own."""
OUTER = {"k": (5, 20, 100), "alpha": (0.3, 0.5, 0.7, 1.0), "outer_momentum": (0.0, 0.5, 0.75, 0.9)}
DEFAULTS = {"Lookahead, default": (5, 0.5, 0.0), "outer momentum, default": (20, 0.7, 0.9)}
"""k, alpha and momentum: the paper's, and what SNOO's code has for the outer step."""
PARTS = 24
"""Parts of training that the mean training loss is taken over."""


@dataclass(frozen=True)
class OuterSettings:
    """What the settings of both tasks have beside their own.

    Args:
        outer_momentum: Of the outer step, Nesterov's.
        factor: What the tuned learning rate was multiplied by.
    """

    outer_momentum: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True)
class ImageSettings(OuterSettings, training.Settings):
    """One run on images."""


@dataclass(frozen=True)
class WordSettings(OuterSettings, word_training.Settings):
    """One run on words."""


Settings = ImageSettings | WordSettings


@dataclass
class Task:
    """What is trained.

    Attributes:
        name: ``images`` or ``words``.
        base: The settings that all runs start from, those of tuning.
        rates: Learning rates to tune the inner optimizer over.
        tested: What is set otherwise in a run that is looked at on test data.
        run: Does a run.
    """

    name: str
    base: Settings
    rates: tuple[float, ...]
    tested: dict[str, Any]
    run: Callable[[Any, Path], Record]


def outer(settings: Settings) -> list[LookaheadCallback]:
    """The callback of a run; none for the inner optimizer alone."""
    if not settings.k:
        return []
    return [LookaheadCallback(settings.k, settings.alpha, outer_momentum=settings.outer_momentum, nonfinite="skip")]


def image_task(data: str, *, smoke: bool) -> Task:
    """A ResNet-18 and SGD."""
    pictures = images.load("digits" if smoke else data)
    budget = {"epochs": 3, "size": 14, "batch_size": 64, "limit": 25_000}
    budget = {"epochs": 1, "batch_size": 32, "limit": 256} if smoke else budget
    held_out = min(10_000, len(pictures.train[0]) // 5)
    base = ImageSettings(pictures.name, seed=TUNING_SEED, width=8, held_out=held_out, **budget)
    rates = (0.1,) if smoke else (0.01, 0.03, 0.1, 0.3)

    def run(settings: ImageSettings, folder: Path) -> Record:
        results = training.train(settings, pictures, folder, *outer(settings))
        number = min(len(pictures.train[0]) - settings.held_out, settings.limit or math.inf)
        return {**results, "steps": settings.epochs * int(number // settings.batch_size)}

    return Task("images", base, rates, {"held_out": 0}, run)


def word_task(data: str, *, smoke: bool) -> Task:
    """An LSTM and Adam."""
    words = text.load("python" if smoke else data)
    sizes = {"embedding": 16, "hidden": 24, "epochs": 2, "limit": 2500}
    sizes = sizes if smoke else {"embedding": 64, "hidden": 96, "epochs": 5, "limit": 233_500}
    drops = dict.fromkeys(("drop_output", "drop_hidden", "drop_input", "drop_words", "drop_weights"), 0.1)
    base = WordSettings(
        words.name, seed=TUNING_SEED, optimizer="adam", batch_size=20, bptt=35, patience=1, **sizes, **drops
    )
    rates = (8e-3,) if smoke else (2e-3, 4e-3, 8e-3, 1.6e-2)

    def run(settings: WordSettings, folder: Path) -> Record:
        progress = training.Progress()
        results = word_training.train(settings, words, folder, *outer(settings), progress)
        windows = word_training.Windows(words.train, settings.batch_size, settings.bptt, settings.limit)
        return {**results, "losses": progress.losses, "steps": settings.epochs * len(windows)}

    return Task("words", base, rates, {"tested": True}, run)


TASKS = {"images": (image_task, "fashion-mnist"), "words": (word_task, "kjv")}


def grid(start: Settings, *, smoke: bool) -> list[Settings]:
    """Every outer loop; with an alpha of 1 and no momentum it is the inner optimizer alone, which has a run already."""
    choices = [(values[0], values[-1]) if smoke else values for values in OUTER.values()]
    points = [point for point in product(*choices) if point[1:] != (1.0, 0.0)]
    return [with_outer(start, point) for point in points]


def with_outer(start: Settings, point: tuple[float, float, float]) -> Settings:
    """The settings with this k, alpha and momentum."""
    return replace(start, **dict(zip(OUTER, point, strict=True)))


def best(records: Iterable[Record]) -> Record:
    """The run with the lowest loss on held-out data; the first of equals."""
    return min(records, key=lambda record: record["results"].get("loss") or math.inf)


def kind(settings: Record) -> str:
    """``alone``, ``Lookahead`` or ``outer momentum``."""
    return "alone" if not settings["k"] else "outer momentum" if settings["outer_momentum"] else "Lookahead"


def tuning(records: Iterable[Record]) -> list[Record]:
    """The runs of tuning."""
    return [record for record in records if record["settings"]["seed"] == TUNING_SEED]


def run(study: Study, task: Task, seeds: int, *, smoke: bool) -> None:
    """Tune the inner optimizer, run the grid around it, and the best and the defaults from every seed."""
    tuned = best(study.complete([replace(task.base, lr=lr) for lr in task.rates], task.run))["settings"]["lr"]
    starts = [replace(task.base, lr=factor * tuned, factor=factor) for factor in FACTORS]
    finals: list[Settings] = []
    for start in starts:
        alone, *around = study.complete([start, *grid(start, smoke=smoke)], task.run)
        finals += [type(start)(**alone["settings"]), *(with_outer(start, point) for point in DEFAULTS.values())]
        for of in ("Lookahead", "outer momentum"):
            chosen = best(record for record in around if kind(record["settings"]) == of)
            finals.append(type(start)(**chosen["settings"]))
    finals = list(dict.fromkeys(finals))
    study.complete([replace(one, seed=seed, **task.tested) for seed in range(seeds) for one in finals], task.run)


# -- what came of it


def by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each task."""
    return groups(records, lambda r: "words" if "bptt" in r["settings"] else "images", TASKS)


def label(settings: Record) -> str:
    """A row's name."""
    if not settings["k"]:
        return "inner optimizer alone"
    return f"k {settings['k']}, alpha {settings['alpha']:g}, momentum {settings['outer_momentum']:g}"


def faster(runs: list[Record], alone: list[Record]) -> str:
    """How many times sooner the mean training loss is where the inner optimizer ends alone, seed by seed."""
    ends = {r["settings"]["seed"]: r["results"]["losses"][-1] for r in alone if "losses" in r["results"]}
    found = []
    for record in runs:
        losses, end = record["results"].get("losses"), ends.get(record["settings"]["seed"])
        if losses and end is not None:
            first = next((part for part, loss in enumerate(losses, start=1) if loss <= end), None)
            found.append(PARTS / first if first else None)
    reached = [number for number in found if number is not None]
    if not reached:
        return "never"
    often = "" if len(reached) == len(found) else f" ({len(reached)} of {len(found)})"
    return f"{sum(reached) / len(reached):.2f}{often}"


def tables(records: list[Record]) -> list[Table]:
    """For each task: the tuning, the runs from every seed, and the grid around each inner optimizer."""
    found = []
    for name, runs in by_task(records).items():
        found += [seeds_table(name, runs), *grid_tables(name, runs)]
    return found


def seeds_table(name: str, records: list[Record]) -> Table:
    """The runs on test data, by learning rate."""
    finals = [r for r in records if r["settings"]["seed"] != TUNING_SEED]
    number = len({r["settings"]["seed"] for r in finals})
    loss, shown = ("test_loss", "test loss") if name == "words" else ("loss", "test loss")
    result = Table(
        f"{title(name, records)}, {number} seeds",
        ["rate", "outer loop", shown, "training loss", "times sooner (SNOO claims 1.5 to 2.5)"],
    )
    for (factor, lr), runs in groups(finals, lambda r: (r["settings"]["factor"], r["settings"]["lr"])).items():
        alone = [r for r in runs if not r["settings"]["k"]]
        for row, of in groups(runs, lambda r: order(r["settings"])).items():
            sooner = "" if not row[0] else faster(of, alone)
            cells = [cell(of, loss, "{:.4f}"), cell(of, "train_loss", "{:.4f}"), sooner]
            result.rows.append([f"{lr:g} ({factor:g} times the tuned)", label(of[0]["settings"]), *cells])
    return result


def order(settings: Record) -> tuple[float, ...]:
    """Alone first, then Lookahead, then momentum."""
    return settings["k"] and 1, settings["outer_momentum"], settings["k"], settings["alpha"]


def title(name: str, records: list[Record]) -> str:
    """What was trained on what, and for how long."""
    s = records[0]["settings"]
    what = "an LSTM, Adam" if name == "words" else f"{s['model']} of width {s['width']}, SGD"
    steps = sorted({record["results"]["steps"] for record in records})
    return f"{s['data']}: {what}, {s['epochs']} epochs, {' or '.join(map(str, steps))} steps"


def grid_tables(name: str, records: list[Record]) -> list[Table]:
    """Loss on held-out data around each inner optimizer, a row for each k and alpha, a column for each momentum."""
    found = []
    for factor, runs in groups(tuning(records), lambda r: r["settings"]["factor"], FACTORS).items():
        alone = [r for r in runs if not r["settings"]["k"]]
        around = [r for r in runs if r["settings"]["k"]]
        if not around:
            continue
        lr = around[0]["settings"]["lr"]
        own = [r for r in alone if r["settings"]["lr"] == lr]
        table = Table(
            f"{name}, {factor:g} times the tuned rate: held-out loss, one seed; alone {cell(own, 'loss', '{:.4f}')}",
            ["k, alpha", *(f"momentum {mu:g}" for mu in OUTER["outer_momentum"])],
        )
        for (k, alpha), row in groups(around, lambda r: (r["settings"]["k"], r["settings"]["alpha"])).items():
            by_momentum = {r["settings"]["outer_momentum"]: [r] for r in row}
            cells = [cell(by_momentum.get(mu, []), "loss", "{:.4f}") for mu in OUTER["outer_momentum"]]
            table.rows.append([f"{k}, {alpha:g}", *cells])
        found.append(table)
    return found


def draw(records: list[Record]) -> Figure:
    """The theory's excess loss at matched risk against momentum, and the grid around each inner optimizer."""
    tasks = by_task(records)
    with style():
        result = figure(7.2, 3.2)
        panels = result.subplots(1, 1 + len(tasks), squeeze=False)[0]
        theory, *rest = panels
        momenta = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95)
        for index, risk in enumerate((0.01, 0.03)):
            found = [
                compare_at_risk(
                    risk,
                    curvature=[1 / i for i in range(1, 101)],
                    noise_variance=1.0,
                    initial_mean=1.0,
                    k=5,
                    steps=1000,
                    momentum=mu,
                )
                for mu in momenta
            ]
            colour = f"C{index}"
            theory.plot(
                momenta, [one.lookahead.excess_loss for one in found], "o-", color=colour, label=f"risk {risk:g}"
            )
            theory.axhline(found[0].sgd.excess_loss, color=colour, linewidth=1, linestyle=":")
        theory.set(
            xlabel="outer momentum", ylabel="excess loss after 1000 steps", title="theory; dotted: SGD", ylim=(0, None)
        )
        theory.legend()
        for panel, (name, runs) in zip(rest, tasks.items(), strict=True):
            for index, (factor, of) in enumerate(
                groups(tuning(runs), lambda r: r["settings"]["factor"], FACTORS).items()
            ):
                around = [r for r in of if r["settings"]["k"]]
                lowest = {
                    mu: min(values(own, "loss"), default=math.nan)
                    for mu, own in groups(around, lambda r: r["settings"]["outer_momentum"]).items()
                }
                lr = [r["settings"]["lr"] for r in around][:1]
                alone = values([r for r in of if not r["settings"]["k"] and [r["settings"]["lr"]] == lr], "loss")
                panel.plot(lowest.keys(), lowest.values(), "o-", color=f"C{index}", label=f"{factor:g} times the tuned")
                for loss in alone:
                    panel.axhline(loss, color=f"C{index}", linewidth=1, linestyle=":")
            panel.set(xlabel="outer momentum", ylabel="held-out loss, best k and alpha", title=f"{name}; dotted: alone")
        if rest:
            lines = rest[0].get_legend_handles_labels()
            result.legend(*lines, loc="outside lower right", ncols=len(FACTORS), title="inner learning rate")
        for panel in panels:
            panel.set_xticks([0, 0.5, 0.9])
    return result


@stoppable(GOES_ON)
def main() -> None:
    arguments = parser(__doc__, seeds=5)
    arguments.add_argument("--task", choices=[*TASKS, "both"], default="both", help="what to train (both)")
    arguments.add_argument("--data", help="with --task: a folder or a name")
    args = arguments.parse_args()
    if args.data and args.task == "both":
        arguments.error("--data is for one task: give --task images or --task words")
    torch.set_num_threads(1)  # processes that share the work gain more than threads
    study = Study("outer_momentum", args.out)
    for name in TASKS if args.task == "both" else [args.task]:
        make, data = TASKS[name]
        try:
            task = make(args.data or data, smoke=args.smoke)
        except (FileNotFoundError, ValueError) as error:
            stop(error)
        console.print(f"{task.name}: {task.base.data}")
        run(study, task, args.seeds, smoke=args.smoke)
    records = study.records()
    show(study, tables(records), draw(records))


if __name__ == "__main__":
    main()
