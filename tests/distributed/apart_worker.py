"""Ranks that train apart: what each of them does in the tests of `test_apart.py`."""

import copy
import gc
import os
import pickle
import time
import warnings
import weakref
from itertools import chain
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed import distributed_c10d
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.profiler import ProfilerActivity, profile, record_function
from torchmetrics import MeanSquaredError

from lightning_lookahead import InnerOuterMonitor, LookaheadCallback, compare_weights
from lightning_lookahead.outer_loop import workers
from tests.helpers import apart
from tests.helpers.runs import both, make_trainer
from tests.helpers.sharded import AnyFSDPStrategy


def state(trainer, callback, module):
    """All that this rank has: both sets, the outer momentum, buffers, states of optimizers, schedulers and scaler."""
    theta, phi = both(callback, module)
    with callback.use_weights("fast"):
        buffers = copy.deepcopy(dict(module.named_buffers()))
    with callback.use_weights("slow"):
        slow_buffers = copy.deepcopy(dict(module.named_buffers()))
    return {
        "fast buffers": buffers,
        "slow buffers": slow_buffers,
        "theta": theta,
        "phi": phi,
        "b": [list(slow.pairs.outer_momentum.b.values()) for slow in callback.slow_weights],
        "buffers": callback._fit.apart.buffers.own(),
        "optimizers": [optimizer.state_dict() for optimizer in trainer.optimizers],
        "schedulers": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "scaler": trainer.precision_plugin.state_dict(),
        "counts": [(slow.steps, slow.syncs, slow.cycles.steps_since_sync) for slow in callback.slow_weights],
        "validated": module.validated,
    }


def train(kind="Apart", optimizer="Adam", *callbacks, trainer=(), ckpt_path=None, **options):
    """This rank's state at the end."""
    module = getattr(apart, kind)(optimizer)
    run, callback = apart.fit(*callbacks, module=module, trainer=trainer, ckpt_path=ckpt_path, **options)
    return copy.deepcopy(state(run, callback, module))


# -- what leaves a rank


class Marks(Callback):
    """Marks the ends of batches in a profile."""

    def on_train_batch_end(self, *_):
        with record_function("batch ends"):
            pass


def sent(kind, **options):
    """For each batch, and the time after the last, the collectives and how much each sends, sorted."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        train(kind, "Adam", Marks(), trainer={"limit_val_batches": 0}, **options)
    events = sorted(
        (e for e in seen.events() if e.name.startswith(("gloo:", "batch ends"))), key=lambda e: e.time_range.start
    )
    found = [[]]
    for event in events:
        if event.name == "batch ends":
            found.append([])
        else:
            found[-1].append((event.name.removeprefix("gloo:"), [*chain(*event.input_shapes)]))
    return [sorted(events) for events in found]


class Buffers(Callback):
    """This rank's buffers before and after each sync."""

    def __init__(self):
        self.found, self.before = [], {}

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.before = copy.deepcopy(dict(pl_module.named_buffers()))

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step % 3 == 0:
            self.found.append((self.before, copy.deepcopy(dict(pl_module.named_buffers()))))


def buffers_at_syncs():
    seen = Buffers()
    train("Normed", "Adam", seen)
    return seen.found


# -- stop and resume


def every_step(folder):
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)


def train_and_save(folder, kind, **options):
    return train(kind, "Adam", every_step(folder), **options)


def train_and_save_in_validation(folder, kind, **options):
    return train(
        kind, "Adam", ModelCheckpoint(folder, "{step}", save_top_k=-1, save_on_train_epoch_end=False), **options
    )


def resume(folder, kind, steps, **options):
    """The states at the end of runs that go on from checkpoints after these steps."""
    return {step: train(kind, ckpt_path=f"{folder}/step={step}.ckpt", **options) for step in steps}


def resume_elsewhere(path, **options):
    """What this rank starts from, when it goes on from a checkpoint of another number of ranks."""
    found = {}

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if not found:
                found.update(copy.deepcopy(state(trainer, lookahead_of(trainer), pl_module)))

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        end = train("Apart", "Adam", Look(), ckpt_path=path, **options)
    return found, end, [str(warning.message) for warning in said if "Lookahead" in str(warning.message)]


def lookahead_of(trainer):
    return next(callback for callback in trainer.callbacks if isinstance(callback, LookaheadCallback))


# -- what goes wrong


def error_of(kind, *callbacks, **options):
    """What this rank raises."""
    with pytest.raises((RuntimeError, ValueError)) as raised:
        train(kind, "Adam", *callbacks, **options)
    return f"{type(raised.value).__name__}: {raised.value}"


class SyncNow(Callback):
    """Syncs by hand after step 4."""

    def __init__(self, ranks):
        self.ranks = ranks

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 4 and trainer.global_rank in self.ranks:
            lookahead_of(trainer).sync_now()


def sync_now_on(ranks):
    workers.PATIENCE = 2
    train("Apart", "Adam", SyncNow(ranks))


class FailAlone(Callback):
    """The first rank fails after step 4; the second waits for what it saves, and for Lightning's barrier after it."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 4:
            if trainer.global_rank:
                while not Path("failed.ckpt").exists():
                    time.sleep(0.01)
                trainer.strategy.barrier()
            message = "out of luck"
            raise OSError(message)


def fail_alone():
    workers.PATIENCE = 1
    own = [] if int(os.environ["RANK"]) else [OnExceptionCheckpoint(".", "failed")]
    with pytest.raises(OSError, match="out of luck"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train("Apart", "Adam", FailAlone(), *own)
    assert bool(own) == any("lacks what they have of their own" in str(one.message) for one in said)


def sync_now():
    return train("Apart", "Adam", SyncNow([0, 1]), k=100)


def with_ddp(**settings):
    return train("Apart", "Adam", trainer={"strategy": DDPStrategy(**settings)})


def pointers():
    """Whether the parameters are the tensors that they were, after every batch."""
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append([parameter.data_ptr() for parameter in pl_module.parameters()])

    train("Apart", "Adam", Look())
    return all(own == seen[0] for own in seen) and len(seen) == 10


def strategy_of(name):
    """A strategy, or settings of DDP, that do not work."""
    if name == "fsdp":
        return AnyFSDPStrategy(process_group_backend="gloo")
    if name == "fsdp2":
        return ModelParallelStrategy(process_group_backend="gloo")
    if name == "norms":
        return Norms()
    own = {
        "unused": {"find_unused_parameters": True},
        "hook": {"ddp_comm_hook": noop_hook},
        "post-local": {"ddp_comm_state": PostLocalSGDState(None, None, 2), "model_averaging_period": 2},
    }
    return DDPStrategy(**own[name])


class Norms(DDPStrategy):
    """Whose BatchNorm exchanges statistics in each forward. On a CPU DDP itself would refuse them."""

    def _setup_model(self, model):
        wrapped = super()._setup_model(model)
        model.net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model.net)
        return wrapped


class Zero(apart.Apart):
    def configure_optimizers(self):
        return ZeroRedundancyOptimizer(self.net.parameters(), optimizer_class=torch.optim.Adam, lr=0.1)


def refused(kind, strategy):
    own = [EMAWeightAveraging()] if strategy == "average" else []
    strategy = "" if own else strategy
    trainer = {"strategy": strategy_of(strategy)} if strategy else {}
    module = Zero() if kind == "zero" else getattr(apart, kind)()
    with pytest.raises(ValueError, match="share_gradients=False") as raised:
        apart.fit(*own, module=module, trainer=trainer)
    return str(raised.value)


# -- what looks at both sets


def compare():
    """What the comparison finds, and the losses of this rank's own weights on its own data."""
    module = apart.Measured()
    trainer, callback = apart.fit(module=module)
    before = copy.deepcopy(both(callback, module))
    found = compare_weights(trainer, module)
    assert not apart.differences(before, both(callback, module))
    own = {}
    for weights in ("slow", "fast"):
        with callback.use_weights(weights), torch.no_grad():
            own[weights] = module.loss(1000).item()
    return found.to_dict(), own


class Measuring(Callback):
    """The error of this rank's own fast weights on its own data after steps that no sync follows."""

    def __init__(self):
        self.found = {}

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step % 3:
            with torch.no_grad():
                prediction, target = apart.measure(pl_module, None)
            self.found[trainer.global_step] = (prediction - target).square().mean().item()


def monitored():
    monitor, own = InnerOuterMonitor(updates=9, metric=MeanSquaredError(), step=apart.measure), Measuring()
    end = train("Apart", "Adam", own, monitor=monitor)
    return end, [tuple(record) for record in monitor.history], own.found


# -- fits one after the other


def twice():
    """Fit three times with one callback, pickled on the way; what is left of DDP's wrappers and process groups."""
    callback, wrappers, groups = LookaheadCallback(k=3, share_gradients=False), [], []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                wrappers.append(weakref.ref(trainer.strategy.model))
                groups.append(len(distributed_c10d._world.pg_map))
                pickle.dumps(callback)
                copy.deepcopy(callback)

    ends = []
    for _ in range(3):
        module = apart.Normed()
        settings = {"max_steps": 7, "limit_val_batches": 1, "strategy": "ddp", "devices": 2}
        trainer = make_trainer(callback, Look(), **settings)
        trainer.fit(module)
        trainer.validate(module, verbose=False)
        ends.append(copy.deepcopy([both(callback, module), dict(module.named_buffers())]))
    del trainer, module
    gc.collect()
    return ends, [wrapper() is None for wrapper in wrappers[:-1]], groups


class Drift(Callback):
    """Changes what is to be the same on all ranks, on the second."""

    def __init__(self, what):
        self.what = what

    def on_train_batch_end(self, trainer, *_):
        if (trainer.global_step, trainer.global_rank) == (4, 1):
            ((slow,),) = (lookahead_of(trainer).slow_weights,)
            kept = slow.values("slow") if self.what == "phi" else slow.pairs.outer_momentum.b
            next(iter(kept.values())).view(-1)[0] += 1e-9


def drifted(what):
    return error_of("Apart", Drift(what), check_ranks=True, outer_momentum=0.5)
