"""Files of published versions: copied in from a source nobody vouches for, made durable, never changed again.

A version's directory is named by its digest and appears by one rename, complete or not at all. A crash leaves at most a
staging directory, which the next start removes, or a complete directory that no version names yet, which the next
publish of the same bytes reuses.

Files can be damaged later all the same. That is no fault of the version, whose digest says what its bytes are, so no
version is ever condemned for it: damaged files are not loaded, not verified and not trained on until they are whole
again, and publishing the same bundle makes them whole. A version that is received waits with its verification, one that
is verified is refused by engines that do not hold it already; both carry the code `digest_mismatch` for as long.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from ..durable import fsync, put, write_new
from ..errors import Refused, StorageFull, Unavailable
from .manifest import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    Manifest,
    bundle_digest,
    manifest_bytes,
    manifest_digest,
    parse_manifest,
)
from .preflight import Preflighted
from .source import (
    MAX_TEXT_BYTES,
    MAX_TOKENIZER_BYTES,
    READ_FILES,
    TOKENIZER_FILE,
    names,
    open_regular,
    opened,
    read_optional,
    refuse_pickles,
    sha256,
)
from .tensors import chunks

_ABANDONED_AFTER_S = 3600.0  # a manifest takes milliseconds to write
_FULL = (errno.ENOSPC, errno.EDQUOT)
log = structlog.get_logger(__name__)


class Artifacts:
    """The content-addressed store: `<digest[:2]>/<digest>/` with the canonical config and the weights, and manifests by digest."""

    def __init__(self, directory: Path, manifests: Path) -> None:
        self._directory = directory
        self._manifests = manifests
        self._staging = directory / ".staging"

    def directory(self, digest: str) -> Path:
        """Where a bundle's files are, or would be."""
        return self._directory / digest[:2] / digest

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private directory on the artifacts' disk, removed at the end; locked, so that a clean-up elsewhere leaves it alone."""
        with _storage_errors():
            path, lock = self._new_staging()
            try:
                yield path
            finally:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)

    def clean(self) -> int:
        """Remove what dead processes left in staging; how many directories that were."""
        removed = 0
        for path in sorted(self._staging.glob("*")):
            try:
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue  # gone already, or nothing of ours
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                removed += 1
            except BlockingIOError:
                pass  # its owner lives
            finally:
                os.close(lock)
        for path in self._manifests.glob(".*"):
            if path.is_file() and time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                path.unlink(missing_ok=True)
        return removed

    def copy_in(
        self, source: Path, into: Path, *, max_weights_bytes: int, max_text_bytes: int = MAX_TEXT_BYTES
    ) -> None:
        """Copy the few files that are ever read, so that nobody can change them after they were checked."""
        caps = {WEIGHTS_FILE: max_weights_bytes, TOKENIZER_FILE: MAX_TOKENIZER_BYTES}
        with opened(source) as folder:
            refuse_pickles(folder)
            present = names(folder)
            for name in READ_FILES:
                if name in present:
                    _copy(folder, name, into / name, max_bytes=caps.get(name, min(max_text_bytes, MAX_TEXT_BYTES)))

    def install(self, staged: Path, checked: Preflighted) -> Path:
        """Make the staged bundle's files durable under their digest; reuse them where they are already."""
        target = self.directory(checked.digest)
        bundle = staged / checked.digest
        bundle.mkdir()
        (staged / WEIGHTS_FILE).rename(bundle / WEIGHTS_FILE)
        write_new(bundle / CONFIG_FILE, checked.config_bytes)
        for file in (bundle / WEIGHTS_FILE, bundle / CONFIG_FILE):
            file.chmod(0o444)
            fsync(file)
        fsync(bundle)
        target.parent.mkdir(exist_ok=True)
        self._place(bundle, target, checked.digest)
        target.chmod(0o555)
        for directory in (target, target.parent, self._directory):
            fsync(directory)
        return target

    def verify(self, digest: str) -> None:
        """Hash the files again. Raises `Refused(code="digest_mismatch")` unless they are the bytes that were published,
        and `Unavailable` when the disk does not let us know."""
        directory = self.directory(digest)
        try:
            found = self._digest_of(directory)
        except OSError as error:
            log.warning("files cannot be read", directory=str(directory), error=str(error))
            raise Unavailable(
                f"the files of {digest[:12]} cannot be read now ({error.strerror}); trying again", code="storage_failed"
            ) from error
        if found != digest:
            log.warning("files are damaged", directory=str(directory), found=found)
            raise Refused(
                f"the stored files of {digest[:12]} are damaged or gone; publish the same bundle again, which restores them",
                code="digest_mismatch",
            )

    def set_aside(self, digest: str, into: Path) -> None:
        """Move the files out of the store in one step, durably; they go with the directory that they are moved into."""
        target = self.directory(digest)
        if target.exists():
            _set_aside(target, into)
            fsync(target.parent)

    def store_manifest(self, manifest: Manifest) -> str:
        """Keep a manifest under its digest, durably."""
        digest = manifest_digest(manifest)
        path = self._manifests / f"{digest}.json"
        put(path, manifest_bytes(manifest), mode=0o444)
        return digest

    def manifest(self, digest: str) -> Manifest:
        """Read a stored manifest. Raises `Refused(code="digest_mismatch")` when it is damaged or gone."""
        path = self._manifests / f"{digest}.json"
        content = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(content).hexdigest() != digest:
            log.warning("manifest is damaged or gone", path=str(path))
            raise Refused(
                f"the manifest {digest[:12]} is damaged or gone; publish the same bundle again, or restore it from a backup",
                code="digest_mismatch",
            )
        return parse_manifest(content)

    def _new_staging(self) -> tuple[Path, int]:
        while True:
            path = self._staging / secrets.token_hex(8)
            path.mkdir(mode=0o700, parents=True)
            try:
                lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.is_dir():
                return path, lock
            os.close(lock)  # a clean-up came between the making and the locking

    def _place(self, bundle: Path, target: Path, digest: str) -> None:
        for _ in range(3):
            try:
                bundle.rename(target)
                return
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            if self._is_taken_up(target, digest):
                return
            if not target.exists():
                continue
            _set_aside(target, bundle.parent)
        log.error("artifacts keep changing under us", directory=str(target))
        raise Unavailable(
            "the files of this bundle keep changing where they are stored; is another program writing there?",
            code="storage_failed",
        )

    def _is_taken_up(self, target: Path, digest: str) -> bool:
        """Whether the files are there to be reused. They are young from now on, so that no clean-up takes them for orphans."""
        try:
            os.utime(target)
            return self._digest_of(target) == digest
        except FileNotFoundError:  # a clean-up was first
            return False

    def _digest_of(self, directory: Path) -> str | None:
        """None when they are not the two files of a bundle. Raises `OSError` when that cannot be told."""
        try:
            with opened(directory) as folder:
                if names(folder) != {CONFIG_FILE, WEIGHTS_FILE}:
                    return None
                config = read_optional(folder, CONFIG_FILE)
                weights = open_regular(folder, WEIGHTS_FILE, missing="missing_weights", max_bytes=2**63)
                try:
                    return bundle_digest(config or b"", sha256(weights))
                finally:
                    os.close(weights)
        except Refused:
            return None


def _copy(folder: int, name: str, target: Path, *, max_bytes: int) -> None:
    descriptor = open_regular(folder, name, missing="not_a_file", max_bytes=max_bytes)
    try:
        with target.open("xb") as file:
            for chunk in chunks(descriptor, 0, os.fstat(descriptor).st_size):
                file.write(chunk)
    finally:
        os.close(descriptor)


def _set_aside(target: Path, staged: Path) -> None:
    """Move a directory out of the way; it goes with the staging directory."""
    mode = stat.S_IMODE(target.stat().st_mode)
    target.chmod(mode | stat.S_IWUSR)
    target.rename(staged / f"aside-{secrets.token_hex(4)}")


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull("the disk that holds the artifacts is full; free some space and publish again") from error
        log.error("the artifacts' disk failed", error=str(error))  # the path is for us, not for who publishes
        raise Unavailable(
            f"the artifacts' disk failed ({error.strerror}); nothing was published", code="storage_failed"
        ) from error
