"""What ranks train that share the weights: a small network under each strategy.

A kind names a strategy and what its checkpoints look like. As a program: ``python -m tests.helpers.sharded
train|resume KIND OPTIMIZER PATH``.
"""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_lookahead import Linear, LookaheadCallback, load_weights
from tests.helpers.oracle import lookahead
from tests.helpers.runs import Regression, equal, inputs, leave, make_trainer

STEPS, K = 8, 3


MODES = {
    "momentum": {"outer_momentum": 0.9, "alpha": 0.7},
    "": {},
    "apart": {"share_gradients": False, "outer_momentum": 0.5},
    "reset": {"pullback_momentum": "reset"},
    "pullback": {"pullback_momentum": "pullback"},
    "schedule": {"alpha": Linear(0.3, 0.9, 2), "start_step": 1},
    "groups": {"exclude": "net.0.bias", "nonfinite": "restore", "slow_dtype": "float64"},
}


BACKEND = "nccl" if torch.cuda.is_available() else "gloo"


class AnyFSDPStrategy(FSDPStrategy):
    """Lightning asks for an accelerator here; FSDP1 itself runs on the CPU as well."""

    def _setup_model(self, model):
        if torch.cuda.is_available():
            return super()._setup_model(model)
        return FullyShardedDataParallel(
            module=model,
            cpu_offload=self.cpu_offload,
            sharding_strategy=self.sharding_strategy,
            device_id=torch.device("cpu"),
            **self.kwargs,
        )


class Net(nn.Sequential):
    """Shards of uneven size, an empty one (the last bias has one element), tied and frozen weights."""

    def __init__(self, frozen=True):
        super().__init__(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, 1))
        self[4].weight = self[2].weight
        if frozen:
            self.append(nn.Linear(1, 1).requires_grad_(False))


class Sharded(Regression):
    def __init__(self, optimizer, kind):
        settings = {"momentum": 0.0} if kind == "fsdp2_plain" else {}  # with no momentum SGD keeps no state
        super().__init__(optimizer, lr=0.05, batches=4, **settings)
        self.kind = kind
        torch.manual_seed(5)
        if kind.startswith("tp"):  # tensor parallelism wants sizes that can be divided, and weights that are not tied
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
        else:
            self.net = Net(frozen=kind != "fsdp1_flat")
        self.net.to(torch.float32 if "fsdp1" in kind or "bf16" in kind else torch.float64)

    def forward(self, x):
        return self.net(x)

    def loss(self, step):
        step += 100 * self.global_rank * (self.kind == "apart")  # the others have the same data on all ranks
        return (self(inputs(step).to(self.net[0].weight)) - 1).square().mean()

    def configure_model(self):
        policy = (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16) if self.kind == "fsdp2_bf16" else MixedPrecisionPolicy()
        )
        if self.kind.startswith("fsdp2") and not hasattr(self.net, "set_requires_gradient_sync"):
            mesh = self.device_mesh if self.kind == "fsdp2_hsdp" else self.device_mesh["data_parallel"]
            fully_shard(self.net[0], mesh=mesh, mp_policy=policy)
            fully_shard(self.net, mesh=mesh, mp_policy=policy)
        if self.kind.startswith("tp"):
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(self.net, self.device_mesh["tensor_parallel"], plan)

    def configure_optimizers(self):
        parameters = self.trainer.model.parameters() if "fsdp1" in self.kind else self.parameters()
        return self.optimizer_class(parameters, **self.settings)


def strategy_for(kind):
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if kind in {"ddp", "apart"}:
        return DDPStrategy()
    if kind.startswith("fsdp1"):
        return AnyFSDPStrategy(
            use_orig_params=kind != "fsdp1_flat",
            cpu_offload=kind == "fsdp1_offload",
            sharding_strategy="SHARD_GRAD_OP" if kind == "fsdp1_grad_op" else "FULL_SHARD",
            state_dict_type="full" if kind == "fsdp1_full" else "sharded",
            process_group_backend=BACKEND,
        )
    inner = {"tp": world, "tp_full": world, "fsdp2_hsdp": 2}.get(kind, 1)  # hybrid: replicas of two shards each
    return ModelParallelStrategy(
        world // inner, inner, save_distributed_checkpoint="full" not in kind, process_group_backend=BACKEND
    )


def local(tensor):
    """The piece that this rank has."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fit(kind, optimizer, *callbacks, steps=STEPS, ckpt_path=None, mode="", **settings):
    mode = "apart" if kind == "apart" else mode
    module, callback = (
        Sharded(optimizer, kind),
        LookaheadCallback(**{"k": K, "alpha": 0.5, **(MODES[mode] if isinstance(mode, str) else mode)}),
    )
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    settings = {"limit_val_batches": 1, "val_check_interval": 2, "max_steps": steps, **settings}
    parallel = {"strategy": strategy_for(kind), "devices": world, "num_nodes": nodes} if kind != "single" else {}
    parallel["accelerator"] = "auto"  # a GPU, where one is let in
    trainer = make_trainer(callback, *callbacks, **parallel, use_distributed_sampler=False, **settings)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module, callback


def train(kind, optimizer, folder, **options):
    """Save a checkpoint after every step, and the end."""
    every = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)
    _fit_to_the_end(kind, optimizer, every, **options).save_checkpoint(folder / "end.ckpt")


def resume(kind, optimizer, *paths, **options):
    """Go on from each checkpoint, and save the end beside it."""
    for path in paths:
        trainer = _fit_to_the_end(kind, optimizer, ckpt_path=path, **options)
        trainer.save_checkpoint(path.with_name(f"{path.stem}-resumed.ckpt"))


def _fit_to_the_end(*arguments, **options):
    trainer, _, callback = fit(*arguments, **options)
    counted = callback.slow_weights[0].steps, callback.slow_weights[0].syncs
    assert counted == (STEPS, (STEPS - callback.settings.start_step) // K), f"counted {counted}"
    assert trainer.global_step == STEPS
    return trainer


def reference(kind, optimizer, accumulate=1):
    """theta and phi of one process, by name."""
    module = Sharded(optimizer, kind)
    inner = module.optimizer_class(module.parameters(), **module.settings)

    def inner_step(index):
        inner.zero_grad()
        for _ in range(accumulate):
            (module.loss(index) / accumulate).backward()
        inner.step()

    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    phi = dict(zip(trained, lookahead(trained, inner_step, k=K, alpha=0.5, steps=STEPS), strict=True))
    named = list(module.named_parameters(remove_duplicate=False))
    return {
        "fast": {name: parameter.detach() for name, parameter in named},
        "slow": {name: phi.get(parameter, parameter).detach() for name, parameter in named},
    }


def distance(left, right):
    return max((left[name] - right[name]).abs().max().item() for name in right)


def loaded(path):
    return {weights: load_weights(path, weights) for weights in ("slow", "fast")}


def same(left, right):
    return all(equal(left[weights].values(), right[weights].values()) for weights in ("slow", "fast"))


def close(left, right, tolerance):
    return max(distance(left[weights], right[weights]) for weights in ("slow", "fast")) < tolerance


def main():
    """Where the processes are to be started anew, or killed."""
    action, kind, optimizer, path = sys.argv[1:]
    {"train": train, "resume": resume}[action](kind, optimizer, Path(path))
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
