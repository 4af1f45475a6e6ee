"""model.py against the published implementation's numbers (tests/data/README.md), explicit loops, and its contract."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from refiner_min.checkpoint import our_name
from refiner_min.model import (
    RefinerConfig,
    RefinerOutput,
    RefinerViT,
    refiner_vit_l,
    refiner_vit_m,
    refiner_vit_s,
    refiner_vit_ti,
    swap_tokens,
)
from refiner_min.relabel import mix_token_box

TINY = dict(img_size=32, patch_size=8, dim=24, depth=4, heads=3, num_classes=7)


def golden(name: str) -> dict:
    with np.load(Path(__file__).parent / "data" / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def with_prefix(numbers: dict, prefix: str) -> dict:
    return {our_name(key.removeprefix(prefix)): value for key, value in numbers.items() if key.startswith(prefix)}


def golden_model(numbers: dict, **overrides) -> RefinerViT:
    model = RefinerViT(RefinerConfig(**TINY | overrides))
    model.load_state_dict(with_prefix(numbers, "state/"))
    return model.double().eval()


def assert_close(found, expected, tolerance=1e-10):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def soft_cross_entropy(logits, target):
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Published parity


@pytest.fixture(scope="module")
def tiny():
    return golden("refiner_tiny")


def test_evaluation_is_the_published_one(tiny):
    model, images = golden_model(tiny), tiny["input"].double()
    assert_close(model(images), tiny["eval_logits"])
    assert_close(model.forward_features(images), tiny["eval_tokens"])
    maps = model.attention_maps(images)
    for block in range(4):  # with sharing a block hands on the raw map
        assert_close(maps[block].raw, tiny[f"eval_block{block}_map_handed_on"])
    assert_close(maps[1].refined, tiny["eval_block1_refined_map"])


def test_float32_logits_are_the_published_ones(tiny):
    assert_close(golden_model(tiny).float()(tiny["input"]).double(), tiny["eval_logits"], 1e-5)


def test_training_step_is_the_published_one(tiny):
    model, images = golden_model(tiny).train(), tiny["input"].double()
    box = tuple(tiny["train_box"].tolist())
    output = model(images, mix_box=box)
    assert_close(output.logits, tiny["train_cls"])
    assert_close(output.token_logits, tiny["train_aux"])
    for name, expected in with_prefix(tiny, "after_step/").items():
        assert_close(model.state_dict()[name], expected)

    share = 1 - (box[2] - box[0]) * (box[3] - box[1]) / 16  # of the picture's own tokens
    target = tiny["dense_target"].double()
    image_label, token_labels = target[:, :, 1], target[:, :, 2:].transpose(1, 2)
    mixed = share * image_label + (1 - share) * image_label.flip(0)
    loss = soft_cross_entropy(output.logits, mixed) + 0.5 * soft_cross_entropy(output.token_logits, token_labels)
    assert_close(loss, tiny["train_loss"])

    loss.backward()
    gradients = with_prefix(tiny, "grad/")
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        if name.endswith("refinement.reduce.1.bias"):  # zero in truth: another BatchNorm follows
            assert_close(parameter.grad, gradients[name], 1e-12)
        else:
            assert_close(parameter.grad, gradients[name], 1e-8 * gradients[name].abs().max())


def test_training_without_maps_is_the_published_one(tiny):
    model = golden_model(tiny).train()
    box, target = tuple(tiny["soft_box"].tolist()), tiny["soft_target"].double()
    output = model(tiny["input"].double(), mix_box=box)
    share = 1 - (box[2] - box[0]) * (box[3] - box[1]) / 16
    loss = soft_cross_entropy(output.logits, share * target + (1 - share) * target.flip(0))
    loss = loss + 0.5 * soft_cross_entropy(output.token_logits, target[:, None].expand(-1, 16, -1))
    assert_close(loss, tiny["soft_loss"])


@pytest.mark.parametrize("name, overrides", [
    ("refiner_every_block", dict(depth=2, share=False, expand=2, dense=False)),
    ("refiner_no_expansion", dict(depth=2, share=False, expand=1, dense=False)),
])
def test_other_forms_are_the_published_ones(name, overrides):
    numbers = golden(name)
    model = golden_model(numbers, **overrides)
    assert_close(model(numbers["input"].double()), numbers["eval_logits"])
    assert_close(model.float()(numbers["input"]).double(), numbers["eval_logits"], 1e-5)


@pytest.mark.parametrize("build, counts", [  # at 224, 384 and 448 pixels, with the token head
    (refiner_vit_s, (25_408_656, 25_554_576, 25_634_448)),
    (refiner_vit_m, (55_450_932, 55_610_532, 55_697_892)),
    (refiner_vit_l, (81_150_192, 81_344_752, 81_451_248)),
])
def test_parameter_counts_are_the_published_ones(build, counts):
    with torch.device("meta"):
        assert tuple(count(build(img_size=size)) for size in (224, 384, 448)) == counts


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_ti_is_small_and_its_docstring_right():
    assert f"{count(refiner_vit_ti(num_classes=10)):,}" in refiner_vit_ti.__doc__
    assert count(refiner_vit_ti()) <= 3_500_000


# ----------------------------------------------------------------------------------------------------------------------
# The linear form: local aggregation of the values, then global attention


def test_linear_form_aggregates_locally_then_attends():
    """facts: (w * A) V = sum_a S_a A V_a, with V_a[j] = sum_b w[a, b] V[j - b + 1] and S_a a shift of the queries."""
    torch.manual_seed(0)
    model = RefinerViT(RefinerConfig(**TINY | dict(share=False, linear=True, depth=1, expand=2))).double().eval()
    attention = model.blocks[0].attention
    refinement = attention.refinement
    tokens = torch.randn(2, 17, 24, dtype=torch.float64)
    raw, values = attention.raw_map_and_values(tokens, None)
    expand, kernels, reduce = (stage[0].weight for stage in (refinement.expand, refinement.convolve, refinement.reduce))

    batch, heads, length, channels = values.shape
    aggregated = torch.zeros_like(values)
    for image in range(batch):
        for head in range(heads):  # the head that gathers values
            for e in range(len(expand)):
                expanded = sum(expand[e, h, 0, 0] * raw[image, h] for h in range(heads))
                for a in range(3):
                    local = torch.zeros(length, channels, dtype=torch.float64)
                    for j in range(length):
                        for b in range(3):
                            if 0 <= j - (b - 1) < length:
                                local[j] += kernels[e, 0, a, b] * values[image, head, j - (b - 1)]
                    attended = expanded @ local
                    for i in range(length):
                        if 0 <= i + a - 1 < length:
                            aggregated[image, head, i] += reduce[head, e, 0, 0] * attended[i + a - 1]
    expected = attention.proj(aggregated.transpose(1, 2).flatten(2))
    found, handed = attention(tokens)
    assert handed is None
    assert_close(found, expected)


@pytest.mark.parametrize("overrides, stages", [
    (dict(expand=1), (False, True)), (dict(kernel_size=1), (True, False)), (dict(kernel_size=5), (True, True)),
])
def test_linear_form_leaves_stages_out(overrides, stages):
    torch.manual_seed(0)
    model = RefinerViT(RefinerConfig(**TINY | dict(share=False, linear=True, dense=False) | overrides)).eval()
    maps = model.attention_maps(torch.randn(1, 3, 32, 32))[0]
    assert (maps.expanded is not None, maps.convolved is not None) == stages
    assert maps.refined.shape == (1, 3, 17, 17)
    assert not any(isinstance(module, torch.nn.BatchNorm2d | torch.nn.ReLU6) for module in model.blocks.modules())


# ----------------------------------------------------------------------------------------------------------------------
# The contract


FORMS = {
    "published": {}, "every block": dict(share=False), "plain": dict(refine=False, depth=3),
    "linear": dict(share=False, linear=True), "no expansion": dict(expand=1), "no convolution": dict(kernel_size=1),
    "not dense": dict(dense=False), "shared, not refined": dict(unrefined=True),
}


@pytest.mark.parametrize("overrides", FORMS.values(), ids=FORMS)
def test_shapes_and_maps(overrides):
    torch.manual_seed(0)
    model = RefinerViT(RefinerConfig(**TINY | overrides))
    images = torch.randn(2, 3, 32, 32)
    output = model(images)
    if model.config.dense:
        assert isinstance(output, RefinerOutput) and output.token_logits.shape == (2, 16, 7)
        output = output.logits
    assert output.shape == (2, 7)
    model.eval()
    assert model(images).shape == (2, 7)
    assert model.forward_features(images).shape == (2, 17, 24)
    tokens = model.forward_features(images)
    assert model.forward_head(tokens).logits.shape == (2, 7)
    maps = model.attention_maps(images)
    assert len(maps) == model.config.depth
    expanded_heads = 3 * model.config.expand
    for index, block in enumerate(maps):
        refined = model.config.refine and not model.config.unrefined and (not model.config.share or index % 2 == 1)
        assert block.raw.shape == (2, 3, 17, 17) and not block.raw.requires_grad
        assert (block.refined is not None) == refined
        assert (block.expanded is not None) == (refined and model.config.expand > 1)
        assert (block.convolved is not None) == (refined and model.config.kernel_size > 1)
        for stage in (block.expanded, block.convolved):
            assert stage is None or stage.shape == (2, expanded_heads, 17, 17)


def test_evaluation_adds_half_the_largest_token_logit():
    model = RefinerViT(RefinerConfig(**TINY)).eval()
    images = torch.randn(2, 3, 32, 32)
    logits, token_logits = model.forward_head(model.forward_features(images))
    torch.testing.assert_close(model(images), logits + 0.5 * token_logits.amax(dim=1))


def test_mix_box_swaps_rows_and_columns_and_back():
    tokens = torch.arange(2 * 16).float().reshape(2, 16, 1)
    swapped = swap_tokens(tokens, (0, 1, 2, 4))  # rows 0 and 1, columns 1 to 3
    for row in range(4):
        for col in range(4):
            partner = row < 2 and 1 <= col < 4
            assert swapped[0, row * 4 + col, 0] == tokens[int(partner), row * 4 + col, 0]
    assert torch.equal(swap_tokens(swapped, (0, 1, 2, 4)), tokens)


def test_plain_form_has_no_map_to_hand_on():
    model = RefinerViT(RefinerConfig(**TINY | dict(refine=False))).eval()
    block = model.blocks[1]
    tokens = torch.randn(1, 17, 24)
    x, handed = block(tokens, None)
    assert handed is None
    q, k, v = block.attention.qkv(block.norm1(tokens / 2)).chunk(3, dim=2)
    heads = [t.unflatten(2, (3, 8)).transpose(1, 2) for t in (q, k, v)]
    attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    after = tokens + 2 * block.attention.proj(attended)
    torch.testing.assert_close(x, after + 2 * block.mlp(block.norm2(after / 2)))


def test_drop_path_rises_to_the_last_block_and_drops_whole_pictures():
    model = RefinerViT(RefinerConfig(**TINY | dict(drop_path=0.3)))
    assert [round(block.drop_path.p, 6) for block in model.blocks] == [0, 0.1, 0.2, 0.3]
    torch.manual_seed(0)
    dropped = model.blocks[3].train().drop_path(torch.ones(2000, 2, 3))
    per_picture = dropped.flatten(1)
    assert ((per_picture == 0).all(1) | (per_picture > 1).all(1)).all()
    assert abs((per_picture[:, 0] == 0).float().mean() - 0.3) < 0.05


def test_reset_classifier():
    model = refiner_vit_ti(num_classes=10).double()
    model.reset_classifier(3)
    assert model.config.num_classes == 3 and model.head.weight.dtype == torch.float64
    assert model.eval()(torch.randn(1, 3, 64, 64, dtype=torch.float64)).shape == (1, 3)
    assert 0.01 < model.token_head.weight.std() < 0.03


def test_initialisation():
    torch.manual_seed(0)
    model = refiner_vit_ti()
    for name, parameter in model.named_parameters():
        if name in ("class_token", "position") or name.endswith(("qkv.weight", "fc1.weight", "head.weight")):
            assert 0.015 < parameter.std() < 0.025, name
        if name.endswith(("qkv.bias", "fc1.bias", "head.bias")):
            assert (parameter == 0).all(), name
        if name.endswith("mlp.scale"):
            assert (parameter == 1e-5).all(), name


@pytest.mark.parametrize("wrong, value", [
    (dict(heads=5), "heads=5"), (dict(patch_size=15, img_size=30), "patch_size=15"), (dict(img_size=60), "img_size=60"),
    (dict(kernel_size=2), "kernel_size=2"), (dict(depth=3), "depth=3"), (dict(drop_path=1.0), "drop_path=1.0"),
    (dict(expand=0), "expand=0"), (dict(depth=0), "depth=0"), (dict(linear=True), "share=True"),
    (dict(unrefined=True, share=False), "share=False"), (dict(unrefined=True, refine=False), "refine=False"),
    (dict(linear=True, refine=False, share=False), "refine=False"),
    (dict(linear=True, share=False, expand=1, kernel_size=1), "expand=1"),
])
def test_what_cannot_be_is_a_value_error(wrong, value):
    with pytest.raises(ValueError, match=value):
        RefinerConfig(**TINY | wrong)


def test_images_of_another_shape_are_a_value_error():
    model = RefinerViT(RefinerConfig(**TINY)).eval()
    with pytest.raises(ValueError, match=r"\(1, 3, 64, 64\): it takes batches of \(3, 32, 32\)"):
        model(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"\(3, 32, 32\): it takes batches"):  # one picture is no batch
        model(torch.randn(3, 32, 32))


def test_attention_maps_are_for_evaluation():
    with pytest.raises(ValueError, match="eval"):
        RefinerViT(RefinerConfig(**TINY)).train().attention_maps(torch.randn(1, 3, 32, 32))


def test_maps_of_own_blocks_add_up():
    """Rows of the maps handed on sum to r, with r_next = 1 + scale * r (facts 1.6)."""
    model = RefinerViT(RefinerConfig(**TINY)).eval()
    maps = model.attention_maps(torch.randn(1, 3, 32, 32))
    for index, expected in ((0, 1.0), (2, 1 + 1 / math.sqrt(8))):
        torch.testing.assert_close(maps[index].raw.sum(dim=3), torch.full((1, 3, 17), expected))


def test_unrefined_pairs_share_the_map_as_it_is():
    """They are the published form without its refinement: the same maps and values, the map not refined."""
    torch.manual_seed(0)
    model = RefinerViT(RefinerConfig(**TINY, unrefined=True)).eval()
    refined = RefinerViT(RefinerConfig(**TINY)).eval()
    refined.load_state_dict(model.state_dict(), strict=False)
    for block in refined.blocks:
        block.attention.refinement = None
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(model(images), refined(images))
    maps = model.attention_maps(images)
    assert torch.equal(maps[0].raw, maps[1].raw) and torch.equal(maps[2].raw, maps[3].raw)
    assert not torch.equal(maps[1].raw, maps[2].raw)


# ----------------------------------------------------------------------------------------------------------------------
# Compiling, exporting, repeating


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [{}, dict(share=False, linear=True)], ids=["published", "linear"])
def test_compiled_model_is_the_eager_one(overrides):
    torch.manual_seed(0)
    model = RefinerViT(RefinerConfig(**TINY | dict(depth=2) | overrides))
    images = torch.randn(2, 3, 32, 32)
    # aot_eager traces forward and backward whole, like the default backend, but needs no C++ compiler
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).logits, model(images).logits)
    model.eval()
    torch.testing.assert_close(compiled(images), model(images))


def test_a_box_may_be_a_tuple_or_a_tensor():
    tokens = torch.randn(4, 16, 3)
    for box in ((0, 0, 2, 3), (1, 2, 4, 4), (2, 2, 2, 2)):
        swapped = swap_tokens(tokens, box).unflatten(1, (4, 4))
        assert torch.equal(swap_tokens(tokens, torch.tensor(box)).unflatten(1, (4, 4)), swapped)
        row0, col0, row1, col1 = box
        expected = tokens.unflatten(1, (4, 4)).clone()
        expected[:, row0:row1, col0:col1] = expected[:, row0:row1, col0:col1].flip(0)
        assert torch.equal(swapped, expected)


@pytest.mark.slow
def test_mix_token_compiles_to_one_graph():
    """Whatever the box: 50 of them, as training draws and hands them on."""
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    model = RefinerViT(RefinerConfig(**TINY | dict(depth=2)))
    compiled, images = torch.compile(model, backend=graphs), torch.randn(2, 3, 32, 32)
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        box = mix_token_box(4, float(torch.rand((), generator=generator)), generator)
        compiled(images, torch.tensor(box))
    assert graphs.frame_count <= 2  # one


@pytest.mark.slow
def test_s_can_be_exported():
    model = refiner_vit_s().eval()
    images = torch.randn(2, 3, 224, 224)
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    with torch.no_grad():
        three = torch.randn(3, 3, 224, 224)
        torch.testing.assert_close(program.module()(three), model(three), atol=1e-4, rtol=1e-4)


def test_a_seed_gives_the_same_numbers_twice():
    def step():
        torch.manual_seed(7)
        model = RefinerViT(RefinerConfig(**TINY | dict(drop_path=0.2)))
        output = model(torch.randn(4, 3, 32, 32), mix_box=(0, 0, 2, 3))
        (output.logits.square().mean() + output.token_logits.square().mean()).backward()
        return [output.logits, output.token_logits, *(parameter.grad for parameter in model.parameters())]

    for first, second in zip(step(), step()):
        assert torch.equal(first, second)
