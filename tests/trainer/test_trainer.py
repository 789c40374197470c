"""The callback beside everything else that a Trainer may do, and what it refuses."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

from lightning_lookahead import LookaheadCallback, SlowWeights
from tests.helpers.runs import Regression, both, equal, inputs, make_trainer, reference

# -- fits that are not quite fits


class Tunable(Regression):
    """Has a learning rate and a batch size to find."""

    def __init__(self, lr=0.05):
        super().__init__(batches=50)
        self.lr, self.batch_size = lr, 1

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(range(self.batches), batch_size=self.batch_size)


def test_lr_find_before_a_fit_leaves_no_trace():
    callback, module = LookaheadCallback(k=3), Tunable()
    start = module.weights()
    trainer = make_trainer(callback, max_steps=8)
    finder = Tuner(trainer).lr_find(module, num_training=10, update_attr=False)
    assert len(finder.results["lr"]) > 5
    assert equal(module.weights(), start)
    trainer.fit(module)
    assert equal(module.weights(), reference(8)[1])


def test_scale_batch_size_before_a_fit_leaves_no_trace():
    callback, module = LookaheadCallback(k=3), Tunable()
    start = module.weights()
    trainer = make_trainer(callback, max_steps=8)
    assert Tuner(trainer).scale_batch_size(module, max_trials=2, steps_per_trial=4) >= 2
    assert equal(module.weights(), start)
    trainer.fit(module)
    assert equal(module.weights(), reference(8)[1])


@pytest.mark.parametrize("finder_class", [LearningRateFinder, BatchSizeFinder])
def test_a_finder_at_the_start_of_the_fit_leaves_no_trace(finder_class):
    settings = {"update_attr": False, "num_training_steps": 10} if finder_class is LearningRateFinder else {}
    callback, module = LookaheadCallback(k=3), Tunable()
    make_trainer(finder_class(**settings), callback, max_steps=8).fit(module)
    assert equal(module.weights(), reference(8)[1])


def test_a_finder_within_a_cycle_leaves_no_trace():
    class Midway(LearningRateFinder):
        def on_fit_start(self, trainer, pl_module):
            pass

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                self.lr_find(trainer, pl_module)

    with_finder, without = Tunable(), Tunable()
    callback = LookaheadCallback(k=3)
    settings = {"max_epochs": 2, "limit_train_batches": 4}
    make_trainer(Midway(update_attr=False, num_training_steps=10), callback, **settings).fit(with_finder)
    plain = LookaheadCallback(k=3)
    make_trainer(plain, **settings).fit(without)
    assert equal(both(callback, with_finder)[0], both(plain, without)[0])
    assert equal(both(callback, with_finder)[1], both(plain, without)[1])
    assert callback.slow_weights[0].steps == plain.slow_weights[0].steps


def test_fast_dev_run():
    module = Regression()
    make_trainer(LookaheadCallback(k=1), fast_dev_run=3).fit(module)
    assert equal(module.weights(), reference(3, k=1)[1])


def test_no_training_batch_at_all():
    callback, module = LookaheadCallback(k=1), Regression()
    start = module.weights()
    make_trainer(callback, max_epochs=1, limit_train_batches=0).fit(module)
    assert equal(module.weights(), start)
    assert equal(both(callback, module)[0], start)


def test_sanity_validation_leaves_the_count_alone():
    callback, module = LookaheadCallback(k=3), Regression()
    make_trainer(callback, max_steps=4, num_sanity_val_steps=2, limit_val_batches=2).fit(module)
    assert equal(module.weights(), reference(4)[1])
    assert callback.slow_weights[0].steps == 4


def test_diagnostics_change_nothing():
    runs = []
    for settings in ({"log_syncs": False}, {"log_distance": True}):
        module = Regression()
        trainer = make_trainer(
            LookaheadCallback(k=3, **settings),
            max_epochs=2,
            limit_val_batches=1,
            log_every_n_steps=1,
            logger=[CSVLogger("csv"), TensorBoardLogger("board")],
        )
        trainer.fit(module)
        runs.append((module.weights(), trainer.callback_metrics["val_loss"]))
    assert equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])


def test_tuners_stay_ahead_and_everything_else_comes_behind():
    other, finder, callback = (
        Callback(),
        LearningRateFinder(update_attr=False, num_training_steps=5),
        LookaheadCallback(),
    )
    trainer = make_trainer(other, callback, finder, max_steps=1)
    trainer.fit(Tunable())
    assert [c for c in trainer.callbacks if c in {other, finder, callback}] == [finder, callback, other]


# -- beside Lightning's other callbacks


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


def test_a_command_line_can_add_and_set_it(monkeypatch):
    options = ["accelerator=cpu", "logger=false", "callbacks+=lightning_lookahead.LookaheadCallback", "callbacks.k=7"]
    options.append("callbacks.eval_weights=fast")
    monkeypatch.setattr("sys.argv", ["train.py", *(f"--trainer.{option}" for option in options)])
    cli = LightningCLI(Regression, run=False, save_config_callback=None)
    (callback,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, LookaheadCallback))
    assert (callback.k, callback.alpha, callback.eval_weights) == (7, 0.5, "fast")


# -- what is refused, before training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, r"k=0 .* integer of at least 1"),
        ({"alpha": 10**400}, r"alpha=1000.* \(0, 1\]"),
        ({"eval_weights": ["slow"]}, r"eval_weights=\['slow'\] is unknown"),
        ({"k": 2.5}, r"k=2.5 .* integer of at least 1"),
        ({"alpha": 0.0}, r"alpha=0.0 .*\(0, 1\]"),
        ({"alpha": 1.5}, r"alpha=1.5 .*\(0, 1\]"),
        ({"alpha": float("nan")}, r"alpha=nan .*\(0, 1\]"),
        ({"eval_weights": "average"}, "eval_weights='average' is unknown: give 'slow'"),
        ({"pullback_momentum": "restart"}, "pullback_momentum='restart' is unknown: give 'none'"),
    ],
)
def test_bad_arguments_are_refused_with_name_value_and_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LookaheadCallback(**settings)


def test_numbers_of_numpy_are_numbers():
    callback = LookaheadCallback(k=np.int64(3), alpha=np.float32(0.5))
    assert (callback.k, callback.alpha) == (3, 0.5)
    assert (type(callback.k), type(callback.alpha)) == (int, float)


class Refused(Regression):
    def training_step(self, batch, batch_idx):
        pytest.fail("training began")


def refused(error, match, *own, module=None, **settings):
    with pytest.raises(error, match=match):
        make_trainer(*(own or (LookaheadCallback(),)), max_steps=1, **settings).fit(module or Refused())


def test_a_second_callback_is_refused():
    class Mine(LookaheadCallback):
        pass

    refused(ValueError, "a second LookaheadCallback", LookaheadCallback(), Mine())
    refused(ValueError, "a second LookaheadCallback", LookaheadCallback(), LookaheadCallback())


def with_optimizer(configure):
    class Configured(Refused):
        def configure_optimizers(self):
            return configure(self)

    return Configured()


def test_optimizers_that_cannot_be_looked_ahead_with_are_refused():
    class Lookahead(torch.optim.SGD):
        pass

    refused(ValueError, "pull back twice", module=with_optimizer(lambda module: Lookahead(module.parameters(), lr=1)))

    class Duck:
        param_groups, defaults, state = [], {}, {}

        def step(self, closure=None): ...

        def zero_grad(self): ...

        def state_dict(self): ...

        def load_state_dict(self, state_dict): ...

    refused(TypeError, "it must be a torch.optim.Optimizer", module=with_optimizer(lambda _: Duck()))


def test_a_lazy_module_is_refused_with_the_way_out():
    class Lazy(Refused):
        def __init__(self):
            super().__init__()
            self.net = nn.LazyLinear(2)

    refused(ValueError, "by running a batch through it", module=Lazy())


def test_slow_weights_of_ones_own_beside_the_callback_are_refused():
    def doubled(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=1)
        module.slow = SlowWeights(optimizer)
        return optimizer

    refused(ValueError, "has slow weights already", module=with_optimizer(doubled))


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "XLAStrategy", "XLAFSDPStrategy", "SingleDeviceXLAStrategy"])
def test_strategies_that_are_not_supported_are_refused_by_name(name):
    # The real ones ask for packages and devices of their own before any callback has a say.
    class Disguise(Callback):
        def setup(self, trainer, pl_module, stage):
            trainer.strategy.__class__ = type(name, (type(trainer.strategy),), {})

    refused(ValueError, f"strategy={name}: .* Use one device, 'ddp', 'fsdp'", Disguise(), LookaheadCallback())
