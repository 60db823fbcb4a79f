"""What the demo tells to type next."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deploy.demo import run


@pytest.fixture
def _in_a_venv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.mark.usefixtures("_in_a_venv")
def test_a_shell_without_the_command_is_told_how_to_get_it() -> None:
    assert run.where_to_go(8321, keep=True)[0] == "source .venv/bin/activate"


@pytest.mark.usefixtures("_in_a_venv")
def test_a_shell_that_has_the_command_is_not(tmp_path: Path) -> None:
    command = tmp_path / "bin" / "turnout"
    command.parent.mkdir()
    command.touch(mode=0o755)

    assert run.where_to_go(8321, keep=True)[0].startswith("export TURNOUT_URL=http://127.0.0.1:8321 ")


@pytest.mark.parametrize("keep", [True, False])
def test_a_server_that_was_stopped_is_started_first(keep: bool) -> None:
    assert any(line.startswith("turnout serve") for line in run.where_to_go(1, keep=keep)) is not keep
