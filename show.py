"""What --show prints: a real batch, made by the stage's own functions, as numbers one can check by hand.

Colours only on a terminal and without NO_COLOR (no-color.org); the characters alone say all that the colours say.
"""

import os
import shutil
import sys
import unicodedata

import torch
import torch.nn.functional as F

import common
from model import last_true

CYAN, YELLOW = 36, 33  # trained or made likelier, masked or made less likely; told apart by the colour-blind too


def paint(text, colour):
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR")
    return text if plain else f"\033[{colour}m{text}\033[0m"


def width(text):
    """Columns on the terminal: a Chinese character takes two."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def ljust(text, columns):
    return text + " " * (columns - width(text))


def spell(token, tokenizer):
    """A token as text of one line: a line end is \\n, half a character �."""
    text = tokenizer.encoding.decode_single_token_bytes(token).decode(errors="replace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_cells(cells):
    """Prints cells, each (colour, line, line, …), side by side and wrapped to the terminal's width."""
    rows, room = [], 0
    for colour, *lines in cells:
        columns = max(map(width, lines)) + 1
        if columns > room:
            rows, room = rows + [[]], shutil.get_terminal_size((120, 24)).columns
        rows[-1].append([paint(ljust(line, columns), colour) for line in lines])
        room -= columns
    for row in rows:
        for line in zip(*row):
            print("".join(line).rstrip())


def stream(tokens, tokenizer, n=4):
    """Pretraining: the first n windows (B, T) with | after each token and a new line after each document."""
    print(f"\n{len(tokens)} windows of {tokens.size(1)} tokens; | ends a token, <|end|> a document; a token's target is the next")
    for i, row in enumerate(tokens[:n].tolist()):
        print(f"\nwindow {i + 1}")
        for j, t in enumerate(row):
            print(paint(spell(t, tokenizer) + "|", (CYAN, YELLOW)[j % 2]), end="\n" * (t == tokenizer.end))
        print()


def conversations(tokens, targets, mask, tokenizer, n=3):
    """SFT: the first n rows of a batch (B, T), each token over its id, and ^ where it is a target that trains."""
    print(f"\n{mask.sum()} of {mask.numel()} targets train, those with ^; the loss is their mean, the others are masked")
    ids, trained = torch.cat([tokens[:, :1], targets], 1), F.pad(mask, (1, 0))  # (B, T+1) each
    for row, marks in zip(ids[:n].tolist(), trained[:n].tolist()):
        print()
        print_cells((CYAN if m else YELLOW, spell(t, tokenizer), str(t), "^" * len(str(t)) * m) for t, m in zip(row, marks))


@torch.no_grad()
def pairs(model, tokens, mask, tokenizer):
    """Reward: rows (2n, T) of a chosen and a rejected answer in turn, the score after each token of the answer."""
    with common.autocast(tokens.device):
        scores = model(tokens, mask)  # (2n, T)
    print("\nthe score after each token of an answer; the last one counts: loss = -log sigmoid(chosen - rejected)")
    ends = scores.gather(1, last_true(mask)[:, None]).squeeze(1).tolist()  # as RewardModel.score reads them
    for i in range(0, len(tokens), 2):
        print("\n" + tokenizer.decode(tokens[i, : mask[i].int().argmax()].tolist()))
        for name, colour, j in ("chosen", CYAN, i), ("rejected", YELLOW, i + 1):
            print(f"{name}: {ends[j]:.4f}")
            answer = zip(tokens[j][mask[j]].tolist(), scores[j][mask[j]].tolist())
            print_cells((colour, spell(t, tokenizer), str(t), f"{score:.4f}") for t, score in answer)
        print(f"chosen - rejected = {ends[i] - ends[i + 1]:.4f}")


def number(x):
    return f"{round(x, 5) + 0.0:11.5f}"  # + 0.0: no minus before a zero


def credit_table(batch, i, tokenizer):
    """Episode i of a PPO batch: prompt, score, N tokens, and N numbers in each column."""
    mask = batch["mask"][i]  # (T,)
    columns = {
        "log pi": batch["logprobs"],
        "log ref": batch["ref_logprobs"],
        "kl": batch["logprobs"] - batch["ref_logprobs"],
        "reward": batch["rewards"],
        "value": batch["values"],
        "advantage": batch["raw_advantages"],
        "return": batch["returns"],
        "whitened": batch["advantages"],
    }  # (B, T) each
    return dict(
        prompt=tokenizer.decode(batch["tokens"][i, : mask.int().argmax() + 1].tolist()),
        score=batch["scores"][i].item(),
        tokens=[spell(t, tokenizer) for t in batch["tokens"][i, 1:][mask].tolist()],
        columns={name: x[i][mask].tolist() for name, x in columns.items()},
    )


def extremes(batch, tokenizer):
    """The tables of the two episodes in which one token got the most blame, and the most credit, of the batch."""
    advantages = batch["raw_advantages"]  # (B, T)
    return [credit_table(batch, i, tokenizer) for i in (advantages.amin(1).argmin(), advantages.amax(1).argmax())]


def episodes(step, batch, new_logprobs, tokenizer, config):
    """PPO: the batch's episodes of lowest and highest score, a row a token; new_logprobs (B, T) are those after the update."""
    mask, scores = batch["mask"], batch["scores"]
    ratio = (new_logprobs - batch["logprobs"]).exp()  # (B, T)
    for which, i in ("lowest", scores.argmin().item()), ("highest", scores.argmax().item()):
        table = credit_table(batch, i, tokenizer)
        columns = table["columns"] | {"ratio": ratio[i][mask[i]].tolist()}
        first = max(map(width, [*table["tokens"], "token"])) + 1
        print(f"\niteration {step + 1}, the {which} score of {len(scores)} episodes: {table['prompt']}")
        print(ljust("token", first) + "".join(f"{name:>11}" for name in columns))
        for token, whitened, *row in zip(table["tokens"], columns["whitened"], *columns.values()):
            print(paint(ljust(token, first) + "".join(map(number, row)), CYAN if whitened > 0 else YELLOW))
        sums = [sum(columns[name]) for name in ("log pi", "log ref", "kl", "reward")]
        print(ljust("sum", first) + "".join(map(number, sums)) + f"   score {table['score']:.5f}")
    advantages = batch["raw_advantages"][mask]  # (N,) over the batch
    print(
        f"""
kl = log pi - log ref;  reward = -{config.beta} * kl, and + score at the last token;  return = advantage + value
value is the critic's before the token;  ratio = pi after this iteration's update / pi: the loss stops pushing it
beyond 1 + {config.clip} where whitened > 0, and below 1 - {config.clip} where whitened < 0
advantage[t] = reward[t] + {config.gamma} * value[t+1] - value[t] + {config.gamma} * {config.lam} * advantage[t+1], both 0 after the last token
whitened = (advantage {-advantages.mean():+.5f}) / {advantages.std(correction=0):.5f}: mean and deviation of the batch's {len(advantages)} tokens"""
    )
