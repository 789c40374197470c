"""Fits that are not quite fits: tuners, a few steps or none, sanity checks, a command line."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from lightning_lookahead import LookaheadCallback
from tests.helpers.runs import Regression, both, equal, make_trainer, reference


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


def test_a_command_line_can_add_and_set_it(monkeypatch):
    options = ["accelerator=cpu", "logger=false", "callbacks+=lightning_lookahead.LookaheadCallback", "callbacks.k=7"]
    options.append("callbacks.eval_weights=fast")
    monkeypatch.setattr("sys.argv", ["train.py", *(f"--trainer.{option}" for option in options)])
    cli = LightningCLI(Regression, run=False, save_config_callback=None)
    (callback,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, LookaheadCallback))
    assert (callback.settings.k, callback.settings.alpha, callback.eval_weights) == (7, 0.5, "fast")
