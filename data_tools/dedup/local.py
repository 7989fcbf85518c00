"""Duplicates among the signature files, found in NumPy arrays on one machine."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_tools.dedup.candidates import Bucketer
from data_tools.dedup.components import connected_components
from data_tools.dedup.plan import DedupPlan
from data_tools.dedup.sign_part import read_shingles
from data_tools.dedup.verify import jaccard
from data_tools.records import Split
from parallel.common.digests import check_summed, summed_write
from parallel.common.files import atomic_write
from parallel.common.json_text import dump_json

if TYPE_CHECKING:
    from data_tools.engines.base import Engine

_PAIRS_A_TASK = 20_000


@dataclass
class _Documents:
    """Columns of all signature files: one entry a document."""

    part: np.ndarray
    row: np.ndarray
    ids: list[str]
    source_rank: np.ndarray
    size: np.ndarray
    record: list[bytes]
    node: np.ndarray  # uint64 [N, 2], high and low half of the digest

    def keep_order(self, index: int) -> tuple:
        """Sorts the document to be kept first (the rule is in the docstring of `DedupPlan`)."""
        return (int(self.source_rank[index]), -int(self.size[index]), self.ids[index], self.record[index],
                int(self.part[index]), int(self.row[index]))


@dataclass
class _Nodes:
    """Distinct normal forms in the order of their digests; `best` is the document to keep of each."""

    best: np.ndarray
    of_document: np.ndarray


def find_duplicates(plan: DedupPlan, engine: Engine) -> dict[str, Any]:
    """Writes the decision files of all parts; returns counts (clusters, pairs, edges)."""
    documents = _load_documents(plan)
    nodes = _collapse_exact(documents)
    pairs, split_buckets = _candidate_pairs(plan, documents, nodes)
    shingles = _ShingleStore.write(plan, engine, documents, nodes, np.unique(pairs))
    similarity = _verify(plan, engine, shingles, pairs, plan.settings.threshold)
    edges = pairs[similarity >= plan.settings.threshold]
    labels = connected_components(len(nodes.best), edges)
    representative = _representatives(documents, nodes, labels)
    to_representative = _similarity_to_representative(plan, engine, shingles, representative)
    _write_decisions(plan, documents, nodes, representative, to_representative)
    shingles.remove()
    sizes = np.bincount(np.unique(representative[nodes.of_document], return_inverse=True)[1])
    return {**cluster_figures(sizes), "candidate_pairs": len(pairs), "verified_pairs": len(edges),
            "split_buckets": split_buckets}


def cluster_figures(sizes: np.ndarray) -> dict[str, Any]:
    """Counts of clusters out of the number of documents in each."""
    clusters = sizes[sizes > 1]
    counts = np.bincount(np.minimum(clusters, 1000)) if len(clusters) else np.empty(0, dtype=int)
    return {"clusters": len(clusters), "largest_cluster": int(clusters.max()) if len(clusters) else 0,
            "cluster_sizes": {str(size): int(count) for size, count in enumerate(counts) if count}}


def _signatures(plan: DedupPlan, split: Split, columns: list[str]) -> Any:
    """Columns of a part's signature file; pyarrow's own opening knows names in UTF-8 only."""
    from pyarrow import OSFile, parquet

    return parquet.read_table(OSFile(os.fsencode(plan.signature_path(split.index))), columns=columns)


def _load_documents(plan: DedupPlan) -> _Documents:
    tables = [_signatures(plan, split, ["row", "id", "source_rank", "size", "record", "node"]) for split in plan.splits]
    part = np.concatenate([np.full(len(table), split.index) for split, table in zip(plan.splits, tables, strict=True)])
    column = {name: [table[name] for table in tables] for name in tables[0].column_names}
    digests = b"".join(value for chunk in column["node"] for value in chunk.to_pylist())
    return _Documents(
        part=part, row=np.concatenate([chunk.to_numpy() for chunk in column["row"]]),
        ids=[value for chunk in column["id"] for value in chunk.to_pylist()],
        source_rank=np.concatenate([chunk.to_numpy() for chunk in column["source_rank"]]),
        size=np.concatenate([chunk.to_numpy() for chunk in column["size"]]),
        record=[value for chunk in column["record"] for value in chunk.to_pylist()],
        node=np.frombuffer(digests, dtype=">u8").reshape(-1, 2).astype(np.uint64),
    )


def _collapse_exact(documents: _Documents) -> _Nodes:
    order = np.lexsort((documents.node[:, 1], documents.node[:, 0]))
    ordered = documents.node[order]
    first = np.ones(len(order), dtype=bool)
    first[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    number = np.cumsum(first) - 1
    of_document = np.empty(len(order), dtype=np.int64)
    of_document[order] = number
    starts = np.append(np.flatnonzero(first), len(order))
    best = order[starts[:-1]].copy()
    for node in np.flatnonzero(np.diff(starts) > 1):
        best[node] = min(order[starts[node]:starts[node + 1]], key=documents.keep_order)
    return _Nodes(best, of_document)


def _candidate_pairs(plan: DedupPlan, documents: _Documents, nodes: _Nodes) -> tuple[np.ndarray, int]:
    """Pairs of node numbers. Nodes without an n-gram never become candidates."""
    signed = np.flatnonzero(documents.size[nodes.best] >= plan.settings.ngram)
    if len(signed) < 2:
        return np.empty((0, 2), dtype=np.int64), 0
    bands, entries = plan.bands, plan.bands.count * plan.bands.rows
    keys = np.empty((len(signed), bands.count), dtype=np.uint64)
    signatures = np.empty((len(signed), entries), dtype=np.uint32)
    best = nodes.best[signed]
    part_starts = np.searchsorted(documents.part, np.arange(len(plan.splits) + 1))
    for position, split in enumerate(plan.splits):
        mine = np.flatnonzero(documents.part[best] == split.index)
        if len(mine):
            table = _signatures(plan, split, ["bands", "signature"])
            table = table.take(best[mine] - part_starts[position])
            keys[mine] = np.stack(table["bands"].to_numpy()).view(np.uint64)
            signatures[mine] = np.frombuffer(b"".join(table["signature"].to_pylist()), np.uint32).reshape(-1, entries)
    settings = plan.settings
    bucketer = Bucketer(keys, documents.node[best, 1], signatures, plan.estimate_floor(), settings.neighbours,
                        settings.bucket_limit)
    return signed[bucketer.pairs()], bucketer.split_buckets


@dataclass(frozen=True)
class _ShingleTask:
    """Writes the n-gram sets of the wanted rows of one part, end to end; returns the length of each."""

    plan: DedupPlan
    split: Split
    rows: tuple[int, ...]

    def __call__(self) -> tuple[int, list[int]]:
        lengths = []
        with summed_write(self.plan.shingle_path(self.split.index)) as file:
            for _, hashes in read_shingles(self.plan, self.split, set(self.rows)):
                file.write(hashes.tobytes())
                lengths.append(len(hashes))
        return self.split.index, lengths


@dataclass
class _ShingleStore:
    """Where the n-gram set of each wanted node is: part file, first entry, length."""

    plan: DedupPlan
    part: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @staticmethod
    def write(plan: DedupPlan, engine: Engine, documents: _Documents, nodes: _Nodes,
              wanted: np.ndarray) -> _ShingleStore:
        """Reads the parts that hold wanted nodes once more; memory stays at one document a worker."""
        count = len(nodes.best)
        store = _ShingleStore(plan, documents.part[nodes.best], np.zeros(count, np.int64), np.zeros(count, np.int64))
        by_part: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for node in wanted:
            best = nodes.best[node]
            by_part[int(documents.part[best])].append((int(documents.row[best]), int(node)))
        tasks = [_ShingleTask(plan.without_splits(), split, tuple(sorted(row for row, _ in by_part[split.index])))
                 for split in plan.splits if split.index in by_part]
        for part, lengths in engine.map(_call, tasks, "dedup: n-grams of candidates"):
            members = [node for _, node in sorted(by_part[part])]
            store.length[members] = lengths
            store.start[members] = np.cumsum([0, *lengths[:-1]])
        return store

    def remove(self) -> None:
        for part in np.unique(self.part):
            self.plan.shingle_path(int(part)).unlink(missing_ok=True)


@dataclass(frozen=True)
class _VerifyTask:
    """Similarities of some pairs. `spans` is int64 [pairs, 6]: part, start, length of either side."""

    plan: DedupPlan
    number: int
    spans: np.ndarray
    at_least: float

    def __call__(self) -> tuple[int, np.ndarray]:
        files: dict[int, np.ndarray] = {}
        result = np.empty(len(self.spans))
        left, left_place = np.empty(0, np.uint64), (-1, -1)
        for index, (part, start, length, *other) in enumerate(self.spans.tolist()):
            if (part, start) != left_place:
                left, left_place = self._set(files, part, start, length), (part, start)
            result[index] = jaccard(left, self._set(files, *other), self.at_least)
        return self.number, result

    def _set(self, files: dict[int, np.ndarray], part: int, start: int, length: int) -> np.ndarray:
        if part not in files:
            check_summed(self.plan.shingle_path(part))
            files[part] = np.memmap(self.plan.shingle_path(part), dtype=np.uint64, mode="r")
        return np.array(files[part][start:start + length])


def _verify(plan: DedupPlan, engine: Engine, shingles: _ShingleStore, pairs: np.ndarray, at_least: float) -> np.ndarray:
    """Real Jaccard similarity of every pair (0 for those whose sizes rule `at_least` out): float64 [pairs]."""
    left, right = pairs[:, 0], pairs[:, 1]
    spans = np.stack([shingles.part[left], shingles.start[left], shingles.length[left],
                       shingles.part[right], shingles.start[right], shingles.length[right]], axis=1)
    tasks = [_VerifyTask(plan.without_splits(), start, spans[start:start + _PAIRS_A_TASK], at_least)
             for start in range(0, len(pairs), _PAIRS_A_TASK)]
    similarity = np.empty(len(pairs))
    for start, part in engine.map(_call, tasks, "dedup: verify pairs"):
        similarity[start:start + len(part)] = part
    return similarity


def _call(task: Any) -> Any:
    return task()


def _representatives(documents: _Documents, nodes: _Nodes, labels: np.ndarray) -> np.ndarray:
    """For each node the node of its component that is kept."""
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(labels[order]) != 0]))
    ends = np.append(starts[1:], len(order))
    representative = np.arange(len(labels))
    for start, end in zip(starts[ends - starts > 1], ends[ends - starts > 1], strict=True):
        members = order[start:end]
        representative[members] = min(members, key=lambda node: documents.keep_order(nodes.best[node]))
    return representative


def _similarity_to_representative(plan: DedupPlan, engine: Engine, shingles: _ShingleStore,
                                  representative: np.ndarray) -> np.ndarray:
    """Real Jaccard similarity of each node to the one kept for it: float64 [nodes]; 1 for those kept."""
    similarity = np.ones(len(representative))
    removed = np.flatnonzero(representative != np.arange(len(representative)))
    pairs = np.stack([representative[removed], removed], axis=1)
    order = np.argsort(pairs[:, 0], kind="stable")
    similarity[removed[order]] = _verify(plan, engine, shingles, pairs[order], 0.0)
    return similarity


def _write_decisions(plan: DedupPlan, documents: _Documents, nodes: _Nodes, representative: np.ndarray,
                     to_representative: np.ndarray) -> None:
    part_starts = np.searchsorted(documents.part, [split.index for split in plan.splits])
    ends = np.append(part_starts[1:], len(documents.part))
    node = nodes.of_document
    kept_document = nodes.best[representative[node]]
    goes = kept_document != np.arange(len(node))
    for split, start, end in zip(plan.splits, part_starts, ends, strict=True):
        with atomic_write(plan.decision_path(split.index)) as file:
            for index in start + np.flatnonzero(goes[start:end]):
                same = representative[node[index]] == node[index]
                decision = {"row": int(documents.row[index]), "kept_id": documents.ids[kept_document[index]],
                            "similarity": float(to_representative[node[index]]), "rule": decision_rule(same)}
                file.write(dump_json(decision) + "\n")


def decision_rule(same_node: bool) -> str:
    """Name of the rule by which a document goes: of the same normal form as the one kept, or only like it."""
    return "exact_duplicate" if same_node else "near_duplicate"
