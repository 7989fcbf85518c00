"""Text from prompts: batches of prompts of different lengths through the cached decoder, token by token.

Nothing here imports MindSpore before a `Generator` is made, so that settings can be read without it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from pangu.generation.completion import Completion, GenerationState
from pangu.generation.sampling import Sampler, request_generators
from pangu.generation.settings import GenerateSettings
from parallel.common.errors import UserError
from parallel.training.settings import COMPUTE_DTYPES

if TYPE_CHECKING:
    from pangu.settings import Run

LOGITS, BEST = 0, 1  # what a decoder returns
_DECODERS_KEPT = 4


class Generator:
    """Generates with one model; compiled graphs and caches are kept between calls.

    Args:
        model: a `pangu.model.PanGuAlpha`.
        tokenizer: a `pangu.data.tokenizer.Tokenizer`; None if only ids are generated.
        settings: defaults for every call.

    Raises:
        UserError: the tokenizer has another size than the model's vocabulary.
    """

    def __init__(self, model: Any, tokenizer: Any, settings: GenerateSettings | None = None) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings or GenerateSettings()
        self.config = model.config
        if tokenizer is not None:
            check_vocabulary(tokenizer, self.config.vocabulary_size)
        model.set_train(False)
        self._decoders: dict[tuple[int, ...], Any] = {}
        self.tokens_generated, self.seconds = 0, 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of `generate` so far, reading of the prompts and compilation included."""
        return self.tokens_generated / self.seconds if self.seconds else 0.0

    def generate(self, prompts: Sequence[str], settings: GenerateSettings | None = None) -> list[Completion]:
        """Continues each prompt; the results are in the order of the prompts.

        Raises:
            UserError: a prompt is empty or longer than the model's context.
        """
        return self.generate_ids([self.tokenizer.encode(prompt) for prompt in prompts], settings)

    def generate_ids(self, prompts: Sequence[Sequence[int]], settings: GenerateSettings | None = None,
                     on_text: Callable[[int, str], None] | None = None) -> list[Completion]:
        """`generate` for prompts that are ids already; `on_text(index, piece)` is called as text becomes certain."""
        settings = settings or self.settings
        began = time.perf_counter()
        requests = self._requests(prompts, settings, on_text)
        # Beside its like in length a prompt waits least for others.
        order = sorted(requests, key=lambda request: len(request.prompt))
        for first in range(0, len(order), settings.batch_size):
            for _ in self._steps(order[first:first + settings.batch_size], settings):
                pass
        self.tokens_generated += sum(request.generated for request in requests)
        self.seconds += time.perf_counter() - began
        return [request.completion() for request in requests]

    def stream(self, prompt: str, settings: GenerateSettings | None = None) -> Iterator[str]:
        """Pieces of the continuation of `prompt` as they are generated; joined, they are `generate`'s text."""
        settings = settings or self.settings
        pieces: list[str] = []
        began = time.perf_counter()
        requests = self._requests([self.tokenizer.encode(prompt)], settings, lambda _, piece: pieces.append(piece))
        for _ in self._steps(requests, settings):
            yield from pieces
            pieces.clear()
        self.tokens_generated += requests[0].generated
        self.seconds += time.perf_counter() - began

    def _requests(self, prompts: Sequence[Sequence[int]], settings: GenerateSettings,
                  on_text: Callable[[int, str], None] | None) -> list[GenerationState]:
        context = self.config.sequence_length
        prompts = [fit_prompt(list(ids), context, self.config.vocabulary_size, settings, index)
                   for index, ids in enumerate(prompts)]
        stop_ids = frozenset([self.config.eot_id] if settings.stop_ids is None else settings.stop_ids)
        requests = []
        for index, (ids, stream) in enumerate(zip(prompts, request_generators(prompts, settings.seed), strict=True)):
            # The last token need not be read, so one more than there are positions can be generated.
            room = context - len(ids) + 1
            limit = (room, "context") if room < settings.max_new_tokens else (settings.max_new_tokens, "max_new_tokens")
            requests.append(GenerationState(ids, Sampler(settings.rule(), stream), limit, stop_ids, settings.stop,
                                    self.tokenizer.stream() if self.tokenizer is not None else None,
                                    partial(on_text, index) if on_text is not None else None))
        return requests

    def _steps(self, requests: list[GenerationState], settings: GenerateSettings) -> Iterator[None]:
        """Reads the prompts of one batch, then generates a token for each per iteration until all are done."""
        longest = max(len(request.prompt) + request.room - 1 for request in requests)
        batch = 1 if len(requests) == 1 else settings.batch_size
        chunk = settings.prefill_chunk
        decoder = self._decoder(batch, cache_capacity(longest, chunk), chunk)
        # A greedy choice comes from the graph itself; only a draw needs the logits on the host.
        wanted = BEST if settings.rule().plain_greedy else LOGITS
        result = self._prefill(decoder, requests, wanted)
        while True:
            for row, request in enumerate(requests):
                if not request.done:
                    request.feed(int(result[row]) if wanted == BEST else request.sampler.choose(result[row]))
            yield
            if all(request.done for request in requests):
                return
            ids_B1, start_B = np.zeros((batch, 1), np.int32), np.zeros(batch, np.int32)
            for row, request in enumerate(requests):
                if not request.done:
                    ids_B1[row], start_B[row] = request.last, request.position
            result = decoder.read(ids_B1, start_B)[wanted].asnumpy()

    def _prefill(self, decoder: Any, requests: list[GenerationState], wanted: int) -> np.ndarray:
        """Fills the cache with the prompts; logits or argmax after each prompt's last token."""
        chunk, lengths = decoder.chunk, np.array([len(request.prompt) for request in requests])
        last_chunk = (lengths - 1) // chunk
        ids_BP = np.full((decoder.batch, (last_chunk.max() + 1) * chunk), self.config.pad_id, np.int32)
        for row, request in enumerate(requests):
            ids_BP[row, :lengths[row]] = request.prompt
        result = None
        for part in range(last_chunk.max() + 1):
            last_B = np.zeros(decoder.batch, np.int32)
            last_B[:len(requests)] = np.clip(lengths - 1 - part * chunk, 0, chunk - 1)
            ids_BS = np.ascontiguousarray(ids_BP[:, part * chunk:(part + 1) * chunk])
            outputs = decoder.read(ids_BS, np.full(decoder.batch, part * chunk, np.int32), last_B)
            ended = np.flatnonzero(last_chunk == part)
            if len(ended):
                output = outputs[wanted].asnumpy()
                result = output.copy() if result is None else result
                result[ended] = output[ended]
        return result

    def _decoder(self, *sizes: int) -> Any:
        """The decoder for (batch, capacity, chunk); the one unused for longest goes when there are too many."""
        from pangu.generation.kv_cache import CachedDecoder

        decoder = self._decoders.pop(sizes, None) or CachedDecoder(self.model, *sizes)
        self._decoders[sizes] = decoder
        while len(self._decoders) > _DECODERS_KEPT:
            self._decoders.pop(next(iter(self._decoders)))
        return decoder


def check_vocabulary(tokenizer: Any, vocabulary_size: int) -> None:
    """Raises a `UserError` when the tokenizer and the model differ in size."""
    if tokenizer.vocabulary_size != vocabulary_size:
        raise UserError(f"the tokenizer has {tokenizer.vocabulary_size} pieces and the model "
                        f"{vocabulary_size} rows", where="model.vocabulary_size", value=vocabulary_size,
                        hint="use the tokenizer that the model was trained with")


def fit_prompt(ids: list[int], context: int, vocabulary_size: int, settings: GenerateSettings, index: int) -> list[int]:
    """The ids of prompt number `index` that the model will read.

    Raises:
        UserError: no ids, an id outside the vocabulary, or more than `context` ids while `truncate` is off.
    """
    where = f"prompt {index + 1}"
    if not ids:
        raise UserError("the prompt is empty", where=where, hint="give at least one character")
    if min(ids) < 0 or max(ids) >= vocabulary_size:
        raise UserError(f"id outside the vocabulary of {vocabulary_size}", where=where, value=max(ids))
    if settings.truncate:
        return ids[-max(1, context + 1 - settings.max_new_tokens):]
    if len(ids) > context:
        raise UserError(f"the prompt is longer than the model's context of {context} tokens", where=where,
                        value=f"{len(ids)} tokens", hint="shorten it, or set generate.truncate=true")
    return ids


def cache_capacity(slots: int, chunk: int) -> int:
    """The smallest of chunk x (1, 2, 3, 4, 6, 8, 12, 16, ...) that holds `slots`: few sizes, so few compilations."""
    double = chunk
    while double < slots:
        double *= 2
    middle = double // 4 * 3
    return middle if double >= 4 * chunk and middle >= slots else double


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `generate`."""
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint to load (none: the newest of output.directory)")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="file of prompts: a recipe or one prompt a line")
    parser.add_argument("--stream", action="store_true", help="print the text of a single prompt as it is generated")


def run_generate(settings: Run, arguments: argparse.Namespace) -> dict:
    """The verb `generate`: `settings` is a `pangu.settings.Run`; returns the texts and the speed.

    Raises:
        UserError: no prompt, too long a prompt, no or another model's checkpoint, another vocabulary.
    """
    from pangu.data.tokenizer import Tokenizer
    from pangu.generation.prompts import read_prompts

    texts, rules = read_prompts(arguments.prompts, arguments.prompt, settings.generate)
    if arguments.stream and len(texts) != 1:
        raise UserError("--stream shows one prompt", where="--stream", value=f"{len(texts)} prompts")
    tokenizer = Tokenizer(getattr(arguments, "tokenizer", None) or settings.data.tokenizer)
    check_vocabulary(tokenizer, settings.model.vocabulary_size)
    model = load_model(settings, arguments.checkpoint or settings.output.directory)
    generator = Generator(model, tokenizer, rules)
    if arguments.stream:
        outputs = [_stream_to_terminal(generator, texts[0])]
    else:
        outputs = [completion.text for completion in generator.generate(texts)]
        for text, output in zip(texts, outputs, strict=True):
            print(f"{text}\033[1m{output}\033[0m" if sys.stderr.isatty() else text + output, file=sys.stderr)
    return {"prompts": texts, "outputs": outputs, "tokens_per_second": round(generator.tokens_per_second, 2)}


def _stream_to_terminal(generator: Generator, prompt: str) -> str:
    # On stderr, since the last line of stdout is JSON.
    print(prompt, end="", file=sys.stderr, flush=True)
    pieces = []
    for piece in generator.stream(prompt):
        print(piece, end="", file=sys.stderr, flush=True)
        pieces.append(piece)
    print(file=sys.stderr)
    return "".join(pieces)


def load_model(settings: Run, checkpoint: str) -> Any:
    """The model of a run with the parameters of `checkpoint` (a run's folder means its newest), ready to generate."""
    import mindspore as ms
    from mindspore.nn.utils import no_init_parameters

    from pangu.model import PanGuAlpha
    from parallel.checkpoint.folder import resolve_checkpoint
    from parallel.checkpoint.full import load_parameters

    path = resolve_checkpoint(checkpoint)
    ms.set_context(mode=ms.GRAPH_MODE)
    with no_init_parameters():
        model = PanGuAlpha(settings.model, getattr(ms, COMPUTE_DTYPES[settings.train.precision]))
    load_parameters(path, list(model.get_parameters()))
    model.set_train(False)
    return model
