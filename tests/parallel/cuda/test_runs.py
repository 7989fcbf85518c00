"""MindSpore's CUDA backend on stand-ins of the CUDA libraries: what compiles for it, and runs from the user's command
through validation, checkpoint and resume. Kernels compute nothing here, so no number means anything."""

import json
import os
import platform
import subprocess
import sys

import pytest

from parallel.launch.plan import free_port
from tests.parallel.cuda.stand_ins import build, has_cuda_backend

pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    platform.machine() != "x86_64" or not has_cuda_backend(), reason="the wheel has no CUDA backend here")]
SMALL = ["model.layers=2", "model.hidden_size=64", "model.heads=2"]
ON_GPU = ["parallel.backend=mindspore", "parallel.mindspore.device=GPU", "train.peak_tflops=1.0", "train.log_every=1",
          "output.tensorboard=false", "output.loss_curve=false"]
COMPILE = """
import sys
import numpy as np
from parallel.sharding.config import MindSporeConfig
from parallel.training.device import start_device
start_device(MindSporeConfig(device="GPU"))
import mindspore as ms
from parallel.layers.parameter import initialize
from parallel.task import build_task
from parallel.training.optimizers.run import run_optimizer
from parallel.training.settings import COMPUTE_DTYPES
from parallel.training.step import TrainStep
for config in sys.argv[2:]:
    task, settings, _ = build_task(config, ["train.precision=" + sys.argv[1], "train.global_batch_size=8"], 1,
                                   COMPUTE_DTYPES[sys.argv[1]])
    initialize(getattr(task.network, "model", task.network), 0)
    step = TrainStep(task.network, run_optimizer(task.network.trainable_params(), settings.train, task.is_sparse),
                     settings.train)
    step.compile(*[ms.Tensor(np.zeros(item.shape, item.dtype)) for item in task.inputs])
    print("compiled", config)
"""


COPIES = """
import sys
import numpy as np
from pangu.build import build
from parallel.checkpoint.tensors import ParameterTensor
from parallel.task import load_run
from parallel.training.device import start_device
from parallel.training.mindspore_backend import ShardedBackend
from parallel.training.sharded.run import ShardedRun
settings = load_run("configs/pangu/tiny.yaml", sys.argv[1:])[1]
processes = start_device(settings.parallel.mindspore)
config = settings.parallel.resolve(2)
run = ShardedRun(build(settings, config, "float32"), settings.train, config, processes)
table = next(p for p in run.task.network.get_parameters() if p.name.endswith("word.table"))
for number, value in enumerate((3.0, 5.0)):
    if run.stage == 0:
        ParameterTensor(table, sliced=True).assign(np.full(run.holder.shapes[table.name], value, np.float32))
    run.copies_are_old = number == 0
    run.refresh_copies()
    assert not run.copies_are_old
    print("table of stage", run.stage, float(table.asnumpy().min()), float(table.asnumpy().max()), flush=True)
run.barrier()
"""


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    """The variables of a machine with GPUs."""
    return {**os.environ, **build(tmp_path_factory.mktemp("cuda"))}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Packed records and the keys that name them."""
    folder = tmp_path_factory.mktemp("records")
    text = folder / "text.jsonl"
    lines = ({"text": f"第{i}天，他在河边走了{i * 7 % 97}里路。" * 12} for i in range(200))
    text.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    keys = [f"data.corpus={text}", f"data.directory={folder / 'records'}", f"data.tokenizer={folder / 'v.model'}",
            "model.vocabulary_size=80"]
    for verb in ("train-vocabulary", "pack"):
        command(["pangu", verb, "--config", "configs/pangu/tiny.yaml", *keys], os.environ)
    return keys


def command(words, variables):
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=variables, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


LAYOUTS = {
    "data 2": ["parallel.data=2"],
    "op 2": ["parallel.op=2"],
    "op 2, sequence, recomputed, fp16": ["parallel.op=2", "parallel.sequence=true", "parallel.recompute.policy=full",
                                         "train.precision=fp16"],
    "stages 2": ["parallel.pipeline.stages=2", "parallel.pipeline.micro_batches=4"],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_train_validate_and_save(name, cuda, records, tmp_path):
    run = ["parallel", "launch", "--config", "configs/pangu/tiny.yaml", "--nproc", "2", *records, *SMALL, *ON_GPU,
           *LAYOUTS[name], "train.steps=2", "train.validate_every=2", "train.validation_batches=1",
           f"output.directory={tmp_path}"]
    figures = command(run, cuda)
    assert figures["steps"] == 2 and figures["world"] == 2 and figures["backend"] == "mindspore"
    assert "validation_loss" in figures and (tmp_path / "checkpoints" / "step_00000002").is_dir()


def test_a_sharded_run_resumes_under_another_layout(cuda, records, tmp_path):
    run = ["parallel", "launch", "--config", "configs/pangu/tiny.yaml", "--nproc", "2", *records, *SMALL, *ON_GPU,
           "train.validate_every=null", "train.validation_batches=1", f"output.directory={tmp_path}"]
    command([*run, "parallel.data=2", "parallel.optimizer.shard=-1", "train.steps=2"], cuda)
    figures = command([*run, "parallel.op=2", "train.steps=3", "--resume"], cuda)
    assert figures["steps"] == 3 and figures["layout"] == "op 2"
    steps = [row["step"] for row in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
             if "loss" in row]
    assert steps == [1, 2, 3]


def test_a_stage_that_borrows_the_table_gets_what_its_owner_has(cuda, tmp_path):
    keys = [*SMALL, *ON_GPU, "parallel.pipeline.stages=2", "parallel.pipeline.micro_batches=2"]
    port = str(free_port())
    shared = {**cuda, "MS_WORKER_NUM": "2", "MS_SCHED_HOST": "127.0.0.1", "MS_SCHED_PORT": port, "RANK_SIZE": "2"}
    workers = ({"MS_ROLE": "MS_WORKER", "MS_NODE_ID": rank, "RANK_ID": rank} for rank in "01")
    started = []
    for number, role in enumerate([{"MS_ROLE": "MS_SCHED"}, *workers]):
        with open(tmp_path / f"{number}.log", "w") as log:
            text = COPIES if number else "import mindspore.communication as c; c.init()"
            started.append(subprocess.Popen([sys.executable, "-c", text, *keys], stdout=log, stderr=log,
                                            env={**shared, **role}))
    try:
        codes = [child.wait(timeout=600) for child in started[1:]]
    finally:
        for child in started:
            child.kill()
            child.wait()
    logs = [(tmp_path / f"{number}.log").read_text() for number in (1, 2)]
    assert codes == [0, 0], logs[1][-2000:]
    assert "table of stage 0 5.0 5.0" in logs[0], logs[0][-2000:]
    # The second time nothing was old, so nothing was sent.
    assert logs[1].count("table of stage 1 3.0 3.0") == 2, logs[1][-2000:]


RANKERS = [f"configs/recsys/{name}.yaml" for name in (
    "rankmixer", "rankmixer_ug_sep", "tokenmixer_large", "tokenmixer_large_ug_sep", "tokenmixer_large_moe", "dcnv2",
    "autoint", "dhen", "dlrm_mlp", "hiformer", "wukong", "longer")]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_every_model_compiles(precision, cuda):
    done = subprocess.run([sys.executable, "-c", COMPILE, precision, "configs/pangu/tiny.yaml", *RANKERS],
                          capture_output=True, text=True, env=cuda, timeout=1800)
    assert done.stdout.count("compiled") == len(RANKERS) + 1, done.stdout + done.stderr[-3000:]
