"""What broke where weights are sharded: each resumed bit for bit, on two ranks over gloo."""

import pytest

from tests.distributed.sharded_defects_worker import CASES, holds


@pytest.mark.parametrize("case", [*CASES, "between", "anew"])
def test_all_ranks_count_the_same_and_resume_bit_for_bit(case, ranks, tmp_path):
    ranks(2, holds, case, tmp_path)
