"""What a checkpoint holds, whoever saves it and whenever."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_lookahead import LookaheadCallback, load_weights
from tests.helpers.runs import Regression, equal, fit, make_trainer, reference

WHERES = [
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_after_backward",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
]


class SaveIn(Callback):
    """Saves once, in the hook named, when four steps are done."""

    def __init__(self, where, **settings):
        self.saved = False

        def save(trainer, pl_module, *_):
            if trainer.global_step == 4 and not self.saved:
                self.saved = True
                before = pl_module.weights()
                trainer.save_checkpoint("saved.ckpt", **settings)
                assert equal(pl_module.weights(), before)

        setattr(self, where, save)


@pytest.mark.parametrize("where", WHERES)
@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
def test_each_set_is_in_its_place_wherever_the_checkpoint_is_saved(where, eval_weights):
    callback = LookaheadCallback(k=3, eval_weights=eval_weights)
    save = SaveIn(where)
    steps = 4 if where in {"on_train_end", "on_fit_end"} else 8
    make_trainer(save, callback, max_steps=steps, limit_val_batches=1).fit(Regression(batches=4))
    theta, phi = reference(4)
    held = torch.load("saved.ckpt", weights_only=True)["state_dict"].values()
    assert equal(held, phi if eval_weights == "slow" else theta)
    assert equal(load_weights("saved.ckpt", "fast").values(), theta)
    assert equal(load_weights("saved.ckpt", "slow").values(), phi)


def test_a_checkpoint_saved_between_forward_and_backward_disturbs_neither():
    class Saves(Regression):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.trainer.save_checkpoint("saved.ckpt")
            return loss

    module = Saves()
    make_trainer(LookaheadCallback(k=3), max_steps=5).fit(module)
    assert equal(module.weights(), reference(5)[1])
    assert equal(load_weights("saved.ckpt", "fast").values(), reference(4)[0])


@pytest.mark.parametrize("phase", ["training_step", "validation_step"])
def test_a_signal_handler_may_save(phase):
    callback = LookaheadCallback(k=3)

    class Signalled(Regression):
        def training_step(self, batch, batch_idx):
            if phase == "training_step" and self.trainer.global_step == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            if phase == "validation_step" and self.trainer.global_step == 4:
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().validation_step(batch, batch_idx)

    trainer = make_trainer(callback, max_steps=8, limit_val_batches=1, val_check_interval=2)
    previous = signal.signal(signal.SIGUSR1, lambda *_: trainer.save_checkpoint("saved.ckpt"))
    try:
        trainer.fit(Signalled())
    finally:
        signal.signal(signal.SIGUSR1, previous)
    assert equal(load_weights("saved.ckpt", "fast").values(), reference(4)[0])
    assert equal(load_weights("saved.ckpt", "slow").values(), reference(4)[1])


@pytest.mark.parametrize("where", ["on_train_batch_end", "on_validation_epoch_end", "on_fit_end"])
def test_a_checkpoint_of_weights_only_holds_phi(where):
    callback = LookaheadCallback(k=3)
    save = SaveIn(where, weights_only=True)
    make_trainer(callback, save, max_steps=4, limit_val_batches=1).fit(Regression(batches=4))
    checkpoint = torch.load("saved.ckpt", weights_only=True)
    assert equal(checkpoint["state_dict"].values(), reference(4)[1])
    assert "optimizer_states" not in checkpoint


def test_model_checkpoint_on_a_sync_batch_saves_after_the_sync():
    every = ModelCheckpoint(".", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    make_trainer(every, LookaheadCallback(k=3), max_steps=7).fit(Regression())
    for weights in ("slow", "fast"):
        assert equal(load_weights("step=3.ckpt", weights).values(), reference(3)[1])


def test_a_checkpoint_is_the_same_inside_use_weights_after_fit():
    callback, module = LookaheadCallback(k=3), Regression()
    trainer = make_trainer(callback, max_steps=4)
    trainer.fit(module)
    for index, weights in enumerate(("slow", "fast")):
        with callback.use_weights(weights):
            trainer.save_checkpoint(f"{index}.ckpt")
        assert equal(load_weights(f"{index}.ckpt", "fast").values(), reference(4)[0])
        assert equal(load_weights(f"{index}.ckpt", "slow").values(), reference(4)[1])
    resumed, again = Regression(), LookaheadCallback(k=3)
    make_trainer(again, max_steps=10).fit(resumed, ckpt_path="1.ckpt")
    assert equal(resumed.weights(), reference(10)[1])


def test_asynchronous_saving_writes_what_the_weights_were():
    every = ModelCheckpoint(".", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    make_trainer(every, LookaheadCallback(k=3), max_steps=8, plugins=[AsyncCheckpointIO()]).fit(Regression())
    for steps in range(1, 9):
        assert equal(load_weights(f"step={steps}.ckpt", "fast").values(), reference(steps)[0])
        assert equal(load_weights(f"step={steps}.ckpt", "slow").values(), reference(steps)[1])


class Custom(Regression):
    """Saves something made from its parameters."""

    def state_dict(self, *args, **kwargs):
        return {name: value.to(torch.float32) for name, value in super().state_dict(*args, **kwargs).items()}


def test_a_state_dict_that_is_computed_from_the_parameters_is_computed_from_phi():
    callback, module = LookaheadCallback(k=3), Custom()
    save = SaveIn("on_train_batch_end", weights_only=True)
    make_trainer(callback, save, max_steps=6).fit(module)
    held = torch.load("saved.ckpt", weights_only=True)["state_dict"].values()
    assert equal(held, [value.float() for value in reference(4)[1]])
    assert equal(module.weights(), reference(6)[1])


class Filtered(Regression):
    def state_dict(self, *args, **kwargs):
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "bias" not in name}


def test_a_state_dict_that_leaves_parameters_out_holds_copies_of_phi():
    callback, module = LookaheadCallback(k=3), Filtered()
    trainer = make_trainer(callback, max_steps=4)
    kept = {}

    class Keep(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 2:
                kept.update(trainer.strategy.lightning_module_state_dict())

    trainer.callbacks.append(Keep())
    trainer.fit(module)
    assert list(kept) == ["net.0.weight", "net.2.weight"]
    assert equal(kept.values(), reference(2)[1][::2])


def test_a_full_disk_loses_neither_the_weights_nor_the_run(monkeypatch):
    callback, module = LookaheadCallback(k=3), Regression()
    failed = []

    class Fails(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
                patch.setattr(torch, "save", full)
                trainer.save_checkpoint("full.ckpt")
            failed.append(trainer.global_step)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    make_trainer(callback, Fails(), max_steps=8, val_check_interval=2, limit_val_batches=1).fit(module)
    assert failed
    assert equal(module.weights(), reference(8)[1])


@pytest.mark.parametrize("eval_weights", ["slow", "fast"])
@pytest.mark.parametrize("held", ["slow", "fast"])
def test_a_checkpoint_saved_within_a_swap_holds_each_set_in_its_place(eval_weights, held):
    class Saving(Regression):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 4:
                with callback.use_weights(held):
                    self.trainer.save_checkpoint("inside.ckpt")

    callback = LookaheadCallback(k=3, eval_weights=eval_weights)
    fit(callback, Saving(batches=12))
    theta, phi = reference(5)
    assert equal(load_weights("inside.ckpt", "slow").values(), phi)
    assert equal(load_weights("inside.ckpt", "fast").values(), theta)
    resumed, _ = fit(LookaheadCallback(k=3, eval_weights=eval_weights), ckpt_path="inside.ckpt")
    assert equal(resumed.weights(), reference(8)[eval_weights == "slow"])


class Named(LookaheadCallback):
    """With a key of its own in checkpoints."""

    @property
    def state_key(self):
        return f"{type(self).__name__} of this project"


def test_a_state_key_of_a_subclass_is_the_key_in_a_checkpoint():
    _, trainer = fit(Named(k=3), max_steps=4)
    trainer.save_checkpoint("named.ckpt")
    saved = torch.load("named.ckpt", weights_only=True)
    assert saved["callbacks"]["Named of this project"]["optimizers"][0]["steps"] == 4
    whole = fit(Named(k=3), max_steps=8)[0]
    resumed = fit(Named(k=3), max_steps=8, ckpt_path="named.ckpt")[0]
    assert equal(resumed.parameters(), whole.parameters())


def test_a_trainer_that_has_only_validated_saves():
    trainer = make_trainer(Named(k=3))
    trainer.validate(Regression(), verbose=False)
    trainer.save_checkpoint("validated.ckpt")
    assert torch.load("validated.ckpt", weights_only=True)["callbacks"]["Named of this project"]["optimizers"] == []
