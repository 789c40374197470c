"""Beside Lightning's other callbacks."""

import pytest
import torch
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from lightning_lookahead import LookaheadCallback
from tests.helpers.runs import Regression, equal, inputs, make_trainer

STOCK = {
    "BackboneFinetuning": None,  # below
    "BaseFinetuning": None,
    "BasePredictionWriter": None,  # abstract, and not for fit
    "BatchSizeFinder": None,  # above
    "Callback": {},
    "Checkpoint": {},
    "DeviceStatsMonitor": {"cpu_stats": False},  # those need psutil
    "EMAWeightAveraging": None,
    "EarlyStopping": {"monitor": "val_loss"},
    "GradientAccumulationScheduler": {"scheduling": {1: 2}},
    "LambdaCallback": {},
    "LearningRateFinder": None,
    "LearningRateMonitor": {},
    "ModelCheckpoint": {"dirpath": "."},
    "ModelPruning": None,
    "ModelSummary": {},
    "OnExceptionCheckpoint": {"dirpath": "."},
    "ProgressBar": None,  # abstract
    "RichModelSummary": {},
    "RichProgressBar": {},
    "SpikeDetection": {"warmup": 100},
    "StochasticWeightAveraging": None,
    "TQDMProgressBar": {},
    "ThroughputMonitor": {"batch_size_fn": len},
    "Timer": {"duration": "00:01:00:00"},
    "WeightAveraging": None,
}


def test_every_stock_callback_is_thought_of():
    assert set(callbacks.__all__) <= set(STOCK), "a callback that the table above does not know"


@pytest.mark.parametrize("name", [name for name, settings in STOCK.items() if settings is not None])
@pytest.mark.parametrize("first", [True, False])
def test_stock_callbacks_work_as_without_us(name, first):
    def run(*ours):
        stock = getattr(callbacks, name)(**STOCK[name])
        module = Regression()
        make_trainer(
            *((*ours, stock) if first else (stock, *ours)),
            max_epochs=2,
            limit_val_batches=1,
            log_every_n_steps=1,
            logger=CSVLogger("logs"),
            enable_progress_bar="ProgressBar" in name,
            enable_model_summary="Summary" in name,
            enable_checkpointing="Checkpoint" in name,
        ).fit(module)
        return module.weights()

    assert equal(run(LookaheadCallback(k=3, alpha=1.0, eval_weights="fast")), run())


class Featured(Regression):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).to(torch.float64)

    def loss(self, step):
        return (self.net(self.backbone(inputs(step))) - 1).square().mean()


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


@pytest.mark.parametrize("stock", [Unfreeze, lambda: BackboneFinetuning(1, lambda _: 1.0)], ids=["base", "backbone"])
@pytest.mark.parametrize("first", [True, False])
def test_finetuning_adds_its_group_within_a_cycle_and_resumes(stock, first):
    def run(ckpt_path=None):
        callback, module = LookaheadCallback(k=4), Featured()
        every = ModelCheckpoint(".", "{step}", every_n_train_steps=4, save_top_k=-1)
        own = (callback, stock()) if first else (stock(), callback)
        make_trainer(*own, every, max_epochs=3).fit(module, ckpt_path=ckpt_path)
        (slow,) = callback.slow_weights
        return [tensor.clone() for weights in ("fast", "slow") for tensor in slow.values(weights).values()]

    full = run()
    assert len(full) == 2 * 8
    assert not equal(full[:8], full[8:])
    # From later on, when the group has been added, Lightning's own callback does not resume to the bit.
    assert equal(run(ckpt_path="step=4.ckpt"), full)


def test_a_group_that_finetuning_added_is_tracked_again_after_a_resume():
    path = "step=8.ckpt"
    every = ModelCheckpoint(".", "{step}", every_n_train_steps=8, save_top_k=-1)
    make_trainer(LookaheadCallback(k=5), Unfreeze(), every, max_epochs=2).fit(Featured())
    saved = torch.load(path, weights_only=True)
    seen = []

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            with callback.use_weights("slow"):
                seen.extend(parameter.detach().clone() for parameter in pl_module.parameters())

    callback = LookaheadCallback(k=5)
    make_trainer(callback, Unfreeze(), Start(), max_epochs=3).fit(Featured(), ckpt_path=path)
    assert equal(seen, [saved["state_dict"][name] for name, _ in Featured().named_parameters()])


def sparsity(module):
    return [
        float((parameter == 0).double().mean()) for name, parameter in module.named_parameters() if "weight" in name
    ]


@pytest.mark.parametrize("first", [True, False])
def test_pruning_stays_in_the_weights_that_fit_returns(first):
    pruning = ModelPruning("l1_unstructured", amount=0.5, use_lottery_ticket_hypothesis=False)
    callback, module = LookaheadCallback(k=4), Regression()
    make_trainer(*((callback, pruning) if first else (pruning, callback)), max_epochs=3).fit(module)
    assert [name for name, _ in module.named_parameters()] == [name for name, _ in Regression().named_parameters()]
    assert min(sparsity(module)) >= 0.5


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_the_average_of_stochastic_weight_averaging_is_what_fit_returns(first, norm):
    averages = []

    class Averaging(StochasticWeightAveraging):
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            averages.extend(parameter.detach().clone() for parameter in self._average_model.parameters())

    callback, module = LookaheadCallback(k=5), (Featured() if norm else Regression())
    swa = Averaging(swa_lrs=0.05, swa_epoch_start=1)
    make_trainer(*((callback, swa) if first else (swa, callback)), max_epochs=3).fit(module)
    if norm:  # Lightning then makes one step more, with its last gradients, after it has put the average in place
        with callback.use_weights("fast"):
            averages = [parameter.detach().clone() for parameter in module.parameters()]
        with callback.use_weights("slow"):
            assert not equal(module.parameters(), averages)
    assert equal(module.parameters(), averages)


@pytest.mark.parametrize("first", [True, False])
def test_the_average_of_weight_averaging_is_what_fit_returns_and_both_resume(first):
    def run(ckpt_path=None, epochs=3):
        averaging = callbacks.EMAWeightAveraging()
        callback, module = LookaheadCallback(k=4), Regression()
        every = ModelCheckpoint(".", "{step}", every_n_train_steps=1, save_top_k=-1)
        own = (callback, averaging) if first else (averaging, callback)
        make_trainer(*own, every, max_epochs=epochs, limit_val_batches=1).fit(module, ckpt_path=ckpt_path)
        assert equal(module.parameters(), averaging._average_model.module.parameters())
        return module.weights()

    full = run()
    assert equal(run(ckpt_path="step=7.ckpt"), full)
