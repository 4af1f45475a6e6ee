"""What is asked of a command from outside, between two steps: to stop (Ctrl-C, SIGTERM), and to save (the clock).

Several processes ask each other, so that all of them stop or save after the same step; and a folder is for one command
at a time (claim). It imports distributed.
"""

import signal
import time
from contextlib import contextmanager
from pathlib import Path

from refiner_min import UNFINISHED, UserError, distributed, locked

ASK_EVERY = 20  # steps between two looks at the clock of the first of several processes
AGAIN = 2.0  # seconds after which a Ctrl-C is a second one: launchers hand the first one on once more


class StopRequest:
    """Ctrl-C and SIGTERM end the command after a step; a second Ctrl-C ends it at once. However often SIGTERM comes (a
    scheduler sends it to the launcher and to its processes, and the launcher sends it on), it is one."""

    def __enter__(self):
        self.signal, self.noted = None, None
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        now = time.monotonic()
        if number == signal.SIGINT and self.signal == number and now - self.noted > AGAIN:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self.noted = number, now

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether to stop now. Several processes ask each other every time: launchers kill half a minute later."""
        if distributed.world() > 1:
            asked = distributed.largest_over_processes(self.signal or 0)
            if asked and self.noted is None:  # another process was asked: what comes now is handed on, too
                self.noted = time.monotonic()
            self.signal = asked or self.signal  # which may have come meanwhile, and is for the next time then
            return asked > 0
        return self.signal is not None


class SaveClock:
    """Says when so many minutes have gone by since it was last started anew; of several processes, by the first's."""

    def __init__(self, minutes: float):
        self.seconds = 60 * minutes
        self.restart()

    def restart(self):
        self.last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether to save after this step."""
        if distributed.world() > 1 and step % ASK_EVERY:
            return False
        due = distributed.is_main() and time.monotonic() - self.last >= self.seconds
        return bool(distributed.largest_over_processes(int(due)))


@contextmanager
def claim(folder: Path):
    """Make the folder, and keep it for this process meanwhile, by a lock that ends with the process, however that ends.
    UserError: another process has it, or it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder} cannot be made ({error})") from None
    try:
        with locked(folder / "lock", f"*.{UNFINISHED}", wait=False):
            yield
    except BlockingIOError:
        raise UserError(f"another process is at work in {folder}: wait for it, or name another folder") from None
