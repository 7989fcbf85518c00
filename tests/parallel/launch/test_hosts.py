"""A file of machines becomes numbers that follow the layout; machines tell each other who is missing or different."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time

import pytest

from parallel.__main__ import VERBS
from parallel.common.command import main
from parallel.common.errors import UserError
from parallel.launch.hosts import by_node_rank, own_number, read_hosts
from parallel.launch.machines import End, machines_of
from parallel.launch.plan import Plan
from parallel.sharding.config import ParallelConfig
from parallel.sharding.topology import place_nodes


def port_before_a_free_one() -> int:
    """Launchers meet at the port after that of the run: two below those that the system gives to others meanwhile."""
    for first in random.sample(range(20000, 32000, 2), 100):
        with socket.socket() as own, socket.socket() as after:
            try:
                own.bind(("127.0.0.1", first))
                after.bind(("127.0.0.1", first + 1))
            except OSError:
                continue
            return first
    raise RuntimeError("no two ports are free")

def test_stages_of_a_pipeline_lie_in_one_rack(tmp_path):
    """200B on 256 machines that stand in 16 racks: machine n of rack d is d + 16 n."""
    path = tmp_path / "hosts"
    path.write_text("# racks of 16\n" + "\n".join(f"r{rack}m{n} 10.0.{rack}.{n}" for rack in range(16)
                                                  for n in range(16)) + "\n")
    config = ParallelConfig(data=16, op=8, pipeline={"stages": 16, "micro_batches": 16}).resolve()
    numbered = by_node_rank(read_hosts(path), config, 8)
    assert all(numbered[rack + 16 * n].name == f"r{rack}m{n}" for rack in range(16) for n in range(16))
    for node, host in zip(place_nodes(config, 8), numbered, strict=True):
        place = host.name.partition("m")[2]
        assert (host.name, host.address) == (f"r{node.rack}m{place}", f"10.0.{node.rack}.{place}")


@pytest.mark.parametrize(("text", "message"), [
    ("a\nb\na\n", "line 3: the machine is listed twice"), ("a b c\n", "a name and perhaps an address"),
    ("# nobody\n", "no machine is listed"),
])
def test_what_is_wrong_in_the_file_is_a_line(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        read_hosts(tmp_path / "hosts")


def test_which_machine_this_is():
    import socket

    assert own_number(["a", socket.gethostname(), "b"], None, "f") == 1
    assert own_number(["a", "b"], "b", "f") == 1
    with pytest.raises(UserError, match="not listed.*--host NAME"):
        own_number(["a", "b"], None, "f")


def test_the_flag_gives_nodes_rank_and_master(tmp_path, capsys):
    (tmp_path / "hosts").write_text("one 127.0.0.1\ntwo\n")
    config = "configs/pangu/tiny.yaml"
    words = ["launch", "--config", config, "--hosts", str(tmp_path / "hosts"), "--nproc", "1", "parallel.data=2",
             f"output.directory={tmp_path}", "--timeout", "1"]
    assert main("parallel", VERBS, [*words, "--host", "two"]) == 2
    assert "machine 0 (one) does not answer at 127.0.0.1:8119" in capsys.readouterr().err
    assert main("parallel", VERBS, [*words, "--host", "one", "--master", f"127.0.0.1:{port_before_a_free_one()}"]) == 2
    assert "machine 1 (two) did not come within 1 s" in capsys.readouterr().err
    assert main("parallel", VERBS, [*words, "--host", "three"]) == 2
    assert "this machine is not listed" in capsys.readouterr().err
    assert main("parallel", VERBS, [*words, "--nodes", "2"]) == 2
    assert "--hosts says which machine is which" in capsys.readouterr().err


def together(facts: list[dict], act, timeout=20) -> list:
    """What `act(machines)` gives or raises on every machine of a run over loopback."""
    port, results = port_before_a_free_one(), [None] * len(facts)

    def one(node):
        plan = Plan(len(facts), node, "127.0.0.1", port, 1, timeout)
        plan.hosts = [f"host{number}" for number in range(len(facts))]
        try:
            machines = machines_of(plan, facts[node])
            with contextlib.closing(machines):
                machines.meet()
                results[node] = act(machines)
        except UserError as error:
            results[node] = error

    threads = [threading.Thread(target=one, args=(node,)) for node in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


FACTS = {"code": "1", "settings": "2", "commit": "abc"}


def test_another_commit_is_named_on_all_machines():
    told = together([FACTS, FACTS, {**FACTS, "code": "9", "commit": "def"}], lambda machines: None)
    for error in told:
        assert "machine 2 (host2) has other code than machine 0 (host0) (commit def there, abc on" in str(error)
    told = together([FACTS, {**FACTS, "settings": "9"}], lambda machines: None)
    assert all("machine 1 (host1) has other settings" in str(error) for error in told)


def test_a_failure_reaches_all_and_they_begin_again_together():
    def act(machines):
        seen = []
        for attempt in range(2):
            machines.ready(attempt)
            node = machines.plan.node_rank
            if attempt == 0 and node != 1:
                while machines.failure() is None:
                    time.sleep(0.01)
            why = "rank 1 was ended by SIGKILL" if (attempt, node) == (0, 1) else ""
            seen.append(machines.ended(End(why, False)))
        return seen

    for seen in together([FACTS] * 3, act):
        assert "rank 1 was ended by SIGKILL" in seen[0].why and not seen[0].final
        assert seen[1] == End("", False)


def test_a_machine_that_is_gone_ends_the_run():
    def act(machines):
        machines.ready(0)
        if machines.plan.node_rank == 1:
            return None
        while machines.failure() is None:
            time.sleep(0.01)
        return machines.ended(End())

    told = together([FACTS] * 3, act)
    assert told[0].final and "machine 1 (host1) is gone" in told[0].why and told[2] == told[0]


def test_what_machines_bring_is_gathered():
    told = together([FACTS] * 3, lambda machines: machines.gather([machines.plan.node_rank]))
    assert told == [[[0], [1], [2]], [], []]
