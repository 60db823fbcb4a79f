"""kill -9 of every part of a whole server in the middle of its work, on the fake engine and a stand-in trainer.

`tests/e2e/test_70_kill.py` does the same to vLLM and the real trainer, `tests/long/test_kill_matrix.py` at random moments.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from gateway.registry.base_family import BaseFamily
from gateway.settings import Settings
from tests.corpus import CONFIG, WEIGHTS, make_base, make_bundle
from tests.homes.make import move, publish, wait_loaded, wait_over
from tests.homes.server import answer_of, printed_key, serving, settings_of, until

PARTS = {
    "gateway": "gateway.app",
    "controller": "tests.homes.controller",
    "engine": "tests.fakes.engine",
    "trainer": "fine_tuning",
}
LONG_ANSWER = "fake:chunks=2000 fake:delay_ms=20"


@dataclass
class Server:
    """What runs over one home, with `support@1` as stable and `support@2` loaded."""

    settings: Settings
    base: BaseFamily
    client: httpx.Client
    scratch: Path

    def pids(self, part: str) -> list[int]:
        found = []
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            argv = process.info["cmdline"] or []
            if PARTS[part] in argv and process.info["status"] != psutil.STATUS_ZOMBIE and self._is_mine(process, argv):
                found.append(process.pid)
        return found

    def _is_mine(self, process: psutil.Process, argv: list[str]) -> bool:
        home = str(self.settings.home)
        return any(home in word or str(self.scratch) in word for word in argv)

    def kill(self, part: str) -> int:
        [pid] = self.pids(part)
        os.kill(pid, signal.SIGKILL)
        return pid

    def chat(self, model: str, text: str = "Hello", **fields: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def heal(self, *models: str) -> None:
        """Until each of them answers again."""

        def answers() -> bool:
            return all(self.chat(model).status_code == 200 for model in models)

        until(answers, lambda: f"{models} answer again: {self.client.get('/readyz').text}")

    def stream_until_cut(self, part: str, model: str) -> tuple[str, bool]:
        """Kill the part after a stream's first lines; what was read, and whether the connection broke."""
        text, broke = "", False
        body = {"model": model, "messages": [{"role": "user", "content": LONG_ANSWER}], "stream": True}
        try:
            with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
                for number, line in enumerate(answer.iter_lines()):
                    text += line + "\n"
                    if number == 4:
                        self.kill(part)
        except httpx.HTTPError:
            broke = True
        return text, broke

    def another(self, part: str, pid: int) -> int:
        """The part runs as another process than this."""
        found: list[int] = until(
            lambda: [other for other in self.pids(part) if other != pid], lambda: f"another {part}"
        )
        return found[0]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scratch = tmp_path_factory.mktemp("kills")
    base, orders = make_base(scratch / "base"), scratch / "orders"
    orders.mkdir()
    settings = settings_of(scratch / "home", scratch / "base")
    settings.prepare_directories()
    with serving(settings, orders) as client:
        client.headers["authorization"] = f"Bearer {printed_key(settings)}"
        for seed in (1, 2):
            publish(client, make_bundle(scratch / f"bundle-{seed}", base, seed=seed))
            wait_loaded(client, f"support/versions/{seed}")
        move(client, "promote", target="support@1", force=True)
        yield Server(settings, base, client, scratch)


@pytest.mark.invariant(10)
def test_a_gateway_killed_in_a_stream_returns_and_the_engine_stays(server: Server) -> None:
    engine, [gateway] = server.pids("engine"), server.pids("gateway")

    text, broke = server.stream_until_cut("gateway", "support@1")

    assert broke
    assert "[DONE]" not in text
    server.heal("support", "support@1", "tiny")
    assert server.another("gateway", gateway)
    assert server.pids("engine") == engine


@pytest.mark.invariant(10)
def test_a_killed_controller_is_followed_by_one_that_adopts_the_engine(server: Server) -> None:
    engine = server.pids("engine")

    killed = server.kill("controller")

    assert server.chat("support@1").status_code == 200, "nobody waits for a controller"
    server.another("controller", killed)
    publish(server.client, make_bundle(server.scratch / "bundle-3", server.base, seed=3))
    wait_loaded(server.client, "support/versions/3")
    assert server.pids("engine") == engine


@pytest.mark.invariant(5)
@pytest.mark.invariant(10)
def test_an_engine_killed_in_a_stream_comes_back_with_its_adapters(server: Server) -> None:
    [engine] = server.pids("engine")

    text, broke = server.stream_until_cut("engine", "support@1")

    assert broke or '"error"' in text
    assert "[DONE]" not in text
    assert "Traceback" not in text
    server.another("engine", engine)
    server.heal("support", "support@1", "support@2")
    assert server.chat("support@2").headers["x-turnout-version"] == "support@2"
    assert len(server.pids("engine")) == 1


@contextmanager
def half_an_upload(server: Server, folder: Path) -> Iterator[None]:
    """A publish whose client has sent half of the weights so far."""
    part = b'--half\r\nContent-Disposition: form-data; name="%s"; filename="%s"\r\n\r\n%s\r\n'
    fields = (("adapter_config", CONFIG), ("adapter_model", WEIGHTS))
    body = b"".join(part % (field.encode(), name.encode(), (folder / name).read_bytes()) for field, name in fields)
    connection = HTTPConnection("127.0.0.1", server.settings.port, timeout=30)
    connection.putrequest("POST", "/api/adapters/unfinished/versions")
    connection.putheader("authorization", server.client.headers["authorization"])
    connection.putheader("content-type", "multipart/form-data; boundary=half")
    connection.putheader("content-length", str(len(body) + 1))
    connection.endheaders(body[: len(body) // 2])
    try:
        yield
    finally:
        connection.close()


@pytest.mark.invariant(10)
def test_a_gateway_killed_in_a_publish_leaves_nothing_half_done(server: Server) -> None:
    artifacts = server.settings.artifacts_dir
    bundles = sorted(artifacts.glob("??/*"))
    folder = make_bundle(server.scratch / "unfinished", server.base, seed=11, rank=64, alpha=64)

    with half_an_upload(server, folder):
        until(lambda: list((artifacts / ".staging").glob("*/*")), lambda: "the upload reaches the disk")
        server.kill("gateway")
    server.heal("support@1")

    assert list((artifacts / ".staging").glob("*")) == []
    assert sorted(artifacts.glob("??/*")) == bundles
    assert server.client.get("/api/adapters/unfinished").status_code == 404
    again = make_bundle(server.scratch / "again", server.base, seed=1)
    publish(server.client, again)
    assert answer_of(server.client.get("/api/adapters/support"))["versions"][0]["version"] == 1


@pytest.mark.invariant(7)
@pytest.mark.invariant(10)
@pytest.mark.parametrize("delay_s", [0.002, 0.01, 0.03])
def test_a_gateway_killed_in_a_rollback_has_moved_all_or_nothing(server: Server, delay_s: float) -> None:
    for target in ("support@1", "support@2"):
        now = the_route(server)
        if target != now["stable"] and (now["stable"], now["previous"]) != ("support@2", "support@1"):
            move(server.client, "promote", target=target, force=True)
    before, moves = the_route(server), the_moves(server)
    [gateway] = server.pids("gateway")
    server.client.get("/healthz")  # connect first, so that the delay is spent in the move

    killer = threading.Timer(delay_s, os.kill, (gateway, signal.SIGKILL))
    killer.start()
    try:
        acknowledged = server.client.post("/api/routes/support/rollback", json={"reason": "test"}).is_success
    except httpx.HTTPError:
        acknowledged = False
    killer.join()
    server.heal("support")

    after = the_route(server)
    has_moved = after["stable"] == "support@1"
    assert after["stable"] == ("support@1" if has_moved else "support@2")
    assert (after["revision"] - before["revision"], the_moves(server) - moves) == (int(has_moved), int(has_moved))
    assert has_moved or not acknowledged
    assert server.chat("support").headers["x-turnout-version"] == after["stable"]


def the_route(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = answer_of(server.client.get("/api/routes/support"))
    return found


def the_moves(server: Server) -> int:
    return len(answer_of(server.client.get("/api/audit?subject=support&limit=200"))["data"])


@pytest.mark.invariant(10)
def test_a_job_whose_trainer_and_then_controller_were_killed_still_finishes(server: Server) -> None:
    orders = server.scratch / "orders"
    bundle = make_bundle(server.scratch / "tuned", server.base, adapter="phoenix", seed=21)
    (orders / "fine_tuning.json").write_text(json.dumps([{"do": "hang", "bundle": str(bundle)}]))
    rows = [
        json.dumps({"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": "a"}]})
        for n in range(12)
    ]
    file = answer_of(
        server.client.post(
            "/v1/files", files={"file": ("a.jsonl", "\n".join(rows).encode())}, data={"purpose": "fine-tune"}
        )
    )
    body = {"model": "tiny", "training_file": file["id"], "suffix": "phoenix"}
    job = answer_of(server.client.post("/v1/fine_tuning/jobs", json=body))["id"]

    until(lambda: (orders / f"seen-{job}-1.json").exists(), lambda: "the trainer starts")
    first = server.kill("trainer")
    second = server.another("trainer", first)
    server.another("controller", server.kill("controller"))
    assert server.pids("trainer") == [second], "the job outlives its controller"
    (orders / "release").touch()

    wait_over(server.client, f"/v1/fine_tuning/jobs/{job}", "status")
    assert len(answer_of(server.client.get("/api/adapters/phoenix"))["versions"]) == 1
    assert answer_of(server.client.get(f"/api/jobs/{job}"))["attempt"] == 2, "it was adopted, not started again"
    until(lambda: server.pids("trainer") == [], lambda: "no trainer is left")
    shutil.rmtree(server.scratch / "tuned")
