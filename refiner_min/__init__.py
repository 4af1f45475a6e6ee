"""refiner_min: the reference implementation of Refiner-ViT that one can read in an evening.

Start with model.py. What every part of the package shares is here: how a mistake is told, how a file is written, where
chance comes from.
"""

import errno
import json
import os
import platform
import secrets
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

__version__ = "0.1.0"
UNFINISHED = f"*-[0-9]*-{'[0-9a-f]' * 8}.tmp"  # the pattern of what replacing puts after a file's name
_HELD = set()  # the open files of the locks of this process
FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk holds all that is granted here",
        errno.EFBIG: "no larger file is allowed here"}


class UserError(Exception):
    """A mistake that its user can mend, said in one sentence: what was wrong, with the value, and what to do."""

    def __str__(self):  # in one line, whatever stands in a file that it speaks of
        return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in super().__str__())


def some(names: list[str]) -> str:
    """The first three of them, and how many more there are, for such a sentence."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def out_of_memory(error: Exception) -> bool:
    """Whether this is how torch or Python says that the memory, a GPU's or the machine's, does not hold something."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "DefaultCPUAllocator"))


def run_command(main):
    """Run a command's main(); a UserError, and too little memory, is one sentence and exit status 2, Ctrl-C is 130,
    neither a traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print("error: the memory is too small for this: take fewer pictures at once, or smaller ones", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _interrupted(kind, error, traceback):
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.argv[:1] == ["-m"]:  # so Python starts a command; importing torch takes seconds, before there is a run_command
    sys.excepthook = _interrupted


@contextmanager
def replacing(path):
    """A file to write bytes to, which takes the place of path when it is whole; until then path is as it was.
    UserError: it could not be written (no such folder, no right, disk full)."""
    path = Path(path)
    mine = f"{platform.node().split('.')[0]}-{os.getpid()}-{secrets.token_hex(4)}"  # several machines share a disk
    temporary = path.parent / f"{path.name}.{mine}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's own, behind which the system's stands
        if "DataLoader worker" in str(error):  # torch tells of it wherever the process is by then
            raise
        number = next((one.errno for one in (error, error.__context__) if isinstance(one, OSError)), None)
        raise UserError(f"{path} could not be written ({FULL.get(number, error)}); what was there before still is"
                        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def locked(path, unfinished: str | None = None, wait: bool = True):
    """Hold the file path, which is made for it and removed after it, against every process that wants to hold it too,
    on any machine that shares the disk; a lock ends with its process, however that ends. unfinished: a pattern of files
    beside it, which killed processes left and which are removed. Where the disk takes no locks, nothing is held.
    BlockingIOError: without wait, another process holds it."""
    path = Path(path)
    file = _lock(path, wait)
    if file is not None:
        _HELD.add(file)
    try:
        for left in path.parent.glob(unfinished) if file is not None and unfinished else ():
            left.unlink(missing_ok=True)
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # while it is still held
            file.close()
            _HELD.remove(file)


def _lock(path: Path, wait: bool):
    """The open file that holds the lock; None: there are no locks here, or nothing may be written."""
    while fcntl is not None:
        try:
            file = open(path, "ab")
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if os.path.samefile(path, file.fileno()):
                return file
        except BlockingIOError:
            file.close()
            raise
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                file.close()
                return None
        file.close()  # its last holder has removed it: there is another one now
    return None


def _let_go():
    """A lock is held as long as anybody has its file open, and a process that reads pictures would inherit it."""
    for file in _HELD:
        file.close()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)


def write_json(path, facts: dict):
    """facts as the JSON file path, whole or not at all. UserError: as replacing's."""
    with replacing(path) as file:
        file.write(f"{json.dumps(facts, indent=1)}\n".encode())


def seed_for(stream: str, *numbers: int) -> int:
    """A seed from 0 to 2^64 - 1 for one use of chance, such as the "order" of the pictures in an epoch: the same on
    every machine, and independent of other streams' and other numbers'. numbers: as many for every use of a stream,
    each from 0 to 2^32 - 1. Source: numpy's SeedSequence."""
    return int(np.random.SeedSequence(numbers, spawn_key=tuple(stream.encode())).generate_state(1, np.uint64)[0])
