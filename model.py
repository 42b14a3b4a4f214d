"""The GPT: a decoder-only transformer of the Llama/Qwen3 family, with attention written by hand.

Shapes are noted where they change:
    B = batch    T = query positions    S = key positions (S = T without a cache)    C = n_embd
    H = n_head   G = n_kv_head          D = head_dim                                 V = vocab_size

Indexing in all four stages: logits[:, t] predict token t+1.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    vocab_size: int = 2048
    block_size: int = 256  # longest context, in tokens
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int = 4  # < n_head: grouped-query attention (arXiv 2305.13245), a smaller cache
    n_embd: int = 192
    head_dim: int = 0  # 0: n_embd // n_head; Qwen3 chooses it freely
    n_inner: int = 0  # width of the MLP; 0: 8/3 n_embd, as large as a 4x MLP, rounded up to 64
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    qk_norm: bool = False  # RMSNorm on queries and keys, as in Qwen3
    tied: bool = True  # one matrix embeds tokens and produces the logits

    def __post_init__(self):
        sizes = ("vocab_size", "block_size", "n_layer", "n_head", "n_kv_head", "n_embd")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_kv_head {self.n_kv_head} does not divide n_head {self.n_head}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need pairs")
        self.n_inner = self.n_inner or 64 * math.ceil(8 * self.n_embd / 3 / 64)


# ---- rotary positions


def rope_table(config):
    """cos and sin of every position's rotation angles, each (block_size, D/2), float32."""
    D = config.head_dim
    frequencies = config.rope_theta ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)  # (D/2,)
    angles = torch.arange(config.block_size)[:, None] * frequencies  # (block_size, D/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotary positions (arXiv 2104.09864): x (B, H, T, D), cos and sin (.., T, D/2), float32.

    Rotates each pair (x[i], x[i + D/2]), as Llama's code does; the paper pairs neighbours.
    """
    x1, x2 = x.chunk(2, dim=-1)  # (B, H, T, D/2) each
    rotated = torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)  # (B, H, T, D)
    return rotated.to(x.dtype)


# ---- attention


def causal_mask(query_positions, n_keys, n_pad=None):
    """What is added to the attention scores: 0 where a query may look, -inf where not.

    query_positions (T,) -> (T, S), S = n_keys; with n_pad (B,) pads on the left -> (B, 1, T, S).
    A pad may look at itself: an empty row of the softmax would be NaN.
    """
    keys = torch.arange(n_keys, device=query_positions.device)  # (S,)
    queries = query_positions[:, None]  # (T, 1)
    visible = keys <= queries  # (T, S)
    if n_pad is not None:
        is_token = keys >= n_pad.view(-1, 1, 1, 1)  # (B, 1, 1, S)
        visible = visible & (is_token | (keys == queries))  # (B, 1, T, S)
    return torch.zeros(visible.shape, device=keys.device).masked_fill(~visible, -torch.inf)


def attention(q, k, v, attn_mask):
    """softmax(q k^T / sqrt(D) + attn_mask) v.

    q (B, H, T, D), k and v (B, H, S, D), attn_mask (.., T, S) -> (B, H, T, D)

    torch.compile recognizes exactly this form and replaces it with one fused kernel, which
    tests/test_attention.py and tests/test_fusion.py watch. A scale by multiplication, a
    masked_fill, a float32 mask or the float32 softmax of CUDA's autocast would not match.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1)) + attn_mask.to(q.dtype)  # (B, H, T, S)
    weights = torch.softmax(scores, dim=-1, dtype=q.dtype)  # (B, H, T, S)
    return weights.to(v.dtype) @ v  # (B, H, T, D)


class KVCache:
    """Every layer's keys and values. Their shape is fixed, so that decoding compiles once.

    A tensor per layer: compiled code updates these in place, and copies one that holds them all.
    """

    def __init__(self, config, batch_size, length, dtype, device):
        shape = (batch_size, config.n_kv_head, length, config.head_dim)  # (B, G, S, D)
        layers = range(config.n_layer)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.length = length

    def update(self, layer, cache_positions, k, v):
        """Writes k and v (B, G, T, D) at cache_positions (T,); returns all of the layer's."""
        all_k, all_v = self.k[layer], self.v[layer]  # (B, G, S, D) each
        all_k.index_copy_(2, cache_positions, k.to(all_k.dtype))
        all_v.index_copy_(2, cache_positions, v.to(all_v.dtype))
        return all_k, all_v


class Attention(nn.Module):
    def __init__(self, config, layer):
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

    def forward(self, x, cos, sin, attn_mask, cache, cache_positions):
        B, T, _ = x.shape
        H, G, D = self.config.n_head, self.config.n_kv_head, self.config.head_dim
        q = self.q_proj(x).view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, G, D).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, G, D).transpose(1, 2)  # (B, G, T, D)
        v = v.contiguous()  # like the rotated q and k; torch.compile's fused kernel needs it
        if self.config.qk_norm:
            q, k = self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, cache_positions, k, v)  # (B, G, S, D)
        if G < H:  # each key/value head serves H / G query heads
            k = k.repeat_interleave(H // G, dim=1)  # (B, H, S, D)
            v = v.repeat_interleave(H // G, dim=1)  # (B, H, S, D)
        if attn_mask is None:  # compiled, and only the future is hidden: see GPT.hidden
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        else:
            y = attention(q, k.to(q.dtype), v.to(q.dtype), attn_mask)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, H * D)  # (B, T, H * D)
        return self.o_proj(y)  # (B, T, C)


# ---- the network


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, T, n_inner)
        return self.down_proj(x)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.attn = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, attn_mask, cache, cache_positions):
        x = x + self.attn(self.attn_norm(x), cos, sin, attn_mask, cache, cache_positions)
        x = x + self.mlp(self.mlp_norm(x))
        return x  # (B, T, C)


class GPT(nn.Module):
    config_class = GPTConfig  # what load_checkpoint makes the config from

    def __init__(self, config):
        super().__init__()
        self.config = config
        # A multiple of 64 rows makes for faster kernels. `logits` cuts the spare ones off, so
        # they have no logit and are never sampled.
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
        self.init_weights()

    def init_weights(self):
        """GPT-2's: std 0.02, and 0.02 / sqrt(2 n_layer) where a matrix writes to the residual."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.n_layer) if is_residual else 0.02
                nn.init.normal_(parameter, std=std)

    @property
    def device(self):
        return self.embed.weight.device

    def n_params(self):
        return sum(p.numel() for p in self.parameters())  # a tied matrix counts once

    def hidden(self, tokens, n_pad=None, cache=None, cache_positions=None):
        """The last hidden states (B, T, C) of tokens (B, T), which the LM and reward heads read.

        n_pad (B,): pads on the left of each row. Pads on the right need nothing: no token
        before them sees them.
        cache, cache_positions (T,): where to write keys and values; all before them are seen.
        """
        T = tokens.size(1)
        if cache is None:
            if T > self.config.block_size:
                raise ValueError(f"{T} tokens do not fit in block_size {self.config.block_size}")
            cache_positions = torch.arange(T, device=tokens.device)
        # Compiled training does without the mask, for a kernel that skips what it would hide,
        # half of the work: flash attention takes none.
        is_plain = cache is None and n_pad is None
        attn_mask = None
        if not (is_plain and torch.compiler.is_compiling()):
            n_keys = T if cache is None else cache.length
            attn_mask = causal_mask(cache_positions, n_keys, n_pad)  # (T, S) or (B, 1, T, S)
        text_positions = cache_positions  # (T,)
        if n_pad is not None:
            text_positions = (cache_positions - n_pad.view(-1, 1, 1)).clamp(min=0)  # (B, 1, T)
        cos, sin = self.cos[text_positions], self.sin[text_positions]  # (.., T, D/2) each
        x = self.embed(tokens)  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin, attn_mask, cache, cache_positions)  # (B, T, C)
        return self.norm(x)  # (B, T, C)

    def logits(self, hidden):
        """hidden (.., C) -> logits (.., V), float32."""
        return self.lm_head(hidden)[..., : self.config.vocab_size].float()

    def forward(self, tokens, n_pad=None):
        return self.logits(self.hidden(tokens, n_pad))  # (B, T, V)

    def next_logits(self, tokens, n_pad, cache, cache_positions):
        """The logits (B, V) after the last of tokens (B, T): one step of generate."""
        hidden = self.hidden(tokens, n_pad, cache, cache_positions)[:, -1]  # (B, C)
        return self.logits(hidden)  # (B, V)

    @torch.no_grad()
    def generate(
        self,
        prompts,
        max_new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        end_id=None,
        on_token=None,
        uniforms=None,
    ):
        """Continues each prompt, a list of token ids of any length. Returns the new ids as lists.

        A row ends with end_id, which is kept; a row without it ran into max_new_tokens.
        temperature 0 is greedy. Only top_k 0 and top_p 1 sample from the model's own distribution.
        on_token(ids): called after each step with the B new ids, for streaming.
        uniforms (B, max_new_tokens): the random numbers to sample with; None: drawn here. PPO
        draws them for all processes, so that each samples what one process would.
        """
        B, P = len(prompts), max(map(len, prompts))
        if min(map(len, prompts)) == 0:
            raise ValueError("an empty prompt: generation needs at least one token to start from")
        if P + max_new_tokens > self.config.block_size:
            raise ValueError(
                f"{P} prompt + {max_new_tokens} new tokens "
                f"do not fit in block_size {self.config.block_size}"
            )
        tokens = [[0] * (P - len(prompt)) + list(prompt) for prompt in prompts]
        tokens = torch.tensor(tokens, device=self.device)  # (B, P), padded on the left
        n_pad = torch.tensor([P - len(prompt) for prompt in prompts], device=self.device)  # (B,)
        dtype = self.embed.weight.dtype
        if torch.is_autocast_enabled(self.device.type):
            dtype = torch.get_autocast_dtype(self.device.type)
        cache = KVCache(self.config, B, P + max_new_tokens, dtype, self.device)
        cache_positions = torch.arange(P, device=self.device)  # (P,)
        done = torch.zeros(B, dtype=torch.bool, device=self.device)
        columns = []  # the new ids, (B,) per step
        for step in range(max_new_tokens):
            logits = self.next_logits(tokens, n_pad, cache, cache_positions)  # (B, V)
            # NaN would sample an id beyond V, and looking that up breaks a GPU's context
            if step == 0 and not logits.isfinite().all():
                raise FloatingPointError("the logits of the next token are not finite")
            u = None if uniforms is None else uniforms[:, step].contiguous()  # (B,)
            ids = sample(logits, temperature, top_k, top_p, u)  # (B,)
            columns.append(ids)
            if on_token:
                on_token(ids.tolist())
            if end_id is not None:
                done |= ids == end_id
                if done.all():
                    break
            tokens = ids[:, None]  # (B, 1): from now on one token per step
            cache_positions = cache_positions[-1:] + 1  # (1,)
        rows = torch.stack(columns, dim=1).tolist()  # (B, steps)
        if end_id is None:
            return rows
        return [row[: row.index(end_id) + 1] if end_id in row else row for row in rows]


# ---- helpers


def token_logprobs(logits, targets):
    """log p(target): logits (.., V), targets (..) -> (..), float32."""
    losses = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), reduction="none")
    return -losses.view(targets.shape)


def sample(logits, temperature=1.0, top_k=0, top_p=1.0, u=None):
    """One id per row of logits (B, V): (B,). u (B,): random numbers in [0, 1); None: drawn here."""
    if temperature < 1e-6:  # 0, or so near it that the division would overflow
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1:  # keep the smallest set whose probability reaches top_p (arXiv 1904.09751)
        sorted_logits, order = logits.sort(descending=True)  # (B, V) each
        probs = sorted_logits.softmax(-1)  # (B, V)
        outside = probs.cumsum(-1) - probs >= top_p  # by the mass before a token
        outside[:, 0] = False  # the first token stays, also with top_p 0
        logits = logits.masked_fill(outside.gather(-1, order.argsort(-1)), -torch.inf)
    # Inverts the cumulative distribution at one random number per row. torch.multinomial draws
    # one for each of the V ids, which takes a quarter of generation's time.
    cdf = logits.softmax(-1).cumsum(-1)  # (B, V)
    if u is None:
        u = torch.rand(len(cdf), device=cdf.device)  # (B,)
    return torch.searchsorted(cdf / cdf[:, -1:], u[:, None], right=True).squeeze(1)  # (B,)


def scatter(x, places, like):
    """x (N,) at places, two (N,), and 0 elsewhere, in the shape (B, T) of like."""
    return torch.zeros(like.shape, device=like.device).index_put(places, x)


def last_true(mask):
    """Index of each row's last True: (B, T) -> (B,)."""
    return mask.size(1) - 1 - mask.int().flip(1).argmax(1)
