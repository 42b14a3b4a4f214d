"""Byte-level BPE: trained here by hand, run by tiktoken.

    python -m data.tokenizer --data corpus.txt --tokenizer bpe:2048 --out out/tokenizer.tiktoken

The file is in tiktoken's format, `base64(token) rank` a line. The special tokens are not in it:
their ids follow the last rank. Text is always encoded as plain text, so nobody can forge a role.

A tokenizer that convert.py brought from elsewhere has its rules in a first line, `# {…}`: the
pattern that splits text; special_tokens, {name: id}; text_tokens, those of them that text may hold
(Qwen's <think>); normal_form, the Unicode form text gets, or null; separator, the id between
documents, where it is not <|end|>. chat, of a model with turns of its own, has lists of ids:
{"start": what begins a conversation without a system message, role: [opening, closing], …}.
Without chat, the special tokens hold ours.
"""

import base64
import heapq
import itertools
import json
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

from utils.cli import die, parse_config
from utils.files import read_text, write_text

# GPT-2's split: contractions; words, numbers, punctuation, each with a space before; white space
BPE_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAR_PATTERN = r"(?s:.)"
ROLES = ("user", "assistant", "system")
SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>")
NORMAL_FORMS = (None, "NFC", "NFD", "NFKC", "NFKD")
# What a pattern from elsewhere must split without a loss.
PROBE = "".join(map(chr, range(0x250))) + " 東京 😀\n"
# GPT-2's order of the 256 bytes, printable ones first. Ids break ties between equally frequent
# pairs, so with this order the merges equal those of the `tokenizers` library.
BYTES = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
BYTES += [b for b in range(256) if b not in BYTES]


def own_chat(specials):
    """This project's turns: <|role|>, the content, <|end|>."""
    turns = {role: [[specials[f"<|{role}|>"]], [specials["<|end|>"]]] for role in ROLES}
    return {"start": [], **turns}


class Tokenizer:
    """ranks: {token bytes: id}; foreign: the rules of a tokenizer from elsewhere, or None.

    All ids together, special tokens included, are 0 .. vocab_size - 1.
    chat: {role: [ids before the content, ids after it]}, and "start" as in the file.
    end closes the assistant's turn, separator stands between documents: the same token in
    tokenizers made here. pad fills rows; every use of it is masked.
    """

    def __init__(self, ranks, foreign=None):
        self.ranks, self.foreign = ranks, foreign
        # BPE falls back to bytes; a set of characters has nothing to fall back to
        self.is_char = not all(bytes([b]) in ranks for b in BYTES)
        self.rules = foreign or {
            "pattern": CHAR_PATTERN if self.is_char else BPE_PATTERN,
            "special_tokens": {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)},
            "text_tokens": [],
            "normal_form": None,
        }
        pattern, specials = self.rules["pattern"], self.rules["special_tokens"]
        self.encoding = tiktoken.Encoding(
            "threefold", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
        )
        self.vocab_size = len(ranks) + len(specials)
        self.id_type = np.dtype(np.uint16 if self.vocab_size <= 65536 else np.uint32)  # in a .bin
        self.chat = self.rules.get("chat") or own_chat(specials)
        self.end = self.chat["assistant"][1][0]
        self.separator = self.rules.get("separator", self.end)
        self.pad = specials.get("<|pad|>", self.end)

    def encode(self, text):
        if self.is_char and (unknown := {c for c in text if c.encode() not in self.ranks}):
            unknown = sorted(unknown)[:5]
            die(f"the char tokenizer does not know {unknown}; train it on more text, or use bpe")
        if self.rules["normal_form"]:
            text = unicodedata.normalize(self.rules["normal_form"], text)
        allowed = set(self.rules["text_tokens"])
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def decode(self, ids):
        return self.encoding.decode(ids)

    def dumps(self):
        """The .tiktoken file's text."""
        lines = [f"# {json.dumps(self.foreign)}\n"] if self.foreign else []
        for token, rank in self.ranks.items():
            lines.append(f"{base64.b64encode(token).decode()} {rank}\n")
        return "".join(lines)

    @classmethod
    def loads(cls, text, source="tokenizer"):
        """The Tokenizer of a .tiktoken file's text; source names it in errors."""
        ranks, foreign = {}, None
        remedy = "write the file with data/tokenizer.py or convert.py"
        for number, line in enumerate(text.splitlines(), 1):
            try:
                if number == 1 and line.startswith("#"):
                    foreign = json.loads(line[1:])
                else:
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
            except (ValueError, RecursionError):
                die(f"{source}, line {number}: not `base64(token) rank`; {remedy}")
        try:
            check(ranks, foreign)
            return cls(ranks, foreign)
        except (ValueError, TypeError, KeyError, AttributeError, regex.error) as e:
            die(f"{source}: {e}; {remedy}")


def check(ranks, foreign):
    """Raises an error that says what is wrong with a tokenizer's ids or its rules."""
    specials = foreign["special_tokens"] if foreign else {}
    ids = sorted([*ranks.values(), *specials.values()])
    if not ranks or ids != list(range(len(ids))):
        raise ValueError(f"ids are not 0 .. {len(ids) - 1}")
    if not foreign:
        return
    needed = {*foreign["text_tokens"], *(() if "chat" in foreign else SPECIAL_TOKENS)}
    if not specials.keys() >= needed:
        raise ValueError("special_tokens lack one of ours or of text_tokens")
    if "chat" in foreign:
        check_chat(foreign["chat"], specials.values(), len(ids))
    if not all_ids([foreign.get("separator", 0)], len(ids)):
        raise ValueError("separator is not one of the ids")
    if foreign["normal_form"] not in NORMAL_FORMS:
        raise ValueError(f"normal_form is not one of {NORMAL_FORMS}")
    pieces = [match.group() for match in regex.finditer(foreign["pattern"], PROBE)]
    if "" in pieces or "".join(pieces) != PROBE:
        raise ValueError("the pattern leaves out text, or matches where there is none")


def all_ids(part, n_ids):
    return isinstance(part, list) and all(type(id) is int and 0 <= id < n_ids for id in part)


def check_chat(chat, special_ids, n_ids):
    """Raises an error that says what is wrong with the ids of a chat format."""
    parts = [chat["start"]]
    for role in ROLES:
        opening, closing = chat[role]
        parts += [opening, closing]
    if not all(all_ids(part, n_ids) for part in parts):
        raise ValueError("chat is not made of lists of ids")
    if not set(chat["assistant"][1][:1]) & set(special_ids):
        raise ValueError("chat ends no answer with a special token")


def load(path):
    """A Tokenizer from a .tiktoken file."""
    return Tokenizer.loads(read_text(path), path)


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (arXiv 1508.07909) with vocab_size ids, special tokens included.

    Merges the most frequent pair again and again. Pair counts are corrected only where a merge
    changed something. A heap finds the maximum; entries that went stale are skipped.
    """
    n_ranks = vocab_size - len(SPECIAL_TOKENS)
    if n_ranks < 256:
        die(f"vocab_size {vocab_size} is below 256 bytes + {len(SPECIAL_TOKENS)} special tokens")
    tokens = [bytes([b]) for b in BYTES]  # id -> bytes
    byte_id = {b: i for i, b in enumerate(BYTES)}

    # each distinct pre-token as ids, and how often it occurs; no merge crosses a pre-token
    frequencies = Counter()
    for text in texts:
        frequencies.update(regex.findall(BPE_PATTERN, text))
    words = [[byte_id[b] for b in word.encode()] for word in frequencies]
    counts = list(frequencies.values())

    # pair -> occurrences; pair -> words that (may) hold it
    pair_counts, where = Counter(), defaultdict(set)
    for w, word in enumerate(words):
        for pair in zip(word, word[1:]):
            pair_counts[pair] += counts[w]
            where[pair].add(w)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapq.heapify(heap)

    # merges
    progress = tqdm(total=n_ranks - 256, desc="bpe merges", disable=None)
    while len(tokens) < n_ranks and heap:
        count, pair = heapq.heappop(heap)
        if -count != pair_counts[pair] or count == 0:
            continue  # stale: a newer entry of this pair is in the heap
        new_id = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        changed = set()
        for w in where.pop(pair):
            old, words[w] = words[w], merge(words[w], pair, new_id)
            for word, count in (old, -counts[w]), (words[w], counts[w]):
                for p in zip(word, word[1:]):
                    pair_counts[p] += count
                    where[p].add(w)
                    changed.add(p)
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
    characters = sorted(set(itertools.chain.from_iterable(texts)))
    return Tokenizer({c.encode(): i for i, c in enumerate(characters)})


def make(name, texts):
    """`bpe:4096` trained on texts, `char` from their characters, or tiktoken's `gpt2`."""
    if name == "char":
        return train_char(texts)
    if name == "gpt2":
        try:
            return Tokenizer(tiktoken.get_encoding("gpt2")._mergeable_ranks)
        except OSError:  # what a failed download raises
            die("tokenizer gpt2: no network; set TIKTOKEN_CACHE_DIR, or use bpe:SIZE")
    kind, _, size = name.partition(":")
    if kind != "bpe" or not size.isdecimal():
        die(f"tokenizer {name!r}: use bpe:SIZE (such as bpe:4096), gpt2 or char")
    return train_bpe(texts, int(size))


@dataclass
class Config:
    data: str = "out/world/corpus.txt"  # the text to learn from
    tokenizer: str = "bpe:2048"  # bpe:SIZE, gpt2 or char
    out: str = "out/tokenizer.tiktoken"  # where to write it


def main():
    config = parse_config(Config, __doc__)
    tokenizer = make(config.tokenizer, [read_text(config.data)])
    write_text(config.out, tokenizer.dumps())
    print(f"{config.out}: {tokenizer.vocab_size} ids")


if __name__ == "__main__":
    main()
