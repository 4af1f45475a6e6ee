"""stopping.py: signals, the clock, and a folder that is for one run at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from refiner_min import UserError, stopping
from refiner_min.stopping import SaveClock, StopRequest, claim


@pytest.fixture
def now(monkeypatch):
    """The time, to be set."""
    clock = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    return clock


def send(number):
    os.kill(os.getpid(), number)


def test_sigterm_is_one_however_often_it_comes(now):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.agreed()
        for later in (0, 0.1, 60):
            now[0] = 100 + later
            send(signal.SIGTERM)
        assert stop.agreed() and stop.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_only_a_second_ctrl_c_ends_at_once(now):
    with StopRequest() as stop:
        send(signal.SIGINT)
        now[0] += stopping.AGAIN  # the launcher hands it on
        send(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        send(signal.SIGTERM)
        assert stop.signal == signal.SIGINT
        now[0] += 0.1
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_ctrl_c_after_sigterm_waits_for_the_save(now):
    with StopRequest() as stop:
        send(signal.SIGTERM)
        now[0] += 60
        send(signal.SIGINT)
        assert stop.signal == signal.SIGTERM


def test_a_signal_while_the_processes_ask_each_other_is_not_lost(now, monkeypatch):
    def asked(number):
        send(signal.SIGTERM)
        return number

    monkeypatch.setattr(stopping.distributed, "world", lambda: 2)
    monkeypatch.setattr(stopping.distributed, "largest_over_processes", asked)
    with StopRequest() as stop:
        assert not stop.agreed()  # the others do not know of it
        assert stop.agreed() and stop.signal == signal.SIGTERM


def test_ctrl_c_is_handed_on_to_a_process_that_has_heard_of_it(now, monkeypatch):
    """A machine's launcher may do so while its processes, which asked the others', save already."""
    monkeypatch.setattr(stopping.distributed, "world", lambda: 2)
    monkeypatch.setattr(stopping.distributed, "largest_over_processes", lambda number: signal.SIGINT)
    with StopRequest() as stop:
        assert stop.agreed()
        now[0] += stopping.AGAIN
        send(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        now[0] += 0.1
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_the_clock(now):
    clock = SaveClock(2.0)
    now[0] += 119
    assert not clock.due(1)
    now[0] += 1
    assert clock.due(2) and clock.due(3)  # until it is saved
    clock.restart()
    assert not clock.due(4)


def test_a_folder_is_for_one_process_and_a_kill_gives_it_back(tmp_path):
    code = ("import sys, time\nfrom pathlib import Path\nfrom refiner_min.stopping import claim\n"
            "with claim(Path('mine/run')): print('claimed', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "claimed\n"
    with pytest.raises(UserError, match="another process is at work in mine/run: wait for it, or name another folder"):
        with claim(Path("mine/run")):
            raise AssertionError("claimed twice")
    other.kill()
    other.communicate()
    with claim(Path("mine/run")):
        pass
    with claim(Path("mine/run")):  # and once more, after it was given back
        pass
    Path("file").write_text("precious")
    with pytest.raises(UserError, match="--out file/run cannot be made"):
        with claim(Path("file/run")):
            pass
    assert Path("file").read_text() == "precious"


def test_processes_that_read_for_a_killed_one_do_not_keep_its_folder(tmp_path):
    code = ("import os, time\nfrom pathlib import Path\nfrom refiner_min.stopping import claim\n"
            "with claim(Path('run')):\n    reader = os.fork()\n    if reader: print(reader, flush=True)\n"
            "    time.sleep(60)")
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    reader = int(owner.stdout.readline())
    owner.kill()
    owner.wait()
    try:
        with claim(Path("run")):
            os.kill(reader, 0)  # which is still there
    finally:
        os.kill(reader, signal.SIGKILL)


def test_what_a_killed_run_left_unfinished_is_removed_and_nothing_else():
    Path("run").mkdir()
    for name in ("last.pt", "last.pt.other-1-0000beef.tmp", "mine.txt"):
        Path("run", name).write_bytes(b"")
    with claim(Path("run")):
        assert {path.name for path in Path("run").iterdir()} == {"last.pt", "mine.txt", "lock"}
    assert not Path("run/lock").exists()
