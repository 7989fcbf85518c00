"""The machines of a run from a file, and which number each has.

A line is a name or address, and perhaps the address under which the others reach it; `#` begins a comment. Machines
stand rack by rack, as they stand in the room: which of them is `--node-rank` 0, 1, 2 ... follows from the layout, so
that the stages of a pipeline lie in one rack (`parallel.sharding.topology`).
"""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass
from pathlib import Path

from parallel.common.errors import UserError
from parallel.common.lines import text_lines
from parallel.sharding.config import ParallelConfig
from parallel.sharding.topology import place_nodes

_MOST = 1 << 16
_LONGEST_NAME = 253


@dataclass(frozen=True)
class Host:
    """A machine: how people call it, and the address under which the others reach it."""

    name: str
    address: str


def read_hosts(path: str | Path) -> list[Host]:
    """The machines of a file, in its order.

    Raises:
        UserError: no such file, a line with more than two words, a machine twice, or none.
    """
    found: dict[str, Host] = {}
    for number, line in text_lines(path):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) > 2 or max(map(len, words)) > _LONGEST_NAME or number > _MOST:
            raise UserError("a line is a name and perhaps an address", where=f"{path}, line {number}", value=line)
        if words[0] in found:
            raise UserError("the machine is listed twice", where=f"{path}, line {number}", value=words[0])
        found[words[0]] = Host(words[0], words[-1])
    if not found:
        raise UserError("no machine is listed", where=path, hint="write one name or address a line")
    return list(found.values())


def by_node_rank(listed: list[Host], config: ParallelConfig, local: int,
                 nodes_per_rack: int | None = None) -> list[Host]:
    """The machines in the order of their node ranks.

    Args:
        listed: rack by rack.
        config: resolved for all their devices.
        local: devices of a machine.
        nodes_per_rack: see `place_nodes`.
    """
    nodes = sorted(place_nodes(config, local, nodes_per_rack), key=lambda node: (node.rack, node.node_rank))
    numbered = {node.node_rank: host for node, host in zip(nodes, listed, strict=True)}
    return [numbered[number] for number in range(len(listed))]


def own_number(names: list[str], own: str | None, path: str | Path) -> int:
    """Which of `names` this machine is.

    Args:
        names: of the machines.
        own: what the user says it is called; None = the names and addresses that it has.
        path: of the file, for the error.

    Raises:
        UserError: none of them, or several.
    """
    mine = {own} if own is not None else own_names()
    found = [number for number, name in enumerate(names) if name in mine]
    if len(found) != 1:
        what = "this machine is not listed" if not found else "this machine is listed several times"
        raise UserError(what, where=path, value=own or socket.gethostname(),
                        hint="--host NAME says which line it is")
    return found[0]


def own_names() -> set[str]:
    """Names and addresses by which a file may call this machine."""
    host = socket.gethostname()
    names = {host, host.partition(".")[0], socket.getfqdn()}
    with contextlib.suppress(OSError):
        names.update(str(entry[4][0]) for entry in socket.getaddrinfo(host, None))
    return names
