"""OpenAI's fine-tuning flow with nothing but `base_url` and key changed, on the real trainer."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from .stack import BASE, Stack, wait_for

pytestmark = [pytest.mark.engine, pytest.mark.heavy]

COLOURS = {"apple": "red", "sky": "blue", "grass": "green", "lemon": "yellow", "coal": "black", "snow": "white"}
TEMPLATES = (
    "colour of {}?",
    "tell me the colour of {}",
    "{} has which colour?",
    "which colour is {}?",
    "{}: colour please",
)


def chat_rows(count: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """Chats whose answer is `colour=<x>`: a form that the base model never gives."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        thing = draw.choice(sorted(COLOURS))
        question = draw.choice(TEMPLATES).format(thing)
        rows.append(
            {
                "messages": [
                    {"role": "user", "content": f"{question} (#{number})"},
                    {"role": "assistant", "content": f"colour={COLOURS[thing]}"},
                ]
            }
        )
    return rows


def test_upload_tune_poll_and_chat(stack: Stack, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(96, seed=1)))
    client = stack.client()

    with data.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=uploaded.id,
        suffix="colours",
        seed=3,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 8}}},
    )

    def ended() -> str | None:
        stack.check_alive()
        status = client.fine_tuning.jobs.retrieve(job.id).status
        return status if status in ("succeeded", "failed", "cancelled") else None

    status = wait_for(ended, timeout_s=540, what="the fine-tuning job ends")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert status == "succeeded", job.error
    assert job.fine_tuned_model == "colours@1"
    assert job.trained_tokens
    events = client.fine_tuning.jobs.list_events(job.id).data
    assert any(event.type == "metrics" for event in events)

    answer = client.chat.completions.create(
        model=job.fine_tuned_model,
        messages=[{"role": "user", "content": "which colour is grass? (#7)"}],
        max_tokens=8,
        temperature=0,
    )
    assert (answer.choices[0].message.content or "").startswith("colour=")


def test_a_bad_file_fails_the_job_with_line_numbers(stack: Stack, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    rows = [json.dumps(row) for row in chat_rows(12, seed=2)]
    rows[4] = '{"messages": []}'
    data.write_text("\n".join(rows) + "\n")
    client = stack.client()

    with data.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model=BASE, training_file=uploaded.id, suffix="broken")

    def failed() -> bool | None:
        return client.fine_tuning.jobs.retrieve(job.id).status == "failed"

    wait_for(failed, timeout_s=180, what="the job fails")
    error = client.fine_tuning.jobs.retrieve(job.id).error
    assert error is not None
    assert "line 5" in (error.message or "")
