"""The list of faults fits the code, and the program that plants them tells a noticed one from one that was not."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.faults import Fault, load_faults
from tests.mutants.run import Result, copied_tree, is_enough, try_fault

ROOT = Path(__file__).resolve().parents[2]
FAULTS = load_faults()


def test_every_fault_finds_its_place_exactly_once() -> None:
    misplaced = []
    for fault in FAULTS:
        try:
            ast.parse(fault.planted((ROOT / fault.file).read_text()))
        except (ValueError, SyntaxError) as error:
            misplaced.append(f"{fault.name}: {error}")

    assert misplaced == []


def test_every_fault_has_a_name_of_its_own() -> None:
    assert [name for name, times in Counter(fault.name for fault in FAULTS).items() if times > 1] == []


def test_every_test_that_must_notice_exists() -> None:
    missing = [
        f"{fault.name}: {test}"
        for fault in FAULTS
        for test in fault.tests
        for path, _, function in [test.partition("::")]
        if not (ROOT / path).is_file() or (function and f"def {function}(" not in (ROOT / path).read_text())
    ]

    assert missing == []


def test_the_list_is_long_and_little_of_it_is_excused() -> None:
    excused = [fault.name for fault in FAULTS if fault.equivalent is not None]

    assert len(FAULTS) >= 100
    assert len(excused) <= 0.05 * len(FAULTS)


# ---- The program


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A product of one line with a test that looks at half of it."""
    (tmp_path / "gateway").mkdir()
    (tmp_path / "gateway" / "door.py").write_text(
        "def may(key: str, host: str) -> bool:\n    return key == 'k' and host == 'h'\n"
    )
    (tmp_path / "tests").mkdir()
    test = "from gateway.door import may\n\n\ndef test_a_key_is_needed():\n    assert not may('', 'h')\n"
    (tmp_path / "tests" / "test_door.py").write_text(test)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    return tmp_path


def a_fault(old: str, new: str) -> Fault:
    return Fault(name="planted", harm="none", file="gateway/door.py", old=old, new=new, tests=("tests/test_door.py",))


@pytest.mark.parametrize(
    ("old", "new", "outcome"),
    [
        ("key == 'k'", "len(key) < 9", "killed"),
        ("and host == 'h'", "and host != 'g'", "survived"),
        ("return key", "return return key", "broken"),
        ("no such text", "x", "misplaced"),
        ("==", "!=", "misplaced"),
    ],
)
def test_a_fault_is_noticed_or_not(tree: Path, old: str, new: str, outcome: str) -> None:
    before = (tree / "gateway" / "door.py").read_text()

    with copied_tree(tree) as copy:
        result = try_fault(copy, a_fault(old, new))
        assert (copy / "gateway" / "door.py").read_text() == before

    assert result.outcome == outcome
    assert (tree / "gateway" / "door.py").read_text() == before


@pytest.mark.parametrize(
    ("killed", "others", "enough"),
    [(19, ["survived"], True), (18, ["survived"], False), (99, ["broken"], False), (99, ["misplaced"], False)],
)
def test_few_may_survive_and_none_may_stay_untried(killed: int, others: list[str], *, enough: bool) -> None:
    fault = a_fault("a", "b")
    results = [Result(fault, "killed", 1.0)] * killed + [
        Result(fault, outcome, 1.0)  # type: ignore[arg-type]
        for outcome in others
    ]

    assert is_enough(results) is enough


def test_a_fault_without_tests_says_why_none_can_notice_it() -> None:
    with pytest.raises(ValueError, match="the reason why none can notice"):
        Fault(name="planted", harm="none", file="f.py", old="a", new="b")
