"""A running `turnout serve` and what tests need to look at it from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil
import pytest
from openai import OpenAI

from deploy.demo.stopping import command_line, is_running

ROOT = Path(__file__).parents[2]
BASE_PATH = ROOT / "build" / "models" / "smollm2-135m-instruct"
BASE = "smollm2-135m"
READY_TIMEOUT_S = 540  # against hanging, below the limit of a test: an idle machine takes one to two minutes

LONG_STREAM = {
    "model": BASE,
    "messages": [{"role": "user", "content": "Write a long story about a lighthouse."}],
    "max_tokens": 1200,
    "temperature": 0,
    "stream": True,
    "logit_bias": {"2": -100},  # no end of turn: the stream must be open when something dies
}

T = TypeVar("T")


def wait_for(look: Callable[[], T | None], *, timeout_s: float, what: str) -> T:
    """Poll until `look` gives something true; fail with `what` when it does not."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not within {timeout_s:.0f} s")
        time.sleep(0.1)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Stack:
    """Supervisor, gateway, controller and engine over one home directory."""

    home: Path
    port: int = field(default_factory=free_port)
    admin_key: str = ""
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.home / "serve.out"

    def start(self) -> None:
        """Start everything and wait until the engine takes traffic."""
        self.home.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "TURNOUT_HOME": str(self.home),
            "TURNOUT_PORT": str(self.port),
            "TURNOUT_BASE_MODEL__PATH": str(BASE_PATH),
            "TURNOUT_BASE_MODEL__NAME": BASE,
        }
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway.cli", "serve"],
                env=environment,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if not self.admin_key:
            self.admin_key = wait_for(self._printed_key, timeout_s=180, what="the admin key is printed once")
        self.wait_ready()

    def _printed_key(self) -> str | None:
        self.check_alive()
        words = self.log_path.read_text(errors="replace").split()
        return next((word.strip("\"',") for word in words if word.strip("\"',").startswith("tn-")), None)

    def check_alive(self) -> None:
        """Fail at once, with the log's end, when the supervisor is gone."""
        assert self.process is not None
        if self.process.poll() is not None:
            pytest.fail(f"turnout serve ended with {self.process.returncode}:\n{self.log_tail()}")

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-lines:])

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until `/readyz` says that completions are served."""

        def ready() -> bool | None:
            self.check_alive()
            try:
                return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
            except httpx.HTTPError:
                return None

        try:
            wait_for(ready, timeout_s=timeout_s, what="the stack is ready")
        except BaseException:
            sys.stderr.write(self.log_tail())
            raise

    def client(self, key: str | None = None) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key or self.admin_key, max_retries=0, timeout=120)

    def http(self, key: str | None = None) -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {key or self.admin_key}"}, timeout=120
        )

    def get(self, path: str) -> Any:
        with self.http() as client:
            answer = client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: dict[str, Any], *, expect: int | None = None) -> Any:
        with self.http() as client:
            answer = client.post(path, json=body)
        if expect is None:
            assert answer.is_success, answer.text
        else:
            assert answer.status_code == expect, answer.text
        return answer.json()

    def put(self, path: str, body: dict[str, Any]) -> Any:
        with self.http() as client:
            answer = client.put(path, json=body)
        assert answer.is_success, answer.text
        return answer.json()

    def publish(self, directory: Path, adapter: str) -> httpx.Response:
        """Upload a PEFT folder or bundle as a new version."""
        names = {
            "adapter_config": "adapter_config.json",
            "adapter_model": "adapter_model.safetensors",
            "manifest": "manifest.json",
        }
        files = {
            key: (name, (directory / name).read_bytes()) for key, name in names.items() if (directory / name).exists()
        }
        with self.http() as client:
            return client.post(f"/api/adapters/{adapter}/versions", files=files)

    def wait_resident(self, version: str, *, timeout_s: float = 540) -> dict[str, Any]:
        """Until the version (`support@1`) is verified, loaded and probed."""
        adapter, number = version.split("@")

        def look() -> dict[str, Any] | None:
            self.check_alive()
            found: dict[str, Any] = self.get(f"/api/adapters/{adapter}/versions/{number}")
            assert found["state"] in ("received", "verified"), found
            resident = [row for row in found["residency"] if row["state"] == "ready"]
            return found if resident else None

        return wait_for(look, timeout_s=timeout_s, what=f"{version} is verified and resident")

    def children(self) -> list[psutil.Process]:
        """Every process below the supervisor and every one that carries its mark."""
        marked = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("TURNOUT_HOME") == str(self.home) or str(self.home) in " ".join(
                    process.cmdline()
                ):
                    marked.append(process)
            except psutil.Error:
                continue
        return [process for process in marked if process.pid != os.getpid()]

    def find(self, needle: str) -> psutil.Process:
        """The one process of this stack whose command line or title holds `needle`."""
        found = [p for p in self.tree() if needle in " ".join(command_line(p))]
        assert found, f"no process with {needle!r} among {[command_line(p) for p in self.tree()]}"
        return found[0]

    def tree(self) -> list[psutil.Process]:
        """Processes that serve this home: by environment, command line or descent."""
        found = {p.pid: p for p in self.children()}
        for process in list(found.values()):
            try:
                found |= {child.pid: child for child in process.children(recursive=True)}
            except psutil.Error:
                continue
        return [p for p in found.values() if is_running(p)]

    def kill_supervisor(self) -> None:
        """As a crash of it would: gateway and controller go with it, the engine goes on."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

        def are_gone() -> bool:
            return not pids(self, "gateway.app") and not pids(self, "gateway.controller")

        wait_for(are_gone, timeout_s=60, what="gateway and controller end with their supervisor")

    def stop(self, *, timeout_s: float = 90) -> int:
        """SIGTERM of the whole; the exit status. Kills what is left when the time is over."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.kill_all()

    def kill_all(self) -> None:
        """Leave nothing behind, whatever a failed test left."""
        for process in self.tree():
            try:
                process.kill()
            except psutil.Error:
                continue
        if self.process is not None:
            self.process.wait(30)


def engine_pid(stack: Stack) -> int:
    return (
        stack.find("vllm.entrypoints").pid
        if _has(stack, "vllm.entrypoints")
        else stack.find("deploy.engine.launch").pid
    )


def _has(stack: Stack, needle: str) -> bool:
    return any(needle in " ".join(command_line(process)) for process in stack.tree() if process.is_running())


def pids(stack: Stack, module: str) -> list[int]:
    return [p.pid for p in stack.tree() if module in " ".join(command_line(p))]


def ask(stack: Stack, model: str) -> httpx.Response:
    with stack.http() as client:
        return client.post(
            "/v1/chat/completions",
            json={
                "model": model,
                "messages": [{"role": "user", "content": "Hello"}],
                "max_tokens": 4,
                "temperature": 0,
            },
        )
