"""The launchers of a run's machines among themselves: who is there, whether they are alike, who has failed.

Machine 0 listens at the port after the run's. The others connect before anything is compiled and send their facts; one
that is missing, or runs other code or settings, is named on all of them. The connections stay open while the ranks run:
so a machine whose ranks have failed, or that is gone, ends the ranks of all, and all begin again together
(`--max-restarts`). Messages are lines of JSON of bounded length.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parallel.common.errors import UserError
from parallel.common.progress import info
from parallel.common.structured import parse_object
from parallel.launch.plan import Plan

_LONGEST_LINE = 1 << 20
_REPORT_SECONDS = 20.0
_RETRY_SECONDS = 0.5


@dataclass(frozen=True)
class End:
    """How ranks have ended: what went wrong ("" = nothing), and whether to begin again cannot help."""

    why: str = ""
    final: bool = False


class Machines:
    """This machine among those of a run; the base is a run of one machine, which never waits.

    Attributes:
        facts: of every machine, by node rank.
    """

    def __init__(self, plan: Plan, facts: dict[str, Any]) -> None:
        self.plan, self.facts = plan, {plan.node_rank: facts}

    def meet(self) -> None:
        """Waits for all machines and compares them.

        Raises:
            UserError: one did not come, or has other code or settings.
        """

    def ready(self, attempt: int) -> None:
        """Waits until all machines are ready to start the ranks of an attempt.

        Raises:
            UserError: a machine is gone.
        """

    def failure(self) -> str | None:
        """What has become of another machine, in words; None = all run on."""
        return None

    def ended(self, end: End) -> End:
        """Sends the others how this machine's ranks have ended and waits for theirs; how the run has ended on all."""
        return end

    def gather(self, facts: Any) -> list[Any]:
        """What every machine brings, on machine 0; [] on the others.

        Raises:
            UserError: a machine is gone.
        """
        return [facts]

    def close(self) -> None:
        """Leaves the others."""


def machines_of(plan: Plan, facts: dict[str, Any]) -> Machines:
    """This machine among those of a plan."""
    if plan.nodes == 1:
        return Machines(plan, facts)
    return _Chief(plan, facts) if plan.node_rank == 0 else _Member(plan, facts)


def compared(every: dict[int, dict[str, Any]], names: Callable[[int], str]) -> str | None:
    """The first machine that differs from machine 0 in "code" or "settings", in words; None if there is none."""
    first = every[0]
    for node, facts in sorted(every.items()):
        for what in ("code", "settings"):
            if facts.get(what) != first.get(what):
                commits = f" (commit {facts.get('commit')} there, {first.get('commit')} on {names(0)})"
                return f"{names(node)} has other {what} than {names(0)}{commits if what == 'code' else ''}"
    return None


class _Line:
    """A connection that carries lines of JSON; what comes in goes into a queue as (line, message), None at its end."""

    def __init__(self, connection: socket.socket, into: queue.Queue) -> None:
        self.connection, self.into = connection, into
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.thread = threading.Thread(target=self._read, daemon=True, name="machines")
        self.thread.start()

    def send(self, **message: Any) -> bool:
        """Sends a message; False if nobody is there."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self.connection.makefile("rb") as file:
            while line := file.readline(_LONGEST_LINE):
                self.into.put((self, parse_object(line)))
        self.into.put((self, None))

    def close(self) -> None:
        """Ends the connection."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class _Chief(Machines):
    """Machine 0: all others are connected to it."""

    def __init__(self, plan: Plan, facts: dict[str, Any]) -> None:
        super().__init__(plan, facts)
        self.lines: dict[int, _Line] = {}
        self.came: queue.Queue = queue.Queue()
        self.lost: str | None = None
        self.began = time.monotonic()
        self.state: dict[str, dict[int, Any]] = {"ready": {}, "ended": {}, "facts": {}}
        self.server = socket.socket()
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self.server.bind((plan.host, plan.port + 1))
        except OSError as error:
            raise UserError(f"cannot listen here: {error.strerror}", where="--master",
                            value=f"{plan.host}:{plan.port + 1}",
                            hint="the launchers meet at the port after the one that is named") from None
        self.server.listen(plan.nodes)
        threading.Thread(target=self._accept, daemon=True, name="machines").start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            _Line(connection, self.came)

    def meet(self) -> None:
        """See `Machines`."""
        self.began, report = time.monotonic(), _REPORT_SECONDS
        deadline = self.began + self.plan.timeout
        while len(self.facts) < self.plan.nodes:
            missing = sorted(set(range(self.plan.nodes)) - self.facts.keys())
            if time.monotonic() > deadline:
                self._refuse(f"{self._listed(missing)} did not come within {self.plan.timeout} s",
                             "start the same command there, or see that it reaches this machine")
            if time.monotonic() - self.began > report:
                info(f"waiting for {self._listed(missing)}")
                report *= 2
            self._take(0.2)
        slow = [(facts["came"], node) for node, facts in self.facts.items() if "came" in facts]
        if slow and max(slow)[0] > _REPORT_SECONDS:
            info(f"{self.plan.name(max(slow)[1])} came last, after {max(slow)[0]:.0f} s")
        wrong = compared(self.facts, self.plan.name)
        if wrong is not None:
            self._refuse(wrong, "use the same commit and the same settings on all machines of a run")
        self._send_all(met=True)

    def _listed(self, nodes: list[int]) -> str:
        return ", ".join(map(self.plan.name, nodes[:8])) + (f" and {len(nodes) - 8} more" if len(nodes) > 8 else "")

    def _refuse(self, why: str, hint: str) -> None:
        self._send_all(refused=why, hint=hint)
        raise UserError(why, where="launch", hint=hint)

    def _send_all(self, **message: Any) -> None:
        for line in self.lines.values():
            line.send(**message)

    def _take(self, seconds: float) -> None:
        """Takes one message, if one comes."""
        try:
            who, message = self.came.get(timeout=seconds)
        except queue.Empty:
            return
        node = next((node for node, line in self.lines.items() if line is who), None)
        if message is None:
            if node is not None and self.lost is None:
                self.lost = f"{self.plan.name(node)} is gone"
        elif "node" in message:
            self._met(who, message)
        elif node is not None:
            for kind in self.state:
                if kind in message:
                    self.state[kind][node] = message[kind]

    def _met(self, line: _Line, message: dict[str, Any]) -> None:
        node = message["node"]
        if not isinstance(node, int) or not 0 < node < self.plan.nodes or node in self.lines:
            line.send(refused=f"there is already a machine with --node-rank {node}, or there are fewer machines",
                      hint="give each machine a number of its own")
            line.close()
            return
        self.lines[node] = line
        self.facts[node] = {**message, "came": time.monotonic() - self.began}

    def ready(self, attempt: int) -> None:
        """See `Machines`."""
        self._wait_for("ready", lambda sent: sent == attempt)
        if self.lost is not None:
            self._refuse(self.lost, "its own output says why")
        self.state["ended"] = {}
        self._send_all(go=attempt)

    def _wait_for(self, kind: str, wanted: Callable[[Any], bool]) -> None:
        others = set(range(1, self.plan.nodes))
        while self.lost is None and not all(wanted(self.state[kind].get(node)) for node in others):
            self._take(0.2)

    def failure(self) -> str | None:
        """See `Machines`."""
        while not self.came.empty():
            self._take(0.0)
        for node, (why, _) in self.state["ended"].items():
            if why:
                return f"{why} ({self.plan.name(node)})"
        return self.lost

    def ended(self, end: End) -> End:
        """See `Machines`."""
        why = end.why or self.failure() or ""
        if why:
            self._send_all(end=why)
        self._wait_for("ended", lambda sent: sent is not None)
        why = why or self.failure() or ""
        final = end.final or self.lost is not None or any(final for _, final in self.state["ended"].values())
        self._send_all(all_ended=[why, final])
        return End(why, final)

    def gather(self, facts: Any) -> list[Any]:
        """See `Machines`."""
        self._wait_for("facts", lambda sent: sent is not None)
        if self.lost is not None:
            self._refuse(self.lost, "its own output says why")
        self._send_all(gathered=True)
        return [facts, *(self.state["facts"][node] for node in sorted(self.state["facts"]))]

    def close(self) -> None:
        """See `Machines`."""
        self.server.close()
        for line in self.lines.values():
            line.close()


class _Member(Machines):
    """A machine after the first, connected to it."""

    def __init__(self, plan: Plan, facts: dict[str, Any]) -> None:
        super().__init__(plan, facts)
        self.came: queue.Queue = queue.Queue()
        self.line: _Line | None = None
        self.received: dict[str, Any] = {}
        self.lost: str | None = None

    def meet(self) -> None:
        """See `Machines`."""
        deadline = time.monotonic() + self.plan.timeout
        address = (self.plan.host, self.plan.port + 1)
        while self.line is None:
            try:
                self.line = _Line(socket.create_connection(address, timeout=5.0), self.came)
            except socket.gaierror:
                raise UserError("this host is not known", where="--master", value=self.plan.host) from None
            except OSError as error:
                if time.monotonic() > deadline:
                    raise UserError(f"{self.plan.name(0)} does not answer at {address[0]}:{address[1]}: {error}",
                                    where="launch", hint="start the same command there first") from None
                time.sleep(_RETRY_SECONDS)
        self.line.send(node=self.plan.node_rank, **self.facts[self.plan.node_rank])
        self._wait_for("met")

    def _wait_for(self, *kinds: str, value: Any = None) -> str:
        """Which of `kinds` comes first from machine 0."""
        while True:
            self._take(0.2)
            for kind in kinds:
                if kind in self.received and (value is None or self.received[kind] == value):
                    return kind
            if self.lost is not None:
                raise UserError(self.lost, where="launch", hint="its own output says why")

    def _take(self, seconds: float) -> None:
        try:
            _, message = self.came.get(timeout=seconds)
        except queue.Empty:
            return
        if message is None:
            self.lost = self.lost or f"{self.plan.name(0)} is gone"
        elif "refused" in message:
            raise UserError(str(message["refused"]), where="launch", hint=str(message.get("hint", "")))
        else:
            self.received.update(message)

    def ready(self, attempt: int) -> None:
        """See `Machines`."""
        self.received.pop("end", None)
        self.received.pop("all_ended", None)
        self.line.send(ready=attempt)
        self._wait_for("go", value=attempt)

    def failure(self) -> str | None:
        """See `Machines`."""
        while not self.came.empty():
            self._take(0.0)
        return self.received.get("end") or self.lost

    def ended(self, end: End) -> End:
        """See `Machines`."""
        self.line.send(ended=[end.why, end.final])
        try:
            self._wait_for("all_ended")
        except UserError as error:
            return End(end.why or str(error), True)
        return End(*self.received["all_ended"])

    def gather(self, facts: Any) -> list[Any]:
        """See `Machines`."""
        self.line.send(facts=facts)
        self._wait_for("gathered")
        return []

    def close(self) -> None:
        """See `Machines`."""
        if self.line is not None:
            self.line.close()
