"""One straight run of two ranks that several files compare with."""

import pytest

from tests.parallel.torch_runtime.launches import config_of, launch
from tests.parallel.torch_runtime.records import packed


@pytest.fixture(scope="session")
def straight(tmp_path_factory):
    """12 steps of data 2, every rank with all parameters, saved every 4 steps while training goes on."""
    folder = tmp_path_factory.mktemp("straight")
    data = packed(folder / "records", documents=400, shards=2)
    order = [*config_of("pangu", data), "parallel.data=2", "parallel.backend=torch", "train.steps=12",
             "output.save_in_background=true"]
    return launch(order, folder / "straight", 2)
