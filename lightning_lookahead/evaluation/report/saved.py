"""What a checkpoint says of the outer loop, without the values of its tensors and without the module's class."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lightning_lookahead.checkpointing import callback_state, read_checkpoint
from lightning_lookahead.outer_loop.saved_format import GROUP_SETTINGS
from lightning_lookahead.outer_loop.settings import Settings

from .logs import record_of

if TYPE_CHECKING:
    from pathlib import Path

    from lightning_lookahead.evaluation.records import Record

DEFAULTS: dict[str, Any] = {
    **{option.name: option.default for option in fields(Settings) if option.metadata.get("saved", True)},
    "eval_weights": "slow",
    "exclude": [],
    "sync_optimizers": "independently",
    "share_gradients": True,
}
"""The settings that a checkpoint holds, with the defaults of `LookaheadCallback`."""


@dataclass(frozen=True)
class Loop:
    """The counts of one optimizer's outer loop.

    Attributes:
        steps: Inner steps taken.
        syncs: Syncs, of the first cycle.
        steps_since_sync: Inner steps since the last sync, of the first cycle.
        trained: How many parameters have slow weights; ``None`` if the file does not say.
        saved_with: The set of weights that the checkpoint's ``state_dict`` holds.
        groups: The settings of param groups that have their own.
    """

    steps: int
    syncs: int
    steps_since_sync: int
    trained: int | None
    saved_with: str
    groups: list[dict[str, Any]]


@dataclass(frozen=True)
class Saved:
    """A checkpoint.

    Attributes:
        name: Its path in the run.
        epoch: Lightning's count of epochs.
        global_step: Lightning's count of steps.
        lightning: The version of Lightning that wrote it.
        settings: Settings of the callback; those that the file does not name have their defaults.
        loops: The outer loop of each optimizer.
        history: The monitor's records.
    """

    name: str
    epoch: object
    global_step: object
    lightning: object
    settings: dict[str, Any]
    loops: list[Loop]
    history: list[Record]

    @property
    def steps(self) -> int:
        """Inner steps taken; of several optimizers the largest number."""
        return max((loop.steps for loop in self.loops), default=0)


def read_saved(path: Path, name: str) -> Saved:
    """Read a checkpoint, a file or a folder of shards.

    Raises:
        ValueError: If it is damaged or was saved without the callback.
        pickle.UnpicklingError: If it holds objects that ``weights_only=True`` does not allow.
    """
    checkpoint = read_checkpoint(path, weights_only=True, values=False)
    try:
        return _saved(checkpoint, name)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        message = f"{name} has a damaged structure ({type(error).__name__}: {error}). Take another checkpoint."
        raise ValueError(message) from error


def _saved(checkpoint: dict[str, Any], name: str) -> Saved:
    state = callback_state(checkpoint, name)
    if state is None:
        message = f"{name} has no state of LookaheadCallback: it was saved without it, or with save_weights_only=True."
        raise ValueError(message)
    groups = [_groups(optimizer) for optimizer in checkpoint.get("optimizer_states", [])]
    return Saved(
        name,
        checkpoint.get("epoch"),
        checkpoint.get("global_step"),
        checkpoint.get("pytorch-lightning_version"),
        {option: _plain(state.get(option, default)) for option, default in DEFAULTS.items()},
        [
            Loop(
                own["steps"],
                own["syncs"],
                own["steps_since_sync"],
                len(own["trained"]) if "trained" in own else None,
                own.get("saved_with", state["eval_weights"]),
                groups[at] if at < len(groups) else [],
            )
            for at, own in enumerate(state["optimizers"])
        ],
        [record_of(*values) for values in state.get("monitor", {}).get("history", [])],
    )


def _plain(value: Any) -> Any:
    """A setting as it is, or its text if it is of no kind that a setting has: a tensor cannot be compared."""
    names = isinstance(value, list) and all(isinstance(name, str) for name in value)
    return value if names or value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _groups(optimizer: dict[str, Any]) -> list[dict[str, Any]]:
    groups = (
        {key: group[key] for key in GROUP_SETTINGS if key in group} for group in optimizer.get("param_groups", [])
    )
    return [group for group in groups if group]
