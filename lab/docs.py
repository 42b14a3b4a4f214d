"""What `make` measured, into the documents: docs/results.json, the pictures, docs/results.md.

    python -m lab.docs   # and the table of `make score`, where it has run

Figures that a document quotes come from docs/results.json; tests/test_docs.py holds them to it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from lab.measure import table
from utils.cli import die, parse_config
from utils.files import atomic, read_json, read_text, write_block, write_text

STAGES = {"base": "after pretraining", "sft": "after SFT", "ppo": "after PPO"}
PICTURES = ["curves.png", "credit.png"]


@dataclass
class Config:
    out: str = "out"  # folder of report.json and its pictures
    docs: str = "docs"  # folder of the documents


def grades_table(results):
    """What each stage answers to questions in new wordings."""
    header = ["asked in the chat format", "known: right", "known: hallucinated"]
    header += ["known: “I do not know.”", "unknown: hallucinated", "unknown: “I do not know.”"]
    rows = []
    for stage, title in STAGES.items():
        known, unknown = (results[f"{stage}_{who}, new wordings"] for who in ("known", "unknown"))
        row = [known["right"], known["wrong"], known["idk"], unknown["wrong"], unknown["idk"]]
        row.append(results[f"{stage}_private"]["right"])
        rows.append([title, *[f"{fraction:.1%}" for fraction in row]])
    return table([*header, "password told"], rows)


SUMMARY = """\
- **Pretraining stores knowledge**: {recall:.1%} of the facts are completed right in sentences never
  seen, yet a bare question is answered {bare:.1%} of the time; {more_questions:.1%} of the time the
  base model goes on with more questions. It depends on the prompt's form: from {least:.1%} to
  {most:.1%} right over {n_formats} formats. And it **reads**: {base_reads:.1%} of the answers about
  people in no other text are found in the text before the question.
- **SFT draws it out**, for people it never asked about, from {worst:.1%} to {best:.1%} over
  {n_wordings} wordings it never saw. And it hallucinates about people nobody told it of, though
  its confidence tells known from unknown people with AUROC {sft_auroc:.3f}. Told to use a text, it
  reads {sft_reads:.1%} of the answers (of an attribute never trained in this form
  {sft_reads_new:.1%}), {sft_text_over_memory:.1%} where the text contradicts what pretraining said.
- **The reward model** orders {reward_accuracy:.1%} of held-out pairs as the labeller did.
  **PPO** against it raises the score of held-out prompts
  from {before[val_score]:.2f} ± {before[val_score_se]:.2f}
  to {after[val_score]:.2f} ± {after[val_score_se]:.2f} at a KL of {after[val_kl_ref]:.1f} nats,
  with {ppo_well_formed:.1%} of the sampled answers well-formed and ended.
- **What PPO costs**: people whom it asked about are answered right more often, by {gap:.1f} points;
  the instruction × attribute that lost most lost {form_loss:.1f} points. Where a text does not tell
  what is asked, {sft_closed_hallucinated:.1%} of the answers are hallucinated after SFT and
  {ppo_closed_hallucinated:.1%} after PPO."""


def summary(results):
    bare, formats = results["bare_questions"], results["formats"].values()
    new_wordings = results["wordings"]["new"]
    before, after = results["ppo_validations"]
    return SUMMARY.format(
        **results,
        bare=bare["answers it"],
        more_questions=bare["rephrases it"] + bare["asks another question"],
        least=min(formats),
        most=max(formats),
        n_formats=len(formats),
        worst=min(new_wordings),
        best=max(new_wordings),
        n_wordings=len(new_wordings),
        before=before,
        after=after,
        gap=100 * results["ppo_membership_gap"],
        form_loss=100 * results["ppo_form_loss"],
    )


def main():
    config = parse_config(Config, __doc__)
    out, docs = Path(config.out), Path(config.docs)
    results = read_json(out / "report.json", "`make` writes it")
    missing = [stage for stage in STAGES if f"{stage}_private" not in results]
    missing += [picture for picture in PICTURES if not (out / picture).exists()]
    if missing:
        die(f"{out}: the report lacks {', '.join(missing)}; `make` runs all stages")

    write_text(docs / "results.json", json.dumps(results, indent=1) + "\n")
    text = f"{grades_table(results)}\n\n{summary(results)}"
    write_block(docs / "results.md", "python -m lab.docs", text)
    if (score := out / "score/score.md").exists():
        write_block(docs / "results.md", "make score", read_text(score).rstrip("\n"))
    for picture in PICTURES:
        with atomic(docs / picture) as f:
            f.write((out / picture).read_bytes())
    print(f"wrote {docs / 'results.json'}, and the default run's part of {docs / 'results.md'}")


if __name__ == "__main__":
    main()
