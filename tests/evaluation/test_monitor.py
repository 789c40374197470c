"""What the monitor records, in which windows, and that it goes on after a stop."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import (
    MeanSquaredError,
)

from lightning_lookahead import InnerOuterMonitor, LookaheadCallback
from tests.helpers.classifier import Classifier, Manual, images
from tests.helpers.monitoring import Held, by_hand, fit, regress
from tests.helpers.runs import logged_by, make_trainer

# -- what it records


@pytest.mark.parametrize("batches", [1, 3])
def test_the_records_are_algorithm_1_before_and_after_every_sync(batches):
    monitor, model = InnerOuterMonitor(updates=7, metric=MeanSquaredError(), step=regress), Held(batches=10)
    model.held = batches
    fit(model, monitor)
    expected = by_hand(7, batches=batches)
    assert [(record.step, record.weights) for record in monitor.history] == [(s, w) for s, w, _ in expected]
    for record, (_, _, loss) in zip(monitor.history, expected, strict=True):
        assert abs(record.loss - loss) < 1e-6 * loss  # torchmetrics sums in float32
        assert abs(record.value - loss) < 1e-6 * loss


def test_every_step_is_seen_when_a_batch_takes_several():
    monitor = InnerOuterMonitor(updates=7)
    fit(Manual(), monitor)
    assert [(record.step, record.weights[0]) for record in monitor.history] == [
        *((0, "o"), (1, "i"), (2, "i"), (3, "i"), (3, "o"), (4, "i"), (5, "i"), (6, "i"), (6, "o"), (7, "i"))
    ]


def test_a_batch_without_a_step_is_not_evaluated():
    monitor = InnerOuterMonitor(updates=4)
    fit(Classifier(), monitor, accumulate_grad_batches=3)
    assert [record.step for record in monitor.history] == [0, 1, 2, 3, 3]


def test_with_several_optimizers_it_follows_the_first():
    class Two(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.other = nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            self.manual_backward(super().training_step(batch, batch_idx) + self.other(torch.ones(1)).sum())
            first.step()
            if batch_idx % 2:
                second.step()

        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), lr=0.1), torch.optim.SGD(self.other.parameters(), lr=0.1)

    monitor = InnerOuterMonitor(updates=4)
    fit(Two(), monitor)
    assert [(record.step, record.weights) for record in monitor.history if record.weights == "outer"] == [
        (0, "outer"),
        (3, "outer"),
    ]


# -- windows, and going on after a stop


def test_windows_repeat_through_training():
    monitor = InnerOuterMonitor(updates=3, start=2, every_n_syncs=3)
    fit(Classifier(batches=24), monitor)
    steps = [record.step for record in monitor.history if record.weights == "inner"]
    assert steps == [3, 4, 5, 10, 11, 12, 19, 20, 21]


def test_a_run_that_was_stopped_has_the_history_of_one_that_was_not(tmp_path):
    def monitor():
        return InnerOuterMonitor(updates=6, start=3, every_n_syncs=4, metric=MeanSquaredError(), step=regress)

    whole, every = monitor(), ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(Held(batches=20), whole, every)
    for step in (1, 2, 3, 4, 6, 8, 9, 10, 13, 16, 17):
        resumed = monitor()
        fit(Held(batches=20), resumed, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert resumed.history == whole.history, step
    torch.load(tmp_path / "step=9.ckpt", weights_only=True)


def test_a_checkpoint_of_a_run_without_a_monitor_can_be_gone_on_from_with_one():
    trainer = fit(Held(batches=20), None, max_steps=4)
    trainer.save_checkpoint("run.ckpt")
    monitor = InnerOuterMonitor(updates=3, metric=MeanSquaredError(), step=regress)
    fit(Held(batches=20), monitor, ckpt_path="run.ckpt", max_epochs=2)
    assert [record.step for record in monitor.history] == [5, 6, 6, 7]


def test_a_step_whose_evaluation_was_interrupted_is_evaluated_after_a_resume():
    def monitor(fails):
        def step(module, batch):
            if fails and module.trainer.global_step == 5 and not module.training:
                raise KeyboardInterrupt
            return regress(module, batch)

        return InnerOuterMonitor(updates=9, metric=MeanSquaredError(), step=step)

    whole = monitor(fails=False)
    fit(Held(batches=20), whole)
    with pytest.raises(SystemExit):
        fit(Held(batches=20), monitor(fails=True), OnExceptionCheckpoint(".", "stop"))
    resumed = monitor(fails=False)
    fit(Held(batches=20), resumed, ckpt_path="stop.ckpt")
    assert resumed.history == whole.history


@pytest.mark.parametrize("options", [{"start_step": 4}, {"group": True}, {}])
@pytest.mark.parametrize("at", range(2, 9))
def test_a_resumed_run_has_no_record_too_many(options, at):
    class Grouped(Classifier):
        def configure_optimizers(self):
            if "group" not in options:
                return super().configure_optimizers()
            first, *rest = self.parameters()
            return torch.optim.SGD([{"params": [first], "lookahead_k": 2}, {"params": rest}], lr=0.2)

        def train_dataloader(self):
            return DataLoader(images(64, 2), batch_size=8)

    def run(ckpt_path=None):
        monitor = InnerOuterMonitor(updates=9)
        own = {name: value for name, value in options.items() if name != "group"}
        callback = LookaheadCallback(k=3, monitor=monitor, **own)
        every = ModelCheckpoint(".", "{step}", every_n_train_steps=1, save_top_k=-1)
        make_trainer(callback, every, max_steps=9, max_epochs=9, limit_val_batches=1.0).fit(
            Grouped(), ckpt_path=ckpt_path
        )
        return [(record.step, record.weights) for record in monitor.history]

    full = run()
    assert run(f"step={at}.ckpt") == full


def test_the_last_sync_and_one_by_hand_are_recorded():
    class Syncs(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                trainer.callbacks[0].sync_now()

    monitor, logger = InnerOuterMonitor(updates=20), CSVLogger(".", name="table")
    callback = LookaheadCallback(k=4, monitor=monitor, unfinished_cycle="sync")
    make_trainer(callback, Syncs(), max_steps=8, max_epochs=9, limit_val_batches=1.0, logger=logger).fit(Classifier())
    outer = [record.step for record in monitor.history if record.weights == "outer"]
    assert outer == [0, 2, 6, 8]
    logged = [row for row in logged_by(logger) if row["lookahead/outer_acc"]]
    assert float(logged[-1]["lookahead/outer_acc"]) == pytest.approx(monitor.history[-1].value)


def test_a_second_fit_begins_a_new_history():
    monitor = InnerOuterMonitor(updates=2)
    fit(Classifier(), monitor)
    first = monitor.history
    fit(Classifier(), monitor)
    assert first == monitor.history
    assert first is not monitor.history


def test_the_callback_can_be_copied_and_pickled_with_it():
    monitor = InnerOuterMonitor(updates=2, metric=MeanSquaredError(), step=regress)
    callback = LookaheadCallback(monitor=monitor)
    for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert other.monitor.updates == 2
    fit(Held(), monitor)
    assert pickle.loads(pickle.dumps(monitor)).history == monitor.history


def test_the_other_package_of_lightning_takes_it_too(bare_program):
    program = """
import torch, pytorch_lightning as pl
from torch.utils.data import DataLoader, TensorDataset
from lightning_lookahead import InnerOuterMonitor, LookaheadCallback, compare_weights

class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(4, 3)
    def forward(self, x):
        return self.net(x)
    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, _):
        self.log("loss", self.training_step(batch, _))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

loader = DataLoader(TensorDataset(torch.ones(12, 4), torch.arange(12) % 3), batch_size=2)
monitor = InnerOuterMonitor(updates=4)
trainer = pl.Trainer(callbacks=[LookaheadCallback(k=2, monitor=monitor)], max_steps=5, accelerator="cpu", logger=False,
                     enable_checkpointing=False)
model = Model()
trainer.fit(model, loader, loader)
print(len(monitor.history), set(compare_weights(trainer, model, loader).slow))
"""
    shown = bare_program("-c", program)
    assert shown.stdout.endswith("7 {'loss'}\n"), shown.stderr


# -- what it refuses, and when


@pytest.mark.parametrize(
    "wrong", [{"updates": 0}, {"updates": 1.5}, {"start": -1}, {"batches": 0}, {"every_n_syncs": 0}]
)
def test_numbers_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value} is out of range: it must be an integer of at least"):
        InnerOuterMonitor(**wrong)
