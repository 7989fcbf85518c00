"""TNEWS-like 4-way few-shot evaluation with common beginnings computed once, against computing every request in full.

Both sides are this project's scorer, batched by length with the same buckets; the peer is its --no-sharing, which is
what scoring libraries do by default. Headlines are generated, or TNEWS's own with --data and --tokenizer.

    python scripts/bench/evaluate.py [--data DIR --tokenizer FILE] [--instances 48] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
WIDTH, LAYERS, CONTEXT, VOCABULARY = 256, 6, 1024, 1200


def generated_tnews(folder: Path, count: int) -> Path:
    """TNEWS's files with sentences of the generated world of about a headline's length, and their vocabulary."""
    from data_tools.synthetic.generate import generate_corpus
    from pangu.data.train_vocabulary import train_vocabulary
    from pangu.evaluation.task import load_task

    texts = [document["text"] for document in generate_corpus(300_000)]
    train_vocabulary(texts, folder / "vocabulary.model", size=VOCABULARY)
    draw, labels = random.Random(1), list(load_task("tnews").labels)
    sentences = [line[:24] for text in texts for line in text.split("\n") if len(line) >= 24]
    (folder / "tnews").mkdir()
    for name in ("dev.json", "train.json"):
        rows = [{"id": n, "label_desc": draw.choice(labels), "sentence": draw.choice(sentences)} for n in range(count)]
        (folder / "tnews" / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder / "vocabulary.model"


def main() -> None:
    """Prints a line per round and one JSON object at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", metavar="DIR", help="folder with TNEWS as published (none: generated headlines)")
    parser.add_argument("--tokenizer", metavar="FILE", help="vocabulary for --data")
    parser.add_argument("--instances", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()

    import mindspore

    from pangu.data.tokenizer import Tokenizer
    from pangu.evaluation.instances import InstanceBuilder
    from pangu.evaluation.scoring import Scorer
    from pangu.evaluation.task import Source, load_task

    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(arguments.tokenizer) if arguments.tokenizer else generated_tnews(Path(folder), 400)
        tokenizer = Tokenizer(file)
        source = Source(load_task("tnews"), arguments.data or folder)
        instances = InstanceBuilder(source.task, source, tokenizer, CONTEXT, "few").instances(arguments.instances)
    requests = [request for instance in instances for request in instance.requests]
    tokens = sum(len(prefix) + len(scored) - 1 for prefix, scored in requests)
    model = make_model(tokenizer.vocabulary_size)
    sides = {"ours": Scorer(model, share=True), "peer": Scorer(model, share=False)}
    scores = {name: scorer.loglikelihood(requests) for name, scorer in sides.items()}  # compiles
    seconds = {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name, scorer in sides.items():
            began = time.perf_counter()
            scorer.loglikelihood(requests)
            seconds[name].append(time.perf_counter() - began)
        print(f"round {number + 1}: " + ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()))
    speed = {name: len(instances) / min(times) for name, times in seconds.items()}
    difference = max(abs(a - b) for a, b in zip(*scores.values(), strict=True))
    print(json.dumps({"ratio": round(speed["ours"] / speed["peer"], 2), "ours": round(speed["ours"], 2),
                      "peer": round(speed["peer"], 2), "unit": "instances/s", "instances": len(instances),
                      "examples": instances[0].shots, "tokens_per_request": round(tokens / len(requests), 1),
                      "largest_difference_nats": round(difference, 5), "width": WIDTH, "layers": LAYERS,
                      "threads": os.environ.get("OMP_NUM_THREADS", f"all of {os.cpu_count()}"),
                      "malloc": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")}}))


def make_model(vocabulary: int):
    """An untrained model: speed does not depend on the weights."""
    from mindspore.nn.utils import no_init_parameters

    from pangu.config import ModelConfig
    from pangu.model import PanGuAlpha
    from parallel.layers.parameter import initialize

    with no_init_parameters():
        model = PanGuAlpha(ModelConfig(layers=LAYERS, hidden_size=WIDTH, heads=8, vocabulary_size=vocabulary,
                                       sequence_length=CONTEXT, dropout=0.0))
    initialize(model, 1)
    return model


if __name__ == "__main__":
    main()
