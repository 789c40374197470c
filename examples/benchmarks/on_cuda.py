"""All that is to be measured on a GPU, in one call of less than 25 minutes.

    python examples/benchmarks/on_cuda.py             # tests first, then a record of each benchmark
    python examples/benchmarks/results.py             # then RESULTS.md has the tables

The tests that need a GPU, then each benchmark with ``--device cuda``. Each has a time of its own: what takes longer is
ended and the next one begins. A record is in `examples/benchmarks/records/cuda/NAME.json` as soon as it is made.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from examples.command_line import parser_of, stoppable

HERE = Path(__file__).parent
TESTS = "tests/distributed/test_cuda.py"
MINUTES = {
    TESTS: 6.0,
    "ordinary_steps": 3.0,
    "training": 5.0,
    "sync": 3.0,
    "offload": 2.0,
    "memory": 1.5,
    "saving": 4.0,
}
"""What is done, in this order, and how long it may take."""
ROUNDS = {"ordinary_steps": 7, "training": 7, "sync": 15, "saving": 2}


def command(name: str, *, smoke: bool) -> list[str]:
    """What to start."""
    if name == TESTS:
        return [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", TESTS]
    rounds = ["--rounds", str(ROUNDS[name])] if name in ROUNDS else []
    record = HERE / "records" / "cuda" / f"{name}.json"
    return [
        sys.executable,
        str(HERE / f"{name}.py"),
        *(["--smoke"] if smoke else ["--device", "cuda", *rounds, "--json", str(record)]),
    ]


@stoppable()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--smoke", action="store_true", help="seconds, on any device, without tests and records")
    smoke = parser.parse_args().smoke
    if not smoke and not torch.cuda.is_available():
        sys.exit("on_cuda.py: there is no CUDA device here.")
    environment = {name: value for name, value in os.environ.items() if smoke or name != "CUDA_VISIBLE_DEVICES"}
    outcomes = {}
    for name, minutes in MINUTES.items():
        if smoke and name == TESTS:
            continue
        started = time.monotonic()
        print(f"== {name}", flush=True)
        try:
            done = subprocess.run(  # noqa: S603
                command(name, smoke=smoke), cwd=HERE.parents[1], env=environment, timeout=60 * minutes, check=False
            )
            outcome = "done" if not done.returncode else f"failed ({done.returncode})"
        except subprocess.TimeoutExpired:
            outcome = f"ended after {minutes:g} minutes"
        outcomes[name] = f"{outcome}, {time.monotonic() - started:.0f} s"
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    sys.exit(any(not outcome.startswith("done") for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
