"""The GPT: it cannot see the future, cache and padding change nothing, samples are as asked for."""

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import ppo
from model import GPTConfig, KVCache, sample

SIZES = [
    dict(n_kv_head=2),
    dict(n_kv_head=1),
    dict(n_kv_head=1, qk_norm=True, head_dim=6),
    dict(tied=False),
]
PROMPTS = [[5], [1, 2, 3, 4, 5, 6, 7], [9, 9, 0], [0, 10, 0, 4]]


@pytest.mark.parametrize("sizes", SIZES)
def test_logits_do_not_depend_on_later_tokens(sizes):
    """logits[:, t] choose token t+1: they stay when every token after t is replaced.

    And token t matters, to its own and to all later ones.
    """
    model = tiny.gpt(**sizes)
    tokens, others = torch.randint(11, (2, 3, 8))
    with torch.no_grad():
        logits = model(tokens)
        for t in range(8):
            mixed = torch.cat((tokens[:, : t + 1], others[:, t + 1 :]), dim=1)
            before, after = logits[:, : t + 1], model(mixed)[:, : t + 1]
            torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
            changed = tokens.clone()
            changed[:, t] = (tokens[:, t] + 1) % 11
            change = (model(changed)[:, t:] - logits[:, t:]).abs()
            assert (change.amax((0, 2)) > 1e-2).all()


def test_a_value_does_not_depend_on_the_action_it_is_the_baseline_of():
    """values[:, t] = V(tokens[:, :t+1]): token t+1, the action, and all later may be replaced."""
    critic = tiny.critic(tiny.gpt())
    tokens, others = torch.randint(11, (2, 3, 9))
    mask = torch.arange(8) >= torch.tensor([0, 2, 5])[:, None]
    with torch.no_grad():
        values = ppo.action_values(critic, tokens, mask)  # (3, 8)
        for t in range(8):
            mixed = torch.cat((tokens[:, : t + 1], others[:, t + 1 :]), dim=1)
            before = values[:, : t + 1]
            after = ppo.action_values(critic, mixed, mask)[:, : t + 1]
            torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert values.std() > 0.1


@pytest.mark.parametrize("sizes", SIZES)
def test_left_padding_and_the_cache_change_no_logit(sizes):
    """Each row's logits are those of the row alone in one forward pass.

    With prompts of unequal length padded on the left, then token by token through the cache.
    (Rotary positions are relative, so a row counted from its pads on would do; what must not
    happen is that its prompt and its continuation are counted differently, or that pads are
    looked at.)
    """
    model = tiny.gpt(**sizes)
    tokens, n_pad = tiny.pads_on_the_left(PROMPTS)
    P, steps = tokens.size(1), 5
    continuation = torch.randint(11, (len(PROMPTS), steps))
    cache = KVCache(model.config, len(PROMPTS), P + steps, torch.float32, tiny.CPU)
    with torch.no_grad():
        alone = []  # (n + 5, V) each
        for prompt, row in zip(PROMPTS, continuation.tolist()):
            alone.append(model(torch.tensor([prompt + row]))[0])
        outputs = [model.hidden(tokens, n_pad, cache, torch.arange(P))]
        for s in range(steps):
            ids, position = continuation[:, s : s + 1], torch.tensor([P + s])
            outputs.append(model.hidden(ids, n_pad, cache, position))
        cached = model.logits(torch.cat(outputs, dim=1))  # (B, P + 5, V)
        padded = model(torch.cat((tokens, continuation), dim=1), n_pad)
    assert torch.isfinite(cached).all() and torch.isfinite(padded).all()  # the pads' own logits too
    for i, expected in enumerate(alone):
        torch.testing.assert_close(cached[i, n_pad[i] :], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(padded[i, n_pad[i] :], expected, atol=1e-5, rtol=0)


# ---- generation


@pytest.mark.parametrize("sizes", SIZES)
def test_greedy_generation_equals_recomputing_everything_for_each_token(sizes):
    """One prompt at a time, without cache or padding, up to the first end token, which is kept."""
    model = tiny.gpt(**sizes)

    def recomputed(prompt, end):
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 12:
            with torch.no_grad():
                tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
            if tokens[-1] == end:
                break
        return tokens[len(prompt) :]

    free = model.generate(PROMPTS, 12, temperature=0)
    assert free == [recomputed(prompt, None) for prompt in PROMPTS]
    end = free[1][3]
    stopped = model.generate(PROMPTS, 12, temperature=0, end_id=end)
    assert stopped == [recomputed(prompt, end) for prompt in PROMPTS]
    assert stopped[1][-1] == end and end not in stopped[1][:-1]


def test_generation_streams_the_tokens_that_it_returns():
    model, streamed = tiny.gpt(), []
    uniforms = torch.rand(len(PROMPTS), 6)
    rows = model.generate(PROMPTS, 6, on_token=streamed.append, uniforms=uniforms)
    assert rows == [list(column) for column in zip(*streamed)]


@pytest.mark.parametrize("sizes", SIZES)
def test_with_given_random_numbers_a_row_does_not_depend_on_the_call_it_is_generated_in(sizes):
    """So 1 and 2 processes sample the same responses, each process with its rows of the numbers.

    The calls differ in their longest prompt, and end at different steps.
    """
    model = tiny.gpt(**sizes)
    uniforms = torch.rand(len(PROMPTS), 12)

    def generated(first, last, uniforms=uniforms):
        return model.generate(
            PROMPTS[first:last], 12, temperature=0.7, end_id=3, uniforms=uniforms[first:last]
        )

    together = generated(0, 4)
    assert generated(0, 2) + generated(2, 4) == together
    assert sum((generated(i, i + 1) for i in range(4)), []) == together
    lengths = [len(row) for row in together]
    assert len(set(lengths)) > 1 and min(lengths) < 12  # some end, at different steps
    assert generated(0, 4) == together  # nothing else is drawn
    assert generated(0, 4, uniforms.flip(1)) != together  # and the numbers do decide


def test_generation_fills_the_block_and_refuses_more():
    model = tiny.gpt(block_size=10)
    assert list(map(len, model.generate(PROMPTS, 3))) == [3] * 4  # 7 + 3 = 10
    too_many = "7 prompt [+] 4 new tokens do not fit in block_size 10"
    with pytest.raises(ValueError, match=too_many):
        model.generate(PROMPTS, 4)
    with pytest.raises(ValueError, match="11 tokens do not fit in block_size 10"):
        model(torch.zeros(1, 11, dtype=torch.long))
    with pytest.raises(ValueError, match="empty prompt"):
        model.generate([[1], []], 2)


WRONG = [dict(n_head=3), dict(n_kv_head=3), dict(head_dim=5), dict(n_layer=0), dict(vocab_size=0)]


@pytest.mark.parametrize("wrong", WRONG)
def test_sizes_that_do_not_fit_together_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig(**(dict(n_embd=16) | wrong))


@pytest.mark.parametrize("tied", [True, False])
def test_padded_vocabulary_ids_have_no_logit_and_are_never_sampled(tied):
    """The matrix has 64 rows for 11 ids.

    However large the other 53 are, the model cannot say them, and they get no gradient.
    """
    model = tiny.gpt(tied=tied)
    assert model.lm_head.weight.size(0) == 64
    model.lm_head.weight.data[11:] = 100.0
    logits = model(torch.randint(11, (2, 5)))
    assert logits.shape == (2, 5, 11)
    logits.logsumexp(-1).sum().backward()
    assert not model.lm_head.weight.grad[11:].any()
    rows = model.generate(PROMPTS * 10, 20, temperature=5.0)
    assert all(id < 11 for row in rows for id in row)


# ---- sampling


def brute_force(logits, temperature, top_k, top_p):
    """The distribution in its definition's own steps: {id: probability}, from a list of logits."""
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])
    kept = ranked[: top_k or None]

    def softmax(ids):
        scaled = torch.tensor([logits[i] / temperature for i in ids], dtype=torch.float64)
        return dict(zip(ids, scaled.softmax(0).tolist()))

    # the smallest set of the likeliest ids whose mass reaches top_p (arXiv 1904.09751)
    nucleus, mass = [], 0.0
    for i, p in softmax(kept).items():
        if mass >= top_p:
            break
        nucleus.append(i)
        mass += p
    return softmax(nucleus)


LOGITS = [1.3, -0.4, 0.2, 2.1, 0.9, -3.0]
TRUNCATIONS = [(0, 1.0), (3, 1.0), (0, 0.7), (4, 0.8), (1, 1.0), (0, 0.01), (100, 0.999)]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), TRUNCATIONS)
def test_samples_follow_the_distribution_that_temperature_top_k_and_top_p_define(
    temperature, top_k, top_p
):
    """20,000 draws against brute force.

    Never an id outside, and the fractions within 5 standard errors.
    """
    logits, n = torch.tensor(LOGITS), 20_000
    expected = brute_force(logits.tolist(), temperature, top_k, top_p)
    drawn = sample(logits.expand(n, -1), temperature, top_k, top_p)
    fractions = torch.bincount(drawn, minlength=6) / n
    for id, fraction in enumerate(fractions.tolist()):
        p = expected.get(id, 0.0)
        assert fraction == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5 + 1e-9), id


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), TRUNCATIONS)
def test_a_given_random_number_is_sent_through_the_inverse_of_the_cumulative_distribution(
    temperature, top_k, top_p
):
    """u chooses the first id, in the order of ids, whose cumulative probability exceeds u."""
    probabilities = brute_force(LOGITS, temperature, top_k, top_p)
    us = [i / 1000 for i in range(1000)]
    expected = []
    for u in us:
        total = 0.0
        for id in sorted(probabilities):
            total += probabilities[id]
            if total > u:
                break
        expected.append(id)
    logits = torch.tensor(LOGITS).expand(1000, -1)
    drawn = sample(logits, temperature, top_k, top_p, u=torch.tensor(us))
    assert drawn.tolist() == expected
    assert set(expected) >= {id for id, p in probabilities.items() if p > 1e-3}
    largest = torch.tensor([1 - 2**-24])  # below 1
    assert sample(logits[:1], temperature, top_k, top_p, u=largest).item() in probabilities


logits_ = st.lists(st.integers(-30, 30).map(lambda n: n / 4), min_size=1, max_size=8, unique=True)


@given(logits=logits_, top_k=st.integers(0, 9), top_p=st.floats(0.01, 1))
def test_no_sample_ever_lies_outside_the_kept_set(logits, top_k, top_p):
    """Any logits, in any order; temperature 0 takes the largest."""
    # float32 may count one more at the border
    kept = brute_force(logits, 1.0, top_k, top_p + 1e-5 if top_p < 1 else 1.0)
    drawn = sample(torch.tensor(logits).expand(200, -1), 1.0, top_k, top_p)
    assert set(drawn.tolist()) <= set(kept)
    assert sample(torch.tensor([logits]), 0).item() == logits.index(max(logits))


def test_each_row_is_sampled_from_its_own_logits():
    logits = torch.full((3, 5), -50.0)
    logits[0, 4] = logits[1, 0] = logits[2, 2] = 50.0
    logits += torch.tensor([[0.0], [500.0], [-500.0]])  # a shift of a row changes nothing
    # at top_p 0 the likeliest token alone is left; a temperature so low that the division
    # overflows is the limit 0
    options = [dict(), dict(top_k=2), dict(top_p=0.5), dict(temperature=0), dict(top_p=0)]
    options.append(dict(temperature=1e-40))
    for option in options:
        assert sample(logits, **option).tolist() == [4, 0, 2]
