"""fold.py: a folded model gives the numbers of the model, holds no BatchNorm, and can be taken elsewhere."""

from itertools import product

import pytest
import torch
from torch import nn

from refiner_min.fold import fold
from refiner_min.model import RefinerConfig, RefinerViT, refiner_vit_l, refiner_vit_m, refiner_vit_s, refiner_vit_ti


def with_statistics(model: RefinerViT) -> RefinerViT:
    """The model in evaluation as one that was trained: BatchNorms with random weights and statistics."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def small(**fields) -> RefinerViT:
    torch.manual_seed(0)
    fields = dict(img_size=32, patch_size=8, dim=48, depth=4, heads=4, stem=(8, 8, 8), num_classes=10) | fields
    return with_statistics(RefinerViT(RefinerConfig(**fields)))


VARIANTS = [dict(refine=refine, share=share, expand=expand, kernel_size=kernel, linear=linear, dense=dense)
            for refine, share, expand, kernel, linear, dense in product(*[(True, False)] * 2, (3, 1), (3, 1),
                                                                        *[(False, True)] * 2)
            if not linear or refine and not share and not expand == kernel == 1] + [dict(unrefined=True)]


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_every_form_gives_the_same_logits_and_maps(fields):
    model, images = small(**fields).double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert not folded.training and not any(parameter.requires_grad for parameter in folded.parameters())
    torch.testing.assert_close(folded(images), model(images), atol=1e-10, rtol=0)
    for ours, theirs in zip(folded.attention_maps(images), model.attention_maps(images)):
        for one, other in zip(ours, theirs):
            if other is None:
                assert one is None
            else:
                torch.testing.assert_close(one, other, atol=1e-10, rtol=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_norms_of_several_processes_are_folded_too():
    model, images = nn.SyncBatchNorm.convert_sync_batchnorm(small()).double(), torch.randn(2, 3, 32, 32).double()
    folded = fold(model)
    assert not any("Norm" in type(module).__name__ and not isinstance(module, nn.LayerNorm)
                   for module in folded.modules())
    torch.testing.assert_close(folded(images), model(images), atol=1e-10, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("build", [refiner_vit_s, refiner_vit_m, refiner_vit_l])
def test_the_published_sizes_give_the_same_logits_in_float32(build):
    torch.manual_seed(0)
    model, images = with_statistics(build()), torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        difference = (fold(model)(images) - model(images)).abs().max()
    print(f"{build.__name__}: folded logits differ by {difference:.1e}")
    assert difference < 1e-4


BATCH = {0: torch.export.Dim("batch", min=1, max=64)}  # of the first axis of the only input


@pytest.mark.slow
def test_a_folded_model_can_be_exported():
    folded, images = fold(with_statistics(refiner_vit_ti(num_classes=10))), torch.randn(3, 3, 64, 64)
    program = torch.export.export(folded, (images,), dynamic_shapes=(BATCH,)).module()
    for count in (3, 5):
        images = torch.randn(count, 3, 64, 64)
        torch.testing.assert_close(program(images), folded(images), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_folded_model_runs_as_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="wants pip install onnxscript onnxruntime")
    pytest.importorskip("onnxscript")
    folded, images, path = fold(with_statistics(refiner_vit_ti(num_classes=10))), torch.randn(2, 3, 64, 64), "ti.onnx"
    torch.onnx.export(folded, (images,), tmp_path / path, dynamo=True, input_names=["images"], dynamic_shapes=(BATCH,))
    session = runtime.InferenceSession(tmp_path / path)
    for count in (2, 5):
        images = torch.randn(count, 3, 64, 64)
        [logits] = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), folded(images), atol=1e-4, rtol=0)
