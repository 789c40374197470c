"""Does it pay to estimate the best alpha at each sync? Fixed and adaptive alpha, on the same runs.

    python examples/paper/adaptive_alpha.py                          # Fashion-MNIST, a narrow network
    python examples/paper/adaptive_alpha.py --data FOLDER --full     # CIFAR, on a GPU

Lookahead with k 5 around SGD (learning rate .1, momentum .9) and around AdamW (learning rate 1e-3, weight decay .1):
alpha fixed at .5 and .8, and estimated from secants, from Hessian-vector products and, around AdamW, from second
moments as in the paper.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer

from examples.command_line import stoppable
from examples.lab.report import Table, cell, figure, groups, style, values
from examples.lab.study import GOES_ON, show
from examples.lab.sweep import sweep, title
from examples.lab.training import Settings, train
from lightning_lookahead import AdaptiveAlpha, LookaheadCallback

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    from matplotlib.figure import Figure

    from examples.lab.images import Images
    from examples.lab.study import Record
    from examples.lab.sweep import Sweep


INNER = {"sgd": "SGD", "adamw": "AdamW"}
COLOURS = {
    "alone": "tab:gray",
    "alpha 0.5": "tab:blue",
    "alpha 0.8": "tab:cyan",
    "estimated: secant": "tab:red",
    "estimated: hvp": "tab:green",
    "estimated: fisher": "tab:orange",
    "estimated: sqrt_fisher": "tab:purple",
}
KINDS = [(inner, alpha) for inner in INNER.values() for alpha in COLOURS]


@dataclass(frozen=True)
class Adaptive(Settings):
    """A run whose alpha may be estimated.

    Args:
        curvature: What `AdaptiveAlpha` takes; empty for a fixed alpha.
    """

    curvature: str = ""


class Alphas(Callback):
    """The alpha of every sync, kept in the checkpoint."""

    def __init__(self, lookahead: LookaheadCallback) -> None:
        self.lookahead = lookahead
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        alpha = self.lookahead.slow_weights[0].alpha.last
        if trainer.global_step % pl_module.settings.k == 0 and alpha is not None:  # None: every sync was left out
            self.values.append(round(alpha, 4))

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = state_dict["values"]


def adapted(settings: Adaptive, images: Images, folder: Path) -> Record:
    """One run; with an estimated alpha its results hold the alpha of every sync."""
    if not settings.curvature:
        return train(settings, images, folder)
    lookahead = LookaheadCallback(settings.k, AdaptiveAlpha(settings.curvature), nonfinite="skip")
    alphas = Alphas(lookahead)
    return {**train(settings, images, folder, lookahead, alphas), "alphas": alphas.values}


def run(runs: Sweep) -> list[Record]:
    """Each optimizer alone and with each alpha, from every seed."""
    todo: list[Settings] = []
    adam = replace(runs.base, optimizer="adamw", lr=1e-3, weight_decay=0.1)
    for inner, estimates in ((runs.base, ("secant", "hvp")), (adam, ("fisher", "sqrt_fisher", "secant", "hvp"))):
        base = Adaptive(**asdict(inner))
        todo += [base, *(replace(base, k=5, alpha=alpha) for alpha in (0.5, 0.8))]
        todo += [replace(base, k=5, curvature=curvature) for curvature in estimates]
    return runs.complete(runs.repeat(todo), adapted)


def kind(record: Record) -> tuple[str, str]:
    """The inner optimizer, and where alpha comes from."""
    s = record["settings"]
    alpha = (f"estimated: {s['curvature']}" if s["curvature"] else f"alpha {s['alpha']}") if s["k"] else "alone"
    return INNER[s["optimizer"]], alpha


def tables(records: list[Record]) -> list[Table]:
    """Accuracy and losses at the end, and what alpha was."""
    headings = [
        "inner optimizer",
        "",
        "test accuracy, %",
        "test loss",
        "training loss",
        "mean alpha",
        "alpha at a bound",
    ]
    result = Table(f"{title(records[0]['settings'])}, k 5", headings)
    for names, runs in groups(records, kind, KINDS).items():
        alphas = [alpha for run in runs for alpha in run["results"].get("alphas", [])]
        low = AdaptiveAlpha().alpha_low
        bound = f"{statistics.mean(alpha in (low, 1) for alpha in alphas):.0%} of syncs" if alphas else "-"
        mean = f"{statistics.mean(alphas):.2f}" if alphas else "-"
        losses = [cell(runs, name, "{:.4f}") for name in ("loss", "train_loss")]
        result.rows.append([*names, cell(runs, "accuracy", scale=100), *losses, mean, bound])
    return [result]


def draw(records: list[Record]) -> Figure:
    """Test loss at the end, mean and standard deviation over seeds, and the estimated alphas of the first seed."""
    by_optimizer = groups(records, lambda record: kind(record)[0], INNER.values())
    with style():
        result = figure(7.2, 2.6 * len(by_optimizer))
        rows = result.subplots(len(by_optimizer), 2, squeeze=False, sharex="col")
        for (optimizer, of), (losses, steps) in zip(by_optimizer.items(), rows, strict=True):
            for (_, name), runs in groups(of, kind, KINDS).items():
                found = values(runs, "loss")
                spread = statistics.stdev(found) if len(found) > 1 else 0
                losses.errorbar(statistics.mean(found), name, xerr=spread, fmt="o", color=COLOURS[name])
                if alphas := runs[0]["results"].get("alphas"):
                    steps.plot(range(1, len(alphas) + 1), alphas, ".", color=COLOURS[name], markersize=2)
            losses.invert_yaxis()
            losses.set_title(f"around {optimizer}")
            steps.set(ylabel="alpha", ylim=(0, 1.05))
        for panel, text in zip(rows[-1], ("test loss at the end", "sync, first seed"), strict=True):
            panel.set_xlabel(text)
    return result


@stoppable(GOES_ON)
def main() -> None:
    runs = sweep(__doc__, "adaptive_alpha", small={"epochs": 2}, full={})
    records = run(runs)
    show(runs.study, tables(records), draw(records))


if __name__ == "__main__":
    main()
