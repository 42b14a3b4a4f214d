"""What --show prints: a real batch, made by the stage's own functions, to check by hand.

Colours only on a terminal and without NO_COLOR (no-color.org); the text alone says it all too.
"""

import os
import shutil
import sys
import unicodedata

import torch

from model import last_true
from train.batches import collate
from train.device import autocast

# Trained or made likelier, and masked or made less likely; the colour-blind can tell them apart.
CYAN, YELLOW = 36, 33


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
    """Prints cells, (colour, line, line, …) each, side by side, wrapped to the terminal's width."""
    rows, room = [], 0
    for colour, *lines in cells:
        columns = max(map(width, lines)) + 1
        if columns > room:
            rows.append([])
            room = shutil.get_terminal_size((120, 24)).columns
        rows[-1].append([paint(ljust(line, columns), colour) for line in lines])
        room -= columns
    for row in rows:
        for line in zip(*row):
            print("".join(line).rstrip())


# ---- pretraining


def stream(tokens, tokenizer, n=4):
    """The first n windows (B, T), with | after each token and a new line after each document."""
    print(f"\n{len(tokens)} windows of {tokens.size(1)} tokens; | ends each; target: the next one")
    for i, row in enumerate(tokens[:n].tolist()):
        print(f"\nwindow {i + 1}")
        for j, token in enumerate(row):
            end = "\n" if token == tokenizer.end else ""
            print(paint(spell(token, tokenizer) + "|", (CYAN, YELLOW)[j % 2]), end=end)
        print()


# ---- SFT


def conversations(tokens, mask, tokenizer, n=3):
    """The first n rows of a batch (B, T+1): each token over its id, with ^ where it trains."""
    targets = mask[:, 1:]  # (B, T): the first token is nobody's target
    print(f"\n{targets.sum()} of {targets.numel()} targets train, with ^; the loss is their mean")
    for row, marks in zip(tokens[:n].tolist(), mask[:n].tolist()):
        print()
        cells = []
        for token, trains in zip(row, marks):
            mark = "^" * len(str(token)) if trains else ""
            cells.append((CYAN if trains else YELLOW, spell(token, tokenizer), str(token), mark))
        print_cells(cells)


# ---- reward model


@torch.no_grad()
def pairs(model, pairs, tokenizer, device):
    """The pairs' prompts, and the score after each token of both answers."""
    print("\nscores after each token; the last one counts: loss = -log sigmoid(chosen - rejected)")
    for pair in pairs:
        tokens, mask = collate([pair.chosen, pair.rejected], tokenizer.pad, device)  # (2, T)
        with autocast(device):
            scores = model(tokens, mask)  # (2, T)
        chosen, rejected = scores.gather(1, last_true(mask)[:, None]).squeeze(1).tolist()
        print("\n" + tokenizer.decode(pair.prompt))
        rows = ("chosen", CYAN, chosen), ("rejected", YELLOW, rejected)
        for i, (name, colour, score) in enumerate(rows):
            print(f"{name}: {score:.4f}")
            cells = []
            for token, value in zip(tokens[i][mask[i]].tolist(), scores[i][mask[i]].tolist()):
                cells.append((colour, spell(token, tokenizer), str(token), f"{value:.4f}"))
            print_cells(cells)
        print(f"chosen - rejected = {chosen - rejected:.4f}")


# ---- PPO


def number(x):
    return f"{round(x, 5) + 0.0:11.5f}"  # + 0.0: no minus before a zero


def prompt_text(batch, i, tokenizer):
    n_prompt = batch["mask"][i].int().argmax() + 1
    return tokenizer.decode(batch["tokens"][i, :n_prompt].tolist())


def advantage_table(batch, i, tokenizer):
    """Episode i of a PPO batch: prompt, score, N tokens, and N numbers in each column."""
    mask = batch["mask"][i]  # (T,)
    columns = {
        "log pi": batch["logprobs"],
        "log ref": batch["ref_logprobs"],
        "kl": batch["logprobs"] - batch["ref_logprobs"],
        "reward": batch["rewards"],
        "value": batch["values"],
        "advantage": batch["advantages"],
        "return": batch["returns"],
        "whitened": batch["whitened_advantages"],
    }  # (B, T) each
    response = batch["tokens"][i, 1:][mask].tolist()
    return dict(
        prompt=prompt_text(batch, i, tokenizer),
        score=batch["scores"][i].item(),
        tokens=[spell(token, tokenizer) for token in response],
        columns={name: x[i][mask].tolist() for name, x in columns.items()},
    )


def extremes(batch, tokenizer):
    """The tables of the episodes with the lowest and with the highest advantage of a token."""
    advantages = batch["advantages"]  # (B, T)
    worst, best = advantages.amin(1).argmin(), advantages.amax(1).argmax()
    return [advantage_table(batch, i, tokenizer) for i in (worst, best)]


def episodes(step, batch, new_logprobs, tokenizer, config):
    """The episodes of lowest and highest score; new_logprobs (B, T): after the update."""
    mask, scores = batch["mask"], batch["scores"]
    ratio = (new_logprobs - batch["logprobs"]).exp()  # (B, T)
    for which, i in ("lowest", scores.argmin()), ("highest", scores.argmax()):
        table = advantage_table(batch, i, tokenizer)
        columns = table["columns"] | {"ratio": ratio[i][mask[i]].tolist()}
        first = max(map(width, [*table["tokens"], "token"])) + 1
        of = f"the {which} score of {len(scores)} episodes"
        print(f"\niteration {step + 1}, {of}: {table['prompt']}")
        print(ljust("token", first) + "".join(f"{name:>11}" for name in columns))
        colours = [CYAN if x > 0 else YELLOW for x in columns["whitened"]]
        for token, colour, *row in zip(table["tokens"], colours, *columns.values()):
            print(paint(ljust(token, first) + "".join(map(number, row)), colour))
        sums = [number(sum(columns[name])) for name in ("log pi", "log ref", "kl", "reward")]
        print(ljust("sum", first) + "".join(sums) + f"   score {table['score']:.5f}")
    advantages = batch["advantages"][mask]  # (N,) over the batch
    shift, std = -advantages.mean(), advantages.std(correction=0)
    gamma, lam, clip = config.gamma, config.lam, config.clip
    print(f"""
kl = log pi - log ref;  reward = -{config.beta} * kl, and + score at the last token
value is the critic's before the token;  return = advantage + value
advantage[t] = reward[t] + {gamma} * value[t+1] - value[t] + {gamma} * {lam} * advantage[t+1],
    with value and advantage 0 after the last token
whitened = (advantage {shift:+.5f}) / {std:.5f}: mean and deviation of the {mask.sum()} tokens
ratio = pi after this iteration's update / pi; the loss stops pushing it beyond 1 + {clip} where
    whitened > 0, and below 1 - {clip} where whitened < 0""")


# ---- GRPO


def group(step, batch, tokenizer, group_size):
    """The responses to the prompt whose scores differ most, a row a response."""
    spread = batch["scores"].view(-1, group_size).std(1)  # (prompts,)
    first = spread.argmax().item() * group_size
    prompt = prompt_text(batch, first, tokenizer)
    print(f"\niteration {step + 1}, the prompt whose {group_size} scores differ most: {prompt}")
    print(f"{'score':>11}{'kl':>11}{'advantage':>11}  response")
    for i in range(first, first + group_size):
        mask = batch["mask"][i]  # (T,)
        kl = (batch["logprobs"] - batch["ref_logprobs"])[i].sum()
        advantage = batch["advantages"][i][mask][0]
        numbers = "".join(number(x.item()) for x in (batch["scores"][i], kl, advantage))
        text = tokenizer.decode(batch["tokens"][i, 1:][mask].tolist())
        print(paint(f"{numbers}  {text}", CYAN if advantage > 0 else YELLOW))
