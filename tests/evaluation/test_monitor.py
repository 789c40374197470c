"""What the monitor records and shows, and that the run does not notice it."""

import copy
import csv
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import CombinedLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchmetrics import (
    CatMetric,
    ConfusionMatrix,
    CosineSimilarity,
    MeanMetric,
    MeanSquaredError,
    MetricCollection,
    R2Score,
)

from lightning_lookahead import InnerOuterMonitor, LookaheadCallback
from lightning_lookahead._undisturbed import undisturbed
from tests.helpers.classifier import Classifier, everything, images, same
from tests.helpers.runs import Regression, equal, inputs, logged_by, make_trainer


def fit(model, monitor=None, *callbacks, k=3, ckpt_path=None, **settings):
    callback = LookaheadCallback(k=k, monitor=monitor)
    trainer = make_trainer(callback, *callbacks, **{"limit_val_batches": 1.0, "max_epochs": 1, **settings})
    trainer.fit(model, ckpt_path=ckpt_path)
    return trainer


def regress(module, batch):
    """Prediction, target and loss of `Regression`: the data are in its loss."""
    x = inputs(1000 + int(batch[0]))
    prediction = module.net(x)
    return prediction, torch.ones_like(prediction), (prediction - 1).square().mean()


def by_hand(steps, k=3, batches=1):
    """The loss of theta after every inner step and of phi after every sync, in Algorithm 1."""
    module = Regression()
    optimizer = module.configure_optimizers()
    records = []

    def record(step, weights):
        with torch.no_grad():
            losses = [(module.net(inputs(1000 + index)) - 1).square().mean() for index in range(batches)]
        records.append((step, weights, torch.stack(losses).mean().item()))

    phi = module.weights()
    record(0, "outer")
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        module.loss(step - 1).backward()
        optimizer.step()
        record(step, "inner")
        if step % k == 0:
            with torch.no_grad():
                for slow, fast in zip(phi, module.net.parameters(), strict=True):
                    fast.copy_(slow.lerp_(fast, 0.5))
            record(step, "outer")
    return records


class Held(Regression):
    """`Regression` with a number of validation batches."""

    held = 1

    def val_dataloader(self):
        return DataLoader(range(self.held))


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


class Manual(Classifier):
    """Takes several steps in a batch, by hand."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


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


# -- that the run does not notice it

RUNS = {
    "plain": {},
    "validated in the middle": {"val_check_interval": 2},
    "accumulated": {"accumulate_grad_batches": 2},
    "mixed precision": {"precision": "bf16-mixed"},
    "double precision": {"precision": "64-true"},
}


def end(model_class, monitor, **settings):
    torch.manual_seed(7)
    model = model_class(generator=torch.Generator().manual_seed(3))  # shared by training and validation data
    modes, tensors = [], []

    def keep(*_):
        modes.append([part.training for part in model.modules()])
        tensors.extend(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)

    model.on_train_batch_end = keep
    trainer = fit(model, monitor, max_epochs=2, **settings)
    with trainer.callbacks[0].use_weights("fast"):
        state = everything(model)
    tensors += [entry["momentum_buffer"] for entry in trainer.optimizers[0].state.values()]
    return [*state, model.order, modes, model.generator.get_state()], tensors, trainer.callback_metrics


def assert_same(watched, plain):
    for left, right in zip(watched[0], plain[0], strict=True):
        assert same(left, right)
    assert equal(watched[1], plain[1])
    assert len(plain[1]) > 20
    assert watched[2]["accuracy"] == plain[2]["accuracy"]


@pytest.mark.parametrize(
    ("model_class", "name"),
    # Lightning accumulates in automatic optimization only
    [*((Classifier, name) for name in RUNS), *((Manual, name) for name in RUNS if name != "accumulated")],
)
def test_a_run_is_bit_for_bit_the_same_with_it(model_class, name):
    settings = RUNS[name]
    monitor = InnerOuterMonitor(updates=9, every_n_syncs=4)
    assert_same(end(model_class, monitor, **settings), end(model_class, None, **settings))
    assert len(monitor.history) > 10


def rude(module, batch):
    x, y = batch
    module.train()
    module.training_accuracy(module(x + torch.rand(())), y)
    module.eval()
    return module(x), y


def test_a_step_function_that_draws_and_moves_statistics_changes_nothing_either():
    assert_same(end(Classifier, InnerOuterMonitor(updates=9, step=rude)), end(Classifier, None))


def test_workers_that_the_validation_keeps_are_left_alone():
    class Working(Classifier):
        def val_dataloader(self):
            return DataLoader(images(40, 3), batch_size=20, num_workers=1, persistent_workers=True)

    monitor = InnerOuterMonitor(updates=6, every_n_syncs=3, batches=1)
    assert_same(end(Working, monitor), end(Working, None))
    assert len(monitor.history) > 10


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


# -- where it is shown


def test_every_logger_gets_every_value_and_the_progress_bar_the_latest():
    table, board = CSVLogger(".", name="table"), TensorBoardLogger(".", name="board")
    monitor = InnerOuterMonitor(updates=6)
    trainer = fit(Classifier(), monitor, TQDMProgressBar(), logger=[table, board], enable_progress_bar=True)
    shown = trainer.progress_bar_metrics
    for kind in ("inner", "outer"):
        expected = {record.step: record.value for record in monitor.history if record.weights == kind}
        name = f"lookahead/{kind}_acc"
        logged = {int(row["step"]): float(row[name]) for row in logged_by(table) if row.get(name)}
        assert logged == expected
        events = EventAccumulator(board.log_dir).Reload()
        assert {event.step: event.value for event in events.Scalars(name)} == pytest.approx(expected)
        assert shown[name] == pytest.approx(list(expected.values())[-1])
    image = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload().Images("lookahead/inner_outer")
    assert [picture.step for picture in image] == [6]
    assert image[0].encoded_image_string.startswith(b"\x89PNG")
    assert image[0].width > 400


def test_a_window_that_training_ends_in_is_drawn():
    board = TensorBoardLogger(".", name="board")
    fit(Classifier(), InnerOuterMonitor(updates=60), logger=board)
    images = EventAccumulator(board.log_dir, size_guidance={"images": 0}).Reload().Images("lookahead/inner_outer")
    assert [picture.step for picture in images] == [8]


@pytest.mark.parametrize(
    ("metric", "name"),
    [(MeanSquaredError(), "mean_squared_error"), (R2Score(), "r2_score"), (CosineSimilarity(), "cosine_similarity")],
)
def test_log_keys_have_the_name_of_the_metric(metric, name):
    logger = CSVLogger(".", name="table")
    fit(Held(), InnerOuterMonitor(updates=1, metric=metric, step=regress), logger=logger)
    assert any(row.get(f"lookahead/inner_{name}") for row in logged_by(logger))


def rows(path):
    with Path(path).open(newline="") as file:
        return [
            (int(row["step"]), row["weights"], float(row["value"]), float(row["loss"])) for row in csv.DictReader(file)
        ]


def test_the_records_are_written_beside_the_run_and_again_by_a_run_that_goes_on():
    def monitor():
        return InnerOuterMonitor(updates=10, metric=MeanSquaredError(), step=regress, save_csv=True)

    logger = CSVLogger(".", name="log")
    whole = monitor()
    trainer = fit(Held(batches=5), whole, logger=logger)
    path = Path(logger.log_dir) / "inner_outer.csv"
    assert rows(path) == [tuple(record) for record in whole.history]
    trainer.save_checkpoint("run.ckpt")
    resumed, logger = monitor(), CSVLogger(".", name="log")
    fit(Held(batches=5), resumed, logger=logger, ckpt_path="run.ckpt", max_epochs=2)
    assert rows(path) == [tuple(record) for record in whole.history]
    assert rows(Path(logger.log_dir) / "inner_outer.csv") == [tuple(record) for record in resumed.history]
    assert resumed.history[-1].step == 10


def test_a_file_that_cannot_be_written_does_not_stop_the_run():
    Path("inner_outer.csv").mkdir()
    monitor = InnerOuterMonitor(updates=3, save_csv=True)
    with pytest.warns(UserWarning, match="Lookahead: the monitor's records are no longer written"):
        trainer = fit(Classifier(), monitor)
    assert trainer.global_step == 8
    assert len(monitor.history) == 5


@pytest.mark.parametrize("settings", [{"barebones": True}, {"fast_dev_run": 4}])
def test_trainers_that_log_nothing_train_all_the_same(settings):
    monitor = InnerOuterMonitor(updates=3)
    callback = LookaheadCallback(k=3, monitor=monitor)
    quiet = {"logger": None, "enable_checkpointing": None, "enable_progress_bar": None, "num_sanity_val_steps": None}
    settings = {**quiet, "enable_model_summary": None, "limit_val_batches": None, **settings, "max_steps": 4}
    if "barebones" in settings:
        monitor.data = list(DataLoader(images(8, 1), batch_size=8))
    make_trainer(callback, **settings).fit(Classifier())
    assert len(monitor.history) == 5


def test_without_matplotlib_there_is_a_warning_and_no_picture(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match="without matplotlib"):
        fit(Classifier(), InnerOuterMonitor(updates=2), logger=TensorBoardLogger(".", name="board"))


def test_the_other_package_of_lightning_takes_it_too(tmp_path):
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
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    shown = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment
    )
    assert shown.stdout.endswith("7 {'loss'}\n")


# -- what it refuses, and when


@pytest.mark.parametrize(
    "wrong", [{"updates": 0}, {"updates": 1.5}, {"start": -1}, {"batches": 0}, {"every_n_syncs": 0}]
)
def test_numbers_out_of_range_are_refused(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value} is out of range: it must be an integer of at least"):
        InnerOuterMonitor(**wrong)


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


# -- what an evaluation might have left behind


def run_both(make, **settings):
    """The end of a run with the monitor and without, of models that ``make`` gives."""
    ends = []
    for monitor in (InnerOuterMonitor(updates=6, every_n_syncs=2, data=settings.get("data")), None):
        torch.manual_seed(7)
        model = make()
        own = {name: value for name, value in settings.items() if name != "data"}
        trainer = fit(model, monitor, **{"max_epochs": 3, **own})
        with trainer.callbacks[0].use_weights("fast"):
            ends.append([*model.weights(), torch.get_rng_state(), torch.tensor(model.order)])
    return ends


class DrawingData(Classifier):
    """Draws random numbers when it is asked for its validation data, and says when that was."""

    def val_dataloader(self):
        self.order.append(1000.0 + self.trainer.current_epoch)
        indices = torch.randperm(40)[:20].tolist()
        return DataLoader(torch.utils.data.Subset(images(40, 3), indices), batch_size=10)


@pytest.mark.parametrize("settings", [{"check_val_every_n_epoch": 2}, {"reload_dataloaders_every_n_epochs": 1}])
def test_validation_data_that_are_drawn_when_they_are_loaded_are_loaded_when_they_would_be(settings):
    watched, plain = run_both(DrawingData, **settings, max_epochs=4)
    # the monitor may ask for data of its own, but draws nothing for the run
    kept = [value for value in watched[-1].tolist() if value < 1000]
    assert kept == [value for value in plain[-1].tolist() if value < 1000]
    assert equal(watched[:-1], plain[:-1])


class NoisyMetric(MeanSquaredError):  # noqa: N818 (a mean squared error is no exception)
    def compute(self):
        return super().compute() + 0 * torch.rand(())


def test_a_metric_that_draws_when_it_is_computed_changes_nothing():
    ends = []
    for monitor in (
        InnerOuterMonitor(updates=6, metric=NoisyMetric(), step=lambda m, b: (m(b[0])[:, 0], b[1].float())),
        None,
    ):
        torch.manual_seed(7)
        model = Classifier()
        fit(model, monitor)
        ends.append([*model.weights(), torch.get_rng_state()])
    assert equal(*ends)


class Buffered(Classifier):
    """Has buffers that cannot be written to in place, are shared, and are replaced in a forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(1, 4).expand(3, 4))
        self.register_buffer("count", torch.zeros(()))
        self.net[1].register_buffer("count", self.count)

    def forward(self, x):
        self.count = self.count + 1
        return self.net(x * self.mask[0])


def test_buffers_that_are_expanded_shared_or_replaced_are_the_same_objects_afterwards():
    watched, plain = run_both(Buffered)
    assert equal(watched, plain)
    model = Buffered()
    before = list(model.named_buffers(remove_duplicate=False))
    with undisturbed(model):
        model(torch.ones(2, 4))
        model.net[1].count += 5
        assert model.mask.data_ptr() != before[0][1].data_ptr()
    after = list(model.named_buffers(remove_duplicate=False))
    assert all(name == other and now is then for (name, now), (other, then) in zip(after, before, strict=True))
    assert model.count == 0


def test_a_backward_that_is_yet_to_come_does_not_notice():
    class Pending(Classifier):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.register_buffer("scale", torch.ones(()))

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            loss = (self.net[4](torch.ones(2, 8)) * self.scale).square().mean()
            other = (self.net[0](batch[0]) * self.scale).square().mean()
            self.manual_backward(other)
            first.step()
            self.manual_backward(loss)
            second.step()
            for optimizer in (first, second):
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[part].parameters(), lr=0.1) for part in (0, 4)]

    assert equal(*run_both(Pending))


def test_what_metrics_have_gathered_is_put_back_also_lists_and_cached_results():
    class Gathering(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.all, self.off = MeanMetric(), CatMetric(), nn.Linear(1, 1).eval()

    module = Gathering()
    for metric in (module.mean, module.all):
        metric.update(torch.tensor([1.0, 3.0]))
    first = module.mean.compute()
    with undisturbed(module):
        module.train()
        for metric in (module.mean, module.all):
            metric.update(torch.tensor([100.0]))
            metric(torch.tensor([100.0]))
        module.all.reset()
    assert module.mean.compute() == first == 2.0
    assert module.mean.update_count == module.all.update_count == 1
    assert module.all.compute().tolist() == [1.0, 3.0]
    assert module.training
    assert not module.off.training


@pytest.mark.parametrize("where", ["loader", "sampler", "batch sampler", "attribute", "attribute's loader"])
def test_generators_of_loaders_and_modules_are_put_back(where):
    generator = torch.Generator().manual_seed(1)
    data, plain = images(8, 1), RandomSampler(range(8))
    sampler = RandomSampler(range(8), generator=generator)
    loader = {
        "loader": lambda: DataLoader(data, generator=generator, sampler=plain),
        "sampler": lambda: DataLoader(data, sampler=sampler),
        "batch sampler": lambda: DataLoader(data, batch_sampler=BatchSampler(sampler, 2, drop_last=False)),
    }.get(where, lambda: DataLoader(data, shuffle=True, generator=generator))()
    module = nn.Linear(1, 1)
    if where == "attribute":
        module.generator = generator
    if where == "attribute's loader":
        module.loader = loader
    before = generator.get_state()
    with undisturbed(module, [] if "attribute" in where else [loader]):
        list(loader)
        assert not torch.equal(generator.get_state(), before)
    assert torch.equal(generator.get_state(), before)


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


def test_after_a_manual_fit_no_hook_is_left_on_the_optimizer():
    trainer = fit(Manual(), None)
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_post_hooks
    assert not optimizer._optimizer_step_pre_hooks


def test_values_go_to_loggers_once():
    logger = CSVLogger(".", name="table")
    fit(Classifier(), InnerOuterMonitor(updates=3), logger=logger, log_every_n_steps=1)
    assert len([row for row in logged_by(logger) if row.get("lookahead/inner_acc")]) == 3


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
