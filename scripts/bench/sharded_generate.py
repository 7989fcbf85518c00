"""Generation on two processes from a cluster's checkpoint, beside merging it first and generating on one.

    python scripts/bench/sharded_generate.py [--layers 24] [--width 1024] [--rounds 3] [--tokens 64]

The checkpoint has the sizes of configs/pangu/350m.yaml with start values, in the slices of data 2 x op 4 as eight
devices leave it. `merged`: `python -m parallel reshard` to one device, then `python -m pangu generate`. `sharded`:
`python -m parallel launch --run generate --nproc 2 parallel.op=2` on the slices, its program exported before. Both
generate greedily, and their texts must be equal. Told are seconds of the commands with one token, the peak memory of
any process and of the ranks (VmHWM), and tokens a second of decoding. Sides take turns. The last line of stdout is
JSON; `ratio` is of seconds to the first token, sharded over merged.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))

import serve_lm_sides as sides  # noqa: E402 - beside this file
import turns  # noqa: E402

CLUSTER = ["parallel.data=2", "parallel.op=4", "parallel.devices=8"]
PROMPT = "一丁七万丈三上下"


class Watched:
    """A command with the peak memory of its processes.

    Attributes: `figures`, its JSON line; `seconds`; `peaks`, bytes by process; `ranks`, those of launched ranks.
    """

    def __init__(self, *words: object) -> None:
        begun = time.perf_counter()
        self.peaks: dict[int, int] = {}
        self.ranks: set[int] = set()
        with subprocess.Popen([sys.executable, "-m", *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, env=environment()) as process:
            over = threading.Event()
            watcher = threading.Thread(target=self._watch, args=(process.pid, over))
            watcher.start()
            output, errors = process.communicate()
            over.set()
            watcher.join()
        self.seconds = time.perf_counter() - begun
        if process.returncode:
            raise SystemExit(f"error: {' '.join(map(str, words))} failed:\n{errors[-3000:]}")
        self.figures = json.loads(output.strip().splitlines()[-1])

    def _watch(self, root: int, over: threading.Event) -> None:
        while not over.wait(0.05):
            for pid in descendants(root):
                try:
                    status = Path(f"/proc/{pid}/status").read_text()
                    self.peaks[pid] = int(status.partition("VmHWM:")[2].split()[0]) << 10
                    if b"\0RANK=" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
                        self.ranks.add(pid)
                except (OSError, IndexError, ValueError):
                    continue

    @property
    def peak(self) -> int:
        """Bytes of the largest rank, or of the largest process where there are no ranks."""
        return max(self.peaks[pid] for pid in (self.ranks or self.peaks))


def environment() -> dict[str, str]:
    """That of every side, but memory that is freed goes back, for peaks are told, and the cores are dealt among a
    launch's ranks by the launcher."""
    left_out = {*turns.MALLOC, "OMP_NUM_THREADS"}
    return {name: value for name, value in turns.environment().items() if name not in left_out}


def descendants(root: int) -> list[int]:
    """A process and those below it."""
    found = [root]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:
                continue
    return found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    turns.require("torch", "mindspore")
    print(turns.describe_machine(), file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measured(arguments, Path(scratch))))


def measured(arguments: argparse.Namespace, scratch: Path) -> dict:
    """The figures."""
    config = sides.start_values(scratch / "model", arguments.layers, vocabulary=40000, width=arguments.width,
                                heads=arguments.width // 64)
    slices = scratch / "slices"
    start = scratch / "model/run/checkpoints/step_00000001"
    Watched("parallel", "reshard", "--config", config, "--from", start, "--to", slices, *CLUSTER)
    program = scratch / "program"
    layout = ["parallel.op=2", "generate.batch_size=1"]
    Watched("parallel", "export", "--config", config, "--output", program, "--graphs", "prefill,decode,score", *layout,
            "parallel.devices=2")
    sizes = {"slices_gb": size(slices), "model_gb": size(scratch / "model/run")}
    sharded = ["parallel", "launch", "--config", config, "--run", "generate", "--nproc", 2, "--program", program,
               *layout, "KEYS", "--", "--prompt", PROMPT, "--checkpoint", slices]
    rounds: dict[str, list[dict]] = {"merged": [], "sharded": []}
    texts: set[str] = set()
    for number in range(arguments.rounds):
        for name in list(rounds)[:: 1 if number % 2 == 0 else -1]:
            make = merged(config, slices, scratch / "whole") if name == "merged" else lambda *keys: Watched(
                *(part for word in sharded for part in (keys if word == "KEYS" else [word])))
            rounds[name].append(one_round(make, arguments.tokens))
            shutil.rmtree(scratch / "whole", ignore_errors=True)
            texts.add(json.dumps(rounds[name][-1].pop("outputs")))
            print(f"{name}: {rounds[name][-1]}", file=sys.stderr)
    if len(texts) != 1:
        raise SystemExit("error: the sides do not give one text")
    table = {name: {key: statistics.median(one[key] for one in own) for key in own[0]} for name, own in rounds.items()}
    return {"ratio": round(table["sharded"]["first_token_s"] / table["merged"]["first_token_s"], 3), **table, **sizes,
            "threads": turns.threads(), "malloc": "glibc's defaults"}


def merged(config: Path, slices: Path, whole: Path):
    """Merges the slices, then generates; the first command's time and memory count in the first call."""
    first = Watched("parallel", "reshard", "--config", config, "--from", slices, "--to", whole)

    def make(*keys: str) -> Watched:
        done = Watched("pangu", "generate", "--config", config, "--prompt", PROMPT, "--checkpoint", whole, *keys)
        if keys[0].endswith("=1"):
            done.seconds += first.seconds
            done.peaks |= first.peaks
        return done
    return make


def one_round(make, tokens: int) -> dict:
    """First with one token, then with all of them."""
    greedy = "generate.temperature=0"
    first, full = make("generate.max_new_tokens=1", greedy), make(f"generate.max_new_tokens={tokens}", greedy)
    return {"first_token_s": round(first.seconds, 2), "peak_gb": round(first.peak / 1e9, 3),
            "tokens_per_s": full.figures["tokens_per_second"], "outputs": full.figures["outputs"]}


def size(folder: Path) -> float:
    """GB of its files."""
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9, 3)


if __name__ == "__main__":
    main()
