"""The files that the stages read, as tokens; each record keeps the number of its line."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import conversation
from utils.cli import die
from utils.files import read_jsonl


def load_stream(folder, name, tokenizer, seq_len):
    """Token ids of <folder>/<name>.bin, memory-mapped: (N,), more than seq_len of them."""
    path, dtype = Path(folder) / f"{name}.bin", tokenizer.id_type
    if not path.exists():
        die(f"{path}: no such file; `make` or `python -m data.fetch` makes it")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        die(f"{path}: {size} bytes are not a whole number of {dtype} ids; make it again")
    stream = np.memmap(path, dtype, mode="r")
    if stream.max() >= tokenizer.vocab_size:
        ids = f"holds id {stream.max()}, the tokenizer has {tokenizer.vocab_size}"
        die(f"{path}: {ids}; both must come from one run")
    if len(stream) <= seq_len:
        die(f"{path}: {len(stream)} tokens are too few for --seq_len {seq_len}")
    return stream


class Example(NamedTuple):
    tokens: list  # ids
    mask: list  # 1 on those that train: the assistant's words and their <|end|>
    line: int

    @property
    def prompt_length(self):
        """How many tokens do not train."""
        return self.mask.count(0)


class Pair(NamedTuple):
    chosen: Example
    rejected: Example
    line: int

    @property
    def prompt(self):
        """The ids before the answers, the same for both."""
        return self.chosen.tokens[: self.chosen.prompt_length]


class Prompt(NamedTuple):
    tokens: list  # ids, <|assistant|> the last
    messages: list
    line: int


def load_probes(folder, tokenizer, block_size):
    """{name: [Example]} of <folder>/probes.jsonl: texts that begin a document, and what follows.

    {} where there is no such file.
    """

    def problem(record):
        for key in ("name", "text", "answer"):
            if not isinstance(record.get(key), str):
                return f'"{key}" must be a string'
        if not record["answer"]:
            return '"answer" is empty'

    path, probes = Path(folder) / "probes.jsonl", {}
    for record in read_jsonl(path, problem) if path.exists() else []:
        text = [tokenizer.separator] + tokenizer.encode(record["text"])
        answer = tokenizer.encode(record["answer"])
        if len(text) + len(answer) > block_size:
            size = f"{len(text) + len(answer)} tokens"
            die(f"{path}, line {record.line}: {size} are more than the model's {block_size}")
        mask = [0] * len(text) + [1] * len(answer)
        example = Example(text + answer, mask, record.line)
        probes.setdefault(record["name"], []).append(example)
    return probes


def load_conversations(path, tokenizer, block_size):
    """[Example], cut at block_size; one whose answer begins beyond it is left out."""

    def problem(record):
        messages = record.get("messages")
        if wrong := conversation.check(messages):
            return wrong
        if messages[-1]["role"] != "assistant":
            return "the conversation must end in an assistant message"

    examples = []
    for record in read_jsonl(path, problem):
        tokens, mask = conversation.render(record["messages"], tokenizer)
        examples.append(Example(tokens[:block_size], mask[:block_size], record.line))
    kept = [example for example in examples if any(example.mask)]
    if not kept:
        die(f"{path}: no answer begins within {block_size} tokens, the model's --block_size")
    if len(kept) < len(examples):
        n = len(examples) - len(kept)
        print(f"left out {n} conversations whose answer begins beyond {block_size} tokens")
    return kept


def load_pairs(path, tokenizer, block_size):
    """[Pair], cut to block_size: first the prompt's beginning goes, then the answers' ends.

    Pairs that are alike after the cut are left out.
    """

    def problem(record):
        if wrong := conversation.check(record.get("messages")):
            return wrong
        if record["messages"][-1]["role"] != "user":
            return "messages must end in a user message, which chosen and rejected answer"
        for answer in ("chosen", "rejected"):
            if not isinstance(record.get(answer), str):
                return '"chosen" and "rejected" must be strings'

    records = read_jsonl(path, problem)
    pairs = []
    for record in records:
        prompt = conversation.render_prompt(record["messages"], tokenizer)
        answers = [tokenizer.encode(record[name]) for name in ("chosen", "rejected")]
        answers = [answer + [tokenizer.end] for answer in answers]
        too_long = len(prompt) + max(map(len, answers)) - block_size
        opening, _ = tokenizer.chat["assistant"]  # stays, for the answer to begin after it
        n_cut = min(max(too_long, 0), len(prompt) - len(opening))
        prompt = prompt[n_cut:]
        examples = []
        for answer in answers:
            mask = [0] * len(prompt) + [1] * len(answer)
            tokens = prompt + answer
            examples.append(Example(tokens[:block_size], mask[:block_size], record.line))
        if examples[0] != examples[1]:
            pairs.append(Pair(*examples, record.line))
    if not pairs:
        die(f"{path}: no pair differs within {block_size} tokens")
    if len(pairs) < len(records):
        n = len(records) - len(pairs)
        print(f"left out {n} pairs whose answers are the same within {block_size} tokens")
    return pairs


def load_prompts(path, tokenizer, max_new_tokens, block_size):
    """[Prompt], each short enough for max_new_tokens more."""

    def problem(record):
        messages = record.get("messages")
        return conversation.check_prompt(messages, tokenizer, max_new_tokens, block_size)

    prompts = []
    for record in read_jsonl(path, problem):
        tokens = conversation.render_prompt(record["messages"], tokenizer)
        prompts.append(Prompt(tokens, record["messages"], record.line))
    return prompts
