"""Weights in bfloat16 with slow weights in float32, beside slow weights in bfloat16 and a run in float32.

    python examples/bf16.py

trains a small network on scikit-learn's digits. A number in bfloat16 has 8 binary digits: what a sync moves it by is
rounded away if it is less than half a step of the type, unless the slow weights have more digits, as they have by
default (`slow_dtype`). It ends in a table: types, bytes of the slow weights, how many of their numbers bfloat16 cannot
hold, and the loss and accuracy on test images.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from command_line import at_least_one, parser_of, stoppable
from common import ALONE, Digits, DigitsData, parse, quietly
from lightning_lookahead import LookaheadCallback

if TYPE_CHECKING:
    from argparse import Namespace

    from torch import Tensor

RUNS = {("32-true", "float32"): "float32", ("bf16-true", "float32"): "bfloat16", ("bf16-true", "bfloat16"): "bfloat16"}
"""Precision of the Trainer and `slow_dtype` -> type of the fast weights."""


def train(seed: int, precision: str, slow_dtype: str, args: Namespace) -> tuple[dict[str, float], list[Tensor]]:
    """One run: loss and accuracy of the slow weights on test images, and the slow weights as they are kept."""
    seed_everything(seed, verbose=False)
    lookahead = LookaheadCallback(args.k, args.alpha, slow_dtype=slow_dtype)
    trainer = Trainer(max_epochs=args.epochs, precision=precision, callbacks=[lookahead], **ALONE)
    model = Digits(args.lr)
    trainer.fit(model, DigitsData())
    (slow,) = lookahead.slow_weights
    (found,) = trainer.validate(model, DigitsData(), verbose=False)
    return found, list(slow.values("slow").values())


@stoppable()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=at_least_one, default=3, help="runs of each kind, from seeds 0, 1, ... (3)")
    parser.add_argument("--epochs", type=at_least_one, default=5, help="passes over the 1,347 training images (5)")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate of SGD (0.01)")
    args = parse(parser)
    quietly()

    title = f"Digits, lr {args.lr}, k {args.k}, alpha {args.alpha}, {args.epochs} epochs, {args.seeds} seeds"
    table = Table("fast weights", "slow weights", title=title)
    for heading in ("bytes of phi", "not in bfloat16", "test loss", "test accuracy"):
        table.add_column(heading, justify="right")
    for (precision, slow_dtype), dtype in RUNS.items():
        runs = [train(seed, precision, slow_dtype, args) for seed in range(args.seeds)]
        slow = runs[0][1]
        more = sum((value != value.bfloat16()).sum().item() for value in slow) / sum(value.numel() for value in slow)
        loss, accuracy = (statistics.mean(found[name] for found, _ in runs) for name in ("loss", "accuracy"))
        size = sum(value.nbytes for value in slow)
        table.add_row(dtype, slow_dtype, f"{size:,}", f"{more:.0%}", f"{loss:.3f}", f"{accuracy:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
