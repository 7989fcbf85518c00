"""Continuous batching: which tokens of which sequences the next step reads, and who holds which blocks of the cache.

A step takes the newest token of every sequence that generates, and up to `prefill_chunk` tokens of prompts, the oldest
request's first. Sequences join and leave at every step. Blocks are taken as they are needed; when there are none, the
newest sequence gives up its own and is computed again later, from its prompt and what it has generated, so the oldest
always goes on. A sequence that begins with what another one is just reading waits until that is done, and shares it.

Only the time of an answer depends on all this, never the answer: see `pangu.generation.runner` and `sampling`.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np

from pangu.generation.blocks import BlockPool, digests
from pangu.generation.runner import Runner, Span
from pangu.generation.sampling import Sampler


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability (nats), its rank (1 = likeliest) and the likeliest tokens at its position, best first.

    The token itself is among `top` only if it is one of them. Equal tokens have equal floats, so that
    `logprob == top[0][1]` says whether the token is the greedy one (two tokens may tie).
    """

    id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


Scores = list["TokenLogprob | None"]


class Sequence:
    """One request inside the scheduler; subclasses say when it ends.

    Args:
        prompt: its ids.
        sampler: chooses its tokens.
        logprobs: None, or how many likely tokens are wanted beside each generated one.
        prompt_logprobs: the same for the prompt.
        scored_from: place of the first token of the prompt whose log-probability is wanted; those before have none.
    """

    def __init__(self, prompt: SequenceOf[int], sampler: Sampler, logprobs: int | None = None,
                 prompt_logprobs: int | None = None, scored_from: int = 1) -> None:
        self.prompt, self.sampler = list(prompt), sampler
        self.logprobs, self.prompt_logprobs = logprobs, prompt_logprobs
        self.all_ids = list(prompt)
        """The prompt and what was generated."""
        self.computed = 0
        """Tokens whose keys and values are in the blocks of `table`."""
        self.table: list[int] = []
        self.digests: list[bytes] = []
        self.registered = 0
        """Blocks of `table` that can be found."""
        self.scored_from = scored_from
        self.scores: Scores | None = [None] * scored_from if prompt_logprobs is not None else None
        """Log-probabilities of the prompt's tokens as far as they are known."""
        self.cached: int | None = None
        """Tokens of the prompt that were found in the cache when the sequence first joined."""
        self.number = -1
        self.reported = False

    @property
    def done(self) -> bool:
        """Whether it needs no further step."""
        raise NotImplementedError

    def read(self, cached: int, scores: Scores | None) -> None:
        """The prompt has been read; `cached` of its tokens were there already."""

    def feed(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """Takes the next token."""
        raise NotImplementedError

    @property
    def pending(self) -> int:
        """Tokens to be read before the next one can be chosen."""
        return len(self.all_ids) - self.computed

    def first_scored(self, start: int) -> int:
        """Position from `start` on of the first token whose logits say something about the prompt that is not known
        yet; the prompt's last position where there is none."""
        if self.scores is None:
            return len(self.prompt) - 1
        return max(start, len(self.scores) - 1)


@dataclass
class Counters:
    """Totals since the start."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    preemptions: int = 0


@dataclass
class _Part:
    """What one step does of a sequence: `count` tokens, of which the last `outputs` have logits."""

    sequence: Sequence
    start: int
    count: int
    outputs: int
    span: Span = field(init=False)

    def __post_init__(self) -> None:
        ids = self.sequence.all_ids[self.start:self.start + self.count]
        self.span = Span(self.sequence.table, self.start, ids, self.outputs)

    @property
    def ends(self) -> bool:
        """Whether the next token can be chosen after it."""
        return self.start + self.count == len(self.sequence.all_ids)


class Scheduler:
    """Runs sequences over one runner, one step at a time. Not for several threads.

    Args:
        runner: the model; its cache must hold at least one sequence of full length.
        running: sequences in the batch at most.
        prefill_chunk: tokens of prompts in one step.
        share: whether equal beginnings are computed once.
    """

    def __init__(self, runner: Runner, running: int, prefill_chunk: int, share: bool = True) -> None:
        self.runner, self.most_running, self.prefill_chunk = runner, running, prefill_chunk
        self.share = share and runner.shares_prefixes
        self.pool = BlockPool(runner.blocks, runner.block_size)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.counters = Counters()
        self._number = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.running and not self.waiting

    def add(self, sequence: Sequence) -> None:
        """Takes a new sequence."""
        sequence.number = self._number
        self._number += 1
        self.counters.prompt_tokens += len(sequence.prompt)
        self.waiting.append(sequence)

    def abort(self, sequence: Sequence) -> None:
        """Forgets a sequence and frees its blocks; one that is not here is ignored."""
        for place in (self.running, self.waiting):
            if sequence in place:
                place.remove(sequence)
                self._release(sequence)

    def take_unstarted(self) -> list[Sequence]:
        """Gives up the sequences that have not joined yet."""
        unstarted = [sequence for sequence in self.waiting if sequence.cached is None]
        self.waiting = [sequence for sequence in self.waiting if sequence.cached is not None]
        self.counters.prompt_tokens -= sum(len(sequence.prompt) for sequence in unstarted)
        return unstarted

    def step(self) -> list[Sequence]:
        """Reads some tokens; the sequences that went on. Those that are done have left."""
        self._admit()
        parts = self._plan()
        if not parts:
            return []
        logits, best = self.runner.run([part.span for part in parts])
        self.counters.steps += 1
        row = 0
        for part in parts:
            part.sequence.computed += part.count
            self._score_prompt(part, logits[row:row + part.outputs])
            row += part.outputs
            self._register(part.sequence)
        self._choose(parts, logits, best)
        for part in parts:
            if part.sequence.done:
                self.abort(part.sequence)
        return [part.sequence for part in parts]

    # -- joining ------------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        coming = self._coming() if self.waiting and self.share else {}
        for sequence in list(self.waiting):
            if len(self.running) >= self.most_running:
                return
            found, scores, known = self._find(sequence)
            if self._is_coming(sequence, known, coming):
                continue
            kept = sum(self.pool.is_kept(block) for block in found)
            needed = self._blocks_for(len(sequence.all_ids)) - len(found)
            if needed > self.pool.available - kept:
                return
            self._join(sequence, found, scores)
            coming |= self._coming_of(sequence) if self.share else {}

    def _join(self, sequence: Sequence, found: list[int], scores: Scores) -> None:
        for block in found:
            self.pool.hold(block)
        sequence.table, sequence.registered = list(found), len(found)
        sequence.computed = len(found) * self.pool.block_size
        if sequence.scores is not None and len(scores) > len(sequence.scores):
            sequence.scores = scores
        if sequence.cached is None:
            sequence.cached = sequence.computed
            self.counters.cached_tokens += sequence.computed
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=lambda item: item.number)

    def _find(self, sequence: Sequence) -> tuple[list[int], Scores, int]:
        """Blocks with the sequence's beginning, at most all but its last token; what they know of its scores; and how
        many blocks of it are known.

        Where tokens of a block are scored, it is of use only with their scores; and the token after the blocks is
        scored by the one before it, so the last block is computed again.
        """
        found: list[int] = []
        scores: Scores = []
        if not self.share:
            return found, scores, 0
        size = self.pool.block_size
        sequence.digests = digests(sequence.all_ids, size, sequence.digests)
        unknown = sequence.scores is not None and len(sequence.scores) < len(sequence.prompt)
        for number, digest in enumerate(sequence.digests[:(len(sequence.all_ids) - 1) // size]):
            block = self.pool.find(digest)
            if block is None:
                break
            if unknown and self._wanted_in(sequence, number) >= 0:
                noted = self.pool.notes[block]
                if noted is None or noted[0] < sequence.prompt_logprobs:
                    break
                scores += [_shortened(score, sequence.prompt_logprobs) for score in noted[1]]
            else:
                scores += [None] * size
            found.append(block)
        again = unknown and len(found) * size >= sequence.scored_from
        return found[:-1] if again else found, scores if unknown else [], len(found)

    def _wanted_in(self, sequence: Sequence, number: int) -> int:
        """How many likely tokens are wanted beside each token of a sequence's block; -1 where none of it is scored."""
        if sequence.prompt_logprobs is None or (number + 1) * self.pool.block_size <= sequence.scored_from:
            return -1
        return sequence.prompt_logprobs

    def _coming(self) -> dict[bytes, int]:
        coming: dict[bytes, int] = {}
        for sequence in self.running:
            coming |= self._coming_of(sequence)
        return coming

    def _coming_of(self, sequence: Sequence) -> dict[bytes, int]:
        """Digests of the blocks that a sequence is about to fill, and how many scores a token they will have."""
        if sequence.pending <= 1:
            return {}
        first = sequence.computed // self.pool.block_size
        return {digest: self._noted_in(sequence, number)
                for number, digest in enumerate(sequence.digests[first:], start=first)}

    def _noted_in(self, sequence: Sequence, number: int) -> int:
        """How many likely tokens a token of a sequence's block will be noted with; -1 where not all have scores."""
        all_scored = sequence.scored_from <= 1 or number * self.pool.block_size >= sequence.scored_from
        return sequence.prompt_logprobs if all_scored and sequence.prompt_logprobs is not None else -1

    def _is_coming(self, sequence: Sequence, known: int, coming: dict[bytes, int]) -> bool:
        """Whether another sequence is reading what this one needs after the `known` blocks."""
        if not coming or known >= (len(sequence.all_ids) - 1) // self.pool.block_size:
            return False
        return coming.get(sequence.digests[known], -2) >= self._wanted_in(sequence, known)

    # -- a step -------------------------------------------------------------------------------------------------------

    def _plan(self) -> list[_Part]:
        parts, budget = [], self.prefill_chunk
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # it has lost its blocks to an older one
            count = sequence.pending if sequence.pending == 1 else min(sequence.pending, budget)
            if count == 0 or not self._grow(sequence, sequence.computed + count):
                continue
            budget -= count if sequence.pending > 1 else 0
            start, end = sequence.computed, sequence.computed + count
            first = sequence.first_scored(start)
            outputs = end - first if first < len(sequence.prompt) - 1 and first < end else int(
                end == len(sequence.all_ids))
            parts.append(_Part(sequence, start, count, outputs))
        return parts

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Takes blocks for `tokens` tokens; False if the sequence had to give up its own."""
        while len(sequence.table) < self._blocks_for(tokens):
            if self.pool.available:
                sequence.table.append(self.pool.take())
                continue
            newest = self.running[-1]
            self._preempt(newest)
            if newest is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        insort(self.waiting, sequence, key=lambda item: item.number)
        self.counters.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self.pool.give_back(sequence.table)
        sequence.table, sequence.computed, sequence.registered = [], 0, 0

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.pool.block_size)

    def _register(self, sequence: Sequence) -> None:
        """Full blocks can be found from here on, with the scores of their tokens where those are known."""
        size = self.pool.block_size
        full = sequence.computed // size
        if not self.share or full == sequence.registered:
            return
        sequence.digests = digests(sequence.all_ids, size, sequence.digests)
        for number in range(sequence.registered, full):
            digest, end = sequence.digests[number], (number + 1) * size
            self.pool.register(sequence.table[number], digest)
            block, scores = self.pool.find(digest), sequence.scores
            if scores is not None and len(scores) >= end and self._noted_in(sequence, number) >= 0:
                noted = self.pool.notes[block]
                if noted is None or noted[0] < sequence.prompt_logprobs:
                    self.pool.notes[block] = sequence.prompt_logprobs, scores[number * size:end]
        sequence.registered = full

    def _score_prompt(self, part: _Part, logits: np.ndarray) -> None:
        """Log-probabilities of the prompt's tokens that this part's logits are about."""
        sequence = part.sequence
        if sequence.scores is None or len(sequence.scores) >= len(sequence.prompt) or not part.outputs:
            return
        first = part.start + part.count - part.outputs
        targets = sequence.prompt[first + 1:first + 1 + part.outputs]
        sequence.scores += self._logprobs(logits[:len(targets)], targets, [sequence.prompt_logprobs] * len(targets))

    def _logprobs(self, logits: np.ndarray, targets: SequenceOf[int], counts: SequenceOf[int]) -> list[TokenLogprob]:
        if not len(targets):
            return []
        found = self.runner.log_probabilities(logits, np.asarray(targets, np.int32), max(counts))
        log_p, above = found.target.tolist(), found.above.tolist()
        ids, tops = found.top_ids.tolist(), found.top.tolist()
        return [TokenLogprob(int(target), log_p[row], above[row] + 1,
                             tuple(zip(ids[row][:count], tops[row][:count], strict=True)))
                for row, (target, count) in enumerate(zip(targets, counts, strict=True))]

    def _choose(self, parts: list[_Part], logits: np.ndarray, best: np.ndarray) -> None:
        """The next token of every sequence whose tokens have all been read."""
        rows = np.cumsum([part.outputs for part in parts]) - 1
        choosing: list[tuple[Sequence, int]] = []
        for part, row in zip(parts, rows.tolist(), strict=True):
            sequence = part.sequence
            if not part.ends:
                continue
            if not sequence.reported:
                sequence.reported = True
                sequence.read(sequence.cached or 0, sequence.scores)
            if not sequence.done:
                choosing.append((sequence, row))
        tokens = self._tokens(choosing, logits, best)
        scored = [place for place, (sequence, _) in enumerate(choosing) if sequence.logprobs is not None]
        found = self._logprobs(logits[[choosing[place][1] for place in scored]], [tokens[place] for place in scored],
                               [choosing[place][0].logprobs for place in scored])
        scores = dict(zip(scored, found, strict=True))
        for place, ((sequence, _), token) in enumerate(zip(choosing, tokens, strict=True)):
            self.counters.generated += 1
            sequence.all_ids.append(token)
            sequence.feed(token, scores.get(place))

    def _tokens(self, choosing: list[tuple[Sequence, int]], logits: np.ndarray, best: np.ndarray) -> list[int]:
        """What each sequence takes from its row."""
        tokens = [int(best[row]) for _, row in choosing]
        drawing = [place for place, (sequence, _) in enumerate(choosing) if not sequence.sampler.takes_best]
        if drawing:
            samplers = [choosing[place][0].sampler for place in drawing]
            chosen = self.runner.choose(logits, [choosing[place][1] for place in drawing],
                                        [sampler.next_draw() for sampler in samplers])
            for place, sampler, token in zip(drawing, samplers, chosen, strict=True):
                sampler.took(token)
                tokens[place] = token
        return tokens


def _shortened(score: TokenLogprob | None, count: int) -> TokenLogprob | None:
    if score is None or len(score.top) <= count:
        return score
    return TokenLogprob(score.id, score.logprob, score.rank, score.top[:count])
