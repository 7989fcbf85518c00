"""Command line: `python -m parallel.torch_runtime <verb>`, on a machine that has torch and needs no MindSpore."""

from __future__ import annotations

import sys

from parallel.common.command import Verb, main

VERBS = [
    Verb("run", "parallel.torch_runtime.run:run", "train an exported program, one process for each of its ranks",
         arguments="parallel.torch_runtime.run:add_arguments", overrides=True),
    Verb("rank", "parallel.torch_runtime.rank:run", "one process of a run; RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT "
         "say which", arguments="parallel.torch_runtime.rank:add_arguments"),
]

if __name__ == "__main__":
    sys.exit(main("parallel.torch_runtime", VERBS))
