"""Settings of the generation of text."""

from __future__ import annotations

from pydantic import Field, field_validator

from pangu.generation.sampling import SamplingRule
from parallel.common.settings import Settings

_MAX_BATCH = 256


class GenerateSettings(Settings):
    """How text is generated."""

    max_new_tokens: int = Field(128, ge=1)
    """Tokens generated per prompt at most; the model's sequence_length is a limit too."""
    temperature: float = Field(1.0, ge=0.0)
    """Logits are divided by this before sampling; 0 = greedy."""
    top_k: int = Field(0, ge=0)
    """Only the k most likely tokens may be drawn; 0 = all, 1 = greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Only the fewest tokens whose probability reaches p may be drawn (after top_k); 1 = all."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for every time it was already generated (prompt not counted; paper's code: 1.5)."""
    presence_penalty: float = 0.0
    """Taken once from the logits of tokens already generated (prompt not counted; paper's code: 0.3)."""
    stop_ids: list[int] | None = None
    """Tokens that end the text and are not part of it; null = model.eot_id."""
    stop: list[str] = []
    """Strings that end the text and are not part of it."""
    seed: int = Field(1, ge=0)
    """Seed of the sampling; each prompt has a random stream of its own."""
    batch_size: int = Field(8, ge=1, le=_MAX_BATCH)
    """Prompts generated together at most."""
    prefill_chunk: int = Field(64, ge=1)
    """Tokens of the prompts that are read at once, between two tokens of the others."""
    truncate: bool = False
    """A prompt that leaves no room for max_new_tokens loses its beginning; false: too long a prompt is an error."""

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError("an empty string would end every text at once")
        return stop

    def rule(self) -> SamplingRule:
        """The part that chooses tokens."""
        return SamplingRule(self.temperature, self.top_k, self.top_p, self.frequency_penalty, self.presence_penalty)
