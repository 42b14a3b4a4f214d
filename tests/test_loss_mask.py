"""Which tokens train: exactly the assistant's words and the end token after them, in every stage that has a mask."""

import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import common
import ppo
import reward
import sft
from data import conversation

TOKENIZER = tiny.byte_tokenizer()


def messages(*contents, system=None):
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


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


@given(contents=st.lists(st.text(), min_size=1, max_size=5), system=st.none() | st.text(min_size=1))
def test_the_rendered_mask_decodes_to_exactly_the_assistants_words_and_its_end_tokens(contents, system):
    """Whatever the text holds, also names of special tokens: only the end token itself ends, and only roles open."""
    conversation_ = messages(*contents, system=system)
    tokens, mask = conversation.render(conversation_, TOKENIZER)
    assert len(tokens) == len(mask)
    assert TOKENIZER.decode(tokens) == whole_text(conversation_)
    assert TOKENIZER.decode([token for token, trains in zip(tokens, mask) if trains]) == trained_text(conversation_)
    assert tokens.count(TOKENIZER.end) == len(conversation_)
    assert sum(mask) == sum(len(TOKENIZER.encode(m["content"])) + 1 for m in conversation_ if m["role"] == "assistant")


def sft_run(conversations, block_size=160, **flags):
    """(logits, targets, mask, tokens) of every optimizer step of sft.main on a tiny base model, and the weights after it."""
    batches = []

    def masked_loss(logits, targets, mask):
        if logits.requires_grad:  # a step, not a validation
            batches.append((logits.detach(), targets, mask, *seen))
        return real_loss(logits, targets, mask)

    def collate(*args):
        tokens, targets, mask = real_collate(*args)
        seen[:] = [tokens]
        return tokens, targets, mask

    real_loss, real_collate, seen = sft.masked_loss, sft.collate, []
    with tempfile.TemporaryDirectory() as folder:
        base, data, out = (Path(folder) / name for name in ("base.pt", "data.jsonl", "sft.pt"))
        model = tiny.gpt(vocab_size=TOKENIZER.vocab_size, block_size=block_size)
        common.save_checkpoint(base, "base", model, TOKENIZER, sft.Config())
        common.write_jsonl(data, [{"messages": m} for m in conversations])
        flags = dict(init=base, data=data, out=out, device="cpu", batch_size=4, steps=5, val_share=0) | flags
        argv = ["sft.py"] + [f"--{name}={value}" for name, value in flags.items()]
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.object(sft, "masked_loss", masked_loss),  # the real ones, watched
            mock.patch.object(sft, "collate", collate),
        ):
            sft.main()
        weights = torch.load(out, weights_only=True)["weights"]
    return batches, weights


def test_every_batch_of_an_sft_run_to_its_last_trains_exactly_the_assistants_words_and_end_tokens():
    """The batches that a real run used, decoded (nanochat issue 570: the mask was lost, and the loss did not show it)."""
    batches, _ = sft_run(CONVERSATIONS, batch_size=5)
    assert len(batches) == 5
    texts, seen = {whole_text(m): trained_text(m) for m in CONVERSATIONS}, set()
    for _, targets, mask, tokens in batches:
        assert torch.equal(targets[:, :-1], tokens[:, 1:])  # the target of a position is the next token
        for i in range(5):
            row = [*tokens[i].tolist(), targets[i, -1].item()]
            while row[-1] == TOKENIZER.pad:
                row.pop()
            text = TOKENIZER.decode(row)
            assert TOKENIZER.decode(targets[i][mask[i]].tolist()) == texts[text]
            seen.add(text)
    assert seen == texts.keys()


def test_the_sft_loss_is_the_mean_over_the_tokens_that_train_and_nothing_else():
    """-1/N sum over the mask of log p(target): other targets may be anything, the logits there get no gradient."""
    logits, targets = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True), torch.randint(11, (3, 5))
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]]).bool()
    loss = sft.masked_loss(logits, targets, mask)
    expected = [-logits[i, t].log_softmax(0)[targets[i, t]].item() for i, t in mask.nonzero().tolist()]
    assert loss.item() == pytest.approx(sum(expected) / 6)
    assert sft.masked_loss(logits, targets.where(mask, 0), mask).item() == loss.item()
    loss.backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, mask)


def test_conversations_without_a_target_never_make_the_loss_nan():
    """One whose answer begins beyond the block is left out; one that is cut within its answer stays; where none is left,
    the run ends with a clear line (nanochat issue 590: a batch of the first kind is 0/0)."""
    beyond, cut, short = messages("q" * 60, "never seen"), messages("q" * 20, "a" * 60), messages("q", "a")
    batches, weights = sft_run([beyond, cut, short] * 3, block_size=32, batch_size=2, val_share=0.4)
    assert all(mask.any(1).all() for _, _, mask, _ in batches)
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert max(tokens.size(1) for *_, tokens in batches) == 31  # 32 tokens, of which the last is only a target
    with pytest.raises(SystemExit, match="no answer begins within 32 tokens"):
        sft_run([beyond] * 4, block_size=32)


def test_a_preference_pairs_mask_covers_exactly_the_answer_and_its_end_token():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preferences.jsonl"
        history = messages("Where?", "Dorvik.", "Sure?")
        common.write_jsonl(path, [{"messages": history, "chosen": "Yes.", "rejected": ""}])
        ((chosen, rejected),) = reward.load_pairs(path, TOKENIZER, 100)
    tokens, mask = reward.collate([chosen, rejected], TOKENIZER.pad, tiny.CPU)
    for i, answer in enumerate(("Yes.", "")):
        assert TOKENIZER.decode(tokens[i][mask[i]].tolist()) == answer + "<|end|>"
        row = tokens[i][tokens[i] != TOKENIZER.pad]
        assert TOKENIZER.decode(row.tolist()) == whole_text(history) + f"<|assistant|>{answer}<|end|>"


@given(n_prompt=st.integers(0, 40), n_chosen=st.integers(0, 40), n_rejected=st.integers(0, 40))
def test_a_pair_too_long_for_the_model_loses_its_prompts_beginning_before_its_answers_end(n_prompt, n_chosen, n_rejected):
    """Cut off at the end, as a text of the stream is, it would lose what is judged. Both answers keep one and the same prompt."""
    prompt, chosen, rejected = "abcdefghij" * 4, "B" * n_chosen, "C" * n_rejected
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preferences.jsonl"
        common.write_jsonl(path, [{"messages": messages(prompt[:n_prompt]), "chosen": chosen + "+", "rejected": rejected + "-"}])
        pairs = reward.load_pairs(path, TOKENIZER, 32)
    whole = whole_text(messages(prompt[:n_prompt]))
    n_kept = max(32 - max(n_chosen, n_rejected) - 3, 0)  # an answer has its + or - and the end token; <|assistant|> is one more
    for tokens, mask, answer in zip(*zip(*pairs[0]), (chosen + "+<|end|>", rejected + "-<|end|>")):
        n_before = mask.index(1)
        assert len(tokens) == len(mask) <= 32 and mask == [0] * n_before + [1] * (len(mask) - n_before)
        assert tokens[n_before - 1] == TOKENIZER.assistant and n_before == 1 + min(n_kept, n_prompt + 2)
        assert whole.endswith(TOKENIZER.decode(tokens[: n_before - 1]))
        expected = TOKENIZER.encode(answer[: -len("<|end|>")]) + [TOKENIZER.end]
        assert tokens[n_before:] == expected[: 32 - n_before]
        assert len(expected) > 31 or tokens[-1] == TOKENIZER.end


def test_the_mask_of_a_rollout_covers_exactly_the_response_and_its_end_token():
    """mask[:, t] belongs to tokens[:, t+1]. A response that ran out of room has no end token, none is forged, and its score
    is the fixed one."""
    policy, tokenizer = tiny.gpt(vocab_size=4), tiny.EnumerableTokenizer()
    prompts, texts = [[3], [0, 1], [2, 0, 0, 1]] * 20, [f"prompt {i}" for i in range(60)]
    config = ppo.Config(max_new_tokens=3, no_end_score=-7.0)
    decoded = []

    def score(tokens, mask, texts_, responses):
        assert texts_ == texts
        decoded.extend(responses)
        return torch.arange(60.0)

    batch, figures, _ = ppo.rollout(policy, policy, tiny.critic(policy), score, prompts, texts, tokenizer, config)
    n_ended = 0
    for i, prompt in enumerate(prompts):
        tokens, mask = batch["tokens"][i].tolist(), batch["mask"][i].tolist()
        first = len(prompt) - 1  # the action that the prompt's last token leads to
        assert tokens[: len(prompt)] == prompt
        response = tokens[len(prompt) :][:3]
        ended = tiny.END in response
        if ended:
            response = response[: response.index(tiny.END) + 1]
        assert mask == [False] * first + [True] * len(response) + [False] * (len(mask) - first - len(response))
        assert decoded[i] == tokenizer.decode(response[:-1] if ended else response)
        assert batch["scores"][i] == (i if ended else -7.0)
        n_ended += ended
    assert 0 < n_ended < 60
    assert figures["no_end"] == pytest.approx(1 - n_ended / 60)
    assert figures["length"] == pytest.approx(batch["mask"].sum().item() / 60)
