"""Checkpoints of every kind, as small as they can be, that later versions have to read bit for bit.

``python -m tests.golden.make`` writes new ones in place of those that are here: when the format has changed, and the
reading of the old ones is tested elsewhere. With names of kinds it writes these alone. What two ranks write, it starts
two processes for.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError

from lightning_lookahead import InnerOuterMonitor, LookaheadCallback
from tests.helpers.places import environment
from tests.helpers.runs import leave, make_trainer

HERE = Path(__file__).parent
STEPS = 4  # one step into the second cycle
KINDS = {
    "slow": {},
    "fast": {"eval_weights": "fast"},
    "pullback": {"pullback_momentum": "pullback"},
    "statistics": {"buffers": "sync"},
    "groups": {},
    "bf16": {},
    "players": {},
    "momentum": {"outer_momentum": 0.9},
    "monitor": {},
    "shards": {"pullback_momentum": "pullback"},
    "apart": {"share_gradients": False, "outer_momentum": 0.9},
}
OF_TWO = ("shards", "apart")
"""Kinds that two ranks write."""


def data(step):
    return torch.randn(4, 2, generator=torch.Generator().manual_seed(step))


def regress(module, batch):
    prediction = module(batch)
    return prediction, torch.ones_like(prediction)


class Tiny(LightningModule):
    """A network of ten weights."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(3)
        self.kind = kind
        self.automatic_optimization = kind != "players"
        self.first, self.last = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
        self.norm = nn.BatchNorm1d(2) if kind == "statistics" else nn.Identity()
        self.to(torch.bfloat16 if kind == "bf16" else torch.float32)

    def forward(self, x):
        return self.last(self.norm(self.first(x.to(self.first.weight.dtype))).tanh())

    def configure_model(self):
        if self.kind == "shards" and not hasattr(self, "set_requires_gradient_sync"):
            fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        rank = self.global_rank if self.kind == "apart" else 0
        loss = (self(data(self.trainer.global_step + 100 * rank)) - 1).square().mean()
        if self.automatic_optimization:
            return loss
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return None

    def configure_optimizers(self):
        first, last = list(self.first.parameters()), list(self.last.parameters())
        if self.kind == "players":
            return [torch.optim.SGD(first, lr=0.1, momentum=0.9), torch.optim.Adam(last, lr=0.1)]
        groups = [{"params": first}, {"params": [*last, *self.norm.parameters()]}]
        if self.kind == "groups":
            groups[1].update(lookahead_k=2, lookahead_alpha=0.8)
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(range(8))


def fit(kind, steps=STEPS, **settings):
    """Train, or go on with training; return the Trainer, the module and the callback."""
    monitor = InnerOuterMonitor(updates=4, data=[data(9)], metric=MeanSquaredError(), step=regress)
    callback = LookaheadCallback(k=3, monitor=monitor if kind == "monitor" else None, **KINDS[kind])
    module = Tiny(kind)
    trainer = make_trainer(callback, max_steps=2 * steps if kind == "players" else steps, **strategy(kind))
    trainer.fit(module, **settings)
    return trainer, module, callback


def strategy(kind):
    from lightning.pytorch.strategies import ModelParallelStrategy  # noqa: PLC0415 (one kind needs it)

    if kind not in OF_TWO or "WORLD_SIZE" not in os.environ:
        return {}
    sharding = ModelParallelStrategy(2, 1, save_distributed_checkpoint=True, process_group_backend="gloo")
    return {"strategy": sharding if kind == "shards" else "ddp", "devices": 2, "use_distributed_sampler": False}


def both(module, callback):
    """All that the module holds with either set."""
    found = {}
    for weights in ("slow", "fast"):
        with callback.use_weights(weights):
            found[weights] = {
                name: (value.full_tensor() if hasattr(value, "full_tensor") else value.clone())
                for name, value in module.state_dict().items()
            }
    return found


def resume(kind):
    """What each rank has when it goes on from what two have written, which has nothing left to train."""
    _, module, callback = fit(kind, ckpt_path=HERE / f"{kind}.ckpt")
    (slow,) = callback.slow_weights
    return both(module, callback), (slow.steps, slow.syncs)


def write(kind):
    path = HERE / f"{kind}.ckpt"
    trainer, module, callback = fit(kind)
    trainer.save_checkpoint(path)
    found = both(module, callback)
    if trainer.is_global_zero:
        torch.save(found, HERE / f"{kind}.expected.pt")
    elif kind == "apart":
        torch.save(found, HERE / "apart-1.expected.pt")


def main():
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        write(sys.argv[1])
        leave()
    kinds = sys.argv[1:] or KINDS
    for old in (HERE / f"{kind}.ckpt" for kind in kinds):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for kind in kinds:
        if kind in OF_TWO:
            subprocess.run([*launcher, "-m", "tests.golden.make", kind], check=True, env=environment())
        else:
            write(kind)


if __name__ == "__main__":
    main()
