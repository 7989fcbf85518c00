"""Deduplication as a step: signatures of all parts, duplicates among them, then each part without its duplicates."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.dedup.plan import DedupPlan, DedupSettings
from data_tools.dedup.sign_part import SignTask
from data_tools.documents import OutputFormat
from data_tools.engines.base import Engine
from data_tools.parts import Drop, OutputLayout, PartFigures, Step, digest_of, run_step, split_identity
from data_tools.records import Document, ReadSettings, Split
from parallel.common.digests import check_file, file_crc32
from parallel.common.errors import UserError
from parallel.common.files import read_json, write_json
from parallel.common.lines import json_lines
from parallel.common.progress import info


class RemoveDuplicates(Step):
    """Drops the rows that the decision file of a part names.

    Args:
        plan: says where the files are.
        sums: CRC-32 of each part's file.
    """

    name = "dedup"

    def __init__(self, plan: DedupPlan, sums: dict[int, int]) -> None:
        self.plan, self.sums = plan, sums
        self._decisions: dict[int, dict[str, Any]] = {}

    def digest_source(self, split: Split) -> Any:
        return self.sums[split.index]

    def begin_part(self, split: Split) -> None:
        check_file(self.plan.decision_path(split.index), self.sums[split.index])
        decisions = [decision for _, decision in json_lines(self.plan.decision_path(split.index))]
        self._decisions = {decision["row"]: decision for decision in decisions}

    def process(self, document: Document, row: int, figures: PartFigures) -> Iterator[Document]:
        decision = self._decisions.get(row)
        if decision is not None:
            evidence = f"Jaccard similarity {decision['similarity']:.4f} to {decision['kept_id']}"
            raise Drop(decision["rule"], evidence, kept_id=decision["kept_id"], similarity=decision["similarity"])
        yield document


def _find_duplicates(plan: DedupPlan, engine: Engine) -> dict[str, Any]:
    """Writes which rows of which parts are duplicates of what (`DedupPlan.decision_path`); returns its figures."""
    if engine.name == "spark":
        from data_tools.dedup import spark

        return spark.find_duplicates(plan, engine)
    from data_tools.dedup import local

    return local.find_duplicates(plan, engine)


def run_dedup(settings: DedupSettings, read: ReadSettings, splits: list[Split], layout: OutputLayout, work: str | Path,
              engine: Engine, format: OutputFormat) -> tuple[PartFigures, dict[str, Any]]:
    """Deduplicates all parts together; returns the figures of the step and of the clusters.

    Args:
        work: folder for the files in between; the decisions stay there, so that a rerun need not find them again.
    """
    if not splits:
        return PartFigures(), {"clusters": 0, "largest_cluster": 0, "cluster_sizes": {}, "candidate_pairs": 0,
                               "verified_pairs": 0, "split_buckets": 0}
    plan = DedupPlan(settings, read, tuple(splits), str(work))
    clusters, sums = decide(plan, engine)
    return run_step(RemoveDuplicates(plan, sums), splits, layout, engine, format, read), clusters


def decide(plan: DedupPlan, engine: Engine) -> tuple[dict[str, Any], dict[int, int]]:
    """Writes the decision files, unless they are there unchanged for the same input and settings already.

    Returns:
        (figures, CRC-32 of each part's file).
    """
    marker = Path(plan.work) / "decisions" / "done.json"
    digest = digest_of([plan.settings.model_dump(mode="json"), plan.read.model_dump(mode="json"),
                        [split_identity(split) for split in plan.splits]])
    done = _read_marker(marker)
    if done.get("digest") == digest and done["sums"] == _sums(plan):
        info("dedup: the duplicates were found already")
        return done["figures"], dict(done["sums"])
    _sign(plan, engine)
    figures = _find_duplicates(plan, engine)
    sums = _sums(plan)
    write_json(marker, {"digest": digest, "figures": figures, "sums": sums})
    shutil.rmtree(plan.signature_path(0).parent, ignore_errors=True)
    return figures, dict(sums)


def _read_marker(path: Path) -> dict[str, Any]:
    """What stands there; {} where nothing does or it is damaged: what it marks is made anew."""
    try:
        return read_json(path, dict, sealed=True) if path.is_file() else {}
    except UserError:
        return {}


def _sums(plan: DedupPlan) -> list[list[int]]:
    """[part, CRC-32 of its decision file] of the files that are there."""
    return [[split.index, file_crc32(path)] for split in plan.splits
            if (path := plan.decision_path(split.index)).is_file()]


def _sign(plan: DedupPlan, engine: Engine) -> None:
    """Signature files of all parts; a part that has one for the same input and settings is not read again."""
    tasks = []
    for split in plan.splits:
        path, marker = plan.signature_path(split.index), _sign_marker(plan, split)
        done = _read_marker(marker)
        if not (path.is_file() and done.get("digest") == _sign_digest(plan, split)
                and done.get("crc32") == file_crc32(path)):
            tasks.append(SignTask(plan.without_splits(), split))
    for index, crc32 in engine.map(_run_sign, tasks, "dedup: signatures"):
        split = plan.splits[index]
        write_json(_sign_marker(plan, split), {"digest": _sign_digest(plan, split), "crc32": crc32})


def _run_sign(task: SignTask) -> tuple[int, int]:
    task()
    return task.split.index, file_crc32(task.plan.signature_path(task.split.index))


def _sign_marker(plan: DedupPlan, split: Split) -> Path:
    return plan.signature_path(split.index).with_suffix(".json")


def _sign_digest(plan: DedupPlan, split: Split) -> str:
    return digest_of([plan.settings.model_dump(mode="json"), plan.read.model_dump(mode="json"), split_identity(split)])
