"""pictures.py: every kind of picture is read, upright, and what is none is refused."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from refiner_min import UserError
from refiner_min.pictures import read_picture, squash


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


@pytest.mark.parametrize("kind, enough, size", [
    ("jpg", (80, 60), (80, 60)), ("jpg", (81, 60), (160, 120)), ("jpg", (161, 1), (320, 240)),
    ("jpg", (1, 1), (40, 30)), ("png", (40, 30), (320, 240))])
def test_no_more_of_a_jpeg_is_decoded_than_is_enough(tmp_path, kind, enough, size):
    """Its size is that of the upright picture, before and after."""
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = Image.fromarray(colours).resize((320, 240) if orientation == 1 else (240, 320))
        stored.save(tmp_path / f"photo.{kind}", exif=exif, quality=95)
        picture = read_picture(tmp_path / f"photo.{kind}", enough=lambda *all: enough if all == (320, 240) else None)
        assert picture.size == size
        whole = read_picture(tmp_path / f"photo.{kind}").resize(size, Image.Resampling.BOX)
        assert np.abs(np.asarray(picture).astype(int) - np.asarray(whole)).mean() < 2


@pytest.mark.parametrize("values, expected", [(0, 0), (65535, 255), (256 * 100 + 7, 100), (255, 0)])
def test_sixteen_bits_are_scaled(tmp_path, values, expected):
    Image.fromarray(np.full((4, 8), values, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.full((4, 8), values, dtype=np.int32)).save(tmp_path / "deep.tif")
    for name in ("deep.png", "deep.tif"):
        picture = read_picture(tmp_path / name)
        assert (picture.mode, picture.size) == ("RGB", (8, 4)) and (np.asarray(picture) == expected).all()


@pytest.mark.parametrize("pixels", [np.full((4, 8), 0.5, dtype=np.float32), np.full((4, 8), 70_000, dtype=np.int32),
                                    np.full((4, 8), -1, dtype=np.int32)])
def test_values_of_no_known_range_are_refused(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "values.tif")
    with pytest.raises(UserError, match="values.tif is not a picture .*what is black and white in mode"):
        read_picture(tmp_path / "values.tif")


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    for name in ("pipe.png", "folder.png", "link.png"):
        with pytest.raises(UserError, match="no file, or a broken link"):
            read_picture(tmp_path / name)
    with pytest.raises(UserError, match="there is no such file"):
        read_picture(tmp_path / "none.png")


def test_a_name_of_any_bytes_is_read_or_named(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")
    Image.new("RGB", (8, 4)).save(path)
    assert read_picture(path).size == (8, 4)
    Path(path).write_bytes(b"no picture")
    with pytest.raises(UserError) as told:
        read_picture(path)
    str(told.value).encode()  # can be printed


def test_an_animation_is_read_as_its_first_picture_and_a_sliver_whole(tmp_path):
    frames = [Image.new("RGB", (8, 4), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(read_picture(tmp_path / "moving.gif"))[0, 0, 0] > 190
    Image.new("RGB", (1, 5000)).save(tmp_path / "sliver.png")
    assert squash(read_picture(tmp_path / "sliver.png"), 16).shape == (3, 16, 16)


def test_a_format_that_runs_a_program_is_refused(tmp_path, monkeypatch):
    path, run = tmp_path / "photo.jpg", []
    Image.new("RGB", (8, 4)).save(path, "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *words: run.append(words))
    with pytest.raises(UserError, match="photo.jpg is not a picture that can be read"):
        read_picture(path)
    assert not run
    photo = Image.new("RGB", (8, 4))
    photo.save(path, "MPO", save_all=True, append_images=[photo])  # what some cameras call a JPEG
    assert read_picture(path).size == (8, 4)


def test_a_size_that_no_memory_holds_is_refused_before_it_is_decoded(tmp_path):
    Image.new("L", (8, 4)).save(tmp_path / "bomb.png")
    content = bytearray((tmp_path / "bomb.png").read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "bomb.png").write_bytes(content)
    with pytest.raises(UserError, match="bomb.png is not a picture .*3600000000 pixels"):
        read_picture(tmp_path / "bomb.png")
