"""The main job end to end: corpus, vocabulary, records, training, accuracies, generated text.

Every step is one of the commands a user would type; it is printed before it runs, and its figures are kept beside its
results, so that a second run goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pangu.quickstart_page import write_page
from parallel.common.errors import UserError
from parallel.common.files import atomic_write, read_json, write_json
from parallel.common.lines import split_lines
from parallel.common.progress import info, table
from parallel.common.structured import parse_object
from parallel.common.yaml_core import dump_yaml
from parallel.training.metrics_log import read_metrics

if TYPE_CHECKING:
    from pangu.settings import Run

OWN_TEXT_VOCABULARY = 8000
PROMPTS = "pangu/prompts/quickstart.yaml"
OWN_TEXT_PROMPTS = "pangu/prompts/continuation.yaml"
# The blocks of the config that each step depends on: it is repeated when one of them has changed.
BLOCKS = {"corpus": (), "vocabulary": ("data", "model.vocabulary_size", "vocabulary"),
          "pack": ("data", "model.vocabulary_size", "model.sequence_length", "vocabulary", "pack"),
          "train": ("data", "model", "train", "parallel", "output"), "evaluate": ("data", "model", "train", "output"),
          "generate": ("data", "model", "train", "output", "generate")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb `quickstart`."""
    parser.add_argument("--corpus", metavar="PATH", help="train on this text instead of the generated one: txt or "
                        "jsonl, plain or .xz .gz .zst, or a folder of such")
    parser.add_argument("--output", metavar="DIR", help="where everything goes (default runs/quickstart, or "
                        "runs/quickstart-NAME for a corpus called NAME)")
    parser.add_argument("--bytes", default="2MB", metavar="SIZE", help="size of the generated corpus (default 2MB)")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps (default: those of the config)")
    parser.add_argument("--fresh", action="store_true", help="delete earlier results of this output folder first")


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Verb `quickstart`: runs the steps that are not finished and prints what was made and where."""
    started = time.monotonic()
    job = Job(settings, arguments)
    figures = {name: job.step(name, command) for name, command in job.steps().items()}
    page = job.write_page(figures)
    job.show(figures, time.monotonic() - started)
    return {"output": str(job.output), "page": str(page), "seconds": round(time.monotonic() - started, 1),
            **{key: figures["train"].get(key) for key in ("steps", "loss", "validation_perplexity",
                                                          "tokens_per_second", "checkpoint")},
            "accuracy": {skill: row["accuracy"] for skill, row in _results(figures).items()},
            "outputs": figures["generate"]["outputs"]}


class Job:
    """The steps of one quickstart in one output folder."""

    def __init__(self, settings: Run, arguments: argparse.Namespace) -> None:
        self.settings, self.arguments = settings, arguments
        self.own_text = arguments.corpus is not None
        if self.own_text and not Path(arguments.corpus).exists():
            raise UserError("no such corpus", where="--corpus", value=arguments.corpus, hint="check the path")
        self.output = Path(arguments.output or self._default_output())
        if arguments.fresh and self.output.exists():
            self._delete()
        self.output.mkdir(parents=True, exist_ok=True)
        self._same_job_as_before()

    def _default_output(self) -> str:
        if not self.own_text:
            return "runs/quickstart"
        return "runs/quickstart-" + Path(self.arguments.corpus).name.split(".")[0]

    def _delete(self) -> None:
        if not (self.output / "job.json").is_file():
            raise UserError("not a folder that quickstart made, so it is not deleted", where="--output",
                            value=str(self.output), hint="name another folder")
        shutil.rmtree(self.output)

    def _same_job_as_before(self) -> None:
        job = {"corpus": str(Path(self.arguments.corpus).resolve()) if self.own_text else None,
               "bytes": None if self.own_text else self.arguments.bytes}
        file = self.output / "job.json"
        if file.is_file() and read_json(file) != job:
            raise UserError("this folder holds a quickstart on another corpus", where="--output",
                            value=str(self.output), hint="name another folder, or add --fresh")
        write_json(file, job)

    def write_config(self) -> dict:
        """Writes `run.yaml`, the config that all commands use, and returns its blocks."""
        out, settings = self.output, self.settings.model_copy(deep=True)
        settings.data.corpus, settings.data.tokenizer = self.corpus, str(out / "vocabulary.model")
        settings.data.directory, settings.output.directory = str(out / "records"), str(out / "train")
        if self.own_text:
            settings.model.vocabulary_size, settings.vocabulary.shrink = self._vocabulary_size(), True
        if self.arguments.steps is not None:
            settings.train.steps = self.arguments.steps
        tree = settings.model_dump(mode="json")
        # What this file sets comes before what a recipe says, so it sets no more than it was told.
        told = {**tree, "generate": settings.generate.model_dump(mode="json", exclude_unset=True)}
        with atomic_write(self.config) as file:
            file.write(dump_yaml(told))
        return tree

    @property
    def config(self) -> Path:
        """The config file of this folder."""
        return self.output / "run.yaml"

    def _vocabulary_size(self) -> int:
        """What the user's text allowed, once its vocabulary is trained."""
        trained = self.output / "figures" / "vocabulary.json"
        return read_json(trained)["figures"]["vocabulary_size"] if trained.is_file() else OWN_TEXT_VOCABULARY

    @property
    def corpus(self) -> str:
        """The text that is trained on."""
        return self.arguments.corpus if self.own_text else str(self.output / "world.jsonl")

    def steps(self) -> dict[str, list[str]]:
        """Names and commands, in order."""
        questions, config = str(self.output / "questions.jsonl"), ["--config", str(self.config)]
        corpus = ["data_tools", "generate-corpus", "--output", self.corpus, "--bytes", self.arguments.bytes,
                  "--questions", questions]
        steps = {"corpus": corpus, "vocabulary": ["pangu", "train-vocabulary", *config],
                 "pack": ["pangu", "pack", *config, "pack.overwrite=true"], "train": ["pangu", "train", *config],
                 "evaluate": ["pangu", "evaluate", *config, "--questions", questions],
                 "generate": ["pangu", "generate", *config, "--prompts", PROMPTS]}
        if self.own_text:
            steps["generate"][-1] = OWN_TEXT_PROMPTS
            del steps["corpus"], steps["evaluate"]
        return steps

    def step(self, name: str, command: list[str]) -> dict:
        """Runs one step unless its figures for the same command and settings are there already."""
        blocks = self.write_config()
        made_from = {"command": command, "settings": {key: _at(blocks, key) for key in BLOCKS[name]}}
        kept = self.output / "figures" / f"{name}.json"
        if kept.is_file() and (earlier := read_json(kept))["made_from"] == made_from:
            info(f"-- {name}: finished earlier")
            return earlier["figures"]
        info(f"-- {name}: python -m {' '.join(command)}")
        started = time.monotonic()
        figures = run_command(command)
        seconds = round(time.monotonic() - started, 2)
        write_json(kept, {"made_from": made_from, "figures": figures, "seconds": seconds})
        # What follows was made from an older result of this step.
        following = list(self.steps())
        for later in following[following.index(name) + 1:]:
            (kept.parent / f"{later}.json").unlink(missing_ok=True)
        return figures

    def write_page(self, figures: dict[str, dict]) -> Path:
        """Writes `report.html`."""
        seconds = {name: read_json(self.output / "figures" / f"{name}.json").get("seconds", 0.0) for name in figures}
        title = "PanGu-alpha on your text" if self.own_text else "PanGu-alpha on a generated world"
        page = self.output / "report.html"
        write_page(page, title, figures, seconds, read_metrics(self.output / "train" / "metrics.jsonl"))
        return page

    def show(self, figures: dict[str, dict], seconds: float) -> None:
        """What was made, where, and how good it is."""
        out, train = self.output, figures["train"]
        written = figures["generate"]
        table("Generated", ["prompt", "continuation"], zip(written["prompts"], written["outputs"], strict=True))
        rows = [(skill, f"{row['accuracy']:.0%}", f"{row['chance']:.0%}")
                for skill, row in _results(figures).items()]
        if rows:
            table("Accuracy on held-out questions", ["skill", "accuracy", "chance"], rows)
        perplexity = train.get("validation_perplexity")
        table(f"Made in {seconds:.0f} s", ["what", "where", "figures"], [
            ("corpus", self.corpus, f"{figures['pack']['documents']:,} documents"),
            ("vocabulary", out / "vocabulary.model", f"{figures['vocabulary']['vocabulary_size']:,} pieces"),
            ("records", out / "records", f"{figures['pack']['tokens']:,} tokens"),
            ("model", train["checkpoint"], f"validation perplexity {perplexity:.2f}" if perplexity else ""),
            ("loss curve", out / "train" / "loss.png", f"{train['tokens_per_second']:,.0f} tokens/s"),
            ("all on one page", out / "report.html", ""),
        ])
        info(f"Generate more: python -m pangu generate --config {self.config} --prompt 你好")


def _results(figures: dict[str, dict]) -> dict[str, dict]:
    return figures.get("evaluate", {}).get("results", {})


def _at(tree: dict, key: str) -> Any:
    for part in key.split("."):
        tree = tree[part]
    return tree


def run_command(command: list[str], runner: Callable[..., subprocess.CompletedProcess] = subprocess.run) -> dict:
    """Runs `python -m ...` with stderr passed on; returns the JSON object of the last line of stdout.

    Raises:
        UserError: the command failed; it has shown the user why.
    """
    done = runner([sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, env=os.environ.copy())
    if done.returncode == 130 or done.returncode < 0:
        raise KeyboardInterrupt
    if done.returncode:
        raise UserError("the step failed; its message is above", where=" ".join(command[:2]))
    figures = parse_object(split_lines(done.stdout.strip())[-1])
    # A run that was told to stop ends well and goes on when it is typed again, but it is not finished.
    if str(figures.get("stopped")).startswith("SIG"):
        raise KeyboardInterrupt
    return figures
