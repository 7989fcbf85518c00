"""A layout changes nothing: every layout of every model gives the losses, norms and parameters of one device.

Law: 3 training steps of all ranks, executed from the partitioned graphs, equal 3 steps on one device, both in
float64 (`parallel.proof.replay.tolerances`); and recomputation changes no bit. One case runs by
default, the whole grid (`parallel.proof.replay.layout_grid.LAYOUTS` x models) with -m slow.
"""

from __future__ import annotations

import json
import platform
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from parallel.proof.replay.layout_grid import LAYOUTS, REFUSALS, Cell, References, chosen, replay_all

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the dry run needs g++ on x86-64")

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench" / "replay_table.py"
SCRIPT_NAMES = runpy.run_path(str(SCRIPT))
MODELS = SCRIPT_NAMES["MODELS"]
FAST = [("recsys/tokenmixer_large", "stages")]  # PanGu's op 2 is the README's replay
FOUR_GIGABYTES = 4 * 2**20  # in KiB, as getrusage counts
MEASURED = """
import json, resource, sys
from parallel.__main__ import VERBS
from parallel.common.command import main
code = main("parallel", VERBS, sys.argv[1:])
peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([code, *peaks]))
"""


class Grid:
    """Cells by model and layout, replayed when first asked for; compilers and one-device runs are shared."""

    def __init__(self, root, cache) -> None:
        from parallel.proof.compile.rank_compiler import Compilers

        self.root, self.cache, self.compilers = root, cache, Compilers(2)
        self.references: dict[str, References] = {}
        self.cells: dict[tuple[str, str], Cell] = {}

    def sizes(self, model: str) -> list[str]:
        """Overrides that a layout's own come after."""
        return [*MODELS[model].split(), *([f"data.cache={self.cache}"] if model.startswith("recsys") else [])]

    def cell(self, model: str, name: str) -> Cell:
        """A layout's row."""
        config = str(self.root / "configs" / f"{model}.yaml")
        references = self.references.setdefault(model, References(config))
        if (model, name) not in self.cells:
            self.cells[model, name] = next(iter(replay_all(config, [], chosen(name), self.compilers,
                                                           sizes=self.sizes(model), references=references)))
        return self.cells[model, name]


@pytest.fixture(scope="module")
def grid(root, tmp_path_factory):
    made = Grid(root, tmp_path_factory.mktemp("cache"))
    with made.compilers:
        yield made


def check(grid: Grid, model: str, name: str) -> None:
    cell = grid.cell(model, name)
    if cell.figures is None:
        assert any(text in cell.refused for text in REFUSALS), cell.refused
        pytest.skip(cell.refused)
    assert cell.figures["equal"], cell.figures
    assert cell.figures["steps"] == 3 and 0 <= cell.figures["max_parameter_difference"] <= 1e-6
    if cell.layout.twin:
        same = grid.cell(model, cell.layout.twin).digest == cell.digest
        assert same or (model, name) in SCRIPT_NAMES["OTHER_ORDER"], "recomputation changes a bit"


@pytest.mark.parametrize("model, name", FAST)
def test_layout_equals_one_device(grid, model, name):
    check(grid, model, name)
    assert grid.cell(model, name).figures is not None, grid.cell(model, name).refused


class TestTable:
    """The table of `scripts/bench/replay_table.py`, from made-up replays."""

    def cell(self, name: str, equal: bool = True, digest: str = "a", refused: str = "") -> Cell:
        figures = {"world": 2, "equal": equal, "step_seconds": 1.0, "one_device_step_seconds": 1.0,
                   **{f"max_{key}_difference": 2e-6 for key in ("loss", "norm", "parameter", "state")}}
        return Cell(chosen(name)[0], None if refused else figures, digest, refused)

    def test_a_difference_is_bold_and_a_failure(self, capsys):
        cells = {("m/x", "one"): self.cell("one", equal=False), ("m/x", "data"): self.cell("data")}
        table = SCRIPT_NAMES["markdown"](["m/x"], chosen("one,data,op"), cells).splitlines()
        assert table[2:] == ["| one | 2 | **2.0e-06** |", "| data | 2 | 2.0e-06 |", "| op |  |  |",
                             "| largest of the losses | | 2.0e-06 |"]
        assert SCRIPT_NAMES["report"](cells, 3) == 1
        message = json.loads(capsys.readouterr().out)
        assert message["different"] == ["m/x one"] and message["left"] == 1 and message["replays"] == 2

    def test_a_twin_with_another_bit_is_a_failure(self, capsys):
        cells = {("x", "one"): self.cell("one"), ("x", "recompute"): self.cell("recompute", digest="b")}
        assert SCRIPT_NAMES["report"](cells, 2) == 1 and "bit for bit" in capsys.readouterr().out
        cells["x", "recompute"] = self.cell("recompute")
        assert SCRIPT_NAMES["report"](cells, 2) == 0

    def test_only_the_model_may_refuse(self):
        known = self.cell("stages", refused="DCNv2 has no stack of blocks to shard into stages")
        strange = self.cell("op", refused="MindSpore did not compile this layout")
        assert SCRIPT_NAMES["report"]({("x", "one"): self.cell("one"), ("x", "stages"): known}, 2) == 0
        assert SCRIPT_NAMES["report"]({("x", "one"): self.cell("one"), ("x", "op"): strange}, 2) == 1

    def test_finished_replays_are_read_back(self, tmp_path):
        made = self.cell("op")
        SCRIPT_NAMES["keep"](tmp_path / "runs", "x", made)
        assert SCRIPT_NAMES["kept"](tmp_path / "runs") == {("x", "op"): made}


@pytest.mark.slow
@pytest.mark.parametrize("name", [layout.name for layout in LAYOUTS])
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_of_every_model_equals_one_device(grid, model, name):
    check(grid, model, name)


@pytest.mark.slow
@pytest.mark.parametrize("words", [
    ["train.precision=fp16", "train.loss_scale.name=dynamic", "train.loss_scale.initial=1024", "model.attention=flash"],
    ["train.precision=bf16"],  # flash attention by itself
    ["train.precision=fp16", "--float32"], ["train.precision=bf16", "--float32"],
])
def test_half_precision_equals_one_device(root, capsys, words):
    """In float64 what half precision compiles is what float32 compiles; rounded as it declares, within a bound."""
    from parallel.__main__ import VERBS
    from parallel.common.command import main
    from parallel.proof.replay.tolerances import HALF

    sizes = "model.layers=2 model.hidden_size=64 model.sequence_length=32 model.vocabulary_size=64"
    layout = "parallel.data=2 parallel.op=2 train.global_batch_size=8"
    assert main("parallel", VERBS, ["replay", "--config", str(root / "configs/pangu/tiny.yaml"), "--steps", "2",
                                    *sizes.split(), *layout.split(), *words]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    rounded = "--float32" in words
    assert figures["equal"] and figures["precision"] == ("float32" if rounded else "float64")
    assert figures["max_parameter_difference"] < (HALF[words[0][-4:]].parameter if rounded else 1e-9)
    assert (figures["max_parameter_difference"] > 1e-3) == rounded  # half precision was there


@pytest.mark.slow
@pytest.mark.parametrize("model, name", [("pangu/tiny", "all_five_data_4"), ("pangu/tiny", "dropout"),
                                         ("recsys/rankmixer", "data_tokens"),
                                         ("recsys/tokenmixer_large_moe", "expert_half")])
def test_ranks_made_from_others_are_those_that_compile(grid, model, name):
    """Where not every rank is compiled, the others' graphs are those that would have been."""
    from parallel.proof.replay.ranks import compile_ranks
    from parallel.proof.replay.representatives import alike, representatives
    from parallel.proof.replay.settings import with_defaults

    config = str(grid.root / "configs" / f"{model}.yaml")
    keys = with_defaults(config, [*grid.sizes(model), *chosen(name)[0].keys.split()])
    few = compile_ranks(config, keys, grid.compilers, trust=True)
    every = compile_ranks(config, keys, grid.compilers, every_rank=True)
    assert few.compiled_ranks == representatives(few.config, trust=True)
    assert len(few.compiled_ranks) < len(every.compiled_ranks) == few.config.world
    for one, other in zip(few.programs, every.programs, strict=True):
        assert one.graph.parameters == other.graph.parameters
        assert all(alike(*nodes) for nodes in zip(one.graph.main.nodes, other.graph.main.nodes, strict=True))
    assert few.extents == every.extents


@pytest.mark.slow
def test_sixteen_ranks_take_less_than_four_gigabytes(root):
    """The replay of the tiny model itself on 16 ranks, with the processes that compile."""
    keys = chosen("all_five_data_4")[0].keys.split()
    done = subprocess.run([sys.executable, "-c", MEASURED, "replay", "--config", str(root / "configs/pangu/tiny.yaml"),
                           *keys], cwd=root, capture_output=True, text=True, check=True)
    figures, (code, own, child) = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert code == 0 and figures["world"] == 16
    assert own + 2 * child < FOUR_GIGABYTES, f"{own} KiB here, {child} KiB in each of two compiling processes"
