"""A classifier with everything that an evaluation could disturb: BatchNorm, dropout, metrics, shuffled data."""

import random

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from tests.helpers.oracle import lookahead


def images(number, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long())


class Classifier(LightningModule):
    def __init__(self, lr=0.2, batches=8, generator=None):
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.lr, self.batches, self.generator = lr, batches, generator
        self.training_accuracy = MulticlassAccuracy(3, average="micro")
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.order = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.order.append(x[0, 0].item())
        prediction = self(x)
        self.training_accuracy(prediction, y)
        return nn.functional.cross_entropy(prediction, y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.accuracy(self(x), y)
        self.log("accuracy", self.accuracy)
        self.log("loss", nn.functional.cross_entropy(self(x), y))

    def weights(self):
        return [parameter.detach().clone() for parameter in self.parameters()]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(images(self.batches * 8, 2), batch_size=8, shuffle=True, generator=self.generator)

    def val_dataloader(self):
        return DataLoader(images(40, 3), batch_size=20, generator=self.generator)


def everything(model):
    """Weights, buffers, modes, metrics and random numbers at this moment."""
    metric = model.training_accuracy
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [part.training for part in model.modules()],
        {name: value.clone() for name, value in metric.metric_state.items()},
        metric.update_count,
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002 (the global one is what is not to be touched)
    )


def same(left, right):
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


class Manual(Classifier):
    """Takes several steps in a batch, by hand."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


class Normed(Classifier):
    """Data that depend on the step's number alone."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.net[3].p = 0.0

    def train_dataloader(self):
        return DataLoader(images(self.batches * 8, 2), batch_size=8)

    def training_step(self, batch, batch_idx):
        return super().training_step(images(8, self.trainer.global_step)[:], batch_idx)

    def statistics(self):
        return [self.net[1].running_mean.clone(), self.net[1].running_var.clone()]


def normed(steps):
    """theta and phi of weights and statistics, written out."""
    model = Normed()
    optimizer = model.configure_optimizers()
    moved = [*model.parameters(), model.net[1].running_mean, model.net[1].running_var]

    def inner_step(index):
        optimizer.zero_grad()
        x, y = images(8, index)[:]
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    phi = lookahead(moved, inner_step, k=3, alpha=0.5, steps=steps)
    return [tensor.detach().clone() for tensor in moved], phi


def both_with_statistics(callback, model):
    shown = []
    for weights in ("fast", "slow"):
        with callback.use_weights(weights):
            shown.append([*model.weights(), *model.statistics()])
    return shown
