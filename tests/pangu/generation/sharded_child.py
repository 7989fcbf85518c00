"""A rank of a sharded model: its group's first rank reads texts in parts and generates; the results go to a file.

    python -m tests.pangu.generation.sharded_child CONFIG CHECKPOINT OUTPUT
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from pangu.generation.generate import Generator
from pangu.generation.runner import Span
from pangu.generation.settings import GenerateSettings
from pangu.generation.sharded.dealing import dealt, put_together
from pangu.generation.sharded.model import open_sharded
from pangu.settings import Run
from parallel.common.settings import load_settings
from parallel.torch_runtime.inference import member, rank  # noqa: F401, before memory is measured

GREEDY = GenerateSettings(max_new_tokens=12, temperature=0.0, stop_ids=[], batch_size=3, prefill_chunk=16)
SEEDED = GREEDY.model_copy(update={"temperature": 1.0, "top_p": 0.9, "seed": 5})
LENGTHS = (3, 40, 17, 29, 64)


def texts(vocabulary: int) -> list[list[int]]:
    """Ids of texts; two of them begin alike."""
    generator = np.random.default_rng(1)
    made = [generator.integers(10, vocabulary, length).tolist() for length in LENGTHS]
    return [*made, made[1][:36] + made[0]]


def logits_of(runner, prompts: list[list[int]]) -> list[np.ndarray]:
    """Logits after every token of each prompt, read in uneven parts beside each other, and token by token at last."""
    size, first, tables = runner.block_size, 0, []
    for ids in prompts:
        count = -(-len(ids) // size)
        tables.append(list(range(first, first + count))[::-1])
        first += count
    assert first <= runner.blocks
    found, done = [[] for _ in prompts], [0] * len(prompts)
    for turn in range(200):
        spans, members = [], []
        for number, ids in enumerate(prompts):
            left = len(ids) - done[number]
            count = min(left, (turn * 5 + number * 7) % 23) if left > 4 else min(left, 1)
            if count:
                spans.append(Span(tables[number], done[number], ids[done[number]:done[number] + count], count))
                members.append(number)
                done[number] += count
        rows = runner.run(spans)[0]
        place = 0
        for number, span in zip(members, spans, strict=True):
            found[number].append(rows[place:place + span.outputs].copy())
            place += span.outputs
        if all(count == len(ids) for count, ids in zip(done, prompts, strict=True)):
            break
    return [np.concatenate(rows) for rows in found]


def memory(line: str) -> int:
    """Bytes that the kernel tells of this process: VmRSS now, VmHWM at most."""
    told = Path("/proc/self/status").read_text().split(f"{line}:")[1]
    return int(told.split()[0]) * 1024


def main() -> None:
    config, checkpoint, output, *flags = sys.argv[1:]
    settings, before = load_settings(Run, config), memory("VmRSS")
    sharded = open_sharded(settings, checkpoint, int8="int8" in flags)
    Path(f"{output}.memory-{os.environ['RANK']}").write_text(str(memory("VmHWM") - before))
    if sharded.backend is None:
        sharded.follow()
    else:
        prompts = texts(settings.model.vocabulary_size)
        if sharded.first:
            rows = logits_of(sharded.backend.runner(1, 1, 1), prompts)
            np.savez(f"{output}.npz", **{str(number): item for number, item in enumerate(rows)})
        mine = dealt(prompts, sharded.member.groups)[sharded.member.group]
        generator = Generator(sharded.backend, None)
        message = {name: [completion.ids for completion in generator.generate_ids([prompts[i] for i in mine], rule)]
                   for name, rule in (("greedy", GREEDY), ("seeded", SEEDED))}
        gathered = sharded.member.gather([mine, message])
        sharded.close()
        if sharded.first:
            results = {name: put_together([list(zip(numbers, own[name], strict=True)) for numbers, own in gathered],
                                          len(prompts)) for name in message}
            Path(f"{output}.json").write_text(json.dumps(results))
    print(json.dumps({"rank": os.environ["RANK"]}))


if __name__ == "__main__":
    main()
