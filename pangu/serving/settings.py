"""Keys of `python -m pangu serve`. Needs no MindSpore."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pangu.serving.engine_settings import EngineSettings
from parallel.serving.settings import HttpSettings


class ServeSettings(HttpSettings):
    """The HTTP server of the language model. On the command line of `serve` the block's name may be left out:
    port=8000."""

    name: str | None = Field(None, min_length=1, max_length=200)
    """What clients call the model; null = model.name."""
    chat_template: str | None = None
    """Jinja file that turns `messages` into a prompt; null = pangu/serving/chat.jinja."""
    chat_stop: list[Annotated[str, Field(min_length=1, max_length=1000)]] = ["\n问：", "\n答："]
    """Strings that end an answer in a chat, beside those that the client sends."""
    engine: EngineSettings = EngineSettings()
    """Batch, cache and queue."""
    max_sequences: int = Field(256, ge=1)
    """Prompts of one request times its best_of at most."""
    max_logprobs: int = Field(20, ge=0)
    """Alternatives a token that a client may ask for."""
