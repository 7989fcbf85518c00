"""What a rank of a program tells a user: too little memory, messages in another order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from parallel.common.errors import UserError  # noqa: E402
from parallel.torch_runtime.graph import Graph, Kind, Node  # noqa: E402
from parallel.torch_runtime.program import Program, Rank, Tensor, Writer  # noqa: E402
from parallel.torch_runtime.step import TorchStep, check_messages  # noqa: E402

NEEDS = {"bytes": 152_300_000_000, "kinds": {"parameters": 1_400_000_000, "activations": 140_000_000_000,
                                             "total": 152_300_000_000},
         "changes": [["parallel.recompute.policy", "full", 31_000_000_000], ["train.accumulation", 2, 80_000_000_000]]}
KIND = Kind((2,), "float32")


def settings() -> dict:
    return {"train": {"seed": 1}}


def written(folder, graphs: list[Graph], **more) -> Program:
    """A program with one graph a rank."""
    writer = Writer(folder)
    messages = sorted({pair for graph in graphs for pair in graph.groups})
    ranks = [Rank(number, 0, 0, 0, {"step": writer.add(graph)}, {"step": graph.groups}, {})
             for number, graph in enumerate(graphs)]
    writer.finish(digest="test", tensors=[Tensor("w", "parameter", (2,), "float32", ("fill", 1.0))],
                  inputs=[("x", (2,), "float32")], ranks=ranks, settings=settings(), groups=[], messages=messages,
                  parallel={"data": 1, "pipeline": {"stages": 1}}, **more)
    return Program(folder)


def sends(op: str, tags: list[int]) -> Graph:
    """A graph that sends (or takes) one message for each tag."""
    nodes = [Node(op, [0], [KIND], {"tag": tag, "group": 0}, number=2 + place) for place, tag in enumerate(tags)]
    return Graph([("x", KIND)], [("w", KIND)], [], nodes, 2, [(0, 1)])


def test_out_of_memory_names_the_key_and_the_estimate(tmp_path, monkeypatch):
    node = Node("Add", [0, 1], [KIND], number=2)
    program = written(tmp_path, [Graph([("x", KIND)], [("w", KIND)], [], [node], 2)], needs=NEEDS)
    step = TorchStep(program, 0, device="cpu", mode="exact")

    class Full:
        graph = program.graph(0)

        def run(self, inputs):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. If reserved ...")

    monkeypatch.setattr(step, "_bound", lambda kind, batch: Full())
    with pytest.raises(UserError) as refused:
        step.run("step", [torch.zeros(2).numpy()])
    line = str(refused.value)
    assert line.startswith("parallel.recompute.policy: out of device memory on rank 0: CUDA out of memory. Tried")
    for part in ("152.3 GB", "activations 140.0", "recompute.policy=full 31.0 GB", "train.accumulation=2 80.0"):
        assert part in line
    assert "\n" not in line


def test_out_of_memory_while_the_state_is_made(tmp_path, monkeypatch):
    node = Node("Add", [0, 1], [KIND], number=2)
    program = written(tmp_path, [Graph([("x", KIND)], [("w", KIND)], [], [node], 2)])

    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(TorchStep, "_start", full)
    with pytest.raises(UserError, match="train.global_batch_size: out of device memory"):
        TorchStep(program, 0, device="cpu", mode="exact")


@pytest.mark.parametrize("name, tflops", [("NVIDIA H200", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA L4", None)])
def test_the_data_sheet_of_a_gpu(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    step = SimpleNamespace(device=torch.device("cuda"))
    assert TorchStep.data_sheet_tflops(step, "bf16") == tflops
    assert TorchStep.data_sheet_tflops(step, "fp32") is None
    assert TorchStep.data_sheet_tflops(SimpleNamespace(device=torch.device("cpu")), "bf16") is None


def test_messages_that_would_be_taken_for_another_are_refused(tmp_path):
    good = written(tmp_path / "good", [sends("Send", [0, 1, 2]), sends("Receive", [0, 1, 2])])
    check_messages(good, 0)
    check_messages(good, 1)
    bad = written(tmp_path / "bad", [sends("Send", [0, 1, 2]), sends("Receive", [0, 2, 1])])
    with pytest.raises(UserError, match=r"message 1 from rank 0 to rank 1 would be taken for another.*--device cpu"):
        check_messages(bad, 1)
    lost = written(tmp_path / "lost", [sends("Send", [0, 1]), sends("Receive", [0])])
    with pytest.raises(UserError, match="message 1 from rank 0"):
        check_messages(lost, 0)
