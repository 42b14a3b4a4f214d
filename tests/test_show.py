"""--show of every stage: what it prints, checked against formulas, files and models by hand."""

import os
import pty
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from tiny import run

import ppo
import pretrain
import reward
import sft
from data import conversation, tokenizer
from forks import grpo
from model import GPT, GPTConfig
from train import show
from train.checkpoint import load_checkpoint, read_torch, save_checkpoint
from utils.files import read_jsonl, write_jsonl, write_text

ROOT = Path(__file__).parent.parent
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo, "grpo": grpo}
# Far from 1, so that each of them is seen in the numbers.
BETA, GAMMA, LAM = 0.3, 0.9, 0.8
QUESTIONS = [f"{word} {i}?" for i in range(10) for word in ("who", "what", "where", "when")]
COLUMNS = ["log pi", "log ref", "kl", "reward", "value", "advantage", "return", "whitened", "ratio"]


def message(role, content):
    return {"role": role, "content": content}


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{stage: flags} on bytes.

    With a model that SFT taught to end its answers, so that episodes differ in length.
    """
    folder = tmp_path_factory.mktemp("show")
    tok = tiny.byte_tokenizer()
    conversations, pairs, prompts = [], [], []
    for i, question in enumerate(QUESTIONS):
        prompt = [message("user", question)]
        turns = prompt + [message("assistant", "no" + "o" * (i % 4))]
        if i % 5 == 0:
            turns += [message("user", "sure?"), message("assistant", "yes")]
        conversations.append(dict(messages=turns))
        pairs.append(dict(messages=prompt, chosen="yes", rejected="no no"))
        prompts.append(dict(messages=prompt))
    write_jsonl(folder / "conversations.jsonl", conversations)
    write_jsonl(folder / "preferences.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", prompts)
    write_text(folder / "tokenizer.tiktoken", tok.dumps())
    stream = []
    for i in range(40):
        stream += tok.encode(f"A fact about {i}.\nAnd one more.") + [tok.end]
    for name in ("train", "val"):
        np.array(stream, tok.id_type).tofile(folder / f"{name}.bin")
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    base = GPT(GPTConfig(vocab_size=tok.vocab_size, block_size=64, **sizes))
    save_checkpoint(folder / "base.pt", "base", base, tok, sft.Config())
    common = dict(device="cpu", seed=2)
    demonstrations = dict(init=folder / "base.pt", data=folder / "conversations.jsonl")
    made_by = dict(out=folder / "sft.pt", epochs=20, batch_size=8, lr=1e-2)
    run(sft, common | demonstrations | made_by)
    model, _ = load_checkpoint(folder / "sft.pt", ["sft"], GPT, tiny.CPU)
    save_checkpoint(folder / "reward.pt", "reward", tiny.critic(model), tok, reward.Config())
    common |= dict(out=folder / "none" / "new.pt")
    preferences = dict(init=folder / "sft.pt", data=folder / "preferences.jsonl")
    questions = dict(init=folder / "sft.pt", data=folder / "prompts.jsonl")
    questions |= dict(reward=folder / "reward.pt", temperature=1.5, lr=1e-3, max_new_tokens=9)
    sizes_of_ppo = dict(batch_size=16, minibatch_size=8, micro_batch_size=8, val_size=4, steps=2)
    formula = dict(beta=BETA, gamma=GAMMA, lam=LAM)
    groups = questions | sizes_of_ppo | dict(beta=BETA, group_size=4)
    return {
        "pretrain": common | sizes | dict(data=folder, seq_len=48, batch_size=6),
        "sft": common | demonstrations | dict(batch_size=8),
        "reward": common | preferences | dict(batch_size=8),
        "ppo": common | questions | sizes_of_ppo | formula,
        "grpo": common | groups,
    }


def printed(stage, flags, capsys):
    capsys.readouterr()
    run(STAGES[stage], flags[stage] | dict(show=True))
    return capsys.readouterr().out


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


# ---- PPO


def tables(out):
    """The printed tables as numpy float64, in the order of printing.

    [{"rows": (N, 9), "sums": (4,), "score": …, "mean": …, "std": …, "n": …}]
    """
    found, iteration = [], []
    for line in out.splitlines():
        if line.startswith("token  "):
            assert re.split(r"\s{2,}", line)[1:] == COLUMNS
            iteration.append(dict(rows=[]))
        elif line.startswith("sum  "):
            *sums, _, score = line.split()[1:]
            table = iteration[-1]
            table["rows"] = np.array(table["rows"])
            table |= dict(sums=np.array(sums, float), score=float(score))
        elif match := re.match(
            r"whitened = \(advantage ([+-][\d.]+)\) / ([\d.]+): .* (\d+) tokens$", line
        ):
            for table in iteration:
                table |= dict(mean=-float(match[1]), std=float(match[2]), n=int(match[3]))
            found, iteration = found + iteration, []
        elif iteration and isinstance(iteration[-1]["rows"], list):
            iteration[-1]["rows"].append([float(line[-99 + 11 * i :][:11]) for i in range(9)])
    return found


def double_sum(rewards, values):
    """The advantages as the sum that GAE's backward recursion stands for."""
    deltas = rewards + GAMMA * np.append(values[1:], 0) - values
    advantages = []
    for t in range(len(deltas)):
        discounts = (GAMMA * LAM) ** np.arange(len(deltas) - t)
        advantages.append((discounts * deltas[t:]).sum())
    return advantages


def test_ppos_columns_follow_from_each_other_as_the_lines_below_say(flags, capsys):
    out = printed("ppo", flags, capsys)
    assert "kl = log pi - log ref;  reward = -0.3 * kl, and + score at the last token" in out
    recursion = "reward[t] + 0.9 * value[t+1] - value[t] + 0.9 * 0.8 * advantage[t+1]"
    assert recursion in out and "return = advantage + value" in out
    assert "beyond 1 + 0.2 where" in out and "below 1 - 0.2 where" in out
    shown = tables(out)
    assert len(shown) == 4 and max(len(table["rows"]) for table in shown) > 3
    close = dict(rtol=0, atol=5e-5)  # five printed digits, a few of them added
    for i, table in enumerate(shown):
        # (N,) each
        logprobs, ref, kl, rewards, values, advantages, returns, whitened, ratios = table["rows"].T
        np.testing.assert_allclose(kl, logprobs - ref, **close)
        score_at_the_end = np.eye(len(kl))[-1] * table["score"]
        np.testing.assert_allclose(rewards, -BETA * kl + score_at_the_end, **close)
        np.testing.assert_allclose(advantages, double_sum(rewards, values), **close)
        np.testing.assert_allclose(returns, advantages + values, **close)
        expected = (advantages - table["mean"]) / table["std"]
        np.testing.assert_allclose(whitened, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(table["sums"], table["rows"][:, :4].sum(0), **close)
        # in the first iteration the policy is its own reference
        assert (kl == 0).all() if i < 2 else (kl != 0).any()
        assert (ratios > 0).all() and (ratios != 1).any()  # and the update has moved it
    assert shown[0]["score"] < shown[1]["score"] and shown[2]["score"] < shown[3]["score"]


def test_ppo_shows_the_very_batches_that_training_uses(flags, tmp_path, capsys, monkeypatch):
    """--show's two iterations are the first two of the run with the same flags.

    And the table holds that batch's numbers.
    """
    real, batches = ppo.update, []

    def watched(policy, critic, optimizers, batch, factor, config):
        batches.append(batch)
        return real(policy, critic, optimizers, batch, factor, config)

    monkeypatch.setattr(ppo, "update", watched)
    out = printed("ppo", flags, capsys)
    run(ppo, flags["ppo"] | dict(out=tmp_path / "ppo.pt"))
    for shown, trained in zip(batches[:2], batches[2:4], strict=True):
        assert shown.keys() == trained.keys()
        assert all(torch.equal(shown[name], trained[name]) for name in shown)
    for i, table in enumerate(tables(out)):
        batch = batches[i // 2]
        row = batch["scores"].argmax() if i % 2 else batch["scores"].argmin()
        mask = batch["mask"][row]
        names = {
            0: "logprobs",
            1: "ref_logprobs",
            3: "rewards",
            4: "values",
            5: "advantages",
            6: "returns",
            7: "whitened_advantages",
        }
        for column, name in names.items():
            numbers = batch[name][row][mask]
            np.testing.assert_allclose(table["rows"][:, column], numbers, rtol=0, atol=1e-5)
        raw = (batch["returns"] - batch["values"])[batch["mask"]]
        assert table["n"] == len(raw)
        shown, expected = [table["mean"], table["std"]], [raw.mean(), raw.std(correction=0)]
        np.testing.assert_allclose(shown, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def logprobs_by_hand(policy, tokens, mask, temperature):
    """log pi of each action of one response, from a forward pass of its beginning."""
    logprobs = []
    for t in mask.nonzero().flatten().tolist():
        logits = policy(tokens[None, : t + 1])[0, -1] / temperature  # (V,)
        logprobs.append(logits.log_softmax(0)[tokens[t + 1]].item())
    return np.array(logprobs)


@tiny.in_precision(torch.float32)
def test_the_ratio_is_the_probability_after_the_update_over_that_before(flags, capsys, monkeypatch):
    real, after = ppo.update, []

    def watched(policy, critic, optimizers, batch, factor, config):
        metrics = real(policy, critic, optimizers, batch, factor, config)
        for i in (batch["scores"].argmin(), batch["scores"].argmax()):
            args = batch["tokens"][i], batch["mask"][i], config.temperature
            after.append(logprobs_by_hand(policy, *args))
        return metrics

    monkeypatch.setattr(ppo, "update", watched)
    shown = tables(printed("ppo", flags, capsys))
    for table, logprobs in zip(shown, after, strict=True):
        before, ratio = table["rows"][:, 0], table["rows"][:, 8]
        assert np.abs(ratio - 1).max() > 1e-3
        np.testing.assert_allclose(ratio, np.exp(logprobs - before), rtol=1e-4, atol=2e-5)


def test_the_checkpoint_keeps_the_episodes_of_the_most_blamed_and_the_most_credited_token(
    flags, tmp_path, monkeypatch
):
    """Of one more rollout after training.

    The advantages are those of the double sum over the rewards and values beside them.
    """
    real, batches = ppo.compute_advantages, []

    def watched(batch, beta, config):
        batches.append(batch)
        return real(batch, beta, config)

    monkeypatch.setattr(ppo, "compute_advantages", watched)
    run(ppo, flags["ppo"] | dict(out=tmp_path / "ppo.pt", seed=3))
    assert len(batches) == flags["ppo"]["steps"] + 1
    last, tok = batches[-1], tiny.byte_tokenizer()
    rows = []  # the advantages of each episode of the last batch
    for i, mask in enumerate(last["mask"]):
        names = ("logprobs", "ref_logprobs", "values")
        logprobs, ref, values = (last[name][i][mask].double().numpy() for name in names)
        score_at_the_end = np.eye(len(ref))[-1] * last["scores"][i].item()
        rows.append(double_sum(-BETA * (logprobs - ref) + score_at_the_end, values))
    blamed, credited = read_torch(tmp_path / "ppo.pt")["made_by"]["episodes"]
    expected = min(rows, key=min), max(rows, key=max)
    assert expected[0] != expected[1]
    for episode, advantages in zip((blamed, credited), expected):
        shown = episode["columns"]["advantage"]
        np.testing.assert_allclose(shown, advantages, rtol=0, atol=1e-4)
        i = rows.index(advantages)
        response = last["tokens"][i, 1:][last["mask"][i]].tolist()
        assert episode["tokens"] == [show.spell(token, tok) for token in response]
        assert episode["score"] == last["scores"][i].item()
        assert episode["prompt"].endswith("?<|end|><|assistant|>")


# ---- GRPO


def test_grpos_advantages_are_the_scores_less_the_penalty_against_their_groups_mean(flags, capsys):
    out = printed("grpo", flags, capsys)
    groups = out.split("\niteration ")[1:]
    assert len(groups) == 2 and all("whose 4 scores differ most" in group for group in groups)
    for group in groups:
        assert group.splitlines()[1].split() == ["score", "kl", "advantage", "response"]
        rows = [[float(x) for x in line.split()[:3]] for line in group.splitlines()[2:6]]
        scores, kls, advantages = np.array(rows).T
        penalized = scores - BETA * kls
        np.testing.assert_allclose(advantages, penalized - penalized.mean(), rtol=0, atol=5e-5)
        assert np.ptp(scores) > 0.1


# ---- SFT and the reward model


def test_sfts_carets_mark_exactly_the_tokens_that_train(flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "5000")
    out = printed("sft", flags, capsys)
    tok = tiny.byte_tokenizer()
    records = read_jsonl(flags["sft"]["data"])
    rendered = [conversation.render(record["messages"], tok) for record in records]
    blocks = [block.splitlines() for block in out.split("\n\n")[2:]]
    assert len(blocks) == 3
    for words, ids, carets in blocks:
        tokens, mask = [], []
        for match in re.finditer(r"\d+", ids):
            if int(match.group()) != tok.pad:
                tokens.append(int(match.group()))
                below = carets[match.start() : match.end()]
                mask.append(int(below == "^" * len(match.group())))
        assert (tokens, mask) in rendered
        trained = [str(token) for token, marked in zip(tokens, mask) if marked]
        assert carets.count("^") == len("".join(trained))
        assert words.split()[0] == "<|user|>" and "<|assistant|>" in words.split()
    monkeypatch.setenv("COLUMNS", "40")
    lines = printed("sft", flags, capsys).split("\n\n", 2)[2].splitlines()
    assert 30 < max(map(len, lines)) < 40
    of_digits = [line for line in lines if re.fullmatch(r"[\d ]+", line)]
    ids = [line for line in of_digits if max(map(int, line.split())) > 9]
    assert " ".join(ids).split() == [t for _, ids, _ in blocks for t in ids.split()]


def test_the_counts_that_sft_prints_are_the_batchs(flags, capsys, monkeypatch):
    """The targets of the whole batch and those of them that train, pads and rows not shown too."""
    shown, real = [], show.conversations
    monkeypatch.setattr(show, "conversations", lambda *args: shown.append(args) or real(*args))
    out = printed("sft", flags, capsys)
    ((tokens, mask, _),) = shown
    assert tokens.shape == mask.shape and len(tokens) == flags["sft"]["batch_size"]
    n_trained = sum(mask.int().flatten().tolist())
    n_targets = tokens.size(0) * (tokens.size(1) - 1)
    assert not mask[:, 0].any()
    assert f"\n{n_trained} of {n_targets} targets train" in out


def test_the_reward_after_a_token_is_the_score_of_the_answer_cut_there(flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "5000")
    models, real = [], show.pairs

    def watched(model, *args):
        models.append(model)
        real(model, *args)

    monkeypatch.setattr(show, "pairs", watched)
    with tiny.in_precision(torch.float32):
        out = printed("reward", flags, capsys)
    tok = tiny.byte_tokenizer()
    blocks = [block.splitlines() for block in out.rstrip().split("\n\n")[2:]]
    assert len(blocks) == 3
    for prompt, *answers, difference in blocks:
        question = prompt.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
        prompt = conversation.render_prompt([message("user", question)], tok)
        ends = []
        for text, (end, _, ids, scores) in zip(("yes", "no no"), (answers[:4], answers[4:])):
            answer = tok.encode(text) + [tok.end]
            assert list(map(int, ids.split())) == answer
            scores = list(map(float, scores.split()))
            assert len(scores) == len(answer)
            for n, score in enumerate(scores, 1):
                tokens = torch.tensor([prompt + answer[:n]])
                mask = torch.tensor([[False] * len(prompt) + [True] * n])
                assert models[0].score(tokens, mask).item() == pytest.approx(score, abs=1e-4)
            ends.append(score)
            assert float(end.split()[1]) == score
        printed_difference = float(difference.split()[-1])
        assert printed_difference == pytest.approx(ends[0] - ends[1], abs=1.1e-4)


def test_no_batch_depends_on_which_answer_was_preferred_or_how_long_it_is(
    flags, capsys, monkeypatch, tmp_path
):
    """Else a batch of like length holds one verdict only.

    And the last batches set the balance between verdicts.
    """
    monkeypatch.setenv("COLUMNS", "5000")
    shown = {"sft": [], "reward": []}
    for seed in range(3):
        rng = random.Random(seed)
        pairs, demonstrations = [], []
        for question in QUESTIONS:
            prompt, answers = [message("user", question)], ["no", "I cannot say"]
            if rng.random() < 0.5:
                answers.reverse()
            pairs.append(dict(messages=prompt, chosen=answers[0], rejected=answers[1]))
            demonstrations.append(dict(messages=prompt + [message("assistant", answers[0])]))
        write_jsonl(tmp_path / "reward.jsonl", pairs)
        write_jsonl(tmp_path / "sft.jsonl", demonstrations)
        for stage in shown:
            with_data = flags[stage] | {"data": tmp_path / f"{stage}.jsonl"}
            out = printed(stage, {stage: with_data}, capsys)
            shown[stage].append(re.findall(r"<\|user\|>(\w+\?)", out.replace(" ", "")))
    for stage, (first, *others) in shown.items():
        assert len(first) == 3 and others == [first, first], stage


# ---- pretraining


def test_pretrainings_windows_are_the_streams_with_each_border_marked(flags, capsys):
    out = printed("pretrain", flags, capsys)
    mine = flags["pretrain"]
    stream, seq_len = np.fromfile(mine["data"] / "train.bin", np.uint16), mine["seq_len"]
    tok = tokenizer.load(mine["data"] / "tokenizer.tiktoken")
    order = mine["batch_size"], mine["seed"], "train.bin", tok.separator
    starts = pretrain.Windows(stream, seq_len, *order)[0]
    assert f"{mine['batch_size']} windows of {seq_len} tokens" in out
    windows = re.split(r"\nwindow \d+\n", out)[1:]
    assert len(windows) == 4
    for start, window in zip(starts, windows):
        tokens = stream[start : start + seq_len].tolist()
        assert window.count("|") - 2 * window.count("<|end|>") == len(tokens)
        assert window.count("<|end|>|\n") == tokens.count(tok.end) > 0
        text = window.replace("<|end|>|\n", "<|end|>|").removesuffix("\n")
        text = text.replace("<|end|>", "\0").replace("|", "").replace("\0", "<|end|>")
        assert text.replace("\\n", "\n") == tok.decode(tokens)


# ---- all stages


@pytest.mark.parametrize("stage", STAGES)
def test_show_writes_no_file_and_no_escape_code_into_a_pipe(flags, stage, capsys):
    folder = flags[stage]["out"].parent.parent
    before = files(folder)
    assert "\033" not in printed(stage, flags, capsys)
    assert files(folder) == before


def test_as_a_program_show_exits_with_0(flags):
    argv = [f"--{name}={value}" for name, value in flags["sft"].items()]
    command = [sys.executable, ROOT / "sft.py", *argv, "--show"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "targets train" in done.stdout


def on_a_terminal(stage, flags, monkeypatch):
    """What a terminal of 80 columns gets."""
    master, slave = pty.openpty()
    # a process that reads, or the terminal's buffer would fill up
    reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.PIPE)
    os.close(master)
    with os.fdopen(slave, "w") as terminal, monkeypatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        patch.setattr(sys, "stdout", terminal)
        run(STAGES[stage], flags[stage] | dict(show=True))
    return reader.communicate()[0].decode().replace("\r\n", "\n")


@pytest.mark.parametrize("stage", STAGES)
def test_a_terminal_gets_the_same_text_in_colours_and_no_color_takes_them_away(
    flags, stage, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    plain = printed(stage, flags, capsys)
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = on_a_terminal(stage, flags, monkeypatch)
    assert {"\033[36m", "\033[33m", "\033[0m"} == set(re.findall(r"\033\[\d+m", coloured))
    assert re.sub(r"\033\[\d+m", "", coloured).split() == plain.split()
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_a_terminal(stage, flags, monkeypatch) == plain


def coloured_lines(stage, flags, monkeypatch):
    """[[(is cyan, text), …] of a line]; the other colour is yellow."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = []
    for line in on_a_terminal(stage, flags, monkeypatch).split("\n"):
        cells = re.findall(r"\033\[(36|33)m(.*?)\033\[0m", line)
        lines.append([(colour == "36", text) for colour, text in cells])
    return [cells for cells in lines if cells]


@pytest.mark.parametrize("stage, column", [("ppo", 7), ("grpo", 2)])
def test_what_is_made_likelier_is_cyan_and_the_rest_yellow(flags, monkeypatch, stage, column):
    """By the sign of the advantage, whitened in PPO."""
    seen = set()
    for ((is_cyan, text),) in coloured_lines(stage, flags, monkeypatch):
        start = column * 11 - (99 if stage == "ppo" else 0)  # numbers of 11 columns, last or first
        number = float(text[start:][:11])
        assert is_cyan == (number > 0), text
        seen.add(is_cyan)
    assert seen == {True, False}


def test_what_sft_trains_is_cyan_and_the_rest_yellow(flags, monkeypatch):
    lines = coloured_lines("sft", flags, monkeypatch)
    assert len(lines) % 3 == 0 and len(lines) > 6  # tokens, ids and carets
    for words, ids, carets in zip(lines[::3], lines[1::3], lines[2::3]):
        marked = ["^" in text for _, text in carets]
        for cells in (words, ids, carets):
            assert [is_cyan for is_cyan, _ in cells] == marked


def test_the_chosen_answer_is_cyan_and_the_rejected_one_yellow(flags, monkeypatch):
    tok, lines = tiny.byte_tokenizer(), coloured_lines("reward", flags, monkeypatch)
    assert len(lines) == 3 * 2 * 3  # pairs of answers: tokens, ids and scores
    for i, ids in enumerate(lines[1::3]):
        answer = tok.decode([int(text) for _, text in ids])
        assert answer == ("no no<|end|>" if i % 2 else "yes<|end|>")
        for cells in lines[3 * i : 3 * i + 3]:
            assert {is_cyan for is_cyan, _ in cells} == {i % 2 == 0}


def test_a_token_is_spelled_on_one_line_and_a_wide_character_counts_twice():
    tok = tiny.byte_tokenizer()
    tokens = tok.encode("a\n\x1b") + [tok.end]
    assert [show.spell(token, tok) for token in tokens] == ["a", "\\n", "\\x1b", "<|end|>"]
    assert show.spell(tok.encode("中")[0], tok) == "�"
    assert show.width("中文ab") == 6 and show.ljust("中", 4) == "中  "


# ---- the README's breakpoints


def recipes():
    """[(script, what to type, what to look at)] of the table of breakpoints."""
    _, table = (ROOT / "README.md").read_text().split("| command | breakpoint |")
    rows = [line.split("|")[1:4] for line in table.split("\n\n")[0].split("\n")[2:]]
    first, found = rows[0][0], []
    for command, breakpoints, look in rows:
        command = first if "first line" in command else command
        (script,) = re.findall(r"(\w+)\.py", command)
        typed = re.findall("`([bc](?: [^`]+)?)`", breakpoints) + ["c"]
        *steps, expression = re.findall("`([^`]+)`", look)
        found.append((script, typed + steps * (2 if "twice" in look else 1), expression))
    return found


@pytest.mark.parametrize("script, typed, expression", recipes())
def test_a_debugger_stops_where_the_readme_says(flags, tmp_path, script, typed, expression):
    command = [sys.executable, "-m", "pdb", f"{script}.py", "--steps", "2"]
    for name, value in (flags[script] | dict(out=tmp_path / "new.pt")).items():
        command += [] if name == "steps" else [f"--{name}", str(value)]
    command += ["--show"] if script == "ppo" else []
    typed = "\n".join([*typed, f"p 'seen', {expression}", "q"])
    seen = subprocess.run(command, input=typed, capture_output=True, text=True, cwd=ROOT)
    (value,) = re.findall(r"\('seen', (.*)", seen.stdout)
    assert value.startswith("tensor(") and "***" not in seen.stdout
    if script == "pretrain" and "targets" in expression:
        assert value == "tensor(True))"
    if script == "ppo":  # in the first minibatch all ratios are 1
        assert float(re.findall(r"\d[\d.e-]*", value)[0]) < 1e-6
