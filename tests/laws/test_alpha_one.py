"""With k=1 and alpha=1 everything is what it is without the callback."""

import copy

import pytest
import torch
from lightning.pytorch import Callback

from lightning_lookahead import LookaheadCallback
from tests.cases import CASES, Grouped
from tests.helpers.modes import every_step, fit, options_of, saved
from tests.helpers.random_networks import same

HOOKS = ["on_train_start", "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end", "on_train_end"]
HOOKS += ["on_validation_start", "on_validation_batch_end", "on_validation_epoch_end", "on_validation_end"]


class Sees(Callback):
    """What another callback sees of the module in each hook."""

    def __init__(self):
        self.seen = []
        for hook in HOOKS:
            setattr(self, hook, self.look)

    def look(self, trainer, pl_module, *_):
        self.seen.append((trainer.global_step, pl_module.training, copy.deepcopy(dict(pl_module.state_dict()))))


def end(name, *own):
    sees = Sees()
    trainer, module = fit(name, *own, sees, every_step("ours" if own else "plain"))
    return {
        "module": copy.deepcopy(dict(module.state_dict())),
        "seen": sees.seen,
        "optimizers": copy.deepcopy([optimizer.state_dict() for optimizer in trainer.optimizers]),
        "metrics": {key: value for key, value in trainer.callback_metrics.items() if "lookahead/" not in key},
        "random numbers": torch.get_rng_state(),
        "step": trainer.global_step,
    }


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.inner_run])
def test_the_run_is_the_one_without_the_callback(name, monkeypatch):
    monkeypatch.setattr(Grouped, "own", {})
    own = LookaheadCallback(**{**options_of(name), "k": 1, "alpha": 1.0})
    ours, plain = end(name, own), end(name)
    if "recalibrate_batch_norm" in CASES[name].options:  # which is for validation alone
        for found in (ours, plain):
            found["metrics"], found["seen"] = {}, [look for look in found["seen"] if look[1]]
    same(ours, plain, name)
    for paths in list(zip(saved("ours"), saved("plain"), strict=True))[2:5]:
        ours, plain = (torch.load(path, weights_only=True) for path in paths)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step"):
            same(ours[part], plain[part], f"{name}, checkpoint, {part}")
