"""What tests of the openmoji world share: the drawings made for them, and their reader."""

import own_drawings
import pytest

from danceopd.worlds.openmoji.drawings import Drawings
from danceopd.worlds.openmoji.read import Reader


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    return Drawings(own_drawings.write(tmp_path_factory.mktemp("own") / "drawings"), own_drawings.KINDS)


@pytest.fixture(scope="session")
def reader(drawings):
    return Reader(drawings)
