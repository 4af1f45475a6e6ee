"""__init__.py: what every part of the package shares."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import refiner_min
from refiner_min import UserError, locked, out_of_memory, replacing, run_command, seed_for, some


def test_seeds_are_the_same_on_every_machine_and_differ_by_stream_and_numbers():
    assert seed_for("order", 0, 0) == 10340080715587517918  # this number may never change: runs could not go on
    seeds = {seed_for(stream, seed, epoch) for stream in ("order", "scenes", "step", "picture")
             for seed in range(20) for epoch in range(20)}
    ends = [seed_for("order", *numbers) for numbers in ((2**32 - 1, 0), (0, 2**32 - 1), (2**32 - 1,) * 2)]
    assert len({*seeds, *ends}) == 1603
    assert len(seeds) == 1600 and max(seeds) < 2**64 and min(seeds) >= 0


def test_a_sentence_is_one_line():
    assert str(UserError("a\nb\x1ec\udcffd é")) == "a\\nb\\x1ec\\udcffd é"


def test_a_few_names_and_how_many_more():
    assert some(["a", "b", "c"]) == "a, b, c" and some(list("abcde")) == "a, b, c and 2 more"


@pytest.mark.parametrize("raised, status, said", [
    (UserError("what"), 2, "error: what\n"), (KeyboardInterrupt(), 130, "interrupted\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "error: the memory is too small for"),
    (MemoryError(), 2, "error: the memory is too small for")])
def test_run_command(raised, status, said, capsys):
    def main():
        raise raised

    with pytest.raises(SystemExit) as error:
        run_command(main)
    assert error.value.code == status and capsys.readouterr().err.startswith(said)


def test_other_errors_are_shown_as_they_are(capsys):
    def main():
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        run_command(main)


def test_a_cpu_says_in_other_words_that_its_memory_is_too_small():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(error.value) and not out_of_memory(RuntimeError("shapes do not match"))


def test_two_that_write_one_file_do_not_meet(tmp_path):
    """Also from two machines whose processes have the same number."""
    with replacing(tmp_path / "file") as one, replacing(tmp_path / "file") as two:
        assert one.name != two.name
        one.write(b"one")
        two.write(b"two")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"one"]  # which was renamed last


HOLD = ("import sys, time\nfrom refiner_min import locked\n"
        "with locked(sys.argv[1]): print('held', flush=True); time.sleep(60)")


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_is_for_one_process_and_ends_with_it(tmp_path, holder):
    with pytest.raises(BlockingIOError):
        with locked(tmp_path / "lock", wait=False):
            raise AssertionError("held twice")
    held = threading.Event()

    def wait():
        with locked(tmp_path / "lock"):
            held.set()

    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not held.wait(0.3)
    holder.kill()
    waiting.join(timeout=10)
    assert held.is_set() and not list(tmp_path.iterdir())  # no lock is left, though its first holder was killed


def test_those_that_wait_for_a_lock_hold_it_one_after_the_other(tmp_path):
    """Each removes the file when it is done, while others wait for it."""
    inside, most = [], []

    def work():
        for _ in range(30):
            with locked(tmp_path / "lock"):
                inside.append(None)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert max(most) == 1 and len(most) == 120 and not list(tmp_path.iterdir())


def test_a_disk_without_locks(tmp_path, monkeypatch):
    def refuse(*words):
        raise OSError("no locks")

    monkeypatch.setattr(refiner_min.fcntl, "flock", refuse)
    with locked(tmp_path / "lock"), locked(tmp_path / "lock", wait=False):
        pass
    with locked(tmp_path / "no folder" / "lock"):
        pass
    monkeypatch.setattr(refiner_min, "fcntl", None)
    with locked(tmp_path / "lock"):
        pass


@pytest.mark.parametrize("command", ["train", "annotate", "explain", "prepare", "study", "neighbour"])
def test_ctrl_c_while_torch_is_imported_is_no_traceback(command):
    """The torch here is one that is never done with it."""
    Path("torch.py").write_text("import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n")
    path = os.pathsep.join([str(Path.cwd()), str(Path(refiner_min.__file__).parents[1])])
    process = subprocess.Popen([sys.executable, "-m", f"refiner_min.{command}"], stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"PYTHONPATH": path},  # a shell's background jobs ignore Ctrl-C
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    while not Path("begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "interrupted\n"
    assert process.returncode in (130, -signal.SIGINT)  # a shell calls both 130


def test_what_only_imports_the_package_keeps_its_tracebacks():
    code = "import sys, refiner_min; assert sys.excepthook is sys.__excepthook__"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
