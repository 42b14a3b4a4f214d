"""Random input: what must hold holds for any of it, and a damaged file ends in one line or reads as the whole one does."""

import json
import tempfile
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import ppo
import reward
import sft
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig

TOKENIZER = tiny.byte_tokenizer()
SIZES = dict(vocab_size=TOKENIZER.vocab_size, block_size=40, n_layer=1, n_head=2, n_kv_head=1, n_embd=4, n_inner=4)


def long(n):
    """A decorator for the long suite: n examples, new ones in each run. All of them together take about 5 minutes."""
    return lambda test: pytest.mark.faults(settings(max_examples=n, derandomize=False)(test))


# ---- tokens


@given(content=st.binary())
def test_any_bytes_come_back_from_their_ids(content):
    """Also those that are no UTF-8, as a model may generate them: they decode to the replacement character."""
    ids = [TOKENIZER.ranks[bytes([b])] for b in content]
    assert TOKENIZER.encoding.decode_bytes(ids) == content
    assert TOKENIZER.decode(ids) == content.decode(errors="replace")


@given(ids=st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_any_ids_decode(ids):
    assert isinstance(TOKENIZER.decode(ids), str)


# ---- generation

MODEL = tiny.gpt(vocab_size=11, block_size=40)
token_lists = st.lists(st.lists(st.integers(0, 10), min_size=1, max_size=30), min_size=1, max_size=6)


def generates_the_same_alone(prompts, n, end_id):
    together = MODEL.generate(prompts, n, temperature=0, end_id=end_id)
    assert together == [MODEL.generate([prompt], n, temperature=0, end_id=end_id)[0] for prompt in prompts]


mixes = given(prompts=token_lists, n=st.integers(1, 10), end_id=st.none() | st.integers(0, 10))
test_prompts_of_any_lengths_continue_together_as_they_do_alone = mixes(generates_the_same_alone)
test_prompts_of_any_lengths_continue_together_as_they_do_alone_at_length = long(1500)(mixes(generates_the_same_alone))


# ---- damaged files


@st.composite
def damaged(draw, content):
    """The bytes with up to three pieces cut out, repeated, or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 2, 8, 100, 10**9])))
        new = draw(st.sampled_from([b"", content[start:end] * 2]) | st.binary(max_size=8))
        content = content[:start] + new + content[end:]
    return content


def read(reader, content, name):
    """What the reader makes of a file with this content; None if it ends in one line that names the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            return reader(path)
        except SystemExit as e:
            assert str(e).startswith(f"error: {path}") and "\n" not in str(e)


TURNS = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "naïve 東京 😀"}]
RECORDS = {
    "sft": {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]},
    "reward": {"messages": TURNS[:1], "chosen": "yes", "rejected": "no"},
    "ppo": {"messages": TURNS[:1]},
}
READERS = {
    "sft": lambda path: sft.load_examples(path, TOKENIZER, 40),
    "reward": lambda path: reward.load_pairs(path, TOKENIZER, 40),
    "ppo": lambda path: ppo.load_prompts(path, TOKENIZER, ppo.Config(), 40),
}
LINES = {stage: (json.dumps(record) + "\n" + json.dumps(record, ensure_ascii=False) + "\n").encode() for stage, record in RECORDS.items()}
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800")  # half a surrogate pair
keys = st.sampled_from(["messages", "role", "content", "chosen", "rejected", "user", "assistant"]) | st.text()
values = st.recursive(scalars | keys, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4), max_leaves=12)


@st.composite
def records(draw):
    """A good record of a stage in which one value is another one."""
    stage = draw(st.sampled_from(list(RECORDS)))
    record = json.loads(json.dumps(RECORDS[stage]))
    at = record
    while True:
        key = draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or draw(st.booleans()):
            at[key] = draw(values)
            return stage, (json.dumps(record) + "\n").encode()
        at = at[key]


def lines_end_well(stage_and_content):
    stage, content = stage_and_content
    read(READERS[stage], content, "data.jsonl")


lines = given(stage_and_content=st.sampled_from(list(LINES)).flatmap(lambda s: damaged(LINES[s]).map(lambda c: (s, c))) | records())
test_damaged_lines_end_in_one_line_or_are_read = lines(lines_end_well)
test_damaged_lines_end_in_one_line_or_are_read_at_length = long(10_000)(lines(lines_end_well))


def checkpoint_content():
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        common.save_checkpoint(Path(folder) / "a.pt", "base", GPT(GPTConfig(**SIZES)), TOKENIZER, sft.Config())
        return (Path(folder) / "a.pt").read_bytes()


CHECKPOINT = checkpoint_content()


def load(path):
    return common.load_checkpoint(path, ["base"], GPT, tiny.CPU)


WHOLE, _ = read(load, CHECKPOINT, "a.pt")


def damaged_checkpoint_is_refused_or_the_same(content):
    loaded = read(load, content, "a.pt")
    if loaded:
        model, tokenizer = loaded
        assert tokenizer.dumps() == TOKENIZER.dumps()
        assert all(map(torch.equal, model.state_dict().values(), WHOLE.state_dict().values()))


checkpoints = given(content=damaged(CHECKPOINT))
test_a_damaged_checkpoint_is_refused_or_still_the_same = checkpoints(damaged_checkpoint_is_refused_or_the_same)
test_a_damaged_checkpoint_is_refused_or_still_the_same_at_length = long(10_000)(checkpoints(damaged_checkpoint_is_refused_or_the_same))


def test_a_bit_flipped_where_the_file_says_where_its_parts_lie_is_found_or_harmless():
    """All bits of the zip entry of the embedding. One of them marks it as a folder, and torch.load then leaves it empty."""
    name = CHECKPOINT.rindex(b"archive/data/0")
    for bit in range(8 * (name - 46), 8 * name):
        flipped = CHECKPOINT[bit // 8] ^ (1 << bit % 8)
        damaged_checkpoint_is_refused_or_the_same(CHECKPOINT[: bit // 8] + bytes([flipped]) + CHECKPOINT[bit // 8 + 1 :])


def foreign_checkpoint_ends_well(part, value):
    """Whole, but with another value in one place."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        path.write_bytes(CHECKPOINT)
        content = common.read_torch(path)
        *outer, last = part
        at = content
        for key in outer:
            at = at[key]
        at[last] = value
        torch.save(content, path)
        read(load, path.read_bytes(), "a.pt")


PARTS = [("format",), ("stage",), ("model_config",), ("weights",), ("tokenizer",), ("weights", "norm.weight"), ("weights", "more")]
PARTS += [("model_config", name) for name in SIZES] + [("model_config", "head_dim"), ("model_config", "rope_theta")]
leaves = st.none() | st.booleans() | st.integers(-3, 300) | st.floats(-9, 9) | st.text(max_size=9) | st.just(torch.zeros(4))
other_values = leaves | st.lists(leaves, max_size=3) | st.dictionaries(st.text(max_size=3), leaves, max_size=3)
foreign = given(part=st.sampled_from(PARTS), value=other_values)
test_a_checkpoint_of_other_parts_ends_in_one_line_or_is_read = foreign(foreign_checkpoint_ends_well)
test_a_checkpoint_of_other_parts_ends_in_one_line_or_is_read_at_length = long(3_000)(foreign(foreign_checkpoint_ends_well))


def damaged_tokenizer_ends_well(content):
    tokenizer = read(lambda path: Tokenizer.loads(common.read_text(path), path), content, "tokenizer.tiktoken")
    if tokenizer and not tokenizer.is_char:
        assert tokenizer.decode(tokenizer.encode("naïve 東京 😀")) == "naïve 東京 😀"


RULES = json.dumps({"pattern": ".|\n", "special_tokens": TOKENIZER.rules["special_tokens"], "text_tokens": [], "normal_form": "NFC"})
TOKENIZERS = [TOKENIZER.dumps().encode(), f"# {RULES}\n{TOKENIZER.dumps()}".encode()]
tokenizers = given(content=st.sampled_from(TOKENIZERS).flatmap(lambda c: damaged(c) | damaged(c[:300]).map(lambda start: start + c[300:])))
test_a_damaged_tokenizer_ends_in_one_line_or_is_read = tokenizers(damaged_tokenizer_ends_well)
test_a_damaged_tokenizer_ends_in_one_line_or_is_read_at_length = long(8_000)(tokenizers(damaged_tokenizer_ends_well))
