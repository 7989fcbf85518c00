"""Command line: `python -m recsys <verb>`. A new verb is one line in VERBS."""

from __future__ import annotations

import argparse
import sys

from parallel.common.command import Verb, main


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint to load (none: the newest of output.directory)")
    parser.add_argument("--part", choices=["train", "validation", "test"], default="test", help="rows to evaluate on")


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    from recsys.sweep import add_arguments

    add_arguments(parser)


def _refresh_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="DIR", required=True, help="folder of the run whose vocabulary is refreshed")
    parser.add_argument("--out", metavar="DIR", required=True,
                        help="folder for the new vocabulary.json and checkpoint; train goes on from there with "
                             "output.directory=DIR data.vocabulary=DIR/vocabulary.json")
    parser.add_argument("--decay", type=float, default=0.5, metavar="X", help="factor of the old counts (default 0.5)")
    parser.add_argument("--minimum-count", type=float, metavar="N",
                        help="decayed count below which a value is evicted (none: each feature's minimum_count)")


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    from recsys.quantization.quantize import add_arguments

    add_arguments(parser)


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", required=True,
                        help="the run or checkpoint to serve, float or quantized; reloads look for a newer one there")
    parser.add_argument("--run-config", metavar="FILE",
                        help="settings of the run (default: those kept in the checkpoint)")


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from recsys.serving.bench import add_arguments

    add_arguments(parser)


RUN = "recsys.settings:Run"
VERBS = [
    Verb("train", "recsys.train:run", "train a ranker on a click log", settings=RUN),
    Verb("evaluate", "recsys.evaluate:run", "exact metrics of a checkpoint", settings=RUN,
         arguments=_evaluate_arguments),
    Verb("params", "recsys.params:run", "count parameters and FLOPs, without allocating them", settings=RUN),
    Verb("sweep", "recsys.sweep:run", "train a grid of sizes and draw AUC against parameters and FLOPs", settings=RUN,
         arguments=_sweep_arguments),
    Verb("quantize", "recsys.quantization.quantize:run",
         "int8 weights for a checkpoint, their errors, the AUC before and after",
         arguments=_quantize_arguments),
    Verb("serve", "recsys.serving.server:run", "rank candidates over HTTP",
         settings="recsys.serving.settings:ServeSettings", arguments=_serve_arguments),
    Verb("bench", "recsys.serving.bench:run", "latency of a ranker: entangled, separated, cached; float32 and int8",
         settings=RUN, arguments=_bench_arguments),
    Verb("refresh", "recsys.refresh:run", "admit and evict values of open vocabularies after new data", settings=RUN,
         arguments=_refresh_arguments),
]

if __name__ == "__main__":
    sys.exit(main("recsys", VERBS))
