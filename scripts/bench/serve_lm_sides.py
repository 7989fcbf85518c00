"""The sides of `serve_lm_load.py`: how each server is started on a decoder of GPT-2's sizes with random weights."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYERS, WIDTH, HEADS, VOCABULARY, CONTEXT = 12, 768, 12, 50257, 1024
Command = tuple[list[str], dict[str, str], str]
_MEANT = 26011  # pieces of the vocabulary that are not fill

# -- ours -------------------------------------------------------------------------------------------------------------

_OURS = """
import io, sys
from pathlib import Path
import sentencepiece
from mindspore.nn.utils import no_init_parameters
from pangu.data.tokenizer import SPECIAL_PIECES
from pangu.model import PanGuAlpha
from pangu.settings import Run
from parallel.checkpoint.full import save_checkpoint
from parallel.common.settings import to_yaml
from parallel.layers.parameter import initialize
folder, layers = Path(sys.argv[1]), int(sys.argv[2])
# As many pieces as GPT-2 has, of no meaning: clients send ids.
model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(chr(0x4e00 + n % 20000) + " " + chr(0x3400 + n % 6000) for n in range(60000)),
    model_writer=model, vocab_size=VOCABULARY, model_type="char", hard_vocab_limit=False,
    character_coverage=1.0, user_defined_symbols=[*SPECIAL_PIECES[3:], *(f"piece{n}" for n in range(FILL))], unk_id=0,
    bos_id=1, eos_id=2, pad_id=-1, minloglevel=3)
(folder / "v.model").write_bytes(model.getvalue())
size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).get_piece_size()
run = Run(model={"layers": layers, "hidden_size": WIDTH, "heads": HEADS, "vocabulary_size": size,
                 "sequence_length": CONTEXT, "dropout": 0.0},
          data={"tokenizer": str(folder / "v.model")}, output={"directory": str(folder / "run")})
with no_init_parameters():
    network = PanGuAlpha(run.model)
initialize(network, 1)
state = {"run": run.model_dump(mode="json")}
save_checkpoint(folder / "run" / "checkpoints", 1, list(network.get_parameters()), (), state)
(folder / "run.yaml").write_text(to_yaml(run))
"""


def start_values(folder: Path, layers: int, *, vocabulary: int = VOCABULARY, width: int = WIDTH, heads: int = HEADS,
                 context: int = CONTEXT) -> Path:
    """A checkpoint of start values (its query layer counts as one of `layers`) with a vocabulary; its config file."""
    folder.mkdir()
    sizes = {"VOCABULARY": vocabulary, "WIDTH": width, "HEADS": heads, "CONTEXT": context, "FILL": vocabulary - _MEANT}
    script = "\n".join(f"{name} = {value}" for name, value in sizes.items()) + _OURS
    subprocess.run([sys.executable, "-c", script, str(folder), str(layers)], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)
    return folder / "run.yaml"


def ours(scratch: Path, layers: int, int8: bool) -> Command:
    """A checkpoint of start values, served."""
    config = start_values(scratch / "ours", layers)
    words = [sys.executable, "-m", "pangu", "serve", "--config", str(config), "port=PORT"]
    return [*words, "--int8"] if int8 else words, {}, "pangu_alpha"


# -- peers ------------------------------------------------------------------------------------------------------------

_GPT2 = """
import json, sys, torch, transformers
folder, layers = sys.argv[1], int(sys.argv[2])
torch.manual_seed(1)
config = transformers.GPT2Config(n_layer=layers)
transformers.GPT2LMHeadModel(config).save_pretrained(folder)
from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode
pieces = [*bytes_to_unicode().values()]
pieces += [f"piece{n}" for n in range(config.vocab_size - 1 - len(pieces))]
vocabulary = {piece: n for n, piece in enumerate([*pieces, "<|endoftext|>"])}
json.dump(vocabulary, open(f"{folder}/vocab.json", "w"))
open(f"{folder}/merges.txt", "w").write("#version: 0.2\\n")
json.dump({"tokenizer_class": "GPT2Tokenizer", "model_max_length": 1024}, open(f"{folder}/tokenizer_config.json", "w"))
"""

_GGUF = """
import json, sys, gguf, numpy as np
folder, target, layers = sys.argv[1], sys.argv[2], int(sys.argv[3])
raw = open(f"{folder}/model.safetensors", "rb").read()
size = int.from_bytes(raw[:8], "little")
header = json.loads(raw[8:8 + size])
def get(name):
    entry = header.get(name) or header["transformer." + name]
    begin, end = entry["data_offsets"]
    return np.frombuffer(raw[8 + size + begin:8 + size + end], np.float32).reshape(entry["shape"])
out = gguf.GGUFWriter(target, "gpt2")
out.add_context_length(1024); out.add_embedding_length(768); out.add_feed_forward_length(3072)
out.add_block_count(layers); out.add_head_count(12); out.add_layer_norm_eps(1e-5); out.add_file_type(0)
out.add_tokenizer_model("gpt2"); out.add_tokenizer_pre("gpt-2")
vocabulary = json.load(open(f"{folder}/vocab.json"))
out.add_token_list(sorted(vocabulary, key=vocabulary.get)); out.add_token_types([1] * 50256 + [3])
out.add_token_merges(["! !"])  # it wants one; prompts have letters only
out.add_bos_token_id(50256); out.add_eos_token_id(50256)
out.add_tensor("token_embd.weight", get("wte.weight")); out.add_tensor("position_embd.weight", get("wpe.weight"))
out.add_tensor("output.weight", get("wte.weight"))
for part in ("weight", "bias"):
    out.add_tensor(f"output_norm.{part}", get(f"ln_f.{part}"))
names = {"attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj", "ffn_norm": "ln_2",
         "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
for layer in range(layers):
    for ours, theirs in names.items():
        for part in ("weight", "bias"):
            value = get(f"h.{layer}.{theirs}.{part}")
            turned = part == "weight" and ".c_" in theirs  # GPT-2 keeps its matrices the other way round
            out.add_tensor(f"blk.{layer}.{ours}.{part}", np.ascontiguousarray(value.T) if turned else value)
out.write_header_to_file(); out.write_kv_data_to_file(); out.write_tensors_to_file(); out.close()
"""


def _gpt2(scratch: Path, layers: int) -> Path:
    folder = scratch / "gpt2"
    if not folder.exists():
        folder.mkdir()
        subprocess.run([sys.executable, "-c", _GPT2, str(folder), str(layers)], check=True, stdout=subprocess.DEVNULL)
    return folder


def vllm(python: str, scratch: Path, layers: int) -> Command:
    """vLLM's OpenAI server on the CPU, float32."""
    folder = _gpt2(scratch, layers)
    return ([python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", "PORT", "--host",
             "127.0.0.1", "--dtype", "float32", "--served-model-name", "gpt2",
             "--max-num-seqs", "32"], {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}, "gpt2")


def llama(python: str, scratch: Path, layers: int) -> Command:
    """llama.cpp's server by its Python package, float32."""
    folder = _gpt2(scratch, layers)
    subprocess.run([python, "-c", _GGUF, str(folder), str(scratch / "gpt2.gguf"), str(layers)], check=True,
                   stdout=subprocess.DEVNULL)
    return ([python, "-m", "llama_cpp.server", "--model", str(scratch / "gpt2.gguf"), "--port", "PORT", "--n_ctx",
             str(CONTEXT), "--model_alias", "gpt2", "--interrupt_requests", "False"], {}, "gpt2")


PEERS = {"vllm": vllm, "llama": llama}

# -- static batches ---------------------------------------------------------------------------------------------------


def static(layers: int) -> None:
    """Reads batches of (ids, tokens) as JSON lines; answers with the seconds of each."""
    import torch
    import transformers

    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers)).eval()
    out = sys.stdout
    for line in sys.stdin:
        batch = json.loads(line)
        longest = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([[0] * (longest - len(row)) + row for row, _ in batch])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row, _ in batch])
        begun = time.perf_counter()
        model.generate(ids, attention_mask=mask, max_new_tokens=max(count for _, count in batch), do_sample=True,
                       eos_token_id=None, pad_token_id=0)
        print(json.dumps({"seconds": time.perf_counter() - begun}), file=out, flush=True)


if __name__ == "__main__":
    static(int(sys.argv[2]))
