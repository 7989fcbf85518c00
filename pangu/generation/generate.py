"""Text from prompts: prompts of different lengths share a running batch, which the next joins when one is done.

Nothing here imports MindSpore before a `Generator` is made, so that settings can be read without it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from pangu.generation.completion import Completion, GenerationState
from pangu.generation.sampling import Sampler, request_generators
from pangu.generation.scheduler import Scheduler
from pangu.generation.settings import GenerateSettings
from parallel.common.errors import UserError

if TYPE_CHECKING:
    from pangu.generation.backend import Backend
    from pangu.model import PanGuAlpha
    from pangu.settings import Run


class Generator:
    """Generates with one model; what was compiled and what was read of a prompt are kept between calls.

    Args:
        source: a backend, or a model (its parameters are taken when the first text is generated).
        tokenizer: a `pangu.data.tokenizer.Tokenizer`; None if only ids are generated.
        settings: defaults for every call.

    Raises:
        UserError: the tokenizer has another size than the model's vocabulary.
    """

    def __init__(self, source: Backend | PanGuAlpha, tokenizer: Any,
                 settings: GenerateSettings | None = None) -> None:
        from pangu.generation.backend import Backend

        if not isinstance(source, Backend):
            source.set_train(False)
            source = Backend(source)
        self.backend, self.tokenizer, self.settings = source, tokenizer, settings or GenerateSettings()
        self.config = source.config
        if tokenizer is not None:
            check_vocabulary(tokenizer, self.config.vocabulary_size)
        self._scheduler: Scheduler | None = None
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
                     on_text: Callable[[int, str], None] | None = None,
                     on_done: Callable[[int, Completion], None] | None = None) -> list[Completion]:
        """`generate` for prompts that are ids already; `on_text(index, piece)` is called as text becomes certain,
        `on_done(index, completion)` when one has ended."""
        settings = settings or self.settings
        began = time.perf_counter()
        requests = self._requests(prompts, settings, on_text)
        running = set(range(len(requests))) if on_done is not None else set()
        for _ in self._steps(requests, settings):
            for index in [index for index in running if requests[index].done]:
                running.remove(index)
                on_done(index, requests[index].completion())
        self.tokens_generated += sum(request.generated for request in requests)
        self.seconds += time.perf_counter() - began
        return [request.completion() for request in requests]

    def stream(self, prompt: str, settings: GenerateSettings | None = None) -> Iterator[str]:
        """Parts of the continuation of `prompt` as they are generated; joined, they are `generate`'s text."""
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
        stops = self._stops(settings)
        stop_ids = frozenset([self.config.eot_id] if settings.stop_ids is None else settings.stop_ids)
        requests = []
        for index, (ids, stream) in enumerate(zip(prompts, request_generators(prompts, settings.seed), strict=True)):
            # The last token need not be read, so one more than there are positions can be generated.
            room = context - len(ids) + 1
            limit = (room, "context") if room < settings.max_new_tokens else (settings.max_new_tokens, "max_new_tokens")
            requests.append(GenerationState(ids, Sampler(settings.rule(), stream), limit, stop_ids, stops,
                                            self.tokenizer.stream() if self.tokenizer is not None else None,
                                            partial(on_text, index) if on_text is not None else None))
        return requests

    def _stops(self, settings: GenerateSettings) -> list[str]:
        """The stop strings as the tokenizer writes them: a generated text holds no full-width `：`, for example.

        Raises:
            UserError: nothing is left of one.
        """
        if self.tokenizer is None:
            return settings.stop
        stops = [self.tokenizer.normal_form(stop) for stop in settings.stop]
        if "" in stops:
            raise UserError("the tokenizer writes nothing of this stop string, so it would never be found",
                            where="generate.stop", value=settings.stop[stops.index("")], hint="leave it out")
        return stops

    def _steps(self, requests: list[GenerationState], settings: GenerateSettings) -> Iterator[None]:
        """Goes on by a step per iteration until all requests are done."""
        if not requests:
            return
        scheduler = self._prepared(requests, settings)
        try:
            for request in requests:
                scheduler.add(request)
            while not scheduler.idle:
                scheduler.step()
                yield
        finally:
            for request in requests:
                scheduler.abort(request)

    def _prepared(self, requests: list[GenerationState], settings: GenerateSettings) -> Scheduler:
        """A scheduler whose cache holds those of these requests that run at once, to their ends."""
        together = 1 if len(requests) == 1 else settings.batch_size
        longest = max(len(request.prompt) + request.room - 1 for request in requests)
        runner = self.backend.runner(together, longest, settings.prefill_chunk)
        if self._scheduler is None or self._scheduler.runner is not runner:
            self._scheduler = Scheduler(runner, together, settings.prefill_chunk)
        self._scheduler.most_running, self._scheduler.prefill_chunk = together, settings.prefill_chunk
        return self._scheduler


def check_vocabulary(tokenizer: Any, vocabulary_size: int) -> None:
    """Raises a `UserError` when the tokenizer and the model differ in size."""
    if tokenizer.vocabulary_size != vocabulary_size:
        raise UserError(f"the tokenizer has {tokenizer.vocabulary_size} pieces and the model "
                        f"{vocabulary_size} rows", where="model.vocabulary_size", value=vocabulary_size,
                        hint="use the tokenizer that the model was trained with")


def fit_prompt(ids: list[int], context: int, vocabulary_size: int, settings: GenerateSettings, index: int) -> list[int]:
    """The ids of prompt number `index` that the model will read.

    Raises:
        UserError: no ids, an id outside the vocabulary, more than `context` ids while `truncate` is off, or no room for
            a single one beside `max_new_tokens` while it is on.
    """
    where = f"prompt {index + 1}"
    if not ids:
        raise UserError("the prompt is empty", where=where, hint="give at least one character")
    if min(ids) < 0 or max(ids) >= vocabulary_size:
        raise UserError(f"id outside the vocabulary of {vocabulary_size}", where=where, value=max(ids))
    if settings.truncate:
        if settings.max_new_tokens > context:
            raise UserError(f"the context of {context} tokens leaves no room for a prompt",
                            where="generate.max_new_tokens", value=settings.max_new_tokens,
                            hint=f"at most {context}, or generate.truncate=false")
        return ids[-(context + 1 - settings.max_new_tokens):]
    if len(ids) > context:
        raise UserError(f"the prompt is longer than the model's context of {context} tokens", where=where,
                        value=f"{len(ids)} tokens", hint="shorten it, or set generate.truncate=true")
    return ids


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `generate`."""
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint to load (none: the newest of output.directory)")
    parser.add_argument("--int8", action="store_true", help="quantize a float checkpoint's weights while loading")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="file of prompts: a recipe or one prompt a line")
    parser.add_argument("--stream", action="store_true", help="print the text of a single prompt as it is generated")


def run_generate(settings: Run, arguments: argparse.Namespace) -> dict:
    """The verb `generate`: `settings` is a `pangu.settings.Run`; returns the texts and the speed.

    Raises:
        UserError: no prompt, too long a prompt, no or another model's checkpoint, another vocabulary.
    """
    from pangu.data.tokenizer import Tokenizer
    from pangu.generation.backend import load_backend
    from pangu.generation.prompts import read_prompts
    from pangu.generation.sharded.model import open_sharded

    texts, rules = read_prompts(arguments.prompts, arguments.prompt, settings.generate)
    if arguments.stream and len(texts) != 1:
        raise UserError("--stream shows one prompt", where="--stream", value=f"{len(texts)} prompts")
    tokenizer = Tokenizer(settings.data.tokenizer)
    check_vocabulary(tokenizer, settings.model.vocabulary_size)
    place, int8 = arguments.checkpoint or settings.output.directory, arguments.int8
    sharded = open_sharded(settings, place, int8)
    if sharded is not None:
        return sharded.follow() if sharded.backend is None else _generate_sharded(sharded, tokenizer, texts, rules)
    generator = Generator(load_backend(settings, place, int8), tokenizer, rules)
    if arguments.stream:
        outputs = [_stream_to_terminal(generator, texts[0])]
    else:
        outputs = [completion.text for completion in generator.generate(texts)]
        _show(texts, outputs)
    return {"prompts": texts, "outputs": outputs, "tokens_per_second": round(generator.tokens_per_second, 2)}


def _generate_sharded(sharded: Any, tokenizer: Any, texts: list[str], rules: GenerateSettings) -> dict:
    """This group's part of the texts; the first process tells those of all groups."""
    from pangu.generation.sharded.dealing import dealt, put_together

    began = time.perf_counter()
    generator = Generator(sharded.backend, tokenizer, rules)
    mine = dealt([tokenizer.encode(text) for text in texts], sharded.member.groups)[sharded.member.group]
    own = [completion.text for completion in generator.generate([texts[number] for number in mine])]
    gathered = sharded.member.gather([list(zip(mine, own, strict=True)), generator.tokens_generated])
    sharded.close()
    outputs = put_together([pairs for pairs, _ in gathered], len(texts))
    if sharded.first:
        _show(texts, outputs)
    speed = sum(tokens for _, tokens in gathered) / (time.perf_counter() - began)
    return {"prompts": texts, "outputs": outputs, "tokens_per_second": round(speed, 2)}


def _show(texts: list[str], outputs: list[str]) -> None:
    for text, output in zip(texts, outputs, strict=True):
        print(f"{text}\033[1m{output}\033[0m" if sys.stderr.isatty() else text + output, file=sys.stderr)


def _stream_to_terminal(generator: Generator, prompt: str) -> str:
    # On stderr, since the last line of stdout is JSON.
    print(prompt, end="", file=sys.stderr, flush=True)
    pieces = []
    for piece in generator.stream(prompt):
        print(piece, end="", file=sys.stderr, flush=True)
        pieces.append(piece)
    print(file=sys.stderr)
    return "".join(pieces)
