"""Makes folders of pictures ready for training: python -m refiner_min.prepare

    shrink --size 224 SRC DST    the tree SRC again as DST, every picture in it smaller, as a JPEG
    val DIR --list FILE          ImageNet's flat DIR/val/*.JPEG sorted into DIR/val/CLASS/, by any of its lists

Neither writes over a file, and both go on where a killed run ended. val checks all of its list before it moves a
picture; shrink stops at a picture that cannot be read.
"""

import argparse
import json
import os
import re
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension
from torchvision.transforms.v2 import InterpolationMode, functional
from tqdm import tqdm

from refiner_min import UserError, data, hardware, replacing, run_command, some, write_json
from refiner_min.listing import walk
from refiner_min.pictures import SKIP_HINT, read_picture
from refiner_min.splits import reader_options, readers_told, reading
from refiner_min.stopping import StopRequest, claim

FACTS = "prepared.json"  # in a folder of copies: what must be the same to go on with it
LISTED = re.compile(r"([^ ,\t]+)[ ,\t].*?\b(n\d{8})\b")  # a picture, and the first class after it


def files_below(folder: Path, suffixes=IMG_EXTENSIONS) -> list[str]:
    """The paths from there, sorted, of files with these suffixes. UserError: as walk's."""
    start = len(os.path.join(folder, ""))
    paths = (os.path.join(place, name)[start:] for place, names, _ in walk(folder) for name in names)
    return sorted(path for path in paths if has_file_allowed_extension(path, suffixes))


def open_target(target: Path, facts: dict, folders: set[str]):
    """Make the folder of the copies, or find that it was made with the same facts. UserError: any other folder."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        there = json.loads((target / FACTS).read_text()) if any(target.iterdir()) else facts
        differing = [f"{key} {there.get(key)}, not {value}" for key, value in facts.items() if there.get(key) != value]
        if differing:
            raise UserError(f"{target} was made with {', '.join(differing)}: name another folder")
        write_json(target / FACTS, facts)
        for folder in folders:
            (target / folder).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{target} cannot be used ({error}): name one that is new, empty or this command's") from None


def smaller(picture: Image.Image, size: int, keep_shape: bool) -> Image.Image:
    """The centre square with size pixels a side; with keep_shape all of it, its shorter side that long. Never enlarged.
    Bicubic, antialiased, as evaluation resizes."""
    if not keep_shape:
        picture = functional.center_crop(picture, [min(picture.size)])
    return functional.resize(picture, [min(size, *picture.size)], InterpolationMode.BICUBIC)


class _Copies(Dataset):
    def __init__(self, source: Path, target: Path, args: argparse.Namespace):
        self.source, self.target, self.args = source, target, args

    def __getitem__(self, names):  # None, or a str that says which picture is left out, or the UserError that ends all
        copy, name = names
        try:
            picture = smaller(read_picture(self.source / name), self.args.size, self.args.keep_shape)
        except UserError as error:
            return str(error) if self.args.skip_bad else UserError(f"{error}; {SKIP_HINT}")
        try:
            with replacing(self.target / copy) as file:
                picture.save(file, "JPEG", quality=self.args.quality, comment=b"")  # else Pillow copies the comment
        except UserError as error:
            return error


def shrink(args: argparse.Namespace) -> int:
    """Make the copies that are missing, or as many as until a signal. Returns the exit status. UserError: SRC or DST
    will not do, or a picture cannot be read."""
    source, target = args.source.resolve(), args.target.resolve()
    if source.is_relative_to(target) or target.is_relative_to(source):
        raise UserError(f"{target} cannot take copies of {source}: name a folder that is not inside the other")
    pictures = {}  # copy: picture, paths from their folders
    for name in files_below(source):
        copy = name if name.lower().endswith((".jpg", ".jpeg")) else f"{os.path.splitext(name)[0]}.jpg"
        if pictures.setdefault(copy, name) != name:
            raise UserError(f"{source} holds {pictures[copy]} and {name}, which would both be {copy}: rename one")
    if not pictures:
        raise UserError(f"{source} holds no pictures ({', '.join(IMG_EXTENSIONS)})")
    facts = {"source": str(source), "size": args.size, "keep_shape": args.keep_shape, "quality": args.quality}
    open_target(target, facts, {os.path.dirname(copy) for copy in pictures})
    with claim(target):
        return copy_missing(source, target, pictures, args)


def copy_missing(source: Path, target: Path, pictures: dict[str, str], args: argparse.Namespace) -> int:
    """shrink's work: pictures are {copy: picture}."""
    found = set(files_below(target, ""))
    for name in found:
        if name.endswith(".tmp") and name.rsplit(".", 2)[0] in pictures:  # a killed process had not finished it
            (target / name).unlink(missing_ok=True)
    missing = [names for names in pictures.items() if names[0] not in found]
    there = done = len(pictures) - len(missing)
    bad = 0
    loader = DataLoader(_Copies(source, target, args), batch_size=16, sampler=missing, collate_fn=list,
                        **reader_options(args.workers))
    bar = tqdm(total=len(pictures), initial=done, unit=" pictures", disable=None)
    with StopRequest() as stop, bar, readers_told():
        for problems in reading(loader):
            for problem in filter(None, problems):
                if isinstance(problem, UserError):
                    raise problem
                bad += 1
                tqdm.write(f"left out, {bad} so far: {problem}")
            bar.update(len(problems))
            done += len(problems)
            if stop.agreed():
                print(f"stopped after {done:,} of {len(pictures):,} pictures; the same command goes on")
                return 128 + stop.signal
    megabytes = sum((target / name).stat().st_size for name in files_below(target)) / 1e6
    print(f"{len(pictures) - bad:,} pictures ({there:,} were there), {megabytes:.1f} MB, {bad:,} left out: {target}")
    return 0


def read_list(path: Path, names: list[str]) -> dict[str, str]:
    """{name: class}, names without suffix; numbers are the classes of these names in turn. UserError: no such list."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--list {path} cannot be read ({error})") from None
    if all(line.isdecimal() for line in lines):
        if len(lines) != len(names):
            raise UserError(f"--list {path} has {len(lines):,} numbers for {len(names):,} pictures")
        known = devkit_classes(path.with_name("meta.mat"))
        return {name: known.get(int(line), f"number {line}") for name, line in zip(names, lines)}
    classes = {}
    for line in lines[lines[0].startswith("ImageId,"):]:  # the header of Kaggle's
        match = LISTED.match(line)
        if not match or classes.setdefault(Path(match[1]).stem, match[2]) != match[2]:
            raise UserError(f"--list {path} does not name one picture and its only class in the line {line[:80]}")
    return classes


def devkit_classes(path: Path) -> dict[int, str]:
    """{number: class} of a meta.mat; what has children is no class. Source: the devkit's readme. UserError: no file."""
    try:
        from scipy.io import loadmat
        synsets = loadmat(str(path), squeeze_me=True)["synsets"]
        return {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets if synset["num_children"] == 0}
    except ImportError:
        raise UserError(f"{path} explains the numbers of --list, and scipy reads it: pip install scipy") from None
    except Exception as error:  # scipy's reader raises many kinds
        raise UserError(f"{path} explains the numbers of --list, and cannot be read ({error})") from None


def sort_val(val: Path, listing: Path):
    """Move val's pictures into the folders of their classes. UserError: list and folder do not agree."""
    there = {}
    for path in map(Path, files_below(val)):
        if there.setdefault(path.stem, path) != path:
            raise UserError(f"{val} holds both {there[path.stem]} and {path}: remove one")
    classes = read_list(listing, sorted(there, key=lambda name: there[name].name))
    moves = {path: goal for name, path in there.items() if path != (goal := Path(classes.get(name, ""), path.name))}
    for wrong, names in {
            f"{listing} has classes that are not ImageNet's": set(classes.values()) - set(data.imagenet_wnids()),
            f"{listing} lacks pictures that are in {val}": there.keys() - classes.keys(),
            f"{listing} has pictures that are not in {val}": classes.keys() - there.keys(),
            f"{val} has pictures in other folders than {listing} says": {str(path) for path in moves if path.parts[1:]},
            f"{val} has files in the place of folders": {goal.parts[0] for goal in moves.values()
                                                         if (val / goal.parts[0]).is_file()}}.items():
        if names:
            raise UserError(f"{wrong}: {some(sorted(names))}")
    try:
        for path, goal in moves.items():
            (val / goal).parent.mkdir(exist_ok=True)
            os.rename(val / path, val / goal)
    except OSError as error:
        raise UserError(f"{val} is not sorted yet ({error}); the same command goes on when that is mended") from None
    print(f"{len(moves):,} pictures moved, {len(there) - len(moves):,} were in place: {val}")


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m refiner_min.prepare", description=__doc__.split(":")[0] + ".")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("shrink", help="a smaller copy of a set: the centre square of each picture")
    command.add_argument("source", metavar="SRC", type=Path, help="a folder, such as one that holds train/ and val/")
    command.add_argument("target", metavar="DST", type=Path, help="a new folder, or one of this command to go on with")
    command.add_argument("--size", type=int, default=224, help="pixels a side (default: 224); none is ever enlarged")
    command.add_argument("--keep-shape", action="store_true", help="all of a picture, SIZE its shorter side")
    command.add_argument("--quality", type=int, default=90, help="of the JPEGs, 1 to 95 (default: 90)")
    command.add_argument("--workers", type=int, default=hardware.available_cores(), help="default: one for each core")
    command.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read")
    command = commands.add_parser("val", help="ImageNet's flat val/ sorted into the folders of its classes")
    command.add_argument("folder", metavar="DIR", type=Path, help="the folder that holds val/")
    command.add_argument("--list", metavar="FILE", type=Path, required=True, help="lines NAME CLASS, Kaggle's LOC_val_s"
                         "olution.csv, or ILSVRC2012_validation_ground_truth.txt with the devkit's meta.mat beside it")
    args = parser.parse_args(arguments)
    if args.command == "val":
        return args
    hardware.check_workers(args.workers)
    for name, allowed in (("size", range(1, 65501)), ("quality", range(1, 96))):
        if getattr(args, name) not in allowed:
            raise UserError(f"--{name} {getattr(args, name)} must be from {allowed.start} to {allowed.stop - 1}")
    return args


def main(arguments=None) -> int:
    args = parse(arguments)
    if args.command == "shrink":
        return shrink(args)
    sort_val(args.folder / "val", args.list)
    return 0


if __name__ == "__main__":
    run_command(main)
