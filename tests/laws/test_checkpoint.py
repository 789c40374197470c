"""A checkpoint beside one of the run without the callback: nothing of ours but in our own place."""

import pytest
import torch

from lightning_lookahead import LookaheadCallback
from tests.cases import CASES
from tests.helpers.modes import every_step, fit, options_of, saved


def layout(value):
    """The keys and types of nested dicts and lists, and the shapes and types of tensors."""
    if isinstance(value, dict):
        return {key: layout(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [layout(inner) for inner in value]
    return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)


@pytest.mark.parametrize("name", CASES)
def test_it_is_laid_out_as_without_us_and_trains_on_without_us(name):
    fit(name, LookaheadCallback(**options_of(name)), every_step("ours"))
    fit(name, every_step("plain"))
    for paths in list(zip(saved("ours"), saved("plain"), strict=True))[2:5]:
        ours, plain = (torch.load(path, weights_only=True) for path in paths)
        assert ours.keys() == plain.keys()
        assert ours["callbacks"].keys() == {*plain["callbacks"], "LookaheadCallback"}
        for part in ("state_dict", "lr_schedulers", "epoch", "global_step"):
            assert layout(ours[part]) == layout(plain[part]), part
        if "reset" not in CASES[name].options.values():  # which empties it
            assert layout(ours["optimizer_states"]) == layout(plain["optimizer_states"])
    with pytest.warns(UserWarning, match="Please add the following callbacks"):
        trainer, module = fit(name, ckpt_path=saved("ours")[4])
    assert all(value.isfinite().all() for value in module.state_dict().values())
    trainer.save_checkpoint("on.ckpt")
    for state in torch.load("on.ckpt", weights_only=True)["optimizer_states"]:
        assert state.keys() == {"state", "param_groups"}
        assert not any("lookahead" in key for own in state["state"].values() for key in own)
