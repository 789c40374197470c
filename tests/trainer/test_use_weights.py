"""Either set of weights within a fit and after it, and weights that are of another run."""

import contextlib

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lookahead import LookaheadCallback, compare_weights, load_weights
from tests.helpers.runs import Regression, both, equal, last_loss, make_trainer, reference


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
