"""The network that adaptation trains: PanGu-alpha under the loss of answers, perhaps with adapters."""

from __future__ import annotations

from mindspore import Tensor
from mindspore import dtype as mstype

from pangu.adaptation.settings import AdaptSettings
from pangu.model import PanGuAlpha, TrainingLoss
from parallel.layers.low_rank import add_adapters


class AnswerLoss(TrainingLoss):
    """Mean negative log-likelihood of the tokens of answers.

    Inputs: those of `TrainingLoss`, and after documents_BS counted_BS int32, 1 where the next token belongs to an
    answer. Output: scalar loss in nats per counted token.
    """

    def construct(self, records_BR: Tensor, positions_BS: Tensor, documents_BS: Tensor, counted_BS: Tensor,
                  rows_B: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        ids_BS = self.inputs(records_BR, (0, 0), (records_BR.shape[0], self.length), (1, 1))
        nll_N = self.token_nll(records_BR, ids_BS, positions_BS, documents_BS, rows_B)
        loss, weight = self.mean(nll_N, self.reshape(self.cast(counted_BS, mstype.float32), (-1,)))
        return (loss, weight) if self.weighted else loss


def adapted_network(model: PanGuAlpha, adapt: AdaptSettings, weighted: bool = False) -> AnswerLoss:
    """`model` under the loss of answers, with adapters where `adapt` asks for them (then all else is frozen)."""
    if adapt.low_rank is not None:
        low_rank = adapt.low_rank
        add_adapters(model, frozenset(low_rank.targets), low_rank.rank, low_rank.alpha)
    return AnswerLoss(model, weighted)
