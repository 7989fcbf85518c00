"""Redis streams: `XADD events * event '{"user_id": 7, "item_id": 11, "click": 1, "time": 1700000000}'`.

Entries are read with XREAD from the id that the checkpoint holds; no consumer group is needed. A stream that was
trimmed beyond what was read is noticed by its first entry and, from Redis 7 on, by its count of added entries.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.common.errors import UserError
from parallel.common.progress import info
from recsys.data.readers import Reader
from recsys.data.readers._files import no_default_features
from recsys.data.streams.events import Event, Positions, TimeOf, read_object
from recsys.data.streams.no_log import refuse

if TYPE_CHECKING:
    from recsys.settings import DataSettings

_RETRY_SECONDS = 0.1
_EMPTY = "0-0"


class RedisStreams:
    """A `Transport`. A position is [id, inclusive, added]: the last id read (or, inclusive, the first to read), and how
    many entries had been added up to it where the server counts them.

    Args:
        data: `DataSettings`.
    """

    shared = False

    def __init__(self, data: DataSettings) -> None:
        try:
            import redis
        except ImportError:
            raise UserError("the package redis is not installed", where="data.reader: redis_stream",
                            hint='pip install -e ".[stream]"') from None
        self.redis, self.settings, self.time = redis, data.stream, TimeOf(data.time, data.stream.time_unit)
        self.keys, self.field = self.settings.redis.keys, self.settings.redis.field.encode()
        try:
            self.client = redis.Redis.from_url(self.settings.redis.url, socket_timeout=10.0)
        except ValueError as error:
            raise UserError(str(error), where="data.stream.redis.url", value=self.settings.redis.url) from None
        self.at: Positions = {}

    def begin(self) -> Positions:
        """In front of each stream's oldest entry."""
        found = self._patiently(lambda: [self._info(self.client, key) for key in self.keys])
        return {key: [status["first"], True, None if status["added"] is None else status["added"] - status["length"]]
                if status["first"] else [status["last"], False, status["added"]]
                for key, status in zip(self.keys, found, strict=True)}

    def open(self, positions: Positions) -> None:
        """Goes to these positions."""
        if set(positions) != set(self.keys):
            raise UserError("the run reads other streams", where="data.stream.redis.keys", value=self.keys,
                            hint=f"it was begun with {sorted(positions)}")
        self.at = {key: list(position) for key, position in positions.items()}

    def poll(self, wanted: set[str], most: int, seconds: float) -> list[Event]:
        """See `Transport`."""
        keys = sorted(wanted)
        if not keys:
            return []

        def read() -> list:
            found = self._read(keys, most)
            if not any(entries for entries, _ in found):
                self._wait(keys, seconds)
                found = self._read(keys, most)
            return found

        events = []
        for key, (entries, status) in zip(keys, self._patiently(read), strict=True):
            self._check(key, status, entries)
            events += [self._event(key, *entry) for entry in entries]
        return events

    def commit(self, positions: Positions) -> bool:
        """Nothing to commit: the server keeps no position."""
        return True

    def close(self) -> None:
        """Closes the connections."""
        self.client.close()

    # -- the server ---------------------------------------------------------------------------------------------------

    def _read(self, keys: list[str], most: int) -> list[tuple[list, dict]]:
        """Entries and state of every stream, at one moment."""
        with self.client.pipeline(transaction=True) as pipe:
            for key in keys:
                identity, inclusive, _ = self.at[key]
                pipe.xrange(key, identity if inclusive else f"({identity}", "+", count=most)
                self._ask(pipe, key)
            answers = pipe.execute(raise_on_error=False)
        found = []
        for entries, status in zip(answers[::2], answers[1::2], strict=True):
            if isinstance(entries, Exception):
                raise entries
            found.append((entries, self._told(status)))
        return found

    def _wait(self, keys: list[str], seconds: float) -> None:
        """Until one of the streams has something, or the time is over."""
        after = {key: _EMPTY if self.at[key][1] else self.at[key][0] for key in keys}
        self.client.xread(after, count=1, block=max(1, int(seconds * 1000)))

    @staticmethod
    def _ask(client: Any, key: str) -> Any:
        return client.xinfo_stream(key)

    def _info(self, client: Any, key: str) -> dict:
        try:
            return self._told(client.xinfo_stream(key))
        except self.redis.exceptions.ResponseError as error:
            return self._told(error)

    def _told(self, status: Any) -> dict:
        """length, first and last id, entries added (None before Redis 7); a stream that is not there is empty."""
        if isinstance(status, self.redis.exceptions.ResponseError) and "no such key" in str(status):
            return {"length": 0, "first": None, "last": _EMPTY, "added": 0}
        if isinstance(status, Exception):
            raise status
        first = status.get("first-entry")
        return {"length": status["length"], "first": first[0].decode() if first else None,
                "last": _text(status["last-generated-id"]), "added": status.get("entries-added")}

    def _patiently(self, call: Any) -> Any:
        """`call()`, again and again while the server is away."""
        away = self.redis.exceptions.ConnectionError, self.redis.exceptions.TimeoutError
        begun, reported = time.monotonic(), False
        while True:
            try:
                return call()
            except self.redis.exceptions.AuthenticationError as error:
                raise UserError(f"Redis refuses: {error}", where="data.stream.redis.url") from None
            except away as error:
                if time.monotonic() - begun > self.settings.patience_seconds:
                    raise UserError(f"Redis is away: {error}", where="data.stream.redis.url",
                                    hint="start it, or raise data.stream.patience_seconds") from None
                if not reported:
                    info(f"Redis is away ({error}); waiting")
                    reported = True
                time.sleep(_RETRY_SECONDS)
            except self.redis.exceptions.ResponseError as error:
                raise UserError(f"Redis refuses: {error}", where="data.stream.redis") from None

    # -- what was lost ------------------------------------------------------------------------------------------------

    def _check(self, key: str, status: dict, entries: list) -> None:
        """Notices entries that went before they were read."""
        identity, inclusive, added = self.at[key]
        if _order(status["last"]) < _order(identity):
            raise UserError(f"stream '{key}' ends at {status['last']}, before what was read", where=identity,
                            hint="the server lost entries; is its append-only file on, with appendfsync always?")
        lost = self._lost(status, identity, inclusive, added, entries)
        if not lost:
            return
        what = (f"stream '{key}' was trimmed: entries {'from' if inclusive else 'after'} {identity} are gone and were "
                f"never read")
        if self.settings.gap == "error":
            raise UserError(what, where="data.stream.redis", hint="keep more of it (XADD MAXLEN), or accept the gap "
                            "with data.stream.gap=skip")
        info(f"{what}; going on after the gap")
        counted = None if status["added"] is None else status["added"] - status["length"]
        self.at[key] = [identity, inclusive, counted] if entries else [status["last"], False, status["added"]]

    @staticmethod
    def _lost(status: dict, identity: str, inclusive: bool, added: int | None, entries: list) -> bool:
        first = status["first"]
        if first is not None and _order(first) <= _order(identity):
            return False  # nothing after it can have been trimmed
        if _order(status["last"]) == _order(identity):
            return inclusive
        if added is not None and status["added"] is not None:
            return status["added"] - added > status["length"]
        return identity != _EMPTY

    def _event(self, key: str, identity: bytes, fields: dict[bytes, bytes] | None) -> Event:
        name, added = identity.decode(), self.at[key][2]
        self.at[key] = [name, False, None if added is None else added + 1]
        fields = fields or {}
        row = (read_object(fields[self.field], key) if self.field in fields else
               {_text(column): _text(value) for column, value in fields.items()})
        stamped = int(name.partition("-")[0]) / 1000.0
        row = {} if row is None else row
        return self.time.event(key, list(self.at[key]), row, stamped)


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _order(identity: str) -> tuple[int, int]:
    milliseconds, _, number = identity.partition("-")
    return int(milliseconds), int(number or 0)


def read(data: DataSettings, path: Path | None) -> Iterator[tuple[Any, str]]:
    """A stream is no log."""
    refuse(data)


READER = Reader(read, no_default_features, needs_path=False, stream=RedisStreams)
