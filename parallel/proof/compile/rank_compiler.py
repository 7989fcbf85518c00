"""A rank of any cluster, compiled in a process of its own: the Ascend plugin can only be loaded by a fresh process.

The parent starts `python -m parallel.proof.compile.rank_compiler` in the right environment, writes a request
(JSON) into a folder, gives the child the folder, and finds there `graph.mindir` (the partitioned graph), `layouts.json`
(how every parameter is sharded), `result.json` and `log.txt`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import json
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from parallel.common.errors import UserError
from parallel.common.files import read_json
from parallel.torch_runtime.program import KINDS

_PROJECT = Path(__file__).resolve().parents[3]
_LOG_LINES = 30
_DEFECTS = ("ImportError", "ModuleNotFoundError", "AttributeError", "NameError", "KeyError", "AssertionError")
_RECURSION_LIMIT = 100_000
_STACK_BYTES = 1 << 30
_MALLOC = "glibc.malloc.tcache_count=60000"  # small blocks go back to where they came from


@dataclass
class Request:
    """What a child is to compile.

    Args:
        world, rank: size of the cluster and the rank in it.
        config: YAML file of a run.
        overrides: key.sub=value.
        builder: "module:function" called with `arguments`, returning (task, train settings, parallel config), for
            networks without a config file; then `config` is not read.
        arguments: keyword arguments of the builder.
        paths: folders added to sys.path for it.
        compute_dtype: of the matmuls; None = what train.precision says.
        reuse: micro-batches share one copy of the network's graph (see `sharded_step`).
        own_stage: only the layers of the rank's own stage are analysed (see `sharded_step`).
        graph: "step", the training step; "loss", the loss without gradients; "scores", the predictions of a ranker;
            "prefill", "decode" or "score", what generates and scores over a cache.
    """

    world: int
    rank: int
    config: str | None = None
    overrides: list[str] = field(default_factory=list)
    builder: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    compute_dtype: str | None = None
    reuse: bool = True
    own_stage: bool = False
    graph: str = "step"


@dataclass
class Compiled:
    """What a child left.

    Args:
        request: what it was asked.
        graph: bytes of the partitioned graph (`parallel.proof.compile.graph.read_graph`).
        layouts: for each parameter, MindSpore's layout list: device matrix, tensor map, slice shape, ...
        result: figures of the child: seconds, peak_rss_gb, trainable names, inputs, parallel config, micro_batches.
    """

    request: Request
    graph: bytes
    layouts: dict[str, list]
    result: dict[str, Any]


def compile_rank(request: Request, folder: Path | None = None, timeout: float = 3600.0) -> Compiled:
    """Compiles one rank in a fresh process.

    Args:
        request: what to compile.
        folder: where graph, layouts, result and log are kept; None = a temporary folder that is removed.
        timeout: seconds.

    Raises:
        UserError: what the child's own `UserError` said, or that MindSpore refused the layout, with its reason.
    """
    with Compilers(1, timeout) as compilers:
        return compilers.compile([request], folder and [folder])[0]


class Compilers:
    """Processes that compile ranks, `processes` at once. Each imports MindSpore once and forks for every rank, since
    MindSpore can be only one rank in its life. To be used as a context: leaving it ends the processes.

    Args:
        processes: how many at once; they are started when first needed.
        timeout: seconds for each rank.
    """

    def __init__(self, processes: int = 1, timeout: float = 3600.0) -> None:
        self.processes, self.timeout = processes, timeout
        self.idle: queue.SimpleQueue[_Server] = queue.SimpleQueue()
        self.servers = [_Server() for _ in range(processes)]
        for server in self.servers:
            self.idle.put(server)

    def __enter__(self) -> Compilers:
        return self

    def start(self) -> None:
        """Starts the processes ahead of the first compile."""
        for server in self.servers:
            server.start()

    def __exit__(self, *exception: object) -> None:
        for server in self.servers:
            server.stop()

    def compile(self, requests: Sequence[Request], folders: Sequence[Path] | None = None) -> list[Compiled]:
        """The compiled ranks, in the order of the requests.

        Raises:
            UserError: see `compile_rank`; of the first rank that failed.
        """
        with tempfile.TemporaryDirectory(prefix="dryrun-") as scratch:
            paths = [Path(item) for item in folders or [f"{scratch}/{i}" for i in range(len(requests))]]
            with ThreadPoolExecutor(self.processes) as pool:
                try:
                    return list(pool.map(self._compile, requests, paths))
                except BaseException as error:
                    pool.shutdown(wait=False, cancel_futures=True)
                    if not isinstance(error, UserError):
                        self.__exit__()
                    raise

    def _compile(self, request: Request, folder: Path) -> Compiled:
        folder.mkdir(parents=True, exist_ok=True)
        for old in ("result.json", "error.json", "graph.mindir"):
            (folder / old).unlink(missing_ok=True)
        (folder / "request.json").write_text(json.dumps(asdict(request)), encoding="utf-8")
        server = self.idle.get()
        try:
            code = server.answer(folder, self.timeout)
        finally:
            self.idle.put(server)
        if code is None:
            raise UserError("the compile took too long", where=f"rank {request.rank}", value=self.timeout)
        if not (folder / "result.json").is_file():
            raise _failure(request, folder, code)
        return Compiled(request, (folder / "graph.mindir").read_bytes(),
                        read_json(folder / "layouts.json"),
                        read_json(folder / "result.json"))


class _Server:
    """One compiling process: it is given folders with requests and answers with exit codes, a line each."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def start(self) -> subprocess.Popen:
        """The running process; starts it if there is none."""
        if self.process is None:
            from parallel.proof.compile.cann_stubs import library_path

            self.process = subprocess.Popen(
                [sys.executable, "-m", "parallel.proof.compile.rank_compiler"],
                env=child_environment(library_path()), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=tempfile.gettempdir(),
                start_new_session=True, preexec_fn=_raise_stack_limit)
        return self.process

    def answer(self, folder: Path, timeout: float) -> int | None:
        """Exit code of the compile in `folder`; None if it took too long."""
        process = self.start()
        process.stdin.write(f"{folder.resolve()}\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], timeout)[0]:
            self.stop()
            return None
        line = process.stdout.readline().strip()
        return int(line) if line else process.wait()

    def stop(self) -> None:
        """Ends the process and the fork that compiles in it."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()


def _raise_stack_limit() -> None:
    """Deep graphs are traversed recursively; a thread's stack takes the limit at the start of the process."""
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    wanted = _STACK_BYTES if hard == resource.RLIM_INFINITY else min(_STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (wanted, hard))


def child_environment(libraries: str) -> dict[str, str]:
    """Environment of a child: a simulated cluster, the libraries, this project on the path, MindSpore quiet."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MS_", "RANK_"))}
    paths = [str(_PROJECT), environment.get("PYTHONPATH", "")]
    environment |= {
        "MS_SIMULATION_LEVEL": "0", "RANK_SIZE": "1", "RANK_ID": "0", "LD_LIBRARY_PATH": libraries,
        "PYTHONPATH": ":".join(path for path in paths if path), "GLOG_v": "3",
        "GLIBC_TUNABLES": ":".join(filter(None, (environment.get("GLIBC_TUNABLES"), _MALLOC))),
    }  # fmt: skip
    return environment


def _failure(request: Request, folder: Path, code: int) -> Exception:
    error, log = folder / "error.json", folder / "log.txt"
    where = f"rank {request.rank} of {request.world}"
    if error.is_file():
        message = read_json(error)
        if message["kind"] == "UserError":
            return UserError(message["what"], where=message["where"], value=message["value"], hint=message["hint"])
        if message["kind"] in _DEFECTS:
            return RuntimeError(f"{where}: {message['kind']}: {message['what']}")
        return UserError(f"MindSpore did not compile this layout: {message['what']}", where=where)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_LINES:] if log.is_file() else []
    return UserError(f"the compiling process ended with code {code}: {' | '.join(lines)[-600:]}", where=where)


def main() -> int:
    """The child: reads folders from stdin, compiles the request in each in a fork, answers with exit codes."""
    parent = os.getppid()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers goes there
    with contextlib.suppress(Exception):  # reported by the first compile, which has a log
        _import_early()
    for line in sys.stdin:
        folder = Path(line.strip())
        with contextlib.suppress(Exception):
            _import_models(folder)
        fork = os.fork()
        if fork == 0:
            _answer_in_fork(folder)
        print(_exit_code(fork, parent), file=answers, flush=True)
    return 0


def _exit_code(fork: int, parent: int) -> int:
    """Waits for the fork; ends it and itself when whoever asked is gone, for a compile can take all the memory."""
    pause = 0.01
    while True:
        ended, status = os.waitpid(fork, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if os.getppid() != parent:
            os.killpg(0, signal.SIGKILL)
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


def _answer_in_fork(folder: Path) -> None:
    """Compiles and ends the process."""
    code = 1
    gc.disable()  # nothing is collected in so short a life
    try:
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = _answer(folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _import_early() -> None:
    """Everything a compile imports, so that the forks share it; nothing that starts a device."""
    import mindspore.communication  # noqa: F401

    import parallel.training.sharded.step  # noqa: F401
    from parallel.task import build_task  # noqa: F401


def _import_models(folder: Path) -> None:
    """The modules of the request's model."""
    from parallel.task import load_run

    request = read_json(folder / "request.json")
    if request["config"] is not None:
        load_run(request["config"], request["overrides"])


def _answer(folder: Path) -> int:
    request = Request(**read_json(folder / "request.json"))
    os.environ |= {"RANK_SIZE": str(request.world), "RANK_ID": str(request.rank)}
    sys.path[:0] = request.paths
    try:
        _compile(request, folder)
    except UserError as error:
        message = {"kind": "UserError", "what": error.what, "where": str(error.where), "value": error.value,
                   "hint": error.hint}
        (folder / "error.json").write_text(json.dumps(message, default=str), encoding="utf-8")
        return 2
    except Exception as error:
        reason = str(error).split("\n----")[0].strip()
        (folder / "error.json").write_text(json.dumps({"kind": type(error).__name__, "what": reason}), encoding="utf-8")
        raise
    return 0


def _compile(request: Request, folder: Path) -> None:
    started = time.monotonic()
    _pretend_hccl()
    import mindspore as ms
    import numpy as np
    from mindspore.communication import init
    from mindspore.graph.api import _cell_graph_executor

    ms.set_context(mode=ms.GRAPH_MODE)
    # Loops over a thousand parameters are nested calls while a graph is analysed.
    ms.set_recursion_limit(_RECURSION_LIMIT)
    ms.set_device("Ascend")
    init()
    from parallel.proof.dryrun.accounting import coordinates
    from parallel.sharding.layout import redistributing
    from parallel.sharding.parallelize import layers_of_stages
    from parallel.training.sharded.run import evaluation_graph, inference_graph
    from parallel.training.sharded.step import input_shapes, micro_batches, sharded_step

    task, settings, config = _build(request)
    trainable = [parameter.name for parameter in task.network.trainable_params()]
    if request.graph == "step":
        step = sharded_step(task, settings, config, reuse=request.reuse,
                            stage=coordinates(request.rank, config)[0] if request.own_stage else None)
        fed, tensors = task.inputs, _tensors(step.network)
    elif request.graph not in KINDS:
        step, fed, tensors = inference_graph(task, config), task.inputs, _held(task.network)
    else:
        (step, fed), tensors = evaluation_graph(task, config, request.graph), []
    shapes = [item.shape for item in fed] if request.graph not in KINDS else \
        input_shapes(dataclasses.replace(task, inputs=fed), settings, config)
    # Only types matter; np.zeros takes no memory until it is touched.
    inputs = [ms.Tensor(np.zeros(shape, item.dtype)) for shape, item in zip(shapes, fed, strict=True)]
    built = time.monotonic()
    step.compile(*inputs)
    compiled = time.monotonic()
    graph = _cell_graph_executor._get_func_graph_proto(step, step.phase_cache[step.phase], "mind_ir")
    (folder / "graph.mindir").write_bytes(graph)
    (folder / "layouts.json").write_text(json.dumps(step.parameter_layout_dict, default=str), encoding="utf-8")
    result = {
        "trainable": trainable, "parallel": config.model_dump(mode="json"), "figures": task.figures,
        "tokens": task.tokens, "micro_batches": micro_batches(settings, config),
        "layers_of_stages": layers_of_stages(task.network, config),
        "redistributing": redistributing(task.network, config),
        "inputs": [[item.name, list(shape), item.dtype] for shape, item in zip(shapes, fed, strict=True)],
        "whole_inputs": [[item.name, list(item.shape), item.dtype] for item in fed], "tensors": tensors,
        "cpu_seconds": time.process_time(), "build_seconds": built - started, "compile_seconds": compiled - built,
        "seconds": time.monotonic() - started,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _tensors(step: Any) -> list[list]:
    """Name, kind, full shape, type and start of everything that the run of a step keeps (`torch_runtime.program`)."""
    def entry(item: Any, kind: str, start: list) -> list:
        return [item.name, kind, list(item.shape), str(item.dtype).lower(), start]

    counters = {parameter.name for parameter in step.counters()}
    return [*(entry(item, "parameter", _start_of(item)) for item in step.network.get_parameters()
              if item.name not in counters),
            *(entry(item, "state", ["fill", float(item.init_mode.init.value)]) for item in step.optimizer.states()),
            *(entry(item, "counter", ["fill", item.asnumpy().item()]) for item in step.counters())]


def _held(network: Any) -> list[list]:
    """The same of what a network holds that is not trained."""
    return [[item.name, "parameter", list(item.shape), str(item.dtype).lower(), _start_of(item)]
            for item in network.get_parameters()]


def _start_of(item: Any) -> list:
    """How a parameter starts (`parallel.layers.parameter`)."""
    return list(item.start)


def _build(request: Request) -> tuple[Any, Any, Any]:
    from parallel.task import build_task, load_run
    from parallel.training.settings import COMPUTE_DTYPES

    if request.builder is not None:
        module, _, name = request.builder.partition(":")
        return getattr(importlib.import_module(module), name)(**request.arguments)
    dtype = request.compute_dtype
    if dtype is None:
        precision = load_run(request.config, request.overrides)[1].train.precision
        dtype = COMPUTE_DTYPES[precision]
    if request.graph not in KINDS:
        package, settings = load_run(request.config, request.overrides)
        config = settings.parallel.resolve(request.world)
        return package.inference(settings, config, dtype, request.graph), settings.train, config
    task, settings, config = build_task(request.config, request.overrides, request.world, dtype)
    return task, settings.train, config


def _pretend_hccl() -> None:
    """MindSpore imports CANN's Python module for its version only."""
    if importlib.util.find_spec("hccl") is not None:
        return
    package, version = types.ModuleType("hccl"), types.ModuleType("hccl.sys_version")
    version.__sys_version__ = "0"
    package.sys_version = version
    sys.modules |= {"hccl": package, "hccl.sys_version": version}


if __name__ == "__main__":
    sys.exit(main())
