"""`recsys export`: what it leaves is run by onnxruntime as a serving team would, and scores as `recsys evaluate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import onnxruntime  # noqa: E402

from parallel.common.command import main  # noqa: E402
from parallel.common.files import read_json  # noqa: E402
from parallel.task import load_run  # noqa: E402
from recsys.__main__ import VERBS  # noqa: E402
from recsys.evaluation.evaluate import open_log  # noqa: E402
from recsys.evaluation.metrics import Accumulator  # noqa: E402
from recsys.passes.weights import rows_of  # noqa: E402
from tests.recsys.runs import DATA, make_run  # noqa: E402

ROOT = Path(__file__).parents[3]


def command(capsys, verb: str, *words: str, code: int = 0):
    assert main("recsys", VERBS, [verb, *words]) == code
    out = capsys.readouterr()
    return json.loads(out.out.strip().splitlines()[-1]) if code == 0 else out.err.strip().splitlines()[-1]


def typed(*words: str, code: int = 0):
    """`command` in a process of its own: an export with free sizes leaves MindSpore unable to compile other networks
    that the same process goes on with."""
    done = subprocess.run([sys.executable, "-m", "recsys", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == code, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]) if code == 0 else done.stderr.strip().splitlines()[-1]


class Served:
    """The exported folder by onnxruntime and NumPy alone."""

    def __init__(self, folder: Path) -> None:
        self.about = json.loads((folder / "ranker.json").read_text())
        self.passes = {kind: onnxruntime.InferenceSession(str(folder / own["file"]))
                       for kind, own in self.about["passes"].items()}

    def __call__(self, kind: str, *arrays: np.ndarray) -> np.ndarray:
        names = [item["name"] for item in self.about["passes"][kind]["inputs"]]
        return self.passes[kind].run(None, dict(zip(names, arrays, strict=True)))[0]

    def part(self, kind: str, ids: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        own = self.about["columns"][kind]
        return ids[:, own["ids"]].astype(np.int32), numbers[:, own["numbers"]].astype(np.float32)

    def scores(self, ids: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Each row is a user with one candidate; equal users' states are computed once."""
        if "scores" in self.passes:
            return self("scores", *self.part("scores", ids, numbers))
        user_ids, user_numbers = self.part("user", ids, numbers)
        rows = np.concatenate([user_ids, user_numbers.view(np.int32)], 1)
        _, first, index = np.unique(rows, axis=0, return_index=True, return_inverse=True)
        state = self("user", user_ids[first], user_numbers[first])
        return self("candidates", state, index.reshape(-1).astype(np.int32), *self.part("candidates", ids, numbers))


def scored_alike(folder: Path, settings, words: list[str], capsys, tolerance: float = 1e-6) -> dict:
    """Exports a run's checkpoint; its AUC and logloss by onnxruntime are those of `evaluate`."""
    figures = command(capsys, "export", *words, "--output", str(folder))
    message = command(capsys, "evaluate", *words)
    log, served = open_log(settings), Served(folder)
    rows = log.parts["test"]
    ids = np.asarray(rows.ids)
    keys = {name: np.load(folder / "keys" / f"{name}.npy") for name in served.about["dynamic"]}
    if keys:
        from recsys.passes.tasks import whole_spec

        sizes = {**log.vocabulary.sizes(), **{name: len(own) for name, own in keys.items()}}
        ids = rows_of(ids, log.spec, whole_spec(settings, sizes), keys)
    found = Accumulator()
    found.update(np.asarray(rows.labels)[:, 0], served.scores(ids, np.asarray(rows.numbers))[:, 0].astype(np.float64),
                 np.asarray(rows.users))
    own = found.result()
    assert abs(own["auc"] - message["auc"]) <= tolerance and abs(own["logloss"] - message["logloss"]) <= tolerance
    return figures


def words_of(name: str, folder: Path, *more: str) -> list[str]:
    return ["--config", f"configs/recsys/{name}.yaml", *DATA, f"output.directory={folder}",
            f"data.cache={folder.parent / 'data'}", "train.global_batch_size=64", *more]


# Its five compiles are what an export is; every other model is compiled in the slow test.
def test_a_separated_ranker_is_served_by_two_passes_of_any_number_of_rows(tmp_path, capsys):
    settings, _ = make_run(tmp_path / "run", "tokenmixer_large_ug_sep")
    words = words_of("tokenmixer_large_ug_sep", tmp_path / "run")
    figures = scored_alike(tmp_path / "out", settings, words, capsys)
    assert figures["passes"] == ["user", "candidates"] and figures["max_difference"] < 1e-5
    served = Served(tmp_path / "out")
    about = served.about
    assert {item["name"] for item in about["features"]} >= {"user_id", "item_id"}
    ids, numbers = (np.zeros((1, len(about["columns"]["user"][part])), kind)
                    for part, kind in (("ids", np.int32), ("numbers", np.float32)))
    state = served("user", ids, numbers)
    assert state.shape == (1, about["passes"]["user"]["output"]["shape"][1])
    one = served("candidates", state, np.zeros(1, np.int32), *(
        np.zeros((1, len(about["columns"]["candidates"][part])), kind)
        for part, kind in (("ids", np.int32), ("numbers", np.float32))))
    assert one.shape == (1, 1)
    assert (tmp_path / "out" / "vocabulary.json").is_file()
    error = command(capsys, "export", *words, "--output", str(tmp_path / "o"), "--checkpoint", str(tmp_path), code=2)
    assert "checkpoint" in error


@pytest.mark.usefixtures("graph_mode")
def test_mindir_is_loaded_by_mindspore_with_equal_scores(tmp_path):
    make_run(tmp_path / "run", "rankmixer_ug_sep")
    words = words_of("rankmixer_ug_sep", tmp_path / "run")
    figures = typed("export", *words, "--output", str(tmp_path / "out"), "--format", "mindir")
    assert figures["passes"] == ["user", "candidates"] and figures["max_difference"] < 1e-6
    about = read_json(tmp_path / "out" / "ranker.json")
    assert about["passes"]["user"]["file"] == "user.mindir"
    make_run(tmp_path / "moe", "tokenmixer_large_moe")
    error = typed("export", *words_of("tokenmixer_large_moe", tmp_path / "moe"), "--output", str(tmp_path / "out"),
                  "--format", "mindir", code=2)
    assert "take --format onnx" in error


@pytest.mark.slow
@pytest.mark.parametrize("name, more", [
    (name, ()) for name in ("tokenmixer_large", "tokenmixer_large_moe", "rankmixer", "rankmixer_ug_sep", "longer",
                            "dcnv2", "dhen", "hiformer", "wukong", "autoint", "dlrm_mlp")] + [
    ("rankmixer", ("model.moe={experts: 4}",)),
    ("tokenmixer_large", ("model.head={kind: ple, experts: 2, hidden: 16, levels: 2, calibration: true}",))])
def test_every_ranker_is_exported(name, more, tmp_path, capsys):
    settings, _ = make_run(tmp_path / "run", name, *more)
    figures = scored_alike(tmp_path / "out", settings, words_of(name, tmp_path / "run", *more), capsys)
    assert figures["max_difference"] < 1e-5


@pytest.mark.slow
def test_int8_weights_are_widened(tmp_path, capsys):
    settings, _ = make_run(tmp_path / "run", "tokenmixer_large")
    words = words_of("tokenmixer_large", tmp_path / "run")
    command(capsys, "quantize", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "int8"))
    figures = command(capsys, "export", *words, "--checkpoint", str(tmp_path / "int8"), "--output", str(tmp_path / "o"))
    eight = command(capsys, "evaluate", *words, "--checkpoint", str(tmp_path / "int8"))
    log, served = open_log(settings), Served(tmp_path / "o")
    rows, found = log.parts["test"], Accumulator()
    found.update(np.asarray(rows.labels)[:, 0],
                 served.scores(np.asarray(rows.ids), np.asarray(rows.numbers))[:, 0].astype(np.float64),
                 np.asarray(rows.users))
    assert abs(found.result()["logloss"] - eight["logloss"]) < 1e-6 and figures["max_difference"] < 1e-5


@pytest.mark.slow
def test_tables_on_the_host_are_put_into_the_model(tmp_path, capsys):
    words = words_of("dynamic_tables", tmp_path / "run", "train.steps=20", "train.validate_every=20",
                     "output.checkpoint_every=20", "output.tensorboard=false", "output.loss_curve=false")
    command(capsys, "train", *words)
    settings = load_run("configs/recsys/dynamic_tables.yaml", words[2:])[1]
    scored_alike(tmp_path / "out", settings, words, capsys)
    served = Served(tmp_path / "out")
    assert served.about["dynamic"] == ["user_id", "item_id"]
    assert read_json(tmp_path / "out" / "ranker.json")["model"] == "tokenmixer_large"
