"""The forward passes of a ranker, each as a `Task` whose graph can be compiled by itself, for any layout: what is
exported, and what sharded evaluation and serving run.

    scores      ids_BM, numbers_BN                      -> probabilities_BK
    user        ids_Rm, numbers_Rn                      -> state_RS                 (separated rankers)
    candidates  state_RS, index_N, ids_Nm, numbers_Nn   -> probabilities_NK         (separated rankers)
    request     user's ids_1m, numbers_1n, candidates' ids_Nm, numbers_Nn -> state_1S, probabilities_NK
                                                        (separated rankers on one device: both passes in one graph)

Columns of the sides are those of `recsys.ug_sep.sides.UserCandidateSplit`.

Graphs of sharded evaluation and serving are called by their pass and rows, `scores_512` or `candidates_64`. (`scores`
alone is a graph of training.)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parallel.checkpoint.folder import resolve_checkpoint
from parallel.common.errors import UserError
from parallel.task import Input, Task
from recsys.data.columns import features_of
from recsys.data.features import FeatureSpec, assign_columns
from recsys.data.vocabulary import VOCABULARY, Vocabulary
from recsys.network import labels_of, loss_network
from recsys.passes.weights import rooms
from recsys.settings import run_class

if TYPE_CHECKING:
    from parallel.sharding.config import ParallelConfig
    from parallel.training.settings import TrainSettings
    from recsys.settings import Run

KINDS = ("scores", "user", "candidates")
REQUEST = "request"
USER_INPUTS = ("user_ids", "user_numbers")
"""Inputs of the graph of a request on which its user alone depends."""


def kinds_of(settings: Run) -> tuple[str, ...]:
    """The passes that a ranker is served by."""
    separation = settings.model.separation()
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
    run.model.keep_all_rows()
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


def task_of(settings: Run, spec: FeatureSpec, kind: str, rows: int, users: int = 1,
            compute_dtype: str = "float32") -> Task:
    """A pass over so many rows, its network without parameter values."""
    network = loss_network(settings, spec, len(labels_of(settings)), compute_dtype)
    model = network.model
    ids, numbers, leading = spec.id_columns, spec.numeric_columns, []
    known = min(spec.tables.values())
    if kind != "scores":
        if len(kinds_of(settings)) == 1:
            raise UserError("the ranker is not separated into a user and a candidate side", where="model.ug_sep")
        own = model.sides.user if kind == "user" else model.sides.candidate
        ids, numbers = len(own.ids), len(own.numbers)
    if kind == "candidates":
        leading = [Input("state", (users, model.state_size), "float32"), Input("index", (rows,), "int32", users)]
    elif kind == REQUEST:
        user = model.sides.user
        leading = [Input(USER_INPUTS[0], (1, len(user.ids)), "int32", known),
                   Input(USER_INPUTS[1], (1, len(user.numbers)), "float32")]
    inputs = [*leading, Input("ids", (rows, ids), "int32", known),
              Input("numbers", (rows, numbers), "float32")]
    return Task(network, inputs, lambda seed: _sample(inputs, seed), rows,
                scores=lambda network: cell_of(kind, network.model))


def cell_of(kind: str, model: Any) -> Any:
    """The cell of a pass, with the parameters of `model`."""
    from recsys.ranker import Scores
    from recsys.ug_sep.ranker import CandidateScores, RequestScores, UserPass

    return {"scores": Scores, "user": UserPass, "candidates": CandidateScores, REQUEST: RequestScores}[kind](model)


# -- graphs of sharded evaluation and serving --------------------------------------------------------------------------


def evaluation_rows(settings: Run) -> int:
    """Samples of one forward pass when a part of a log is evaluated."""
    return 4 * settings.train.global_batch_size


def inference_kinds(settings: Run, verb: str | None = None) -> tuple[str, ...]:
    """The graphs that a verb needs (None = all): of `evaluate` one over whole rows, of `serve` and `bench` the user's
    for one and for all requests of a batch, and for every size that batches are filled up to the candidates' and, on
    one device, both passes of a request in one graph."""
    engine = settings.serve.engine
    evaluated, served = (f"scores_{evaluation_rows(settings)}",), tuple(f"scores_{size}" for size in engine.candidates)
    if len(kinds_of(settings)) > 1:
        joined = engine.candidates if joins(settings) else []
        served = (*(f"user_{count}" for count in sorted({1, engine.requests})),
                  *(f"candidates_{size}" for size in engine.candidates), *(f"{REQUEST}_{size}" for size in joined))
    return evaluated if verb == "evaluate" else served if verb else tuple(dict.fromkeys((*evaluated, *served)))


def joins(settings: Run) -> bool:
    """Whether there are graphs of whole requests: on one device, where nothing of a user is sharded."""
    return settings.parallel.op * settings.parallel.pipeline.stages == 1


def inference(settings: Run, parallel: ParallelConfig, compute_dtype: str, kind: str) -> Task:
    """The task of such a graph, whose weights are parameters of the compute type, so that no call casts them; see
    `parallel.task.ModelPackage`.

    Raises:
        UserError: an axis does not divide what it shards, or a vocabulary's size is not known.
    """
    from parallel.sharding.layout import hold_weights

    check_inference(settings)
    own = settings.model_copy(deep=True)
    own.model.keep_all_rows(dropless=True)
    name, _, rows = kind.rpartition("_")
    task = task_of(own, whole_spec(own, sizes_of(own)), name, int(rows), settings.serve.engine.requests, compute_dtype)
    task.network.model.check_layout(parallel, int(rows))
    hold_weights(task.network.model, task.network.model.compute_dtype)
    return replace(task, network=task.scores(task.network))


def check_inference(settings: Run) -> None:
    """Raises a `UserError` for what is not served sharded."""
    if settings.model.lookup.by != "op":
        raise UserError("a forward pass alone shards tables over the op axis", where="model.lookup.by",
                        value=settings.model.lookup.by, hint="set model.lookup.by=op: the checkpoint is the same")
    if settings.parallel.pipeline.stages > 1 and len(kinds_of(settings)) > 1:
        raise UserError("both passes of a separated ranker are sharded by op alone", where="parallel.pipeline.stages",
                        value=settings.parallel.pipeline.stages, hint="set it to 1 and raise parallel.op")


def shapes_inference(tree: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's settings (as JSON) that shapes these graphs."""
    model, data, layout = tree["model"], tree["data"], tree["parallel"]
    return {
        "model": {key: value for key, value in model.items() if key not in ("dropout", "embedding_std")},
        "data": {key: data[key] for key in ("reader", "features", "labels", "pooling", "history", "passed",
                                            "like_rate")},
        "train": {"precision": tree["train"]["precision"]},
        "serve": {"requests": tree["serve"]["engine"]["requests"]},
        "sizes": _sizes(data["vocabulary"], tree["output"]["directory"], data["tables"]["place"]),
        "parallel": {"op": layout["op"], "vocabulary": layout["vocabulary"],
                     "pipeline": {key: layout["pipeline"][key] for key in ("stages", "offsets")}},
    }  # fmt: skip


def sizes_of(settings: Run) -> dict[str, int]:
    """Known values of each vocabulary feature, by the vocabulary that the run names or has in its folder, and rows of
    tables on the host, by its newest checkpoint (`rooms`)."""
    return _sizes(settings.data.vocabulary, settings.output.directory, settings.data.tables.place)


def _sizes(vocabulary: str | None, directory: str, place: str) -> dict[str, int]:
    path = Path(vocabulary) if vocabulary is not None else Path(directory) / VOCABULARY
    if vocabulary is not None and not path.is_file():
        raise UserError("there is no such file", where="data.vocabulary", value=vocabulary)
    hosted = _rooms(directory) if place == "host" else {}
    return hosted | (Vocabulary.load(path).sizes() if path.is_file() else {})


def _rooms(directory: str) -> dict[str, int]:
    try:
        newest = resolve_checkpoint(directory)
    except UserError:
        return {}  # passes with start values, in which no key has a row
    return rooms(newest)


def _sample(inputs: list[Input], seed: int) -> tuple[np.ndarray, ...]:
    """Random inputs: ids of rows that every table has, standard normal numbers."""
    generator = np.random.default_rng(seed)
    return tuple(generator.integers(0, item.high, item.shape).astype(np.int32) if item.dtype == "int32"
                 else generator.standard_normal(item.shape).astype(np.float32) for item in inputs)
