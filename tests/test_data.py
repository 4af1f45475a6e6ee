"""data.py: crops against slices, every set opened or refused, every kind of picture read, streams that repeat."""

import functools
import hashlib
import http.server
import math
import os
import tarfile
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from refiner_min import UserError, data, relabel
from refiner_min.relabel import LabelMap
from tests.pictures import CLASSES, make_folder, names_of, pack_labels, random_labels

# ----------------------------------------------------------------------------------------------------------------------
# Crops and augmentation


def ramp(size: int = 8) -> torch.Tensor:
    """(1, 1, size, size) uint8, another value at every pixel."""
    return torch.arange(size * size, dtype=torch.uint8).reshape(1, 1, size, size)


def as_pixels(images) -> torch.Tensor:
    return (images + 1) * 127.5


def test_a_crop_on_pixel_borders_is_a_slice():
    boxes = torch.tensor([[2 / 8, 1 / 8, 6 / 8, 5 / 8]])  # x1, y1, x2, y2
    cut = ramp()[:, :, 1:5, 2:6].float()
    torch.testing.assert_close(as_pixels(data.crop(ramp(), boxes, 4)), cut, atol=1e-3, rtol=0)
    flipped = as_pixels(data.crop(ramp(), boxes, 4, flips=torch.tensor([True])))
    torch.testing.assert_close(flipped, cut.flip(3), atol=1e-3, rtol=0)


def test_a_quarter_turn_turns_the_box():
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    quarter = torch.tensor([math.pi / 2])
    turned = as_pixels(data.crop(ramp(), whole, 8, turns=quarter, aspects=torch.ones(1)))
    torch.testing.assert_close(turned, ramp().float().rot90(1, (2, 3)), atol=1e-2, rtol=0)


def test_a_turn_keeps_the_proportions_of_a_squashed_picture():
    """A picture twice as wide as high, its middle square turned by a quarter: the square's corners move on by one."""
    square = torch.tensor([[0.25, 0.0, 0.75, 1.0]])
    upright = data.crop(ramp(), square, 8)
    turned = data.crop(ramp(), square, 8, turns=torch.tensor([math.pi / 2]), aspects=torch.tensor([2.0]))
    torch.testing.assert_close(turned, upright.rot90(1, (2, 3)), atol=1e-4, rtol=0)


def test_outside_of_the_picture_is_black():
    white = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    images = data.crop(white, torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), 8)  # the picture is the upper right quarter
    torch.testing.assert_close(images[0, 0, 1:3, 5:7], torch.ones(2, 2))
    assert (images[0, 0, 5:] == -1).all() and (images[0, 0, :, :3] == -1).all()


def test_every_picture_has_its_own_box():
    pictures = ramp().expand(2, 1, 8, 8)
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    images = as_pixels(data.crop(pictures, boxes, 4))
    torch.testing.assert_close(images[0], ramp()[0, :, :4, :4].float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(images[1], ramp()[0, :, 4:, 4:].float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("aspect, box", [(2.0, (0.25, 0.0, 0.75, 1.0)), (0.5, (0.0, 0.25, 1.0, 0.75))])
def test_center_crop_is_the_middle_square_of_a_squashed_picture(aspect, box):
    expected = data.crop(ramp(), torch.tensor([box]), 8)
    torch.testing.assert_close(data.center_crop(ramp(), torch.tensor([aspect]), 8), expected)
    x1, y1, x2, y2 = (0.5 + (edge - 0.5) * 0.8 for edge in box)
    expected = data.crop(ramp(), torch.tensor([[x1, y1, x2, y2]]), 8)
    torch.testing.assert_close(data.center_crop(ramp(), torch.tensor([aspect]), 8, 0.8), expected)


def test_random_boxes_keep_their_ranges():
    torch.manual_seed(0)
    aspects = torch.full((4000,), 1.5)
    boxes = data.random_boxes(aspects, (0.2, 0.5), (0.75, 4 / 3))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height, width * 1.5 / height  # in the picture's own proportions
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-6
    assert 0.2 <= area.min() < 0.21 and 0.49 < area.max() <= 0.5 + 1e-6
    assert 0.75 <= ratio.min() + 1e-6 and ratio.max() <= 4 / 3 + 1e-6
    assert abs(ratio.log().mean()) < 0.02 and abs(boxes[:, 0].mean() - (1 - width).mean() / 2) < 0.01


def test_boxes_above_one_surround_the_picture():
    torch.manual_seed(0)
    boxes = data.random_boxes(torch.ones(100), (1.3, 1.5), (1.0, 1.0))
    assert (boxes[:, :2] <= 0).all() and (boxes[:, 2:] >= 1).all()


def test_colour_changes_each_picture_in_its_own_way():
    torch.manual_seed(0)
    images = torch.rand(8, 3, 4, 4) * 2 - 1
    assert torch.allclose(data.jitter_colour(images, 0.0), images, atol=1e-6)
    changed = data.jitter_colour(images.clone(), 0.4)
    assert changed.abs().max() <= 1
    assert len((changed - images).abs().mean(dim=(1, 2, 3)).unique()) == 8
    grey = torch.rand(1, 1, 4, 4).expand(1, 3, 4, 4)
    changed = data.jitter_colour(grey, 0.4)
    assert torch.allclose(changed[:, 0], changed[:, 1], atol=1e-6)


def test_erasing():
    torch.manual_seed(0)
    images = torch.zeros(2000, 3, 16, 16)
    assert torch.equal(data.erase(images, 0.0), images)
    noise = data.erase(images, 0.25) != 0
    erased = noise.any(dim=(1, 2, 3))
    assert abs(erased.float().mean() - 0.25) < 0.03
    share = noise[erased].any(dim=1).float().mean(dim=(1, 2))
    assert share.max() <= 0.45 and share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
    for mask in noise[erased][:20, 0]:
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert mask.sum() == rows * columns  # a full box


def test_augmentation_repeats_with_the_seed_and_differs_within_the_batch():
    pictures = ramp(16).expand(4, 3, 16, 16).clone()
    batch = data.Batch(pictures, torch.ones(4), torch.arange(4))
    augment = data.Augmentation(8, (0.3, 1.0), colour=0.4, erasing=0.5, turn=10)

    def draw(seed):
        torch.manual_seed(seed)
        return augment(batch).pictures

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1)[0], draw(1)[1])
    still = data.Augmentation(16, (1.0, 1.0), (1.0, 1.0), flip=0.0)
    torch.testing.assert_close(as_pixels(still(batch).pictures), pictures.float(), atol=1e-3, rtol=0)
    flipped = data.Augmentation(16, (1.0, 1.0), (1.0, 1.0), flip=1.0)(batch).pictures
    torch.testing.assert_close(as_pixels(flipped), pictures.float().flip(3), atol=1e-3, rtol=0)
    streamed = data.Augmentation(16, area=None)(batch).pictures
    torch.testing.assert_close(as_pixels(streamed), pictures.float())


# ----------------------------------------------------------------------------------------------------------------------
# Label maps, changed as their pictures are

LEVELS = torch.tensor([60, 120, 180, 240])  # of the four classes; black is outside


def quarters(size: int) -> torch.Tensor:
    """(size, size), another class in each quarter."""
    return torch.tensor([[0, 1], [2, 3]]).repeat_interleave(size // 2, 0).repeat_interleave(size // 2, 1)


def quarter_map(batch: int) -> LabelMap:
    """The map of pictures of quarters(...): (B, 1, 16, 16), sure of itself."""
    ids = quarters(16).expand(batch, 1, 16, 16).clone()
    return LabelMap(torch.full(ids.shape, 30.0), ids)


def agreement(images, maps: LabelMap, boxes, grid: int = 8) -> tuple[float, float]:
    """Of the tokens in whose neighbourhood the image (B, C, S, S) shows one class: the share whose label says the same,
    and how many they are among all."""
    tokens = relabel.pool_label_map(*maps, boxes, 4, grid)[1].argmax(dim=2)  # (B, T)
    levels = as_pixels(images)[:, :1]
    side = images.shape[3] // grid
    high, low = (F.max_pool2d(sign * levels, 2 * side, side, side // 2) for sign in (1, -1))  # half a token around
    shown = (high[:, 0].flatten(1)[:, :, None] - LEVELS).abs()  # (B, T, 4)
    uniform = ((high + low)[:, 0].flatten(1) < 2) & (shown.min(dim=2).values < 2)
    return (tokens == shown.argmin(dim=2))[uniform].float().mean().item(), uniform.float().mean().item()


@pytest.mark.parametrize("turn", [0, 40])
@pytest.mark.parametrize("aspect", [1.0, 2.0, 0.5])
def test_the_map_is_cropped_flipped_and_turned_as_the_picture(turn, aspect):
    torch.manual_seed(0)
    pictures = LEVELS[quarters(64)].to(torch.uint8).expand(64, 1, 64, 64)
    batch = data.Batch(pictures, torch.full((64,), aspect), torch.zeros(64), quarter_map(64))
    augment = data.Augmentation(32, (0.15, 1.2), flip=0.5, turn=turn)
    right, compared = agreement(*(lambda b: (b.pictures, b.label_map, b.boxes))(augment(batch)))
    assert right == 1 and compared > 0.3


OPERATIONS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")


@pytest.mark.parametrize("operation", ["none", *OPERATIONS])
@pytest.mark.parametrize("shape", [(120, 60), (60, 120)])
def test_a_streams_map_is_changed_as_its_picture(operation, shape, monkeypatch):
    """One operation of RandAugment at a time, of pictures that are not square; before it a flip, after it a crop."""
    torch.manual_seed(0)
    levels = LEVELS[quarters(120)].to(torch.uint8).numpy()
    picture = Image.fromarray(levels).resize(shape, Image.Resampling.NEAREST).convert("RGB")
    augment = data.StreamAugmentation(64, (0.3, 1.0), magnitude=0 if operation == "none" else 20)
    if operation != "none":
        space = augment.augment._AUGMENTATION_SPACE
        monkeypatch.setattr(augment.augment, "_AUGMENTATION_SPACE", {operation: space[operation]})
    drawn = [augment(picture, LabelMap(*(plane[0] for plane in quarter_map(1)))) for _ in range(60)]
    images = torch.stack([image for image, _, _ in drawn])
    maps = LabelMap(*map(torch.stack, zip(*(label_map for _, label_map, _ in drawn))))
    boxes = torch.stack([box for _, _, box in drawn])
    assert images.shape == (60, 3, 64, 64) and maps.ids.shape == (60, 1, 16, 16)
    sides = (boxes[:, 2:] - boxes[:, :2]) * torch.tensor(shape)
    assert boxes.min() >= 0 and boxes.max() <= 1  # one crop a picture, of the size that was asked for
    assert (sides.prod(dim=1) / 7200).min() > 0.28
    assert (sides[:, 0] / sides[:, 1]).log().abs().max() < math.log(4 / 3) + 0.1
    right, compared = agreement(data.normalise(images), maps, boxes, grid=16)
    assert right > 0.995 and compared > 0.2  # a cell's width beside a slanting border may go either way


def test_a_change_of_colour_leaves_the_map_exactly_as_it_was(monkeypatch):
    """Cell by cell, in proportions that do not come out even: 14 cells over 149 subcells."""
    torch.manual_seed(0)
    ids = torch.arange(196).reshape(1, 14, 14)
    augment = data.StreamAugmentation(32, flip=0.5, magnitude=9)
    space = augment.augment._AUGMENTATION_SPACE
    monkeypatch.setattr(augment.augment, "_AUGMENTATION_SPACE", {"Brightness": space["Brightness"]})
    found = [augment(Image.new("RGB", (400, 300)), LabelMap(ids / 2, ids))[1] for _ in range(20)]
    flipped = [not torch.equal(label_map.ids, ids) for label_map in found]
    assert 0 < sum(flipped) < 20
    for label_map, mirrored in zip(found, flipped):
        assert torch.equal(label_map.ids, ids.flip(2) if mirrored else ids)
        assert torch.equal(label_map.logits, label_map.ids / 2)


def test_label_maps_come_with_their_pictures(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "set", size=(60, 30))
    names = names_of(root)
    logits, ids = random_labels(18)
    shuffled = np.random.default_rng(1).permutation(18)  # a store's rows are in an order of its own
    store = pack_labels(tmp_path / "labels", [names[row] for row in shuffled], logits[shuffled], ids[shuffled])
    for limit in (data.MEMORY_LIMIT, 1000):
        monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
        for workers in (0, 2):
            still = data.StreamAugmentation(16, (1.0, 1.0), flip=0.0, magnitude=0)
            subset = data.load_subset("folder", str(root), 16, labels=str(store), transform=still, workers=workers)
            assert isinstance(subset.train, data.StreamSplit if limit == 1000 else data.MemorySplit)
            assert (subset.relabel, subset.annotator) == (str(store), "hand at 64 px")
            indices = torch.tensor([4, 17, 0, 9, 2])
            found = list(subset.train.epoch(indices, 3))
            for batch, here in zip(found, indices.split(3)):
                assert batch.labels.tolist() == [int(index) // 6 for index in here]
                assert torch.equal(batch.label_map.logits, torch.from_numpy(logits[here]).float())
                assert torch.equal(batch.label_map.ids, torch.from_numpy(ids[here]))
                assert batch.boxes is None if limit != 1000 else batch.boxes.shape == (len(here), 4)
            assert next(subset.val.epoch(torch.arange(2), 2)).label_map is None


def test_a_stream_with_maps_depends_on_seed_and_epoch_not_on_workers(streamed):
    store = pack_labels(streamed.parent / "labels", names_of(streamed), *random_labels(18))

    def first(workers, seed=0, epoch=0):
        split = data.load_subset("folder", str(streamed), 16, labels=str(store), workers=workers, seed=seed).train
        batch = next(split.epoch(torch.arange(4), 4, epoch))
        return [batch.pictures, *batch.label_map, batch.boxes]

    for one, two in zip(first(0), first(2)):
        assert torch.equal(one, two)
    assert not torch.equal(first(0)[3], first(0, seed=1)[3]) and not torch.equal(first(0)[3], first(0, epoch=1)[3])


def test_a_picture_without_a_map_stops_before_anything_is_read(tmp_path, streamed):
    store = pack_labels(tmp_path / "labels", names_of(streamed)[:-2], *random_labels(16))
    with pytest.raises(UserError, match="has no map for 2 of the 18 training pictures"):
        data.load_subset("folder", str(streamed), 16, labels=str(store))
    with pytest.raises(UserError, match="--relabel there does not go with --subset digits"):
        data.load_subset("digits", None, 16, labels="there")


def test_what_the_annotator_left_out_is_left_out_of_a_stream(tmp_path, streamed):
    names = names_of(streamed)
    store = pack_labels(tmp_path / "labels", names, *random_labels(18), skipped=[names[3]])
    with pytest.raises(UserError, match=f"has no map for 1 of the 18 training pictures, {names[3]}"):
        data.load_subset("folder", str(streamed), 16, labels=str(store))
    split = data.load_subset("folder", str(streamed), 16, labels=str(store), skip_bad=True).train
    assert len(split) == 17
    batch = next(split.epoch(torch.tensor([2, 3]), 2))
    assert batch.labels.tolist() == [0, 0] and len(batch.label_map.ids) == 2


def test_a_bad_map_of_a_stream_is_named(streamed):
    for name in names_of(streamed):
        path = streamed.parent / "maps" / f"{name}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.zeros(2, 2, 4, 4), path)
    torch.save(torch.full((2, 2, 4, 4), 7.0), path)
    for workers in (0, 1):
        for skip_bad in (False, True):  # a bad map is not a bad picture
            split = data.load_subset("folder", str(streamed), 16, labels=str(path.parents[1]), workers=workers,
                                     skip_bad=skip_bad).train
            with pytest.raises(UserError, match=r"5.pt holds the class id 7, but the set has 3 classes$"):
                list(split.epoch(torch.arange(18), 4))


# ----------------------------------------------------------------------------------------------------------------------
# Scenes of digits


def scenes(**options) -> data.Subset:
    return data.load_subset("digit-scenes", None, 32, **options)


def test_a_scene_depends_on_seed_epoch_and_index_only():
    def draw(indices, batch_size=3, epoch=0, seed=0, split="train"):
        parts = list(getattr(scenes(seed=seed), split).epoch(torch.tensor(indices), batch_size, epoch))
        return torch.cat([part.pictures for part in parts]), torch.cat([part.token_labels for part in parts])

    pictures, labels = draw([5, 9_999, 0, 7])
    assert pictures.shape == (4, 1, 32, 32) and pictures.dtype == torch.uint8 and labels.shape == (4, 64, 10)
    again, labels_again = draw([0, 9_999, 5], batch_size=1)
    assert torch.equal(again, pictures[[2, 1, 0]]) and torch.equal(labels_again, labels[[2, 1, 0]])
    assert not torch.equal(draw([0], epoch=1)[0], draw([0])[0]) and not torch.equal(draw([0], seed=1)[0], draw([0])[0])
    assert torch.equal(draw([0, 1], split="val")[0], draw([0, 1], split="val", seed=1)[0])  # one validation set for all
    chances = [draw([0], split="val")[1], draw([0])[1]]  # and not the layouts of training's first scenes
    assert not torch.equal(chances[0].sum(dim=2), chances[1].sum(dim=2))


def test_scenes_of_training_and_validation_have_no_digit_in_common():
    subset = scenes()
    train, val = ({tuple(image.flatten().tolist()) for image in split.images} for split in (subset.train, subset.val))
    assert len(train) == 1442 and len(val) == 355 and not train & val
    assert (len(subset.train), len(subset.val), subset.channels, subset.classes) == (10_000, 1_000, 1, data.DIGITS)


def test_what_a_scene_shows_is_what_its_labels_say():
    """Digits that do not overlap, the first the largest, each drawn in its box; and tokens labelled one by one."""
    split = scenes().train
    chance = torch.rand(50, 4, 2 + 2 * split.TRIES, generator=torch.Generator().manual_seed(0))
    which = (chance[:, :, 0] * 1442).long()
    batch, seen = split.draw(chance), []
    place = split.place

    def keep(sides, tries):
        seen.append((sides, place(sides, tries)))
        return seen[-1][1]

    split.place = keep
    assert torch.equal(split.draw(chance).pictures, batch.pictures)
    sides, boxes = seen[0]
    assert (sides[:, 1:] < 0.81 * sides[:, :1]).all() and sides.min() > 0.19 and sides.max() < 0.5
    assert torch.equal(batch.labels, split.labels[which[:, 0]])
    shown = (boxes[..., 2] <= 1.001) & (boxes[..., 3] <= 1.001)
    assert shown[:, 0].all() and shown[:, 1].float().mean() > 0.9 and shown.float().mean() > 0.6
    for scene in range(50):
        expected, drawn = torch.zeros(64, 10), torch.zeros(32, 32)
        for digit in range(4):
            x1, y1, x2, y2 = boxes[scene, digit].tolist()
            for token in range(64):
                x, y = (token % 8 + 0.5) / 8, (token // 8 + 0.5) / 8
                if x1 <= x < x2 and y1 <= y < y2:
                    expected[token, split.labels[which[scene, digit]]] += 1
            if shown[scene, digit]:
                inside = (slice(int(y1 * 32), math.ceil(y2 * 32)), slice(int(x1 * 32), math.ceil(x2 * 32)))
                drawn[inside] = 1
        assert expected.sum(dim=1).max() == 1  # no token under two digits
        assert torch.equal(batch.token_labels[scene], expected)
        outside = batch.pictures[scene, 0].float() * (1 - drawn)
        assert outside.sum() < 0.05 * batch.pictures[scene].float().sum()


def test_a_digit_fills_its_box():
    split = scenes().train
    boxes, sides = torch.tensor([[[0.25, 0.5, 0.75, 1.0]]]), torch.tensor([[0.5]])
    image = split.images[3:4]
    painted = split.paint(image[None], boxes, sides)[0, 0].float()
    expected = F.interpolate(image, (16, 16), mode="bilinear")[0, 0]
    assert (painted[18:30, 10:22] - expected[2:14, 2:14]).abs().max() <= 1  # the border is mixed with the black around
    assert painted[:14].sum() == 0 and painted[:, :6].sum() == 0


# ----------------------------------------------------------------------------------------------------------------------
# Opening the sets


def test_digits():
    digits = data.load_subset("digits", None, 32)
    assert (len(digits.train), len(digits.val)) == (1442, 355) and digits.channels == 1
    assert digits.train.pictures.shape == (1442, 1, 32, 32) and digits.train.pictures.dtype == torch.uint8
    for split, share in ((digits.train, 0.8), (digits.val, 0.2)):  # stratified: no class is dropped or thinned
        counts = split.labels.bincount()
        assert len(counts) == 10 and (counts - share * 179.7).abs().max() < 4
    again = data.load_subset("digits", None, 32)
    assert torch.equal(again.val.pictures, digits.val.pictures)
    with pytest.raises(UserError, match="--data here does not go with --subset digits"):
        data.load_subset("digits", "here", 32)


def test_folder_is_decoded_and_cached(tmp_path, monkeypatch):
    root = make_folder(tmp_path / "set", size=(60, 30))
    subset = data.load_subset("folder", str(root), 16)
    assert subset.classes == list(CLASSES) and subset.class_names == ["tench", "English springer", "cassette player"]
    assert subset.train.pictures.shape == (18, 3, 20, 20) and len(subset.val) == 9
    assert subset.train.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert (subset.train.aspects == 2).all()

    monkeypatch.setattr(data, "read_picture", lambda path: pytest.fail("the cache was not used"))
    again = data.load_subset("folder", str(root), 16)
    assert torch.equal(again.train.pictures, subset.train.pictures) and torch.equal(again.val.labels, subset.val.labels)
    monkeypatch.undo()

    cache = root / "refiner_min-20px.pt"
    cache.write_bytes(cache.read_bytes()[:1000])  # a damaged cache is made again
    assert torch.equal(data.load_subset("folder", str(root), 16).train.pictures, subset.train.pictures)
    Image.new("RGB", (30, 30)).save(root / "train" / CLASSES[0] / "new.png")  # so is one of other pictures
    assert len(data.load_subset("folder", str(root), 16).train) == 19


def test_what_cannot_be_cached_is_still_read(tmp_path, monkeypatch, capsys):
    root = make_folder(tmp_path / "set")

    def refuse(*paths):
        raise OSError("read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    assert len(data.load_subset("folder", str(root), 16).train) == 18
    assert "not cached" in capsys.readouterr().out
    assert sorted(file.name for file in root.iterdir()) == ["train", "val"]


@pytest.mark.parametrize("spoil, message", [
    (lambda root: (root / "val").rename(root / "test"), "has no folder val/"),
    (lambda root: (root / "val" / CLASSES[0]).rename(root / "val" / "other"), "only one of them has n01440764, other"),
    (lambda root: [file.unlink() for file in (root / "train" / CLASSES[1]).iterdir()], "no pictures in .*train for n0"),
    (lambda root: (root / "train" / "spare").mkdir(), "only one of them has spare"),
])
def test_folders_that_do_not_fit(tmp_path, spoil, message):
    root = make_folder(tmp_path / "set")
    spoil(root)
    with pytest.raises(UserError, match=message):
        data.load_subset("folder", str(root), 16)


def test_folders_with_too_little(tmp_path):
    with pytest.raises(UserError, match="has one class, n01440764"):
        data.load_subset("folder", str(make_folder(tmp_path / "class", classes=CLASSES[:1])), 16)
    with pytest.raises(UserError, match="has one class"):  # one picture
        data.load_subset("folder", str(make_folder(tmp_path / "one", train=1, val=1, classes=CLASSES[:1])), 16)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="has no folders in it"):
        data.load_subset("folder", str(tmp_path / "empty"), 16)
    with pytest.raises(UserError, match="--subset folder needs --data DIR"):
        data.load_subset("folder", None, 16)
    with pytest.raises(UserError, match="--subset imagenet needs --data DIR"):
        data.load_subset("imagenet", None, 16)


# ----------------------------------------------------------------------------------------------------------------------
# Reading pictures


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "RGB"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (8, 4), (255, 255, 255)).convert(mode).save(path)
    picture = data.read_picture(path)
    assert (picture.mode, picture.size) == ("RGB", (8, 4))
    assert np.asarray(picture).min() > 250
    assert data.read_picture(path, "L").mode == "L"


def test_a_photo_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (8, 4)).save(tmp_path / "photo.jpg", exif=exif)
    assert data.read_picture(tmp_path / "photo.jpg").size == (4, 8)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_picture_stops_or_is_skipped(tmp_path, capsys):
    root = make_folder(tmp_path / "set")
    truncate(root / "train" / CLASSES[1] / "3.png")
    with pytest.raises(UserError, match=r"train.n02102040.3.png is not a picture that can be read .*--skip-bad"):
        data.load_subset("folder", str(root), 16)
    subset = data.load_subset("folder", str(root), 16, skip_bad=True)
    assert subset.train.labels.bincount().tolist() == [6, 5, 6]
    assert "left out 1 of 18 in train: " in capsys.readouterr().out
    for file in (root / "train" / CLASSES[1]).iterdir():
        file.write_bytes(b"no picture")
    with pytest.raises(UserError, match="no readable picture in .*train for n02102040"):
        data.load_subset("folder", str(root), 16, skip_bad=True)


# ----------------------------------------------------------------------------------------------------------------------
# Streaming


@pytest.fixture
def streamed(tmp_path, monkeypatch):
    """A folder that is too large for the memory it may take."""
    monkeypatch.setattr(data, "MEMORY_LIMIT", 1000)
    return make_folder(tmp_path / "set")


def batches(split, epoch=0, count=18):
    return [[tensor.clone() for tensor in batch[:3]] for batch in split.epoch(torch.arange(count), 4, epoch)]


def test_a_stream_depends_on_seed_and_epoch_not_on_workers(streamed):
    def stream(workers, seed=0):
        return data.load_subset("folder", str(streamed), 16, workers=workers, seed=seed,
                                transform=data.StreamAugmentation(16, magnitude=9)).train

    first = batches(stream(0))
    assert [len(labels) for _, _, labels in first] == [4, 4, 4, 4, 2]
    assert first[0][0].shape == (4, 3, 16, 16) and first[0][0].dtype == torch.uint8
    for one, two in zip(first, batches(stream(2))):
        assert all(torch.equal(a, b) for a, b in zip(one, two))
    assert not torch.equal(first[0][0], batches(stream(0), epoch=1)[0][0])
    assert not torch.equal(first[0][0], batches(stream(0, seed=1))[0][0])
    state = torch.get_rng_state()
    batches(stream(0))
    assert torch.equal(torch.get_rng_state(), state)  # the workers' chance is not training's


def test_a_streamed_validation_is_cropped_in_the_middle(streamed):
    split = data.load_subset("folder", str(streamed), 16, eval_crop=0.8).val
    pictures, aspects, labels, *_ = next(split.epoch(torch.arange(2), 2))
    with Image.open(streamed / "val" / CLASSES[0] / "0.png") as picture:  # 40 x 30: the shorter side becomes 20
        resized = picture.resize((26, 20), Image.Resampling.BICUBIC)
        expected = np.asarray(resized.crop((5, 2, 21, 18)))
    assert np.abs(pictures[0].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1
    assert labels.tolist() == [0, 0] and (aspects == 1).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture_stops_a_stream_or_is_skipped(streamed, capsys, workers):
    truncate(streamed / "train" / CLASSES[0] / "1.png")
    with pytest.raises(UserError, match=r"1.png is not a picture that can be read"):
        batches(data.load_subset("folder", str(streamed), 16, workers=workers).train)
    found = batches(data.load_subset("folder", str(streamed), 16, workers=workers, skip_bad=True).train)
    assert [len(labels) for _, _, labels in found] == [3, 4, 4, 4, 2]
    assert "left out, 1 so far: " in capsys.readouterr().out
    for number in range(4):
        (streamed / "train" / CLASSES[0] / f"{number}.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="no picture of a whole batch could be read"):
        batches(data.load_subset("folder", str(streamed), 16, workers=workers, skip_bad=True).train)


def test_imagenet_is_streamed_and_has_its_thousand_classes(tmp_path):
    wnids = (data.ASSETS / "imagenet_wnids.txt").read_text().split()
    assert len(wnids) == 1000 == len(set(wnids)) and wnids == sorted(wnids) and wnids[0] == "n01440764"
    root = make_folder(tmp_path / "imagenet", train=1, val=1, size=(4, 4), classes=wnids)
    subset = data.load_subset("imagenet", str(root), 16)
    assert isinstance(subset.train, data.StreamSplit) and len(subset.val) == 1000
    with pytest.raises(UserError, match="does not hold ImageNet's 1000 classes"):
        data.load_subset("imagenet", str(make_folder(tmp_path / "other")), 16)


# ----------------------------------------------------------------------------------------------------------------------
# Downloading, from a server on this machine


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves archives of both downloaded sets, and is where data.py looks for them. Runs in an empty folder."""
    served, here = tmp_path / "served", tmp_path / "here"
    served.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *words: None})
    handler = functools.partial(quiet, directory=served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        for subset, (name, _, _) in list(data.DOWNLOADS.items()):
            root = make_folder(tmp_path / name)
            for file in root.rglob("*.png"):
                Image.open(file).save(file.with_suffix(".JPEG"))
                file.unlink()
            archive = served / f"{name}.tgz"
            with tarfile.open(archive, "w:gz") as tar:
                tar.add(root, name)
            url = f"http://127.0.0.1:{running.server_port}/{name}.tgz"
            entry = url, hashlib.md5(archive.read_bytes()).hexdigest()
            monkeypatch.setitem(data.DOWNLOADS, subset, (name, *entry))
            if subset == "imagenette":
                monkeypatch.setitem(data.Imagenette._ARCHIVES, "160px", entry)
        yield served
        running.shutdown()


@pytest.mark.parametrize("subset", ["imagenette", "imagewoof"])
def test_a_set_is_downloaded_once(server, subset):
    assert len(data.load_subset(subset, None, 16).train) == 18
    for archive in server.iterdir():
        archive.unlink()
    assert len(data.load_subset(subset, None, 16).train) == 18
    assert os.listdir("data") == [data.DOWNLOADS[subset][0]]


@pytest.mark.parametrize("subset", ["imagenette", "imagewoof"])
def test_no_network_and_no_data(server, subset):
    name, url, _ = data.DOWNLOADS[subset]
    (server / f"{name}.tgz").unlink()
    with pytest.raises(UserError) as error:
        data.load_subset(subset, None, 16)
    for part in (f"data/{name}", url, "--subset digits"):
        assert part in str(error.value)
    assert os.listdir() == []


@pytest.mark.parametrize("subset", ["imagenette", "imagewoof"])
def test_an_archive_that_is_not_the_right_one(server, subset):
    name = data.DOWNLOADS[subset][0]
    archive = server / f"{name}.tgz"
    archive.write_bytes(archive.read_bytes() + b"0")
    with pytest.raises(UserError, match=f"no {subset} in"):
        data.load_subset(subset, None, 16)
    assert not (data.Path("data") / name).exists()
