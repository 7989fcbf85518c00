"""`pangu export`: prefill and decode as MindIR, loaded again by MindSpore, generate what `pangu generate` does."""

from __future__ import annotations

import json

import numpy as np
import pytest

from parallel.common.command import main


@pytest.fixture
def run(tmp_path):
    """A config file and a checkpoint of a tiny model."""
    import mindspore as ms

    from parallel.checkpoint.full import save_checkpoint
    from tests.pangu.tiny import tiny_model

    ms.set_context(mode=ms.GRAPH_MODE)
    model = tiny_model(final_norm="after_query")
    save_checkpoint(tmp_path / "checkpoints", 1, list(model.get_parameters()))
    sizes = model.config.model_dump(mode="json")
    (tmp_path / "run.yaml").write_text(json.dumps({
        "model": sizes, "output": {"directory": str(tmp_path)}, "data": {"tokenizer": str(tmp_path / "none.model")}}))
    return tmp_path, model


def export(folder, capsys, *more, code=0):
    from pangu.__main__ import VERBS

    assert main("pangu", VERBS, ["export", "--config", str(folder / "run.yaml"), "--output", str(folder / "out"),
                                 *more]) == code
    out = capsys.readouterr()
    return json.loads(out.out.splitlines()[-1]) if code == 0 else out.err.strip().splitlines()[-1]


def test_loaded_graphs_generate_what_the_engine_does(run, capsys):
    from pangu.export import ExportedDecoder
    from pangu.generation.generate import Generator
    from pangu.generation.settings import GenerateSettings

    folder, model = run
    figures = export(folder, capsys, "--sequences", "2", "--prompt-tokens", "8")
    assert figures["max_difference"] < 1e-5 * 30
    ids = np.random.default_rng(3).integers(10, model.config.vocabulary_size, (2, 13))
    found, _ = ExportedDecoder(folder / "out").greedy(ids, 12)
    settings = GenerateSettings(temperature=0.0, max_new_tokens=12, stop_ids=[])
    wanted = Generator(model, None, settings).generate_ids(ids.tolist())
    assert found.tolist() == [item.ids for item in wanted]


def test_sizes_that_do_not_fit_are_refused_in_one_line(run, capsys):
    folder, _ = run
    assert "--prompt-tokens" in export(folder, capsys, "--prompt-tokens", "97", code=2)
    assert "--sequences" in export(folder, capsys, "--sequences", "0", code=2)
