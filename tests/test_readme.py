"""Every command in the README is run, in small: the same words, with a few more that make it quick."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The quickstart draws its run and measures the peak; the others need not.
BARE = ["output.loss_curve=false", "train.peak_tflops=1"]
SMALL = ["train.steps=12", "train.global_batch_size=4", "train.validate_every=null", "model.layers=2",
         "model.hidden_size=32", "model.sequence_length=64", "train.validation_batches=2"]
FOLDERS = ["data.tokenizer={tmp}/vocabulary.model", "data.directory={tmp}/records", "output.directory={tmp}/train"]
TINY = ["model.layers=2", "model.hidden_size=16", "model.heads=2", "model.sequence_length=16",
        "model.vocabulary_size=32", "train.global_batch_size=4"]

# The first words of a command, and what is added to it. A command of the README that fits none fails the test.
ADDED = [
    ("bash scripts/test.sh", ["--collect-only", "-q", "tests/test_house.py"]),
    ("bash scripts/quickstart.sh", ["--bytes", "300kB", "--output", "{tmp}/quickstart", "model.vocabulary_size=1000",
                                    *SMALL]),
    ("bash scripts/serve.sh", ["--config", "{tmp}/quickstart/run.yaml", "port=0"]),
    ("python -m data_tools generate-corpus", []),
    ("python -m data_tools generate-pages", ["--pages", "200"]),
    ("python -m data_tools dedup", []),
    ("python -m data_tools run", ["engine.name=local"]),
    ("python -m parallel estimate", []),
    ("python -m parallel plan", ["model.layers=16"]),
    ("python -m recsys quantize", []),
    ("python -m recsys serve", ["port=0", "engine.candidates=[64]", "engine.requests=2"]),
    ("python -m recsys bench", ["--rounds", "2", "--candidates", "20", "--skip-matmul", "model.layers=1"]),
    ("python -m recsys train", ["train.steps=4", "data.synthetic.samples=2000", "output.directory={tmp}/ranker",
                                 "model.layers=1", *BARE]),
    ("python -m recsys count", []),
    ("python -m parallel dryrun", TINY),
    ("python -m parallel replay", [*TINY, "parallel.data=1"]),
    ("bash scripts/run_distribute.sh", ["--nproc", "2", "parallel.data=1", "model.vocabulary_size=1000", *FOLDERS[:2],
                                        *SMALL, "output.directory={tmp}/two", *BARE]),
    ("python -m pangu train-vocabulary", ["model.vocabulary_size=1000", *FOLDERS]),
    ("python -m pangu pack", ["model.vocabulary_size=1000", *FOLDERS, *SMALL]),
    ("python -m pangu count", []),
    ("python -m pangu train --print-reference", []),
    ("python -m pangu train", ["model.vocabulary_size=1000", *FOLDERS, *SMALL, "output.loss_curve=false"]),
    ("python -m pangu evaluate", ["--limit", "4", "model.vocabulary_size=1000", *FOLDERS, *SMALL]),
    ("python -m pangu generate", ["generate.max_new_tokens=4", "model.vocabulary_size=1000", *FOLDERS, *SMALL]),
]


def blocks(language: str) -> list[str]:
    """The README's blocks in a language."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


def commands() -> list[str]:
    """Lines of the README's bash blocks."""
    return [line for block in blocks("bash") for line in block.splitlines()
            if line.strip() and not line.startswith("#")]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One folder for all commands, since one makes what the next reads; files named in the README stand in it."""
    place = tmp_path_factory.mktemp("readme")
    text = "".join(f"第{i}天，天气很好，我们去公园看花。\n\n" * 3 for i in range(400))
    (place / "my_text.txt").write_text(text, encoding="utf-8")
    return place


def small(command: str, place: Path) -> list[str]:
    """The words of the command with what makes it quick."""
    added = next((words for start, words in ADDED if command.startswith(start)), None)
    if added is None:
        pytest.fail(f"README has a command that this test does not know: {command}")
    words = shlex.split(command, comments=True) + [word.format(tmp=place) for word in added]
    if "--corpus" in words:
        own = str(place / "own")
        words = [own if word == str(place / "quickstart") else word for word in words
                 if not word.startswith("model.vocabulary")]
        at = words.index("--bytes")
        del words[at:at + 2]
    words = [str(place) if word == "." else word for word in words]
    files = {"corpus.jsonl", "pages.jsonl", "synthetic/questions.jsonl", "my_text.txt", "data.corpus=corpus.jsonl",
             "deduplicated", "cleaned", "quantized"}
    words = [str(place / "ranker") if word == "runs/recsys/tokenmixer_large_ug_sep" else word for word in words]
    return [word.replace("=", f"={place}/", 1) if word in files and "=" in word
            else str(place / word) if word in files else word for word in words]


def clients(address: str, environment: dict[str, str]) -> None:
    """What the README shows to ask the language model's server, typed at `address`."""
    there = [line.replace("http://127.0.0.1:8000", address) for line in commands() if line.startswith("curl")]
    for line in there:
        done = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=60, check=True)
        assert json.loads(done.stdout)["choices"][0]["finish_reason"] in ("stop", "length")
    scripts = [block.replace("http://127.0.0.1:8000", address) for block in blocks("python")]
    for script in scripts:
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True,
                              timeout=60)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    assert there and scripts


def ended_once_it_serves(words: list[str], environment: dict[str, str], ask: Callable = lambda *_: None) -> None:
    """Starts a server, asks it for its health and what else there is, and ends it as an operator would."""
    with subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as server:
        output = []
        for line in server.stderr:
            output.append(line)
            if address := re.search(r"serving .* on (http://\S+)", line):
                with urllib.request.urlopen(f"{address[1]}/health", timeout=60) as answer:
                    assert json.load(answer)["status"] == "ok"
                ask(address[1], environment)
                server.terminate()
        out = server.stdout.read()
    assert server.returncode == 0, "".join(output)[-3000:]
    assert "version" in json.loads(out.strip().splitlines()[-1])


@pytest.mark.parametrize("command", [line for line in commands() if not line.startswith("curl")], ids=str)
def test_command(command, place):
    # The tests' own environment stands in for .venv, which scripts/test.sh has made.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = small(command, place)
    if command.startswith(("python -m recsys serve", "bash scripts/serve.sh")):
        ended_once_it_serves(["timeout", "--preserve-status", "300", *words], environment,
                             clients if "serve.sh" in command else lambda *_: None)
        return
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    if "test.sh" not in command and "--print-reference" not in command:
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        assert isinstance(figures, dict)
        assert Path(ROOT, figures.get("page", "README.md")).is_file()
