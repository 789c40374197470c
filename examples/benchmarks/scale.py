"""Do syncs and swaps take a time that grows in a straight line with what they move?

    python examples/benchmarks/scale.py --largest 1000000000

Times of a sync and of a swap against the number of parameters, in tensors of a million values, as far as memory
allows; and against the number of tensors of a thousand values. The line through the first tells how fast parameters
move, to compare with a plain copy; that through the second how much a tensor costs.

In float32 a copy moves 8 bytes per parameter (one number read and one written). A sync has to move 16: it reads and
writes both sets. A swap moves 24: its three copies go from the parameter to a new tensor, from the slow weights to the
parameter, and from the new tensor to the slow weights. The swap is timed in the middle of a cycle, where fast and slow
weights differ: right after a sync there is nothing to move.
"""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from examples.command_line import at_least_one
from examples.lab.bench.parameters import parameters
from examples.lab.bench.program import arguments, run
from examples.lab.bench.timing import summary, take_turns, text
from examples.lab.progress import track
from examples.lab.report import Table
from lightning_lookahead import SlowWeights

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from examples.lab.bench.program import Report

K = 5
BYTES = {"sync": 16, "swap": 24}
"""Per parameter in float32."""

COPY_BYTES = 8
"""Per parameter in float32: one number read and one written."""

SETS = 3
"""Fast weights, slow weights, and what the plain copy writes to."""

BY_PARAMETERS, BY_TENSORS = "number of parameters", "number of tensors"
LARGE, SMALL = 1_000_000, 1000
"""Values of a tensor where parameters are counted, and where tensors are."""

COUNTS = [1, 3, 10, 30, 100, 300, 1000]
MANY = [10, 30, 100, 300, 1000, 3000, 10_000]
"""How many tensors there are of either kind."""

SMOKE = 3
"""How many of these sizes a smoke test takes, with tensors a hundredth as large."""


def free(device: str) -> int:
    """Bytes of memory that nobody uses."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each size that there is memory for."""
    rows = []
    for axis, values, counts in ((BY_PARAMETERS, LARGE, COUNTS), (BY_TENSORS, SMALL, MANY)):
        size = values // 100 if args.smoke else values
        for count in track(counts[:SMOKE] if args.smoke else counts, axis):
            total = count * size
            if total > args.largest or 4 * total * SETS > free(args.device):
                continue
            rows.append({"axis": axis, "tensors": count, "values": size, **_times(count, size, args)})
    return rows


def _times(count: int, size: int, args: argparse.Namespace) -> dict[str, Any]:
    trained = parameters(count * [(size,)], args.device)
    for parameter in trained:
        parameter.grad = torch.ones((), device=args.device).expand(parameter.shape)
    optimizer = torch.optim.SGD(trained, lr=1e-3)
    slow = SlowWeights(optimizer, K, sync_in_step=False)
    sources: list[Any] = [parameter.detach() for parameter in trained]
    targets: list[Any] = list(torch.empty(count * size, device=args.device).split(size))

    def there_and_back() -> None:
        slow.swap_to("slow")
        slow.swap_to("fast")

    optimizer.step()
    calls = {"copy": lambda: torch._foreach_copy_(targets, sources), "sync": slow.sync}
    times = take_turns(calls, args.rounds)
    optimizer.step()  # from here on theta and phi are apart
    times.update(take_turns({"swap": there_and_back}, args.rounds))
    times["swap"] = [second / 2 for second in times["swap"]]
    return {"seconds": {name: summary(taken) for name, taken in times.items()}}


def fit(sizes: Sequence[float], times: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R² of the line that is closest to the times, each difference as a part of its time."""
    x, y = np.asarray(sizes, dtype=float), np.asarray(times)
    slope, intercept = np.polyfit(x, y, 1, w=1 / y)
    mean = np.average(y, weights=1 / y**2)
    unexplained, whole = (np.sum(((y - other) / y) ** 2) for other in (slope * x + intercept, mean))
    return float(slope), float(intercept), float(1 - unexplained / whole)


def tables(report: Report) -> list[Table]:
    """The times, and the lines through them."""
    sizes = Table(
        "Time of a sync and of a swap, for many sizes",
        ["along", "tensors", "values in each", "copy, GB/s", "sync, ms", "swap, ms"],
    )
    lines = Table(
        "Lines through the times, weighted by 1 / time. GB/s at 16 bytes per parameter for a sync, 24 for a swap and 8"
        " for a copy",
        ["line", "sizes", "slope, GB/s", "copy of the largest, GB/s", "slope, µs per tensor", "intercept, µs", "R²"],
    )
    for row in report["rows"]:
        seconds = row["seconds"]
        sizes.rows.append(
            [
                row["axis"],
                f"{row['tensors']:,}",
                f"{row['values']:,}",
                _bandwidth(row),
                text(seconds["sync"], "{:.3f}", 1e3),
                text(seconds["swap"], "{:.3f}", 1e3),
            ]
        )
    for axis in (BY_PARAMETERS, BY_TENSORS):
        rows = [row for row in report["rows"] if row["axis"] == axis]
        if len(rows) < 2:  # noqa: PLR2004 (which a line needs)
            continue
        values = rows[0]["values"]
        for name, count in BYTES.items():
            slope, intercept, explained = fit(
                [row["tensors"] for row in rows], [row["seconds"][name]["median"] for row in rows]
            )
            lines.rows.append(
                [
                    f"{name}, {axis}",
                    str(len(rows)),
                    f"{1e-9 * count * values / slope:.1f}",
                    _bandwidth(rows[-1]),
                    f"{1e6 * slope:.3f}",
                    f"{1e6 * intercept:.2f}",
                    f"{explained:.5f}",
                ]
            )
    return [sizes, lines]


def _bandwidth(row: dict[str, Any]) -> str:
    seconds = row["seconds"]["copy"]
    moved = 1e-9 * COPY_BYTES * row["tensors"] * row["values"]
    # The fastest copy has the largest bandwidth.
    return text(
        {"median": moved / seconds["median"], "low": moved / seconds["high"], "high": moved / seconds["low"]}, "{:.1f}"
    )


if __name__ == "__main__":
    parser = arguments(__doc__, rounds=11)
    parser.add_argument(
        "--largest", type=at_least_one, default=1_000_000_000, help="parameters of the largest model (1000000000)"
    )
    run(parser.parse_args(), measure, tables)
