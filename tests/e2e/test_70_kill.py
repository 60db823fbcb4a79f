"""kill -9 of every part of the real stack, in the middle of its work. `tests/integration/test_kills.py` does it to the fake engine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.demo.stopping import command_line

from .stack import BASE, LONG_STREAM, Stack, ask, engine_pid, pids, wait_for
from .test_40_fine_tuning import chat_rows

pytestmark = [pytest.mark.engine, pytest.mark.long]


def engine_core(stack: Stack) -> psutil.Process:
    """vLLM's own worker process: it renames itself."""
    api_server = psutil.Process(engine_pid(stack))
    cores = [p for p in api_server.children(recursive=True) if is_engine_core(p)]
    assert cores, [command_line(p) for p in api_server.children(recursive=True)]
    return cores[0]


def is_engine_core(process: psutil.Process) -> bool:
    """By its title or its name; what has just ended is neither."""
    try:
        return "EngineCore" in " ".join(command_line(process)) or "EngineCore" in process.name()
    except psutil.Error:
        return False


def stream_until_cut(stack: Stack, kill: int, model: str) -> tuple[str, bool]:
    """Start a stream, kill the process after its first lines; the rest of the text, and whether the connection broke."""
    text, broke = "", False
    with stack.http() as client:
        try:
            with client.stream("POST", "/v1/chat/completions", json=LONG_STREAM | {"model": model}) as answer:
                for number, line in enumerate(answer.iter_lines()):
                    text += line + "\n"
                    if number == 4:
                        os.kill(kill, signal.SIGKILL)
        except httpx.HTTPError:
            broke = True
    return text, broke


@contextmanager
def half_an_upload(stack: Stack, directory: Path, adapter: str) -> Iterator[None]:
    """A publish whose client has sent half of the weights so far."""
    boundary = "half-an-upload"
    body = b"".join(
        b'--%s\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s\r\n'
        % (boundary.encode(), field.encode(), name.encode(), (directory / name).read_bytes())
        for field, name in (
            ("adapter_config", "adapter_config.json"),
            ("adapter_model", "adapter_model.safetensors"),
        )
    )
    connection = HTTPConnection("127.0.0.1", stack.port, timeout=30)
    connection.putrequest("POST", f"/api/adapters/{adapter}/versions")
    connection.putheader("authorization", f"Bearer {stack.admin_key}")
    connection.putheader("content-type", f"multipart/form-data; boundary={boundary}")
    connection.putheader("content-length", str(len(body)))
    connection.endheaders(body[: len(body) // 2])
    try:
        yield
    finally:
        connection.close()


def other_than(pid: int, process: psutil.Process | None) -> psutil.Process | None:
    return process if process is not None and process.pid != pid else None


def stand_on_second(stack: Stack) -> None:
    """alpha@2 is stable and alpha@1 is where a rollback goes."""
    for target in ("alpha@1", "alpha@2"):
        route = stack.get("/api/routes/alpha")
        if target != route["stable"] and (route["stable"], route["previous"]) != ("alpha@2", "alpha@1"):
            stack.post("/api/routes/alpha/promote", {"target": target, "force": True, "reason": "end-to-end test"})


def roll_back_and_kill(stack: Stack, gateway: int, delay_s: float) -> bool:
    """Ask for a rollback, kill the gateway that soon after; whether the move was acknowledged."""
    killer = threading.Timer(delay_s, os.kill, (gateway, signal.SIGKILL))
    with stack.http() as client:
        client.get("/healthz")  # connect first, so that the delay is spent in the move
        killer.start()
        try:
            return client.post("/api/routes/alpha/rollback", json={"reason": "end-to-end test"}).is_success
        except httpx.HTTPError:
            return False
        finally:
            killer.join()


def heal(stack: Stack, *versions: str) -> None:
    """Until the stack answers again, by each of the versions."""
    stack.wait_ready()

    def answers() -> bool | None:
        try:
            return all(ask(stack, version).status_code == 200 for version in versions)
        except httpx.HTTPError:
            return None

    wait_for(answers, timeout_s=300, what=f"{', '.join(versions)} answer again")


@pytest.mark.invariant(10)
def test_gateway_killed_in_a_stream_returns_and_the_engine_stays(stack: Stack, alpha: str) -> None:
    engine = engine_pid(stack)
    (gateway,) = pids(stack, "gateway.app")

    _, broke = stream_until_cut(stack, gateway, BASE)
    heal(stack, "alpha@1")

    assert broke
    assert engine_pid(stack) == engine
    assert pids(stack, "gateway.app") != [gateway]


@pytest.mark.invariant(10)
def test_controller_killed_adopts_the_engine(stack: Stack, alpha: str) -> None:
    engine = engine_pid(stack)
    (controller,) = pids(stack, "gateway.controller")

    os.kill(controller, signal.SIGKILL)
    assert ask(stack, "alpha@1").status_code == 200
    wait_for(
        lambda: [pid for pid in pids(stack, "gateway.controller") if pid != controller],
        timeout_s=120,
        what="a new controller",
    )
    heal(stack, "alpha@1")

    assert engine_pid(stack) == engine


@pytest.mark.invariant(10)
def test_gateway_killed_in_a_publish_leaves_nothing_half_done(stack: Stack, alpha: str, weights: Path) -> None:
    (gateway,) = pids(stack, "gateway.app")
    staging = stack.home / "artifacts" / ".staging"
    bundles = sorted(stack.home.glob("artifacts/??/*"))

    with half_an_upload(stack, weights / "seed4", "unfinished"):
        wait_for(lambda: list(staging.glob("*/*")), timeout_s=120, what="the upload reaches the disk")
        os.kill(gateway, signal.SIGKILL)
    heal(stack, "alpha@1")

    assert list(staging.glob("*")) == []
    assert sorted(stack.home.glob("artifacts/??/*")) == bundles
    with stack.http() as client:
        assert client.get("/api/adapters/unfinished").status_code == 404
    again = stack.publish(weights / "seed1", "alpha")
    assert (again.status_code, again.json()["version"]) == (200, 1)


@pytest.mark.invariant(7)
@pytest.mark.invariant(10)
def test_gateway_killed_in_a_rollback_has_moved_all_or_nothing(stack: Stack, alpha: str) -> None:
    for delay_s in (0.004, 0.012, 0.03):
        stand_on_second(stack)
        before, moves = stack.get("/api/routes/alpha"), len(stack.get("/api/audit?subject=alpha")["data"])
        (gateway,) = pids(stack, "gateway.app")

        acknowledged = roll_back_and_kill(stack, gateway, delay_s)
        heal(stack, "alpha@1")

        after, moves_after = stack.get("/api/routes/alpha"), len(stack.get("/api/audit?subject=alpha")["data"])
        has_moved = after["stable"] == "alpha@1"
        assert after["stable"] == ("alpha@1" if has_moved else "alpha@2")
        assert (after["revision"] - before["revision"], moves_after - moves) == (int(has_moved), int(has_moved))
        assert has_moved or not acknowledged
        assert ask(stack, "alpha").headers["x-turnout-version"] == after["stable"]


@pytest.mark.invariant(5)
@pytest.mark.invariant(10)
@pytest.mark.parametrize("part", ["api_server", "engine_core"])
def test_engine_killed_in_a_stream_comes_back_with_its_adapters(stack: Stack, alpha: str, part: str) -> None:
    old = engine_pid(stack)
    old_core = engine_core(stack).pid
    victim = old if part == "api_server" else old_core

    text, broke = stream_until_cut(stack, victim, "alpha@1")

    assert broke or '"error"' in text
    assert "[DONE]" not in text
    assert "Traceback" not in text
    during = ask(stack, "alpha@1")
    assert during.status_code in (502, 503)
    assert "error" in during.json()
    heal(stack, "alpha@1", "alpha@2", "alpha@3")
    assert engine_pid(stack) != old
    assert not psutil.pid_exists(old_core) or psutil.Process(old_core).status() == psutil.STATUS_ZOMBIE
    assert ask(stack, "alpha@2").headers["x-turnout-version"] == "alpha@2"


@pytest.mark.heavy
@pytest.mark.invariant(10)
def test_trainer_and_controller_killed_in_a_job_which_still_finishes(stack: Stack, tmp_path: Path) -> None:
    import json

    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in chat_rows(64, seed=4)))
    client = stack.client()
    with data.open("rb") as file:
        uploaded = client.files.create(file=file, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=uploaded.id,
        suffix="phoenix",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 8}}},
    )

    def trainer() -> psutil.Process | None:
        found = pids(stack, "trainer.job")
        return psutil.Process(found[0]) if found else None

    running = wait_for(trainer, timeout_s=180, what="the trainer starts")
    wait_for(
        lambda: any(event.type == "metrics" for event in client.fine_tuning.jobs.list_events(job.id).data),
        timeout_s=540,
        what="training makes steps",
    )
    os.killpg(running.pid, signal.SIGKILL)
    second = wait_for(lambda: other_than(running.pid, trainer()), timeout_s=180, what="a second attempt")
    (controller,) = pids(stack, "gateway.controller")
    os.kill(controller, signal.SIGKILL)
    wait_for(
        lambda: [pid for pid in pids(stack, "gateway.controller") if pid != controller],
        timeout_s=120,
        what="a new controller",
    )
    assert second.is_running(), "the job outlives its controller"

    def ended() -> str | None:
        status = client.fine_tuning.jobs.retrieve(job.id).status
        return status if status in ("succeeded", "failed") else None

    assert wait_for(ended, timeout_s=540, what="the job ends") == "succeeded"
    assert len(stack.get("/api/adapters/phoenix")["versions"]) == 1
    assert pids(stack, "trainer.job") == []
    assert stack.get(f"/api/jobs/{job.id}")["attempt"] == 2, "the second attempt was adopted, not started again"
