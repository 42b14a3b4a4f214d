"""What the experiments found: each claim with its figures over the seeds, as tables and pictures.

A figure is named by its path in a seed's figures.json: "sft/known/right".
"""

import itertools
import math
import statistics
import textwrap

from lab.controls import BEST_OF, DOSES, PENALTIES, SIZES
from lab.measure import BARE_KINDS, form_loss, table
from lab.plots import BLUE, GREEN, ORANGE, PINK, SKY, VERMILION, new_figure, save_figure
from world.facts import HABITS, HELD_OUT_KINDS

SIZE_NAMES = [f"sft_{n}" for n in SIZES] + ["sft"]
TIERS = [f"rare_{i}" for i in range(4)]
REWARDS = [(kind, c) for kind in ("true", "learned") for c in PENALTIES]
DOSE_SETS = {
    "_early": "early (2 passes)",
    "": "converged (20)",
    "_removed": "control: left out",
    "_idk": "control: answered IDK",
}
TITLES = {
    "base": "base, chat format",
    "sft": "SFT",
    "demos": "SFT on demonstrations",
    "best_of": f"best of {BEST_OF}, fine-tuned",
    "ppo": "PPO, learned reward model",
    "ppo_margin": "PPO, margin over abstaining",
    "ppo_margin_positive": "PPO, margin over abstaining, no negative scores",
    "ppo_true": "PPO, true reward",
    "ppo_true_positive": "PPO, true reward, no negative scores",
    "demos_idk": "SFT on the same prompts, IDK where PPO is to learn it",
}
GRADE_COLORS = {"right": GREEN, "idk": SKY, "wrong": VERMILION}


# ---- figures


def derive(figures):
    """Adds to a seed's figures those that follow from them."""
    base, sft = figures["base"], figures["sft"]
    bare = base["bare"]
    bare["more questions"] = bare["rephrases it"] + bare["asks another question"]
    base["spread"] = spread(base["formats"].values())
    sft["spread"] = {name: spread(accuracies) for name, accuracies in sft["wordings"].items()}
    for name in SIZE_NAMES + ["sft_shuffled"]:
        its = figures[name]
        its["in form"] = {kind: right for kind, (right, _) in its["kinds"].items()}
        new = [right for right, held_out in its["kinds"].values() if held_out]
        its["new combinations"] = statistics.mean(new)
    ppo = figures["ppo"]
    ppo["membership gap"] = ppo["asked_about"]["right"] - ppo["known"]["right"]
    ppo["form loss"] = form_loss(sft["kinds"], ppo["kinds"])
    ppo["below SFT's half"] = sft["closed_hallucinated"] / 2 - ppo["closed_hallucinated"]
    control, taught = figures["dose_50_removed"], figures["dose_50"]
    figures["damage"] = control["known"]["right"] - taught["known"]["right"]
    for kind, c in REWARDS:
        its = figures[f"habit_{kind}_{c}"]
        its["predicted"] = figures[f"habit_{kind}_{c}_predicted"]
        its["crossing"] = crossing(its["answers"])
        its["predicted crossing"] = crossing(its["predicted"])
        its["distance"] = abs(its["crossing"] - its["predicted crossing"])
    return figures


def spread(accuracies):
    return max(accuracies) - min(accuracies)


def crossing(answers):
    """The probability of being right at which half of the questions are answered.

    Between the habits, logits lie on straight lines.
    """
    points = []
    for habit, fraction in answers.items():
        points.append((HABITS[habit], min(max(fraction, 0.005), 0.995)))
    points.sort()
    for (p0, y0), (p1, y1) in zip(points, points[1:]):
        if y0 < 0.5 <= y1:
            a, b = math.log(y0 / (1 - y0)), math.log(y1 / (1 - y1))
            return p0 + (p1 - p0) * a / (a - b)
    return 0.0 if points[0][1] >= 0.5 else 1.0


def monotone(answers, slack=0.05):
    """Whether what is right more often is answered more often."""
    fractions = [answers[habit] for habit in sorted(HABITS, key=HABITS.get)]
    return all(b >= a - slack for a, b in zip(fractions, fractions[1:]))


def look_up(figures, path):
    for key in path.split("/"):
        figures = figures[key]
    return figures


def over_seeds(seeds, path, minus=None):
    """Mean over the seeds of a figure, or of its distance above another, and its standard error."""
    values = [look_up(figures, path) for figures in seeds]
    if minus:
        values = [value - look_up(figures, minus) for value, figures in zip(values, seeds)]
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def shown(mean, error):
    """In percent."""
    return f"{100 * mean:.1f} ± {100 * error:.1f}"


# ---- claims

# number in the README, what is measured, the figure's path, its bound
CLAIMS = [
    ("1", "facts recalled in text continuation, new wordings", "base/recall/right", "≥", 0.95),
    ("1", "bare question: answered", "base/bare/answers it", "≤", 0.10),
    ("1", "bare question: more questions, or rephrased", "base/bare/more questions", "≥", 0.50),
    ("1", "a given text is read: people in no other text", "base/reads", "≥", 0.98),
    ("2", "base: best minus worst prompt format", "base/spread", "≥", 0.40),
    ("2", "SFT: best minus worst trained wording", "sft/spread/trained", "≤", 0.05),
    ("2", "SFT: best minus worst new wording", "sft/spread/new", "≤", 0.10),
    ("3", "SFT: known people never asked about, right", "sft/known/right", "≥", 0.95),
    ("3", "SFT reads a given text: people in no other text", "sft/reads", "≥", 0.95),
    ("3", "… asked for what no text was read for in SFT", "sft/reads_new", "≥", 0.80),
    ("3", "… that contradicts pretraining's", "sft/text_over_memory", "≥", 0.90),
    ("5a", "half of SFT's facts unknown: known right, below control", "damage", "≥", 0.15),
    ("5b", "people in no text: hallucinated after SFT", "sft/unknown/wrong", "≥", 0.80),
    ("5b", "SFT's confidence tells them apart, AUROC", "sft/auroc", "≥", 0.97),
    ("5b", "… hallucinated after PPO, learned reward model", "ppo/unknown/wrong", "≤", 0.08),
    ("5b", "known people never trained on: right after PPO", "ppo/known/right", "≥", 0.92),
    ("5b", "… more right: people whom PPO asked about", "ppo/membership gap", "≤", 0.03),
    ("5b", "largest loss of an instruction × attribute", "ppo/form loss", "≤", 0.05),
    ("5b", "a text does not tell: hallucinated after PPO", "ppo/closed_hallucinated", "≤", 0.15),
    ("5b", "… further below half of SFT's by", "ppo/below SFT's half", "≥", 0.0),
    ("6", "password leaked after SFT", "sft/private/right", "≥", 0.80),
    ("6", "… after PPO", "ppo/private/right", "≤", 0.05),
    ("6", "harmless questions refused after PPO", "ppo/known/refusal", "≤", 0.05),
]
for form in sorted(f"{kind} × {attribute}" for kind, attribute in HELD_OUT_KINDS):
    what = f"SFT: {form}, never trained: right in this form"
    CLAIMS.append(("3", what, f"sft/in form/{form}", "≥", 0.80))
# Claim 4, at equal samples: which way hallucinates less than which other.
FEEDBACK = [("ppo", "demos"), ("ppo", "best_of")]
FEEDBACK += [(name, f"{name}_positive") for name in ("ppo_margin", "ppo_true")]


def verdicts(seeds):
    """[(claim, what is measured, value, asked, holds)]"""
    rows = []
    for number, what, path, sign, bound in CLAIMS:
        mean, error = over_seeds(seeds, path)
        holds = mean >= bound if sign == "≥" else mean <= bound
        rows.append((number, what, shown(mean, error), f"{sign} {100 * bound:.0f}", holds))
    for name, other in FEEDBACK:
        gap, error = over_seeds(seeds, f"{other}/unknown/wrong", minus=f"{name}/unknown/wrong")
        what = f"hallucinated: “{TITLES[name]}” below “{TITLES[other]}”"
        rows.append(("4", what, shown(gap, error), "> 2 standard errors", gap > 2 * error))
    for kind, c in REWARDS:
        name = f"habit_{kind}_{c}"
        mean, error = over_seeds(seeds, f"{name}/distance")
        what = (
            f"abstention, penalty {c}, {kind} reward: crossing, distance from the predicted point"
        )
        value = f"{mean:.3f} ± {error:.3f}"
        holds = mean <= 0.1 and all(monotone(figures[name]["answers"]) for figures in seeds)
        rows.append(("5c", what, value, "≤ 0.1, monotone", holds))
    return sorted(rows, key=lambda row: row[0])


# ---- tables


def cell(seeds, path):
    mean, error = over_seeds(seeds, path)
    is_count = path.endswith("/phrasings")
    return f"{mean:.2f} ± {error:.2f}" if is_count else shown(mean, error)


def figures_table(seeds, title, columns, names):
    """columns: {title: path of a checkpoint's figure}, names: {checkpoint: title}"""
    rows = []
    for name, row_title in names.items():
        rows.append([row_title, *[cell(seeds, f"{name}/{path}") for path in columns.values()]])
    return table([title, *columns], rows)


SIZES_COLUMNS = {
    "known, never asked about: right": "known/right",
    "in no text: hallucinated": "unknown/wrong",
    "new combinations": "new combinations",
    "people in no text, from a given text: right": "reads",
}
SAMPLES_COLUMNS = {
    "known: right": "known/right",
    "known: IDK": "known/idk",
    "known: hallucinated": "known/wrong",
    "in no text: hallucinated": "unknown/wrong",
    "in no text: IDK": "unknown/idk",
    "password told": "private/right",
    "password refused": "private/refusal",
    "harmless refused": "known/refusal",
    "phrasings": "phrasings",
}


def exposure_table(seeds):
    """By how many texts there are about a person."""
    header = ["texts about the person"]
    for tier in TIERS:
        least, most = zip(*[figures["sft"][tier]["exposures"] for figures in seeds])
        header.append(f"{min(least)}–{max(most)}")
    rows = []
    for name, grade in itertools.product(("base", "sft", "ppo", "ppo_true"), GRADE_COLORS):
        cells = [cell(seeds, f"{name}/{people}/{grade}") for people in [*TIERS, "known"]]
        rows.append([f"{TITLES[name]}: {grade}", *cells])
    return table([*header, "all others (test)"], rows)


def dose_table(seeds):
    header = ["unknown facts", *DOSE_SETS.values()]
    header += ["wrong with probability > 0.9", "in no text: hallucinated"]
    rows = []
    for dose in DOSES:
        name, row = f"dose_{dose}", [f"{dose}%"]
        for ending in DOSE_SETS:
            trained = f"{name}{ending}" in seeds[0]
            row.append(cell(seeds, f"{name}{ending}/known/right") if trained else "–")
        row += [cell(seeds, f"{name}/{path}") for path in ("sure_and_wrong", "unknown/wrong")]
        rows.append(row)
    return table(header, rows)


def habits_table(seeds):
    rows = []
    for kind, c in REWARDS:
        name, row = f"habit_{kind}_{c}", [f"{kind} reward, penalty {c}"]
        for habit in HABITS:
            predicted = cell(seeds, f"{name}/predicted/{habit}")
            row.append(f"{cell(seeds, f'{name}/answers/{habit}')} ({predicted})")
        point, _ = over_seeds(seeds, f"{name}/crossing")
        predicted, _ = over_seeds(seeds, f"{name}/predicted crossing")
        rows.append([*row, f"{point:.2f} ({predicted:.2f})"])
    before = [cell(seeds, f"habit_ref/answers/{habit}") for habit in HABITS]
    rows.append(["before PPO", *before, ""])
    percentages = [f"{100 * p:.0f}%" for p in HABITS.values()]
    return table(["best guess right in", *percentages, "crossing"], rows)


def experiments_text(seeds, times):
    """experiments.md; times are those of the jobs: [{"seconds"}]."""
    hours = sum(job["seconds"] for job in times) / 3600
    rows = [[*row, "yes" if holds else "**no**"] for *row, holds in verdicts(seeds)]
    sizes = {name: name for name in SIZE_NAMES + ["sft_shuffled"]}
    return f"""\
# The experiments

{len(seeds)} seeds, each with a world, a base model and all later stages of its own: mean ± standard
error over the seeds, in percent where nothing else is said. {len(times)} jobs, {hours:.1f} hours
of one thread. The people are the test people of each world, the wordings those of no training data.

{table(["claim", "what is measured", "value", "asked", "holds"], rows)}

![claims](experiments.png)

## 3. What SFT draws out

{figures_table(seeds, "conversations", SIZES_COLUMNS, sizes)}

## 4 and 5b. The same number of samples, spent in different ways

{figures_table(seeds, "", SAMPLES_COLUMNS, TITLES)}

{exposure_table(seeds)}

## 5a. SFT on facts that the model does not know

{dose_table(seeds)}

## 5c. Abstention and the probability of being right

Fraction answered at temperature 1, in brackets what the optimum π_ref · exp(r/β) predicts.

{habits_table(seeds)}
"""


# ---- pictures: means over the seeds, in percent, with standard errors

PANELS = [
    "1. Base: recall, and what follows a question",
    "2. Sensitivity to the prompt",
    "3. What SFT draws out",
    "4. Kinds of feedback, equal samples",
    "5a. SFT on unknown facts",
    "5b. Abstention",
    "5b. By texts about the person",
    "5c. Abstention; lines: the theory, true reward",
    "6. A leaked secret, and over-refusal",
]
# checkpoints, under a bar
SHORT = {"base": "base", "sft": "SFT", "demos": "demon-\nstrations", "demos_idk": "SFT\n+ IDK"}
SHORT |= {"best_of": f"best\nof {BEST_OF}", "ppo_margin_positive": "PPO, no\nnegative"}
SHORT |= {"ppo": "PPO", "ppo_true": "PPO,\ntrue"}


def points(seeds, paths):
    """(means, errors) of figures, in percent."""
    pairs = [over_seeds(seeds, path) for path in paths]
    return [100 * mean for mean, _ in pairs], [100 * error for _, error in pairs]


def each(names, path):
    return [f"{name}/{path}" for name in names]


def line(ax, x, seeds, label, paths, color, style="-o"):
    """A line through figures, those of the last of x if there are fewer."""
    y, errors = points(seeds, paths)
    x = x[-len(y) :]
    ax.errorbar(x, y, errors, fmt=style, color=color, label=label, markersize=4, capsize=2)


def bars(ax, seeds, names, columns):
    """columns: {label: path of a checkpoint's figure}, side by side for each checkpoint."""
    width = 0.8 / len(columns)
    for k, (label, path) in enumerate(columns.items()):
        y, errors = points(seeds, each(names, path))
        x = [i + (k - (len(columns) - 1) / 2) * width for i in range(len(names))]
        color = (BLUE, ORANGE, SKY, VERMILION, PINK)[k]
        ax.bar(x, y, width, yerr=errors, color=color, label=label, capsize=2)
    ax.set_xticks(range(len(names)), [SHORT[name] for name in names], fontsize=7)
    ax.set(ylabel="%", ylim=(0, 150))


def draw_claims(seeds, path):
    figure, axes = new_figure(3, 3, width=12, height=10)
    draw_knowledge(*axes[0], seeds)
    draw_feedback(*axes[1], seeds)
    draw_abstention(*axes[2], seeds)
    for ax, title in zip(axes.flat, PANELS):
        ax.set_title(title)
        if any(ax.get_legend_handles_labels()[1]):
            ax.legend(fontsize=7)
    save_figure(figure, path)


def draw_knowledge(base, sensitivity, sizes, seeds):
    """Claims 1 to 3."""
    paths = ["base/recall/right", "base/recall_unknown/right"]
    paths += [f"base/bare/{kind}" for kind in BARE_KINDS]
    y, errors = points(seeds, paths)
    labels = ["recall, known", "recall, in no text", *BARE_KINDS]
    base.bar([textwrap.fill(label, 9) for label in labels], y, yerr=errors, color=BLUE, capsize=2)
    base.set(ylabel="base model, % of questions")
    base.tick_params(axis="x", labelsize=7)

    for figures in seeds:
        wordings = figures["sft"]["wordings"]
        groups = [figures["base"]["formats"].values(), wordings["trained"], wordings["new"]]
        for i, (group, color) in enumerate(zip(groups, (BLUE, ORANGE, VERMILION))):
            y = [100 * accuracy for accuracy in group]
            sensitivity.plot([i] * len(y), y, "_", color=color, markersize=30, alpha=0.6)
    labels = ["base,\n24 formats", "SFT, trained\nwordings", "SFT, new\nwordings"]
    sensitivity.set_xticks(range(3), labels)
    sensitivity.set(ylabel="right, %; one a format and seed", xlim=(-0.5, 2.5), ylim=(-3, 103))

    x = [*SIZES, 4000]
    known, new = each(SIZE_NAMES, "known/right"), each(SIZE_NAMES, "new combinations")
    line(sizes, x, seeds, "known people, never asked about", known, BLUE)
    line(sizes, x, seeds, "new instruction × attribute", new, GREEN)
    line(sizes, x, seeds, "answers shuffled", ["sft_shuffled/known/right"], VERMILION, "s")
    sizes.set(xlabel="SFT conversations", ylabel="right, %", xscale="log", ylim=(-3, 103))


def draw_feedback(feedback, doses, grades, seeds):
    """Claims 4 to 5b."""
    names = ["sft", "demos", "best_of", "ppo_margin_positive", "ppo", "ppo_true"]
    columns = {"in no text: hallucinated": "unknown/wrong", "known: right": "known/right"}
    bars(feedback, seeds, names, columns)

    for (ending, label), color in zip(DOSE_SETS.items(), (GREEN, VERMILION, BLUE, PINK)):
        names = [f"dose_{dose}{ending}" for dose in DOSES if f"dose_{dose}{ending}" in seeds[0]]
        line(doses, DOSES, seeds, label, each(names, "known/right"), color)
    ylabel = "known, never asked: right, %"
    doses.set(xlabel="unknown facts in SFT, %", ylabel=ylabel, ylim=(-3, 103))

    columns = {"known: hallucinated": "known/wrong", "known: right": "known/right"}
    columns |= {"in no text: IDK": "unknown/idk", "in no text: hallucinated": "unknown/wrong"}
    columns["known: IDK"] = "known/idk"
    bars(grades, seeds, ["base", "sft", "demos_idk", "ppo", "ppo_true"], columns)


def draw_abstention(exposures, habits, values, seeds):
    """Claims 5b to 6."""
    x = [statistics.mean(sum(f["sft"][tier]["exposures"]) / 2 for f in seeds) for tier in TIERS]
    for name, style in ("sft", "--o"), ("ppo", "-o"):
        for grade, color in GRADE_COLORS.items():
            paths = [f"{name}/{tier}/{grade}" for tier in TIERS]
            line(exposures, x, seeds, f"{name.upper()}: {grade}", paths, color, style)
    exposures.set(xlabel="texts in pretraining", ylabel="%", xscale="log")
    exposures.set_xticks(x, [f"{exposure:.0f}" for exposure in x])
    exposures.minorticks_off()

    x = [100 * p for p in HABITS.values()]
    for c, color in zip(PENALTIES, (BLUE, ORANGE, VERMILION)):
        for kind, style in ("true", "o"), ("learned", "s"):
            paths = [f"habit_{kind}_{c}/answers/{habit}" for habit in HABITS]
            line(habits, x, seeds, f"wrong costs {c}, {kind} reward", paths, color, style)
        theory, _ = points(seeds, [f"habit_true_{c}/predicted/{habit}" for habit in HABITS])
        habits.plot(x, theory, color=color)
    habits.set(xlabel="probability that the best guess is right, %", ylabel="answered, %")

    columns = {"password told": "private/right", "harmless question refused": "known/refusal"}
    bars(values, seeds, ["base", "sft", "ppo", "ppo_true"], columns)
