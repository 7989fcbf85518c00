"""SIGKILL to one rank and then to the others, in layouts of both families that run on torch over gloo, one process and
many: the ranks as the launcher starts them, of programs exported once."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

from campaigns.base import Campaign
from campaigns.children import Child
from campaigns.kills import CLICKS, LIMIT, PANGU, ROOT, TRAIN, Job, kill_all, kill_few, trained

GOAL, ALONE = 10, 100
_DEEP = ["parallel.pipeline.stages=2", "parallel.pipeline.micro_batches=2"]
LAYOUTS = {
    "pangu one process on torch": ("pangu", ["parallel.backend=torch"]),
    "ranker one process on torch": ("rankmixer", ["parallel.backend=torch"]),
    "pangu data 2": ("pangu", ["parallel.data=2", "parallel.backend=torch"]),
    "pangu op 2": ("pangu", ["parallel.op=2"]),
    "pangu 2 stages": ("pangu", _DEEP),
    "pangu data 2, sharded optimizer": ("pangu", ["parallel.data=2", "parallel.optimizer.shard=-1"]),
    "pangu op 2 x 2 stages": ("pangu", ["parallel.op=2", *_DEEP]),
    "pangu data 2 x op 2, sequence parallel": ("pangu", ["parallel.data=2", "parallel.op=2", "parallel.sequence=true"]),
    "pangu op 2, dropout, bf16": ("pangu", ["parallel.op=2", "model.dropout=0.1", "train.precision=bf16"]),
    "experts 2": ("tokenmixer_large_moe", ["parallel.data=2", "parallel.expert=2"]),
    "ranker data 2, sharded optimizer": ("rankmixer", ["parallel.data=2", "parallel.optimizer.shard=-1"]),
    "ranker op 2": ("rankmixer", ["parallel.op=2"]),
    "ranker tables over 2": ("dlrm_mlp", ["parallel.data=2", "parallel.backend=torch", "model.lookup.by=alltoall"]),
    "ranker 2 stages": ("tokenmixer_large", _DEEP),
}
"""Name: (family, or file under configs/recsys; keys)."""


def run(campaign: Campaign) -> None:
    """All layouts, by what is missing; one in the suite."""
    home = campaign.folder / "layouts" / "home"
    home.mkdir(parents=True, exist_ok=True)
    if campaign.short:
        kill_few(campaign, "layouts", job("pangu data 2, sharded optimizer", home))
    else:
        kill_all(campaign, "layouts", lambda home: [job(name, home) for name in LAYOUTS])


def job(name: str, home: Path) -> Job:
    """The ranks of a layout."""
    family, keys = LAYOUTS[name]
    if family == "pangu":
        words = [*PANGU, *TRAIN, f"data.directory={home}/records"]
        config = ROOT / "configs/pangu/tiny.yaml"
    else:
        words = [*CLICKS, *TRAIN, f"data.cache={home}/cache"]
        config = ROOT / f"configs/recsys/{family}.yaml"
    program = home / "programs" / name.replace(" ", "_").replace(",", "")

    def prepare(place: Path) -> None:
        if not program.exists():
            if family == "pangu":
                from campaigns.damage import records

                records(home)
            export = Child(["parallel", "export", "--config", str(config), "--output", str(program), *words, *keys],
                           home / f"{program.name}.log")
            if not export.ended(LIMIT) or export.code != 0:
                raise RuntimeError(f"{name}: the export failed: {export.told()[-3000:]}")

    return Job(name, ranks_of(program), trained, ALONE if "one process" in name else GOAL, prepare)


def ranks_of(program: Path) -> Callable[[Path], list[Child]]:
    """Starts the ranks of a program, as the launcher does."""
    def start(place: Path) -> list[Child]:
        from parallel.torch_runtime.program import Program
        from parallel.torch_runtime.run import settings_of

        opened = Program(program)
        settings = place / "settings.json"
        settings.write_text(json.dumps(settings_of(opened, [f"output.directory={place}/run"]).model_dump(mode="json")))
        words = ["parallel.torch_runtime", "rank", str(program), "--settings", str(settings), "--device", "cpu"]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return [Child(words, place / f"rank_{rank}.log", RANK=str(rank), WORLD_SIZE=str(opened.world),
                      LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(opened.world), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), PARALLEL_MEET_SECONDS="60") for rank in range(opened.world)]

    return start
