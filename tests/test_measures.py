"""measures.py: every measure against its definition, in loops; the refinement switched off."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from refiner_min import measures
from refiner_min.augment import normalise
from refiner_min.evaluation import evaluate
from refiner_min.model import RefinerConfig, RefinerViT
from refiner_min.splits import MemorySplit
from tests.runs import CPU

SHAPE = dict(img_size=16, patch_size=4, dim=24, depth=4, heads=3, num_classes=3)


@pytest.fixture
def maps():
    return torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(0)) + 0.5


@pytest.fixture
def split():
    pictures = torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return MemorySplit(pictures, torch.ones(40), torch.arange(40) % 3, cropped=True)


def trained(**overrides) -> RefinerViT:
    """A model whose weights and statistics are not those of its start."""
    torch.manual_seed(0)
    model = RefinerViT(RefinerConfig(**SHAPE | overrides))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.train()
    for _ in range(20):
        model(torch.randn(8, 3, 16, 16))
    return model.eval()


def test_similarity_of_heads_and_tokens(maps):
    pairs = [F.cosine_similarity(picture[i].flatten(), picture[j].flatten(), dim=0)
             for picture in maps for i, j in itertools.combinations(range(3), 2)]
    assert measures.head_similarity(maps) == pytest.approx(float(sum(pairs) / len(pairs)), abs=1e-6)
    assert measures.head_similarity(maps[:, :1]) == 1  # one head: nothing else to be alike
    tokens = maps[:, 0]
    pairs = [F.cosine_similarity(picture[i], picture[j], dim=0)
             for picture in tokens for i, j in itertools.combinations(range(17), 2)]
    assert measures.token_similarity(tokens) == pytest.approx(float(sum(pairs) / len(pairs)), abs=1e-6)


def test_entropy_and_distance(maps):
    rows = maps.abs() / maps.abs().sum(dim=3, keepdim=True)
    by_row = [-sum(float(x) * math.log(x) for x in row) / math.log(17) for row in rows.flatten(0, 2)]
    assert measures.entropy(maps) == pytest.approx(sum(by_row) / len(by_row), abs=1e-5)
    assert measures.entropy(torch.full((1, 1, 17, 17), 1 / 17)) == pytest.approx(1, abs=1e-5)
    assert measures.entropy(torch.eye(17)[None, None]) == 0
    total = 0
    for query, key in itertools.product(range(16), range(16)):  # patches, 4 x 4 of them; the class token is left out
        share = maps[:, :, 1 + query, 1 + key].abs() / maps[:, :, 1 + query, 1:].abs().sum(dim=2)
        total += share.mean() * math.dist(divmod(query, 4), divmod(key, 4)) / 16
    assert measures.mean_distance(maps) == pytest.approx(float(total), abs=1e-5)


def test_cka_is_that_of_gram_matrices():
    torch.manual_seed(0)
    layers = [torch.randn(6, 5, 8) + 3 for _ in range(3)]
    layers[2] = layers[1] @ torch.linalg.qr(torch.randn(8, 8)).Q * 2  # turned and scaled: the same to CKA
    moments = measures.Moments()
    moments.add([layer[:2] for layer in layers])
    moments.add([layer[2:] for layer in layers])
    found, centre = moments.cka(), torch.eye(30) - 1 / 30
    grams = [centre @ layer.flatten(0, 1) @ layer.flatten(0, 1).T @ centre for layer in layers]
    for i, j in itertools.product(range(3), range(3)):
        expected = (grams[i] * grams[j]).sum() / (grams[i].norm() * grams[j].norm())
        assert found[i, j] == pytest.approx(float(expected), abs=1e-5)
    assert found[1, 2] == pytest.approx(1, abs=1e-5) and found[0, 1] < 0.9


def test_use_of_the_refinement():
    model = trained()
    image = torch.randn(4, 3, 16, 16)
    maps = model.attention_maps(image)[1]
    maps = maps._replace(refined=maps.refined * torch.tensor([1, -1, 1])[:, None, None])  # slopes of both signs
    found = measures.use_of_refinement(model.blocks[1].attention.refinement, maps)
    pairs = [torch.corrcoef(torch.stack([maps.raw[b, h].flatten(), maps.refined[b, h].flatten()]))[0, 1]
             for b, h in itertools.product(range(4), range(3))]
    assert found["same"] == pytest.approx(float(sum(pairs) / len(pairs)), abs=1e-5)
    lines = [line_through(maps.raw[:, head], maps.refined[:, head])[0] for head in range(3)]
    assert found["gain"] == pytest.approx(sum(map(abs, lines)) / 3, rel=1e-4)
    scale = model.blocks[1].attention.refinement.reduce[1].weight.detach().abs()
    deviation = torch.stack([maps.raw[:, head].std() for head in range(3)])
    assert found["branch_scale"] == pytest.approx(float(scale.mean()))
    assert found["map_deviation"] == pytest.approx(float(deviation.mean()))
    assert found["branch_share"] == pytest.approx(float((scale**2 / (scale**2 + deviation**2)).mean()))


def test_how_much_of_a_weight_is_what_it_began_as():
    began, model = trained(), trained()
    with torch.no_grad():
        weights = model.blocks[1].attention.refinement
        weights.convolve[0].weight.mul_(-2)
        weights.reduce[0].weight.zero_()[0, 0] = 3
    found = measures.kept(model, began)
    assert found["kept_convolve"] == [None, pytest.approx(-1), None, pytest.approx(1)]
    first = began.blocks[1].attention.refinement.reduce[0].weight.detach()
    assert found["kept_reduce"][1] == pytest.approx(float(first[0, 0] / first.norm()))
    assert found["kept_expand"] == [None, pytest.approx(1), None, pytest.approx(1)]
    assert found["kept_projection"] == pytest.approx([1] * 4)
    assert measures.kept(trained(refine=False), trained(refine=False))["kept_convolve"] == [None] * 4


def line_through(x, y) -> list[float]:
    """Slope and shift of least squares."""
    places = torch.stack([x.flatten(), torch.ones_like(x).flatten()], dim=1).double()
    return torch.linalg.lstsq(places, y.flatten()[:, None].double()).solution.flatten().tolist()


def test_a_branch_switched_off_with_statistics_taken_anew(split):
    """The skip alone, normalised by its own deviation: of the model and in a copy, which is left as it was."""
    model, images, seen = trained(), normalise(split.pictures), []
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def deviations(network) -> float:
        maps, refinement = network.eval().attention_maps(images)[1], network.blocks[1].attention.refinement
        seen.append(maps.refined.std(dim=(0, 2, 3)) / refinement.norm.weight.abs() / refinement.scale)
        return 0.5

    found = measures.ablations(model, list(images.split(20)), deviations)
    assert set(found) == {f"accuracy{way}" for way in ("", "_without_branch", "_without_branch_anew", "_with_copies")}
    _, off, anew, _ = seen
    assert torch.allclose(anew, torch.ones(3), atol=0.05) and (off < 0.8).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_chance_has_no_part_in_what_is_measured(split):
    model, images, seen = trained(drop_path=0.8), normalise(split.pictures), []
    for _ in range(2):
        measures.ablations(model, [images], lambda network: seen.append(network.eval()(images)))
    assert len(seen) == 8 and all(torch.equal(*pair) for pair in zip(seen[:4], seen[4:]))
    assert model.blocks[3].drop_path.p == pytest.approx(0.8)


def test_the_refinement_switched_off(split):
    model, images = trained(), normalise(split.pictures[:8])
    refinement = model.blocks[1].attention.refinement
    maps = model.attention_maps(images)[1]
    with measures.changed([refinement.reduce], measures.mean_of_branch):
        reduced = refinement.reduce(maps.convolved)
        assert torch.equal(reduced, refinement.reduce[1].bias[None, :, None, None].expand_as(reduced))
        refined = refinement.scale * refinement.norm(maps.raw + reduced)
        assert torch.equal(model.attention_maps(images)[1].refined, refined)
    with measures.changed([refinement], measures.closest_copy):
        copied = refinement(maps.raw)
    for head in range(3):
        slope, shift = line_through(maps.raw[:, head], maps.refined[:, head])
        assert torch.allclose(copied[:, head], slope * maps.raw[:, head] + shift, atol=1e-5)
    assert torch.equal(model.attention_maps(images)[1].refined, maps.refined)  # and on again


@pytest.mark.parametrize("overrides", [{}, dict(share=False), dict(share=False, linear=True), dict(refine=False),
                                       dict(unrefined=True), dict(expand=1), dict(dense=False, kernel_size=1)],
                         ids=lambda overrides: " ".join(overrides))
def test_what_is_measured_of_a_model(overrides, split):
    model = trained(**overrides)
    found = measures.measure(model, split, CPU, batch_size=16)
    assert found["pictures"] == 40 and found["accuracy"] == round(evaluate(model, split, CPU, 16).accuracy, 4)
    for name in ("head_similarity", "head_similarity_centred", "entropy", "distance"):
        assert len(found[name]) == 4 and None not in found[name]
    assert len(found["token_similarity"]) == len(found["cka"]) == len(found["cka"][0]) == 5
    refines = [block.attention.refinement is not None for block in model.blocks]
    assert [value is not None for value in found.get("same", [None] * 4)] == refines
    assert (found["accuracy_with_copies"] is not None) == any(refines)
    for name in ("accuracy_without_branch", "accuracy_without_branch_anew"):
        assert (found[name] is not None) == (any(refines) and not model.config.linear)
    whole = measures.layers_of(model, normalise(split.pictures))
    assert torch.allclose(model.norm(whole[-1]), model.forward_features(normalise(split.pictures))[:, 1:], atol=1e-5)
    expected = [float(measures.token_similarity(layer)) for layer in whole]
    assert found["token_similarity"] == pytest.approx(expected, abs=1e-4)
    assert not any(module._forward_hooks for module in model.modules())
