"""Momentum in the outer step, as in SNOO and DiLoCo with one worker, beside Lookahead and SGD alone.

    python examples/outer_momentum.py

trains the same small network on scikit-learn's digits from the same seeds in four ways, with one learning rate, and
ends in a table of test losses and accuracies of the slow weights after every run. The learning rate is not tuned for
any of them: what tuning makes of the comparison is in `examples/paper/outer_momentum.py`.
"""

from __future__ import annotations

import statistics
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from command_line import at_least_one, parser_of, stoppable
from common import ALONE, Digits, DigitsData, quietly
from lightning_lookahead import LookaheadCallback

RUNS: dict[str, dict[str, Any]] = {
    "SGD": {},
    "Lookahead": {"k": 5, "alpha": 0.5},
    "SNOO: Nesterov's, 0.9": {"k": 20, "alpha": 0.7, "outer_momentum": 0.9},
    "SlowMo: not Nesterov's, 0.5": {
        "k": 20,
        "alpha": 1.0,
        "outer_momentum": 0.5,
        "outer_nesterov": False,
    },
}
"""Name -> arguments of the callback."""


def train(seed: int, options: dict[str, Any], lr: float, epochs: int) -> dict[str, float]:
    """One run: loss and accuracy on test images, with a callback of the slow weights."""
    seed_everything(seed, verbose=False)
    callbacks = [LookaheadCallback(**options)] if options else []
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, **ALONE)
    model = Digits(lr)
    trainer.fit(model, DigitsData())
    return trainer.validate(model, DigitsData(), verbose=False)[0]


@stoppable()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=at_least_one, default=3, help="runs of each kind, from seeds 0, 1, ... (3)")
    parser.add_argument("--epochs", type=at_least_one, default=5, help="passes over the 1,347 training images (5)")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of SGD (0.01)")
    args = parser.parse_args()
    quietly()

    table = Table("", title=f"Digits, lr {args.lr}, momentum 0.9, {args.epochs} epochs, {args.seeds} seeds")
    for heading in ("k", "alpha", "test loss", "test accuracy"):
        table.add_column(heading, justify="right")
    for name, options in RUNS.items():
        runs = [train(seed, options, args.lr, args.epochs) for seed in range(args.seeds)]
        loss, accuracy = (statistics.mean(found[measure] for found in runs) for measure in ("loss", "accuracy"))
        own = (str(options.get(option, "")) for option in ("k", "alpha"))
        table.add_row(name, *own, f"{loss:.3f}", f"{accuracy:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
