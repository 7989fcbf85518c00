"""Events for tests: generated clicks in order of time, and the configuration that reads them."""

from __future__ import annotations

import json
import random

FEATURES = ("[{name: user_id, side: user, values: integer, rows: 50},"
            "{name: item_id, side: item, values: hash, rows: 64},"
            "{name: tags, type: multi, side: item, values: hash, rows: 32, length: 4},"
            "{name: price, type: numeric, side: item, boundaries: [0.2, 0.5, 0.8]}]")
SMALL = ["model.name=dlrm_mlp", f"data.features={FEATURES}", "data.labels=[click]", "data.time=time",
         "train.global_batch_size=16", "train.optimizer.learning_rate=0.01", "train.log_every=2",
         "train.validate_every=10", "train.sparse_optimizer={name: adagrad, learning_rate: 0.1}",
         "output.tensorboard=false", "output.loss_curve=false", "train.peak_tflops=1",
         "data.stream.windows=[50, 200]", "model.hidden=[8]", "output.checkpoint_every=5"]


def clicks(count: int, seed: int = 0, start: float = 1000.0) -> list[dict]:
    """Events with a rule to learn: cheap items are clicked by even users."""
    generator = random.Random(seed)
    events = []
    for number in range(count):
        user, item, price = generator.randrange(50), generator.randrange(40), generator.random()
        likely = 0.9 if (user % 2 == 0) == (price < 0.5) else 0.1
        events.append({"user_id": user, "item_id": f"item {item}", "tags": [f"t{item % 7}", f"t{item % 5}"],
                       "price": price, "time": start + number, "click": int(generator.random() < likely)})
    return events


def add(client, events: list[dict], key: str = "events", first: int = 1) -> None:
    """Writes events under ids of their own, so that a writer may repeat itself."""
    pipe = client.pipeline(transaction=False)
    for number, event in enumerate(events, first):
        pipe.xadd(key, {"event": json.dumps(event)}, id=f"{number}-0")
    pipe.execute()
