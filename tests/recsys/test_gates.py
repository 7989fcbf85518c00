"""Experts with ReLU gates under layouts: the factor of their penalty moves with the step of the whole batch."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from parallel.layers.experts.relu_moe import ReluMoE
from parallel.layers.parameter import initialize
from parallel.training.optimizers.run import Optimizer
from parallel.training.settings import OptimizerSettings, TrainSettings
from parallel.training.step import TrainStep
from tests.parallel.torch_runtime.launches import run_command

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "recsys" / "rankmixer.yaml")
WORDS = ["model.moe={experts: 4, penalty: 0.01}", "model.layers=1", "model.width=16", "model.tokens=4",
         "train.global_batch_size=16", "data.synthetic.samples=2000"]


class Gated(ms.nn.Cell):
    """The penalty alone, of inputs [B, T, D]."""

    def __init__(self) -> None:
        super().__init__(auto_prefix=False)
        self.moe = ReluMoE(2, 8, 16, experts=4, router="single_relu", budget=0.5, penalty=0.25, penalty_step=2.0)

    def construct(self, x_BTD: Tensor) -> Tensor:
        return self.moe(x_BTD.transpose(1, 0, 2))[1]


def factors_of(accumulation: int, clip: float | None = None) -> list[float]:
    """The factor after each of two steps over a batch whose halves lie on different sides of the budget."""
    ms.set_context(mode=ms.GRAPH_MODE)
    network = Gated()
    initialize(network, 1)
    moe = network.moe
    moe.infer_router.weight.set_data(Tensor(np.full((2, 8, 4), 0.1, np.float32)))
    x = np.ones((4, 2, 8), np.float32)
    x[3] = -9.0  # no gate of this sample is above 0: three of four samples are over the budget
    settings = TrainSettings(global_batch_size=4, accumulation=accumulation, clip_norm=clip,
                             optimizer=OptimizerSettings(learning_rate=1e-6))
    step = TrainStep(network, Optimizer(network.trainable_params(), settings.optimizer, 10), settings)
    found = []
    for _ in range(2):
        step(Tensor(x))
        found.append(float(moe.factor.asnumpy()))
    return found


@pytest.mark.usefixtures("graph_mode")
def test_a_step_moves_the_factor_once_whatever_its_micro_batches():
    assert factors_of(1) == factors_of(2) == factors_of(4) == factors_of(2, clip=1e-3) == [0.5, 1.0]


@pytest.mark.skipif(platform.machine() != "x86_64" or shutil.which("g++") is None, reason="the replay needs g++")
@pytest.mark.parametrize("layout", [
    "parallel.data=2 train.accumulation=2",
    pytest.param("parallel.data=2 parallel.op=2 model.op_sharding=tokens parallel.optimizer.shard=-1",
                 marks=pytest.mark.slow)])
def test_ranks_train_gates_as_one_device_does(layout, tmp_path):
    code, figures, errors = run_command("parallel", ["replay", "--config", CONFIG, "--steps", "2", *WORDS,
                                                     f"data.cache={tmp_path}", *layout.split()])
    assert code == 0, errors
    assert figures["equal"] and figures["max_parameter_difference"] < 1e-12
