"""What tests of several modules start from: an empty folder, a small set of pictures and its label maps."""

import pytest

from tests.pictures import make_folder, names_of, pack_labels, random_labels


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("pictures") / "set", train=8, val=4)


@pytest.fixture(scope="session")
def labels(pictures, tmp_path_factory):
    return str(pack_labels(tmp_path_factory.mktemp("labels") / "store", names_of(pictures), *random_labels(24)))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
