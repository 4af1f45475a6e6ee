"""Kills: SIGKILL at any moment, also inside a save, by one process and by two; the run ends with the same bits.

tests/README.md has the table of all faults. KILLS=20 pytest tests/test_faults.py kills more often than the suite does.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refiner_min import checkpoint, plots, train
from tests.runs import assert_same_runs, small
from tests.test_distributed import start, wait_until, workers_of

KILLS = int(os.environ.get("KILLS", 3))
FLAGS = ["--dim", "16", "--depth", "2", "--heads", "2", "--amp", "off", "--batch-size", "2", "--resume", "auto",
         "--save-every", "1e-9"]  # after every step, so that many a kill comes inside a save
STARTER = """
import os, random, signal, sys, time, torch
from refiner_min import plots, train
plots.training_curves = plots.save_figure = lambda *words: None  # most of a short epoch
torch.set_num_threads(1)  # what is forked has one thread
seed, kills, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
random = random.Random(seed)
for kill in range(kills + 1):
    child = os.fork()
    if not child:
        os._exit(train.main(sys.argv[4:]))
    if kill < kills:
        time.sleep(random.uniform(0.05, seconds))
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if kill < kills else 0), (kill, status)
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in what is killed here: with another number of threads the sums are rounded otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_pictures(monkeypatch):
    for name in ("training_curves", "save_figure"):
        monkeypatch.setattr(plots, name, lambda *words: None)


@pytest.mark.slow
def test_killed_at_random_moments(pictures, no_pictures):
    flags = [*FLAGS, "--epochs", str(10 * KILLS)]
    assert train.main(small(pictures, "--out", "whole", *flags)) == 0
    command = [sys.executable, "-c", STARTER, "0", str(KILLS), "1.5", *small(pictures, "--out", "killed", *flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_runs("whole", "killed")
    assert not list(Path("killed").glob("*.tmp")) and not Path("killed/lock").exists()


AT_A_PLACE = """
import os, signal, sys, torch
from refiner_min import train
torch.set_num_threads(1)
name, place, before = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "before"
real, calls = getattr(os, name), 0
def counted(*words):
    global calls
    calls += 1
    if calls == place and before:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*words)
    if calls == place:
        os.kill(os.getpid(), signal.SIGKILL)
setattr(os, name, counted)
train.main(sys.argv[4:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, place, when", [  # the calls of the save after the second step
    ("fsync", 5, "before"),  # the new file may not be whole
    ("replace", 5, "before"),  # it is, and last.pt is still the one before
    ("replace", 5, "after"),  # which is the backup now, and there is no last.pt
    ("replace", 6, "after")])  # the new one is last.pt
def test_killed_inside_a_save(pictures, whole, name, place, when):
    flags = small(pictures, "--out", "killed", *FLAGS, "--epochs", "2")
    done = subprocess.run([sys.executable, "-c", AT_A_PLACE, name, str(place), when, *flags], capture_output=True)
    assert done.returncode == -9
    assert Path("killed/last.pt").exists() or Path("killed/last.backup.pt").exists()
    assert train.main(flags) == 0
    assert_same_runs(whole, "killed")


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory):
    """The folder of the same run, undisturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train.main(small(pictures, "--out", str(folder), *FLAGS, "--epochs", "2")) == 0
    return folder


@pytest.mark.slow
@pytest.mark.skipif(KILLS == 3, reason="test_distributed.py kills two processes twice; on request: KILLS=20")
def test_two_processes_killed_at_random_moments(pictures):
    flags = ["--batch-size", "12", "--epochs", str(40 * KILLS), "--resume", "auto", "--amp", "off"]
    assert start(*small(pictures, "--out", "whole", *flags)).wait() == 0
    process = start(*small(pictures, "--out", "killed", *flags), restarts=KILLS)
    for kill in range(KILLS):
        wait_until(process, 2 * 40 * kill + 10, "killed")
        os.kill(workers_of(process)[kill % 2], 9)
    said = process.communicate()[0]
    assert process.returncode == 0, said
    assert_same_runs("whole", "killed")
    assert checkpoint.load("killed/last.pt")["step"] == 2 * 40 * KILLS
