"""--show of every stage: what it prints is checked by hand against the formulas, the files and the models behind it."""

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

import common
import ppo
import pretrain
import reward
import sft
import show
from data import conversation, tokenizer
from model import GPT, GPTConfig
from tests.test_stages import run

ROOT = Path(__file__).parent.parent
STAGES = {"pretrain": pretrain, "sft": sft, "reward": reward, "ppo": ppo}
CREDIT = dict(beta=0.3, gamma=0.9, lam=0.8)  # far from 1, so that each of them is seen in the numbers
QUESTIONS = [f"{word} {i}?" for i in range(10) for word in ("who", "what", "where", "when")]
COLUMNS = ["log pi", "log ref", "kl", "reward", "value", "advantage", "return", "whitened", "ratio"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """{stage: flags} on bytes: a model that SFT taught to end its answers, so that episodes differ in length."""
    folder = tmp_path_factory.mktemp("show")
    tok = tiny.byte_tokenizer()
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": "no" + "o" * (i % 4)}] for i, q in enumerate(QUESTIONS)]
    turns = [t if i % 5 else t + [{"role": "user", "content": "sure?"}, {"role": "assistant", "content": "yes"}] for i, t in enumerate(turns)]
    prompts = [{"messages": t[:1]} for t in turns]
    common.write_jsonl(folder / "conversations.jsonl", [{"messages": t} for t in turns])
    common.write_jsonl(folder / "preferences.jsonl", [p | dict(chosen="yes", rejected="no no") for p in prompts])
    common.write_jsonl(folder / "prompts.jsonl", prompts)
    common.write_text(folder / "tokenizer.tiktoken", tok.dumps())
    stream = [t for i in range(40) for t in tok.encode(f"A fact about {i}.\nAnd one more.") + [tok.end]]
    for name in ("train", "val"):
        np.array(stream, tok.id_type).tofile(folder / f"{name}.bin")
    torch.manual_seed(0)
    sizes = dict(n_layer=1, n_head=2, n_kv_head=2, n_embd=32)
    common.save_checkpoint(folder / "base.pt", "base", GPT(GPTConfig(vocab_size=tok.vocab_size, block_size=64, **sizes)), tok, sft.Config())
    mine = dict(device="cpu", seed=2)
    run(sft, mine | dict(init=folder / "base.pt", data=folder / "conversations.jsonl", out=folder / "sft.pt", epochs=20, batch_size=8, lr=1e-2))
    model, _ = common.load_checkpoint(folder / "sft.pt", ["sft"], GPT, tiny.CPU)
    common.save_checkpoint(folder / "reward.pt", "reward", tiny.critic(model), tok, reward.Config())
    mine |= dict(out=folder / "none" / "new.pt")
    return {
        "pretrain": mine | dict(data=folder, block_size=48, batch_size=6, **sizes),
        "sft": mine | dict(init=folder / "base.pt", data=folder / "conversations.jsonl", batch_size=8),
        "reward": mine | dict(init=folder / "sft.pt", data=folder / "preferences.jsonl", batch_size=8),
        "ppo": mine | CREDIT | dict(init=folder / "sft.pt", reward=folder / "reward.pt", data=folder / "prompts.jsonl", batch_size=16,
                                    minibatch_size=8, micro_batch_size=8, max_new_tokens=9, val_prompts=4, steps=2, lr=1e-3, temperature=1.5),
    }  # fmt: skip


def printed(stage, flags, capsys):
    capsys.readouterr()
    run(STAGES[stage], flags[stage] | dict(show=True))
    return capsys.readouterr().out


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def tables(out):
    """[{"rows": (N, 9), "sums": (4,), "score": …, "mean": …, "std": …, "n": …}] as numpy float64, in the order of printing."""
    found, iteration = [], []
    for line in out.splitlines():
        if line.startswith("token  "):
            assert re.split(r"\s{2,}", line)[1:] == COLUMNS
            iteration.append(dict(rows=[]))
        elif line.startswith("sum  "):
            *sums, _, score = line.split()[1:]
            iteration[-1] |= dict(sums=np.array(sums, float), score=float(score), rows=np.array(iteration[-1]["rows"]))
        elif match := re.match(r"whitened = \(advantage ([+-][\d.]+)\) / ([\d.]+): .* (\d+) tokens$", line):
            for table in iteration:
                table |= dict(mean=-float(match[1]), std=float(match[2]), n=int(match[3]))
            found, iteration = found + iteration, []
        elif iteration and isinstance(iteration[-1]["rows"], list):
            iteration[-1]["rows"].append([float(line[-99 + 11 * i :][:11]) for i in range(9)])
    return found


def test_ppos_columns_follow_from_each_other_as_the_lines_below_say(flags, capsys):
    out = printed("ppo", flags, capsys)
    assert "reward = -0.3 * kl" in out and "reward[t] + 0.9 * value[t+1] - value[t] + 0.9 * 0.8 * advantage[t+1]" in out
    shown = tables(out)
    assert len(shown) == 4 and max(len(table["rows"]) for table in shown) > 3
    close = dict(rtol=0, atol=5e-5)  # five printed digits, a few of them added
    for i, table in enumerate(shown):
        logprobs, ref, kl, rewards, values, advantages, returns, whitened, ratios = table["rows"].T  # (N,) each
        np.testing.assert_allclose(kl, logprobs - ref, **close)
        score_at_the_end = np.eye(len(kl))[-1] * table["score"]
        np.testing.assert_allclose(rewards, -CREDIT["beta"] * kl + score_at_the_end, **close)
        deltas = rewards + CREDIT["gamma"] * np.append(values[1:], 0) - values
        for t in range(len(deltas)):  # the sum that the backward recursion stands for
            discounts = (CREDIT["gamma"] * CREDIT["lam"]) ** np.arange(len(deltas) - t)
            np.testing.assert_allclose(advantages[t], (discounts * deltas[t:]).sum(), **close)
        np.testing.assert_allclose(returns, advantages + values, **close)
        np.testing.assert_allclose(whitened, (advantages - table["mean"]) / table["std"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(table["sums"], table["rows"][:, :4].sum(0), **close)
        assert (kl == 0).all() if i < 2 else (kl != 0).any()  # in the first iteration the policy is its own reference
        assert (ratios > 0).all() and (ratios != 1).any()  # and the update has moved it
    assert shown[0]["score"] < shown[1]["score"] and shown[2]["score"] < shown[3]["score"]


def test_ppo_shows_the_very_batches_that_training_uses(flags, tmp_path, capsys, monkeypatch):
    """--show's two iterations are the first two of the run with the same flags, and the table holds that batch's numbers."""
    real, batches = ppo.update, []

    def watched(policy, critic, optimizers, batch, lr_factor, config):
        batches.append(batch)
        return real(policy, critic, optimizers, batch, lr_factor, config)

    monkeypatch.setattr(ppo, "update", watched)
    out = printed("ppo", flags, capsys)
    run(ppo, flags["ppo"] | dict(out=tmp_path / "ppo.pt"))
    for shown, trained in zip(batches[:2], batches[2:4]):
        assert shown.keys() == trained.keys()
        assert all(torch.equal(shown[name], trained[name]) for name in shown)
    for i, table in enumerate(tables(out)):
        batch = batches[i // 2]
        row = batch["scores"].argmax() if i % 2 else batch["scores"].argmin()
        mask = batch["mask"][row]
        for column, name in (0, "logprobs"), (3, "rewards"), (4, "values"), (6, "returns"), (7, "advantages"):
            np.testing.assert_allclose(table["rows"][:, column], batch[name][row][mask], rtol=0, atol=1e-5)
        raw = (batch["returns"] - batch["values"])[batch["mask"]]
        assert table["n"] == len(raw)
        np.testing.assert_allclose([table["mean"], table["std"]], [raw.mean(), raw.std(correction=0)], rtol=0, atol=1e-5)


def test_the_checkpoint_keeps_the_episodes_of_the_most_blamed_and_the_most_credited_token(flags, tmp_path, monkeypatch):
    """Of one more rollout after training; the advantages are those of the double sum over the rewards and values beside them."""
    real, batches = ppo.credit, []
    monkeypatch.setattr(ppo, "credit", lambda batch, beta, config: batches.append(batch) or real(batch, beta, config))
    run(ppo, flags["ppo"] | dict(out=tmp_path / "ppo.pt", seed=3))
    assert len(batches) == flags["ppo"]["steps"] + 1
    decay = CREDIT["gamma"] * CREDIT["lam"]
    rows = []  # (advantages, tokens) of each episode of the last batch
    for i, mask in enumerate(batches[-1]["mask"]):
        logprobs, ref, values = (batches[-1][name][i][mask].double().numpy() for name in ("logprobs", "ref_logprobs", "values"))
        rewards = -CREDIT["beta"] * (logprobs - ref) + np.eye(len(ref))[-1] * batches[-1]["scores"][i].item()
        deltas = rewards + CREDIT["gamma"] * np.append(values[1:], 0) - values
        rows.append([(decay ** np.arange(len(deltas) - t) * deltas[t:]).sum() for t in range(len(deltas))])
    blamed, credited = common.read_torch(tmp_path / "ppo.pt")["made_by"]["episodes"]
    expected = min(rows, key=min), max(rows, key=max)
    assert expected[0] != expected[1]
    for episode, advantages in zip((blamed, credited), expected):
        np.testing.assert_allclose(episode["columns"]["advantage"], advantages, rtol=0, atol=1e-4)
        i = rows.index(advantages)
        mask, tok = batches[-1]["mask"][i], tiny.byte_tokenizer()
        assert "".join(episode["tokens"]) == "".join(show.spell(t, tok) for t in batches[-1]["tokens"][i, 1:][mask].tolist())
        assert episode["score"] == batches[-1]["scores"][i].item() and episode["prompt"].endswith("?<|end|><|assistant|>")


def test_sfts_carets_mark_exactly_the_tokens_that_train(flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "5000")
    out = printed("sft", flags, capsys)
    tok = tiny.byte_tokenizer()
    rendered = [conversation.render(r["messages"], tok) for r in common.read_jsonl(flags["sft"]["data"], lambda r: None)]
    blocks = [block.splitlines() for block in out.split("\n\n")[2:]]
    assert len(blocks) == 3
    for words, ids, carets in blocks:
        tokens = [(int(m.group()), carets[m.start() : m.end()] == "^" * len(m.group())) for m in re.finditer(r"\d+", ids)]
        tokens = [(t, marked) for t, marked in tokens if t != tok.pad]
        assert ([t for t, _ in tokens], [int(marked) for _, marked in tokens]) in rendered
        assert carets.count("^") == sum(len(str(t)) for t, marked in tokens if marked)
        assert words.split()[0] == "<|user|>" and "<|assistant|>" in words.split()
    monkeypatch.setenv("COLUMNS", "40")
    lines = printed("sft", flags, capsys).split("\n\n", 2)[2].splitlines()
    assert 30 < max(map(len, lines)) < 40
    ids = [line for line in lines if re.fullmatch(r"[\d ]+", line) and max(map(int, line.split())) > 9]
    assert " ".join(ids).split() == [t for _, ids, _ in blocks for t in ids.split()]


def test_the_reward_after_a_token_is_the_score_of_the_answer_cut_there(flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "5000")
    models, real = [], show.pairs
    monkeypatch.setattr(show, "pairs", lambda model, *args: models.append(model) or real(model, *args))
    with tiny.in_precision(torch.float32):
        out = printed("reward", flags, capsys)
    tok = tiny.byte_tokenizer()
    blocks = [block.splitlines() for block in out.rstrip().split("\n\n")[2:]]
    assert len(blocks) == 3
    for prompt, *answers, difference in blocks:
        question = prompt.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>")
        prompt = conversation.render_prompt([{"role": "user", "content": question}], tok)
        ends = []
        for text, (end, _, ids, scores) in zip(("yes", "no no"), (answers[:4], answers[4:])):
            answer = tok.encode(text) + [tok.end]
            assert list(map(int, ids.split())) == answer
            for n, score in enumerate(map(float, scores.split()), 1):
                tokens, mask = torch.tensor([prompt + answer[:n]]), torch.tensor([[False] * len(prompt) + [True] * n])
                assert models[0].score(tokens, mask).item() == pytest.approx(score, abs=1e-4)
            ends.append(score)
            assert float(end.split()[1]) == score
        assert float(difference.split()[-1]) == pytest.approx(ends[0] - ends[1], abs=1.1e-4)


def test_no_batch_depends_on_which_answer_was_preferred_or_how_long_it_is(flags, capsys, monkeypatch, tmp_path):
    """Else a batch of like length holds one verdict only, and the last batches set the balance between verdicts."""
    monkeypatch.setenv("COLUMNS", "5000")
    shown = {"sft": [], "reward": []}
    for seed in range(3):
        rng = random.Random(seed)
        pairs = [{"messages": [{"role": "user", "content": q}], "chosen": "no", "rejected": "I cannot say"} for q in QUESTIONS]
        for pair in pairs:
            if rng.random() < 0.5:
                pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
        common.write_jsonl(tmp_path / "reward.jsonl", pairs)
        demonstrations = [p["messages"] + [{"role": "assistant", "content": p["chosen"]}] for p in pairs]
        common.write_jsonl(tmp_path / "sft.jsonl", [{"messages": m} for m in demonstrations])
        for stage in shown:
            out = printed(stage, flags | {stage: flags[stage] | {"data": tmp_path / f"{stage}.jsonl"}}, capsys)
            shown[stage].append(re.findall(r"<\|user\|>(\w+\?)", out.replace(" ", "")))
    for stage, (first, *others) in shown.items():
        assert len(first) == 3 and others == [first, first], stage


def test_pretrainings_windows_are_the_streams_with_each_border_marked(flags, capsys):
    mine = flags["pretrain"]
    out = printed("pretrain", flags, capsys)
    stream = np.fromfile(mine["data"] / "train.bin", np.uint16)
    starts = pretrain.window_starts(len(stream), mine["batch_size"], mine["block_size"], 0, mine["seed"])
    windows = re.split(r"\nwindow \d+\n", out)[1:]
    assert len(windows) == 4
    tok = tokenizer.load(mine["data"] / "tokenizer.tiktoken")
    for start, window in zip(starts, windows):
        tokens = stream[start : start + mine["block_size"]].tolist()
        assert window.count("|") - 2 * window.count("<|end|>") == len(tokens)
        assert window.count("<|end|>|\n") == tokens.count(tok.end) > 0
        text = window.replace("<|end|>|\n", "<|end|>|").removesuffix("\n").replace("<|end|>", "\0").replace("|", "")
        assert text.replace("\0", "<|end|>").replace("\\n", "\n") == tok.decode(tokens)


@pytest.mark.parametrize("stage", STAGES)
def test_show_writes_no_file_and_no_escape_code_into_a_pipe(flags, stage, capsys):
    folder = flags[stage]["out"].parent.parent
    before = files(folder)
    assert "\033" not in printed(stage, flags, capsys)
    assert files(folder) == before


def test_as_a_program_show_exits_with_0(flags):
    argv = [f"--{name}={value}" for name, value in flags["sft"].items()]
    done = subprocess.run([sys.executable, ROOT / "sft.py", *argv, "--show"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "targets train" in done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_a_terminal_gets_the_same_text_in_colours_and_no_color_takes_them_away(flags, stage, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    plain = printed(stage, flags, capsys)

    def on_a_terminal():
        master, slave = pty.openpty()
        reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.PIPE)  # or the terminal's buffer would fill up
        os.close(master)
        with os.fdopen(slave, "w") as terminal:
            monkeypatch.setattr(sys, "stdout", terminal)
            run(STAGES[stage], flags[stage] | dict(show=True))
            monkeypatch.undo()
        return reader.communicate()[0].decode().replace("\r\n", "\n")

    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = on_a_terminal()
    assert {"\033[36m", "\033[33m", "\033[0m"} == set(re.findall(r"\033\[\d+m", coloured))
    assert re.sub(r"\033\[\d+m", "", coloured).split() == plain.split()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_a_terminal() == plain


def test_a_token_is_spelled_on_one_line_and_a_wide_character_counts_twice():
    tok = tiny.byte_tokenizer()
    assert [show.spell(t, tok) for t in tok.encode("a\n\x1b") + [tok.end]] == ["a", "\\n", "\\x1b", "<|end|>"]
    assert show.spell(tok.encode("中")[0], tok) == "�"
    assert show.width("中文ab") == 6 and show.ljust("中", 4) == "中  "
