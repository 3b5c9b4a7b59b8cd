"""Training under DDP and FSDP2: two gloo processes give the gradients of one process with all the
data.
"""

import os
import subprocess
import sys

import pytest
import torch

WORKER = """
import os, sys
import torch
import torch.distributed as dist
from one_input import Model
import peft
from loft_rs import LoftConfig

kind, tied, checkpointing = sys.argv[1], sys.argv[2] == "tied", {"plain": None, "checkpoint": False}[sys.argv[3]]
rank = int(os.environ["RANK"])
dist.init_process_group("gloo")


def build():
    torch.manual_seed(0)
    config = LoftConfig(r=6, target_modules=["q", "k", "v", "o"], support="random", init_weights=False, tied=tied)
    return peft.get_peft_model(Model(checkpointing), config)


torch.manual_seed(1)
data = torch.randn(3, 2, 5, 24)
alone, model = build(), build()
model.load_state_dict(alone.state_dict())
trained = lambda m: [p for p in m.parameters() if p.requires_grad]
if kind == "ddp":
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.fsdp import fully_shard

    for block in model.base_model.model.blocks:
        fully_shard(block)
    wrapped = fully_shard(model)
both = [torch.optim.SGD(trained(m), lr=0.05) for m in (alone, model)]
for batch in data:
    (alone(batch.flatten(0, 1)).square().sum() / 2).backward()
    wrapped(batch[rank]).square().sum().backward()
    for optimiser in both:
        optimiser.step()
        optimiser.zero_grad()
whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
for a, b in zip(trained(alone), trained(model), strict=True):
    torch.testing.assert_close(whole(b).detach(), a.detach(), atol=1e-5, rtol=1e-4)
    assert bool((a != 0).any())
print("same", kind, flush=True)
dist.destroy_process_group()
os._exit(0)  # gloo's threads can abort an interpreter that is shutting down (pytorch/pytorch#179291)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize(
    ("kind", "tied", "checkpointing"),
    [
        ("ddp", "tied", "plain"),
        ("ddp", "apart", "checkpoint"),
        ("fsdp2", "apart", "plain"),
        ("fsdp2", "tied", "checkpoint"),
    ],
)
def test_two_processes_train_as_one(kind, tied, checkpointing, tmp_path):
    here = os.path.dirname(__file__)
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([here, *sys.path]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(29500 + os.getpid() % 1000),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), kind, tied, checkpointing],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [run.communicate(timeout=180)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "\n".join(outputs)
