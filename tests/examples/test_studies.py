"""Studies of the paper's programs: runs that are done once, records that outlive what happens to them."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from examples.command_line import at_least_one
from examples.lab.report import Table, cell, spread
from examples.lab.study import Study
from tests.helpers.places import environment
from tests.helpers.points import Point, counted


def test_a_run_with_a_record_is_not_done_again_and_its_folder_is_gone(tmp_path):
    todo, done = [Point(0.1), Point(0.2)], []
    first = Study("try", tmp_path / "out").complete(todo, counted(done))
    again = Study("try", tmp_path / "out").complete([Point(0.3), *todo], counted(done))
    assert done == [*todo, Point(0.3)]
    assert again[1:] == first
    assert [record["results"]["accuracy"] for record in again] == [0.3, 0.1, 0.2]
    assert set(first[0]) == {"settings", "results", "seconds", "finished", "versions", "machine"}
    assert first[0]["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # less a build's name
    assert not [path for path in (tmp_path / "out" / "try").iterdir() if path.is_dir()]


def test_a_record_that_was_cut_off_is_made_again_and_a_damaged_one_is_named(tmp_path):
    study, done = Study("try", tmp_path), []
    study.complete([Point(0.1), Point(0.2)], counted(done))
    whole = study.file.read_text()
    study.file.write_text(whole[:-20])
    assert len(study.records()) == 1
    study.complete([Point(0.1), Point(0.2)], counted(done))
    assert done == [Point(0.1), Point(0.2), Point(0.2)]
    assert [record["settings"]["lr"] for record in study.records()] == [0.1, 0.2]
    study.file.write_text("{" + study.file.read_text())
    with pytest.raises(ValueError, match=r"try.jsonl, line 1 is damaged: delete the line"):
        study.records()


def test_what_is_no_number_becomes_null(tmp_path):
    results = {"loss": float("nan"), "curves": {"loss": [1.0, float("inf")]}}
    (record,) = Study("try", tmp_path).complete([Point(0.1)], counted([], lambda _: results))
    assert record["results"] == {"loss": None, "curves": {"loss": [1.0, None]}}
    assert cell([record], "loss") == "1 of 1 diverged"


FULL_DISK = """
import resource
from pathlib import Path
from tests.helpers.points import Point, counted
from examples.lab.study import Study
study = Study("try", Path("out"))
size = study.file.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, size + 100))
study.complete([Point(0.1), Point(0.2)], counted([]))
"""


def command(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
        **options,
    )


def test_a_full_disk_leaves_the_records_as_they_were(tmp_path, program):
    study = Study("try", tmp_path / "out")
    study.complete([Point(0.1)], counted([]))
    before = study.file.read_bytes()
    done = program("-c", FULL_DISK)
    assert "File too large" in done.stderr
    assert study.file.read_bytes() == before
    assert len(study.complete([Point(0.1), Point(0.2)], counted([]))) == 2


SHARED = """
import os, sys, time
from pathlib import Path
from tests.helpers.points import Point
from examples.lab.study import Study

def run(settings, folder):
    if sys.argv[1] == "hangs":
        print("begun", flush=True)
        time.sleep(600)
    time.sleep(0.2)
    return {"by": os.getpid()}

records = Study("try", Path("out")).complete([Point(lr / 10) for lr in range(6)], run)
print(sum(record["results"]["by"] == os.getpid() for record in records), len(records))
"""


@pytest.mark.slow
def test_two_processes_share_the_runs_and_each_returns_the_records_of_all(tmp_path):
    both = [command(SHARED, "works") for _ in range(2)]
    (mine, all_of_them), (others, _) = (map(int, one.communicate()[0].split()[-2:]) for one in both)
    assert mine + others == all_of_them == 6
    assert len((tmp_path / "out" / "try.jsonl").read_text().splitlines()) == 6
    assert not [path for path in (tmp_path / "out" / "try").iterdir() if path.is_dir()]


@pytest.mark.slow
def test_the_run_of_a_process_that_was_killed_is_taken_over():
    hanging = command(SHARED, "hangs")
    while "begun" not in hanging.stdout.readline():
        time.sleep(0.01)
    other = command(SHARED, "works")
    time.sleep(2)
    hanging.send_signal(signal.SIGKILL)
    hanging.communicate()
    assert other.communicate()[0].split()[-2:] == ["6", "6"]


def test_numbers_and_tables():
    assert spread([0.5, 0.7], "{:.1f}", scale=100) == "60.0 ± 14.1"
    assert spread([2.0]) == "2.00"
    runs = [{"results": {"loss": 1.0}}, {"results": {"loss": 2.0}}, {"results": {"diverged": 3}}]
    assert cell(runs, "loss", "{:.1f}") == "1.5 ± 0.7, 1 of 3 diverged"
    table = Table("What", ["a", "b"], [["x", "1"]])
    assert table.markdown() == "What\n\n| a | b |\n| --- | ---: |\n| x | 1 |"
    assert json.dumps(table.rich().title) == '"What"'


@pytest.mark.parametrize("text", ["0", "-3"])
def test_seeds_must_be_at_least_one(text):
    with pytest.raises(Exception, match=f"{text}: must be at least 1"):
        at_least_one(text)
