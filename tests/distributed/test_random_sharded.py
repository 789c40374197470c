"""Random configurations of sharded strategies, stopped and resumed.

``LOOKAHEAD_RANDOM_RUNS=50 .venv/bin/pytest tests/distributed/test_random_sharded.py`` takes so many new ones of each.
"""

import os
import random
from pathlib import Path

import pytest
from test_resume import run

WORKER = Path(__file__).with_name("random_sharded_worker.py")
RUNS = int(os.environ.get("LOOKAHEAD_RANDOM_RUNS", "0"))
KINDS = [("ddp", 2), ("fsdp1", 2), ("fsdp1_flat", 2), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2_full", 2), ("tp", 2)]


@pytest.mark.timeout(3600 if RUNS else 300)
@pytest.mark.parametrize(("kind", "processes"), KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind, processes, tmp_path):
    seeds = random.SystemRandom().sample(range(10**6), RUNS) if RUNS else [1, 2]
    output = run(WORKER, tmp_path, kind, *map(str, seeds), processes=processes)
    for seed in seeds:
        assert output.count(f"{kind} {seed}: holds") == processes
