"""Byte-level BPE: trained here by hand, run by tiktoken.

    python -m data.tokenizer --data corpus.txt --tokenizer bpe:2048 --out tokenizer.tiktoken

The file is tiktoken's format, `base64(token) rank` a line. The special tokens are not in it: their ids
follow the last rank. Text is always encoded as plain text, so nobody can forge a role by typing one.

A tokenizer that convert.py brought from elsewhere has its rules in a first line, `# {"pattern": …, "special_tokens":
{name: id, …}, "text_tokens": […], "normal_form": …}`: the split, all special tokens with their ids (ours among them),
those of them that text may hold (Qwen's <think>), and the Unicode form text is brought into (Qwen's NFC) or null.
"""

import base64
import heapq
import json
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

import common

# GPT-2's split: contractions, words and numbers with the space before them, punctuation, white space.
BPE_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CHAR_PATTERN = r"(?s:.)"
SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>")
PROBE = "".join(map(chr, range(0x250))) + " 東京 😀\n"  # what a tokenizer from elsewhere must split without a loss
NORMAL_FORMS = (None, "NFC", "NFD", "NFKC", "NFKD")
# GPT-2's order of the 256 bytes, printable ones first. Ids break ties between equally frequent pairs, so
# with this order the merges equal those of the `tokenizers` library.
BYTES = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
BYTES += [b for b in range(256) if b not in BYTES]


class Tokenizer:
    def __init__(self, ranks, foreign=None):
        """ranks: {token bytes: id}; foreign: the rules of a tokenizer from elsewhere. All ids together are 0 .. vocab_size - 1."""
        self.ranks, self.foreign = ranks, foreign
        self.is_char = not all(bytes([b]) in ranks for b in BYTES)  # BPE falls back to bytes; a character set has no such net
        self.rules = foreign or {
            "pattern": CHAR_PATTERN if self.is_char else BPE_PATTERN,
            "special_tokens": {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)},
            "text_tokens": [],
            "normal_form": None,
        }
        pattern, specials = self.rules["pattern"], self.rules["special_tokens"]
        self.encoding = tiktoken.Encoding("threefold", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
        self.vocab_size = len(ranks) + len(specials)
        self.id_type = np.dtype(np.uint16 if self.vocab_size <= 65536 else np.uint32)  # of ids in a .bin file
        self.end, self.user, self.assistant, self.system, self.pad = (specials[name] for name in SPECIAL_TOKENS)

    def encode(self, text):
        if self.is_char:
            unknown = {c for c in text if c.encode() not in self.ranks}
            if unknown:
                common.die(f"the character tokenizer does not know {sorted(unknown)[:5]}; train it on text that has them, or use bpe")
        if self.rules["normal_form"]:
            text = unicodedata.normalize(self.rules["normal_form"], text)
        return self.encoding.encode(text, allowed_special=set(self.rules["text_tokens"]), disallowed_special=())

    def decode(self, ids):
        return self.encoding.decode(ids)

    def dumps(self):
        """The .tiktoken file's text."""
        header = f"# {json.dumps(self.foreign)}\n" if self.foreign else ""
        return header + "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())

    @classmethod
    def loads(cls, text, source="tokenizer"):
        ranks, foreign = {}, None
        for number, line in enumerate(text.splitlines(), 1):
            try:
                if number == 1 and line.startswith("#"):
                    header = json.loads(line[1:])
                    foreign = {rule: header[rule] for rule in ("pattern", "special_tokens", "text_tokens", "normal_form")}
                    continue
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, KeyError, TypeError):
                common.die(f"{source}, line {number}: not `base64(token) rank`; write the file with data/tokenizer.py")
        try:
            specials = foreign["special_tokens"] if foreign else {}
            ids = sorted([*ranks.values(), *specials.values()])
            if ids != list(range(len(ids))) or not ranks or (foreign and not specials.keys() >= set(SPECIAL_TOKENS)):
                common.die(f"{source}: ids are not 0 .. {len(ids) - 1}, the special tokens among them; write the file with data/tokenizer.py")
            if foreign and not (specials.keys() >= set(foreign["text_tokens"]) and foreign["normal_form"] in NORMAL_FORMS):
                raise ValueError("text_tokens or normal_form")
            if foreign:
                pieces = [match.group() for match in regex.finditer(foreign["pattern"], PROBE)]
                if "" in pieces or "".join(pieces) != PROBE:
                    raise ValueError("a pattern that leaves out text, or matches where there is none")
            return cls(ranks, foreign)
        except (ValueError, TypeError, AttributeError, regex.error) as e:
            common.die(f"{source}, line 1: rules that are none ({e}); write the file with convert.py")


def load(path):
    """A Tokenizer from a .tiktoken file."""
    return Tokenizer.loads(common.read_text(path), path)


def count_words(texts):
    """Pre-tokens and their counts: a merge never crosses a pre-token, so each distinct one is worked on once."""
    split = regex.compile(BPE_PATTERN)
    words = Counter()
    for text in texts:
        words.update(split.findall(text))
    return words


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (arXiv 1508.07909) with vocab_size ids in all, special tokens included.

    Merges the most frequent pair again and again. Pair counts are kept and corrected only where a merge
    changed something; a heap finds the maximum, with entries that went stale skipped when they come up.
    """
    n_ranks = vocab_size - len(SPECIAL_TOKENS)
    if n_ranks < 256:
        common.die(f"vocab_size {vocab_size} is below 256 bytes + {len(SPECIAL_TOKENS)} special tokens")
    tokens = [bytes([b]) for b in BYTES]  # id -> bytes
    byte_id = {b: i for i, b in enumerate(BYTES)}
    words, counts = [], []  # each distinct pre-token as ids, and how often it occurs
    for word, count in count_words(texts).items():
        words.append([byte_id[b] for b in word.encode()])
        counts.append(count)

    pair_counts, where = Counter(), defaultdict(set)  # pair -> occurrences; pair -> words that (may) hold it
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[w]
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    progress = tqdm(total=n_ranks - 256, desc="bpe merges", disable=None)
    while len(tokens) < n_ranks and heap:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair] or count == 0:
            continue  # stale: a newer entry of this pair is in the heap
        new_id = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for w in where.pop(pair):
            old, merged = words[w], merge(words[w], pair, new_id)
            for p in zip(old, old[1:]):
                pair_counts[p] -= counts[w]
                changed.add(p)
            for p in zip(merged, merged[1:]):
                pair_counts[p] += counts[w]
                where[p].add(w)
                changed.add(p)
            words[w] = merged
        for p in changed:
            heapq.heappush(heap, (-pair_counts[p], p))
        progress.update()
    progress.close()
    return Tokenizer({token: rank for rank, token in enumerate(tokens)})


def merge(word, pair, new_id):
    """word (a list of ids) with each occurrence of pair, from the left, replaced by new_id."""
    merged, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            merged.append(new_id)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def train_char(texts):
    """One id a character, sorted, as in nanoGPT's tiny Shakespeare."""
    return Tokenizer({c.encode(): i for i, c in enumerate(sorted(set().union(*texts)))})


def make(name, texts):
    """`bpe:4096` trained on texts, `char` from their characters, or `gpt2` (tiktoken's, from its cache when offline)."""
    if name == "char":
        return train_char(texts)
    if name == "gpt2":
        try:
            return Tokenizer(tiktoken.get_encoding("gpt2")._mergeable_ranks)
        except OSError:  # what a failed download raises
            common.die("tokenizer gpt2: not in tiktoken's cache and no network; set TIKTOKEN_CACHE_DIR, or use bpe:SIZE")
    kind, _, size = name.partition(":")
    if kind != "bpe" or not size.isdecimal():
        common.die(f"tokenizer {name!r}: use bpe:SIZE (such as bpe:4096), gpt2 or char")
    return train_bpe(texts, int(size))


@dataclass
class Config:
    data: str = "data/world/corpus.txt"  # the text to learn from
    tokenizer: str = "bpe:2048"  # bpe:SIZE, gpt2 or char
    out: str = "tokenizer.tiktoken"  # where to write it


def main():
    config = common.parse_config(Config, __doc__)
    tokenizer = make(config.tokenizer, [common.read_text(config.data)])
    common.write_text(config.out, tokenizer.dumps())
    print(f"{config.out}: {tokenizer.vocab_size} ids, {Path(config.out).stat().st_size} bytes")


if __name__ == "__main__":
    main()
