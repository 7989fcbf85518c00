"""Which backend runs a layout on this machine. Imports neither MindSpore nor torch: it looks at what is there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from parallel.common.errors import UserError
from parallel.sharding.config import ParallelConfig
from parallel.training.device import check_precision
from parallel.training.settings import RunSettings


@dataclass(frozen=True)
class Choice:
    """A backend ("mindspore" or "torch"), the devices it takes ("CPU", "GPU", "Ascend") and why."""

    backend: str
    device: str
    reason: str

    def text(self) -> str:
        """For people."""
        return f"backend: {self.backend} on {self.device} ({self.reason})"


def choose(config: ParallelConfig, precision: str = "fp32", dropout: float = 0.0) -> Choice:
    """The backend for a resolved layout.

    `auto` takes MindSpore where it can run the layout (everything on Ascend; one device and data parallelism on the
    CPU) and torch elsewhere; MindSpore's CUDA backend is taken where `parallel.mindspore.device` says so, and never by
    itself.

    Args:
        config: resolved.
        precision: `train.precision`.
        dropout: of the model.

    Raises:
        UserError: the backend that is needed or asked for is not installed; a key is set that another backend or
            device alone has.
    """
    choice = _chosen(config, what_needs_torch(config, precision, dropout))
    if choice.backend == "mindspore" and config.execution != "auto":
        raise UserError(f"it says how torch runs a graph, and MindSpore runs this one ({choice.reason})",
                        where="parallel.execution", value=config.execution,
                        hint="set it to auto, or parallel.backend to torch")
    if choice.backend == "mindspore":
        check_precision(precision, choice.device)
    if config.fuses_otherwise and choice.device != "Ascend":
        raise UserError(f"gradients are fused into groups on Ascend, and {choice.backend} runs this one on "
                        f"{choice.device} ({choice.reason})", where="parallel.gradient_fusion_groups",
                        value=config.gradient_fusion_groups, hint="leave it out")
    keys = config.mindspore.chosen(*(() if choice.backend == "torch" else ("hccl_",)))
    if keys and choice.device != "Ascend":
        what = "MindSpore runs a graph" if choice.backend == "torch" else "Ascend devices talk"
        raise UserError(f"it says how {what}, and {choice.backend} runs this one on {choice.device} ({choice.reason})",
                        where=f"parallel.mindspore.{keys[0]}", value=getattr(config.mindspore, keys[0]),
                        hint="leave it out")
    return choice


def choice_of(settings: RunSettings, ranks: int) -> Choice:
    """`choose` for a run of any model on a number of processes."""
    return choose(settings.parallel.resolve(ranks), settings.train.precision, settings.model.dropout)


def _chosen(config: ParallelConfig, needed: str) -> Choice:
    if config.mindspore.device is not None:
        _need("mindspore")
        return Choice("mindspore", config.mindspore.device, "parallel.mindspore.device says so")
    if has_ascend() and config.backend != "torch":
        return Choice("mindspore", "Ascend", "all layouts run there")
    if config.backend == "mindspore":
        _need("mindspore")
        return Choice("mindspore", "CPU", "parallel.backend says so")
    device = "GPU" if gpus() and torch_has_cuda() else "CPU"
    if config.backend == "torch":
        _need("torch")
        return Choice("torch", device, "parallel.backend says so")
    if device == "GPU":
        return Choice("torch", "GPU", f"{gpus()} NVIDIA GPUs are here")
    if not installed("mindspore"):
        _need("torch")
        return Choice("torch", device, "MindSpore is not installed")
    if needed:
        _need("torch", needed)
        return Choice("torch", device, f"MindSpore runs {needed} on Ascend only")
    return Choice("mindspore", "CPU", "one device" if config.world == 1 else "data parallelism")


def what_needs_torch(config: ParallelConfig, precision: str, dropout: float = 0.0) -> str:
    """What of a layout MindSpore does not do on CPUs, in words; "" if nothing."""
    found = [f"{name} {degree}" for name, degree in config.beyond_data().items()]
    if config.recompute.policy != "none" and dropout:
        found.append("recomputation with dropout")
    if precision != "fp32":
        found.append(f"precision {precision}")
    return ", ".join(found)


def has_ascend() -> bool:
    """Whether this machine has an Ascend device."""
    return any(Path("/dev").glob("davinci[0-9]*"))


def gpus() -> int:
    """How many NVIDIA GPUs this machine has."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def torch_has_cuda() -> bool:
    """Whether the torch that is installed can use NVIDIA GPUs."""
    return installed("torch") and not importlib.metadata.version("torch").endswith("+cpu")


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # sys.modules has None for it
        return False


def _need(package: str, what: str = "") -> None:
    if not installed(package):
        name = "PyTorch" if package == "torch" else "MindSpore"
        raise UserError(f"{what + ': ' if what else ''}{name} is needed and not installed", where="parallel.backend",
                        hint="pip install -c scripts/constraints.txt -e '.[torch]'" if package == "torch"
                        else "pip install -c scripts/constraints.txt -e .")
