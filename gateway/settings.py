"""The service's settings: environment variables `TURNOUT_*`, or `turnout.yaml` in the home directory."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from .errors import Invalid
from .names import NAME_PATTERN

MAX_SOCKET_PATH_BYTES = 100  # the kernel's limit is 108 with the closing NUL


class BaseModelSettings(BaseModel, frozen=True, extra="forbid"):
    """The one base model this server serves."""

    name: str = Field(
        default="smollm2-135m", pattern=NAME_PATTERN, description="name that requests use for the untuned model"
    )
    path: Path = Field(default=Path("build/models/smollm2-135m-instruct"), description="folder in Hugging Face format")


class EngineSettings(BaseModel, frozen=True, extra="forbid"):
    """How the vLLM server is started."""

    enabled: bool = Field(default=True, description="whether the controller starts an engine at all")
    dtype: Literal["bfloat16", "float32", "float16", "auto"] = Field(
        default="bfloat16", description="arithmetic of the base model"
    )
    max_model_len: int = Field(default=2048, ge=128, description="longest prompt plus answer, in tokens")
    max_loras: int = Field(default=4, ge=1, description="distinct adapters in one batch")
    max_cpu_loras: int = Field(default=32, ge=2, description="adapters the engine keeps in memory")
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = Field(default=16, description="highest rank served")
    max_num_seqs: int = Field(default=32, ge=1, description="sequences decoded together")
    kv_cache_gib: int = Field(default=2, ge=1, description="memory of the key-value cache on CPU")
    start_timeout_s: float = Field(
        default=300, gt=0, description="time the engine has to become healthy, unless it computes"
    )
    health_interval_s: float = Field(default=1.0, gt=0, description="time between health checks")
    hang_timeout_s: float = Field(
        default=10.0, gt=0, description="an engine that was asked and shows no sign of work for longer is restarted"
    )
    first_work_timeout_s: float = Field(
        default=120.0, gt=0, description="the same for the first work after a start, which may compile and warm up"
    )
    command: tuple[str, ...] | None = Field(
        default=None, description="program that starts the engine in place of the built-in one; gets the same arguments"
    )
    self_test: bool = Field(default=True, description="prove on start that adapters do not leak into the base model")


class JobSettings(BaseModel, frozen=True, extra="forbid"):
    """How fine-tuning, verification and evaluation jobs run."""

    max_running: int = Field(default=1, ge=1, description="jobs at a time; on CPU one")
    max_attempts: int = Field(default=3, ge=1, description="starts of a job that dies before it is given up")
    heartbeat_timeout_s: float = Field(
        default=600, gt=0, description="a job silent for longer is killed and started again"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads of a job; unset: all cores")


class Limits(BaseModel, frozen=True, extra="forbid"):
    """Caps on what a client may send."""

    request_bytes: int = Field(default=8 * 2**20, ge=1024, description="body of a completion request")
    adapter_bytes: int = Field(default=2 * 2**30, ge=1024, description="adapter_model.safetensors")
    config_bytes: int = Field(default=1 * 2**20, ge=1024, description="adapter_config.json or manifest.json")
    file_bytes: int = Field(default=512 * 2**20, ge=1024, description="an uploaded data file")
    request_timeout_s: float = Field(
        default=600, gt=0, description="longest time from a request to the end of its answer"
    )
    connections: int = Field(
        default=4096, ge=16, description="open connections; fewer where the process may not open twice as many files"
    )
    connections_per_address: int = Field(
        default=256, ge=1, description="of these, from one address, without a key that counts"
    )


class RetentionSettings(BaseModel, frozen=True, extra="forbid"):
    """How long what grows is kept. What is over goes in small steps, and `turnout gc --dry-run` shows it before."""

    exposures_days: float = Field(default=7, gt=0, description="days that exposures are kept")
    exposures_max_rows: int = Field(
        default=10_000_000,
        ge=1_000,
        description="exposures kept at most, the newest; those of running splits among twice as many",
    )
    job_events_days: float = Field(default=90, gt=0, description="days that events of finished jobs are kept")
    job_events_per_job: int = Field(default=5_000, ge=100, description="events kept of one job, the newest")
    job_attempts_days: float = Field(default=90, gt=0, description="days that attempts of finished jobs are kept")
    job_directories_days: float = Field(
        default=30, gt=0, description="days that logs and results of finished jobs stay on disk"
    )
    evaluation_key_audit_days: float = Field(
        default=30, gt=0, description="days that the audit log keeps the keys made for attempts of evaluations"
    )
    deleted_files_days: float = Field(default=30, gt=0, description="days that records of deleted files are kept")
    scores_days: float = Field(default=90, gt=0, description="days that cached scores are kept; they can be made again")
    orphans_hours: float = Field(
        default=1, ge=0.1, description="age from which stored files that no version names are removed"
    )
    backups_kept: int = Field(default=3, ge=1, description="copies of the database from before upgrades, the newest")
    interval_s: float = Field(default=300, gt=0, description="time between looks for what is over")


class Settings(BaseSettings):
    """All settings; unknown names are refused."""

    model_config = SettingsConfigDict(env_prefix="TURNOUT_", env_nested_delimiter="__", extra="forbid", frozen=True)

    home: Path = Field(
        default=Path("~/.local/share/turnout"), description="where the database, artifacts and jobs live"
    )
    host: str = Field(default="127.0.0.1", description="address the gateway binds to; without keys only loopback")
    port: int = Field(default=8321, ge=0, le=65535, description="port of the gateway")
    auth: Literal["keys", "none"] = Field(default="keys", description="`none` serves everyone, on loopback only")
    database_url: str | None = Field(default=None, description="SQLAlchemy URL; unset: SQLite in the home directory")
    base_model: BaseModelSettings = Field(default=BaseModelSettings(), description="the served base model")
    engine: EngineSettings = Field(default=EngineSettings(), description="the vLLM server")
    jobs: JobSettings = Field(default=JobSettings(), description="training and evaluation jobs")
    limits: Limits = Field(default=Limits(), description="caps on what clients may send")
    retention: RetentionSettings = Field(default=RetentionSettings(), description="how long what grows is kept")
    drain_timeout_s: float = Field(default=30, ge=0, description="time open requests get when the gateway stops")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least level written to the log"
    )

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().resolve()

    @property
    def url(self) -> str:
        """Where clients reach the gateway."""
        return f"http://{self.host}:{self.port}"

    @property
    def database(self) -> str:
        """SQLAlchemy URL of the state."""
        return self.database_url or f"sqlite+aiosqlite:///{self.home / 'turnout.db'}"

    @property
    def artifacts_dir(self) -> Path:
        """Content-addressed adapter weights: `<digest[:2]>/<digest>/`."""
        return self.home / "artifacts"

    @property
    def manifests_dir(self) -> Path:
        """Manifests by their own digest."""
        return self.home / "manifests"

    @property
    def files_dir(self) -> Path:
        """Uploaded data files, by file id."""
        return self.home / "files"

    @property
    def jobs_dir(self) -> Path:
        """Work directories: `<job id>/<attempt>/`."""
        return self.home / "jobs"

    @property
    def scores_dir(self) -> Path:
        """Cached per-item scores: `<target digest>/<task digest>-<fingerprint>.json`."""
        return self.home / "scores"

    @property
    def suites_dir(self) -> Path:
        """Suites registered by the server's owner, one folder each."""
        return self.home / "suites"

    @property
    def logs_dir(self) -> Path:
        """Logs of the processes."""
        return self.home / "logs"

    @property
    def references_dir(self) -> Path:
        """Reference log-probabilities of verified versions: `<digest>.json`."""
        return self.home / "references"

    @property
    def secrets_dir(self) -> Path:
        """Pepper of key hashes and the internal key; mode 0700."""
        return self.home / "secrets"

    @property
    def snapshot_path(self) -> Path:
        """Last known routing table, so that a gateway can serve without its database."""
        return self.home / "snapshot.json"

    @property
    def journal_path(self) -> Path:
        """Rollbacks that were made while the database was locked or gone."""
        return self.home / "break-glass.jsonl"

    @property
    def run_dir(self) -> Path:
        """Private (0700) directory of the engine's socket; short enough for the kernel."""
        preferred = self.home / "run"
        if len(str(preferred / "engine.sock").encode()) <= MAX_SOCKET_PATH_BYTES:
            return preferred
        name = hashlib.sha256(str(self.home).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"turnout-{os.getuid()}-{name}"

    def prepare_directories(self) -> None:
        """Make the directories; private ones with mode 0700, and refuse one that somebody else owns."""
        for path in (
            self.home,
            self.artifacts_dir,
            self.manifests_dir,
            self.files_dir,
            self.jobs_dir,
            self.scores_dir,
            self.suites_dir,
            self.logs_dir,
            self.references_dir,
        ):
            path.mkdir(parents=True, exist_ok=True)
        for path in (self.secrets_dir, self.run_dir):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                raise Invalid(
                    f"{path} belongs to another user; remove it or set TURNOUT_HOME elsewhere", code="bad_directory"
                )
            path.chmod(0o700)


def load_settings(config: Path | None = None, **overrides: object) -> Settings:
    """Read overrides, then the environment, then the YAML file: the first that sets a value wins.

    Raises `Invalid` that names the setting, the value and what is allowed.
    """
    try:
        home = Settings(**({"home": overrides["home"]} if "home" in overrides else {})).home  # type: ignore[arg-type]
        path = config or home / "turnout.yaml"
        if config is not None and not config.is_file():
            raise Invalid(f"settings file {config} does not exist", code="bad_settings")

        class WithFile(Settings):
            @classmethod
            def settings_customise_sources(
                cls,
                settings_cls: type[BaseSettings],
                init_settings: PydanticBaseSettingsSource,
                env_settings: PydanticBaseSettingsSource,
                dotenv_settings: PydanticBaseSettingsSource,
                file_secret_settings: PydanticBaseSettingsSource,
            ) -> tuple[PydanticBaseSettingsSource, ...]:
                return (init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=path))

        return WithFile(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        lines = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']} (got {e['input']!r})" for e in error.errors())
        raise Invalid(f"settings are wrong: {lines}", code="bad_settings") from error
    except yaml.YAMLError as error:
        raise Invalid(f"{path} is not YAML: {error}", code="bad_settings") from error
