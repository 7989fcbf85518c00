"""Scoring of ranking requests: a request is one user and its candidates; several requests share a batch.

Separated models (UG-Sep) compute a request's user once, or find it in the cache, and then only the candidates' side;
unseparated ones compute a full row for every candidate. Graphs have fixed shapes, compiled when the engine starts, and
one thread runs them all. What a request gets does not depend on what was in its batch.

Shapes: R requests, C candidates of one, N candidates of a batch, M, m id columns (all, of one side), K tasks, S state.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mindspore import Tensor

from parallel.checkpoint.full import Checkpoint
from parallel.common.errors import UserError
from parallel.layers.int8 import Int8Product, products
from parallel.layers.int8_numbers import dequantize, panels
from parallel.serving.queue import Waiting, WorkQueue, answer
from recsys.saved_model import Trained, describe
from recsys.serving.settings import EngineSettings
from recsys.serving.state_cache import StateCache, user_key
from recsys.tables.names import is_sparse
from recsys.ug_sep.ranker import CandidatePass, RequestPass, SeparatedRanker, UserPass

FEW = 256
"""Rows of a batch up to which a user that is not cached is computed in the graph of its candidates; beyond, what a
second graph costs is little beside the candidates' own time."""


class Rows(NamedTuple):
    """A request in numbers: ids_CM, numbers_CN."""

    ids: np.ndarray
    numbers: np.ndarray


class Scorer:
    """Probabilities of batches in fixed shapes; for one thread.

    Args:
        model: a ranker in inference mode, its int8 products prepared.
        settings: the shapes.
        cache: of user states.
        tables: `recsys.tables.host.HostTables`, where the model's are on the host.
    """

    joins = True
    """Whether one graph can compute a request's user and its candidates (`score_request`)."""

    def __init__(self, model: Any, settings: EngineSettings, cache: StateCache, tables: Any = None) -> None:
        self.model, self.settings, self.cache, self.version = model, settings, cache, 1
        self.spec, self.sides = model.spec, model.sides if isinstance(model, SeparatedRanker) else None
        self.separated = isinstance(model, SeparatedRanker) and model.ug_sep.separated
        self.full_pass = model
        if self.separated:
            self.user_pass, self.candidate_pass = UserPass(model), CandidatePass(model)
            self.request_pass = RequestPass(model)
        if tables is not None:
            self._read_from(tables)
        model.set_train(False)

    def _read_from(self, tables: Any) -> None:
        """Lets every pass read its rows from tables on the host."""
        from recsys.tables.step import Hosted

        self.full_pass = Hosted(self.model, self.model, tables)
        if self.separated:
            sides = self.model.sides
            self.user_pass = Hosted(self.user_pass, self.model, tables, np.array(sides.user.ids, np.int64))
            self.candidate_pass = Hosted(self.candidate_pass, self.model, tables,
                                         np.array(sides.candidate.ids, np.int64), argument=2)
            self.request_pass = Hosted(self.request_pass, self.model, tables)

    def warm(self, on_graph: Callable[[str], None] = lambda _: None) -> None:
        """Compiles and runs every graph once."""
        spec, users, cache = self.spec, sorted({1, self.settings.requests}), self.cache
        for requests in users if self.separated else [1]:
            for size in self.settings.candidates:
                count = max(size, requests)
                ids = np.zeros((count, spec.id_columns), np.int32)
                rows = np.array_split(np.arange(count), requests)
                batch = [(ids[part], np.full((len(part), spec.numeric_columns), number, np.float32))
                         for number, part in enumerate(rows)]
                self.cache = StateCache(requests)
                self.score(batch)
                if self.separated:  # once more, all users cached
                    self.score(batch)
                on_graph(f"{requests} x {size}")
        if self.separated and users[-1] > 1:  # among several requests one user may be missing
            self.cache = StateCache(0)
            self._states({b"": self.sides.user.take(*(array[:1] for array in batch[0]))}, {b"": None})
        self.cache = cache

    def score(self, batch: list[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
        """probabilities_CK of each (ids_CM, numbers_CN); the user columns of a request's first row hold for all."""
        sizes = [len(ids) for ids, _ in batch]
        found = self._separated(batch) if self.separated else self._chunks(
            self.score_rows, np.concatenate([ids for ids, _ in batch]),
            np.concatenate([numbers for _, numbers in batch]))
        return np.split(self.predictions(found), np.cumsum(sizes)[:-1])

    # -- the passes ---------------------------------------------------------------------------------------------------

    def score_rows(self, ids_NM: np.ndarray, numbers_NN: np.ndarray) -> np.ndarray:
        """The full forward pass."""
        return self.full_pass(Tensor(ids_NM), Tensor(numbers_NN)).asnumpy()

    def user_states(self, ids_Rm: np.ndarray, numbers_Rn: np.ndarray) -> np.ndarray:
        """states_RS of one user, or of as many as requests are scored together."""
        return self.user_pass(Tensor(ids_Rm), Tensor(numbers_Rn)).asnumpy()

    def score_candidates(self, states: Any, index_N: np.ndarray, ids_Nm: np.ndarray,
                         numbers_Nn: np.ndarray) -> np.ndarray:
        """The candidates' pass; `states` is what `on_device` made."""
        return self.candidate_pass(states, Tensor(index_N), Tensor(ids_Nm), Tensor(numbers_Nn)).asnumpy()

    def score_request(self, ids_NM: np.ndarray, numbers_NN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(state_1S, what `score_candidates` gives) of one user's candidates, from whole rows."""
        state_1S, found_NK = self.request_pass(Tensor(ids_NM), Tensor(numbers_NN))
        return state_1S.asnumpy(), found_NK.asnumpy()

    def on_device(self, states_RS: np.ndarray) -> Any:
        """The states as the candidates' pass takes them, for all batches of candidates."""
        return Tensor(states_RS)

    def predictions(self, found_NK: np.ndarray) -> np.ndarray:
        """Probabilities, float64, of what the passes give."""
        return self.model.plan.predictions(found_NK)

    # -- batches ------------------------------------------------------------------------------------------------------

    def _separated(self, batch: list) -> np.ndarray:
        sides, most = self.sides, self.settings.requests
        if len(batch) > most:
            raise ValueError(f"{len(batch)} requests where {most} are one batch")
        users = [sides.user.take(ids[:1], numbers[:1]) for ids, numbers in batch]
        keys = [user_key(self.version, *user) for user in users]
        found = {key: self.cache.get(key) for key in dict.fromkeys(keys)}
        if self.joins and len(batch) == 1 and found[keys[0]] is None and (size := self.joined_size(len(batch[0][0]))):
            return self._joined(keys[0], size, *batch[0])
        found = self._states(dict(zip(keys, users, strict=True)), found)
        states_RS = np.stack([found[key] for key in keys])
        rows = [sides.candidate.take(ids, numbers) for ids, numbers in batch]
        if len(batch) > 1:
            states_RS = np.concatenate([states_RS, np.repeat(states_RS[-1:], most - len(batch), 0)])
        index_N = np.repeat(np.arange(len(batch), dtype=np.int32), [len(ids) for ids, _ in rows])
        states = self.on_device(states_RS)
        return self._chunks(lambda *arrays: self.score_candidates(states, *arrays), index_N,
                            np.concatenate([ids for ids, _ in rows]), np.concatenate([numbers for _, numbers in rows]))

    def joined_size(self, candidates: int) -> int | None:
        """The fixed size of a batch that holds so many, if a new user is computed in the graph of these."""
        return next((size for size in self.settings.candidates if candidates <= size <= FEW), None)

    def _joined(self, key: bytes, size: int, ids_CM: np.ndarray, numbers_CN: np.ndarray) -> np.ndarray:
        """Both passes of one request in one graph; the user's state is kept."""
        states_1S, found_NK = self.score_request(_filled(ids_CM, size), _filled(numbers_CN, size))
        self.cache.put(key, states_1S[0].copy())
        return found_NK[:len(ids_CM)]

    def _states(self, users: dict[bytes, tuple], found: dict[bytes, np.ndarray | None]) -> dict[bytes, np.ndarray]:
        """`found`, states in the cache, with the missing ones computed, each user once."""
        missing = {key: user for key, user in users.items() if found[key] is None}
        if missing:
            ids = np.concatenate([ids for ids, _ in missing.values()])
            numbers = np.concatenate([numbers for _, numbers in missing.values()])
            count = 1 if len(missing) == 1 else self.settings.requests
            states = self.user_states(_filled(ids, count), _filled(numbers, count))
            for key, state in zip(missing, states, strict=False):
                found[key] = state.copy()
                self.cache.put(key, found[key])
        return found

    def _chunks(self, run: Callable, *arrays: np.ndarray) -> np.ndarray:
        """`run` on batches of the fixed sizes, the last one filled up; its results for the real rows."""
        results, begin, total = [], 0, len(arrays[0])
        while begin < total:
            size = next((size for size in self.settings.candidates if size >= total - begin),
                        self.settings.candidates[-1])
            part = [array[begin:begin + size] for array in arrays]
            results.append(run(*(_filled(array, size) for array in part))[:len(part[0])])
            begin += size
        return np.concatenate(results)


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    """`rows` rows: the last one repeated."""
    if len(array) == rows:
        return np.ascontiguousarray(array)
    return np.concatenate([array, np.repeat(array[-1:], rows - len(array), 0)])


class Engine:
    """A queue of requests, the thread that scores them, and reloads between two batches.

    Args:
        trained: the model.
        settings: shapes and bounds.
        observe: called as observe(name, value) with what happens: batch_requests, batch_candidates, batch_seconds.
    """

    def __init__(self, trained: Trained, settings: EngineSettings,
                 observe: Callable[[str, float], None] = lambda name, value: None) -> None:
        self.trained, self.settings, self.observe = trained, settings, observe
        self.encoding_version = 1  # rises with every reload after which requests read as other numbers
        self.cache = StateCache(settings.cache_users, settings.cache_mb << 20, settings.cache_seconds)
        self.scorer = self.make_scorer()
        self.pinned: str | None = None  # name of the checkpoint that no reload replaces
        self._queue: WorkQueue[Rows] = WorkQueue(settings.queue, settings.timeout_seconds)
        self._thread = threading.Thread(target=self._work, name="scoring", daemon=True)
        self._reloading = threading.Lock()
        # Kept, since the folder of a version that a run published goes when newer ones come.
        self._quantization = Checkpoint(trained.path).state.get("quantization")

    def make_scorer(self) -> Scorer:
        """What scores the batches."""
        return Scorer(self.trained.model, self.settings, self.cache, self.trained.tables)

    @property
    def version(self) -> int:
        """Rises with every reload, from 1."""
        return self.scorer.version

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._queue)

    def start(self, on_graph: Callable[[str], None] = lambda _: None) -> None:
        """Compiles everything and begins to score."""
        ready = self._queue.change(lambda: self.scorer.warm(on_graph), always=True)
        self._queue.open()
        self._thread.start()
        ready.result()

    def stop(self) -> None:
        """Scores what waits and ends."""
        self._queue.close()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, ids_CM: np.ndarray, numbers_CN: np.ndarray) -> Future:
        """Future of (probabilities_CK, the model's version); it may hold `Busy` when its time ran out.

        Raises:
            Busy: the queue is full, or the engine ends.
        """
        return self._queue.put(Rows(ids_CM, numbers_CN))

    def score(self, ids_CM: np.ndarray, numbers_CN: np.ndarray) -> np.ndarray:
        """probabilities_CK: `submit` and wait."""
        return self.submit(ids_CM, numbers_CN).result()[0]

    def reload(self, checkpoint: str | Path, pin: bool = False) -> dict[str, Any]:
        """Takes the values of another checkpoint of the same model: read beside the scoring, put in place between two
        batches. Requests are scored by the one or the other, none is lost.

        Args:
            checkpoint: or a folder whose newest is meant.
            pin: keep it until `pinned` is None again; other reloads are refused.

        Raises:
            UserError: it is not of the same model, features and quantization, or another is pinned; the old one goes
                on.
        """
        with self._reloading:
            if self.pinned is not None and not pin:
                raise UserError("the server is pinned to a version", where="version", value=self.pinned,
                                hint="unpin it first")
            prepared = self.prepare(checkpoint)
            self.change(lambda: self.put(*prepared))
            if pin:
                self.pinned = Path(self.trained.path).name
            return {"version": self.version, "checkpoint": str(self.trained.path)}

    def change(self, change: Callable[[], Any]) -> Any:
        """`change()`, called by the scoring thread between two batches."""
        return self._queue.change(change).result()

    def take_version(self, version: int, cleared: bool = True) -> None:
        """Names the version from now on (within `change`); user states of the one before are forgotten."""
        self.scorer.version = version
        if cleared:
            self.cache.clear()

    # -- the scoring thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (batch := self._queue.take(self._fits)) is not None:
            if batch:
                self._score(batch)

    def _fits(self, batch: list[Waiting[Rows]], ask: Rows) -> bool:
        candidates = sum(len(one.item.ids) for one in batch) + len(ask.ids)
        return len(batch) < self.settings.requests and candidates <= self.settings.candidates[-1]

    def _score(self, batch: list[Waiting[Rows]]) -> None:
        begun = time.perf_counter()
        try:
            results = self.scorer.score([one.item for one in batch])
        except Exception as error:  # a defect of ours must not end the thread: those who wait are told
            for one in batch:
                answer(one, error=error)
            return
        for one, scores in zip(batch, results, strict=True):
            answer(one, (scores, self.version))
        self.observe("batch_requests", len(batch))
        self.observe("batch_candidates", sum(len(one.item.ids) for one in batch))
        self.observe("batch_seconds", time.perf_counter() - begun)

    # -- reloading ----------------------------------------------------------------------------------------------------

    def prepare(self, checkpoint: str | Path) -> tuple[Trained, dict[str, Tensor], int]:
        """The other checkpoint's description, its values by parameter name in the order of this device, and whether
        `encoding_version` rises: what `put` takes.

        Raises:
            UserError: it is not of the same model, features and quantization.
        """
        trained, file = self.described(checkpoint)
        model = self.trained.model
        stored = {product.name: product for product in products(model)}
        values = {}
        if self.trained.tables is not None:
            trained.tables = self.trained.tables.reread(trained.path)
        for parameter in self._lasting(model):
            name = parameter.name
            if name not in file.layout:
                raise UserError(f"lacks parameter {name}", where=trained.path)
            value = _in_order(file, stored[name]) if name in stored else file.read(name)
            if value.shape != tuple(parameter.shape):
                raise UserError(f"'{name}' has another shape", where=trained.path)
            values[name] = Tensor(value, parameter.dtype)
        return trained, values, int(not trained.encodes_as(self.trained))

    def described(self, checkpoint: str | Path) -> tuple[Trained, Checkpoint]:
        """A checkpoint of the same model, features and quantization.

        Raises:
            UserError: it is of another.
        """
        trained = describe(checkpoint)
        if (trained.settings.model, trained.spec) != (self.trained.settings.model, self.trained.spec):
            raise UserError("is of another model or other features", where=trained.path,
                            hint="start another server for it")
        file = Checkpoint(trained.path)
        if file.state.get("quantization") != self._quantization:
            raise UserError("is not quantized in the same way", where=trained.path, hint="start another server for it")
        return trained, file

    def _lasting(self, model: Any) -> list:
        """The model's parameters, without windows of tables on the host."""
        return [parameter for parameter in model.get_parameters()
                if self.trained.tables is None or not is_sparse(parameter.name)]

    def put(self, trained: Trained, values: dict[str, Tensor], rise: int) -> None:
        """Puts the values in place, within `change`; `rise`: of `encoding_version`."""
        for parameter in self._lasting(self.trained.model):
            parameter.set_data(values[parameter.name])
        trained.model = self.trained.model
        if trained.tables is not None:
            self.trained.tables.tables = trained.tables.tables
            trained.tables = self.trained.tables  # the passes know this one
        self.taken(trained, rise)

    def taken(self, trained: Trained, rise: int) -> None:
        """Names the model that was put in place."""
        # In this order: who takes the versions first never has an older `trained` than they belong to.
        self.trained = trained
        self.encoding_version += rise
        self.scorer.version += 1
        self.cache.clear()


def _in_order(file: Checkpoint, product: Int8Product) -> np.ndarray:
    """Int8 values of a checkpoint as `Int8Product.prepare` keeps them."""
    stored = file.read(product.name)
    if product.mode == "kernel":
        return panels(stored)
    return dequantize(stored, file.read(product.scale.name)) if product.mode == "float32" else stored
