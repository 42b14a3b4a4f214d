"""The GPT: a decoder-only transformer of the Llama/Qwen3 family, attention written by hand.

Shapes are written beside each line that changes one:
    B batch   T query positions   S key positions (S = T without a cache)   C = n_embd
    H = n_head   G = n_kv_head   D = head_dim   V = vocab_size

Index frame, used by all four stages: logits[:, t] choose token t+1.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 2048
    block_size: int = 256  # longest sequence, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4  # < n_head: grouped-query attention (arXiv 2305.13245), a smaller KV cache
    n_embd: int = 192
    head_dim: int = 0  # 0: n_embd // n_head; Qwen3 chooses it freely
    n_inner: int = 0  # width of the MLP; 0: 8/3 n_embd, which gives SwiGLU the size of a 4x MLP
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMSNorm on queries and keys, as in Qwen3
    tied: bool = True  # one matrix embeds tokens and reads logits out

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions turn pairs")
        self.n_inner = self.n_inner or 64 * math.ceil(8 * self.n_embd / 3 / 64)


def rope_table(config: GPTConfig):
    """cos, sin of every position's rotation angles, each (block_size, D/2), float32."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(config.block_size)[:, None] * config.rope_theta**-half  # (block_size, D/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864), half-split: x (B, H, T, D), cos and sin (.., T, D/2)."""
    x1, x2 = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)  # (B, H, T, D)


def attention(q, k, v, bias):
    """softmax(q k^T / sqrt(D) + bias) v for q (B, H, T, D), k and v (B, H, S, D), bias (.., T, S).

    torch.compile replaces exactly this spelling by one fused kernel (tests/test_attention.py
    watches that); a scale by multiplication, a masked_fill or a float32 bias would not match.
    """
    weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)) + bias.to(q.dtype), dim=-1)  # (B, H, T, S)
    return weights.to(v.dtype) @ v  # (B, H, T, D)


def attention_bias(query_slots, n_slots, n_pad=None):
    """0 where a query may look, -inf where not: (T, S), or (B, 1, T, S) with n_pad (B,) pads on the left.

    A pad may look at itself, so that no row of the softmax is empty and nothing becomes NaN.
    """
    keys = torch.arange(n_slots, device=query_slots.device)  # (S,)
    queries = query_slots[:, None]  # (T, 1)
    visible = keys <= queries  # (T, S)
    if n_pad is not None:
        visible = visible & ((keys >= n_pad[:, None, None]) | (keys == queries))  # (B, T, S)
        visible = visible[:, None]  # (B, 1, T, S)
    return torch.zeros(visible.shape, device=keys.device).masked_fill(~visible, -torch.inf)


class KVCache:
    """Keys and values of every layer in preallocated tensors of one fixed shape, so that decoding compiles once."""

    def __init__(self, config: GPTConfig, batch_size, n_slots, dtype, device):
        shape = (config.n_layer, batch_size, config.n_kv_head, n_slots, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, layer, slots, k, v):
        """Writes k, v (B, G, T, D) into the slots (T,) and returns all of the layer's: (B, G, S, D)."""
        self.k[layer].index_copy_(2, slots, k.to(self.k.dtype))
        self.v[layer].index_copy_(2, slots, v.to(self.v.dtype))
        return self.k[layer], self.v[layer]


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer):
        super().__init__()
        self.config, self.layer = config, layer
        C, H, G, D = config.n_embd, config.n_head, config.n_kv_head, config.head_dim
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, G * D, bias=False)
        self.v_proj = nn.Linear(C, G * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(D, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(D, eps=config.norm_eps)

    def forward(self, x, cos, sin, bias, cache=None, slots=None):
        B, T, _ = x.shape
        H, G, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        q = self.q_proj(x).view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, G, D).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, G, D).transpose(1, 2).contiguous()  # (B, G, T, D); laid out like q and k, or nothing fuses
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, slots, k, v)  # (B, G, S, D)
        if G < H:  # each key/value head serves H / G query heads
            k = k.repeat_interleave(H // G, dim=1)  # (B, H, S, D)
            v = v.repeat_interleave(H // G, dim=1)  # (B, H, S, D)
        y = attention(q, k.to(q.dtype), v.to(q.dtype), bias)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, H * D))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, n_inner) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *args):
        x = x + self.attn(self.attn_norm(x), *args)
        x = x + self.mlp(self.mlp_norm(x))
        return x


class GPT(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        # The matrix is padded to a multiple of 64 rows (faster kernels); forward cuts the logits back
        # to vocab_size, so a padded id has no logit and can never be sampled.
        padded_vocab = 64 * math.ceil(config.vocab_size / 64)
        self.embed = nn.Embedding(padded_vocab, config.n_embd)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.n_embd, padded_vocab, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed.weight
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # GPT-2: 0.02, and the 2 * n_layer writes into the residual stream share their variance
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if is_residual else 0.02)

    @property
    def device(self):
        return self.embed.weight.device

    def n_params(self):
        return sum(p.numel() for p in self.parameters())  # a tied matrix counts once

    def hidden(self, tokens, n_pad=None, cache=None, slots=None):
        """The normed last hidden states (B, T, C) of tokens (B, T); what the LM head and the reward head read.

        n_pad (B,): pads on the left of each row. cache and slots (T,): write at these slots, look at all before them.
        """
        T = tokens.size(1)
        if slots is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens do not fit in block_size {self.config.block_size}")
            slots = torch.arange(T, device=tokens.device)
        n_slots = T if cache is None else cache.k.size(3)
        positions = slots if n_pad is None else (slots - n_pad[:, None]).clamp(min=0)  # (T,) or (B, T)
        cos, sin = self.cos[positions], self.sin[positions]  # (T, D/2) or (B, T, D/2)
        if n_pad is not None:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, D/2)
        bias = attention_bias(slots, n_slots, n_pad)  # (T, S) or (B, 1, T, S)
        x = self.embed(tokens)  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin, bias, cache, slots)  # (B, T, C)
        return self.norm(x)

    def logits(self, hidden):
        """hidden (.., C) -> logits (.., V), float32."""
        return self.lm_head(hidden)[..., : self.config.vocab_size].float()

    def forward(self, tokens, n_pad=None):
        return self.logits(self.hidden(tokens, n_pad))  # (B, T, V)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, end_id=None, generator=None, on_token=None, rand=torch.rand):
        """Continues each prompt (a list of token ids, lengths may differ); returns the new tokens as lists.

        A row ends with end_id, which is kept; a row without it ran into max_new_tokens. temperature 0 is greedy;
        top_k 0 and top_p 1 sample from the model's own distribution, the only setting PPO may use.
        on_token(ids): called after each step with the B new ids, for streaming. rand: what draws a step's random numbers.
        """
        B, P = len(prompts), max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise ValueError("an empty prompt: generation needs at least one token to start from")
        if P + max_new_tokens > self.config.block_size:
            raise ValueError(f"{P} prompt + {max_new_tokens} new tokens do not fit in block_size {self.config.block_size}")
        tokens = torch.tensor([[0] * (P - len(p)) + list(p) for p in prompts], device=self.device)  # (B, P), left-padded
        n_pad = torch.tensor([P - len(p) for p in prompts], device=self.device)  # (B,)
        dtype = torch.get_autocast_dtype(self.device.type) if torch.is_autocast_enabled(self.device.type) else self.embed.weight.dtype
        cache = KVCache(self.config, B, P + max_new_tokens, dtype, self.device)
        slots = torch.arange(P, device=self.device)
        done = torch.zeros(B, dtype=torch.bool, device=self.device)
        columns = []  # one (B,) of ids a step
        for _ in range(max_new_tokens):
            logits = self.logits(self.hidden(tokens, n_pad, cache, slots)[:, -1])  # (B, V)
            if not columns and not logits.isfinite().all():  # sampling from NaN would stop a GPU for good
                raise FloatingPointError("logits of the next token")
            ids = sample(logits, temperature, top_k, top_p, generator, rand)  # (B,)
            columns.append(ids)
            if on_token:
                on_token(ids.tolist())
            if end_id is not None:
                done |= ids == end_id
                if done.all():
                    break
            tokens, slots = ids[:, None], slots[-1:] + 1  # from now on one token a step: (B, 1), (1,)
        rows = torch.stack(columns, dim=1).tolist()  # (B, steps)
        return [row[: row.index(end_id) + 1] if end_id in row else row for row in rows]


def token_logprobs(logits, targets):
    """log p(target): logits (.., V), targets (..) -> (..), float32."""
    return -F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none").view(targets.shape)


def last_true(mask):
    """Index of each row's last True: (B, T) -> (B,)."""
    return mask.size(1) - 1 - mask.int().flip(1).argmax(1)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None, rand=torch.rand):
    """One id a row from logits (B, V): (B,)."""
    if temperature < 1e-6:  # 0, or so near it that the division would overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:  # keep the smallest set whose probability reaches top_p (arXiv 1904.09751)
        sorted_logits, order = logits.sort(descending=True)  # (B, V)
        probs = sorted_logits.softmax(-1)
        outside = probs.cumsum(-1) - probs >= top_p  # the mass before a token
        outside[:, 0] = False  # the first token stays, also with top_p 0
        logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
    # one random number a row, found in the cumulative distribution; torch.multinomial draws one for each of the V ids,
    # a quarter of generation's time
    cdf = logits.softmax(-1).cumsum(-1)  # (B, V)
    u = rand(len(cdf), 1, device=cdf.device, generator=generator)  # (B, 1), below 1
    return torch.searchsorted(cdf / cdf[:, -1:], u, right=True).squeeze(1)
