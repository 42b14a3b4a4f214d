"""A run split over processes: `torchrun --nproc_per_node=N <stage>.py`, on one machine or, with torchrun's flags, on several.

Every process holds the whole model and takes its rows of each batch; gradients are added up before the optimizer's
step, so a stage divides its loss by counts over the whole batch. So N changes no result beyond rounding, and without
torchrun every function here gives back what it got. Process 0 alone prints and writes files.
"""

import os
import sys

import torch
import torch.distributed as dist

launched = dist.is_torchelastic_launched()  # RANK and WORLD_SIZE alone may be a cluster's own
rank = int(os.environ["RANK"]) if launched else 0
size = int(os.environ["WORLD_SIZE"]) if launched else 1


def start(device):
    """Joins the other processes; all but the first fall silent, except for errors."""
    if size > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if rank:
            sys.stdout = open(os.devnull, "w")


def mine(rows):
    """This process's share of the rows of a batch: neighbours, and as many as the others have, or one more or less."""
    return rows[len(rows) * rank // size : len(rows) * (rank + 1) // size]


def gather(rows):
    """The rows of all processes in their order, the inverse of mine: of lists, or of tensors (b, ..) -> (B, ..)."""
    if size == 1:
        return rows
    parts = [None] * size
    dist.all_gather_object(parts, rows.cpu() if torch.is_tensor(rows) else rows)
    return torch.cat(parts).to(rows.device) if torch.is_tensor(rows) else sum(parts, [])


def rand(n):
    """torch.rand for the share of a batch of n rows: draws for all of them, so that N changes no row's numbers."""
    return lambda _, *sizes, **options: mine(torch.rand(n, *sizes, **options))


def total(x):
    """The sum of a tensor over the processes, without gradient."""
    if size == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def add_gradients(model):
    """Replaces each gradient by its sum over the processes."""
    for parameter in model.parameters() if size > 1 else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def start_alike(parts):
    """Gives the networks among the parts the weights of process 0; the same seed on another GPU may round otherwise."""
    for part in parts if size > 1 else ():
        for tensor in part.state_dict().values() if isinstance(part, torch.nn.Module) else ():
            dist.broadcast(tensor, 0)
