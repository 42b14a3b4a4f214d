"""Speed, measured side by side with what users would pick instead, and how cost grows with the work: out/bench.md and a picture for each device.

    python -m bench.run                                           # all rows that need no one else's code
    python -m bench.run --shakespeare data/shakespeare --trl_python path/to/python --rows generation PPO

The two sides of a row take turns, and each figure is the median of its repetitions, so other programs disturb both alike.
"""

import os
import platform
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import common
import data.tokenizer
import pretrain
from bench import sides
from model import attention, attention_bias, sample


@dataclass
class Config:
    out: str = "out/bench.md"  # report to write; the picture goes beside it
    rows: tuple = ("pretraining", "attention", "Shakespeare", "generation", "PPO", "growth")  # what to measure
    shakespeare: str = ""  # folder made by python -m data.fetch text shakespeare; without it that row is left out
    trl_python: str = ""  # interpreter of an environment with trl==1.12.0; without it the row against TRL is left out
    repetitions: int = 5  # turns each side takes
    quick: bool = False  # tiny sizes: shows that everything runs, measures nothing
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # weights and batches


# How ours learns tiny Shakespeare: this model is small enough for rates several times pretrain.py's defaults.
SHAKESPEARE = dict(steps=450, lr=6e-3, muon_lr=1e-2, warmup=20)


@dataclass
class Sizes:
    """What the rows measure on one kind of machine."""

    model: dict  # fields of GPTConfig
    batch: int = 32
    T: int = 128
    generation: tuple = ((32, 32, 96),)  # (batch, prompt, new tokens)
    ppo_model: dict = None  # None: model
    ppo: dict = field(default_factory=lambda: dict(batch=128, minibatch=64, epochs=4, prompt=16, new_tokens=16))
    attention_T: tuple = (128, 1024)
    growth: dict = None  # {axis: values}, all other sizes as in model


CPU = Sizes(
    model=dict(vocab_size=2048, n_layer=6, n_head=4, n_embd=256),
    ppo_model=dict(vocab_size=2048, n_layer=4, n_head=4, n_embd=192),
    growth=dict(
        n_embd=(128, 256, 512), n_layer=(3, 6, 12), T=(64, 128, 256, 512), vocab_size=(512, 2048, 8192, 50304),
        cache=(128, 256, 512, 1024), episodes=(32, 64, 128, 256), response=(8, 16, 32, 64),
    ),
)  # fmt: skip
GPU = Sizes(
    model=dict(vocab_size=50304, n_layer=12, n_head=12, n_embd=768),
    T=1024,
    generation=((64, 128, 384), (512, 128, 384)),
    attention_T=(1024, 4096),
    growth=dict(
        n_embd=(384, 768, 1536), n_layer=(6, 12, 24), T=(256, 512, 1024, 2048), vocab_size=(512, 2048, 8192, 50304),
        cache=(256, 1024, 4096), episodes=(32, 64, 128, 256), response=(16, 32, 64, 128),
    ),
)  # fmt: skip
QUICK = Sizes(
    model=dict(vocab_size=300, n_layer=2, n_head=2, n_embd=32),
    batch=2,
    T=16,
    generation=((2, 4, 4),),
    ppo=dict(batch=4, minibatch=2, epochs=1, prompt=4, new_tokens=4),
    attention_T=(16,),
    growth=dict(n_embd=(16, 32), n_layer=(1, 2), T=(8, 16), vocab_size=(100, 300), cache=(32, 64), episodes=(2, 4), response=(2, 4)),
)


def rounded(x):
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


@dataclass
class Row:
    """One line of the report: seconds of the same work on both sides, and how many units of it that was."""

    work: str
    against: str
    ours: float
    theirs: float
    goal: float  # times as fast
    amount: float = 1
    unit: str = "s"  # "s": the seconds themselves are shown
    note: str = ""

    def __str__(self):
        shown = [s if self.unit == "s" else self.amount / s for s in (self.ours, self.theirs)]
        figures = " | ".join(f"{rounded(x)} {self.unit}" for x in shown)
        return f"| {self.work} | {self.against} | {figures} | **{self.theirs / self.ours:.2f}×** | {self.goal}× | {self.note} |"


# ---- the rows


def pretraining_rows(s, config, device):
    """Tokens a second of pretrain.py's loop and of the plain one, on the same batch, 4 steps in a turn."""
    batch, n_steps = sides.random_batch(s.model, s.T, s.batch, device), 4
    steppers = {"plain": sides.plain_stepper(s.model, s.T, 10**6, device), "Muon": sides.our_stepper(s.model, s.T, 10**6, device)}
    steppers["AdamW"] = sides.our_stepper(s.model, s.T, 10**6, device, muon_lr=0.0)
    turns = {name: lambda step=step: [step(*batch, i) for i in range(n_steps)] for name, (_, step) in steppers.items()}
    seconds = sides.take_turns(config.repetitions, turns)
    n_params, amount = steppers["AdamW"][0].n_params(), s.batch * s.T * n_steps
    work = f"pretraining step, {s.model['n_layer']} layers, {s.model['n_embd']} wide, T {s.T}, batch {s.batch}"
    against = "plain GPT, SDPA, " + ("bfloat16, compiled" if device.type == "cuda" else "float32") + ", AdamW"
    for name in ("AdamW", "Muon"):
        # 6 FLOP a parameter and token, and 12 T C a layer for attention (PaLM, appendix B)
        flops = amount * (6 * n_params + 12 * s.model["n_layer"] * s.T * s.model["n_embd"]) / seconds[name]
        note = f"{flops / 1e12:.3g} TFLOP/s" + (f", MFU {flops / 989e12:.0%} of 989" if device.type == "cuda" else "")
        goal = 1.0 if device.type == "cuda" else 2.5
        yield Row(f"{work}, {name}", against, seconds[name], seconds["plain"], goal, amount, "tokens/s", note)


def attention_rows(s, config, device):
    """model.attention and PyTorch's, forward and backward, on the same tensors."""
    for T in s.attention_T:
        shape = (max(1, s.batch * s.T // T), s.model["n_head"], T, s.model["n_embd"] // s.model["n_head"])
        q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        bias = attention_bias(torch.arange(T, device=device), T)
        by_hand = torch.compile(attention) if device.type == "cuda" else attention

        def by_sdpa(q, k, v, _):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def side(function, inputs=(q, k, v, bias)):
            function(*inputs).sum().backward()

        seconds = sides.take_turns(config.repetitions, {"ours": lambda: side(by_hand), "sdpa": lambda: side(by_sdpa)})
        amount = shape[0] * T
        yield Row(f"attention forward and backward, T {T}", "SDPA", seconds["ours"], seconds["sdpa"], 0.9, amount, "tokens/s", "bfloat16")


def shakespeare_rows(s, config, device):
    """Seconds of training steps until the validation loss is 1.88, nanoGPT's CPU configuration; both train 50 steps in turn."""
    goal, chunk = (1.88, 50) if not config.quick else (10.0, 2)
    tokenizer = data.tokenizer.load(Path(config.shakespeare) / "tokenizer.tiktoken")
    train, val = (pretrain.load_stream(config.shakespeare, name, tokenizer) for name in ("train", "val"))
    sizes, T, B = dict(vocab_size=tokenizer.vocab_size, n_layer=4, n_head=4, n_embd=128), 64, 12
    turns = {"ours": sides.our_stepper(sizes, T, device=device, **SHAKESPEARE)}
    turns["plain"] = sides.plain_stepper(sizes, T, 2000, device)
    seconds, steps = dict.fromkeys(turns, 0.0), dict.fromkeys(turns, 0)
    waiting = dict(turns)
    while waiting:
        for name, (model, step) in list(waiting.items()):
            start = time.perf_counter()
            for i in range(steps[name], steps[name] + chunk):
                step(*pretrain.read_windows(train, pretrain.window_starts(len(train), B, T, i, config.seed), T, device), i)
            sides.synchronize()
            seconds[name] += time.perf_counter() - start
            steps[name] += chunk
            if pretrain.validate(model, val, T, device, None) <= goal:
                del waiting[name]
            elif steps[name] >= 4000:
                common.die(f"--shakespeare: {name} does not reach {goal} in 4000 steps; is this a folder of data.fetch's?")
    note = f"{steps['ours']} and {steps['plain']} steps of {B} × {T}"
    yield Row(f"tiny Shakespeare to validation loss {goal}", "plain GPT", seconds["ours"], seconds["plain"], 4.0, note=note)


def generation_rows(s, config, device):
    """Tokens a second of model.generate; of the same and of a plain model that read everything again for each token; of transformers."""
    for B, P, n in s.generation:
        model = sides.our_gpt(s.model, P + n, device).eval()
        prompts = torch.randint(s.model["vocab_size"], (B, P), device=device)  # (B, P)

        def with_cache(model=model, prompts=prompts, n=n):
            with common.autocast(device):
                model.generate(prompts.tolist(), n)

        @torch.no_grad()
        def recompute(model=model, tokens=prompts, n=n):
            with common.autocast(device):
                for _ in range(n):
                    tokens = torch.cat((tokens, sample(model.logits(model.hidden(tokens)[:, -1]))[:, None]), 1)  # one longer each time

        plain = sides.PlainGPT(**s.model, block_size=P + n).to(device).eval()
        turns = {"ours": with_cache, "recompute": recompute}
        turns["plain"] = lambda plain=plain, prompts=prompts, n=n: sides.plain_generate(plain, prompts, n)
        try:
            dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
            twins = {name: sides.transformers_twin(model, dtype) for name, dtype in dtypes.items()}
        except ImportError:
            twins = {}
        static = {"cache_implementation": "static"} if device.type == "cuda" else {}
        for name, twin in twins.items():
            how = dict(do_sample=True, top_k=0, max_new_tokens=n, attention_mask=torch.ones_like(prompts), pad_token_id=0) | static
            turns[name] = lambda twin=twin, how=how, prompts=prompts: twin.generate(prompts, **how)
        seconds = sides.take_turns(config.repetitions, turns)
        work, amount, note = f"generation, batch {B}, {P} + {n} tokens", B * n, ""
        if device.type == "cuda":  # every step reads all weights and the cache once
            bandwidth = 4.8e12 if "H200" in torch.cuda.get_device_name() else 3.35e12
            cache = 2 * 2 * model.config.n_layer * model.config.n_kv_head * model.config.head_dim * (P + n / 2)  # bytes a row, bfloat16
            bound = B * bandwidth / (2 * model.n_params() + B * cache)
            note = f"{amount / seconds['ours'] / bound:.0%} of what {bandwidth / 1e12:g} TB/s allow"
        against = f"plain GPT, {'bfloat16' if device.type == 'cuda' else 'float32'}, without a cache"
        yield Row(work, against, seconds["ours"], seconds["plain"], 25, amount, "tokens/s", note)
        yield Row(work, "the same without a cache", seconds["ours"], seconds["recompute"], 25, amount, "tokens/s", note)
        if twins:
            best = min(twins, key=seconds.get)
            yield Row(work, f"transformers, {best}, the faster", seconds["ours"], seconds[best], 3, amount, "tokens/s", note)
        else:
            yield f"{work} against transformers: left out, transformers is not installed"


def ppo_rows(s, config, device):
    """Episodes a second of one iteration: rollout, reward function, update."""
    p, sizes = s.ppo, s.ppo_model or s.model
    iteration, policy = sides.our_ppo(sizes, p, device)
    turns = {"ours": iteration}
    size = sizes | p | dict(device=device.type, n_inner=policy.config.n_inner)
    turns |= {name: sides.TRL(config.trl_python, size | dict(bf16=name == "bfloat16")) for name in ("float32", "bfloat16")}
    seconds = sides.take_turns(config.repetitions, turns)
    for side in list(turns.values())[1:]:
        side.process.communicate()  # ends its input, so it ends
    best = min(("float32", "bfloat16"), key=seconds.get)
    lengths = f"batch {p['batch']}, {p['prompt']} + {p['new_tokens']} tokens, {p['epochs']} epochs"
    work = f"PPO iteration, {sizes['n_layer']} layers, {sizes['n_embd']} wide, {lengths}"
    goal = 3.0 if device.type == "cuda" else 5.0
    yield Row(work, f"TRL's PPOTrainer, {best}, the faster", seconds["ours"], seconds[best], goal, p["batch"], "episodes/s")


# ---- cost as the work grows


def growth_tables(s, config, device):
    """[(title, {column: values})]: the first column is what grows, the second the time."""
    tables, known, repetitions = [], {}, min(config.repetitions, 3)
    for axis, name in (("n_embd", "width"), ("n_layer", "depth"), ("T", "T"), ("vocab_size", "vocabulary")):
        columns = {name: list(s.growth[axis]), "ms a step": [], "MB at the peak": [], "float32 logits kept": [], "MB of one such copy": []}
        for value in s.growth[axis]:
            sizes = s.model | ({axis: value} if axis != "T" else {})
            T = value if axis == "T" else s.T
            key = (*sizes.values(), T)
            if key not in known:
                known[key] = sides.in_fresh_process(sides.step_cost, sizes, T, s.batch, repetitions, device)
            one_copy = s.batch * T * sizes["vocab_size"] * 4
            for column, x in zip(list(columns)[1:], (known[key][0] * 1e3, known[key][1] / 1e6, known[key][2], one_copy / 1e6)):
                columns[column].append(x)
        tables.append((f"Pretraining step against {name}", columns))

    model = sides.our_gpt(s.model, max(s.growth["cache"]), device).eval()
    times = [1e3 * sides.decode_cost(model, n_slots, device) for n_slots in s.growth["cache"]]
    tables.append(("Decoding against tokens in the cache, batch 32", {"tokens": list(s.growth["cache"]), "ms a step": times}))
    for axis, p in (("episodes", "batch"), ("response", "new_tokens")):
        turns = {x: sides.our_ppo(s.ppo_model or s.model, s.ppo | {p: x}, device)[0] for x in s.growth[axis]}
        seconds = sides.take_turns(repetitions, turns)
        tables.append((f"PPO iteration against {p.replace('_', ' ')}", {p: list(turns), "s an iteration": list(seconds.values())}))
    return tables


def markdown(columns):
    rows = [[str(x) if isinstance(x, int) else f"{x:.4g}" for x in row] for row in zip(*columns.values())]
    lines = [list(columns), ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(path, tables):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(16, 7), layout="constrained")
    for ax, (title, columns) in zip(axes.flat, tables):
        (x_name, x), (y_name, y), *rest = columns.items()
        for (name, values), style in zip([(y_name, y), *rest[:1]], ("o-", "s--")):
            ax.loglog(x, values, style, label=name)
            for at, value in zip(x, values):
                ax.annotate(rounded(value), (at, value), textcoords="offset points", xytext=(0, 6), ha="center", fontsize=8)
        ax.margins(0.1, 0.15)
        ax.set(title=title, xlabel=x_name, xticks=x, xticklabels=x, yticks=[])
        ax.minorticks_off()
        ax.legend()
    for ax in axes.flat[len(tables) :]:
        ax.axis("off")
    with common.atomic(path) as f:
        figure.savefig(f, dpi=110, format="png")
    plt.close(figure)


# ---- the report


ROWS = {"pretraining": pretraining_rows, "attention": attention_rows, "Shakespeare": shakespeare_rows}
ROWS |= {"generation": generation_rows, "PPO": ppo_rows}
NEEDS = {"Shakespeare": "shakespeare", "PPO": "trl_python"}  # row: the flag without which it is left out


def machine(device):
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    cpu = f"{torch.get_num_threads()} threads of {(names or [platform.processor() or platform.machine()])[0]}"
    return torch.cuda.get_device_name() if device.type == "cuda" else cpu


def section(s, config, device):
    """The report's part on one device."""
    lines, left_out = [], []
    for name in (name for name in ROWS if name in config.rows):
        if name in NEEDS and not getattr(config, NEEDS[name]):
            left_out.append(f"{name}: left out, --{NEEDS[name]} is not given")
            continue
        for row in ROWS[name](s, config, device):
            print(row)
            (left_out if isinstance(row, str) else lines).append(row)
    parts = [f"## {machine(device)}"]
    if lines:
        header = "| work | against | ours | theirs | times as fast | goal | |\n| --- | --- | --- | --- | --- | --- | --- |"
        parts.append("\n".join([header, *map(str, lines)]))
    if left_out:
        parts.append("\n".join(f"- {line}" for line in left_out))
    if "growth" in config.rows:
        tables = growth_tables(s, config, device)
        picture = Path(config.out).with_name(f"{Path(config.out).stem}-{device.type}.png")
        draw(picture, tables)
        parts += [f"![cost as the work grows]({picture.name})"]
        parts += [f"### {title}\n\n{markdown(columns)}" for title, columns in tables]
    return "\n\n".join(parts)


def main():
    config = common.parse_config(Config, __doc__)
    if unknown := set(config.rows) - {*ROWS, "growth"}:
        common.die(f"--rows {' '.join(unknown)}: not among {' '.join(ROWS)} growth")
    sections = []
    for name in ("cpu", "cuda") if config.device == "auto" and torch.cuda.is_available() else (config.device,):
        device = common.setup(SimpleNamespace(device=name, seed=config.seed))
        sections.append(section(QUICK if config.quick else GPU if device.type == "cuda" else CPU, config, device))
    how = (
        f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}. Both sides of a row take turns; medians of {config.repetitions}, of the growth at most 3. "
        f"Load average before the last row: {os.getloadavg()[0]:.1f}."
    )
    common.write_text(config.out, "\n\n".join(["# Speed", how, *sections]) + "\n")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    main()
