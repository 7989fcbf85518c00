"""`recsys evaluate`, `serve` and `bench` of rankers that are sharded over processes, from the command: one device's
metrics and scores."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

from parallel.common.command import main  # noqa: E402
from parallel.common.errors import UserError  # noqa: E402
from parallel.task import load_run  # noqa: E402
from recsys.__main__ import VERBS  # noqa: E402
from recsys.data.columns import features_of  # noqa: E402
from recsys.data.log import prepare  # noqa: E402
from recsys.passes.tasks import check_inference, inference_kinds  # noqa: E402
from recsys.saved_model import load  # noqa: E402
from recsys.serving.engine import Engine  # noqa: E402
from recsys.serving.requests import read_request  # noqa: E402
from recsys.serving.settings import EngineSettings  # noqa: E402
from tests.recsys.runs import DATA, add_checkpoint, body_of, make_run, plain  # noqa: E402

pytestmark = pytest.mark.usefixtures("graph_mode")
NAMES = ("auc", "gauc", "uauc", "logloss", "ne")


def words_of(name: str, folder: Path, *more: str) -> list[str]:
    return ["--config", f"configs/recsys/{name}.yaml", *DATA, f"output.directory={folder}",
            f"data.cache={folder.parent / 'data'}", "train.global_batch_size=8", *more]


def launch(words: list[str], nproc: int, verb: str, *passed: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "parallel", "launch", *words, "--nproc", str(nproc), "--run", verb, "--", *passed]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def figures_of(process: subprocess.Popen) -> dict:
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-3000:]
    return json.loads(out.splitlines()[-1])


def evaluated(capsys, words: list[str]) -> dict:
    assert main("recsys", VERBS, ["evaluate", *words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def same_metrics(capsys, tmp_path: Path, name: str, nproc: int, layout: list[str], *more: str) -> None:
    make_run(tmp_path / "run", name, *more)
    words = words_of(name, tmp_path / "run", *more)
    told = figures_of(launch([*words, *layout], nproc, "evaluate"))
    wanted = evaluated(capsys, words)
    assert told["samples"] == wanted["samples"] and told["ranks"] == nproc
    assert [told[name] for name in NAMES] == pytest.approx([wanted[name] for name in NAMES], abs=1e-5)


# A launch compiles the graphs of two ranks and starts them.
def test_metrics_over_two_processes_are_those_of_one(tmp_path, capsys):
    same_metrics(capsys, tmp_path, "tokenmixer_large", 2, ["parallel.op=2"])


@pytest.mark.slow
@pytest.mark.parametrize("name, nproc, layout, more", [
    ("tokenmixer_large", 4, ["parallel.op=2"], []),  # two groups share the rows
    ("tokenmixer_large", 2, ["parallel.op=2"], ["model.op_sharding=tokens"]),
    ("tokenmixer_large", 2, ["parallel.op=1", "parallel.pipeline.stages=2"], []),
    ("tokenmixer_large", 4, ["parallel.op=2", "parallel.pipeline.stages=2"], []),
    ("tokenmixer_large_moe", 2, ["parallel.op=2"], ["model.op_sharding=tokens"]),
    ("tokenmixer_large_moe", 2, ["parallel.op=2"], ["model.op_sharding=tokens", "model.moe.dispatch=dropless"]),
    ("tokenmixer_large_ug_sep", 2, ["parallel.op=2"], []),
    ("rankmixer", 4, ["parallel.op=4"], []),
    ("dcnv2", 2, ["parallel.op=2"], []),
])
def test_metrics_under_every_layout_are_those_of_one_device(name, nproc, layout, more, tmp_path, capsys):
    same_metrics(capsys, tmp_path, name, nproc, layout, *more)


def quantize(folder: Path) -> None:
    assert main("recsys", VERBS, ["quantize", "--checkpoint", str(folder / "run"), "--output", str(folder / "int8"),
                                  "--part", "none"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name, nproc, layout", [
    ("tokenmixer_large", 2, ["parallel.op=2"]),
    ("tokenmixer_large", 2, ["parallel.op=2", "model.op_sharding=tokens"]),
    ("tokenmixer_large", 2, ["parallel.op=1", "parallel.pipeline.stages=2"]),
    ("tokenmixer_large_moe", 2, ["parallel.op=2", "model.op_sharding=tokens"]),
    ("rankmixer", 4, ["parallel.op=4"]),
])
def test_int8_weights_over_several_processes_are_those_of_one(name, nproc, layout, tmp_path, capsys):
    more = [word for word in layout if word.startswith("model.")]
    make_run(tmp_path / "run", name, *more)
    quantize(tmp_path)
    told = figures_of(launch([*words_of(name, tmp_path / "int8"), *layout], nproc, "evaluate"))
    wanted = evaluated(capsys, words_of(name, tmp_path / "int8", *more))
    assert [told[name] for name in NAMES] == pytest.approx([wanted[name] for name in NAMES], abs=1e-5)
    assert told["logloss"] != pytest.approx(evaluated(capsys, words_of(name, tmp_path / "run", *more))["logloss"],
                                            abs=1e-7)


@pytest.mark.slow
def test_a_quantized_checkpoint_is_evaluated_by_a_program_as_by_one_process(tmp_path, capsys):
    make_run(tmp_path / "run", "tokenmixer_large")
    quantize(tmp_path)
    words, program = words_of("tokenmixer_large", tmp_path / "int8"), str(tmp_path / "program")
    wanted = evaluated(capsys, words)
    export = [sys.executable, "-m", "parallel", "export", *words, "--graphs", "scores_32", "--output", program]
    subprocess.run(export, check=True, capture_output=True, timeout=600)
    told = figures_of(launch([*words, "--program", program], 1, "evaluate"))
    assert [told[name] for name in NAMES] == pytest.approx([wanted[name] for name in NAMES], abs=1e-5)
    assert told["auc"] != pytest.approx(evaluated(capsys, words_of("tokenmixer_large", tmp_path / "run"))["auc"],
                                        abs=1e-7)


@pytest.mark.slow
def test_passes_of_a_separated_ranker_send_what_their_layers_need_and_end_whole(tmp_path):
    """Two AllReduces a layer, and one of the tokenizer's AllGathers: a state is taken apart without sending."""
    from parallel.torch_runtime.program import Program

    words = words_of("tokenmixer_large_ug_sep", tmp_path / "run", "parallel.op=2", "serve.engine.requests=2")
    export = [sys.executable, "-m", "parallel", "export", *words, "--graphs", "user_2,candidates_64", "--output",
              str(tmp_path / "program")]
    subprocess.run(export, check=True, capture_output=True, timeout=600)
    program = Program(tmp_path / "program")
    assert list(program.result_shape(0, "user_2")) == list(program.shapes("candidates_64")["state"])
    sent = Counter(node.op for node in program.graph(0, "candidates_64").nodes if node.op in (
        "AllReduce", "AllGather", "AlltoAll", "ReduceScatter"))
    layers = load_run(words[1], words[2:])[1].model.layers
    assert program.result_shape(0, "user_2")[0] == 2
    assert sent["AllReduce"] == 2 * layers and sent["AlltoAll"] == 0 and sent["AllGather"] <= 1, sent


class Server:
    """A launch of `serve`; its address is told on stderr."""

    def __init__(self, words: list[str], nproc: int, *passed: str) -> None:
        self.process = launch([*words, "serve.port=0"], nproc, "serve", *passed)
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving .* on (http://\S+)", line):
                self.address = found[1]
                break
        else:
            raise AssertionError("".join(self.lines)[-3000:])
        threading.Thread(target=self.process.stderr.read, daemon=True).start()

    def post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(self.address + path, json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def end(self) -> dict:
        self.process.send_signal(signal.SIGTERM)
        out = self.process.stdout.read()
        assert self.process.wait(120) == 0
        return json.loads(out.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name, int8", [("tokenmixer_large_ug_sep", False), ("rankmixer", False), ("rankmixer", True)])
def test_a_server_over_two_processes_answers_as_one_does_before_and_after_a_reload(name, int8, tmp_path):
    settings, log = make_run(tmp_path / "run", name)
    served = tmp_path / ("int8" if int8 else "run")
    if int8:
        quantize(tmp_path)
    words = words_of(name, served, "parallel.op=2", "serve.engine.requests=2",
                     "serve.engine.candidates=[4, 16]", "serve.engine.timeout_seconds=60")
    server = Server(words, 2)

    def compared(version: int) -> None:
        trained = load(served)
        for seed, count in ((1, 3), (2, 20)):  # one that fills up a graph, one that takes two
            body = {**body_of(trained, log, seed, count), "top_k": count}
            ask = read_request(body, trained, 100)
            wanted = plain(trained.model, ask.ids, ask.numbers)[:, 0]
            told = server.post("/rank", body)
            assert told["version"] == version
            found = {item["candidate"]: item["score"] for item in told["ranking"]}
            np.testing.assert_allclose([found[index] for index in range(count)], wanted, rtol=0, atol=1e-5)

    compared(1)
    add_checkpoint(tmp_path / "run", settings, log, 2, 7)
    if int8:
        quantize(tmp_path)
    assert server.post("/reload", {})["version"] == 2
    compared(2)
    assert server.end()["version"] == 2


@pytest.mark.slow
def test_a_program_of_one_device_scores_a_new_user_in_the_graph_of_its_candidates(tmp_path):
    settings, log = make_run(tmp_path / "run", "tokenmixer_large_ug_sep")
    words = words_of("tokenmixer_large_ug_sep", tmp_path / "run", "serve.engine.requests=1",
                     "serve.engine.candidates=[4, 16]", "serve.engine.timeout_seconds=60")
    kinds = inference_kinds(load_run(words[1], words[2:])[1], "serve")
    export = [sys.executable, "-m", "parallel", "export", *words, "--graphs", ",".join(kinds), "--output",
              str(tmp_path / "program")]
    assert "request_16" in kinds
    subprocess.run(export, check=True, capture_output=True, timeout=600)
    server, trained = Server([*words, "--program", str(tmp_path / "program")], 1), load(tmp_path / "run")
    for seed, count in ((1, 3), (1, 3), (2, 14), (3, 20)):  # a cached user, and more than one graph's candidates
        body = {**body_of(trained, log, seed, count), "top_k": count}
        ask = read_request(body, trained, 100)
        found = {item["candidate"]: item["score"] for item in server.post("/rank", body)["ranking"]}
        wanted = plain(trained.model, ask.ids, ask.numbers)[:, 0]
        np.testing.assert_allclose([found[index] for index in range(count)], wanted, rtol=0, atol=1e-5)
    server.end()


@pytest.mark.slow
def test_tables_on_the_host_are_sharded_by_rows_in_serving_and_evaluation(tmp_path, capsys):
    """Trained by the verb, users and items as dynamic ids; a server takes a later checkpoint with more rows."""
    words = [*words_of("tokenmixer_large_ug_sep", tmp_path / "run"), *dynamic_ids("tokenmixer_large_ug_sep"),
             "data.tables.place=host", "train.sparse_optimizer={name: rowwise_adagrad, learning_rate: 0.1}",
             "train.optimizer.learning_rate=0.01", "train.validate_every=null", "train.global_batch_size=16"]

    def train(steps: int) -> None:
        assert main("recsys", VERBS, ["train", *words, f"train.steps={steps}"]) == 0
        capsys.readouterr()

    train(30)
    told = figures_of(launch([*words, "parallel.op=2"], 2, "evaluate"))
    wanted = evaluated(capsys, words)
    assert [told[name] for name in NAMES] == pytest.approx([wanted[name] for name in NAMES], abs=1e-5)
    served = ["serve.engine.requests=2", "serve.engine.candidates=[4, 16]", "serve.engine.timeout_seconds=60"]
    server = Server([*words, *served, "parallel.op=2"], 2)
    log = prepare(load_run(words[1], words[2:])[1].data, 16)

    def compared(version: int) -> None:
        trained = load(tmp_path / "run", rows=40)
        for seed, count in ((1, 3), (2, 20)):
            body = {**body_of(trained, log, seed, count), "top_k": count}
            body["user"]["user_id"] = (3, -1)[seed - 1]  # one that has a row, one that has none
            ask = read_request(body, trained, 100)
            answer = server.post("/rank", body)
            assert answer["version"] == version
            found = {item["candidate"]: item["score"] for item in answer["ranking"]}
            np.testing.assert_allclose([found[index] for index in range(count)], scored(trained, ask), atol=1e-5)

    compared(1)
    train(36)
    assert server.post("/reload", {})["version"] == 2
    compared(2)
    server.end()


def dynamic_ids(name: str) -> list[str]:
    """An override that makes users and items dynamic ids."""
    tree = [feature.model_dump(mode="json") for feature in features_of(load_run(f"configs/recsys/{name}.yaml",
                                                                                [])[1].data)]
    for feature in tree:
        if feature["name"] in ("user_id", "item_id"):
            feature.update(values="dynamic", rows=None)
    return [f"data.features={json.dumps(tree)}"]


def scored(trained, ask) -> np.ndarray:
    """Probabilities of a request by one process with the same tables on the host."""
    engine = Engine(trained, EngineSettings(requests=1, candidates=[4, 16], timeout_seconds=60))
    return engine.scorer.score([(ask.ids, ask.numbers)])[0][:, 0]


@pytest.mark.slow
def test_bench_measures_a_request_over_all_processes(tmp_path):
    words = words_of("tokenmixer_large_ug_sep", tmp_path / "run", "parallel.op=2", "serve.engine.requests=1",
                     "serve.engine.candidates=[16]")
    told = figures_of(launch(words, 2, "bench", "--candidates", "12", "--rounds", "3"))
    assert told["ranks"] == 2 and told["cached_ms"] > 0 and told["separated_ms"] <= told["separated_p99_ms"]


def test_what_cannot_be_sharded_is_one_line(tmp_path):
    process = launch(words_of("tokenmixer_large", tmp_path / "run", "model.lookup.by=alltoall", "parallel.op=2"), 2,
                     "evaluate")
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2 and len(error.strip().splitlines()) == 1 and "model.lookup.by" in error, error


@pytest.mark.parametrize("name, change, where", [
    ("tokenmixer_large", ["parallel.op=2", "model.lookup.by=alltoall"], "model.lookup.by"),
    ("rankmixer_ug_sep", ["parallel.pipeline.stages=2"], "parallel.pipeline.stages")])
def test_layouts_without_graphs_are_refused(name, change, where):
    with pytest.raises(UserError) as told:
        check_inference(load_run(f"configs/recsys/{name}.yaml", change)[1])
    assert told.value.where == where
