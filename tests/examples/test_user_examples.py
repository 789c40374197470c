"""Each example for users as a real command: it runs to its end, and what it claims is seen in what it prints."""

import re
import subprocess
import sys

import pytest

from lightning_lookahead import load_weights
from tests.helpers.places import EXAMPLES, environment


def rows(shown):
    """The cells of the tables that were printed."""
    return [
        [cell.strip() for cell in line.strip("│ \n").split("│")] for line in shown.splitlines() if line.startswith("│")
    ]


def start(*arguments, cwd):
    """A program that starts processes of its own."""
    own = environment(COLUMNS="160", CUDA_VISIBLE_DEVICES="")
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=own, capture_output=True, text=True, check=False
    )


PLAIN = """
import runpy, sys
path = sys.argv[1]
sys.path.insert(0, path.rpartition("/")[0])
try:
    runpy.run_path(path, run_name="__main__")
except SystemExit as end:
    print("ended with", int(end.code))
print("imported", [name for name in sys.modules if name.split(".")[0] in ("lightning", "pytorch_lightning")])
"""


def test_the_plain_loop_resumes_bit_for_bit_without_lightning(bare_program, tmp_path):
    done = bare_program("-c", PLAIN, EXAMPLES / "plain_loop.py")
    assert done.returncode == 0, done.stderr
    assert "403 steps, 80 syncs" in done.stdout
    assert len(re.findall(r"test accuracy of the (?:slow|fast) weights: 9\d\.\d%", done.stdout)) == 2
    assert "after 202 steps: both sets equal bit for bit: True" in done.stdout
    assert "ended with 0\nimported []\n" in done.stdout
    assert (tmp_path / "outputs" / "plain_loop.pt").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    done = start(EXAMPLES / "resume.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "killed after 150 steps by SIGKILL" in done.stdout
    assert "goes on from epoch=2.ckpt, not from cut.ckpt" in done.stdout
    assert re.search(r"momentum: 0 of \d\d,\d{3} numbers differ", done.stdout)
    assert "equal bit for bit: True" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")])
def test_shards_are_saved_resumed_and_read_by_one_process(launcher, tmp_path):
    done = start(*launcher, EXAMPLES / "sharded.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = map(int, re.search(r"in each process: (\S+) and (\S+)", done.stdout.replace(",", "")).groups())
    whole = load_weights(tmp_path / "outputs/sharded/whole/epoch=3.ckpt", "slow")
    assert first + second == sum(value.numel() for value in whole.values())
    assert min(first, second) > 0.4 * (first + second)
    assert "__0_0.distcp, __1_0.distcp, meta.pt" in done.stdout
    assert len(re.findall(r"accuracy of the (?:slow|fast) weights, in one process: 9\d\.\d%", done.stdout)) == 2
    assert "resumed after epoch 2 of 4: both sets equal bit for bit: True" in done.stdout


@pytest.mark.slow
def test_workers_have_the_slow_weights_in_common_and_the_fast_ones_each_for_itself(tmp_path):
    done = start(EXAMPLES / "workers.py", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "slow weights: equal on both workers bit for bit: True" in done.stdout
    assert "fast weights: equal on both workers bit for bit: False" in done.stdout
    assert [row[:3] for row in rows(done.stdout)] == [
        ["DDP", "88", "88 x gradients"],
        ["apart, slow weights", "88", "8 x weights"],
        ["apart, fast weights of worker 0", "88", "8 x weights"],
        ["apart, fast weights of worker 1", "88", "8 x weights"],
    ]


def test_slow_weights_in_float32_hold_what_bfloat16_cannot(program):
    done = program(EXAMPLES / "bf16.py", "--seeds", "1", "--epochs", "1", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    whole, mixed, half = rows(done.stdout)
    assert whole[:2] == ["float32", "float32"]
    assert mixed[:2] == ["bfloat16", "float32"]
    assert half[:4] == ["bfloat16", "bfloat16", f"{int(mixed[2].replace(',', '')) // 2:,}", "0%"]
    assert whole[2] == mixed[2]
    assert mixed[3] != "0%"


def test_a_frozen_backbone_stays_as_it_was_and_has_no_slow_weights(program):
    done = program(EXAMPLES / "fine_tuning.py", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert [row[:4] for row in rows(done.stdout)] == [
        *([str(epoch), "2", "5,130", "yes"] for epoch in (1, 2, 3)),
        *([str(epoch), "6", "9,930", "no"] for epoch in (4, 5, 6)),
    ]


def test_momentum_in_the_outer_step_trains_in_four_ways(program):
    done = program(EXAMPLES / "outer_momentum.py", "--seeds", "1", "--epochs", "1", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert [row[1:3] for row in rows(done.stdout)] == [["", ""], ["5", "0.5"], ["20", "0.7"], ["20", "1.0"]]
    assert len({row[3] for row in rows(done.stdout)}) == 4


@pytest.mark.parametrize("name", ["digits", "gan", "figure10"])
def test_what_lookahead_refuses_is_said_before_training(name, program):
    done = program(EXAMPLES / f"{name}.py", "--alpha", "1.5")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"{name}.py: error: alpha=1.5 is out of range")


def test_the_table_of_examples_lists_what_is_there(program):
    done = program(EXAMPLES / "readme.py", "--check")
    assert done.returncode == 0, done.stderr
    text = (EXAMPLES / "README.md").read_text()
    no_examples = {"command_line.py", "common.py", "readme.py"}
    there = {path.name for path in EXAMPLES.glob("*.*") if path.suffix in {".py", ".yaml"}} - no_examples
    assert set(re.findall(r"^\| `.*examples/(\S+)` \| .+ \| \d+ \| .+ \|$", text, re.MULTILINE)) == there
