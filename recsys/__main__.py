"""Command line: `python -m recsys <verb>`. A new verb is one line in VERBS."""

from __future__ import annotations

import sys

from parallel.common.command import Verb, main

RUN = "recsys.settings:Run"
VERBS = [
    Verb("train", "recsys.train:run", "train a ranker on a click log", settings=RUN),
    Verb("evaluate", "recsys.evaluation.evaluate:run", "exact metrics of a checkpoint", settings=RUN,
         arguments="recsys.evaluation.evaluate:add_arguments"),
    Verb("count", "recsys.count:run", "count parameters and FLOPs, without allocating them", settings=RUN),
    Verb("sweep", "recsys.sweep:run", "train a grid of sizes and draw AUC against parameters and FLOPs", settings=RUN,
         arguments="recsys.sweep:add_arguments"),
    Verb("quantize", "recsys.quantization.quantize:run",
         "int8 weights for a checkpoint, their errors, the AUC before and after",
         arguments="recsys.quantization.quantize:add_arguments"),
    Verb("serve", "recsys.serving.server:run", "rank candidates over HTTP",
         settings="recsys.settings:ServeRun", arguments="recsys.serving.server:add_arguments"),
    Verb("bench", "recsys.serving.bench:run", "latency of a ranker: unseparated, separated, cached; float32 and int8",
         settings=RUN, arguments="recsys.serving.bench:add_arguments"),
    Verb("export", "recsys.passes.export:run", "a trained ranker as ONNX or MindIR, for other programs", settings=RUN,
         arguments="recsys.passes.export:add_arguments"),
    Verb("refresh", "recsys.refresh:run", "admit and evict values of open vocabularies after new data", settings=RUN,
         arguments="recsys.refresh:add_arguments"),
]

if __name__ == "__main__":
    sys.exit(main("recsys", VERBS))
