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
from classifier import Classifier, everything, images, same
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from runs import Regression, equal, inputs, make_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import ConfusionMatrix, CosineSimilarity, MeanSquaredError, MetricCollection, R2Score

from lightning_lookahead import InnerOuterMonitor, LookaheadCallback


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


def logged_by(logger):
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


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
