"""Open the files of a directory that nobody vouches for: regular files by fixed names, of bounded size, never through a link."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import Refused
from .manifest import CONFIG_FILE, MANIFEST_FILE, WEIGHTS_FILE
from .reasons import REASONS
from .tensors import chunks

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer.json"
PICKLE_FILES = tuple(f"adapter_model.{suffix}" for suffix in ("bin", "pt", "pth", "pkl", "ckpt"))
READ_FILES = (WEIGHTS_FILE, CONFIG_FILE, MANIFEST_FILE, TOKENIZER_FILE, TEMPLATE_FILE)
MAX_TEXT_BYTES = 2**20  # adapter_config.json, manifest.json, chat_template.jinja
MAX_TOKENIZER_BYTES = 64 * 2**20
# What opening a name fails with when something else stands there. Any other failure (too many open files, a disk that does
# not answer) says nothing of the files, and is raised as the `OSError` that it is.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.ENAMETOOLONG)


def open_directory(directory: Path) -> int:
    """A descriptor of a real directory. Raises `Refused(code="not_a_file")` for a link or anything else."""
    try:
        return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        raise Refused(
            f"{directory.name!r} is not a directory ({error.strerror}); give the directory that holds {CONFIG_FILE} and {WEIGHTS_FILE}",
            code="not_a_file",
            param=directory.name,
        ) from error


def open_regular(folder: int, name: str, *, missing: str, max_bytes: int) -> int:
    """A descriptor of a regular file below `folder`. A link, a pipe, a directory or an oversized file raises `Refused`."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError as error:
        raise Refused(REASONS[missing], code=missing, param=name) from error
    except OSError as error:
        if error.errno not in _NOT_THERE:
            raise
        raise Refused(
            f"{name} cannot be read ({error.strerror}); it must be a regular file, not a link",
            code="not_a_file",
            param=name,
        ) from error
    found = os.fstat(descriptor)
    try:
        if not stat.S_ISREG(found.st_mode):
            raise Refused(f"{name} is not a regular file", code="not_a_file", param=name)
        if found.st_size > max_bytes:
            raise Refused(f"{name} has {found.st_size} bytes, allowed are {max_bytes}", code="too_large", param=name)
    except Refused:
        os.close(descriptor)
        raise
    return descriptor


def names(folder: int) -> set[str]:
    """What is in an open directory."""
    return set(os.listdir(folder))


def refuse_pickles(folder: int) -> None:
    """Refuse weights in a format that runs code, even beside good ones: which of the two was meant is anyone's guess."""
    for name in PICKLE_FILES:
        try:
            os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            continue
        raise Refused(f"{name}: {REASONS['pickle_weights']}", code="pickle_weights", param=name)


@contextmanager
def opened(directory: Path) -> Iterator[int]:
    """A descriptor of a real directory, closed at the end."""
    folder = open_directory(directory)
    try:
        yield folder
    finally:
        os.close(folder)


def read_text(folder: int, name: str, *, missing: str, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """All of a small regular file."""
    descriptor = open_regular(folder, name, missing=missing, max_bytes=max_bytes)
    with os.fdopen(descriptor, "rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:  # it grew since it was opened
        raise Refused(f"{name} has more than {max_bytes} bytes", code="too_large", param=name)
    return content


def read_optional(folder: int, name: str, *, max_bytes: int = MAX_TEXT_BYTES) -> bytes | None:
    """All of a small regular file, None where there is none."""
    if name not in names(folder):
        return None
    return read_text(folder, name, missing="not_a_file", max_bytes=max_bytes)


def sha256(descriptor: int) -> str:
    """Digest of an open file, hex."""
    digest = hashlib.sha256()
    for chunk in chunks(descriptor, 0, os.fstat(descriptor).st_size):
        digest.update(chunk)
    return digest.hexdigest()
