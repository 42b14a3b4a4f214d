"""Checkpoints from and to Hugging Face folders of the Llama and Qwen3 families.

    python convert.py --from_hf path/to/folder --out out/base.pt     # theirs -> ours: a base for sft.py, reward.py, ppo.py
    python convert.py --from_checkpoint out/ppo.pt --out my_model    # ours -> a folder for transformers' Auto classes

Theirs keep their ids. Appended are the special tokens of this project and single bytes that a vocabulary lacks (SmolLM2
lacks 21, and loses them from text); rows beyond the tokenizer's ids are padding and left out. Text is encoded as it is:
a token that some tokenizers put before every text (Llama 3's <|begin_of_text|>) is not added here.
"""

import contextlib
import json
import math
import os
import shutil
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import safetensors.torch
import torch

import common
from data.tokenizer import BPE_PATTERN, BYTES, NORMAL_FORMS, SPECIAL_TOKENS, Tokenizer
from model import GPT, GPTConfig

# GPT-2 writes each byte as a visible character: the 188 printable ones as they are, the others from U+0100 on.
BYTE_CHARS = {b: chr(b) if i < 188 else chr(0x100 + i - 188) for i, b in enumerate(BYTES)}
CHAR_BYTES = {c: b for b, c in BYTE_CHARS.items()}
# SmolLM2 first cuts single digits out, then applies GPT-2's split between them: white space before a digit stays whole.
DIGITS_PATTERN = r"""\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
SIZES = {
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "head_dim": "head_dim",
    "n_embd": "hidden_size", "n_inner": "intermediate_size", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}  # fmt: skip
WEIGHTS = {
    "embed.": "model.embed_tokens.", "blocks.": "model.layers.", ".attn.": ".self_attn.",
    ".attn_norm.": ".input_layernorm.", ".mlp_norm.": ".post_attention_layernorm.",
}  # fmt: skip
# Renders what data/conversation.py renders, and refuses other orders of roles as it does.
CHAT_TEMPLATE = (
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for message in turns %}{% if message.role != ('user', 'assistant')[loop.index0 % 2] %}"
    "{{ raise_exception('roles must be an optional system, then user and assistant in turn') }}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass
class Config:
    from_hf: str = ""  # Hugging Face folder to read: config.json, tokenizer.json and safetensors
    from_checkpoint: str = ""  # checkpoint of this project to read
    out: str = ""  # the checkpoint, or the new folder, to write
    block_size: int = 0  # with --from_hf: longest sequence, in tokens; 0: as config.json says
    seed: int = 0  # of the appended rows


# ---- theirs -> ours


@contextlib.contextmanager
def reading(path):
    """Around what takes a file of theirs apart: one that is put together otherwise ends the program in one line."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, MemoryError) as e:
        common.die(f"{path}: not as transformers writes it ({e!r:.150}); download the file again")


def read_config(path, block_size=0):
    """The GPTConfig of a config.json; the program ends at what model.py does not compute."""
    theirs = {key: value for key, value in common.read_json(path).items() if value is not None}
    kind = theirs.get("model_type")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}  # transformers 5's name, then 4's
    rope_type = rope.get("rope_type") or rope.get("type") or "default"
    refused = {
        f"model_type {kind!r} (only llama and qwen3)": kind not in ("llama", "qwen3"),
        f"scaled rotary positions ({rope_type})": rope_type != "default",
        "rotary positions on a part of each head": (theirs | rope).get("partial_rotary_factor", 1) != 1,
        "sliding-window attention": theirs.get("use_sliding_window", "sliding_window" in theirs),
        "layers that are not full attention": set(theirs.get("layer_types", ())) - {"full_attention"},
        "biases in attention or MLP": theirs.get("attention_bias") or theirs.get("mlp_bias"),
        "an activation other than silu": theirs.get("hidden_act", "silu") != "silu",
        "quantized weights": "quantization_config" in theirs,
    }
    for what, is_so in refused.items():
        if is_so:
            common.die(f"{path}: {what}: model.py does not compute that; use a plain Llama or Qwen3")
    # What transformers assumes where a config.json is silent.
    silent = {"head_dim": 128 if kind == "qwen3" else 0, "rope_theta": 1e4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    silent["num_key_value_heads"] = theirs.get("num_attention_heads")
    theirs = silent | theirs | rope
    try:
        sizes = {name: theirs[key] for name, key in SIZES.items()}
        return GPTConfig(**sizes | {"block_size": block_size or sizes["block_size"]}, qk_norm=kind == "qwen3")
    except KeyError as e:
        common.die(f"{path}: has no {e}; download the file again")
    except ValueError as e:
        common.die(f"{path}: {e}")


def read_pattern(pre_tokenizer):
    """The one regular expression that cuts text into words as a tokenizer.json's pre_tokenizer does, None where there is none."""
    match (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer]):
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return BPE_PATTERN
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, **rest},
        ] if rest.get("use_regex", True):
            return DIGITS_PATTERN
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return regex


def last_pair(token, ranks):
    """The two parts that byte-pair encoding of token (bytes) joins last, None where it does not get to the token."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(pairwise(parts)))
        if rank == math.inf:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)


def follows_ranks(merges, ranks, ignore_merges):
    """Whether joining the pair of lowest rank, as tiktoken does, gives the same tokens as merges [(bytes, bytes)] in order.

    It does if ids rise with the merges and each token's own last pair is a merge: where tiktoken joins a token, it
    has done inside it what it does to the token alone, so it only ever joins pairs of the list.
    """
    ids, known = [ranks[a + b] for a, b in merges], set(merges)
    pairs = (last_pair(token, ranks) for token in ranks if len(token) > 1)
    # ignore_merges: a word that is a token is looked up, as tiktoken does, so no merge need lead to it.
    return ids == sorted(ids) and all(pair in known or (pair is None and ignore_merges) for pair in pairs)


def read_tokenizer(path):
    """(Tokenizer, number of ids the file had) of a tokenizer.json that holds a byte-level BPE."""
    if not path.exists():
        common.die(f"{path}: no such file; transformers' AutoTokenizer writes it with save_pretrained, if the tokenizer is a BPE")
    content = common.read_json(path)
    bpe, normalizer, added = content["model"], content.get("normalizer") or {}, content["added_tokens"]
    pattern = read_pattern(content.get("pre_tokenizer"))
    odd = [key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if bpe.get(key)]
    if bpe["type"] != "BPE" or odd or not pattern or normalizer.get("type") not in NORMAL_FORMS:
        common.die(f"{path}: not a byte-level BPE with one splitting pattern (as GPT-2, Llama 3, Qwen3 and SmolLM2 have)")

    specials = {t["content"]: t["id"] for t in added}
    text_tokens = [t["content"] for t in added if not t["special"]]
    strips = any(t[key] for t in added if not t["special"] for key in ("lstrip", "rstrip", "single_word"))
    if strips or any(a != b and b.startswith(a) for a in text_tokens for b in text_tokens):
        common.die(f"{path}: added tokens that strip white space or begin like one another, which tiktoken does not do")
    words = sorted(((id, word) for word, id in bpe["vocab"].items() if word not in specials))
    merges = [m.split(" ") if isinstance(m, str) else m for m in bpe["merges"]]
    try:
        ranks = {bytes(CHAR_BYTES[c] for c in word): id for id, word in words}
        merges = [tuple(bytes(CHAR_BYTES[c] for c in part) for part in pair) for pair in merges]
        same = follows_ranks(merges, ranks, bpe.get("ignore_merges"))
    except KeyError as e:
        common.die(f"{path}: {e} is no byte-level character or token; not a byte-level BPE")
    if not same:
        common.die(f"{path}: merging by lowest id, as tiktoken does, would not follow its merges; not supported")
    ids = sorted([*ranks.values(), *specials.values()])
    if ids != list(range(len(ids))):
        common.die(f"{path}: the ids are not 0 .. {len(ids) - 1}, each once")

    for b in BYTES:
        ranks.setdefault(bytes([b]), len(ranks) + len(specials))
    for name in SPECIAL_TOKENS:
        specials.setdefault(name, len(ranks) + len(specials))
    rules = {"pattern": pattern, "special_tokens": specials, "text_tokens": text_tokens, "normal_form": normalizer.get("type")}
    return Tokenizer(ranks, rules), len(ids)


def read_weights(folder):
    """{name: tensor} of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    index, weights = folder / "model.safetensors.index.json", {}
    shards = sorted(set(common.read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    for shard in shards:
        try:
            weights |= safetensors.torch.load_file(folder / shard)
        except FileNotFoundError:
            common.die(f"{folder / shard}: no such file; weights must be safetensors (a pickled .bin could run code)")
        except (safetensors.SafetensorError, OSError) as e:
            common.die(f"{folder / shard}: not readable as safetensors ({e}); download the file again")
    return {name: tensor for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}


def hf_name(name):
    for ours, theirs in WEIGHTS.items():
        name = name.replace(ours, theirs)
    return "model.norm.weight" if name == "norm.weight" else name


def grow(matrix, n_kept, n_rows, generator):
    """The first n_kept rows of matrix (.., C), then random ones with their mean and standard deviation: (n_rows, C)."""
    kept = matrix[:n_kept].float()  # (n_kept, C)
    new = kept.mean(0) + kept.std(0) * torch.randn(n_rows - n_kept, kept.size(1), generator=generator)  # (n_rows - n_kept, C)
    return torch.cat((kept, new))


def from_hf(folder, config):
    """(model, tokenizer) of a Hugging Face folder, in float32."""
    if not (folder / "config.json").exists():
        common.die(f"{folder}: has no config.json; give the folder of a downloaded model")
    with reading(folder / "config.json"):
        sizes = read_config(folder / "config.json", config.block_size)
    with reading(folder / "tokenizer.json"):
        tokenizer, n_kept = read_tokenizer(folder / "tokenizer.json")
    if n_kept > sizes.vocab_size:
        common.die(f"{folder}: the tokenizer has {n_kept} ids, the model {sizes.vocab_size} rows; they are not of one model")
    sizes.vocab_size = tokenizer.vocab_size
    try:
        model, generator = GPT(sizes), torch.Generator().manual_seed(config.seed)
    except (RuntimeError, TypeError) as e:
        common.die(f"{folder}: no model of these sizes can be made here ({str(e).splitlines()[0]})")
    with reading(folder / "model.safetensors.index.json"):
        weights = read_weights(folder)
    if sizes.tied:
        weights.pop("lm_head.weight", None)  # some folders hold the tied matrix twice
    for name, parameter in model.named_parameters():  # names a tied matrix once
        tensor = weights.pop(hf_name(name), torch.empty(0))
        if name in ("embed.weight", "lm_head.weight") and tensor.dim() == 2:
            tensor = grow(tensor, n_kept, parameter.size(0), generator)
        if tensor.shape != parameter.shape:
            common.die(f"{folder}: {hf_name(name)} is {list(tensor.shape)} or missing; config.json says {list(parameter.shape)}")
        parameter.data.copy_(tensor)
    if weights:
        common.die(f"{folder}: weights that the model has no place for: {', '.join(sorted(weights)[:3])}")
    return model, tokenizer


# ---- ours -> theirs


def token_ids(tokenizer):
    return {"bos_token_id": None, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}


def config_json(config: GPTConfig, tokenizer):
    family = "Qwen3" if config.qk_norm else "Llama"
    kind = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), "torch_dtype": "float32"}
    fixed = {"hidden_act": "silu", "attention_bias": False}
    return kind | {key: getattr(config, name) for name, key in SIZES.items()} | fixed | token_ids(tokenizer)


def tokenizer_json(tokenizer):
    """The tokenizer as the `tokenizers` library reads it: a byte-level BPE, or the characters of a char tokenizer."""
    rules, ranks, is_char = tokenizer.rules, tokenizer.ranks, tokenizer.is_char

    def spell(token):
        return token.decode() if is_char else "".join(BYTE_CHARS[b] for b in token)

    pairs = [] if is_char else [last_pair(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": rules["pattern"]}, "behavior": "Isolated", "invert": False}
    added = [
        {"id": id, "content": name, "special": name not in rules["text_tokens"]}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for name, id in sorted(rules["special_tokens"].items(), key=lambda item: item[1])
    ]
    bpe = {
        "type": "BPE",
        "vocab": {spell(token): id for token, id in ranks.items()} | rules["special_tokens"],
        "merges": [[spell(part) for part in pair] for pair in pairs if pair],
        "ignore_merges": True,  # a word that is a token becomes that token, as in tiktoken
    }
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": rules["normal_form"]} if rules["normal_form"] else None,
        "pre_tokenizer": None if is_char else {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": {"type": "Fuse"} if is_char else byte_level,
        "model": bpe,
    }


@contextlib.contextmanager
def atomic_folder(path):
    """A folder to fill that appears as path only when it is complete."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.rename(temporary, path)
    except OSError as e:
        common.die(f"{path}: cannot be written ({e.strerror})")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_hf(path, model, tokenizer):
    """Writes the folder that AutoModelForCausalLM and AutoTokenizer load."""
    weights = {hf_name(name): parameter.data for name, parameter in model.named_parameters()}  # names a tied matrix once
    for name in weights.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        weights[name] = weights[name][: tokenizer.vocab_size].clone()  # (V, C), without the padding
    files = {
        "config.json": config_json(model.config, tokenizer),
        "generation_config.json": token_ids(tokenizer),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": model.config.block_size,
            "eos_token": "<|end|>",
            "pad_token": "<|pad|>",
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    with atomic_folder(path) as folder:
        for name, content in files.items():
            common.write_text(folder / name, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", folder / "model.safetensors")  # safetensors makes it for its owner only
    print(f"wrote {path}")


def main(argv=None):
    config = common.parse_config(Config, __doc__, argv)
    if bool(config.from_hf) == bool(config.from_checkpoint) or not config.out:
        common.die("give --out and either --from_hf or --from_checkpoint")
    if config.from_hf:
        model, tokenizer = from_hf(Path(config.from_hf), config)
        common.save_checkpoint(config.out, "base", model, tokenizer, config)
    else:
        if Path(config.out).exists():
            common.die(f"{config.out}: exists already; name a new folder")
        model, tokenizer = common.load_checkpoint(config.from_checkpoint, ["base", "sft", "ppo"], GPT, "cpu")
        to_hf(Path(config.out), model, tokenizer)


if __name__ == "__main__":
    main()
