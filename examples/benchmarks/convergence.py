"""How many inner steps, and seconds, does it take to a loss, with Lookahead and without?

    python examples/benchmarks/convergence.py                  # scikit-learn's digits: minutes on a CPU
    python examples/benchmarks/convergence.py --data FOLDER    # what examples.lab.images.load takes

A narrow ResNet-18 is trained by SGD with momentum and by Adam, at a constant learning rate, alone and with Lookahead
around it. Each of the four has its own learning rate, the one of the same grid that needs the fewest steps to the
training loss from a seed that is not among the others. The training loss is the running mean over the last batches, of
the fast weights; the test loss is looked at now and then, with the slow weights where Lookahead is on. Seconds are of
training steps only.

Stopped with Ctrl-C, it goes on with the same command. What it has measured so far is in `outputs`.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import nn

from examples.command_line import at_least_one, stop
from examples.lab.bench.fits import trainer
from examples.lab.bench.program import arguments, run
from examples.lab.images import ImageData, Images, load
from examples.lab.report import Table, spread
from examples.lab.study import GOES_ON, Study, console
from examples.lab.training import Classifier, DivergedError, Settings, around, quietly

if TYPE_CHECKING:
    import argparse

    from torch.optim import Optimizer

    from examples.lab.bench.program import Report
    from lightning_lookahead import LookaheadCallback

GRIDS = {"sgd": (0.001, 0.003, 0.01, 0.03, 0.1), "adam": (0.0003, 0.001, 0.003, 0.01, 0.03)}
NAMES = {"sgd": "SGD", "adam": "Adam"}
TUNING_SEED = 1000
LOOK_AT = 1000
"""Test images, at most."""
ANY = 1e9
"""A test loss that is reached at once: the run ends with the training loss."""
MEASURES = {"train": "training loss", "test": "test loss"}


@dataclass(frozen=True)
class Budget(Settings):
    """A run that ends at its targets.

    Args:
        steps: Inner steps, at most.
        every: Steps in the running mean of the training loss, and between two looks at the test loss.
        train: Training loss to reach.
        test: Test loss to reach.
    """

    steps: int = 800
    every: int = 25
    train: float = 0.4
    test: float = 0.3


class Constant(Classifier):
    """The network under SGD with momentum or Adam, at a constant learning rate."""

    def configure_optimizers(self) -> Optimizer:
        s = self.settings
        if s.optimizer == "adam":
            return torch.optim.Adam(self.parameters(), lr=s.lr)
        return torch.optim.SGD(self.parameters(), lr=s.lr, momentum=s.momentum)


class Targets(Callback):
    """Ends training when the targets are reached; keeps the steps and seconds to each."""

    def __init__(self, settings: Budget, data: ImageData, lookahead: LookaheadCallback | None, device: str) -> None:
        self.settings, self.lookahead = settings, lookahead
        self.test = [tensor[:LOOK_AT].to(device) for tensor in data.test.tensors]
        self.reached: dict[str, dict[str, float]] = {}
        self.best = float("inf")
        self._losses: deque[float] = deque(maxlen=settings.every)
        self._seconds = 0.0
        self._start = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._losses.append(outputs["loss"].item())  # on a GPU this waits until the step is done
        self._seconds += time.perf_counter() - self._start
        step = trainer.global_step
        if len(self._losses) == self.settings.every:
            self._compare("train", sum(self._losses) / len(self._losses), step)
        if step % self.settings.every == 0 and "test" not in self.reached:
            self._compare("test", self._look(pl_module), step)
        trainer.should_stop = len(self.reached) == len(MEASURES)

    def _compare(self, measure: str, loss: float, step: int) -> None:
        if measure == "train":
            self.best = min(self.best, loss)
        if measure not in self.reached and loss <= getattr(self.settings, measure):
            self.reached[measure] = {"steps": step, "seconds": self._seconds}

    @torch.no_grad()
    def _look(self, pl_module: LightningModule) -> float:
        x, y = self.test
        pl_module.eval()
        with self.lookahead.use_weights("slow") if self.lookahead else nullcontext():
            loss = nn.functional.cross_entropy(pl_module(x), y).item()
        pl_module.train()
        return loss


def train(settings: Budget, images: Images, device: str) -> dict[str, Any]:
    """One run.

    Returns:
        ``train`` and ``test``: steps and seconds to each target, None where it was not reached; ``best``, the lowest
        running mean of the training loss.
    """
    seed_everything(settings.seed, verbose=False)
    data = ImageData(images, batch_size=settings.batch_size, seed=settings.seed, limit=settings.limit)
    lookahead = around(settings)
    targets = Targets(settings, data, lookahead, device)
    fitting = trainer(
        device,
        [*filter(None, [lookahead]), targets],  # Lookahead comes first: a sync is part of the step that it follows
        max_epochs=-1,
        max_steps=settings.steps,
        limit_val_batches=0,
        reload_dataloaders_every_n_epochs=1,
    )
    with suppress(DivergedError):  # what was reached before counts
        fitting.fit(Constant(settings, images), data)
    return {**{measure: targets.reached.get(measure) for measure in MEASURES}, "best": targets.best}


def tuning(base: Budget, *, smoke: bool) -> list[Budget]:
    """The runs of the tuning seed at each learning rate of the grid; only the training loss is to be reached."""
    grid = GRIDS[base.optimizer][1:3] if smoke else GRIDS[base.optimizer]
    return [replace(base, lr=lr, seed=TUNING_SEED, test=ANY) for lr in grid]


def fewest(tuned: list[dict[str, Any]]) -> float:
    """The learning rate that reached the training loss first; if none did, that which came closest."""

    def steps(one: dict[str, Any]) -> tuple[float, float]:
        return tuple(float("inf") if n is None else n for n in ((one["train"] or {}).get("steps"), one["best"]))

    return min(tuned, key=steps)["lr"]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each optimizer, alone and with Lookahead: its learning rate, and what its runs came to."""
    quietly()
    if args.device == "cpu":
        torch.set_num_threads(1)  # the network is too small for more
    try:
        images = load("digits" if args.smoke else args.data)
    except (FileNotFoundError, ValueError) as error:
        stop(error)
    common = Budget(
        images.name,
        batch_size=32,
        alpha=0.5,
        weight_decay=0.0,
        steps=args.steps,
        train=args.train,
        test=args.test,
    )
    if args.smoke:
        common = replace(common, width=8, steps=30, every=5, train=2.3, test=2.3)
    bases = [replace(common, optimizer=optimizer, k=k) for optimizer in GRIDS for k in (0, 5)]
    study = Study(f"convergence-{args.device}-{images.name}-{common.steps}", Path("outputs"))

    def results(runs: list[Budget]) -> list[dict[str, Any]]:
        return [done["results"] for done in study.complete(runs, lambda own, _: train(own, images, args.device))]

    rows = []
    for base in bases:
        runs = tuning(base, smoke=args.smoke)
        tuned = [{"lr": own.lr, **found} for own, found in zip(runs, results(runs), strict=True)]
        best = replace(base, lr=fewest(tuned))
        rows.append({"settings": asdict(best), "tuned": tuned})
        console.print(f"{_name(rows[-1])}: learning rate {best.lr}")
    # Seed by seed: what slows the machine down for a while slows all down.
    runs = [Budget(**{**row["settings"], "seed": seed}) for seed in range(args.rounds) for row in rows]
    found = results(runs)
    for at, row in enumerate(rows):
        row["runs"] = found[at :: len(rows)]
    study.forget()
    return rows


def tables(report: Report) -> list[Table]:
    """Steps and seconds to the targets; and the steps of each learning rate of the grid."""
    rows = report["rows"]
    s = rows[0]["settings"]
    k, alpha = next((row["settings"]["k"], row["settings"]["alpha"]) for row in rows if row["settings"]["k"])
    runs = (
        f"{s['data']}, {s['model']} of width {s['width']}, batches of {s['batch_size']}, momentum {s['momentum']} in"
        f" SGD, Lookahead with k {k} and alpha {alpha}, at most {s['steps']:,} steps"
    )
    targets = " and ".join(f"{text} {s[name]}" for name, text in MEASURES.items())
    results = Table(
        f"Inner steps and seconds to {targets} (running mean over {s['every']} steps, and looked at every"
        f" {s['every']}), mean ± standard deviation of {len(rows[0]['runs'])} seeds; {runs}",
        ["optimizer", "lr", *(f"{text}: {unit}" for text in MEASURES.values() for unit in ("steps", "seconds"))],
    )
    tuning = Table(
        f"Inner steps to training loss {s['train']} at each learning rate, one seed that is not among the others;"
        f" {runs}",
        ["optimizer", "learning rate: steps"],
    )
    for row in rows:
        cells = [cell for name in MEASURES for cell in (_cell(row, name, "steps"), _cell(row, name, "seconds"))]
        results.rows.append([_name(row), f"{row['settings']['lr']:g}", *cells])
        steps = [f"{one['lr']:g}: {one['train']['steps'] if one['train'] else 'not reached'}" for one in row["tuned"]]
        tuning.rows.append([_name(row), ", ".join(steps)])
    return [results, tuning]


def _name(row: dict[str, Any]) -> str:
    settings = row["settings"]
    return NAMES[settings["optimizer"]] + (" with Lookahead" if settings["k"] else "")


def _cell(row: dict[str, Any], measure: str, unit: str) -> str:
    """Mean and standard deviation of the runs that reached the target, and how many did not."""
    found = [one[measure][unit] for one in row["runs"] if one[measure]]
    missed = len(row["runs"]) - len(found)
    parts = [spread(found, "{:.0f}" if unit == "steps" else "{:.2f}")] if found else []
    return ", ".join([*parts, *([f"not reached in {missed} of {len(row['runs'])}"] if missed else [])])


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=5)
    default = Budget("")
    parser.add_argument(
        "--seeds",
        dest="rounds",
        type=at_least_one,
        default=5,
        help="runs of each kind, from seeds 0, 1, ...; another name of --rounds",
    )
    parser.add_argument("--data", default="digits", help="a folder, or a name (digits unless given)")
    parser.add_argument(
        "--steps", type=at_least_one, default=default.steps, help=f"inner steps, at most ({default.steps})"
    )
    parser.add_argument("--train", type=float, default=default.train, help=f"training loss to reach ({default.train})")
    parser.add_argument("--test", type=float, default=default.test, help=f"test loss to reach ({default.test})")
    run(parser.parse_args(), measure, tables, then=GOES_ON)
