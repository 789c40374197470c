"""Checkpoints that earlier code has written, read bit for bit. ``python -m tests.golden.make`` writes new ones."""

from pathlib import Path

import pytest
import torch

from lightning_lookahead import load_weights
from tests.golden import make

GOLDEN = Path(make.__file__).parent


def same(left, right):
    assert left.keys() == right.keys()
    for name, value in right.items():
        assert left[name].dtype == value.dtype
        assert torch.equal(left[name], value), name


def expected(kind):
    return torch.load(GOLDEN / f"{kind}.expected.pt", weights_only=True)


def test_all_kinds_are_there_and_are_small():
    assert {path.stem for path in GOLDEN.glob("*.ckpt")} == set(make.KINDS)
    assert sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file()) < 200_000


@pytest.mark.parametrize("kind", make.KINDS)
def test_both_sets_are_read_without_a_trainer(kind):
    for weights, values in expected(kind).items():
        found = load_weights(GOLDEN / f"{kind}.ckpt", weights)
        same({name: value.to(values[name]) for name, value in found.items()}, values)


@pytest.mark.filterwarnings("ignore:The checkpoint's Lookahead settings")
@pytest.mark.parametrize("kind", [kind for kind in make.KINDS if kind not in make.OF_TWO])
def test_a_run_goes_on_from_it(kind):
    _, module, callback = make.fit(kind, ckpt_path=GOLDEN / f"{kind}.ckpt")  # which has nothing left to train
    for weights, values in make.both(module, callback).items():
        same(values, expected(kind)[weights])
    syncs = {"groups": [1], "players": [1, 1]}.get(kind, [1])
    assert [slow.syncs for slow in callback.slow_weights] == syncs
    assert {slow.steps for slow in callback.slow_weights} == {make.STEPS}
    if kind == "monitor":
        assert [(record.step, record.weights) for record in callback.monitor.history][:3] == [
            (0, "outer"),
            (1, "inner"),
            (2, "inner"),
        ]
    _, _, again = make.fit(kind, steps=7, ckpt_path=GOLDEN / f"{kind}.ckpt")
    assert {slow.steps for slow in again.slow_weights} == {7}


@pytest.mark.parametrize(("kind", "of_each"), [("shards", ["shards", "shards"]), ("apart", ["apart", "apart-1"])])
def test_ranks_go_on_from_it(kind, of_each, ranks):
    for own, (sets, counts) in zip(of_each, ranks(2, make.resume, kind), strict=True):
        for weights, values in expected(own).items():
            same(sets[weights], values)
        assert counts == (make.STEPS, 1)
