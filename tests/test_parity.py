"""The model and the tokenizer against code that nobody here wrote.

transformers, the `tokenizers` library and tiktoken's teaching code.
"""

import itertools
import random
from collections import Counter

import pytest
import regex
import tiktoken._educational
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import convert
from data import tokenizer
from model import GPT, GPTConfig

FAMILIES = ("llama", "qwen3")
# Code points that Unicode gained lately are letters or digits to one library, nothing to another.
ASSIGNED = st.characters(exclude_categories=["Cs", "Cn"])
CASES = list(itertools.product(FAMILIES, (False, True), (False, True), (0, 1)))


def needed(name):
    reason = f"parity needs {name}: pip install -r requirements-test.txt"
    return pytest.importorskip(name, reason=reason)


# ---- the model


def twins(family, gqa=False, tied=True, seed=0):
    """A GPT of random sizes and weights, norms included, and transformers' model with the same."""
    rng = random.Random(f"{family} {gqa} {tied} {seed}")
    n_kv_head = rng.choice([1, 2, 3])
    config = GPTConfig(
        vocab_size=rng.randrange(
            70, 120
        ),  # no multiple of 64: our matrix has padded rows, theirs has none
        block_size=64,
        n_layer=rng.choice([1, 2, 3]),
        n_head=n_kv_head * (rng.choice([2, 3]) if gqa else 1),
        n_kv_head=n_kv_head,
        n_embd=rng.choice([24, 48]),
        head_dim=rng.choice([4, 10, 16]),
        n_inner=rng.choice([40, 64]),
        rope_theta=rng.choice([1e3, 1e6]),
        norm_eps=rng.choice([1e-5, 1e-6]),
        qk_norm=family == "qwen3",
        tied=tied,
    )
    torch.manual_seed(seed)
    ours = GPT(config)
    for parameter in ours.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.3 + (1 if parameter.dim() == 1 else 0)
    names = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_inner,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.block_size,
    }
    hf = needed("transformers")
    if family == "llama":
        config_class, model_class = hf.LlamaConfig, hf.LlamaForCausalLM
    else:
        config_class, model_class = hf.Qwen3Config, hf.Qwen3ForCausalLM
    ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    theirs = model_class(config_class(**names, **ids))
    weights = {}
    for name, tensor in ours.state_dict().items():
        weights[convert.hf_name(name)] = cut(name, tensor, config)
    theirs.load_state_dict(weights)  # strict: every name and shape must be known there
    return ours, theirs.eval()


def cut(name, tensor, config):
    """Without the padded rows of the two vocabulary matrices."""
    return tensor[: config.vocab_size] if name in ("embed.weight", "lm_head.weight") else tensor


@pytest.mark.parametrize(("family", "gqa", "tied", "seed"), CASES)
def test_logits_and_gradients_equal_those_of_transformers(family, gqa, tied, seed):
    """Llama (arXiv 2307.09288) and Qwen3 (arXiv 2505.09388).

    The gradients are those of the summed cross-entropy, parameter by parameter.
    """
    ours, theirs = twins(family, gqa, tied, seed)
    V = ours.config.vocab_size
    tokens = torch.randint(V, (3, 21))
    logits, hf_logits = ours(tokens[:, :-1]), theirs(tokens[:, :-1]).logits  # (3, 20, V) each
    assert hf_logits.std() > 0.3  # not two models that say nothing
    torch.testing.assert_close(logits, hf_logits, atol=1e-4, rtol=0)
    for each in (logits, hf_logits):
        loss = F.cross_entropy(each.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
        loss.backward()
    hf_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        expected = hf_gradients.pop(convert.hf_name(name))
        assert expected.norm() > 1e-2, name
        difference = cut(name, parameter.grad, ours.config) - expected
        assert difference.norm() <= 1e-4 * expected.norm(), name
        if parameter.grad.size(0) > expected.size(0):
            assert parameter.grad[V:].abs().max() == 0  # a padded row never trains
    assert not hf_gradients


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_logits_equal_those_of_transformers(family):
    ours, theirs = twins(family, gqa=True)
    lengths = [3, 9, 6]
    tokens = torch.randint(ours.config.vocab_size, (3, 9))
    n_pad = 9 - torch.tensor(lengths)
    real = torch.arange(9) >= n_pad[:, None]  # (3, 9)
    with torch.no_grad():
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        expected = theirs(tokens, attention_mask=real.long(), position_ids=positions).logits
        torch.testing.assert_close(ours(tokens, n_pad)[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_equals_that_of_transformers_token_for_token(family):
    """Unequal prompts through the KV cache; then again, an id of one row's answer being the end."""
    ours, theirs = twins(family, gqa=True, seed=2)
    rng = random.Random(0)
    prompts = [[rng.randrange(ours.config.vocab_size) for _ in range(n)] for n in (1, 4, 11, 7)]
    generated = ours.generate(prompts, 24, temperature=0)
    P = max(map(len, prompts))
    tokens = torch.tensor([[0] * (P - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (P - len(p)) + [1] * len(p) for p in prompts])
    how = dict(attention_mask=mask, do_sample=False, max_new_tokens=24, pad_token_id=0)
    assert generated == theirs.generate(tokens, **how)[:, P:].tolist()
    assert len(set(map(tuple, generated))) == 4  # each prompt its own continuation

    end = generated[2][5]
    ended = theirs.generate(tokens, **how, eos_token_id=end)[:, P:].tolist()
    rows = [row[: row.index(end) + 1] if end in row else row for row in ended]
    assert ours.generate(prompts, 24, temperature=0, end_id=end) == rows
    assert min(map(len, rows)) < 24


# ---- the tokenizer


SYLLABLES = "ba be ti to ra re lo na su ma the an in er qu é ß st ши 中".split()
MARKS = [" ", ", ", ". ", "'s ", " 1987 ", "\n\n", "  ", " — ", "! "]


def prose(n_words=6000, n_distinct=700, seed=0):
    """Sentences of invented words whose frequencies fall as 1/rank.

    With numbers, contractions, accents and line breaks.
    """
    rng = random.Random(seed)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(n_distinct)]
    chosen = rng.choices(words, [1 / (rank + 3) for rank in range(n_distinct)], k=n_words)
    marks = rng.choices(MARKS, [60, 8, 8, 4, 2, 2, 1, 1, 1], k=n_words)
    return "".join(word + mark for word, mark in zip(chosen, marks, strict=True))


@pytest.fixture(scope="module")
def trained():
    return tokenizer.train_bpe([prose()], 256 + 400 + len(tokenizer.SPECIAL_TOKENS))


def test_bpe_equals_what_the_tokenizers_library_trains(trained):
    """The same ids for the same tokens: every merge, and every tie between pairs, is the same."""
    tokenizers = needed("tokenizers")
    pre, text = tokenizers.pre_tokenizers, prose()
    assert len(set(text.split())) > 500
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = pre.Split(tokenizers.Regex(tokenizer.BPE_PATTERN), "isolated")
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.pre_tokenizer = pre.Sequence([split, byte_level])
    settings = dict(initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=256 + 400, **settings)
    theirs.train_from_iterator([text], trainer)
    spelled = {}
    for token, rank in trained.ranks.items():
        spelled["".join(convert.BYTE_CHARS[b] for b in token)] = rank
    assert spelled == theirs.get_vocab()
    unseen = prose(seed=1) + "Words that 12 never   occurred: naïve, 東京, 😀!\n"
    assert trained.encode(unseen) == theirs.encode(unseen).ids


def merges_without_ties(text, n):
    """The first n tokens of byte-pair encoding by brute force; no pair ties with a merged one."""
    words = regex.findall(tokenizer.BPE_PATTERN, text)
    words = [[bytes([b]) for b in word.encode()] for word in words]
    tokens = []
    for _ in range(n):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        (pair, count), (_, next_count) = pairs.most_common(2)
        assert count > next_count
        tokens.append(pair[0] + pair[1])
        for word in words:
            for i in range(len(word) - 1):
                if tuple(word[i : i + 2]) == pair:
                    word[i : i + 2] = [pair[0] + pair[1], b""]
        words = [[token for token in word if token] for word in words]
    return tokens


def test_bpe_equals_brute_force_and_tiktokens_teaching_code_where_no_two_pairs_tie():
    """The teaching code breaks ties by the text's order, ours by ids; here are none to break."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcde", [9, 7, 5, 3, 2], k=rng.randint(2, 6))) for _ in range(60)]
    text = " ".join(rng.choices(words, [1 / (rank + 1) for rank in range(60)], k=2500))
    ours = tokenizer.train_bpe([text], 256 + 25 + len(tokenizer.SPECIAL_TOKENS)).ranks
    ours = list(ours)[256:]
    assert ours == merges_without_ties(text, 25)
    pattern = tokenizer.BPE_PATTERN
    theirs = tiktoken._educational.bpe_train(text, 256 + 25, pattern, visualise=None)
    assert ours == list(theirs)[256:]


WORDS = st.sampled_from(prose().split()[:300])


@settings(deadline=None)
@given(text=st.lists(WORDS | st.text(ASSIGNED)).map(" ".join))
def test_encoding_equals_tiktokens_teaching_code(trained, text):
    slow = tiktoken._educational.SimpleBytePairEncoding(
        pat_str=tokenizer.BPE_PATTERN, mergeable_ranks=trained.ranks
    )
    assert trained.encode(text) == slow.encode(text, visualise=None)


TRICKY = st.sampled_from([*tokenizer.SPECIAL_TOKENS, "'s", " ", "\r\n", "é", "9"])


@settings(deadline=None)
@given(text=st.text() | st.lists(TRICKY).map("".join))
def test_any_unicode_text_comes_back_from_the_tokenizer(trained, text):
    """Also text that spells special tokens: it becomes plain tokens, and never theirs."""
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(id < len(trained.ranks) for id in ids)
    assert tokenizer.Tokenizer.loads(trained.dumps()).encode(text) == ids


@settings(deadline=None)
@given(text=st.text(alphabet="aé中😀\n ", min_size=1))
def test_any_known_text_comes_back_from_the_character_tokenizer(text):
    characters = tokenizer.train_char(["aé中😀\n "])
    assert characters.is_char
    assert characters.decode(characters.encode(text)) == text
    assert len(characters.encode(text)) == len(text)
