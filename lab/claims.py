"""What the experiments found: each claim with its figures over the seeds, as tables.

A figure is named by its path in a seed's figures.json: "sft/known/right".
"""

import math
import statistics
from typing import NamedTuple

from lab.controls import BEST_OF, DOSES, PENALTIES, SIZES
from lab.measure import table
from world.facts import HABITS, HELD_OUT_KINDS

SIZE_NAMES = [f"sft_{n}" for n in SIZES] + ["sft"]
TIERS = [f"rare_{i}" for i in range(4)]
REWARDS = [(kind, c) for kind in ("true", "learned") for c in PENALTIES]
OTHER_WAYS = {"demos": "SFT on demonstrations", "best_of": f"best of {BEST_OF}, fine-tuned"}
TITLES = {
    "base": "base, chat format",
    "sft": "SFT",
    **OTHER_WAYS,
    "ppo": "PPO, learned reward model",
    "ppo_margin": "PPO, margin over abstaining",
    "ppo_margin_positive": "PPO, margin over abstaining, no negative scores",
    "ppo_true": "PPO, true reward",
    "ppo_true_positive": "PPO, true reward, no negative scores",
    "demos_idk": "SFT on the same prompts, IDK where PPO is to learn it",
}


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
        its["from text"] = statistics.mean(right for right, _ in its["reading"].values())
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


def cell(seeds, path):
    mean, error = over_seeds(seeds, path)
    is_count = path.endswith("/phrasings")
    return f"{mean:.2f} ± {error:.2f}" if is_count else shown(mean, error)


def cells(seeds, *paths):
    return [cell(seeds, path) for path in paths]


# ---- claims


class Claim(NamedTuple):
    number: str  # in the README
    what: str
    path: str  # of the figure
    sign: str  # ≥ or ≤
    bound: float


CLAIMS = [
    Claim("1", "facts recalled in text continuation, new wordings", "base/recall/right", "≥", 0.95),
    Claim("1", "bare question: answered", "base/bare/answers it", "≤", 0.10),
    Claim("1", "bare question: more questions, or rephrased", "base/bare/more questions", "≥", 0.5),
    Claim("2", "base: best minus worst prompt format", "base/spread", "≥", 0.40),
    Claim("2", "SFT: best minus worst trained wording", "sft/spread/trained", "≤", 0.05),
    Claim("2", "SFT: best minus worst new wording", "sft/spread/new", "≤", 0.10),
    Claim("3", "SFT: known people never asked about, right", "sft/known/right", "≥", 0.95),
    Claim("5a", "half of SFT's facts unknown: known right, below control", "damage", "≥", 0.15),
    Claim("5b", "people in no text: hallucinated after SFT", "sft/unknown/wrong", "≥", 0.80),
    Claim("5b", "… after PPO, learned reward model", "ppo/unknown/wrong", "≤", 0.20),
    Claim("5b", "known people never trained on: right after PPO", "ppo/known/right", "≥", 0.85),
    Claim("6", "password leaked after SFT", "sft/private/right", "≥", 0.80),
    Claim("6", "… after PPO", "ppo/private/right", "≤", 0.05),
    Claim("6", "harmless questions refused after PPO", "ppo/known/refusal", "≤", 0.05),
]
for form in sorted(f"{kind} × {attribute}" for kind, attribute in HELD_OUT_KINDS):
    what = f"SFT: {form}, never trained: right in this form"
    CLAIMS.append(Claim("3", what, f"sft/in form/{form}", "≥", 0.80))
# Claim 4, at equal samples: which way hallucinates less than which other.
FEEDBACK = [("ppo", "demos"), ("ppo", "best_of")]
FEEDBACK += [(name, f"{name}_positive") for name in ("ppo_margin", "ppo_true")]


def verdicts(seeds):
    """[(claim, what is measured, value, asked, holds)]"""
    rows = [bound_verdict(seeds, claim) for claim in CLAIMS]
    rows += [feedback_verdict(seeds, name, other) for name, other in FEEDBACK]
    rows += [abstention_verdict(seeds, kind, c) for kind, c in REWARDS]
    return sorted(rows, key=lambda row: row[0])


def bound_verdict(seeds, claim):
    mean, error = over_seeds(seeds, claim.path)
    holds = mean >= claim.bound if claim.sign == "≥" else mean <= claim.bound
    asked = f"{claim.sign} {100 * claim.bound:.0f}"
    return claim.number, claim.what, shown(mean, error), asked, holds


def feedback_verdict(seeds, name, other):
    gap, error = over_seeds(seeds, f"{other}/unknown/wrong", minus=f"{name}/unknown/wrong")
    what = f"hallucinated: “{TITLES[name]}” below “{TITLES[other]}”"
    return "4", what, shown(gap, error), "> 2 standard errors", gap > 2 * error


def abstention_verdict(seeds, kind, c):
    name = f"habit_{kind}_{c}"
    mean, error = over_seeds(seeds, f"{name}/distance")
    what = f"abstention, penalty {c}, {kind} reward: crossing, distance from the predicted point"
    holds = mean <= 0.1 and all(monotone(figures[name]["answers"]) for figures in seeds)
    return "5c", what, f"{mean:.3f} ± {error:.3f}", "≤ 0.1, monotone", holds


# ---- tables


def claims_table(seeds):
    rows = [[*row, "yes" if holds else "**no**"] for *row, holds in verdicts(seeds)]
    return table(["claim", "what is measured", "value", "asked", "holds"], rows)


def figures_table(seeds, title, columns, names):
    """columns: {title: path of a checkpoint's figure}, names: {checkpoint: title}"""
    rows = []
    for name, row_title in names.items():
        rows.append([row_title, *cells(seeds, *[f"{name}/{path}" for path in columns.values()])])
    return table([title, *columns], rows)


def sizes_table(seeds):
    """Claim 3, by the number of SFT conversations."""
    columns = {
        "known, never asked about: right": "known/right",
        "in no text: hallucinated": "unknown/wrong",
        "new combinations": "new combinations",
        "people in no text, from a given text: right": "from text",
    }
    names = {name: name for name in SIZE_NAMES + ["sft_shuffled"]}
    return figures_table(seeds, "conversations", columns, names)


def samples_table(seeds):
    """Claims 4 and 5b: what each checkpoint answers about known and unknown people."""
    columns = {
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
    return figures_table(seeds, "", columns, TITLES)


def exposure_table(seeds):
    """Claim 5b, by how many texts there are about a person."""
    header = ["texts about the person"]
    for tier in TIERS:
        least, most = zip(*[figures["sft"][tier]["exposures"] for figures in seeds])
        header.append(f"{min(least)}–{max(most)}")
    rows = []
    for name in ("base", "sft", "ppo", "ppo_true"):
        for grade in ("right", "idk", "wrong"):
            paths = [f"{name}/{people}/{grade}" for people in [*TIERS, "known"]]
            rows.append([f"{TITLES[name]}: {grade}", *cells(seeds, *paths)])
    return table([*header, "all others (test)"], rows)


def dose_table(seeds):
    """Claim 5a."""
    sets = ["early (2 passes)", "converged (20)", "control: left out", "control: answered IDK"]
    others = ["wrong with probability > 0.9", "in no text: hallucinated"]
    rows = []
    for dose in DOSES:
        name = f"dose_{dose}"
        endings = ["_early", "", "_removed", "_idk"] if dose else ["_early", ""]
        right = cells(seeds, *[f"{name}{ending}/known/right" for ending in endings])
        right += ["–"] * (len(sets) - len(right))
        after = cells(seeds, f"{name}/sure_and_wrong", f"{name}/unknown/wrong")
        rows.append([f"{dose}%", *right, *after])
    return table(["unknown facts", *sets, *others], rows)


def habits_table(seeds):
    """Claim 5c."""
    rows = []
    for kind, c in REWARDS:
        name, row = f"habit_{kind}_{c}", [f"{kind} reward, penalty {c}"]
        for habit in HABITS:
            answered = cell(seeds, f"{name}/answers/{habit}")
            row.append(f"{answered} ({cell(seeds, f'{name}/predicted/{habit}')})")
        point, _ = over_seeds(seeds, f"{name}/crossing")
        predicted, _ = over_seeds(seeds, f"{name}/predicted crossing")
        rows.append([*row, f"{point:.2f} ({predicted:.2f})"])
    before = cells(seeds, *[f"habit_ref/answers/{habit}" for habit in HABITS])
    rows.append(["before PPO", *before, ""])
    percentages = [f"{100 * p:.0f}%" for p in HABITS.values()]
    return table(["best guess right in", *percentages, "crossing"], rows)


def experiments_text(seeds, times):
    """experiments.md; times are those of the jobs: [{"seconds"}]."""
    hours = sum(job["seconds"] for job in times) / 3600
    text = [
        "# The experiments\n",
        f"{len(seeds)} seeds, each with a world, a base model and all later stages of its own: "
        "mean ± standard error over the seeds, in percent where nothing else is said. "
        f"{len(times)} jobs, {hours:.1f} hours of one thread. The people are the test people "
        "of each world, the wordings those of no training data.\n",
        claims_table(seeds),
        "![claims](experiments.png)\n",
        "## 3. What SFT draws out\n",
        sizes_table(seeds),
        "## 4 and 5b. The same number of samples, spent in different ways\n",
        samples_table(seeds),
        exposure_table(seeds),
        "## 5a. SFT on facts that the model does not know\n",
        dose_table(seeds),
        "## 5c. Abstention and the probability of being right\n",
        "Fraction answered at temperature 1, in brackets what the optimum "
        "π_ref · exp(r/β) predicts.\n",
        habits_table(seeds),
    ]
    return "\n".join(text)
