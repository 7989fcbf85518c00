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
