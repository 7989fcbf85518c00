"""How many processes run where, and at which address they meet."""

from __future__ import annotations

import argparse
import socket

from parallel.common.errors import UserError
from parallel.launch.hosts import by_node_rank, own_number, read_hosts
from parallel.sharding.config import ParallelConfig

DEFAULT_PORT = 8118


def add_node_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say how many processes run where."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that take part (default 1)")
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="number of this machine, from 0")
    parser.add_argument("--master", metavar="HOST:PORT",
                        help=f"address of machine 0 and a free port there (default 127.0.0.1:{DEFAULT_PORT}; on a "
                        "single machine any free port)")
    parser.add_argument("--nproc", type=int, metavar="P",
                        help="processes on each machine (default: devices of the parallel block / nodes)")
    parser.add_argument("--hosts", metavar="FILE",
                        help="machines of the run, a name or address a line, rack by rack: gives --nodes, --node-rank "
                             "and --master")
    parser.add_argument("--host", metavar="NAME", help="which line of --hosts is this machine (default: its own names)")
    parser.add_argument("--nodes-per-rack", type=int, metavar="N",
                        help="machines of a rack in --hosts (default: as many as one pipeline needs)")
    parser.add_argument("--max-restarts", type=int, default=0, metavar="N",
                        help="times that all ranks start again from the last complete checkpoint after one has failed "
                             "(default 0)")
    parser.add_argument("--timeout", type=int, default=300, metavar="S",
                        help="seconds to wait for all processes to meet (default 300)")


class Plan:
    """How many processes, on which machine of how many, and where they meet.

    Attributes:
        hosts: names of the machines by node rank, where a file gave them.
        max_restarts: times that all may start again.
    """

    def __init__(self, nodes: int, node_rank: int, host: str, port: int, local: int, timeout: int) -> None:
        self.nodes, self.node_rank, self.host, self.port = nodes, node_rank, host, port
        self.local, self.timeout = local, timeout
        self.is_default = False
        self.hosts: list[str] = []
        self.max_restarts = 0

    @property
    def ranks(self) -> int:
        """Processes on all machines."""
        return self.nodes * self.local

    def name(self, node: int) -> str:
        """A machine, for people."""
        return f"machine {node} ({self.hosts[node]})" if self.hosts else f"machine {node}"

    @classmethod
    def of(cls, arguments: argparse.Namespace, devices: int | None, parallel: ParallelConfig) -> Plan:
        """Checks the flags against each other and the parallel block."""
        if arguments.max_restarts < 0:
            raise UserError("must be at least 0", where="--max-restarts", value=arguments.max_restarts)
        hosts: list[str] = []
        if arguments.hosts is not None:
            hosts = cls._from_hosts(arguments, devices, parallel)
        nodes, node_rank = arguments.nodes, arguments.node_rank
        if nodes < 1 or not 0 <= node_rank < nodes:
            raise UserError(f"must be in [0, {nodes})", where="--node-rank", value=node_rank)
        host, port = _address(arguments.master, nodes)
        if nodes > 1 and node_rank > 0 and host in ("localhost",):
            raise UserError("must name machine 0", where="--master", value=arguments.master)
        local = arguments.nproc or cls._default_local(devices, parallel, nodes)
        if local < 1:
            raise UserError("must be at least 1", where="--nproc", value=local)
        parallel.resolve(nodes * local)
        plan = cls(nodes, node_rank, host, port, local, arguments.timeout)
        plan.is_default = arguments.master is None and nodes == 1
        plan.hosts, plan.max_restarts = hosts, arguments.max_restarts
        return plan

    @classmethod
    def _from_hosts(cls, arguments: argparse.Namespace, devices: int | None, parallel: ParallelConfig) -> list[str]:
        """Fills --nodes, --node-rank and --master from --hosts; names of the machines by node rank."""
        if arguments.nodes != 1 or arguments.node_rank != 0:
            raise UserError("--hosts says which machine is which", where="--nodes, --node-rank",
                            hint="leave them out")
        listed = read_hosts(arguments.hosts)
        local = arguments.nproc or cls._default_local(devices, parallel, len(listed))
        hosts = by_node_rank(listed, parallel.resolve(len(listed) * local), local, arguments.nodes_per_rack)
        arguments.nodes = len(hosts)
        arguments.node_rank = own_number([host.name for host in hosts], arguments.host, arguments.hosts)
        if len(hosts) > 1 and arguments.master is None:
            arguments.master = f"{hosts[0].address}:{DEFAULT_PORT}"
        return [host.name for host in hosts]

    def keep_port(self) -> None:
        """Takes a free port where the user named none: launches that begin together must not meet at one port.

        Raises:
            UserError: the user named the port, and it is taken.
        """
        if self.is_default:
            self.port = free_port()
        check_port(self.host, self.port)

    @staticmethod
    def _default_local(devices: int | None, parallel: ParallelConfig, nodes: int) -> int:
        if devices is None and -1 in (parallel.data, parallel.op):
            raise UserError("the parallel block leaves the number of devices open", where="--nproc",
                            hint="give --nproc or parallel.devices")
        devices = devices or parallel.world
        if devices % nodes:
            raise UserError(f"{devices} devices do not divide over them", where="--nodes", value=nodes)
        return devices // nodes


def check_port(host: str, port: int) -> None:
    """Raises a `UserError` unless this machine can listen at the address."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except socket.gaierror:
        raise UserError("this host is not known", where="--master", value=host) from None
    except OSError as error:
        raise UserError(f"cannot listen here: {error.strerror}", where="--master", value=f"{host}:{port}",
                        hint="choose a free port of this machine (machine 0 listens)") from None


def _address(master: str | None, nodes: int) -> tuple[str, int]:
    """Where the processes meet: what the user says, or the default (on one machine `keep_port` chooses again)."""
    if master is None:
        return "127.0.0.1", DEFAULT_PORT
    host, _, port = master.rpartition(":")
    if not host or not port.isdigit() or not 1024 <= int(port) < 65536:
        raise UserError("must be HOST:PORT with a port of 1024 to 65535", where="--master", value=master)
    return host, int(port)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
