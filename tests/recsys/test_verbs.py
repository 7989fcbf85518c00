"""Verbs sweep and refresh from the command line, small."""

import json

import numpy as np
import pytest

from parallel.checkpoint.folder import resolve_checkpoint
from parallel.checkpoint.full import Checkpoint
from parallel.common.command import main
from recsys.__main__ import VERBS
from recsys.data.vocabulary import Vocabulary

QUIET = ["output.tensorboard=false", "output.loss_curve=false", "train.log_every=5"]


def command(capsys, verb, *words, code=0):
    assert main("recsys", VERBS, [verb, *words]) == code
    out = capsys.readouterr()
    return json.loads(out.out.strip().splitlines()[-1]) if code == 0 else out.err.strip().splitlines()


def test_sweep_trains_the_grid_once_and_draws(tmp_path, capsys):
    words = ["--config", "configs/recsys/dlrm_mlp.yaml", "--grid", "model.hidden=[8],[16,8]", "--seeds", "2",
             "--output",
             str(tmp_path / "sweep"), "data.synthetic.samples=2000", "data.synthetic.users=40",
             "data.synthetic.items=30", f"data.cache={tmp_path / 'cache'}", "train.global_batch_size=100",
             "train.steps=10", "train.validate_every=10", *QUIET]
    figures = command(capsys, "sweep", *words)
    assert figures["points"] == 2 and [row["seeds"] for row in figures["table"]] == [2, 2]
    small, large = figures["table"]
    assert small["dense_parameters"] < large["dense_parameters"] and small["auc_std"] > 0
    assert 0.4 < figures["best_auc"] < 1.0
    assert (tmp_path / "sweep" / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    before = (tmp_path / "sweep" / "sweep.json").stat().st_mtime_ns
    assert command(capsys, "sweep", *words)["table"] == figures["table"]
    assert (tmp_path / "sweep" / "sweep.json").stat().st_mtime_ns == before
    error = command(capsys, "sweep", *words, "train.optimizer.learning_rate=0.1", code=2)
    assert len(error) == 1 and "other overrides" in error[0]
    error = command(capsys, "sweep", "--config", "configs/recsys/dlrm_mlp.yaml", "--grid", "model.hiden=[8]", code=2)
    assert len(error) == 1 and "hidden" in error[0]


CSV = """model: {{name: dlrm_mlp, embedding_size: 4, hidden: [8]}}
data:
  reader: csv
  path: {path}
  cache: {cache}
  labels: [click]
  split: {{by: order, fractions: [0.8, 0.1, 0.1]}}
  features:
    - {{name: user, side: user, group: user}}
    - {{name: item, side: item, group: item, rows: 4}}
train: {{global_batch_size: 20, steps: {steps}, validate_every: 100}}
output: {{directory: {run}, checkpoint_every: 100}}
"""


def log_of(path, items, seed):
    generator = np.random.default_rng(seed)
    rows = [f"{generator.integers(0, 2)},u{generator.integers(0, 5)},{items[generator.integers(0, len(items))]}"
            for _ in range(200)]
    path.write_text("\n".join(["click,user,item", *rows]) + "\n")


def test_refresh_moves_newcomers_in_and_training_goes_on(tmp_path, capsys):
    log_of(tmp_path / "old.csv", ["a", "b", "c", "d"], 0)
    log_of(tmp_path / "new.csv", ["c", "d", "e"], 1)

    def config(path, run, steps):
        file = tmp_path / f"{run}.yaml"
        file.write_text(CSV.format(path=tmp_path / path, cache=tmp_path / "cache", run=tmp_path / run, steps=steps))
        return ["--config", str(file), *QUIET]

    command(capsys, "train", *config("old.csv", "first", 10))
    old = Vocabulary.load(tmp_path / "first" / "vocabulary.json")
    figures = command(capsys, "refresh", *config("new.csv", "first", 10), "--run", str(tmp_path / "first"), "--output",
                      str(tmp_path / "second"), "--decay", "0.01", "--minimum-count", "2")
    assert figures["reset"]["item"] and not figures["reset"]["user"]
    new = Vocabulary.load(tmp_path / "second" / "vocabulary.json")
    values = new.values["item"]
    assert {"c", "d", "e"} <= set(values) and not {"a", "b"} & set(values)
    assert all(values.index(name) == old.values["item"].index(name) for name in "cd")
    one, other = (Checkpoint(resolve_checkpoint(tmp_path / run)) for run in ("first", "second"))
    name = next(name for name in one.names("parameters.safetensors") if name.endswith(".table"))
    changed = np.flatnonzero((one.read(name) != other.read(name)).any(1))
    moment = other.read(f"adam_m.{name}")
    first = changed.tolist()
    assert len(first) == figures["reset"]["item"] and (moment[first] == 0).all() and moment.any()
    resumed = command(capsys, "train", *config("new.csv", "second", 20),
                      f"data.vocabulary={tmp_path / 'second' / 'vocabulary.json'}")
    assert resumed["steps"] == 20 and np.isfinite(resumed["logloss"])


def test_refresh_says_what_is_wrong(tmp_path, capsys):
    error = command(capsys, "refresh", "--config", "configs/recsys/dlrm_mlp.yaml", "--run", str(tmp_path), "--output",
                    str(tmp_path / "out"), code=2)
    assert len(error) == 1 and "vocabulary.json" in error[0]
    error = command(capsys, "refresh", "--config", "configs/recsys/dlrm_mlp.yaml", "--run", str(tmp_path), "--output",
                    str(tmp_path / "out"), "--decay", "2", code=2)
    assert len(error) == 1 and "decay" in error[0]
    error = command(capsys, "train", "--config", "configs/recsys/dlrm_mlp.yaml", f"data.cache={tmp_path}",
                    "data.vocabulary=nowhere.json", code=2)
    assert len(error) == 1 and "nowhere.json" in error[0]




def test_scaling_laws_find_the_exponent_of_a_power_law():
    from recsys.sweep import scaling_laws

    sizes = [1e5, 3e5, 1e6, 1e7]
    rows = [{"dense_parameters": size, "flops_per_sample": 7 * size, "logloss": 2.0 * size**-0.05} for size in sizes]
    laws = scaling_laws(rows)
    for law in laws.values():
        assert law["exponent"] == pytest.approx(-0.05) and law["r2"] == pytest.approx(1.0)
    assert laws["dense_parameters"]["factor"] == pytest.approx(2.0)
    noisy = scaling_laws([{**row, "logloss": row["logloss"] * (1.1 if index % 2 else 1.0)}
                          for index, row in enumerate(rows)])
    assert noisy["dense_parameters"]["r2"] < 0.95
    assert scaling_laws(rows[:2]) == {}
