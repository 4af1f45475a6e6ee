"""Batches of pictures to images: crops, flips, turns, colour, erasing, and what they do to the label map with them.

A decoded set is augmented on its device, a whole batch at a time but every picture in its own way (Augmentation). Of a
streamed one, the workers that read it crop, flip and change a picture at a time (StreamAugmentation, RandAugment);
colour and erasing come on the device too. Evaluation sees the middle square (evaluation_picture).
It imports label_store, for the maps that are changed as their pictures are.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import v2

from refiner_min.label_store import LabelMap


class Batch(NamedTuple):
    pictures: torch.Tensor  # (B, channels, S, S) uint8; once augmented, images
    aspects: torch.Tensor  # (B,) float32, width over height before the squashing
    labels: torch.Tensor  # (B,) int64
    label_map: LabelMap | None = None  # of the whole pictures, on which it was changed as they were
    boxes: torch.Tensor | None = None  # (B, 4), where a picture that is cropped already was cut out of its map
    token_labels: torch.Tensor | None = None  # (B, T, K), where they are known exactly

    def to(self, device) -> "Batch":
        def move(value):
            if value is None:
                return None
            return LabelMap(*map(move, value)) if isinstance(value, LabelMap) else value.to(device, non_blocking=True)

        return Batch(*map(move, self))


# ----------------------------------------------------------------------------------------------------------------------
# Cropping and augmenting, a batch at a time


def normalise(pictures):
    """uint8 to float32 with mean 0.5 and deviation 0.5: from -1 to 1."""
    return pictures.float() / 127.5 - 1


def turn_matrix(turns, aspects):
    """A turn by radians (B,), in fractions of the sides of pictures of these proportions: (B, 2, 2)."""
    cos, sin = turns.cos(), turns.sin()
    return torch.stack([cos, -sin / aspects, sin * aspects, cos], dim=1).unflatten(1, (2, 2))


def crop(pictures, boxes, size: int, flips=None, turns=None, aspects=None):
    """Cut a box out of every picture: (B, channels, S, S) uint8 -> images (B, channels, size, size) float32.

    boxes (B, 4): x1, y1, x2, y2 as fractions of the picture's sides; outside of the picture is black.
    flips (B,) bool: mirrored left to right. turns (B,): radians about the box's centre, of pictures with these aspects.
    The images are scaled to mean 0.5 and deviation 0.5, so from -1 to 1. Bilinear, like torchvision's crops.
    """
    centre = boxes[:, :2] + boxes[:, 2:] - 1  # (B, 2): x, y from -1 to 1 over the picture, as grid_sample counts
    sides = boxes[:, 2:] - boxes[:, :2]  # (B, 2): width, height
    if flips is not None:
        sides = sides * torch.stack([torch.where(flips, -1.0, 1.0), torch.ones_like(sides[:, 1])], dim=1)
    matrix = sides.diag_embed() if turns is None else turn_matrix(turns, aspects) * sides[:, None]  # (B, 2, 2)
    theta = torch.cat([matrix, centre[:, :, None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(theta, (len(pictures), 1, size, size), align_corners=False)
    return normalise(F.grid_sample(pictures.float(), grid, align_corners=False))


def warp_map(label_map: LabelMap, theta) -> LabelMap:
    """Label maps (B, k, H, W) read at other places: theta (B, 2, 3) takes a place of the new map, from -1 to 1, to that
    in the old one. Nearest cell; outside is logit 0."""
    planes = torch.cat([label_map.logits, label_map.ids.to(label_map.logits)], dim=1)  # (B, 2k, H, W)
    grid = F.affine_grid(theta.to(planes), planes.shape, align_corners=False)
    logits, ids = F.grid_sample(planes, grid, mode="nearest", align_corners=False).chunk(2, dim=1)
    return LabelMap(logits, ids.long())


def turn_map(label_map: LabelMap, boxes, turns, aspects) -> LabelMap:
    """Turn label maps about their boxes' centres, as crop turns the pictures."""
    centre = (boxes[:, :2] + boxes[:, 2:] - 1)[:, :, None]  # (B, 2, 1)
    matrix = turn_matrix(turns, aspects)
    return warp_map(label_map, torch.cat([matrix, centre - matrix @ centre], dim=2))


def flip_map(label_map: LabelMap, boxes, flips) -> tuple[LabelMap, torch.Tensor]:
    """Mirror those label maps left to right, and their boxes with them."""
    planes = (torch.where(flips[:, None, None, None], plane.flip(3), plane) for plane in label_map)
    mirrored = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)
    return LabelMap(*planes), torch.where(flips[:, None], mirrored, boxes)


def random_boxes(aspects, area: tuple[float, float], ratio: tuple[float, float]):
    """A box for every picture, (B, 4) as fractions: its share of the area uniform, its width over height log-uniform,
    its place uniform; of ten the first that fits, or the middle. As torchvision's RandomResizedCrop, by which streamed
    pictures are cropped; an area above 1 gives boxes around the picture."""
    def uniform(low, high, *shape):
        return torch.empty(len(aspects), *shape, device=aspects.device).uniform_(low, high)

    share, shape = uniform(*area, 10), uniform(math.log(ratio[0]), math.log(ratio[1]), 10).exp()  # (B, 10)
    shape = shape / aspects[:, None]  # in fractions of the sides
    sides = torch.stack([share * shape, share / shape], dim=2).sqrt()  # (B, 10, 2)
    fits = (sides <= max(1, area[1]) ** 0.5).all(dim=2)  # (B, 10)
    first = fits.int().argmax(dim=1)[:, None, None].expand(-1, 1, 2)
    nearest = aspects.clamp(*ratio) / aspects
    middle = torch.stack([nearest, 1 / nearest], dim=1).clamp(max=1)  # (B, 2)
    fits = fits.any(dim=1, keepdim=True)
    sides = torch.where(fits, sides.gather(1, first)[:, 0], middle)  # (B, 2): width, height
    corner = (1 - sides) * torch.where(fits, uniform(0, 1, 2), 0.5)
    return torch.cat([corner, corner + sides], dim=1)


def jitter_colour(images, strength: float):
    """Brightness, contrast and saturation, each times a factor of 1 - strength to 1 + strength of its own."""
    def factor():
        return torch.empty(len(images), 1, 1, 1, device=images.device).uniform_(1 - strength, 1 + strength)

    images = (images + 1) * factor() - 1  # black is -1
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * factor()
    grey = images.mean(dim=1, keepdim=True)
    return (grey + (images - grey) * factor()).clamp(-1, 1)


def erase(images, probability: float):
    """Random erasing: a box of 2 % to 33 % of the area filled with noise, in that share of the images.
    Source: the published recipe's "pixel" mode; arXiv:1708.04896."""
    boxes = random_boxes(torch.ones(len(images), device=images.device), (0.02, 1 / 3), (0.3, 1 / 0.3))
    boxes = boxes * (torch.rand(len(images), 1, device=images.device) < probability)
    x1, y1, x2, y2 = (boxes * images.shape[3]).round().T[:, :, None]  # each (B, 1)
    pixel = torch.arange(images.shape[3], device=images.device)
    inside = ((pixel >= y1) & (pixel < y2))[:, :, None] & ((pixel >= x1) & (pixel < x2))[:, None, :]  # (B, size, size)
    return torch.where(inside[:, None], torch.randn_like(images), images)


@dataclass(frozen=True)
class Augmentation:
    """What training does to a Batch, on its device: __call__(batch) -> the Batch with images (B, channels, size, size)
    from -1 to 1 for pictures, and the boxes of these in its label map. All chance is that of torch's global generators.
    """

    size: int  # pixels a side of the images
    area: tuple[float, float] | None = (0.08, 1.0)  # of the crop, as a share of the picture's; None: cropped already
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width over height of the crop
    flip: float = 0.5  # probability
    turn: float = 0.0  # degrees to either side
    colour: float = 0.0  # strength of jitter_colour

    def __call__(self, batch: Batch) -> Batch:
        aspects, label_map, boxes = batch.aspects, batch.label_map, batch.boxes
        if self.area is None:
            images = normalise(batch.pictures)
        else:
            flips = torch.rand_like(aspects) < self.flip
            turns = torch.empty_like(aspects).uniform_(-1, 1) * math.radians(self.turn)
            boxes = random_boxes(aspects, self.area, self.ratio)
            images = crop(batch.pictures, boxes, self.size, flips, turns, aspects)
            if label_map is not None:
                label_map = turn_map(label_map, boxes, turns, aspects) if self.turn else label_map
                label_map, boxes = flip_map(label_map, boxes, flips)
        if self.colour:
            images = jitter_colour(images, self.colour)
        return batch._replace(pictures=images, label_map=label_map, boxes=boxes)


def evaluation_picture(picture: Image.Image, size: int, crop: float = 1.0) -> torch.Tensor:
    """What evaluation makes of a picture: (channels, size, size) uint8, the middle square, its side that share of the
    shorter side; above 1, all of the shorter side between black borders. Source: published (timm's evaluation)."""
    resized = v2.functional.resize(picture, [math.floor(size / crop)], v2.InterpolationMode.BICUBIC)
    return v2.functional.pil_to_tensor(v2.functional.center_crop(resized, [size, size]))


# ----------------------------------------------------------------------------------------------------------------------
# RandAugment as published: rand-m9-mstd0.5-inc1 of timm 0.4

SAMPLINGS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
OPERATIONS = {  # its argument, by the level as a share of 10 and a sign, 1 or -1; and what Pillow does with it
    "AutoContrast": (None, lambda picture, _: ImageOps.autocontrast(picture)),
    "Equalize": (None, lambda picture, _: ImageOps.equalize(picture)),
    "Invert": (None, lambda picture, _: ImageOps.invert(picture)),
    "PosterizeIncreasing": (lambda share, sign: 4 - int(4 * share),  # bits that are kept; Pillow's own refuses 0
                            lambda picture, bits: picture.point(lambda value: value >> (8 - bits) << (8 - bits))),
    "SolarizeIncreasing": (lambda share, sign: 256 - int(256 * share), ImageOps.solarize),  # inverted from there on
    "SolarizeAdd": (lambda share, sign: int(110 * share),  # below 128
                    lambda picture, added: picture.point(lambda v: min(v + added, 255) if v < 128 else v)),
    **{f"{kind}Increasing": (lambda share, sign: 1 + sign * 0.9 * share,
                             lambda picture, factor, kind=kind: getattr(ImageEnhance, kind)(picture).enhance(factor))
       for kind in ("Color", "Contrast", "Brightness", "Sharpness")},
    "Rotate": (lambda share, sign: sign * 30 * share, None),  # degrees
    "ShearX": (lambda share, sign: sign * 0.3 * share, None),
    "ShearY": (lambda share, sign: sign * 0.3 * share, None),
    "TranslateXRel": (lambda share, sign: sign * 0.45 * share, None),  # of the width
    "TranslateYRel": (lambda share, sign: sign * 0.45 * share, None),  # of the height
}


def randaugment_argument(name: str, level: float, sign: int = 1):
    """What an operation is done with: level from 0 to 10, sign 1 or -1; None where it takes nothing."""
    argument, _ = OPERATIONS[name]
    return argument and argument(level / 10, sign)


def geometry(name: str, argument: float, width: int, height: int) -> torch.Tensor | None:
    """The matrix (3, 3) of a geometric operation: where in the picture, in pixels, a place of the new one is read."""
    if name == "Rotate":
        cos, sin = math.cos(math.radians(argument)), math.sin(math.radians(argument))
        x, y = width / 2, height / 2
        rows = [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]]
    elif name in ("ShearX", "ShearY"):
        rows = [[1, argument, 0], [0, 1, 0]] if name == "ShearX" else [[1, 0, 0], [argument, 1, 0]]
    elif name in ("TranslateXRel", "TranslateYRel"):
        rows = [[1, 0, argument * width if name == "TranslateXRel" else 0],
                [0, 1, argument * height if name == "TranslateYRel" else 0]]
    else:
        return None
    return torch.tensor([*rows, [0, 0, 1]], dtype=torch.float64)


def randaugment_operation(picture: Image.Image, name: str, level: float, sign: int = 1,
                          sampling: str = "bilinear") -> Image.Image:
    """One operation of RandAugment on a picture, with the published pixels. level: 0 to 10; sign: 1 or -1; sampling:
    "bilinear" or "bicubic", of the geometric ones, around which is grey."""
    argument = randaugment_argument(name, level, sign)
    matrix = geometry(name, argument, *picture.size)
    if matrix is None:
        return OPERATIONS[name][1](picture, argument)
    return picture.transform(picture.size, Image.Transform.AFFINE, matrix[:2].flatten().tolist(),
                             resample=SAMPLINGS[sampling], fillcolor=(128, 128, 128))


class RandAugment:
    """Two operations a picture, each done with probability 0.5: picture -> the picture, and the matrix (3, 3) of where
    in it, in pixels, a place of the new one was read. magnitude: the mean level, from 0 to 10.
    Source: arXiv:1909.13719; published: timm 0.4's rand-m9-mstd0.5-inc1."""

    COUNT, PROBABILITY, DEVIATION = 2, 0.5, 0.5

    def __init__(self, magnitude: float):
        self.magnitude = magnitude

    def draw(self) -> list[tuple[str, float, int, str]]:
        """The operations of a picture, with replacement: name, level, sign, sampling."""
        drawn = []
        for _ in range(self.COUNT):
            name = list(OPERATIONS)[int(torch.randint(len(OPERATIONS), ()))]
            level = float(torch.randn(()) * self.DEVIATION + self.magnitude)
            sign, sampling = 2 * int(torch.randint(2, ())) - 1, list(SAMPLINGS)[int(torch.randint(2, ()))]
            if torch.rand(()) < self.PROBABILITY:
                drawn.append((name, min(max(level, 0.0), 10.0), sign, sampling))
        return drawn

    def __call__(self, picture: Image.Image, operations: list | None = None) -> tuple[Image.Image, torch.Tensor]:
        places = torch.eye(3, dtype=torch.float64)
        for name, level, sign, sampling in self.draw() if operations is None else operations:
            matrix = geometry(name, randaugment_argument(name, level, sign), *picture.size)
            places = places if matrix is None else places @ matrix
            picture = randaugment_operation(picture, name, level, sign, sampling)
        return picture, places


class Crop(NamedTuple):
    """A part of a picture of width x height pixels, and how it is resized."""

    box: tuple[int, int, int, int]  # left, top, width, height
    of: tuple[int, int]  # width, height
    interpolation: v2.InterpolationMode

    def enough(self, size: int) -> tuple[int, int]:
        """The smallest width and height of the whole picture from which this part can well be resized to size: twice
        as large, as Pillow's thumbnails are made."""
        share = min(2 * size / min(self.box[2:]), 1)
        return tuple(max(math.ceil(side * share), 1) for side in self.of)

    def fractions(self) -> torch.Tensor:
        """The part as x1, y1, x2, y2 (4,), fractions of the picture's sides."""
        left, top, width, height = self.box
        return torch.tensor([left, top, left + width, top + height]) / torch.tensor(self.of * 2)

    def cut(self, picture: Image.Image, size: int) -> torch.Tensor:
        """The part as (channels, size, size) uint8, of the picture or of the same one decoded smaller, there to the
        next pixel. torch resizes two to three times as fast as Pillow, by the same filters."""
        box = [round(share * side) for share, side in zip(self.fractions().tolist(), picture.size * 2)]
        part = picture.crop((*box[:2], max(box[2], box[0] + 1), max(box[3], box[1] + 1)))
        return v2.functional.resize(v2.functional.pil_to_tensor(part), [size, size], self.interpolation)


class StreamAugmentation:
    """The published recipe's picture side: a random crop with a random interpolation, a flip, and RandAugment.

    picture -> (3, size, size) uint8. picture and its LabelMap, (k, H, W) each -> those two and the crop's box (4,) in
    the map; flip and RandAugment then come before the crop, and change both, as published.
    Without a map the crop can be drawn first (draw), so that no more of a picture is decoded than it needs.
    """

    MODES = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC

    def __init__(self, size: int, area=(0.08, 1.0), flip: float = 0.5, magnitude: float = 9, draft: bool = True):
        self.size, self.flip, self.draft = size, flip, draft
        self.cropping = v2.RandomResizedCrop(size, scale=area)
        self.randaugment = RandAugment(magnitude) if magnitude else None

    def __call__(self, picture: Image.Image, label_map: LabelMap | None = None, crop: Crop | None = None):
        if label_map is not None:
            return self.with_map(picture, label_map)
        image = (crop or self.draw(*picture.size)).cut(picture, self.size)
        image = image.flip(2) if torch.rand(()) < self.flip else image
        operations = self.randaugment.draw() if self.randaugment is not None else []
        if operations:
            picture, _ = self.randaugment(v2.functional.to_pil_image(image), operations)
            image = v2.functional.pil_to_tensor(picture)
        return image

    def with_map(self, picture: Image.Image, label_map: LabelMap) -> tuple[torch.Tensor, LabelMap, torch.Tensor]:
        """The image, the map changed as it was, and the crop's box in the map."""
        size, flipped, places = picture.size, bool(torch.rand(()) < self.flip), torch.eye(3).double()
        if flipped:
            picture = v2.functional.horizontal_flip(picture)
        if self.randaugment is not None:
            picture, places = self.randaugment(picture)
        to_pixels = torch.tensor([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]]).double() * torch.tensor([[*size, 1]]).mT
        theta = torch.linalg.inv(to_pixels) @ places @ to_pixels  # from -1 to 1
        theta = theta[:2] * torch.tensor([[-1.0 if flipped else 1.0], [1.0]])
        changed = warp_map(LabelMap(*(plane[None] for plane in label_map)), theta[None])
        crop = self.draw(*picture.size)
        return crop.cut(picture, self.size), LabelMap(*(plane[0] for plane in changed)), crop.fractions()

    def draw(self, width: int, height: int) -> Crop:
        """A random part of a picture of that size."""
        interpolation = self.MODES[int(torch.randint(2, ()))]
        params = self.cropping.make_params([torch.empty(0, height, width)])  # asked for its size only
        box = tuple(params[side] for side in ("left", "top", "width", "height"))
        return Crop(box, (width, height), interpolation)
