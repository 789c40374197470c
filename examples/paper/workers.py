"""Workers that train apart and meet every k steps: what that does to the loss, and what it saves of the traffic.

    python examples/paper/workers.py             # minutes to hours on a CPU: each run is several processes

Images: a narrow ResNet-18 and SGD on Fashion-MNIST with 2 and 4 workers, each of them with its part of every batch.
DDP, which averages gradients in each step, beside Local SGD (alpha 1), Lookahead over workers (alpha .5) and DiLoCo's
outer step (alpha .7, outer momentum .9), each with k {5, 20, 100}. All see equally many images in equally many steps.
The learning rate of each is tuned by itself, from one seed, on images that are held out. What is sent is what a worker
hands to collectives: gradients or weights, BatchNorm's statistics, and what Lightning exchanges.

The noisy quadratic model: the variance that phi settles at with 1 to 64 workers, by the formula, simulated in one
process, and with the callback in 2 and 4 processes.

On paper: how long a worker sends in each step, for a network of a billion parameters.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

from examples.command_line import stop, stoppable
from examples.lab import images, processes, training
from examples.lab.report import Table, cell, figure, groups, style
from examples.lab.study import GOES_ON, Study, parser, show
from examples.lab.traffic import seconds_per_step
from lightning_lookahead import LookaheadCallback
from lightning_lookahead.theory.noisy_quadratic import lookahead_variance, simulate

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from matplotlib.figure import Figure

    from examples.lab.study import Record

TUNING_SEED = 100
BATCH = 64
"""Images in the batches of all workers together."""
FACTORS = (0.5, 1.0, 2.0)
RATE = 0.03
"""The best learning rate of one worker alone, in `outer_momentum.py`."""
NUMBERS = (2, 4)
KS = (5, 20, 100)
METHODS: dict[str, dict[str, float]] = {
    "DDP": {},
    "Local SGD": {"alpha": 1.0},
    "Lookahead": {"alpha": 0.5},
    "DiLoCo": {"alpha": 0.7, "outer_momentum": 0.9},
}
MANY = (1, 2, 4, 8, 16, 32, 64)
MODES = {"learning_rate": 0.8, "curvature": [1.0, 0.5, 0.25], "noise_variance": [1.0, 1.0, 1.0]}


@dataclass(frozen=True)
class Run(training.Settings):
    """One run on images in several processes.

    Args:
        method: A name in `METHODS`.
        workers: How many processes.
        outer_momentum: Of the outer step, Nesterov's.
    """

    method: str = "DDP"
    workers: int = 2
    outer_momentum: float = 0.0


@dataclass(frozen=True)
class Variance:
    """The variance that phi settles at on the noisy quadratic model.

    Args:
        method: A name in `METHODS`.
        workers: How many train apart.
        processes: Whether they are processes with the callback, or simulated in this one.
        k: Steps from one sync to the next.
        particles: Independent weights of each mode; the variance over them is off by sqrt(2 / particles).
        syncs: After which it is taken.
        seed: Of the noise.
    """

    method: str
    workers: int
    processes: bool
    k: int = 5
    particles: int = 5000
    syncs: int = 60
    seed: int = 0


# -- in one of the processes


class Part(images.ImageData):
    """Batches of which each worker trains on its part; all look at all of the test images."""

    def train_dataloader(self) -> DataLoader:
        whole = super().train_dataloader()
        parts = PartOf(whole.sampler, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(self.train, sampler=parts, batch_size=None, generator=torch.Generator())


class PartOf:
    """A worker's part of each batch of a sampler."""

    def __init__(self, batches: Iterable[Tensor], rank: int, number: int) -> None:
        self.batches, self.rank, self.number = batches, rank, number

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return (batch.chunk(self.number)[self.rank] for batch in self.batches)


class Worker(training.Classifier):
    """The classifier with random numbers of its own on each rank. A loss that is not finite is found at a sync."""

    def on_train_epoch_start(self) -> None:
        epoch = 1000 * self.settings.seed + self.current_epoch
        torch.manual_seed(epoch * self.trainer.world_size + self.global_rank)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(images.augment(x)), y)


class Particles(LightningModule):
    """One weight for each particle and mode; the optimum of each is drawn anew in each step, on each rank."""

    def __init__(self, settings: Variance) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(settings.particles, len(MODES["curvature"]), dtype=torch.float64))
        self.steps = settings.k * settings.syncs
        self.random, self.seed = torch.Generator(), settings.seed

    def on_train_start(self) -> None:
        self.random.manual_seed(self.seed * self.trainer.world_size + self.global_rank)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        curvature, variance = (torch.tensor(MODES[name]).double() for name in ("curvature", "noise_variance"))
        optimum = variance.sqrt() * torch.randn(self.x.shape, dtype=torch.float64, generator=self.random)
        return (curvature * (self.x - optimum) ** 2).sum() / 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.x], lr=MODES["learning_rate"])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(range(self.steps))


class Traffic(Callback):
    """Counts the bytes that this rank hands to collectives: Python's, DDP's gradients and DDP's buffers."""

    def __init__(self) -> None:
        self.bytes = 0
        for name in ("all_reduce", "all_gather", "broadcast"):
            setattr(distributed, name, self._counting(getattr(distributed, name), name == "all_gather"))

    def _counting(self, collective: Any, gathers: bool) -> Any:  # noqa: FBT001
        def counted(*args: Any, **named: Any) -> Any:
            self.bytes += args[1 if gathers else 0].nbytes
            return collective(*args, **named)

        return counted

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ddp = trainer.strategy.model
        if not ddp._comm_hooks:
            ddp.register_comm_hook(None, lambda _, bucket: self._reduce(bucket))

    def _reduce(self, bucket: Any) -> Any:
        return allreduce_hook(None, bucket)  # by `distributed.all_reduce`, which counts

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.strategy.model.broadcast_buffers:
            self.bytes += sum(buffer.nbytes for buffer in pl_module.buffers())


def work(settings: Run | Variance, data: str) -> Record:
    """What this process does of a run, with the others; the results are the first one's."""
    training.quietly()
    torch.set_num_threads(1)
    method = METHODS[settings.method]
    seed_everything(settings.seed, verbose=False)
    traffic = Traffic()
    outer = [LookaheadCallback(settings.k, **method, share_gradients=False)] if method else []
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=settings.workers,
        max_epochs=getattr(settings, "epochs", 1),
        callbacks=[*outer, traffic],
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if isinstance(settings, Variance):
        model = Particles(settings)
        trainer.fit(model)
        return {"variance": model.x.detach().var(0).tolist()}
    loaded = images.load(data)
    own = {name: getattr(settings, name) for name in ("batch_size", "seed", "held_out", "size", "limit")}
    model, part = Worker(settings, loaded), Part(loaded, **own)
    started = time.monotonic()
    try:
        trainer.fit(model, part)
    except RuntimeError as error:
        if "NaN or infinite" not in str(error):
            raise
        return {"diverged": trainer.global_step}
    results = {"wall": time.monotonic() - started, "megabytes": traffic.bytes / 1e6, "steps": trainer.global_step}
    if distributed.get_rank():
        return {}
    model.eval()
    with torch.no_grad():
        batches = [(model(x), y) for x, y in part.val_dataloader()]
    scores, targets = (torch.cat(tensors) for tensors in zip(*batches, strict=True))
    loss = nn.functional.cross_entropy(scores, targets).item()
    accuracy = (scores.argmax(1) == targets).double().mean().item()
    return {"loss": loss, "accuracy": accuracy, **results} if math.isfinite(loss) else {"diverged": results["steps"]}


# -- in the process that keeps the records


def in_processes(settings: Run | Variance, folder: Path, data: str) -> Record:
    """Do a run in as many processes as it has workers."""
    results = folder.resolve() / "results.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.workers}"]
    kind = type(settings).__name__
    own = ["--worker", json.dumps([kind, asdict(settings), data, str(results)])]
    processes.run([*launcher, __file__, *own], folder / "log", OMP_NUM_THREADS="1")
    return json.loads(results.read_text())


def one_worker(arguments: str) -> None:
    """What a process does that `in_processes` has started."""
    kind, settings, data, results = json.loads(arguments)
    found = work({"Run": Run, "Variance": Variance}[kind](**settings), data)
    if not distributed.get_rank():
        Path(results).write_text(json.dumps(found))
    distributed.barrier()
    distributed.destroy_process_group()


def variance(settings: Variance, folder: Path) -> Record:
    """The variances of all modes."""
    if settings.processes:
        return in_processes(settings, folder, "")
    loop = outer_loop(settings.method)
    phi = simulate(
        **MODES,
        **loop,
        k=settings.k,
        syncs=settings.syncs,
        initial_mean=0.0,
        particles=settings.particles,
        seed=settings.seed,
        workers=settings.workers,
    )
    return {"variance": phi.var(axis=0, ddof=1).tolist()}


def outer_loop(method: str) -> dict[str, float]:
    """A method's alpha and momentum, as the theory calls them."""
    own = METHODS[method]
    return {"alpha": own["alpha"], "momentum": own.get("outer_momentum", 0.0)}


def run(study: Study, base: Run, seeds: int, data: str, *, smoke: bool) -> None:
    """The variances; then tune each method, and run it from every seed."""
    few = slice(1, 3) if smoke else slice(None)
    variances = [
        Variance(method, number, processes, particles=500 if smoke else 5000, syncs=30 if smoke else 60)
        for method in ("Lookahead", "DiLoCo")
        for number in MANY[few]
        for processes in ((False, True) if number in NUMBERS[: 1 if smoke else 2] else (False,))
    ]
    study.complete(variances, variance)
    kinds = [
        replace(base, workers=number, method=name, k=k, **own)
        for number in (NUMBERS[:1] if smoke else NUMBERS)
        for name, own in METHODS.items()
        for k in ((KS[:1] if smoke else KS) if own else (0,))
    ]
    finals = []
    for kind in kinds:
        tried = [replace(kind, lr=RATE * factor, seed=TUNING_SEED) for factor in (FACTORS[:1] if smoke else FACTORS)]
        found = study.complete(tried, lambda settings, folder: in_processes(settings, folder, data))
        chosen = min(found, key=lambda record: record["results"].get("loss", math.inf))["settings"]["lr"]
        finals += [replace(kind, lr=chosen, held_out=0, seed=seed) for seed in range(seeds)]
    study.complete(finals, lambda settings, folder: in_processes(settings, folder, data))


# -- what came of it


def tables(records: list[Record]) -> list[Table]:
    """The runs on images, the variances, and what exchanging takes on paper."""
    return [*image_tables(records), variance_table(records), paper_table()]


def image_tables(records: list[Record]) -> list[Table]:
    """For each number of workers the methods, on test images."""
    runs = [r for r in records if "model" in r["settings"] and r["settings"]["seed"] != TUNING_SEED]
    found = []
    for number, of in groups(runs, lambda r: r["settings"]["workers"]).items():
        s = of[0]["settings"]
        steps = " or ".join(sorted({str(r["results"]["steps"]) for r in of if "steps" in r["results"]}))
        table = Table(
            f"{s['data']}: {s['model']} of width {s['width']}, {number} workers, {steps} steps of {s['batch_size']}"
            f" images in all, {len({r['settings']['seed'] for r in of})} seeds",
            ["method", "learning rate", "test loss", "test accuracy, %", "sent by a worker, MB", "seconds"],
        )
        for (_, k), own in groups(
            of, lambda r: (list(METHODS).index(r["settings"]["method"]), r["settings"]["k"])
        ).items():
            name = own[0]["settings"]["method"] + (f", k {k}" if k else "")
            table.rows.append(
                [
                    name,
                    f"{own[0]['settings']['lr']:g}",
                    cell(own, "loss", "{:.4f}"),
                    cell(own, "accuracy", scale=100),
                    cell(own, "megabytes", "{:.1f}"),
                    cell(own, "wall", "{:.0f}"),
                ]
            )
        found.append(table)
    return found


def variance_table(records: list[Record]) -> Table:
    """The variance of the first mode: formula, simulated, and with the callback in processes."""
    of = [r for r in records if "processes" in r["settings"]]
    k, particles = of[0]["settings"]["k"], of[0]["settings"]["particles"]
    table = Table(
        f"Noisy quadratic model, curvature 1, learning rate {MODES['learning_rate']:g}, k {k}: the variance of phi,"
        f" over {particles} particles (off by {math.sqrt(2 / particles):.0%})",
        ["outer loop", "workers", "formula", "simulated", "the callback, in processes"],
    )
    for (name, number), own in groups(of, lambda r: (r["settings"]["method"], r["settings"]["workers"])).items():
        formula = lookahead_variance(**MODES, **outer_loop(name), k=k, workers=number)[0]
        by = {r["settings"]["processes"]: r["results"]["variance"][0] for r in own}
        shown = [f"{by[processes]:.5f}" if processes in by else "" for processes in (False, True)]
        table.rows.append([name, str(number), f"{formula:.5f}", *shown])
    return table


def paper_table() -> Table:
    """What the calculator gives."""
    every = {"DDP, every step": 1, **{f"a sync every {k} steps": k for k in (5, 20, 100, 500)}}
    table = Table(
        "On paper: seconds of each step in which one of 8 workers sends, a billion parameters in float32, a ring"
        " all-reduce through a link of its own, no latency, nothing overlapped",
        ["exchange", "1 Gbit/s", "100 Gbit/s"],
    )
    for name, k in every.items():
        seconds = (seconds_per_step(parameters=1e9, workers=8, gigabits=speed, k=k) for speed in (1, 100))
        table.rows.append([name, *(f"{value:.3g}" for value in seconds)])
    return table


def draw(records: list[Record]) -> Figure:
    """Test loss against what was sent, for each number of workers; and the variance against their number."""
    runs = [r for r in records if "model" in r["settings"] and r["settings"]["seed"] != TUNING_SEED]
    by_number = groups(runs, lambda r: r["settings"]["workers"])
    with style():
        result = figure(7.2, 3.4)
        result.set_layout_engine("constrained")
        *panels, last = result.subplots(1, len(by_number) + 1, squeeze=False)[0]
        for panel, (number, of) in zip(panels, by_number.items(), strict=True):
            for index, (method, own) in enumerate(groups(of, lambda r: r["settings"]["method"], METHODS).items()):
                finished = [r["results"] for r in own if "loss" in r["results"]]
                points = [[r[name] for r in finished] for name in ("megabytes", "loss")]
                panel.plot(*points, "o", color=f"C{index}", label=method, markersize=4)
            panel.set(xscale="log", xlabel="sent by a worker, MB", ylabel="test loss", title=f"{number} workers")
        if panels:
            result.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(METHODS))
        of = [r for r in records if "processes" in r["settings"]]
        for method, own in groups(of, lambda r: r["settings"]["method"]).items():
            color = f"C{list(METHODS).index(method)}"
            numbers = sorted({r["settings"]["workers"] for r in own})
            formula = [
                lookahead_variance(**MODES, **outer_loop(method), k=own[0]["settings"]["k"], workers=number)[0]
                for number in numbers
            ]
            last.plot(numbers, formula, color=color, label="formula", linewidth=1)
            for processes, mark in ((False, "o"), (True, "x")):
                found = [
                    (r["settings"]["workers"], r["results"]["variance"][0])
                    for r in own
                    if r["settings"]["processes"] == processes
                ]
                label, size = ("in processes", 6) if processes else ("simulated", 4)
                last.plot(*zip(*found, strict=True), mark, color=color, label=label, markersize=size)
        last.set(xscale="log", yscale="log", xlabel="workers", ylabel="variance of phi", title="noisy quadratic model")
        last.legend(*(own[:3] for own in last.get_legend_handles_labels()))
    return result


@stoppable(GOES_ON)
def main() -> None:
    arguments = parser(__doc__, seeds=3, data="fashion-mnist")
    arguments.add_argument("--worker", help="(for the processes that this program starts)")
    args = arguments.parse_args()
    if args.worker:
        one_worker(args.worker)
        return
    data = "digits" if args.smoke else args.data
    try:
        loaded = images.load(data)
    except (FileNotFoundError, ValueError) as error:
        stop(error)
    budget = {"epochs": 3, "size": 14, "limit": 25_000, "held_out": 10_000}
    budget = {"epochs": 1, "limit": 512, "held_out": 200} if args.smoke else budget
    study = Study("workers", args.out)
    run(study, Run(loaded.name, batch_size=BATCH, width=8, **budget), args.seeds, data, smoke=args.smoke)
    records = study.records()
    show(study, tables(records), draw(records))


if __name__ == "__main__":
    main()
