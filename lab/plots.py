"""All pictures, in the colours of Okabe and Ito, which the colour-blind can tell apart."""

import random
import statistics

import matplotlib
import matplotlib.figure

from lab.claims import SIZE_NAMES, TIERS, over_seeds
from lab.controls import DOSES, PENALTIES, SIZES
from lab.measure import BARE_KINDS
from utils.files import atomic
from world.facts import HABITS

BLUE, ORANGE, VERMILION = "#0072b2", "#e69f00", "#d55e00"
GREEN, PINK, SKY = "#009e73", "#cc79a7", "#56b4e9"
GRADE_COLORS = {"right": GREEN, "idk": SKY, "wrong": VERMILION}
GRADE_LABELS = {"right": "right", "idk": "“I do not know.”", "wrong": "hallucinated"}
SHORT = {  # checkpoints, under a bar
    "base": "base",
    "sft": "SFT",
    "demos": "demon-\nstrations",
    "demos_idk": "SFT\n+ IDK",
    "best_of": "best\nof 4",
    "ppo": "PPO",
    "ppo_margin_positive": "PPO, no\nnegative",
    "ppo_true": "PPO,\ntrue",
}
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


def rollouts(key):
    return {key: "rollouts", f"val_{key}": "held-out prompts"}


LOSSES = {"train_loss": "training", "val_loss": "validation"}
CURVES = [  # stage, title, {key in the log: name}, unit
    ("base", "pretraining: loss", LOSSES, "nats a token"),
    ("sft", "SFT: loss", LOSSES, "nats a token"),
    ("reward", "reward model: loss", {"train_loss": "training"}, "nats a pair"),
    (
        "reward",
        "reward model: accuracy",
        {"val_accuracy": "held-out pairs"},
        "fraction ordered right",
    ),
    ("ppo", "PPO: score", rollouts("score"), "SFT's standard deviations"),
    ("ppo", "PPO: KL to SFT", rollouts("kl_ref"), "nats a response"),
    ("ppo", "PPO: entropy", rollouts("entropy"), "nats a token"),
    ("ppo", "PPO: critic's loss", {"value_loss": "update"}, "half squared score"),
    ("ppo", "PPO: clip fraction", {"clip_fraction": "update"}, "fraction of tokens"),
]


def draw_curves(logs, path):
    """The stages' logs over their steps; bars are standard errors."""
    figure, axes = new_figure(3, 3, width=9, height=7.5)
    for ax, (stage, title, lines, unit) in zip(axes.flat, CURVES):
        for (key, name), color, style in zip(lines.items(), (BLUE, VERMILION), ("o-", "s--")):
            draw_curve(ax, logs.get(stage, []), key, label=name, color=color, style=style)
        ax.set(title=title, xlabel="iteration" if stage == "ppo" else "optimizer step", ylabel=unit)
        if ax.has_data():
            ax.legend()
        else:
            ax.text(0.5, 0.5, "no finished run", ha="center", transform=ax.transAxes)
    save_figure(figure, path)


def draw_curve(ax, log, key, label, color, style):
    records = [record for record in log if key in record]
    if records:
        x = [record["step"] for record in records]
        y = [record[key] for record in records]
        errors = [record.get(f"{key}_se", 0) for record in records]
        style = style if len(x) > 2 else "s"
        ax.errorbar(x, y, errors, fmt=style, color=color, markersize=3, label=label)


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


# ---- the claims: means over the seeds, in percent, with standard errors


def draw_claims(seeds, path):
    figure, axes = new_figure(3, 3, width=12, height=10)
    for ax, (title, panel) in zip(axes.flat, PANELS.items()):
        panel(ax, seeds)
        ax.set_title(title)
        if any(ax.get_legend_handles_labels()[1]):
            ax.legend(fontsize=7)
    save_figure(figure, path)


def points(seeds, paths):
    """(means, errors) of figures, in percent."""
    pairs = [over_seeds(seeds, path) for path in paths]
    return [100 * mean for mean, _ in pairs], [100 * error for _, error in pairs]


def line(ax, x, seeds, paths, label, color, style="-o"):
    y, errors = points(seeds, paths)
    ax.errorbar(x, y, errors, fmt=style, color=color, label=label, markersize=4, capsize=2)


def bars(ax, labels, seeds, series):
    """series: {its label: the paths of its figures}, side by side at each of the labels."""
    width = 0.8 / len(series)
    for k, (label, paths) in enumerate(series.items()):
        y, errors = points(seeds, paths)
        x = [i + (k - (len(series) - 1) / 2) * width for i in range(len(labels))]
        color = (BLUE, ORANGE)[k]
        ax.bar(x, y, width, yerr=errors, color=color, label=label, capsize=2)
    ax.set_xticks(range(len(labels)), labels, fontsize=7)


def each(names, path):
    return [f"{name}/{path}" for name in names]


def panel_base(ax, seeds):
    labels = ["recall,\nknown", "recall,\nin no text"]
    labels += [kind.removesuffix(" question").replace(" ", "\n") for kind in BARE_KINDS]
    paths = ["base/recall/right", "base/recall_unknown/right"]
    bars(ax, labels, seeds, {"": paths + [f"base/bare/{kind}" for kind in BARE_KINDS]})
    ax.set(ylabel="base model, % of questions")


def panel_sensitivity(ax, seeds):
    groups = [[figures["base"]["formats"].values() for figures in seeds]]
    groups += [
        [figures["sft"]["wordings"][name] for figures in seeds] for name in ("trained", "new")
    ]
    for i, group in enumerate(groups):
        y = [100 * accuracy for accuracies in group for accuracy in accuracies]
        x = [i + random.Random(j).uniform(-0.2, 0.2) for j in range(len(y))]
        ax.scatter(x, y, s=9, color=(BLUE, ORANGE, VERMILION)[i], alpha=0.6)
    ax.set_xticks(range(3), ["base,\n24 formats", "SFT, trained\nwordings", "SFT, new\nwordings"])
    ax.set(ylabel="right, %; a point a format and seed", ylim=(-3, 103))


def panel_sizes(ax, seeds):
    x = [*SIZES, 4000]
    known = "known people, never asked about"
    line(ax, x, seeds, each(SIZE_NAMES, "known/right"), known, BLUE)
    line(ax, x, seeds, each(SIZE_NAMES, "new combinations"), "new instruction × attribute", GREEN)
    line(ax, x[-1:], seeds, ["sft_shuffled/known/right"], "answers shuffled", VERMILION, "s")
    ax.set(xlabel="SFT conversations", ylabel="right, %", xscale="log", ylim=(-3, 103))


def panel_feedback(ax, seeds):
    names = ["sft", "demos", "best_of", "ppo_margin_positive", "ppo", "ppo_true"]
    series = {
        "in no text: hallucinated": each(names, "unknown/wrong"),
        "known: right": each(names, "known/right"),
    }
    bars(ax, [SHORT[name] for name in names], seeds, series)
    ax.set(ylabel="%", ylim=(0, 125))


def panel_doses(ax, seeds):
    kinds = [
        ("_early", "2 passes", GREEN, DOSES),
        ("", "20 passes", VERMILION, DOSES),
        ("_removed", "control: left out", BLUE, DOSES[1:]),
        ("_idk", "control: IDK", PINK, DOSES[1:]),
    ]
    for kind, label, color, doses in kinds:
        line(ax, doses, seeds, [f"dose_{d}{kind}/known/right" for d in doses], label, color)
    ax.set(xlabel="unknown facts in SFT, %", ylabel="known, never asked: right, %", ylim=(-3, 103))


def panel_abstention(ax, seeds):
    names = ["base", "sft", "demos_idk", "ppo", "ppo_true"]
    for group, shift, hatch in ("known", -0.21, None), ("unknown", 0.21, "//"):
        x = [i + shift for i in range(len(names))]
        bottom = [0] * len(names)
        for grade, color in GRADE_COLORS.items():
            y, _ = points(seeds, each(names, f"{group}/{grade}"))
            look = dict(color=color, hatch=hatch, edgecolor="white")
            ax.bar(x, y, 0.38, bottom, label="" if hatch else GRADE_LABELS[grade], **look)
            bottom = [low + height for low, height in zip(bottom, y)]
    ax.set_xticks(range(len(names)), [SHORT[name] for name in names])
    ax.set(ylabel="%", ylim=(0, 130))


def panel_exposures(ax, seeds):
    x = [statistics.mean(sum(f["sft"][tier]["exposures"]) / 2 for f in seeds) for tier in TIERS]
    for name, style in ("sft", "--o"), ("ppo", "-o"):
        for grade, color in GRADE_COLORS.items():
            paths = [f"{name}/{tier}/{grade}" for tier in TIERS]
            line(ax, x, seeds, paths, f"{name.upper()}: {grade}", color, style)
    ax.set(xlabel="texts in pretraining", ylabel="%", xscale="log")
    ax.set_xticks(x, [f"{exposure:.0f}" for exposure in x])
    ax.minorticks_off()


def panel_habits(ax, seeds):
    x = [100 * p for p in HABITS.values()]
    for c, color in zip(PENALTIES, (BLUE, ORANGE, VERMILION)):
        for kind, style in ("true", "o"), ("learned", "s"):
            paths = [f"habit_{kind}_{c}/answers/{habit}" for habit in HABITS]
            line(ax, x, seeds, paths, f"wrong costs {c}, {kind} reward", color, style)
        theory, _ = points(seeds, [f"habit_true_{c}/predicted/{habit}" for habit in HABITS])
        ax.plot(x, theory, color=color)
    ax.set(xlabel="probability that the best guess is right, %", ylabel="answered, %")


def panel_values(ax, seeds):
    names = ["base", "sft", "ppo", "ppo_true"]
    series = {
        "password told": each(names, "private/right"),
        "harmless question refused": each(names, "known/refusal"),
    }
    bars(ax, [SHORT[name] for name in names], seeds, series)
    ax.set(ylabel="%", ylim=(0, 110))


PANELS = {
    "1. Base: recall, and what follows a question": panel_base,
    "2. Sensitivity to the prompt": panel_sensitivity,
    "3. What SFT draws out": panel_sizes,
    "4. Kinds of feedback, equal samples": panel_feedback,
    "5a. SFT on unknown facts": panel_doses,
    "5b. Known people | in no text (hatched)": panel_abstention,
    "5b. By texts about the person": panel_exposures,
    "5c. Abstention; lines: the theory, true reward": panel_habits,
    "6. A leaked secret, and over-refusal": panel_values,
}
