"""scenes.py: what a scene shows is what its labels say, and it depends on seed, epoch and index only."""

import math

import torch
import torch.nn.functional as F

from refiner_min import data


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
