"""Command line: `python -m pangu <verb>`. A new verb is one line in VERBS."""

from __future__ import annotations

import sys

from parallel.common.command import Verb, main

RUN = "pangu.settings:Run"
VERBS = [
    Verb("quickstart", "pangu.quickstart:run", "run the main job: text, vocabulary, training, generated text",
         settings=RUN, arguments="pangu.quickstart:add_arguments", config="configs/pangu/quickstart.yaml"),
    Verb("count", "pangu.count:run", "count parameters exactly, without allocating them", settings=RUN),
    Verb("train-vocabulary", "pangu.data.prepare:run_train_vocabulary", "train a vocabulary on data.corpus",
         settings=RUN),
    Verb("pack", "pangu.data.prepare:run_pack", "turn data.corpus into MindRecord files of token ids", settings=RUN),
    Verb("flatten", "pangu.data.flatten:run", "add flat files, which need no MindSpore, to packed records",
         settings=RUN),
    Verb("train", "pangu.train:run", "train a model on packed records", settings=RUN),
    Verb("make-pairs", "pangu.adaptation.finetune:run_make_pairs", "pairs of prompt and answer of a task's examples",
         arguments="pangu.adaptation.finetune:pairs_arguments"),
    Verb("finetune", "pangu.adaptation.finetune:run", "train a trained model, or adapters for it, on such pairs",
         settings=RUN),
    Verb("extract-adapter", "pangu.adaptation.adapters:run_extract", "take the adapters out of a checkpoint",
         arguments="pangu.adaptation.adapters:extract_arguments"),
    Verb("merge-adapter", "pangu.adaptation.adapters:run_merge", "add adapters to the weights they belong to",
         arguments="pangu.adaptation.adapters:merge_arguments"),
    Verb("generate", "pangu.generation.generate:run_generate", "continue prompts", settings=RUN,
         arguments="pangu.generation.generate:add_arguments"),
    Verb("evaluate", "pangu.evaluation.evaluate:run", "few-shot tasks and multiple-choice questions", settings=RUN,
         arguments="pangu.evaluation.evaluate:add_arguments"),
    Verb("serve", "pangu.serving.server:run", "answer over HTTP as OpenAI's API does, with a page to try it",
         settings="pangu.settings:ServeRun", arguments="pangu.serving.server:add_arguments"),
    Verb("quantize", "pangu.quantize:run", "make a checkpoint with int8 weights", settings=RUN,
         arguments="pangu.quantize:add_arguments"),
    Verb("export", "pangu.export:run", "the reading of a prompt and the single step as MindIR files",
         settings=RUN, arguments="pangu.export:add_arguments"),
    Verb("convert", "pangu.checkpoints.convert:run", "convert checkpoints of other codes, both ways", settings=RUN,
         arguments="pangu.checkpoints.convert:add_arguments"),
]

if __name__ == "__main__":
    sys.exit(main("pangu", VERBS))
