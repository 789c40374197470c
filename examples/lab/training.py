"""One run on images: a network, an optimizer with or without something around it, and what came of it."""

from __future__ import annotations

import logging
import math
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from examples.lab.images import ImageData, Images, augment
from examples.lab.models import MODELS
from examples.lab.progress import bar
from lightning_lookahead import LookaheadCallback, compare_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MILESTONES = (0.3, 0.6, 0.8)
"""Where the learning rate falls, as parts of training: epochs 60, 120 and 160 of the paper's 200."""
DECAY = 0.2


class DivergedError(Exception):
    """The training loss is not finite any more."""


@dataclass(frozen=True)
class Settings:
    """One run on images.

    Args:
        data: The name of the images.
        seed: Of the initial weights, the order of the images and the augmentation.
        optimizer: ``sgd`` or ``adamw``.
        lr: Learning rate at the start; falls to a fifth after 30, 60 and 80% of training.
        momentum: Of SGD.
        weight_decay: Of SGD (added to the gradient), or AdamW's (times the learning rate).
        k: Inner steps between two syncs; 0 for no Lookahead.
        alpha: Slow weights step size.
        pullback_momentum: What a sync does to momentum: ``none`` (maintain), ``pullback`` (interpolate) or ``reset``.
        average: Decay of an exponential average of the weights (Polyak) that is looked at instead; 0 for none.
        model: A name in `examples.lab.models.MODELS`.
        width: Channels of its first stage; at least 8 on CPUs without AVX-512, where torch 2.13's convolution of 1x1
            with a stride, of 4 channels in channels-last, writes past the end of its memory.
        size: What the images are averaged down to; 0 leaves them.
        epochs: Passes over the training images.
        batch_size: Images in a batch.
        held_out: Training images to look at instead of the test images, for tuning; 0 to look at the test images.
        limit: Images to train on and to look at; 0 for all.
    """

    data: str
    seed: int = 0
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-3
    k: int = 0
    alpha: float = 0.8
    pullback_momentum: str = "none"
    average: float = 0.0
    model: str = "resnet18"
    width: int = 8
    size: int = 0
    epochs: int = 5
    batch_size: int = 128
    held_out: int = 0
    limit: int = 0


class Classifier(LightningModule):
    """A network for images under the paper's recipe: augmentation, cross-entropy, learning rate in steps."""

    def __init__(self, settings: Settings, images: Images) -> None:
        super().__init__()
        self.settings = settings
        self.net = MODELS[settings.model](settings.width, channels=images.channels, classes=images.classes)
        self.net.to(memory_format=torch.channels_last)
        self.accuracy = MulticlassAccuracy(images.classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_epoch_start(self) -> None:
        # So that augmentation is the epoch's, whether training was stopped before it or not.
        torch.manual_seed(1000 * self.settings.seed + self.current_epoch)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self(augment(x)), y)
        if not loss.isfinite():
            raise DivergedError
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        scores = self(x)
        self.accuracy(scores, y)
        self.log("accuracy", self.accuracy, prog_bar=True, batch_size=len(x))
        self.log("loss", nn.functional.cross_entropy(scores, y), batch_size=len(x))

    def configure_optimizers(self) -> dict[str, Any]:
        s = self.settings
        if s.optimizer == "adamw":
            optimizer = torch.optim.AdamW(self.parameters(), lr=s.lr, weight_decay=s.weight_decay)
        else:
            optimizer = torch.optim.SGD(self.parameters(), lr=s.lr, momentum=s.momentum, weight_decay=s.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        milestones = sorted({math.ceil(part * steps) for part in MILESTONES})
        scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=DECAY)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Curves(Callback):
    """Training loss, and loss and accuracy on what is looked at, after every epoch; kept in the checkpoint."""

    def __init__(self, names: Sequence[str] = ("train_loss", "loss", "accuracy")) -> None:
        self.values: dict[str, list[float]] = {name: [] for name in names}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, curve in self.values.items():
            curve.append(round(trainer.callback_metrics[name].item(), 6))

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = state_dict["values"]


class Progress(Callback):
    """The mean training loss over each of 24 equal parts of training; kept in the checkpoint."""

    PARTS = 24

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.sum = torch.zeros(())
        self.steps = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.sum, self.steps = self.sum.to(outputs["loss"].device) + outputs["loss"], self.steps + 1
        if trainer.global_step >= (len(self.losses) + 1) * trainer.estimated_stepping_batches / self.PARTS:
            self.losses.append(round(self.sum.item() / self.steps, 6))
            self.sum, self.steps = torch.zeros(()), 0

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "sum": self.sum, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.losses, self.sum, self.steps = (state_dict[name] for name in ("losses", "sum", "steps"))


class FitBar(Callback):
    """A bar that counts the steps of a fit, in the first process."""

    def __init__(self) -> None:
        self.shown = ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            steps = bar("steps", trainer.estimated_stepping_batches, trainer.global_step)
            self.show = self.shown.enter_context(steps)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.show(trainer.global_step)

    def on_train_end(self, *_: Any) -> None:
        self.shown.close()

    on_exception = on_train_end


def quietly() -> None:
    """Nothing said of what is meant to be so."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for text in ("num_workers", "LeafSpec", "NaN or infinite", "exists and is not empty", "multi-channel"):
        warnings.filterwarnings("ignore", message=f".*{text}.*")


def around(settings: Settings) -> LookaheadCallback | EMAWeightAveraging | None:
    """What is put around the optimizer: Lookahead, an average of the weights, or nothing."""
    if settings.k:
        # A run that diverges ends at the next loss; here it is only left without a sync.
        return LookaheadCallback(
            settings.k, settings.alpha, pullback_momentum=settings.pullback_momentum, nonfinite="skip"
        )
    return EMAWeightAveraging(decay=settings.average) if settings.average else None


def trainer(settings: Any, folder: Path, callbacks: Sequence[Callback | None] = (), **more: Any) -> Trainer:
    """A Trainer for ``settings.epochs``, with ``last.ckpt`` in the folder after each; ``more`` are arguments of it."""
    checkpoint = ModelCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    return Trainer(
        max_epochs=settings.epochs,
        callbacks=[*filter(None, callbacks), checkpoint, FitBar()],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        **more,
    )


def resumable(folder: Path) -> Path | None:
    """The checkpoint to go on from, if the run was stopped."""
    last = folder / "last.ckpt"
    return last if last.exists() else None


def train(settings: Settings, images: Images, folder: Path, *more: Callback) -> dict[str, Any]:
    """Do one run, or the rest of it.

    Args:
        settings: What to train, and how.
        images: What on.
        folder: Where the run's checkpoint is.
        more: Callbacks, after what the settings put around the optimizer; with a Lookahead of its own among them it is
            that one which is put around.

    Returns:
        ``accuracy`` and ``loss`` on what is looked at, at the end; ``train_loss``, the mean over the last epoch's
        batches, of the fast weights; ``curves``, the three after every epoch; ``losses``, `Progress`'s; with Lookahead
        also ``fast_accuracy`` and ``fast_loss``. Of a run whose loss became infinite or nan only ``diverged``, the
        step after which it did.
    """
    quietly()
    seed_everything(settings.seed, verbose=False)
    data = ImageData(
        images,
        batch_size=settings.batch_size,
        seed=settings.seed,
        held_out=settings.held_out,
        size=settings.size,
        limit=settings.limit,
    )
    model, curves, progress = Classifier(settings, images), Curves(), Progress()
    outer = None if any(isinstance(one, LookaheadCallback) for one in more) else around(settings)
    fit = trainer(settings, folder, [outer, *more, curves, progress])
    try:
        fit.fit(model, data, ckpt_path=resumable(folder))
    except DivergedError:
        return {"diverged": fit.global_step}
    results = {"train_loss": curves.values["train_loss"][-1], "curves": curves.values, "losses": progress.losses}
    if settings.k:
        final = compare_weights(fit, model, datamodule=data)
        results = {**final.slow, **{f"fast_{name}": value for name, value in final.fast.items()}, **results}
    else:
        results = {**fit.validate(model, data, verbose=False)[0], **results}
    return results if math.isfinite(results["loss"]) else {"diverged": fit.global_step}
