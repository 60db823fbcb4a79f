from pathlib import Path

import pytest

from evals.errors import FingerprintMismatch
from evals.scores import Answer, Fingerprint, ScoreCache, ScoreSet, check_comparable

BASE, ADAPTER, TASK, OTHER_TASK = "a" * 64, "b" * 64, "c" * 64, "d" * 64


def a_fingerprint(**fields: str) -> Fingerprint:
    given = {"backend": "gateway", "base_digest": BASE, "engine": "vllm-1", "dtype": "bfloat16", "harness": "lm-eval 1"}
    return Fingerprint.model_validate({**given, **fields})


def a_set(target: str = BASE, task: str = TASK, fingerprint: Fingerprint | None = None, **answers: str) -> ScoreSet:
    return ScoreSet(
        target_digest=target, task="emails", task_digest=task, fingerprint=fingerprint or a_fingerprint(),
        answers=tuple(Answer(item=item, text=text) for item, text in answers.items()),
    )  # fmt: skip


def test_what_was_saved_is_found_again(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.save(a_set(one="yes", two="no"))

    found = cache.load(BASE, "emails", TASK, a_fingerprint())

    assert found == a_set(one="yes", two="no")
    assert [path.name for path in tmp_path.rglob("*.json")] == [f"{TASK}-{a_fingerprint().digest}.json"]


@pytest.mark.parametrize(
    ("target", "task", "fingerprint"),
    [
        (ADAPTER, TASK, a_fingerprint()),
        (BASE, OTHER_TASK, a_fingerprint()),
        (BASE, TASK, a_fingerprint(engine="vllm-2")),
        (BASE, TASK, a_fingerprint(dtype="float32")),
        (BASE, TASK, a_fingerprint(base_digest=ADAPTER)),
        (BASE, TASK, a_fingerprint(harness="lm-eval 2")),
        (BASE, TASK, a_fingerprint(backend="hf+peft")),
    ],
)
def test_answers_of_other_weights_tasks_or_conditions_are_never_returned(
    tmp_path: Path, target: str, task: str, fingerprint: Fingerprint
) -> None:
    cache = ScoreCache(tmp_path)
    cache.save(a_set(one="yes"))

    assert cache.load(target, "emails", task, fingerprint).answers == ()


def test_a_file_under_anothers_name_is_not_believed(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path)
    cache.save(a_set(one="yes"))
    wrong = cache.path(ADAPTER, TASK, a_fingerprint())
    wrong.parent.mkdir()
    cache.path(BASE, TASK, a_fingerprint()).rename(wrong)

    assert cache.load(ADAPTER, "emails", TASK, a_fingerprint()).answers == ()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"answers": 3}', b"\xff\xfe"])
def test_a_damaged_file_is_scored_anew(tmp_path: Path, content: bytes) -> None:
    cache = ScoreCache(tmp_path)
    cache.save(a_set(one="yes"))
    cache.path(BASE, TASK, a_fingerprint()).write_bytes(content)

    assert cache.load(BASE, "emails", TASK, a_fingerprint()) == a_set()


def test_a_save_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ScoreCache(tmp_path)
    cache.save(a_set(one="yes"))

    def dies(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", dies)
    with pytest.raises(OSError, match="no space"):
        cache.save(a_set(one="yes", two="no"))

    assert cache.load(BASE, "emails", TASK, a_fingerprint()) == a_set(one="yes")


def test_only_missing_items_are_asked_again() -> None:
    assert a_set(one="yes", three="no").missing(["one", "two", "three", "four"]) == ("two", "four")


def test_the_first_answer_stays() -> None:
    found = a_set(one="yes").extended([Answer(item="one", text="changed"), Answer(item="two", text="no")])

    assert found == a_set(one="yes", two="no")


def test_scores_under_other_conditions_are_not_compared() -> None:
    with pytest.raises(FingerprintMismatch, match=r"engine: vllm-1 against vllm-2"):
        check_comparable(a_set(), a_set(ADAPTER, fingerprint=a_fingerprint(engine="vllm-2")))


def test_scores_under_the_same_conditions_are_compared() -> None:
    check_comparable(a_set(), a_set(ADAPTER))
