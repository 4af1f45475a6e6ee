"""refiner_min: the reference implementation of Refiner-ViT that one can read in an evening.

Start with model.py. What every part of the package shares is here: how a mistake is told, how a file is written, where
chance comes from.
"""

import errno
import json
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

__version__ = "0.1.0"


FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk holds all that is granted here",
        errno.EFBIG: "no larger file is allowed here"}


class UserError(Exception):
    """A mistake that its user can mend, said in one sentence: what was wrong, with the value, and what to do."""


def some(names: list[str]) -> str:
    """The first three of them, and how many more there are, for such a sentence."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def run_command(main):
    """Run a command's main(); a UserError is one sentence and exit status 2, Ctrl-C is 130, neither a traceback."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
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
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's own, behind which the system's stands
        number = next((one.errno for one in (error, error.__context__) if isinstance(one, OSError)), None)
        raise UserError(f"{path} could not be written ({FULL.get(number, error)}); what was there before still is"
                        ) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path, facts: dict):
    """facts as the JSON file path, whole or not at all. UserError: as replacing's."""
    with replacing(path) as file:
        file.write(f"{json.dumps(facts, indent=1)}\n".encode())


def seed_for(stream: str, *numbers: int) -> int:
    """A seed from 0 to 2^64 - 1 for one use of chance, such as the "order" of the pictures in an epoch: the same on
    every machine, and independent of other streams' and other numbers'. numbers: as many for every use of a stream,
    each from 0 to 2^32 - 1. Source: numpy's SeedSequence."""
    return int(np.random.SeedSequence(numbers, spawn_key=tuple(stream.encode())).generate_state(1, np.uint64)[0])
