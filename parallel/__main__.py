"""Command line: `python -m parallel <verb>`. A new verb is one line in VERBS."""

from __future__ import annotations

import sys

from parallel.common.command import Verb, main

_DRYRUN, _REPLAY = "parallel.proof.dryrun.dryrun", "parallel.proof.replay.replay"
_RESHARD, _EXPORT = "parallel.checkpoint.reshard", "parallel.proof.export"
VERBS: list[Verb] = [
    Verb("launch", "parallel.launch.launch:run", "run a verb of a model in several processes, on one node or several",
         arguments="parallel.launch.launch:add_arguments", run_file=True, passes=True),
    Verb("preflight", "parallel.launch.preflight:run", "look at the machines of a run before anything is compiled",
         arguments="parallel.launch.preflight:add_arguments", run_file=True),
    Verb("preflight-rank", "parallel.launch.preflight_rank:run", "one process of preflight",
         arguments="parallel.launch.preflight_rank:add_arguments"),
    Verb("dryrun", f"{_DRYRUN}:run", "compile the training graph of any rank of any cluster and report it",
         arguments=f"{_DRYRUN}:add_arguments", run_file=True),
    Verb("reshard", f"{_RESHARD}:run_reshard", "shard a checkpoint by the parallel block of a config file",
         arguments=f"{_RESHARD}:add_arguments", run_file=True),
    Verb("merge", f"{_RESHARD}:run_merge", "put the slices of a checkpoint together",
         arguments=f"{_RESHARD}:add_arguments"),
    Verb("replay", f"{_REPLAY}:run", "execute all ranks of a layout here and compare with one device",
         arguments=f"{_REPLAY}:add_arguments", run_file=True),
    Verb("export", f"{_EXPORT}:run", "write all ranks' graphs as a program that runs without MindSpore",
         arguments=f"{_EXPORT}:add_arguments", run_file=True),
    Verb("estimate", "parallel.planning.estimate:run", "memory, communication and time of a step on a cluster",
         arguments="parallel.planning.estimate:add_arguments", run_file=True),
    Verb("plan", "parallel.planning.plan:run", "search the fastest layout of N devices that fits",
         arguments="parallel.planning.plan:add_arguments", run_file=True),
]

if __name__ == "__main__":
    sys.exit(main("parallel", VERBS))
