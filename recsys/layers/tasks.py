"""What the tasks of a ranker are to each other, and how their scores become one number. Needs no MindSpore.

Shapes: n samples, K tasks, T columns of targets: K labels, then weights of samples, then the group (see `TaskPlan`).
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from parallel.common.errors import UserError
from recsys.settings import TaskSettings

MAX_FORMULA = 1000
_FUNCTIONS: dict[str, Callable] = {"log": np.log, "exp": np.exp, "sqrt": np.sqrt, "min": np.minimum, "max": np.maximum,
                                   "abs": np.abs, "log1p": np.log1p}
_OPERATORS: dict[type, Callable] = {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide,
                                    ast.Pow: np.power}


@dataclass(frozen=True)
class TaskPlan:
    """The tasks in matrices.

    Args:
        tasks: K, in the order of the labels.
        parents: bool [K, K]; row k: the tasks whose conditional probabilities multiply to task k's (itself and those it
            is `given`, all the way).
        conditions: bool [K, K]; row k: the task in whose positive samples alone task k counts, if any.
    """

    tasks: tuple[TaskSettings, ...]
    parents: np.ndarray
    conditions: np.ndarray

    @classmethod
    def of(cls, tasks: Sequence[TaskSettings], count: int) -> TaskPlan:
        """The plan of `model.tasks`; without any, `count` plain ones.

        Raises:
            UserError: a task names another that is not there, or they go round in a circle.
        """
        tasks = tuple(tasks) or tuple(TaskSettings(name=f"task_{index}") for index in range(count))
        names = [task.name for task in tasks]
        parents, conditions = np.eye(len(tasks), dtype=bool), np.zeros((len(tasks), len(tasks)), bool)
        for index, task in enumerate(tasks):
            for key, matrix in (("given", parents), ("only_where", conditions)):
                other = getattr(task, key)
                if other is None:
                    continue
                number = _number(names, other, f"model.tasks.{task.name}.{key}")
                if tasks[number].kind != "binary" or number == index:
                    raise UserError("must be another task of kind binary", where=f"model.tasks.{task.name}.{key}",
                                    value=other)
                matrix[index, number] = True
        for _ in tasks:
            parents = (parents.astype(int) @ parents.astype(int)) > 0
        if (parents & parents.T & ~np.eye(len(tasks), dtype=bool)).any():
            raise UserError("tasks are given each other in a circle", where="model.tasks")
        return cls(tasks, parents, conditions)

    @property
    def plain(self) -> bool:
        """Whether every task is a click: cross-entropy of its own logit over all samples."""
        return all(task == TaskSettings(name=task.name, weight=task.weight) for task in self.tasks)

    @property
    def grouped(self) -> bool:
        """Whether a loss compares samples of one user."""
        return any(task.pairwise or task.listwise for task in self.tasks)

    def predictions(self, logits_nK: np.ndarray) -> np.ndarray:
        """float64 [n, K]: probabilities (products of conditional ones along `given`), or the predicted number."""
        logits = np.asarray(logits_nK, np.float64)
        binary = np.array([task.kind == "binary" for task in self.tasks])
        own = np.where(binary, -np.logaddexp(0.0, -logits), 0.0)
        found = np.exp(own @ self.parents.T.astype(np.float64))
        for index in np.flatnonzero(~binary):
            value = logits[:, index]
            found[:, index] = np.expm1(np.clip(value, -50.0, 50.0)) if self.tasks[index].transform == "log" else value
        return found

    def counted(self, labels_nT: np.ndarray) -> np.ndarray:
        """bool [n, K]: samples that say something about each task."""
        labels = np.asarray(labels_nT)[:, :len(self.tasks)]
        known = ~np.isnan(labels)
        met = (np.nan_to_num(labels) @ self.conditions.T.astype(np.float64)) > 0
        return known & np.where(self.conditions.any(1), met, True)


def _number(names: list[str], name: str, where: str) -> int:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise UserError("there is no such task", where=where, value=name,
                        hint=f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}")
    return names.index(name)


class Formula:
    """One score out of the tasks' scores: `click ** 0.7 * (1 + watch) ** 0.3`, say.

    Numbers, names of tasks, + - * / **, parentheses, and log, log1p, exp, sqrt, abs, min, max. Nothing else is run.

    Args:
        text: the formula.
        names: of the tasks.

    Raises:
        UserError: it is none, or names a task that is not there.
    """

    def __init__(self, text: str, names: Sequence[str]) -> None:
        self.text, self.names = text, list(names)
        if len(text) > MAX_FORMULA:
            raise UserError(f"is longer than {MAX_FORMULA} signs", where="fusion")
        try:
            self.tree = ast.parse(text, mode="eval").body
            self(np.ones((1, len(self.names))))
        except (SyntaxError, RecursionError, MemoryError, ValueError, TypeError):
            raise UserError("is no formula", where="fusion", value=text) from None

    def __call__(self, scores_nK: np.ndarray) -> np.ndarray:
        """float64 [n]; a result that is not a number counts as minus infinity, so that it ranks last."""
        columns = {name: scores_nK[:, index] for index, name in enumerate(self.names)}
        with np.errstate(all="ignore"):
            value = np.broadcast_to(self._value(self.tree, columns), (len(scores_nK),)).astype(np.float64)
        return np.where(np.isnan(value), -np.inf, value)

    def _value(self, node: ast.AST, columns: dict[str, np.ndarray]) -> Any:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return np.float64(node.value)
        if isinstance(node, ast.Name):
            if node.id not in columns:
                _number(self.names, node.id, "fusion")
            return columns[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](self._value(node.left, columns), self._value(node.right, columns))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            value = self._value(node.operand, columns)
            return -value if isinstance(node.op, ast.USub) else value
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
            and not node.keywords):
            return _FUNCTIONS[node.func.id](*(self._value(argument, columns) for argument in node.args))
        raise UserError("is not allowed in a formula", where="fusion", value=ast.unparse(node),
                        hint="numbers, names of tasks, + - * / **, log, log1p, exp, sqrt, abs, min and max")
