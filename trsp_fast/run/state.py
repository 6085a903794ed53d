"""Outputs that appear whole or not at all."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trsp_fast.errors import UserError


def check_output(out: str | Path) -> Path:
    """The output folder, known to be creatable: refuses early what would fail after hours.

    Raises:
        UserError: it is a file, is not empty, or its parent cannot be written.
    """
    path = Path(os.path.realpath(out))
    if path.exists() and not path.is_dir():
        raise UserError(f"output {str(out)!r} is a file; give a folder that does not exist yet or is empty.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"output {str(out)!r} is not empty; give a new or empty folder, or remove it first.")
    with _parents_of(path, out), tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent):
        pass
    return path


@contextlib.contextmanager
def _parents_of(path: Path, out: str | Path) -> Iterator[None]:
    """The folders above `path` exist inside; those made for it that are still empty afterwards are removed again."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(
            f"output {str(out)!r} cannot be created ({error.strerror}); give a folder that can be written."
        ) from None
    try:
        yield
    finally:
        for parent in missing:
            with contextlib.suppress(OSError):  # not empty, or another run was faster
                parent.rmdir()


@contextlib.contextmanager
def staged_output(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` by one rename when the block ends well, and vanishes else.

    Every file is flushed to the disk before the rename. What a killed run left of its own temporary folder goes first.

    Raises:
        UserError: `out` cannot be created (see `check_output`), or there is no space left.
    """
    path = check_output(out)
    with _parents_of(path, out):
        _clear_abandoned(path)
        stage, lock = _locked_folder(path)
        try:
            yield stage
            _flush(stage)
            stage.chmod(0o755)
            check_output(out)  # somebody may have filled it meanwhile
            os.rename(stage, path)
            _flush_folder(path.parent)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise UserError(
                f"no space left for {str(out)!r} ({error.strerror}); nothing was written, make room."
            ) from None
        finally:
            os.close(lock)
            shutil.rmtree(stage, ignore_errors=True)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new temporary folder of `path` and the descriptor that locks it until this process ends, however it does."""
    while True:
        try:
            stage = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
            lock = os.open(stage, os.O_RDONLY)
        except FileNotFoundError:  # another run removed it, or the parent that it had made
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if stage.is_dir():  # else another run took it for abandoned before the lock was ours
            return stage, lock
        os.close(lock)


def _clear_abandoned(path: Path) -> None:
    """Remove temporary folders of `path` whose process is gone: nobody holds their lock."""
    for stage in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if stage.is_symlink() or not stage.is_dir():
            continue
        try:
            lock = os.open(stage, os.O_RDONLY)
        except FileNotFoundError:  # it became what it was made for, or another run cleared it
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another run is at work, or the file system has no locks
            continue
        else:
            shutil.rmtree(stage, ignore_errors=True)
        finally:
            os.close(lock)


def write_json(path: Path, values: dict[str, Any], *, strict: bool = True) -> None:
    """Readable JSON; `strict` refuses NaN and infinity, which configurations of other tools do have."""
    path.write_text(json.dumps(values, indent=1, allow_nan=not strict) + "\n", encoding="utf-8")


def _flush(folder: Path) -> None:
    for directory, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(directory, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        _flush_folder(Path(directory))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
