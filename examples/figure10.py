"""The paper's Figure 10 for handwritten digits: test accuracy after every inner step and every sync.

    python examples/figure10.py

trains a small network with Lookahead from several seeds and looks at windows of 60 inner steps all through
training. It prints in how many inner loops accuracy fell, and in how many of those the sync brought it back, and draws
the windows of the first seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from rich.table import Table

from command_line import at_least_one, parser_of, stoppable
from common import ALONE, Digits, DigitsData, parse, quietly
from lightning_lookahead import InnerOuterMonitor, LookaheadCallback, Record, inner_loops, plot_inner_outer

if TYPE_CHECKING:
    from argparse import Namespace


def train(seed: int, args: Namespace) -> list[Record]:
    """One run; what its monitor has seen."""
    seed_everything(seed, verbose=False)
    monitor = InnerOuterMonitor(updates=args.updates, start=args.start, every_n_syncs=args.every_n_syncs)
    trainer = Trainer(
        max_epochs=args.epochs,
        callbacks=[LookaheadCallback(args.k, args.alpha, monitor=monitor), RichProgressBar(leave=False)],
        **ALONE,
    )
    trainer.fit(Digits(args.lr, args.momentum), DigitsData())
    return monitor.history


def table(histories: dict[int, list[Record]], args: Namespace) -> Table:
    """A row for each seed: how inner loops ended, and what the sync made of it."""
    title = f"Digits, lr {args.lr}, momentum {args.momentum}, k {args.k}, alpha {args.alpha}, {args.epochs} epochs"
    result = Table("seed", title=title)
    for heading in (
        "inner loops",
        "accuracy fell",
        "sync raised it",
        "to where it was, or higher",
        "mean fall",
        "mean rise",
    ):
        result.add_column(heading, justify="right")
    every = [loop for history in histories.values() for loop in inner_loops(history)]
    groups = {**{str(seed): inner_loops(history) for seed, history in histories.items()}, "all": every}
    for name, loops in groups.items():
        fallen = [loop for loop in loops if loop.fell]
        raised = [loop for loop in fallen if loop.raised]
        recovered = [loop for loop in fallen if loop.recovered]
        numbers = [sum(loop.before - loop.end for loop in fallen), sum(loop.after - loop.end for loop in fallen)]
        means = [f"{number / max(len(fallen), 1):.2%}" for number in numbers]
        result.add_row(name, *map(str, (len(loops), len(fallen), len(raised), len(recovered))), *means)
    return result


@stoppable()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=at_least_one, default=5, help="runs, from seeds 0, 1, ... (5)")
    parser.add_argument("--epochs", type=at_least_one, default=7, help="passes over the 1,347 training images (7)")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate of SGD (0.1)")
    parser.add_argument("--momentum", type=float, default=0.9, help="momentum of SGD (0.9)")
    parser.add_argument("--updates", type=int, default=60, help="inner steps in a window (60)")
    parser.add_argument("--start", type=int, default=40, help="inner steps before the first window (40)")
    parser.add_argument(
        "--every-n-syncs", type=int, default=20, help="syncs from one window's beginning to the next's (20)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/figure10.png"), help="file for the figure")
    args = parse(parser)
    try:
        InnerOuterMonitor(updates=args.updates, start=args.start, every_n_syncs=args.every_n_syncs)
    except ValueError as error:
        parser.error(str(error))
    quietly()

    console = Console()
    histories = {}
    for seed in range(args.seeds):
        console.print(f"seed {seed}")
        histories[seed] = train(seed, args)
    console.print(table(histories, args))
    if not histories[0]:
        parser.error(f"--start {args.start} is after the end of training: there is nothing to draw")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot_inner_outer(histories[0], name="test accuracy").savefig(args.out, dpi=130)
    console.print(f"Figure: {args.out}", highlight=False)


if __name__ == "__main__":
    main()
