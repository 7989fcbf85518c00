"""MindFormers' names of PanGu-alpha's settings. Imports no MindFormers."""

from __future__ import annotations

from typing import Any

from pangu.config import ModelConfig
from parallel.common.settings import validate

MODEL_TYPE = "pangu_alpha"
_FIELDS = {"num_layers": "layers", "hidden_size": "hidden_size", "intermediate_size": "ffn_size", "num_heads": "heads",
           "vocab_size": "vocabulary_size", "seq_length": "sequence_length", "dropout": "dropout",
           "final_norm": "final_norm", "gelu": "gelu", "softmax_compute_type": "softmax_dtype",
           "pad_token_id": "pad_id", "eos_token_id": "eot_id"}
"""Names of MindFormers to those of `ModelConfig`."""


def to_model_config(config: Any) -> ModelConfig:
    """The settings that a config of MindFormers means.

    Raises:
        UserError: a value that the model does not have.
    """
    values = {own: getattr(config, name) for name, own in _FIELDS.items() if hasattr(config, name)}
    values = {name: str(value).lower() if name == "softmax_dtype" else value for name, value in values.items()}
    return validate(ModelConfig, values, where="MindFormers config")
