"""Forward passes of rankers on an NVIDIA GPU: exported graphs beside the same network hand-written in torch, and
separated rankers (UG-Sep) beside unseparated ones.

    bash scripts/bench/gpu/rankers/export.sh programs                        # where MindSpore is
    python scripts/bench/gpu/rankers.py --programs programs --run rankmixer_1b_bf16,rankmixer_100m_bf16
    python scripts/bench/gpu/rankers.py --programs programs --separated rankmixer_1b,tokenmixer_500m

The second line compares, for the dense part (tokenization, blocks, heads; its inputs are the groups' vectors) and for
the whole pass (lookups and target attention too), the torch runtime's two modes with the peer, all as CUDA graphs that
take turns, weights cold since they are larger than the second-level cache. Outputs are compared with the peer in
float32 before anything is timed. MFU counts the products as the network writes them, over the peak measured in this run
(8192^3) and over 989 TFLOP/s.

The third line compares, for 100, 500 and 1,000 candidates of one request, three ratios of user to candidate tokens: the
unseparated network on the same tokens ("entangled"), both passes of the separated one ("separated"), both in one graph
whose user's side runs beside the candidates' ("request"; "one lane": behind one another), and its candidate pass alone
on a user state that is there ("cached"). Inputs are the same throughout, but a request's: those of its own graph.
`--device cpu` runs the same on small programs. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
from parallel.torch_runtime.execute import DTYPES  # noqa: E402
from parallel.torch_runtime.fusion.weights import narrowed  # noqa: E402
from parallel.torch_runtime.graph import Graph, Literal  # noqa: E402
from parallel.torch_runtime.program import Program  # noqa: E402
from parallel.torch_runtime.step import measured_tflops  # noqa: E402
from scripts.bench.gpu import ranker_peers as peers  # noqa: E402
from scripts.bench.gpu.kernel_times import profiled  # noqa: E402
from scripts.bench.gpu.ranker_parts import (  # noqa: E402
    DATA_SHEET_TFLOPS,
    Served,
    captured,
    dense_part,
    difference,
    drawn,
    flops,
    in_turns,
    inputs_of,
    smallest_table,
    within,
)

CANDIDATES, RATIOS, SIDES = "100,500,1000", "1:2,1:1,3:1", "separated,request,cached,one lane"


class Bench:
    """One device, its measured peak, and how long a turn takes.

    Args:
        arguments: parsed.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.folder, self.modes = Path(arguments.programs), arguments.modes.split(",")
        self.device = torch.device("cuda:0" if arguments.device == "cuda" else "cpu")
        self.seconds, self.limit, self.parts = arguments.seconds, arguments.limit, arguments.parts.split(",")
        self.candidates, self.ratios = [int(count) for count in arguments.candidates.split(",")], \
            arguments.ratios.split(",")
        self.sides, self.profile = arguments.sides.split(","), arguments.profile
        self.peak = measured_tflops(self.device, torch.bfloat16)

    def figures(self, milliseconds: float, count: float, rows: int) -> dict[str, float]:
        """Milliseconds, samples/s and both MFUs of a pass with so many FLOPs."""
        rate = count / milliseconds / 1e9
        return {"ms": round(milliseconds, 4), "samples_per_second": round(1e3 * rows / milliseconds),
                "mfu": round(rate / self.peak, 4), "mfu_data_sheet": round(rate / DATA_SHEET_TFLOPS, 4)}

    # -- one ranker against the peer ----------------------------------------------------------------------------------

    def forward(self, name: str) -> dict[str, Any]:
        """The dense part and the whole pass of a RankMixer's program beside the peer."""
        program = Program(self.folder / name)
        kind = program.inference_kinds[0]
        graph, rows = program.graph(0, kind), int(kind.rpartition("_")[2])
        inputs = inputs_of(program.tree["shapes"][kind], {"ids": smallest_table(program)}, self.device)
        peer = Peer(program, graph, self.device)
        with torch.no_grad():
            groups = [item.clone() for item in peer.lookups(peer.weights, inputs[0])]
        found: dict[str, Any] = {}
        for part, own, given, plain in (
                ("dense", dense_part(graph), self._fed(groups, dense_part(graph)), lambda: peer.dense(groups)),
                ("whole", graph, inputs, lambda: peer.whole(inputs[0]))):
            if part not in self.parts:
                continue
            with torch.no_grad():
                wide = groups if part == "dense" else peer.lookups.wide(peer.weights, inputs[0])
                wanted = peer.reference(wide)
            entries, checked = {}, {}
            for mode in self.modes:
                make = partial(self._run, program, own, mode, given)
                entries[mode] = self._entry(f"{name} {part} {mode}", checked, mode, make)
            entries["peer"] = self._entry(f"{name} {part} peer", checked, "peer", lambda plain=plain: plain)
            entries = {mode: call for mode, call in entries.items() if call is not None}
            errors = {mode: round(difference(result, wanted), 6) for mode, result in checked.items()}
            times = in_turns(entries, self.device, seconds=self.seconds)
            found[part] = {mode: self.figures(value, flops(own), rows) | {"error": errors[mode]}
                           for mode, value in times.items()}
            if "peer" in times:
                found[part]["x_peer"] = {mode: round(times["peer"] / value, 3) for mode, value in times.items()}
            found[part]["gflops"] = round(flops(own) / 1e9, 1)
            self._show(f"{name} {part}", found[part])
        return found

    def _run(self, program: Program, graph: Graph, mode: str, inputs: list[Tensor]) -> Any:
        function = Served(program, {"own": graph}, mode, self.device).function("own")
        return lambda: function(inputs)

    def _fed(self, groups: list[Tensor], graph: Graph) -> list[Tensor]:
        """The groups' vectors in the order and form of the cut graph's inputs."""
        found, left = [], list(groups)
        for _, kind in graph.inputs:
            place = next(number for number, group in enumerate(left) if group.numel() == _size(kind.shape))
            found.append(left.pop(place).reshape(kind.shape))
        return found

    def _entry(self, what: str, checked: dict[str, Tensor], name: str, make: Any) -> Any:
        """A captured callable, its result in `checked`; None where it failed, with the traceback on stderr."""
        begin = time.perf_counter()
        try:
            with within(self.limit):
                replay, result = captured(make(), self.device)
            checked[name] = result.clone()
        except Exception:
            print(f"{what} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            return None
        print(f"{what}: ready after {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
        return replay

    # -- separated rankers --------------------------------------------------------------------------------------------

    def separated(self, model: str) -> dict[str, Any]:
        """By mode and number of candidates, milliseconds of a request: entangled, and by ratio separated in two passes,
        both passes as one graph in two lanes, and with the user's state at hand."""
        return {mode: self._separated(model, mode) for mode in self.modes}

    def _separated(self, model: str, mode: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        whole, parts = Passes(self.folder / f"ug_{model}", mode, self.device), {}
        for ratio in self.ratios:
            path = self.folder / f"ug_{model}_{ratio.replace(':', '_')}"
            if (path / "program.json.gz").is_file():
                parts[ratio] = Passes(path, mode, self.device)
        for count in self.candidates:
            entries, checked = {}, {}
            together, _ = whole(f"scores_{count}")
            entries["entangled"] = self._entry(f"{model} {mode} entangled {count}", checked, "entangled",
                                               lambda together=together: together)
            for ratio, rank in parts.items():
                for side, call in self._sides(rank, count).items():
                    entries[f"{side} {ratio}"] = self._entry(f"{model} {mode} {side} {ratio} {count}", checked,
                                                             f"{side} {ratio}", lambda call=call: call)
                for side in ("cached", "request"):
                    one, other = (checked.get(f"{name} {ratio}") for name in (side, "separated"))
                    if one is not None and other is not None:
                        found.setdefault(f"{side}_is_separated", {})[f"{ratio} {count}"] = difference(one, other)
            times = in_turns({name: call for name, call in entries.items() if call is not None}, self.device,
                             seconds=self.seconds)
            base = times.get("entangled")
            found[str(count)] = {name: {"ms": round(value, 4), "less": base and round(1 - value / base, 4)}
                                 for name, value in times.items()}
            found[str(count)]["gflops"] = {"entangled": round(flops(whole.graphs[f"scores_{count}"]) / 1e9, 1)} | {
                ratio: round(sum(flops(rank.graphs[kind]) for kind in ("user_1", f"candidates_{count}")) / 1e9, 1)
                for ratio, rank in parts.items()}
            self._show(f"{model} {mode} C={count}", found[str(count)])
            if self.profile and self.device.type == "cuda":
                found[str(count)]["profile"] = {
                    name: profiled(lambda _, call=call: call(), range(5), self.device)
                    for name, call in entries.items() if call is not None}
            entries.clear()
            gc.collect()
        found["numbers"] = self._agrees(parts)
        return found

    def _sides(self, rank: Passes, count: int) -> dict[str, Any]:
        """What is timed of a separated program, as functions of nothing that give the probabilities."""
        user, state = rank("user_1")
        candidates, _ = rank(f"candidates_{count}")
        found = {"separated": lambda: candidates(user()), "cached": lambda: candidates(state)}
        if f"request_{count}" in rank.graphs:
            found["request"], found["one lane"] = rank.request(count), rank.request(count, lanes=False)
        return {name: call for name, call in found.items() if name in self.sides}

    def _agrees(self, parts: dict[str, Passes]) -> dict[str, float]:
        """|fused - exact| / |exact| of both passes of every ratio: the exact mode keeps to the graph node by node."""
        found = {}
        for ratio, own in parts.items():
            scores = []
            for passes in (own, Passes(own.path, "exact", self.device)):
                with torch.no_grad():
                    scores.append(passes(f"candidates_{self.candidates[0]}")[0](passes("user_1")[1]).clone())
            found[ratio] = round(difference(*scores), 6)
        return found

    def _show(self, title: str, figures: dict[str, Any]) -> None:
        print(f"\n{title}", file=sys.stderr)
        for name, value in figures.items():
            print(f"  {name}: {value}", file=sys.stderr)
        sys.stderr.flush()


class Passes:
    """The passes of a program, served in a mode."""

    def __init__(self, path: Path, mode: str, device: torch.device) -> None:
        self.path, self.device, self.program = path, device, Program(path)
        self.graphs = {kind: self.program.graph(0, kind) for kind in self.program.inference_kinds}
        self.served = Served(self.program, self.graphs, mode, device)
        self.rows = dict.fromkeys(("ids", "user_ids"), smallest_table(self.program))

    def request(self, count: int, lanes: bool = True) -> Any:
        """Both passes in one graph, on the inputs of either, as a function of nothing; it gives the probabilities."""
        user, candidates = (inputs_of(self.program.tree["shapes"][kind], self.rows, self.device)
                            for kind in ("user_1", f"candidates_{count}"))
        function = self.served.function(f"request_{count}", (0, 1) if lanes else ())
        return lambda: function([*user, *candidates[2:]])[1]

    def __call__(self, kind: str) -> tuple[Any, Tensor | None]:
        """(a pass as a function: of the state, or of nothing; its result, of a pass without a state)."""
        inputs = inputs_of(self.program.tree["shapes"][kind], self.rows, self.device)
        function = self.served.function(kind)
        if kind.startswith("candidates"):
            return (lambda state: function([state, *inputs[1:]])), None
        with torch.no_grad():
            return (lambda: function(inputs)), function(inputs).clone()


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


class Lookups(peers.Lookups):
    """The peer's lookups, also with the attention's products in float32."""

    def wide(self, weights: peers.Weights, ids: Tensor) -> list[Tensor]:
        """Groups' vectors with float32 products."""
        own = peers.Lookups(self.features, self.missing, peers.attention)
        return own({name: value.float() for name, value in weights.items() if name.startswith("embedding.")}, ids)


class Peer:
    """RankMixer in torch with the weights of a rank: compiled, and in float32 to compare with.

    Args:
        program: whose weights it has, in the type of the products where the graph casts them.
        graph: its pass.
        device: where it runs.
    """

    def __init__(self, program: Program, graph: Graph, device: torch.device) -> None:
        settings = program.settings
        self.weights = {name: drawn(program, name, kind.shape, device).to(DTYPES[kind.dtype])
                        for name, kind in narrowed([graph])[0].parameters}
        self.layers = settings["model"]["layers"]
        self.tasks = len(settings["data"]["labels"])
        missing = [_number(graph.constant(node.inputs[1])) for node in graph.nodes if node.op == "NotEqual"]
        self.lookups = Lookups(settings["data"]["features"], missing, torch.compile(peers.attention, dynamic=False))
        self.compiled = torch.compile(self._dense, dynamic=False)

    def _dense(self, weights: peers.Weights, groups: list[Tensor]) -> Tensor:
        return peers.rankmixer_dense(weights, torch.cat(groups, 1), self.layers, self.tasks)

    def dense(self, groups: list[Tensor]) -> Tensor:
        """Probabilities from the groups' vectors."""
        return self.compiled(self.weights, groups)

    def whole(self, ids: Tensor) -> Tensor:
        """Probabilities from the ids."""
        return self.dense(self.lookups(self.weights, ids))

    def reference(self, groups: list[Tensor]) -> Tensor:
        """Probabilities in float32 from the same weights."""
        wide = {name: value.float() for name, value in self.weights.items() if not name.startswith("embedding.")}
        return self._dense(wide, groups)


def _number(value: Any) -> int:
    return int(value.array().item() if isinstance(value, Literal) else value)


def main() -> int:
    """Runs what the arguments say; the last line of stdout is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", required=True, help="folder with exported programs")
    parser.add_argument("--run", default="", help="programs of RankMixer, with commas between")
    parser.add_argument("--separated", default="", help="models of which there are separated programs")
    parser.add_argument("--modes", default="cuda_graph,inductor", help="of the runtime")
    parser.add_argument("--candidates", default=CANDIDATES, help="of --separated: of a request")
    parser.add_argument("--ratios", default=RATIOS, help="of --separated: user to candidate tokens")
    parser.add_argument("--sides", default=SIDES, help="of --separated: what is timed beside the unseparated network")
    parser.add_argument("--profile", action="store_true", help="of --separated: also where the time goes")
    parser.add_argument("--parts", default="dense,whole", help="of --run: which parts of the pass")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=0.15, help="of a turn; there are five of each")
    parser.add_argument("--limit", type=int, default=600, help="seconds until a callable is ready; then it is left out")
    arguments = parser.parse_args()
    bench, found = Bench(arguments), {}
    print(f"peak {bench.peak:.1f} TFLOP/s", file=sys.stderr, flush=True)
    for call, listed in ((bench.forward, arguments.run), (bench.separated, arguments.separated)):
        for name in filter(None, listed.split(",")):
            try:
                found[name] = call(name)
            except Exception:
                print(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                found[name] = None
            print(json.dumps({name: found[name]}), flush=True)
            gc.collect()
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
    print(json.dumps({"peak_tflops": round(bench.peak, 1), "device": torch.cuda.get_device_name(0)
                      if bench.device.type == "cuda" else "cpu", "found": found}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
