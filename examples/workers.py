"""Two workers that train apart and meet every tenth step, beside two that share gradients in every step.

    python examples/workers.py                                            # Lightning starts the second process
    torchrun --standalone --nproc-per-node=2 examples/workers.py          # or torchrun starts both

trains a small network on scikit-learn's digits in two processes (DDP on the CPU), each with half of the images. With
`share_gradients=False` each moves its own fast weights; a sync averages them and moves the slow weights towards the
average. It ends in a table of test accuracies, and shows which weights the workers have in common.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import distributed

from command_line import stoppable
from common import CPU, Digits, DigitsData, accuracy, quietly
from lightning_lookahead import LookaheadCallback

K, EPOCHS = 10, 4


def train(lookahead: LookaheadCallback | None) -> tuple[Trainer, Digits]:
    """A run of both workers, with Lookahead or with DDP alone."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        strategy="ddp",
        devices=2,
        max_epochs=EPOCHS,
        callbacks=[lookahead] if lookahead else [],
        enable_checkpointing=False,
        **CPU,
    )
    model = Digits()
    trainer.fit(model, DigitsData())
    return trainer, model


def of_each(value: Any) -> list[Any]:
    """What every worker has."""
    found = [None, None]
    distributed.all_gather_object(found, value)
    return found


def main_of_both(console: Console) -> None:
    """What both workers do; the first one prints."""
    table = Table("", title=f"Digits, 2 workers, {EPOCHS} epochs")
    for heading in ("steps", "a worker sends", "test accuracy"):
        table.add_column(heading, justify="right")
    trainer, model = train(None)
    table.add_row("DDP", str(trainer.global_step), f"{trainer.global_step} x gradients", f"{accuracy(model):.1%}")

    lookahead = LookaheadCallback(k=K, alpha=0.5, share_gradients=False)
    trainer, model = train(lookahead)
    (slow,) = lookahead.slow_weights
    common = []
    for weights in ("slow", "fast"):
        with lookahead.use_weights(weights):
            first, second = of_each(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
            accuracies = of_each(accuracy(model))
        equal = torch.equal(first, second)
        common.append(f"{weights} weights: equal on both workers bit for bit: {equal}")
        for worker, value in enumerate(accuracies[:1] if equal else accuracies):
            name = f"apart, {weights} weights" if equal else f"apart, {weights} weights of worker {worker}"
            table.add_row(name, str(slow.steps), f"{slow.syncs} x weights", f"{value:.1%}")
    if trainer.is_global_zero:
        console.print(table)
        console.print("\n".join(common), highlight=False)
    distributed.barrier()  # gloo ends with an error in a process that outlives the other
    distributed.destroy_process_group()


@stoppable()
def main() -> None:
    quietly()
    main_of_both(Console())


if __name__ == "__main__":
    main()
