"""The weights that validation sees, and that they are gone again after it."""

import contextlib
import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from lightning_lookahead import LookaheadCallback, compare_weights, load_weights
from tests.helpers.classifier import Classifier, images
from tests.helpers.runs import Regression, both, equal, make_trainer, reference


def last_loss(weights):
    """Validation loss of `Regression` with these weights."""
    module = Regression()
    with torch.no_grad():
        for parameter, value in zip(module.net.parameters(), weights, strict=True):
            parameter.copy_(value)
    return module.loss(1000).item()


class Seen(Callback):
    """What the module holds in each of the hooks around a validation."""

    def __init__(self):
        self.weights = {}

    def record(self, hook, trainer, pl_module):
        self.weights.setdefault((hook, trainer.global_step), pl_module.weights())

    def on_validation_start(self, trainer, pl_module):
        self.record("on_validation_start", trainer, pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.record("on_validation_epoch_end", trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self.record("on_validation_end", trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.record("on_train_batch_end", trainer, pl_module)


@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
def test_validation_within_a_cycle_runs_on_the_chosen_weights_and_leaves_the_run_alone(eval_weights):
    hooks = {}

    class Watching(Regression):
        def on_validation_start(self):
            hooks.setdefault("start", []).append(self.weights())

        def on_validation_epoch_end(self):
            hooks.setdefault("epoch_end", []).append(self.weights())

        def on_validation_end(self):
            hooks.setdefault("end", []).append(self.weights())

    callback, module, losses = LookaheadCallback(k=3, eval_weights=eval_weights), Watching(batches=10), []

    class Losses(Callback):
        def on_validation_end(self, trainer, pl_module):
            losses.append(trainer.callback_metrics["val_loss"].item())

    make_trainer(callback, Losses(), max_epochs=1, val_check_interval=2, limit_val_batches=1).fit(module)
    for index, steps in enumerate((2, 4, 6, 8, 10)):
        theta, phi = reference(steps)
        expected = phi if eval_weights == "slow" else theta
        assert losses[index] == last_loss(expected)
        assert equal(hooks["start"][index], expected)
        assert equal(hooks["epoch_end"][index], expected)
        assert equal(hooks["end"][index], expected)
    assert equal(both(callback, module)[0], reference(10)[0])
    assert equal(both(callback, module)[1], reference(10)[1])


def test_every_callback_sees_the_slow_weights_wherever_it_stands_in_the_list():
    before, after, callback = Seen(), Seen(), LookaheadCallback(k=3)
    trainer = make_trainer(before, callback, after, max_epochs=1, limit_val_batches=1, num_sanity_val_steps=1)
    trainer.fit(Regression(batches=4))
    _, phi = reference(4)
    for seen in (before, after):
        assert equal(seen.weights["on_validation_start", 4], phi)
        assert equal(seen.weights["on_validation_epoch_end", 4], phi)
        assert equal(seen.weights["on_validation_end", 4], phi)
        assert equal(seen.weights["on_train_batch_end", 3], reference(3)[1])


def test_tensors_are_the_same_objects_after_validation():
    identity = []

    class Identity(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            identity.append([(id(p), p.data_ptr(), p.requires_grad) for p in pl_module.parameters()])

    trainer = make_trainer(LookaheadCallback(k=3), Identity(), max_steps=6, val_check_interval=1, limit_val_batches=1)
    trainer.fit(Regression())
    assert all(entry == identity[0] for entry in identity)


class Failing(Regression):
    """Raises in the validation after four steps."""

    error = ValueError

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if self.trainer.global_step == 4:
            if self.error is KeyboardInterrupt:
                os.kill(os.getpid(), signal.SIGINT)  # a real Ctrl-C
                while True:
                    pass
            raise self.error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_inside_validation_leaves_the_fast_weights_and_a_checkpoint_with_each_in_its_place(error):
    callback, module = LookaheadCallback(k=3), Failing()
    module.error = error
    trainer = make_trainer(
        OnExceptionCheckpoint(".", "failed"), callback, max_steps=9, val_check_interval=2, limit_val_batches=1
    )
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            trainer.fit(module)
    finally:
        signal.signal(signal.SIGINT, previous)
    theta, phi = reference(4)
    assert equal(module.weights(), theta)
    assert equal(both(callback, module)[1], phi)
    for weights, expected in (("fast", theta), ("slow", phi)):
        saved = load_weights("failed.ckpt", weights)
        assert equal(saved.values(), expected)
    resumed, again = Regression(), LookaheadCallback(k=3)
    make_trainer(again, max_steps=9).fit(resumed, ckpt_path="failed.ckpt")
    assert equal(resumed.weights(), reference(9)[1])


def test_step_hooks_are_removed_after_an_exception():
    callback, module = LookaheadCallback(k=3), Failing()
    trainer = make_trainer(callback, max_steps=9, val_check_interval=2, limit_val_batches=1)
    with pytest.raises(ValueError):  # noqa: PT011 (its own, without a message)
        trainer.fit(module)
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_the_best_checkpoint_validated_again_gives_the_logged_score():
    best = ModelCheckpoint(".", monitor="val_loss", save_top_k=1)
    module = Regression()
    make_trainer(LookaheadCallback(k=3), best, max_epochs=3, limit_val_batches=1).fit(module)
    fresh = Regression()
    with pytest.warns(UserWarning, match="Please add the following callbacks"):  # Lightning's, of LookaheadCallback
        (scores,) = make_trainer(limit_val_batches=1).validate(fresh, ckpt_path=best.best_model_path, verbose=False)
    assert scores["val_loss"] == best.best_model_score.item()


def test_validating_the_best_checkpoint_with_the_trainer_that_fitted_uses_its_weights():
    callback, best, module = LookaheadCallback(k=3), ModelCheckpoint(".", monitor="val_loss"), Regression()
    trainer = make_trainer(callback, best, max_epochs=3, limit_val_batches=1)
    trainer.fit(module)
    (scores,) = trainer.validate(module, ckpt_path="best", verbose=False)
    assert scores["val_loss"] == best.best_model_score.item()
    assert callback.slow_weights[0].steps == 15


@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
def test_two_sets_of_different_runs_are_never_mixed_after_other_weights_were_loaded(eval_weights):
    callback, module = LookaheadCallback(k=3, eval_weights=eval_weights), Regression()
    every = ModelCheckpoint(".", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(callback, every, max_steps=8, limit_val_batches=1)
    trainer.fit(module)
    left = module.weights()
    both(callback, module)  # nothing was loaded yet
    trainer.validate(module, ckpt_path="step=4.ckpt", verbose=False)
    loaded = module.weights()
    for ask in (callback.use_weights("slow").__enter__, lambda: compare_weights(trainer, module)):
        with pytest.raises(
            (RuntimeError, ValueError), match="does not hold the weights that the fit has left.*ckpt_path="
        ):
            ask()
    with pytest.warns(UserWarning, match="has one set of weights only: the module does not hold"):
        trainer.save_checkpoint("mixed.ckpt")
    assert equal(torch.load("mixed.ckpt", weights_only=True)["state_dict"].values(), loaded)
    with pytest.raises(ValueError, match="holds one set of weights"):
        load_weights("mixed.ckpt", "fast")
    module.load_state_dict(dict(zip(module.state_dict(), left, strict=True)))  # those of the fit again
    assert equal(both(callback, module)[0], reference(8)[0])


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 5:
            raise KeyboardInterrupt


def load_by_swap(callback, trainer, module):
    with callback.use_weights("fast"):
        trainer.validate(module, ckpt_path="step=4.ckpt", verbose=False)


def change_places(_, __, module):
    with torch.no_grad():  # of two hidden units: the network computes what it did
        for parameter, dim in ((module.net[0].weight, 0), (module.net[0].bias, 0), (module.net[2].weight, 1)):
            parameter.copy_(parameter.flip(dim))


def assign(_, __, module):
    other = {name: value + 1 for name, value in module.state_dict().items()}
    module.load_state_dict(other, assign=True)


OTHERS = [lambda _, trainer, module: trainer.validate(module, ckpt_path="step=4.ckpt", verbose=False)]
OTHERS += [load_by_swap, change_places, assign]


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("load", OTHERS, ids=["validate", "within use_weights", "units change places", "assign"])
def test_other_weights_are_noticed_however_they_came_and_however_the_fit_ended(load, stopped):
    callback, module = LookaheadCallback(k=3), Regression()
    every = ModelCheckpoint(".", "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(callback, every, *([Stop()] if stopped else []), max_steps=8, limit_val_batches=1)
    with pytest.raises((KeyboardInterrupt, SystemExit)) if stopped else contextlib.nullcontext():
        trainer.fit(module)
    both(callback, module)
    load(callback, trainer, module)
    with pytest.raises(RuntimeError, match="does not hold the weights that the fit has left"):
        both(callback, module)
    with pytest.warns(UserWarning, match="has one set of weights only"):
        trainer.save_checkpoint("mixed.ckpt")
    with pytest.raises(ValueError, match="holds one set of weights"):
        load_weights("mixed.ckpt", "fast")


def test_use_weights_inside_validation_and_after_an_exception():
    callback, module = LookaheadCallback(k=3), Regression()
    shown = {}

    class Look(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            with callback.use_weights("fast"):
                shown["fast"] = pl_module.weights()
            shown["slow"] = pl_module.weights()

    make_trainer(callback, Look(), max_steps=5, limit_val_batches=1).fit(module)
    assert equal(shown["fast"], reference(5)[0])
    assert equal(shown["slow"], reference(5)[1])
    held = module.weights()
    with pytest.raises(ZeroDivisionError), callback.use_weights("fast"):
        raise ZeroDivisionError
    assert equal(module.weights(), held)


def test_use_weights_before_any_fit_says_so():
    with pytest.raises(RuntimeError, match="from the start of a fit on"), LookaheadCallback().use_weights("slow"):
        pass
    with pytest.raises(ValueError, match="'best' is unknown"), LookaheadCallback().use_weights("best"):
        pass


def test_validating_after_fit_uses_the_weights_that_were_asked_for():
    callback, module = LookaheadCallback(k=3), Regression()
    trainer = make_trainer(callback, max_steps=8, limit_val_batches=1)
    trainer.fit(module)
    for weights, expected in zip(("fast", "slow"), reference(8), strict=True):
        with callback.use_weights(weights):
            (scores,) = trainer.validate(module, verbose=False)
        assert scores["val_loss"] == last_loss(expected)
    assert equal(module.weights(), reference(8)[1])


class Broken(LightningDataModule):
    def setup(self, stage):
        raise OSError


def test_what_fails_after_a_fit_leaves_phi_in_the_module():
    class FailsAtTheEnd(Callback):
        def on_fit_end(self, trainer, pl_module):
            raise OSError

    callback, module = LookaheadCallback(k=3), Regression()
    trainer = make_trainer(callback, max_steps=4)
    trainer.fit(module)
    phi = reference(4)[1]
    with pytest.raises(OSError):  # noqa: PT011
        trainer.fit(module, datamodule=Broken())
    assert equal(module.weights(), phi)
    with pytest.raises(OSError):  # noqa: PT011
        trainer.validate(module, datamodule=Broken())
    assert equal(module.weights(), phi)
    other = Regression()
    with pytest.raises(OSError):  # noqa: PT011
        make_trainer(LookaheadCallback(k=3), FailsAtTheEnd(), max_steps=4).fit(other)
    assert equal(other.weights(), phi)


# -- BatchNorm statistics gathered anew


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
