"""Quantized rankers: the kernel's network against the float one, quantized checkpoints, the verbs."""

from __future__ import annotations

import json

import numpy as np
import pytest
from mindspore import Tensor

from parallel.checkpoint.full import Checkpoint
from parallel.common.command import main
from parallel.layers import int8
from recsys.__main__ import VERBS
from recsys.quantization import layers as quantization
from tests.recsys.runs import make_run

pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.mark.parametrize("config", ["tokenmixer_large_ug_sep", "dlrm_mlp",
                                    pytest.param("rankmixer_ug_sep", marks=pytest.mark.slow),
                                    pytest.param("tokenmixer_large_moe", marks=pytest.mark.slow)])
def test_quantized_models_give_nearly_the_same(config, tmp_path):
    """The kernel's network against the same one with weights widened to float32, and both against the float one."""
    from recsys.build import loss_network
    from recsys.saved_model import load

    settings, log = make_run(tmp_path / "run", config)
    ids, numbers = (Tensor(np.asarray(array[:8])) for array in (log.parts["test"].ids, log.parts["test"].numbers))
    trained = load(tmp_path / "run")
    exact = trained.model(ids, numbers).asnumpy()
    names = {item.name for item in trained.model.get_parameters()}
    results = {}
    for mode in ("kernel", "float32"):
        model = loss_network(settings, log.spec, len(log.labels)).model
        from parallel.checkpoint.full import load_parameters

        load_parameters(tmp_path / "run", list(model.get_parameters()))
        model.set_train(False)
        errors = quantization.quantize_model(model)
        assert {item.name for item in model.get_parameters()} == names | {f"{name}_scale" for name in errors}
        assert not any("router" in name or "embedding" in name or name.startswith("head") for name in errors)
        assert 0 < max(errors.values()) < 0.01
        before = int8.library
        if mode == "float32":
            int8.library = lambda: None
        try:
            assert int8.prepare(model) in (mode, "float32")
        finally:
            int8.library = before
        results[mode] = model(ids, numbers).asnumpy()
    np.testing.assert_allclose(results["kernel"], results["float32"], rtol=0, atol=1e-5 * np.abs(exact).max())
    assert 0 < np.abs(results["kernel"] - exact).max() < 0.1 * np.abs(exact).max()


def figures(capsys) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_quantize_and_evaluate_from_the_command_line(tmp_path, capsys):
    make_run(tmp_path / "run", "tokenmixer_large_ug_sep")
    assert main("recsys", VERBS, ["quantize", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "q"),
                                  "--group", "128"]) == 0
    found = figures(capsys)
    assert {"max_relative_error", "auc_before", "auc_after", "bytes_before", "bytes_after"} <= set(found)
    assert 0 < found["max_relative_error"] < 0.01 and abs(found["auc_before"] - found["auc_after"]) < 0.05
    assert found["bytes_after"] < found["bytes_before"]
    checkpoint = Checkpoint(tmp_path / "q" / "checkpoints" / "step_00000001")
    assert checkpoint.state["quantization"] == {"bits": 8, "group": 128}
    kinds = {entry["dtype"] for name, entry in checkpoint.layout.items() if name.endswith("gate.weight")}
    assert kinds == {"I8"}
    state = checkpoint.state["run"]
    words = [f"data.cache={state['data']['cache']}", "data.synthetic.samples=600", "data.synthetic.users=40",
             "data.synthetic.items=30"]
    assert main("recsys", VERBS, ["evaluate", "--config", "configs/recsys/tokenmixer_large_ug_sep.yaml",
                                  "--checkpoint", str(tmp_path / "q"), *words]) == 0
    assert figures(capsys)["auc"] == pytest.approx(found["auc_after"], abs=1e-6)
    for wrong, message in ((["--checkpoint", str(tmp_path / "q"), "--output", str(tmp_path / "r")],
                            "quantized already"),
                           (["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "run")], "of its own")):
        assert main("recsys", VERBS, ["quantize", *wrong]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and message in error[0]
