"""A run of PanGu-alpha on real packed records and GPUs, from the first step to what the trained model writes.

    python scripts/bench/gpu/recorded_run.py --programs programs --records records --output runs/recorded

`programs` holds exported programs of `configs/pangu/350m_h200.yaml`: `run` (data 2), and `one` (one GPU, where the run
goes on and the perplexities are measured):

    python -m parallel export --config configs/pangu/350m_h200.yaml --output programs/run
    python -m parallel export --config configs/pangu/350m_h200.yaml --output programs/one parallel.data=1 \\
        parallel.devices=1

`records` holds packed records: `text` to train on, and `unseen_NAME` for every corpus that is measured
alone (`corpora.py` writes the texts, `python -m pangu pack` packs them).

What happens: training; kill -9 of rank 1 after `--kill-at` steps; the same command again, which goes on from the newest
checkpoint up to `--move-at`; the other layout from there to `--steps`; the perplexity of each corpus on one process;
and with `--texts`, what the model writes (`forms.py`) by the program `gen` (exported with
`--graphs decode,prefill,score`).
The last line of stdout is one JSON object. No MindSpore is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from pangu.data.dataset import PackedDataset  # noqa: E402
from parallel.checkpoint.full import load_checkpoint  # noqa: E402
from parallel.torch_runtime.program import Program  # noqa: E402
from parallel.torch_runtime.step import TorchStep  # noqa: E402
from parallel.training.metrics_log import read_metrics  # noqa: E402
from parallel.training.validation import Validation  # noqa: E402

DATA_SHEET_TFLOPS = 989.0


class Training:
    """A launch of a program's ranks, which writes into the run's folder."""

    def __init__(self, arguments: argparse.Namespace, program: str, steps: int, *more: str) -> None:
        self.folder, self.began = arguments.output / "train", time.monotonic()
        words = [sys.executable, "-m", "parallel.torch_runtime", "run", str(arguments.programs / program), "--device",
                 arguments.device, f"data.directory={arguments.records / 'text'}", f"output.directory={self.folder}",
                 "output.tensorboard=false", f"parallel.execution={arguments.execution}", *arguments.more, *more]
        self.stop_at = steps
        self.errors = open(arguments.output / f"{program}-{int(time.time())}.log", "w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=self.errors, text=True,
                                        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"})

    def step(self) -> int:
        """The last step in the log."""
        path = self.folder / "metrics.jsonl"
        return max((record["step"] for record in read_metrics(path)), default=0) if path.is_file() else 0

    def wait_for(self, step: int) -> float:
        """Until the log holds a step; seconds since the start."""
        while self.step() < step:
            if self.process.poll() is not None:
                raise RuntimeError(f"the run ended before step {step}: {self.told()[-2000:]}")
            time.sleep(0.1)
        return time.monotonic() - self.began

    def kill(self, rank: int) -> float:
        """kill -9 of a rank; seconds until the whole launch has ended."""
        os.kill(self._process_of(rank), signal.SIGKILL)
        began = time.monotonic()
        self.process.wait(timeout=120)
        return time.monotonic() - began

    def _process_of(self, rank: int) -> int:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                variables = (path / "environ").read_bytes().split(b"\0")
                if parent == self.process.pid and f"RANK={rank}".encode() in variables:
                    return int(path.name)
            except (OSError, ValueError):
                continue
        raise RuntimeError(f"rank {rank} is not there")

    def stop(self) -> None:
        """SIGTERM: the ranks save together and end."""
        self.process.send_signal(signal.SIGTERM)

    def end(self) -> dict[str, Any]:
        """Waits for the end; the figures of the JSON line."""
        output = self.process.communicate()[0]
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if self.process.returncode or not lines:
            raise RuntimeError(f"the run failed: {self.told()[-3000:]}")
        return json.loads(lines[-1]) | {"seconds": round(time.monotonic() - self.began, 1)}

    def told(self) -> str:
        """What it wrote on stderr."""
        self.errors.seek(0)
        return self.errors.read()


def trained(arguments: argparse.Namespace) -> dict[str, Any]:
    """The three phases; their figures."""
    total = f"train.steps={arguments.steps}"
    first = Training(arguments, "run", arguments.kill_at, total)
    start = first.wait_for(1)
    first.wait_for(arguments.kill_at)
    seconds = first.kill(1)
    line = [text for text in first.told().splitlines() if text.startswith("error: ")]
    found = {"killed": {"at_step": first.step(), "ended_after_s": round(seconds, 1), "start_s": round(start, 1),
                        "exit_code": first.process.returncode, "line": line[0] if line else None}}
    losses = {record["step"]: record["loss"] for record in read_metrics(first.folder / "metrics.jsonl")
              if "loss" in record}
    again = Training(arguments, "run", arguments.move_at, total)
    again.wait_for(arguments.move_at)
    again.stop()
    found["resumed"] = told(again)
    after = {record["step"]: record["loss"] for record in read_metrics(first.folder / "metrics.jsonl")
             if "loss" in record}
    common = [step for step in losses if step in after and step > found["resumed"]["from_step"]]
    found["resumed"]["steps_run_twice"] = len(common)
    found["resumed"]["largest_difference_of_loss"] = max((abs(losses[step] - after[step]) for step in common),
                                                         default=None)
    moved = Training(arguments, "one", arguments.steps, total)
    if arguments.end_at is not None:
        moved.wait_for(arguments.end_at)
        moved.stop()
    found["moved"] = told(moved)
    return found


def told(training: Training) -> dict[str, Any]:
    """The figures of a phase that is to end by itself (or was told to)."""
    figures = training.end()
    marks = [text for text in training.told().splitlines() if "going on from" in text]
    step = int(marks[0].rpartition("(step ")[2].rstrip(")")) if marks else 0
    kept = ("steps", "loss", "validation_loss", "validation_perplexity", "tokens_per_second", "mfu", "peak_tflops",
            "stopped", "backend", "layout", "world", "seconds", "checkpoint")
    found = {key: figures.get(key) for key in kept} | {"from_step": step}
    if figures.get("mfu") and figures.get("peak_tflops"):
        found["mfu_data_sheet"] = figures["mfu"] * figures["peak_tflops"] / DATA_SHEET_TFLOPS
    return found


def perplexities(arguments: argparse.Namespace, checkpoint: str) -> dict[str, Any]:
    """Of every corpus that was kept back, by one process: {name: {loss, perplexity, tokens}}."""
    program = Program(arguments.programs / "one")
    device = "cuda:0" if arguments.device == "gpu" else "cpu"
    step = TorchStep(program, 0, device=device, mode="eager" if arguments.device == "gpu" else "exact")
    load_checkpoint(checkpoint, step.parameters(), (), None)
    settings, found = program.settings, {}
    for folder in sorted(arguments.records.glob("unseen_*")):
        source = PackedDataset(folder, shuffle=False, repeat=False, batch_size=settings["train"]["global_batch_size"],
                               seed=0, sequence_length=settings["model"]["sequence_length"],
                               vocabulary_size=settings["model"]["vocabulary_size"])
        figures = Validation(step, source)(0)
        found[folder.name.partition("_")[2]] = {
            "loss": figures["validation_loss"], "perplexity": figures["validation_perplexity"],
            "tokens": source.index.train.tokens, "documents": source.index.train.documents}
    step.close()
    return found


def epochs(arguments: argparse.Namespace) -> dict[str, Any]:
    """How often the run saw its records."""
    program = Program(arguments.programs / "run")
    batch, length = program.settings["train"]["global_batch_size"], program.settings["model"]["sequence_length"]
    source = PackedDataset(arguments.records / "text", batch_size=batch, seed=0, sequence_length=length,
                           vocabulary_size=program.settings["model"]["vocabulary_size"])
    records = source.index.train.records
    return {"records": records, "tokens": source.index.train.tokens, "documents": source.index.train.documents,
            "batch": batch, "length": length}


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, required=True)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--execution", default="cuda_graph", help="parallel.execution of the phases")
    parser.add_argument("--steps", type=int, default=1200, help="of the whole run, as exported")
    parser.add_argument("--kill-at", type=int, default=380, help="kill -9 of rank 1 once the log holds this step")
    parser.add_argument("--move-at", type=int, default=950, help="where the other layout takes over")
    parser.add_argument("--end-at", type=int, help="stop there, before --steps")
    parser.add_argument("--texts", type=Path, help="folder of `corpora.py`: also write poems, couplets and talk")
    parser.add_argument("--tokenizer", type=Path, help="SentencePiece model, with --texts")
    parser.add_argument("--count", type=int, default=96, help="poems and couplets to write")
    parser.add_argument("more", nargs="*", help="key=value for all phases")
    arguments = parser.parse_intermixed_args()
    for name in ("programs", "records", "output"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    arguments.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    result: dict[str, Any] = {"data": epochs(arguments)}
    result |= trained(arguments)
    steps, data = result["moved"]["steps"], result["data"]
    data |= {"tokens_seen": steps * data["batch"] * data["length"],
             "epochs": round(steps * data["batch"] / data["records"], 2)}
    result["unseen"] = perplexities(arguments, result["moved"]["checkpoint"])
    if arguments.texts is not None:
        from scripts.bench.gpu.forms import written

        try:
            result["written"] = written(arguments.programs / "gen", result["moved"]["checkpoint"], arguments.tokenizer,
                                        arguments.texts, arguments.device, arguments.count)
        except Exception as error:  # what was trained and measured before is told in any case
            result["written"] = {"failed": repr(error)[:500]}
    result["seconds"] = round(time.monotonic() - began, 1)
    (arguments.output / "result.json").write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
