"""What bench.run measures: our side and the other, each as a function to call, and the clock."""

import concurrent.futures
import copy
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

import convert
import ppo
import pretrain
from data.examples import Prompt
from model import GPT, GPTConfig, sample
from reward import from_gpt
from train import device as its_device
from train.device import autocast, compiled, should_compile
from train.optim import lr_factor, make_optimizers, optimizer_step
from utils.cli import die

# ---- measuring


def synchronize():
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def take_turns(repetitions, sides):
    """{name: median seconds} of the functions, which take turns after a round that warms up."""
    seconds = {name: [] for name in sides}
    for _ in range(repetitions + 1):
        for name, side in sides.items():
            synchronize()
            start = time.perf_counter()
            side()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s[1:]) for name, s in seconds.items()}


def peak_memory(device):
    """The most bytes held since the process began: of the GPU, or resident (nan but on Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])


def in_fresh_process(function, *arguments):
    """function(*arguments) where nothing was allocated before, to see the peak of it alone."""
    context = multiprocessing.get_context("forkserver")  # imports once for all such processes
    context.set_forkserver_preload(["bench.sides"])
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


# ---- ours


def our_gpt(sizes, block_size, device):
    block_size = 8 * math.ceil(block_size / 8)
    return GPT(GPTConfig(**sizes, n_kv_head=sizes["n_head"], block_size=block_size)).to(device)


def compile_as_by_default(device):
    """Turns --compile on where the stages do, for all that is made here from now on."""
    its_device.compiling = should_compile(pretrain.Config(), device)


def our_stepper(sizes, T, device, **settings):
    """(model, step(tokens, targets, i)): what pretrain.py does with these settings."""
    compile_as_by_default(device)
    config = pretrain.Config(**settings)
    model = our_gpt(sizes, T, device)
    optimizers = make_optimizers(model, config.lr, config.muon_lr, config.weight_decay)

    def step(tokens, targets, i):
        with autocast(device):
            loss = pretrain.next_token_loss(model, tokens, targets)
        loss.backward()
        optimizer_step(model, optimizers, lr_factor(i, config.steps, config.warmup))

    return model, step


def random_batch(sizes, T, batch, device):
    windows = torch.randint(sizes["vocab_size"], (batch, T + 1), device=device)
    return windows[:, :-1], windows[:, 1:]


def odd_ids(tokens, mask, prompts, responses):
    """The score of an answer: how many of its ids are odd."""
    return (tokens[:, 1:] % 2 * mask).sum(1).float()  # (B,)


def our_ppo(sizes, p, device):
    """(policy, an iteration of ppo.py). No answer ends early: both sides do the same work."""
    tokenizer = SimpleNamespace(end=-1, pad=0, decode=str)
    config = ppo.Config(batch_size=p["batch"], minibatch_size=p["minibatch"])
    config.epochs, config.max_new_tokens = p["epochs"], p["new_tokens"]
    policy = our_gpt(sizes, p["prompt"] + p["new_tokens"] + 1, device)
    ref = copy.deepcopy(policy).requires_grad_(False)
    critic = from_gpt(policy, logprob_term=True)
    compile_as_by_default(device)
    policy.next_logits = compiled(policy.next_logits)
    optimizers = [make_optimizers(net, 1e-5, weight_decay=0.0)[0] for net in (policy, critic)]
    ids = torch.randint(sizes["vocab_size"], (p["batch"], p["prompt"])).tolist()
    prompts = [Prompt(tokens, messages=[], line=0) for tokens in ids]

    def iteration():
        batch = ppo.rollout(policy, ref, critic, odd_ids, prompts, tokenizer, config)
        batch |= ppo.compute_advantages(batch, config.beta, config)
        ppo.update(policy, critic, optimizers, batch, 1.0, config)

    return policy, iteration


# ---- what users would pick instead: a GPT-2 as it is usually written, in float32 on a CPU


class PlainBlock(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv, self.out = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        wider, narrower = nn.Linear(n_embd, 4 * n_embd), nn.Linear(4 * n_embd, n_embd)
        self.mlp = nn.Sequential(wider, nn.GELU(), narrower)

    def forward(self, x):
        B, T, C = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.norm2(x))


def init_plain(module):
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


class PlainGPT(nn.Module):
    def __init__(self, vocab_size, n_layer, n_head, n_embd, block_size):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, n_embd)
        self.position = nn.Embedding(block_size, n_embd)
        blocks = [PlainBlock(n_embd, n_head) for _ in range(n_layer)]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(n_embd))
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.apply(init_plain)
        self.head.weight = self.embed.weight

    def hidden(self, tokens):
        positions = torch.arange(tokens.size(1), device=tokens.device)
        return self.blocks(self.embed(tokens) + self.position(positions))  # (B, T, C)

    def logits(self, hidden):
        return self.head(hidden).float()

    def forward(self, tokens):
        return self.logits(self.hidden(tokens))  # (B, T, V)


def bfloat16_on_cuda(device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def plain_stepper(sizes, T, device, steps=10**6):
    """(model, step(tokens, targets, i)) as nanoGPT trains: AdamW, cosine, clipped gradient."""
    model = PlainGPT(**sizes, block_size=T).to(device)
    adam = dict(betas=(0.9, 0.99), weight_decay=0.1, fused=device.type == "cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **adam)
    compile_as_by_default(device)
    if its_device.compiling:
        model.compile()

    def step(tokens, targets, i):
        with bfloat16_on_cuda(device):
            loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = 0.55 + 0.45 * math.cos(math.pi * i / steps)  # to a tenth
        optimizer.param_groups[0]["lr"] = 1e-3 * min((i + 1) / 100, decay)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


def multinomial(logits):
    return torch.multinomial(logits.softmax(-1), 1).squeeze(1)  # (B,)


@torch.no_grad()
def generate_without_cache(model, tokens, n, draw=sample, precision=autocast):
    """Samples n tokens more as nanoGPT does: everything is read again for each."""
    with precision(tokens.device):
        for _ in range(n):
            ids = draw(model.logits(model.hidden(tokens)[:, -1]))  # (B,)
            tokens = torch.cat((tokens, ids[:, None]), dim=1)  # one longer each time


def generate(model, tokens, n):
    with autocast(tokens.device):
        model.generate(tokens.tolist(), n)


def our_generator(sizes, block_size, device):
    compile_as_by_default(device)
    model = our_gpt(sizes, block_size, device).eval()
    model.next_logits = compiled(model.next_logits)
    return model


def llama_config(model):
    """The model's sizes in transformers' names; no id ends a text."""
    ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return convert.config_json(model.config) | ids


def transformers_turns(model, prompts, n):
    """{precision: function}: transformers' generate with our weights, if it is installed."""
    try:
        import transformers
    except ImportError:
        return {}
    weights = convert.hf_weights(model)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    how = dict(do_sample=True, top_k=0, max_new_tokens=n, pad_token_id=0)
    how["attention_mask"] = torch.ones_like(prompts)
    if prompts.is_cuda:
        how["cache_implementation"] = "static"
    turns = {}
    for name in ("float32", "bfloat16"):
        twin = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_config(model)))
        twin.load_state_dict(weights)
        twin.to(model.device, getattr(torch, name)).eval()
        turns[name] = functools.partial(twin.generate, prompts, **how)
    return turns


class TRL:
    """trl_side.py in its own process and environment, which does one iteration a call."""

    def __init__(self, python, size):
        command = [python, Path(__file__).with_name("trl_side.py"), json.dumps(size)]
        quiet = dict(TRL_EXPERIMENTAL_SILENCE="1", TRANSFORMERS_VERBOSITY="error")
        env = os.environ | quiet | dict(PYTHONWARNINGS="ignore")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.process = subprocess.Popen(command, **pipes, env=env)
        except OSError as e:
            die(f"--trl_python {python}: {e.strerror}; name a Python that has trl==1.12.0")
        self.wait()

    def wait(self):
        for line in self.process.stdout:
            if line == "ready\n":
                return
        die("--trl_python: TRL's side ended as it says above; it needs trl==1.12.0")

    def __call__(self):
        print(file=self.process.stdin, flush=True)
        self.wait()


# ---- what growing work costs


def step_cost(sizes, batch, repetitions, device):
    """{column: value} of a pretraining step: its time, its memory, and the logits it keeps."""
    T = sizes.pop("T")
    before, kept = peak_memory(device), set()
    _, step = our_stepper(sizes, T, device)
    tokens, targets = random_batch(sizes, T, batch, device)
    n_logits = tokens.numel() * sizes["vocab_size"]

    # which float32 tensors of the logits' size wait for the backward pass
    def note_logits(x):
        if x.dtype == torch.float32 and x.numel() >= n_logits:
            kept.add(x.untyped_storage().data_ptr())
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(note_logits, lambda x: x)
    with torch.compiler.set_stance("force_eager"), hooks:
        step(tokens, targets, 0)

    # time and memory, of the compiled step where there is one
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = take_turns(repetitions, {"step": lambda: step(tokens, targets, 0)})["step"]
    return {
        "ms a step": seconds * 1e3,
        "MB at the peak": (peak_memory(device) - before) / 1e6,
        "float32 logits kept": len(kept),
        "MB of one such copy": n_logits * 4 / 1e6,
    }


def decode_cost(sizes, length, device, batch=32, n=16):
    """Median time between two tokens of generate, with a cache of this length."""
    model = our_generator(sizes, length, device)
    prompts = torch.randint(sizes["vocab_size"], (batch, length - n)).tolist()
    times = []
    for _ in range(2):  # the first call warms up
        times.clear()
        with autocast(device):
            model.generate(prompts, n, on_token=lambda ids: times.append(time.perf_counter()))
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return {"ms a step": 1e3 * statistics.median(seconds)}


def ppo_cost(sizes, p, repetitions, device):
    _, iteration = our_ppo(sizes, p, device)
    return {"s an iteration": take_turns(repetitions, {"ours": iteration})["ours"]}
