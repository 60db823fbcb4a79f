"""How an engine is started: what it is told, what it inherits, where it may listen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.engine.launch import build_command, build_environment, check_private, default_threads
from gateway.engine.fleet import engine_spec
from gateway.settings import EngineSettings, Settings


def environment(**current: str) -> dict[str, str]:
    return build_environment(current, kv_cache_gib=3, threads=2, cache_dir=Path("/c"), on_cpu=True)


def test_adapters_can_be_loaded_and_only_our_plugin_runs() -> None:
    found = environment(PATH="/bin")

    assert found["PATH"] == "/bin"
    assert found["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert found["VLLM_PLUGINS"] == "turnout_base_rows"
    assert found["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert found["OMP_NUM_THREADS"] == "2"


@pytest.mark.parametrize("name", ["VLLM_SERVER_DEV_MODE", "VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_API_KEY"])
def test_what_would_open_the_engine_up_is_dropped(name: str) -> None:
    assert name not in environment(**{name: "1"})


def test_a_gpu_build_is_told_nothing_of_the_cpu() -> None:
    found = build_environment({}, kv_cache_gib=3, threads=2, cache_dir=None, on_cpu=False)

    assert not [name for name in found if "CPU" in name or name == "OMP_NUM_THREADS"]


@pytest.mark.invariant(9)
def test_the_server_gets_a_socket_and_no_port() -> None:
    command = build_command(Path("/run/x.sock"), ["--model", "/m"])

    assert command[command.index("--uds") + 1] == "/run/x.sock"
    assert "--port" not in command
    assert "--enable-lora" in command
    assert command[-2:] == ["--model", "/m"]


@pytest.mark.invariant(9)
@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701])
def test_refuses_a_directory_that_others_can_enter(tmp_path: Path, mode: int) -> None:
    tmp_path.chmod(mode)

    with pytest.raises(SystemExit, match="chmod 700"):
        check_private(tmp_path / "engine.sock")


def test_takes_a_private_directory_and_no_missing_one(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    check_private(tmp_path / "engine.sock")
    with pytest.raises(SystemExit, match="does not exist"):
        check_private(tmp_path / "none" / "engine.sock")


def test_leaves_a_core_to_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (2, 1), (8, 7)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        assert default_threads() == threads


def test_starting_it_without_a_socket_says_so() -> None:
    found = subprocess.run([sys.executable, "-m", "deploy.engine.launch"], capture_output=True, text=True, check=False)

    assert found.returncode == 1
    assert "--uds" in found.stderr
    assert "Traceback" not in found.stderr


def test_importing_the_plugin_imports_nothing() -> None:
    code = "import sys; before = set(sys.modules); import deploy.engine.base_rows; print(sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "torch" not in found.stdout
    assert "vllm" not in found.stdout


def test_every_limit_is_an_argument(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, engine=EngineSettings(max_lora_rank=64, max_cpu_loras=10, max_loras=3))

    argv = engine_spec(settings).argv

    assert argv[argv.index("--max-lora-rank") + 1] == "64"
    assert argv[argv.index("--max-cpu-loras") + 1] == "13", "room for the self-test's adapters on top"
    assert Path(argv[argv.index("--model") + 1]).is_absolute()


def test_the_engine_inherits_no_setting_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TURNOUT_DATABASE_URL", "postgresql://secret")

    assert not [name for name in engine_spec(Settings(home=tmp_path)).env if name.startswith("TURNOUT")]


def test_an_engine_of_the_owners_gets_the_same_arguments(tmp_path: Path) -> None:
    own = Settings(home=tmp_path, engine=EngineSettings(command=("/opt/engine", "--fast")))
    shipped = Settings(home=tmp_path)

    assert engine_spec(own).argv[:2] == ("/opt/engine", "--fast")
    assert engine_spec(own).argv[2:] == engine_spec(shipped).argv[3:]
