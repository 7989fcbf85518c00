"""What each world calls the parameters, and which way round it keeps matrices.

`pangu.model` keeps every matrix as [out, in]. The released MindSpore code keeps query, key and value so (`nn.Dense`)
and the other three as [in, out] (`Mapping`: x @ W); PyTorch's ports keep all as [out, in]. Sources: the strategy file
published with the 2.6B checkpoint for `mindspore`; MindFormers v1.0 for `mindformers`; imoneoi/transformers-pangu for
`huggingface`; the package pcl_pangu for `megatron`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pangu.config import ModelConfig
from parallel.common.errors import UserError

NAMINGS = ("pangu", "mindspore", "mindformers", "huggingface", "megatron")
_NORMS = {"gamma": "weight", "beta": "bias"}


@dataclass(frozen=True)
class Key:
    """One parameter: its name and shape here, its name there, and whether theirs is the transpose."""

    name: str
    shape: tuple[int, ...]
    foreign: str
    transposed: bool

    @property
    def their_shape(self) -> tuple[int, ...]:
        """Shape in their file."""
        return self.shape[::-1] if self.transposed else self.shape


def keys(config: ModelConfig, naming: str) -> list[Key]:
    """All parameters of a model in the order in which they are used.

    Raises:
        UserError: an unknown naming.
    """
    if naming not in NAMINGS:
        raise UserError("no such naming", value=naming, hint=f"known: {', '.join(NAMINGS)}")
    named = []
    for name, shape in shapes(config).items():
        theirs, transposed = _TRANSLATORS[naming](name, config)
        named.append(Key(name, shape, theirs, transposed))
    return named


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The model's parameters and their shapes, without building the model."""
    width, ffn, positions = config.hidden_size, config.ffn, config.sequence_length
    found: dict[str, tuple[int, ...]] = {"embedding.word.table": (config.vocabulary_size, width),
                                         "embedding.position.table": (positions, width)}
    layer: dict[str, tuple[int, ...]] = {"norm1.gamma": (width,), "norm1.beta": (width,)}
    for part in ("query", "key", "value", "output"):
        layer |= {f"attention.{part}.weight": (width, width), f"attention.{part}.bias": (width,)}
    layer |= {"norm2.gamma": (width,), "norm2.beta": (width,),
              "feed_forward.mapping.weight": (ffn, width), "feed_forward.mapping.bias": (ffn,),
              "feed_forward.projection.weight": (width, ffn), "feed_forward.projection.bias": (width,)}
    for number in range(config.layers - 1):
        found |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    found["query_embedding.table"] = (positions, width)
    found |= {f"query_layer.{name}": shape for name, shape in layer.items()}
    return found | {"norm.gamma": (width,), "norm.beta": (width,)}


def _block_and_rest(name: str) -> tuple[int | None, str]:
    """(block number, rest) of a parameter of a block; the query layer is block None; (-1, name) elsewhere."""
    if name.startswith("query_layer."):
        return None, name.removeprefix("query_layer.")
    if name.startswith("layers."):
        _, number, rest = name.split(".", 2)
        return int(number), rest
    return -1, name


# ---- the released code and MindFormers

_MINDSPORE_LAYER = {"norm1": "layernorm1", "norm2": "layernorm2", "attention.query": "attention.dense1",
                    "attention.key": "attention.dense2", "attention.value": "attention.dense3",
                    "attention.output": "attention.projection", "feed_forward.mapping": "output.mapping",
                    "feed_forward.projection": "output.projection"}
_MINDSPORE_IN_OUT = ("attention.output.weight", "feed_forward.mapping.weight", "feed_forward.projection.weight")


def _mindspore(name: str, config: ModelConfig, tables: str = "backbone.") -> tuple[str, bool]:
    number, rest = _block_and_rest(name)
    if number == -1:
        return {"embedding.word.table": f"{tables}word_embedding.embedding_table",
                "embedding.position.table": f"{tables}position_embedding.embedding_table",
                "query_embedding.table": "backbone.top_query_embedding.embedding_table",
                "norm.gamma": "backbone.layernorm.gamma", "norm.beta": "backbone.layernorm.beta"}[rest], False
    module, kind = rest.rsplit(".", 1)
    block = "backbone.top_query_layer" if number is None else f"backbone.blocks.{number}"
    return f"{block}.{_MINDSPORE_LAYER[module]}.{kind}", rest in _MINDSPORE_IN_OUT


def _mindformers(name: str, config: ModelConfig) -> tuple[str, bool]:
    return _mindspore(name, config, "backbone.embedding.")


# ---- PyTorch

_HUGGINGFACE_LAYER = {"norm1": "ln_1", "norm2": "ln_2", "attention.query": "attn.q_proj",
                      "attention.key": "attn.k_proj", "attention.value": "attn.v_proj",
                      "attention.output": "attn.c_proj",
                      "feed_forward.mapping": "mlp.c_fc", "feed_forward.projection": "mlp.c_proj"}
_MEGATRON_LAYER = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm",
                   "attention.query": "attention.query", "attention.key": "attention.key",
                   "attention.value": "attention.value", "attention.output": "attention.dense",
                   "feed_forward.mapping": "mlp.dense_h_to_4h", "feed_forward.projection": "mlp.dense_4h_to_h"}


def _torch(rest: str, block: str, layer: dict[str, str]) -> str:
    module, kind = rest.rsplit(".", 1)
    return f"{block}.{layer[module]}.{_NORMS.get(kind, kind)}"


def _huggingface(name: str, config: ModelConfig) -> tuple[str, bool]:
    number, rest = _block_and_rest(name)
    if number == -1:
        return {"embedding.word.table": "transformer.wte.weight", "embedding.position.table": "transformer.wpe.weight",
                "query_embedding.table": "transformer.wqe.weight", "norm.gamma": "transformer.ln_f.weight",
                "norm.beta": "transformer.ln_f.bias"}[rest], False
    # The query layer is the last block.
    block = f"transformer.h.{config.layers - 1 if number is None else number}"
    return _torch(rest, block, _HUGGINGFACE_LAYER), False


def _megatron(name: str, config: ModelConfig) -> tuple[str, bool]:
    number, rest = _block_and_rest(name)
    if number == -1:
        return {"embedding.word.table": "embedding.word_embeddings.weight",
                "embedding.position.table": "embedding.position_embeddings.weight",
                "query_embedding.table": "topQueryEmbedding.top_query_embeddings.weight",
                "norm.gamma": "transformer.final_layernorm.weight",
                "norm.beta": "transformer.final_layernorm.bias"}[rest], False
    return _torch(rest, "topQueryLayer" if number is None else f"transformer.layers.{number}", _MEGATRON_LAYER), False


_TRANSLATORS = {"pangu": lambda name, config: (name, False), "mindspore": _mindspore, "mindformers": _mindformers,
                "huggingface": _huggingface, "megatron": _megatron}
