"""The verify job on the real base model: what it refuses, and the reference that it leaves."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from evals.errors import VerifyRefused
from evals.verify import Findings, check_files, judge
from gateway.registry.base_family import BaseFamily, load_base_family
from gateway.registry.manifest import bundle_digest, canonical_bytes, canonical_config
from gateway.registry.reference import Reference
from tests.corpus import BAD, make_adapter, make_base

BASE = Path(__file__).parents[2] / "build" / "models" / "smollm2-135m-instruct"
Build = Callable[[Path, BaseFamily], object]


@dataclass(frozen=True)
class Published:
    path: Path
    digest: str


def publish(folder: Path, base: BaseFamily, build: Build) -> Published:
    """Files as publishing leaves them, whatever pre-flight would have said."""
    source, target = folder / "source", folder / "artifact"
    build(source, base)
    target.mkdir()
    config = canonical_bytes(
        canonical_config(json.loads((source / "adapter_config.json").read_text()), base_model=base.name)
    )
    (target / "adapter_config.json").write_bytes(config)
    shutil.copy(source / "adapter_model.safetensors", target)
    weights = sha256((target / "adapter_model.safetensors").read_bytes()).hexdigest()
    return Published(target, bundle_digest(config, weights))


def digest_of(folder: Path) -> str:
    """What these files would have been published as."""
    weights = sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    return bundle_digest((folder / "adapter_config.json").read_bytes(), weights)


def good(folder: Path, base: BaseFamily) -> object:
    return make_adapter(folder, base)


# ---- Files: before anything heavy is imported. ---------------------------------------------------------------------


@pytest.fixture
def artifact(tmp_path: Path) -> Published:
    return publish(tmp_path, make_base(tmp_path / "base"), good)


def test_canonical_files_are_accepted(artifact: Published) -> None:
    assert check_files(artifact.path, artifact.digest)["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "change",
    [
        {"auto_mapping": {"base_model_class": "x", "parent_library": "planted"}},
        {"megatron_core": "planted"},
        {"use_something_new": True},
        {"target_modules": ["v_proj", "q_proj"]},
        {"lora_alpha": "16"},
    ],
)
def test_a_config_that_publishing_would_not_write_is_refused(artifact: Published, change: dict[str, Any]) -> None:
    path = artifact.path / "adapter_config.json"
    path.write_bytes(canonical_bytes({**json.loads(path.read_text()), **change}))

    with pytest.raises(VerifyRefused, match="canonical form") as refused:
        check_files(artifact.path, digest_of(artifact.path))

    assert refused.value.code == "bad_config"


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"r": 8}'])
def test_a_config_that_is_none_is_refused(artifact: Published, content: bytes) -> None:
    (artifact.path / "adapter_config.json").write_bytes(content)

    with pytest.raises(VerifyRefused) as refused:
        check_files(artifact.path, digest_of(artifact.path))

    assert refused.value.code == "bad_config"


@pytest.mark.parametrize("content", [b"", b"{", b'{"r": 8}'])
def test_a_config_that_was_damaged_is_no_fault_of_the_version(artifact: Published, content: bytes) -> None:
    (artifact.path / "adapter_config.json").write_bytes(content)

    with pytest.raises(VerifyRefused) as refused:
        check_files(artifact.path, artifact.digest)

    assert refused.value.code == "digest_mismatch"


def test_weights_that_changed_on_disk_are_refused(artifact: Published) -> None:
    path = artifact.path / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    with pytest.raises(VerifyRefused, match="changed after publishing") as refused:
        check_files(artifact.path, artifact.digest)

    assert refused.value.code == "digest_mismatch"


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_refused(artifact: Published, name: str) -> None:
    (artifact.path / name).unlink()

    with pytest.raises(VerifyRefused) as refused:
        check_files(artifact.path, artifact.digest)

    assert refused.value.code == "digest_mismatch"


@pytest.mark.parametrize(
    ("findings", "code"),
    [
        (Findings(log_loss=math.nan, base_log_loss=3.1, effect=1.0, tokens=500), "non_finite"),
        (Findings(log_loss=math.inf, base_log_loss=3.1, effect=1.0, tokens=500), "non_finite"),
        (Findings(log_loss=3.1, base_log_loss=3.1, effect=1e-5, tokens=500), "no_effect"),
        (Findings(log_loss=4.7, base_log_loss=3.1, effect=1.0, tokens=500), "log_loss"),
    ],
)
def test_numbers_of_no_working_adapter_are_refused(findings: Findings, code: str) -> None:
    with pytest.raises(VerifyRefused) as refused:
        judge(findings)

    assert refused.value.code == code


@pytest.mark.parametrize("log_loss", [2.5, 3.1, 3.3, 4.5])
def test_numbers_of_a_working_adapter_are_accepted(log_loss: float) -> None:
    judge(Findings(log_loss=log_loss, base_log_loss=3.1, effect=0.5, tokens=500))


# ---- The real thing ------------------------------------------------------------------------------------------------

CASES: dict[str, Build] = {
    "good": good,
    "bit_flips": BAD["bit_flips"].build,
    "diverged": BAD["diverged"].build,
    "wrong_base_unnamed": BAD["wrong_base_unnamed"].build,
    "no_measurable_effect": BAD["no_measurable_effect"].build,
    "all_nan": BAD["all_nan"].build,
}
# One process for all cases: importing the libraries takes longer than verifying.
PROGRAM = "import sys; from pathlib import Path; from evals.verify import run; [run(Path(d)) for d in sys.argv[1:]]"


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Attempt directories of a verification of each case, finished."""
    base = load_base_family("smollm2-135m", BASE)
    directories = {}
    for name, build in CASES.items():
        folder = tmp_path_factory.mktemp(name)
        found = publish(folder, base, build)
        directories[name] = folder / "attempt"
        directories[name].mkdir()
        spec = {
            "token": name, "base_model_path": str(BASE), "base_digest": base.digest, "adapter_dir": str(found.path),
            "digest": found.digest, "threads": 2,
        }  # fmt: skip
        (directories[name] / "spec.json").write_text(json.dumps(spec))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, directories.values())], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directories


def the_result(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "result.json").read_text())
    return found


@pytest.mark.heavy
def test_a_good_adapter_is_verified(verified: dict[str, Path]) -> None:
    result = the_result(verified["good"])

    assert result["ok"]
    assert result["token"] == "good"
    assert 2.5 < result["data"]["base_log_loss"] < 3.8
    assert abs(result["data"]["log_loss"] - result["data"]["base_log_loss"]) < 0.5
    assert result["data"]["effect"] > 0.1


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "code"),
    [(name, BAD[name].code) for name in CASES if name != "good"],
)
def test_what_only_running_shows_is_refused(verified: dict[str, Path], name: str, code: str) -> None:
    result = the_result(verified[name])

    assert not result["ok"]
    assert result["error_code"] == code
    assert not (verified[name] / "reference.json").exists()


@pytest.mark.heavy
def test_the_reference_holds_what_probes_need(verified: dict[str, Path]) -> None:
    reference = Reference.model_validate_json((verified["good"] / "reference.json").read_bytes())

    assert len(reference.prompts) == 16
    assert len({prompt.token_ids for prompt in reference.prompts}) == 16
    for prompt in reference.prompts:
        assert 10 <= len(prompt.candidates) <= 20
        assert len(set(prompt.candidates)) == len(prompt.candidates) == len(prompt.adapter) == len(prompt.base)
        assert all(math.isfinite(value) and value <= 0 for value in (*prompt.adapter, *prompt.base))
        assert sum(map(math.exp, prompt.base)) <= 1 + 1e-6
    assert reference.fingerprint["backend"] == "hf+peft"


@pytest.mark.heavy
def test_chats_in_the_reference_end_where_the_assistant_begins(verified: dict[str, Path]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))
    reference = Reference.model_validate_json((verified["good"] / "reference.json").read_bytes())

    texts = [tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False) for prompt in reference.prompts]

    assert sum(text.endswith("<|im_start|>assistant\n") for text in texts) == 8
