"""
processes.py: several processes, started by torchrun, each on a GPU of its own (or on CPUs, by
gloo). The first of them, the chief, alone prints and writes results.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
from torch import nn

from model import UserError

# torch.distributed is imported where it is used: one process needs none, and some builds lack it.
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether torchrun has started this process: it sets all of LAUNCHED. A cluster's scheduler may
    set some by itself, which is refused only where they speak of several processes."""
    missing = [name for name in LAUNCHED if not os.environ.get(name)]
    if missing and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        found = f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {' and '.join(missing)} is not set"
        raise UserError(f"{found}: start by torchrun, or unset WORLD_SIZE for one process.")
    return not missing


def join_processes(device: str) -> str:
    """Under torchrun, joins the other processes, each on a GPU of its own. Returns the device."""
    if not launched():
        return device
    import torch.distributed as dist

    if device == "cuda":
        number, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if number >= there:
            raise UserError(f"there are {there} GPUs: lower --nproc_per_node.")
        device = f"cuda:{number}"
        torch.cuda.set_device(device)
    # One may wait for the others' last questions, or for the losses that the chief measures.
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=7))
    return device


def processes() -> tuple[int, int]:
    """This process's number, and how many there are: (0, 1) unless started by torchrun."""
    if launched():
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return 0, 1


@contextmanager
def together(device: str) -> Iterator[str]:
    """Joins torchrun's processes, and leaves them in the end, once all are there: whoever goes
    before that may break off what others still send. Yields the device of this one; only what the
    chief prints is seen."""
    device = join_processes(device)
    rank, _ = processes()
    with nullcontext() if rank == 0 else redirect_stdout(io.StringIO()):
        yield device
    if launched():
        from_all(None)
        torch.distributed.destroy_process_group()


def spread(layer: nn.Module) -> None:
    """Leaves in this process its share of a layer's frozen weights. They are put together for each
    pass through the layer, forward or backward, and let go after it (FSDP2); nothing is fetched
    ahead. A LoRA that is added later stays whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    _, world = processes()
    kind = next(layer.parameters()).device.type
    fully_shard(layer, mesh=init_device_mesh(kind, (world,)), reshard_after_forward=True)


def from_all(mine: object) -> list:
    """What each process has, by rank. None goes on before all have come here."""
    _, world = processes()
    found = [mine] * world
    if world > 1:
        torch.distributed.all_gather_object(found, mine)
    return found
