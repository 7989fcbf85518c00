"""First pass: every part read once; id, digest, band keys and signature of each document written to a Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_tools.dedup.normalise import normalise
from data_tools.dedup.plan import DedupPlan
from data_tools.dedup.signature import band_keys, shingle_set, text_digest
from data_tools.documents import read_split
from data_tools.records import Document, ReadLog, Split
from parallel.common.files import atomic_write

_BATCH_CHARACTERS = 1 << 20
_BATCH_DOCUMENTS = 1000


@dataclass(frozen=True)
class SignTask:
    """Writes the signature file of one part; callable, so that an engine can send it to a worker."""

    plan: DedupPlan
    split: Split

    def __call__(self) -> None:
        from pyarrow import parquet

        path = self.plan.signature_path(self.split.index)
        with atomic_write(path, "wb") as file, parquet.ParquetWriter(file, _schema(), compression="lz4") as writer:
            for batch in self._batches():
                writer.write_table(self._signed(batch))

    def _batches(self) -> Iterator[list[tuple[int, Document, np.ndarray]]]:
        """Lists of (row, document, normalised text)."""
        batch, characters = [], 0
        for row, document in enumerate(read_split(self.split, self.plan.read, ReadLog())):
            codes = normalise(document.text)
            batch.append((row, document, codes))
            characters += len(codes)
            if characters >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
                yield batch
                batch, characters = [], 0
        if batch:
            yield batch

    def _signed(self, batch: list[tuple[int, Document, np.ndarray]]) -> Any:
        import pyarrow

        plan = self.plan
        texts = [codes for _, _, codes in batch]
        signatures = plan.signer().sign(texts)
        keys = band_keys(signatures, plan.bands).view(np.int64)
        columns = {
            "part": [self.split.index] * len(batch),
            "row": [row for row, _, _ in batch],
            "id": [document.id for _, document, _ in batch],
            "source_rank": [plan.source_rank(document.source) for _, document, _ in batch],
            "size": [len(codes) for codes in texts],
            "record": [record_digest(document) for _, document, _ in batch],
            "node": [node_digest(document.text, codes, plan.settings.ngram) for _, document, codes in batch],
            "bands": list(keys),
            "signature": [signature.tobytes() for signature in signatures],
        }
        return pyarrow.table(columns, schema=_schema())


def _schema() -> Any:
    import pyarrow

    return pyarrow.schema([
        ("part", pyarrow.int32()), ("row", pyarrow.int64()), ("id", pyarrow.string()),
        ("source_rank", pyarrow.int32()), ("size", pyarrow.int64()), ("record", pyarrow.binary()),
        ("node", pyarrow.binary()), ("bands", pyarrow.list_(pyarrow.int64())),
        ("signature", pyarrow.binary()),
    ])


def node_digest(text: str, codes: np.ndarray, ngram: int) -> bytes:
    """16 bytes: equal for texts of one normal form; for texts shorter than the n-gram, for equal texts only."""
    if len(codes) < ngram:
        return text_digest(text.encode(), b"short")
    return text_digest(codes.tobytes(), b"normal")


def record_digest(document: Document) -> bytes:
    """16 bytes for the whole record: distinguishes documents of one id."""
    import json

    text = json.dumps(document.record(), sort_keys=True, ensure_ascii=False)
    return text_digest(text.encode("utf-8", "surrogatepass"), b"record")


def read_shingles(plan: DedupPlan, split: Split, rows: set[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(row, sorted distinct n-gram hashes) of the wanted rows of a part, which is read a second time for it."""
    last = max(rows)
    for row, document in enumerate(read_split(split, plan.read, ReadLog())):
        if row in rows:
            yield row, shingle_set(normalise(document.text), plan.settings.ngram)
        if row >= last:
            return
