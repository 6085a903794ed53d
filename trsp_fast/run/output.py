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

from trsp_fast.errors import CheckFailed, Diverged, Interrupted, UserError

RUN = ".trsp"  # the run's own folder inside its output
STATE = f"{RUN}/state"  # what an interrupted run goes on from; gone when the output is complete


def check_output(out: str | Path, *, resume: bool = False) -> Path:
    """The output folder, known to be creatable: refuses early what would fail after hours.

    Args:
        resume: say that there is nothing to resume where the output is that of a finished run.

    Raises:
        UserError: it is a file, is not empty, or its parent cannot be written.
    """
    path = Path(os.path.realpath(out))
    if path.is_symlink():
        raise UserError(f"output {str(out)!r} is a link that leads back to itself; remove it, or give a folder.")
    if resume and (path / RUN / "run.json").exists():
        shutil.rmtree(path / STATE, ignore_errors=True)  # a kill just after the last rename left it
        raise UserError(f"the run of {str(out)!r} has finished and is complete; there is nothing to resume.")
    if path.exists() and not path.is_dir():
        raise UserError(f"output {str(out)!r} is a file; give a folder that does not exist yet or is empty.")
    if os.path.ismount(path):
        raise UserError(f"output {str(out)!r} is a mount point, which cannot be replaced; give a folder below it.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"output {str(out)!r} is not empty; give a new or empty folder, or remove it first.")
    with _parents_of(path, out):
        try:
            tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".partial", dir=path.parent).cleanup()
        except OSError as error:
            raise _cannot_be_created(out, error) from None
    return path


def _cannot_be_created(out: str | Path, error: OSError) -> UserError:
    return UserError(f"output {str(out)!r} cannot be created ({error.strerror}); give a folder that can be written.")


@contextlib.contextmanager
def _parents_of(path: Path, out: str | Path) -> Iterator[None]:
    """The folders above `path` exist inside; those made for it that are still empty afterwards are removed again."""
    missing = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _cannot_be_created(out, error) from None
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
            _publish(stage, path, out)
        except OSError as error:
            if not is_full(error):
                raise
            raise UserError(
                f"no space left for {str(out)!r} ({error.strerror}); nothing was written, make room."
            ) from None
        finally:
            os.close(lock)
            shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def resumable_output(out: str | Path, *, resume: bool = False, restart: bool = False) -> Iterator[Path]:
    """A folder beside `out`, named after it, that becomes `out` by one rename when the block ends well.

    Where the block ends otherwise and left a state in it (`STATE`), it stays, and a later call with `resume` goes on
    with its `RUN` folder; all else in it is made anew. A lock that dies with this process keeps other runs away.

    Args:
        resume: go on from the state of an interrupted run; start anew where there is none.
        restart: discard the state of an interrupted run.

    Raises:
        UserError: `out` cannot be created, another run is at work on it, an interrupted run is there and neither
            `resume` nor `restart` was given, or there is no space left.
        Interrupted: a signal came and the state was kept.
    """
    path = check_output(out, resume=resume)
    stage = path.parent / f".{path.name}.unfinished"
    with _parents_of(path, out):
        lock = _exclusive(stage, out)
        try:
            check_output(out, resume=resume)  # the run that held the lock may just have finished
            if holds_state(stage) and not resume and not restart:
                raise UserError(
                    f"an interrupted run of {str(out)!r} is there; give --resume to go on with it or --restart to "
                    "discard it."
                )
            _empty(stage, keep=RUN if resume and holds_state(stage) and not restart else None)
            yield stage
            _publish(stage, path, out)
            shutil.rmtree(path / STATE, ignore_errors=True)
        except OSError as error:
            if not is_full(error):
                raise
            kept = "what was done is kept, make room and give --resume" if holds_state(stage) else "make room"
            raise UserError(f"no space left for {str(out)!r} ({error.strerror}); {kept}.") from None
        except CheckFailed as error:
            if not isinstance(error, Diverged):  # the work is done and was refused: nothing to go on with
                shutil.rmtree(stage, ignore_errors=True)
            raise
        except (KeyboardInterrupt, SystemExit) as stop:
            if not holds_state(stage):
                raise
            raise Interrupted(130 if isinstance(stop, KeyboardInterrupt) else int(stop.code or 0)) from None
        finally:
            if _is_folder(lock, stage) and not holds_state(stage):
                shutil.rmtree(stage, ignore_errors=True)
            os.close(lock)


def holds_state(stage: Path) -> bool:
    """Whether an interrupted run can go on from this folder."""
    return any((stage / STATE).glob("*.json"))


def is_full(error: OSError) -> bool:
    """Whether an error of the system says that no more can be written."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _publish(stage: Path, path: Path, out: str | Path) -> None:
    """The finished folder takes its name, flushed to the disk before and after."""
    _flush(stage)
    stage.chmod(0o755)
    check_output(out)  # somebody may have filled it meanwhile
    os.rename(stage, path)
    flush_folder(path.parent)


def _exclusive(stage: Path, out: str | Path) -> int:
    """The descriptor of the folder `stage`, made if need be, locked until this process ends, however it does."""
    while True:
        try:
            stage.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        except (FileExistsError, NotADirectoryError):  # all in it would be removed, wherever a link leads
            raise UserError(f"{str(stage)!r} is no folder, but the run needs one there; remove it.") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(f"another run is at work on {str(out)!r}; wait for it, or give another --out.") from None
        except OSError:  # a file system without locks
            return lock
        if _is_folder(lock, stage):
            return lock
        os.close(lock)  # the run that held it has just finished and renamed it


def _is_folder(descriptor: int, path: Path) -> bool:
    """Whether the open folder still has this name, which another run's may have got since."""
    return path.is_dir() and os.path.samestat(os.fstat(descriptor), os.stat(path))


def _empty(folder: Path, keep: str | None) -> None:
    for entry in list(folder.iterdir()):
        if entry.name == keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


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


def write_durably(path: Path, content: bytes) -> None:
    """A file that is there whole or not at all, and after a crash of the machine too."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    flush_folder(path.parent)


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
        flush_folder(Path(directory))


def flush_folder(folder: Path) -> None:
    """Make renames in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
