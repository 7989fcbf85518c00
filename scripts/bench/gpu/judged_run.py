"""PanGu-alpha trained on real packed records for a given time, then judged from its checkpoint: perplexity of texts
kept back; poems, couplets and talk with counts of how many keep the form; few-shot scores beside chance.

    python scripts/bench/gpu/judged_run.py --programs programs --records records --texts texts \\
        --tokenizer vocabulary.model --data evaluation --output runs/judged

`programs` holds exported programs: `run` to train (its ranks are the GPUs), `one` of one rank with the graph `loss`,
and `gen` of one rank with decode, prefill and score, `generate.batch_size=32 generate.prefill_chunk=256`; `records` and
`texts` are those of `recorded_run.py`. Training ends by itself after the steps that the program was exported with, or
is stopped after `--train-seconds` and saves. Then four processes share the GPUs: perplexities; texts; and the tasks,
dealt to two. What is done after `--judge-seconds` counts. The last line of stdout is one JSON object; `texts.json` in
the output folder holds every text that was written. No MindSpore is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
from scripts.bench.gpu.recorded_run import Training, epochs, perplexities, told  # noqa: E402

PARTS = ("perplexity", "texts", "tasks0", "tasks1")


def trained(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains; the figures of the run. Where compiling fails, the rest of the time goes to captured graphs."""
    limit = time.monotonic() + arguments.train_seconds
    try:
        found = ended(Training(arguments, "run", arguments.steps), limit)
    except RuntimeError as error:
        if arguments.execution != "inductor":
            raise
        print(f"compiled training failed, captured graphs instead: {str(error)[-1500:]}", file=sys.stderr, flush=True)
        arguments.execution = "cuda_graph"
        found = ended(Training(arguments, "run", arguments.steps), limit)
    data = epochs(arguments)
    seen = found["steps"] * data["batch"]
    return {"training": found | {"execution": arguments.execution}, "data": data | {
        "tokens_seen": seen * data["length"], "epochs": round(seen / data["records"], 2)}}


def ended(training: Training, limit: float) -> dict[str, Any]:
    """The figures of a run that ends by itself or is stopped at a time of the clock."""
    while training.process.poll() is None and time.monotonic() < limit:
        time.sleep(0.2)
    if training.process.poll() is None:
        training.stop()
    return told(training)


def judged(arguments: argparse.Namespace, checkpoint: str) -> dict[str, Any]:
    """Starts the four processes, waits for them, ends those that take too long; what they have found. One that fails is
    started once more without captured graphs."""
    limit, found = time.monotonic() + arguments.judge_seconds, {}
    running = {name: started(arguments, name, checkpoint) for name in PARTS}
    again: set[str] = set()
    while running and time.monotonic() < limit:
        time.sleep(0.1)
        for name, process in list(running.items()):
            code = process.poll()
            if code is None:
                continue
            del running[name]
            if code:
                log = (arguments.output / f"{name}.log").read_text("utf-8").strip().splitlines()
                found.setdefault("failed", {}).setdefault(name, []).append(log[-1:])
                if name not in again:
                    again.add(name)
                    running[name] = started(arguments, name, checkpoint, "--captured=no")
    for name, process in running.items():
        process.kill()
        found.setdefault("not_finished", []).append(name)
    for path in sorted(path for name in PARTS for path in arguments.output.glob(f"{name}*.jsonl")):
        for line in path.read_text("utf-8").split("\n")[:-1]:  # what was killed may leave half a line
            for name, figures in json.loads(line).items():
                found.setdefault(name, {}).update(figures)
    return found


def started(arguments: argparse.Namespace, name: str, checkpoint: str, *more: str) -> subprocess.Popen:
    """One of the four processes, which writes into a log."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if arguments.device == "gpu":
        environment["CUDA_VISIBLE_DEVICES"] = str(PARTS.index(name) % arguments.gpus)
    with open(arguments.output / f"{name}.log", "a", encoding="utf-8") as log:
        return subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--part", name, "--checkpoint", checkpoint,
                                 *more], cwd=ROOT, env=environment, stdout=log, stderr=log)


def part(arguments: argparse.Namespace) -> None:
    """One of the four processes; a line of JSON for everything that is done."""
    began = time.monotonic()
    path = arguments.output / f"{arguments.part}{'' if arguments.captured == 'yes' else '_again'}.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        def tell(**figures: Any) -> None:
            file.write(json.dumps(figures, ensure_ascii=False) + "\n")
            file.flush()
            print(f"{time.monotonic() - began:.1f} s", json.dumps(figures, ensure_ascii=False)[:2000], flush=True)

        if arguments.part == "perplexity":
            tell(unseen=perplexities(arguments, arguments.checkpoint))
        elif arguments.part == "texts":
            from scripts.bench.gpu.forms import written

            found = written(arguments.programs / "gen", arguments.checkpoint, arguments.tokenizer, arguments.texts,
                            arguments.device, arguments.count, arguments.captured == "yes")
            texts = {name: figures.pop("texts") for name, figures in found.items()}
            (arguments.output / "texts.json").write_text(json.dumps(texts, ensure_ascii=False, indent=0), "utf-8")
            tell(written=found)
        else:
            names = arguments.tasks.split(",")[int(arguments.part[-1])::2]
            for name, figures in scores(arguments, names):
                tell(tasks={name: figures})


def scores(arguments: argparse.Namespace, names: list[str]):
    """(task, its figures) one after the other, by the verb `evaluate`'s own class on the program `gen`."""
    from pangu.evaluation.evaluate import Evaluation, summarize
    from pangu.evaluation.task import Source, load_task
    from parallel.launch.inference import DEVICE, PROGRAM
    from parallel.torch_runtime.program import Program
    from parallel.torch_runtime.run import settings_of

    os.environ |= {PROGRAM: str(arguments.programs / "gen"), DEVICE: arguments.device}
    settings = settings_of(Program(arguments.programs / "gen"), [
        f"data.tokenizer={arguments.tokenizer}", f"output.directory={arguments.output / arguments.part}",
        f"parallel.execution={'auto' if arguments.captured == 'yes' else 'eager'}"])
    flags = argparse.Namespace(checkpoint=arguments.checkpoint, output=None, int8=False, no_cache=True, batch="auto",
                               no_sharing=False, shots=arguments.shots, seed=1, limit=arguments.limit)
    evaluation = Evaluation(settings, flags)
    for name in names:
        began = time.monotonic()
        source = Source(load_task(name), arguments.data)
        figures = summarize(source.task, evaluation._task(source))
        yield name, figures | {"seconds": round(time.monotonic() - began, 1)}
    evaluation.workers.close()


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("programs", "records", "texts", "tokenizer", "data", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--gpus", type=int, default=2, help="that the four processes share")
    parser.add_argument("--execution", default="inductor", help="parallel.execution of the training")
    parser.add_argument("--train-seconds", type=float, default=215.0)
    parser.add_argument("--judge-seconds", type=float, default=100.0)
    parser.add_argument("--steps", type=int, default=1800, help="of the run, as exported")
    parser.add_argument("--count", type=int, default=192, help="poems and couplets to write")
    parser.add_argument("--tasks", default="ocnli,tnews,chid,c3,cluewsc2020,afqmc,csl,iflytek,cmrc2017,cmrc2019")
    parser.add_argument("--shots", default="few", help="demonstrations: 0, a number, or few")
    parser.add_argument("--limit", type=int, default=200, help="instances of a task, drawn at random")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--captured", choices=["yes", "no"], default="yes", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("more", nargs="*", help="key=value for the training")
    arguments = parser.parse_intermixed_args()
    for name in ("programs", "records", "texts", "tokenizer", "data", "output"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.part is not None:
        part(arguments)
        return 0
    result = trained(arguments)
    print(json.dumps(result), file=sys.stderr, flush=True)
    result |= judged(arguments, result["training"]["checkpoint"])
    (arguments.output / "result.json").write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    print(json.dumps(result, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
