"""Every layout of the replay's table that fits 2 to 8 processes, run by torch over gloo, against the replay.

The same compiled graphs on both sides, on packed records and encoded clicks: three steps. In the exact mode loss, norm,
parameters and moments agree in float64 to 1e-9, loss and norm in float32 to 1e-5; so do those of the mode with fused
nodes. The ranks' processes cannot import MindSpore.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from parallel.common.errors import UserError  # noqa: E402
from parallel.proof.compile.rank_compiler import Compilers  # noqa: E402
from parallel.proof.export import write_compiled  # noqa: E402
from parallel.proof.replay.executor import run_step  # noqa: E402
from parallel.proof.replay.layout_grid import LAYOUTS, REFUSALS  # noqa: E402
from parallel.proof.replay.ranks import AllRanks, compile_graphs, read_ranks  # noqa: E402
from parallel.proof.replay.settings import check_layout, check_size, with_defaults  # noqa: E402
from parallel.proof.replay.tolerances import STATE_FLOOR  # noqa: E402
from parallel.torch_runtime.program import Program, start_of  # noqa: E402

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None,
                                reason="compiling needs g++ on x86-64")
ROOT = Path(__file__).parents[3]
STEPS, EXACT, ROUNDED = 3, 1e-9, 1e-5
FIRST_MOMENTS = ("adam_m", "adagrad_a", "rmsprop_s", "rmsprop_u")
WAYS = ("exact/float64", "exact/declared", "eager/declared", "regions/declared")
SIZES = {"pangu/tiny": ["model.layers=2", "model.hidden_size=32", "model.sequence_length=16",
                        "model.vocabulary_size=64", "train.global_batch_size=16"]}
RANKER = ["train.global_batch_size=32", "data.synthetic.samples=2000"]
MODELS = ("pangu/tiny", "recsys/rankmixer", "recsys/tokenmixer_large", "recsys/tokenmixer_large_moe",
          "recsys/rankmixer_ug_sep")
DEFAULT = {("pangu/tiny", "stages"),
           ("recsys/tokenmixer_large_moe", "expert")}
OPTIMIZERS = {
    "lamb": "train.optimizer.name=lamb", "adagrad": "train.optimizer.name=adagrad",
    "rmsprop": "train.optimizer.name=rmsprop train.optimizer.momentum=0.9",
    "no_bias_correction": "train.optimizer.bias_correction=false",
}  # fmt: skip
CASES = [pytest.param(model, layout.name, layout.keys.split(), id=f"{model.partition('/')[2]}-{layout.name}",
                      marks=() if (model, layout.name) in DEFAULT else pytest.mark.slow)
         for model in MODELS for layout in LAYOUTS]
CASES += [pytest.param("pangu/tiny", f"optimizer_{name}", ["parallel.data=2", "parallel.op=2",
                                                           "parallel.optimizer.shard=-1", *keys.split()],
                       id=f"tiny-{name}", marks=pytest.mark.slow) for name, keys in OPTIMIZERS.items()]
CASES += [pytest.param("pangu/tiny", f"parts_{name}", ["parallel.micro_batch_interleave=2", *keys.split()],
                       id=f"tiny-parts_{name}", marks=pytest.mark.slow)
          for name, keys in (("op", "parallel.op=2"), ("sequence", "parallel.op=2 parallel.sequence=true"),
                             ("data_op", "parallel.data=2 parallel.op=2"))]


@dataclass
class Compiled:
    """A layout's graphs on both sides, and the batches."""

    world: AllRanks
    folder: Path
    batches: list[tuple[np.ndarray, ...]]

    @property
    def program(self) -> Program:
        return Program(self.folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from tests.parallel.torch_runtime.records import packed

    return packed(tmp_path_factory.mktemp("data") / "records")


def real_batches(model: str, settings, data: Path) -> list[tuple[np.ndarray, ...]]:
    """Global batches as training draws them."""
    from parallel.training.data_source import sample_numbers

    size, seed, sizes = settings.train.global_batch_size, settings.train.seed, settings.model
    if model.startswith("pangu"):
        from pangu.data.dataset import PackedDataset

        source = PackedDataset(data, batch_size=size, seed=seed, sequence_length=sizes.sequence_length,
                               vocabulary_size=sizes.vocabulary_size)
    else:
        from recsys.data.batches import Batches
        from recsys.data.log import prepare

        log = prepare(settings.data.model_copy(update={"cache": str(data.parent / "clicks")}), sizes.embedding_size)
        source = Batches(log.parts["train"], size, seed, spec=log.spec)
    found = [tuple(batch) for batch in itertools.islice(source.batches(0), STEPS)]
    if sizes.dropout:
        found = [(*batch, sample_numbers(number, size)) for number, batch in enumerate(found)]
    return found


def compiled(model: str, keys: list[str], compilers: Compilers, data: Path, folder: Path) -> Compiled:
    """Compiles a layout and writes its program and batches."""
    from parallel.task import load_run

    config = str(ROOT / f"configs/{model}.yaml")
    keys = with_defaults(config, [*SIZES.get(model, RANKER), *keys])
    try:
        check_size(config, keys)
        check_layout(config, keys)
    except UserError as error:
        known = [why for text, why in REFUSALS.items() if text in str(error)]
        if not known and "of micro-batches on a single rank" not in str(error):
            raise
        pytest.skip(f"refused: {error}")
    settings = load_run(config, keys)[1]
    world = settings.parallel.resolve().world
    if not 2 <= world <= 8:
        pytest.skip(f"a world of {world}")
    made = compile_graphs(config, keys, compilers, compute_dtype="float32", trust=True)
    found = Compiled(read_ranks(*made), folder, real_batches(model, settings, data))
    write_compiled(folder, {"step": (made[0], found.world)}, settings, digest="test")
    np.savez(folder / "batches.npz", **{f"{number}_{place}": array for number, batch in enumerate(found.batches)
                                        for place, array in enumerate(batch)})
    return found


def replayed(case: Compiled, exact: bool) -> tuple[list[list], list[dict[str, np.ndarray]]]:
    """Results of every step by rank, and every rank's parameters and states at the end."""
    program = case.program
    ranks = case.world.start({item.name: start_of(item, None, program.seed) for item in program.tensors}, exact)
    results = [run_step(ranks, case.world.inputs(batch)) for batch in case.batches]
    return results, [rank.state for rank in ranks]


class Ranks:
    """A process that forks the ranks of programs under test: torch is imported once."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        child = Path(__file__).with_name("layout_child.py")
        self.process = subprocess.Popen([sys.executable, str(child)], env=environment, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def run(self, case: Compiled, ways=WAYS) -> None:
        """Runs the ranks of a program and waits for them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        world = case.program.world
        job = {"folder": str(case.folder), "ranks": world, "address": address, "ways": list(ways)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        codes = json.loads(self.process.stdout.readline() or "[]")
        told = "\n".join((case.folder / f"rank-{rank}.log").read_text() for rank in range(world))
        assert codes == [0] * world, told[-3000:]

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def ranks():
    found = Ranks()
    yield found
    found.close()


def far(one: float, other: float) -> float:
    """Relative difference."""
    return abs(one - other) / max(abs(other), 1e-30)


def compared(case: Compiled, way: str, tolerance: float) -> list[dict[str, np.ndarray]]:
    """Checks loss and norm of every step on every rank; each rank's state at the end."""
    results, states = replayed(case, way.endswith("float64"))
    for rank, state in enumerate(states):
        got = np.load(case.folder / f"{way.replace('/', '-')}-{rank}.npz")
        steps = json.loads(str(got["results"]))
        for number, (step, wanted) in enumerate(zip(steps, results, strict=True)):
            loss, norm, finite = (float(item) for item in wanted[rank][:3])
            assert far(step["loss"], loss) < tolerance, (way, rank, number)
            assert far(step["global_norm"], norm) < tolerance, (way, rank, number)
            assert step["finite"] == bool(finite)
        state["torch"] = {name: got[name] for name in got.files if name != "results"}
    return states


def same_states(states: list[dict[str, np.ndarray]], rate: float) -> None:
    """Checks parameters and moments, relative to the largest element of the tensor on any rank; of a gradient that is 0
    but for rounding (an attention key's bias) to what a step can move, or to the largest moment, as the replay does."""
    largest: dict[str, float] = {}
    for state in states:
        for name, value in state.items():
            if name != "torch":
                largest[name] = max(largest.get(name, 0.0), float(np.abs(value).max(initial=0.0)))
    first = max((size for name, size in largest.items() if name.startswith(FIRST_MOMENTS)), default=0.0)
    floors = {"adam_v": (STATE_FLOOR * first) ** 2, **dict.fromkeys(FIRST_MOMENTS, STATE_FLOOR * first)}
    assert first > 0, "no moment has moved"
    for state in states:
        for name, got in state["torch"].items():
            if name in state:
                scale = max(largest[name], floors.get(name.partition(".")[0], rate))
                assert np.abs(got - state[name]).max(initial=0.0) <= EXACT * scale, name


@pytest.mark.parametrize("model, name, keys", CASES)
def test_a_layout_run_by_torch_is_the_replayed_one(model, name, keys, compilers, data, ranks, tmp_path):
    case = compiled(model, keys, compilers, data, tmp_path / "program")
    ranks.run(case)
    states = compared(case, "exact/float64", EXACT)
    same_states(states, case.program.settings["train"]["optimizer"]["learning_rate"])
    compared(case, "exact/declared", ROUNDED)
    compared(case, "eager/declared", ROUNDED)
    compared(case, "regions/declared", ROUNDED)


def test_the_runtime_asks_for_no_mindspore():
    """Every module of the room but the launcher's and Triton's kernels."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts)
               for path in (ROOT / "parallel/torch_runtime").rglob("*.py")
               if path.stem not in ("tiles", "__main__") and "\nimport triton" not in path.read_text()]
    code = ("import sys; sys.path.insert(0, 'tests/parallel/torch_runtime'); import layout_child, importlib; "
            f"[importlib.import_module(name) for name in {modules}]; assert 'mindspore' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
