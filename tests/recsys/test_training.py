"""Training on the shared trainer: it learns, resumes to the bit, evaluates what it trained."""

import json
import shutil

import numpy as np
import pytest

from parallel.checkpoint.full import load_parameters
from parallel.common.command import main
from parallel.common.settings import load_settings
from recsys.__main__ import VERBS
from recsys.build import loss_network, spec_of
from recsys.data.log import prepare
from recsys.evaluation.log_metrics import Evaluation
from recsys.evaluation.metrics import auc
from recsys.settings import Run

CONFIG = "configs/recsys/rankmixer.yaml"
SMALL = ["data.synthetic.samples=3000", "data.synthetic.users=60", "data.synthetic.items=40", "model.width=16",
         "data.synthetic.strength=2", "model.tokens=4", "model.layers=1", "train.global_batch_size=64",
         "train.validate_every=30", "train.steps=60", "train.optimizer.learning_rate=0.01",
         "model.moe={experts: 2, router: dtsi, penalty: 0.001}", "output.tensorboard=false",
         "output.loss_curve=false", "train.sparse_optimizer={name: adagrad, learning_rate: 0.1}",
         "data.labels=[click, like]", "model.dropout=0.1"]


pytestmark = pytest.mark.usefixtures("graph_mode")


def overrides(folder, *more):
    return [*SMALL, f"data.cache={folder / 'cache'}", f"output.directory={folder / 'run'}", *more]


def command(verb, words, capsys):
    assert main("recsys", VERBS, [verb, "--config", CONFIG, *words]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run in two halves and the same run without a stop."""
    from recsys.train import run

    results = {}
    for name, stops in {"straight": [60], "resumed": [25, 60]}.items():
        folder = tmp_path_factory.mktemp(name)
        for stop in stops:
            words = overrides(folder, f"train.steps={stop}", "output.checkpoint_every=5")
            settings = load_settings(Run.for_file(CONFIG, words), CONFIG, words)
            figures = run(settings)
        results[name] = (folder, settings, figures)
    return results


def test_it_learns_and_says_so(trained):
    _, _, figures = trained["straight"]
    assert {"auc", "gauc", "uauc", "logloss", "samples_per_second", "parameters", "checkpoint"} <= set(figures)
    assert 0.62 < figures["auc"] < figures["bayes_auc"]
    assert {"auc_like", "logloss_like"} <= set(figures)
    assert figures["best_step"] in (30, 60) and figures["steps"] == 60


def test_a_stopped_and_resumed_run_is_the_uninterrupted_run(trained):
    networks = []
    for folder, settings, figures in trained.values():
        network = loss_network(settings, spec_of(settings), 2)
        load_parameters(figures["checkpoint"], list(network.get_parameters()))
        networks.append({p.name: p.asnumpy().copy() for p in network.get_parameters()})
        assert (folder / "run" / "vocabulary.json").is_file()
    assert networks[0].keys() == networks[1].keys() and len(networks[0]) > 10
    for name, value in networks[0].items():
        assert np.array_equal(value, networks[1][name]), name
    factor = next(value for name, value in networks[0].items() if name.endswith("factor"))
    assert factor != np.float32(0.001)
    one, other = (result[2] for result in trained.values())
    assert one["auc"] == other["auc"] and one["logloss"] == other["logloss"]


def test_evaluate_gives_the_same_figures_from_disk(trained, capsys):
    folder, _, figures = trained["straight"]
    best = command("evaluate", [*overrides(folder), "--checkpoint", str(folder / "run" / "best")], capsys)
    assert best["auc"] == pytest.approx(figures["auc"], abs=1e-9)
    assert best["logloss_like"] == pytest.approx(figures["logloss_like"], abs=1e-7)
    other = command("evaluate", [*overrides(folder), "--checkpoint", str(folder / "run" / "best"), "--part", "train"],
                    capsys)
    assert other["samples"] == 2400 and other["auc"] > best["auc"] - 0.05


def test_metrics_are_those_of_all_rows_whatever_the_batch(trained):
    _, settings, figures = trained["straight"]
    log = prepare(settings.data, settings.model.embedding_size)
    model = loss_network(settings, log.spec, 2).model
    load_parameters(figures["checkpoint"], list(model.get_parameters()))
    results = [Evaluation(model, log.parts["test"], log.labels, batch)(0) for batch in (300, 77)]
    assert results[0]["auc"] == pytest.approx(results[1]["auc"], abs=1e-6)
    labels, scores, _ = zip(*Evaluation(model, log.parts["test"], log.labels, 300).predictions(), strict=True)
    assert results[0]["auc"] == pytest.approx(auc(np.concatenate(labels)[:, 0], np.concatenate(scores)[:, 0]))


def test_a_checkpoint_of_another_model_is_refused(trained, capsys):
    folder, _, _ = trained["straight"]
    words = overrides(folder, "model.width=32")
    assert main("recsys", VERBS, ["evaluate", "--config", CONFIG, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and "shape" in error[0]


def test_a_resume_under_another_schedule_says_what_changed(trained, tmp_path, capsys):
    folder, _, _ = trained["resumed"]
    shutil.copytree(folder, tmp_path / "copy")
    words = overrides(tmp_path / "copy", "train.steps=61", "train.optimizer.learning_rate=0.002",
                      "train.optimizer.schedule.warmup_steps=3", "train.validate_every=null")
    assert main("recsys", VERBS, ["train", "--config", CONFIG, *words]) == 0
    said = capsys.readouterr().err
    assert "train.optimizer.learning_rate was" in said and "and is 0.002: the run will differ" in said
    assert "train.optimizer.schedule.warmup_steps was" in said and "and is 3: the run will differ" in said
    assert "going on from" in said and "(step 60)" in said
