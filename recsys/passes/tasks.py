"""The forward passes of a ranker, each as a `Task` whose graph can be compiled by itself, for any layout: what is
exported, and what sharded evaluation and serving run.

    scores      ids_BM, numbers_BN                      -> probabilities_BK
    user        ids_Rm, numbers_Rn                      -> state_RS                 (separated rankers)
    candidates  state_RS, index_N, ids_Nm, numbers_Nn   -> probabilities_NK         (separated rankers)

Columns of `user` and `candidates` are those of `recsys.ug_sep.sides.UserCandidateSplit`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.common.errors import UserError
from parallel.task import Input, Task
from recsys.build import labels_of, loss_network, run_class
from recsys.data.columns import features_of
from recsys.data.features import FeatureSpec, assign_columns

if TYPE_CHECKING:
    from parallel.sharding.config import ParallelConfig
    from parallel.training.settings import TrainSettings
    from recsys.settings import Run

KINDS = ("scores", "user", "candidates")


def kinds_of(settings: Run) -> tuple[str, ...]:
    """The passes that a ranker is served by."""
    separation = getattr(settings.model, "ug_sep", None)
    return KINDS[1:] if separation is not None and separation.separated else KINDS[:1]


def arguments_of(settings: Run, sizes: dict[str, int], kind: str, rows: int, users: int = 1) -> dict[str, Any]:
    """Keyword arguments of `built` as JSON.

    Args:
        settings: of the run; its layout is that of the pass.
        sizes: known values of each vocabulary feature (`Vocabulary.sizes`), and rows of each dynamic one.
        kind: of `KINDS`.
        rows: samples (scores), users (user) or candidates (candidates).
        users: R of the candidates' pass; with 1 their index is not read.
    """
    return {"settings": settings.model_dump(mode="json"), "sizes": sizes, "kind": kind, "rows": rows, "users": users}


def built(settings: dict[str, Any], sizes: dict[str, int], kind: str, rows: int,
          users: int) -> tuple[Task, TrainSettings, ParallelConfig]:
    """The task of a pass: a builder of `parallel.proof.compile.rank_compiler.Request`.

    Raises:
        UserError: a pass that the model does not have, or an axis that does not divide what it shards.
    """
    run = run_class(settings["model"]["name"]).model_validate(settings)
    exact_experts(run)
    config = run.parallel.resolve()
    spec = whole_spec(run, sizes)
    task = task_of(run, spec, kind, rows, users)
    task.network.model.check_layout(config, rows)
    return task, run.train, config


def whole_spec(settings: Run, sizes: dict[str, int]) -> FeatureSpec:
    """Places of the features where every table lies in the graph; one of dynamic ids has as many known rows as `sizes`
    says."""
    features = [feature.model_copy(update={"values": "integer", "rows": sizes.get(feature.target or feature.name, 1)})
                if feature.is_dynamic else feature for feature in features_of(settings.data)]
    return assign_columns(features, settings.model.embedding_size, sizes)


def exact_experts(settings: Run) -> None:
    """Lets routed experts take all rows that choose them: what a row gets must not depend on its batch."""
    moe = getattr(settings.model, "moe", None)
    if moe is not None and hasattr(moe, "dispatch"):
        moe.dispatch, moe.capacity_factor = "capacity", float(moe.experts)


def task_of(settings: Run, spec: FeatureSpec, kind: str, rows: int, users: int = 1) -> Task:
    """A pass over so many rows, its network without parameter values."""
    network = loss_network(settings, spec, len(labels_of(settings)))
    model = network.model
    ids, numbers, leading = spec.id_columns, spec.numeric_columns, []
    if kind != "scores":
        if kind not in kinds_of(settings):
            raise UserError("the ranker is not separated into a user and a candidate side", where="model.ug_sep")
        own = model.sides.user if kind == "user" else model.sides.candidate
        ids, numbers = len(own.ids), len(own.numbers)
    if kind == "candidates":
        leading = [Input("state", (users, model.state_size), "float32"), Input("index", (rows,), "int32", users)]
    inputs = [*leading, Input("ids", (rows, ids), "int32", min(spec.tables.values())),
              Input("numbers", (rows, numbers), "float32")]
    return Task(network, inputs, lambda seed: _sample(inputs, seed), rows,
                scores=lambda network: cell_of(kind, network.model))


def cell_of(kind: str, model: Any) -> Any:
    """The cell of a pass, with the parameters of `model`."""
    from recsys.ranker import Scores
    from recsys.ug_sep.ranker import CandidateScores, UserPass

    return {"scores": Scores, "user": UserPass, "candidates": CandidateScores}[kind](model)


def _sample(inputs: list[Input], seed: int) -> tuple[np.ndarray, ...]:
    """Random inputs: ids of rows that every table has, standard normal numbers."""
    generator = np.random.default_rng(seed)
    return tuple(generator.integers(0, item.high, item.shape).astype(np.int32) if item.dtype == "int32"
                 else generator.standard_normal(item.shape).astype(np.float32) for item in inputs)
