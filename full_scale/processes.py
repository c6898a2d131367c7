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
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from model import UserError


def join_processes(device: str) -> str:
    """Under torchrun, joins the other processes, each on a GPU of its own. Returns the device."""
    if "LOCAL_RANK" not in os.environ:
        return device
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
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def together(device: str) -> Iterator[str]:
    """Joins torchrun's processes, and leaves them in the end. Yields the device of this one; only
    what the chief prints is seen."""
    device = join_processes(device)
    rank, _ = processes()
    with nullcontext() if rank == 0 else redirect_stdout(io.StringIO()):
        yield device
    if dist.is_initialized():
        dist.destroy_process_group()


def spread(layer: nn.Module) -> None:
    """Leaves in this process its share of a layer's frozen weights. They are put together for each
    pass through the layer, forward or backward, and let go after it (FSDP2); nothing is fetched
    ahead. A LoRA that is added later stays whole."""
    _, world = processes()
    kind = next(layer.parameters()).device.type
    fully_shard(layer, mesh=init_device_mesh(kind, (world,)), reshard_after_forward=True)


def from_all(mine: object) -> list:
    """What each process has, by rank. None goes on before all have come here."""
    _, world = processes()
    found = [mine] * world
    if world > 1:
        dist.all_gather_object(found, mine)
    return found
