"""Training a separated ranker with a user's samples sharing the user side's computation (UG-Sep, arXiv 2602.10455:
user-level sample aggregation, 5.5 to 14.8 % more training speed there).

Shapes: B batch, R distinct users' rows (a bucket of them), m and n columns of one side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from mindspore import Tensor

from parallel.common.errors import UserError
from parallel.training.data_source import DataSource
from recsys.data.batches import Batches
from recsys.ranker import TrainingLoss
from recsys.ug_sep.ranker import SeparatedRanker
from recsys.ug_sep.sides import UserCandidateSplit

if TYPE_CHECKING:
    from recsys.settings import Run

# R is filled up to one of these shares of B, so that few graphs are compiled.
BUCKETS = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)


def distinct_users(ids: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids_Rm, numbers_Rn, index_B): rows with equal columns once each, R filled up to a bucket.

    Rows are compared bit by bit, so users are distinguished by what the model sees of them, not by an id.
    """
    joined = np.concatenate([ids, np.ascontiguousarray(numbers, np.float32).view(np.int32)], axis=1, dtype=np.int32)
    keys = np.ascontiguousarray(joined).view(np.dtype((np.void, joined.shape[1] * 4))).reshape(-1)
    _, first, index = np.unique(keys, return_index=True, return_inverse=True)
    size = next(size for size in (math.ceil(len(ids) * part) for part in BUCKETS) if size >= len(first))
    first = np.concatenate([first, np.repeat(first[:1], size - len(first))])
    return ids[first], numbers[first], index.reshape(-1).astype(np.int32)


class SharedUsers(DataSource):
    """Batches (ids_Bm, numbers_Bn, labels_BK, index_B, user_ids_Rm, user_numbers_Rn) of batches with rows of both
    sides.

    Args:
        source: the batches.
        sides: which columns are whose.

    Attributes:
        forms_vary: the number of different users does, and a graph is compiled for each number.
    """

    forms_vary = True
    columns = ("ids", "numbers", "labels", "index", "user_ids", "user_numbers")

    def __init__(self, source: Batches, sides: UserCandidateSplit) -> None:
        self.source, self.sides, self.steps_per_epoch = source, sides, source.steps_per_epoch

    def batches(self, start_step: int) -> Iterator[tuple[np.ndarray, ...]]:
        """Batches start_step, start_step + 1, ... without end."""
        for ids, numbers, labels in self.source.batches(start_step):
            yield share(self.sides, ids, numbers, labels)

    def ids_of(self, batch: tuple[np.ndarray, ...]) -> np.ndarray:
        """ids_BM of such a batch, the columns of both sides."""
        ids, _, _, index, user_ids, _ = batch
        full = np.empty((len(ids), ids.shape[1] + user_ids.shape[1]), ids.dtype)
        full[:, list(self.sides.candidate.ids)], full[:, list(self.sides.user.ids)] = ids, user_ids[index]
        return full


def share(sides: UserCandidateSplit, ids: np.ndarray, numbers: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray,
                                                                                                        ...]:
    """A batch with rows of both sides as `SharedUsers` gives it."""
    user, candidate = sides.split(ids, numbers)
    user_ids, user_numbers, index = distinct_users(*user)
    return *candidate, labels, index, user_ids, user_numbers


class SharedUsersLoss(TrainingLoss):
    """`TrainingLoss` of a separated ranker on batches of `SharedUsers`: the same loss and gradients."""

    def construct(self, ids_Bm: Tensor, numbers_Bn: Tensor, labels_BK: Tensor, index_B: Tensor, user_ids_Rm: Tensor,
                  user_numbers_Rn: Tensor) -> Tensor:
        outputs = self.model.aggregated_outputs(user_ids_Rm, user_numbers_Rn, index_B, ids_Bm, numbers_Bn)
        return self.total(outputs, labels_BK)


def sharing_loss(network: TrainingLoss, settings: Run) -> SharedUsersLoss:
    """The loss to train with under `train.share_users`.

    Raises:
        UserError: the model is not separated, or something would differ between a user's samples.
    """
    if not isinstance(network.model, SeparatedRanker) or not network.model.in_slices:
        raise UserError("only a separated ranker can share its users", where="train.share_users",
                        hint="give model.ug_sep, with its masks on and form: slices")
    count = max(settings.train.accumulation, settings.parallel.pipeline.micro_batches)
    if count > 1:
        raise UserError("shared users are not split into micro-batches", where="train.accumulation", value=count)
    if settings.model.dropout > 0.0:
        raise UserError("dropout differs between a user's samples", where="model.dropout",
                        value=settings.model.dropout, hint="set it to 0, or train.share_users: false")
    return SharedUsersLoss(network.model)
