"""Checkpoints without a Trainer, files and folders of shards: to load one set of weights, to find the newest."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

from ._damage import damaged_part, forbidden_class, is_archive, is_whole, what_is_damaged
from .outer_loop.names import bare
from .outer_loop.saved_format import SHARDS, Weights, check_saved, check_weights, slow_dtype, upgrade, without_words
from .outer_loop.settings import dtype_of
from .outer_loop.shards import KEY, listed
from .outer_loop.tensors import checksum

if TYPE_CHECKING:
    import os

    from torch import Tensor

_MODELS = ("state_dict.", "model.")  # where ModelParallelStrategy and FSDPStrategy keep the model among the shards


def load_weights(
    path: str | os.PathLike[str], weights: Weights = "slow", *, weights_only: bool = True
) -> dict[str, Tensor]:
    """Read one set of weights out of a checkpoint file, without a Trainer.

    The weights are compared with the checksums in the file.

    Args:
        path: A checkpoint that a run with `LookaheadCallback` saved: a file, or a folder of shards.
        weights: ``"slow"`` (phi, what the algorithm returns) or ``"fast"`` (theta, where the inner optimizer was).
        weights_only: As in `torch.load`. ``False`` runs code from the file: only for files that you trust. The list of
            a folder of shards, ``.metadata``, is a pickle that torch reads either way: a folder has to be trusted.

    Returns:
        Parameter and buffer names -> tensors on the CPU, for ``module.load_state_dict``. The ``_orig_mod.`` that
        ``torch.compile`` puts into names is left out: load first, compile then.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the path is empty, or the file is damaged, no Lightning checkpoint, made without the callback, or
            does not hold both sets (``save_weights_only=True``).
        pickle.UnpicklingError: If it is whole and holds objects that ``weights_only=True`` does not allow; the message
            names the first one's class.

    Example::

        model.load_state_dict(load_weights("run.ckpt", "slow"))
    """
    check_weights(weights)
    found = weights_in(read_checkpoint(path, weights_only=weights_only), weights, path)
    return {name.replace("_orig_mod.", ""): value for name, value in found.items()}


def newest_checkpoint(folder: str | os.PathLike[str], pattern: str = "*.ckpt") -> Path | None:
    """Find the newest whole checkpoint in a folder, to go on from after a kill.

    A damaged one is passed over: a file whose end or one of whose parts is missing or altered, a folder of shards
    without its list or with a shard that is missing or too short. A whole file counts whatever objects it holds:
    nothing in it is run. The list of a folder of shards is a pickle, and torch runs what that says: look for such
    folders only where you trust them.

    Args:
        folder: Where to look, subfolders left out.
        pattern: A glob pattern of names.

    Returns:
        Its path; ``None`` if there is none.

    Raises:
        FileNotFoundError: If there is no such folder.

    Example::

        trainer.fit(model, ckpt_path=newest_checkpoint("checkpoints"))
    """
    _check_there(folder, "folder", "a folder of checkpoints")
    there = (path for path in Path(folder).glob(pattern) if path.exists())  # a link may lead nowhere
    by_age = sorted(there, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in by_age if is_whole(path)), None)


def weights_in(checkpoint: dict[str, Any], weights: Weights, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """One set of weights out of a checkpoint that was read from ``path``, under the names of its ``state_dict``.

    Raises:
        ValueError: If the checkpoint does not hold both sets, or is damaged.
    """
    try:
        return _weights_in(checkpoint, weights, path)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        message = f"{path} has a damaged structure ({type(error).__name__}: {error}). Take another checkpoint."
        raise ValueError(message) from error


def _weights_in(checkpoint: dict[str, Any], weights: Weights, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    saved = _callback_state(checkpoint, path)
    # WeightAveraging saves its average as the state_dict, and what the module held beside it.
    state_dict = dict(checkpoint.get("current_model_state", checkpoint["state_dict"]))
    spelt = {bare(name): name for name in state_dict}
    aliases = {name: names for names in saved.get("aliases", []) for name in names}
    for at, state in enumerate(saved["optimizers"]):
        own = {**state, **_in_shards(checkpoint, at)}
        sums = own.get("checksums", {})
        beside = {name: state_dict[spelt[name]] for name in sums.get(own["saved_with"], {}) if name in spelt}
        for which, part in own.get("weights", {}).items():
            if which != own["saved_with"]:
                _check_values(part, sums.get(which, {}), path)
        _check_values(beside, sums.get(own["saved_with"], {}), path, others_may_change=True)
        dtypes = {
            name: slow_dtype(value.dtype, dtype_of(own.get("slow_dtype"))) for name, value in _tensors(state_dict)
        }
        dtypes = {bare(name): dtype for name, dtype in dtypes.items()}
        parts = without_words(own.get("weights", {}), dtypes), own.get("statistics", {})
        for name, value in (item for part in parts for item in part.get(weights, {}).items()):
            known = [spelt[alias] for alias in aliases.get(name, [name]) if alias in spelt]
            if not known:
                message = (
                    f"{path} has {weights} weights of {name!r}, but its 'state_dict' has no such name: the module saves"
                    " its weights under names of its own. Load the checkpoint in a Trainer and take"
                    f" callback.use_weights({weights!r})."
                )
                raise ValueError(message)
            state_dict.update(dict.fromkeys(known, value))
    return state_dict


def _tensors(state_dict: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in state_dict.items() if isinstance(value, torch.Tensor)]


def _in_shards(checkpoint: dict[str, Any], at: int) -> dict[str, Any]:
    """An outer loop's tensors in the state of the first optimizer, in a folder or in a file that was made of one."""
    first: dict[str, Any] = next(iter(checkpoint.get("optimizer_states", [])), {})
    own: dict[str, Any] = first.get(SHARDS, {}).get(str(at), {})
    return own


def _check_values(
    values: dict[str, Any], sums: dict[str, int], path: str | os.PathLike[str], *, others_may_change: bool = False
) -> None:
    """Raise if a value lacks its checksum; with ``others_may_change`` only if the file itself is damaged, too."""
    wrong = next((name for name, value in values.items() if name in sums and checksum(value) != sums[name]), None)
    if wrong is None or (others_may_change and (Path(path).is_dir() or damaged_part(path) is None)):
        return
    message = f"{path} is damaged: {wrong!r} does not have the values that it was saved with. Take another checkpoint."
    raise ValueError(message)


def _read_shards(path: Path, *, weights_only: bool, values: bool) -> dict[str, Any]:
    """Put a folder of shards together as one file, of the optimizers only the outer loops' tensors."""
    checkpoint: dict[str, Any] = torch.load(path / "meta.pt", map_location="cpu", weights_only=weights_only)
    if not values:
        return {**checkpoint, "state_dict": {}}
    reader = FileSystemReader(path)
    entries = {
        name: entry
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and name.startswith(_MODELS)
    }
    ours = {".".join((*KEY, *keys)): (keys, entry) for keys, entry in listed(path).items()}
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in {**entries, **{name: entry for name, (_, entry) in ours.items()}}.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # on purpose
        load_shards(tensors, storage_reader=reader, no_dist=True)
    states: dict[str, Any] = {}
    for full, ((at, part, entry, name), _) in ours.items():
        states.setdefault(at, {}).setdefault(part, {}).setdefault(entry, {})[name] = tensors[full]
    checkpoint["state_dict"] = {name.partition(".")[2]: tensors[name] for name in entries}
    checkpoint["optimizer_states"] = [{SHARDS: states}]
    return checkpoint


def _check_there(path: str | os.PathLike[str], name: str, what: str) -> None:
    if not str(path):
        message = f"{name} is empty: give the path of {what}."
        raise ValueError(message)
    if not Path(path).exists():
        message = f"{name}={str(path)!r} does not exist: give the path of {what}."
        raise FileNotFoundError(message)


def read_checkpoint(path: str | os.PathLike[str], *, weights_only: bool, values: bool = True) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: a file, or a folder of shards without the optimizers' own state.

    Args:
        path: The file or the folder.
        weights_only: As in `torch.load`.
        values: Whether to read the values of tensors. ``False``: a file is mapped, a folder's ``state_dict`` empty.
    """
    _check_there(path, "path", "a checkpoint")
    try:
        if Path(path).is_dir():
            checkpoint = _read_shards(Path(path), weights_only=weights_only, values=values)
        else:
            # Of the parts only the names are checked here: the tensors have checksums of ours.
            if is_archive(path) and damaged_part(path, "/data.pkl"):
                raise zipfile.BadZipFile  # noqa: TRY301 (reported below like other damage)
            mapped = (not values and is_archive(path)) or None  # None: as torch is set
            loaded = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mapped)
            checkpoint = _as_a_trainer_writes(loaded)
    except Exception as error:
        forbidden = forbidden_class(error) if weights_only else None
        file = Path(path) / "meta.pt" if Path(path).is_dir() else Path(path)
        if forbidden is not None and not (is_archive(file) and damaged_part(file)):
            what, way = forbidden
            message = (
                f"{path} is whole, and holds {what}, which weights_only=True does not allow. If you trust the file,"
                f" read it with weights_only=False{way}."
            )
            raise pickle.UnpicklingError(message) from error
        message = (
            f"{path} cannot be read as a checkpoint: {what_is_damaged(file)} ({type(error).__name__}: {error}). Take"
            " another one: newest_checkpoint(folder) finds the newest that is whole."
        )
        raise ValueError(message) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        message = f"{path} is no Lightning checkpoint: it has no 'state_dict'. Give a file that a Trainer saved."
        raise ValueError(message)  # noqa: TRY004 (the argument is a path; what is wrong is in the file)
    return checkpoint


def _as_a_trainer_writes(checkpoint: Any) -> Any:
    """A checkpoint with a Trainer's keys: Fabric's tool, which makes a file of a folder, leaves the folder's keys."""
    if isinstance(checkpoint, dict):
        if "state_dict" not in checkpoint and "model" in checkpoint:
            checkpoint["state_dict"] = checkpoint.pop("model")
        if "optimizer_states" not in checkpoint and KEY[0] in checkpoint:
            checkpoint["optimizer_states"] = [checkpoint.pop(KEY[0])]
    return checkpoint


def callback_state(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The state of `LookaheadCallback` in a checkpoint that was read from ``path``; ``None`` if there is none.

    Raises:
        ValueError: If it is damaged, or in a newer format.
    """
    callbacks = checkpoint.get("callbacks", {})
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if isinstance(state, dict) and "lookahead_version" in state:
            upgrade(checkpoint, state)
            check_saved(state, path)
            return state
    return None


def _callback_state(checkpoint: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    state = callback_state(checkpoint, path)
    if state is not None and state["optimizers"] and all("saved_with" in own for own in state["optimizers"]):
        return state
    message = (
        f"{path} holds one set of weights and does not say which: it was saved without LookaheadCallback, before"
        " training began, or with save_weights_only=True. Use torch.load(path)['state_dict'] for the weights that it"
        " has, or save whole checkpoints."
    )
    raise ValueError(message)
