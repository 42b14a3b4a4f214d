"""Speed, side by side with what users would pick instead, and how cost grows with the work.

    python -m bench.run     # all rows that need no one else's code, to out/bench.md
    python -m bench.run --trl_python path/to/python --rows generation PPO

The two sides of a row take turns and each figure is the median of its repetitions, so other
programs disturb both alike.
"""

import dataclasses
import os
import platform
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import data.tokenizer
import pretrain
from bench import sides
from data.examples import load_stream
from model import attention, causal_mask
from train.device import setup
from utils.cli import die, parse_config
from utils.files import atomic, write_text

ROWS = ("pretraining", "attention", "Shakespeare", "generation", "PPO", "growth")


@dataclass
class Config:
    out: str = "out/bench.md"  # report to write; the picture goes beside it
    rows: tuple = ROWS  # what to measure
    shakespeare: str = "out/shakespeare"  # made by python -m data.fetch text shakespeare
    trl_python: str = ""  # interpreter of an environment with trl==1.12.0, for the row PPO
    repetitions: int = 5  # turns each side takes
    quick: bool = False  # tiny sizes: shows that everything runs, measures nothing
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # weights and batches


# What is measured: on a CPU, on a GPU, with --quick.
GPT2 = dict(vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
TINY = dict(vocab_size=300, n_layer=2, n_head=2, n_embd=32)
PPO = dict(batch=128, minibatch=64, epochs=4, prompt=16, new_tokens=16)
TINY_PPO = dict(batch=4, minibatch=2, epochs=1, prompt=4, new_tokens=4)
SIZES = {
    "model": (dict(vocab_size=2048, n_layer=6, n_head=4, n_embd=256), GPT2, TINY),
    "T": (128, 1024, 16),
    "batch": (32, 32, 2),
    "attention_T": ((128, 1024), (1024, 4096), (16,)),
    # (batch, prompt, new tokens)
    "generation": ([(32, 32, 96)], [(64, 128, 384), (512, 128, 384)], [(2, 4, 4)]),
    "ppo_model": (dict(vocab_size=2048, n_layer=4, n_head=4, n_embd=192), GPT2, TINY),
    "ppo": (PPO, PPO, TINY_PPO),
}
# What grows, all other sizes staying the same.
GROWTH = {
    "n_embd": ((128, 256, 512), (384, 768, 1536), (16, 32)),
    "n_layer": ((3, 6, 12), (6, 12, 24), (1, 2)),
    "T": ((64, 128, 256, 512), (256, 512, 1024, 2048), (8, 16)),
    "vocab_size": ((512, 2048, 8192, 50304), (512, 2048, 8192, 50304), (100, 300)),
    "cache": ((128, 256, 512, 1024), (256, 1024, 4096), (32, 64)),
    "batch": ((32, 64, 128, 256), (32, 64, 128, 256), (2, 4)),
    "new_tokens": ((8, 16, 32, 64), (16, 32, 64, 128), (2, 4)),
}


def rounded(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def table_line(cells):
    return f"| {' | '.join(cells)} |"


# ---- the rows: lines of the table, or a list item that says why one is left out


def row(work, against, seconds, goal, amount=1, unit="s", note=""):
    """The line of ours and of theirs, in seconds for an amount of units; goal: times as fast."""
    ours, theirs = seconds
    shown = [s if unit == "s" else amount / s for s in seconds]
    figures = [f"{rounded(x)} {unit}" for x in shown]
    return table_line([work, against, *figures, f"**{theirs / ours:.2f}×**", f"{goal}×", note])


def per_second(rate, unit, device):
    """A note: FLOP or bytes a second, and how near a Hopper GPU comes to its peak of them."""
    if device.type != "cuda":
        return f"{rate / 1e12:.3g} T{unit}/s"
    bandwidth = 4.8e12 if "H200" in torch.cuda.get_device_name() else 3.35e12
    peak = 989e12 if unit == "FLOP" else bandwidth  # in bfloat16
    return f"{rate / 1e12:.3g} T{unit}/s, {rate / peak:.0%} of {peak / 1e12:g}"


def run_steps(step, batch, n):
    for i in range(n):
        step(*batch, i)


def pretraining_rows(s, config, device):
    """Tokens a second of pretrain.py's step and of the plain one, on the same batch."""
    on_gpu, n_steps = device.type == "cuda", 4
    batch = sides.random_batch(s.model, s.T, s.batch, device)
    model, adamw = sides.our_stepper(s.model, s.T, device, muon_lr=0.0)
    steps = {"AdamW": adamw, "Muon": sides.our_stepper(s.model, s.T, device)[1]}
    steps["plain"] = sides.plain_stepper(s.model, s.T, device)[1]
    turns = {name: partial(run_steps, step, batch, n_steps) for name, step in steps.items()}
    seconds = sides.take_turns(config.repetitions, turns)

    # 6 FLOP a parameter and token, and 12 T C a layer for attention (PaLM, appendix B)
    n_layer, C, amount = s.model["n_layer"], s.model["n_embd"], s.batch * s.T * n_steps
    flop = amount * (6 * model.n_params() + 12 * n_layer * s.T * C)

    work = f"pretraining step, {n_layer} layers, {C} wide, T {s.T}, batch {s.batch}"
    against = f"plain GPT, SDPA, {'bfloat16, compiled' if on_gpu else 'float32'}, AdamW"
    goal = 1.0 if on_gpu else 2.5
    for name in ("AdamW", "Muon"):
        times = (seconds[name], seconds["plain"])
        note = per_second(flop / seconds[name], "FLOP", device)
        yield row(f"{work}, {name}", against, times, goal, amount, "tokens/s", note)


def sdpa(q, k, v, _):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def forward_and_backward(function, *inputs):
    function(*inputs).sum().backward()


def attention_rows(s, config, device):
    """model.attention and PyTorch's, forward and backward, on the same tensors."""
    H, D = s.model["n_head"], s.model["n_embd"] // s.model["n_head"]
    by_hand = torch.compile(attention) if device.type == "cuda" else attention
    for T in s.attention_T:
        B = max(1, s.batch * s.T // T)
        kind = dict(device=device, dtype=torch.bfloat16, requires_grad=True)
        q, k, v = (torch.randn(B, H, T, D, **kind) for _ in range(3))
        inputs = (q, k, v, causal_mask(torch.arange(T, device=device), T))
        functions = {"ours": by_hand, "sdpa": sdpa}
        turns = {name: partial(forward_and_backward, f, *inputs) for name, f in functions.items()}
        seconds = sides.take_turns(config.repetitions, turns)
        work, times = f"attention forward and backward, T {T}", tuple(seconds.values())
        yield row(work, "SDPA", times, 0.9, B * T, "tokens/s", "bfloat16")


def shakespeare_rows(s, config, device):
    """Seconds of training, 50 steps in turn, to the loss of nanoGPT's configuration for CPUs."""
    folder = Path(config.shakespeare)
    if not folder.exists():
        yield f"- Shakespeare: left out, no --shakespeare {folder}; python -m data.fetch makes it"
        return
    goal, chunk = (1.88, 50) if not config.quick else (10.0, 2)
    T, B = 64, 12
    tokenizer = data.tokenizer.load(folder / "tokenizer.tiktoken")
    train, val = (load_stream(folder, name, tokenizer, T) for name in ("train", "val"))
    windows = pretrain.Windows(train, T, B, config.seed, folder, tokenizer.separator)

    # so small a model learns at rates several times pretrain.py's defaults
    sizes = dict(vocab_size=tokenizer.vocab_size, n_layer=4, n_head=4, n_embd=128)
    settings = dict(steps=450, lr=6e-3, muon_lr=1e-2, warmup=20)
    waiting = {"ours": sides.our_stepper(sizes, T, device, **settings)}
    waiting["plain"] = sides.plain_stepper(sizes, T, device, steps=2000)

    seconds, steps = dict.fromkeys(waiting, 0.0), dict.fromkeys(waiting, 0)
    while waiting:
        for name, (model, step) in list(waiting.items()):
            start = time.perf_counter()
            for i in range(steps[name], steps[name] + chunk):
                step(*pretrain.read_windows(train, windows[i], T, device), i)
            sides.synchronize()
            seconds[name] += time.perf_counter() - start
            steps[name] += chunk
            if pretrain.validate(model, val, T, device, 64) <= goal:
                del waiting[name]
            elif steps[name] >= 4000:
                die(f"--shakespeare {folder}: {name} not at {goal} in 4000 steps; fetch it anew")
    work, times = f"tiny Shakespeare to validation loss {goal}", tuple(seconds.values())
    note = f"{steps['ours']} and {steps['plain']} steps of {B} × {T}"
    yield row(work, "plain GPT", times, 4.0, note=note)


def generation_rows(s, config, device):
    """Tokens a second of model.generate; of both models without a cache; of transformers."""
    precision = "bfloat16" if device.type == "cuda" else "float32"
    for B, P, n in s.generation:
        model = sides.our_generator(s.model, P + n, device)
        plain = sides.PlainGPT(**s.model, block_size=P + n).to(device).eval()
        prompts = torch.randint(s.model["vocab_size"], (B, P), device=device)  # (B, P)
        as_nanogpt = dict(draw=sides.multinomial, precision=sides.bfloat16_on_cuda)
        turns = {
            "ours": partial(sides.generate, model, prompts, n),
            "recompute": partial(sides.generate_without_cache, model, prompts, n),
            "plain": partial(sides.generate_without_cache, plain, prompts, n, **as_nanogpt),
        }
        twins = sides.transformers_turns(model, prompts, n)
        seconds = sides.take_turns(config.repetitions, turns | twins)

        work = f"generation, batch {B}, {P} + {n} tokens"
        peers = {"plain": (f"plain GPT, {precision}, without a cache", 25)}
        peers["recompute"] = ("the same without a cache", 25)
        if twins:
            best = min(twins, key=seconds.get)
            peers[best] = (f"transformers, {best}, the faster", 3)
        else:
            yield f"- {work} against transformers: left out, transformers is not installed"

        # a step reads all weights, and in the mean half of the new tokens' cache, in bfloat16
        c = model.config
        cache = B * 2 * c.n_layer * c.n_kv_head * c.head_dim * (P + n / 2)
        read = 2 * n * (model.n_params() + cache)
        note = per_second(read / seconds["ours"], "B", device)
        for name, (against, goal) in peers.items():
            times = (seconds["ours"], seconds[name])
            yield row(work, against, times, goal, B * n, "tokens/s", note)


def ppo_rows(s, config, device):
    """Episodes a second of one iteration: rollout, reward function, update."""
    if not config.trl_python:
        yield "- PPO: left out, --trl_python is not given"
        return
    p, sizes = s.ppo, s.ppo_model
    policy, iteration = sides.our_ppo(sizes, p, device)
    size = p | dict(config=sides.llama_config(policy), device=device.type)
    trl = {}
    for precision in ("float32", "bfloat16"):
        bf16 = precision == "bfloat16"
        trl[precision] = sides.TRL(config.trl_python, size | dict(bf16=bf16))
    seconds = sides.take_turns(config.repetitions, {"ours": iteration} | trl)
    for side in trl.values():
        side.process.communicate()  # ends its input, so it ends
    best = min(trl, key=seconds.get)
    work = f"PPO iteration, {sizes['n_layer']} layers, {sizes['n_embd']} wide, batch {p['batch']}, "
    work += f"{p['prompt']} + {p['new_tokens']} tokens, {p['epochs']} epochs"
    against, times = f"TRL's PPOTrainer, {best}, the faster", (seconds["ours"], seconds[best])
    goal = 3.0 if device.type == "cuda" else 5.0
    yield row(work, against, times, goal, p["batch"], "episodes/s")


MEASURE = dict(pretraining=pretraining_rows, attention=attention_rows)
MEASURE |= dict(Shakespeare=shakespeare_rows, generation=generation_rows, PPO=ppo_rows)


# ---- cost as the work grows


def growth_title(axis):
    works = dict(cache="Decoding 32 rows", batch="PPO iteration", new_tokens="PPO iteration")
    return f"{works.get(axis, 'Pretraining step')} against {axis}"


def cost(s, axis, x, repetitions, device):
    """{column: value} of the work that GROWTH's axis belongs to, with x in place of its size."""
    if axis == "cache":
        return sides.decode_cost(s.model, x, device)
    if axis in s.ppo:
        return sides.ppo_cost(s.ppo_model, s.ppo | {axis: x}, repetitions, device)
    sizes = s.model | {"T": s.T, axis: x}
    return sides.in_fresh_process(sides.step_cost, sizes, s.batch, repetitions, device)


def draw(path, tables):
    """A panel for each axis; tables: {axis: costs}, each cost {column: value}, x first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    label = dict(textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    for ax, (axis, costs) in zip(axes.flat, tables.items()):
        x = [cost[axis] for cost in costs]
        for name, style in zip(list(costs[0])[1:], ("o-", "s--")):
            y = [cost[name] for cost in costs]
            ax.loglog(x, y, style, label=name)
            for point in zip(x, y):
                ax.annotate(rounded(point[1]), point, **label)
        ax.margins(0.1, 0.15)
        ax.set(title=growth_title(axis), xlabel=axis, xticks=x, xticklabels=x, yticks=[])
        ax.minorticks_off()
        ax.legend()
    axes.flat[-1].axis("off")
    with atomic(path) as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


# ---- the report


def table(header, lines):
    return "\n".join([table_line(header), table_line(["---"] * len(header)), *lines])


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    names += [platform.processor() or platform.machine()]
    return f"{torch.get_num_threads()} threads of {names[0]}"


def section(config, device):
    """The report's part on one device."""
    kind = 2 if config.quick else int(device.type == "cuda")
    s = SimpleNamespace(**{name: values[kind] for name, values in SIZES.items()})
    rows, left_out = [], []
    for name, measure in MEASURE.items():
        if name not in config.rows:
            continue
        for line in measure(s, config, device):
            print(line)
            (rows if line.startswith("|") else left_out).append(line)
    parts = [f"## {machine(device)}"]
    if rows:
        header = ("work", "against", "ours", "theirs", "times as fast", "goal", "")
        parts.append(table(header, rows))
    if left_out:
        parts.append("\n".join(left_out))

    if "growth" in config.rows:
        repetitions, tables = min(config.repetitions, 3), {}
        for axis, values in GROWTH.items():
            xs = values[kind]
            tables[axis] = [{axis: x} | cost(s, axis, x, repetitions, device) for x in xs]
        picture = Path(config.out).with_name(f"{Path(config.out).stem}-{device.type}.png")
        draw(picture, tables)
        parts.append(f"![cost as the work grows]({picture.name})")
        for axis, costs in tables.items():
            lines = [table_line(map(rounded, cost.values())) for cost in costs]
            parts.append(f"### {growth_title(axis)}\n\n{table(costs[0], lines)}")
    return "\n\n".join(parts)


def main():
    config = parse_config(Config, __doc__)
    if unknown := set(config.rows) - set(Config.rows):
        die(f"--rows {' '.join(unknown)}: not among {' '.join(Config.rows)}")
    both = config.device == "auto" and torch.cuda.is_available()
    sections = []
    for name in ("cpu", "cuda") if both else (config.device,):
        sections.append(section(config, setup(dataclasses.replace(config, device=name))))
    how = (
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}. Both sides of a row take turns; "
        f"medians of {config.repetitions}, of the growth at most 3. "
        f"Load average before the last row: {os.getloadavg()[0]:.1f}."
    )
    write_text(config.out, "\n\n".join(["# Speed", how, *sections]) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main()
