"""Files, fine-tuning, adapters, evaluations and the audit log over HTTP, with OpenAI's own client where OpenAI has one."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import FileObject
from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
from sqlalchemy import insert, update

from gateway import tables
from gateway.api.declared import MAX_JSON_BYTES
from gateway.api.fine_tuning import fine_tuning_job
from gateway.app import Gateway
from gateway.handover import listening_socket
from gateway.ids import now
from gateway.jobs.models import JobState
from gateway.migrations.run import migrate
from gateway.registry.models import VersionState
from gateway.settings import BaseModelSettings, EngineSettings, Limits, Settings, load_settings
from tests.corpus import BAD, make_base, make_bundle
from tests.jobs_world import chat_rows

FILE_LIMIT = 200_000
ROWS = b"".join(json.dumps(row).encode() + b"\n" for row in chat_rows(20))


@dataclass
class Api:
    """A gateway with its clients."""

    gateway: Gateway
    tmp_path: Path

    async def key(self, *scopes: str, project_id: str = "proj_default") -> str:
        name = "-".join((*scopes, project_id, os.urandom(3).hex()))
        _, raw = await self.gateway.keys.create(name, scopes, actor="test", project_id=project_id)
        await self.gateway.table.refresh()
        return raw

    async def client(self, *scopes: str, project_id: str = "proj_default") -> httpx.AsyncClient:
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.gateway.front),
            base_url="http://gateway",
            headers={"authorization": f"Bearer {await self.key(*scopes, project_id=project_id)}"},
        )

    async def sdk(self) -> AsyncOpenAI:
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=self.gateway.front))
        return AsyncOpenAI(
            base_url="http://gateway/v1", api_key=await self.key("train"), http_client=http, max_retries=0
        )

    async def publish(self, client: httpx.AsyncClient, *, seed: int = 0, adapter: str = "support") -> httpx.Response:
        folder = make_bundle(self.tmp_path / f"bundle-{seed}", self.gateway.services.registry.base, seed=seed)
        return await client.post(f"/api/adapters/{adapter}/versions", files=bundle_files(folder))

    async def verified(self, client: httpx.AsyncClient, *, seed: int = 0) -> None:
        made = await self.publish(client, seed=seed)
        registry = self.gateway.services.registry
        await registry.set_state(made.json()["id"], VersionState.VERIFIED, code=None, reason=None, actor="test")
        suite = self.gateway.settings.suites_dir / "emails"
        suite.mkdir(exist_ok=True)
        (suite / "suite.yaml").write_text("name: emails\n")


def bundle_files(folder: Path) -> dict[str, tuple[str, bytes]]:
    names = {
        "adapter_config": "adapter_config.json",
        "adapter_model": "adapter_model.safetensors",
        "manifest": "manifest.json",
    }
    return {field: (name, (folder / name).read_bytes()) for field, name in names.items() if (folder / name).is_file()}


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    base = make_base(tmp_path / "base")
    settings = Settings(
        home=tmp_path / "home",
        base_model=BaseModelSettings(name=base.name, path=base.path),
        engine=EngineSettings(enabled=False),
        limits=Limits(file_bytes=FILE_LIMIT, config_bytes=20_000, adapter_bytes=300_000),
    )
    await migrate(settings)
    gateway = Gateway(settings)
    await gateway.start()
    try:
        yield Api(gateway, tmp_path)
    finally:
        await gateway.stop()


def leftovers(api: Api) -> list[Path]:
    """Files of uploads that were not kept."""
    settings = api.gateway.settings
    staged = (settings.artifacts_dir / ".staging").rglob("*")
    return [path for path in (*settings.files_dir.rglob("*"), *staged) if path.is_file()]


def error_of(answer: httpx.Response) -> tuple[int, str | None, str | None]:
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return answer.status_code, error["code"], error["param"]


# ---- files ----


async def test_files_with_openais_client(api: Api) -> None:
    async with await api.sdk() as client:
        made = await client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
        shown = await client.files.retrieve(made.id)
        second = await client.files.create(file=("more.jsonl", ROWS), purpose="fine-tune")
        listed = [file.id async for file in client.files.list(limit=1)]
        oldest_first = [file.id async for file in client.files.list(order="asc", purpose="fine-tune")]
        content = (await client.files.content(made.id)).content
        deleted = await client.files.delete(made.id)

        FileObject.model_validate(made.model_dump(), strict=True)
        assert made == shown
        assert (made.bytes, made.filename, made.purpose, made.status) == (
            len(ROWS),
            "train.jsonl",
            "fine-tune",
            "processed",
        )
        assert listed == [second.id, made.id]
        assert oldest_first == [made.id, second.id]
        assert content == ROWS
        assert (deleted.id, deleted.deleted) == (made.id, True)
        with pytest.raises(openai.NotFoundError) as gone:
            await client.files.retrieve(made.id)
        assert gone.value.code == "file_not_found"
        assert not (api.gateway.settings.files_dir / made.id).exists()


async def test_other_purposes_are_refused_in_openais_words(api: Api) -> None:
    async with await api.sdk() as client:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.files.create(file=("x.jsonl", ROWS), purpose="batch")

    assert (refused.value.code, refused.value.param) == ("invalid_purpose", "purpose")
    assert leftovers(api) == []


UPLOADS: list[tuple[str, dict[str, Any], int, str]] = [
    ("a path", {"files": {"file": ("../../etc/passwd", ROWS)}}, 400, "bad_filename"),
    ("an absolute path", {"files": {"file": ("/etc/passwd", ROWS)}}, 400, "bad_filename"),
    ("dots", {"files": {"file": ("..", ROWS)}}, 400, "bad_filename"),
    ("a control character", {"files": {"file": ("a\x7fb", ROWS)}}, 400, "bad_filename"),
    ("a long name", {"files": {"file": ("n" * 300, ROWS)}}, 400, "bad_filename"),
    ("another part", {"files": {"file": ("a", ROWS), "extra": ("b", b"x")}}, 400, "unknown_part"),
    ("the file twice", {"files": [("file", ("a", ROWS)), ("file", ("b", ROWS))]}, 400, "duplicate_part"),
    ("an empty file", {"files": {"file": ("a", b"")}}, 400, "empty_file"),
    ("too large", {"files": {"file": ("a", b"x" * (FILE_LIMIT + 1))}}, 413, "too_large"),
    ("far too large", {"files": {"file": ("a", b"x" * (2 * FILE_LIMIT + 100_000))}}, 413, "too_large"),
]


@pytest.mark.parametrize(("upload", "status", "code"), [row[1:] for row in UPLOADS], ids=[row[0] for row in UPLOADS])
async def test_uploads_that_are_refused(api: Api, upload: dict[str, Any], status: int, code: str) -> None:
    async with await api.client("train") as client:
        answer = await client.post("/v1/files", data={"purpose": "fine-tune"}, **upload)

    assert error_of(answer)[:2] == (status, code)
    assert leftovers(api) == []


async def test_a_form_without_a_file_or_purpose(api: Api) -> None:
    async with await api.client("train") as client:
        no_file = await client.post("/v1/files", files={"purpose": (None, b"fine-tune")})
        no_purpose = await client.post("/v1/files", files={"file": ("a", ROWS)})
        long_purpose = await client.post("/v1/files", files={"purpose": (None, b"x" * 5_000), "file": ("a", ROWS)})
        no_form = await client.post("/v1/files", json={"purpose": "fine-tune"})

    assert error_of(no_file) == (400, "missing_file", "file")
    assert error_of(no_purpose) == (400, "missing_field", "purpose")
    assert error_of(long_purpose)[:2] == (413, "too_large")
    assert error_of(no_form)[:2] == (400, "not_multipart")
    assert leftovers(api) == []


RAW_BODIES: list[tuple[str, bytes, str]] = [
    ("nothing", b"", "upload_incomplete"),
    ("no boundary", b"hello", "bad_multipart"),
    ("cut in a header", b"--B\r\nContent-Disp", "upload_incomplete"),
    ("cut in the file", b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nrows', "upload_incomplete"),
    ("cut before the end", b'--B\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nrows\r\n--B', "upload_incomplete"),
    ("no name", b"--B\r\nContent-Type: text/plain\r\n\r\nx\r\n--B--\r\n", "unknown_part"),
    ("a flood of headers", b"--B\r\n" + b"X-A: 1\r\n" * 5_000 + b"\r\nx\r\n--B--\r\n", "bad_multipart"),
    ("a huge header", b"--B\r\nX-A: " + b"a" * 50_000 + b"\r\n\r\nx\r\n--B--\r\n", "bad_multipart"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "code"), [row[1:] for row in RAW_BODIES], ids=[row[0] for row in RAW_BODIES])
@pytest.mark.parametrize("piece", [1, 100_000])
async def test_malformed_bodies_leave_nothing(api: Api, body: bytes, code: str, piece: int) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), piece):
            yield body[start : start + piece]

    async with await api.client("train") as client:
        headers = {"content-type": "multipart/form-data; boundary=B"}
        answer = await client.post("/v1/files", content=pieces(), headers=headers)

    assert error_of(answer)[:2] == (400, code)
    assert leftovers(api) == []


async def test_only_uploads_are_read_beyond_the_cap_of_bodies(api: Api) -> None:
    body = b"x" * (MAX_JSON_BYTES + 1)
    async with await api.client("train") as client:
        for path in ("/v1/fine_tuning/jobs", "/api/evaluations", "/api/jobs/x/cancel"):
            headers = {"content-type": "multipart/form-data; boundary=B"}
            answer = await client.post(path, content=body, headers=headers)
            assert answer.status_code == 413, path


async def test_a_file_that_a_job_needs_is_not_deleted(api: Api) -> None:
    async with await api.sdk() as client:
        file = await client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
        job = await client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        with pytest.raises(openai.ConflictError) as refused:
            await client.files.delete(file.id)
        assert refused.value.code == "file_in_use"
        assert (await client.files.retrieve(file.id)).id == file.id

        await client.fine_tuning.jobs.cancel(job.id)
        assert (await client.files.delete(file.id)).deleted


@pytest.fixture
def small_disk(request: pytest.FixtureRequest, api: Api) -> Any:
    """64 kB under one of the home's directories."""
    path: Path = getattr(api.gateway.settings, request.param)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], capture_output=True, check=False
    )
    if made.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("small_disk", ["files_dir"], indirect=True)
async def test_a_full_disk_is_507_and_heals_alone(api: Api, small_disk: Path) -> None:
    async with await api.client("train") as client:
        form = {"data": {"purpose": "fine-tune"}}
        full = await client.post("/v1/files", files={"file": ("a", b"x" * 100_000)}, **form)  # type: ignore[arg-type]
        assert error_of(full)[:2] == (507, "storage_full")
        assert leftovers(api) == []

        fits = await client.post("/v1/files", files={"file": ("a", b"x" * 10_000)}, **form)  # type: ignore[arg-type]
        assert fits.status_code == 200


@pytest.mark.parametrize("small_disk", ["artifacts_dir"], indirect=True)
async def test_a_full_disk_publishes_nothing(api: Api, small_disk: Path) -> None:
    async with await api.client("train") as client:
        folder = make_bundle(api.tmp_path / "bundle", api.gateway.services.registry.base)
        files = bundle_files(folder) | {"adapter_model": ("m", b"x" * 200_000)}
        full = await client.post("/api/adapters/support/versions", files=files)

        assert error_of(full)[:2] == (507, "storage_full")
        assert (await client.get("/api/adapters")).json()["data"] == []
        assert leftovers(api) == []


# ---- fine-tuning ----


async def test_fine_tuning_with_openais_client(api: Api) -> None:
    async with await api.sdk() as client:
        file = await client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
        held_out = await client.files.create(file=("valid.jsonl", ROWS), purpose="fine-tune")
        job = await client.fine_tuning.jobs.create(
            model="tiny",
            training_file=file.id,
            validation_file=held_out.id,
            suffix="Support",
            seed=11,
            metadata={"team": "help"},
            method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}},
            extra_body={"x_turnout": {"overrides": {"rank": 4, "learning_rate": 0.001}}},
        )
        shown = await client.fine_tuning.jobs.retrieve(job.id)
        events = await client.fine_tuning.jobs.list_events(job.id)

        for found in (job, shown):
            FineTuningJob.model_validate(found.model_dump(), strict=True)
        assert job == shown
        assert (job.status, job.model, job.seed, job.metadata) == ("validating_files", "tiny", 11, {"team": "help"})
        assert (job.fine_tuned_model, job.finished_at, job.error, job.trained_tokens) == (None, None, None, None)
        assert job.hyperparameters.model_dump() == {
            "batch_size": "auto",
            "learning_rate_multiplier": "auto",
            "n_epochs": 2,
        }
        assert job.method is not None
        assert job.method.type == "supervised"
        FineTuningJobEvent.model_validate(events.data[0].model_dump(), strict=True)
        assert [event.message for event in events.data] == [f"Created fine-tuning job: {job.id}"]

        stored = await api.gateway.services.jobs._store.get(job.id)
        assert stored.spec.adapter == "support"  # type: ignore[union-attr]
        assert stored.spec.hyperparameters == {"rank": 4, "learning_rate": 0.001, "n_epochs": 2}  # type: ignore[union-attr]

        cancelled = await client.fine_tuning.jobs.cancel(job.id)
        assert cancelled.status == "cancelled"
        assert cancelled.finished_at is not None


async def test_jobs_and_events_come_in_pages_newest_first(api: Api) -> None:
    async with await api.sdk() as client:
        file = await client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
        made = [(await client.fine_tuning.jobs.create(model="tiny", training_file=file.id)).id for _ in range(5)]
        listed = [job.id async for job in client.fine_tuning.jobs.list(limit=2)]
        assert listed == made[::-1]

        async with api.gateway.database.write() as connection:
            for number in range(7):
                await api.gateway.services.jobs._store.add_event(connection, made[0], f"event {number}")
        events = [event.message async for event in client.fine_tuning.jobs.list_events(made[0], limit=3)]
        assert events[:-1] == [f"event {number}" for number in reversed(range(7))]


async def test_a_page_after_what_does_not_exist_is_not_found(api: Api) -> None:
    async with await api.sdk() as sdk, await api.client("admin") as client:
        file = await sdk.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
        job = await sdk.fine_tuning.jobs.create(model="tiny", training_file=file.id)
        lists = {
            "/v1/files": "file_not_found",
            "/v1/fine_tuning/jobs": "job_not_found",
            f"/v1/fine_tuning/jobs/{job.id}/events": "event_not_found",
            "/api/jobs": "job_not_found",
            f"/api/jobs/{job.id}/events": "event_not_found",
            "/api/evaluations": "job_not_found",
            "/api/audit": "audit_not_found",
        }
        answers = {path: error_of(await client.get(path, params={"after": "nope"})) for path in lists}
        with pytest.raises(openai.NotFoundError) as refused:
            await sdk.files.list(after="nope")

    assert answers == {path: (404, code, "after") for path, code in lists.items()}
    assert (refused.value.type, refused.value.param) == ("invalid_request_error", "after")


async def test_pages_go_on_after_a_file_that_was_deleted_meanwhile_but_not_after_a_strangers(api: Api) -> None:
    async with await api.sdk() as client, await api.client("train", project_id="proj_other") as stranger:
        made = [(await client.files.create(file=("a", ROWS), purpose="fine-tune")).id for _ in range(4)]
        seen = []
        async for file in client.files.list(limit=1):
            await client.files.delete(file.id)
            seen.append(file.id)

        foreign = await stranger.get("/v1/files", params={"after": made[0]})

    assert seen == made[::-1]
    assert error_of(foreign) == (404, "file_not_found", "after")


FAILURES: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"surprise": 1}, 400, "invalid_request", "surprise"),
    ({"model": "gpt-4o"}, 400, "model_not_found", "model"),
    ({"model": "support@1"}, 404, "version_not_found", "support@1"),
    ({"model": None}, 400, "invalid_request", "model"),
    ({"training_file": "file-nope"}, 400, "file_not_found", "training_file"),
    ({"validation_file": "file-nope"}, 400, "file_not_found", "validation_file"),
    ({"training_file": "../../etc/passwd"}, 400, "file_not_found", "training_file"),
    ({"suffix": "no spaces please"}, 400, "bad_suffix", "suffix"),
    ({"suffix": "tiny"}, 400, "name_taken", "suffix"),
    ({"seed": -1}, 400, "invalid_request", "seed"),
    ({"method": {"type": "dpo"}}, 400, "invalid_request", "method.type"),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}}, 400, "invalid_request", None),
    ({"integrations": [{"type": "wandb"}]}, 400, "invalid_request", None),
    ({"metadata": {str(number): "x" for number in range(17)}}, 400, "invalid_request", "metadata"),
    ({"x_turnout": {"preset": "nope"}}, 400, "preset_not_found", "x_turnout.preset"),
    ({"x_turnout": {"preset": "../config"}}, 400, "preset_not_found", "x_turnout.preset"),
    ({"x_turnout": {"overrides": {"base_model": "/etc"}}}, 400, "invalid_request", "x_turnout.overrides.base_model"),
    ({"x_turnout": {"overrides": {"dataset": "/etc/passwd"}}}, 400, "invalid_request", "x_turnout.overrides.dataset"),
    ({"x_turnout": {"overrides": {"rank": 64}}}, 400, "rank_too_high", "x_turnout.overrides.rank"),
    ({"x_turnout": {"overrides": {"patience": 2}}}, 400, "no_validation_file", "x_turnout.overrides.patience"),
    ({"hyperparameters": {"n_epochs": 2}, "x_turnout": {"overrides": {"epochs": 3}}}, 400, "twice_set", "n_epochs"),
    ({"hyperparameters": {"n_epochs": 2}, "method": {"type": "supervised"}}, 400, "twice_set", "hyperparameters"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "status", "code", "param"), FAILURES)
async def test_requests_that_cannot_be_honoured_are_refused(
    api: Api, change: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    async with await api.client("train") as client:
        made = await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", ROWS)})
        body = {"model": "tiny", "training_file": made.json()["id"]} | change

        answer = await client.post("/v1/fine_tuning/jobs", json=body)

        found = error_of(answer)
        assert found[:2] == (status, code)
        assert param is None or found[2] == param
        assert (await client.get("/v1/fine_tuning/jobs")).json()["data"] == []


async def test_an_idempotency_key_makes_one_job(api: Api) -> None:
    async with await api.client("train") as client:
        made = await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("train.jsonl", ROWS)})
        body = {"model": "tiny", "training_file": made.json()["id"]}
        key = {"idempotency-key": "nightly-1"}

        answers = await asyncio.gather(
            *(client.post("/v1/fine_tuning/jobs", json=body, headers=key) for _ in range(50))
        )
        other = await client.post("/v1/fine_tuning/jobs", json=body | {"seed": 9}, headers=key)
        listed = await client.get("/v1/fine_tuning/jobs")

        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.text for answer in answers}) == 1
        assert len(listed.json()["data"]) == 1
        assert error_of(other)[:2] == (409, "idempotency_mismatch")


@pytest.mark.parametrize("state", JobState)
async def test_every_state_is_one_of_openais_words(api: Api, state: JobState) -> None:
    async with await api.sdk() as client:
        file = await client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
        job = await client.fine_tuning.jobs.create(model="tiny", training_file=file.id)
    stored = await api.gateway.services.jobs._store.get(job.id)
    moved = stored.model_copy(
        update={
            "state": state,
            "result": {"fine_tuned_model": "support@1", "trained_tokens": 5},
            "error_code": "invalid_training_file",
            "error_message": "line 3",
            "finished_at": now() if state.is_final else None,
        }
    )

    shown = FineTuningJob.model_validate_json(fine_tuning_job(moved).model_dump_json(), strict=True)

    assert (shown.fine_tuned_model is not None) == (state is JobState.SUCCEEDED)
    assert (shown.error is not None) == (state is JobState.FAILED)
    if state is JobState.FAILED:
        assert shown.error is not None
        assert shown.error.param == "training_file"
    if state is JobState.PUBLISHING:
        assert shown.status == "running"


# ---- adapters ----


async def test_publishing_twice_gives_the_same_version(api: Api) -> None:
    async with await api.client("train") as client:
        first, second = await api.publish(client), await api.publish(client)
        listed = (await client.get("/api/adapters")).json()["data"]
        shown = (await client.get("/api/adapters/support")).json()

    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert (first.json()["full_name"], first.json()["state"]) == ("support@1", "received")
    assert first.json()["served_as"] == f"support.v1.{first.json()['digest'][:12]}"
    assert listed == [shown]
    assert [version["version"] for version in shown["versions"]] == [1]
    assert leftovers(api) == []


async def test_a_version_is_shown_with_all_that_is_known_of_it(api: Api) -> None:
    async with await api.client("train") as client:
        version = (await api.publish(client)).json()
        async with api.gateway.database.write() as connection:
            row = {"replica_id": "engine-1", "engine_name": version["served_as"], "state": "ready", "updated_at": now()}
            await connection.execute(insert(tables.residency).values(**row))

        shown = (await client.get("/api/adapters/support/versions/1")).json()

    assert {key: shown[key] for key in version} == version
    assert [(place["replica_id"], place["state"]) for place in shown["residency"]] == [("engine-1", "ready")]
    assert shown["verdicts"] == []
    assert shown["manifest"]["datasets"][0]["rows"] == 800


PARTS: list[tuple[str, dict[str, tuple[str, bytes]], int, str]] = [
    ("a path", {"adapter_model": ("../../x.safetensors", b"x")}, 400, "bad_filename"),
    ("an absolute path", {"adapter_config": ("/etc/passwd", b"{}")}, 400, "bad_filename"),
    ("a backslash", {"adapter_config": ("a/..\\b", b"{}")}, 400, "bad_filename"),
    ("another part", {"tokenizer": ("tokenizer.json", b"{}")}, 400, "unknown_part"),
    ("an archive", {"bundle": ("bundle.tar", b"x")}, 400, "unknown_part"),
    ("a large config", {"adapter_config": ("c", b" " * 20_001)}, 413, "too_large"),
    ("large weights", {"adapter_model": ("m", b" " * 300_001)}, 413, "too_large"),
    ("a header bomb", {"adapter_model": ("m", b"\xff\xff\xff\xff\xff\xff\xff\x7f" + b"{}" * 10)}, 422, ""),
    ("a truncated file", {"adapter_model": ("m", b"\x10")}, 422, ""),
    ("no JSON", {"adapter_config": ("c", b"nonsense")}, 422, ""),
]


@pytest.mark.parametrize(("parts", "status", "code"), [row[1:] for row in PARTS], ids=[row[0] for row in PARTS])
async def test_bundles_that_are_refused(api: Api, parts: dict[str, tuple[str, bytes]], status: int, code: str) -> None:
    folder = make_bundle(api.tmp_path / "bundle", api.gateway.services.registry.base)
    async with await api.client("train") as client:
        answer = await client.post("/api/adapters/support/versions", files=bundle_files(folder) | parts)

        found = error_of(answer)
        assert found[0] == status
        assert found[1]
        assert not code or found[1] == code
        assert (await client.get("/api/adapters")).json()["data"] == []
    assert leftovers(api) == []


async def test_a_plain_peft_folder_needs_no_manifest(api: Api) -> None:
    files = bundle_files(make_bundle(api.tmp_path / "bundle", api.gateway.services.registry.base))
    plain = {name: part for name, part in files.items() if name != "manifest"}

    async with await api.client("train") as client:
        assert (await client.post("/api/adapters/support/versions", files=plain)).status_code == 201


@pytest.mark.invariant(4)
async def test_the_corpus_is_refused_over_http_with_the_same_codes(api: Api) -> None:
    refused = {}
    async with await api.client("train") as client:
        for name, bad in BAD.items():
            if bad.refused_by == "preflight" and not bad.needs_directory:
                folder = api.tmp_path / "corpus" / name
                bad.build(folder, api.gateway.services.registry.base)
                answer = await client.post("/api/adapters/support/versions", files=bundle_files(folder))
                refused[name] = (answer.status_code, answer.json()["error"]["code"])
        listed = (await client.get("/api/adapters")).json()["data"]

    assert refused == {name: (422, bad.code) for name, bad in BAD.items() if name in refused}
    assert len(refused) > 40
    assert listed == []
    assert leftovers(api) == []


# ---- over a real socket ----


async def test_a_connection_that_ends_too_early_leaves_nothing(api: Api) -> None:
    client = await api.client("train")
    key = client.headers["authorization"]
    await client.aclose()
    server = api.gateway.server()
    server.config.lifespan = "off"
    listening = listening_socket(load_settings(port=0))
    port = listening.getsockname()[1]
    task = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    part = b'--B\r\nContent-Disposition: form-data; name="adapter_model"; filename="m"\r\n\r\n' + b"x" * 50_000

    async def send(declared: int, *, close: bool) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = (
            f"POST /api/adapters/support/versions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: {key}\r\n"
            f"Content-Type: multipart/form-data; boundary=B\r\nContent-Length: {declared}\r\nConnection: close\r\n\r\n"
        )
        writer.write(head.encode() + part)
        await writer.drain()
        answer = b"" if close else await reader.read()
        writer.close()
        return answer

    await send(len(part) + 1_000, close=True)
    cut = await send(len(part), close=False)
    too_long = await send(10**12, close=False)

    assert b" 400 " in cut.splitlines()[0]
    assert b" 413 " in too_long.splitlines()[0]
    deadline = asyncio.get_running_loop().time() + 5
    while leftovers(api) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.02)
    assert leftovers(api) == []
    server.should_exit = True
    await task


# ---- evaluations ----


async def test_an_evaluation_is_not_run_again_once_there_is_a_verdict(api: Api) -> None:
    async with await api.client("train") as client:
        await api.verified(client)
        body = {"target": "support@1", "suite": "emails"}
        first = await client.post("/api/evaluations", json=body)
        again = await client.post("/api/evaluations", json=body)
        assert (first.status_code, again.status_code) == (201, 200)
        assert first.json()["id"] == again.json()["id"]
        assert first.json()["spec"]["stable"] == "tiny"
        early = await client.post("/api/evaluations", json=body | {"larger_look": True})
        assert error_of(early)[:2] == (409, "no_larger_look")

        await judge(api, first.json()["id"], "inconclusive")
        settled = await client.post("/api/evaluations", json=body)
        assert (settled.status_code, settled.json()["id"], settled.json()["state"]) == (
            200,
            first.json()["id"],
            "succeeded",
        )
        larger = await client.post("/api/evaluations", json=body | {"larger_look": True})
        assert (larger.status_code, larger.json()["spec"]["look"]) == (201, 2)

        await judge(api, larger.json()["id"], "passed")
        third = await client.post("/api/evaluations", json=body | {"larger_look": True})
        assert error_of(third)[:2] == (409, "no_larger_look")
        final = await client.post("/api/evaluations", json=body)
        assert (final.status_code, final.json()["id"]) == (200, larger.json()["id"])
        shown = (await client.get("/api/adapters/support/versions/1")).json()["verdicts"]
        assert [(verdict["verdict"], verdict["looks"]) for verdict in shown] == [("passed", 2)]


async def judge(api: Api, job_id: str, verdict: str) -> None:
    """What the controller does with an evaluation's result."""
    from gateway.jobs.verdicts import NewVerdict, store_verdict

    store = api.gateway.services.jobs._store
    job = await store.get(job_id)
    data = {"verdict": verdict, "reason": "numbers", "fingerprint": "f", "report": {"rows": [1]}}
    new = NewVerdict.from_result(job.spec, data, baseline=api.gateway.services.registry.base.digest)  # type: ignore[arg-type]
    async with api.gateway.database.write() as connection:
        await store_verdict(connection, new, job)
        await connection.execute(
            update(tables.jobs)
            .where(tables.jobs.c.id == job_id)
            .values(state="succeeded", finished_at=now(), result=data)
        )


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"target": "support@1", "suite": "nope"}, 404, "suite_not_found"),
        ({"target": "support@1", "suite": "../emails"}, 404, "suite_not_found"),
        ({"target": "support@9", "suite": "emails"}, 404, "version_not_found"),
        ({"target": "support", "suite": "emails"}, 400, "bad_target"),
        ({"target": "tiny", "suite": "emails"}, 400, "bad_target"),
        ({"target": "support@2", "suite": "emails"}, 409, "not_verified"),
        ({"target": "support@1", "suite": "emails", "yaml": "!function os.system"}, 400, "invalid_request"),
    ],
)
async def test_evaluations_that_are_refused(api: Api, body: dict[str, Any], status: int, code: str) -> None:
    async with await api.client("train") as client:
        await api.verified(client)
        await api.publish(client, seed=2)

        answer = await client.post("/api/evaluations", json=body)

        assert error_of(answer)[:2] == (status, code)
        assert (await client.get("/api/evaluations")).json()["data"] == []


async def test_lists_leave_reports_out(api: Api) -> None:
    async with await api.client("train") as client:
        await api.verified(client)
        job_id = (await client.post("/api/evaluations", json={"target": "support@1", "suite": "emails"})).json()["id"]
        await judge(api, job_id, "passed")

        [listed] = (await client.get("/api/jobs", params={"kind": "evaluation"})).json()["data"]
        [same] = (await client.get("/api/evaluations", params={"target": "support@1"})).json()["data"]
        none = (await client.get("/api/evaluations", params={"target": "support@2"})).json()["data"]
        shown = (await client.get(f"/api/evaluations/{job_id}")).json()
        events = (await client.get(f"/api/jobs/{job_id}/events")).json()["data"]

    assert "report" not in listed["result"]
    assert listed == same
    assert none == []
    assert shown["result"]["report"] == {"rows": [1]}
    assert [event["message"] for event in events] == ["Created evaluation of support@1 on suite emails"]


async def test_suites_are_listed_and_never_written_over_http(api: Api) -> None:
    async with await api.client("train", "admin") as client:
        await api.verified(client)
        listed = (await client.get("/api/suites")).json()["data"]
        for method in ("POST", "PUT", "DELETE"):
            assert (await client.request(method, "/api/suites", json={})).status_code == 405

    assert ("emails", "registered") in [(suite["name"], suite["source"]) for suite in listed]
    assert all("path" not in suite for suite in listed)


# ---- who may ----


PATHS = [
    ("POST", "/v1/files"), ("GET", "/v1/files"), ("GET", "/v1/files/file-1"), ("GET", "/v1/files/file-1/content"),
    ("DELETE", "/v1/files/file-1"), ("POST", "/v1/fine_tuning/jobs"), ("GET", "/v1/fine_tuning/jobs"),
    ("GET", "/v1/fine_tuning/jobs/x"), ("GET", "/v1/fine_tuning/jobs/x/events"), ("POST", "/v1/fine_tuning/jobs/x/cancel"),
    ("POST", "/api/adapters/support/versions"), ("POST", "/api/evaluations"), ("GET", "/api/evaluations"),
    ("GET", "/api/evaluations/x"), ("GET", "/api/jobs"), ("GET", "/api/jobs/x"), ("GET", "/api/jobs/x/events"),
    ("POST", "/api/jobs/x/cancel"), ("GET", "/api/audit"),
    ("POST", "/api/gc"),
]  # fmt: skip


async def test_an_inference_key_reaches_none_of_it(api: Api) -> None:
    async with await api.client("inference", "preview") as client:
        for method, path in PATHS:
            body = (
                {"json": {"model": "tiny", "training_file": "f", "target": "a@1", "suite": "s"}}
                if method == "POST"
                else {}
            )
            answer = await client.request(method, path, **body)  # type: ignore[arg-type]
            assert error_of(answer)[:2] == (403, "insufficient_scope"), (method, path)


async def test_without_a_key_nothing_is_reached(api: Api) -> None:
    async with await api.client("inference") as client:
        del client.headers["authorization"]
        for method, path in [*PATHS, ("GET", "/api/adapters"), ("GET", "/api/suites")]:
            assert (await client.request(method, path)).status_code == 401, (method, path)


async def test_another_project_sees_nothing(api: Api) -> None:
    async with await api.client("train") as client, await api.client("train", "admin", project_id="other") as stranger:
        await api.verified(client)
        file = (await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("t", ROWS)})).json()["id"]
        job = (await client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file})).json()["id"]

        for method, path in [
            ("GET", f"/v1/files/{file}"), ("GET", f"/v1/files/{file}/content"), ("DELETE", f"/v1/files/{file}"),
            ("GET", f"/v1/fine_tuning/jobs/{job}"), ("GET", f"/v1/fine_tuning/jobs/{job}/events"),
            ("POST", f"/v1/fine_tuning/jobs/{job}/cancel"), ("GET", f"/api/jobs/{job}"), ("GET", f"/api/jobs/{job}/events"),
            ("POST", f"/api/jobs/{job}/cancel"), ("GET", "/api/adapters/support"), ("GET", "/api/adapters/support/versions/1"),
        ]:  # fmt: skip
            assert (await stranger.request(method, path)).status_code == 404, (method, path)
        for path in ("/v1/files", "/v1/fine_tuning/jobs", "/api/jobs", "/api/evaluations", "/api/adapters"):
            assert (await stranger.get(path)).json()["data"] == [], path
        stolen = await stranger.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": file})
        assert error_of(stolen) == (400, "file_not_found", "training_file")
        target = {"target": "support@1", "suite": "emails"}
        assert error_of(await stranger.post("/api/evaluations", json=target))[:2] == (404, "version_not_found")
        assert error_of(await api.publish(stranger, seed=5))[:2] == (409, "name_taken")
        subjects = {entry["subject"] for entry in (await stranger.get("/api/audit")).json()["data"]}
        assert not subjects & {file, job, "support@1"}


async def test_the_audit_log_is_for_admins_and_comes_in_pages(api: Api) -> None:
    async with await api.client("train") as client, await api.client("admin") as admin:
        await api.publish(client)
        file = (await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("t", ROWS)})).json()["id"]
        assert (await client.get("/api/audit")).status_code == 403

        whole = (await admin.get("/api/audit", params={"limit": 1000})).json()
        pages, after = [], None
        while True:
            page = (await admin.get("/api/audit", params={"limit": 2} | ({"after": after} if after else {}))).json()
            pages += page["data"]
            if not page["has_more"]:
                break
            after = page["data"][-1]["id"]
        mine = (await admin.get("/api/audit", params={"subject": file})).json()["data"]

    assert pages == whole["data"]
    assert not whole["has_more"]
    assert [(entry["action"], entry["after"]["filename"]) for entry in mine] == [("file.create", "t")]
    assert {"key.create", "version.publish", "file.create"} <= {entry["action"] for entry in whole["data"]}


# ---- what is over ----


async def test_what_is_over_is_shown_then_removed_and_the_audit_log_says_by_whom(api: Api) -> None:
    orphan = api.gateway.settings.artifacts_dir / "ab" / ("ab" * 32)
    orphan.mkdir(parents=True)
    (orphan / "adapter_model.safetensors").write_bytes(b"x" * 100)
    os.utime(orphan, (1, 1))
    async with await api.client("admin") as admin:
        shown = (await admin.post("/api/gc", json={"dry_run": True})).json()
        assert orphan.exists()
        removed = (await admin.post("/api/gc", json={"dry_run": False})).json()
        nothing = (await admin.post("/api/gc", json={"dry_run": False})).json()
        entries = (await admin.get("/api/audit", params={"action": "gc"})).json()["data"]
        metrics = (await admin.get("/metrics")).text

    [kind] = shown["kinds"]
    assert (shown["dry_run"], kind["kind"], kind["unit"], kind["count"], kind["size_bytes"]) == (
        True, "artifacts", "files", 1, 100,
    )  # fmt: skip
    assert kind["oldest"].startswith("1970-01-01T00:00:01")
    assert (removed["dry_run"], removed["is_complete"], removed["kinds"]) == (False, True, shown["kinds"])
    assert not orphan.exists()
    assert nothing["kinds"] == []
    [entry] = entries
    assert (entry["subject"], entry["after"]) == ("retention", {"artifacts": {"count": 1, "size_bytes": 100}})
    assert 'turnout_retention_deleted{kind="artifacts"} 1.0' in metrics
    assert 'turnout_table_rows{table="audit"}' in metrics
