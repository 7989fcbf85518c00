"""The planner against the dry run's compiled graphs: three layouts by default, all of them with `-m slow`."""

from __future__ import annotations

import json
import sys
from collections import Counter

import pytest

from parallel.task import load_run
from tests.parallel.planning.test_planning import CLUSTER, EVERYTHING, RANKER, ROOT, TINY, figures

MOE = ROOT / "configs/recsys/tokenmixer_large_moe.yaml"
PIPE = "parallel.pipeline.stages=2 parallel.pipeline.micro_batches=4 "
EIGHT = "train.global_batch_size=8 "
GRID = {
    # name: config, rank, overrides
    "data and op": (TINY, 0, "parallel.data=2 parallel.op=2 " + EIGHT),
    "vocabulary whole": (TINY, 2, "parallel.op=2 parallel.vocabulary=false " + PIPE + EIGHT),
    "op 4": (TINY, 0, "parallel.op=4 " + EIGHT),
    "all of them, first stage": (TINY, 0, " ".join(EVERYTHING)),
    "all of them, last stage, sequence": (TINY, 4, " ".join([*EVERYTHING, "parallel.sequence=true"])),
    "sequence": (TINY, 0, "parallel.data=2 parallel.op=2 parallel.sequence=true parallel.optimizer.shard=-1 " + EIGHT),
    "sequence, op alone": (TINY, 0, "parallel.op=2 parallel.sequence=true " + EIGHT),
    "first stage": (TINY, 0, "parallel.data=2 train.global_batch_size=16 " + PIPE),
    "last stage": (TINY, 2, "parallel.data=2 train.global_batch_size=16 " + PIPE),
    "third of four stages": (TINY, 4, "parallel.data=2 parallel.pipeline.stages=4 parallel.pipeline.micro_batches=4 "
                             "parallel.optimizer.shard=-1"),
    "interleaved, first": (TINY, 0, PIPE + "parallel.pipeline.schedule=interleaved parallel.pipeline.interleave=2 "
                           "model.layers=6 " + EIGHT),
    "interleaved, last": (TINY, 1, PIPE + "parallel.pipeline.schedule=interleaved parallel.pipeline.interleave=2 "
                          "model.layers=6 " + EIGHT),
    "gpipe": (TINY, 0, PIPE + "parallel.pipeline.schedule=gpipe " + EIGHT),
    "dropout": (TINY, 0, "parallel.data=2 parallel.op=2 model.dropout=0.1 " + EIGHT),
    "dropout, recomputed, last stage": (TINY, 4, "parallel.data=2 parallel.op=2 parallel.recompute.policy=full "
                                        "model.dropout=0.1 train.global_batch_size=16 " + PIPE),
    "flash": (TINY, 0, "parallel.data=2 parallel.op=2 model.attention=flash " + EIGHT),
    "flash, recomputed, last stage": (TINY, 4, "parallel.data=2 parallel.op=2 parallel.recompute.policy=full "
                                      "parallel.sequence=true model.attention=flash train.global_batch_size=16 "
                                      + PIPE),
    "flash, dropout": (TINY, 0, "parallel.data=2 parallel.op=2 model.attention=flash model.dropout=0.1 " + EIGHT),
    "flash, dropout, first stage": (TINY, 0, "parallel.data=2 parallel.op=2 model.attention=flash model.dropout=0.1 "
                                    "parallel.recompute.policy=full train.global_batch_size=16 " + PIPE),
    "full recomputation": (TINY, 0, "parallel.data=2 parallel.op=2 parallel.recompute.policy=full " + EIGHT),
    "sliced": (TINY, 0, "parallel.data=2 parallel.op=2 parallel.recompute.policy=full "
               "parallel.recompute.slice_activations=true " + EIGHT),
    "sliced, last stage": (TINY, 4, "parallel.data=2 parallel.op=2 parallel.recompute.policy=full model.layers=6 "
                           "parallel.recompute.slice_activations=true train.global_batch_size=16 " + PIPE),
    "selective": (TINY, 0, "parallel.data=2 parallel.op=2 parallel.recompute.policy=selective " + EIGHT),
    "selective, last stage": (TINY, 4, "parallel.data=2 parallel.op=2 parallel.recompute.policy=selective "
                              "train.global_batch_size=16 " + PIPE),
    "sequence, norms recomputed": (TINY, 0, "parallel.data=2 parallel.op=2 parallel.sequence=true "
                                   "parallel.recompute.policy=selective parallel.recompute.cells=[norm1,norm2] "
                                   + EIGHT),
    "part of an optimizer shard": (TINY, 0, "parallel.data=4 parallel.op=2 parallel.optimizer.shard=2 "
                                   "parallel.recompute.policy=selective " + EIGHT),
    "accumulation": (TINY, 0, "parallel.data=2 parallel.op=2 train.accumulation=4 train.global_batch_size=16"),
    "shard level 2": (TINY, 0, "parallel.data=4 parallel.optimizer.shard=-1 parallel.optimizer.level=2 " + EIGHT),
    "shard level 2, accumulation": (TINY, 0, "parallel.data=4 parallel.optimizer.shard=-1 parallel.optimizer.level=2 "
                                    "train.accumulation=4 train.global_batch_size=16"),
    "shard level 3": (TINY, 0, "parallel.data=4 parallel.optimizer.shard=-1 parallel.optimizer.level=3 " + EIGHT),
    "shard level 3, accumulation": (TINY, 0, "parallel.data=4 parallel.optimizer.shard=-1 parallel.optimizer.level=3 "
                                    "train.accumulation=4 train.global_batch_size=16"),
    "ranker": (RANKER, 0, "parallel.data=2 parallel.op=2 parallel.optimizer.shard=-1"),
    "ranker, op alone": (RANKER, 0, "parallel.op=2"),
    "ranker sharded by tokens": (RANKER, 0, "parallel.data=4 parallel.op=2 model.op_sharding=tokens"),
    "ranker, first stage": (RANKER, 0, "parallel.data=2 parallel.pipeline.stages=2 parallel.pipeline.micro_batches=2"),
    "ranker recomputed": (RANKER, 0, "parallel.data=2 parallel.recompute.policy=full"),
    "experts": (MOE, 0, "parallel.data=2"),
    "experts sharded": (MOE, 0, "parallel.data=4 parallel.expert=2 model.moe.experts=5 model.width=80"),
    **{f"{name} {words}": (ROOT / f"configs/recsys/{name}.yaml", 0, words) for name, words in (
        ("tokenmixer_large", "parallel.data=2 parallel.op=2 parallel.optimizer.shard=-1"),
        ("rankmixer_ug_sep", "parallel.data=2 parallel.op=2"), ("hiformer", "parallel.data=2 parallel.op=2"),
        ("wukong", "parallel.data=4 parallel.optimizer.shard=-1"),
        ("dcnv2", "parallel.data=4 parallel.optimizer.shard=2"), ("autoint", "parallel.data=2"),
        ("longer", "parallel.data=2 parallel.optimizer.shard=-1 train.precision=fp32"),
        ("dlrm_mlp", "parallel.data=2 parallel.op=2"))},
    **{f"{name} in stages": (ROOT / f"configs/recsys/{name}.yaml", 0, "parallel.data=2 parallel.pipeline.stages=2")
       for name in ("tokenmixer_large_ug_sep", "rankmixer_ug_sep", "hiformer", "autoint", "dhen")},
}
QUICK = ("all of them, last stage, sequence", "ranker")


def against_dry_run(compilers, name: str) -> None:
    """Parameters, states, gradients and every collective to the byte, kept activations but for a few scalars."""
    from parallel.proof.compile.rank_compiler import Request
    from parallel.proof.dryrun.dryrun import read_rank

    config, rank, words = GRID[name]
    overrides = ["train.precision=fp16", *words.split()]
    layout = load_run(config, overrides)[1].parallel.resolve()
    report = read_rank(compilers.compile([Request(layout.world, rank, str(config), overrides)])[0])
    ours, _, _ = figures(config, overrides, rank // (layout.data * layout.op))
    mine, theirs = Counter(), Counter()
    for collective, times in ours.collectives.items():
        mine[collective.kind, collective.dimension, collective.bytes] += times
    for item in report.collectives:
        theirs[item.kind, item.dimension, item.bytes] += item.times
    assert mine == theirs
    for kind in ("parameters", "optimizer", "gradients"):
        assert getattr(ours.memory, kind) == getattr(report.memory, kind) > 0, kind
    assert ours.memory.activations == pytest.approx(report.memory.activations, abs=64)


needs_plugin = pytest.mark.skipif(sys.platform != "linux", reason="the dry run needs the Linux x86-64 wheel")


@needs_plugin
@pytest.mark.parametrize("name", QUICK)
def test_layout_equals_the_dry_run(compilers, name):
    against_dry_run(compilers, name)


@needs_plugin
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in GRID if name not in QUICK])
def test_grid_equals_the_dry_run(compilers, name):
    against_dry_run(compilers, name)


@needs_plugin
@pytest.mark.slow
def test_plan_confirms_its_winner(capsys):
    from parallel.__main__ import VERBS
    from parallel.common.command import main

    words = ["--config", str(TINY), "--cluster", str(CLUSTER), "--devices", "8", "train.precision=fp16"]
    assert main("parallel", VERBS, ["plan", *words]) == 0
    message = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert message["confirmed_place"] == 1
    assert all(ours == pytest.approx(dry, abs=64) for ours, dry in message["confirmed"].values())
