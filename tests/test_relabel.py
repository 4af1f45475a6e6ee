"""relabel.py: pooling against the published numbers and explicit loops, the loss against the published step, mixing and
MixToken by counting."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from refiner_min import relabel
from refiner_min.label_store import LabelMap
from refiner_min.model import RefinerOutput, swap_tokens
from refiner_min.relabel import Labels, TokenLabelLoss, pool_label_map
from tests.test_model import assert_close, golden, golden_model, with_prefix

# ----------------------------------------------------------------------------------------------------------------------
# Pooling


@pytest.fixture(scope="module")
def published():
    return golden("relabel_pooling")


def published_targets(numbers: dict, boxes) -> torch.Tensor:
    """(4, 20, 2 + 16) in the published layout: the set's label, the image's, the tokens'."""
    image, tokens = pool_label_map(numbers["topk_logits"], numbers["topk_ids"], boxes, 20, 4)
    truth = F.one_hot(numbers["class_id"], 20).float()
    return torch.cat([truth[:, :, None], image[:, :, None], tokens.transpose(1, 2)], dim=2)


def published_smoothing(targets, smoothing: float = 0.1):
    """p (1 - s + s/K) + s/K, which does not quite sum to one; the one-hot label of the set does."""
    off = smoothing / targets.shape[1]
    smooth = targets * (1 - smoothing + off) + off
    smooth[:, :, 0] = targets[:, :, 0] * (1 - smoothing) + off
    return smooth


@pytest.mark.parametrize("suffix, corners", [("_xy_right", (1, 0, 3, 2)), ("", (0, 1, 2, 3))], ids=["right", "swapped"])
def test_pooled_labels_are_the_published_ones(published, suffix, corners):
    """With the axes put right; and with them swapped on purpose, what the published code gives."""
    top, left, height, width = published["crop_top_left_height_width"].unbind(1)
    box = torch.stack([top, left, top + height, left + width], dim=1)[:, corners]
    plain = published_targets(published, box)
    assert_close(plain, published["target_plain" + suffix], 1e-5)
    smooth = published_smoothing(plain)
    assert_close(smooth, published["target_smooth" + suffix], 1e-5)
    mixed = 0.3 * smooth + 0.7 * smooth.flip(0)
    assert_close(mixed, published["target_mixed_lam0.3" + suffix], 1e-5)


def random_maps(generator, batch=3, classes=7, top=5, height=6, width=9) -> LabelMap:
    ids = torch.rand(batch, classes, height, width, generator=generator).argsort(dim=1)[:, :top]
    return LabelMap(3 * torch.randn(batch, top, height, width, generator=generator, dtype=torch.float64), ids)


def random_boxes(generator, batch=3):
    """(B, 4): anywhere, down to a pixel of 224, and some on the border."""
    sides = torch.rand(batch, 2, generator=generator, dtype=torch.float64).clamp(min=1 / 224)
    corner = torch.rand(batch, 2, generator=generator, dtype=torch.float64) * (1 - sides)
    corner = torch.where(torch.rand(batch, 2, generator=generator) < 0.2, 0.0, corner)
    corner = torch.where(torch.rand(batch, 2, generator=generator) < 0.2, 1 - sides, corner)
    return torch.cat([corner, corner + sides], dim=1)


def pool_by_loops(logits, ids, box, num_classes, size):
    """One map (k, H, W) under one box, cell by cell and sample by sample: tokens (size * size, K)."""
    _, height, width = logits.shape
    dense = torch.zeros(num_classes, height, width, dtype=logits.dtype)
    for rank, row, col in np.ndindex(*logits.shape):
        dense[ids[rank, row, col], row, col] = logits[rank, row, col]

    def sample(x, y):  # at (x, y) in cells; the middle of cell 0 is at 0.5
        x, y = min(max(x - 0.5, 0), width - 1), min(max(y - 0.5, 0), height - 1)
        col, row = min(int(x), max(width - 2, 0)), min(int(y), max(height - 2, 0))
        u, v = x - col, y - row
        return ((1 - v) * ((1 - u) * dense[:, row, col] + u * dense[:, row, col + 1])
                + v * ((1 - u) * dense[:, row + 1, col] + u * dense[:, row + 1, col + 1]))

    x1, y1, x2, y2 = (float(edge) * side for edge, side in zip(box, (width, height, width, height)))
    step_x, step_y = (x2 - x1) / size, (y2 - y1) / size
    across, down = math.ceil(step_x), math.ceil(step_y)  # RoIAlign's samples a bin
    tokens = []
    for row in range(size):
        for col in range(size):
            samples = [sample(x1 + (col + (i + 0.5) / across) * step_x, y1 + (row + (j + 0.5) / down) * step_y)
                       for j in range(down) for i in range(across)]
            tokens.append(torch.stack(samples).mean(dim=0).softmax(dim=0))
    return torch.stack(tokens)


@pytest.mark.parametrize("seed", range(5))
def test_pooling_is_what_the_loops_say(seed):
    generator = torch.Generator().manual_seed(seed)
    maps, boxes = random_maps(generator), random_boxes(generator)
    image, tokens = pool_label_map(*maps, boxes, 7, 4)
    for index in range(3):
        one = maps.logits[index], maps.ids[index], boxes[index], 7
        assert_close(tokens[index], pool_by_loops(*one, 4))
        assert_close(image[index], pool_by_loops(*one, 1)[0])


@pytest.mark.parametrize("seed", range(20))
def test_properties_of_pooling(seed):
    generator = torch.Generator().manual_seed(seed)
    maps, boxes = random_maps(generator), random_boxes(generator)
    image, tokens = pool_label_map(*maps, boxes, 7, 4)
    assert_close(image.sum(dim=1), torch.ones(3, dtype=torch.float64))  # and so none is NaN
    assert_close(tokens.sum(dim=2), torch.ones(3, 16, dtype=torch.float64))
    assert min(image.min(), tokens.min()) >= 0

    mirrored = torch.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], dim=1)
    flipped_image, flipped = pool_label_map(maps.logits.flip(3), maps.ids.flip(3), mirrored, 7, 4)
    assert_close(flipped_image, image, 1e-9)
    assert_close(flipped.unflatten(1, (4, 4)), tokens.unflatten(1, (4, 4)).flip(2), 1e-9)


def test_a_crop_of_a_crop_is_the_composed_box():
    """On a map that is linear in x and y, where bilinear sampling is exact: tokens of a crop's quarter are the quarter
    of its tokens."""
    row, col = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    logits = torch.stack([0.1 * row, 0.2 * col])[None].double()
    maps = LabelMap(logits, torch.arange(2)[None, :, None, None].expand(1, 2, 12, 12))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        outer = random_boxes(generator, 1) * 0.8 + 0.1  # half a cell from the border, where sampling is clamped
        inner = torch.tensor([[0.5, 0.25, 1.0, 0.75]], dtype=torch.float64)
        sides = outer[:, 2:] - outer[:, :2]
        composed = torch.cat([outer[:, :2] + inner[:, :2] * sides, outer[:, :2] + inner[:, 2:] * sides], dim=1)
        whole = pool_label_map(*maps, outer, 2, 8)[1].unflatten(1, (8, 8))
        part = pool_label_map(*maps, composed, 2, 4)[1].unflatten(1, (4, 4))
        assert_close(part, whole[:, 2:6, 4:8], 1e-9)


def test_no_axis_can_be_swapped_unseen():
    """Four corners, four classes; a crop of each corner sees its own."""
    ids = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(4, 0).repeat_interleave(4, 1)[None, None]  # (1, 1, 8, 8)
    logits = torch.full_like(ids, 20).float()
    for index, (x, y) in enumerate([(0, 0), (1, 0), (0, 1), (1, 1)]):
        box = torch.tensor([[x * 0.6, y * 0.6, x * 0.6 + 0.4, y * 0.6 + 0.4]])
        image, tokens = pool_label_map(logits, ids, box, 4, 3)
        assert image.argmax() == index and (tokens.argmax(dim=2) == index).all() and image.max() > 0.99
    wide = torch.tensor([[0.0, 0.0, 1.0, 0.4]])  # the upper two, row-major
    tokens = pool_label_map(logits, ids, wide, 4, 2)[1]
    assert tokens.argmax(dim=2).tolist() == [[0, 1, 0, 1]]
    uneven = pool_label_map(logits[:, :, :, :4], ids[:, :, :, :4], torch.tensor([[0.0, 0.6, 1.0, 1.0]]), 4, 2)[1]
    assert (uneven.argmax(dim=2) == 2).all()  # a map that is not square


def test_a_box_smaller_than_a_cell_is_not_widened():
    ids = torch.arange(4)[None, None, None].expand(1, 1, 4, 4)  # a class a column
    logits = torch.full((1, 1, 4, 4), 20.0)
    box = torch.tensor([[0.30, 0.3, 0.45, 0.4]])  # within column 1
    assert pool_label_map(logits, ids, box, 4, 2)[1].argmax(dim=2).tolist() == [[1, 1, 1, 1]]


def test_outside_of_the_map_nothing_is_known():
    logits, ids = torch.full((1, 1, 4, 4), 20.0), torch.zeros(1, 1, 4, 4, dtype=torch.long)
    tokens = pool_label_map(logits, ids, torch.tensor([[1.0, 0.0, 3.0, 1.0]]), 5, 4)[1].unflatten(1, (4, 4))
    torch.testing.assert_close(tokens[0, :, 2:], torch.full((4, 2, 5), 0.2))


MEMORY = """
import resource, torch
from refiner_min.relabel import pool_label_map
torch.set_num_threads(1)
ids = torch.rand(256, 1000, 18, 18).topk(5, dim=1).indices
logits, boxes = torch.rand(256, 5, 18, 18), torch.tensor([[0.1, 0.1, 0.9, 0.9]]).repeat(256, 1)
pool_label_map(logits[:2], ids[:2], boxes[:2], 1000, 14)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here on
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
before = peak()
result = pool_label_map(logits, ids, boxes, 1000, 14)
print((peak() - before) / 1000 - sum(t.numel() * 4 for t in result) / 1e6)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_pooling():
    """256 pictures, 1000 classes, maps of 18 x 18 to 14 x 14 tokens: less than 700 MB beyond the result."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 700


# ----------------------------------------------------------------------------------------------------------------------
# Mixing


def test_boxes_are_the_published_ones():
    with np.load(Path(__file__).parent / "data" / "recipe.npz") as numbers:
        boxes = numbers["mix_token_boxes"]
    assert len(boxes) == 108
    for lam, row, col, *box in boxes:
        assert relabel.box_around(14, lam, int(row), int(col)) == tuple(map(int, box))


def test_box_of_mix_token():
    generator = torch.Generator().manual_seed(0)
    inside = torch.zeros(14, 14)
    for lam in np.linspace(0, 1, 50):
        side = int(14 * (1 - lam) ** 0.5) // 2 * 2
        for _ in range(40):
            row0, col0, row1, col1 = relabel.mix_token_box(14, lam, generator)
            assert 0 <= row0 <= row1 <= 14 and 0 <= col0 <= col1 <= 14
            assert row1 - row0 <= side and col1 - col0 <= side
            assert row1 - row0 == side or row0 == 0 or row1 == 14
            inside[row0:row1, col0:col1] += 1
    torch.testing.assert_close(inside, inside.T, rtol=0.1, atol=60)  # rows and columns alike
    boxes = [relabel.mix_token_box(8, 0.3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert boxes[0] == boxes[1] != boxes[2]
    assert relabel.box_share(relabel.mix_token_box(14, 1.0, generator), 14) == 0


def test_the_share_of_a_box_is_that_of_the_tokens_it_swaps():
    tokens = torch.stack([torch.zeros(196, 1), torch.ones(196, 1)])
    for row0, col0, row1, col1 in np.ndindex(15, 15, 15, 15):
        if row0 < row1 and col0 < col1:  # all of the 11,025
            box = (row0, col0, row1, col1)
            assert relabel.box_share(box, 14) == pytest.approx(swap_tokens(tokens, box)[0].mean().item(), abs=1e-6)


def coloured(batch: int = 4, grid: int = 4, size: int = 16):
    """Pictures whose pixels hold the number of their picture, and token labels that say the same."""
    images = torch.arange(float(batch))[:, None, None, None].expand(batch, 1, size, size).clone()
    image = F.one_hot(torch.arange(batch), batch).float()
    return images, Labels(image, image[:, None].expand(batch, grid * grid, batch).clone())


def test_mixup_mixes_all_labels_alike():
    images, labels = coloured()
    mixed, (image, tokens) = relabel.mixup(images, labels, 0.3)
    numbers = torch.arange(4.0)
    torch.testing.assert_close(mixed[:, 0, 0, 0], image @ numbers)
    torch.testing.assert_close(image[0], torch.tensor([0.3, 0, 0, 0.7]))
    torch.testing.assert_close(tokens, image[:, None].expand_as(tokens))
    assert relabel.mixup(images, Labels(labels.image), 0.3)[1].tokens is None


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (2, 5, 11, 16), (0, 0, 16, 16), (3, 1, 7, 2), (6, 6, 7, 7)])
def test_cutmix_pastes_the_tokens_whose_centre_it_covers(box):
    images, labels = coloured()
    mixed, (image, tokens) = relabel.cutmix(images, labels, box)
    numbers = torch.arange(4.0)
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), image @ numbers)  # by area
    for token in range(16):  # the centre of a token of 4 x 4 pixels is the corner that pixels 1 and 2 share
        row, col = 4 * (token // 4) + 2, 4 * (token % 4) + 2
        pasted = box[0] <= row < box[2] and box[1] <= col < box[3]
        assert (tokens[:, token] @ numbers).tolist() == [3, 2, 1, 0] if pasted else [0, 1, 2, 3]
    assert torch.equal(images, coloured()[0])  # as it was


# ----------------------------------------------------------------------------------------------------------------------
# The loss


@pytest.fixture(scope="module")
def tiny():
    return golden("refiner_tiny")


def test_training_step_through_the_loss_is_the_published_one(tiny):
    model, box = golden_model(tiny).train(), tuple(tiny["train_box"].tolist())
    target = tiny["dense_target"].double()
    output = model(tiny["input"].double(), mix_box=box)
    assert_close(output.logits, tiny["train_cls"])
    assert_close(output.token_logits, tiny["train_aux"])
    labels = Labels(target[:, :, 1], target[:, :, 2:].transpose(1, 2))
    loss = TokenLabelLoss(dense_weight=0.5)(output, labels, relabel.box_share(box, 4))
    assert_close(loss, tiny["train_loss"])
    loss.backward()
    for name, expected in with_prefix(tiny, "grad/").items():
        found = dict(model.named_parameters())[name].grad
        zero = name.endswith("refinement.reduce.1.bias")  # in truth: another BatchNorm follows
        assert_close(found, expected, 1e-12 if zero else 1e-8 * expected.abs().max())


def test_loss_without_maps_is_the_published_one(tiny):
    box = tuple(tiny["soft_box"].tolist())
    output = golden_model(tiny).train()(tiny["input"].double(), mix_box=box)
    loss = TokenLabelLoss(0.5)(output, Labels(tiny["soft_target"].double()), relabel.box_share(box, 4))
    assert_close(loss, tiny["soft_loss"])


def test_class_ids_are_one_hot_labels():
    torch.manual_seed(0)
    output, ids = RefinerOutput(torch.randn(4, 5), torch.randn(4, 9, 5)), torch.tensor([0, 3, 1, 3])
    criterion = TokenLabelLoss(0.7, smoothing=0.1)
    one_hot = F.one_hot(ids, 5).float()
    torch.testing.assert_close(criterion(output, Labels(ids), 0.4), criterion(output, Labels(one_hot), 0.4))
    torch.testing.assert_close(TokenLabelLoss(smoothing=0.1)(output.logits, Labels(ids)),
                               F.cross_entropy(output.logits, ids, label_smoothing=0.1))


def test_a_smoothed_label_is_p_times_one_minus_s_plus_s_over_k():
    torch.manual_seed(0)
    logits, label = torch.randn(3, 5), torch.rand(3, 5).softmax(dim=1)
    smooth = label * 0.8 + 0.2 / 5
    torch.testing.assert_close(TokenLabelLoss(smoothing=0.2)(logits, Labels(label)),
                               -(smooth * logits.log_softmax(dim=1)).sum(dim=1).mean())


def test_a_token_without_a_label_is_not_trained():
    torch.manual_seed(0)
    token_logits = torch.randn(2, 9, 5, requires_grad=True)
    tokens = F.one_hot(torch.randint(5, (2, 9)), 5).float()
    tokens[0, 3:] = 0
    output, image = RefinerOutput(torch.zeros(2, 5), token_logits), torch.zeros(2).long()
    loss = TokenLabelLoss(2.0, smoothing=0.1)(output, Labels(image, tokens))
    loss.backward()
    assert (token_logits.grad[0, 3:] == 0).all() and (token_logits.grad[0, :3].abs().sum(dim=1) > 0).all()
    labelled = torch.cat([token_logits[0, :3], token_logits[1]]), torch.cat([tokens[0, :3], tokens[1]])
    torch.testing.assert_close(loss, math.log(5) + 2 * F.cross_entropy(*labelled, label_smoothing=0.1))
    torch.testing.assert_close(TokenLabelLoss()(output, Labels(image, tokens * 0)), torch.tensor(math.log(5)))
