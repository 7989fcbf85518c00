"""What a resumed run does otherwise than the run that wrote the checkpoint: reported, since nothing stops it."""

from __future__ import annotations

from typing import Any

# Changing these changes neither the steps nor what they learn.
_HARMLESS = ("output.", "train.validate_every", "train.validation_batches", "train.log_every", "train.peak_tflops",
             "train.early_stop", "train.max_skipped", "train.profile", "train.stall_after", "train.data_sink",
             "data.cache", "data.workers", "generate.", "evaluate.", "serve.", "parallel.", "train.steps")
_ABSENT = object()
_MOST = 20


def changed_settings(was: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One note for every setting that shapes the run and differs, with both values.

    Args:
        was: the settings kept in the checkpoint (`state["run"]`); {} says nothing.
        now: the settings of this run, in the same form.
    """
    if not was or not now:
        return []
    old, new = _flat(was), _flat(now)
    notes = [f"note: {key} was {_shown(old.get(key, _ABSENT))} and is {_shown(new.get(key, _ABSENT))}: the run will "
             "differ from one that was never stopped"
             for key in dict.fromkeys([*new, *old])
             if old.get(key, _ABSENT) != new.get(key, _ABSENT) and not key.startswith(_HARMLESS)]
    notes += _schedule_notes(old, new)
    if (name := "train.optimizer.name") in old and old[name] != new.get(name):
        notes.insert(0, f"note: moments that {old[name]} made go on in {new.get(name)}; for a clean start begin a new "
                     "run from the parameters alone")
    more = [f"note: and {len(notes) - _MOST} more settings"] if len(notes) > _MOST else []
    return notes[:_MOST] + more


def _schedule_notes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A schedule that ends with the run is another schedule when the run becomes longer or shorter."""
    steps = "train.steps"
    if old.get(steps) == new.get(steps) or steps not in old:
        return []
    notes = []
    for block in ("train.optimizer", "train.sparse_optimizer"):
        schedule = f"{block}.schedule"
        if new.get(f"{schedule}.name", "constant") != "constant" and new.get(f"{schedule}.decay_steps") is None:
            notes.append(f"note: {steps} was {old[steps]} and is {new[steps]}, and {schedule}.decay_steps is null, so "
                         f"the learning rate falls over {new[steps]} steps from here on; set decay_steps to "
                         f"{old[steps]} to keep the schedule")
    return notes


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat.update(_flat(value, f"{name}."))
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def _shown(value: Any) -> str:
    from parallel.common.errors import shown

    return "not there" if value is _ABSENT else shown(value, 60)
