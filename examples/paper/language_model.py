"""The paper's LSTM experiment: SGD, averaged SGD, Adam, and Lookahead around SGD and Adam, on words.

    python examples/paper/language_model.py                          # King James Bible, a small LSTM, hours on a CPU
    python examples/paper/language_model.py --data FOLDER --full     # Penn Treebank, the paper's LSTM, on a GPU

The network is AWD-LSTM's; its sequences of random length and its penalties on activations are left out. SGD and Adam
are each tuned alone, on the grid that is printed, by perplexity on validation text; then Lookahead around each, over
the same rates and the paper's k {5, 10} and alpha {.5, .8}. Averaged SGD takes SGD's choice, and is the equal average
of the weights after each step of the second half of training. The best of each is trained from several seeds and looked
at on test text. May be stopped and started again, and run several times at once to share the work.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from examples.command_line import stop, stoppable
from examples.lab.report import Table, band, cell, figure, groups, style
from examples.lab.study import GOES_ON, Study, console, parser, show
from examples.lab.text import Text, load, unigram_perplexity
from examples.lab.word_training import Settings, train

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.figure import Figure

    from examples.lab.study import Record

FULL = {"epochs": 750}  # as long as AWD-LSTM was trained; the rest is the default of Settings
SMALL = {
    "embedding": 96,
    "hidden": 160,
    "epochs": 6,
    "batch_size": 20,
    "bptt": 35,
    "patience": 1,
    "limit": 233_500,  # it ends four steps after a sync, so that the fast weights have gone their own way
    # In so short a training nothing is learned by heart, and more dropout only slows it down.
    **dict.fromkeys(("drop_output", "drop_hidden", "drop_input", "drop_words", "drop_weights"), 0.1),
}
SMOKE = {**SMALL, "embedding": 16, "hidden": 24, "epochs": 2, "limit": 2500}
TUNING_SEED = 100

FULL_RATES = {"sgd": (10.0, 20.0, 30.0, 60.0), "adam": (5e-4, 1e-3, 2e-3, 4e-3)}
SMALL_RATES = {"sgd": (10.0, 20.0, 40.0, 80.0), "adam": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)}
SMOKE_RATES = {"sgd": (20.0,), "adam": (8e-3,)}
"""Grids of learning rates. They are ours; the fewer steps, the larger."""

OUTER = {"k": (5, 10), "alpha": (0.5, 0.8)}
"""The paper's grid."""

COLOURS = {
    "SGD": "tab:gray",
    "averaged SGD": "tab:green",
    "Lookahead around SGD": "tab:blue",
    "Adam": "tab:orange",
    "Lookahead around Adam": "tab:red",
}
PAPER = {
    "SGD": "63.90",
    "averaged SGD": "58.79",
    "Lookahead around SGD": "63.04",
    "Adam": "59.33",
    "Lookahead around Adam": "57.72",
}
"""Test perplexity on the Penn Treebank, with the sizes that are the defaults of `Settings`."""


def best(records: list[Record]) -> dict[str, Any]:
    """The settings of the run with the lowest loss on validation text; the first of equals."""
    return min(records, key=lambda record: record["results"].get("loss", math.inf))["settings"]


def run(study: Study, text: Text, base: Settings, rates: dict[str, Sequence[float]], seeds: int) -> list[Record]:
    """Tune each optimizer, then train the best of each from every seed. Returns the records of all runs."""

    def complete(todo: list[Settings]) -> list[Record]:
        return study.complete(todo, lambda settings, folder: train(settings, text, folder))

    def tune(starts: list[Settings]) -> Settings:
        records = complete([replace(start, lr=lr) for start in starts for lr in rates[start.optimizer]])
        tuning.extend(records)
        return Settings(**best(records))

    def around(inner: Settings) -> list[Settings]:
        return [replace(inner, **dict(zip(OUTER, point, strict=True))) for point in product(*OUTER.values())]

    tuning: list[Record] = []
    adam = replace(base, optimizer="adam")
    sgd = tune([base])
    tuned = [sgd, replace(sgd, average=0.5), tune(around(base)), tune([adam]), tune(around(adam))]
    finals = [replace(settings, seed=seed, tested=True) for seed in range(seeds) for settings in tuned]
    return tuning + complete(finals)


def name(settings: dict[str, Any]) -> str:
    """The optimizer's, as in the paper's table."""
    inner = {"sgd": "SGD", "adam": "Adam"}[settings["optimizer"]]
    if settings["k"]:
        return f"Lookahead around {inner}"
    return f"averaged {inner}" if settings["average"] else inner


def final(records: list[Record]) -> list[tuple[str, list[Record]]]:
    """The records of each optimizer, and of each setting of it, on test text; in the order of the paper's table."""
    tested = (r for r in records if r["settings"]["tested"])
    names = list(PAPER)
    by = groups(tested, lambda r: (names.index(name(r["settings"])), *order(r["settings"])))
    return [(names[at], runs) for (at, *_), runs in by.items()]


def tables(records: list[Record]) -> list[Table]:
    """What tuning saw, and the perplexities at the end."""
    return [grid_table(records), table(records)]


def table(records: list[Record]) -> Table:
    """Test perplexities, a row for each optimizer."""
    columns = {"test": "test_perplexity", "validation": "perplexity", "test, fast weights": "fast_test_perplexity"}
    result = Table(title(records), ["optimizer", "lr", "k, alpha", *columns, "paper: test, PTB"])
    for optimizer, runs in final(records):
        s = runs[0]["settings"]
        cells = [cell(runs, column) if s["k"] or "fast" not in column else "" for column in columns.values()]
        result.rows.append([optimizer, f"{s['lr']:g}", outer(s), *cells, PAPER[optimizer]])
    return result


def order(settings: dict[str, Any]) -> tuple[float, ...]:
    """Runs of one optimizer by k and alpha, without Lookahead first, then by learning rate."""
    return settings["k"], settings["k"] and settings["alpha"], settings["lr"]


def outer(settings: dict[str, Any]) -> str:
    """The k and alpha of a run with Lookahead."""
    return f"{settings['k']}, {settings['alpha']:g}" if settings["k"] else ""


def title(records: list[Record]) -> str:
    """What was trained on what, and for how long."""
    _, runs = final(records)[0]
    s = runs[0]["settings"]
    words = f", {s['limit']:,} words" if s["limit"] else ""
    sizes = f"{s['layers']} LSTM layers of {s['hidden']}, embedding {s['embedding']}"
    return f"Perplexity on {s['data']}{words}: {sizes}, {s['epochs']} epochs, {len(runs)} seeds"


def grid_table(records: list[Record]) -> Table:
    """What tuning saw: validation perplexity, lr down, without Lookahead and with each k and alpha across."""
    tuning = [r for r in records if not r["settings"]["tested"]]
    columns = [outer(runs[0]["settings"]) for runs in groups(tuning, lambda r: order(r["settings"])[:2]).values()]
    headings = [f"k, alpha: {name}" if name else "alone" for name in columns]
    result = Table("Tuning: perplexity on validation text, one seed", ["inner optimizer", "lr", *headings])
    for (optimizer, lr), runs in groups(tuning, lambda r: (r["settings"]["optimizer"], r["settings"]["lr"])).items():
        by_outer = {outer(r["settings"]): [r] for r in runs}
        cells = [cell(by_outer[name], "perplexity") if name in by_outer else "" for name in columns]
        result.rows.append([{"sgd": "SGD", "adam": "Adam"}[optimizer], f"{lr:g}", *cells])
    return result


def draw(records: list[Record]) -> Figure:
    """Validation perplexity after every epoch, mean and standard deviation over seeds, by inner optimizer."""
    with style():
        result = figure(7.2, 3.8)
        panels = dict(zip(("SGD", "Adam"), result.subplots(1, 2, sharey=True), strict=True))
        lines: dict[str, Iterator[str]] = {}  # an optimizer may have runs of several settings
        for optimizer, runs in final(records):
            panel = panels[optimizer.split()[-1]]
            line = next(lines.setdefault(optimizer, iter(("-", "--", ":", "-."))))
            around = outer(runs[0]["settings"])
            label = f"{optimizer}, k {around.replace(',', ', alpha')}" if around else optimizer
            finished = [r["results"]["curves"]["loss"] for r in runs if "curves" in r["results"]]
            if finished:
                curves = [list(map(math.exp, curve)) for curve in finished]
                marker = "o" if len(curves[0]) <= 20 else None  # noqa: PLR2004 (with more they hide the line)
                band(panel, curves, label, color=COLOURS[optimizer], marker=marker, markersize=3, linestyle=line)
        for panel in panels.values():
            panel.set(xlabel="epoch", yscale="log")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
            panel.legend(loc="lower left", bbox_to_anchor=(0, 1))
        panels["SGD"].set_ylabel("validation perplexity")
    return result


@stoppable(GOES_ON)
def main() -> None:
    arguments = parser(__doc__, seeds=3, data="kjv")
    arguments.add_argument("--full", action="store_true", help="the paper's network and 750 epochs, on all of the text")
    args = arguments.parse_args()
    try:
        text = load("python" if args.smoke else args.data)
    except (FileNotFoundError, ValueError) as error:
        stop(error)
    torch.set_num_threads(1)  # processes that share the work gain more than threads
    sizes = ", ".join(
        f"{len(part):,} for {use}" for use, part in zip(("training", "validation", "test"), text[2:], strict=True)
    )
    console.print(f"{text.name}: words {sizes}; vocabulary {len(text.vocabulary):,}")
    console.print(f"Test perplexity of the words' frequencies alone: {unigram_perplexity(text):.1f}")
    small = (SMOKE, SMOKE_RATES) if args.smoke else (SMALL, SMALL_RATES)
    budget, rates = (FULL, FULL_RATES) if args.full and not args.smoke else small
    base = Settings(text.name, seed=TUNING_SEED, **budget)
    study = Study("language_model", args.out)
    records = run(study, text, base, rates, args.seeds)
    show(study, tables(records), draw(records))


if __name__ == "__main__":
    main()
