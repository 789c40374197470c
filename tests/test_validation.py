"""The weights that validation sees, and that they are gone again after it."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from runs import Regression, both, equal, make_trainer, reference

from lightning_lookahead import LookaheadCallback, load_weights


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
        assert equal(hooks["end"][index], theta)
    assert equal(both(callback, module)[0], reference(10)[0])
    assert equal(both(callback, module)[1], reference(10)[1])


def test_every_callback_sees_the_slow_weights_wherever_it_stands_in_the_list():
    before, after, callback = Seen(), Seen(), LookaheadCallback(k=3)
    trainer = make_trainer(before, callback, after, max_epochs=1, limit_val_batches=1, num_sanity_val_steps=1)
    trainer.fit(Regression(batches=4))
    theta, phi = reference(4)
    for seen in (before, after):
        assert equal(seen.weights["on_validation_start", 4], phi)
        assert equal(seen.weights["on_validation_epoch_end", 4], phi)
        assert equal(seen.weights["on_validation_end", 4], theta)
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
    previous = signal.getsignal(signal.SIGINT)
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


def test_validating_the_best_checkpoint_with_the_trainer_that_fitted_uses_its_weights_and_keeps_both_sets():
    callback, best, module = LookaheadCallback(k=3), ModelCheckpoint(".", monitor="val_loss"), Regression()
    trainer = make_trainer(callback, best, max_epochs=3, limit_val_batches=1)
    trainer.fit(module)
    theta = both(callback, module)[0]
    (scores,) = trainer.validate(module, ckpt_path="best", verbose=False)
    assert scores["val_loss"] == best.best_model_score.item()
    assert equal(both(callback, module)[0], theta)
    assert callback.slow_weights[0].steps == 15


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
