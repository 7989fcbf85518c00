"""Training and loading of rankers whose tables lie on the host."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from parallel.common.errors import UserError
from parallel.training.device import Processes
from parallel.training.optimizers.run import Optimizer
from parallel.training.settings import COMPUTE_DTYPES
from parallel.training.sharded.run import unsharded_network
from parallel.training.trainer import Trainer
from recsys.data.features import FeatureSpec
from recsys.data.log import Log
from recsys.evaluation.log_metrics import Evaluation
from recsys.layers.sizes import count
from recsys.live.publisher import publisher_of
from recsys.network import loss_network
from recsys.ranker import Scores, TrainingLoss
from recsys.tables.exchange import exchange_of
from recsys.tables.host import HostTables
from recsys.tables.names import is_sparse
from recsys.tables.step import Hosted, HostedBackend, TableStep, dense_parameters
from recsys.training.any_backend import batches_of, keep_vocabulary, run_of
from recsys.training.validation import Best, evaluation_batch, validation_rows

if TYPE_CHECKING:
    from recsys.settings import Run


def train_hosted(settings: Run, log: Log, processes: Processes) -> dict:
    """`recsys.train.train` with tables on the host; over several processes these hold the rows of different ids.

    Raises:
        UserError: settings that only tables in the graph know.
    """
    from recsys.training.fit import check_device, finish, start_values

    options = settings.train
    if options.share_users:
        raise UserError("is for tables in the graph", where="train.share_users", value=True, hint="set it to false")
    backend, network = hosted_backend(settings, log.spec, len(log.labels), processes)
    tables, batch = backend.hosted.tables, options.global_batch_size // processes.ranks
    check_device(settings, network.model, processes)
    start_values(settings, network, log, tables)
    batches = batches_of(settings, log, processes.rank, processes.ranks)
    rows = validation_rows(settings, log.parts["validation"])
    # The windows have places for a batch of this process, no more.
    evaluation = Evaluation(network.model, rows, log.labels, min(evaluation_batch(settings, rows), batch),
                            scores=backend.scorer, backend=backend)
    best = Best(settings, evaluation, lambda: dense_parameters(network), processes.rank, tables=tables)
    counted = count(network)
    if processes.rank == 0:
        keep_vocabulary(log, Path(settings.output.directory))
    publisher = publisher_of(settings, backend, log.spec, tables=tables)
    trainer = Trainer(backend, run_of(settings, counted, batches, ranks=processes.ranks, evaluate=[best],
                                      companions=[tables, *([publisher] if publisher is not None else [])]))
    figures = finish(settings, log, trainer, best, counted)
    return {**figures, "parameters": counted["dense_parameters"], **tables.figures()}


def hosted_backend(settings: Run, spec: FeatureSpec, tasks: int,
                   processes: Processes) -> tuple[HostedBackend, TrainingLoss]:
    """The backend of a run with tables on the host, and its network, whose parameters have no values yet.

    Raises:
        UserError: another backend than MindSpore, or more than data parallelism.
    """
    options = settings.train
    if settings.parallel.backend == "torch":
        raise UserError("on a stream tables on the host are trained by MindSpore", where="parallel.backend",
                        value="torch", hint="leave it out, or set data.tables.place: graph")
    if settings.data.tables.hot_rows is not None and processes.ranks > 1:
        raise UserError("hot rows are for one process", where="data.tables.hot_rows",
                        value=settings.data.tables.hot_rows, hint="set it to null")
    parallel = settings.parallel.resolve(processes.ranks)
    if beyond := parallel.beyond_data():
        raise UserError("with tables on the host MindSpore runs data parallelism only", where="parallel",
                        value=", ".join(f"{name} {degree}" for name, degree in beyond.items()),
                        hint="parallel.backend=torch runs data x op")
    batch = options.global_batch_size // processes.ranks
    tables = HostTables(settings, spec, batch, exchange_of(processes, settings.data.tables.exchange_kb << 10))
    network = loss_network(settings, tables.window, tasks, COMPUTE_DTYPES[options.precision])
    options = unsharded_network(network, options, parallel)
    dense = [parameter for parameter in network.trainable_params() if not is_sparse(parameter.name)]
    step = TableStep(network, Optimizer(dense, options.optimizer, options.steps), options, group=processes.group,
                     rank=processes.rank, ranks=processes.ranks)
    return HostedBackend(step, tables, Hosted(Scores(network.model), network, tables)), network
