"""How many devices a trained model takes, how many tokens a second it writes there, and when the first one comes.

A model of the graphs of inference (one group of op x stages devices; several groups multiply the tokens): every product
takes the longer of its arithmetic and of reading its shard of the weights, attention reads its shard of the cache, two
AllReduces a layer wait for the op axis, and stages work one after the other on one batch, as they are run.
Shapes: B sequences that decode together, S tokens of a prompt that are read at once, D width, F feed-forward width.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from parallel.common.errors import UserError
from parallel.common.progress import info, table
from parallel.common.settings import load_settings
from parallel.planning.cluster import ClusterSettings, LinkSettings
from parallel.planning.cost.segments import Work
from parallel.planning.planner import cluster_file
from parallel.task import load_run

_KERNELS = 16  # of a layer that are no products: norms, residuals, reading and writing the cache, softmax
_HALF = 2  # bytes of a weight, of a cached number, of an activation
_MOST_STAGES = 64


@dataclass(frozen=True)
class Decoder:
    """A decoder's sizes; see `parallel.task.ModelPackage.decoder_sizes`.

    Args:
        layers, width, heads, inner, vocabulary: L, D, H, F, V.
        context: positions.
        batch: B.
        chunk: S.
        whole_vocabulary: whether every device holds the words whole.
    """

    layers: int
    width: int
    heads: int
    inner: int
    vocabulary: int
    context: int
    batch: int
    chunk: int
    whole_vocabulary: bool


@dataclass(frozen=True)
class Served:
    """A group on a cluster.

    Args:
        op, stages: of the group.
        weight_bytes, cache_bytes: on the fullest device; the cache is B sequences of full length.
        fits: whether both lie in its memory.
        tokens_per_second: of the group, B sequences with half a context each.
        first_token_seconds: of a prompt of half a context that comes to an idle group.
    """

    op: int
    stages: int
    weight_bytes: int
    cache_bytes: int
    fits: bool
    tokens_per_second: float
    first_token_seconds: float

    @property
    def devices(self) -> int:
        """Of the group."""
        return self.op * self.stages


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """`estimate --serve`: the group that the file says, and the fewest devices that hold the model.

    Raises:
        UserError: a model that does not generate, or that no number of devices holds.
    """
    package, settings = load_run(arguments.config, list(arguments.overrides))
    decoder = Decoder(**package.decoder_sizes(settings))
    package.check_inference(settings)
    cluster = load_settings(ClusterSettings, cluster_file(arguments.cluster))
    layout = settings.parallel.forward().resolve()
    own = served(decoder, cluster, layout.op, layout.pipeline.stages)
    least = fewest(decoder, cluster)
    columns = ["", "op", "stages", "devices", "weights GB", "cache GB", "fits", "tokens/s", "first token ms"]
    table(f"{settings.model.name} on {cluster.name}: {decoder.batch} sequences at once, prompts of "
          f"{decoder.context // 2} tokens", columns,
          [[name, one.op, one.stages, one.devices, one.weight_bytes / 1e9, one.cache_bytes / 1e9, one.fits,
            one.tokens_per_second, 1e3 * one.first_token_seconds]
           for name, one in (("this file", own), ("fewest devices", least))])
    info("an estimate from the sizes and the cluster's file, not measured")
    return {"cluster": cluster.name, **asdict(own), "devices": own.devices,
            "fewest": {**asdict(least), "devices": least.devices}}


def fewest(decoder: Decoder, cluster: ClusterSettings) -> Served:
    """The group of the fewest devices that holds the model; among equal ones the fastest.

    Raises:
        UserError: there is none.
    """
    widths = [op for op in range(1, cluster.devices_per_node + 1) if decoder.heads % op == 0 and decoder.inner % op == 0
            and (decoder.whole_vocabulary or decoder.vocabulary % op == 0)]
    depths = range(1, min(decoder.layers, _MOST_STAGES) + 1)
    found = [served(decoder, cluster, op, stages) for op in widths for stages in depths]
    fitting = [one for one in found if one.fits]
    if not fitting:
        raise UserError(f"no group within {cluster.devices_per_node} x {_MOST_STAGES} devices holds the model",
                        where="--cluster", value=cluster.name, hint="lower generate.batch_size")
    return min(fitting, key=lambda one: (one.devices, -one.tokens_per_second))


def served(decoder: Decoder, cluster: ClusterSettings, op: int, stages: int) -> Served:
    """What a group does."""
    layers = -(-decoder.layers // stages)
    layer = (4 * decoder.width**2 + 2 * decoder.width * decoder.inner) * _HALF // op
    words = decoder.vocabulary * decoder.width * _HALF // (1 if decoder.whole_vocabulary else op)
    weights = layers * layer + words + 2 * decoder.context * decoder.width * 4
    cache = 2 * layers * decoder.context * decoder.batch * decoder.width // op * _HALF
    working = 2 * _HALF * decoder.chunk * (decoder.inner // op + 4 * decoder.width)
    working += 4 * decoder.batch * decoder.vocabulary
    half = decoder.context // 2
    step = _seconds(decoder, cluster, op, stages, decoder.batch, decoder.batch * half)
    chunks = math.ceil(half / decoder.chunk)
    first = sum(_seconds(decoder, cluster, op, stages, decoder.chunk, (number + 1) * decoder.chunk)
                for number in range(chunks))
    return Served(op, stages, weights, cache, weights + cache + working <= cluster.usable_bytes, decoder.batch / step,
                  first)


def _seconds(decoder: Decoder, cluster: ClusterSettings, op: int, stages: int, tokens: int, seen: int) -> float:
    """One call over `tokens` new tokens that look at `seen` slots of the cache in all."""
    width, inner, words = decoder.width, decoder.inner, decoder.vocabulary
    products: Counter = Counter()
    for rows, columns, times in ((width, width // op, 4), (width, inner // op, 2)):
        products[2 * tokens * rows * columns, min(tokens, columns), rows * columns * _HALF] += times * decoder.layers
    columns = words if decoder.whole_vocabulary else words // op
    rows = min(tokens, decoder.batch)
    products[2 * rows * width * columns, min(rows, columns), width * columns * _HALF] += 1
    work = Work(products, 2 * seen * width // op * _HALF * decoder.layers, _KERNELS * decoder.layers)
    size = tokens * width * _HALF
    sums = 2 * decoder.layers * _all_reduce(cluster, size, op) + _all_reduce(cluster, rows * words * 4, op) / 2
    hops = (stages - 1) * _hop(_link(cluster, op * stages), cluster, size)
    return cluster.seconds_of(work) + sums + hops


def _link(cluster: ClusterSettings, devices: int) -> LinkSettings:
    """The slowest link among devices that stand next to each other."""
    if cluster.group is not None and cluster.devices_per_group is not None and devices <= cluster.devices_per_group:
        return cluster.group
    if devices <= cluster.devices_per_node:
        return cluster.node
    return cluster.rack if devices <= cluster.devices_per_node * cluster.nodes_per_rack else cluster.across


def _all_reduce(cluster: ClusterSettings, size: float, devices: int) -> float:
    if devices == 1:
        return 0.0
    link = _link(cluster, devices)
    rate = link.bandwidth_gb * 1e9 * cluster.efficiency.communication
    return 2 * (size * (devices - 1) / devices / rate + link.latency_us * 1e-6 * math.log2(devices))


def _hop(link: LinkSettings, cluster: ClusterSettings, size: float) -> float:
    return size / (link.bandwidth_gb * 1e9 * cluster.efficiency.communication) + link.latency_us * 1e-6
