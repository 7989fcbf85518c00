"""Features of users and items from Redis, so that a request names ids only. Needs no MindSpore.

A feature that the request gives is taken from the request. Of the others the user's record gives those whose side is
user or cross (a history), the item's record those of the item; a record that lacks one leaves it missing. What
belongs to the moment (side context) is in the request, unless the user's record has it.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from typing import Any

from parallel.common.errors import UserError
from parallel.common.structured import BadText, parse_json
from recsys.data.features import Feature
from recsys.saved_model import Trained
from recsys.serving.settings import RedisFeatures

_LONGEST_ID = 512


class StoreAway(Exception):
    """The features did not come in time; the client may try again."""


class FeatureStore:
    """Fills requests; for one event loop.

    Args:
        settings: `features.redis`.
        trained: whose features are asked for.

    Raises:
        UserError: the package redis is missing, or no feature holds an id.
    """

    def __init__(self, settings: RedisFeatures, trained: Trained) -> None:
        try:
            import redis.asyncio as client
            from redis import exceptions
        except ImportError:
            raise UserError("the package redis is not installed", where="features.redis",
                            hint='pip install -e ".[stream]"') from None
        self.settings, self.errors = settings, exceptions.RedisError
        try:
            self.client = client.Redis.from_url(settings.url, socket_timeout=settings.timeout_seconds)
        except ValueError as error:
            raise UserError(str(error), where="features.redis.url", value=settings.url) from None
        self.user_id = settings.user_id or trained.columns.user
        self.item_id = settings.item_id or next((feature.source for feature in trained.features
                                                 if feature.side == "item" and feature.type == "id"), None)
        for what, name in (("user_id", self.user_id), ("item_id", self.item_id)):
            if name is None:
                raise UserError("no feature holds the id", where=f"features.redis.{what}", hint="name it")
        self.kept: OrderedDict[str, tuple[dict | None, float]] = OrderedDict()
        self.unknown = self.asked = 0

    async def fill(self, body: Any, trained: Trained) -> Any:
        """The body with the features that it lacks; one that is no request is left for `read_request` to refuse.

        Raises:
            UserError: an id is no id, or unknown where the settings refuse that; a record is damaged.
            StoreAway: Redis is away or too slow.
        """
        if not isinstance(body, dict) or not isinstance(user := body.get("user"), dict):
            return body
        candidates = body.get("candidates")
        if not isinstance(candidates, list) or not all(isinstance(item, dict) for item in candidates):
            return body
        mine = [f for f in trained.features if f.side in ("user", "cross") and f.source not in user]
        theirs = [f for f in trained.features if f.side == "item" and f.source not in user]
        users = [_key(self.settings.user, user.get(self.user_id), "user")] if mine else []
        items = [_key(self.settings.item, item.get(self.item_id), f"candidates[{index}]")
                 if any(f.source not in item for f in theirs) else None for index, item in enumerate(candidates)]
        found = await self._records(users, {key for key in items if key is not None})
        if users:
            user = _filled(user, found[users[0]], mine, [f for f in trained.features if f.side == "context"])
        candidates = [item if key is None else _filled(item, found[key], theirs, [])
                      for item, key in zip(candidates, items, strict=True)]
        return {**body, "user": user, "candidates": candidates}

    async def _records(self, users: list[str], items: set[str]) -> dict[str, dict | None]:
        now, found = time.monotonic(), {}
        for key in items:
            record, made = self.kept.get(key, (None, -1e9))
            if now - made < self.settings.item_seconds:
                found[key] = record
        missing = [*users, *(key for key in items if key not in found)]
        if missing:
            try:
                values = await asyncio.wait_for(self._ask(missing), self.settings.timeout_seconds)
            except (self.errors, OSError, asyncio.TimeoutError) as error:
                raise StoreAway(f"the features did not come: {error or 'too slow'}") from None
            self.asked += len(missing)
            found.update({key: self._record(key, value) for key, value in zip(missing, values, strict=True)})
            self._keep({key: found[key] for key in missing[len(users):]}, now)
        unknown = [key for key in missing if found[key] is None]
        self.unknown += len(unknown)
        if unknown and self.settings.unknown == "refuse":
            raise UserError("has no features in the store", where=unknown[0])
        return found

    async def _ask(self, keys: list[str]) -> list:
        if self.settings.form == "json":
            return await self.client.mget(keys)
        async with self.client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hgetall(key)
            return await pipe.execute()

    def _record(self, key: str, value: Any) -> dict | None:
        if not value:
            return None
        if self.settings.form == "hash":
            return {name.decode("utf-8", "replace"): _cell(cell) for name, cell in value.items()}
        try:
            record = parse_json(value)
        except BadText:
            record = None
        if not isinstance(record, dict):
            raise UserError("the record in the store is no JSON object", where=key)
        return record

    def _keep(self, records: dict[str, dict | None], now: float) -> None:
        if self.settings.item_seconds == 0:
            return
        for key, record in records.items():
            self.kept[key] = record, now
            self.kept.move_to_end(key)
        while len(self.kept) > self.settings.items:
            self.kept.popitem(last=False)

    async def close(self) -> None:
        """Closes the connections."""
        await self.client.aclose()


def _key(pattern: str, identity: Any, where: str) -> str:
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or len(str(identity)[:1000]) > _LONGEST_ID:
        raise UserError("needs an id (text or a whole number) to look its features up", where=where, value=identity)
    return pattern.replace("{}", str(identity).encode("utf-8", "replace").decode())


def _cell(value: bytes) -> Any:
    text = value.decode("utf-8", "replace")
    if text.startswith("["):
        try:
            return parse_json(text)
        except BadText:
            return text
    return text


def _filled(given: dict, record: dict | None, features: list[Feature], also: list[Feature]) -> dict:
    """`given` with the record's features; of those in `also` only the ones that the record has."""
    record = record or {}
    more = {f.source: record.get(f.source) for f in features if f.source not in given}
    more.update({f.source: record[f.source] for f in also if f.source not in given and f.source in record})
    return {**more, **given}
