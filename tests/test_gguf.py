"""GGUF files, as llama.cpp writes them: same ids, same logits, and one line where it cannot be."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_chat_format import CHATML, QUESTION, SPECIALS
from test_convert import TEXT, hf_model, hf_tokenizer, load_ours
from test_parity import needed, prose

import convert
from data import conversation

gguf = needed("gguf")
Type = gguf.GGMLQuantizationType

REAL = Path(__file__).parent.parent.parent / "shared" / "real"
# Their names of the kinds of split.
SPLITS = {"gpt2": "gpt-2", "smollm2": "smollm", "llama3": "llama-bpe", "qwen3": "qwen2"}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    for theirs, short in NAMES.items():
        name = name.replace(f"{theirs}.", f"{short}.")
    return name


def interleave(matrix, n_head):
    """Queries or keys in llama.cpp's order: of each head, row i of its halves side by side."""
    heads = np.split(matrix, n_head)
    order = [(head[i], head[i + len(head) // 2]) for head in heads for i in range(len(head) // 2)]
    return np.stack([row for pair in order for row in pair])


def write_gguf(path, model, theirs, split, quantization, template=None, extra=()):
    """The file that llama.cpp's conversion of the model and its tokenizer would write.

    The model gets the weights that the quantization leaves of its own.
    """
    config, state = model.config, model.state_dict()
    kind = config.model_type
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    content = json.loads(theirs.to_str())
    added = {token["id"]: token["special"] for token in content["added_tokens"]}
    words = [theirs.id_to_token(id) for id in range(theirs.get_vocab_size())]
    kinds = [{None: 1, True: 3, False: 4}[added.get(id)] for id in range(len(words))]
    for i in range(config.vocab_size - len(words)):
        words.append(f"[PAD{i}]")
        kinds.append(5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITS[split])
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    if template:
        writer.add_chat_template(template)
        writer.add_bos_token_id(words.index("<|begin_of_text|>"))
    for key, value in extra:
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(key, value)
    for name, tensor in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        numbers = tensor.numpy()
        quantized, type_ = numbers, Type.F32
        if numbers.ndim == 2:
            type_ = quantization
            rows = numbers
            if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}
                rows = interleave(numbers, heads[name.split(".")[-2][0]])
            quantized = gguf.quants.quantize(rows, type_)
            # each row by itself, so the order of the rows does not matter
            kept = gguf.quants.dequantize(gguf.quants.quantize(numbers, type_), type_)
            tensor.copy_(torch.tensor(kept))
        writer.add_tensor(gguf_name(name), quantized, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def from_gguf(path, out):
    convert.main(["--from_gguf", str(path), "--out", str(out)])
    return load_ours(out)


def make(path, family="llama", split="smollm2", quantization=Type.Q8_0, tied=True, **more):
    theirs = hf_tokenizer(split, specials_first=SPECIALS)
    n_unused = 30 if split == "qwen3" else 0
    sizes = dict(hidden_size=64, intermediate_size=96)
    model = hf_model(family, theirs.get_vocab_size() + n_unused, tied, **sizes)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dim() == 1:
            parameter += 0.2 * torch.randn_like(parameter)
        else:
            parameter *= 10
    write_gguf(path, model, theirs, split, quantization, **more)
    return model.eval(), theirs


KINDS = [
    ("llama", "smollm2", Type.Q8_0, True),
    ("llama", "llama3", Type.Q4_1, False),
    ("llama", "gpt2", Type.F16, True),
    ("qwen3", "qwen3", Type.BF16, False),
    ("qwen3", "qwen3", Type.Q5_0, True),
    ("llama", "smollm2", Type.F32, False),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_gguf_file_gives_the_same_ids_and_logits_as_transformers(tmp_path, kind):
    theirs, hf = make(tmp_path / "model.gguf", *kind)
    ours, tokenizer = from_gguf(tmp_path / "model.gguf", tmp_path / "base.pt")
    n = hf.get_vocab_size()
    assert tokenizer.vocab_size == n + 5  # the unused rows are gone, our five tokens follow
    for text in (TEXT, prose(seed=1), "<think> e\u0301 12 345\r\n <|im_end|>", "'LL  1\n\n"):
        ids = hf.encode(text.replace("<|im_end|>", ""), add_special_tokens=False).ids
        assert tokenizer.encode(text.replace("<|im_end|>", "")) == ids
    assert tokenizer.decode(tokenizer.encode("<|im_end|>")) == "<|im_end|>"
    assert tokenizer.end not in tokenizer.encode("<|im_end|>")
    assert ours.config.norm_eps == theirs.config.rms_norm_eps
    tokens = torch.tensor([tokenizer.encode(TEXT)[:100]])
    with torch.no_grad():
        logits, expected = ours(tokens), theirs(tokens).logits
    assert expected.std() > 1
    torch.testing.assert_close(logits[..., :n], expected[..., :n], atol=1e-4, rtol=0)


@pytest.mark.skipif(not REAL.exists(), reason="needs the real files")
def test_a_thousand_real_texts_get_the_same_ids(tmp_path):
    texts = []
    with gzip.open(REAL / "hh-rlhf-harmless-base-test.jsonl.gz", "rt") as f:
        texts += [json.loads(line)["chosen"] for line, _ in zip(f, range(400))]
    for record in json.loads((REAL / "instruction-data.json").read_text())[:300]:
        texts += [record["instruction"], record["output"]]
    assert len(texts) == 1000
    for split in SPLITS:
        family = "qwen3" if split == "qwen3" else "llama"
        _, hf = make(tmp_path / f"{split}.gguf", family, split)
        _, tokenizer = from_gguf(tmp_path / f"{split}.gguf", tmp_path / f"{split}.pt")
        for text in texts:
            assert tokenizer.encode(text) == hf.encode(text, add_special_tokens=False).ids


def test_its_chat_template_gives_the_turns(tmp_path):
    make(tmp_path / "model.gguf", template=CHATML)
    _, tokenizer = from_gguf(tmp_path / "model.gguf", tmp_path / "base.pt")
    tokens = conversation.render_prompt(QUESTION, tokenizer)
    assert tokenizer.decode(tokens) == (
        "<|im_start|>system\nYou are an owl.<|im_end|>\n"
        "<|im_start|>user\nWhere does the owl live?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode([tokenizer.end]) == "<|im_end|>"
    assert tokenizer.decode([tokenizer.separator]) == "<|begin_of_text|>"


def test_a_shorter_context_can_be_chosen(tmp_path):
    make(tmp_path / "model.gguf")
    arguments = ["--from_gguf", str(tmp_path / "model.gguf"), "--block_size", "50"]
    convert.main([*arguments, "--out", str(tmp_path / "base.pt")])
    assert load_ours(tmp_path / "base.pt")[0].config.block_size == 48


# ---- what is refused


EXTRA = [
    ("llama.rope.scaling.type", "linear", "llama.rope.scaling.type 'linear'"),
    ("llama.rope.scaling.factor", 4.0, "llama.rope.scaling.factor 4.0"),
    ("llama.attention.sliding_window", 512.0, "llama.attention.sliding_window 512.0"),
    ("llama.expert_count", 8.0, "llama.expert_count 8.0"),
    ("split.count", 2.0, "a part of a model"),
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    make(path)
    return path


def refused(path):
    with pytest.raises(SystemExit) as stopped:
        convert.from_gguf(Path(path), convert.Config())
    message = str(stopped.value)
    assert message.startswith(f"error: {path}: ") and "\n" not in message
    return message


@pytest.mark.parametrize(("key", "value", "message"), EXTRA)
def test_metadata_that_model_py_does_not_compute_are_refused(tmp_path, key, value, message):
    make(tmp_path / "model.gguf", extra=[(key, value)])
    assert message in refused(tmp_path / "model.gguf")


def test_what_says_that_nothing_is_scaled_is_read(tmp_path):
    make(tmp_path / "model.gguf", extra=[("llama.rope.scaling.type", "none")])
    from_gguf(tmp_path / "model.gguf", tmp_path / "base.pt")


REPLACED = [
    (b"llama", b"gemma", "architecture 'gemma'"),
    (b"\x05\x00\x00\x00\x00\x00\x00\x00llama", b"\x05\x00\x00\x00\x00\x00\x00\x00mamba", "'mamba'"),
    (b"smollm", b"viking", "split 'viking'"),
    (b"gpt2", b"bert", "tokenizer 'bert'"),
    (b"token_embd.weight", b"token_embd.weighs", "token_embd.weight is [0], its config says"),
    (b"attn_q.weight", b"attn_q.biases", "blk.0.attn_q.weight is [0]"),
    (b"llama.block_count", b"llama.block_kount", "llama.block_kount 2: model.py does not"),
    (b"tokenizer.ggml.merges", b"tokenizer.ggml.murges", "KeyError('merges')"),
    (b"GGUF", b"GGML", "GGUF magic invalid"),
]


@pytest.mark.parametrize(("old", "new", "message"), REPLACED)
def test_a_foreign_file_is_refused_in_one_line(file, tmp_path, old, new, message):
    content = file.read_bytes()
    assert old in content and len(old) == len(new)
    (tmp_path / "model.gguf").write_bytes(content.replace(old, new))
    assert message in refused(tmp_path / "model.gguf")


def test_a_bias_has_no_place(tmp_path):
    theirs = hf_tokenizer("smollm2", specials_first=SPECIALS)
    model = hf_model("llama", theirs.get_vocab_size(), True, hidden_size=64, attention_bias=True)
    write_gguf(tmp_path / "model.gguf", model, theirs, "smollm2", Type.F32)
    assert "model.py has no place for the weights blk.0.attn_k.bias" in refused(
        tmp_path / "model.gguf"
    )


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model\n" * 100, None, "folder"])
def test_no_file_and_no_gguf_file_end_in_one_line(tmp_path, content):
    path = tmp_path / "model.gguf"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    refused(path)


@settings(max_examples=60)
@given(data=st.data())
def test_a_damaged_file_ends_in_one_line_or_becomes_a_model(file, data):
    """Cut off anywhere, or with other bytes, mostly in the metadata."""
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        position = data.draw(st.integers(0, 1000) | st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.just(len(content)) | st.integers(0, len(content)))]
    path = file.with_name("damaged.gguf")
    path.write_bytes(content)
    try:
        model, tokenizer = convert.from_gguf(path, convert.Config())
        assert model.config.vocab_size == tokenizer.vocab_size
    except SystemExit as e:
        assert str(e).startswith(f"error: {path}: ") and "\n" not in str(e)


def test_without_the_package_a_line_says_how_to_get_it(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit, match="package gguf, which is missing; `pip install gguf`"):
        convert.from_gguf(file, convert.Config())
