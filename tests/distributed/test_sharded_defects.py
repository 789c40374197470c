"""What broke where weights are sharded: each resumed bit for bit, in two processes over gloo."""

from pathlib import Path

import pytest
from sharded_defects_worker import CASES
from test_resume import run

WORKER = Path(__file__).with_name("sharded_defects_worker.py")
FSDP1 = [case for case, (kind, *_) in CASES.items() if kind == "fsdp1"]
FSDP2 = [case for case, (kind, *_) in CASES.items() if kind != "fsdp1"]


@pytest.mark.parametrize("cases", [FSDP1, [*FSDP2, "between", "anew"]], ids=["fsdp1", "fsdp2"])
def test_all_ranks_count_the_same_and_resume_bit_for_bit(cases, tmp_path):
    output = run(WORKER, tmp_path, *cases, processes=2)
    for case in cases:
        assert output.count(f"{case}: holds") == 2
