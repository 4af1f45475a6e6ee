"""At size, on request: SIZE=100000 pytest -s tests/test_size.py prints what a set of so many pictures takes."""

import io
import os
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from refiner_min import data
from tests.test_listing import settle

SIZE = int(os.environ.get("SIZE", 0))


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
