"""What the repository says in two places is the same in both."""

from importlib.metadata import version

import yaml

import lightning_lookahead
from tests.helpers.places import ROOT


def test_the_version_of_the_package_is_that_of_what_is_installed():
    assert lightning_lookahead.__version__ == version("lightning-lookahead")


def test_a_commit_is_checked_as_the_whole_is():
    (own,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    commands = [hook["entry"].replace("ruff format .", "ruff format --check .") for hook in own["hooks"]]
    assert [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line in commands] == commands
