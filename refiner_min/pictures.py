"""One picture from disk: read upright, squashed to a square; what cannot be read is refused in one sentence."""

import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from refiner_min import UserError

SKIP_HINT = "--skip-bad leaves such pictures out"  # what a command that can adds to the sentence


def read_picture(source, mode: str = "RGB") -> Image.Image:
    """A picture as mode, "RGB" or "L", upright. source: a path. UserError if it cannot be read."""
    try:
        with Image.open(source) as picture:
            return ImageOps.exif_transpose(picture).convert(mode)
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{source} is not a picture that can be read ({error})") from None


def squash(picture: Image.Image, size: int) -> torch.Tensor:
    """The whole picture as a square: (channels, size, size) uint8."""
    return pil_to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC))
