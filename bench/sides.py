"""What bench.run measures: our side and the other, each as a function to call, and how they are timed."""

import concurrent.futures
import copy
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

import common
import convert
import ppo
import pretrain
from model import GPT, GPTConfig
from reward import RewardModel

# ---- measuring


def synchronize():
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def take_turns(repetitions, sides):
    """{name: median seconds} of the functions, which run one after another, again and again, after a round that warms up."""
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
    """Bytes held at most since the process began: of the GPU, or resident (Linux tells; elsewhere nan)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) if status.exists() else math.nan


def in_fresh_process(function, *arguments):
    """function(*arguments) where nothing was allocated before: the only way to see the peak of one piece of work on a CPU."""
    context = multiprocessing.get_context("forkserver")  # imports once for all such processes
    context.set_forkserver_preload(["bench.sides"])
    with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


# ---- ours


def our_gpt(sizes, block_size, device):
    config = GPTConfig(**sizes, n_kv_head=sizes["n_head"], block_size=8 * math.ceil(block_size / 8))
    return GPT(config).to(device)


def our_stepper(sizes, T, steps, device, lr=pretrain.Config.lr, muon_lr=pretrain.Config.muon_lr, warmup=pretrain.Config.warmup):
    """The same as pretrain.py trains."""
    model = our_gpt(sizes, T, device)
    optimizers = common.make_optimizers(model, lr, muon_lr)
    if device.type == "cuda":
        model.compile()

    def step(tokens, targets, i):
        with common.autocast(device):
            loss = pretrain.next_token_loss(model, tokens, targets)
        loss.backward()
        common.optimizer_step(model, optimizers, common.lr_factor(i, steps, warmup))

    return model, step


def random_batch(sizes, T, batch, device):
    windows = torch.randint(sizes["vocab_size"], (batch, T + 1), device=device)
    return windows[:, :-1], windows[:, 1:]


def our_ppo(model_sizes, p, device):
    """One iteration of ppo.py's loop, as a function. No response ends early, so that both sides do the same work."""
    ids = SimpleNamespace(end=-1, pad=0, decode=str)
    config = ppo.Config(batch_size=p["batch"], minibatch_size=p["minibatch"], micro_batch_size=p["minibatch"], epochs=p["epochs"],
                        max_new_tokens=p["new_tokens"])  # fmt: skip
    policy = our_gpt(model_sizes, p["prompt"] + p["new_tokens"] + 1, device)
    ref, critic = copy.deepcopy(policy).requires_grad_(False), RewardModel(policy.config).to(device)
    if device.type == "cuda":
        for network in (policy, ref, critic.trunk):  # as ppo.py --compile
            network.hidden = torch.compile(network.hidden)
    optimizers = [common.make_optimizers(network, 1e-5, weight_decay=0.0)[0] for network in (policy, critic)]
    prompts = torch.randint(model_sizes["vocab_size"], (p["batch"], p["prompt"])).tolist()

    def odd_ids(tokens, mask, prompts, responses):
        return (tokens[:, 1:] % 2 * mask).sum(1).float()  # (B,)

    def iteration():
        batch, _, _ = ppo.rollout(policy, ref, critic, odd_ids, prompts, prompts, ids, config)
        ppo.update(policy, critic, optimizers, ppo.credit(batch, config.beta, config), 1.0, config)

    return iteration, policy


# ---- what users would pick instead for pretraining: a GPT-2 as it is usually written, in float32 on a CPU


class PlainBlock(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head = n_head
        self.norm1, self.norm2 = nn.LayerNorm(n_embd), nn.LayerNorm(n_embd)
        self.qkv, self.out = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.mlp = nn.Sequential(nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd))

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    def __init__(self, vocab_size, n_layer, n_head, n_embd, block_size):
        super().__init__()
        self.embed, self.position = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.blocks = nn.Sequential(*(PlainBlock(n_embd, n_head) for _ in range(n_layer)), nn.LayerNorm(n_embd))
        self.head = nn.Linear(n_embd, vocab_size, bias=False)
        self.apply(lambda m: isinstance(m, nn.Linear | nn.Embedding) and nn.init.normal_(m.weight, std=0.02))
        self.head.weight = self.embed.weight

    def hidden(self, tokens):
        positions = torch.arange(tokens.size(1), device=tokens.device)
        return self.blocks(self.embed(tokens) + self.position(positions))  # (B, T, C)

    def forward(self, tokens):
        return self.head(self.hidden(tokens))  # (B, T, V)


def plain_stepper(sizes, T, steps, device):
    """(model, step(tokens, targets, i)) as nanoGPT trains: AdamW, cosine schedule, clipped gradient; bfloat16 on CUDA only."""
    model = PlainGPT(**sizes, block_size=T).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1, fused=device.type == "cuda")
    if device.type == "cuda":
        model.compile()

    def step(tokens, targets, i):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = 0.55 + 0.45 * math.cos(math.pi * i / steps)  # to a tenth
        optimizer.param_groups[0]["lr"] = 1e-3 * min((i + 1) / 100, decay)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return model, step


@torch.no_grad()
def plain_generate(model, tokens, n):
    """Samples n tokens more as nanoGPT does: everything is read again for each; bfloat16 on CUDA only."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
        for _ in range(n):
            logits = model.head(model.hidden(tokens)[:, -1]).float()  # (B, V)
            tokens = torch.cat((tokens, torch.multinomial(logits.softmax(-1), 1)), dim=1)  # one longer each time


def transformers_twin(model, dtype):
    """transformers' Llama with the model's weights."""
    import transformers

    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**convert.config_json(model.config, SimpleNamespace(end=None, pad=0))))
    vocabulary = ("embed.weight", "lm_head.weight")  # ours are padded
    cut = {name: w[: model.config.vocab_size] if name in vocabulary else w for name, w in model.state_dict().items()}
    theirs.load_state_dict({convert.hf_name(name): w for name, w in cut.items()})
    return theirs.to(model.device, dtype).eval()


class TRL:
    """trl_side.py in its own process and environment, which does one iteration a call."""

    def __init__(self, python, size):
        command = [python, Path(__file__).with_name("trl_side.py"), json.dumps(size)]
        env = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        except OSError as e:
            common.die(f"--trl_python {python}: {e.strerror}; give the interpreter of an environment with trl==1.12.0")
        self.wait()

    def wait(self):
        for line in self.process.stdout:
            if line == "ready\n":
                return
        common.die("--trl_python: TRL's side ended; its message stands above. It needs `pip install trl==1.12.0`")

    def __call__(self):
        print(file=self.process.stdin, flush=True)
        self.wait()


# ---- what growing work costs


def step_cost(sizes, T, batch, repetitions, device):
    """Seconds of a pretraining step, bytes at its peak, and how many float32 copies of the logits wait for the backward pass."""
    before, kept = peak_memory(device), set()
    _, step = our_stepper(sizes, T, 10**6, device)
    tokens, targets = random_batch(sizes, T, batch, device)

    def note_logits(x):
        if x.dtype == torch.float32 and x.numel() >= tokens.numel() * sizes["vocab_size"]:
            kept.add(x.untyped_storage().data_ptr())
        return x

    with torch.compiler.set_stance("force_eager"), torch.autograd.graph.saved_tensors_hooks(note_logits, lambda x: x):
        step(tokens, targets, 0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # the compiled step's peak is asked for
    seconds = take_turns(repetitions, {"step": lambda: step(tokens, targets, 0)})["step"]
    return seconds, peak_memory(device) - before, len(kept)


def decode_cost(model, n_slots, device, batch=32, n=16):
    """Median seconds between two tokens of generate when the cache has n_slots; of the second of two calls."""
    prompts = torch.randint(model.config.vocab_size, (batch, n_slots - n)).tolist()
    for _ in range(2):
        times = []
        with common.autocast(device):
            model.generate(prompts, n, on_token=lambda ids, times=times: times.append(time.perf_counter()))
    return statistics.median(after - before for before, after in itertools.pairwise(times))
