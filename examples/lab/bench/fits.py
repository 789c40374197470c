"""A Trainer that does nothing beside training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Callback


def trainer(device: str, callbacks: Sequence[Callback], **more: Any) -> Trainer:
    """One device, and nothing logged, shown or saved: their time would hide what is measured."""
    return Trainer(
        callbacks=list(callbacks),
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )
