"""Small networks for the proofs, built inside the compiling process: a PanGu-alpha and a per-token-FFN ranker block.

B batch, S sequence, D width, T feature tokens, F inner width.
"""

from __future__ import annotations

from mindspore import Tensor, nn, ops

from parallel.layers.experts.moe import SparsePertokenMoE
from parallel.layers.experts.relu_moe import ReluMoE
from parallel.layers.grouped import Add, GroupedFeedForward, TokenLayout
from parallel.sharding.config import ParallelConfig
from parallel.sharding.layout import Layer, OpSharding
from parallel.sharding.trainable import Trainable
from parallel.task import Input, Task
from parallel.training.settings import TrainSettings

PANGU = {"layers": 2, "hidden_size": 16, "heads": 4, "vocabulary_size": 64, "sequence_length": 8, "dropout": 0.0}
RANKER = {"tokens": 4, "width": 8, "inner": 32, "blocks": 4}
GATED = {"tokens": 4, "width": 8, "inner": 24, "outputs": 6, "experts": 4, "router": "dtsi", "budget": 0.5,
         "penalty": 1e-8, "penalty_step": 1.2}
EXPERTS = {"tokens": 4, "width": 8, "inner": 16, "experts": 4, "active": 3}
BATCH = 16


def pangu(parallel: dict, model: dict | None = None, train: dict | None = None) -> tuple:
    """PanGu-alpha of a few thousand parameters under a `parallel:` block."""
    from pangu.build import build
    from pangu.settings import Run

    settings = Run.model_validate({"model": PANGU | (model or {}), "parallel": parallel,
                                   "train": {"global_batch_size": BATCH} | (train or {})})
    config = settings.parallel.resolve()
    return build(settings, config), settings.train, config


def halved(parallel: dict, compute_dtype: str, train: dict | None = None) -> tuple:
    """`pangu` with its products in another element type."""
    from pangu.build import build
    from pangu.settings import Run

    settings = Run.model_validate({"model": PANGU, "parallel": parallel,
                                   "train": {"global_batch_size": BATCH} | (train or {})})
    config = settings.parallel.resolve()
    return build(settings, config, compute_dtype), settings.train, config


def one_bias(parallel: dict, model: dict | None = None, train: dict | None = None) -> tuple:
    """The same as it should not be: the attention bias is made on the first stage and sent to all others."""
    task, settings, config = pangu(parallel, model, train)
    loss, model = task.network, task.network.model
    bias = model.bias
    for name in list(model.biases._cells):
        model.biases._cells[name] = bias
    loss.pipeline_cells = lambda: [[model.embedding, bias], *model.layers, model.query_layer,
                                   [model.query_embedding, model.norm, model.head, loss.cross_entropy, loss.mean]]
    return task, settings, config


class Entrance(Layer):
    """[B, T, D] -> [T, B, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.to_tokens = ops.Transpose()

    def construct(self, features_BTD: Tensor) -> Tensor:
        return self.to_tokens(features_BTD, (1, 0, 2))

    def sharding(self) -> list[OpSharding]:
        return [OpSharding(self.to_tokens, (("batch", None, None),))]


class SquaredError(Layer):
    """Mean over the batch of (sum over tokens and width - label)^2; `wrong` wants the tokens sharded, not the batch."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.pool, self.mean = ops.ReduceSum(), ops.ReduceMean()
        self.differ, self.square = ops.Sub(), ops.Square()
        self.wrong = wrong

    def construct(self, x_TBD: Tensor, labels_B: Tensor) -> Tensor:
        return self.mean(self.square(self.differ(self.pool(x_TBD, (0, 2)), labels_B)))

    def sharding(self) -> list[OpSharding]:
        rows = ("batch",)
        stream = ("batch", None, None) if self.wrong else (None, "batch", None)
        return [OpSharding(self.pool, (stream,)), OpSharding(self.differ, (rows, rows)),
                OpSharding(self.square, (rows,)), OpSharding(self.mean, (rows,))]


class RankerBlocks(Trainable):
    """Blocks x + FFN_t(x), each token with its own FFN, and a squared error. Inputs [B, T, D] and [B]."""

    def __init__(self, tokens: int, width: int, inner: int, blocks: int, wrong: bool = False) -> None:
        super().__init__(auto_prefix=False)
        self.entrance, self.error = Entrance(), SquaredError(wrong)
        self.networks = nn.CellList([GroupedFeedForward(tokens, width, inner) for _ in range(blocks)])
        self.adds = nn.CellList([Add((None, "batch", None)) for _ in range(blocks)])

    def construct(self, features_BTD: Tensor, labels_B: Tensor) -> Tensor:
        x_TBD = self.entrance(features_BTD)
        for i in range(len(self.networks)):
            x_TBD = self.adds[i](x_TBD, self.networks[i](x_TBD))
        return self.error(x_TBD, labels_B)

    def pipeline_cells(self) -> list:
        """Blocks in order, for stages and recomputation."""
        return [self.entrance, *[list(pair) for pair in zip(self.networks, self.adds, strict=True)], self.error]


class UsedExperts(Trainable):
    """Experts of every token for an input [B, T, D], not trained."""

    def __init__(self, dispatch: str) -> None:
        super().__init__(auto_prefix=False)
        self.entrance = Entrance()
        self.moe = SparsePertokenMoE(**EXPERTS, dispatch=dispatch, layout=TokenLayout("tokens"))
        self.set_train(False)

    def construct(self, features_BTD: Tensor) -> Tensor:
        return self.moe(self.entrance(features_BTD))


def experts(parallel: dict, dispatch: str) -> tuple:
    """`UsedExperts` under a `parallel:` block."""
    from mindspore.nn.utils import no_init_parameters

    config = ParallelConfig.model_validate(parallel).resolve()
    with no_init_parameters():
        network = UsedExperts(dispatch)
    inputs = [Input("features", (BATCH, EXPERTS["tokens"], EXPERTS["width"]), "float32")]
    return Task(network, inputs, lambda seed: (), BATCH), TrainSettings(global_batch_size=BATCH), config


class UsedGates(Trainable):
    """ReLU-gated experts of every token for an input [B, T, D], not trained."""

    def __init__(self, dispatch: str, tokens: str) -> None:
        super().__init__(auto_prefix=False)
        self.entrance = Entrance()
        self.moe = ReluMoE(**GATED, dispatch=dispatch, layout=TokenLayout(tokens))
        self.set_train(False)

    def construct(self, features_BTD: Tensor) -> Tensor:
        return self.moe(self.entrance(features_BTD))[0]


def gates(parallel: dict, dispatch: str, tokens: str) -> tuple:
    """`UsedGates` under a `parallel:` block."""
    from mindspore.nn.utils import no_init_parameters

    config = ParallelConfig.model_validate(parallel).resolve()
    with no_init_parameters():
        network = UsedGates(dispatch, tokens)
    inputs = [Input("features", (BATCH, GATED["tokens"], GATED["width"]), "float32")]
    return Task(network, inputs, lambda seed: (), BATCH), TrainSettings(global_batch_size=BATCH), config


def ranker(parallel: dict, wrong: bool = False, train: dict | None = None) -> tuple:
    """The ranker blocks under a `parallel:` block."""
    from mindspore.nn.utils import no_init_parameters

    config = ParallelConfig.model_validate(parallel).resolve()
    with no_init_parameters():
        network = RankerBlocks(**RANKER, wrong=wrong)
    inputs = [Input("features", (BATCH, RANKER["tokens"], RANKER["width"]), "float32"),
              Input("labels", (BATCH,), "float32")]
    settings = TrainSettings.model_validate({"global_batch_size": BATCH} | (train or {}))
    return Task(network, inputs, lambda seed: (), BATCH), settings, config
