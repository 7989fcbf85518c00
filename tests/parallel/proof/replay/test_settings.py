"""What a replay overrides in the settings, what it refuses, and how it measures differences."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from parallel.common.errors import UserError
from parallel.proof.replay.executor import Rank, prepare
from tests.parallel.proof.replay.graphs import graph_of, node

CONFIG = "configs/pangu/tiny.yaml"


class TestComparison:
    def test_a_moment_is_measured_against_what_it_has_been(self):
        from parallel.proof.replay.lockstep import Replay

        network = SimpleNamespace(trainable_params=list)
        world = SimpleNamespace(extents=[{}], count=1)
        settings = SimpleNamespace(train=SimpleNamespace(precision="fp32"))
        replay = Replay(world, SimpleNamespace(task=SimpleNamespace(network=network), settings=settings), 3)
        rank = Rank(0, prepare(graph_of(node("Neg", "out", ("x",), (1,)))), {})
        found = []
        for ours, full in ((1.0, 1.0), (2e-7, 1e-7), (0.5, 1.0), (1.0, np.nan)):
            rank.state = {"adam_m.bias": np.array([ours])}
            found.append(replay._differences([rank], {"adam_m.bias": np.array([full])})[0].relative)
        np.testing.assert_allclose(found, [0.0, 1e-7, 0.5, np.inf])

    def test_both_optimizers_take_the_larger_epsilon(self, root):
        from parallel.proof.replay.settings import with_defaults

        config = str(root / "configs/recsys/dlrm_mlp.yaml")
        own = ["train.sparse_optimizer.name=adagrad"]
        assert not any("sparse" in item for item in with_defaults(config, []))
        made = with_defaults(config, own)
        assert made[-1:] == own and {"train.optimizer.epsilon=1e-3", "train.sparse_optimizer.epsilon=1e-3"} < set(made)

    def test_experts_leave_no_row_out_unless_the_user_says_so(self, root):
        from parallel.proof.replay.settings import with_defaults
        from parallel.task import load_run

        config = str(root / "configs/recsys/tokenmixer_large_moe.yaml")
        for own, factor in (["model.moe.experts=9"], 9.0), (["model.moe.capacity_factor=2"], 2.0):
            settings = load_run(config, with_defaults(config, own))[1]
            assert (settings.model.moe.capacity_factor, settings.train.optimizer.epsilon) == (factor, 1e-2)
        plain, separated = (with_defaults(str(root / f"configs/recsys/{name}.yaml"), [])
                            for name in ("rankmixer", "rankmixer_ug_sep"))
        assert not any("moe" in item for item in plain) and plain + ["train.optimizer.epsilon=1e-2"] == separated

    def test_micro_batches_of_one_rank_are_refused(self, root):
        from parallel.proof.replay.settings import check_size

        with pytest.raises(UserError, match="accumulates no gradients of micro-batches on a single rank"):
            check_size(str(root / CONFIG), ["train.accumulation=2"])
        check_size(str(root / CONFIG), ["train.accumulation=2", "parallel.data=2"])
