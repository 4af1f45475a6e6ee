"""One picture from disk: read upright, squashed to a square; what cannot be read is refused in one sentence."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torchvision.transforms.v2.functional import pil_to_tensor

from refiner_min import UserError

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")  # others, such as EPS, are read by running a program
SKIP_HINT = "--skip-bad leaves such pictures out"  # what a command that can adds to the sentence


def read_picture(source, mode: str = "RGB", enough=None) -> Image.Image:
    """A picture as mode, "RGB" or "L", upright; of 16 bits a channel the upper eight. source: a path. enough: (width,
    height) of the picture -> the smallest that will do; a JPEG that is at least two, four or eight times as large is
    decoded at that share of its size, which is faster. UserError if it cannot be read."""
    try:
        if not Path(source).is_file():  # a pipe would be waited for
            raise ValueError("no file, or a broken link" if os.path.lexists(source) else "there is no such file")
        with Image.open(source, formats=FORMATS) as picture:
            if enough is not None:
                _decode_smaller(picture, enough)
            ImageOps.exif_transpose(picture, in_place=True)
            picture = _in_eight_bits(picture)
            picture.load()
            return picture if picture.mode == mode else picture.convert(mode)  # a copy only where it is needed
    except Exception as error:  # Pillow's decoders raise many kinds
        raise UserError(f"{source} is not a picture that can be read ({error})") from None


def _decode_smaller(picture: Image.Image, enough):
    on_its_side = picture.getexif().get(ExifTags.Base.Orientation, 1) > 4
    width, height = enough(*picture.size[::-1 if on_its_side else 1])
    picture.draft(None, (height, width) if on_its_side else (width, height))  # does nothing to what is no JPEG


def _in_eight_bits(picture: Image.Image) -> Image.Image:
    """Pillow would cut values above 255 off. ValueError: values of no known range."""
    low, high = picture.getextrema() if picture.mode == "I" else (0, 0)
    if picture.mode == "F" or low < 0 or high >= 2**16:
        raise ValueError(f"what is black and white in mode {picture.mode} is not known")
    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))


def squash(picture: Image.Image, size: int) -> torch.Tensor:
    """The whole picture as a square: (channels, size, size) uint8."""
    return pil_to_tensor(picture.resize((size, size), Image.Resampling.BICUBIC))
