"""A verify job: `python -m evals.verify DIR`. Runs a published version on its base before any engine sees it.

It refuses weights that are not finite, change nothing, or no longer speak (mean log-loss on general text), and leaves
`reference.json`: the log-probabilities that every later probe and parity check compares with.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import BaseModel, Field, ValidationError

from gateway.jobs.workdir import WorkDirectory
from gateway.registry.manifest import CONFIG_FILE, WEIGHTS_FILE, bundle_digest, canonical_bytes, canonical_config

from .errors import VerifyRefused
from .items import file_digest, load_rows

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = Path(__file__).parent / "tasks"
MAX_LOG_LOSS_RISE = 1.5  # nats per token over base on general text; good adapters move it by 0.1, a wreck by 20
MIN_EFFECT = 1e-3  # nats; the largest change of any reference log-probability. Arithmetic noise is a hundred times less
TOP = 10  # candidates of a reference prompt: the ten likeliest of the adapter and of the base
DTYPE = "float32"  # of the reference: engines in bf16 scatter around it

log = structlog.get_logger()


class VerifyJob(BaseModel, frozen=True, extra="ignore"):
    """`spec.json` of a verification."""

    token: str
    base_model_path: Path
    base_digest: str
    adapter_dir: Path
    digest: str
    threads: int | None = Field(default=None, ge=1)


class Findings(BaseModel, frozen=True):
    """What was measured."""

    log_loss: float
    base_log_loss: float
    effect: float = Field(description="largest change of a reference log-probability, in nats")
    tokens: int = Field(description="tokens of general text")


def check_files(adapter_dir: Path, digest: str) -> dict[str, Any]:
    """The canonical config of a version whose bytes are its digest's. Reads no weights into memory, imports no PEFT.

    PEFT imports modules that a config names, so a config with one key too many must not get near it.
    """
    raw = _read(adapter_dir / CONFIG_FILE)
    found = bundle_digest(raw, _digest(adapter_dir / WEIGHTS_FILE))
    if found != digest:
        text = f"the files on disk are {found[:12]}, the version is {digest[:12]}: they changed after publishing; publish the same bundle again"
        raise VerifyRefused(text, code="digest_mismatch")
    try:
        config = json.loads(raw)
        is_canonical = isinstance(config, dict) and canonical_bytes(canonical_config(config)) == raw
    except (ValueError, KeyError, TypeError, AttributeError):
        is_canonical = False
    if not is_canonical:
        text = f"{CONFIG_FILE} is not in the canonical form that publishing writes; publish the adapter again"
        raise VerifyRefused(text, code="bad_config")
    return dict(config)


def judge(findings: Findings) -> None:
    """Raise `VerifyRefused` unless the numbers are those of a working adapter."""
    if not math.isfinite(findings.log_loss):
        text = f"log-loss on general text is {findings.log_loss}: the training diverged; train again with a lower learning rate"
        raise VerifyRefused(text, code="non_finite")
    if findings.effect < MIN_EFFECT:
        text = (
            f"no log-probability differs from base by more than {findings.effect:.2g} nats (at least {MIN_EFFECT:g}): "
            "the adapter would answer as the base does; train it longer, or save the trained weights"
        )
        raise VerifyRefused(text, code="no_effect")
    rise = findings.log_loss - findings.base_log_loss
    if rise > MAX_LOG_LOSS_RISE:
        text = (
            f"mean log-loss on general text is {findings.log_loss:.2f} nats per token, base has {findings.base_log_loss:.2f} "
            f"(at most {MAX_LOG_LOSS_RISE:g} more): damaged weights, another base model, or a training that diverged"
        )
        raise VerifyRefused(text, code="log_loss")


def verify(spec: VerifyJob, work: WorkDirectory) -> Findings:
    """Measure the version, judge it, leave its reference."""
    config = check_files(spec.adapter_dir, spec.digest)
    work.say("files match their digest; loading the base model")
    import torch

    if spec.threads:
        torch.set_num_threads(spec.threads)
    model, tokenizer = _load_base(spec.base_model_path)
    prompts = _prompt_ids(tokenizer)
    texts = [tokenizer(row["text"])["input_ids"] for _, row in load_rows(TASKS / "general_texts.jsonl")]
    plain, base_log_loss, tokens = _next_token_logprobs(model, prompts), *_log_loss(model, texts)
    work.say("base model measured; loading the adapter")
    tuned_model = _with_adapter(model, config, spec.adapter_dir)
    tuned = _next_token_logprobs(tuned_model, prompts)
    if not torch.isfinite(tuned).all():
        raise VerifyRefused("log-probabilities are not finite: the training diverged; train again", code="non_finite")
    log_loss, _ = _log_loss(tuned_model, texts)
    reference = _reference(spec, prompts, tuned, plain)
    findings = Findings(log_loss=log_loss, base_log_loss=base_log_loss, effect=_effect(reference), tokens=tokens)
    judge(findings)
    (work.path / "reference.json").write_text(json.dumps(reference))
    return findings


def run(directory: Path) -> None:
    """Verify and leave the result. `ok=False` is a final refusal, unless its code is `digest_mismatch`: the files can be
    restored, and are then verified anew. Whatever else goes wrong is left to crash."""
    work = WorkDirectory(directory)
    raw = work.spec()
    try:
        spec = VerifyJob.model_validate(raw)
    except ValidationError as error:
        raise SystemExit(f"{directory / 'spec.json'}: {error}") from error
    try:
        findings = verify(spec, work)
    except VerifyRefused as error:
        log.warning("version refused", code=error.code, reason=error.message)
        work.finish(spec.token, ok=False, error_code=error.code, error_message=error.message)
        return
    work.say("verified", **findings.model_dump())
    work.finish(spec.token, ok=True, data=findings.model_dump())


def _load_base(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, DTYPE), local_files_only=True, trust_remote_code=False
    )
    return model.eval(), tokenizer


def _with_adapter(model: PreTrainedModel, config: dict[str, Any], adapter_dir: Path) -> torch.nn.Module:
    """The base with the adapter in it. Every tensor of the file must find its place, and every place a tensor."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        fields = {key: value for key, value in config.items() if key != "peft_type"}
        tuned = get_peft_model(model, LoraConfig(**fields, inference_mode=True))
        weights = load_file(adapter_dir / WEIGHTS_FILE)
        loaded = set_peft_model_state_dict(tuned, weights)
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise VerifyRefused(f"PEFT cannot load it: {str(error)[:300]}", code="bad_weights") from error
    missing = [key for key in loaded.missing_keys if "lora_" in key]
    if loaded.unexpected_keys or missing:
        text = f"tensors without a layer: {loaded.unexpected_keys[:3]}; layers without a tensor: {missing[:3]}; publish again"
        raise VerifyRefused(text, code="bad_weights")
    return tuned.eval()


def _prompt_ids(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Plain prompts, and chats up to where the assistant begins (plain ones only, on a base without a chat template)."""
    found = []
    for _, row in load_rows(TASKS / "reference_prompts.jsonl"):
        if "text" in row:
            found.append(tokenizer(row["text"])["input_ids"])
        elif tokenizer.chat_template:
            chat = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
            found.append(tokenizer(chat, add_special_tokens=False)["input_ids"])
        else:
            found.append(tokenizer("\n".join(message["content"] for message in row["messages"]))["input_ids"])
    return found


def _logits(model: torch.nn.Module, sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits of a batch, padded on the right: under causal attention the padding is never looked at."""
    import torch

    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits.float()


def _next_token_logprobs(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    import torch

    logits = _logits(model, prompts)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts])
    return logits[torch.arange(len(prompts)), last].log_softmax(-1)


def _log_loss(model: torch.nn.Module, texts: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Mean over all tokens but each text's first, in nats; and how many they were."""
    import torch

    total, tokens = 0.0, 0
    for start in range(0, len(texts), 4):
        batch = texts[start : start + 4]
        logits = _logits(model, batch)
        for row, text in enumerate(batch):
            targets = torch.tensor(text[1:])
            total += torch.nn.functional.cross_entropy(logits[row, : len(text) - 1], targets, reduction="sum").item()
            tokens += len(targets)
    return total / tokens, tokens


def _reference(
    spec: VerifyJob, prompts: Sequence[Sequence[int]], tuned: torch.Tensor, plain: torch.Tensor
) -> dict[str, Any]:
    rows = []
    for ids, adapter, base in zip(prompts, tuned, plain, strict=True):
        candidates = list(dict.fromkeys([*adapter.topk(TOP).indices.tolist(), *base.topk(TOP).indices.tolist()]))
        rows.append(
            {
                "token_ids": list(ids),
                "candidates": candidates,
                "adapter": adapter[candidates].tolist(),
                "base": base[candidates].tolist(),
            }
        )
    libraries = {name: version(name) for name in ("torch", "transformers", "peft")}
    fingerprint = {"backend": "hf+peft", "dtype": DTYPE, "base_digest": spec.base_digest, **libraries}
    return {"schema": 1, "digest": spec.digest, "prompts": rows, "fingerprint": fingerprint}


def _effect(reference: dict[str, Any]) -> float:
    pairs = ((prompt["adapter"], prompt["base"]) for prompt in reference["prompts"])
    return float(max(abs(a - b) for adapter, base in pairs for a, b in zip(adapter, base, strict=True)))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise VerifyRefused(f"{path.name} is missing; publish the adapter again", code="digest_mismatch") from None


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except FileNotFoundError:
        raise VerifyRefused(f"{path.name} is missing; publish the adapter again", code="digest_mismatch") from None


def main() -> None:
    """Entry point of the job's process."""
    run(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
