"""Lookahead (Zhang, Lucas, Hinton, Ba 2019) for PyTorch Lightning: k steps forward, 1 step back.

The names are imported when they are first used, so that a plain PyTorch loop with `SlowWeights` does not pay for
importing Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_lookahead._records import InnerLoop, Record, inner_loops
    from lightning_lookahead.adaptive import AdaptiveAlpha
    from lightning_lookahead.callback import LookaheadCallback
    from lightning_lookahead.checkpointing import load_weights, newest_checkpoint
    from lightning_lookahead.cli import LookaheadCLI
    from lightning_lookahead.comparison import Comparison, compare_weights
    from lightning_lookahead.monitor import InnerOuterMonitor
    from lightning_lookahead.plotting import plot_inner_outer
    from lightning_lookahead.slow_weights import SlowWeights
    from lightning_lookahead.step_size import Constant, Cosine, Linear

__all__ = [
    "AdaptiveAlpha",
    "Comparison",
    "Constant",
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

_MODULES = {
    "AdaptiveAlpha": "adaptive",
    "Comparison": "comparison",
    "Constant": "step_size",
    "Cosine": "step_size",
    "InnerLoop": "_records",
    "InnerOuterMonitor": "monitor",
    "Linear": "step_size",
    "LookaheadCLI": "cli",
    "LookaheadCallback": "callback",
    "Record": "_records",
    "SlowWeights": "slow_weights",
    "compare_weights": "comparison",
    "inner_loops": "_records",
    "load_weights": "checkpointing",
    "newest_checkpoint": "checkpointing",
    "plot_inner_outer": "plotting",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
