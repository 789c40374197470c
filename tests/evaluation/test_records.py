"""Where records are shown: loggers, pictures, a file."""

import csv
import sys
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader
from torchmetrics import (
    CosineSimilarity,
    MeanSquaredError,
)

from lightning_lookahead import InnerOuterMonitor, LookaheadCallback
from tests.helpers.classifier import Classifier, images
from tests.helpers.monitoring import Held, fit, regress
from tests.helpers.runs import logged_by, make_trainer


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
    [
        (MeanSquaredError(), "mean_squared_error"),
        (type("R2Score", (MeanSquaredError,), {})(), "r2_score"),  # torchmetrics' once took one output only
        (CosineSimilarity(), "cosine_similarity"),
    ],
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


def test_values_go_to_loggers_once():
    logger = CSVLogger(".", name="table")
    fit(Classifier(), InnerOuterMonitor(updates=3), logger=logger, log_every_n_steps=1)
    assert len([row for row in logged_by(logger) if row.get("lookahead/inner_acc")]) == 3
