"""A resumed run says what it does otherwise than the run before."""

from __future__ import annotations

from parallel.training.resume_notes import changed_settings


def run(steps=10, name="adamw", rate=1e-3, schedule="cosine", decay_steps=None, **more):
    return {"train": {"steps": steps, "seed": 1, "log_every": 1, "optimizer": {
        "name": name, "learning_rate": rate, "betas": (0.9, 0.95),
        "schedule": {"name": schedule, "decay_steps": decay_steps, "warmup_steps": 2}}},
            "output": {"directory": "r"}, **more}


def test_nothing_is_said_where_nothing_differs():
    as_json = run()
    as_json["train"]["optimizer"]["betas"] = [0.9, 0.95]
    assert changed_settings(as_json, run()) == [] and changed_settings({}, run()) == []
    harmless = run()
    harmless["train"]["log_every"], harmless["output"]["directory"] = 5, "s"
    assert changed_settings(run(), harmless) == []


def test_a_longer_run_bends_a_schedule_that_ends_with_it():
    info, = changed_settings(run(), run(steps=20))
    assert "train.steps was 10 and is 20" in info and "decay_steps to 10" in info
    assert changed_settings(run(schedule="constant"), run(steps=20, schedule="constant")) == []
    assert changed_settings(run(decay_steps=10), run(steps=20, decay_steps=10)) == []


def test_another_optimizer_and_other_sizes_are_reported():
    notes = changed_settings(run(), run(name="lamb", rate=2e-3))
    assert "moments that adamw made go on in lamb" in notes[0]
    assert any("train.optimizer.learning_rate was 0.001 and is 0.002" in info for info in notes)
    info, = changed_settings(run(data={"seed": 1}), run(data={"seed": 2}))
    assert info.startswith("note: data.seed was 1 and is 2")
