"""Processes that tokenize and write the shards of a packing: each owns some shards, none is shared."""

from __future__ import annotations

import multiprocessing
import os
import queue
import shutil
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pangu.data.flat import FlatWriter
from pangu.data.mind_records import COLUMN, HEADER_BYTES
from parallel.common.digests import file_crc32
from parallel.common.errors import UserError

_RECORDS_PER_WRITE = 256
_PAGE_BYTES = 4 << 20  # MindRecord's defaults, 16 and 32 MB, are far above a small corpus
_BLOCKS_WAITING = 4
_POLL_SECONDS = 0.2


class WriterPool:
    """Writer processes behind bounded queues; shard `n` belongs to process `n % workers`.

    Use as a context; leaving it early ends the processes. Processes are spawned, not forked, because MindSpore's
    threads do not survive a fork.

    Args:
        plans: arguments of every shard.
        workers: number of processes.
        tokenizer_factory: picklable; called once in each process.
    """

    def __init__(self, plans: list[dict], workers: int, tokenizer_factory: Callable[[], PackTokenizer]) -> None:
        context = multiprocessing.get_context("spawn")
        self._results = context.Queue()
        self._queues = [context.Queue(_BLOCKS_WAITING) for _ in range(workers)]
        self._count = len(plans)
        self._processes = []
        for number, inbox in enumerate(self._queues):
            own = {index: plan for index, plan in enumerate(plans) if index % workers == number}
            process = context.Process(target=_work, args=(own, tokenizer_factory, inbox, self._results), daemon=True)
            process.start()
            self._processes.append(process)

    def __enter__(self) -> WriterPool:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        for process in self._processes:
            process.join()
        for channel in [*self._queues, self._results]:
            channel.cancel_join_thread()
            channel.close()

    def send(self, shard: int, block: list[str]) -> None:
        """Hands a block of documents to the owner of `shard`; waits while its queue is full.

        Raises:
            UserError: a worker met one.
            RuntimeError: a worker failed or was killed.
        """
        inbox = self._queues[shard % len(self._queues)]
        while True:
            try:
                return inbox.put((shard, block), timeout=_POLL_SECONDS)
            except queue.Full:
                self._raise_failure()

    def finish(self) -> list[dict]:
        """Lets every worker close its files; the index entries in the order of the plans."""
        for number in range(len(self._queues)):
            self.send(number, [])
        entries: dict[int, dict] = {}
        while len(entries) < self._count:
            self._raise_failure(entries)
            time.sleep(0)
        return [entries[index] for index in range(self._count)]

    def _raise_failure(self, entries: dict[int, dict] | None = None) -> None:
        """Takes what workers reported: entries into `entries`, errors raised here."""
        try:
            kind, value = self._results.get(timeout=_POLL_SECONDS if entries is not None else 0.001)
        except queue.Empty:
            dead = [process.exitcode for process in self._processes if process.exitcode not in (None, 0)]
            if dead:
                raise RuntimeError(f"a packing process ended with exit code {dead[0]}") from None
            return
        if kind == "user_error":
            raise UserError(value)
        if kind == "error":
            raise RuntimeError(f"a packing process failed:\n{value}")
        if entries is not None:
            entries.update(value)


def _work(plans: dict[int, dict], tokenizer_factory: Callable[[], PackTokenizer], inbox: Any, results: Any) -> None:
    """Body of a writer process; an empty block is the end."""
    try:
        encode = tokenizer_factory().encode
        shards = {index: Shard(encode, **plan) for index, plan in plans.items()}
        while True:
            number, block = inbox.get()
            if not block:
                break
            shards[number].add(block)
        results.put(("entries", {index: shard.finish() for index, shard in shards.items()}))
    except UserError as error:
        results.put(("user_error", str(error)))
    except Exception:
        results.put(("error", traceback.format_exc()))


class PackTokenizer(Protocol):
    """What packing asks of a tokenizer."""

    eot_id: int
    pad_id: int
    vocabulary_size: int
    fingerprint: str
    """SHA-256 of the model file: what the ids depend on."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""


class Shard:
    """One MindRecord file: documents in, records out. Args as `_plan` gives them."""

    def __init__(self, encode: Callable[[str], list[int]], *, split: str, path: str, record_length: int, eot_id: int,
                 pad_id: int, pad: bool, vocabulary_size: int, flat: bool = True) -> None:
        self.encode, self.split, self.path, self.record_length = encode, split, path, record_length
        self.eot_id, self.pad_id, self.pad, self.vocabulary_size = eot_id, pad_id, pad, vocabulary_size
        self.documents = self.tokens = self.records = 0
        self._rest: list[int] = []
        self._writer: Any = None
        self._sums: list[int] = []
        self._flat = FlatWriter(path, record_length, vocabulary_size, eot_id) if flat else None

    def add(self, texts: list[str]) -> None:
        """Appends documents, each followed by the end-of-document id, and writes the records that they fill."""
        for text in texts:
            ids = self.encode(text)
            self._rest += ids
            self._rest.append(self.eot_id)
            self.documents += 1
            self.tokens += len(ids) + 1
            if len(self._rest) >= self.record_length * _RECORDS_PER_WRITE:
                self._write_full_records()
        self._write_full_records()

    def finish(self) -> dict:
        """Writes what is left, closes the file and returns its entry in the index."""
        if self._rest and self.pad:
            self._rest += [self.pad_id] * (self.record_length - len(self._rest))
            self._write_full_records()
        if self._writer is not None:
            self._call(self._writer.commit)
            for file in (self.path, self.path + ".db"):
                os.chmod(file, 0o644)  # MindRecord's own 0600 shuts out other users of a cluster
        size = os.path.getsize(self.path) if self.records else 0
        checks = self._checks() if self._writer is not None else None
        flat = self._flat.finish() if self._flat is not None and self.records else None
        return {"split": self.split, "file": os.path.basename(self.path), "documents": self.documents,
                "tokens": self.tokens, "records": self.records, "bytes": size, "flat": flat, "checks": checks}

    def _write_full_records(self) -> None:
        count = len(self._rest) // self.record_length
        if count == 0:
            return
        ids = np.asarray(self._rest[: count * self.record_length], np.int32).reshape(count, self.record_length)
        del self._rest[: count * self.record_length]
        if ids.min() < 0 or ids.max() >= self.vocabulary_size:
            raise UserError("the tokenizer gave an id outside its vocabulary", where="tokenizer", value=int(ids.max()),
                            hint=f"ids are below {self.vocabulary_size}")
        if self._writer is None:
            self._writer = self._open()
        for start in range(0, count, _RECORDS_PER_WRITE):
            batch = [{COLUMN: row} for row in ids[start : start + _RECORDS_PER_WRITE]]
            self._call(self._writer.write_raw_data, batch)
        if self._flat is not None:
            self._flat.add(ids)
        self._sums += [zlib.crc32(row) for row in ids.astype("<i4")]
        self.records += count

    def _checks(self) -> dict[str, Any]:
        """The entry `RecordChecks` of the file that has been closed."""
        path = Path(self.path).with_suffix(".crc32")
        data = np.array(self._sums, "<u4").tobytes()
        path.write_bytes(data)
        return {"records": path.name, "records_crc32": zlib.crc32(data), "db_crc32": file_crc32(f"{self.path}.db"),
                "header_crc32": file_crc32(self.path, HEADER_BYTES)}

    def _open(self) -> Any:
        from mindspore.mindrecord import FileWriter

        writer = FileWriter(self.path, shard_num=1)
        writer.set_header_size(HEADER_BYTES)
        # A page must hold at least one record.
        writer.set_page_size(max(_PAGE_BYTES, 1 << (8 * self.record_length).bit_length()))
        writer.add_schema({COLUMN: {"type": "int32", "shape": [-1]}}, "packed documents")
        return writer

    def _call(self, function: Callable, *arguments: Any) -> None:
        """Calls the MindRecord writer, whose errors are all RuntimeError, and separates a full disk from the rest."""
        try:
            function(*arguments)
        except RuntimeError as error:
            free = shutil.disk_usage(os.path.dirname(self.path)).free
            if "free disk" not in str(error) and free > _PAGE_BYTES:
                raise
            raise UserError("no space left on the disk; nothing was written", where=os.path.dirname(self.path),
                            value=f"{free} bytes free", hint="free some space") from None
