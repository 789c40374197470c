"""Weights read without a Trainer, and files that are not what they should be."""

import os
import pickle

import pytest
import torch

from lightning_lookahead import LookaheadCallback, load_weights
from tests.helpers.runs import Regression, checkpoint_after, equal, make_trainer, reference


def spoilt(kind):
    path = checkpoint_after(4)
    if kind == "truncated":
        with open(path, "r+b") as file:  # noqa: PTH123
            file.truncate(os.path.getsize(path) // 2)  # noqa: PTH202
    elif kind == "empty":
        open(path, "wb").close()  # noqa: PTH123
    elif kind == "text":
        with open(path, "w") as file:  # noqa: PTH123
            file.write("not a checkpoint")
    else:
        torch.save({"list": [1, 2]} if kind == "foreign" else [1, 2], path)
    return path


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "foreign", "list"])
def test_a_spoilt_file_gives_a_clear_error_and_leaves_the_model_as_it_was(kind):
    path = spoilt(kind)
    with pytest.raises(ValueError, match=f"{path} (cannot be read as a checkpoint|is no Lightning checkpoint)"):
        load_weights(path)
    module = Regression()
    before = module.weights()
    with pytest.raises(Exception):  # noqa: B017, PT011 (Lightning's and torch's own)
        make_trainer(LookaheadCallback(k=3), max_steps=8).fit(module, ckpt_path=path)
    assert equal(module.weights(), before)


class Renamed(Regression):
    def state_dict(self, *args, **kwargs):
        return {f"model.{name}": value for name, value in super().state_dict(*args, **kwargs).items()}


def test_load_weights_does_not_guess_names():
    path = checkpoint_after(4, Renamed)
    assert equal(load_weights(path, "slow").values(), reference(4)[1])
    with pytest.raises(ValueError, match="has no such name: the module saves its weights under names of its own"):
        load_weights(path, "fast")


def test_load_weights_says_what_a_file_lacks():
    with pytest.raises(FileNotFoundError):
        load_weights("nowhere.ckpt")
    with pytest.raises(ValueError, match="'mean' is unknown: give 'slow'"):
        load_weights(checkpoint_after(4), "mean")
    with pytest.raises(ValueError, match="saved without LookaheadCallback"):
        load_weights(checkpoint_after(4, callbacks=[]))
    trainer = make_trainer(LookaheadCallback(), max_steps=2)
    trainer.fit(Regression())
    trainer.save_checkpoint("light.ckpt", weights_only=True)
    with pytest.raises(ValueError, match="save_weights_only=True"):
        load_weights("light.ckpt")


def test_a_newer_version_is_refused_with_its_number():
    path = checkpoint_after(4)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["callbacks"]["LookaheadCallback"]["lookahead_version"] = 3
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="of version 3; this package reads version 2"):
        load_weights(path)
    with pytest.raises(ValueError, match="of version 3; this package reads version 2"):
        make_trainer(LookaheadCallback(k=3), max_steps=8).fit(Regression(), ckpt_path=path)


class Schedule:
    """A hyperparameter of one's own class."""


def test_load_weights_reads_hyperparameters_of_ones_own_classes_if_the_file_is_trusted():
    path = checkpoint_after(4)
    checkpoint = torch.load(path, weights_only=True)
    torch.save({**checkpoint, "hyper_parameters": {"schedule": Schedule}}, path)
    with pytest.raises(
        pickle.UnpicklingError, match=r"is whole.*test_load_weights.Schedule,.*weights_only=False.*safe_globals"
    ):
        load_weights(path)
    assert equal(load_weights(path, weights_only=False).values(), reference(4)[1])
