"""The weights that validation sees, and that they are gone again after it."""

import os
import signal

import pytest
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from lightning_lookahead import LookaheadCallback, load_weights
from tests.helpers.runs import Regression, Seen, both, equal, last_loss, make_trainer, reference


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
