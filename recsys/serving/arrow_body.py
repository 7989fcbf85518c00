"""Requests and answers in Arrow's streaming format beside JSON: columns instead of objects.

    Content-Type: application/vnd.apache.arrow.stream

The body is two IPC streams one after the other: the user's features, one row, and the candidates' features, a row each;
`top_k` is in the metadata of the second schema. With `Accept: application/vnd.apache.arrow.stream` the answer is a
table `candidate, score, <label>...` with `version` in its schema's metadata. Needs no MindSpore.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pyarrow as pa

from parallel.common.errors import UserError
from recsys.saved_model import Trained
from recsys.serving.requests import Ask, encode_tables

MEDIA_TYPE = "application/vnd.apache.arrow.stream"


def read_tables(raw: bytes, most: int) -> tuple[pa.Table, pa.Table, int | None]:
    """(user, candidates, top_k) of a body.

    Raises:
        UserError: what is wrong with it, in one line.
    """
    source = pa.BufferReader(raw)
    try:
        user, candidates = _stream(source, 1, "user"), _stream(source, most, "candidates")
        rest = source.read(1)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, OSError, EOFError, ValueError) as error:
        lines = str(error).splitlines() or ["truncated"]
        raise UserError(f"the body is no pair of Arrow streams: {lines[0]}") from None
    if rest:
        raise UserError("something follows the second stream")
    if len(user) != 1:
        raise UserError("must have one row", where="user", value=len(user))
    if not 1 <= len(candidates) <= most:
        raise UserError(f"there must be 1 to {most}", where="candidates", value=len(candidates))
    return user, candidates, _top_k(candidates)


def _stream(source: pa.BufferReader, most: int, where: str) -> pa.Table:
    begin = source.tell()
    for message in pa.MessageReader.open_stream(source):
        if _compressed(message.metadata):
            raise UserError("compressed buffers are not read", where=where, hint="send it without compression")
    end = source.tell()
    source.seek(begin)
    with pa.ipc.open_stream(source) as reader:
        batches, rows = [], 0
        for batch in reader:
            batch.validate(full=True)
            rows += len(batch)
            if rows > most:
                raise UserError(f"has more than {most} rows", where=where)
            batches.append(batch)
        table = pa.Table.from_batches(batches, reader.schema)
    source.seek(end)
    return table.combine_chunks()


def _compressed(metadata: pa.Buffer) -> bool:
    """Whether a message's header is a record batch with compressed buffers: field 3 of the flatbuffer `RecordBatch`.

    A few bytes could mean gigabytes, and the reader gives no bound.
    """
    data = bytes(metadata)
    message = struct.unpack_from("<I", data, 0)[0]
    kind = _field(data, message, 1)
    header = _field(data, message, 2)
    if kind is None or header is None or data[kind] != 3:
        return False
    batch = header + struct.unpack_from("<I", data, header)[0]
    return _field(data, batch, 3) is not None


def _field(data: bytes, table: int, number: int) -> int | None:
    """Position of a field of a flatbuffer's table."""
    vtable = table - struct.unpack_from("<i", data, table)[0]
    if 4 + 2 * number >= struct.unpack_from("<H", data, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
    return table + offset if offset else None


def _top_k(candidates: pa.Table) -> int | None:
    given = (candidates.schema.metadata or {}).get(b"top_k")
    if given is None:
        return None
    if not given.isdigit() or len(given) > 9 or int(given) < 1:
        raise UserError("must be a whole number above 0", where="top_k", value=given.decode("utf-8", "replace"))
    return int(given)


def read_arrow(raw: bytes, trained: Trained, most: int) -> Ask:
    """Checks and encodes a request; see `recsys.serving.requests.read_request`.

    Raises:
        UserError: what is wrong with it, in one line.
    """
    user, candidates, top_k = read_tables(raw, most)
    ids, numbers = encode_tables(trained, user, candidates)
    count = len(candidates)
    return Ask(ids, numbers, min(top_k or count, count))


def body_of(raw: bytes, most: int) -> dict[str, Any]:
    """The request as the JSON body would be, for what fills it up.

    Raises:
        UserError: see `read_tables`.
    """
    user, candidates, top_k = read_tables(raw, most)
    return {"user": user.to_pylist()[0], "candidates": candidates.to_pylist(),
            **({"top_k": top_k} if top_k is not None else {})}


def write_answer(answer: dict) -> bytes:
    """The answer's ranking as a table."""
    ranking = answer["ranking"]
    labels = list(ranking[0]["scores"]) if ranking else []
    columns = {"candidate": pa.array([one["candidate"] for one in ranking], pa.int32()),
               "score": pa.array(np.array([one["score"] for one in ranking], np.float64))}
    columns |= {label: pa.array([one["scores"][label] for one in ranking], pa.float64()) for label in labels}
    table = pa.table(columns).replace_schema_metadata({"version": str(answer["version"])})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def write_request(user: dict, candidates: list[dict], top_k: int | None = None) -> bytes:
    """A body out of what the JSON body holds: for clients in Python, and tests."""
    sink = pa.BufferOutputStream()
    for rows, metadata in (([user], None), (candidates, {"top_k": str(top_k)} if top_k else None)):
        table = pa.Table.from_pylist(rows).replace_schema_metadata(metadata)
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return sink.getvalue().to_pybytes()
