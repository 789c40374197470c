"""Does a sync run at the speed of memory, and is a peer's faster?

    python examples/benchmarks/sync.py

One sync reads fast and slow weights and writes both: 16 bytes per parameter in float32. Its time is compared with that
of as many bytes in a plain copy, and with a sync of other implementations of Lookahead on the same parameters: those of
the packages that are installed (`pip install -e ".[benchmarks]"`, `pip install --no-deps timm`), the loop of the
official code, and two foreach calls. On a CPU it is measured with one thread and with as many as torch takes, which
`OMP_NUM_THREADS` sets. Ours also looks whether all fast weights are finite, which the others do not, and
`EMAWeightAveraging` moves its average alone and leaves the fast weights as they are. With outer momentum there is a
third tensor to read and to write: 24 bytes per parameter.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from bench.parameters import MODELS, SMOKE, parameters
from bench.peers import OURS, syncs
from bench.program import arguments, run
from bench.timing import ratios, summary, take_turns, text
from lab.report import Table

if TYPE_CHECKING:
    import argparse

    from bench.program import Report

BYTES = 16
"""Per parameter in float32: two numbers read and two written."""


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of threads and each model: what memory can do, and the time of each sync."""
    most = torch.get_num_threads()
    rows = []
    for threads in sorted({1, most}) if args.device == "cpu" else [most]:
        torch.set_num_threads(threads)
        rows += [{"threads": threads, **row} for row in _measure(args)]
    return rows


def _measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for model, shapes in (SMOKE if args.smoke else MODELS).items():
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
        rows.append({"model": model, "parameters": count, "tensors": len(shapes), "GB/s": bandwidth, "syncs": found})
    return rows


def tables(report: Report) -> list[Table]:
    """Time of a sync to that of copying as many bytes, and each peer's to ours."""
    by_threads = itertools.groupby(report["rows"], key=lambda row: row["threads"])
    return [table for threads, rows in by_threads for table in _tables(threads, list(rows))]


def _tables(threads: int, rows: list[dict[str, Any]]) -> list[Table]:
    models = [row["model"] for row in rows]
    plural = "s" if threads > 1 else ""
    taken = f"with {threads} thread{plural}"
    sizes = Table(f"What is synced, {taken}", ["model", "parameters", "tensors", "copy, GB/s", "our sync, ms"])
    for row in rows:
        ours = text(row["syncs"][OURS]["milliseconds"], "{:.3f}")
        count = [f"{row['parameters']:,}", f"{row['tensors']:,}"]
        sizes.rows.append([row["model"], *count, text(row["GB/s"], "{:.1f}"), ours])
    memory = Table(f"Time of a sync / time of copying 16 bytes per parameter, {taken}", ["", *models])
    peers = Table(f"Time of a sync / time of ours, {taken}", ["", *models])
    for name in rows[0]["syncs"]:
        for table, what in ((memory, "to memory"), (peers, "to ours")):
            if name != OURS or table is memory:
                table.rows.append([name, *(text(row["syncs"][name][what]) for row in rows)])
    return [sizes, memory, peers]


if __name__ == "__main__":
    run(arguments(__doc__, rounds=25).parse_args(), measure, tables)
