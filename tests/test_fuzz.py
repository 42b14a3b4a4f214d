"""Random input: what must hold holds for any of it.

A damaged file ends in one line, or reads as the whole one does.
"""

import gzip
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import pytest
import safetensors.torch
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
import sft
from data import examples, fetch, stream
from data.tokenizer import Tokenizer
from model import GPT, GPTConfig
from train.checkpoint import load_checkpoint, read_torch, save_checkpoint
from train.loop import Run
from train.optim import make_optimizers
from utils.files import read_text

TOKENIZER = tiny.byte_tokenizer()
SIZES = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=4, n_inner=4, block_size=40)
SIZES |= dict(vocab_size=TOKENIZER.vocab_size)

# Seconds of computing by the long suite, split evenly over its tests.
SECONDS = float(os.environ.get("FUZZ_SECONDS", 300))
long_tests = []


def long(given_examples, check):
    """The test for the long suite: check with new examples until its share of SECONDS is over."""

    @pytest.mark.faults
    def test():
        end, n = time.process_time() + SECONDS / len(long_tests), 0
        while time.process_time() < end:
            settings(max_examples=100, derandomize=False)(given_examples(check))()
            n += 100
        print(f"{check.__name__}: {n} examples")

    long_tests.append(test)
    return test


@pytest.fixture(autouse=True, scope="module")
def little_memory():
    """8 GB: a file that asks for more must not get them, nor take this machine down."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# ---- tokens


@given(content=st.binary())
def test_any_bytes_come_back_from_their_ids(content):
    """Also those that are not UTF-8, as a model may generate them: U+FFFD stands for them."""
    ids = [TOKENIZER.ranks[bytes([b])] for b in content]
    assert TOKENIZER.encoding.decode_bytes(ids) == content
    assert TOKENIZER.decode(ids) == content.decode(errors="replace")


@given(ids=st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_any_ids_decode(ids):
    assert isinstance(TOKENIZER.decode(ids), str)


# ---- generation


MODEL = tiny.gpt(vocab_size=11, block_size=40)
token_list = st.lists(st.integers(0, 10), min_size=1, max_size=30)
token_lists = st.lists(token_list, min_size=1, max_size=6)


def generates_the_same_alone(prompts, n, end_id):
    together = MODEL.generate(prompts, n, temperature=0, end_id=end_id)
    alone = [MODEL.generate([prompt], n, temperature=0, end_id=end_id)[0] for prompt in prompts]
    assert together == alone


mixes = given(prompts=token_lists, n=st.integers(1, 10), end_id=st.none() | st.integers(0, 10))
test_prompts_of_any_lengths_continue_together_as_they_do_alone = mixes(generates_the_same_alone)
test_prompts_of_any_lengths_continue_together_as_they_do_alone_at_length = long(
    mixes, generates_the_same_alone
)


# ---- damaged files


@st.composite
def damaged(draw, content):
    """The bytes with up to three pieces cut out, repeated, or replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        size = draw(st.sampled_from([0, 1, 2, 8, 100, 10**9]))
        end = min(len(content), start + size)
        new = draw(st.sampled_from([b"", content[start:end] * 2]) | st.binary(max_size=8))
        content = content[:start] + new + content[end:]
    return content


def read(reader, content, name):
    """What the reader makes of a file with this content.

    None if it ends in one line that names the file.
    """
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
    "sft": lambda path: examples.load_conversations(path, TOKENIZER, 40),
    "reward": lambda path: examples.load_pairs(path, TOKENIZER, 40),
    "ppo": lambda path: examples.load_prompts(path, TOKENIZER, 16, 40),
}
LINES = {}
for stage, record in RECORDS.items():
    escaped, plain = json.dumps(record), json.dumps(record, ensure_ascii=False)
    LINES[stage] = f"{escaped}\n{plain}\n".encode()
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
scalars |= st.just("\ud800")  # half a surrogate pair
keys = ["messages", "role", "content", "chosen", "rejected", "user", "assistant"]
keys = st.sampled_from(keys) | st.text()
values = st.recursive(
    scalars | keys,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def changed(draw, content):
    """A JSON object as bytes, with one of its values replaced by another or left out."""
    record = json.loads(json.dumps(content))
    at = record
    while True:
        key = draw(st.sampled_from(list(at) if isinstance(at, dict) else range(len(at))))
        if not isinstance(at[key], (dict, list)) or not at[key] or draw(st.booleans()):
            at[key] = draw(values)
            if draw(st.integers(0, 3)) == 0:
                del at[key]
            return json.dumps(record).encode()
        at = at[key]


def lines_end_well(stage_and_content):
    stage, content = stage_and_content
    read(READERS[stage], content, "data.jsonl")


stages = st.sampled_from(list(LINES))
lines_of_stages = stages.flatmap(
    lambda stage: st.tuples(st.just(stage), damaged(LINES[stage]) | changed(RECORDS[stage]))
)
lines = given(stage_and_content=lines_of_stages)
test_damaged_lines_end_in_one_line_or_are_read = lines(lines_end_well)
test_damaged_lines_end_in_one_line_or_are_read_at_length = long(lines, lines_end_well)


def pieces(path):
    return list(stream.read_pieces(path))


def conversations(path):
    return fetch.convert(path, fetch.to_conversation)


def pairs(path):
    return fetch.convert(path, fetch.to_pair)


TRANSCRIPT = "\n\nHuman: Why?\n\nAssistant: "
CHATS = {}
for answer in ("chosen", "rejected"):
    CHATS[answer] = [*TURNS[:1], {"role": "assistant", "content": answer}]
# name: (a record that data.fetch reads, how it reads a file)
SOURCES = {
    "text": ({"text": "naïve 東京 😀<|endoftext|> end"}, pieces),
    "conversations": (RECORDS["sft"], conversations),
    "instructions": ({"instruction": "Add.", "input": "1, 2", "output": "3"}, conversations),
    "pairs": (RECORDS["reward"], pairs),
    "transcripts": ({"chosen": f"{TRANSCRIPT}a", "rejected": f"{TRANSCRIPT}b"}, pairs),
    "chats": (CHATS, pairs),
}


def sources_end_well(name, content, ending):
    if ending == ".jsonl.gz":
        content = gzip.compress(content)
    read(SOURCES[name][1], content, f"data{ending}")


@st.composite
def source_files(draw):
    name = draw(st.sampled_from(list(SOURCES)))
    ending = draw(st.sampled_from([".txt", ".jsonl", ".json", ".jsonl.gz", ".txt.gz"]))
    record, _ = SOURCES[name]
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    content = draw(damaged(line) | changed(record))
    if ending == ".txt.gz":
        content = draw(damaged(gzip.compress(content, mtime=0)))
    return dict(name=name, content=content, ending=ending)


sources = given(source_files())


def source_ends_well(source):
    sources_end_well(**source)


test_a_damaged_source_of_data_ends_in_one_line_or_is_read = sources(source_ends_well)
test_a_damaged_source_of_data_ends_in_one_line_or_is_read_at_length = long(
    sources, source_ends_well
)


def checkpoint_content():
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        path, model = Path(folder) / "a.pt", GPT(GPTConfig(**SIZES))
        save_checkpoint(path, "base", model, TOKENIZER, sft.Config())
        return path.read_bytes()


CHECKPOINT = checkpoint_content()


def load(path):
    return load_checkpoint(path, ["base"], GPT, tiny.CPU)


WHOLE, _ = read(load, CHECKPOINT, "a.pt")


def damaged_checkpoint_is_refused_or_the_same(content):
    loaded = read(load, content, "a.pt")
    if loaded:
        model, tokenizer = loaded
        assert tokenizer.dumps() == TOKENIZER.dumps()
        assert all(map(torch.equal, model.state_dict().values(), WHOLE.state_dict().values()))


checkpoints = given(content=damaged(CHECKPOINT))
test_a_damaged_checkpoint_is_refused_or_still_the_same = checkpoints(
    damaged_checkpoint_is_refused_or_the_same
)
test_a_damaged_checkpoint_is_refused_or_still_the_same_at_length = long(
    checkpoints, damaged_checkpoint_is_refused_or_the_same
)


def test_a_bit_flipped_where_the_file_says_where_its_parts_lie_is_found_or_harmless():
    """All bits of the zip entry of the embedding.

    One of them marks it as a folder, and torch.load then leaves it empty.
    """
    name = CHECKPOINT.rindex(b"archive/data/0")
    for bit in range(8 * (name - 46), 8 * name):
        flipped = bytearray(CHECKPOINT)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged_checkpoint_is_refused_or_the_same(bytes(flipped))


def replace(content, part, value):
    """Puts another value in one place, named by the keys that lead to it."""
    *outer, last = part
    for key in outer:
        content = content[key]
    content[last] = value


def foreign_checkpoint_ends_well(part, value):
    """Whole, but with another value in one place."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.pt"
        path.write_bytes(CHECKPOINT)
        content = read_torch(path)
        replace(content, part, value)
        torch.save(content, path)
        read(load, path.read_bytes(), "a.pt")


PARTS = [("format",), ("stage",), ("model_config",), ("weights",), ("tokenizer",)]
PARTS += [("weights", "norm.weight"), ("weights", "more")]
PARTS += [("model_config", name) for name in (*SIZES, "head_dim", "rope_theta")]
leaves = st.none() | st.booleans() | st.integers(-3, 300) | st.floats(-9, 9)
leaves |= st.text(max_size=9) | st.just(torch.zeros(4))
other_values = leaves | st.lists(leaves, max_size=3)
other_values |= st.dictionaries(st.text(max_size=3), leaves, max_size=3)
foreign = given(part=st.sampled_from(PARTS), value=other_values)
test_a_checkpoint_of_other_parts_ends_in_one_line_or_is_read = foreign(foreign_checkpoint_ends_well)
test_a_checkpoint_of_other_parts_ends_in_one_line_or_is_read_at_length = long(
    foreign, foreign_checkpoint_ends_well
)


def start_run(out, resume=""):
    """A Run of a small model, which it resumes if it is asked to."""
    model = torch.nn.Linear(2, 1)
    optimizers = make_optimizers(model, 0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    config = sft.Config(out=str(out), resume=resume)
    run = Run(config, 6, [model], optimizers, batches=None, beta=0.5)
    run.log_file.close()
    return run


def foreign_state_ends_well(part, value):
    """A state for --resume with another value in one place."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "a.pt"
        run = start_run(out)
        run.save_state(3)
        content = read_torch(run.newest)
        replace(content, part, value)
        torch.save(content, run.newest)
        try:
            assert isinstance(start_run(out, "newest").first_step, int)
        except SystemExit as e:
            assert str(e).startswith(f"error: {out}.resume") and "\n" not in str(e)


STATE_PARTS = [("step",), ("settings",), ("settings", "lr"), ("parts",), ("state",)]
STATE_PARTS += [("parts", 0), ("parts", 0, "weight"), ("parts", 1), ("parts", 1, "state")]
STATE_PARTS += [("parts", 1, "param_groups"), ("parts", 1, "state", 0), ("state", "beta")]
states = given(part=st.sampled_from(STATE_PARTS), value=other_values)
test_a_state_of_other_parts_ends_in_one_line_or_is_read = states(foreign_state_ends_well)
test_a_state_of_other_parts_ends_in_one_line_or_is_read_at_length = long(
    states, foreign_state_ends_well
)


def test_a_state_that_nobody_touched_is_read(tmp_path):
    start_run(tmp_path / "a.pt").save_state(3)
    run = start_run(tmp_path / "a.pt", "newest")
    assert run.first_step == 3 and run.state == {"beta": 0.5}


def load_tokenizer(path):
    return Tokenizer.loads(read_text(path), path)


def damaged_tokenizer_ends_well(content):
    tokenizer = read(load_tokenizer, content, "tokenizer.tiktoken")
    if tokenizer and not tokenizer.is_char:
        assert tokenizer.decode(tokenizer.encode("naïve 東京 😀")) == "naïve 東京 😀"


RULES = dict(pattern=".|\n", text_tokens=[], normal_form="NFC")
RULES |= dict(special_tokens=TOKENIZER.rules["special_tokens"])
TOKENIZERS = [TOKENIZER.dumps().encode(), f"# {json.dumps(RULES)}\n{TOKENIZER.dumps()}".encode()]
other_rules = changed(RULES).map(lambda rules: b"# " + rules + b"\n" + TOKENIZERS[0])


def damaged_early(content, n):
    """Damaged anywhere, or within the first n bytes."""
    return damaged(content) | damaged(content[:n]).map(lambda start: start + content[n:])


damaged_tokenizers = st.sampled_from(TOKENIZERS).flatmap(
    lambda content: damaged_early(content, 300)
)
tokenizers = given(content=damaged_tokenizers | other_rules)
test_a_damaged_tokenizer_ends_in_one_line_or_is_read = tokenizers(damaged_tokenizer_ends_well)
test_a_damaged_tokenizer_ends_in_one_line_or_is_read_at_length = long(
    tokenizers, damaged_tokenizer_ends_well
)


# ---- folders from elsewhere


def hugging_face_files():
    """{name: content} of the folder that convert.py makes of the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        convert.to_hf(Path(folder) / "hf", WHOLE, TOKENIZER)
        return {path.name: path.read_bytes() for path in (Path(folder) / "hf").iterdir()}


HUGGING_FACE = hugging_face_files()
NAMES = safetensors.torch.load(HUGGING_FACE["model.safetensors"])
SHARDS = {"weight_map": dict.fromkeys(NAMES, "model.safetensors")}


def foreign_folder_ends_well(name, content):
    with tempfile.TemporaryDirectory() as folder:
        for good, bytes_ in HUGGING_FACE.items():
            (Path(folder) / good).write_bytes(bytes_)
        (Path(folder) / name).write_bytes(content)
        try:
            model, tokenizer = convert.from_hf(Path(folder), convert.Config())
            assert model.config.vocab_size == tokenizer.vocab_size
            path = Path(folder) / "a.pt"
            save_checkpoint(path, "base", model, tokenizer, convert.Config())
            load(path)  # what was converted can be used
        except SystemExit as e:
            assert str(e).startswith(f"error: {folder}") and "\n" not in str(e)


@st.composite
def foreign_files(draw):
    names = ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"]
    name = draw(st.sampled_from(names))
    content = HUGGING_FACE.get(name, json.dumps(SHARDS).encode())
    if name == "model.safetensors":  # its first 8 bytes and the JSON after them say what lies where
        return name, draw(damaged_early(content, 400))
    return name, draw(damaged(content) | changed(json.loads(content)))


folders = given(foreign_files())


def folder_ends_well(name_and_content):
    foreign_folder_ends_well(*name_and_content)


test_a_folder_from_elsewhere_ends_in_one_line_or_becomes_a_checkpoint = folders(folder_ends_well)
test_a_folder_from_elsewhere_ends_in_one_line_or_becomes_a_checkpoint_at_length = long(
    folders, folder_ends_well
)


def test_what_the_fuzz_found_once_is_refused():
    for pattern in ("", "|.", "(", "\\p{Nonsense}", "0", "\\w+"):
        rules = json.dumps(RULES | dict(pattern=pattern))
        damaged_tokenizer_ends_well(f"# {rules}\n{TOKENIZER.dumps()}".encode())
    for shard in ("", ".", "\ud800"):
        index = json.dumps({"weight_map": {"embed": shard}})
        foreign_folder_ends_well("model.safetensors.index.json", index.encode())
