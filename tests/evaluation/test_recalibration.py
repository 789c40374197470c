"""BatchNorm's statistics gathered anew, for validation and for a comparison."""

import math

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from lightning_lookahead import LookaheadCallback, compare_weights
from tests.helpers.classifier import Classifier, everything, images, same
from tests.helpers.comparing import trained
from tests.helpers.runs import Regression, Seen, both, equal, make_trainer


class Normed(Classifier):
    """Without dropout, and with data in order, so that the statistics can be had by hand."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.net[3].p = 0.0
        self.logged = []

    def train_dataloader(self):
        return DataLoader(images(64, 2), batch_size=8)

    def on_validation_end(self):
        self.logged.append(self.trainer.callback_metrics["loss"].item())


def validated(batches, **settings):
    callback, model = LookaheadCallback(k=3, recalibrate_batch_norm=batches), Normed()
    seen = Seen()
    trainer = make_trainer(callback, seen, max_epochs=1, val_check_interval=5, limit_val_batches=1.0, **settings)
    trainer.fit(model)
    return callback, model, trainer, seen


@pytest.mark.parametrize("batches", [True, 3])
def test_validation_sees_the_statistics_of_the_slow_weights_and_training_those_of_the_fast(batches):
    callback, model, _, seen = validated(batches)
    plain_callback, plain, _, _ = validated(False)
    assert equal(both(callback, model)[0], both(plain_callback, plain)[0])
    assert equal(both(callback, model)[1], both(plain_callback, plain)[1])
    assert equal(model.buffers(), plain.buffers())
    for logged, without, step in zip(model.logged, plain.logged, (5,), strict=True):
        other = Normed()
        with torch.no_grad():
            for parameter, value in zip(other.parameters(), seen.weights["on_validation_start", step], strict=True):
                parameter.copy_(value)
        update_bn(list(other.train_dataloader())[: None if batches is True else batches], other)
        other.eval()
        losses = [torch.nn.functional.cross_entropy(other(x), y).item() for x, y in other.val_dataloader()]
        assert logged == pytest.approx(sum(losses) / 2, rel=1e-6)
        assert logged != without


def test_a_checkpoint_saved_while_they_are_in_place_holds_the_others():
    class Saving(Normed):
        def on_validation_epoch_end(self):
            self.trainer.save_checkpoint(f"inside-{self.trainer.global_step}.ckpt")

        def on_validation_end(self):
            self.trainer.save_checkpoint(f"after-{self.trainer.global_step}.ckpt")

    for eval_batches in (2, False):
        callback = LookaheadCallback(k=3, recalibrate_batch_norm=eval_batches)
        make_trainer(callback, max_epochs=1, val_check_interval=5, limit_val_batches=1.0).fit(Saving())
        inside, after = (torch.load(f"{when}-5.ckpt", weights_only=True)["state_dict"] for when in ("inside", "after"))
        assert inside.keys() == after.keys()
        assert all(torch.equal(inside[name], after[name]) for name in after)


def test_an_exception_while_they_are_in_place_brings_the_others_back():
    class Failing(Normed):
        def validation_step(self, batch, batch_idx):
            raise ZeroDivisionError

    models = [Failing(), Normed()]
    callback = LookaheadCallback(k=3, recalibrate_batch_norm=True)
    with pytest.raises(ZeroDivisionError):
        make_trainer(callback, max_epochs=1, val_check_interval=5, limit_val_batches=1.0).fit(models[0])
    make_trainer(LookaheadCallback(k=3), max_steps=5).fit(models[1])
    assert equal(models[0].buffers(), models[1].buffers())


def test_training_goes_on_with_its_own_workers_while_they_are_gathered():
    class Working(Normed):
        def train_dataloader(self):
            return DataLoader(images(64, 2), batch_size=8, num_workers=1, persistent_workers=True)

    model = Working()
    callback = LookaheadCallback(k=3, recalibrate_batch_norm=True)
    make_trainer(callback, max_epochs=2, val_check_interval=3, limit_val_batches=1.0).fit(model)
    expected = [x[0, 0].item() for x, _ in Normed().train_dataloader()]
    assert model.order == expected * 2


def test_an_option_that_would_do_nothing_is_refused_before_the_first_step():
    with pytest.raises(ValueError, match="does nothing with eval_weights='fast'"):
        LookaheadCallback(eval_weights="fast", recalibrate_batch_norm=True)
    with pytest.raises(ValueError, match="recalibrate_batch_norm=-2 is out of range"):
        LookaheadCallback(recalibrate_batch_norm=-2)
    model = Regression()
    before = model.weights()
    with pytest.raises(ValueError, match="Regression has no BatchNorm statistics"):
        make_trainer(LookaheadCallback(recalibrate_batch_norm=True), max_steps=5).fit(model)
    assert equal(model.weights(), before)


def recalibrated(model, weights, batches):
    """Loss and accuracy of the classifier with these weights and the statistics that torch gathers for them."""
    other = Classifier()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter, value in zip(other.parameters(), weights, strict=True):
            parameter.copy_(value)
    other.net[3].p = 0.0
    update_bn(batches, other)
    other.eval()
    losses, hits = [], 0
    for x, y in other.val_dataloader():
        losses.append(torch.nn.functional.cross_entropy(other(x), y).item())
        hits += (other(x).argmax(1) == y).sum().item()
    return sum(losses) / 2, hits / 40


@pytest.mark.parametrize("ckpt_path", [None, "run.ckpt"])
@pytest.mark.parametrize("which", [True, 3, "given"])
def test_statistics_gathered_anew_change_the_numbers_and_are_gone_after_it(which, ckpt_path):
    class Straight(Classifier):
        def __init__(self):
            super().__init__()
            self.net[3].p = 0.0  # so that the statistics do not depend on what dropout draws

        def train_dataloader(self):
            return DataLoader(images(64, 2), batch_size=8)

    trainer, model, callback = trained(7, Straight())
    trainer.save_checkpoint("run.ckpt")
    batches = list(DataLoader(images(64, 7), batch_size=8)) if which == "given" else list(model.train_dataloader())
    used = batches[:3] if which == 3 else batches
    before = everything(model)
    comparison = compare_weights(
        trainer, model, ckpt_path=ckpt_path, recalibrate_batch_norm=batches if which == "given" else which
    )
    for now, then in zip(everything(model), before, strict=True):
        assert same(now, then)
    plain = compare_weights(trainer, model, ckpt_path=ckpt_path)
    for weights in ("slow", "fast"):
        with callback.use_weights(weights):
            loss, accuracy = recalibrated(model, [p.detach().clone() for p in model.parameters()], used)
        logged = getattr(comparison, weights)
        assert math.isclose(logged["loss"], loss, rel_tol=1e-6)
        assert math.isclose(logged["accuracy"], accuracy, rel_tol=1e-6)
        assert logged["loss"] != getattr(plain, weights)["loss"]


def test_a_fresh_trainer_takes_the_training_data_of_the_data_module():
    class Data(LightningDataModule):
        def setup(self, stage):
            if stage == "fit":
                self.train = images(64, 2)

        def train_dataloader(self):
            return DataLoader(self.train, batch_size=8)

        def val_dataloader(self):
            return DataLoader(images(40, 3), batch_size=20)

    trained(7, Classifier())[0].save_checkpoint("run.ckpt")
    arguments = {"datamodule": Data(), "ckpt_path": "run.ckpt"}
    plain = compare_weights(make_trainer(limit_val_batches=1.0), Classifier(), **arguments)
    anew = compare_weights(make_trainer(limit_val_batches=1.0), Classifier(), **arguments, recalibrate_batch_norm=True)
    assert anew.slow["loss"] != plain.slow["loss"]


def test_what_cannot_be_recalibrated_says_so():
    trainer, model, _ = trained()
    with pytest.raises(ValueError, match="Regression has no BatchNorm"):
        compare_weights(trainer, model, recalibrate_batch_norm=True)
    for wrong in (-1, "all", None, 0.5):
        with pytest.raises(ValueError, match=f"recalibrate_batch_norm={wrong!r} is out of range"):
            compare_weights(trainer, model, recalibrate_batch_norm=wrong)
    trainer, model, _ = trained(model=Classifier())
    with pytest.raises(ValueError, match="no training batch"):
        compare_weights(trainer, model, recalibrate_batch_norm=[])
    model = Classifier()
    trainer = make_trainer(LookaheadCallback(k=3), max_steps=4, limit_val_batches=1.0)
    trainer.fit(model)
    trainer.save_checkpoint("run.ckpt")
    model.train_dataloader = Regression.__base__.train_dataloader.__get__(model)
    with pytest.raises(ValueError, match="gives no training data.*recalibrate_batch_norm=loader"):
        compare_weights(make_trainer(limit_val_batches=1.0), model, ckpt_path="run.ckpt", recalibrate_batch_norm=True)


class Frozen(Classifier):
    """Its second BatchNorm is in evaluation mode in training, too: it has statistics of its own."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.BatchNorm1d(4)
        self.frozen.running_mean.fill_(5.0)
        self.frozen.eval()

    def train(self, mode=True):
        super().train(mode)
        self.frozen.eval()
        return self

    def forward(self, x):
        return self.net(self.frozen(x + 5))


@pytest.mark.parametrize("ckpt_path", [None, "run.ckpt"])
def test_statistics_that_do_not_train_are_kept(ckpt_path):
    trainer, model, _ = trained(7, Frozen(), LookaheadCallback(k=3, recalibrate_batch_norm=True))
    trainer.save_checkpoint("run.ckpt")
    seen = []
    model.on_validation_epoch_end = lambda: seen.append(
        (model.frozen.running_mean.clone(), model.net[1].running_mean.clone())
    )
    compare_weights(trainer, model, ckpt_path=ckpt_path, recalibrate_batch_norm=True)
    assert all(torch.equal(frozen, torch.full((4,), 5.0)) for frozen, _ in seen)
    assert not torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][1], model.net[1].running_mean)
    seen.clear()
    model = Frozen()
    model.on_validation_epoch_end = lambda: seen.append(model.frozen.running_mean.clone())
    trained(7, model, LookaheadCallback(k=3, recalibrate_batch_norm=True), val_check_interval=3)
    assert seen
    assert all(torch.equal(frozen, torch.full((4,), 5.0)) for frozen in seen)


def test_a_recalibration_that_fails_leaves_the_layers_as_they_were():
    trainer, model, _ = trained(7, Classifier())
    before = everything(model)
    with pytest.raises(RuntimeError, match="shape"):
        compare_weights(trainer, model, recalibrate_batch_norm=[torch.ones(4, 4), torch.ones(4, 5)])
    assert model.net[1].momentum == 0.1
    for now, then in zip(everything(model), before, strict=True):
        assert same(now, then)


def test_batches_that_are_given_need_not_have_a_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from images(8, 2)

    trainer, model, _ = trained(7, Classifier())
    listed = compare_weights(trainer, model, recalibrate_batch_norm=DataLoader(list(Stream()), batch_size=8))
    assert compare_weights(trainer, model, recalibrate_batch_norm=DataLoader(Stream(), batch_size=8)) == listed


def test_no_more_training_data_are_used_than_in_training():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from images(8, 2)

    class Streaming(Classifier):
        calls = 0

        def train_dataloader(self):
            return DataLoader(Endless(), batch_size=8)

        def forward(self, x):
            self.calls += self.net.training
            return self.net(x)

    trainer, model, _ = trained(3, Streaming(), limit_train_batches=3)
    model.calls = 0
    compare_weights(trainer, model, recalibrate_batch_norm=True)
    assert model.calls == 2 * 3
