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


# What grows, all other sizes staying the same: on a CPU, on a GPU, with --quick.
GROWTH = {
    "n_embd": [(128, 256, 512), (384, 768, 1536), (16, 32)],
    "n_layer": [(3, 6, 12), (6, 12, 24), (1, 2)],
    "T": [(64, 128, 256, 512), (256, 512, 1024, 2048), (8, 16)],
    "vocab_size": [(512, 2048, 8192, 50304), (512, 2048, 8192, 50304), (100, 300)],
    "cache": [(128, 256, 512, 1024), (256, 1024, 4096), (32, 64)],
    "batch": [(32, 64, 128, 256), (32, 64, 128, 256), (2, 4)],
    "new_tokens": [(8, 16, 32, 64), (16, 32, 64, 128), (2, 4)],
}


@dataclass
class Sizes:
    """What the rows measure on one kind of machine."""

    model: dict  # fields of GPTConfig
    ppo_model: dict
    ppo: dict
    generation: tuple  # (batch, prompt, new tokens)
    attention_T: tuple
    T: int
    batch: int
    growth: dict  # {axis: values}


CPU = Sizes(
    model=dict(vocab_size=2048, n_layer=6, n_head=4, n_embd=256),
    ppo_model=dict(vocab_size=2048, n_layer=4, n_head=4, n_embd=192),
    ppo=dict(batch=128, minibatch=64, epochs=4, prompt=16, new_tokens=16),
    generation=((32, 32, 96),),
    attention_T=(128, 1024),
    T=128,
    batch=32,
    growth={axis: values[0] for axis, values in GROWTH.items()},
)
GPU = Sizes(
    model=dict(vocab_size=50304, n_layer=12, n_head=12, n_embd=768),
    ppo_model=dict(vocab_size=50304, n_layer=12, n_head=12, n_embd=768),
    ppo=dict(batch=128, minibatch=64, epochs=4, prompt=16, new_tokens=16),
    generation=((64, 128, 384), (512, 128, 384)),
    attention_T=(1024, 4096),
    T=1024,
    batch=32,
    growth={axis: values[1] for axis, values in GROWTH.items()},
)
QUICK = Sizes(
    model=dict(vocab_size=300, n_layer=2, n_head=2, n_embd=32),
    ppo_model=dict(vocab_size=300, n_layer=2, n_head=2, n_embd=32),
    ppo=dict(batch=4, minibatch=2, epochs=1, prompt=4, new_tokens=4),
    generation=((2, 4, 4),),
    attention_T=(16,),
    T=16,
    batch=2,
    growth={axis: values[2] for axis, values in GROWTH.items()},
)


def rounded(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


@dataclass
class Row:
    """One line of the report."""

    work: str
    against: str
    seconds: tuple  # of the same work: ours, theirs
    goal: float  # times as fast
    amount: float = 1  # of units in the work
    unit: str = "s"  # "s": the seconds themselves are shown
    note: str = ""

    def __str__(self):
        shown = [s if self.unit == "s" else self.amount / s for s in self.seconds]
        figures = " | ".join(f"{rounded(x)} {self.unit}" for x in shown)
        ours, theirs = self.seconds
        ratio = f"**{theirs / ours:.2f}×** | {self.goal}×"
        return f"| {self.work} | {self.against} | {figures} | {ratio} | {self.note} |"


# ---- the rows


def run_steps(step, batch, n):
    for i in range(n):
        step(*batch, i)


def pretraining_rows(s, config, device):
    """Tokens a second of pretrain.py's step and of the plain one, on the same batch."""
    on_gpu, n_steps = device.type == "cuda", 4
    batch = sides.random_batch(s.model, s.T, s.batch, device)
    steppers = {
        "plain": sides.plain_stepper(s.model, s.T, device),
        "Muon": sides.our_stepper(s.model, s.T, device),
        "AdamW": sides.our_stepper(s.model, s.T, device, muon_lr=0.0),
    }
    turns = {name: partial(run_steps, step, batch, n_steps) for name, (_, step) in steppers.items()}
    seconds = sides.take_turns(config.repetitions, turns)

    # 6 FLOP a parameter and token, and 12 T C a layer for attention (PaLM, appendix B)
    n_layer, C, amount = s.model["n_layer"], s.model["n_embd"], s.batch * s.T * n_steps
    flops = amount * (6 * steppers["AdamW"][0].n_params() + 12 * n_layer * s.T * C)

    work = f"pretraining step, {n_layer} layers, {C} wide, T {s.T}, batch {s.batch}"
    against = f"plain GPT, SDPA, {'bfloat16, compiled' if on_gpu else 'float32'}, AdamW"
    goal = 1.0 if on_gpu else 2.5
    for name in ("AdamW", "Muon"):
        times, speed = (seconds[name], seconds["plain"]), flops / seconds[name]
        note = f"{speed / 1e12:.3g} TFLOP/s" + f", MFU {speed / 989e12:.0%} of 989" * on_gpu
        yield Row(f"{work}, {name}", against, times, goal, amount, "tokens/s", note)


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
        turns = {
            "ours": partial(forward_and_backward, by_hand, *inputs),
            "sdpa": partial(forward_and_backward, sdpa, *inputs),
        }
        seconds = sides.take_turns(config.repetitions, turns)
        times = (seconds["ours"], seconds["sdpa"])
        work = f"attention forward and backward, T {T}"
        yield Row(work, "SDPA", times, 0.9, B * T, "tokens/s", "bfloat16")


def shakespeare_rows(s, config, device):
    """Seconds of training, 50 steps in turn, to the loss of nanoGPT's configuration for CPUs."""
    goal, chunk = (1.88, 50) if not config.quick else (10.0, 2)
    T, B, folder = 64, 12, config.shakespeare
    tokenizer = data.tokenizer.load(Path(folder) / "tokenizer.tiktoken")
    train, val = (load_stream(folder, name, tokenizer, T) for name in ("train", "val"))
    windows = pretrain.Windows(train, T, B, config.seed, folder)

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
            if pretrain.validate(model, val, T, device) <= goal:
                del waiting[name]
            elif steps[name] >= 4000:
                die(f"--shakespeare {folder}: {name} not at {goal} in 4000 steps; fetch it anew")
    work, times = f"tiny Shakespeare to validation loss {goal}", (seconds["ours"], seconds["plain"])
    note = f"{steps['ours']} and {steps['plain']} steps of {B} × {T}"
    yield Row(work, "plain GPT", times, 4.0, note=note)


def fraction_of_bandwidth(tokens_per_s, model, B, length):
    """How near generation comes to reading all weights and the cache once a step."""
    bandwidth = 4.8e12 if "H200" in torch.cuda.get_device_name() else 3.35e12
    c = model.config
    cache = 2 * 2 * c.n_layer * c.n_kv_head * c.head_dim * length  # bytes a row, bfloat16
    bound = B * bandwidth / (2 * model.n_params() + B * cache)
    return f"{tokens_per_s / bound:.0%} of what {bandwidth / 1e12:g} TB/s allow"


def transformers_turns(model, prompts, n):
    """{precision: function}: transformers' generate with our weights, if it is installed."""
    how = dict(do_sample=True, top_k=0, max_new_tokens=n, pad_token_id=0)
    how["attention_mask"] = torch.ones_like(prompts)
    if prompts.is_cuda:
        how["cache_implementation"] = "static"
    try:
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        twins = {name: sides.transformers_twin(model, dtype) for name, dtype in dtypes.items()}
    except ImportError:
        return {}
    return {name: partial(twin.generate, prompts, **how) for name, twin in twins.items()}


def generation_rows(s, config, device):
    """Tokens a second of model.generate; of both models without a cache; of transformers."""
    on_gpu = device.type == "cuda"
    for B, P, n in s.generation:
        model = sides.our_gpt(s.model, P + n, device).eval()
        plain = sides.PlainGPT(**s.model, block_size=P + n).to(device).eval()
        prompts = torch.randint(s.model["vocab_size"], (B, P), device=device)  # (B, P)
        as_nanogpt = dict(draw=sides.multinomial, precision=sides.bfloat16_on_cuda)
        turns = {
            "ours": partial(sides.generate, model, prompts, n),
            "recompute": partial(sides.generate_without_cache, model, prompts, n),
            "plain": partial(sides.generate_without_cache, plain, prompts, n, **as_nanogpt),
        }
        twins = transformers_turns(model, prompts, n)
        seconds = sides.take_turns(config.repetitions, turns | twins)

        work = f"generation, batch {B}, {P} + {n} tokens"
        precision = "bfloat16" if on_gpu else "float32"
        peers = {"plain": (f"plain GPT, {precision}, without a cache", 25)}
        peers["recompute"] = ("the same without a cache", 25)
        if twins:
            best = min(twins, key=seconds.get)
            peers[best] = (f"transformers, {best}, the faster", 3)
        speed = B * n / seconds["ours"]
        note = fraction_of_bandwidth(speed, model, B, P + n / 2) if on_gpu else ""
        for name, (against, goal) in peers.items():
            times = (seconds["ours"], seconds[name])
            yield Row(work, against, times, goal, B * n, "tokens/s", note)
        if not twins:
            yield f"{work} against transformers: left out, transformers is not installed"


def ppo_rows(s, config, device):
    """Episodes a second of one iteration: rollout, reward function, update."""
    p, sizes, precisions = s.ppo, s.ppo_model, ("float32", "bfloat16")
    policy, iteration = sides.our_ppo(sizes, p, device)
    turns = {"ours": iteration}
    for name in precisions:
        size = p | dict(config=sides.llama_config(policy), device=device.type)
        turns[name] = sides.TRL(config.trl_python, size | dict(bf16=name == "bfloat16"))
    seconds = sides.take_turns(config.repetitions, turns)
    for name in precisions:
        turns[name].process.communicate()  # ends its input, so it ends
    best = min(precisions, key=seconds.get)
    lengths = f"{p['prompt']} + {p['new_tokens']} tokens, {p['epochs']} epochs"
    work = f"PPO iteration, {sizes['n_layer']} layers, {sizes['n_embd']} wide, batch {p['batch']}, "
    against, times = f"TRL's PPOTrainer, {best}, the faster", (seconds["ours"], seconds[best])
    goal = 3.0 if device.type == "cuda" else 5.0
    yield Row(work + lengths, against, times, goal, p["batch"], "episodes/s")


# ---- cost as the work grows: (title, rows), each row {column: value}, first what grows


def pretraining_growth(s, repetitions, device):
    known = {}  # all axes have one value in common
    axes = dict(n_embd="width", n_layer="depth", T="T", vocab_size="vocabulary")
    for axis, name in axes.items():
        rows = []
        for value in s.growth[axis]:
            sizes = s.model | {"T": s.T} | {axis: value}
            key = tuple(sizes.values())
            if key not in known:
                work = (sizes, s.batch, repetitions, device)
                known[key] = sides.in_fresh_process(sides.step_cost, *work)
            rows.append({name: value} | known[key])
        yield f"Pretraining step against {name}", rows


def decoding_growth(s, device):
    lengths, rows = s.growth["cache"], []
    model = sides.our_gpt(s.model, max(lengths), device).eval()
    for n in lengths:
        rows.append({"tokens": n, "ms a step": 1e3 * sides.decode_cost(model, n, device)})
    yield "Decoding against tokens in the cache, batch 32", rows


def ppo_growth(s, repetitions, device):
    for axis in ("batch", "new_tokens"):
        values = s.growth[axis]
        turns = {x: sides.our_ppo(s.ppo_model, s.ppo | {axis: x}, device)[1] for x in values}
        seconds = sides.take_turns(repetitions, turns)
        rows = [{axis: x, "s an iteration": seconds[x]} for x in values]
        yield f"PPO iteration against {axis.replace('_', ' ')}", rows


def draw(path, tables):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    label = dict(textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
    for ax, (title, rows) in zip(axes.flat, tables):
        x_name, *y_names = rows[0]
        x = [row[x_name] for row in rows]
        for y_name, style in zip(y_names, ("o-", "s--")):
            y = [row[y_name] for row in rows]
            ax.loglog(x, y, style, label=y_name)
            for point in zip(x, y):
                ax.annotate(rounded(point[1]), point, **label)
        ax.margins(0.1, 0.15)
        ax.set(title=title, xlabel=x_name, xticks=x, xticklabels=x, yticks=[])
        ax.minorticks_off()
        ax.legend()
    for ax in axes.flat[len(tables) :]:
        ax.axis("off")
    with atomic(path) as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


# ---- the report

MEASURE = dict(pretraining=pretraining_rows, attention=attention_rows)
MEASURE |= dict(Shakespeare=shakespeare_rows, generation=generation_rows, PPO=ppo_rows)


def missing(name, config):
    """What the row cannot be measured without, or None."""
    if name == "Shakespeare" and not Path(config.shakespeare).exists():
        return f"--shakespeare {config.shakespeare} is not there; python -m data.fetch makes it"
    if name == "PPO" and not config.trl_python:
        return "--trl_python is not given"


def table(header, lines):
    rule = "| --- " * len(header) + "|"
    return "\n".join([f"| {' | '.join(header)} |", rule, *lines])


def growth_line(row):
    cells = [str(x) if isinstance(x, int) else f"{x:.4g}" for x in row.values()]
    return f"| {' | '.join(cells)} |"


def machine(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    names += [platform.processor() or platform.machine()]
    return f"{torch.get_num_threads()} threads of {names[0]}"


def section(s, config, device):
    """The report's part on one device."""
    lines, left_out = [], []
    for name, measure in MEASURE.items():
        if name not in config.rows:
            continue
        if what := missing(name, config):
            left_out.append(f"- {name}: left out, {what}")
            continue
        for row in measure(s, config, device):
            print(row)
            if isinstance(row, Row):
                lines.append(str(row))
            else:
                left_out.append(f"- {row}")
    parts = [f"## {machine(device)}"]
    if lines:
        header = ("work", "against", "ours", "theirs", "times as fast", "goal", "")
        parts.append(table(header, lines))
    if left_out:
        parts.append("\n".join(left_out))

    if "growth" in config.rows:
        repetitions = min(config.repetitions, 3)
        tables = [*pretraining_growth(s, repetitions, device), *decoding_growth(s, device)]
        tables += ppo_growth(s, repetitions, device)
        picture = Path(config.out).with_name(f"{Path(config.out).stem}-{device.type}.png")
        draw(picture, tables)
        parts.append(f"![cost as the work grows]({picture.name})")
        for title, rows in tables:
            parts.append(f"### {title}\n\n{table(rows[0], map(growth_line, rows))}")
    return "\n\n".join(parts)


def main():
    config = parse_config(Config, __doc__)
    if unknown := set(config.rows) - set(ROWS):
        die(f"--rows {' '.join(unknown)}: not among {' '.join(ROWS)}")
    both = config.device == "auto" and torch.cuda.is_available()
    sections = []
    for name in ("cpu", "cuda") if both else (config.device,):
        device = setup(dataclasses.replace(config, device=name))
        sizes = GPU if device.type == "cuda" else CPU
        sections.append(section(QUICK if config.quick else sizes, config, device))
    how = (
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}. Both sides of a row take turns; "
        f"medians of {config.repetitions}, of the growth at most 3. "
        f"Load average before the last row: {os.getloadavg()[0]:.1f}."
    )
    write_text(config.out, "\n\n".join(["# Speed", how, *sections]) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main()
