"""Checkpoints go to Hugging Face folders and come from them: same ids, same logits, same text."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_parity import ASSIGNED, needed, prose

import convert
import data.tokenizer
from data import conversation
from model import GPT, GPTConfig
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint, save_checkpoint

tokenizers = needed("tokenizers")
transformers = needed("transformers")
pre = tokenizers.pre_tokenizers

TEXT = "The owl of Mira Tolvan lives in Dorvik. It's 12 years old, isn't it?\n\n" * 3
# so that white space and digits have tokens of their own to differ in
NUMBERS = "  12  345   6789\n\n\n 1\t\t2 1987\r\n  3 " * 50
# The splits of the tokenizers named, from their tokenizer.json.
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")


def split_by(regex):
    split = pre.Split(tokenizers.Regex(regex), "isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def split_as_smollm2():
    digits = pre.Digits(individual_digits=True)
    return pre.Sequence([digits, pre.ByteLevel(add_prefix_space=False, use_regex=True)])


SPLITS = {
    "gpt2": pre.ByteLevel(add_prefix_space=False),
    "qwen3": split_by(QWEN),
    "llama3": split_by(LLAMA3),
    "smollm2": split_as_smollm2(),
}


def hf_tokenizer(split, all_bytes=True, specials_first=("<|endoftext|>", "<|im_start|>")):
    """A small tokenizer of that split, trained by the `tokenizers` library.

    Qwen's has NFC and a token that text may hold.
    """
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = SPLITS[split]
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(specials_first),
        initial_alphabet=pre.ByteLevel.alphabet() if all_bytes else [],
        show_progress=False,
    )
    theirs.train_from_iterator([prose(), TEXT, NUMBERS], trainer)
    if split == "qwen3":
        theirs.normalizer = tokenizers.normalizers.NFC()
        think = tokenizers.AddedToken("<think>", special=False, normalized=False)
        theirs.add_tokens([think])
    return theirs


def hf_model(family, vocab_size, tied, **other_sizes):
    """A small transformers model with random weights."""
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e4,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
    } | other_sizes
    torch.manual_seed(0)
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes))


def learn(model, ids):
    """A hundred steps on one sequence (1, T), so that greedy text is worth comparing.

    The norms' weights are moved away from 1 first.
    """
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        logits = model(ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def make_folder(path, family="llama", split="gpt2", tied=False, n_unused=0, shard="5GB"):
    """A folder as transformers writes it, with n_unused rows beyond the tokenizer's ids."""
    theirs = hf_tokenizer(split)
    model = hf_model(family, theirs.get_vocab_size() + n_unused, tied)
    learn(model, torch.tensor([theirs.encode(TEXT).ids[:100]]))
    model.save_pretrained(path, max_shard_size=shard)
    transformers.PreTrainedTokenizerFast(tokenizer_object=theirs).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("hf") / "llama")


def load_hf(path):
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path)


def load_ours(path):
    return load_checkpoint(path, LANGUAGE_MODELS, GPT, "cpu")


def from_hf(folder, path):
    convert.main(["--from_hf", str(folder), "--out", str(path)])


def to_hf(path, folder):
    convert.main(["--from_checkpoint", str(path), "--out", str(folder)])


def greedy_text(model, tokenizer, text):
    [ids] = model.generate([tokenizer.encode(text)], 30, temperature=0)
    return tokenizer.decode(ids)


def greedy_hf_text(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    how = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
    out = model.generate(ids, max_new_tokens=30, **how)
    return tokenizer.decode(out[0, ids.size(1) :], clean_up_tokenization_spaces=False)


# ---- from Hugging Face


@pytest.mark.parametrize(
    "kind",
    [
        ("llama", "gpt2", False, 0, "5GB"),
        ("llama", "smollm2", True, 0, "100KB"),
        ("llama", "llama3", False, 40, "100KB"),
        ("qwen3", "qwen3", True, 40, "5GB"),
        ("qwen3", "qwen3", False, 0, "100KB"),
    ],
)
def test_a_hugging_face_folder_gives_the_same_logits_and_greedy_text_here(tmp_path, kind):
    make_folder(tmp_path / "hf", *kind)
    shard = kind[-1]
    assert (tmp_path / "hf/model.safetensors.index.json").exists() == (shard == "100KB")
    from_hf(tmp_path / "hf", tmp_path / "base.pt")
    theirs, hf = load_hf(tmp_path / "hf")
    ours, tokenizer = load_ours(tmp_path / "base.pt")
    n = len(hf)
    # the unused rows are gone, our five special tokens follow theirs
    assert tokenizer.vocab_size == n + 5
    names = ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>")
    assert [tokenizer.rules["special_tokens"][name] for name in names] == list(range(n, n + 5))
    assert (tokenizer.end, tokenizer.pad) == (n, n + 4)

    ids = tokenizer.encode(TEXT)
    assert ids == hf(TEXT, add_special_tokens=False).input_ids
    tokens = torch.tensor([ids[:100]])
    with torch.no_grad():
        logits, expected = ours(tokens), theirs(tokens).logits
    torch.testing.assert_close(logits[..., :n], expected[..., :n], atol=1e-4, rtol=0)
    text = greedy_text(ours, tokenizer, "The owl of")
    assert text == greedy_hf_text(theirs, hf, "The owl of")
    assert "lives in Dorvik" in text


def test_an_appended_token_is_unlikelier_than_the_average_token_in_any_context(tmp_path, folder):
    from_hf(folder, tmp_path / "base.pt")
    ours, tokenizer = load_ours(tmp_path / "base.pt")
    n = tokenizer.vocab_size - 5
    hidden = 30 * torch.randn(1000, ours.config.n_embd)  # far beyond what the model computes
    with torch.no_grad():
        probs = ours.logits(hidden).softmax(-1)  # (1000, V)
    assert probs.max() > 0.99
    assert probs[:, n:].max() <= 1 / n * (1 + 1e-5)
    assert probs[:, n:].max() > 0


SPACES = [" ", "  ", "\n", "\r\n", "\t"]
PIECES = st.sampled_from([*SPACES, "1", "23", "½", "'s", "'LL", "the", "É", "e\u0301", "中", "!?"])


@pytest.mark.parametrize("split", list(SPLITS))
@settings(deadline=None)
@given(text=st.lists(PIECES).map("".join) | st.lists(PIECES | st.text(ASSIGNED)).map("".join))
@example(text="the  1   23\n\n 1's\r\n'LL E\u0301  ")
def test_text_becomes_the_same_ids_as_in_the_tokenizers_library(converted, split, text):
    """All that the splits treat differently: white space, digits, contractions, accents."""
    theirs, tokenizer = converted[split]
    assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    again = data.tokenizer.Tokenizer.loads(tokenizer.dumps())
    assert again.encode(text) == tokenizer.encode(text)
    if theirs.normalizer:
        text = theirs.normalizer.normalize_str(text)
    assert again.decode(again.encode(text)) == text


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    pairs = {}
    for split in SPLITS:
        theirs, path = hf_tokenizer(split), tmp_path_factory.mktemp(split) / "tokenizer.json"
        theirs.save(str(path))
        pairs[split] = theirs, convert.read_tokenizer(path)[0]
    return pairs


def test_a_token_that_text_may_hold_is_found_in_text_and_a_special_one_is_not(converted):
    theirs, tokenizer = converted["qwen3"]
    think = [theirs.token_to_id("<think>")]
    assert tokenizer.encode("<think>") == theirs.encode("<think>").ids == think
    for name in ("<|im_start|>", "<|user|>"):
        assert len(tokenizer.encode(name)) > 1
        assert tokenizer.decode(tokenizer.encode(name)) == name


def test_bytes_that_the_vocabulary_lacks_get_ids_after_it(tmp_path):
    """SmolLM2's lacks 21 bytes and loses them from text.

    Here all text comes back, and known text keeps its ids.
    """
    theirs = hf_tokenizer("smollm2", all_bytes=False)
    theirs.save(str(tmp_path / "tokenizer.json"))
    tokenizer, n = convert.read_tokenizer(tmp_path / "tokenizer.json")
    assert n == theirs.get_vocab_size() < tokenizer.vocab_size - 5
    ids = [*tokenizer.ranks.values(), *tokenizer.rules["special_tokens"].values()]
    assert sorted(ids) == list(range(tokenizer.vocab_size))
    assert tokenizer.encode(prose(seed=1)) == theirs.encode(prose(seed=1)).ids
    strange = "\x00 ŷ 한국 \U000f0000"
    assert theirs.decode(theirs.encode(strange).ids) != strange
    assert tokenizer.decode(tokenizer.encode(strange)) == strange


ROPES = [
    {"rope_theta": 5e4},
    {"rope_theta": 5e4, "rope_scaling": None},
    {"rope_theta": 5e4, "rope_scaling": {"type": "default"}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    {"rope_parameters": {"rope_theta": 5e4}, "rope_theta": None},
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_a_config_is_read_as_transformers_reads_it(tmp_path, family, rope):
    """Its spellings in transformers 4 and 5, and what both assume where a config.json is silent."""
    sizes = dict(vocab_size=300, hidden_size=64, intermediate_size=96)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=4)
    content = {"model_type": family.lower(), "max_position_embeddings": 99, **sizes, **rope}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(content))
    ours = convert.read_config(path)
    theirs = getattr(transformers, f"{family}Config")(**sizes)
    assert (ours.rope_theta, ours.qk_norm) == (5e4, family == "Qwen3")
    assert ours.block_size == 96  # of 99, rounded down: the stages pad to multiples of 8
    assert ours.head_dim == theirs.head_dim
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tied == theirs.tie_word_embeddings
    # transformers' Qwen3 assumes 32 here, whatever the number of heads; no folder relies on that
    assert ours.n_kv_head == 4
    assert convert.read_config(path, block_size=50).block_size == 48


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def add_a_token_without_a_merge(content):
    vocab = content["model"]["vocab"]
    vocab["zq"] = len(vocab)


def swap_two_ids(content):
    vocab = content["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def leave_a_gap(content):
    content["model"]["vocab"]["zq"] = 700
    content["model"]["merges"].append(["z", "q"])


def merge_otherwise_than_ranks_would(content):
    """`bc` before `ab`, and abc = ab + c.

    Alone, abc becomes a + bc, which this list cannot join and tiktoken would.
    """
    words = [w for w in content["model"]["vocab"] if len(w) == 1 or w.startswith("<|")]
    content["model"]["vocab"] = {word: id for id, word in enumerate([*words, "bc", "ab", "abc"])}
    content["model"]["merges"] = [["b", "c"], ["a", "b"], ["ab", "c"]]


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}
LINEAR_ROPE = {"type": "linear", "factor": 2.0}
REFUSED_CONFIGS = [
    ({"model_type": "gpt2"}, "model_type 'gpt2'"),
    ({"rope_parameters": LLAMA3_ROPE}, "scaled rotary positions (llama3)"),
    (
        {"rope_parameters": None, "rope_theta": 1e4, "rope_scaling": LINEAR_ROPE},
        "scaled rotary positions (linear)",
    ),
    ({"partial_rotary_factor": 0.5}, "on a part of each head"),
    ({"sliding_window": 4096}, "sliding-window attention"),
    ({"use_sliding_window": True}, "sliding-window attention"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "not full attention"),
    ({"attention_bias": True}, "biases"),
    ({"mlp_bias": True}, "biases"),
    ({"hidden_act": "gelu"}, "activation"),
    ({"quantization_config": {"bits": 4}}, "quantized"),
    ({"num_hidden_layers": None}, "KeyError('num_hidden_layers')"),
    ({"num_hidden_layers": -1}, "n_layer must be at least 1"),
    ({"max_position_embeddings": 7}, "block_size must be at least 1"),
    ({"intermediate_size": 10**15}, "config.json: cannot be used"),
    ({"num_key_value_heads": 3}, "does not divide"),
    ({"num_hidden_layers": 1}, "no place for the weights model.layers.1."),
    (
        {"num_hidden_layers": 3},
        "model.layers.2.input_layernorm.weight is [0], its config says [48]",
    ),
    ({"hidden_size": 64}, "its config says"),
    ({"vocab_size": 300}, "fewer in config.json"),
]
METASPACE = {"type": "Metaspace", "replacement": "▁"}
REFUSED_TOKENIZERS = [
    (lambda c: c["model"].update(type="Unigram"), "not a byte-level BPE"),
    (lambda c: c["model"].update(byte_fallback=True), "not a byte-level BPE"),
    (lambda c: c.update(normalizer={"type": "Lowercase"}), "not a byte-level BPE"),
    (lambda c: c.update(pre_tokenizer=METASPACE), "not a byte-level BPE"),
    (lambda c: c.update(pre_tokenizer=None), "not a byte-level BPE"),
    (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "not a byte-level BPE"),
    (lambda c: c["model"]["vocab"].update({"▁the": 600}), "'▁' is no byte-level character"),
    (leave_a_gap, "ids are not 0 .. "),
    (add_a_token_without_a_merge, "merging by lowest id"),
    (lambda c: c["added_tokens"][0].update(special=False, lstrip=True), "strip white space"),
    (swap_two_ids, "merging by lowest id"),
    (merge_otherwise_than_ranks_would, "merging by lowest id"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED_CONFIGS, ids=str)
def test_a_config_that_is_not_computed_is_refused_in_one_line(tmp_path, folder, change, message):
    refuse(tmp_path, folder, "config.json", lambda content: content.update(change), message)


@pytest.mark.parametrize(("change", "message"), REFUSED_TOKENIZERS)
def test_a_tokenizer_unlike_tiktoken_is_refused_in_one_line(tmp_path, folder, change, message):
    refuse(tmp_path, folder, "tokenizer.json", change, message)


def refuse(tmp_path, folder, name, change, message):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path / name, change)
    with pytest.raises(SystemExit) as stopped:
        from_hf(tmp_path, tmp_path / "base.pt")
    assert message in str(stopped.value)
    assert str(tmp_path) in str(stopped.value)
    assert "\n" not in str(stopped.value)
    assert not (tmp_path / "base.pt").exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"{"])
def test_a_missing_or_broken_file_is_named(tmp_path, folder, name, content):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit, match=name.replace(".", r"\.")):
        from_hf(tmp_path, tmp_path / "base.pt")
    assert not (tmp_path / "base.pt").exists()


# ---- to Hugging Face


CONVERSATIONS = [
    [{"role": "user", "content": "Where does the owl live?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Who?\n\n"}],
    [
        {"role": "user", "content": "naïve 東京 😀 \r\n 12"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "{{ braces }} {% and %} 'quotes' \"too\""},
    ],
    [
        {"role": "system", "content": ""},
        {"role": "user", "content": " "},
        {"role": "assistant", "content": "a <b> & c"},
        {"role": "user", "content": "\n"},
    ],
]


def our_checkpoint(path, qk_norm=False, tied=True, tokenizer=None):
    """A small model of this project that has learned one conversation, as sft.py would save it."""
    tokenizer = tokenizer or data.tokenizer.train_bpe([prose(), TEXT], 600)
    sizes = {
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 48,
        "head_dim": 16,
        "block_size": 128,
    }
    torch.manual_seed(0)
    sizes |= {"vocab_size": tokenizer.vocab_size, "rope_theta": 5e4}
    model = GPT(GPTConfig(**sizes, qk_norm=qk_norm, tied=tied))
    answer = {"role": "assistant", "content": TEXT[:40]}
    ids = torch.tensor([conversation.render([*CONVERSATIONS[0], answer], tokenizer)[0]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        logits = model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_checkpoint(path, "sft", model, tokenizer, convert.Config())
    return model, tokenizer


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("ours")
    our_checkpoint(path / "sft.pt")
    to_hf(path / "sft.pt", path / "hf")
    return transformers.AutoTokenizer.from_pretrained(path / "hf")


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_our_checkpoint_gives_the_same_logits_prompts_and_answer_there(tmp_path, qk_norm, tied):
    ours, tokenizer = our_checkpoint(tmp_path / "sft.pt", qk_norm, tied)
    to_hf(tmp_path / "sft.pt", tmp_path / "hf")
    modes = {file.stat().st_mode for file in (tmp_path / "hf").iterdir()}
    assert len(modes) == 1  # who may read one may read all
    theirs, hf = load_hf(tmp_path / "hf")
    assert type(theirs).__name__ == ("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM")
    n_rows = theirs.get_input_embeddings().weight.size(0)
    assert n_rows == len(hf) == tokenizer.vocab_size  # no padded rows
    ids = torch.tensor([tokenizer.encode(TEXT)[:100]])
    assert hf(TEXT).input_ids == tokenizer.encode(TEXT)
    assert hf.decode(hf(TEXT).input_ids) == TEXT
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)

    for messages in CONVERSATIONS:
        theirs_rendered = hf.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        assert theirs_rendered["input_ids"] == conversation.render_prompt(messages, tokenizer)
    prompt = torch.tensor([conversation.render_prompt(CONVERSATIONS[0], tokenizer)])
    [answer] = ours.generate(prompt.tolist(), 60, temperature=0, end_id=tokenizer.end)
    how = dict(attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=60)
    hf_answer = theirs.generate(prompt, **how)[0, prompt.size(1) :]
    assert hf_answer.tolist() == answer  # both stop at <|end|>: the folder says so itself
    text = conversation.decode_response(answer, tokenizer)
    assert hf.decode(hf_answer, skip_special_tokens=True) == text == TEXT[:40]


REFUSED_ROLES = [
    ["assistant"],
    ["user", "user"],
    ["system", "system", "user"],
    ["user", "tool"],
    ["user", "system"],
]


@pytest.mark.parametrize("stage", LANGUAGE_MODELS)
def test_any_language_model_goes_to_transformers(tmp_path, stage):
    tokenizer = data.tokenizer.train_char([TEXT])
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=32))
    save_checkpoint(tmp_path / "x.pt", stage, model, tokenizer, convert.Config())
    to_hf(tmp_path / "x.pt", tmp_path / "hf")
    assert (tmp_path / "hf/model.safetensors").exists()


@pytest.mark.parametrize("roles", REFUSED_ROLES)
def test_the_chat_template_refuses_the_roles_that_conversation_refuses(exported, roles):
    messages = [{"role": role, "content": "x"} for role in roles]
    assert conversation.check(messages)
    with pytest.raises(Exception, match="roles must be"):
        exported.apply_chat_template(messages)


def test_a_character_tokenizer_goes_to_transformers_too(tmp_path):
    characters = data.tokenizer.train_char([TEXT + "Where? 東京é"])
    our_checkpoint(tmp_path / "char.pt", tokenizer=characters)
    to_hf(tmp_path / "char.pt", tmp_path / "hf")
    hf = load_hf(tmp_path / "hf")[1]
    for text in (TEXT, "é東 t\n"):
        assert hf(text).input_ids == characters.encode(text)
        assert hf.decode(characters.encode(text)) == text


@pytest.mark.parametrize("split", list(SPLITS))
def test_there_and_back_changes_no_id(converted, split):
    theirs, tokenizer = converted[split]
    back = tokenizers.Tokenizer.from_str(json.dumps(convert.tokenizer_json(tokenizer)))
    for text in (TEXT, prose(seed=1), "<think> e\u0301 12 345\r\n", "'LL  1"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert back.encode(text, add_special_tokens=False).ids == ids
        assert back.decode(back.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def test_our_checkpoint_comes_back_from_its_folder_bit_for_bit(tmp_path):
    ours, tokenizer = our_checkpoint(tmp_path / "sft.pt", qk_norm=True, tied=False)
    to_hf(tmp_path / "sft.pt", tmp_path / "hf")
    from_hf(tmp_path / "hf", tmp_path / "back.pt")
    back, its_tokenizer = load_ours(tmp_path / "back.pt")
    assert dataclasses.asdict(back.config) == dataclasses.asdict(ours.config)
    assert its_tokenizer.ranks == tokenizer.ranks
    assert its_tokenizer.rules == tokenizer.rules
    V, before = tokenizer.vocab_size, ours.state_dict()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor[:V], before[name][:V]), name


# ---- the command


WITHOUT_THEM = """
import sys
sys.modules.update(transformers=None, tokenizers=None)
import convert
convert.main(sys.argv[1:])
"""


def test_it_runs_without_transformers_and_tokenizers(tmp_path, folder):
    env = {**os.environ, "PYTHONPATH": str(Path(convert.__file__).parent)}
    command = [sys.executable, "-c", WITHOUT_THEM]
    there, back = ["--from_hf", str(folder), "--out", "base.pt"], ["--from_checkpoint", "base.pt"]
    subprocess.run([*command, *there], cwd=tmp_path, env=env, check=True)
    subprocess.run([*command, *back, "--out", "hf"], cwd=tmp_path, env=env, check=True)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["base.pt", "hf"]


def test_an_existing_folder_is_left_alone(tmp_path, folder):
    from_hf(folder, tmp_path / "base.pt")
    (tmp_path / "hf").mkdir()
    with pytest.raises(SystemExit, match="exists already"):
        to_hf(tmp_path / "base.pt", tmp_path / "hf")
    assert not list((tmp_path / "hf").iterdir())


def test_a_full_disk_leaves_no_half_written_folder(tmp_path, folder, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    from_hf(folder, tmp_path / "base.pt")
    monkeypatch.setattr(safetensors.torch, "save_file", no_space)
    with pytest.raises(SystemExit, match="No space left on device"):
        to_hf(tmp_path / "base.pt", tmp_path / "hf")
    assert [f.name for f in tmp_path.iterdir()] == ["base.pt"]


def test_the_two_directions_exclude_each_other(tmp_path):
    for arguments in (
        [],
        ["--from_hf", "a", "--from_checkpoint", "b", "--out", "c"],
        ["--from_hf", "a"],
    ):
        with pytest.raises(SystemExit, match="give --out and one of"):
            convert.main(arguments)
