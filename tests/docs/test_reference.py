"""What the pages have from the package is whole."""

import inspect
import re
import runpy
from pathlib import Path

import pytest
import torch

import lightning_lookahead
from lightning_lookahead import InnerOuterMonitor, LookaheadCallback, SlowWeights, theory
from lightning_lookahead.outer_loop.saved_format import VERSION
from tests.docs.pages import DOCS, text

INSERTED = runpy.run_path(str(DOCS / "hooks/inserted.py"))


def rows(table):
    return [re.split(r" \| ", line.strip("| ")) for line in table.splitlines()[2:]]


@pytest.mark.parametrize(
    ("path", "documented"),
    [
        ("trainer.callback.LookaheadCallback", LookaheadCallback),
        ("evaluation.monitor.InnerOuterMonitor", InnerOuterMonitor),
    ],
)
def test_the_tables_of_options_have_every_argument_with_its_default(path, documented):
    found = {name: default for name, default, _ in rows(INSERTED["options"](path))}
    arguments = inspect.signature(documented).parameters
    assert found == {f"`{n}`": f"`{a.default!r}`".replace("'", '"') for n, a in arguments.items()}


def test_the_table_of_keys_has_every_key_of_a_state():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    groups = [{"params": net[0].parameters()}, {"params": net[1].parameters(), "lookahead_k": 3}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    slow = SlowWeights(optimizer, k=2, module=net, pullback_momentum="pullback", buffers="sync")
    for _ in range(5):
        net(torch.randn(4, 2)).sum().backward()
        optimizer.step()
    documented = re.findall(r"`(\w+)`", " ".join(key for key, _ in rows(INSERTED["keys"]("outer_loop.saved_format"))))
    own = slow.state_dict().keys() - slow.settings.saved().keys()
    assert own == set(documented) - {"k", "alpha"}


def test_the_page_of_checkpoints_has_every_key_of_the_callbacks_state():
    callback = LookaheadCallback(monitor=InnerOuterMonitor())
    keys = callback.state_dict().keys() - callback.settings.saved().keys()
    assert all(f"`{key}`" in text("checkpoints.md") for key in keys)
    assert INSERTED["version"]("outer_loop.saved_format") == str(VERSION)


def test_the_api_has_every_public_name():
    assert sorted(re.findall(r"^::: lightning_lookahead\.(\w+)$", text("api/index.md"), re.MULTILINE)) == (
        lightning_lookahead.__all__
    )
    modules = {path.stem for path in Path(theory.__file__).parent.glob("[a-z]*.py")}
    shown = re.findall(r"^::: lightning_lookahead\.theory\.(\w+)$", text("api/theory.md"), re.MULTILINE)
    assert set(shown) == modules - {"noisy_quadratic"}  # it has names of the others
