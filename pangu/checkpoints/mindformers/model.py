"""PanGu-alpha as a model of MindFormers, and MindFormers' training step on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindformers.models.modeling_utils import PreTrainedModel
from mindformers.wrapper.wrapper import MFTrainOneStepCell
from mindspore import Tensor, ops
from mindspore.nn.utils import no_init_parameters

from pangu.checkpoints.mindformers.config import PanGuAlphaConfig
from pangu.checkpoints.mindformers.names import MODEL_TYPE, to_model_config, to_parallel_config
from pangu.config import check_layout
from pangu.generation.kv_cache import CachedDecoder
from pangu.model import PanGuAlpha
from parallel.checkpoint.full import load_parameters
from parallel.common.errors import UserError
from parallel.layers.loss import CrossEntropy, MaskedMean
from parallel.layers.parameter import initialize
from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import apply_sharding
from parallel.sharding.parallelize import fuse_gradients, place_on_stages, recompute
from parallel.sharding.trainable import Trainable


class PanGuAlphaForCausalLM(PreTrainedModel):
    """Training: input_ids [B, S + 1] (or [B, S] with labels [B, S]) -> loss. Prediction: input_ids [B, S] -> logits
    [B S, V], tokens, mask, as MindFormers' generator wants them. With `use_past` it generates over the cache of
    `pangu.generation.kv_cache`: `batch_size` prompts are read once, then a token of each is read a step.

    Raises:
        UserError: values that the model does not have, or a layout that does not fit it.
    """

    config_class = PanGuAlphaConfig
    base_model_prefix = MODEL_TYPE
    _support_list: list[str] = []

    def __init__(self, config: Any) -> None:
        super().__init__(config, auto_prefix=False)
        sizes = to_model_config(config)
        dtype = getattr(ms, str(config.compute_dtype).lower())
        with no_init_parameters():
            self.network = PanGuAlpha(sizes, dtype)
        initialize(self.network, config.seed)
        # Names as in checkpoints of `pangu train`: without the path of the wrapper.
        for item in self.network.get_parameters():
            item.name = item.name.removeprefix("network.")
        self.pad_id = sizes.pad_id
        # MindFormers' own (mint.argmax) has no CPU kernel.
        self.argmax = lambda logits, axis: ops.Argmax(axis=axis)(logits)
        self.cross_entropy, self.mean = CrossEntropy(sizes.vocabulary_size, axis="vocabulary"), MaskedMean()
        layout = to_parallel_config(config.parallel_config)
        check_layout(sizes, layout)
        self.apply_layout(layout)
        self.use_past, self.batch = bool(getattr(config, "use_past", False)), config.batch_size
        if self.use_past:
            self.decoder = CachedDecoder(self.network, self.batch, sizes.sequence_length, sizes.sequence_length)
            self.decoder.every = True  # of a prompt MindFormers picks the rows itself
        if config.checkpoint_name_or_path:
            self.load_checkpoint(config)

    def load_checkpoint(self, config: Any) -> None:
        """Folders of `pangu train` by its own reader, anything else by MindFormers'."""
        path = Path(config.checkpoint_name_or_path)
        if not path.is_dir():
            super().load_checkpoint(config)
            return
        load_parameters(path, list(self.network.get_parameters()))

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        """MindFormers' own, given parameters: the bare data that it takes itself MindSpore 2.9 does not save."""
        if kwargs.get("save_json"):
            kwargs.setdefault("state_dict", {item.name: item for item in self.network.get_parameters()})
        super().save_pretrained(save_directory, *args, **kwargs)

    def prepare_inputs_for_predict_layout(self, input_ids: Any, **kwargs: Any) -> tuple:
        """Inputs from which MindFormers compiles prediction."""
        return (Tensor(input_ids, ms.int32),) + (None,) * 2

    def apply_layout(self, layout: ParallelConfig) -> None:
        """Writes a layout on the cells: strategies, stages, fusion of gradients, recomputation. On one device it has no
        effect."""
        apply_sharding(self, layout)
        stack = _Stack(self)
        for part in (place_on_stages, fuse_gradients, recompute):
            part(stack, layout)

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict:
        """MindFormers' own; the cache has `batch_size` rows."""
        if self.use_past and len(input_ids) != self.batch:
            raise UserError("the cache has a row for each prompt of a batch", where="batch_size", value=self.batch,
                            hint=f"make the model with batch_size={len(input_ids)}, or give as many prompts")
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def construct(self, input_ids: Tensor, labels: Tensor | None = None, attention_mask: Tensor | None = None,
                  position_ids: Tensor | None = None, batch_valid_length: Tensor | None = None,
                  block_tables: Tensor | None = None, slot_mapping: Tensor | None = None) -> Any:
        if batch_valid_length is not None:  # a step of its generator with use_past
            last_B = batch_valid_length.reshape((-1,)) - 1
            start_B = last_B if input_ids.shape[1] == 1 else ops.zeros_like(last_B)
            logits_NV, _ = self.decoder(input_ids, start_B, last_B)
            return logits_NV, input_ids, ops.cast(ops.not_equal(input_ids, self.pad_id), ms.float32)
        if self.training and labels is None:
            labels = input_ids[:, 1:]
            input_ids = input_ids[:, :-1]
        batch, length = input_ids.shape
        if position_ids is None:
            row_S = Tensor(np.arange(length, dtype=np.int32))
            position_ids = ops.broadcast_to(row_S.reshape((1, -1)), (batch, length))
        if attention_mask is None:
            causal_SS = Tensor(np.tril(np.ones((1, length, length), np.float32)))
            attention_mask = ops.broadcast_to(causal_SS, (batch, length, length))
        logits_NV = self.network(input_ids, position_ids, attention_mask)
        counted_BS = ops.cast(ops.not_equal(input_ids, self.pad_id), ms.float32)
        if not self.training:
            return ops.cast(logits_NV, ms.float32), input_ids, counted_BS
        nll_N = self.cross_entropy(logits_NV, labels.reshape((-1,)))
        return self.mean(nll_N, counted_BS.reshape((-1,)))[0]


class _Stack(Trainable):
    """What a model says of its cells, without being another network."""

    def __init__(self, model: PanGuAlphaForCausalLM) -> None:
        super().__init__(auto_prefix=False)
        self.of = (model,)  # no child cell of this one

    def pipeline_cells(self) -> list:
        """See `Trainable`."""
        model = self.of[0]
        *rest, last = model.network.pipeline_cells()
        return [*rest, [*last, model.cross_entropy, model.mean]]

    def shared_parameters(self) -> list:
        """See `Trainable`."""
        network = self.of[0].network
        return [(network.embedding.word.table, [network.embedding, network.head])]


class PanGuTrainOneStepCell(MFTrainOneStepCell):
    """MindFormers' training step, which also runs on a CPU: `runner_wrapper: {type: PanGuTrainOneStepCell}`."""


class _StepOnCPU(PanGuTrainOneStepCell):
    """Looks for overflow in the gradients: the registers and kernels that MindFormers asks are not on a CPU."""

    def start_overflow_check(self, pre_cond: Any, compute_input: Any) -> tuple:
        return pre_cond, compute_input

    def get_overflow_status(self, status: Any, compute_output: tuple) -> Any:
        finite = ops.isfinite(compute_output[0]).all()
        for gradient in compute_output[1:]:
            finite = ops.logical_and(finite, ops.isfinite(gradient).all())
        return ops.logical_not(finite)


_StepOnCPU.__name__ = PanGuTrainOneStepCell.__name__  # the name under which MindFormers finds it


def train_cell() -> type[PanGuTrainOneStepCell]:
    """The class of training steps for this device."""
    return _StepOnCPU if ms.get_context("device_target") == "CPU" else PanGuTrainOneStepCell
