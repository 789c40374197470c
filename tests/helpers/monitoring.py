"""Runs with a monitor, and what it has to record."""

import torch
from torch.utils.data import DataLoader

from lightning_lookahead import LookaheadCallback
from tests.helpers.runs import Regression, inputs, make_trainer


def fit(model, monitor=None, *callbacks, k=3, ckpt_path=None, **settings):
    callback = LookaheadCallback(k=k, monitor=monitor)
    trainer = make_trainer(callback, *callbacks, **{"limit_val_batches": 1.0, "max_epochs": 1, **settings})
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


def regress(module, batch):
    """Prediction, target and loss of `Regression`: the data are in its loss."""
    x = inputs(1000 + int(batch[0]))
    prediction = module.net(x)
    return prediction, torch.ones_like(prediction), (prediction - 1).square().mean()


def by_hand(steps, k=3, batches=1):
    """The loss of theta after every inner step and of phi after every sync, in Algorithm 1."""
    module = Regression()
    optimizer = module.configure_optimizers()
    records = []

    def record(step, weights):
        with torch.no_grad():
            losses = [(module.net(inputs(1000 + index)) - 1).square().mean() for index in range(batches)]
        records.append((step, weights, torch.stack(losses).mean().item()))

    phi = module.weights()
    record(0, "outer")
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        module.loss(step - 1).backward()
        optimizer.step()
        record(step, "inner")
        if step % k == 0:
            with torch.no_grad():
                for slow, fast in zip(phi, module.net.parameters(), strict=True):
                    fast.copy_(slow.lerp_(fast, 0.5))
            record(step, "outer")
    return records


class Held(Regression):
    """`Regression` with a number of validation batches."""

    held = 1

    def val_dataloader(self):
        return DataLoader(range(self.held))
