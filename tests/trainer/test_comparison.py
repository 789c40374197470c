"""Slow against fast weights on the same data, and nothing else changed."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from lightning_lookahead import Comparison, LookaheadCallback, compare_weights
from tests.helpers.classifier import Classifier, everything, images, same
from tests.helpers.comparing import expected, trained
from tests.helpers.places import environment
from tests.helpers.runs import Regression, both, equal, make_trainer


@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
def test_after_a_fit_each_set_gets_the_metrics_that_validation_logs_with_it(eval_weights):
    trainer, model, _ = trained(callback=LookaheadCallback(k=3, eval_weights=eval_weights))
    comparison = compare_weights(trainer, model)
    slow, fast = expected()
    assert (comparison.slow, comparison.fast) == (slow, fast)
    assert comparison.difference == {"val_loss": slow["val_loss"] - fast["val_loss"]}
    assert slow != fast


@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
@pytest.mark.parametrize("steps", [6, 7])
@pytest.mark.parametrize("with_callback", [True, False])
def test_a_checkpoint_is_compared_by_a_trainer_that_has_trained_nothing(steps, eval_weights, with_callback):
    trained(steps, callback=LookaheadCallback(k=3, eval_weights=eval_weights))[0].save_checkpoint("run.ckpt")
    model = Regression()
    before, identity = model.weights(), [p.data_ptr() for p in model.parameters()]
    callbacks = [LookaheadCallback(k=3)] if with_callback else []
    comparison = compare_weights(make_trainer(*callbacks, limit_val_batches=1.0), model, ckpt_path="run.ckpt")
    assert (comparison.slow, comparison.fast) == expected(steps)
    assert (comparison.slow == comparison.fast) == (steps == 6)
    assert equal(model.weights(), before)
    assert [p.data_ptr() for p in model.parameters()] == identity


def test_a_checkpoint_is_compared_by_the_trainer_that_has_gone_on_and_its_weights_stay():
    trainer, model, callback = trained(4)
    trainer.save_checkpoint("run.ckpt")
    trainer, model, callback = trained(8)
    before = both(callback, model)
    comparison = compare_weights(trainer, model, ckpt_path="run.ckpt")
    assert (comparison.slow, comparison.fast) == expected(4)
    comparison = compare_weights(trainer, model)
    assert (comparison.slow, comparison.fast) == expected(8)
    for now, then in zip(both(callback, model), before, strict=True):
        assert equal(now, then)
    trainer.save_checkpoint("again.ckpt")
    comparison = compare_weights(make_trainer(limit_val_batches=1.0), Regression(), ckpt_path="again.ckpt")
    assert (comparison.slow, comparison.fast) == expected(8)


def test_the_best_checkpoint_is_found_as_in_validate():
    callback = LookaheadCallback(k=3)
    best = ModelCheckpoint(".", monitor="val_loss")
    trainer = make_trainer(callback, best, max_steps=8, limit_val_batches=1.0, val_check_interval=2)
    trainer.fit(model := Regression(batches=8))
    assert compare_weights(trainer, model, ckpt_path="best").slow["val_loss"] == best.best_model_score


def test_a_module_that_migrates_its_checkpoints_is_asked_to():
    class Old(Regression):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["state_dict"] = {f"old.{name}": value for name, value in checkpoint["state_dict"].items()}

        def on_load_checkpoint(self, checkpoint):
            state_dict = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name.removeprefix("old."): value for name, value in state_dict.items()}

    trained()[0].save_checkpoint("run.ckpt")
    comparison = compare_weights(make_trainer(limit_val_batches=1.0), Old(), ckpt_path="run.ckpt")
    assert (comparison.slow, comparison.fast) == expected()


class Disturbing(Classifier):
    """Does in validation what nobody should: draws random numbers, moves buffers, uses its training metric."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("noise", torch.rand(()) + random.random() + np.random.rand())  # noqa: NPY002
        self.net[1].running_mean += 1
        self.training_accuracy(self(batch[0]), batch[1])


@pytest.mark.parametrize("ckpt_path", [None, "run.ckpt"])
def test_weights_buffers_modes_metrics_and_random_numbers_are_left_as_they_were(ckpt_path):
    trainer, model, callback = trained(7, Disturbing())
    trainer.save_checkpoint("run.ckpt")
    model.train()
    model.net[3].eval()
    before, sets, buffers = everything(model), both(callback, model), list(model.buffers())
    comparison = compare_weights(trainer, model, ckpt_path=ckpt_path)
    for now, then in zip(everything(model), before, strict=True):
        assert same(now, then)
    assert all(now is then for now, then in zip(model.buffers(), buffers, strict=True))
    for now, then in zip(both(callback, model), sets, strict=True):
        assert equal(now, then)
    assert comparison.slow["noise"] == comparison.fast["noise"]
    assert comparison.slow["loss"] != comparison.fast["loss"]


def test_a_shuffling_loader_gives_both_the_same_data_and_is_left_as_it_was():
    trainer, model, _ = trained(7, Classifier(), limit_val_batches=1)
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    seen, validate = [], model.validation_step

    def validation_step(batch, batch_idx):
        seen.append(batch[0])
        validate(batch, batch_idx)

    model.validation_step = validation_step
    compare_weights(trainer, model, DataLoader(images(40, 3), batch_size=20, shuffle=True, generator=generator))
    assert torch.equal(*seen)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("ckpt_path", [None, "run.ckpt"])
def test_an_exception_in_validation_leaves_everything_as_it_was(ckpt_path):
    trainer, model, callback = trained()
    trainer.save_checkpoint("run.ckpt")
    before = both(callback, model)
    model.validation_step = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        compare_weights(trainer, model, ckpt_path=ckpt_path)
    for now, then in zip(both(callback, model), before, strict=True):
        assert equal(now, then)
    assert equal(model.weights(), before[1])
    del model.validation_step
    assert compare_weights(trainer, model).slow == expected()[0]


def test_nothing_is_sent_to_the_loggers():
    logger = CSVLogger(".", name="log")
    trainer, model, _ = trained(logger=logger)
    trainer.validate(model, verbose=False)
    file = Path(logger.log_dir) / "metrics.csv"
    before = file.read_text()
    compare_weights(trainer, model)
    logger.save()
    assert file.read_text() == before
    assert "val_loss" in before
    assert trainer.loggers == [logger]


def test_a_data_module_and_several_loaders_are_compared():
    class Data(LightningDataModule):
        def val_dataloader(self):
            return [DataLoader(range(1)), DataLoader(range(1))]

    class Two(Regression):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.log("val_loss", self.loss(1000) + dataloader_idx)

    trained()[0].save_checkpoint("run.ckpt")
    trainer = make_trainer(limit_val_batches=1.0)
    comparison = compare_weights(trainer, Two(), datamodule=Data(), ckpt_path="run.ckpt")
    first, second = comparison.slow.values()
    assert list(comparison.slow) == ["val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1"]
    assert (first, second) == (expected()[0]["val_loss"], expected()[0]["val_loss"] + 1)


# -- what cannot be compared


def test_a_trainer_without_the_callback_is_told_to_give_a_checkpoint():
    trainer = make_trainer(max_steps=2, limit_val_batches=1.0)
    trainer.fit(model := Regression())
    with pytest.raises(ValueError, match="one set of weights only.*ckpt_path="):
        compare_weights(trainer, model)
    with pytest.raises(ValueError, match="one set of weights only"):
        compare_weights(make_trainer(LookaheadCallback()), model)


def test_fsdp1_is_refused():
    trained()[0].save_checkpoint("run.ckpt")
    trainer = make_trainer()
    trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})  # the real one wants a GPU
    with pytest.raises(ValueError, match="does not work with FSDPStrategy.*Trainer with one device"):
        compare_weights(trainer, Regression(), ckpt_path="run.ckpt")


def test_another_model_than_the_trained_one_is_refused():
    trainer, _, _ = trained()
    with pytest.raises(ValueError, match="model is not the module"):
        compare_weights(trainer, Regression())


@pytest.mark.parametrize("weights_only", [True, False])
def test_a_checkpoint_with_one_set_is_refused_and_the_model_keeps_its_weights(weights_only):
    if weights_only:
        trained()[0].save_checkpoint("run.ckpt", weights_only=True)
    else:
        trainer = make_trainer(max_steps=2)
        trainer.fit(Regression())
        trainer.save_checkpoint("run.ckpt")
    trainer, model, callback = trained(4)
    before = both(callback, model)
    with pytest.raises(ValueError, match="holds one set of weights"):
        compare_weights(trainer, model, ckpt_path="run.ckpt")
    for now, then in zip(both(callback, model), before, strict=True):
        assert equal(now, then)


def test_a_run_that_is_under_way_is_left_alone():
    class Impatient(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            compare_weights(trainer, pl_module)

    with pytest.raises(RuntimeError, match="inside a run"):
        make_trainer(LookaheadCallback(), Impatient(), max_steps=2).fit(Regression())


# -- data, other callbacks, files, compiled modules


def test_data_of_the_module_with_a_generator_of_their_own_are_the_same_for_both_and_left_as_they_were():
    class Shuffling(Classifier):
        def __init__(self):
            super().__init__()
            self.own, self.seen = torch.Generator().manual_seed(4), []

        def val_dataloader(self):
            return DataLoader(images(40, 3), batch_size=4, shuffle=True, generator=self.own)

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.seen.append(batch[0])

    trainer, model, _ = trained(7, Shuffling(), limit_val_batches=2)
    before = model.own.get_state()
    model.seen.clear()
    compare_weights(trainer, model)
    assert torch.equal(torch.stack(model.seen[:2]), torch.stack(model.seen[2:]))
    assert torch.equal(model.own.get_state(), before)


def test_an_average_of_another_callback_is_neither_set():
    from lightning.pytorch.callbacks import EMAWeightAveraging  # noqa: PLC0415

    callback, model = LookaheadCallback(k=3), Regression(batches=8)
    middle = ModelCheckpoint(".", "middle", every_n_train_steps=5, save_on_train_epoch_end=False)
    trainer = make_trainer(callback, EMAWeightAveraging(decay=0.5), middle, max_steps=7, limit_val_batches=1.0)
    trainer.fit(model)
    with pytest.raises(ValueError, match="EMAWeightAveraging has put its average in the place of the fast weights"):
        compare_weights(trainer, model)
    for own in (trainer, make_trainer(EMAWeightAveraging(decay=0.5), limit_val_batches=1.0)):
        callbacks = list(own.callbacks)
        comparison = compare_weights(own, Regression(), ckpt_path="middle.ckpt")
        assert (comparison.slow, comparison.fast) == expected(5)
        assert own.callbacks == callbacks
    again = compare_weights(make_trainer(limit_val_batches=1.0), Regression(), ckpt_path="middle.ckpt")
    assert (again.slow, again.fast) == expected(5)


@pytest.mark.parametrize("size", [0, 1000, 0.5])
def test_a_damaged_file_is_named_and_the_model_keeps_its_weights(size):
    trainer, model, _ = trained()
    trainer.save_checkpoint("run.ckpt")
    content = Path("run.ckpt").read_bytes()
    Path("run.ckpt").write_bytes(content[: int(len(content) * size) if size == 0.5 else size])
    before = model.weights()
    with pytest.raises(ValueError, match="run.ckpt cannot be read as a checkpoint"):
        compare_weights(trainer, model, ckpt_path="run.ckpt")
    assert equal(model.weights(), before)


def test_validation_that_shows_nothing_and_data_that_can_be_read_once_are_refused():
    trainer, model, _ = trained()
    with pytest.raises(ValueError, match="dataloaders is an iterator"):
        compare_weights(trainer, model, iter([torch.ones(1)]))
    model.validation_step = lambda batch, batch_idx: None  # noqa: ARG005 (Lightning's names)
    with pytest.raises(ValueError, match="validation logged no metric"):
        compare_weights(trainer, model)


def test_the_strategy_s_own_loader_is_there_again():
    trainer, model, _ = trained()
    trainer.save_checkpoint("run.ckpt")
    before = trainer.strategy.load_checkpoint
    compare_weights(trainer, model, ckpt_path="run.ckpt")
    assert trainer.strategy.load_checkpoint is before
    fresh = make_trainer(limit_val_batches=1.0)
    compare_weights(fresh, Regression(), ckpt_path="run.ckpt")
    assert "load_checkpoint" not in vars(fresh.strategy)


def test_a_compiled_module_is_compared():
    trained()[0].save_checkpoint("run.ckpt")
    compiled = torch.compile(Regression(), backend="eager")
    comparison = compare_weights(make_trainer(limit_val_batches=1.0), compiled, ckpt_path="run.ckpt")
    assert (comparison.slow, comparison.fast) == expected()


# -- the table

SOME = Comparison({"loss": 0.25, "acc": 0.5}, {"loss": float("nan"), "acc": 0.75})


def test_the_numbers_are_there_as_a_dict_and_as_json():
    assert SOME.to_dict()["slow"] == {"loss": 0.25, "acc": 0.5}
    assert SOME.to_dict()["difference"]["acc"] == -0.25
    read = json.loads(SOME.to_json())
    assert read["fast"] == {"loss": None, "acc": 0.75}
    assert read["difference"] == {"loss": None, "acc": -0.25}


def test_the_table_is_drawn_by_rich_and_plain_without_it(monkeypatch):
    assert re.search(r"│ acc +│ +0\.5 │ +0\.75 │ +-0\.25 │", str(SOME))
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert str(SOME).splitlines() == [
        "metric  slow  fast  slow - fast",
        "loss    0.25   nan         +nan",
        "acc      0.5  0.75        -0.25",
    ]


def test_the_table_can_be_printed_where_there_are_no_box_drawing_characters():
    program = "from lightning_lookahead import Comparison; print(Comparison({'a': 1.0}, {'a': 2.0}))"
    ascii_only = environment(PYTHONIOENCODING="ascii")
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=ascii_only)
    assert "-1" in shown.stdout


def test_a_metric_that_one_set_alone_has_is_shown_without_a_difference():
    one = Comparison({"only": 1.0}, {})
    assert one.difference == {}
    assert "only" in str(one)
