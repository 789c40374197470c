"""What exchanging weights or gradients takes on paper: a calculator."""

from __future__ import annotations

BITS = 8
GIGA = 1e9


def seconds_per_step(
    *, parameters: float, workers: int, gigabits: float, k: int = 1, bytes_per_value: float = 4
) -> float:
    """Seconds of each step in which a worker sends, if all workers exchange every parameter once in k steps.

    Assumptions: a ring all-reduce, in which each worker sends ``2 (workers - 1) / workers`` times all values, through a
    link of its own that sends and receives at full speed at once; no latency, and nothing computed meanwhile.

    Args:
        parameters: How many values are exchanged.
        workers: At least 1.
        gigabits: Speed of a worker's link, in Gbit/s.
        k: Steps from one exchange to the next: 1 for DDP, which exchanges gradients in each.
        bytes_per_value: 4 for float32, 2 for bfloat16.
    """
    sent = 2 * (workers - 1) / workers * parameters * bytes_per_value
    return sent * BITS / (gigabits * GIGA) / k
