"""An engine whose passes run over the shards of several processes: the first one has the queue, the cache and HTTP, and
leads the others (`recsys.passes.sharded`)."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.checkpoint.folder import resolve_checkpoint
from parallel.common.errors import UserError
from recsys.passes.sharded import ShardedRanker
from recsys.passes.tasks import REQUEST, joins, kinds_of
from recsys.saved_model import Trained, describe
from recsys.serving.engine import Engine, Scorer
from recsys.serving.settings import EngineSettings
from recsys.serving.state_cache import StateCache
from recsys.ug_sep.sides import UserCandidateSplit

if TYPE_CHECKING:
    from recsys.serving.settings import ServeSettings
    from recsys.settings import Run


class ShardedScorer(Scorer):
    """Args:
        ranker: this process's part; it leads.
        spec: places of the features.
        separated: whether the passes are the user's and the candidates'.
        joins: whether there are graphs of whole requests.
        settings, cache: see `Scorer`.
    """

    def __init__(self, ranker: ShardedRanker, spec: Any, separated: bool, joins: bool, settings: EngineSettings,
                 cache: StateCache) -> None:
        self.ranker, self.spec, self.separated, self.joins = ranker, spec, separated, joins
        self.settings, self.cache, self.version = settings, cache, 1
        self.sides = UserCandidateSplit.of(spec) if separated else None

    def score_rows(self, ids_NM: np.ndarray, numbers_NN: np.ndarray) -> np.ndarray:
        return self.ranker.lead(f"scores_{len(ids_NM)}", (self.ranker.rows.rows(ids_NM), numbers_NN))

    def user_states(self, ids_Rm: np.ndarray, numbers_Rn: np.ndarray) -> np.ndarray:
        rows_Rm = self.ranker.rows.rows(ids_Rm, self.sides.user.ids)
        return self.ranker.lead(f"user_{len(ids_Rm)}", (rows_Rm, numbers_Rn))

    def on_device(self, states_RS: np.ndarray) -> np.ndarray:
        # There is one graph, for as many users as may come together.
        return np.concatenate([states_RS, np.repeat(states_RS[-1:], self.settings.requests - len(states_RS), 0)])

    def score_candidates(self, states: Any, index_N: np.ndarray, ids_Nm: np.ndarray,
                         numbers_Nn: np.ndarray) -> np.ndarray:
        rows_Nm = self.ranker.rows.rows(ids_Nm, self.sides.candidate.ids)
        return self.ranker.lead(f"candidates_{len(index_N)}", (states, index_N.astype(np.int32), rows_Nm, numbers_Nn))

    def score_request(self, ids_NM: np.ndarray, numbers_NN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (user_ids, user_numbers), (ids, numbers) = self.sides.split(ids_NM, numbers_NN)
        user_rows, rows = (self.ranker.rows.rows(*side) for side in ((user_ids[:1], self.sides.user.ids),
                                                                     (ids, self.sides.candidate.ids)))
        return self.ranker.lead(f"{REQUEST}_{len(ids)}", (user_rows, user_numbers[:1], rows, numbers))

    def joined_size(self, candidates: int) -> int | None:
        # The user's lane runs beside the candidates': it pays at every size.
        return next((size for size in self.settings.candidates if candidates <= size), None)

    def predictions(self, found_NK: np.ndarray) -> np.ndarray:
        return found_NK.astype(np.float64)  # the passes end in probabilities


class ShardedEngine(Engine):
    """Args:
        trained: the model's settings and features; its network is None.
        ranker: this process's part.
        settings: see `Engine`.
    """

    def __init__(self, trained: Trained, ranker: ShardedRanker, settings: EngineSettings) -> None:
        self.ranker = ranker
        super().__init__(trained, settings)

    def make_scorer(self) -> ShardedScorer:
        settings = self.trained.settings
        return ShardedScorer(self.ranker, self.trained.spec, len(kinds_of(settings)) > 1,
                             joins(self.ranker.settings), self.settings, self.cache)

    def prepare(self, checkpoint: str | Path) -> tuple[Trained, dict[str, Any], int]:
        """See `Engine.prepare`; the values are this process's shards."""
        trained, _ = self.described(checkpoint)
        return trained, self.ranker.read(trained.path), int(not trained.encodes_as(self.trained))

    def put(self, trained: Trained, values: dict[str, Any], rise: int) -> None:
        """See `Engine.put`; the other processes read their shards meanwhile."""
        self.ranker.lead_take(trained.path, values)
        self.taken(trained, rise)


def open_engine(run: Run, settings: ServeSettings, checkpoint: str, config: str | None) -> ShardedEngine | None:
    """The engine of the process that answers; None in one that followed it, after it has ended.

    Args:
        run: the run, with the layout of the launch.
        settings: of the server.
        checkpoint: or a folder of such.
        config: the run's file.

    Raises:
        UserError: several processes behind a port, a run to follow, several groups; see `ShardedRanker`.
    """
    if settings.workers > 1 or settings.follow:
        raise UserError("one server over several devices has one process that answers, and follows no run",
                        where="workers" if settings.workers > 1 else "follow",
                        hint="set workers=1 follow=false; POST /reload takes a new checkpoint")
    path = resolve_checkpoint(checkpoint)
    ranker = ShardedRanker(run, path, "serve")
    if ranker.member.groups > 1:
        raise UserError("a server is one group of op x stages processes", where="--nproc", value=ranker.member.world,
                        hint=f"start {ranker.member.size}, and a server for each further group")
    if not ranker.member.leads:
        for number in (signal.SIGTERM, signal.SIGINT):  # the first process decides when it is over
            signal.signal(number, signal.SIG_IGN)
        ranker.follow()
        return None
    return ShardedEngine(describe(path, config), ranker, settings.engine)
