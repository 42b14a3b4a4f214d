"""Data-parallel runs: `torchrun --nproc_per_node=N <stage>.py`, on one machine or on several.

Every process holds the whole model and takes its share of each batch. Gradients are summed
before the optimizer's step, so the number of processes changes no result beyond rounding.
Without torchrun the functions here change nothing. Process 0 alone prints and writes files.
"""

import os
import sys

import torch
import torch.distributed as dist

launched = dist.is_torchelastic_launched()  # RANK and WORLD_SIZE alone may be a cluster's own
rank = int(os.environ["RANK"]) if launched else 0
size = int(os.environ["WORLD_SIZE"]) if launched else 1


def start(device):
    """Joins the other processes. All but the first fall silent, except for errors."""
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if rank:
            sys.stdout = open(os.devnull, "w")


def shard(*batches):
    """This process's rows of a batch, or of several: neighbours, as many as the others have."""
    shards = []
    for rows in batches:
        first, end = len(rows) * rank // size, len(rows) * (rank + 1) // size
        shards.append(rows[first:end])
    return shards if len(shards) > 1 else shards[0]


def gather(batch):
    """The whole batch from each process's shard of it, {name: tensor (b, ..)} -> {name: (B, ..)}.

    Columns differ where the shards' longest rows do: zeros fill up the shorter ones.
    """
    if size == 1:
        return batch
    shards = [None] * size
    dist.all_gather_object(shards, {name: x.cpu() for name, x in batch.items()})
    gathered = {}
    for name, x in batch.items():
        parts = [part[name] for part in shards]
        if x.dim() > 1:
            T = max(part.size(1) for part in parts)
            parts = [torch.nn.functional.pad(part, (0, T - part.size(1))) for part in parts]
        gathered[name] = torch.cat(parts).to(x.device)
    return gathered


def all_reduce_sum(x):
    """The sum of a tensor over the processes, without gradient."""
    if size == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def sum_gradients(model):
    """Replaces each gradient by its sum over the processes."""
    for parameter in model.parameters() if size > 1 else ():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)


def broadcast_weights(model):
    """Gives the model process 0's weights: the same seed may round differently on another GPU."""
    for tensor in model.state_dict().values() if size > 1 else ():
        dist.broadcast(tensor, 0)
