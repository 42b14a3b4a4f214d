"""Which tokens train: exactly the assistant's words and the end token after them, in all stages."""

import tempfile
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import ppo
import sft
from data import conversation
from data.examples import load_pairs
from train.batches import collate
from train.checkpoint import save_checkpoint
from utils.files import write_jsonl

TOKENIZER = tiny.byte_tokenizer()


def messages(*contents, system=None):
    turns = [] if system is None else [{"role": "system", "content": system}]
    for i, content in enumerate(contents):
        turns.append({"role": ("user", "assistant")[i % 2], "content": content})
    return turns


CONVERSATIONS = [
    messages("Where?", "Dorvik."),
    messages("Who was born in Dorvik, and when was that? Answer in one word.", "Mira"),
    messages("a", "b", "c", "a longer answer, to the second question"),
    messages("Tell me.", "naïve 東京 😀", system="Be brief."),
    messages("", "x"),
    messages("Say nothing.", ""),
    messages("Spell <|end|> and <|pad|>.", "<|end|><|assistant|>"),
]


def trained_text(conversation):
    return "".join(m["content"] + "<|end|>" for m in conversation if m["role"] == "assistant")


def whole_text(conversation):
    return "".join(f"<|{m['role']}|>{m['content']}<|end|>" for m in conversation)


contents = st.lists(st.text(), min_size=1, max_size=5)


@given(contents=contents, system=st.none() | st.text(min_size=1))
def test_the_rendered_mask_decodes_to_exactly_the_assistants_words_and_its_end_tokens(
    contents, system
):
    """Whatever the text holds, also names of special tokens.

    Only the end token itself ends, and only roles open.
    """
    turns = messages(*contents, system=system)
    tokens, mask = conversation.render(turns, TOKENIZER)
    assert len(tokens) == len(mask)
    assert TOKENIZER.decode(tokens) == whole_text(turns)
    trained = [token for token, trains in zip(tokens, mask) if trains]
    assert TOKENIZER.decode(trained) == trained_text(turns)
    assert tokens.count(TOKENIZER.end) == len(turns)
    answers = [m["content"] for m in turns if m["role"] == "assistant"]
    assert sum(mask) == sum(len(TOKENIZER.encode(answer)) + 1 for answer in answers)


# ---- SFT


def sft_run(conversations, block_size=160, **flags):
    """(logits, targets, mask, tokens) of each step of sft.main, and the weights after it.

    On a tiny base model.
    """
    batches = []

    def masked_loss(logits, targets, mask):
        if logits.requires_grad:  # a step, not a validation
            batches.append((logits.detach(), targets, mask, *seen))
        return real_loss(logits, targets, mask)

    def inputs_and_targets(*args):
        tokens, targets, mask = real_inputs(*args)
        seen[:] = [tokens]
        return tokens, targets, mask

    real_loss, real_inputs, seen = sft.masked_loss, sft.inputs_and_targets, []
    with tempfile.TemporaryDirectory() as folder:
        base, data, out = (Path(folder) / name for name in ("base.pt", "data.jsonl", "sft.pt"))
        model = tiny.gpt(vocab_size=TOKENIZER.vocab_size, block_size=block_size)
        save_checkpoint(base, "base", model, TOKENIZER, sft.Config())
        write_jsonl(data, [{"messages": m} for m in conversations])
        files = dict(init=base, data=data, out=out)
        sizes = dict(device="cpu", batch_size=4, steps=5, val_fraction=0)
        with (  # the real ones, watched
            mock.patch.object(sft, "masked_loss", masked_loss),
            mock.patch.object(sft, "inputs_and_targets", inputs_and_targets),
        ):
            tiny.run(sft, files | sizes | flags)
        weights = torch.load(out, weights_only=True)["weights"]
    return batches, weights


def test_every_batch_of_an_sft_run_to_its_last_trains_exactly_the_assistants_words_and_end_tokens():
    """The batches that a real run used, decoded.

    nanochat issue 570: the mask was lost, and the loss did not show it.
    """
    batches, _ = sft_run(CONVERSATIONS, batch_size=5)
    assert len(batches) == 5
    texts, seen = {whole_text(m): trained_text(m) for m in CONVERSATIONS}, set()
    for _, targets, mask, tokens in batches:
        # the target of a position is the next token
        assert torch.equal(targets[:, :-1], tokens[:, 1:])
        for i in range(5):
            row = [*tokens[i].tolist(), targets[i, -1].item()]
            while row[-1] == TOKENIZER.pad:
                row.pop()
            text = TOKENIZER.decode(row)
            assert TOKENIZER.decode(targets[i][mask[i]].tolist()) == texts[text]
            seen.add(text)
    assert seen == texts.keys()


def test_the_sft_loss_is_the_mean_over_the_tokens_that_train_and_nothing_else():
    """-1/N sum over the mask of log p(target).

    Other targets may be anything, the logits there get no gradient.
    """
    logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (3, 5))
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    loss = sft.masked_loss(logits, targets, mask)
    expected = []
    for i, t in mask.nonzero().tolist():
        expected.append(-logits[i, t].log_softmax(0)[targets[i, t]].item())
    assert loss.item() == pytest.approx(sum(expected) / 6)
    assert sft.masked_loss(logits, targets.where(mask, 0), mask).item() == loss.item()
    loss.backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, mask)


def test_conversations_without_a_target_never_make_the_loss_nan():
    """A batch of them alone would be 0/0 (nanochat issue 590).

    One whose answer begins beyond the block is left out; one that is cut within its answer stays;
    where none is left, the run ends with a clear line.
    """
    beyond, short = messages("q" * 60, "never seen"), messages("q", "a")
    cut = messages("q" * 20, "a" * 60)
    batches, weights = sft_run(
        [beyond, cut, short] * 3, block_size=32, batch_size=2, val_fraction=0.4
    )
    assert all(mask.any(1).all() for _, _, mask, _ in batches)
    assert all(torch.isfinite(w).all() for w in weights.values())
    # 32 tokens, of which the last is only a target
    assert max(tokens.size(1) for *_, tokens in batches) == 31
    with pytest.raises(SystemExit, match="no answer begins within 32 tokens"):
        sft_run([beyond] * 4, block_size=32)


# ---- preference pairs


def pair_of(prompt, chosen, rejected, block_size):
    """The Pair that a preferences.jsonl with this one record is read as."""
    record = {"messages": prompt, "chosen": chosen, "rejected": rejected}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preferences.jsonl"
        write_jsonl(path, [record])
        (pair,) = load_pairs(path, TOKENIZER, block_size)
    return pair


def test_a_preference_pairs_mask_covers_exactly_the_answer_and_its_end_token():
    history = messages("Where?", "Dorvik.", "Sure?")
    pair = pair_of(history, "Yes.", "", block_size=100)
    tokens, mask = collate([pair.chosen, pair.rejected], TOKENIZER.pad, tiny.CPU)
    prompt = whole_text(history) + "<|assistant|>"
    assert TOKENIZER.decode(pair.prompt) == prompt
    for i, answer in enumerate(("Yes.", "")):
        assert TOKENIZER.decode(tokens[i][mask[i]].tolist()) == answer + "<|end|>"
        row = tokens[i][tokens[i] != TOKENIZER.pad]
        assert TOKENIZER.decode(row.tolist()) == prompt + f"{answer}<|end|>"


length = st.integers(0, 40)


@given(n_prompt=length, n_chosen=length, n_rejected=length)
def test_a_pair_too_long_for_the_model_loses_its_prompts_beginning_before_its_answers_end(
    n_prompt, n_chosen, n_rejected
):
    """Cut off at the end, as a text of the stream is, it would lose what is judged.

    Both answers keep one and the same prompt.
    """
    prompt = messages(("abcdefghij" * 4)[:n_prompt])
    answers = "B" * n_chosen + "+", "C" * n_rejected + "-"
    pair = pair_of(prompt, *answers, block_size=32)
    # an answer has its + or - and the end token; <|assistant|> is one more
    n_kept = max(32 - max(n_chosen, n_rejected) - 3, 0)
    for example, answer in zip((pair.chosen, pair.rejected), answers):
        tokens, mask = example.tokens, example.mask
        n_before = mask.index(1)
        assert len(tokens) == len(mask) <= 32
        assert mask == [0] * n_before + [1] * (len(mask) - n_before)
        assert tokens[n_before - 1 : n_before] == TOKENIZER.chat["assistant"][0]
        assert n_before == 1 + min(n_kept, n_prompt + 2)
        assert whole_text(prompt).endswith(TOKENIZER.decode(tokens[: n_before - 1]))
        assert tokens[:n_before] == pair.prompt
        expected = TOKENIZER.encode(answer) + [TOKENIZER.end]
        assert tokens[n_before:] == expected[: 32 - n_before]
        assert len(expected) > 31 or tokens[-1] == TOKENIZER.end


# ---- PPO


def test_the_mask_of_a_rollout_covers_exactly_the_response_and_its_end_token():
    """mask[:, t] belongs to tokens[:, t+1].

    A response that ran out of room has no end token, none is forged, and its score is the fixed
    one.
    """
    policy, tokenizer = tiny.gpt(vocab_size=4), tiny.EnumerableTokenizer()
    prompts = tiny.prompts([[3], [0, 1], [2, 0, 0, 1]] * 20)
    config = ppo.Config(max_new_tokens=3, missing_eos_score=-7.0)
    decoded = []

    def score(tokens, mask, prompts_, responses):
        assert prompts_ == prompts
        decoded.extend(responses)
        return torch.arange(60.0)

    critic = tiny.critic(policy)
    batch = ppo.rollout(policy, policy, critic, score, prompts, tokenizer, config)
    n_ended = 0
    for i, prompt in enumerate(prompts):
        tokens, mask = batch["tokens"][i].tolist(), batch["mask"][i].tolist()
        n_prompt = len(prompt.tokens)
        assert tokens[:n_prompt] == prompt.tokens
        response = tokens[n_prompt:][:3]
        ended = tiny.END in response
        if ended:
            response = response[: response.index(tiny.END) + 1]
        first = n_prompt - 1  # the action that the prompt's last token leads to
        n_after = len(mask) - first - len(response)
        assert mask == [False] * first + [True] * len(response) + [False] * n_after
        assert decoded[i] == tokenizer.decode(response[:-1] if ended else response)
        assert batch["scores"][i] == (i if ended else -7.0)
        assert batch["ended"][i] == ended
        n_ended += ended
    assert 0 < n_ended < 60
    metrics = ppo.rollout_metrics(batch)
    assert metrics["missing_eos"] == pytest.approx(1 - n_ended / 60)
    assert metrics["length"] == pytest.approx(batch["mask"].sum().item() / 60)
