"""Which engine replicas exist and where: the seam that other drivers implement, and the local one."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Protocol

from ..process_usage import group_usage
from ..processes import ProcessTable, argv_digest
from ..settings import Settings
from .models import ReplicaProcess, ReplicaSpec, ReplicaUsage

KIND = "engine"
LOCAL_REPLICA = "engine-0"
USAGE_EVERY_S = 1.0
# All that an engine inherits. It serves strangers' prompts and loads their weights: no database URL, no key of ours.
_INHERITED = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "VIRTUAL_ENV",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_HOME",
)


class Fleet(Protocol):
    """A driver of engine replicas. Only plain data crosses it; every call may be repeated."""

    async def ensure(self, spec: ReplicaSpec) -> ReplicaProcess:
        """Make the replica run as `spec` says: start it, or end one that was started otherwise and start it anew."""

    async def replicas(self) -> list[ReplicaProcess]:
        """What is known of every replica."""

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """End the replica and everything that it started; returns when all of it is gone."""


class LocalFleet:
    """Processes on this machine, through the process table."""

    def __init__(self, processes: ProcessTable) -> None:
        self._processes = processes
        self._usage: dict[tuple[str, int], ReplicaUsage] = {}

    async def ensure(self, spec: ReplicaSpec) -> ReplicaProcess:
        """Start the replica unless it runs with these very arguments."""
        row = await self._processes.child(spec.id)
        if row is not None:
            is_running = (await self._processes.status(spec.id)).state == "running"
            if is_running and row.argv_digest == argv_digest(spec.argv):
                return await self._look(spec.id)
            # Also when it is dead: its core may live on without its server, and would share the socket's directory.
            await self._processes.kill(spec.id, grace_s=5.0 if is_running else 0.0)
        await self._processes.spawn(
            spec.id,
            kind=KIND,
            argv=spec.argv,
            env=spec.env,
            cwd=Path(spec.cwd),
            log=Path(spec.log),
            attempt=row.attempt + 1 if row else 1,
        )
        return await self._look(spec.id)

    async def replicas(self) -> list[ReplicaProcess]:
        """Every replica that was ever started here and not stopped since."""
        return [await self._look(row.id) for row in await self._processes.children(KIND)]

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """SIGTERM, then SIGKILL, of the whole group."""
        await self._processes.kill(replica_id, grace_s)

    async def _look(self, replica_id: str) -> ReplicaProcess:
        row = await self._processes.child(replica_id)
        if row is None:
            return ReplicaProcess(id=replica_id, state="absent")
        status = await self._processes.status(replica_id)
        epoch = f"{row.pid}-{row.started:.2f}"
        usage = await self._used(replica_id, row.pid) if status.state == "running" else None
        return ReplicaProcess(id=replica_id, state=status.state, epoch=epoch, exit_code=status.exit_code, usage=usage)

    async def _used(self, replica_id: str, pid: int) -> ReplicaUsage:
        """What it has used; looked at once a second, for a look reads some files of every process and thread."""
        found = self._usage.get((replica_id, pid))
        if found is None or time.monotonic() - found.at_s >= USAGE_EVERY_S:
            used = await asyncio.to_thread(group_usage, pid)
            found = ReplicaUsage(
                at_s=time.monotonic(), cpu_s=used.cpu_s, waited_s=used.waited_s, read_bytes=used.read_bytes
            )
            self._usage = {(replica_id, pid): found}
        return found


def engine_socket(settings: Settings, replica_id: str = LOCAL_REPLICA) -> Path:
    """Where a local replica listens: in a directory that only we can enter."""
    return settings.run_dir / f"{replica_id}.sock"


def engine_slots(settings: Settings) -> int:
    """Adapters the engine holds in memory: those of versions, and room for the self-test's on top."""
    return settings.engine.max_cpu_loras + (settings.engine.max_loras if settings.engine.self_test else 0)


def engine_spec(settings: Settings, replica_id: str = LOCAL_REPLICA) -> ReplicaSpec:
    """How the local replica is started. Every setting of the engine is an argument, so a change of one restarts it."""
    engine, socket = settings.engine, engine_socket(settings, replica_id)
    program = engine.command or (sys.executable, "-m", "deploy.engine.launch")
    argv = (
        *program,
        *("--uds", str(socket)),
        *("--model", str(settings.base_model.path.expanduser().resolve())),
        *("--served-model-name", settings.base_model.name),
        *("--dtype", engine.dtype),
        *("--max-model-len", str(engine.max_model_len)),
        *("--max-loras", str(engine.max_loras)),
        *("--max-cpu-loras", str(engine_slots(settings))),
        *("--max-lora-rank", str(engine.max_lora_rank)),
        *("--max-num-seqs", str(engine.max_num_seqs)),
        *("--kv-cache-gib", str(engine.kv_cache_gib)),
        *("--cache-dir", str(settings.home / "cache" / "vllm")),
    )
    return ReplicaSpec(
        id=replica_id,
        argv=argv,
        env={name: os.environ[name] for name in _INHERITED if name in os.environ},
        # The built-in program is installed; one of the owner's own may be given relative to where the server was started.
        cwd=str(Path.cwd() if engine.command else settings.home),
        socket=str(socket),
        log=str(settings.logs_dir / f"{replica_id}.log"),
    )
