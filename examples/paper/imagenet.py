"""The paper's ImageNet experiment: ResNet-50 trained by SGD alone and with Lookahead around it.

    python examples/paper/imagenet.py --smoke                                     # seconds on a CPU, made-up images
    python examples/paper/imagenet.py --data FOLDER --devices 8 --batch-size 32 --precision bf16-mixed

The recipe is PyTorch's: SGD with momentum .9 and weight decay 1e-4, learning rate .1 for a batch of 256 in all and in
proportion for other batches, divided by ten at epochs 30, 48 and 58 of 60 (30, 60 and 80 of 90). Lookahead has k 5 and
alpha .5 and is put around the same optimizer. Both start from the same weights and see the same images in one order.

FOLDER holds train/<class>/*.JPEG and val/<class>/*.JPEG. Needs torchvision: pip install torchvision. May be stopped and
started again with the same arguments: it goes on after the last whole epoch. On several nodes, start it on each as any
Lightning program, or with torchrun, and with --out on a disk that all of them see.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torchmetrics.classification import MulticlassAccuracy

from examples.command_line import at_least_one, leads, stop, stoppable
from examples.lab import training
from examples.lab.image_folder import ImageFolders, UnreadableError, check, load, make_images, vision
from examples.lab.report import COLOURS, Table, bands, cell, figure, groups, style
from examples.lab.study import GOES_ON, Study, describe, parser, show
from examples.lab.training import DivergedError, FitBar, quietly
from lightning_lookahead import LookaheadCallback, newest_checkpoint

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Sequence

    from lightning.pytorch.strategies import Strategy
    from matplotlib.figure import Figure
    from torchvision.datasets import ImageFolder

    from examples.lab.study import Record

DECAY = {60: (30, 48, 58), 90: (30, 60, 80)}
"""Epochs -> those after which the learning rate falls to a tenth; other numbers of epochs in the proportions of 60."""
REPORTED = {60: (50, 60)}
"""Epochs -> those whose accuracy the table has; of other numbers of epochs the last."""
PAPER = {"SGD": ("74.43", "92.15", "75.15", "92.56"), "Lookahead": ("75.13", "92.22", "75.49", "92.53")}
"""What the paper reports for ResNet-50: top-1 and top-5 after 50 epochs, the same after 60."""
SMOKE = {"model": "resnet18", "epochs": 2, "batch_size": 4, "size": 64}  # on one core ResNet-50 takes thrice the time


@dataclass(frozen=True)
class Settings:
    """One run.

    Args:
        data: The name of the folder of images.
        images: How many there are to train on.
        classes: How many kinds there are.
        seed: Of the initial weights, the order of the images and the augmentation.
        k: Inner steps between two syncs; 0 for no Lookahead.
        alpha: Slow weights step size.
        lr: Learning rate at the start for a batch of 256 in all; other batches have theirs in proportion.
        momentum: Of SGD.
        weight_decay: Of SGD, added to the gradient.
        epochs: Passes over the training images.
        decay: Epochs after which the learning rate falls to a tenth.
        batch_size: Images in a batch of one device.
        world: How many devices there are, on all nodes.
        strategy: ``ddp``, ``fsdp1``, ``fsdp2`` or ``auto``.
        precision: Lightning's name for it.
        model: A name in `torchvision.models`.
        size: Height and width of an image.
    """

    data: str
    images: int
    classes: int
    seed: int = 0
    k: int = 0
    alpha: float = 0.5
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    epochs: int = 60
    decay: tuple[int, ...] = DECAY[60]
    batch_size: int = 256
    world: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    model: str = "resnet50"
    size: int = 224


class Classifier(LightningModule):
    """A network of torchvision's under PyTorch's recipe."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.net = getattr(vision().models, settings.model)(num_classes=settings.classes)
        if not self.sharded:  # FSDP2 takes no other layout than torch's own
            self.net.to(memory_format=torch.channels_last)
        self.top1 = MulticlassAccuracy(settings.classes, average="micro")
        self.top5 = MulticlassAccuracy(settings.classes, average="micro", top_k=min(5, settings.classes))

    @property
    def sharded(self) -> bool:
        return self.settings.strategy.startswith("fsdp")

    def configure_model(self) -> None:
        if self.settings.strategy == "fsdp2":
            mesh = self.device_mesh["data_parallel"]
            for part in [*filter(lambda part: isinstance(part, blocks()), self.net.modules()), self.net]:
                fully_shard(part, mesh=mesh)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(memory_format=torch.channels_last))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(x))
        return loss

    def on_validation_epoch_start(self) -> None:
        # DDP goes by the first rank's BatchNorm statistics; under FSDP each rank would validate with its own, and a
        # checkpoint would hold those of one.
        if self.sharded:
            for buffer in self.net.buffers():
                distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        scores = self(x)
        for name, metric in (("top1", self.top1), ("top5", self.top5)):
            metric(scores, y)
            self.log(name, metric, prog_bar=True, batch_size=len(x))
        self.log("loss", nn.functional.cross_entropy(scores, y), sync_dist=True, batch_size=len(x))

    def configure_optimizers(self) -> dict[str, Any]:
        s = self.settings
        lr = s.lr * s.batch_size * s.world / 256
        optimizer = torch.optim.SGD(self.parameters(), lr=lr, momentum=s.momentum, weight_decay=s.weight_decay)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, list(s.decay))}


class Curves(training.Curves):
    """Training loss, and loss and accuracy in validation, after every epoch; kept in the checkpoint."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        # These are means over all ranks, which have to stop together.
        if not all(math.isfinite(curve[-1]) for curve in self.values.values()):
            raise DivergedError


class SameRun(Callback):
    """All ranks do the same run from the same checkpoint, or stop.

    Args:
        run: The run in words.
    """

    def __init__(self, run: str) -> None:
        self.run = run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        first = trainer.strategy.broadcast(self.run)
        if first != self.run:
            message = (
                f"rank {trainer.global_rank} is about to do another run ({self.run}) than rank 0 ({first}): where"
                " several processes train one network, run one command at a time, and have --out on a disk that all"
                " nodes see."
            )
            stop(message)


def blocks() -> tuple[type[nn.Module], ...]:
    """What is sharded each by itself."""
    resnet = vision().models.resnet
    return resnet.BasicBlock, resnet.Bottleneck


def strategy(settings: Settings) -> Strategy | str:
    """Lightning's strategy of that name. Both kinds of FSDP save a folder, each rank its own shards."""
    if settings.strategy == "fsdp1":
        return FSDPStrategy(auto_wrap_policy=set(blocks()), state_dict_type="sharded")
    if settings.strategy == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=settings.world, tensor_parallel_size=1)
    return settings.strategy


def train(settings: Settings, images: tuple[ImageFolder, ImageFolder], args: Namespace, folder: Path) -> Record:
    """Do one run, or the rest of it.

    Returns:
        ``top1``, ``top5`` and ``loss`` in validation at the end, with Lookahead those of the slow weights;
        ``train_loss``, the mean over the last epoch's batches, of the fast weights; ``curves`` of the four. Of a run
        whose loss became infinite or nan only ``diverged``, the step after which that was seen.
    """
    quietly()
    seed_everything(settings.seed, verbose=False)
    checkpoint = newest_checkpoint(folder, "epoch=*.ckpt") if folder.is_dir() else None
    curves = Curves(("train_loss", "loss", "top1", "top5"))
    # A run that diverges ends after the epoch; here it is only left without a sync, on all ranks alike.
    outer = [LookaheadCallback(settings.k, settings.alpha, nonfinite="skip")] if settings.k else []
    # The one before is removed when a new one is whole, which a folder of shards that is written over is not.
    saving = ModelCheckpoint(folder, "{epoch}", save_on_train_epoch_end=True, enable_version_counter=False)
    same = SameRun(f"{describe(settings)}; {checkpoint}")
    try:
        fit = Trainer(
            max_epochs=settings.epochs,
            callbacks=[*outer, curves, saving, same, FitBar()],
            accelerator=args.accelerator,
            strategy=strategy(settings),
            devices=args.devices,
            num_nodes=args.nodes,
            precision=settings.precision,
            benchmark=True,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,
        )
    except (MisconfigurationException, ValueError) as error:  # no such devices, or FSDP1 without a GPU
        stop(error)
    data = ImageFolders(*images, batch_size=settings.batch_size, seed=settings.seed, workers=args.workers)
    try:
        fit.fit(Classifier(settings), data, ckpt_path=checkpoint)
    except DivergedError:
        return {"diverged": fit.global_step}
    return {**{name: curve[-1] for name, curve in curves.values.items()}, "curves": curves.values}


def after(records: Sequence[Record], epoch: int) -> list[Record]:
    """The records as if the runs had ended after this epoch."""
    curves = [record["results"].get("curves", {}) for record in records]
    return [{"results": {name: values[epoch - 1] for name, values in own.items()}} for own in curves]


def optimizers(records: list[Record]) -> dict[str, list[Record]]:
    """The records of each optimizer, under its name in the paper."""
    return groups(records, lambda r: "Lookahead" if r["settings"]["k"] else "SGD", PAPER)


def tables(records: list[Record]) -> list[Table]:
    """Validation accuracies in percent, a row for each optimizer."""
    s = records[0]["settings"]
    reported = REPORTED.get(s["epochs"], (s["epochs"],))
    headings = [f"top-{n}, epoch {epoch}" for epoch in reported for n in (1, 5)]
    result = Table(title(records), ["optimizer", *headings, "validation loss", "training loss"])
    for optimizer, of in optimizers(records).items():
        accuracies = [cell(after(of, epoch), top, scale=100) for epoch in reported for top in ("top1", "top5")]
        losses = [cell(of, loss, "{:.4f}") for loss in ("loss", "train_loss")]
        result.rows.append([optimizer, *accuracies, *losses])
    if (s["model"], s["epochs"], s["classes"]) == ("resnet50", 60, 1000):
        result.rows += [[f"{optimizer}, in the paper", *numbers, "", ""] for optimizer, numbers in PAPER.items()]
    return [result]


def title(records: list[Record]) -> str:
    """What was trained on what, for how long and where."""
    s = records[0]["settings"]
    seeds = len({r["settings"]["seed"] for r in records})
    return (
        f"{s['data']}, {s['images']:,} images: {s['model']}, {s['epochs']} epochs, batch {s['batch_size']} on each of"
        f" {s['world']} devices, {s['strategy']}, {s['precision']}, {seeds} seeds"
    )


def draw(records: list[Record]) -> Figure:
    """Training loss and top-1 accuracy after every epoch, mean and standard deviation over seeds."""
    with style():
        result = figure(7.2, 3.0)
        panels = result.subplots(1, 2)
        curves = {"train_loss": "training loss", "top1": "top-1 accuracy"}
        for panel, (curve, text) in zip(panels, curves.items(), strict=True):
            for optimizer, of in optimizers(records).items():
                bands(panel, of, curve, optimizer, COLOURS[optimizer])
            panel.set(xlabel="epoch", ylabel=text)
        panels[1].yaxis.set_major_formatter("{x:.0%}")
        if panels[1].lines:
            panels[1].legend()
    return result


def runs(images: ImageFolder, args: Namespace) -> list[Settings]:
    """From each seed a run without and one with Lookahead."""
    given = {"epochs": args.epochs, "batch_size": args.batch_size, "size": 224, **(SMOKE if args.smoke else {})}
    decay = DECAY.get(given["epochs"]) or tuple(sorted({math.ceil(given["epochs"] * part / 60) for part in DECAY[60]}))
    base = Settings(
        data="made-up" if args.smoke else args.data.resolve().name,
        images=len(images),
        classes=len(images.classes),
        decay=decay,
        world=args.devices * args.nodes,
        strategy=args.strategy,
        precision=args.precision,
        **given,
    )
    return [replace(base, seed=seed, k=k) for seed in range(args.seeds) for k in (0, 5)]


def run(study: Study, images: tuple[ImageFolder, ImageFolder], args: Namespace) -> list[Record]:
    """Do all runs. Returns their records, in the first process."""
    todo = runs(images[0], args)

    def one(settings: Settings, folder: Path) -> Record:
        return train(settings, images, args, folder)

    if leads():
        records = study.complete(todo, one)
    else:  # Lightning or torchrun started this process to train with the first one
        study.follow(todo, one)
        records = []
    if distributed.is_initialized():  # gloo ends with an error in a process that outlives the others
        distributed.barrier()
        distributed.destroy_process_group()
    return records


def arguments() -> Namespace:
    """What the program is asked to do."""
    result = parser(__doc__, seeds=1)
    result.add_argument("--data", type=Path, help="a folder with train/<class>/*.JPEG and val/<class>/*.JPEG")
    result.add_argument("--epochs", type=at_least_one, default=60, help="60 is the paper's short schedule (60)")
    result.add_argument(
        "--batch-size", type=at_least_one, default=256, help="images in a batch, for EACH device; see above (256)"
    )
    result.add_argument("--strategy", choices=("auto", "ddp", "fsdp1", "fsdp2"), default="auto", help="(auto)")
    result.add_argument("--accelerator", choices=("auto", "gpu", "cpu"), default="auto", help="(auto)")
    result.add_argument("--devices", type=at_least_one, default=1, help="on each node (1)")
    result.add_argument("--nodes", type=at_least_one, default=1, help="(1)")
    precisions = ("32-true", "16-mixed", "bf16-mixed")
    result.add_argument("--precision", choices=precisions, default="32-true", help="(32-true)")
    result.add_argument("--workers", type=int, default=8, help="processes that read images, for each device (8)")
    return result.parse_args()


@stoppable(GOES_ON)
def main() -> None:
    args = arguments()
    study = Study("imagenet", args.out, ["torchvision"])
    with TemporaryDirectory() as temporary:
        if args.smoke:
            args.data, args.workers = make_images(Path(temporary)), 0
        try:
            check(args.data)
            records = run(study, load(args.data, SMOKE["size"] if args.smoke else 224), args)
        except FileNotFoundError as error:
            stop(error)
        except UnreadableError as error:  # from a worker it comes with the worker's traceback before it
            stop(str(error).strip().rpartition("UnreadableError: ")[2])
    if leads():
        show(study, tables(records), draw(records))


if __name__ == "__main__":
    main()
