"""Duplicates among the signature files, found on Spark; row for row what `dedup.local` finds.

Joins and counts run in the JVM on data frames, which stream and spill, so that a key with millions of rows (identical
documents, a frequent band) does not have to fit into a worker. Python sees buckets of at most `bucket_limit` nodes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.dedup.candidates import bucket_pairs
from data_tools.dedup.components import connected_components
from data_tools.dedup.local import decision_rule
from data_tools.dedup.plan import DedupPlan
from data_tools.dedup.sign_part import read_shingles
from data_tools.dedup.verify import jaccard
from parallel.common.files import atomic_write
from parallel.common.json_text import dump_json

if TYPE_CHECKING:
    from data_tools.engines.spark import SparkEngine

DRIVER_EDGES = 2_000_000  # up to this many edges the components are found on the driver


def find_duplicates(plan: DedupPlan, engine: SparkEngine, driver_edges: int = DRIVER_EDGES) -> dict[str, Any]:
    """Writes the decision files of all parts; returns counts (clusters, pairs, edges)."""
    from pyspark import StorageLevel
    from pyspark.sql import functions as f

    session = engine.session
    documents = session.read.parquet(*[f"file://{plan.signature_path(split.index)}" for split in plan.splits])
    nodes = _nodes(documents).persist(StorageLevel.MEMORY_AND_DISK)
    pairs, split_buckets = _candidate_pairs(plan, engine, nodes)
    pairs = pairs.persist(StorageLevel.MEMORY_AND_DISK)
    shingles = _shingles(plan, engine, nodes, pairs).persist(StorageLevel.DISK_ONLY)
    threshold = plan.settings.threshold
    edges = _similarities(engine, shingles, pairs, threshold).where(f.col("similarity") >= threshold)
    edges = edges.persist(StorageLevel.MEMORY_AND_DISK)
    edge_count = edges.count()
    labels = _components(engine, edges, edge_count, driver_edges)
    removed = _removed_nodes(engine, nodes, labels, shingles).persist(StorageLevel.MEMORY_AND_DISK)
    _write_decisions(plan, engine, documents, nodes, removed)
    figures = {**_cluster_figures(nodes, removed), "candidate_pairs": pairs.count(), "verified_pairs": edge_count,
               "split_buckets": split_buckets}
    for frame in (nodes, pairs, shingles, edges, removed):
        frame.unpersist()
    return figures


def _nodes(documents: Any) -> Any:
    """One row a node: its best document (the rule is in the docstring of `DedupPlan`) and the number of its copies."""
    from pyspark.sql import functions as f

    key = f.struct("source_rank", (-f.col("size")).alias("negative_size"), "id", "record", "part", "row",
                   "bands", "signature")
    best = documents.groupBy("node").agg(f.min(key).alias("best"), f.count("*").alias("copies"))
    return best.select("node", "copies", "best.*")


def _candidate_pairs(plan: DedupPlan, engine: SparkEngine, nodes: Any) -> tuple[Any, int]:
    """(frame u, v of node digests with u < v, number of buckets that had to be split)."""
    from pyspark.sql import functions as f

    limit = plan.settings.bucket_limit
    signed = nodes.where(-f.col("negative_size") >= plan.settings.ngram)
    keyed = signed.select("node", f.posexplode("bands").alias("band", "key"))
    counts = keyed.groupBy("band", "key").count().where("count > 1").persist()
    split_buckets = counts.where(f.col("count") > limit).count()
    members = keyed.join(counts, ["band", "key"])
    signatures = signed.select("node", "signature")
    small = members.where(f.col("count") <= limit).select(f.struct("band", "key").alias("bucket"), "node")
    buckets = _grouped(small.join(signatures, "node"))
    if split_buckets:
        large = members.where(f.col("count") > limit).select("band", "key", "node")
        buckets = buckets.union(_split_buckets(large, keyed, signatures, limit))
    floor, neighbours = plan.estimate_floor(), plan.settings.neighbours
    pairs = buckets.flatMap(lambda bucket: _pairs_of_bucket(bucket[1], floor, neighbours))
    return engine.session.createDataFrame(pairs, "u binary, v binary").distinct(), split_buckets


def _split_buckets(large: Any, keyed: Any, signatures: Any, limit: int) -> Any:
    """Buckets above the limit: split by the keys of the other bands, then by digest (see `candidates`)."""
    from pyspark.sql import functions as f

    other = keyed.select("node", f.col("band").alias("other_band"), f.col("key").alias("other_key"))
    groups = ["band", "key", "other_band", "other_key"]
    joined = large.join(other, "node").where("band != other_band")
    counts = joined.groupBy(*groups).agg(f.count("*").alias("count"), f.min("node").alias("first")).where("count > 1")
    members = joined.join(counts, groups).select(f.struct(*groups).alias("bucket"), "node", "count", "first")
    fitting = _grouped(members.where(f.col("count") <= limit).select("bucket", "node").join(signatures, "node"))
    oversize = members.where(f.col("count") > limit).rdd.flatMap(lambda row: _shards(row, limit))
    sharded = members.sparkSession.createDataFrame(oversize, "bucket string, node binary").distinct()
    return fitting.union(_grouped(sharded.join(signatures, "node")))


def _shards(row: Any, limit: int) -> Iterator[tuple[str, bytes]]:
    """The member in its shard; the first member of the bucket in all of them."""
    count = -(-row["count"] // limit)
    node = bytes(row["node"])
    own = int.from_bytes(node[8:], "big") % count
    for shard in range(count) if node == bytes(row["first"]) else (own,):
        yield f"{tuple(row['bucket'])} {shard}", node


def _grouped(members: Any) -> Any:
    """RDD (bucket, [(node, signature)]) of a frame bucket, node, signature."""
    keyed = members.rdd.map(lambda row: (row["bucket"] if isinstance(row["bucket"], str) else tuple(row["bucket"]),
                                         (bytes(row["node"]), bytes(row["signature"]))))
    return keyed.groupByKey()


def _pairs_of_bucket(members: Any, floor: float, neighbours: int) -> list[tuple[bytes, bytes]]:
    members = sorted(members)
    signatures = np.stack([np.frombuffer(signature, np.uint32) for _, signature in members])
    return [(members[first][0], members[second][0]) for first, second in bucket_pairs(signatures, floor, neighbours)]


def _shingles(plan: DedupPlan, engine: SparkEngine, nodes: Any, pairs: Any) -> Any:
    """Frame node, hashes: the n-gram sets of all nodes that occur in a pair, read from the parts once more."""
    wanted = pairs.select("u").union(pairs.select("v")).distinct().withColumnRenamed("u", "node")
    places = nodes.join(wanted, "node").select("part", "row", "node").rdd
    by_part = places.map(lambda row: (row["part"], (row["row"], bytes(row["node"])))).groupByKey()
    splits, bare = {split.index: split for split in plan.splits}, plan.without_splits()

    def read(item: tuple[int, Any]) -> Iterator[tuple[bytes, bytes]]:
        node_of_row = dict(item[1])
        for row, hashes in read_shingles(bare, splits[item[0]], set(node_of_row)):
            yield node_of_row[row], hashes.tobytes()

    return engine.session.createDataFrame(by_part.flatMap(read), "node binary, hashes binary")


def _similarities(engine: SparkEngine, shingles: Any, pairs: Any, at_least: float) -> Any:
    """Frame u, v, similarity: real Jaccard similarity of each pair (0 where sizes rule `at_least` out)."""
    left = shingles.withColumnsRenamed({"node": "u", "hashes": "left"})
    right = shingles.withColumnsRenamed({"node": "v", "hashes": "right"})
    joined = pairs.select("u", "v").join(left, "u").join(right, "v")

    def measure(row: Any) -> tuple[bytes, bytes, float]:
        sets = (np.frombuffer(bytes(row[name]), np.uint64) for name in ("left", "right"))
        return bytes(row["u"]), bytes(row["v"]), jaccard(*sets, at_least)

    return engine.session.createDataFrame(joined.rdd.map(measure), "u binary, v binary, similarity double")


def _components(engine: SparkEngine, edges: Any, edge_count: int, driver_edges: int) -> Any:
    """Frame node, label: the smallest digest of the component, for every node that has an edge."""
    if edge_count > driver_edges:
        return star_components(edges.select("u", "v"))
    rows = [(bytes(row["u"]), bytes(row["v"])) for row in edges.select("u", "v").collect()]
    digests = sorted({digest for row in rows for digest in row})
    number = {digest: index for index, digest in enumerate(digests)}
    numbered = np.array([(number[u], number[v]) for u, v in rows], dtype=np.int64).reshape(-1, 2)
    labels = connected_components(len(digests), numbered)
    found = [(digest, digests[label]) for digest, label in zip(digests, labels, strict=True)]
    return engine.session.createDataFrame(found, "node binary, label binary")


def star_components(edges: Any) -> Any:
    """Connected components by alternating large-star and small-star rounds.

    Kiveris, Lattanzi, Mirrokni, Rastogi, Vassilvitskii, "Connected Components in MapReduce and Beyond" (SoCC 2014).

    Args:
        edges: frame u, v.

    Returns:
        frame node, label, the label being the smallest node of the component.
    """
    from pyspark.sql import functions as f

    edges = edges.distinct().localCheckpoint()
    while True:
        following = _small_star(_large_star(edges)).localCheckpoint()
        changed = following.exceptAll(edges).limit(1).count() + edges.exceptAll(following).limit(1).count()
        edges = following
        if changed == 0:
            break
    labels = edges.select(f.col("u").alias("node"), f.col("v").alias("label"))
    roots = edges.select(f.col("v").alias("node"), f.col("v").alias("label"))
    return labels.union(roots).distinct()


def _large_star(edges: Any) -> Any:
    """Every neighbour that is larger than a node goes to the smallest of the node and its neighbours."""
    from pyspark.sql import functions as f

    both = edges.select("u", "v").union(edges.select(f.col("v").alias("u"), f.col("u").alias("v")))
    smallest = both.groupBy("u").agg(f.min("v").alias("m")).select("u", f.least("u", "m").alias("m"))
    return both.join(smallest, "u").where("v > u").select(f.col("v").alias("u"), f.col("m").alias("v")).distinct()


def _small_star(edges: Any) -> Any:
    """A node and all its smaller neighbours go to the smallest of these."""
    from pyspark.sql import functions as f

    down = edges.select(f.greatest("u", "v").alias("u"), f.least("u", "v").alias("v")).where("u > v").distinct()
    smallest = down.groupBy("u").agg(f.min("v").alias("m"))
    moved = down.join(smallest, "u").where("v > m").select(f.col("v").alias("u"), f.col("m").alias("v"))
    return moved.union(smallest.select("u", f.col("m").alias("v"))).distinct()


def _removed_nodes(engine: SparkEngine, nodes: Any, labels: Any, shingles: Any) -> Any:
    """Frame node, keeper, kept_id, similarity of the nodes for which another one is kept."""
    from pyspark.sql import functions as f

    key = f.struct("source_rank", "negative_size", "id", "record", "part", "row", "node")
    members = labels.join(nodes, "node").select("node", "label", key.alias("key"))
    best = members.groupBy("label").agg(f.min("key").alias("best"))
    representatives = best.select("label", f.col("best.node").alias("keeper"), f.col("best.id").alias("kept_id"))
    removed = members.join(representatives, "label").where("node != keeper").select("node", "keeper", "kept_id")
    pairs = removed.select(f.col("keeper").alias("u"), f.col("node").alias("v"))
    similarity = _similarities(engine, shingles, pairs, 0.0).select(f.col("v").alias("node"), "similarity")
    return removed.join(similarity, "node")


def _write_decisions(plan: DedupPlan, engine: SparkEngine, documents: Any, nodes: Any, removed: Any) -> None:
    from pyspark.sql import functions as f

    for split in plan.splits:
        with atomic_write(plan.decision_path(split.index)):
            pass
    best = nodes.select("node", f.col("part").alias("best_part"), f.col("row").alias("best_row"),
                        f.col("id").alias("best_id"))
    rows = documents.select("part", "row", "node").join(best, "node").join(removed, "node", "left")
    near = f.col("keeper").isNotNull()
    goes = rows.where(near | (f.col("part") != f.col("best_part")) | (f.col("row") != f.col("best_row")))
    decisions = goes.select("part", "row", f.coalesce("kept_id", "best_id").alias("kept_id"),
                            f.coalesce("similarity", f.lit(1.0)).alias("similarity"), near.alias("near"))
    bare = plan.without_splits()

    def write(ordered: Iterator[Any]) -> Iterator[int]:
        for part, group in itertools.groupby(ordered, key=lambda row: row["part"]):
            with atomic_write(bare.decision_path(part)) as file:
                for row in group:
                    decision = {"row": row["row"], "kept_id": row["kept_id"], "similarity": row["similarity"],
                                "rule": decision_rule(not row["near"])}
                    file.write(dump_json(decision) + "\n")
            yield part

    decisions.repartition("part").sortWithinPartitions("part", "row").rdd.mapPartitions(write).count()


def _cluster_figures(nodes: Any, removed: Any) -> dict[str, Any]:
    from pyspark.sql import functions as f

    sizes = nodes.select("node", "copies").join(removed.select("node", "keeper"), "node", "left")
    sizes = sizes.groupBy(f.coalesce("keeper", "node").alias("cluster")).agg(f.sum("copies").alias("size"))
    sizes = sizes.where("size > 1")
    largest = sizes.agg(f.max("size")).collect()[0][0]
    counts = sizes.groupBy(f.least("size", f.lit(1000)).alias("size")).count().orderBy("size").collect()
    return {"clusters": sum(row["count"] for row in counts), "largest_cluster": largest or 0,
            "cluster_sizes": {str(row["size"]): row["count"] for row in counts}}
