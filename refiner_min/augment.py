"""Batches of pictures to images: crops, flips, turns, colour, erasing, and what they do to the label map with them.

A decoded set is augmented on its device, a whole batch at a time but every picture in its own way (Augmentation); a
streamed one a picture at a time, by the workers that read it (StreamAugmentation). Evaluation sees the middle square.
It imports label_store, for the maps that are changed as their pictures are.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
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


def turn_map(label_map: LabelMap, boxes, turns, aspects) -> LabelMap:
    """Turn label maps about their boxes' centres, as crop turns the pictures. Nearest cell; outside is logit 0."""
    centre = (boxes[:, :2] + boxes[:, 2:] - 1)[:, :, None].to(label_map.logits)  # (B, 2, 1)
    matrix = turn_matrix(turns, aspects).to(centre)
    theta = torch.cat([matrix, centre - matrix @ centre], dim=2)  # (B, 2, 3)
    planes = torch.cat([label_map.logits, label_map.ids.to(centre)], dim=1)  # (B, 2k, H, W)
    grid = F.affine_grid(theta, planes.shape, align_corners=False)
    logits, ids = F.grid_sample(planes, grid, mode="nearest", align_corners=False).chunk(2, dim=1)
    return LabelMap(logits, ids.long())


def flip_map(label_map: LabelMap, boxes, flips) -> tuple[LabelMap, torch.Tensor]:
    """Mirror those label maps left to right, and their boxes with them."""
    planes = (torch.where(flips[:, None, None, None], plane.flip(3), plane) for plane in label_map)
    mirrored = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)
    return LabelMap(*planes), torch.where(flips[:, None], mirrored, boxes)


def center_crop(pictures, aspects, size: int, share: float = 1.0):
    """The middle square of every picture, its side that share of the shorter side: (B, channels, size, size)."""
    width, height = share * (1 / aspects).clamp(max=1), share * aspects.clamp(max=1)  # fractions of the two sides
    boxes = torch.stack([1 - width, 1 - height, 1 + width, 1 + height], dim=1) / 2
    return crop(pictures, boxes, size)


def random_boxes(aspects, area: tuple[float, float], ratio: tuple[float, float]):
    """A box for every picture, (B, 4) as fractions: its share of the area uniform, its width over height log-uniform,
    its place uniform. As torchvision's RandomResizedCrop; an area above 1 gives boxes around the picture."""
    def uniform(low, high):
        return torch.empty_like(aspects).uniform_(low, high)

    share, shape = uniform(*area), uniform(math.log(ratio[0]), math.log(ratio[1])).exp() / aspects
    longest = max(1, area[1]) ** 0.5
    width, height = (share * shape).sqrt().clamp(max=longest), (share / shape).sqrt().clamp(max=longest)
    left, top = uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height)
    return torch.stack([left, top, left + width, top + height], dim=1)


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
    erasing: float = 0.0  # probability

    def __call__(self, batch: Batch):
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
        images = erase(images, self.erasing) if self.erasing else images
        return batch._replace(pictures=images, label_map=label_map, boxes=boxes)


def evaluation_picture(picture: Image.Image, size: int, crop: float = 1.0) -> torch.Tensor:
    """The middle square of a streamed picture, its side that share of the shorter side: (3, size, size) uint8."""
    resized = v2.functional.resize(picture, [math.floor(size / crop)], v2.InterpolationMode.BICUBIC)
    return v2.functional.pil_to_tensor(v2.functional.center_crop(resized, [size, size]))


class StreamAugmentation:
    """The published recipe's picture side: a random crop with a random interpolation, a flip, and RandAugment.

    picture -> (3, size, size) uint8. picture and its LabelMap, (k, H, W) each -> those two and the crop's box (4,) in
    the map; flip and RandAugment then come before the crop, and change both, as published.
    Published: timm's rand-m9-mstd0.5-inc1; torchvision's RandAugment has no spread of the magnitude.
    """

    MODES = v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC

    def __init__(self, size: int, area=(0.08, 1.0), flip: float = 0.5, magnitude: int = 9):
        self.size, self.flip = size, flip
        self.crops = [v2.RandomResizedCrop(size, scale=area, interpolation=mode) for mode in self.MODES]
        self.augment = PairedRandAugment(num_ops=2, magnitude=magnitude) if magnitude else None
        self.alone = v2.Compose([v2.RandomChoice(self.crops), v2.RandomHorizontalFlip(flip),
                                 *([self.augment] if magnitude else []), v2.PILToTensor()])

    def __call__(self, picture: Image.Image, label_map: LabelMap | None = None):
        if label_map is None:
            return self.alone(picture)
        planes = torch.cat([label_map.logits, label_map.ids.float()])  # (2k, H, W)
        if torch.rand(()) < self.flip:
            picture, planes = v2.functional.horizontal_flip(picture), planes.flip(2)
        if self.augment is not None:
            picture, planes = self.augment(picture, planes)
        crop = self.crops[int(torch.randint(2, ()))]
        params = crop.make_params([picture])
        top, left, height, width = (params[side] for side in ("top", "left", "height", "width"))
        image = v2.functional.resized_crop(picture, top, left, height, width, [self.size] * 2, crop.interpolation)
        sides = torch.tensor([picture.width, picture.height] * 2)
        logits, ids = planes.chunk(2)
        return (v2.functional.pil_to_tensor(image), LabelMap(logits, ids.long()),
                torch.tensor([left, top, left + width, top + height]) / sides)


class PairedRandAugment(v2.RandAugment):
    """RandAugment of a picture alone, or of a picture and the planes (2k, H, W) of its label map, on which the
    geometric operations act too (nearest cell, outside is 0). torchvision's own refuses a second input."""

    FINER = 8  # subcells a cell, for planes in the picture's proportions: a turn of the square map would be a shear

    def forward(self, picture, planes=None):
        self.planes = None
        if planes is None:
            return super().forward(picture)
        height, width = planes.shape[1:]
        proportions = self.FINER * height, round(self.FINER * height * picture.width / picture.height)
        self.planes = F.interpolate(planes[None], proportions, mode="nearest-exact")[0]
        picture = super().forward(picture)
        return picture, F.interpolate(self.planes[None], (height, width), mode="nearest-exact")[0]

    def _apply_image_or_video_transform(self, image, transform_id, magnitude, interpolation, fill):
        apply = super()._apply_image_or_video_transform
        if self.planes is not None and transform_id.startswith(("Shear", "Translate", "Rotate")):
            scale = self.planes.shape[1] / image.height if transform_id.startswith("Translate") else 1.0  # of pixels
            self.planes = apply(self.planes, transform_id, magnitude * scale, v2.InterpolationMode.NEAREST, fill)
        return apply(image, transform_id, magnitude, interpolation, fill)
