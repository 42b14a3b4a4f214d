"""The device that a run computes on, its precision, and one line for the errors it may raise."""

import contextlib
import os
import sys

import torch

from train import parallel
from utils.cli import die


def setup(config):
    """Seeds, picks the device and says what it is. Under torchrun, joins the other processes."""
    name = config.device
    if name == "auto":
        has_mps = torch.backends.mps.is_available()
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "cuda" and parallel.size > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        die(f"--device {name}: {str(e).splitlines()[0]}; use auto, cpu, cuda or mps")
    for flag in ("batch_size", "minibatch_size"):
        size = getattr(config, flag, 0)
        if size % parallel.size:
            die(f"--{flag} {size}: cannot be split evenly over {parallel.size} processes")
    parallel.start(device)
    sys.excepthook = lambda *error: report_uncaught(config, *error)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    processes = f" x {parallel.size} processes" * (parallel.size > 1)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    print(f"device {device}{threads}{processes}, seed {config.seed}")
    return device


def report_uncaught(config, kind, error, traceback):
    """One line for Ctrl-C, lack of memory and numbers that overflowed; all else is a bug."""
    no_memory = issubclass(kind, (torch.OutOfMemoryError, MemoryError))
    no_memory = no_memory or "can't allocate memory" in str(error)
    if no_memory:
        flags = ("micro_batch_size", "batch_size", "seq_len", "block_size")
        flags = [f"--{flag}" for flag in flags if hasattr(config, flag)]
        line = "out of memory"
        if flags:
            line += f"; less is needed with a smaller {' or '.join(flags)}"
    elif kind is KeyboardInterrupt:
        line = "interrupted; no file is half-written"
    elif kind is FloatingPointError:
        line = f"{error}; start again with a lower --lr"
    if "--debug" in sys.argv or not (no_memory or kind in (KeyboardInterrupt, FloatingPointError)):
        return sys.__excepthook__(kind, error, traceback)
    print(f"error: {line}", file=sys.stderr)


def computes_in_bfloat16(device):
    """Whether the device has bfloat16 arithmetic: GPUs since Ampere, CPUs with AVX512-BF16 or AMX.

    Elsewhere it is emulated, and slower than float32.
    """
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return False


def autocast(device):
    """bfloat16 where the device computes in it, float32 elsewhere."""
    if computes_in_bfloat16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def compile_networks(*networks):
    """Compiles the trunks' forward passes, which training and generation share."""
    # PPO's three networks share the code, with and without gradients and cache: 9 graphs. Beyond
    # the limit, 8 by default, PyTorch would go on uncompiled.
    torch._dynamo.config.recompile_limit = 32
    for network in networks:
        network.hidden = torch.compile(network.hidden)
