"""PanGu-alpha's config as MindFormers wants it."""

from __future__ import annotations

from typing import Any

from mindformers.models.configuration_utils import PretrainedConfig
from mindformers.modules.transformer.transformer import TransformerOpParallelConfig, default_transformer_config

from pangu.checkpoints.mindformers.names import MODEL_TYPE

_DEFAULTS: dict[str, Any] = {
    "batch_size": 1, "seq_length": 1024, "vocab_size": 40000, "hidden_size": 2560, "num_layers": 32, "num_heads": 32,
    "intermediate_size": None, "dropout": 0.1, "final_norm": "before_query", "gelu": "tanh",
    "softmax_compute_type": "float32", "compute_dtype": "float16", "pad_token_id": 6, "eos_token_id": 9,
    "bos_token_id": 9, "use_past": False, "max_decode_length": 1024, "top_k": 3, "top_p": 1.0, "do_sample": False,
    "repetition_penalty": 1.0, "seed": 1, "checkpoint_name_or_path": "", "parallel_config": default_transformer_config,
    "block_size": 16, "num_blocks": None,
}  # fmt: skip
_OF_MINDFORMERS = ("pad_token_id", "eos_token_id", "bos_token_id")


class PanGuAlphaConfig(PretrainedConfig):
    """Sizes of PanGu-alpha by MindFormers' names; see `pangu.config.ModelConfig` for what they mean.

    Args:
        values: of the keys above, whose defaults are those of 2.6B; others are MindFormers' own.
    """

    model_type = MODEL_TYPE
    _support_list: list[str] = []

    def __init__(self, **values: Any) -> None:
        own = {name: values.pop(name, default) for name, default in _DEFAULTS.items()}
        if isinstance(own["parallel_config"], dict):
            own["parallel_config"] = TransformerOpParallelConfig(**own["parallel_config"])
        if own["num_blocks"] is None:  # for MindFormers' accounts of the cache, which has a row a sequence here
            own["num_blocks"] = own["batch_size"] * -(-own["seq_length"] // own["block_size"]) + 1
        super().__init__(**{name: own[name] for name in _OF_MINDFORMERS}, **values)
        for name, value in own.items():
            setattr(self, name, value)
        self.is_dynamic = False
