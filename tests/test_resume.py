"""Stop anywhere, resume in a new process: the run is the uninterrupted run, bit for bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import equal

WORKER = Path(__file__).parent / "distributed" / "resume_worker.py"


def run(program, *arguments, processes=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, program, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("optimizer", "strategy", "weights"),
    [
        ("SGD", "auto", "slow"),
        ("Adam", "auto", "slow"),
        ("Adam", "auto", "fast"),
        ("SGD", "ddp", "slow"),
        ("Adam", "ddp", "slow"),
        ("Adam", "zero", "slow"),
    ],
)
def test_resumed_at_every_offset_in_a_new_process_the_run_is_the_uninterrupted_one(optimizer, strategy, weights):
    processes = 1 if strategy == "auto" else 2
    run(WORKER, "train", optimizer, strategy, weights, processes=processes)
    ends = [torch.load(f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
    for theta, phi in ends:
        assert not equal(theta, phi), "the last cycle must be unfinished, or the test shows less"
        assert equal(theta, ends[0][0])
        assert equal(phi, ends[0][1])
    output = run(WORKER, "resume", optimizer, strategy, weights, processes=processes)
    assert output.count("resumed from every step") == processes
