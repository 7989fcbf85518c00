"""A model as evaluation sees it: three methods on ids, with every answer kept so that a stopped run goes on.

The three methods are those of EleutherAI's lm-evaluation-harness: loglikelihood, rolling loglikelihood, generation
until a stop; `pangu.evaluation.lm_eval_adapter` puts that package's texts and requests on top.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pangu.generation.completion import Completion
from pangu.generation.generate import Generator
from pangu.generation.settings import GenerateSettings
from parallel.common.files import explain_os_error, open_text
from parallel.common.json_text import dump_json
from parallel.common.structured import BadText, parse_json

BLOCK = 512
_Ids = Sequence[int]


class RequestCache:
    """Answers by request, in jsonl files of a folder; one file per process, all are read.

    Args:
        folder: of the files; None = nothing is kept.
        fingerprint: of the model; another one has other files.
        rank: this process.
    """

    def __init__(self, folder: str | Path | None, fingerprint: str = "", rank: int = 0) -> None:
        self.answers: dict[str, Any] = {}
        self._path: Path | None = None
        if folder is None:
            return
        folder = Path(folder)
        for path in sorted(folder.glob(f"{fingerprint}-*.jsonl")):
            self._read(path)
        self._path = folder / f"{fingerprint}-{rank}.jsonl"

    def _read(self, path: Path) -> None:
        with open_text(path, errors="replace") as file:
            for line in file:
                try:
                    kept = parse_json(line)
                except BadText:
                    continue  # the last line of a run that was killed
                # A line that has changed is forgotten like one that was cut off.
                if isinstance(kept, list) and len(kept) == 3 and kept[2] == _sum(kept[:2]):
                    self.answers[kept[0]] = kept[1]

    def add(self, answers: dict[str, Any]) -> None:
        """Keeps answers, on the disk at once."""
        self.answers |= answers
        if self._path is None or not answers:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # The line before may have been truncated.
            text = "\n" + "".join(dump_json([*item, _sum(list(item))]) + "\n" for item in answers.items())
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise explain_os_error(error, self._path) from error


def _sum(answer: list) -> int:
    """Checksum of a request and its answer."""
    return zlib.crc32(dump_json(answer).encode())


class LanguageModel:
    """Scores and continues ids.

    Args:
        model: a `pangu.model.PanGuAlpha`, or a `pangu.generation.backend.Backend` where there is a `scorer`.
        tokenizer: a `pangu.data.tokenizer.Tokenizer`; None if nothing is generated.
        batch_size: rows at once; None = by their length.
        share: whether common beginnings are computed once.
        cache: where answers are kept.
        scorer: what scores; None = MindSpore's graphs of `model`.
    """

    def __init__(self, model: Any, tokenizer: Any = None, batch_size: int | None = None, share: bool = True,
                 cache: RequestCache | None = None, scorer: Any = None) -> None:
        self.config, self.tokenizer = model.config, tokenizer
        if scorer is None:
            from pangu.evaluation.scoring import Scorer

            scorer = Scorer(model, batch_size, share)
        self.scorer = scorer
        self.generator = Generator(model, tokenizer)
        self.batch_size, self.cache = batch_size, cache or RequestCache(None)

    def loglikelihood(self, requests: Sequence[tuple[_Ids, _Ids]],
                      on_done: Callable[[int], None] | None = None) -> list[tuple[float, bool]]:
        """log p(continuation | prefix) in nats, summed over tokens, and whether the continuation is the greedy one.

        `on_done(count)` is called as answers come.

        Raises:
            UserError: an empty prefix or continuation, or a continuation longer than the context.
        """
        keys = [_key("score and greedy", prefix, continuation) for prefix, continuation in requests]
        open_ones = self._open(keys, requests, on_done)
        names = list(open_ones)

        def keep(numbers: list[int], answers: list[tuple[float, bool]]) -> None:
            self.cache.add({names[number]: answer for number, answer in zip(numbers, answers, strict=True)})
            if on_done is not None:
                on_done(len(numbers))

        self.scorer.loglikelihood_and_greedy(list(open_ones.values()), keep)
        return [tuple(self.cache.answers[key]) for key in keys]  # a file gives lists back

    def loglikelihood_rolling(self, texts: Sequence[_Ids]) -> list[float]:
        """log p of whole texts, however long, after `<eot>`: windows that overlap in one token, each token once."""
        requests, owners = [], []
        step = self.config.sequence_length
        for number, ids in enumerate(texts):
            whole = [self.config.eot_id, *ids]
            for begin in range(0, len(whole) - 1, step):
                window = whole[begin:begin + step + 1]
                requests.append((window[:1], window[1:]))
                owners.append(number)
        totals = [0.0] * len(texts)
        for owner, (score, _) in zip(owners, self.loglikelihood(requests), strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, prompts: Sequence[_Ids], settings: GenerateSettings,
                       on_done: Callable[[int], None] | None = None) -> list[str]:
        """Continuations of prompts. Equal prompts get equal answers; each depends on the prompt and the seed alone.

        Raises:
            UserError: a prompt is empty or longer than the context.
        """
        rule = settings.model_dump_json(exclude={"batch_size", "prefill_chunk"})
        keys = [_key(rule, prompt, ()) for prompt in prompts]
        if self.batch_size is not None:
            settings = settings.model_copy(update={"batch_size": self.batch_size})

        open_ones = self._open(keys, prompts, on_done)
        names = list(open_ones)
        for first in range(0, len(names), BLOCK):
            block = names[first:first + BLOCK]

            def keep(index: int, completion: Completion, block: list[str] = block) -> None:
                self.cache.add({block[index]: completion.text})
                if on_done is not None:
                    on_done(1)

            self.generator.generate_ids([open_ones[name] for name in block], settings, on_done=keep)
        return [self.cache.answers[key] for key in keys]

    def _open(self, keys: list[str], requests: Sequence[Any], on_done: Callable[[int], None] | None) -> dict[str, Any]:
        """The requests without an answer, by their keys; of equal ones one."""
        found = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.cache.answers}
        if on_done is not None and len(found) < len(keys):
            on_done(len(keys) - len(found))
        return found


def _key(kind: str, prefix: _Ids, continuation: _Ids) -> str:
    digest = hashlib.blake2b(kind.encode(), digest_size=16)
    for ids in (prefix, continuation):
        digest.update(b"|" + np.asarray(ids, "<i4").tobytes())
    return digest.hexdigest()
