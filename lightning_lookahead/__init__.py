"""Lookahead (Zhang, Lucas, Hinton, Ba 2019) for PyTorch Lightning: k steps forward, 1 step back.

The names are imported when they are first used, so that a plain PyTorch loop with `SlowWeights` does not pay for
importing Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .checkpointing import load_weights as load_weights, newest_checkpoint as newest_checkpoint
    from .evaluation.monitor import InnerOuterMonitor as InnerOuterMonitor
    from .evaluation.plotting import plot_inner_outer as plot_inner_outer
    from .evaluation.records import InnerLoop as InnerLoop, Record as Record, inner_loops as inner_loops
    from .evaluation.report.command import write_report as write_report
    from .outer_loop.adaptive import AdaptiveAlpha as AdaptiveAlpha
    from .outer_loop.schedules import Cosine as Cosine, Linear as Linear
    from .outer_loop.slow_weights import SlowWeights as SlowWeights
    from .trainer.callback import LookaheadCallback as LookaheadCallback
    from .trainer.cli import LookaheadCLI as LookaheadCLI
    from .trainer.comparison import Comparison as Comparison, compare_weights as compare_weights

__version__ = "0.1.0"

_NAMES = {
    "checkpointing": "load_weights newest_checkpoint",
    "evaluation.monitor": "InnerOuterMonitor",
    "evaluation.plotting": "plot_inner_outer",
    "evaluation.records": "InnerLoop Record inner_loops",
    "evaluation.report.command": "write_report",
    "outer_loop.adaptive": "AdaptiveAlpha",
    "outer_loop.schedules": "Cosine Linear",
    "outer_loop.slow_weights": "SlowWeights",
    "trainer.callback": "LookaheadCallback",
    "trainer.cli": "LookaheadCLI",
    "trainer.comparison": "Comparison compare_weights",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)  # noqa: PLE0605 (a list of names)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
