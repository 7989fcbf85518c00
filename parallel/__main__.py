"""Command line: `python -m parallel <verb>`. A new verb is one line in VERBS."""

from __future__ import annotations

import argparse
import sys

from parallel.common.command import Verb, main


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    from parallel.training.launch import add_arguments

    add_arguments(parser)


def _dryrun_arguments(parser: argparse.ArgumentParser) -> None:
    from parallel.proof.dryrun.dryrun import add_arguments

    add_arguments(parser)


def _reshard_arguments(parser: argparse.ArgumentParser) -> None:
    from parallel.checkpoint.reshard import add_arguments

    add_arguments(parser)


def _replay_arguments(parser: argparse.ArgumentParser) -> None:
    from parallel.proof.replay.replay import add_arguments

    add_arguments(parser)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    from parallel.proof.export import add_arguments

    add_arguments(parser)


def _estimate_arguments(parser: argparse.ArgumentParser) -> None:
    from parallel.planning.estimate import add_arguments

    add_arguments(parser)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    from parallel.planning.plan import add_arguments

    add_arguments(parser)


VERBS: list[Verb] = [
    Verb("launch", "parallel.training.launch:run", "run a verb of a model as many processes, on one node or several",
         arguments=_launch_arguments, run_file=True),
    Verb("dryrun", "parallel.proof.dryrun.dryrun:run",
         "compile the training graph of any rank of any cluster and report it",
         arguments=_dryrun_arguments, run_file=True),
    Verb("reshard", "parallel.checkpoint.reshard:run_reshard",
         "cut a checkpoint by the parallel block of a config file",
         arguments=_reshard_arguments, run_file=True),
    Verb("split", "parallel.checkpoint.reshard:run_split",
         "cut a whole checkpoint by the parallel block of a config file",
         arguments=_reshard_arguments, run_file=True),
    Verb("merge", "parallel.checkpoint.reshard:run_merge", "put the slices of a checkpoint together",
         arguments=_reshard_arguments),
    Verb("replay", "parallel.proof.replay.replay:run", "execute all ranks of a layout here and compare with one device",
         arguments=_replay_arguments, run_file=True),
    Verb("export", "parallel.proof.export:run", "write all ranks' graphs as a program that runs without MindSpore",
         arguments=_export_arguments, run_file=True),
    Verb("estimate", "parallel.planning.estimate:run", "memory, communication and time of a step on a cluster",
         arguments=_estimate_arguments, run_file=True),
    Verb("plan", "parallel.planning.plan:run", "search the fastest layout of N devices that fits",
         arguments=_plan_arguments, run_file=True),
]

if __name__ == "__main__":
    sys.exit(main("parallel", VERBS))
