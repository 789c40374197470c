"""Random configurations of sharded strategies, stopped and resumed.

``LOOKAHEAD_RANDOM_RUNS=50 .venv/bin/pytest tests/distributed/test_random_sharded.py`` takes so many new ones of each.
"""

import os
import random

import pytest

from tests.distributed.random_sharded_worker import check

RUNS = int(os.environ.get("LOOKAHEAD_RANDOM_RUNS", "0"))
KINDS = [("ddp", 2), ("fsdp1", 2), ("fsdp1_flat", 2), ("fsdp2", 2), ("fsdp2", 3), ("fsdp2_full", 2), ("tp", 2)]


@pytest.mark.timeout(3600 if RUNS else 300)
@pytest.mark.parametrize(("kind", "processes"), KINDS)
def test_a_resumed_run_is_the_uninterrupted_one(kind, processes, ranks, tmp_path):
    for seed in random.SystemRandom().sample(range(10**6), RUNS) if RUNS else [1, 2]:
        ranks(processes, check, kind, seed, tmp_path / str(seed))
