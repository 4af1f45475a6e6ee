"""augment.py: crops against slices, chance in its ranges, and label maps that are changed as their pictures are."""

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from refiner_min.augment import (
    Augmentation,
    Batch,
    StreamAugmentation,
    center_crop,
    crop,
    erase,
    jitter_colour,
    normalise,
    random_boxes,
)
from refiner_min.label_store import LabelMap
from refiner_min.relabel import pool_label_map

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
    torch.testing.assert_close(as_pixels(crop(ramp(), boxes, 4)), cut, atol=1e-3, rtol=0)
    flipped = as_pixels(crop(ramp(), boxes, 4, flips=torch.tensor([True])))
    torch.testing.assert_close(flipped, cut.flip(3), atol=1e-3, rtol=0)


def test_a_quarter_turn_turns_the_box():
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    quarter = torch.tensor([math.pi / 2])
    turned = as_pixels(crop(ramp(), whole, 8, turns=quarter, aspects=torch.ones(1)))
    torch.testing.assert_close(turned, ramp().float().rot90(1, (2, 3)), atol=1e-2, rtol=0)


def test_a_turn_keeps_the_proportions_of_a_squashed_picture():
    """A picture twice as wide as high, its middle square turned by a quarter: the square's corners move on by one."""
    square = torch.tensor([[0.25, 0.0, 0.75, 1.0]])
    upright = crop(ramp(), square, 8)
    turned = crop(ramp(), square, 8, turns=torch.tensor([math.pi / 2]), aspects=torch.tensor([2.0]))
    torch.testing.assert_close(turned, upright.rot90(1, (2, 3)), atol=1e-4, rtol=0)


def test_outside_of_the_picture_is_black():
    white = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    images = crop(white, torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), 8)  # the picture is the upper right quarter
    torch.testing.assert_close(images[0, 0, 1:3, 5:7], torch.ones(2, 2))
    assert (images[0, 0, 5:] == -1).all() and (images[0, 0, :, :3] == -1).all()


def test_every_picture_has_its_own_box():
    pictures = ramp().expand(2, 1, 8, 8)
    boxes = torch.tensor([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]])
    images = as_pixels(crop(pictures, boxes, 4))
    torch.testing.assert_close(images[0], ramp()[0, :, :4, :4].float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(images[1], ramp()[0, :, 4:, 4:].float(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("aspect, box", [(2.0, (0.25, 0.0, 0.75, 1.0)), (0.5, (0.0, 0.25, 1.0, 0.75))])
def test_center_crop_is_the_middle_square_of_a_squashed_picture(aspect, box):
    expected = crop(ramp(), torch.tensor([box]), 8)
    torch.testing.assert_close(center_crop(ramp(), torch.tensor([aspect]), 8), expected)
    x1, y1, x2, y2 = (0.5 + (edge - 0.5) * 0.8 for edge in box)
    expected = crop(ramp(), torch.tensor([[x1, y1, x2, y2]]), 8)
    torch.testing.assert_close(center_crop(ramp(), torch.tensor([aspect]), 8, 0.8), expected)


def test_random_boxes_keep_their_ranges():
    torch.manual_seed(0)
    aspects = torch.full((4000,), 1.5)
    boxes = random_boxes(aspects, (0.2, 0.5), (0.75, 4 / 3))
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height, width * 1.5 / height  # in the picture's own proportions
    assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-6
    assert 0.2 <= area.min() < 0.21 and 0.49 < area.max() <= 0.5 + 1e-6
    assert 0.75 <= ratio.min() + 1e-6 and ratio.max() <= 4 / 3 + 1e-6
    assert abs(ratio.log().mean()) < 0.02 and abs(boxes[:, 0].mean() - (1 - width).mean() / 2) < 0.01


def test_boxes_above_one_surround_the_picture():
    torch.manual_seed(0)
    boxes = random_boxes(torch.ones(100), (1.3, 1.5), (1.0, 1.0))
    assert (boxes[:, :2] <= 0).all() and (boxes[:, 2:] >= 1).all()


def test_colour_changes_each_picture_in_its_own_way():
    torch.manual_seed(0)
    images = torch.rand(8, 3, 4, 4) * 2 - 1
    assert torch.allclose(jitter_colour(images, 0.0), images, atol=1e-6)
    changed = jitter_colour(images.clone(), 0.4)
    assert changed.abs().max() <= 1
    assert len((changed - images).abs().mean(dim=(1, 2, 3)).unique()) == 8
    grey = torch.rand(1, 1, 4, 4).expand(1, 3, 4, 4)
    changed = jitter_colour(grey, 0.4)
    assert torch.allclose(changed[:, 0], changed[:, 1], atol=1e-6)


def test_erasing():
    torch.manual_seed(0)
    images = torch.zeros(2000, 3, 16, 16)
    assert torch.equal(erase(images, 0.0), images)
    noise = erase(images, 0.25) != 0
    erased = noise.any(dim=(1, 2, 3))
    assert abs(erased.float().mean() - 0.25) < 0.03
    share = noise[erased].any(dim=1).float().mean(dim=(1, 2))
    assert share.max() <= 0.45 and share.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
    for mask in noise[erased][:20, 0]:
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        assert mask.sum() == rows * columns  # a full box


def test_augmentation_repeats_with_the_seed_and_differs_within_the_batch():
    pictures = ramp(16).expand(4, 3, 16, 16).clone()
    batch = Batch(pictures, torch.ones(4), torch.arange(4))
    augment = Augmentation(8, (0.3, 1.0), colour=0.4, erasing=0.5, turn=10)

    def draw(seed):
        torch.manual_seed(seed)
        return augment(batch).pictures

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(1)[0], draw(1)[1])
    still = Augmentation(16, (1.0, 1.0), (1.0, 1.0), flip=0.0)
    torch.testing.assert_close(as_pixels(still(batch).pictures), pictures.float(), atol=1e-3, rtol=0)
    flipped = Augmentation(16, (1.0, 1.0), (1.0, 1.0), flip=1.0)(batch).pictures
    torch.testing.assert_close(as_pixels(flipped), pictures.float().flip(3), atol=1e-3, rtol=0)
    streamed = Augmentation(16, area=None)(batch).pictures
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
    tokens = pool_label_map(*maps, boxes, 4, grid)[1].argmax(dim=2)  # (B, T)
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
    batch = Batch(pictures, torch.full((64,), aspect), torch.zeros(64), quarter_map(64))
    augment = Augmentation(32, (0.15, 1.2), flip=0.5, turn=turn)
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
    augment = StreamAugmentation(64, (0.3, 1.0), magnitude=0 if operation == "none" else 20)
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
    right, compared = agreement(normalise(images), maps, boxes, grid=16)
    assert right > 0.995 and compared > 0.2  # a cell's width beside a slanting border may go either way


def test_a_change_of_colour_leaves_the_map_exactly_as_it_was(monkeypatch):
    """Cell by cell, in proportions that do not come out even: 14 cells over 149 subcells."""
    torch.manual_seed(0)
    ids = torch.arange(196).reshape(1, 14, 14)
    augment = StreamAugmentation(32, flip=0.5, magnitude=9)
    space = augment.augment._AUGMENTATION_SPACE
    monkeypatch.setattr(augment.augment, "_AUGMENTATION_SPACE", {"Brightness": space["Brightness"]})
    found = [augment(Image.new("RGB", (400, 300)), LabelMap(ids / 2, ids))[1] for _ in range(20)]
    flipped = [not torch.equal(label_map.ids, ids) for label_map in found]
    assert 0 < sum(flipped) < 20
    for label_map, mirrored in zip(found, flipped):
        assert torch.equal(label_map.ids, ids.flip(2) if mirrored else ids)
        assert torch.equal(label_map.logits, label_map.ids / 2)
