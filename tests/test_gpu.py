"""A GPU: pretended everywhere, to see what a step does there, and where there is one whole runs on it.

A pretended tensor is torch's FakeTensor: a device, a shape and a number format without values. So what mixes devices
raises, and so does what has to wait for a value. What a real GPU alone can tell: numbers, the backward pass (the
gradients are put in by hand here), the two scales of fp16, and whether a kernel waits of its own accord.
"""

import json
import math
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from refiner_min import annotate, checkpoint, distributed, hardware, recipes, train
from refiner_min.engine import Run
from refiner_min.evaluation import evaluate
from refiner_min.model import refiner_vit_ti
from refiner_min.records import StepLog
from refiner_min.stopping import SaveClock, StopRequest
from tests.runs import CPU, rows_of, small, stop_at

pytestmark = [pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor"),  # copied deeply
              pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")]

GPU = torch.device("cuda", 0)


def command(kind: str, pictures, labels, *flags) -> list[str]:
    """A small run's flags, by what it trains on."""
    streamed, maps = ["--storage", "stream", "--randaugment", "9"], ["--relabel", labels, "--mix-token"]
    folder = small(pictures, "--batch-size", "8", "--workers", "1")
    kinds = {"digits": ["--subset", "digits", "--batch-size", "360"],
             "scenes": ["--subset", "digit-scenes", "--batch-size", "500"],
             "decoded": folder, "decoded, maps": [*folder, *maps, "--turn", "10", "--crop-max", "1.5"],
             "streamed": [*folder, *streamed], "streamed, maps": [*folder, *streamed, *maps]}
    return [*kinds[kind], "--epochs", "2", "--lr", "1e-3", "--out", "run", "--device", "cuda", "--no-compile",
            *flags]


KINDS = "digits", "scenes", "decoded", "decoded, maps", "streamed", "streamed, maps"


def run_on_gpu(*words) -> Run:
    arguments = command(*words)
    return train.new_run(*train.parse(arguments), GPU)


def train_an_epoch(run: Run, monkeypatch, forbid, free: int = 0):
    """forbid is called once the epoch's order has been copied, which may be waited for, and so many steps are over."""
    real = run.subset.train.epoch

    def epoch(*words):
        for step, batch in enumerate(real(*words)):
            if step >= free:
                forbid()
            yield batch

    monkeypatch.setattr(run.subset.train, "epoch", epoch)
    monkeypatch.setattr("refiner_min.step.LOOK_EVERY", 1)  # at the loss, in every step
    with StopRequest() as stop:
        run.train_epoch(stop, tqdm(disable=True), SaveClock(20), StepLog(run))
    assert run.step == run.steps_per_epoch > 1


@pytest.fixture(autouse=True)
def settings_as_before():
    with hardware.exact_float32(), torch.backends.cudnn.flags(enabled=True):  # both put back what they find
        yield


# ----------------------------------------------------------------------------------------------------------------------
# Pretended


class PretendedGPU(TorchDispatchMode):
    """Tensors on cuda are without values, all others real: chance that is drawn on the CPU can be read.

    Refused, beside what FakeTensorMode refuses: a CPU's tensor among the GPU's, unless it is a single number, and with
    strict a copy that blocks.
    """

    strict = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors, target = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)], kwargs.get("device")
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        devices = {tensor.device for tensor in tensors if tensor.ndim or copies} | ({target} if target else set())
        if len(devices) > 1 and not copies:
            raise RuntimeError(f"{func} mixes devices")
        if len(devices) > 1 and self.strict and not kwargs.get("non_blocking"):
            raise RuntimeError(f"{func} waits until the copy is there")
        if GPU in devices or any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def with_memory_format(convolution, memory_format):
    """Module.to, which can put a pretended parameter in the place of a real one but not of another."""
    there = convolution.weight.detach().to(memory_format=memory_format)
    convolution.weight = nn.Parameter(there)
    return convolution


@pytest.fixture
def pretended(monkeypatch):
    """The mode, and stand-ins for what asks the driver. Events never come, so that nothing is read."""
    event = SimpleNamespace(query=lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=lambda: event))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # or autocast is off
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(nn.Conv2d, "to", with_memory_format)
    monkeypatch.setitem(recipes.MODELS, "ti", partial(refiner_vit_ti, depth=2))
    with FakeTensorMode(allow_non_fake_inputs=True), PretendedGPU() as mode:
        yield mode


@pytest.mark.parametrize("wrong", [
    lambda x: x + torch.ones(3), lambda x: torch.cat([x, torch.ones(1)]), lambda x: x[torch.tensor([0])],
    lambda x: torch.ones(3)[x.long()], lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool(x[0] > 0),
    lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.cpu(), lambda x: x.sum().cpu(),
    lambda x: torch.ones(3).to(x), lambda x: torch.tensor(1.0, device=GPU), lambda x: x.copy_(torch.ones(3)),
])
def test_what_mixes_devices_or_waits_is_refused(pretended, wrong):
    pretended.strict = True
    x = torch.rand(3, device=GPU)
    with pytest.raises(RuntimeError):
        wrong(x)
    allowed = x * torch.tensor(2.0) + torch.ones(3).to(GPU, non_blocking=True) + float(torch.rand(()))
    assert allowed.device == GPU and x.to("cpu", non_blocking=True).device == CPU


def pretended_run(monkeypatch, *words) -> Run:
    run = run_on_gpu(*words)
    run.scaler = torch.amp.GradScaler(enabled=False)  # fp16's reads its scale in every step

    def backward(loss):
        assert loss.device == GPU and loss.requires_grad and loss.dtype == torch.float32
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    return run


MIXUP, CUTMIX = ("--mixup", "0.8", "--cutmix", "0"), ("--mixup", "0", "--cutmix", "1")


@pytest.mark.parametrize("kind, flags", [
    ("digits", ("--linear",)),
    ("scenes", ("--mix-token", *MIXUP)), ("scenes", CUTMIX),
    ("decoded", (*MIXUP, "--amp", "off")), ("decoded", (*CUTMIX, "--mix-token", "--dense-weight", "0.5")),
    ("decoded, maps", (*MIXUP, "--amp", "fp16")), ("decoded, maps", (*CUTMIX, "--no-token-labels")),
    ("streamed", ("--no-refine", "--clip-grad", "1")), ("streamed, maps", CUTMIX),
], ids=str)
def test_a_step_neither_mixes_devices_nor_waits(pretended, pictures, labels, monkeypatch, kind, flags):
    """Augmentation, labels, mixing, erasing, forward pass, loss, optimizer and average, as training calls them."""
    large = ["--batch-size", "3000"] if kind == "scenes" else ["--workers", "0"]
    run = pretended_run(monkeypatch, kind, pictures, labels, *large, *flags)
    train_an_epoch(run, monkeypatch, lambda: setattr(pretended, "strict", True))
    tensors = [run.loss.total, *run.model.state_dict().values(), *(run.ema.state_dict().values() if run.ema else ())]
    assert all(tensor.device == GPU for tensor in tensors)


@pytest.mark.parametrize("wrong, message", [
    (lambda images: images + torch.zeros(images.shape), "mixes devices"),
    (lambda images: images.cpu().to(GPU), "waits until the copy"),
    (lambda images: images * images.mean().item(), "_local_scalar_dense"),
])
def test_a_step_that_did_would_be_seen(pretended, pictures, labels, monkeypatch, wrong, message):
    run = pretended_run(monkeypatch, "decoded", pictures, labels)
    run.mix = lambda images, labels: (wrong(images), labels)
    with pytest.raises(RuntimeError, match=message):
        train_an_epoch(run, monkeypatch, lambda: setattr(pretended, "strict", True))


@pytest.mark.parametrize("kind", ["digits", "scenes"])
def test_evaluation_waits_at_its_end_only(pretended, pictures, labels, monkeypatch, kind):
    run, seen = run_on_gpu(kind, pictures, labels), []
    split = type(run.subset.val)
    real = split.epoch

    def epoch(self, *words):
        for batch in real(self, *words):
            pretended.strict = True
            yield batch

    monkeypatch.setattr(split, "epoch", epoch)
    monkeypatch.setattr(distributed, "sum_over_processes", lambda totals: seen.append(totals) or torch.ones(6))
    assert run.evaluate().count == 1 and seen[0].device == GPU


class _Patches(nn.Conv2d):
    def forward(self, images):
        return annotate.positions_as_batch(super().forward(images))


def test_annotating_waits_for_a_batch_when_the_next_one_is_on_its_way(pretended, monkeypatch):
    said, numbers = [], iter(range(3))

    def record_event():
        event = next(numbers)
        said.append(f"{event} on its way")
        return SimpleNamespace(synchronize=lambda: said.append(f"{event} waited for"))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=record_event))
    with torch.device(GPU):
        annotator = annotate.Annotator(_Patches(3, 1000, 32, stride=32), [127.0] * 3, [128.0] * 3)
    columns = torch.arange(7).to(GPU)
    batches = [(4 * number, torch.zeros(4, 3, 64, 64, dtype=torch.uint8), {}) for number in range(3)]
    pretended.strict = True
    for first, maps, _ in annotate.make_all(annotator, columns, batches):
        said.append(f"{first // 4} written")
        assert maps.logits.shape == maps.ids.shape == (4, 5, 2, 2) and maps.logits.device == maps.ids.device == CPU
    assert said == ["0 on its way", "1 on its way", "0 waited for", "0 written", "2 on its way", "1 waited for",
                    "1 written", "2 waited for", "2 written"]


# ----------------------------------------------------------------------------------------------------------------------
# Real


def on_a_gpu(test):
    return pytest.mark.slow(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")(test))


def numbers(out) -> list[dict]:
    return [{name: float(value) for name, value in row.items()} for row in rows_of(out)]


def assert_close_runs(one, two, tolerance: float):
    for first, second in zip(numbers(one), numbers(two), strict=True):
        for name in ("step", "lr", "train_loss", "val_loss"):
            assert first[name] == pytest.approx(second[name], abs=tolerance), name


@on_a_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_split_trains(pictures, labels, kind):
    assert train.main(command(kind, pictures, labels)) == 0
    assert json.loads(Path("run/config.json").read_text())["hardware"] == torch.cuda.get_device_name(GPU)
    assert all(math.isfinite(value) for row in numbers("run") for value in row.values())
    assert train.main(["--eval", "--out", "run", "--device", "cuda"]) == 0


@on_a_gpu
@pytest.mark.parametrize("kind", ["decoded, maps", "streamed, maps"])
def test_stopped_and_resumed_is_as_never_stopped(pictures, labels, monkeypatch, kind):
    """But for rounding: cuDNN measures anew which algorithm it takes, and some kernels add in any order."""
    flags = command(kind, pictures, labels, "--amp", "off", "--erasing", "1", "--drop-path", "0.3", "--lr", "5e-3")
    assert train.main([*flags, "--out", "whole"]) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert train.main([*flags, "--out", "stopped"]) == 128 + 15
    assert checkpoint.load("stopped/last.pt")["step"] == 4
    torch.manual_seed(99)  # another state of the generators
    assert train.main(["--resume", "stopped", "--device", "cuda", "--workers", "1"]) == 0
    assert_close_runs("whole", "stopped", 1e-3)


@on_a_gpu
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_number_formats(pictures, labels, amp):
    for chosen in ("off", amp):
        assert train.main(command("decoded, maps", pictures, labels, "--amp", chosen, "--out", chosen)) == 0
        assert bool(checkpoint.load(f"{chosen}/last.pt")["scaler"]) == (chosen == "fp16")
    assert_close_runs("off", amp, 0.1)


@on_a_gpu
def test_compiled_with_a_box_that_changes(pictures, labels):
    torch.compiler.reset()
    for out, flags in (("plain", ()), ("compiled", ("--compile",))):
        words = "--amp", "off", "--drop-path", "0", "--out", out, *flags  # whose chance a compiled model draws anew
        assert train.main(command("decoded, maps", pictures, labels, *words)) == 0
    assert_close_runs("plain", "compiled", 1e-2)


@on_a_gpu
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits(pictures, labels, monkeypatch, kind):
    """With bf16, but the first, in which libraries are set up. The loss is looked at in every step: its copy does not
    block, and its event is asked, not waited for. torch sees its own waiting only, not that of libraries."""
    run = run_on_gpu(kind, pictures, labels, "--amp", "bf16")
    try:
        train_an_epoch(run, monkeypatch, lambda: torch.cuda.set_sync_debug_mode("error"), free=1)
        with pytest.raises(RuntimeError, match="synchroniz"):
            run.loss.bad.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@pytest.mark.parametrize("amp, tf32", [("bf16", True), ("off", False)])
def test_settings(pictures, labels, amp, tf32):
    run = run_on_gpu("decoded", pictures, labels, "--amp", amp)
    assert run.settings == {"tf32": tf32, "tf32_in_evaluation": False, "cudnn_benchmark": True, "channels_last": True}
    assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == (tf32, True)
    for net in (run.model, run.ema):
        kernels = [module.weight for module in net.modules() if isinstance(module, nn.Conv2d)]
        assert kernels and all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


@on_a_gpu
@pytest.mark.parametrize("kind", ["digits", "scenes"])
def test_evaluation_is_that_of_the_cpu(pictures, labels, kind):
    """Of a run that trains with TF32, which with heads as large as here would change the loss by about 0.001."""
    run = run_on_gpu(kind, pictures, labels, "--amp", "bf16", "--ema", "0")
    with torch.no_grad():
        for name, weight in run.model.named_parameters():
            if name.endswith("head.weight"):
                weight.mul_(20)
    there, here = run.evaluate(), evaluate(deepcopy(run.model).cpu(), run.subset.val, CPU, 100)
    assert there.loss == pytest.approx(here.loss, abs=1e-4) and there.count == here.count
