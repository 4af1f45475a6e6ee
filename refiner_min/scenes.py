"""The built-in scenes of digits: pictures in which the label of every patch is known. It imports augment's Batch."""

from copy import copy

import torch
import torch.nn.functional as F

from refiner_min import seed_for
from refiner_min.augment import Batch


class SceneSplit:
    """Pictures of up to four digits of different sizes that don't overlap, drawn where they are trained on.

    The picture's class is that of its largest digit. A token's is that of the digit whose square covers the token's
    centre; where there is none its label is all zero. Scene i of an epoch depends on stream, seed, epoch and i. Ours.
    """

    DIGITS, TRIES = 4, 16  # a digit that finds no room in so many tries is left out
    LARGEST, OTHERS = (0.4, 0.5), (0.5, 0.8)  # side of the largest digit over the scene's; of the others over that one
    cropped = True
    note = ", new ones in every epoch (--crop-*, --flip, --turn and --colour are for photographs)"

    def __init__(self, images, labels, count: int, size: int, grid: int, seed: int, stream: str = "scenes"):
        self.images, self.labels = images, labels  # (n, 1, 8, 8) from 0 to 255, (n,)
        self.count, self.size, self.grid, self.seed, self.stream = count, size, grid, seed, stream

    def __len__(self):
        return self.count

    def to(self, device) -> "SceneSplit":
        there = copy(self)
        there.images, there.labels = self.images.to(device), self.labels.to(device)
        return there

    def epoch(self, indices: torch.Tensor, batch_size: int, epoch: int = 0):
        """Yield the Batches of the indices."""
        generator = torch.Generator().manual_seed(seed_for(self.stream, self.seed, epoch))
        chance = torch.rand(self.count, self.DIGITS, 2 + 2 * self.TRIES, generator=generator).to(self.labels.device)
        for batch in indices.to(chance.device).split(batch_size):
            yield self.draw(chance[batch])

    def draw(self, chance) -> Batch:
        """Scenes from numbers (B, digits, 2 + 2 tries) between 0 and 1."""
        which = (chance[:, :, 0] * len(self.labels)).long()  # (B, digits), the largest one first
        largest, others = (low + (high - low) * chance[:, :, 1] for low, high in (self.LARGEST, self.OTHERS))
        sides = torch.cat([largest[:, :1], largest[:, :1] * others[:, 1:]], dim=1)  # of the scene's
        boxes = self.place(sides, chance[:, :, 2:].unflatten(2, (self.TRIES, 2)))  # (B, digits, 4)
        centre = (torch.arange(self.grid, device=chance.device) + 0.5) / self.grid  # (grid,)
        x, y = centre.repeat(self.grid), centre.repeat_interleave(self.grid)  # (T,), row by row
        x1, y1, x2, y2 = boxes[..., None].unbind(2)  # (B, digits, 1) each
        covers = (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)  # (B, digits, T)
        classes = F.one_hot(self.labels[which], 10).float()  # (B, digits, K)
        return Batch(self.paint(self.images[which], boxes, sides), torch.ones_like(sides[:, 0]),
                     self.labels[which[:, 0]], token_labels=covers.float().transpose(1, 2) @ classes)

    def place(self, sides, tries):
        """The first of the tries (B, digits, tries, 2) in which a digit overlaps with none before it, as a box; a digit
        without one lies outside of the scene."""
        boxes = torch.full((*sides.shape, 4), 2.0, device=sides.device)  # (B, digits, 4)
        for index in range(self.DIGITS):
            side = sides[:, index, None, None]  # (B, 1, 1)
            corners = tries[:, index] * (1 - side)  # (B, tries, 2)
            before = boxes[:, None, :index]  # (B, 1, index, 4)
            low, high = corners[:, :, None], corners[:, :, None] + side[:, :, None]  # (B, tries, 1, 2)
            apart = (low >= before[..., 2:]) | (high <= before[..., :2])
            free = apart.any(dim=3).all(dim=2)  # (B, tries)
            first = free.int().argmax(dim=1)[:, None, None].expand(-1, 1, 2)
            corner = torch.where(free.any(dim=1)[:, None], corners.gather(1, first)[:, 0], 2.0)  # (B, 2)
            boxes[:, index] = torch.cat([corner, corner + side[:, 0]], dim=1)
        return boxes

    def paint(self, images, boxes, sides):
        """Digits (B, digits, 1, 8, 8) into their boxes: pictures (B, 1, size, size) uint8."""
        centre = (boxes[..., :2] + boxes[..., 2:] - 1) / sides[..., None]  # (B, digits, 2), in digits
        theta = torch.cat([(1 / sides)[..., None, None] * torch.eye(2, device=sides.device), -centre[..., None]], dim=3)
        grid = F.affine_grid(theta.flatten(0, 1), (theta[..., 0, 0].numel(), 1, self.size, self.size),
                             align_corners=False)  # where in its digit each pixel of a scene lies
        painted = F.grid_sample(images.flatten(0, 1), grid, align_corners=False)
        return painted.unflatten(0, sides.shape).sum(dim=1).round().clamp(0, 255).to(torch.uint8)
