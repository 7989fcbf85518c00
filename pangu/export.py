"""Verb `export`: PanGu-alpha's reading of a prompt and its single step as MindIR files, which MindSpore loads and runs
without this code.

    DIR/prefill.mindir    `prompt_tokens` new tokens of each sequence
    DIR/decode.mindir     one new token of each
    DIR/language_model.json    inputs, outputs and sizes
    DIR/<vocabulary>      the tokenizer's model, where the run has one

Both take and return the keys and values, so that they share them: ids [B, S] and start [B] (position of each
sequence's first new token), last [B] (which of the S is the last real one), keys and values [L, B H C, K], as the call
before returned them (zeros at first) -> logits [B, V] of the token after the last one, keys, values. A prompt longer
than S is read by several calls.

Shapes: as in `pangu.generation.kv_cache`; L layers.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype

from pangu.generation.backend import load_model
from pangu.generation.kv_cache import CachedDecoder
from parallel.checkpoint.folder import resolve_checkpoint
from parallel.common.errors import UserError
from parallel.common.files import write_json
from parallel.common.progress import table
from parallel.interchange.mindir import Loaded, plain_operations, write
from parallel.interchange.ports import Port
from parallel.training.device import start_device

if TYPE_CHECKING:
    from pangu.settings import Run

TOLERANCE = 1e-5
_CHECKED_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="folder of the exported model")
    add("--checkpoint", metavar="DIR", help="checkpoint to export (none: the newest of output.directory)")
    add("--format", choices=["mindir"], default="mindir", help="of the graphs (mindir)")
    add("--sequences", type=int, default=1, help="sequences of a call (default 1)")
    add("--prompt-tokens", type=int, default=32, help="tokens that prefill reads at once (default 32)")


class PassedDecoder(nn.Cell):
    """`CachedDecoder` with its cache as inputs and outputs.

    Args:
        decoder: whose layers are used.
    """

    def __init__(self, decoder: CachedDecoder) -> None:
        super().__init__(auto_prefix=False)
        self.decoder, self.model = decoder, decoder.model
        shape = decoder.query_layer.cache.shape
        self.shape, self.batch = shape, decoder.batch
        self.write = ops.TensorScatterUpdate()
        self.layers = nn.CellList([*decoder.model.layers, decoder.model.query_layer], auto_prefix=False)
        self.stack = ops.Stack()
        self.set_train(False)

    def construct(self, ids_BS: Tensor, start_B: Tensor, last_B: Tensor, keys_LRK: Tensor, values_LRK: Tensor) -> tuple:
        decoder, model, length = self.decoder, self.model, ids_BS.shape[1]
        slots_BS = start_B.reshape((-1, 1)) + decoder.slots_C[:length]
        rows = (decoder.first_BH1 + slots_BS.reshape((self.batch, 1, length))).reshape((-1,))
        bias_B1SC = decoder.bias(slots_BS)
        positions_BS = ops.minimum(slots_BS, decoder.last_position)
        hidden_ND = model.embedding(ids_BS, positions_BS)
        keys, values = (), ()
        for index in range(len(self.layers)):
            query_ND = None
            if index == len(self.layers) - 1:
                if model.norm_first:
                    hidden_ND = model.norm(hidden_ND)
                query_ND = ops.cast(model.query_embedding(positions_BS), model.compute_dtype)
            hidden_ND, key_RK, value_RK = self.layer(self.layers[index], hidden_ND, bias_B1SC, rows, query_ND,
                                                     keys_LRK[index], values_LRK[index])
            keys, values = (*keys, key_RK), (*values, value_RK)
        if length > 1:
            hidden_ND = decoder.gather(hidden_ND, last_B + Tensor(np.arange(self.batch, dtype=np.int32) * length), 0)
        if not model.norm_first:
            hidden_ND = model.norm(hidden_ND)
        return ops.cast(model.logits(hidden_ND), mstype.float32), self.stack(keys), self.stack(values)

    def layer(self, layer: Any, hidden_ND: Tensor, bias_B1SC: Tensor, rows: Tensor, query_ND: Tensor | None,
              key_RK: Tensor, value_RK: Tensor) -> tuple:
        """One `CachedLayer` with the rows that hold its keys and values; (hidden_ND, key_RK, value_RK)."""
        attention = layer.attention
        normed_ND = layer.norm1(hidden_ND)
        if query_ND is None:
            query_ND = normed_ND
        query_BHSK = attention.to_heads(attention.query(query_ND), self.batch)
        key_RK = self.put(key_RK, attention.key(normed_ND), rows)
        value_RK = self.put(value_RK, attention.value(normed_ND), rows)
        mixed_BHSK = attention.core(query_BHSK, key_RK.reshape(self.shape), value_RK.reshape(self.shape), bias_B1SC)
        hidden_ND = layer.add1(hidden_ND, attention.output(attention.from_heads(mixed_BHSK)))
        return layer.add2(hidden_ND, layer.feed_forward(layer.norm2(hidden_ND))), key_RK, value_RK

    def put(self, cache_RK: Tensor, new_ND: Tensor, rows: Tensor) -> Tensor:
        """cache_RK with the new keys or values in their rows."""
        new_BHSK = self.model.query_layer.attention.to_heads(new_ND, self.batch)
        return self.write(cache_RK, rows.reshape((-1, 1)), new_BHSK.reshape((-1, self.shape[3])))


def run(settings: Run, arguments: argparse.Namespace) -> dict[str, Any]:
    """Verb `export`.

    Raises:
        UserError: no checkpoint, int8 weights, sizes that do not fit the context, or logits that differ.
    """
    start_device()
    config, width = settings.model, arguments.prompt_tokens
    if not 1 < width <= config.sequence_length:
        raise UserError(f"between 2 and the {config.sequence_length} tokens of the context", where="--prompt-tokens",
                        value=width)
    if arguments.sequences < 1:
        raise UserError("at least 1", where="--sequences", value=arguments.sequences)
    path, folder = resolve_checkpoint(arguments.checkpoint or settings.output.directory), Path(arguments.output)
    capacity = -(-config.sequence_length // width) * width + width  # padding has slots of its own
    with plain_operations():
        model = load_model(settings, path)
        if model.int8:
            raise UserError("int8 weights need this code's kernels", where="--checkpoint", value=str(path),
                            hint="export the checkpoint that was quantized")
        cell = PassedDecoder(CachedDecoder(model, arguments.sequences, capacity, width))
        ports = {name: ports_of(config, arguments.sequences, capacity, tokens, str(model.compute_dtype).lower())
                 for name, tokens in (("prefill", width), ("decode", 1))}
        size = sum(write(folder / f"{name}.mindir", cell, inputs) for name, (inputs, _) in ports.items())
    write_json(folder / "language_model.json", {
        "model": config.model_dump(mode="json"), "checkpoint": path.name, "capacity": capacity,
        "graphs": {name: {"file": f"{name}.mindir", "inputs": [port.described() for port in inputs],
                          "outputs": [port.described() for port in outputs]}
                   for name, (inputs, outputs) in ports.items()}}, sealed=False)
    tokenizer = Path(settings.data.tokenizer)
    if tokenizer.is_file():
        shutil.copyfile(tokenizer, folder / tokenizer.name)
    difference = check(model, ExportedDecoder(folder), config)
    figures = {"format": "mindir", "bytes": size, "max_difference": difference, "checkpoint": str(path),
               "output": str(folder)}
    table("Exported", ["figure", "value"], figures.items())
    return figures


def ports_of(config: Any, batch: int, capacity: int, tokens: int, dtype: str) -> tuple[list[Port], list[Port]]:
    """Inputs and outputs of a graph that reads so many new tokens of each sequence."""
    rows = (config.layers, batch * config.heads * capacity, config.hidden_size // config.heads)
    cache = [Port(name, dtype, rows) for name in ("keys", "values")]
    return ([Port("ids", "int32", (batch, tokens)), Port("start", "int32", (batch,)), Port("last", "int32", (batch,)),
             *cache], [Port("logits", "float32", (batch, config.vocabulary_size)), *cache])


class ExportedDecoder:
    """An exported folder, as another program would use it.

    Args:
        folder: what the verb wrote.
    """

    def __init__(self, folder: Path) -> None:
        from parallel.common.files import read_json

        self.about = read_json(folder / "language_model.json")
        graphs = self.about["graphs"]
        self.graphs = {name: Loaded(folder / own["file"]) for name, own in graphs.items()}
        cache = graphs["decode"]["inputs"][3]
        self.batch, self.width = graphs["prefill"]["inputs"][0]["shape"]
        self.keys = self.values = np.zeros(cache["shape"], cache["type"])

    def read(self, ids_BS: np.ndarray, start: int) -> np.ndarray:
        """logits [B, V] after all of `ids_BS`, which begin at position `start`."""
        logits, length = None, ids_BS.shape[1]
        for begin in range(0, length, self.width if length > 1 else 1):
            part = ids_BS[:, begin:begin + self.width]
            name, real = ("prefill" if length > 1 else "decode"), part.shape[1]
            if name == "prefill":
                part = np.pad(part, ((0, 0), (0, self.width - real)))
            whole = [np.full(self.batch, value, np.int32) for value in (start + begin, real - 1)]
            logits, self.keys, self.values = self.graphs[name].all(part.astype(np.int32), *whole, self.keys,
                                                                   self.values)
        return logits

    def greedy(self, ids_BS: np.ndarray, count: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """The likeliest next tokens [B, count], and the logits that they were taken from."""
        found, logits = [], [self.read(ids_BS, 0)]
        for number in range(count):
            found.append(logits[-1].argmax(-1))
            if number + 1 < count:
                logits.append(self.read(found[-1][:, None], ids_BS.shape[1] + number))
        return np.stack(found, 1), logits


def check(model: Any, exported: ExportedDecoder, config: Any) -> float:
    """The largest difference between the logits of greedy generation by the loaded files and those of the model
    without a cache.

    Raises:
        UserError: they differ.
    """
    prompt = min(exported.width + 3, config.sequence_length - _CHECKED_TOKENS)
    ids_BS = np.random.default_rng(1).integers(0, config.vocabulary_size, (exported.batch, prompt)).astype(np.int32)
    tokens, logits = exported.greedy(ids_BS, _CHECKED_TOKENS)
    whole = np.concatenate([ids_BS, tokens.astype(np.int32)], 1)
    positions = np.broadcast_to(np.arange(whole.shape[1], dtype=np.int32), whole.shape)
    wanted = model(Tensor(whole), Tensor(positions.copy()), Tensor(np.zeros_like(whole))).astype(ms.float32).asnumpy()
    wanted = wanted.reshape(*whole.shape, -1)
    difference = max(float(np.abs(own - wanted[:, prompt - 1 + number]).max()) for number, own in enumerate(logits))
    bound = TOLERANCE if str(model.compute_dtype) == "Float32" else 1e-2
    if not difference <= bound * max(1.0, float(np.abs(wanted).max())):
        raise UserError("the exported model does not answer as the checkpoint does", where="export", value=difference)
    return difference
