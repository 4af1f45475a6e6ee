"""prepare.py: copies are what Pillow makes of the pictures, val/ is sorted as its list says; killed, gone on with,
refused."""

import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy.io import savemat

import refiner_min
from refiner_min import UserError, prepare
from tests.pictures import CLASSES, make_folder

FIRST, SECOND, THIRD = CLASSES
IDS = {1: THIRD, 2: FIRST, 3: SECOND}  # not in the order of their names, as in the devkit


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))


def odd_pictures(root: Path) -> Path:
    """A set, and beside its pictures some of every kind that a set may hold, one of them turned, some small."""
    folder = make_folder(root, train=2, val=1) / "train" / FIRST
    noise(61, 40).convert("L").save(folder / "grey.JPG")
    noise(40, 61).convert("CMYK").save(folder / "cmyk.jpeg")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by a quarter
    noise(70, 40).save(folder / "turned.JPEG", exif=exif, comment=b"a camera's")
    noise(90, 31).convert("P").save(folder / "wide.png")
    noise(33, 80).save(folder / "tall.BMP")
    noise(40, 40).convert("RGBA").save(folder / "clear.webp")
    noise(9, 6).save(folder / "small.tif")
    noise(50, 12).save(folder / "low.a.ppm")
    (folder / "notes.txt").write_text("no picture")
    return root


def pillow_copy(path: Path, size: int, keep_shape: bool, quality: int) -> bytes:
    with Image.open(path) as picture:
        picture = ImageOps.exif_transpose(picture).convert("RGB")
    width, height = picture.size
    side = min(width, height)
    if not keep_shape:
        left, top = round((width - side) / 2), round((height - side) / 2)
        picture = picture.crop((left, top, left + side, top + side))
    if side > size:
        sides = (int(length * size / side) for length in picture.size)
        picture = picture.resize(tuple(sides), Image.Resampling.BICUBIC)
    picture.info.clear()
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def tree(root: Path = Path(".")) -> dict:
    """Everything below: {path: content, or None for a folder}."""
    return {path.relative_to(root).as_posix(): None if path.is_dir() else path.read_bytes()
            for path in sorted(root.rglob("*"))}


def copies(root: Path) -> dict:
    return {path: content for path, content in tree(root).items() if path != prepare.FACTS}


def shrink(*words, source="set", target="out", size=16, workers=0) -> int:
    return prepare.main(["shrink", "--size", str(size), source, target, "--workers", str(workers), *words])


# ----------------------------------------------------------------------------------------------------------------------
# shrink


@pytest.mark.parametrize("keep_shape, quality, size", [(False, 90, 16), (True, 90, 16), (False, 50, 33), (True, 95, 8)])
def test_copies_are_what_pillow_makes(keep_shape, quality, size, capsys):
    before = tree(odd_pictures(Path("set")))
    shrink(*["--keep-shape"] * keep_shape, *[f"--quality={quality}"] * (quality != 90), size=size)
    found = copies(Path("out"))
    names = {path: re.sub(r"\.(png|bmp|webp|tif|ppm)$", ".jpg", path, flags=re.IGNORECASE) for path in before
             if not path.endswith(".txt")}
    assert found.keys() == set(names.values()) and f"train/{FIRST}/grey.JPG" in found
    for path, copy in names.items():
        expected = before[path] and pillow_copy(Path("set", path), size, keep_shape, quality)
        assert found[copy] == expected, path
    assert tree(Path("set")) == before
    megabytes = sum(len(content) for content in found.values() if content) / 1e6
    out = Path("out").resolve()
    assert capsys.readouterr().out == f"17 pictures (0 were there), {megabytes:.1f} MB, 0 left out: {out}\n"


def test_the_centre_is_kept_and_nothing_enlarged():
    flag = Image.new("RGB", (48, 32), "red")
    flag.paste((0, 255, 0), (8, 0, 40, 32))
    Path("set").mkdir()
    flag.save("set/flag.png")
    noise(20, 11).save("set/small.png")
    shrink()
    shrink("--keep-shape", target="whole")
    with Image.open("out/flag.jpg") as square, Image.open("whole/flag.jpg") as whole:
        assert square.size == (16, 16) and whole.size == (24, 16)
        assert np.abs(np.asarray(square).astype(int) - [0, 255, 0]).max() < 8
        assert all(np.abs(np.array(whole.getpixel((column, 8))) - [255, 0, 0]).max() < 40 for column in (0, 23))
    with Image.open("out/small.jpg") as square, Image.open("whole/small.jpg") as whole:
        assert square.size == (11, 11) and whole.size == (20, 11)


def test_any_number_of_workers_writes_the_same():
    odd_pictures(Path("set"))
    for workers in range(3):
        shrink(workers=workers, target=f"out{workers}")
    assert tree(Path("out0")) == tree(Path("out1")) == tree(Path("out2"))
    assert json.loads(Path("out2/prepared.json").read_text()) == {
        "source": str(Path("set").resolve()), "size": 16, "keep_shape": False, "quality": 90}


def test_links_are_followed():
    make_folder(Path("elsewhere"), train=1, val=1)
    Path("set").mkdir()
    Path("set/val").symlink_to(Path("elsewhere/val").resolve())
    shrink()
    assert [path for path in copies(Path("out")) if path.endswith(".jpg")] == [f"val/{name}/0.jpg" for name in CLASSES]


def shrink_until_killed():
    make, calls = prepare.replacing, []

    def replacing(path):
        calls.append(make(path))
        if len(calls) == 5:  # four copies are there
            file = calls[4].__enter__()
            file.write(b"half a picture")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return calls[-1]

    prepare.replacing = replacing
    shrink()


def test_killed_and_gone_on_with_is_byte_for_byte_as_never_stopped(capsys):
    make_folder(Path("set"), train=3, val=1)
    shrink(target="whole")
    process = multiprocessing.get_context("fork").Process(target=shrink_until_killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    begun = {path: os.stat(Path("out", path)).st_mtime_ns for path in copies(Path("out")) if path.endswith(".jpg")}
    assert len(begun) == 4 and [path.read_bytes() for path in Path("out").rglob("*.tmp")] == [b"half a picture"]
    mine = Path("out/mine.jpg.1.tmp")
    mine.write_text("no copy of this set")
    capsys.readouterr()
    shrink()
    assert capsys.readouterr().out.startswith("12 pictures (4 were there), ")
    assert mine.read_text() == "no copy of this set"
    mine.unlink()
    assert tree(Path("out")) == tree(Path("whole"))
    assert begun == {path: os.stat(Path("out", path)).st_mtime_ns for path in begun}  # not made again
    shrink()
    assert tree(Path("out")) == tree(Path("whole"))
    assert capsys.readouterr().out.startswith("12 pictures (12 were there), ")


def begin_to_shrink() -> subprocess.Popen:
    """The command at work on 400 large pictures."""
    Path("set").mkdir()
    noise(900, 900).save("set/0.jpg")
    for index in range(1, 400):
        os.link("set/0.jpg", f"set/{index}.jpg")
    command = [sys.executable, "-m", "refiner_min.prepare", "shrink", "set", "out", "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(Path("out").glob("*.jpg")) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def test_a_scheduler_ends_the_command_cleanly():
    process = begin_to_shrink()
    with pytest.raises(UserError, match="another process is at work in .*/out: wait for it, or name another folder"):
        shrink(size=224)
    os.killpg(process.pid, signal.SIGTERM)  # a scheduler tells the workers too
    said, complaint = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in complaint
    whole, made = pillow_copy(Path("set/0.jpg"), 224, False, 90), copies(Path("out"))
    assert 0 < len(made) < 400 and set(made.values()) == {whole}
    done = int(re.fullmatch(r"stopped after (\d+) of 400 pictures; the same command goes on\n", said)[1])
    assert 0 < done <= len(made)


def test_a_worker_that_is_killed_ends_the_command():
    process = begin_to_shrink()
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2 and "error: a process that reads pictures has ended " in complaint
    assert "Traceback" not in complaint


def test_a_bad_picture_stops_it_or_is_left_out(capsys):
    make_folder(Path("set"), train=2, val=1)
    bad = Path("set/train", SECOND, "0.png")
    bad.write_bytes(bad.read_bytes()[:500])
    for workers in (0, 2):
        with pytest.raises(UserError, match=f"{SECOND}/0.png is not a picture that can be read .*; --skip-bad leaves"):
            shrink(workers=workers)
        stopped = tree(Path("out"))
        assert f"train/{FIRST}/0.jpg" in stopped and f"train/{SECOND}/0.jpg" not in stopped
    capsys.readouterr()
    for _ in range(2):
        shrink("--skip-bad")
        said = capsys.readouterr().out
        assert said.startswith("left out, 1 so far: ") and f"{SECOND}/0.png is not" in said
        assert said.splitlines()[-1].startswith("8 pictures (") and ", 1 left out: " in said
    assert said.splitlines()[-1].startswith("8 pictures (8 were there), ")
    whole = tree(Path("out"))
    assert stopped.items() <= whole.items() and f"train/{SECOND}/0.jpg" not in whole and len(copies(Path("out"))) == 16


def test_a_full_disk_is_no_bad_picture(monkeypatch):
    make_folder(Path("set"), train=1, val=1)
    shrink()
    Path("out/val", FIRST, "0.jpg").unlink()
    there = tree()

    outcomes = iter([None, OSError(28, "No space left on device")])  # of the facts, and of the copy

    def sync(file):
        if outcome := next(outcomes):
            raise outcome

    monkeypatch.setattr(refiner_min.os, "fsync", sync)
    with pytest.raises(UserError, match=r"0.jpg could not be written .*the disk is full"):
        shrink("--skip-bad")
    assert tree() == there


def occupied():
    Path("out").mkdir()
    Path("out/mine.jpg").write_text("precious")


def facts(content: str):
    occupied()
    Path("out/prepared.json").write_text(content)


@pytest.mark.parametrize("words, prepared, message", [
    (dict(source="none"), None, "/none cannot be listed .No such file or directory"),
    (dict(source="set/val/n01440764/0.png"), None, "0.png cannot be listed .Not a directory"),
    (dict(source="empty"), lambda: Path("empty/a").mkdir(parents=True), r"/empty holds no pictures \(.jpg, .jpeg, "),
    (dict(size=0), None, "--size 0 must be from 1 to 65500"),
    (dict(workers=-1), None, "--workers -1 must be at least 0 and at most "),
    ("--quality=0", None, "--quality 0 must be from 1 to 95"),
    ("--quality=96", None, "--quality 96 must be from 1 to 95"),
    (dict(target="set"), None, "/set cannot take copies of .*/set: name"),
    (dict(target="set/out"), None, "set/out cannot take copies of .*/set: name"),
    (dict(source="set/train", target="set"), None, "/set cannot take copies of .*/set/train: name"),
    (dict(target="link"), lambda: Path("link").symlink_to("set"), "/set cannot take copies of .*/set: name"),
    ({}, lambda: noise(9, 9).save(f"set/val/{FIRST}/0.bmp"), "0.bmp and .*/0.png, which would both be .*/0.jpg"),
    ({}, lambda: noise(9, 9).save(f"set/val/{FIRST}/0.jpg"), "0.jpg and .*/0.png, which would both be .*/0.jpg"),
    ({}, occupied, "/out cannot be used .*No such file.*prepared.json.*: name one that is new, empty or this"),
    ({}, lambda: facts("{"), "/out cannot be used .*: name one that is new, "),
    ({}, lambda: facts("[]"), "/out cannot be used .*: name one that is new, "),
    ({}, lambda: facts("{}"), "/out was made with source None, not .*, quality None, not 90: name another folder"),
    ({}, lambda: Path("out").write_text("a file"), "/out cannot be used .*File exists"),
    (dict(target="file/out"), lambda: Path("file").write_text("a file"), "file/out cannot be used .*Not a directory"),
    ("--keep-shape", lambda: shrink(), "/out was made with keep_shape False, not True: name another folder"),
    ("--quality=91", lambda: shrink(), "/out was made with quality 90, not 91: name another folder"),
    (dict(size=17), lambda: shrink("--keep-shape"), "made with size 16, not 17, keep_shape True, not False: name"),
    (dict(source="set/val"), lambda: shrink(), "/out was made with source .*/set, not .*/set/val: name another folder"),
], ids=str)
def test_refusals_change_nothing(words, prepared, message):
    make_folder(Path("set"), train=1, val=1)
    if prepared:
        prepared()
    before = tree()
    with pytest.raises(UserError, match=message) as refusal:
        shrink(words) if isinstance(words, str) else shrink(**words)
    assert tree() == before
    assert "\n" not in str(refusal.value)


def test_a_file_is_in_the_place_of_a_folder():
    make_folder(Path("set"), train=1, val=1)
    shrink(source="set/val")
    Path("out", FIRST, "0.jpg").unlink()
    Path("out", FIRST).rmdir()
    Path("out", FIRST).write_text("precious")
    before = tree()
    with pytest.raises(UserError, match=f"/out cannot be used .*File exists: .*/out/{FIRST}'.: name one that is new"):
        shrink(source="set/val")
    assert tree() == before


# ----------------------------------------------------------------------------------------------------------------------
# val


def flat_val(count: int = 7) -> dict[str, str]:
    """A flat set/val of small pictures. Returns the class of each."""
    Path("set/val").mkdir(parents=True)
    classes = {}
    for index in range(1, count + 1):
        name = f"ILSVRC2012_val_{index:08}.JPEG"
        noise(8, 8, seed=index).save(Path("set/val", name))
        classes[name] = CLASSES[(index * index) % 3]
    return classes


def write_list(kind: str, classes: dict[str, str], path: str = "lists/list.txt") -> str:
    Path(path).parent.mkdir(exist_ok=True)
    backwards = dict(reversed(classes.items()))
    if kind == "names":
        lines = [f"{name} {wnid}" for name, wnid in classes.items()]
    elif kind == "tabs":  # saved on Windows
        lines = [f"{Path(name).stem}\tn-th\t{wnid}\r" for name, wnid in backwards.items()]
    elif kind == "kaggle":
        lines = ["ImageId,PredictionString", *(f"{Path(name).stem},{wnid} 85 272 367 489 n09999999 1 2 3 4 "
                                               for name, wnid in backwards.items())]
    else:
        numbers = {wnid: number for number, wnid in IDS.items()}
        lines = [str(numbers[wnid]) for wnid in classes.values()]
        write_meta(Path(path).with_name("meta.mat"))
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8-sig" if kind == "tabs" else "utf-8")
    return path


def write_meta(path: Path):
    """A meta.mat as the devkit has it; the last entry is no class, but holds two."""
    names = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
             "num_train_images")
    rows = [(number, wnid, "word, words", "what it is", 0, [], 0, 1300) for number, wnid in IDS.items()]
    rows.append((1001, "n00001740", "entity", "it is", 2, [1, 2], 1, 0))
    synsets = np.empty((len(rows), 1), dtype=[(name, object) for name in names])
    for index, row in enumerate(rows):
        synsets[index, 0] = row
    savemat(path, {"synsets": synsets})


def sorted_tree(classes: dict[str, str]) -> dict:
    pictures = {f"{wnid}/{name}": Path("set/val", name).read_bytes() for name, wnid in classes.items()}
    return dict(sorted((dict.fromkeys(classes.values()) | pictures).items()))


KINDS = ["names", "tabs", "kaggle", "numbers"]


def sort_val(path: str) -> int:
    return prepare.main(["val", "set", "--list", path])


@pytest.mark.parametrize("kind", KINDS)
def test_val_is_sorted_as_its_list_says(kind, capsys):
    classes = flat_val()
    expected, path = sorted_tree(classes), write_list(kind, classes)
    assert sort_val(path) == 0
    assert tree(Path("set/val")) == expected
    assert sort_val(path) == 0
    assert tree(Path("set/val")) == expected
    assert capsys.readouterr().out == ("7 pictures moved, 0 were in place: set/val\n"
                                       "0 pictures moved, 7 were in place: set/val\n")


@pytest.mark.parametrize("problem, told", [(KeyboardInterrupt("stopped"), "stopped"),
                                           (OSError(5, "I/O error"), "set/val is not sorted yet .*I/O error")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_val_is_gone_on_with(kind, problem, told, monkeypatch, capsys):
    classes = flat_val()
    expected, path = sorted_tree(classes), write_list(kind, classes)
    rename, calls = os.rename, []

    def stop(*words):
        calls.append(words)
        if len(calls) == 4:
            raise problem
        rename(*words)

    with monkeypatch.context() as patch:
        patch.setattr(prepare.os, "rename", stop)
        with pytest.raises((KeyboardInterrupt, UserError), match=told):
            sort_val(path)
    assert len(list(Path("set/val").glob("*.JPEG"))) == 4
    assert sort_val(path) == 0
    assert tree(Path("set/val")) == expected
    assert capsys.readouterr().out == "4 pictures moved, 3 were in place: set/val\n"


def change_list(old: str, new: str):
    path = Path("lists/list.txt")
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))


def put(path: str):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("precious")


LAST, LINE = "ILSVRC2012_val_00000007", "does not name one picture and its only class in the line"


@pytest.mark.parametrize("kind, change, message", [
    ("names", lambda: change_list(f"{LAST}.JPEG", "other.JPEG"), f"lacks pictures that are in set/val: {LAST}$"),
    ("names", lambda: change_list("ILSVRC", f"other {FIRST}\nILSVRC"), "has pictures that are not in set/val: other$"),
    ("names", lambda: put("set/val/other.png"), "list.txt lacks pictures that are in set/val: other$"),
    ("names", lambda: put("set/val/lower/other.png"), "list.txt lacks pictures that are in set/val: other$"),
    ("names", lambda: put(f"set/val/{FIRST}/{LAST}.JPEG"), f"set/val holds both {LAST}.JPEG and {FIRST}/{LAST}.JPEG: "),
    ("names", lambda: put(f"set/val/{LAST}.png"), f"set/val holds both {LAST}.JPEG and {LAST}.png: remove one"),
    ("names", lambda: put(f"set/val/{FIRST}"), f"set/val has files in the place of folders: {FIRST}$"),
    ("names", lambda: change_list(FIRST, "n00000001"), "has classes that are not ImageNet's: n00000001$"),
    ("names", lambda: change_list(FIRST, "n1440764"), f"{LINE} ILSVRC.* n1440764$"),
    ("names", lambda: change_list(FIRST, ""), f"{LINE} ILSVRC"),
    ("names", lambda: change_list("ILSVRC", f"{LAST} {THIRD}\nILSVRC"), f"{LINE} {LAST}.JPEG {SECOND}$"),
    ("names", lambda: Path("lists/list.txt").write_bytes(b"\xff\xfe"), "--list lists/list.txt cannot be read"),
    ("names", lambda: Path("lists/list.txt").unlink(), "--list lists/list.txt cannot be read .*No such file"),
    ("names", lambda: Path("lists/list.txt").write_text(""), "list.txt has 0 numbers for 7 pictures"),
    ("names", lambda: Path("set/val").rename("set/valid"), "set/val cannot be listed .No such file"),
    ("kaggle", lambda: change_list(SECOND, ""), "has classes that are not ImageNet's: n09999999$"),
    ("numbers", lambda: change_list("\n", "\n1\n"), "list.txt has 8 numbers for 7 pictures"),
    ("numbers", lambda: change_list("2", "1001"), "has classes that are not ImageNet's: number 1001$"),
    ("numbers", lambda: change_list("2", "4"), "has classes that are not ImageNet's: number 4$"),
    ("numbers", lambda: Path("lists/meta.mat").unlink(), "lists/meta.mat explains .* cannot be read .*No such file"),
    ("numbers", lambda: Path("lists/meta.mat").write_text("no MATLAB"), "lists/meta.mat explains .* cannot be read"),
    ("numbers", lambda: savemat("lists/meta.mat", {"other": [1, 2]}), "lists/meta.mat explains .* cannot be read"),
], ids=str)
def test_val_refusals_change_nothing(kind, change, message):
    write_list(kind, flat_val())
    change()
    before = tree()
    with pytest.raises(UserError, match=message) as refusal:
        sort_val("lists/list.txt")
    assert tree() == before
    assert "\n" not in str(refusal.value)


def test_a_picture_in_another_folder_than_the_list_says():
    path = write_list("names", flat_val())
    sort_val(path)
    change_list(f"{LAST}.JPEG {SECOND}", f"{LAST}.JPEG {THIRD}")
    before = tree()
    with pytest.raises(UserError, match=f"has pictures in other folders than {path} says: {SECOND}/{LAST}.JPEG$"):
        sort_val(path)
    assert tree() == before


def test_numbers_without_scipy(monkeypatch):
    path = write_list("numbers", flat_val())
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="lists/meta.mat explains the numbers of --list, .*: pip install scipy$"):
        sort_val(path)
    others = write_list("names", {path.name: FIRST for path in Path("set/val").iterdir()}, "lists/others.txt")
    assert sort_val(others) == 0  # needs none


def test_the_command(capsys):
    for words in ([], ["shrink"], ["val", "set"], ["other"]):
        with pytest.raises(SystemExit, match="2"):
            prepare.main(words)
    assert "usage: python -m refiner_min.prepare" in capsys.readouterr().err
