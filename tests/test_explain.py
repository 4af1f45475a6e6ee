"""explain.py: what it shows is what the model computes; what it cannot read or write is said."""

import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from refiner_min import UserError, checkpoint, data, explain
from refiner_min.augment import evaluation_picture, normalise
from refiner_min.model import RefinerConfig, RefinerViT, refiner_vit_s
from refiner_min.pictures import read_picture
from refiner_min.recipes import OF_MODEL, Recipe
from tests.test_checkpoint import published_state

SMALL = dict(img_size=32, patch_size=8, dim=24, depth=4, heads=3, num_classes=7, dense=False)


def weights(**overrides) -> Path:
    torch.manual_seed(0)
    model = RefinerViT(RefinerConfig(**SMALL | overrides))
    path = Path("best.pt")
    config = asdict(model.config)
    recipe = asdict(Recipe(eval_crop=0.9)) | {name: value for name, value in config.items() if name in OF_MODEL}
    checkpoint.save({"config": config, "recipe": recipe, "model": model.state_dict(),
                     "classes": [f"thing {index}" for index in range(model.config.num_classes)]}, path)
    return path


def photo(mode: str = "RGB", size=(60, 40)) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save("photo.png")
    return Path("photo.png")


@pytest.mark.parametrize("overrides", [{}, dict(refine=False), dict(share=False, linear=True), dict(expand=1),
                                       dict(kernel_size=1), dict(in_channels=1), dict(num_classes=2), dict(dense=True)],
                         ids=str)
@pytest.mark.parametrize("mode", ["RGB", "P"])
def test_every_form_is_explained(overrides, mode, capsys):
    path = weights(**overrides)
    assert explain.main([str(photo(mode)), "--weights", str(path)]) == 0
    said = capsys.readouterr().out
    assert "thing " in said and "drawn in photo-explained.png" in said
    with Image.open("photo-explained.png") as picture:
        assert picture.format == "PNG" and picture.width > 600


def test_the_classes_are_those_of_the_evaluation():
    path = weights()
    found = explain.explain(photo(), path, "out.png")
    model, _ = checkpoint.load_model(path)
    image = normalise(evaluation_picture(read_picture("photo.png"), 32, 0.9))[None]  # as training evaluates
    with torch.no_grad():
        probabilities = model(image).softmax(dim=1)[0]
    assert len(found) == 5 and [value for _, value in found] == sorted((value for _, value in found), reverse=True)
    for name, value in found:
        assert value == pytest.approx(probabilities[int(name.split()[1])].item(), abs=1e-6)


@pytest.mark.slow
def test_published_weights_are_explained(capsys):
    """Size and model are known by the shapes, the picture is taken as that model is evaluated, classes by name."""
    torch.manual_seed(0)
    source = refiner_vit_s(img_size=32).eval()
    torch.save({"state_dict": published_state(source)}, "published.pth.tar")
    found = explain.explain(photo(), "published.pth.tar", "out.png")
    image = normalise(evaluation_picture(read_picture("photo.png"), 32, 0.9))[None]
    with torch.no_grad():
        best = int(source(image).argmax())
    assert found[0][0] == data.class_names(data.imagenet_wnids())[best]
    torch.save({"state_dict": published_state(RefinerViT(RefinerConfig(**SMALL | dict(dense=True))))}, "small.pth.tar")
    assert explain.explain(photo(), "small.pth.tar", "out.png")[0][0].startswith("class ")


def test_the_maps_are_the_class_tokens_row():
    model, _ = checkpoint.load_model(weights())
    image = explain.evaluation_image(photo(), model.config)
    maps = explain.class_token_maps(model, image, 4)
    assert list(maps) == [1, 3]  # the refined blocks
    expected = model.attention_maps(image)[3]
    for stage, found in maps[3].items():
        row = getattr(expected, stage)[0].mean(dim=0)[0]  # query 0, every key
        assert torch.allclose(found.flatten(), row[1:], atol=1e-6)
    assert list(maps[3]) == ["raw", "expanded", "convolved", "refined"]
    assert list(explain.class_token_maps(model, image, 1)) == [1]
    plain, _ = checkpoint.load_model(weights(refine=False))
    assert {block: list(found) for block, found in explain.class_token_maps(plain, image, 2).items()} == {
        0: ["raw"], 3: ["raw"]}


@pytest.mark.parametrize("words, message", [
    (["none.png", "--weights", "best.pt"], "none.png is not a picture that can be read"),
    (["photo.png", "--weights", "none.pt"], "there is no checkpoint none.pt"),
    (["photo.png", "--weights", "photo.png"], "photo.png is damaged or not a checkpoint"),
    (["photo.png", "--weights", "best.pt", "--out", "photo.png"], "--out photo.png is the photo itself"),
    (["photo.png", "--weights", "best.pt", "--out", "none/x.png"], "none/x.png could not be written"),
    (["photo.png", "--weights", "best.pt", "--blocks", "0"], "--blocks 0 must be at least 1"),
])
def test_mistakes(words, message):
    weights()
    before = photo().read_bytes()
    with pytest.raises(UserError, match=message):
        explain.main(words)
    assert photo().read_bytes() == before


def test_the_command():
    weights()
    command = [sys.executable, "-m", "refiner_min.explain", "none.png", "--weights", "best.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: none.png is not a picture")


@pytest.mark.parametrize("photo", ["chelsea", "china", "flower"])
def test_what_the_small_models_say_of_the_photographs_stands_beside_them(photo):
    """A class and its percentage, of either model; without --weights it is ti that is asked."""
    folder = Path(__file__).parents[1] / "notebooks" / "photos"
    [row] = re.findall(rf"^\| `{photo}.jpg`.*$", (folder / "README.md").read_text(), re.MULTILINE)
    assert explain.parse(["photo.jpg"]).weights == "ti"
    for cell, weights in zip(row.split("|")[-3:-1], checkpoint.PRETRAINED, strict=True):
        name, probability = explain.explain(folder / f"{photo}.jpg", weights, "out.png")[0]
        said, percent = re.fullmatch(r"(.+), (\d+) %", cell.strip()).groups()
        assert said == name and abs(100 * probability - int(percent)) < 0.6
