"""What the monitor measures, on which data, and what it refuses to measure."""

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import (
    ConfusionMatrix,
    MetricCollection,
)

from lightning_lookahead import InnerOuterMonitor, LookaheadCallback
from tests.helpers.classifier import Classifier, images
from tests.helpers.monitoring import fit
from tests.helpers.runs import equal, make_trainer


def test_accuracy_and_cross_entropy_are_taken_if_nothing_is_given():
    model, monitor = Classifier(), InnerOuterMonitor(updates=4)
    seen = []

    class Evaluating(LookaheadCallback):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            super().on_train_batch_end(trainer, pl_module, *arguments)
            pl_module.eval()
            with torch.no_grad():
                x, y = images(40, 3)[:]
                prediction = pl_module(x)
                hits = (prediction.argmax(1) == y).float().mean().item()
                seen.append((hits, nn.functional.cross_entropy(prediction, y).item()))
            pl_module.train()

    trainer = make_trainer(Evaluating(k=2, monitor=monitor), max_steps=4, limit_val_batches=1.0)
    trainer.fit(model)
    after = [record for record in monitor.history if (record.step % 2, record.weights) in {(1, "inner"), (0, "outer")}]
    for record, (hits, loss) in zip(after[1:], seen, strict=True):
        assert record.value == pytest.approx(hits, abs=1e-7)
        assert record.loss == pytest.approx(loss, rel=1e-6)
    assert len({record.value for record in monitor.history}) > 2


@pytest.mark.parametrize("limit", [None, 1])
def test_batches_are_read_once_and_are_at_most_as_many_as_asked_for(limit):
    read = []

    class Reading(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            read.append(index)
            return images(3, 5)[index]

    model = Classifier()
    model.val_dataloader = lambda: DataLoader(Reading())
    fit(model, InnerOuterMonitor(updates=6, batches=limit), limit_val_batches=2, val_check_interval=8)
    training = read[: read.index(0, 1) + (limit or 2)]  # one to look whether it fits, then those of the window
    assert training == [0, 0, 1][: 1 + (limit or 2)]
    assert read[len(training) :] == [0, 1]  # validation at the end of the epoch


def test_the_data_may_be_given_and_are_then_not_asked_of_the_trainer():
    batches = list(DataLoader(images(12, 9), batch_size=6))
    monitor = InnerOuterMonitor(updates=3, data=batches)
    fit(Classifier(), monitor, limit_val_batches=0)
    own = InnerOuterMonitor(updates=3, data=DataLoader(images(12, 9), batch_size=4))
    fit(Classifier(), own, limit_val_batches=0)
    assert [record.value for record in monitor.history] == pytest.approx([record.value for record in own.history])
    assert len(monitor.history) == 5


def test_epochs_that_are_not_validated_do_not_keep_it_from_the_data():
    monitor = InnerOuterMonitor(updates=2)
    fit(Classifier(), monitor, check_val_every_n_epoch=5)
    assert [record.step for record in monitor.history] == [0, 1, 2]


def test_augmentation_on_the_device_is_that_of_validation():
    class Augmenting(Classifier):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            x, y = batch
            return (x * 0 if self.trainer.training else x), y

    model, monitor = Augmenting(), InnerOuterMonitor(updates=2)
    fit(model, monitor)
    accuracy = monitor.history[0].value
    fresh = Classifier().eval()
    x, y = images(40, 3)[:]
    assert accuracy == pytest.approx((fresh(x).argmax(1) == y).float().mean().item(), abs=1e-7)


class NoForward(Classifier):
    forward = nn.Module.forward


REFUSED = {
    "no data": (Classifier, {}, {"limit_val_batches": 0}, "has no held-out data.*data="),
    "no forward": (NoForward, {}, {}, "NoForward has no forward.*step=f"),
    "not two": (Classifier, {"data": [{"x": 1}]}, {}, "batches of two.*got a dict.*step=f"),
    "regression": (Classifier, {"data": [(torch.ones(2, 4), torch.ones(2, 3))]}, {}, r"got \(2, 3\) and \(2, 3\)"),
    "many numbers": (
        Classifier,
        {"metric": ConfusionMatrix(task="multiclass", num_classes=3)},
        {},
        "needs one that gives one number",
    ),
    "collection": (Classifier, {"metric": MetricCollection([])}, {}, "must be a torchmetrics Metric"),
}


@pytest.mark.parametrize(("model_class", "arguments", "settings", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("start", [None, 6])
def test_what_does_not_fit_is_said_before_the_first_step(model_class, arguments, settings, message, start):
    model = model_class()
    before = model.weights()
    with pytest.raises((ValueError, TypeError), match=message):
        fit(model, InnerOuterMonitor(start=start, **arguments), **settings)
    assert equal(model.weights(), before)
    assert model.order == []


def test_a_step_sees_a_validating_trainer_without_gradients_in_its_precision_and_training_goes_on_as_before():
    seen, training = [], []

    def step(module, batch):
        trainer = module.trainer
        seen.append((trainer.validating, module.training, torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return module(batch[0]), batch[1]

    class Watching(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            training.append(self.trainer.training and self.training)

    fit(Watching(), InnerOuterMonitor(updates=4, step=step), precision="bf16-mixed")
    assert set(seen) == {(True, False, False, True)}
    assert training == [True] * 8


def test_hooks_of_transfer_are_called_with_the_index_of_the_loader():
    class Two(Classifier):
        def val_dataloader(self):
            return [DataLoader(images(20, 3), batch_size=10), DataLoader(images(10, 4), batch_size=10)]

        def on_before_batch_transfer(self, batch, dataloader_idx):
            return [*batch, dataloader_idx]

        def validation_step(self, batch, batch_idx, dataloader_idx):
            pass

        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

    seen = []
    fit(Two(), InnerOuterMonitor(updates=1, step=lambda m, b: (seen.append(int(b[2])), (m(b[0]), b[1]))[1]))
    assert seen == [0, *[0, 0, 1] * 2]


def test_combined_loaders_give_the_batches_that_validation_sees():
    class Combined(Classifier):
        def val_dataloader(self):
            parts = {"a": DataLoader(images(20, 3), batch_size=10), "b": DataLoader(images(30, 4), batch_size=10)}
            return CombinedLoader(parts, "max_size_cycle")

        def validation_step(self, batch, batch_idx):
            pass

    seen = []
    fit(Combined(), InnerOuterMonitor(updates=1, step=lambda m, b: (seen.append(set(b)), (m(b["a"][0]), b["a"][1]))[1]))
    assert seen == [{"a", "b"}] * 7


def test_a_metric_of_the_module_itself_is_not_used_up_and_a_short_last_batch_counts_for_less():
    model = Classifier()
    x, y = images(12, 9)[:]
    monitor = InnerOuterMonitor(updates=1, metric=model.accuracy, data=[(x[:10], y[:10]), (x[10:], y[10:])])
    monitor.step = lambda module, batch: (
        module(batch[0]),
        batch[1],
        nn.functional.cross_entropy(module(batch[0]), batch[1]),
    )
    monitor.reset()
    fit(model, monitor, limit_val_batches=0)
    assert model.accuracy.update_count == 0
    fresh = Classifier().eval()
    assert monitor.history[0].loss == pytest.approx(nn.functional.cross_entropy(fresh(x), y).item(), rel=1e-6)


def test_data_that_can_be_read_once_are_refused():
    with pytest.raises(ValueError, match="data is an iterator, which gives its batches once"):
        InnerOuterMonitor(data=iter([]))


def test_data_are_let_go_of_when_no_window_comes_any_more():
    held = []

    class Looking(Classifier):
        def on_train_batch_end(self, *_):
            held.append(len(monitor._ready))

    monitor = InnerOuterMonitor(updates=3)
    fit(Looking(), monitor)
    assert held == [2, 2, 0, 0, 0, 0, 0, 0]
    repeating = InnerOuterMonitor(updates=3, every_n_syncs=2)
    fit(Classifier(), repeating)
    assert repeating._ready == []
