"""Everything that is to be known about a GPU, in at most 8 minutes; writes docs/gpu.md's figures.

    make gpu                       # fetches tiny Shakespeare first
    python -m bench.gpu --rows training generation

Beside each figure stands the one that arithmetic leads to expect, so that a deviation is seen.
"""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import data.tokenizer
import ppo
import pretrain
from bench import memory, sides
from bench.run import forward_and_backward, rounded, run_steps, table
from data.examples import load_stream
from model import attention, causal_mask
from train import device as its_device
from train.device import setup
from utils.cli import die, parse_config
from utils.files import write_block

ROWS = ("training", "attention", "generation", "PPO", "Shakespeare")


@dataclass
class Config:
    out: str = memory.DOCUMENT  # document whose figures are replaced
    rows: tuple = ROWS  # what to measure
    shakespeare: str = "out/shakespeare"  # made by python -m data.fetch text shakespeare
    quick: bool = False  # tiny sizes: shows that everything runs, measures nothing
    device: str = "auto"  # auto or cuda
    seed: int = 0  # weights and batches


# Peaks by the makers' data sheets: dense TFLOP/s in bfloat16 (float32 on a T4), TB/s of memory.
PEAKS = {
    "H200": (989, 4.8),
    "H100": (989, 3.35),
    "A100": (312, 2.04),
    "L4": (121, 0.30),
    "A10": (125, 0.60),
    "4090": (165, 1.01),
    "3090": (71, 0.94),
    "T4": (8.1, 0.32),
}
# Fractions of the peaks that the figures are expected to reach.
EXPECTED = dict(training=0.45, generation=0.5, attention=0.9)
SHAKESPEARE_LOSS = 1.42  # nanoGPT's README: 1.4697 in its configuration for GPUs

SIZES = dict(
    gpt=dict(vocab_size=50304, n_layer=12, n_head=12, n_embd=768),
    T=1024,
    batches=(32, 16, 8, 4, 2, 1),  # the largest that fits is taken
    steps=10,
    attention_T=(1024, 4096),
    generation=((64, 128, 128), (512, 128, 128)),  # batch, prompt, new tokens
    ppo=dict(batch=128, minibatch=64, epochs=2, prompt=128, new_tokens=128),
    # as nanoGPT's config/train_shakespeare_char.py, without its dropout
    shakespeare=dict(n_layer=6, n_head=6, n_embd=384, T=256, batch=64, steps=600),
)
TINY = dict(
    gpt=dict(vocab_size=300, n_layer=2, n_head=2, n_embd=32),
    T=16,
    batches=(2,),
    steps=1,
    attention_T=(16,),
    generation=((2, 4, 4),),
    ppo=dict(batch=4, minibatch=2, epochs=1, prompt=4, new_tokens=4),
    shakespeare=dict(n_layer=2, n_head=2, n_embd=32, T=16, batch=2, steps=2),
)


def peaks(name):
    """(FLOP/s, bytes/s) of the GPU of this name, or NaN where it is not in the table."""
    for key, (tflops, bandwidth) in PEAKS.items():
        if key in name.split() or key in name.replace("-", " ").split():
            return tflops * 1e12, bandwidth * 1e12
    return float("nan"), float("nan")


def in_gb(n_bytes):
    return f"{n_bytes / 1e9:.1f} GB"


def measured(function, *arguments):
    """(the function's result, bytes at the peak meanwhile)"""
    torch.cuda.reset_peak_memory_stats()
    result = function(*arguments)
    return result, torch.cuda.max_memory_allocated()


def flop_per_token(n_params, sizes, T):
    """Of a training step: 6 a parameter, and 12 T C a layer (PaLM, appendix B)."""
    return 6 * n_params + 12 * sizes["n_layer"] * sizes["n_embd"] * T


# ---- the rows: work, ours, theirs, ratio, expected, memory


def training_rows(s, gpu, device, config):
    """Tokens a second of pretrain.py's compiled step and of a compiled SDPA GPT's."""
    room = gpu.memory - memory.SPARE * 1e9
    c = memory.gpt(**s.gpt, block_size=s.T)
    settings = dict(c=c, T=s.T, compiled=True)
    fitting = [B for B in s.batches if sum(memory.pretraining(rows=B, **settings).values()) < room]
    batch = sides.random_batch(s.gpt, s.T, fitting[0], device)
    n_tokens = fitting[0] * s.T * s.steps
    flop = flop_per_token(memory.n_params(c), s.gpt, s.T)
    expected = EXPECTED["training"] * gpu.flops / flop
    work = f"pretraining step, {memory.n_params(c) / 1e6:.0f}M, {fitting[0]} × {s.T}"
    makers = {
        "AdamW": partial(sides.our_stepper, muon_lr=0.0),
        "Muon": sides.our_stepper,
        "plain GPT, SDPA, compiled, AdamW": sides.plain_stepper,
    }
    seconds, bytes_at_peak = {}, {}
    for name, make in makers.items():
        step = make(s.gpt, s.T, device)[1]
        turn = {name: partial(run_steps, step, batch, s.steps)}
        times, bytes_at_peak[name] = measured(sides.take_turns, 3, turn)
        seconds |= times
    *ours, peer = makers
    for name in ours:
        rate = n_tokens / seconds[name]
        yield (
            f"{work}, {name}",
            f"{rounded(rate)} tokens/s, {rate * flop / gpu.flops:.0%} MFU",
            f"{peer}: {rounded(n_tokens / seconds[peer])}, {in_gb(bytes_at_peak[peer])}",
            f"{seconds[peer] / seconds[name]:.2f}×",
            f"{rounded(expected)} tokens/s at {EXPECTED['training']:.0%} MFU",
            in_gb(bytes_at_peak[name]),
        )


def sdpa_by(backend, q, k, v, _):
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attention_rows(s, gpu, device, config):
    """model.attention with a mask, compiled, against the fastest of PyTorch's kernels without."""
    H, D = s.gpt["n_head"], s.gpt["n_embd"] // s.gpt["n_head"]
    sides.compile_as_by_default(device)
    by_hand = torch.compile(attention) if its_device.compiling else attention
    for T in s.attention_T:
        B = max(1, 16 * s.T // T)
        kind = dict(device=device, dtype=torch.bfloat16, requires_grad=True)
        q, k, v = (torch.randn(B, H, T, D, **kind) for _ in range(3))
        inputs = (q, k, v, causal_mask(torch.arange(T, device=device), T))
        seconds = {}
        backends = dict(flash=SDPBackend.FLASH_ATTENTION, cudnn=SDPBackend.CUDNN_ATTENTION)
        backends |= dict(efficient=SDPBackend.EFFICIENT_ATTENTION, math=SDPBackend.MATH)
        for name, backend in backends.items():
            side = partial(forward_and_backward, partial(sdpa_by, backend), *inputs)
            try:
                seconds |= sides.take_turns(3, {name: side})
            except RuntimeError:
                continue  # not for this GPU
        ours = partial(forward_and_backward, by_hand, *inputs)
        (times, peak), best = (
            measured(sides.take_turns, 3, {"ours": ours}),
            min(seconds, key=seconds.get),
        )
        yield (
            f"attention with a mask, forward and backward, {B} × {T}",
            f"{rounded(times['ours'] * 1e3)} ms",
            f"SDPA, {best}, causal: {rounded(seconds[best] * 1e3)} ms",
            f"{seconds[best] / times['ours']:.2f}×",
            f"{EXPECTED['attention']}×; a mask hides half of the work and does not skip it",
            in_gb(peak),
        )


def generation_rows(s, gpu, device, config):
    """Tokens a second of model.generate, and how near to what the memory's bandwidth allows."""
    for B, P, n in s.generation:
        model = sides.our_generator(s.gpt, P + n, device)
        prompts = torch.randint(s.gpt["vocab_size"], (B, P), device=device)  # (B, P)
        turn = {"ours": partial(sides.generate, model, prompts, n)}
        times, peak = measured(sides.take_turns, 2, turn)
        # a step reads the weights in bfloat16, and in the mean half of the new tokens' cache
        c = model.config
        read = n * (2 * memory.n_params(c) + memory.cache(c, B * (P + n / 2)))
        bound = B * n / (read / gpu.bandwidth)
        rate = B * n / times["ours"]
        yield (
            f"generation, batch {B}, {P} + {n} tokens",
            f"{rounded(rate)} tokens/s",
            f"bandwidth bound: {rounded(bound)}",
            f"{rate / bound:.0%}",
            f"{rounded(EXPECTED['generation'] * bound)} tokens/s, half of the bound",
            in_gb(peak),
        )


def ppo_rows(s, gpu, device, config):
    """Seconds of one iteration of ppo.py, and of its two parts."""
    p, seconds = s.ppo, dict(rollout=[], update=[])

    def timed(name, function, *arguments):
        sides.synchronize()
        start = time.perf_counter()
        result = function(*arguments)
        sides.synchronize()
        seconds[name].append(time.perf_counter() - start)
        return result

    real = {name: getattr(ppo, name) for name in seconds}
    policy, iteration = sides.our_ppo(s.gpt, p, device)
    try:
        for name, function in real.items():
            setattr(ppo, name, partial(timed, name, function))
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):  # the first one warms up
            iteration()
    finally:
        for name, function in real.items():
            setattr(ppo, name, function)
    parts = {name: min(times[1:]) for name, times in seconds.items()}
    T, n = p["prompt"] + p["new_tokens"], memory.n_params(policy.config)
    # sampling at half of the bandwidth bound; four networks read, two train, at 45% of the peak
    step = 2 * n + memory.cache(policy.config, p["batch"] * (p["prompt"] + p["new_tokens"] / 2))
    sampling = p["new_tokens"] * step / gpu.bandwidth / EXPECTED["generation"]
    flop = p["batch"] * T * flop_per_token(n, s.gpt, T)
    rate = gpu.flops * EXPECTED["training"]
    expected = [sampling + 4 * flop / 3 / rate, 2 * p["epochs"] * flop / rate]
    total = sum(parts.values())
    yield (
        f"PPO iteration, {p['batch']} × ({p['prompt']} + {p['new_tokens']}) tokens",
        f"{total:.2f} s: rollout {parts['rollout']:.2f}, update {parts['update']:.2f}",
        "",
        "",
        f"rollout {expected[0]:.2f} s, update {expected[1]:.2f} s",
        in_gb(torch.cuda.max_memory_allocated()),
    )


def shakespeare_rows(s, gpu, device, config):
    """The validation loss of tiny Shakespeare in nanoGPT's configuration for GPUs."""
    folder, size = Path(config.shakespeare), s.shakespeare
    if not folder.exists():
        print(f"Shakespeare: left out, no {folder}; python -m data.fetch makes it")
        return
    T, n_steps = size["T"], size["steps"]
    tokenizer = data.tokenizer.load(folder / "tokenizer.tiktoken")
    train, val = (load_stream(folder, name, tokenizer, T) for name in ("train", "val"))
    separator = tokenizer.separator
    windows = pretrain.Windows(train, T, size["batch"], config.seed, folder, separator)
    sizes = {name: size[name] for name in ("n_layer", "n_head", "n_embd")}
    sizes |= dict(vocab_size=tokenizer.vocab_size)
    model, step = sides.our_stepper(sizes, T, device, steps=n_steps)
    torch.cuda.reset_peak_memory_stats()
    sides.synchronize()
    start = time.perf_counter()
    for i in range(n_steps):
        step(*pretrain.read_windows(train, windows[i], T, device), i)
    sides.synchronize()
    seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated()
    loss = pretrain.validate(model, val, T, device, size["batch"])
    yield (
        f"tiny Shakespeare, {size['n_layer']} layers, {size['n_embd']} wide, {n_steps} steps of "
        f"{size['batch']} × {T}",
        f"validation loss {loss:.3f} in {seconds:.0f} s",
        "nanoGPT's README: 1.4697",
        "",
        f"at most {SHAKESPEARE_LOSS}",
        in_gb(peak),
    )


MEASURE = dict(training=training_rows, attention=attention_rows, generation=generation_rows)
MEASURE |= dict(PPO=ppo_rows, Shakespeare=shakespeare_rows)
HEADER = ("work", "measured", "against", "ratio", "expected", "memory at the peak")


def main():
    config = parse_config(Config, __doc__)
    if unknown := set(config.rows) - set(ROWS):
        die(f"--rows {' '.join(unknown)}: not among {' '.join(ROWS)}")
    if not torch.cuda.is_available():
        die("no CUDA GPU on this machine: nothing to measure, docs/gpu.md stays as it is")
    start = time.time()
    device = setup(dataclasses.replace(config, device="cuda"))
    name = torch.cuda.get_device_name()
    flops, bandwidth = peaks(name)
    total = torch.cuda.get_device_properties(device).total_memory
    gpu = SimpleNamespace(flops=flops, bandwidth=bandwidth, memory=total)
    s = SimpleNamespace(**(TINY if config.quick else SIZES))
    lines = []
    for kind in config.rows:
        for cells in MEASURE[kind](s, gpu, device, config):
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1])
    what = f"{name}, {in_gb(total)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; "
    what += f"{time.time() - start:.0f} seconds in all."
    write_block(config.out, "bench.gpu", f"{what}\n\n{table(HEADER, lines)}")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main()
