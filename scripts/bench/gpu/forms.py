"""What a trained model writes in the words of the recipes, and how much of it keeps the form: poems from their titles,
second lines of couplets, turns of a conversation. Rhymes are told by pypinyin, where it is installed.

    python scripts/bench/gpu/forms.py texts.json texts

counts again, on any machine, from the texts that `judged_run.py` wrote (`texts` is the folder of `corpora.py`).
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from pangu.data.tokenizer import Tokenizer
from pangu.generation.generate import Generator
from pangu.generation.prompts import RECIPES, Recipe
from pangu.generation.sharded.model import open_sharded
from parallel.common.settings import load_settings
from parallel.launch.inference import DEVICE, PROGRAM
from parallel.torch_runtime.program import Program
from parallel.torch_runtime.run import settings_of

_SHOWN = 8
_UNKNOWN = "⁇"  # what the vocabulary has no piece for, one character
_BETWEEN = re.compile(r"[，。！？；、,!?;\s]+")  # the vocabulary's normal form has some of them in half width


def written(program: Path, checkpoint: str, tokenizer: Path, texts: Path, device: str, count: int,
            captured: bool = True) -> dict[str, Any]:
    """Texts of every recipe (all as `texts`: pairs of prompt and text; some as `samples`) and how many keep the form.

    Args:
        program: exported with the graphs decode, prefill and score.
        checkpoint: of the trained model.
        tokenizer: its SentencePiece model.
        texts: folder with `unseen.jsonl` and `unseen_couplets.jsonl` (`corpora.py`).
        device: "gpu" or "cpu".
        count: poems, and couplets.
        captured: whether GPUs run captured graphs.
    """
    os.environ |= {PROGRAM: str(program), DEVICE: device}
    settings = settings_of(Program(program), [f"parallel.execution={'auto' if captured else 'eager'}"])
    model, coder = open_sharded(settings, checkpoint), Tokenizer(tokenizer)
    poems = _regular(texts, count)
    couplets = [row["text"].split("\n")[0].removeprefix("上联：")
                for row in _rows(texts / "unseen_couplets.jsonl")][:count]
    dialogue = load_settings(Recipe, RECIPES / "dialogue.yaml")
    found: dict[str, Any] = {}
    spoken = {"poem": [f"古诗一首\n题目：{row['title']}\n" for row in poems],
              "couplet": [f"上联：{upper}\n下联：" for upper in couplets],
              "dialogue": [dialogue.fill(item) for item in dialogue.inputs]}
    for name, prompts in spoken.items():
        rules = load_settings(Recipe, RECIPES / f"{name}.yaml").generate
        rules = rules.model_copy(update={"batch_size": settings.generate.batch_size, "seed": 1,
                                         **({"max_new_tokens": 96} if name == "poem" else {})})
        generator = Generator(model.backend, coder, rules)
        texts_made = [item.text for item in generator.generate(prompts)]
        found[name] = {"tokens_per_second": round(generator.tokens_per_second, 1),
                       "texts": [[prompt, text] for prompt, text in zip(prompts, texts_made, strict=True)],
                       "samples": [prompt + text for prompt, text in zip(prompts, texts_made, strict=True)][:_SHOWN]}
        if name == "poem":
            found[name] |= {"forms": poem_forms(texts_made),
                            "forms_of_real_ones": poem_forms(["\n".join(row["lines"]) for row in poems])}
        if name == "couplet":
            found[name]["forms"] = couplet_forms(couplets, texts_made)
    model.close()
    return found


def _regular(texts: Path, count: int) -> list[dict]:
    """The first poems kept back that have lines of five or of seven characters."""
    found = [row for row in _rows(texts / "unseen.jsonl") if _halves("\n".join(row["lines"]))[1] in (5, 7)]
    return found[:count]


def counted(texts_made: dict[str, list[list[str]]], texts: Path) -> dict[str, Any]:
    """The forms of texts that were written before: pairs of prompt and text by recipe."""
    poems, pairs = [text for _, text in texts_made["poem"]], texts_made["couplet"]
    uppers = [prompt.split("\n")[0].removeprefix("上联：") for prompt, _ in pairs]
    return {"poem": poem_forms(poems),
            "real_poems": poem_forms(["\n".join(row["lines"]) for row in _regular(texts, len(poems))]),
            "couplet": couplet_forms(uppers, [text for _, text in pairs])}


def _rows(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _halves(text: str) -> tuple[list[str], int]:
    """Stretches between punctuation, and their length if they all have the same, else 0."""
    halves = [half for half in _BETWEEN.split(text) if half]
    sizes = {len(half) for half in halves}
    return halves, sizes.pop() if len(sizes) == 1 and len(halves) >= 4 else 0


def poem_forms(poems: list[str]) -> dict[str, Any]:
    """Of so many poems: those of at least four halves, all of five or all of seven characters; of these, whose second
    and fourth halves end in one rhyme (beside how many do for ends of different poems, the mean of 20 draws); without a
    repeated half; with a character that is unknown."""
    regular = [halves for poem in poems for halves, size in [_halves(poem)] if size in (5, 7)]
    ends = [(halves[1][-1], halves[3][-1]) for halves in regular]
    found = {"poems": len(poems), "regular": len(regular), "five": sum(len(item[0]) == 5 for item in regular),
             "eight_or_four_halves": sum(len(item) in (4, 8) for item in regular),
             "no_repeated_half": sum(len(set(item)) == len(item) for item in regular),
             "with_unknown": sum(_UNKNOWN in "".join(item) for item in regular)}
    try:
        rhymes = [(rhyme(one), rhyme(other)) for one, other in ends]
    except ImportError:
        return found
    chances = []
    for seed in range(20):
        shuffled = [other for _, other in rhymes]
        random.Random(seed).shuffle(shuffled)
        chances.append(sum(map(_rhymed, (one for one, _ in rhymes), shuffled)))
    return found | {"rhymed": sum(itertools.starmap(_rhymed, rhymes)), "rhymed_by_chance": sum(chances) / len(chances)}


def _rhymed(one: str, other: str) -> bool:
    """Whether two rhyme classes are one; a character without a piece in the vocabulary has none."""
    return one == other and one != _UNKNOWN


def rhyme(character: str) -> str:
    """The rhyme class of a character: its final in Mandarin without the medial."""
    from pypinyin import Style, lazy_pinyin

    if character == _UNKNOWN:
        return character
    final = lazy_pinyin(character, style=Style.FINALS, strict=True)[0].replace("ü", "v")
    same = {"iou": "ou", "uei": "ei", "uen": "en", "ie": "e", "ve": "e", "io": "o", "ueng": "eng", "iong": "ong",
            "in": "en", "ing": "eng", "vn": "en", "van": "an"}
    if final in same:
        return same[final]
    return final[1:] if len(final) > 1 and final[0] in "iuv" and final[1] in "ao" else final


def couplet_forms(uppers: list[str], lowers: list[str]) -> dict[str, int]:
    """Of so many couplets: second lines as long as the first; and of these, those that repeat no character of the first
    at its place."""
    lines = [(upper, _BETWEEN.sub("", lower)) for upper, lower in zip(uppers, lowers, strict=True)]
    fitting = [(upper, lower) for upper, lower in lines if len(lower) == len(upper)]
    return {"couplets": len(lines), "as_long": len(fitting),
            "nothing_repeated": sum(all(a != b for a, b in zip(*pair, strict=True)) for pair in fitting)}


if __name__ == "__main__":
    print(json.dumps(counted(json.loads(Path(sys.argv[1]).read_text("utf-8")), Path(sys.argv[2]))))
