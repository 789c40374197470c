"""Do slow weights on the CPU leave the GPU's memory and time alone?

    python examples/benchmarks/offload.py

With ``slow_device="cpu"`` the slow weights visit the GPU around a sync only: they set out for it before the step that
ends a cycle and are back after it. So there should be 0 bytes of them on the GPU after all other steps, and as both
ways are gone while the GPU computes, a step should take as long as one with slow weights that stay on the GPU. A stack
of linear layers is trained with SGD, three times with the same weights: without slow weights, with resident ones, and
with offloaded ones. Whole cycles take turns. Needs a CUDA device.
"""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from examples.lab.bench.program import arguments, run
from examples.lab.bench.timing import ratios, summary, take_turns, text
from examples.lab.report import Table
from lightning_lookahead import SlowWeights

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from examples.lab.bench.program import Report

K = 5
CYCLES = 5
"""In one timed call."""

KINDS: dict[str, dict[str, Any] | None] = {"none": None, "resident": {}, "offloaded": {"slow_device": "cpu"}}
"""Where the slow weights are -> the arguments of `SlowWeights` that put them there."""


class Size(NamedTuple):
    """Of the stack of linear layers: how many, their inputs and outputs, and the examples of a batch."""

    layers: int
    width: int
    batch: int


SIZE = Size(layers=8, width=4096, batch=4096)
SMALL = Size(layers=2, width=64, batch=32)


class Training:
    """Training steps of one stack of layers, with slow weights or without.

    Args:
        net: The layers, copied.
        batch: Inputs, the same at each step.
        arguments: Of `SlowWeights`; ``None`` for no slow weights.
    """

    def __init__(self, net: nn.Module, batch: torch.Tensor, arguments: dict[str, Any] | None) -> None:
        self._net = copy.deepcopy(net)
        self._batch = batch
        self._optimizer = torch.optim.SGD(self._net.parameters(), lr=1e-3)
        self.step()  # gradients and the workspace of the kernels are there from now on
        before = allocated(batch.device.type)
        self._slow = None if arguments is None else SlowWeights(self._optimizer, K, **arguments)
        self.cycle()  # what comes with the first one: a stream, a workspace for the kernels
        self.held = []
        """Bytes on the GPU after each step of a cycle above those without slow weights."""
        for _ in range(K):
            self.step()
            self.held.append(allocated(batch.device.type) - before)

    def step(self) -> None:
        """Forward, backward, optimizer; the gradients stay in memory."""
        self._optimizer.zero_grad(set_to_none=False)
        self._net(self._batch).square().mean().backward()
        self._optimizer.step()

    def cycle(self) -> None:
        """K steps, the last one with a sync."""
        for _ in range(K):
            self.step()

    def cycles(self) -> None:
        """What is timed."""
        for _ in range(CYCLES):
            self.cycle()


def allocated(device: str) -> int:
    """Bytes of the tensors that are on the GPU once it has done its work."""
    gc.collect()
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # counts what another stream has used and need not keep any longer
    return torch.cuda.memory_allocated()


def stack(size: Size, device: str) -> nn.Module:
    """Linear layers with a nonlinearity after each."""
    layers = [nn.Sequential(nn.Linear(size.width, size.width), nn.ReLU()) for _ in range(size.layers)]
    return nn.Sequential(*layers).to(device)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each place of the slow weights; none without a CUDA device."""
    if args.device != "cuda":
        print("offload.py needs a CUDA device: nothing was measured.")
        return []
    size = SMALL if args.smoke else SIZE
    torch.manual_seed(0)
    net = stack(size, args.device)
    batch = torch.randn(size.batch, size.width, device=args.device)
    trainings = {kind: Training(net, batch, arguments) for kind, arguments in KINDS.items()}
    calls: dict[str, Callable[[], object]] = {kind: training.cycles for kind, training in trainings.items()}
    times = take_turns(calls, args.rounds)
    steps = K * CYCLES
    return [
        {
            "slow weights": kind,
            "size": list(size),
            "bytes": sum(parameter.nbytes for parameter in net.parameters()),
            "held": trainings[kind].held,
            "milliseconds": summary([1e3 * second / steps for second in taken]),
            "to resident": summary(ratios(taken, times["resident"])),
            "to none": summary(ratios(taken, times["none"])),
        }
        for kind, taken in times.items()
    ]


def tables(report: Report) -> list[Table]:
    """Bytes of slow weights on the GPU, and the time of a step."""
    rows = report["rows"]
    size = Size(*rows[0]["size"])
    told = f"{size.layers} linear layers of {size.width} x {size.width}, {size.batch} examples a batch, k = {K}"
    steps = ["after a sync", *(f"after step {step}" for step in range(1, K))]
    memory = Table(
        f"Bytes on the GPU above those without slow weights ({told})",
        ["slow weights", "bytes of the parameters", *steps],
    )
    time = Table(
        f"Time of a training step ({told})",
        ["slow weights", "ms per step", "/ resident", "/ no slow weights"],
    )
    for row in rows:
        held = row["held"][-1:] + row["held"][:-1]
        memory.rows.append([row["slow weights"], f"{row['bytes']:,}", *(f"{count:,}" for count in held)])
        time.rows.append(
            [
                row["slow weights"],
                text(row["milliseconds"], "{:.3f}"),
                text(row["to resident"], "{:.3f}"),
                text(row["to none"], "{:.3f}"),
            ]
        )
    return [memory, time]


if __name__ == "__main__":
    run(arguments(__doc__, rounds=15).parse_args(), measure, tables)
