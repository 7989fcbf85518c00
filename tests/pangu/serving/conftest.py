"""What the tests of serving share."""

from __future__ import annotations

import pytest

from pangu.data.tokenizer import Tokenizer
from tests.pangu.serving.servers import write_vocabulary


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A small vocabulary without byte pieces, as the published one."""
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "v.model"))


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory):
    """One with byte pieces."""
    return Tokenizer(write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "bytes.model", bytes_too=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run with a checkpoint of random weights, its settings)."""
    from pangu.settings import Run
    from parallel.checkpoint.full import save_checkpoint
    from parallel.common.settings import to_yaml
    from tests.pangu.tiny import tiny_model

    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer(write_vocabulary(folder / "v.model"))
    model = tiny_model(4, vocabulary_size=tokenizer.vocabulary_size, sequence_length=64)
    settings = Run(model=model.config, data={"tokenizer": str(folder / "v.model")},
                   output={"directory": str(folder / "train")})
    save_checkpoint(folder / "train" / "checkpoints", 1, list(model.get_parameters()), (),
                    {"run": settings.model_dump(mode="json")})
    (folder / "run.yaml").write_text(to_yaml(settings))
    return folder, settings
