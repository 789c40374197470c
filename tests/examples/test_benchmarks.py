"""The benchmarks still run, on next to nothing; what they measure there means nothing."""

import json
import re
import subprocess
import sys

import pytest

from tests.helpers.places import EXAMPLES, environment

BENCHMARKS = EXAMPLES / "benchmarks"
PROGRAMS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem not in {"results", "on_cuda"})


def start(name, *arguments, cwd):
    return subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *arguments],
        cwd=cwd,
        env=environment(COLUMNS="300", CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.benchmark
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_smoke_run_prints_tables_and_writes_what_they_hold(name, tmp_path):
    done = start(name, "--smoke", "--json", "found/report.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    if name == "offload":  # without a GPU there is nothing to measure, and no file that says otherwise
        assert "needs a CUDA device" in done.stdout
        assert not (tmp_path / "found").exists()
        return
    report = json.loads((tmp_path / "found" / "report.json").read_text())
    assert report["program"] == name
    assert report["rows"]
    assert report["command"] == f"python examples/benchmarks/{name}.py --smoke"
    assert report["versions"]["torch"] in done.stdout
    assert "┃" in done.stdout


@pytest.mark.benchmark
def test_a_device_that_is_not_there_is_said_in_one_line(program):
    done = program(BENCHMARKS / "sync.py", "--device", "cuda")
    assert done.returncode == 1
    assert done.stderr == "sync.py: there is no CUDA device here.\n"


@pytest.mark.benchmark
def test_the_published_results_are_what_the_records_give(program):
    done = program(BENCHMARKS / "results.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr
    published = (BENCHMARKS / "RESULTS.md").read_text()
    assert sorted(re.findall(r"<!-- records: (\w+) -->", published)) == sorted(
        ["cuda", *(path.stem for path in (BENCHMARKS / "records").glob("*.json"))]
    )


@pytest.mark.slow
@pytest.mark.benchmark
def test_one_call_does_all_that_is_to_be_measured_on_a_gpu(tmp_path):
    done = start("on_cuda", "--smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    rest = set(PROGRAMS) - {"convergence", "scale"}  # which ask nothing of a device
    assert {name for name in PROGRAMS if f"\n{name}: done" in done.stdout} == rest
    assert not list(tmp_path.iterdir())


@pytest.mark.benchmark
def test_without_a_gpu_that_call_says_so_in_one_line(program):
    done = program(BENCHMARKS / "on_cuda.py")
    assert done.returncode == 1
    assert done.stderr == "on_cuda.py: there is no CUDA device here.\n"
