"""PanGu-alpha inside MindFormers 1.9.0, which dropped it after 1.3: config, model and tokenizer for its Auto classes,
its text generation pipeline and its Trainer.

    from pangu.checkpoints.mindformers import register
    register()
    model = mindformers.AutoModelForCausalLM.from_config(PanGuAlphaConfig(...))

The network is `pangu.model.PanGuAlpha` with its own parameter names, so a checkpoint of ours is a checkpoint of theirs.
docs/evaluation.md tells what that package lets one do on a CPU.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pangu.config import ModelConfig, check_layout
from parallel.common.errors import UserError
from parallel.sharding.config import ParallelConfig

MODEL_TYPE = "pangu_alpha"
_FIELDS = {"num_layers": "layers", "hidden_size": "hidden_size", "intermediate_size": "ffn_size", "num_heads": "heads",
           "vocab_size": "vocabulary_size", "seq_length": "sequence_length", "dropout": "dropout",
           "final_norm": "final_norm", "gelu": "gelu", "softmax_compute_type": "softmax_dtype",
           "pad_token_id": "pad_id", "eos_token_id": "eot_id"}
"""Names of MindFormers to ours."""


def to_model_config(config: Any) -> ModelConfig:
    """Our settings out of MindFormers' config.

    Raises:
        UserError: a value that the model does not have.
    """
    from parallel.common.settings import validate

    values = {ours: getattr(config, theirs) for theirs, ours in _FIELDS.items() if hasattr(config, theirs)}
    values = {name: str(value).lower() if name == "softmax_dtype" else value for name, value in values.items()}
    return validate(ModelConfig, values, where="MindFormers config")


def to_parallel_config(config: Any) -> ParallelConfig:
    """Our layout out of MindFormers' `parallel_config` (an object or a dict).

    Optimizer sharding and the number of devices are settings of its context, which it makes itself.

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


@cache
def register() -> tuple[type, type, type]:
    """Registers and returns (PanGuAlphaConfig, PanGuAlphaForCausalLM, PanGuAlphaTokenizer); once is enough.

    Raises:
        UserError: mindformers is not installed.
    """
    try:
        from mindformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
        from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
    except ImportError:
        raise UserError("this needs the package mindformers",
                        hint="pip install 'pangu-rankers[mindformers]'") from None
    config, model, tokenizer = _config_class(), _model_class(), _tokenizer_class()
    for kind, cls in ((MindFormerModuleType.CONFIG, config), (MindFormerModuleType.MODELS, model),
                      (MindFormerModuleType.TOKENIZER, tokenizer), (MindFormerModuleType.WRAPPER, _wrapper_class())):
        MindFormerRegister.register_cls(cls, kind)
    AutoConfig.register(MODEL_TYPE, config)
    AutoModel.register(config, model)
    AutoModelForCausalLM.register(config, model)
    AutoTokenizer.register(config, slow_tokenizer_class=tokenizer)
    return config, model, tokenizer


@cache
def _config_class() -> type:
    from mindformers.models.configuration_utils import PretrainedConfig
    from mindformers.modules.transformer.transformer import TransformerOpParallelConfig, default_transformer_config

    class PanGuAlphaConfig(PretrainedConfig):
        """Sizes of PanGu-alpha by MindFormers' names; see `pangu.config.ModelConfig` for what they mean."""

        model_type = MODEL_TYPE
        _support_list: list[str] = []

        def __init__(self, batch_size: int = 1, seq_length: int = 1024, vocab_size: int = 40000,
                     hidden_size: int = 2560, num_layers: int = 32, num_heads: int = 32,
                     intermediate_size: int | None = None, dropout: float = 0.1, final_norm: str = "before_query",
                     gelu: str = "tanh", softmax_compute_type: str = "float32", compute_dtype: str = "float16",
                     pad_token_id: int = 6, eos_token_id: int = 9, bos_token_id: int = 9, use_past: bool = False,
                     max_decode_length: int = 1024, top_k: int = 3, top_p: float = 1.0, do_sample: bool = False,
                     repetition_penalty: float = 1.0, seed: int = 1, checkpoint_name_or_path: str = "",
                     block_size: int = 16, num_blocks: int | None = None,
                     parallel_config: Any = default_transformer_config, **kwargs: Any) -> None:
            if isinstance(parallel_config, dict):
                parallel_config = TransformerOpParallelConfig(**parallel_config)
            super().__init__(pad_token_id=pad_token_id, eos_token_id=eos_token_id, bos_token_id=bos_token_id, **kwargs)
            given = {name: value for name, value in locals().items()
                     if name not in ("self", "kwargs", "__class__", "given", "TransformerOpParallelConfig")}
            for name, value in given.items():
                setattr(self, name, value)
            self.is_dynamic = False
            if num_blocks is None:  # of its own accounts of the cache; ours has a row a sequence
                self.num_blocks = batch_size * -(-seq_length // block_size) + 1

    return PanGuAlphaConfig


@cache
def _model_class() -> type:
    import mindspore as ms
    import numpy as np
    from mindformers.models.modeling_utils import PreTrainedModel
    from mindspore import Tensor, ops
    from mindspore.nn.utils import no_init_parameters

    from pangu.generation.kv_cache import CachedDecoder
    from pangu.model import PanGuAlpha
    from parallel.layers.loss import CrossEntropy, MaskedMean
    from parallel.layers.parameter import initialize

    class PanGuAlphaForCausalLM(PreTrainedModel):
        """Training: input_ids [B, S + 1] (or [B, S] with labels [B, S]) -> loss. Prediction: input_ids [B, S] -> logits
        [B S, V], tokens, mask, as MindFormers' generator wants them. With `use_past` it generates over the cache of
        `pangu.generation.kv_cache`: `batch_size` prompts are read once, then a token of each is read a step.

        Raises:
            UserError: values that the model does not have, or a layout that does not fit it.
        """

        config_class = _config_class()
        base_model_prefix = MODEL_TYPE
        _support_list: list[str] = []

        def __init__(self, config: Any) -> None:
            super().__init__(config, auto_prefix=False)
            sizes = to_model_config(config)
            dtype = getattr(ms, str(config.compute_dtype).lower())
            with no_init_parameters():
                self.network = PanGuAlpha(sizes, dtype)
            initialize(self.network, config.seed)
            # Names as on our disk: without the path of the wrapper.
            for item in self.network.get_parameters():
                item.name = item.name.removeprefix("network.")
            self.pad_id = sizes.pad_id
            # MindFormers' own (mint.argmax) has no CPU kernel.
            self.argmax = lambda logits, axis: ops.Argmax(axis=axis)(logits)
            self.cross_entropy, self.mean = CrossEntropy(sizes.vocabulary_size, axis="vocabulary"), MaskedMean()
            layout = to_parallel_config(config.parallel_config)
            check_layout(sizes, layout)
            _lay_out(self, layout)
            self.use_past, self.batch = bool(getattr(config, "use_past", False)), config.batch_size
            if self.use_past:
                self.decoder = CachedDecoder(self.network, self.batch, sizes.sequence_length, sizes.sequence_length)
                self.decoder.every = True  # of a prompt MindFormers picks the rows itself
            if config.checkpoint_name_or_path:
                self.load_checkpoint(config)

        def load_checkpoint(self, config: Any) -> None:
            """Our checkpoint folders by our reader, anything else by MindFormers'."""
            path = Path(config.checkpoint_name_or_path)
            if not path.is_dir():
                super().load_checkpoint(config)
                return
            from parallel.checkpoint.full import load_parameters

            load_parameters(path, list(self.network.get_parameters()))

        def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
            """MindFormers' own, given parameters: the bare data that it takes itself MindSpore 2.9 does not save."""
            if kwargs.get("save_json"):
                kwargs.setdefault("state_dict", {item.name: item for item in self.network.get_parameters()})
            super().save_pretrained(save_directory, *args, **kwargs)

        def prepare_inputs_for_predict_layout(self, input_ids: Any, **kwargs: Any) -> tuple:
            """Inputs from which MindFormers compiles prediction."""
            return (Tensor(input_ids, ms.int32),) + (None,) * 2

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

    return PanGuAlphaForCausalLM


def _lay_out(model: Any, layout: ParallelConfig) -> None:
    """Writes a layout on the model's cells: strategies, stages, fusion of gradients, recomputation. On one device it
    has no effect."""
    from parallel.sharding.layout import lay_out
    from parallel.sharding.parallelize import fuse_gradients, place_on_stages, recompute
    from parallel.sharding.trainable import Trainable

    network = model.network

    class Stack(Trainable):
        """What the network says of its cells, without being another network."""

        def pipeline_cells(self) -> list:
            *rest, last = network.pipeline_cells()
            return [*rest, [*last, model.cross_entropy, model.mean]]

        def shared_parameters(self) -> list:
            return [(network.embedding.word.table, [network.embedding, network.head])]

    lay_out(model, layout)
    for part in (place_on_stages, fuse_gradients, recompute):
        part(Stack(auto_prefix=False), layout)


@cache
def _wrapper_class() -> type:
    import mindspore
    from mindformers.wrapper.wrapper import MFTrainOneStepCell
    from mindspore import ops

    class PanGuTrainOneStepCell(MFTrainOneStepCell):
        """MindFormers' training step, which also runs on a CPU: `runner_wrapper: {type: PanGuTrainOneStepCell}`."""

    if mindspore.get_context("device_target") != "CPU":
        return PanGuTrainOneStepCell

    class OnCPU(PanGuTrainOneStepCell):
        """Looks for overflow in the gradients: the registers and kernels that MindFormers asks are not on a CPU."""

        def start_overflow_check(self, pre_cond: Any, compute_input: Any) -> tuple:
            return pre_cond, compute_input

        def get_overflow_status(self, status: Any, compute_output: tuple) -> Any:
            finite = ops.isfinite(compute_output[0]).all()
            for gradient in compute_output[1:]:
                finite = ops.logical_and(finite, ops.isfinite(gradient).all())
            return ops.logical_not(finite)

    OnCPU.__name__ = PanGuTrainOneStepCell.__name__
    return OnCPU


@cache
def _tokenizer_class() -> type:
    from mindformers.models.tokenization_utils import PreTrainedTokenizer

    from pangu.data.tokenizer import Tokenizer

    class PanGuAlphaTokenizer(PreTrainedTokenizer):
        """`pangu.data.tokenizer.Tokenizer` with MindFormers' interface; nothing is added before or after a text."""

        vocab_files_names = {"vocab_file": "tokenizer.model"}
        model_input_names = ["input_ids", "attention_mask"]
        FILE_LIST = ["tokenizer_config.json"]
        _support_list: list[str] = []

        def __init__(self, vocab_file: str, unk_token: str = "<unk>", eos_token: str = "<eot>",
                     pad_token: str = "<pad>", **kwargs: Any) -> None:
            self.vocab_file, self.pangu = vocab_file, Tokenizer(vocab_file)
            super().__init__(unk_token=unk_token, eos_token=eos_token, pad_token=pad_token, **kwargs)

        @property
        def vocab_size(self) -> int:
            """Pieces of the SentencePiece model."""
            return self.pangu.vocabulary_size

        def get_vocab(self) -> dict[str, int]:
            """Piece to id."""
            pieces = {self.pangu.id_piece(number): number for number in range(self.vocab_size)}
            return pieces | self.added_tokens_encoder

        def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
            return [self.pangu.id_piece(number) for number in self.pangu.encode(text)]

        def _convert_token_to_id(self, token: str) -> int:
            number = self.pangu.piece_id(token)
            return self.pangu.unknown_id if number is None else number

        def _convert_id_to_token(self, index: int) -> str:
            return self.pangu.id_piece(index)

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            """The text of pieces."""
            return self.pangu.decode(self._convert_token_to_id(token) for token in tokens)

        def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
            """Copies the SentencePiece model."""
            import shutil

            name = (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer.model"
            target = Path(save_directory) / name
            if target.resolve() != Path(self.vocab_file).resolve():
                shutil.copyfile(self.vocab_file, target)
            return (str(target),)

    return PanGuAlphaTokenizer
