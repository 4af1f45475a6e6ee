"""augment.py: crops against slices, chance in its ranges, RandAugment and evaluation's picture against the published
ones, and label maps that are changed as their pictures are."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

from refiner_min import augment
from refiner_min.augment import (
    Augmentation,
    Batch,
    RandAugment,
    StreamAugmentation,
    crop,
    erase,
    evaluation_picture,
    jitter_colour,
    normalise,
    randaugment_argument,
    randaugment_operation,
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


@pytest.mark.parametrize("area, ratio, aspect", [
    ((0.08, 1.0), (3 / 4, 4 / 3), 500 / 375), ((0.35, 1.0), (3 / 4, 4 / 3), 0.6), ((0.9, 1.0), (1.0, 1.0), 3.0)])
def test_boxes_are_as_the_crops_of_streamed_pictures(area, ratio, aspect):
    """The quantiles of their widths, heights and places, over 4,000 of each."""
    torch.manual_seed(0)
    picture = Image.new("L", (round(600 * aspect), 600))
    size = torch.tensor([picture.width, picture.height] * 2)
    stream = StreamAugmentation(8, area)
    stream.cropping.ratio = ratio
    streamed = torch.stack([stream.draw(*picture.size).fractions() for _ in range(4000)])
    decoded = random_boxes(torch.full((4000,), picture.width / picture.height), area, ratio)
    quantiles = torch.linspace(0.02, 0.98, 9)
    for one, two in zip((streamed * size).T, (decoded * size).T):
        torch.testing.assert_close(one.quantile(quantiles), two.quantile(quantiles), atol=0.035 * size.max(), rtol=0)
    for boxes in (streamed, decoded):
        assert boxes.min() > -1e-6 and boxes.max() < 1 + 1e-6


def test_a_crop_is_torchvisions_and_the_same_place_of_a_picture_decoded_smaller():
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (15, 20, 3), np.uint8)).resize((800, 600))
    for _ in range(20):
        part = StreamAugmentation(32).draw(800, 600)
        left, top, width, height = part.box
        expected = pil_to_tensor(resized_crop(picture, top, left, height, width, [32, 32], part.interpolation)).int()
        assert (part.cut(picture, 32) - expected).abs().max() <= 2
        enough = part.enough(32)
        assert min(width * enough[0] / 800, height * enough[1] / 600) >= min(64, width, height) - 1e-6
        smaller = part.cut(picture.resize(enough), 32)
        assert (smaller - expected).float().abs().mean() < 8  # blocks of 40 pixels, next to each other by chance
    assert StreamAugmentation(32).draw(20, 30).enough(32) == (20, 30)  # never enlarged


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
    change = Augmentation(8, (0.3, 1.0), colour=0.4, turn=10)

    def draw(seed):
        torch.manual_seed(seed)
        return change(batch).pictures

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
    changed = Augmentation(32, (0.15, 1.2), flip=0.5, turn=turn)(batch)
    right, compared = agreement(changed.pictures, changed.label_map, changed.boxes)
    assert right == 1 and compared > 0.3

def stream_with_one_operation(name: str, monkeypatch, **options) -> StreamAugmentation:
    """Whose RandAugment does that operation once, with a random level and sign."""
    stream = StreamAugmentation(64, (0.3, 1.0), magnitude=0 if name == "none" else 9, **options)
    if name != "none":
        monkeypatch.setattr(RandAugment, "draw", lambda self: [
            (name, 10 * float(torch.rand(())), 2 * int(torch.randint(2, ())) - 1, "bilinear")])
    return stream


@pytest.mark.parametrize("operation", ["none", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "Rotate", "both"])
@pytest.mark.parametrize("shape", [(120, 60), (60, 120), (90, 90)])
def test_a_streams_map_is_changed_as_its_picture(operation, shape, monkeypatch):
    """A flip, RandAugment with the published strengths, a crop: of pictures that need not be square."""
    torch.manual_seed(0)
    levels = LEVELS[quarters(120)].to(torch.uint8).numpy()
    picture = Image.fromarray(levels).resize(shape, Image.Resampling.NEAREST).convert("RGB")
    stream = stream_with_one_operation(operation, monkeypatch)
    if operation == "both":
        monkeypatch.setattr(RandAugment, "draw", lambda self: [
            ("Rotate", 9.0, 2 * int(torch.randint(2, ())) - 1, "bilinear"), ("ShearX", 9.0, 1, "bicubic")])
    drawn = [stream(picture, LabelMap(*(plane[0] for plane in quarter_map(1)))) for _ in range(60)]
    images = torch.stack([image for image, _, _ in drawn])
    maps = LabelMap(*map(torch.stack, zip(*(label_map for _, label_map, _ in drawn))))
    boxes = torch.stack([box for _, _, box in drawn])
    assert images.shape == (60, 3, 64, 64) and maps.ids.shape == (60, 1, 16, 16)
    sides = (boxes[:, 2:] - boxes[:, :2]) * torch.tensor(shape)
    assert boxes.min() >= 0 and boxes.max() <= 1  # one crop a picture, of the size that was asked for
    assert (sides.prod(dim=1) / (shape[0] * shape[1])).min() > 0.28
    assert (sides[:, 0] / sides[:, 1]).log().abs().max() < math.log(4 / 3) + 0.1
    right, compared = agreement(normalise(images), maps, boxes, grid=16)
    assert right > 0.995 and compared > 0.2  # a cell's width beside a slanting border may go either way


def test_a_change_of_colour_leaves_the_map_exactly_as_it_was(monkeypatch):
    torch.manual_seed(0)
    ids = torch.arange(196).reshape(1, 14, 14)
    stream = stream_with_one_operation("BrightnessIncreasing", monkeypatch)
    found = [stream(Image.new("RGB", (400, 300)), LabelMap(ids / 2, ids))[1] for _ in range(20)]
    flipped = [not torch.equal(label_map.ids, ids) for label_map in found]
    assert 0 < sum(flipped) < 20
    for label_map, mirrored in zip(found, flipped):
        assert torch.equal(label_map.ids, ids.flip(2) if mirrored else ids)
        assert torch.equal(label_map.logits, label_map.ids / 2)


# ----------------------------------------------------------------------------------------------------------------------
# Against the published training code


@pytest.fixture(scope="module")
def published():
    with np.load(Path(__file__).parent / "data" / "recipe.npz") as numbers:
        return dict(numbers)


def digest(pixels) -> str:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def test_every_operation_of_randaugment_gives_the_published_pixels(published):
    picture, compared = Image.fromarray(published["randaugment_picture"]), set()
    for name, expected in zip(published["names"], published["sha256"]):
        if name.startswith("randaugment/"):
            _, operation, level, sign, *sampling = name.split("/")
            found = randaugment_operation(picture, operation, float(level), {"-": -1}.get(sign, 1), *sampling)
            assert digest(np.asarray(found)) == expected, name
            compared.add(operation)
    assert compared == set(augment.OPERATIONS) and len(compared) == 15


@pytest.mark.parametrize("name, expected", [  # at levels 0, 4.5, 9, 10
    ("Rotate", (0, 13.5, 27, 30)), ("ShearX", (0, 0.135, 0.27, 0.3)), ("ShearY", (0, 0.135, 0.27, 0.3)),
    ("TranslateXRel", (0, 0.2025, 0.405, 0.45)), ("TranslateYRel", (0, 0.2025, 0.405, 0.45)),
    ("ColorIncreasing", (1, 1.405, 1.81, 1.9)), ("ContrastIncreasing", (1, 1.405, 1.81, 1.9)),
    ("BrightnessIncreasing", (1, 1.405, 1.81, 1.9)), ("SharpnessIncreasing", (1, 1.405, 1.81, 1.9)),
    ("PosterizeIncreasing", (4, 3, 1, 0)), ("SolarizeIncreasing", (256, 141, 26, 0)), ("SolarizeAdd", (0, 49, 99, 110)),
    ("AutoContrast", (None,) * 4), ("Equalize", (None,) * 4), ("Invert", (None,) * 4),
])
def test_arguments_of_randaugment(name, expected):
    found = [randaugment_argument(name, level) for level in (0, 4.5, 9, 10)]
    assert found == (list(expected) if expected[0] is None else pytest.approx(expected))
    other = [randaugment_argument(name, level, -1) for level in (0, 4.5, 9, 10)]
    if name.endswith("Increasing") and isinstance(expected[1], float):
        assert other == pytest.approx([2 - value for value in expected])
    elif isinstance(expected[1], float):
        assert other == pytest.approx([-value for value in expected])
    else:
        assert other == found


def test_chance_of_randaugment():
    torch.manual_seed(0)
    randaugment = RandAugment(9)
    drawn = [randaugment.draw() for _ in range(20_000)]
    assert sum(not operations for operations in drawn) / 20_000 == pytest.approx(0.25, abs=0.01)
    done = [operation for operations in drawn for operation in operations]
    for name in augment.OPERATIONS:
        assert sum(operation[0] == name for operation in done) / len(done) == pytest.approx(1 / 15, abs=0.006)
    levels = torch.tensor([level for _, level, _, _ in done])
    assert levels.max() == 10 and 6 < levels.min() < 8  # cut at 10: a standard deviation of 0.5 twice
    cut = (9 + 0.5 * torch.randn(1_000_000)).clamp(0, 10)
    assert levels.mean().item() == pytest.approx(cut.mean().item(), abs=0.01)
    assert levels.std().item() == pytest.approx(cut.std().item(), abs=0.01)
    for index, values in ((2, (1, -1)), (3, ("bilinear", "bicubic"))):
        for value in values:
            assert sum(operation[index] == value for operation in done) / len(done) == pytest.approx(0.5, abs=0.015)
    assert any(operations[0][0] == operations[1][0] for operations in drawn if len(operations) == 2)  # with replacement


def test_the_strongest_level_of_every_operation_is_possible():
    """Levels are cut at 10, where the published table keeps no bit and inverts everything."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8))
    found = {name: np.asarray(randaugment_operation(picture, name, 10)) for name in augment.OPERATIONS}
    assert (found["PosterizeIncreasing"] == 0).all()
    assert (found["SolarizeIncreasing"] == 255 - np.asarray(picture)).all()
    for bits, level in ((3, 2.5), (1, 7.5)):
        posterized = ImageOps.posterize(picture, bits)
        assert posterized.tobytes() == randaugment_operation(picture, "PosterizeIncreasing", level).tobytes()


def test_two_operations_follow_each_other(monkeypatch):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3)).astype(np.uint8))
    operations = [("TranslateXRel", 10.0, 1, "bilinear"), ("Invert", 3.0, 1, "bilinear")]
    monkeypatch.setattr(RandAugment, "draw", lambda self: operations)
    found, places = RandAugment(9)(picture)
    expected = randaugment_operation(randaugment_operation(picture, "TranslateXRel", 10), "Invert", 3)
    assert found.tobytes() == expected.tobytes()
    assert places.tolist() == [[1, 0, 0.45 * 50], [0, 1, 0], [0, 0, 1]]


def test_evaluations_picture_has_the_published_bytes(published):
    compared = 0
    for name, expected in zip(published["names"], published["sha256"]):
        if name.startswith("eval"):
            kind, size, crop_ = name.split("/")
            photo = Image.fromarray(published["eval_photo_small" if kind == "eval_small" else "eval_photo"])
            found = evaluation_picture(photo, int(size), float(crop_))
            assert found.shape == (3, int(size), int(size)) and digest(found.numpy()) == expected, name
            compared += 1
    assert compared == 6
    assert evaluation_picture(photo.convert("L"), 32).shape == (1, 32, 32)
