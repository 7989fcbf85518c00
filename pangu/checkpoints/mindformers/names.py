"""MindFormers' names of PanGu-alpha's settings. Imports no MindFormers."""

from __future__ import annotations

from typing import Any

from pangu.config import ModelConfig
from parallel.common.errors import UserError
from parallel.common.settings import validate
from parallel.sharding.config import ParallelConfig

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


def to_parallel_config(config: Any) -> ParallelConfig:
    """The layout that MindFormers' `parallel_config` (an object or a dict) means.

    Optimizer sharding and the number of devices are settings of MindFormers' context, which it makes itself.

    Raises:
        UserError: an axis that the model does not have.
    """
    def value(name: str, default: Any) -> Any:
        found = config.get(name, default) if isinstance(config, dict) else getattr(config, name, default)
        return default if found is None else found

    for name in ("context_parallel", "expert_parallel"):
        if value(name, 1) != 1:
            raise UserError("the model has no such axis", where=f"parallel_config.{name}", value=value(name, 1),
                            hint="set it to 1")
    recompute = value("recompute", False)
    full = recompute.get("recompute", False) if isinstance(recompute, dict) else getattr(recompute, "recompute",
                                                                                         recompute)
    stages = value("pipeline_stage", 1)
    return ParallelConfig.model_validate({
        "data": value("data_parallel", 1), "op": value("model_parallel", 1),
        "sequence": bool(value("use_seq_parallel", False)), "vocabulary": not value("vocab_emb_dp", True),
        "pipeline": {"stages": stages, "micro_batches": value("micro_batch_num", 1) if stages > 1 else 1},
        "gradient_fusion_groups": value("gradient_aggregation_group", 4),
        "recompute": {"policy": "full" if full is True else "none"}})
