"""Does a sync run at the speed of memory, and is a peer's faster?

    python examples/benchmarks/sync.py

One sync reads fast and slow weights and writes both: 16 bytes per parameter in float32. Its time is compared with that
of as many bytes in a plain copy, and with a sync of other implementations of Lookahead on the same parameters: those of
the packages that are installed (`pip install -e ".[benchmarks]"`, `pip install --no-deps timm`), the loop of the
official code, and two foreach calls. On a CPU it is measured with one thread and with as many as torch takes, which
`OMP_NUM_THREADS` sets. The others do not look whether all fast weights are finite, so ours does not either
(`nonfinite="ignore"`), and what looking costs (`"raise"`, the default) is measured beside. Two foreach calls are no
implementation: they count no steps and see no new parameters. `EMAWeightAveraging` moves its average alone and leaves
the fast weights as they are. With outer momentum there is a third tensor to read and to write: 24 bytes per parameter.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from examples.lab.bench.parameters import MODELS, SMOKE, parameters
from examples.lab.bench.peers import CHECKED, MOMENTUM, OURS, syncs
from examples.lab.bench.program import arguments, run
from examples.lab.bench.timing import ratios, summary, take_turns, text
from examples.lab.progress import track
from examples.lab.report import Table

if TYPE_CHECKING:
    import argparse

    from examples.lab.bench.program import Report

BYTES = 16
"""Per parameter in float32: two numbers read and two written."""

PRICES = {
    "looking whether weights are finite": (CHECKED, OURS),
    "outer momentum": (MOMENTUM, CHECKED),
}
"""What is paid for -> the sync with it, and that without."""


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of threads and each model: what memory can do, and the time of each sync."""
    most = torch.get_num_threads()
    rows = []
    for threads in track(sorted({1, most}) if args.device == "cpu" else [most], "numbers of threads"):
        torch.set_num_threads(threads)
        rows += [{"threads": threads, **row} for row in _measure(args)]
    return rows


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for model, shapes in track((SMOKE if args.smoke else MODELS).items(), "models"):
        trained = parameters(shapes, args.device)
        count = sum(parameter.numel() for parameter in trained)
        source, target = torch.randn(2, count, device=args.device)
        calls = {"copy": lambda s=source, t=target: t.copy_(s), **syncs(trained)}
        times = take_turns(calls, args.rounds)
        copy = times.pop("copy")  # which moves 8 bytes per parameter
        found = {
            name: {
                "milliseconds": summary([1e3 * second for second in taken]),
                "to memory": summary(ratios(taken, [BYTES / 8 * second for second in copy])),
                "to ours": summary(ratios(taken, times[OURS])),
            }
            for name, taken in times.items()
        }
        bandwidth = summary([8e-9 * count / second for second in copy])
        prices = {what: summary(ratios(times[more], times[less])) for what, (more, less) in PRICES.items()}
        row = {"model": model, "parameters": count, "tensors": len(shapes), "GB/s": bandwidth}
        rows.append({**row, "syncs": found, "prices": prices})
    return rows


def tables(report: Report) -> list[Table]:
    """Each peer's time to ours, what looking and momentum cost, and ours to that of copying as many bytes."""
    by_threads = itertools.groupby(report["rows"], key=lambda row: row["threads"])
    return [table for threads, rows in by_threads for table in _tables(threads, list(rows))]


def _tables(threads: int, rows: list[dict[str, Any]]) -> list[Table]:
    models = [row["model"] for row in rows]
    taken = f"with {threads} thread{'s' if threads > 1 else ''}"
    peers = Table(f"Time of a sync / time of ours, {taken}", ["", *models])
    prices = Table(f"Time of a sync / time without, {taken}", ["", *models])
    memory = Table(f"Time of a sync / time of copying 16 bytes per parameter, {taken}", ["", *models])
    for name in rows[0]["syncs"]:
        if name not in {OURS, CHECKED, MOMENTUM}:
            peers.rows.append([name, *(text(row["syncs"][name]["to ours"]) for row in rows)])
        memory.rows.append([name, *(text(row["syncs"][name]["to memory"]) for row in rows)])
    for what in PRICES:
        prices.rows.append([what, *(text(row["prices"][what]) for row in rows)])
    sizes = Table(f"What is synced, {taken}", ["model", "our sync, ms", "copy, GB/s", "parameters", "tensors"])
    for row in rows:
        found = text(row["syncs"][OURS]["milliseconds"], "{:.3f}"), text(row["GB/s"], "{:.1f}")
        sizes.rows.append([row["model"], *found, f"{row['parameters']:,}", f"{row['tensors']:,}"])
    return [peers, prices, memory, sizes]


if __name__ == "__main__":
    run(arguments(__doc__, rounds=25).parse_args(), measure, tables)
