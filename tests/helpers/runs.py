"""What the tests of the callback train: a tiny module, its reference without Lightning, and a quiet Trainer."""

import csv
import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

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
