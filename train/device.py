"""The device that a run computes on, its precision, and one line for the errors it may raise."""

import contextlib
import functools
import os
import sys

import torch
from torch.utils._triton import has_triton

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
        if device.type == "cuda":  # streams and memory figures are those of the current one
            torch.cuda.set_device(device.index or 0)
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
    global compiling
    compiling = should_compile(config, device)
    processes = f" x {parallel.size} processes" * (parallel.size > 1)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    how = ", compiled" * compiling
    print(f"device {device}{threads}{processes}{how}, seed {config.seed}")
    return device


def report_uncaught(config, kind, error, traceback):
    """One line for Ctrl-C, lack of memory and numbers that overflowed; all else is a bug."""
    no_memory = issubclass(kind, (torch.OutOfMemoryError, MemoryError))
    # what a CPU and Apple's MPS say
    texts = ("can't allocate memory", "out of memory")
    no_memory = no_memory or any(text in str(error) for text in texts)
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


def to_device(x, device):
    """A copy of a tensor on the CPU; a GPU gets it from pinned memory, so that nobody waits."""
    if device.type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


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


# ---- compiling

compiling = False  # whether what is marked @compiled is; setup decides


def should_compile(config, device):
    """As --compile or --no-compile says; without either on CUDA, where it pays, not elsewhere."""
    wanted = getattr(config, "compile", False)
    if wanted is None:
        wanted = device.type == "cuda"
    if wanted and device.type == "cuda" and not has_triton():
        print("no triton for this GPU: the run is not compiled, and slower")
        return False
    return wanted


@functools.cache
def compiled_version(function):
    # PPO's three networks share the code, with and without gradients and cache. Beyond the
    # limit, 8 graphs by default, PyTorch would go on uncompiled.
    torch._dynamo.config.recompile_limit = 32
    return torch.compile(function)


def compiled(function):
    """Marks what --compile compiles: a model's forward pass together with the loss it ends in.

    In one graph the loss reads the logits as they are made. Outside of it, PyTorch would write
    them in float32, several times: 3.3 GB each for 16 x 1024 tokens and GPT-2's vocabulary.
    """

    @functools.wraps(function)
    def call(*args, **kwargs):
        chosen = compiled_version(function) if compiling else function
        return chosen(*args, **kwargs)

    return call
