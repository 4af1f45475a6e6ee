"""What the model says about a photo, and where it looks: python -m refiner_min.explain PHOTO [--weights runs/X/best.pt]

Writes one PNG: the photo as the model sees it, its five likeliest classes, and for some blocks the class token's
attention over the photo before the expansion, after it, after the local convolution and after the reduction.
"""

import argparse
from pathlib import Path

import torch

from refiner_min import UserError, checkpoint, data, plots, recipes, run_command
from refiner_min.augment import evaluation_picture, normalise
from refiner_min.pictures import read_picture


def evaluation_image(photo, config, eval_crop: float = 1.0) -> torch.Tensor:
    """The photo at a path as the model takes it in evaluation: (1, channels, S, S) from -1 to 1."""
    picture = read_picture(photo, "L" if config.in_channels == 1 else "RGB")
    return normalise(evaluation_picture(picture, config.img_size, eval_crop))[None]


def class_token_maps(model, image, blocks: int) -> dict:
    """The class token's attention to the patches, the mean over the maps of a stage: {block: {stage: (grid, grid)}}
    for at most that many blocks, evenly spread over the refined ones, or over all where none is refined."""
    all_maps = model.attention_maps(image)
    refined = [index for index, maps in enumerate(all_maps) if maps.refined is not None] or list(range(len(all_maps)))
    count = min(blocks, len(refined))
    chosen = sorted({refined[round(position * (len(refined) - 1) / max(count - 1, 1))] for position in range(count)})
    side = model.config.grid
    return {index: {stage: maps[0, :, 0, 1:].mean(dim=0).unflatten(0, (side, side))  # (grid, grid)
                    for stage, maps in all_maps[index]._asdict().items() if maps is not None}
            for index in chosen}


@torch.no_grad()
def explain(photo, weights, out, blocks: int = 4) -> list[tuple[str, float]]:
    """Draw the explanation of the photo into the PNG out; returns the five likeliest classes with their
    probabilities. UserError: what cannot be read or written."""
    model, state = checkpoint.load_model(weights)
    if "config" in state:
        checkpoint.check(state, weights, ["recipe", "classes"])
        crop, classes = recipes.saved_recipe(state, weights).eval_crop, state["classes"]
    else:  # published
        crop, count = recipes.published_crop(model.config), model.config.num_classes
        classes = data.class_names(data.imagenet_wnids()) if count == 1000 else [f"class {k}" for k in range(count)]
    if model.config.in_channels not in (1, 3):
        raise UserError(f"{weights} is a model of pictures with {model.config.in_channels} channels, and a photo has 3")
    image = evaluation_image(photo, model.config, crop)
    probabilities, likeliest = model(image).softmax(dim=1)[0].topk(min(5, model.config.num_classes))
    if not probabilities.isfinite().all():
        raise UserError(f"{weights} gives no finite answer for {photo}")
    names = [classes[index] for index in likeliest]
    shown = (image[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).squeeze(2)  # (S, S, 3), or (S, S) of a grey model
    figure = plots.explanation(shown.numpy(), names, probabilities.tolist(), class_token_maps(model, image, blocks))
    plots.save_figure(figure, out)
    return list(zip(names, probabilities.tolist()))


def parse(arguments=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m refiner_min.explain", description=__doc__.split("\n\n")[1])
    parser.add_argument("photo", metavar="PHOTO")
    parser.add_argument("--weights", metavar="PATH", default="ti", help="a best.pt or last.pt of refiner_min.train, "
                        "published weights, or the small ones that come with the package: ti, or plain-ti, a plain ViT "
                        "(default: ti)")
    parser.add_argument("--out", metavar="PNG", help="default: PHOTO's name with -explained.png, in this folder")
    parser.add_argument("--blocks", type=int, default=4, help="how many blocks to show (default: 4)")
    args = parser.parse_args(arguments)
    if args.blocks < 1:
        raise UserError(f"--blocks {args.blocks} must be at least 1")
    return args


def main(arguments=None) -> int:
    args = parse(arguments)
    out = Path(args.out or f"{Path(args.photo).stem}-explained.png")
    if out.resolve() == Path(args.photo).resolve():
        raise UserError(f"--out {out} is the photo itself")
    for name, probability in explain(args.photo, args.weights, out, args.blocks):
        print(f"{probability:7.2%}  {name}")
    print(f"drawn in {out}")
    return 0


if __name__ == "__main__":
    run_command(main)
