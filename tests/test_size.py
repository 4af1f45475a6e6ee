"""At size, on request: SIZE=100000 pytest -s tests/test_size.py prints what a set of so many pictures takes, and
PHOTOS=DIR (with train/ and val/) how fast its pictures are read, with nothing else running."""

import io
import os
import statistics
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from refiner_min import data
from refiner_min.augment import StreamAugmentation
from tests.test_listing import settle

SIZE = int(os.environ.get("SIZE", 0))
PHOTOS = os.environ.get("PHOTOS")


def private_megabytes(process: int) -> float:
    """What a process does not share with others."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1000


@pytest.mark.slow
@pytest.mark.skipif(not SIZE, reason="minutes; on request: SIZE=100000")
def test_a_set_in_the_shape_of_imagenet(tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (32, 24), (90, 120, 60)).save(picture, "JPEG")
    for label, name in enumerate(data.imagenet_wnids()):
        for split, count in (("train", SIZE // 1000), ("val", 1)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{name}_{label * count + number}.JPEG").write_bytes(picture.getvalue())
    settle(tmp_path)

    def start():
        began = time.perf_counter()
        subset = data.load_subset("imagenet", str(tmp_path), 16, workers=2)
        return subset, time.perf_counter() - began

    (_, first), (subset, second) = start(), start()
    order, used, began = torch.randperm(len(subset.train)), [], time.perf_counter()
    for number, _ in enumerate(subset.train.epoch(order, 256)):
        if number % max(len(order) // 256 // 5, 1) == 1:
            used.append([round(private_megabytes(worker.pid), 1) for worker in subset.train.loader._iterator._workers])
    seconds = time.perf_counter() - began
    print(f"\n{len(order):,} pictures: first listing {first:.2f} s, second start {second:.2f} s; "
          f"{len(order) / seconds:,.0f} pictures/s by two workers; private memory of each over the epoch, MB: {used}")
    assert second < 5
    assert all(after < before + 20 for before, after in zip(used[0], used[-1]))


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS, reason="minutes; on request: PHOTOS=DIR")
@pytest.mark.parametrize("enlarged", [False, True], ids=["as they are", "1500 x 1125"])
def test_the_stream_is_faster_than_torchvisions(tmp_path, enlarged):
    """The same pictures, crops and flips by two workers, in turns; the median of five rounds."""
    chosen = sorted(Path(PHOTOS).glob("val/*/*"))[::1 if not enlarged else 8]
    for path in chosen:
        for split in ("train", "val"):
            copy = tmp_path / split / path.parent.name / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            if split == "train" and enlarged:
                Image.open(path).convert("RGB").resize((1500, 1125), Image.Resampling.BICUBIC).save(copy, quality=90)
            else:
                copy.symlink_to(path.resolve())
    plain = v2.Compose([v2.RandomResizedCrop(224, interpolation=v2.InterpolationMode.BICUBIC),
                        v2.RandomHorizontalFlip(), v2.PILToTensor()])
    loader = DataLoader(ImageFolder(tmp_path / "train", plain), 64, shuffle=True, num_workers=2,
                        persistent_workers=True)

    def stream(draft):
        ours = StreamAugmentation(224, magnitude=0, draft=draft)
        return data.load_subset("folder", str(tmp_path), 224, storage="stream", transform=ours, workers=2).train

    def epoch_of(split):
        return lambda: split.epoch(torch.randperm(len(split)), 64)

    runs = {"ImageFolder": lambda: loader, "stream": epoch_of(stream(True)),
            "stream --no-draft": epoch_of(stream(False))}
    speeds = {name: [] for name in runs}
    for number in range(6):
        for name, batches in runs.items():
            began = time.perf_counter()
            for _ in batches():
                pass
            if number:  # the first round starts the workers
                speeds[name].append(len(chosen) / (time.perf_counter() - began))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    ratios = {name: statistics.median(there / here for there, here in zip(speeds[name], speeds["ImageFolder"]))
              for name in runs}
    print("\n" + ", ".join(f"{name} {medians[name]:.0f} pictures/s ({ratios[name]:.2f}x)" for name in runs))
    assert ratios["stream"] > (1.5 if enlarged else 1.1)
