"""Training speed of a separated ranker with and without shared users, and of the unseparated one: samples/s, in turns.

One process trains the same model three ways on the same batches of the generated log: unseparated (same tokens, no
masks), separated, and separated with the samples of a user sharing the user side's computation. A step is forward,
backward and update.

    python scripts/bench/ug_sep_train.py [--config FILE] [--ratios 1:1] [--together 8] [--rounds 12] [key.sub=value ...]

Last line of stdout: JSON; `ratio` is samples/s shared / separated at the first ratio, `rows` has every figure.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184",
          "MALLOC_TOP_PAD_": "536870912"}
THREADS = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
SIZES = ["model.width=192", "model.ratio=2", "train.global_batch_size=512"]
OFF = ["model.ug_sep.mixing_mask=false", "model.ug_sep.reverting_mask=false"]


def restart_with_malloc() -> None:
    """The settings are read when a process starts."""
    if any(os.environ.get(key) != value for key, value in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv],
                  {**os.environ, **MALLOC, "OMP_NUM_THREADS": str(THREADS)})


def trainer(config: str, words: list[str], shared: bool):
    """(step on a batch of arrays, batches of the log, sides, settings) of one way to train."""
    from mindspore import Tensor

    from parallel.common.settings import load_settings
    from parallel.layers.parameter import initialize
    from parallel.training.optimizers.run import Optimizer
    from parallel.training.step import TrainStep
    from recsys.build import loss_network
    from recsys.data.batches import Batches
    from recsys.data.log import prepare
    from recsys.settings import Run
    from recsys.ug_sep.user_aggregation import sharing_loss

    settings = load_settings(Run.for_file(config, words), config, words)
    log = prepare(settings.data, settings.model.embedding_size)
    network = loss_network(settings, log.spec, len(log.labels))
    initialize(network.model, 1)
    loss = sharing_loss(network, settings) if shared else network
    step = TrainStep(loss, Optimizer(network.trainable_params(), settings.train.optimizer, 1000), settings.train)
    step.set_train(True)
    batches = Batches(log.parts["train"], settings.train.global_batch_size, 1, spec=log.spec,
                      together=settings.data.together)

    def run(batch: tuple) -> float:
        started = time.perf_counter()
        float(step(*map(Tensor, batch))[0].asnumpy())
        return time.perf_counter() - started

    return run, batches, network.model.sides, settings


def measure(arguments: argparse.Namespace, ratio: str, cache: str) -> dict:
    """One row: median samples/s of the three ways."""
    import itertools

    import numpy as np

    from recsys.ug_sep.user_aggregation import share

    words = [*SIZES, f"data.cache={cache}", f"data.together={arguments.together}", f"model.ug_sep.ratio={ratio}",
             *arguments.words]
    ways = {"unseparated": trainer(arguments.config, [*words, *OFF], False)[0],
            "separated": trainer(arguments.config, words, False)[0]}
    ways["shared"], batches, sides, settings = trainer(arguments.config, words, True)
    times: dict[str, list[float]] = {name: [] for name in ways}
    most = 0
    for number, batch in enumerate(itertools.islice(batches.batches(0), arguments.rounds + 2)):
        shared = share(sides, *batch)
        most = max(most, len(shared[-1]))
        for name, run in ways.items():
            seconds = run(shared if name == "shared" else batch)
            # The first batch compiles; another bucket of users would compile again, and shows as an outlier.
            if number >= 2:
                times[name].append(seconds)
    size = settings.train.global_batch_size
    row = {"ratio": ratio, "batch": size, "user_rows": most, **{name: size / float(np.median(found))
                                                                for name, found in times.items()}}
    row["shared_over_separated"] = row["shared"] / row["separated"]
    row["shared_over_unseparated"] = row["shared"] / row["unseparated"]
    row["separated_over_unseparated"] = row["separated"] / row["unseparated"]
    print(f"{ratio}: unseparated {row['unseparated']:,.0f}/s, separated {row['separated']:,.0f}/s, shared "
          f"{row['shared']:,.0f}/s with {most} user rows for {size} samples", file=sys.stderr)
    return row


def main() -> None:
    """Parses the flags, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "recsys" / "tokenmixer_large_ug_sep.yaml"),
                        help="a separated ranker")
    parser.add_argument("--ratios", default="1:1", help="user tokens : candidate tokens, several with commas")
    parser.add_argument("--together", type=int, default=8, help="samples of a user that are neighbours")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each way")
    parser.add_argument("words", nargs="*", help="overrides, key.sub=value")
    arguments = parser.parse_args()
    restart_with_malloc()
    sys.path.insert(0, str(ROOT))
    import mindspore as ms

    ms.set_context(mode=ms.GRAPH_MODE)
    with tempfile.TemporaryDirectory() as cache:
        rows = [measure(arguments, ratio, cache) for ratio in arguments.ratios.split(",")]
    print(json.dumps({"ratio": rows[0]["shared_over_separated"], "ours": rows[0]["shared"],
                      "peer": rows[0]["separated"], "unit": "samples/s", "peer_name": "separated, users not shared",
                      "threads": THREADS, "malloc": MALLOC, "rows": rows}))


if __name__ == "__main__":
    main()
