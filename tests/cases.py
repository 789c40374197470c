"""Every mode of Lookahead: what the laws in `laws/` hold for. A new mode gets all of them for one line in `CASES`."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torchmetrics import MeanSquaredError

from lightning_lookahead import AdaptiveAlpha, Cosine, InnerOuterMonitor, Linear
from tests.helpers.classifier import Normed
from tests.helpers.monitoring import regress
from tests.helpers.runs import Regression, inputs


@dataclass(frozen=True)
class Case:
    """A run of ten batches in two epochs, with cycles of three steps unless the options say otherwise.

    The last cycle is to be unfinished where the options allow it, or the laws show less.
    """

    options: dict = field(default_factory=dict)
    """Of the callback."""
    module: type = Regression
    """Its data depend on the number of the step alone."""
    optimizer: str = "SGD"
    trainer: dict = field(default_factory=dict)
    """Settings of the Trainer."""
    inner_run: bool = True
    """Whether k=1 and alpha=1 give the inner optimizer's own run: not if a sync does more, or waits."""

    def make(self):
        """A new module."""
        return self.module(self.optimizer)


# -- what is trained


class Grouped(Regression):
    """The second layer has cycles and a step size of its own."""

    own = {"lookahead_k": 2, "lookahead_alpha": 0.8}  # noqa: RUF012 (nobody writes to it)

    def configure_optimizers(self):
        first, second = (list(self.net[layer].parameters()) for layer in (0, 2))
        return self.optimizer_class([{"params": first}, {"params": second, **self.own}], **self.settings)


class Half(Regression):
    """Of bfloat16."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net.to(torch.bfloat16)

    def loss(self, step):
        return (self.net(inputs(step).bfloat16()) - 1).square().mean()


class Single(Regression):
    """Of float32, and converted by a Trainer of double precision after what was loaded is in it."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.net.to(torch.float32)

    def loss(self, step):
        return (self.net(inputs(step).to(self.net[0].weight.dtype)) - 1).square().mean()


class Players(Regression):
    """Two optimizers of different kinds by hand; the first steps in every batch, the second twice in every other."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.automatic_optimization = False
        self.other = nn.Linear(3, 2).to(torch.float64)
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))

    def configure_optimizers(self):
        return super().configure_optimizers(), torch.optim.Adam(self.other.parameters(), lr=0.01)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        step = int(self.taken)
        for optimizer in (first, second, second) if step % 2 else (first,):
            optimizer.zero_grad()
            self.manual_backward(self.loss(step) + (self.other(inputs(step)) - 1).square().mean())
            optimizer.step()
        self.taken += 1


class Norm(Normed):
    """BatchNorm, and no dropout."""

    def __init__(self, optimizer):
        super().__init__()
        self.optimizer_class = getattr(torch.optim, optimizer)

    def configure_optimizers(self):
        settings = {"momentum": 0.9} if self.optimizer_class is torch.optim.SGD else {}
        return self.optimizer_class(self.parameters(), lr=self.lr, **settings)


class NormByHand(Norm):
    """The same by manual optimization."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


# -- the table

MONITOR = {"updates": 5, "every_n_syncs": 2, "metric": MeanSquaredError(), "step": regress}
EVERYTHING = {"pullback_momentum": "pullback", "buffers": "sync", "start_step": 2, "slow_dtype": "float64"}
FAST = {"pullback_momentum": "pullback", "buffers": "sync", "eval_weights": "fast", "alpha": Linear(0.4, 0.9, 2)}
RESET = {"pullback_momentum": "reset", "slow_dtype": "float64", "start_step": 2, "k": Linear(2, 4, 2)}

HEAVY_BALL = {"outer_nesterov": False}
MOMENTUM = {"outer_momentum": 0.9, "alpha": 0.7}
STATISTICS = {"buffers": "sync", "start_step": 2, "slow_dtype": "float64", "alpha": 1.1}

CASES = {
    "SGD": Case(),
    "Adam": Case(optimizer="Adam"),
    "fast weights are evaluated": Case({"eval_weights": "fast"}, optimizer="Adam"),
    "late start": Case({"start_step": 3}, optimizer="Adam"),
    "last cycle synced": Case({"unfinished_cycle": "sync"}),
    "schedules": Case({"k": Linear(2, 4, 2), "alpha": Cosine(1.0, 0.25, 2)}),
    "pullback, SGD": Case({"pullback_momentum": "pullback"}),
    "pullback, Adam": Case({"pullback_momentum": "pullback"}, optimizer="Adam"),
    "reset, SGD": Case({"pullback_momentum": "reset"}, inner_run=False),
    "reset, Adam": Case({"pullback_momentum": "reset"}, optimizer="Adam", inner_run=False),
    "adaptive, secant": Case({"alpha": AdaptiveAlpha("secant")}, optimizer="Adam"),
    "adaptive, hvp": Case({"alpha": AdaptiveAlpha("hvp")}, optimizer="Adam"),
    "adaptive, fisher": Case({"alpha": AdaptiveAlpha("fisher")}, optimizer="Adam"),
    "groups": Case(module=Grouped),
    "excluded": Case({"exclude": "net.2.*"}),
    "players, each by itself": Case(module=Players),
    "players, together": Case({"sync_optimizers": "together"}, Players, inner_run=False),
    "skips what is not finite": Case({"nonfinite": "skip"}),
    "restores what is not finite": Case({"nonfinite": "restore"}),
    "bfloat16, SGD": Case(module=Half),
    "bfloat16, Adam": Case(module=Half, optimizer="Adam"),
    "bfloat16, SGD, fast": Case({"eval_weights": "fast"}, Half),
    "bfloat16, Adam, fast": Case({"eval_weights": "fast"}, Half, "Adam"),
    "coarse and late": Case({"slow_dtype": "bfloat16", "start_step": 3}, inner_run=False),
    "converted after loading": Case(module=Single, trainer={"precision": "64-true"}),
    "on the CPU": Case({"slow_device": "cpu"}),
    "statistics": Case({"buffers": "sync"}, Norm),
    "statistics, fast": Case({"buffers": "sync", "eval_weights": "fast"}, Norm),
    "recalibrated": Case({"recalibrate_batch_norm": 2}, Norm),
    "logged and monitored": Case({"log_syncs": True, "log_distance": True, "monitor": InnerOuterMonitor(**MONITOR)}),
    "everything": Case(EVERYTHING, Norm),
    "everything, by hand": Case(EVERYTHING, NormByHand),
    "fast, of all that moves": Case(FAST, Norm),
    "fast, by hand": Case(FAST, NormByHand),
    "outer momentum, SGD": Case({"outer_momentum": 0.9, "alpha": 0.7}, inner_run=False),
    "outer momentum, Adam": Case(
        {"outer_momentum": 0.5, "alpha": 1.2, **HEAVY_BALL}, optimizer="Adam", inner_run=False
    ),
    "outer momentum, last cycle synced": Case({**MOMENTUM, "unfinished_cycle": "sync"}, inner_run=False),
    "outer momentum, schedules": Case(
        {**MOMENTUM, "k": Linear(2, 4, 2), "alpha": Linear(1.3, 0.4, 2)}, inner_run=False
    ),
    "outer momentum, groups": Case(MOMENTUM, Grouped, inner_run=False),
    "outer momentum, players": Case(MOMENTUM, Players, inner_run=False),
    "outer momentum, together": Case({**MOMENTUM, "sync_optimizers": "together"}, Players, inner_run=False),
    "outer momentum, bfloat16": Case({**MOMENTUM, "eval_weights": "fast"}, Half, inner_run=False),
    "outer momentum, on the CPU": Case({**MOMENTUM, "slow_device": "cpu", "nonfinite": "restore"}, inner_run=False),
    "outer momentum, statistics": Case({**MOMENTUM, **STATISTICS}, Norm, inner_run=False),
    "outer momentum, monitored": Case({**MOMENTUM, "monitor": InnerOuterMonitor(**MONITOR)}, inner_run=False),
    "outer momentum, by hand": Case({**MOMENTUM, **RESET, "buffers": "sync"}, NormByHand, inner_run=False),
    "anew": Case(RESET, Norm, inner_run=False),
    "anew, by hand": Case(RESET, NormByHand, inner_run=False),
}
