"""Lookahead (Zhang, Lucas, Hinton, Ba 2019) for PyTorch Lightning: k steps forward, 1 step back.

The names are imported when they are first used, so that a plain PyTorch loop with `SlowWeights` does not pay for
importing Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_lookahead.checkpointing import load_weights, newest_checkpoint
    from lightning_lookahead.evaluation.monitor import InnerOuterMonitor
    from lightning_lookahead.evaluation.plotting import plot_inner_outer
    from lightning_lookahead.evaluation.records import InnerLoop, Record, inner_loops
    from lightning_lookahead.outer_loop.adaptive import AdaptiveAlpha
    from lightning_lookahead.outer_loop.schedules import Cosine, Linear
    from lightning_lookahead.outer_loop.slow_weights import SlowWeights
    from lightning_lookahead.trainer.callback import LookaheadCallback
    from lightning_lookahead.trainer.cli import LookaheadCLI
    from lightning_lookahead.trainer.comparison import Comparison, compare_weights

__all__ = [
    "AdaptiveAlpha",
    "Comparison",
    "Cosine",
    "InnerLoop",
    "InnerOuterMonitor",
    "Linear",
    "LookaheadCLI",
    "LookaheadCallback",
    "Record",
    "SlowWeights",
    "compare_weights",
    "inner_loops",
    "load_weights",
    "newest_checkpoint",
    "plot_inner_outer",
]

_NAMES = {
    "checkpointing": "load_weights newest_checkpoint",
    "evaluation.monitor": "InnerOuterMonitor",
    "evaluation.plotting": "plot_inner_outer",
    "evaluation.records": "InnerLoop Record inner_loops",
    "outer_loop.adaptive": "AdaptiveAlpha",
    "outer_loop.schedules": "Cosine Linear",
    "outer_loop.slow_weights": "SlowWeights",
    "trainer.callback": "LookaheadCallback",
    "trainer.cli": "LookaheadCLI",
    "trainer.comparison": "Comparison compare_weights",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
