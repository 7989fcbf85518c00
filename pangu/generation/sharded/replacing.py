"""The models that a group of processes holds: one, or two while a newer takes the place of an older.

The group's first rank sends int32s: the number of a model and a call of its graphs, or LOAD or DROP with the number of
the model that is meant; an empty message ends. A load is a load of all ranks or of none.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from pangu.generation.sharded.runner import Call, run_call
from pangu.generation.sharded.shapes import KINDS
from parallel.common.errors import UserError

LOAD, DROP = -1, -2
NOTHING = np.zeros(0, np.int32)


class Models:
    """Args:
        member: this process in its group (`parallel.torch_runtime.inference.member.Member`).
        make: a checkpoint's path -> this rank's graphs with its weights and a cache.
        blocks: of the cache.

    Attributes: `lock`, held by the first rank while all ranks do one thing.
    """

    def __init__(self, member: Any, make: Callable[[str], Any], blocks: int) -> None:
        self.member, self.make, self.blocks = member, make, blocks
        self.lock = threading.RLock()
        self.held: dict[int, Any] = {}

    def first(self, rank: Any) -> None:
        """Takes the first model, which has been made."""
        self.held[0] = rank

    def sender(self, number: int) -> Callable[[np.ndarray], None]:
        """What gives the other ranks the calls of a model."""
        return lambda message: self.member.broadcast(np.concatenate([np.array([number], np.int32), message]))

    def load(self, path: str) -> int:
        """Makes a model of a checkpoint on all ranks; its number. For the first rank. Nothing is computed meanwhile.

        Raises:
            UserError: a rank cannot; then none has it.
        """
        with self.lock:
            number = max(self.held) + 1
            self.member.broadcast(np.array([LOAD, number, *path.encode()], np.int32))
            problem = self._take(number, path)
            if problem is not None:
                raise UserError(problem)
            return number

    def drop(self, number: int) -> None:
        """Gives a model up on all ranks. For the first rank."""
        with self.lock:
            self.member.broadcast(np.array([DROP, number], np.int32))
            self._give_up(number)

    def end(self) -> None:
        """Lets the other ranks end. For the first rank."""
        with self.lock:
            self.member.broadcast(NOTHING)
            self.release()

    def follow(self) -> None:
        """Does what the first rank says until it ends."""
        shapes = {kind: self.held[0].shape(kind) for kind in KINDS}
        while len(message := self.member.receive()):
            number = int(message[0])
            if number == LOAD:
                self._take(int(message[1]), bytes(message[2:].astype(np.uint8)).decode())
            elif number == DROP:
                self._give_up(int(message[1]))
            else:
                run_call(self.held[number], Call.unpacked(message[1:]), shapes, self.blocks)

    def release(self) -> None:
        """Gives all captured graphs up."""
        for rank in self.held.values():
            rank.release()

    def _take(self, number: int, path: str) -> str | None:
        """Makes this rank's part; what was wrong on the first rank of those that could not."""
        made, problem = None, None
        try:
            made = self.make(path)
        except UserError as error:
            problem = str(error)
        except (OSError, RuntimeError, MemoryError) as error:
            problem = f"{path} was not loaded: {error!r}"
        problem = next((text for text in self.member.tell_group(problem) if text is not None), None)
        if problem is None:
            self.held[number] = made
        return problem

    def _give_up(self, number: int) -> None:
        self.held.pop(number).release()
