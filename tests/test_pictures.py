"""pictures.py: every kind of picture is read, upright, and what is none is refused."""

import numpy as np
import pytest
from PIL import Image

from refiner_min.pictures import read_picture


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "RGB"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new("RGB", (8, 4), (255, 255, 255)).convert(mode).save(path)
    picture = read_picture(path)
    assert (picture.mode, picture.size) == ("RGB", (8, 4))
    assert np.asarray(picture).min() > 250
    assert read_picture(path, "L").mode == "L"


def test_a_photo_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (8, 4)).save(tmp_path / "photo.jpg", exif=exif)
    assert read_picture(tmp_path / "photo.jpg").size == (4, 8)
