"""Command line: `python -m pangu <verb>`. A new verb is one line in VERBS."""

from __future__ import annotations

import argparse
import sys

from pangu.checkpoints.convert import add_arguments as _convert_arguments
from pangu.evaluation.evaluate import add_arguments as _evaluate_arguments
from pangu.quickstart import add_arguments as _quickstart_arguments
from parallel.common.command import Verb, main


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", metavar="DIR", help="checkpoint to load (none: the newest of output.directory)")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="file of prompts: a recipe or one prompt a line")
    parser.add_argument("--stream", action="store_true", help="print the text of a single prompt as it is generated")


RUN = "pangu.settings:Run"
VERBS = [
    Verb("quickstart", "pangu.quickstart:run", "run the main job: text, vocabulary, training, generated text",
         settings=RUN, arguments=_quickstart_arguments, config="configs/pangu/tiny.yaml"),
    Verb("params", "pangu.params:run", "count parameters exactly, without allocating them", settings=RUN),
    Verb("vocabulary", "pangu.data.prepare:run_vocabulary", "train a vocabulary on data.corpus", settings=RUN),
    Verb("pack", "pangu.data.prepare:run_pack", "turn data.corpus into MindRecord files of token ids", settings=RUN),
    Verb("flatten", "pangu.data.flat:run", "add flat files, which need no MindSpore, to packed records", settings=RUN),
    Verb("train", "pangu.train:run", "train a model on packed records", settings=RUN),
    Verb("generate", "pangu.generation.generate:run_generate", "continue prompts", settings=RUN,
         arguments=_generate_arguments),
    Verb("evaluate", "pangu.evaluation.evaluate:run", "few-shot tasks and multiple-choice questions", settings=RUN,
         arguments=_evaluate_arguments),
    Verb("convert", "pangu.checkpoints.convert:run", "turn checkpoints of other codes into ours and back", settings=RUN,
         arguments=_convert_arguments),
]

if __name__ == "__main__":
    sys.exit(main("pangu", VERBS))
