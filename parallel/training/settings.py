"""The `train:` and `output:` blocks that every run file has, and what else is asked of its settings. Docstrings below
the fields are the manual."""

from __future__ import annotations

from typing import Any, Literal, Protocol

import pydantic

from parallel.common.errors import UserError
from parallel.common.settings import Settings
from parallel.sharding.config import ParallelConfig

COMPUTE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Names of the element types of the matrix products, by `train.precision`."""


class ScheduleSettings(Settings):
    """Learning rate over the steps: linear warm-up from 0, then a decay from `learning_rate` to `end_learning_rate`."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up. `cosine` and `linear` fall to end_learning_rate at decay_steps and stay there."""

    warmup_steps: int = pydantic.Field(2000, ge=0)
    """Steps of linear warm-up from 0 to learning_rate (PanGu-alpha: 2000)."""

    decay_steps: int | None = pydantic.Field(None, ge=1)
    """Step at which the decay ends, counted from step 0 and not from the end of the warm-up (as the released
    PanGu-alpha code does); null = the number of steps of the run."""

    end_learning_rate: float = pydantic.Field(0.0, ge=0.0)
    """Learning rate at the end of the decay (PanGu-alpha 2.6B: 1e-6)."""


class OptimizerSettings(Settings):
    """One optimizer and its schedule."""

    name: Literal["adamw", "adam", "lamb", "adagrad", "rmsprop"] = "adamw"
    """adamw: Adam with decoupled weight decay. adam: weight_decay must be 0. lamb: AdamW's update scaled to each
    parameter's norm. adagrad and rmsprop: the usual choices for sparse tables and dense layers of rankers."""

    learning_rate: float = pydantic.Field(1e-4, ge=0.0)
    """The largest learning rate, reached at the end of the warm-up."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment (adam, adamw, lamb)."""

    epsilon: float = pydantic.Field(1e-8, gt=0.0)
    """Added to the root of the second moment (all optimizers; outside the root)."""

    weight_decay: float = pydantic.Field(0.1, ge=0.0)
    """Decoupled decay of matrices and tables (adamw, lamb). Layer-norm parameters and biases are never decayed."""

    bias_correction: bool = True
    """Divide the moments by 1 - beta^step (Adam as published). The released PanGu-alpha code does not: false."""

    decay: float = pydantic.Field(0.9, ge=0.0, lt=1.0)
    """Decay of the mean square (rmsprop)."""

    momentum: float = pydantic.Field(0.0, ge=0.0, lt=1.0)
    """Momentum of the scaled gradient (rmsprop)."""

    initial_accumulator: float = pydantic.Field(0.0, ge=0.0)
    """What the sum of squares starts from (adagrad)."""

    schedule: ScheduleSettings = ScheduleSettings()
    """Learning rate over the steps."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> OptimizerSettings:
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise UserError("betas must be in [0, 1)", where="train.optimizer.betas", value=list(self.betas))
        if self.schedule.end_learning_rate > self.learning_rate:
            raise UserError("the schedule ends above its start", where="train.optimizer.schedule.end_learning_rate",
                            value=self.schedule.end_learning_rate, hint=f"at most {self.learning_rate}")
        return self


class LossScaleSettings(Settings):
    """Scaling of the loss so that half-precision gradients neither vanish nor overflow."""

    name: Literal["auto", "none", "static", "dynamic"] = "auto"
    """auto: dynamic when precision is fp16, else none."""

    initial: float = pydantic.Field(2.0**32, ge=1.0)
    """First (dynamic) or only (static) scale. PanGu-alpha starts at 2^32 and finds its own way down."""

    factor: float = pydantic.Field(2.0, gt=1.0)
    """The scale is divided by this after a non-finite step and multiplied by it after a clean window (dynamic)."""

    window: int = pydantic.Field(1000, ge=1)
    """Clean steps in a row before the scale grows (dynamic)."""


class EarlyStopSettings(Settings):
    """Stop when a validation metric no longer improves."""

    metric: str = "validation_loss"
    """Name of the metric, as the log shows it."""

    mode: Literal["min", "max"] = "min"
    """min: smaller is better; max: larger is better."""

    patience: int = pydantic.Field(3, ge=1)
    """Validations without improvement before the run stops."""

    minimum_change: float = pydantic.Field(0.0, ge=0.0)
    """Less than this does not count as an improvement."""


class ProfileSettings(Settings):
    """Which steps are profiled."""

    start: int = pydantic.Field(10, ge=1)
    """The first step of the window, counted from 1; the first steps of a run compile and warm up."""

    steps: int = pydantic.Field(3, ge=1)
    """Steps in the window."""


class TrainSettings(Settings):
    """How a model is trained, whatever the model."""

    global_batch_size: int = pydantic.Field(8, ge=1)
    """Sequences (or samples) of one optimizer step, over all ranks and micro-batches."""

    accumulation: int = pydantic.Field(1, ge=1)
    """Micro-batches per step whose gradients are added before the update; memory falls, the result stays the same."""

    steps: int = pydantic.Field(1000, ge=1)
    """Batches to train on. A step skipped for a non-finite gradient counts."""

    seed: int = pydantic.Field(1, ge=0, lt=2**31)
    """Seed of the initial parameters, the data order and dropout."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the matrix products (parameters, moments, norms, softmax and loss stay float32). fp32 on the CPU."""

    optimizer: OptimizerSettings = OptimizerSettings()
    """The optimizer of all parameters, or of the dense ones where the tables have one of their own."""

    clip_norm: float | None = pydantic.Field(1.0, gt=0.0)
    """Largest global norm of the gradient; null = no clipping."""

    loss_scale: LossScaleSettings = LossScaleSettings()
    """Scaling of the loss for fp16."""

    validate_every: int | None = pydantic.Field(100, ge=1)
    """Steps between validations; null = only at the end."""

    validation_batches: int | None = pydantic.Field(None, ge=1)
    """Batches of a validation; null = all of the validation source."""

    log_every: int = pydantic.Field(10, ge=1)
    """Steps between lines of the metrics log (the mean loss of these steps)."""

    early_stop: EarlyStopSettings | None = None
    """Stop before `steps` when validation no longer improves; null = never."""

    max_skipped: int = pydantic.Field(100, ge=1)
    """Give up after this many non-finite steps in a row."""

    peak_tflops: float | None = pydantic.Field(None, gt=0.0)
    """Peak of one device in TFLOP/s for the MFU; null = on the CPU the measured speed of a large matrix product,
    elsewhere no MFU."""

    profile: ProfileSettings | None = None
    """Profile some steps: one trace for each rank in `<output.directory>/profile`, by torch.profiler (JSON for
    chrome://tracing and Perfetto) or MindSpore's profiler (for MindStudio Insight); null = none."""

    stall_after: float | None = pydantic.Field(None, gt=0.0)
    """Seconds after which a rank that waits for others ends the run, telling its number, the step, the collective and
    its stack; longer than the slowest compile of a rank, validation or checkpoint. null = as long as the backend
    waits. MindSpore tells no collective: the whole step counts, from the second on."""

    data_sink: bool = False
    """Feed log_every steps to the device at once (Ascend only)."""

    @pydantic.model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if self.global_batch_size % self.accumulation:
            raise UserError("accumulation does not divide global_batch_size", where="train.accumulation",
                            value=self.accumulation, hint=f"choose a divisor of {self.global_batch_size}")
        return self

    def sparse_settings(self) -> OptimizerSettings | None:
        """Of the optimizer that embedding tables have to themselves; None = they have the same one."""
        return None


class OutputSettings(Settings):
    """Where a run writes and what it keeps."""

    directory: str = "runs/default"
    """Folder of the run: checkpoints/, metrics.jsonl, loss.png, tensorboard/."""

    checkpoint_every: int | None = pydantic.Field(500, ge=1)
    """Steps between checkpoints; null = only at the end."""

    keep: int = pydantic.Field(2, ge=1)
    """Newest checkpoints kept; older ones are deleted after the next is complete."""

    resume: str = "auto"
    """auto: go on from the newest checkpoint in `directory`, from scratch if there is none. never: from scratch;
    refused where checkpoints exist, so that none is lost. Anything else is the path of a checkpoint to go on from."""

    save_in_background: bool = False
    """Write checkpoints while training goes on: the state is copied to host memory (each rank what it writes of it),
    one checkpoint is under way at a time, and a stop or the end of the run waits for it. false: training waits."""

    shared_disk: bool = True
    """Whether all machines of a run see the same `directory`. true: every slice is written once. false: once a machine,
    so that each finds on its own disk what its ranks hold."""

    save_optimizer: bool = True
    """Save moments beside the parameters; without them a run cannot be resumed."""

    tensorboard: bool = True
    """Write TensorBoard event files."""

    loss_curve: bool = True
    """Draw loss.png at every validation and at the end."""


class ModelBlock(Protocol):
    """What the `model:` block of every model has."""

    @property
    def name(self) -> str:
        """Which model."""

    @property
    def dropout(self) -> float:
        """Rate while training; 0 = none."""


class RunSettings(Protocol):
    """The blocks that the file of every run has. The class is the model's (`parallel.task.ModelPackage`)."""

    @property
    def model(self) -> ModelBlock:
        """Sizes and choices of the model."""

    @property
    def train(self) -> TrainSettings:
        """Batch, steps, optimizer."""

    @property
    def parallel(self) -> ParallelConfig:
        """How the model is sharded over devices."""

    @property
    def output(self) -> OutputSettings:
        """Where results go."""

    def model_dump(self, **options: Any) -> dict[str, Any]:
        """See pydantic."""

    def model_copy(self, **options: Any) -> RunSettings:
        """See pydantic."""
