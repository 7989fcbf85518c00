"""Verb `convert`: checkpoints of other codes, converted both ways, one parameter in memory at a time.

Every parameter of the model must be in the source with the shape the config says, and every key of the source must be
mapped, or known to be no weight; otherwise nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pangu.checkpoints.mindspore_file import Entry, MindSporeFile, write_mindspore
from pangu.checkpoints.names import Key, keys
from pangu.checkpoints.slices import SlicedCheckpoint, SliceLayout, read_strategy, release_layouts, write_slices
from pangu.checkpoints.torch_file import TorchFile, write_megatron
from pangu.config import ModelConfig
from parallel.checkpoint.folder import FORMAT, PARAMETERS_FILE, VERSION
from parallel.checkpoint.safetensors_file import SafetensorsFile, write_safetensors
from parallel.checkpoint.sharded import Slices
from parallel.common.errors import UserError
from parallel.common.files import explain_os_error, write_json
from parallel.common.folders import sweep, temporary_name
from parallel.common.progress import Bar, info, table

if TYPE_CHECKING:
    from pangu.settings import Run

SLICED = "mindspore-512"
LAYOUTS = ("pangu", SLICED, "mindspore", "mindformers", "huggingface", "megatron")
DTYPES = {"fp32": "F32", "fp16": "F16"}
_NUMPY = {"F32": np.float32, "F16": np.float16}
# No weights: optimizer states and counters of MindSpore's training, PyTorch's buffers of masks.
_NO_WEIGHT = re.compile(r"^(adam_[mv]|moment[12s]?|accu_grads)\.|^(global_step|epoch_num|step_num|scale_sense|"
                        r"current_iterator_step|last_overflow_iterator_step|learning_rate|beta[12]_power|loss_scale)$|"
                        r"\.attn\.(masked_)?bias$")
# MindFormers' names of the tables once they were loaded from .npy.
_ALIASES = {"backbone.embedding.word_embedding.embedding_table": "word_embedding_table",
            "backbone.embedding.position_embedding.embedding_table": "position_embedding_table",
            "backbone.top_query_embedding.embedding_table": "query_embedding_table"}
_HEAD = "lm_head.weight"
_MAX_SHOWN = 5

Plan = list[tuple[str, str, tuple[int, ...], Callable[[], np.ndarray]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    add = parser.add_argument
    add("--from", dest="source", required=True, choices=LAYOUTS, help="layout of what is read")
    add("--to", dest="target", required=True, choices=LAYOUTS, help="layout of what is written")
    add("--input", metavar="PATH", help="checkpoint to read: a file or folder (not for mindspore-512)")
    add("--slices", metavar="DIR", help="mindspore-512: folder of the ranks' files")
    add("--strategy", metavar="FILE", help="mindspore-512: the strategy file (none: the published layout over "
        "64 x 8 ranks)")
    add("--embeddings", metavar="DIR", help="mindspore-512: folder of the three .npy tables (none: that of --slices)")
    add("--output", metavar="PATH", required=True, help="folder or file to write; must not exist. mindspore: a .ckpt; "
        "mindformers: a .ckpt or .safetensors; megatron: a .pt; else a folder")
    add("--dtype", choices=["keep", *DTYPES], default="keep", help="type of what is written (default: as read; the "
        "layout pangu is always fp32)")
    add("--allow-unmapped", action="store_true", help="go on when the source has keys that the model does not know")


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Verb `convert`: returns `parameters` (numbers), `mapped` and `unmapped` (tensors), `seconds`, `peak_rss_gb`.

    Raises:
        UserError: a file is missing or damaged; a parameter is missing or of another shape; keys left over.
    """
    began, config = time.perf_counter(), settings.model
    output = Path(arguments.output)
    if output.exists():
        raise UserError("it exists already", where="--output", value=str(output), hint="name a new one")
    mapping = Mapping(open_source(arguments, config), config, _naming(arguments.source))
    if mapping.unmapped and not arguments.allow_unmapped:
        raise UserError(f"{len(mapping.unmapped)} keys of the source belong to no parameter: "
                        f"{', '.join(mapping.unmapped[:_MAX_SHOWN])}", where=arguments.input or arguments.slices,
                        hint="is the config of another size? --allow-unmapped goes on without them")
    plan = mapping.plan(keys(config, _naming(arguments.target)), arguments.dtype, arguments.target)
    with Bar(len(plan), "convert") as bar:
        write(arguments, config, output, [_counted(item, bar) for item in plan])
    total = sum(int(np.prod(key.shape, dtype=np.int64)) for key in mapping.keys)
    mapping.report()
    return {"output": str(output), "parameters": total, "mapped": len(mapping.keys), "unmapped": len(mapping.unmapped),
            "unmapped_names": mapping.unmapped[:100], "ignored": len(mapping.ignored), "notes": mapping.notes,
            "seconds": round(time.perf_counter() - began, 2), "peak_rss_gb": round(peak_memory_gb(), 3)}


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far; its parent's, which getrusage may report, is left out."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / (1 << 20)
    except (OSError, TypeError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def _naming(layout: str) -> str:
    return "mindspore" if layout == SLICED else layout


def _counted(item: tuple, bar: Bar) -> tuple:
    name, dtype, shape, read = item

    def counted() -> np.ndarray:
        array = read()
        bar.advance()
        return array

    return name, dtype, shape, counted


# ---- reading

class Source(Protocol):
    """Parameters in somebody's layout.

    Attributes:
        entries: name -> something with `dtype` and `shape`.
    """

    entries: dict[str, Any]

    def read(self, name: str) -> np.ndarray:
        """One of them."""


def open_source(arguments: argparse.Namespace, config: ModelConfig) -> Source:
    """The checkpoint that `--from` names.

    Raises:
        UserError: flags that the layout needs are not given; files missing or damaged.
    """
    if arguments.source == SLICED:
        if not arguments.slices:
            raise UserError(f"--from {SLICED} needs --slices DIR", where="convert")
        shapes = {key.foreign: key.their_shape for key in keys(config, "mindspore")}
        return SlicedCheckpoint(arguments.slices, _layouts(arguments, config), arguments.embeddings, shapes)
    if not arguments.input:
        raise UserError(f"--from {arguments.source} needs --input PATH", where="convert")
    path = Path(arguments.input)
    if arguments.source == "pangu":
        return OwnCheckpoint(path)
    if path.is_dir():
        return ManyFiles(path)
    return open_file(path)


def _layouts(arguments: argparse.Namespace, config: ModelConfig) -> dict[str, SliceLayout]:
    return read_strategy(arguments.strategy) if arguments.strategy else release_layouts(config)


def open_file(path: Path) -> Source:
    """A file of tensors, by its suffix."""
    if path.suffix == ".safetensors":
        return SafetensorsFile(path)
    if path.suffix == ".ckpt":
        return MindSporeFile(path)
    if path.suffix in (".pt", ".bin", ".pth"):
        return TorchFile(path)
    raise UserError("unknown kind of file", where=path, value=path.suffix, hint="known: .safetensors .ckpt .pt .bin")


class OwnCheckpoint:
    """A checkpoint of this project as a source, full or in the slices of its ranks."""

    def __init__(self, path: Path) -> None:
        slices = Slices(path)
        self.entries = {name: Entry(slices.tensors[name].dtype, slices.tensors[name].shape)
                        for name in slices.names(PARAMETERS_FILE)}
        self.read = slices.read


class ManyFiles:
    """All tensor files of a folder as one: shards of Hugging Face, or Megatron's single rank."""

    def __init__(self, folder: Path) -> None:
        ranks = sorted(folder.glob("**/mp_rank_*/model_optim_rng.pt"))
        if len(ranks) > 1:
            raise UserError(f"the checkpoint is sharded over {len(ranks)} ranks", where=folder,
                            hint="merge it with Megatron's own tool; one rank is read")
        # Beside Hugging Face's shards of weights other .bin files may be (training_args.bin).
        patterns = ("*.safetensors", "pytorch_model*.bin", "*.bin", "*.ckpt", "*.pt")
        paths = ranks or next((found for pattern in patterns
                               if (found := sorted(folder.glob(pattern)))), [])
        if not paths:
            raise UserError("no checkpoint file here", where=folder, hint="known: .safetensors .bin .ckpt .pt")
        self._owner: dict[str, Any] = {}
        for file in map(open_file, paths):
            for name in file.entries:
                if name in self._owner:
                    raise UserError(f"two files hold '{name}'", where=folder)
                self._owner[name] = file
        self.entries = {name: file.entries[name] for name, file in self._owner.items()}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        return self._owner[name].read(name)


class Mapping:
    """Which key of a source is which parameter of `pangu.model`.

    Args:
        source: see `open_source`.
        config: of the model.
        naming: of the source, see `pangu.checkpoints.names`.

    Raises:
        UserError: a parameter is missing, or has another shape or a type that is no float.
    """

    def __init__(self, source: Source, config: ModelConfig, naming: str) -> None:
        self.source, self.keys, self.notes = source, keys(config, naming), []
        self._names = {key.name: self._source_name(key) for key in self.keys}
        missing = [key.foreign for key in self.keys if self._names[key.name] not in source.entries]
        if missing:
            raise UserError(f"the source lacks {len(missing)} of {len(self.keys)} parameters: "
                            f"{', '.join(missing[:_MAX_SHOWN])}", where=naming,
                            hint="check --from and the model settings of --config")
        for key in self.keys:
            self._check(key)
        used = set(self._names.values())
        rest = [name for name in source.entries if name not in used]
        self.ignored = [name for name in rest if _NO_WEIGHT.search(name) or self._is_tied_head(name)]
        self.unmapped = [name for name in rest if name not in set(self.ignored)]

    def _source_name(self, key: Key) -> str:
        alias = _ALIASES.get(key.foreign)
        return alias if key.foreign not in self.source.entries and alias in self.source.entries else key.foreign

    def _check(self, key: Key) -> None:
        name = self._names[key.name]
        entry = self.source.entries[name]
        if entry.dtype not in ("F32", "F16", "BF16"):
            raise UserError(f"'{name}' is of type {entry.dtype}, not a float", where="source")
        found, wanted = tuple(entry.shape), key.their_shape
        padded = key.foreign == "embedding.word_embeddings.weight"  # Megatron rounds the vocabulary up
        if padded and found[1:] == wanted[1:] and found[0] > wanted[0]:
            self.notes.append(f"{found[0] - wanted[0]} padding rows of {name} were left out")
        elif found != wanted:
            raise UserError(f"'{name}' has shape {list(found)} and the model wants {list(wanted)}", where="source",
                            hint="check the model settings of --config")

    def _is_tied_head(self, name: str) -> bool:
        """Whether it is the output table and equals the word embedding, as it must here."""
        if name != _HEAD:
            return False
        same = np.array_equal(self.source.read(name), self.source.read("transformer.wte.weight"))
        if not same:
            self.notes.append("lm_head differs from the word embedding, to which this model ties it")
        return same

    def plan(self, target: list[Key], dtype: str, layout: str) -> Plan:
        """What is to be written: their names, types, shapes and how each is read."""
        plan: Plan = []
        for key, goal in zip(self.keys, target, strict=True):
            own = self.source.entries[self._names[key.name]].dtype
            chosen = "F32" if layout == "pangu" else DTYPES.get(dtype, "F32" if own == "BF16" else own)
            plan.append((goal.foreign, chosen, goal.their_shape, self._reader(key, goal, chosen)))
        return plan

    def _reader(self, key: Key, goal: Key, dtype: str) -> Callable[[], np.ndarray]:
        name = self._names[key.name]

        def read() -> np.ndarray:
            array = self.source.read(name)
            if array.dtype == np.uint16:  # bfloat16 is the upper half of a float32
                array = (array.astype(np.uint32) << 16).view(np.float32)
            array = array[:key.their_shape[0]]
            if key.transposed != goal.transposed:
                array = array.T
            return np.ascontiguousarray(array, _NUMPY[dtype])

        return read

    def report(self) -> None:
        """What was mapped, by kind of parameter, for people."""
        rows: dict[str, list] = {}
        for key in self.keys:
            kind = re.sub(r"\.\d+\.", ".*.", key.name)
            row = rows.setdefault(kind, [kind, re.sub(r"\.\d+\.", ".*.", self._names[key.name]), list(key.shape),
                                         "transposed" if key.transposed else "", 0])
            row[-1] += 1
        table("Mapped", ["parameter", "source", "shape", "", "tensors"], rows.values())
        for line in self.notes:
            info(line)


# ---- writing

def write(arguments: argparse.Namespace, config: ModelConfig, output: Path, plan: Plan) -> None:
    """Writes `plan` in the target's layout; complete or absent.

    Raises:
        UserError: no space, no permission, a suffix that the layout does not have.
    """
    target = arguments.target
    if target in ("mindspore", "mindformers") and output.suffix == ".ckpt":
        write_mindspore(output, plan)
    elif target == "mindformers" and output.suffix == ".safetensors":
        _write_one_safetensors(output, plan)
    elif target == "megatron" and output.suffix == ".pt":
        with mapped(plan, output.parent) as there:
            write_megatron(output, there)
    elif target in ("mindspore", "mindformers", "megatron"):
        raise UserError("this layout is a file with the suffix .ckpt (mindspore, mindformers), .safetensors "
                        "(mindformers) or .pt (megatron)", where="--output", value=str(output))
    else:
        with _new_folder(output) as folder:
            _write_folder(arguments, config, folder, plan)


def _write_folder(arguments: argparse.Namespace, config: ModelConfig, folder: Path, plan: Plan) -> None:
    if arguments.target == SLICED:
        with mapped(plan, folder.parent) as there:
            write_slices(folder, _layouts(arguments, config), there)
    elif arguments.target == "huggingface":
        write_safetensors(folder / "model.safetensors", plan, {"format": "pt"})
        write_json(folder / "config.json", huggingface_config(config), sealed=False)
    else:
        checksums = write_safetensors(folder / PARAMETERS_FILE, plan)
        entries = {name: {"file": PARAMETERS_FILE, "dtype": dtype, "shape": list(shape), "crc32": checksums[name]}
                   for name, dtype, shape, _ in plan}
        write_json(folder / "layout.json", {"format": FORMAT, "version": VERSION, "tensors": entries})
        write_json(folder / "state.json", {"format": FORMAT, "version": VERSION, "step": 0,
                                           "converted_from": arguments.source})


def _write_one_safetensors(output: Path, plan: Plan) -> None:
    hidden = temporary_name(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(hidden, plan)
        hidden.replace(output)
    finally:
        hidden.unlink(missing_ok=True)


@contextlib.contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A hidden folder that replaces `output` when the block ends without an error."""
    hidden = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        sweep(output.parent)
        hidden = temporary_name(output)
        hidden.mkdir()
        yield hidden
        hidden.rename(output)
    except OSError as error:
        raise explain_os_error(error, output) from error
    finally:
        if hidden is not None:
            shutil.rmtree(hidden, ignore_errors=True)


@contextlib.contextmanager
def mapped(plan: Plan, folder: Path) -> Iterator[Plan]:
    """The same plan over a temporary file, of which each array is a map: reading often costs no memory."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert.", dir=folder) as place:
        path = Path(place) / "tensors.safetensors"
        write_safetensors(path, plan)
        file = SafetensorsFile(path)
        yield [(name, dtype, shape, lambda name=name: file.map(name)) for name, dtype, shape, _ in plan]


def huggingface_config(config: ModelConfig) -> dict:
    """`config.json` with the names of the GPT-2 family, which the port takes over."""
    gelu = {"tanh": "gelu_new", "erf": "gelu", "fast": "quick_gelu"}[config.gelu]
    return {"model_type": "gpt_pangu", "architectures": ["GPTPanguForCausalLM"], "vocab_size": config.vocabulary_size,
            "max_position_embeddings": config.sequence_length, "hidden_size": config.hidden_size,
            "intermediate_size": config.ffn, "num_layers": config.layers, "num_heads": config.heads,
            "activation_function": gelu, "layer_norm_epsilon": 1e-5, "bos_token_id": config.eot_id,
            "eos_token_id": config.eot_id, "pad_token_id": config.pad_id, "tie_word_embeddings": True,
            "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout}
