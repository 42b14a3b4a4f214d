"""All pictures, in the colours of Okabe and Ito, which the colour-blind can tell apart."""

import matplotlib
import matplotlib.figure

from utils.files import atomic

BLUE, ORANGE, VERMILION = "#0072b2", "#e69f00", "#d55e00"
GREEN, PINK, SKY = "#009e73", "#cc79a7", "#56b4e9"
COLORS = [VERMILION, ORANGE, GREEN, SKY, BLUE, PINK]
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
}


def new_figure(rows, columns, width, height):
    matplotlib.rcParams.update(STYLE)
    figure = matplotlib.figure.Figure((width, height), dpi=100, layout="constrained")
    return figure, figure.subplots(rows, columns)


def save_figure(figure, path):
    with atomic(path) as f:
        figure.savefig(f, format="png")


# ---- the stages' logs

# stage, keys in its log, title, unit
CURVES = [
    ("base", ["train_loss", "val_loss"], "pretraining: loss", "nats a token"),
    ("base", ["recall_loss", "reading_loss"], "pretraining: loss on a fact", "nats (guess: 3.5)"),
    ("sft", ["train_loss", "val_loss"], "SFT: loss", "nats a token"),
    ("reward", ["train_loss"], "reward model: loss", "nats a pair"),
    ("reward", ["val_accuracy"], "reward model: accuracy", "fraction ordered right"),
    ("ppo", ["score", "val_score"], "PPO: score", "SFT's standard deviations"),
    ("ppo", ["kl_ref", "val_kl_ref"], "PPO: KL to SFT", "nats a response"),
    ("ppo", ["entropy", "val_entropy"], "PPO: entropy", "nats a token"),
    ("ppo", ["clip_fraction"], "PPO: clip fraction", "fraction of tokens"),
]


def draw_curves(logs, path):
    """The stages' logs over their steps; bars are standard errors."""
    figure, axes = new_figure(3, 3, width=9, height=7.5)
    for ax, (stage, keys, title, unit) in zip(axes.flat, CURVES):
        for key, color, style in zip(keys, (BLUE, VERMILION), ("o-", "s--")):
            records = [record for record in logs.get(stage, []) if key in record]
            if records:
                x = [record["step"] for record in records]
                y = [record[key] for record in records]
                errors = [record.get(f"{key}_se", 0) for record in records]
                style = style if len(x) > 2 else "s"
                ax.errorbar(x, y, errors, fmt=style, color=color, markersize=3, label=key)
        ax.set(title=title, xlabel="iteration" if stage == "ppo" else "optimizer step", ylabel=unit)
        if ax.has_data():
            ax.legend()
        else:
            ax.text(0.5, 0.5, "no finished run", ha="center", transform=ax.transAxes)
    save_figure(figure, path)


# ---- PPO's credit assignment


def draw_credit(episodes, path):
    """The advantages over the tokens of two answers, as ppo.py wrote them into its checkpoint."""
    figure, axes = new_figure(1, 2, width=9, height=3.4)
    for ax, color, episode in zip(axes, (VERMILION, BLUE), episodes):
        tokens, columns = episode["tokens"], episode["columns"]
        x = range(len(tokens))
        ax.bar(x, columns["advantage"], width=0.6, color=color, label="advantage of the token")
        ax.plot(x, columns["value"], "k.--", label="critic's value before it")
        ax.set_xticks(x, tokens, rotation=30, parse_math=False)
        question = episode["prompt"].split("<|user|>")[-1].split("<|end|>")[0]
        title = f"{question}\nscore of the answer: {episode['score']:.2f}"
        ax.set_title(title, parse_math=False)
        ax.set(xlabel="token of the answer", ylabel="SFT's standard deviations")
        ax.legend()
    save_figure(figure, path)
