"""`load_weights`: either set of weights out of a checkpoint, a file or a folder of shards, without a Trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from lightning_lookahead._carried import ENTRIES, Weights
from lightning_lookahead._checks import check_saved, check_weights

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from torch import Tensor

_MODELS = ("state_dict.", "model.")  # where ModelParallelStrategy and FSDPStrategy keep the model among the shards


def load_weights(
    path: str | os.PathLike[str], weights: Weights = "slow", *, weights_only: bool = True
) -> dict[str, Tensor]:
    """Read one set of weights out of a checkpoint file, without a Trainer.

    Args:
        path: A checkpoint that a run with `LookaheadCallback` saved: a file, or a folder of shards.
        weights: ``"slow"`` (phi, what the algorithm returns) or ``"fast"`` (theta, where the inner optimizer was).
        weights_only: As in `torch.load`. ``False`` runs code from the file: only for files that you trust.

    Returns:
        Parameter and buffer names -> tensors on the CPU, for ``module.load_state_dict``. The ``_orig_mod.`` that
        ``torch.compile`` puts into names is left out: load first, compile then.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, no Lightning checkpoint, was made without the callback, or does not hold
            both sets (``save_weights_only=True``).

    Example::

        model.load_state_dict(load_weights("run.ckpt", "slow"))
    """
    check_weights(weights)
    found = weights_in(read_checkpoint(path, weights_only=weights_only), weights, path)
    return {name.replace("_orig_mod.", ""): value for name, value in found.items()}


def weights_in(checkpoint: dict[str, Any], weights: Weights, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """One set of weights out of a checkpoint that was read from ``path``, under the names of its ``state_dict``.

    Raises:
        ValueError: If the checkpoint does not hold both sets.
    """
    saved = _callback_state(checkpoint, path)
    # WeightAveraging puts its average in the place of what the module held, and that beside it.
    state_dict = dict(checkpoint.get("current_model_state", checkpoint["state_dict"]))
    if weights == saved["eval_weights"]:
        return state_dict
    for counters, names in zip(saved["optimizers"], saved.get("statistics", []), strict=False):
        state_dict.update(zip(names, counters.get("statistics", {}).get(weights, []), strict=False))
    for optimizer_state, names in zip(checkpoint["optimizer_states"], saved["names"], strict=True):
        for aliases, value in _others(optimizer_state, [*names, *saved["tied"]], f"lookahead_{weights}"):
            known = [name for name in aliases if name in state_dict]
            if not known:
                message = (
                    f"{path} has {weights} weights of {aliases or ['a parameter without a name']}, but its"
                    " 'state_dict' has no such name: the module saves its weights under names of its own. Load the"
                    f" checkpoint in a Trainer and take callback.use_weights({weights!r})."
                )
                raise ValueError(message)
            state_dict.update(dict.fromkeys(known, value))
    return state_dict


def _others(optimizer_state: dict[str, Any], names: list[list[str]], entry: str) -> Iterator[tuple[list[str], Tensor]]:
    """The set that an optimizer's state carries: all names of each parameter, and its value."""
    state = optimizer_state["state"]
    if "param_groups" in optimizer_state:
        keys = [key for group in optimizer_state["param_groups"] for key in group["params"]]
        aliases = dict(zip(keys, names, strict=False))
    else:  # shards name the parameters, each by one of its names
        aliases = {name: own for own in names for name in own}
    return ((aliases.get(key, [key]), own[entry]) for key, own in state.items() if entry in own)


def _read_shards(path: Path, *, weights_only: bool) -> dict[str, Any]:
    """Put a folder of shards together as if it were one file, with nothing of the optimizers but what they carry."""
    checkpoint: dict[str, Any] = torch.load(path / "meta.pt", map_location="cpu", weights_only=weights_only)
    reader = FileSystemReader(path)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and (name.startswith(_MODELS) or name.endswith(tuple(ENTRIES)))
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it should be here
        load_shards(tensors, storage_reader=reader, no_dist=True)
    checkpoint["state_dict"] = {}
    states: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if name.startswith(_MODELS):
            checkpoint["state_dict"][rest] = tensor
        else:  # optimizer_0.state.NAME.lookahead_fast
            parameter, _, entry = rest.removeprefix("state.").rpartition(".")
            states.setdefault(part, {})[parameter] = {entry: tensor}
    checkpoint["optimizer_states"] = [{"state": states[part]} for part in sorted(states)]
    return checkpoint


def read_checkpoint(path: str | os.PathLike[str], *, weights_only: bool) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: a file, or of a folder of shards the weights and what the optimizers carry."""
    if not Path(path).exists():
        message = f"{path} does not exist."
        raise FileNotFoundError(message)
    try:
        if Path(path).is_dir():
            checkpoint = _read_shards(Path(path), weights_only=weights_only)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        hint = "it holds objects other than tensors, or it is cut short or damaged" if weights_only else "is it whole?"
        message = (
            f"{path} cannot be read as a checkpoint: {hint} ({type(error).__name__}). A checkpoint with objects of"
            " your own classes (hyperparameters, say) can be read with weights_only=False if you trust it."
        )
        raise ValueError(message) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        message = f"{path} is no Lightning checkpoint: it has no 'state_dict'. Give a file that a Trainer saved."
        raise ValueError(message)  # noqa: TRY004 (the argument is a path; what is wrong is in the file)
    return checkpoint


def _callback_state(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and "lookahead_version" in state:
            check_saved(state, path)
            if state["optimizers"] and "names" in state and "optimizer_states" in checkpoint:
                return state
    message = (
        f"{path} holds one set of weights and does not say which: it was saved without LookaheadCallback, before"
        " training began, or with save_weights_only=True. Use torch.load(path)['state_dict'] for the weights that it"
        " has, or save whole checkpoints."
    )
    raise ValueError(message)
