"""What broke where weights are sharded, on two ranks."""

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_lookahead import LookaheadCallback, load_weights
from tests.helpers.runs import inputs, make_trainer
from tests.helpers.sharded import local, strategy_for

STEPS = 8


class Tiny(LightningModule):
    """A small network whose batches depend on the number of the step."""

    def __init__(self, kind, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(5)
        self.kind = kind
        self.net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Linear(4, 2)).to(dtype)
        self.register_buffer("taken", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return self.net(x)

    def loss(self):
        return (self(inputs(int(self.taken)).to(self.net[0].weight.dtype)) - 1).square().mean()

    def training_step(self, batch, batch_idx):
        loss = self.loss()
        self.taken += 1
        return loss

    def configure_model(self):
        if self.kind.startswith("fsdp2") and not hasattr(self.net, "set_requires_gradient_sync"):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def trained(self):
        return self.trainer.model if self.kind.startswith("fsdp1") else self

    def configure_optimizers(self):
        return torch.optim.SGD(self.trained().parameters(), lr=0.05, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(range(4))


class Head(Tiny):
    """Only the last layer is trained: under FSDP1 one rank has no piece of it."""

    def __init__(self, kind):
        super().__init__(kind)
        self.net[:3].requires_grad_(False)

    def configure_optimizers(self):
        wanted = [p for p in self.trained().parameters() if p.requires_grad]
        return torch.optim.SGD(wanted, lr=0.05, momentum=0.9)


class Players(Tiny):
    """Two optimizers of different kinds, of which the second steps every third time."""

    kinds = (torch.optim.SGD, torch.optim.Adam)

    def __init__(self, kind):
        super().__init__(kind)
        self.automatic_optimization = False

    def configure_optimizers(self):
        first, second = self.kinds
        settings = {"momentum": 0.9} if first is torch.optim.SGD else {}
        return first(self.net[0].parameters(), lr=0.05, **settings), second(self.net[2:].parameters(), lr=0.05)

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(self.loss())
        first.step()
        if self.taken % 3 == 2:
            second.step()
        self.taken += 1


class TwoAdams(Players):
    kinds = (torch.optim.Adam, torch.optim.Adam)


class Groups(Tiny):
    def configure_optimizers(self):
        groups = [{"params": self.net[0].parameters(), "lookahead_k": 2}, {"params": self.net[2:].parameters()}]
        return torch.optim.NAdam(groups, lr=0.05)


class Normed(Tiny):
    """Saves between its forward and its backward."""

    saves = True

    def __init__(self, kind):
        super().__init__(kind)
        self.net[1] = nn.BatchNorm1d(6)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.saves:
            self.trainer.save_checkpoint(self.folder / "between.ckpt")
        return loss


CASES = {
    "head": ("fsdp1", Head, {}, {}),
    "head skip": ("fsdp1", Head, {"nonfinite": "skip"}, {}),
    "bf16": ("fsdp1", Tiny, {}, {"precision": "bf16-true"}),
    "bf16 fsdp2": ("fsdp2", Tiny, {}, {"precision": "bf16-true"}),
    "float64": ("fsdp1", Tiny, {"slow_dtype": "float64"}, {}),
    "coarse": ("fsdp1", Tiny, {"slow_dtype": "bfloat16"}, {}),
    "exclude": ("fsdp1", Tiny, {"exclude": "net.2.bias"}, {}),
    "players": ("fsdp2", Players, {"pullback_momentum": "pullback"}, {}),
    "adams": ("fsdp2", TwoAdams, {}, {}),
    "groups": ("fsdp2", Groups, {}, {"precision": "bf16-mixed"}),
    "groups pullback": ("fsdp2", Groups, {"pullback_momentum": "pullback"}, {"precision": "bf16-mixed"}),
    "full": ("fsdp2_full", Players, {"pullback_momentum": "pullback"}, {}),
}


def fit(case, *callbacks, ckpt_path=None):
    kind, module_class, options, settings = CASES[case]
    module, callback = module_class(kind), LookaheadCallback(**{"k": 3, **options})
    limits = {"max_epochs": 2} if isinstance(module, Players) else {"max_steps": STEPS}
    strategy = {"strategy": strategy_for(kind), "devices": 2, "use_distributed_sampler": False}
    trainer = make_trainer(callback, *callbacks, **strategy, **limits, **settings)
    trainer.fit(module, ckpt_path=ckpt_path)
    values = [
        {w: [local(v).detach().clone() for v in slow.values(w).values()] for w in ("slow", "fast")}
        for slow in callback.slow_weights
    ]
    return [(slow.steps, slow.syncs) for slow in callback.slow_weights], values, trainer


def check(case, folder):
    every = ModelCheckpoint(folder, "{step}-{epoch}", every_n_train_steps=1, save_top_k=-1)
    counts, values, trainer = fit(case, every)
    if case.startswith("head"):
        pieces = [None, None]
        torch.distributed.all_gather_object(
            pieces, sum(p.numel() for p in trainer.optimizers[0].param_groups[0]["params"])
        )
        assert 0 in pieces, "every rank has a piece: this shows nothing"
    paths = sorted(folder.glob("step=*"))
    assert len(paths) >= STEPS, paths
    for path in paths[1:-1:2]:
        again, resumed, _ = fit(case, ckpt_path=path)
        assert again == counts, (case, path.name, again, counts)
        for mine, its in zip(values, resumed, strict=True):
            for weights in ("slow", "fast"):
                same = [torch.equal(a, b) for a, b in zip(mine[weights], its[weights], strict=True)]
                assert all(same), (case, path.name, weights, same)
        if torch.distributed.get_rank() == 0:
            for weights in ("slow", "fast"):
                load_weights(path, weights)
    return counts


def between(folder):
    """Saving between forward and backward changes nothing, and holds the slow statistics."""
    ends = []
    for saves in (True, False):
        module, callback = Normed("fsdp2"), LookaheadCallback(k=3, buffers="sync")
        module.saves, module.folder = saves, folder
        strategy = {"strategy": strategy_for("fsdp2"), "devices": 2, "use_distributed_sampler": False}
        make_trainer(callback, max_steps=5, **strategy).fit(module)
        ends.append([local(value).clone() for value in module.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def anew(_):
    """A reset of sharded state is that of a new optimizer, or is refused."""
    schedulefree = pytest.importorskip("schedulefree")

    class Free(Tiny):
        def configure_optimizers(self):
            optimizer = schedulefree.SGDScheduleFree(self.trained().parameters(), lr=0.05, foreach=False)
            optimizer.train()
            return optimizer

    ends = {}
    for kind in ("ddp", "fsdp2"):
        callback = LookaheadCallback(k=3, pullback_momentum="reset")
        trainer = make_trainer(
            callback, max_steps=5, strategy=strategy_for(kind), devices=2, use_distributed_sampler=False
        )
        try:
            trainer.fit(Free(kind))
        except ValueError as error:
            assert "does not work with sharded parameters and SGDScheduleFree" in str(error)  # noqa: PT017
            assert kind == "fsdp2"
            return
        (slow,) = callback.slow_weights
        ends[kind] = [getattr(v, "full_tensor", lambda v=v: v)() for v in slow.values("fast").values()]
    for one, other in zip(ends["ddp"], ends["fsdp2"], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def holds(case, folder):
    """Check a case on all ranks."""
    if case in {"between", "anew"}:
        {"between": between, "anew": anew}[case](folder)
        return
    counts = check(case, folder)
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, counts)
    assert all(counts == other for other in gathered), gathered
