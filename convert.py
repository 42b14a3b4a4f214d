"""Open weights of the Llama and Qwen3 families in, checkpoints of this project out.

    python convert.py --from_gguf model.gguf --out out/smol.pt      # what Ollama and llama.cpp use
    python convert.py --from_hf path/to/folder --out out/base.pt    # what transformers saves
    python convert.py --from_checkpoint out/ppo.pt --out my_model   # for transformers' Auto classes

A model with a chat template keeps its turns: `python chat.py --model out/smol.pt` talks to it, and
SFT, reward model and PPO use them too. One without gets this project's special tokens appended.

Their tokens keep their ids. The single bytes that a vocabulary lacks are appended (SmolLM2's lacks
21, and loses them from text). Rows beyond the tokenizer's ids are left out.
"""

import contextlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch

from data import chat_template, gguf_file
from data.tokenizer import BPE_PATTERN, BYTES, NORMAL_FORMS, ROLES, SPECIAL_TOKENS, Tokenizer
from model import GPT, GPTConfig
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint, save_checkpoint
from utils.cli import die, parse_config
from utils.files import read_json, read_text, write_text, writing

# Names of our config's fields and of our weights in their files.
SIZES = {
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_embd": "hidden_size",
    "n_inner": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
WEIGHTS = {
    r"^embed\.": "model.embed_tokens.",
    r"^blocks\.": "model.layers.",
    r"^norm\.": "model.norm.",
    r"\.attn\.": ".self_attn.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.mlp_norm\.": ".post_attention_layernorm.",
}
# GPT-2 writes a byte as a visible character: 188 printable ones as they are, others from U+0100 on.
BYTE_CHARS = {b: chr(b) if i < 188 else chr(0x100 + i - 188) for i, b in enumerate(BYTES)}
CHAR_BYTES = {c: b for b, c in BYTE_CHARS.items()}
# SmolLM2 first cuts single digits out, then applies GPT-2's split between them: white space before
# a digit stays whole.
DIGITS = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
# Qwen's and Llama 3's, which differ in how many digits make a word.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")
# Tokens that stand between documents in pretraining, the likelier ones first.
SEPARATORS = ("<|begin_of_text|>", "<|endoftext|>")
# Renders what data/conversation.py renders, and refuses the orders of roles that it refuses.
CHAT_TEMPLATE = (
    "{% set around = AROUND %}"
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for message in turns %}{% if message.role != ('user', 'assistant')[loop.index0 % 2] %}"
    "{{ raise_exception('roles must be an optional system, then user and assistant in turn') }}"
    "{% endif %}{% endfor %}"
    "{% if messages[0].role != 'system' %}{{ around.start }}{% endif %}"
    "{% for message in messages %}"
    "{{ around[message.role][0] + message.content + around[message.role][1] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ around.assistant[0] }}{% endif %}"
)
# Names in GGUF files: of our config's fields, after the architecture's; of our weights; and of the
# ways to split text, each with the Unicode form that the model's own tokenizer gives the text.
GGUF_SIZES = {
    "block_size": "context_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_kv_head": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "n_embd": "embedding_length",
    "n_inner": "feed_forward_length",
    "rope_theta": "rope.freq_base",
    "norm_eps": "attention.layer_norm_rms_epsilon",
}
GGUF_WEIGHTS = {
    r"^embed\.": "token_embd.",
    r"^blocks\.": "blk.",
    r"^norm\.": "output_norm.",
    r"^lm_head\.": "output.",
    r"\.attn\.o_proj": ".attn_output",
    r"\.attn\.([qkv])_proj": r".attn_\1",
    r"\.attn\.([qk])_norm": r".attn_\1_norm",
    r"\.mlp_norm\.": ".ffn_norm.",
    r"\.mlp\.(\w+)_proj": r".ffn_\1",
}
GGUF_SPLITS = {
    "gpt-2": (BPE_PATTERN, None),
    "smollm": (DIGITS, None),
    "llama-bpe": (LLAMA3, None),
    "qwen2": (QWEN, "NFC"),
    "deepseek-r1-qwen": (QWEN, "NFC"),
}
# GGUF's kinds of tokens: plain ones, those that text may hold, those that fill the vocabulary up.
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5


@dataclass
class Config:
    from_gguf: str = ""  # GGUF file to read, of whatever quantization; needs `pip install gguf`
    from_hf: str = ""  # Hugging Face folder to read: config.json, tokenizer.json and safetensors
    from_checkpoint: str = ""  # checkpoint of this project to read
    out: str = ""  # the checkpoint, or the new folder, to write
    block_size: int = 0  # of a model that is read: longest context, in tokens; 0: as it says


# ---- theirs -> ours: the config


@contextlib.contextmanager
def reading(path):
    """Around the parsing of a file of theirs: unexpected content ends the program in one line."""
    wrong_content = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
    try:
        yield
    except (*wrong_content, MemoryError, RuntimeError) as e:
        die(f"{path}: cannot be used ({e!r:.150}); download it again, or use another model")


def find_unsupported(theirs, rope):
    """What of a config.json, and of its part about rotary positions, model.py lacks, or None."""
    kind = theirs.get("model_type")
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    rotated_fraction = (theirs | rope).get("partial_rotary_factor", 1)
    layer_types = set(theirs.get("layer_types", ()))
    checks = {
        f"model_type {kind!r}": kind not in ("llama", "qwen3"),
        f"scaled rotary positions ({rope_type})": rope_type != "default",
        "rotary positions on a part of each head": rotated_fraction != 1,
        "sliding-window attention": theirs.get("use_sliding_window", "sliding_window" in theirs),
        "layers that are not full attention": layer_types - {"full_attention"},
        "biases in attention or MLP": theirs.get("attention_bias") or theirs.get("mlp_bias"),
        "an activation other than silu": theirs.get("hidden_act", "silu") != "silu",
        "quantized weights": "quantization_config" in theirs,
    }
    return next((what for what, is_so in checks.items() if is_so), None)


def read_config(path, block_size=0):
    """The GPTConfig of a config.json; the program ends at what model.py does not compute."""
    theirs = {key: value for key, value in read_json(path).items() if value is not None}
    # transformers 5's name, then 4's
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if unsupported := find_unsupported(theirs, rope):
        die(f"{path}: {unsupported}: model.py does not compute that; use a plain Llama or Qwen3")

    # what transformers assumes where a config.json is silent
    is_qwen3 = theirs["model_type"] == "qwen3"
    assumed = dict(rope_theta=1e4, rms_norm_eps=1e-6, tie_word_embeddings=False)
    assumed["head_dim"] = 128 if is_qwen3 else 0
    assumed["num_key_value_heads"] = theirs.get("num_attention_heads")

    theirs = assumed | theirs | rope
    sizes = {name: theirs[key] for name, key in SIZES.items()}
    block_size = block_size or sizes["block_size"]
    sizes["block_size"] = block_size // 8 * 8  # later stages pad to multiples of 8
    return GPTConfig(**sizes, qk_norm=is_qwen3)


# ---- theirs -> ours: the tokenizer


def read_pattern(pre_tokenizer):
    """The one regular expression that cuts text into words as a pre_tokenizer does, or None."""
    *cuts, last = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    if not last or last["type"] != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    cuts_too = last.get("use_regex", True)  # by GPT-2's pattern
    isolated = {"behavior": "Isolated", "invert": False}
    match cuts:
        case [] if cuts_too:
            return BPE_PATTERN
        case [{"type": "Digits", "individual_digits": True}] if cuts_too:
            return DIGITS
        case [{"type": "Split", "pattern": {"Regex": regex}, **how}] if not cuts_too:
            return regex if how == isolated else None


def last_pair(token, ranks):
    """The two parts that byte-pair encoding of token (bytes) joins last; None if it gets stuck."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pair_ranks = [ranks.get(a + b, math.inf) for a, b in pairwise(parts)]
        rank = min(pair_ranks)
        if rank == math.inf:
            return None
        i = pair_ranks.index(rank)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def follows_ranks(merges, ranks, ignore_merges):
    """Whether merges [(bytes, bytes)] in order give what tiktoken gives, by joining lowest ranks.

    They do if ids rise with the merges and each token's own last pair is a merge: where tiktoken
    joins a token, it has done inside it what it does to the token alone, so it only ever joins
    pairs of the list.
    """
    ids = [ranks[a + b] for a, b in merges]
    pairs = {last_pair(token, ranks) for token in ranks if len(token) > 1}
    if ignore_merges:  # a word that is a token is looked up, as tiktoken does: no merge need exist
        pairs.discard(None)
    return ids == sorted(ids) and pairs <= set(merges)


def read_added_tokens(path, added):
    """{content: id} of all added tokens, and the contents of those that text may hold."""
    of_text = [token for token in added if not token["special"]]
    texts = [token["content"] for token in of_text]
    strips = any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in of_text)
    if strips or any(a != b and b.startswith(a) for a in texts for b in texts):
        die(f"{path}: added tokens strip white space or begin alike; tiktoken does neither")
    return {token["content"]: token["id"] for token in added}, texts


def to_bytes(word):
    return bytes(CHAR_BYTES[c] for c in word)


def read_ranks(path, bpe, specials):
    """{token bytes: id} of a byte-level BPE."""
    words = sorted((id, word) for word, id in bpe["vocab"].items() if word not in specials)
    merges = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
    try:
        ranks = {to_bytes(word): id for id, word in words}
        merges = [tuple(map(to_bytes, pair)) for pair in merges]
    except KeyError as e:
        die(f"{path}: {e} is no byte-level character; only a byte-level BPE is supported")
    if not follows_ranks(merges, ranks, bpe.get("ignore_merges")):
        die(f"{path}: merging by lowest id, as tiktoken does, differs from its merges; unsupported")
    return ranks


def read_template(folder):
    """(chat template or None, the tokens that it may name) of a Hugging Face folder."""
    path, template = folder / "tokenizer_config.json", None
    settings = read_json(path) if path.exists() else {}
    if (folder / "chat_template.jinja").exists():
        template = read_text(folder / "chat_template.jinja")
    elif isinstance(settings.get("chat_template"), str):
        template = settings["chat_template"]
    variables = {}
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        variables[name] = token["content"] if isinstance(token, dict) else token
    return template, variables


def append_tokens(path, ranks, rules, template, variables):
    """(Tokenizer, number of ids that they had): ours follow their ids.

    A template's turns become the tokenizer's, and then none of our special tokens is needed.
    """
    specials = rules["special_tokens"]
    ids = sorted([*ranks.values(), *specials.values()])
    if ids != list(range(len(ids))):
        die(f"{path}: the ids are not 0 .. {len(ids) - 1}, each once; download it again")
    separators = [specials[name] for name in SEPARATORS if name in specials]
    if separators:
        rules["separator"] = separators[0]
    for b in BYTES:
        ranks.setdefault(bytes([b]), len(ranks) + len(specials))
    with_ours = dict(specials)
    for name in SPECIAL_TOKENS:
        with_ours.setdefault(name, len(ranks) + len(with_ours))
    tokenizer = Tokenizer(ranks, rules | dict(special_tokens=with_ours))
    if template:
        try:
            turns = chat_template.read_turns(template, variables)
            chat = chat_template.to_ids(turns, tokenizer, specials.keys())
            if chat != tokenizer.chat:
                tokenizer = Tokenizer(ranks, rules | dict(chat=chat))
        except ValueError as e:
            print(f"{path}: no use of its chat template ({e}); turns get this project's tokens")
    return tokenizer, len(ids)


def read_tokenizer(path):
    """(Tokenizer, number of ids the file had) of a tokenizer.json that holds a byte-level BPE."""
    content = read_json(path)
    bpe = content["model"]
    pattern = read_pattern(content.get("pre_tokenizer"))
    form = (content.get("normalizer") or {}).get("type")
    extras = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    is_plain = bpe["type"] == "BPE" and not any(bpe.get(extra) for extra in extras)
    if not is_plain or not pattern or form not in NORMAL_FORMS:
        die(f"{path}: not a byte-level BPE with one splitting pattern, as GPT-2 or Qwen3 have")

    specials, texts = read_added_tokens(path, content["added_tokens"])
    ranks = read_ranks(path, bpe, specials)
    rules = dict(pattern=pattern, special_tokens=specials, text_tokens=texts, normal_form=form)
    return append_tokens(path, ranks, rules, *read_template(path.parent))


# ---- theirs -> ours: the weights


def hf_name(name, table=WEIGHTS):
    """Their name of our weight, in Hugging Face folders or as another table says."""
    for ours, theirs in table.items():
        name = re.sub(ours, theirs, name)
    return name


def read_weights(folder):
    """{name: tensor} of model.safetensors, or of the shards that its .index.json lists."""
    index, shards = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        shards = sorted(set(read_json(index)["weight_map"].values()))
    weights = {}
    for path in (folder / shard for shard in shards):
        if not path.is_file():  # nor a name that no file can have: safetensors would panic
            die(f"{path}: no such file; download it as safetensors (a pickled .bin could run code)")
        try:
            weights |= safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as e:
            die(f"{path}: not safetensors ({e}); download it (a pickled .bin could run code)")
    return {name: w for name, w in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def grow(matrix, n_kept, n_rows):
    """matrix's first n_kept rows, then their mean again and again: (n_rows, C).

    So an appended token gets the mean of the logits, and before any training a probability of at
    most 1 / n_kept, whatever the context: exp(mean) <= mean(exp). Rows as different from each
    other as theirs are got a token of these into one answer in a hundred.
    """
    kept = matrix[:n_kept].float()  # (n_kept, C)
    return torch.cat((kept, kept.mean(0).expand(n_rows - n_kept, -1)))


def fill(model, path, weights, n_kept, table=WEIGHTS, load=torch.as_tensor):
    """Copies their weights into the model; rows beyond their n_kept ids become the others' mean.

    weights: {their name: what load makes a tensor of}
    """
    if model.config.tied:
        weights.pop(hf_name("lm_head.weight", table), None)  # some hold the tied matrix twice
    for name, parameter in model.named_parameters():  # names a tied matrix once
        theirs = hf_name(name, table)
        tensor = load(weights.pop(theirs)) if theirs in weights else torch.empty(0)
        if name in ("embed.weight", "lm_head.weight") and tensor.dim() == 2:
            tensor = grow(tensor, n_kept, parameter.size(0))
        if tensor.shape != parameter.shape:
            die(f"{path}: {theirs} is {[*tensor.shape]}, its config says {[*parameter.shape]}")
        parameter.data.copy_(tensor)
    if weights:
        die(f"{path}: model.py has no place for the weights {', '.join(sorted(weights)[:3])}")


def from_hf(folder, config):
    """(model, tokenizer) of a Hugging Face folder, in float32."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).exists():
            die(f"{folder / name}: no such file; transformers' save_pretrained writes it")
    with reading(folder / "tokenizer.json"):
        tokenizer, n_kept = read_tokenizer(folder / "tokenizer.json")
    with reading(folder / "config.json"):
        sizes = read_config(folder / "config.json", config.block_size)
        if n_kept > sizes.vocab_size:
            die(f"{folder}: {n_kept} ids in tokenizer.json, fewer in config.json; use one model's")
        sizes.vocab_size = tokenizer.vocab_size
        model = GPT(sizes)
    with reading(folder / "model.safetensors.index.json"):
        weights = read_weights(folder)
    fill(model, folder, weights, n_kept)
    return model, tokenizer


# ---- theirs -> ours: GGUF, where all of it is one file


def read_gguf_config(path, fields, block_size=0):
    """The GPTConfig of GGUF metadata; the program ends at what model.py does not compute."""
    kind = fields["general.architecture"]
    if kind not in ("llama", "qwen3") or fields.get("split.count", 1) > 1:
        what = f"architecture {kind!r}" if kind not in ("llama", "qwen3") else "a part of a model"
        die(f"{path}: {what}; model.py computes Llama and Qwen3, from one file")
    theirs = {}
    for key, value in fields.items():
        if key.startswith(f"{kind}."):
            theirs[key.removeprefix(f"{kind}.")] = value
    sizes = {name: theirs.pop(key) for name, key in GGUF_SIZES.items() if key in theirs}

    # what is left must say nothing new
    head_dim = sizes.get("head_dim") or sizes["n_embd"] // sizes["n_head"]
    expected = dict.fromkeys(("attention.value_length", "rope.dimension_count"), head_dim)
    expected["vocab_size"] = theirs.get("vocab_size")
    for key, value in theirs.items():
        if value not in (0, "none", expected.get(key)):
            die(f"{path}: {kind}.{key} {value!r:.50}: model.py does not compute that")

    block_size = block_size or sizes["block_size"]
    sizes["block_size"] = block_size // 8 * 8  # later stages pad to multiples of 8
    sizes.setdefault("n_kv_head", sizes["n_head"])
    # a float32 of the file: 9.99999975e-06 was 1e-05
    sizes["norm_eps"] = float(f"{sizes['norm_eps']:.7g}")
    return GPTConfig(vocab_size=1, **sizes, qk_norm=kind == "qwen3")


def read_gguf_tokenizer(path, fields):
    """(Tokenizer, number of ids the file had) of GGUF metadata that hold a byte-level BPE."""
    theirs = {}
    for key, value in fields.items():
        if key.startswith("tokenizer."):
            theirs[key.removeprefix("tokenizer.ggml.")] = value
    kind, split = theirs["model"], theirs.get("pre")
    if kind != "gpt2" or split not in GGUF_SPLITS:
        known = ", ".join(GGUF_SPLITS)
        die(f"{path}: tokenizer {kind!r}, split {split!r}; read here: 'gpt2' with one of {known}")
    tokens, kinds = theirs["tokens"], theirs["token_type"]
    if len(tokens) != len(kinds) or len(set(tokens)) != len(tokens):
        die(f"{path}: tokens without a kind, or twice the same one; download it again")
    while kinds and kinds[-1] == UNUSED:
        kinds.pop()

    vocab, added = {}, []
    strips = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    for id, (token, kind) in enumerate(zip(tokens, kinds)):
        if kind == NORMAL:
            vocab[token] = id
        else:
            added.append(dict(content=token, id=id, special=kind != USER_DEFINED) | strips)
    specials, texts = read_added_tokens(path, added)
    pattern, form = GGUF_SPLITS[split]
    bpe = dict(vocab=vocab, merges=theirs["merges"], ignore_merges=split == "llama-bpe")
    ranks = read_ranks(path, bpe, specials)
    rules = dict(pattern=pattern, special_tokens=specials, text_tokens=texts, normal_form=form)
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id"}
    variables = {name: tokens[theirs[key]] for name, key in names.items() if key in theirs}
    template = theirs.get("tokenizer.chat_template")
    return append_tokens(path, ranks, rules, template, variables)


def unpermute(matrix, n_head):
    """Llama's queries or keys (n_head * D, C) in the order of Hugging Face's code, and of ours.

    llama.cpp rotates neighbours, so its files interleave the two halves of each head.
    """
    D, C = matrix.size(0) // n_head, matrix.size(1)
    return matrix.view(n_head, D // 2, 2, C).transpose(1, 2).reshape(n_head * D, C)


def from_gguf(path, config):
    """(model, tokenizer) of a GGUF file, in float32."""
    with reading(path):
        fields, tensors = gguf_file.read(path)
        sizes = read_gguf_config(path, fields, config.block_size)
        if "rope_freqs.weight" in tensors:
            die(f"{path}: scaled rotary positions: model.py does not compute that")
        tokenizer, n_kept = read_gguf_tokenizer(path, fields)
        sizes.vocab_size = tokenizer.vocab_size
        sizes.tied = "output.weight" not in tensors
        model = GPT(sizes)
        fill(model, path, tensors, n_kept, GGUF_WEIGHTS, gguf_file.dequantize)
    if fields["general.architecture"] == "llama":
        for block in model.blocks:
            for matrix, n_head in (
                (block.attn.q_proj.weight, sizes.n_head),
                (block.attn.k_proj.weight, sizes.n_kv_head),
            ):
                matrix.data = unpermute(matrix.data, n_head)
    return model, tokenizer


# ---- ours -> theirs


def hf_weights(model):
    """{their name: weight}, without the padded rows; a tied matrix once."""
    weights = {hf_name(name): parameter.data for name, parameter in model.named_parameters()}
    for name in weights.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        weights[name] = weights[name][: model.config.vocab_size].clone()  # (V, C)
    return weights


def config_json(config):
    family = "Qwen3" if config.qk_norm else "Llama"
    kind = dict(architectures=[f"{family}ForCausalLM"], model_type=family.lower())
    kind["torch_dtype"] = "float32"
    sizes = {key: getattr(config, name) for name, key in SIZES.items()}
    return kind | sizes | dict(hidden_act="silu", attention_bias=False)


def bpe_json(tokenizer):
    """Vocabulary and merges; a character tokenizer is a BPE without merges."""
    ranks, pairs = tokenizer.ranks, []
    if tokenizer.is_char:
        spelled = {token: token.decode() for token in ranks}
    else:
        spelled = {token: "".join(BYTE_CHARS[b] for b in token) for token in ranks}
        tokens = sorted(ranks, key=ranks.get)
        pairs = [last_pair(token, ranks) for token in tokens if len(token) > 1]
    vocab = {spelled[token]: id for token, id in ranks.items()}
    return {
        "type": "BPE",
        "vocab": vocab | tokenizer.rules["special_tokens"],
        "merges": [[spelled[part] for part in pair] for pair in pairs if pair],
        "ignore_merges": True,  # a word that is a token becomes that token, as in tiktoken
    }


def tokenizer_json(tokenizer):
    """The tokenizer as the `tokenizers` library reads it."""
    rules, added = tokenizer.rules, []
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for name, id in sorted(rules["special_tokens"].items(), key=lambda item: item[1]):
        added.append(dict(id=id, content=name, special=name not in rules["text_tokens"]) | flags)
    pattern = {"Regex": rules["pattern"]}
    split = dict(type="Split", pattern=pattern, behavior="Isolated", invert=False)
    decoder = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    pre_tokenizer = dict(type="Sequence", pretokenizers=[split, decoder])
    if tokenizer.is_char:
        pre_tokenizer, decoder = None, {"type": "Fuse"}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": rules["normal_form"]} if rules["normal_form"] else None,
        "pre_tokenizer": pre_tokenizer,
        "decoder": decoder,
        "model": bpe_json(tokenizer),
    }


def template_of(tokenizer):
    """The chat template of the tokenizer's turns."""
    chat = tokenizer.chat
    around = {"start": tokenizer.decode(chat["start"])}
    for role in ROLES:
        around[role] = [tokenizer.decode(ids) for ids in chat[role]]
    return CHAT_TEMPLATE.replace("AROUND", json.dumps(around, ensure_ascii=False))


@contextlib.contextmanager
def atomic_folder(path):
    """A folder to fill that appears as path only when it is complete."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with writing(path):
        try:
            temporary.mkdir()
            yield temporary
            os.rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def to_hf(path, model, tokenizer):
    """Writes the folder that AutoModelForCausalLM and AutoTokenizer load."""
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad)
    files = {
        "config.json": config_json(model.config) | ids,
        "generation_config.json": ids,
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.block_size,
            "eos_token": tokenizer.decode([tokenizer.end]),
            "pad_token": tokenizer.decode([tokenizer.pad]),
            "clean_up_tokenization_spaces": False,
            "chat_template": template_of(tokenizer),
        },
    }
    with atomic_folder(path) as folder:
        for name, content in files.items():
            write_text(folder / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        file = folder / "model.safetensors"
        safetensors.torch.save_file(hf_weights(model), file, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", file)  # safetensors lets its owner alone read it
    print(f"wrote {path}")


def main(argv=None):
    config = parse_config(Config, __doc__, argv)
    sources = (config.from_gguf, config.from_hf, config.from_checkpoint)
    if sum(map(bool, sources)) != 1 or not config.out:
        die("give --out and one of --from_gguf, --from_hf and --from_checkpoint")
    if not config.from_checkpoint:
        read = from_gguf if config.from_gguf else from_hf
        model, tokenizer = read(Path(config.from_gguf or config.from_hf), config)
        save_checkpoint(config.out, "base", model, tokenizer, config)
    else:
        if Path(config.out).exists():
            die(f"{config.out}: exists already; name a new folder")
        model, tokenizer = load_checkpoint(config.from_checkpoint, LANGUAGE_MODELS, GPT, "cpu")
        to_hf(Path(config.out), model, tokenizer)


if __name__ == "__main__":
    main()
