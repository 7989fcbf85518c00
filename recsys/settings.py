"""What a ranker's run is made of: the blocks of a YAML file under configs/recsys/. Needs no MindSpore."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal

import pydantic
from pydantic import ConfigDict, Field, model_validator

from parallel.common.errors import UserError
from parallel.common.settings import Settings, apply_override, read_yaml_tree
from parallel.sharding.config import ParallelConfig
from parallel.training.settings import (
    EarlyStopSettings,
    OptimizerSettings,
    OutputSettings,
    ScheduleSettings,
    TrainSettings,
)
from recsys.data.features import Feature
from recsys.data.streams.settings import StreamSettings
from recsys.live.settings import PublishSettings
from recsys.models import module_of
from recsys.serving.settings import ServeSettings
from recsys.tables.settings import TableSettings


class SyntheticSettings(Settings):
    """The generated click log (reader `synthetic`)."""

    samples: int = Field(120_000, ge=100, le=10**10)
    """Rows."""
    users: int = Field(1000, ge=10)
    """Users."""
    items: int = Field(500, ge=10)
    """Items."""
    seed: int = Field(1, ge=0)
    """Seed of users, items and clicks."""
    strength: float = Field(1.0, ge=0.0)
    """How far the features decide: multiplies the log-odds."""


class SparkSettings(Settings):
    """Where Spark runs."""

    master: str = "local[*]"
    """Spark master: local[*], spark://host:7077, yarn, ... The log and data.cache must be visible to all its workers,
    and the project be installed there."""
    driver_memory: str = "2g"
    """Memory of the Spark driver (with a local master: of everything in the JVM)."""
    options: dict[str, bool | int | float | str] = Field(default_factory=dict)
    """Further Spark options, such as spark.executor.memory."""


class SplitSettings(Settings):
    """Which rows are for training, validation and test."""

    by: Literal["default", "order", "time", "random", "files"] = "default"
    """default: what suits the reader; order: as they come; time: by the time column; random: by a hash of the row's
    number; files: validation_path and test_path are files of their own."""
    fractions: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of training, validation and test (not for files)."""
    validation_path: str | None = None
    """files: the validation rows."""
    test_path: str | None = None
    """files: the test rows; null = the validation rows."""

    @model_validator(mode="after")
    def _check(self) -> SplitSettings:
        if abs(sum(self.fractions) - 1.0) > 1e-6 or min(self.fractions) < 0 or self.fractions[0] == 0:
            raise UserError("shares are positive and add up to 1", where="data.split.fractions",
                            value=list(self.fractions))
        if self.by == "files" and self.validation_path is None:
            raise UserError("split by files needs validation_path", where="data.split")
        return self


class DataSettings(Settings):
    """The click log and what its columns mean."""

    reader: str = "synthetic"
    """Which file under recsys/data/readers/ reads the log."""
    path: str | None = None
    """File, folder of shards or glob pattern; not for synthetic, redis_stream and kafka."""
    delimiter: str = ","
    """Between the cells of reader csv: one ASCII character, no quote and no line end."""
    quoted: bool = True
    """csv: whether a cell may be in double quotes, which then may hold delimiters and line ends; false: a quote is
    text like any other."""
    features: list[Feature] | None = None
    """Columns that the model reads; null = those the reader knows."""
    history: int = Field(0, ge=0, le=100_000)
    """movielens, kuairand: adds the feature `history`, the items that the user liked before, at most this many, weighed
    by the candidate unless `pooling` says otherwise (`none` for longer); 0 = no such feature."""
    passed: int = Field(0, ge=0, le=100_000)
    """The same for the feature `passed`: items that the user met before and did not like (rated lower, not clicked)."""
    like_rate: bool = False
    """movielens, kuairand: adds the feature `like_rate`, the share of liked items among all that the user met before,
    in 16 buckets. It says most about users whom training has not seen."""
    pooling: dict[str, Literal["mean", "sum", "max", "attention", "none"]] = Field(default_factory=dict)
    """Pooling of single features by name, over what their list says."""
    vocabulary: str | None = None
    """vocabulary.json to read the values with (of another run, or of `refresh`); null = made from the training rows."""
    labels: list[str] | None = None
    """Label columns (0 or 1), one task each; null = the reader's."""
    number_labels: list[str] = Field(default_factory=list)
    """Labels that are numbers (of tasks of kind regression) instead of 0 or 1."""
    missing_labels: bool = False
    """Whether an empty label is allowed: the sample does not count for that task. Otherwise it is a bad row."""
    label_weights: dict[str, str] = Field(default_factory=dict)
    """By label the column of its samples' weights in the loss."""
    user: str | None = None
    """Column whose values group samples for GAUC and UAUC; null = the reader's."""
    time: str | None = None
    """Column of times for split by time; null = the reader's."""
    split: SplitSettings = SplitSettings()
    """Training, validation and test rows."""
    on_bad_row: Literal["error", "skip"] = "error"
    """error: stop at the first row with a wrong label, number or id; skip: leave such rows out and report how many."""
    shuffle: bool = True
    """Whether training rows come in an order drawn anew for every epoch."""
    together: int = Field(1, ge=1)
    """Shuffled training rows keep up to this many of a user's samples one after the other, so that batches hold fewer
    users (see train.share_users)."""
    shards: int = Field(1, ge=1)
    """Parts of consecutive training rows, each of which gives every batch equally many samples; a data-parallel process
    reads only its own parts (their number must divide by that of the processes). Batches depend on the shards and not
    on the processes. 1 = every process reads here and there in the whole log."""
    workers: int = Field(1, ge=1, le=1024)
    """engine local: processes that count and encode the log, a file each (readers csv, parquet, criteo, avazu)."""
    cache: str = "runs/data"
    """Folder for the encoded rows and the vocabulary; they are made once per log and feature list."""
    engine: Literal["local", "spark"] = "local"
    """Who counts and encodes a log: this process, or Spark, a task for each of its files (readers csv, parquet, criteo,
    avazu; any other log is one task). The result is the same, row for row."""
    spark: SparkSettings = SparkSettings()
    """engine spark: where it runs (needs the extra `data`)."""
    synthetic: SyntheticSettings = SyntheticSettings()
    """Sizes of the generated log."""
    stream: StreamSettings = StreamSettings()
    """redis_stream, kafka, tail: how events are read."""
    tables: TableSettings = TableSettings()
    """Where the embedding tables are kept."""

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if len(self.delimiter) != 1 or not self.delimiter.isascii() or self.delimiter in '"\r\n\0':
            raise UserError("one ASCII character, no quote and no line end", where="data.delimiter",
                            value=self.delimiter, hint="write a tab as \"\\t\"")
        return self


class TaskSettings(Settings):
    """One task of a multi-task ranker."""

    name: str
    """Name; tasks are in the order of data.labels."""
    weight: float = Field(1.0, ge=0.0)
    """Factor of its loss."""
    kind: Literal["binary", "regression"] = "binary"
    """binary: a probability; regression: a number (watch time; see data.number_labels)."""
    given: str | None = None
    """binary: a task without which this one cannot happen (buying without a click): the head says how probable it is
    given that one, and what is trained on all samples and served is the product (ESMM's CTCVR)."""
    only_where: str | None = None
    """A task in whose positive samples alone this one is trained and measured (conversion of those who clicked)."""
    loss: Literal["squared", "huber"] = "squared"
    """regression: half the squared error, or Huber's beyond an error of 1."""
    transform: Literal["none", "log"] = "none"
    """regression: log: the head learns log(1 + value); the score is the value again."""
    pairwise: float = Field(0.0, ge=0.0)
    """Factor of a further loss over pairs of one user's samples in a batch (RankNet); see data.together."""
    listwise: float = Field(0.0, ge=0.0)
    """Factor of a further loss over the list of one user's samples in a batch (ListNet)."""

    @model_validator(mode="after")
    def _check(self) -> TaskSettings:
        where = f"model.tasks.{self.name}"
        if self.kind == "regression" and (self.given or self.listwise):
            raise UserError("given and listwise are for binary tasks", where=where)
        if self.kind == "binary" and (self.loss != "squared" or self.transform != "none"):
            raise UserError("loss and transform are for regression", where=where)
        if self.given and (self.pairwise or self.listwise):
            raise UserError("a product along `given` has no logit to compare samples by", where=where)
        return self


class HeadSettings(Settings):
    """What is between the shared representation and each task's head."""

    kind: Literal["shared", "mmoe", "ple"] = "shared"
    """shared: nothing; mmoe: shared experts, mixed by a gate for each task; ple: levels of shared and own experts."""
    experts: int = Field(4, ge=1, le=10_000)
    """mmoe: experts; ple: experts of each task and of the shared part on every level."""
    hidden: int = Field(64, ge=1)
    """Width of an expert."""
    levels: int = Field(2, ge=1, le=10_000)
    """ple: levels."""
    calibration: bool = False
    """A rising line for each task's logit, trained beside the network without moving it: predicted clicks come to
    agree with observed ones, the order of candidates stays."""


class LookupSettings(Settings):
    """How tables that are parameters of the network are sharded and looked up."""

    by: Literal["op", "alltoall"] = "op"
    """op: rows sharded over the op axis, looked up on each device and summed. alltoall: rows sharded over all devices
    of data x op, each once; ids go to the devices that hold their rows and rows come back."""
    capacity_factor: float = Field(2.0, gt=0.0)
    """alltoall: ids that a device may ask of another in one round, over the even share."""
    rounds: int = Field(2, ge=1, le=64)
    """alltoall: exchanges in a step; a later one serves what the one before had no slot for. What finds none in the
    last makes the step not count, and the run end with a line."""


class RankerSettings(Settings):
    """What every ranker has."""

    largest_integer: ClassVar[int] = 1 << 24

    embedding_size: int = Field(16, ge=1)
    """Width of the embeddings of features that name none."""
    embedding_std: float = Field(0.01, gt=0)
    """Sigma of the embeddings' start."""
    lookup: LookupSettings = LookupSettings()
    """Sharding of the tables in the graph."""
    head_hidden: list[int] = Field(default_factory=list)
    """Hidden widths of each task's head; empty = one linear layer."""
    head: HeadSettings = HeadSettings()
    """What is shared and what is not between tasks."""
    tasks: list[TaskSettings] = Field(default_factory=list)
    """Names, loss weights and kinds of the tasks; empty = one for each label, all clicks with weight 1."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Rate on the features' concatenation (embedding dropout)."""

    separable: ClassVar[bool] = False  # whether the model has a form with user and candidate separated

    def separation(self) -> Settings | None:
        """The settings of that form, where it is chosen."""
        return self.ug_sep if self.separable else None

    def depth(self) -> int:
        """Number of layers: the model's own key, 1 where it has none."""
        return dict(self).get("layers", 1)

    def full_capacity(self) -> int | None:
        """The capacity factor under which no routed expert leaves a row out; None without such experts."""
        return None

    def keep_all_rows(self, dropless: bool = False) -> None:
        """Lets routed experts take all rows that choose them, in graphs of static shapes in which what a row gets must
        not depend on its batch; nothing without such experts.

        Args:
            dropless: whether what runs the graph has a grouped product, if the settings ask for one.
        """


class FlatSchedule(ScheduleSettings):
    """A constant learning rate unless said otherwise, as rankers are trained."""

    name: Literal["cosine", "linear", "constant"] = "constant"
    """Shape after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""


class RankerOptimizer(OptimizerSettings):
    """Adam without decay unless said otherwise."""

    name: Literal["adamw", "adam", "lamb", "adagrad", "rmsprop"] = "adam"
    """The papers use rmsprop (RankMixer, dense), adagrad (sparse; TokenMixer-Large both)."""
    learning_rate: float = Field(1e-3, ge=0.0)
    """The largest learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment (adam, adamw, lamb)."""
    weight_decay: float = Field(0.0, ge=0.0)
    """Decoupled decay (adamw, lamb)."""
    schedule: FlatSchedule = FlatSchedule()
    """Learning rate over the steps."""


class SparseOptimizer(RankerOptimizer):
    """Optimizer of the embedding tables."""

    name: Literal["adamw", "adam", "lamb", "adagrad", "rmsprop", "rowwise_adagrad", "lazy_adam", "sgd"] = "adam"
    """With data.tables.place: host, and in the graph with model.lookup.by: alltoall, only rows of the step are touched
    by rowwise_adagrad (one number of state a row), adagrad, lazy_adam (on the host adam means it too), sgd. In the
    graph all others go over whole tables."""


class RankerTrain(TrainSettings):
    """How a ranker is trained."""

    global_batch_size: int = Field(512, ge=1)
    """Samples of one step, over all ranks."""
    steps: int = Field(500, ge=1)
    """Batches to train on."""
    optimizer: RankerOptimizer = RankerOptimizer()
    """Optimizer of the dense part."""
    sparse_optimizer: SparseOptimizer | None = None
    """Optimizer of the embedding tables; null = the same as the dense part's."""
    clip_norm: float | None = Field(None, gt=0.0)
    """Largest global norm of the gradient; null = no clipping."""
    log_every: int = Field(20, ge=1)
    """Steps between lines of the metrics log."""
    early_stop: EarlyStopSettings | None = None
    """Stop before `steps` when validation no longer improves; metrics: auc, gauc, uauc, logloss, validation_loss."""
    start_from: str | None = None
    """Checkpoint or run, perhaps of other features, from which a run without checkpoints of its own starts: parameters
    by name, rows of tables by value, optimizer states anew; a table shows what was kept. Null = start values."""
    share_users: bool = False
    """With model.ug_sep: samples of a batch with equal user columns share one computation of the user side; the loss is
    the same. Pays with data.together."""
    keep_best: Literal["auc", "gauc", "uauc", "logloss"] | None = None
    """Evaluate the parameters of the validation that was best in this metric; null = the last ones."""

    def sparse_settings(self) -> SparseOptimizer | None:
        """See `TrainSettings`."""
        return self.sparse_optimizer


class Run(Settings):
    """All blocks of a ranker's file."""

    model: RankerSettings = RankerSettings()
    """Which ranker, its sizes and choices."""
    data: DataSettings = DataSettings()
    """Click log and features."""
    train: RankerTrain = RankerTrain()
    """Batch, steps, optimizers: `optimizer` for the dense part, `sparse_optimizer` for the tables."""
    parallel: ParallelConfig = ParallelConfig()
    """How the model is sharded over devices."""
    output: OutputSettings = OutputSettings()
    """Where results go."""
    publish: PublishSettings = PublishSettings()
    """Versions for servers that follow the run."""
    serve: ServeSettings = ServeSettings()
    """The HTTP server, where the run's file is what it is started with."""

    @classmethod
    def for_file(cls, path: str | None, overrides: list[str]) -> type[Run]:
        """This class with the `model` block of the model that the file (or an override) names."""
        tree = read_yaml_tree(path) if path is not None else {}
        for override in overrides:
            apply_override(tree, override)
        model = tree.get("model")
        return run_class(model.get("name", "rankmixer") if isinstance(model, dict) else "rankmixer")


@cache
def run_class(name: str) -> type[Run]:
    """`Run` whose `model` block is that of the model `name`."""
    settings = module_of(name).SETTINGS
    field = pydantic.Field(default_factory=settings, description="The ranker's sizes and choices.")
    return pydantic.create_model("Run", __base__=Run, __doc__=Run.__doc__, model=(settings, field))


class ServeRun:
    """Settings of `serve`: of the server alone, or a run's file, whose block `serve` they are; there a key of the block
    may stand without its name, as port=8000."""

    @classmethod
    def for_file(cls, path: str | None, overrides: list[str]) -> type[Settings]:
        """The class that fits the file."""
        if path is None or "model" not in read_yaml_tree(path):
            return ServeSettings
        return _serve_run_class(Run.for_file(path, []))


@cache
def _serve_run_class(run: type[Run]) -> type[Run]:
    def moved(cls: type[Run], tree: Any) -> Any:
        if not isinstance(tree, dict) or not isinstance(tree.get("serve") or {}, dict):
            return tree
        short = {key for key in tree if key in ServeSettings.model_fields and key not in cls.model_fields}
        block = {**(tree.get("serve") or {}), **{key: tree[key] for key in short}}
        return {key: value for key, value in tree.items() if key not in short} | ({"serve": block} if short else {})

    return pydantic.create_model("ServeRun", __base__=run, __doc__=run.__doc__, __validators__={
        "serve_keys": model_validator(mode="before")(classmethod(moved))})


class StoredModel(RankerSettings):
    """A model block with the keys of any model."""

    model_config = ConfigDict(extra="allow")

    name: str
    """Which ranker."""


class StoredRun(Run):
    """A run whose settings were checked before they were stored."""

    model: StoredModel
    """Sizes and choices of the ranker, unchecked."""
