"""Runs of the cases in `cases.py`, and what has to be equal in two of them."""

import copy
from pathlib import Path

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lookahead import LookaheadCallback
from tests.cases import CASES
from tests.helpers.naive import NaiveLookahead
from tests.helpers.random_networks import counts_in, counts_of
from tests.helpers.runs import make_trainer

EXTRA = {"monitor", "nonfinite", "recalibrate_batch_norm", "log_syncs", "log_distance", "check_ranks"}
"""Options that leave the run of these modules as it is; the naive callback has none of them."""


def options_of(name):
    """The callback's, made anew."""
    return {"k": 3, **copy.deepcopy(CASES[name].options)}


def fit(name, *callbacks, ckpt_path=None):
    """Train a new module of the case for two epochs; return the Trainer and the module."""
    torch.manual_seed(0)
    module = CASES[name].make()
    settings = {"max_epochs": 2, "limit_train_batches": 5, "limit_val_batches": 1, "val_check_interval": 3}
    trainer = make_trainer(*callbacks, **settings, **CASES[name].trainer)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer, module


def lookahead(name, *others, ckpt_path=None, **changed):
    """Such a fit with the callback; return what it has at its end."""
    callback = LookaheadCallback(**{**options_of(name), **changed})
    _, module = fit(name, callback, *others, ckpt_path=ckpt_path)
    return held(callback, module)


def held(callback, module):
    """All that the module holds with either set, the slow weights as they are kept, and the counts."""
    sets = {weights: shown(callback, module, weights) for weights in ("fast", "slow")}
    kept = [list(slow.values("slow").values()) for slow in callback.slow_weights]
    counts = [counts_in(slow.state_dict()) for slow in callback.slow_weights]
    return {**sets, "kept": copies(kept), "counts": counts}


def shown(callback, module, weights):
    """The module's state with one set in it."""
    with callback.use_weights(weights):
        return copies(dict(module.state_dict()))


def copies(value):
    """Of nested dicts, lists and tensors: what does not change when the run goes on."""
    return copy.deepcopy(value)


class At(Callback):
    """Calls a function with the Trainer and the module after a batch, or after every one."""

    def __init__(self, function, batch=None):
        self.function, self.batch, self.batches = function, batch, 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.batches += 1
        if self.batch in {None, self.batches}:
            self.function(trainer, pl_module)


def saved(folder):
    """The checkpoints of `every_step`, from the first to the last."""
    return sorted(Path(folder).glob("step=*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))


def every_step(folder):
    """Saves a checkpoint after every batch."""
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_train_epoch_end=False)


def naive(name, alphas):
    """The same run of the naive callback, with the step sizes of the syncs where they are not known before."""
    options = {option: value for option, value in options_of(name).items() if option not in EXTRA}
    if alphas is not None:
        options["alpha"] = lambda sync: alphas[sync]
    options["exclude"] = [options["exclude"]] if "exclude" in options else []
    callback = NaiveLookahead(**options)
    _, module = fit(name, callback)
    names = dict(module.named_parameters())
    expected = callback.both(module)
    phi = expected.pop("phi")
    kept = [
        [phi[n] for n, p in names.items() if p in set(outer.own().values()) and n in phi] for outer in callback.outers
    ]
    return {**expected, "kept": kept, "counts": [counts_of(outer) for outer in callback.outers]}
