"""All optimizers of a run: which parameter belongs to which, with what schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mindspore import Parameter, Tensor, nn, ops

from parallel.common.errors import UserError
from parallel.layers.embedding import RowTable
from parallel.training.optimizers.budget import BudgetFactors, holds_budget
from parallel.training.optimizers.dense import OPTIMIZERS, HandOver
from parallel.training.optimizers.rows import ROW_OPTIMIZERS
from parallel.training.schedules import LearningRate
from parallel.training.settings import OptimizerSettings, TrainSettings


def pick(items: tuple, index: int) -> Tensor:
    """items[index], for maps over indices."""
    return items[index]


class Optimizer(nn.Cell):
    """All optimizers of a run with their schedules; each parameter belongs to the first group that claims it.

    Args:
        parameters: the trainable parameters, in the order of the gradients.
        settings: optimizer of the parameters that no group claims.
        steps: steps of the run (end of the learning-rate decay unless the schedule says otherwise).
        groups: pairs (claims(parameter) -> bool, settings), tried in order; factors that hold a budget are a last one.
        tables: layers whose gradients are of rows; a group that claims one's table claims all of them and no others.
        handed: owns the parameters of the only group, instead of its settings' optimizer.
    """

    def __init__(self, parameters: Sequence[Parameter], settings: OptimizerSettings, steps: int,
                 groups: Sequence[tuple[Callable[[Parameter], bool], OptimizerSettings]] = (),
                 tables: Sequence[RowTable] = (), handed: HandOver | None = None) -> None:
        super().__init__(auto_prefix=False)
        parameters = list(parameters)
        if not parameters:
            raise UserError("the network has no trainable parameter", where="optimizer")
        budgets, groups = len(groups), [*groups, (holds_budget, settings)]
        owners = [next((g for g, (claims, _) in enumerate(groups) if claims(p)), len(groups)) for p in parameters]
        choices = [*(own for _, own in groups), settings]
        own_tables = {id(table.table) for table in tables}
        self.members, self.by_rows, cells, rates = [], (), [], []
        # The parameters without a group come first: their rate is the one that the log shows.
        for group in (len(groups), *range(len(groups))):
            members = tuple(i for i, owner in enumerate(owners) if owner == group)
            if members:
                own = choices[group]
                self.members.append(members)
                mine = [parameters[i] for i in members]
                self.by_rows += (bool(own_tables & set(map(id, mine))),)
                if handed is not None and group == 0:
                    cells.append(handed)
                elif group == budgets:
                    cells.append(BudgetFactors(mine))
                elif self.by_rows[-1]:
                    cells.append(ROW_OPTIMIZERS[own.name](mine, own, [table.accumulator for table in tables]))
                else:
                    cells.append(OPTIMIZERS[own.name](mine, own))
                rates.append(LearningRate(own, steps))
        self.members, self.map = tuple(self.members), ops.HyperMap()
        self.cells_of_groups, self.rates = nn.CellList(cells, auto_prefix=False), nn.CellList(rates, auto_prefix=False)

    def construct(self, gradients: tuple, step: Tensor, finite: Tensor | None = None, rows: tuple = ()) -> Tensor:
        """Updates all parameters and returns the learning rate of the main group, a float32 scalar.

        rows: the numbers of the rows of those gradients that are of rows (`row_gradients`), whose optimizer takes them.
        finite: None, or whether this step counts, for graphs that cannot branch; where it is false, gradients (all 0,
        which the caller sees to), a rate of 0 and held states leave everything as it was.
        """
        done = self.rates[0](step)
        for group in range(len(self.members)):
            own = gradients
            if len(self.members) > 1:
                own = self.map(ops.partial(pick, gradients), self.members[group])
            rate = self.rates[group](step)
            if finite is not None:
                rate = ops.select(finite, rate, ops.zeros_like(rate))
            if self.by_rows[group]:
                done = ops.depend(done, self.cells_of_groups[group](own, rate, step, finite, rows))
            else:
                done = ops.depend(done, self.cells_of_groups[group](own, rate, step, finite))
        return done

    def learning_rate(self, step: Tensor) -> Tensor:
        """The main group's learning rate at `step`."""
        return self.rates[0](step)

    def states(self) -> list[Parameter]:
        """The moments of all groups."""
        own = {id(p) for cell in self.cells_of_groups for p in cell.parameters}
        return [p for p in self.get_parameters() if id(p) not in own]


def run_optimizer(parameters: Sequence[Parameter], train: TrainSettings,
                  is_sparse: Callable[[str], bool] | None = None, tables: Sequence[RowTable] = (), *,
                  given: bool = False) -> Optimizer:
    """The optimizer of a run: `train.sparse_optimizer`, where it is set, owns the parameters whose name `is_sparse`.

    Args:
        parameters: trainable.
        train: the `train:` block.
        is_sparse: see `parallel.task.Task`.
        tables: layers whose gradients are of rows (`row_gradients.row_tables`); their tables are all that `is_sparse`.
        given: see `Task.given`.
    """
    if given:
        handed = HandOver(parameter for parameter in parameters if is_sparse(parameter.name))
        return Optimizer(parameters, train.optimizer, train.steps,
                         [(lambda parameter: is_sparse(parameter.name), train.optimizer)], handed=handed)
    sparse = train.sparse_settings() or (train.optimizer if tables else None)
    groups = [(lambda parameter: is_sparse(parameter.name), sparse)] if sparse is not None and is_sparse else []
    return Optimizer(parameters, train.optimizer, train.steps, groups, tables)
