"""What the tests of the callback train: a tiny module, its reference without Lightning, and a quiet Trainer."""

import csv
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_lookahead import LookaheadCallback
from tests.helpers.oracle import lookahead


def inputs(step):
    return torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(step))


class Regression(LightningModule):
    """Steps once in a batch. The data of a step depend on its number alone, as Lightning replays a part-epoch."""

    def __init__(self, optimizer="SGD", batches=5, **settings):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(torch.float64)
        self.settings = {"lr": 0.05, **({"momentum": 0.9} if optimizer == "SGD" else {}), **settings}
        self.optimizer_class = getattr(torch.optim, optimizer)
        self.batches = batches

    def loss(self, step):
        return (self.net(inputs(step)) - 1).square().mean()

    def training_step(self, batch, batch_idx):
        return self.loss(self.trainer.global_step)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(1000))

    def configure_optimizers(self):
        return self.optimizer_class(self.net.parameters(), **self.settings)

    def train_dataloader(self):
        return DataLoader(range(self.batches))

    def val_dataloader(self):
        return DataLoader(range(1))

    def weights(self):
        return [parameter.detach().clone() for parameter in self.net.parameters()]


def reference(steps, k=3, alpha=0.5, **settings):
    """theta and phi of Algorithm 1 after ``steps`` inner steps of `Regression`, without Lightning."""
    module = Regression(**settings)
    optimizer = module.configure_optimizers()

    def inner_step(index):
        optimizer.zero_grad()
        module.loss(index).backward()
        optimizer.step()

    phi = lookahead(list(module.net.parameters()), inner_step, k=k, alpha=alpha, steps=steps)
    return module.weights(), phi


def make_trainer(*callbacks, trainer=Trainer, **settings):
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(callback).__name__ for callback in callbacks),
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return trainer(callbacks=list(callbacks), **{**quiet, **settings})


def leave():
    """End a rank with the others: gloo aborts one whose peers are gone, and at times one that exits in order."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def logged_by(logger):
    """The rows of a `CSVLogger`."""
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def both(callback, module):
    """theta and phi as `use_weights` shows them."""
    shown = []
    for weights in ("fast", "slow"):
        with callback.use_weights(weights):
            shown.append(module.weights())
    return tuple(shown)


def fit(callback, module=None, **settings):
    module = module or Regression(batches=12)
    ckpt_path = settings.pop("ckpt_path", None)
    trainer = make_trainer(callback, **{"max_steps": 8, "max_epochs": 9, **settings})
    trainer.fit(module, ckpt_path=ckpt_path)
    return module, trainer


def checkpoint_after(steps, module_class=Regression, path="from.ckpt", callbacks=None, **settings):
    callbacks = [LookaheadCallback(k=3)] if callbacks is None else callbacks
    trainer = make_trainer(*callbacks, max_steps=steps)
    trainer.fit(module_class(**settings))
    trainer.save_checkpoint(path)
    return path


def last_loss(weights):
    """Validation loss of `Regression` with these weights."""
    module = Regression()
    with torch.no_grad():
        for parameter, value in zip(module.net.parameters(), weights, strict=True):
            parameter.copy_(value)
    return module.loss(1000).item()


class Seen(Callback):
    """What the module holds in each of the hooks around a validation."""

    def __init__(self):
        self.weights = {}

    def record(self, hook, trainer, pl_module):
        self.weights.setdefault((hook, trainer.global_step), pl_module.weights())

    def on_validation_start(self, trainer, pl_module):
        self.record("on_validation_start", trainer, pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.record("on_validation_epoch_end", trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self.record("on_validation_end", trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.record("on_train_batch_end", trainer, pl_module)


class SeveralSteps(Regression):
    """Two optimizers in manual optimization: the first steps ``first`` times in a batch, the second every batch."""

    def __init__(self, first=3):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.taken = first, 0
        self.other = nn.Linear(3, 2).to(torch.float64)

    def configure_optimizers(self):
        return super().configure_optimizers(), torch.optim.Adam(self.other.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for _ in range(self.first):
            self.toggle_optimizer(first)
            first.zero_grad()
            self.manual_backward(self.loss(self.taken))
            first.step()
            self.untoggle_optimizer(first)
            self.taken += 1
        second.zero_grad()
        self.manual_backward((self.other(inputs(self.taken)) - 1).square().mean())
        second.step()


def hooks(optimizer):
    """How many hooks torch calls for this optimizer object."""
    return sum(len(entry) for name, entry in vars(optimizer).items() if name.startswith("_optimizer_"))
