"""A checkpoint of a run without Lookahead, on two ranks."""

import warnings

import torch
from lightning.pytorch import Callback

from tests.helpers.runs import make_trainer
from tests.helpers.sharded import Sharded, fit, local, strategy_for


class Start(Callback):
    def __init__(self, expected):
        self.expected, self.seen = expected, False

    def on_train_start(self, trainer, pl_module):
        (slow,) = trainer.callbacks[0].slow_weights
        for weights in ("slow", "fast"):
            for value, expected in zip(slow.values(weights).values(), self.expected, strict=True):
                assert torch.equal(local(value), expected)
        self.seen = True


def start_from_a_foreign_checkpoint(kind, path):
    trainer = make_trainer(max_steps=4, strategy=strategy_for(kind), devices=2, use_distributed_sampler=False)
    trainer.fit(Sharded("SGD", kind))
    trainer.save_checkpoint(path)
    listed = [parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]]
    start = Start([local(parameter).detach().clone() for parameter in listed if parameter.requires_grad])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, _, callback = fit(kind, "SGD", start, ckpt_path=path)
    assert sum("made without LookaheadCallback" in str(warning.message) for warning in caught) == 1
    assert start.seen
    assert callback.slow_weights[0].steps == 4
