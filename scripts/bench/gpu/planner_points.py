"""The planner held against measurements: step time and memory of a list of points, predicted and measured.

A point is a config file and overrides; `points/points.yaml` lists those that constants were fitted on, those that were
held out, and layouts of two GPUs. On a machine with MindSpore:

    P="python scripts/bench/gpu/planner_points.py"
    $P export --programs programs                                # one program a point
    $P predict --output predicted.json                           # by configs/cluster/h200.yaml

then, with torch and a GPU (no MindSpore; `--nproc 2` for layouts of two GPUs), and where both files are:

    $P measure --programs programs --set held_out --output measured.jsonl
    $P score --predicted predicted.json --measured measured.jsonl --set held_out

Steps run as a CUDA graph on random tokens and ids from start values made on the device; points of one GPU are shared
out over the GPUs of `--nproc` and run at the same time, those of two follow. A step is the median of turns of several
back to back.
`peak_allocated` is `torch.cuda.max_memory_allocated` from before the parameters are made until the captured step has
run: parameters, moments, and what lives at the fullest moment in the graph's pool; NCCL's buffers and the CUDA context
are outside it. `--device cpu` measures times of small programs (`--small`) and no memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

_HERE = Path(__file__).resolve().parent
_TURNS = 5
KINDS = ("fitted", "held_out", "two_gpus")
_SMALL = {
    "pangu": ["model.hidden_size=64", "model.heads=4", "model.layers=2", "model.sequence_length=64",
              "model.vocabulary_size=512"],
    "rankmixer": ["model.width=64"], "tokenmixer_large": ["model.width=64", "model.layers=2"],
}  # fmt: skip
"""Overrides that come last under --small: the same layouts, sizes for a CPU."""
_BATCH = "train.global_batch_size=16"


def points_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The points that the arguments name: name, config (a file), set (overrides), choice, kind."""
    path, kind = arguments.points, arguments.set
    tree, found = yaml.safe_load(path.read_text(encoding="utf-8")), []
    only = {name for name in arguments.only.split(",") if name}
    for name in KINDS if kind == "all" else (kind,):
        for item in tree[name]:
            if only and item["name"] not in only:
                continue
            words = [*item["set"], *([*_SMALL[item["config"]], _BATCH] if arguments.small else [])]
            found.append({"name": item["name"], "config": path.parent / f"{item['config']}.yaml", "set": words,
                          "choice": bool(item.get("choice")), "kind": name})
    return found


# -- export, predict --------------------------------------------------------------------------------------------------


def export(arguments: argparse.Namespace) -> dict[str, Any]:
    """Exports the program of every point that has none yet."""
    made = []
    for point in points_of(arguments):
        folder = Path(arguments.programs) / point["name"]
        if (folder / "program.json.gz").is_file():
            continue
        subprocess.run([sys.executable, "-m", "parallel", "export", "--graphs", "step", "--processes", "1", "--config",
                        str(point["config"]), "--output", str(folder), *point["set"]], check=True,
                       stdout=subprocess.DEVNULL)
        made.append(point["name"])
        print(point["name"], file=sys.stderr, flush=True)
    return {"exported": made}


def predict(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `parallel estimate` says of every point."""
    from parallel.planning.planner import planner_for

    found: dict[str, Any] = {}
    for point in points_of(arguments):
        planner, settings = planner_for(point["config"], point["set"], arguments.cluster)
        estimate = planner.evaluate(settings.parallel.resolve())
        found[point["name"]] = {"step_ms": round(1e3 * estimate.step_seconds, 3),
                                "memory_gb": round(estimate.fullest.total / 1e9, 4),
                                "parts_ms": {name: round(1e3 * value, 3) for name, value in estimate.parts.items()},
                                "memory_parts_gb": {name: round(value / 1e9, 4) for name, value in
                                                    estimate.fullest.parts().items()},
                                "parameters": planner.parameters}
        print(point["name"], found[point["name"]]["step_ms"], found[point["name"]]["memory_gb"], file=sys.stderr)
    return {"cluster": Path(arguments.cluster).stem, "points": found}


# -- measure ----------------------------------------------------------------------------------------------------------


def batch_of(program: Any, rows: int, seed: int) -> list[np.ndarray]:
    """A rank's rows of random inputs: tokens, ids of rows that every table has, one document a sample."""
    generator, found = np.random.default_rng(seed), []
    most = min([tensor.shape[0] for tensor in program.tensors if tensor.name.endswith(".table")
                and tensor.kind == "parameter"], default=0)
    for name, shape, dtype in program.inputs:
        shape = (rows, *shape[1:])
        if name == "records":
            array = generator.integers(7, program.settings["model"]["vocabulary_size"], shape)
        elif name == "ids":
            array = generator.integers(1, most, shape)
        elif name == "position_ids":
            array = np.broadcast_to(np.arange(shape[1]), shape)
        elif name == "labels":
            array = generator.integers(0, 2, shape)
        else:
            array = np.zeros(shape)
        found.append(np.ascontiguousarray(array).astype(dtype))
    return found


def step_of(program: Any, rank: int, device: str, address: str | None) -> Any:
    """A rank's step whose start values are made on the device; captured on a GPU."""
    import torch

    from parallel.torch_runtime.execute import DTYPES
    from parallel.torch_runtime.step import TorchStep

    class Step(TorchStep):
        """With random numbers of the right scale in place of those that the seed gives."""

        def _started(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
            held = self.program.by_name.get(name)
            if held is None or held.start[0] in ("fill", "ones", "zeros") or not DTYPES[dtype].is_floating_point:
                value = held.start[1] if held is not None and held.start[0] == "fill" else \
                    float(held is not None and held.start[0] == "ones")
                return torch.full(shape, value, dtype=DTYPES[dtype], device=self.device)
            return torch.randn(shape, dtype=DTYPES[dtype], device=self.device) * float(held.start[1])

    return Step(program, rank, device=device, mode="eager" if device == "cpu" else "cuda_graph", address=address)


def measured(point: dict[str, Any], arguments: argparse.Namespace, rank: int, address: str | None) -> dict[str, Any]:
    """One point on this process's device: milliseconds of a step, memory, losses of the first steps."""
    import torch

    from parallel.torch_runtime.program import Program

    cuda, before = arguments.device != "cpu", 0
    if cuda:
        torch.cuda.set_device(rank)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    program = Program(Path(arguments.programs) / point["name"])
    joint = program.world > 1
    step = step_of(program, rank if joint else 0, f"cuda:{rank}" if cuda else "cpu", address)
    batch = batch_of(program, program.inputs[0][1][0] // step.share[1], 7 + step.share[0])
    losses = [float(step.run("step", batch)[0]) for _ in range(4)]
    found = {"name": point["name"], "kind": point["kind"], "world": program.world, "losses": losses,
             "start_s": round(time.perf_counter() - begin, 2)}
    call = lambda: step.run("step", batch)  # noqa: E731
    if cuda:
        found |= {"peak_allocated_gb": (torch.cuda.max_memory_allocated() - before) / 1e9,
                  "reserved_gb": torch.cuda.memory_reserved() / 1e9, "before_gb": before / 1e9}
        call = next(iter(step.bound.values())).recorded.replay
    found |= timed(call, step, arguments.seconds, torch.cuda.synchronize if cuda else lambda: None)
    if arguments.profile and cuda:
        found["kernels"] = kernels_of(call)
    if joint:
        peaks = [0.0] * program.world
        peaks[rank] = found.get("peak_allocated_gb", 0.0)
        found["peak_allocated_gb_by_rank"] = step.communicator.add(peaks)
    step.bound.clear()
    return found


def timed(call: Any, step: Any, seconds: float, finish: Any) -> dict[str, Any]:
    """Milliseconds of a step: the median of turns of about `seconds` each, back to back; of several ranks, their mean.

    Args:
        call: one step.
        step: whose ranks begin a turn together.
        finish: returns when the device has nothing left to do.
    """
    def taken(times: int) -> float:
        finish()
        begin = time.perf_counter()
        for _ in range(times):
            call()
        finish()
        return (time.perf_counter() - begin) / times

    taken(1)
    times = int(max(3, min(60, seconds / max(taken(1), 1e-5))))
    if step.ranks > 1:
        times = int(step.exchange([float(times)])[0] / step.ranks)
    turns = []
    for _ in range(_TURNS):
        step.barrier()
        turns.append(1e3 * taken(times))
    turns = [value / step.ranks for value in step.exchange(turns)]
    return {"step_ms": statistics.median(turns), "turns_ms": [round(value, 4) for value in turns], "steps": times}


def kernels_of(call: Any) -> list[list[Any]]:
    """[name, kernels a step, microseconds a step] of every kernel, by a profile of three steps."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for item in profile.profiler.kineto_results.events():
        if "CUDA" in str(item.device_type()) and item.duration_ns() > 0:
            entry = found.setdefault(item.name()[:160], [0, 0.0])
            entry[0] += 1
            entry[1] += item.duration_ns() / 1e3
    return sorted(([name, round(count / 3, 2), round(total / 3, 2)] for name, (count, total) in found.items()),
                  key=lambda entry: -entry[2])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every point of a set that has a program; lines of JSON into the output, one a point."""
    if arguments.rank is None:
        return _spawned(arguments)
    points = [point for point in points_of(arguments)
              if (Path(arguments.programs) / point["name"] / "program.json.gz").is_file()]
    worlds = {point["name"]: _world(point) for point in points}
    # The largest first, in turn, so that the processes end at about the same time.
    single = [point for point in points if worlds[point["name"]] == 1]
    own = single[arguments.rank::arguments.nproc]
    joint = [point for point in points if worlds[point["name"]] == arguments.nproc > 1]
    begin, failed = time.perf_counter(), 0
    with Path(f"{arguments.output}.{arguments.rank}").open("w", encoding="utf-8") as file:
        for point in (*own, *joint):
            if time.perf_counter() - begin > arguments.limit:
                break
            try:
                found = measured(point, arguments, arguments.rank, arguments.address)
            except Exception as error:  # the next points are measured all the same
                if worlds[point["name"]] > 1:
                    raise
                found, failed = {"name": point["name"], "error": repr(error)[:400]}, failed + 1
            if point in own or arguments.rank == 0:
                file.write(json.dumps(found) + "\n")
                file.flush()
            shown = {key: value for key, value in found.items() if key not in ("kernels",)}
            print(f"[{time.perf_counter() - begin:.1f}]", json.dumps(shown), file=sys.stderr, flush=True)
    return {"rank": arguments.rank, "failed": failed}


def _world(point: dict[str, Any]) -> int:
    """Ranks of a point, by its overrides."""
    degree = 1
    for word in point["set"]:
        key, _, value = word.partition("=")
        if key in ("parallel.data", "parallel.op", "parallel.pipeline.stages"):
            degree *= int(value)
    return degree


def _spawned(arguments: argparse.Namespace) -> dict[str, Any]:
    """One process for each GPU; their lines in one file."""
    address = f"127.0.0.1:{29700 + os.getpid() % 5000}"
    processes = [subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--rank", str(rank), "--address", address],
                                  stdout=subprocess.DEVNULL) for rank in range(arguments.nproc)]
    codes = [process.wait() for process in processes]
    lines: list[str] = []
    for rank in range(arguments.nproc):
        part = Path(f"{arguments.output}.{rank}")
        if part.is_file():
            lines += part.read_text(encoding="utf-8").splitlines()
            part.unlink()
    Path(arguments.output).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return {"measured": len(lines), "codes": codes}


# -- score ------------------------------------------------------------------------------------------------------------


def score(arguments: argparse.Namespace) -> dict[str, Any]:
    """Errors of time and memory, rank correlation and regret over the points that were measured."""
    predicted = json.loads(Path(arguments.predicted).read_text(encoding="utf-8"))["points"]
    listed = {point["name"]: point for point in points_of(arguments)}
    rows = []
    for line in Path(arguments.measured).read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        if item["name"] in listed and "step_ms" in item and item["name"] in predicted:
            rows.append(_row(item, predicted[item["name"]], listed[item["name"]]))
    for row in rows:
        print(f"{row['name']:28s} {row['step_ms']:9.3f} {row['predicted_ms']:9.3f} {100 * row['time_error']:+7.2f} %  "
              f"{row['memory_gb'] or 0:8.3f} {row['predicted_gb']:8.3f} {100 * (row['memory_error'] or 0):+7.2f} %  "
              f"noise {100 * row['noise']:.2f} %", file=sys.stderr)
    return summary(rows)


def _row(item: dict[str, Any], told: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    peaks = item.get("peak_allocated_gb_by_rank") or [item.get("peak_allocated_gb")]
    memory = max((value for value in peaks if value), default=None)
    turns = item["turns_ms"]
    return {"name": item["name"], "choice": point["choice"], "step_ms": item["step_ms"],
            "predicted_ms": told["step_ms"], "time_error": told["step_ms"] / item["step_ms"] - 1,
            "noise": (max(turns) - min(turns)) / item["step_ms"], "memory_gb": memory,
            "predicted_gb": told["memory_gb"], "memory_error": told["memory_gb"] / memory - 1 if memory else None}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a set of points: mean and worst errors, rank correlation of times, regret of the first choice.

    Args:
        rows: name, step_ms, predicted_ms, time_error, memory_error, noise, choice of each point.
    """
    times = [abs(row["time_error"]) for row in rows]
    memory = [abs(row["memory_error"]) for row in rows if row["memory_error"] is not None]
    worst = max(rows, key=lambda row: abs(row["time_error"]))
    found = {"points": len(rows), "mean_time_error": statistics.mean(times), "worst_time_error": worst["time_error"],
             "worst_point": worst["name"], "rank_correlation": rank_correlation(rows),
             "mean_memory_error": statistics.mean(memory) if memory else None,
             "worst_memory_error": max(memory, default=None)}
    choice = [row for row in rows if row["choice"]]
    if choice:
        first, best = (min(choice, key=lambda row, key=key: row[key]) for key in ("predicted_ms", "step_ms"))
        found |= {"layouts": len(choice), "first_choice": first["name"], "fastest": best["name"],
                  "regret": first["step_ms"] / best["step_ms"] - 1}
    return found


def rank_correlation(rows: list[dict[str, Any]]) -> float:
    """Kendall's tau of predicted and measured times over the pairs that differ by more than their repeats do."""
    agree = against = 0
    for place, one in enumerate(rows):
        for other in rows[:place]:
            far = one["step_ms"] - other["step_ms"]
            if abs(far) <= max(one["noise"] * one["step_ms"], other["noise"] * other["step_ms"]):
                continue
            same = far * (one["predicted_ms"] - other["predicted_ms"]) > 0
            agree, against = agree + same, against + (not same)
    return (agree - against) / max(1, agree + against)


def main() -> int:
    """Runs a verb; the last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["export", "predict", "measure", "score"])
    parser.add_argument("--points", type=Path, default=_HERE / "points" / "points.yaml", help="list of points")
    parser.add_argument("--set", default="all", choices=["all", *KINDS])
    parser.add_argument("--only", default="", help="names of points with commas between (default: all of the set)")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    parser.add_argument("--programs", default="programs", help="folder of the exported programs, one a point")
    parser.add_argument("--cluster", default="h200", help="cluster file that predicts")
    parser.add_argument("--predicted", default="predicted.json")
    parser.add_argument("--measured", default="measured.jsonl")
    parser.add_argument("--output", default="measured.jsonl")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--nproc", type=int, default=1, help="GPUs (processes)")
    parser.add_argument("--seconds", type=float, default=0.25, help="of a turn")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no further point begins")
    parser.add_argument("--profile", action="store_true", help="also the time of every kernel")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    found = {"export": export, "predict": predict, "measure": measure, "score": score}[arguments.verb](arguments)
    if arguments.rank is not None:
        os._exit(0)  # captured graphs hold NCCL's communicators, which would wait for each other to be given up
    if arguments.verb == "predict":
        Path(arguments.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        found = {"predicted": len(found["points"])}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
