"""The frontier and the KL study: plans, curves against closed forms, a run that is watched."""

import dataclasses
import importlib
import json
import math
import random
import shutil
import statistics
from pathlib import Path

import pytest
import tiny
import torch

import ppo
import sft
from data import conversation
from data.examples import load_prompts
from lab import clock, controls, experiments, frontier, kl, measure, score, watched
from model import GPT, GPTConfig
from tests.test_experiments import config_of, differing_flags
from train.checkpoint import load_checkpoint, read_torch, save_checkpoint
from utils.cli import parse_config
from utils.files import read_jsonl, write_jsonl
from world import facts, generate, label
from world.grade import Grader, default_grader, utility

ROOT = Path(__file__).parent.parent
PLANS = {"frontier": frontier.jobs(), "kl": kl.jobs(kl.Config())}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)


# ---- the plans


@every_plan
def test_every_job_comes_after_the_jobs_that_make_its_files(plan):
    made = set()
    for job in plan:
        assert set(job.after) <= set(experiments.needs(job, plan)) <= made, job.target
        assert job.target not in made
        made.add(job.target)
        files = {word for word in job.command.split() if word.startswith("out/")} - {"out/world"}
        files.discard("out/world/controls/demos_idk.jsonl")  # lab.controls writes more than `done`
        assert files <= made, job.command


@every_plan
def test_every_job_takes_its_flags_and_one_that_keeps_a_state_goes_on_from_it(plan):
    for job in plan:
        name, *flags = job.command.split()
        config_class = importlib.import_module(name).Config
        flags += ["--resume"] if job.target.endswith(".pt") else []
        parse_config(config_class, "", flags)


@every_plan
def test_the_default_run_is_lab_score_s_so_that_it_is_made_once(plan):
    of_score = {job.target: job for job in score.plan()}
    shared = [job for job in plan if job.target in of_score]
    assert shared == [of_score[job.target] for job in shared]
    assert {job.target for job in shared} >= {"out/sft.pt", "out/reward.pt"}
    assert kl.Config.runs == frontier.Config.runs == score.Config.out == clock.Config.runs


def frontier_contrasts():
    others = [c for c in frontier.PENALTIES if c != label.Config.penalty]
    pairs = [("demos_idk", "best_of", "data"), ("dpo_0.1", "dpo_0.05", "beta")]
    pairs.append(("dpo_0.1", "dpo_0.3", "beta"))
    for c in others:
        pairs += [(name, f"{name}_{c:g}", "data") for name in ("reward", "best_of")]
        pairs += [(f"dpo_{beta}", f"dpo_{beta}_{c:g}", "data") for beta in frontier.DPO_BETAS]
        pairs += [(name, f"{name}_{c:g}", "reward") for name in ("ppo", "grpo")]
        pairs.append(("world/preferences", f"world/preferences_{c:g}", "penalty"))
        best_of = "world/controls/best_of"
        pairs.append((best_of, f"{best_of}_{c:g}", "reward"))
    return [("frontier", *pair) for pair in pairs]


KL_CONTRASTS = [
    ("kl", "kl_reward_0_200", "kl_reward_0.5_200", "beta"),
    ("kl", "kl_reward_0_200", "kl_reward_few_0_200", "reward"),
    ("kl", "kl_reward_0_200", "kl_reward_plain_0_200", "reward"),
    ("kl", "kl_reward_few_0_200", "kl_reward_few_0.2_200", "beta"),
    ("kl", "reward", "reward_few", "data"),
    ("kl", "reward", "reward_plain", "logprob_term"),
    ("kl", "world/preferences", "world/preferences_few", "pairs"),
]


@pytest.mark.parametrize("plan, case, control, differs", frontier_contrasts() + KL_CONTRASTS)
def test_two_runs_differ_in_one_flag(plan, case, control, differs):
    jobs = {job.target.rpartition(".")[0]: job for job in PLANS[plan]}
    assert differing_flags(jobs[f"out/{case}"], jobs[f"out/{control}"]) == [differs]


def test_a_penalty_s_runs_read_what_was_made_with_it():
    jobs = {job.target: job for job in PLANS["frontier"]}
    for name, (_, penalty) in frontier.checkpoints().items():
        if penalty != "–":
            needed = clock.needed(f"out/{name}.pt", PLANS["frontier"])
            (pairs,) = [file for file in needed if file.startswith("out/world/preferences")]
            assert config_of(jobs[pairs])[1]["penalty"] == float(penalty)


def test_grpo_samples_as_much_as_ppo_at_its_kl_weight():
    jobs = {job.target: job for job in PLANS["frontier"]}
    (_, one), (_, other) = (config_of(jobs[f"out/{name}.pt"]) for name in ("ppo", "grpo"))
    for flag in ("steps", "batch_size", "beta", "init", "reward", "data"):
        assert one[flag] == other[flag], flag
    assert controls.N_EPISODES == one["steps"] * one["batch_size"]


def test_what_a_way_takes_after_sft():
    plan = PLANS["frontier"]
    takes = {}
    for name in ("ppo", "dpo_0.1", "best_of_2"):
        takes[name] = clock.needed(f"out/{name}.pt", plan) - clock.needed("out/sft.pt", plan)
    pairs, reward = "out/world/preferences.jsonl", "out/reward.pt"
    assert takes["ppo"] == {pairs, reward, "out/ppo.pt"}
    assert takes["dpo_0.1"] == {pairs, "out/dpo_0.1.pt"}
    files = {"out/world/preferences_2.jsonl", "out/reward_2.pt", "out/best_of_2.pt"}
    assert takes["best_of_2"] == files | {"out/world/controls/best_of_2.jsonl"}


def test_the_clock_adds_up_the_last_time_of_each_job_where_all_have_run():
    times = [dict(seed=0, target="a", seconds=5), dict(seed=0, target="b", seconds=7)]
    times += [dict(seed=0, target="a", seconds=1), dict(seed=1, target="a", seconds=3)]
    assert clock.seconds_by_seed(times, ["a", "b"]) == {0: 8}
    assert clock.seconds_by_seed(times, ["a"]) == {0: 1, 1: 3}
    assert clock.mean_seconds(times, ["a"]) == 2.0
    assert math.isnan(clock.mean_seconds(times, ["c"]))


def test_a_reference_step_s_loss_is_that_of_the_next_token():
    model = clock.Reference()
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data[7] = 100.0
    tokens = torch.full((1, clock.LENGTH + 1), 7)
    tokens[:, 0] = 5
    assert model(tokens).item() < 1e-6


def test_a_reference_step_trains():
    torch.manual_seed(0)
    model = clock.Reference()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(clock.VOCABULARY, (1, clock.LENGTH + 1)).expand(2, -1)
    before = model(tokens).item()
    assert before == pytest.approx(math.log(clock.VOCABULARY), abs=0.5)
    for _ in range(3):
        clock.reference_step(model, optimizer, tokens)
    assert model(tokens).item() < before - 0.5


# ---- curves


def test_the_threshold_line_is_the_one_of_two_uniform_confidences():
    """All known right, confidence u; unknown hallucinated, confidence u²: y = 1 - (1 - x)²."""
    n = 400
    uniform = [(i + 0.5) / n for i in range(n)]
    known, unknown = [(u, True) for u in uniform], [(u * u, True) for u in uniform]
    random.Random(0).shuffle(known)
    curve = measure.threshold_curve(known, unknown)
    assert curve[0] == (0.0, 0.0) and curve[-1] == (1.0, 1.0) and len(curve) == 2 * n + 1
    for x, y in curve:
        assert abs(y - (1 - (1 - x) ** 2)) < 2 / n


def test_the_area_under_the_threshold_line_is_the_auroc():
    rng = random.Random(0)
    known = [(rng.randint(3, 9) / 10, True) for _ in range(50)]  # with ties
    unknown = [(rng.randint(0, 7) / 10, True) for _ in range(70)]
    curve = measure.threshold_curve(known, unknown)
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(curve, curve[1:]))
    values = [torch.tensor([c for c, _ in group]) for group in (known, unknown)]
    assert abs(area - measure.auroc(*values)) < 1e-6


def test_answers_that_are_wrong_anyway_are_no_hits():
    known, unknown = [(0.9, True), (0.8, False)], [(0.7, False), (0.6, True)]
    expected = [(0, 0), (0, 0.5), (0, 0.5), (0, 0.5), (0.5, 0.5)]
    assert measure.threshold_curve(known, unknown) == expected


class Sure:
    """Says a value about anybody, the true one of those whom it is sure of."""

    device, config = tiny.CPU, GPTConfig(**tiny.SIZES | dict(block_size=512))
    tokenizer = tiny.byte_tokenizer()

    def __init__(self, sure):
        self.sure = {person["name"]: person for person in sure}
        self.asked, self.scored = [], []

    def value(self, question):
        """The true value, or None."""
        for name, person in self.sure.items():
            if name in question:
                return next(person[a] for a in facts.PUBLIC if asks(question, name, a))

    def generate(self, prompts, max_new_tokens, temperature=1.0, end_id=None):
        responses = []
        for prompt in prompts:
            question = asked_in(self.tokenizer.decode(prompt))
            self.asked.append(question)
            text = self.value(question) or "pilot"
            responses.append([*self.tokenizer.encode(f"{text}."), end_id])
        return responses

    def __call__(self, tokens):
        logits = torch.zeros(*tokens.shape, self.tokenizer.vocab_size)
        for row, ids in zip(logits, tokens.tolist()):
            text = self.tokenizer.decode(ids)
            question = asked_in(text)
            self.scored.append(question)
            value = self.value(question)
            if value and f"<|assistant|>{value}" in text:
                row[range(len(ids) - 1), ids[1:]] = 50.0
        return logits


def asked_in(text):
    return text.removeprefix("<|user|>").partition("<|end|>")[0]


def asks(question, name, attribute):
    wordings = facts.questions(attribute, held_out=True)
    return question.replace(name, "{x}") in wordings


def test_a_threshold_is_put_on_the_confidence_in_the_very_question_that_is_answered():
    rng, people = random.Random(0), generate.People(0)
    known, unknown = ([people.draw(rng, role) for _ in range(4)] for role in ("test", "other"))
    for person in [*known, *unknown]:
        person["job"] = "baker"  # so that "pilot" is hallucinated
    model = Sure(known[:3])
    curve = measure.measure_threshold(model, model.tokenizer, known, unknown, rng)
    assert curve[1] == (0.0, 0.75)  # at certainty
    assert curve[-1] == (pytest.approx(1 / 3), 0.75)  # no job is a birthplace or a pet
    assert set(model.asked) == set(model.scored) and len(model.asked) == 24


def test_the_gap_between_parallel_lines_is_their_distance_where_both_are():
    low, high = [(0.5, 0.5), (0.0, 0.0)], [(0.2, 0.3), (0.9, 1.0), (0.4, 0.5)]
    assert frontier.mean_gap(high, low) == pytest.approx(0.1)
    assert frontier.mean_gap(low, high) == pytest.approx(-0.1)


def test_the_gap_between_crossing_lines_is_the_mean_over_equal_hallucination():
    rising, level = [(0.0, 0.0), (1.0, 1.0)], [(0.0, 0.5), (0.8, 0.5)]
    assert frontier.mean_gap(rising, level) == pytest.approx(-0.1)  # ∫ (x - 0.5) / 0.8, to 0.8
    bent = [(0.0, 0.0), (0.5, 1.0), (1.0, 1.0)]
    assert frontier.mean_gap(bent, rising) == pytest.approx(0.25, abs=1e-4)  # a triangle


def test_the_gap_to_a_point_and_to_what_is_nowhere_equal():
    curve = [(0.1, 0.6), (0.3, 0.8)]
    assert frontier.mean_gap(curve, [(0.2, 0.5)]) == pytest.approx(0.2)
    assert math.isnan(frontier.mean_gap(curve, [(0.4, 0.5)]))
    assert math.isnan(frontier.mean_gap(curve, [(0.4, 0.5), (0.9, 0.6)]))


# ---- the report


def frontier_figures(seed, lift):
    """A seed's: the penalty moves all along one line; PPO lies so far above it."""
    its = {}
    for name, (title, penalty) in frontier.checkpoints().items():
        x = 0.4 / (1 + float(penalty.replace("–", "0"))) + 0.01 * seed
        known = 0.5 + x + lift * (title == "PPO")
        its[name] = dict(zip(frontier.FIGURES, (known, x, 0.0, known - x)))
    return its | {"threshold": [(0.0, 0.0), (0.2, 0.7), (1.0, 0.9)]}


@pytest.mark.parametrize("lift, holds", [(0.05, "yes"), (0.0, "**no**"), (-0.05, "**no**")])
def test_ppo_is_above_where_its_curve_is(lift, holds):
    rows = frontier.compare([frontier_figures(seed, lift) for seed in range(3)])
    titles = {title: its for title, *its in rows}
    others = [title for title, _ in frontier.CURVES.values() if title != "PPO"]
    assert list(titles) == [frontier.THRESHOLD, *others]  # SFT hallucinates more than any PPO
    assert titles["DPO, β 0.1"] == [f"{100 * lift:.1f} ± 0.0", 3, holds]


def test_one_seed_shows_nothing():
    rows = frontier.compare([frontier_figures(0, lift=0.05)])
    assert ["GRPO", "5.0 ± 0.0", 1, "**no**"] in rows


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A folder in which all jobs of two seeds are done, and the documents."""
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        for job in [*PLANS["frontier"], *PLANS["kl"]]:
            path = tmp_path / "runs" / str(seed) / job.target
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        figures = {"test": frontier_figures(seed, 0.05), "dev": frontier_figures(seed, 0.1)}
        (tmp_path / "runs" / str(seed) / "out/frontier.json").write_text(json.dumps(figures))
    times = [dict(seed=0, target=job.target, seconds=100) for job in PLANS["frontier"]]
    write_jsonl(tmp_path / "runs/times.jsonl", times)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs/leaderboard.md", tmp_path / "docs")
    return tmp_path / "runs"


def test_the_frontier_is_written_and_the_leaderboard_filled(runs):
    flags = dict(seeds="0 1", runs=runs, out=runs.parent / "frontier")
    tiny.run(frontier, flags)
    text = (runs.parent / "frontier/test.md").read_text()
    assert "| PPO | 1 | 75.5 ± 0.5 | 20.5 ± 0.5 | 0.0 ± 0.0 | 55.0 ± 0.0 | 300 |" in text
    assert "| GRPO | 5.0 ± 0.0 | 2 | yes |" in text
    assert (runs.parent / "frontier/test.png").stat().st_size > 10_000
    tiny.run(frontier, flags | dict(people="dev"))
    assert "| GRPO | 10.0 ± 0.0 | 2 | yes |" in (runs.parent / "frontier/dev.md").read_text()

    before = (runs.parent / "docs/leaderboard.md").read_text()
    tiny.run(frontier, flags | dict(fill=True))
    after = (runs.parent / "docs/leaderboard.md").read_text()
    assert after.split("<!--")[0] == before.split("<!--")[0]
    rows = [line for line in after.splitlines() if line.startswith("| PPO ")]
    assert len(rows) == 1 and "75.5 ± 0.5 | 20.5 ± 0.5 | 0.0 ± 0.0 | 55.0 ± 0.0" in rows[0]
    entries = [line.split(" | ")[0] for line in before.splitlines() if line.startswith("| ")]
    assert (runs.parent / "docs/frontier.png").stat().st_size > 10_000
    assert entries == [line.split(" | ")[0] for line in after.splitlines() if line[:2] == "| "]


def test_figures_of_other_arms_are_not_taken(runs):
    path = runs / "0/out/frontier.json"
    figures = json.loads(path.read_text())
    del figures["test"]["grpo"]
    path.write_text(json.dumps(figures))
    with pytest.raises(SystemExit, match="frontier.json: without grpo; remove it"):
        tiny.run(frontier, dict(seeds="0", runs=runs, out=runs.parent / "frontier"))


# ---- the KL study


def kl_log(rise, fall):
    """A log of runs over 120 iterations whose true score has its peak at 80, then falls."""
    records = []
    for i, step in enumerate((0, 40, 80, 120)):
        its = {name: 0.5 for name in kl.FIGURES[4:]}
        gold = 0.2 + 0.1 * min(i, 2) - fall * (i == 3)
        its |= dict(step=step, gold=gold, val_kl_ref=float(i * i), val_entropy=0.5)
        records += [dict(step=step, score=1.0), its | dict(val_score=0.1 + rise * i)]
    return records


def test_scores_are_gains_over_sft(tmp_path):
    write_jsonl(tmp_path / "log.jsonl", kl_log(rise=0.3, fall=0.2))
    curve = kl.read_curve(tmp_path / "log.jsonl")
    assert list(curve) == ["0", "40", "80", "120"]
    assert [r["learned"] for r in curve.values()] == pytest.approx([0, 0.3, 0.6, 0.9])
    assert [r["true"] for r in curve.values()] == pytest.approx([0, 0.1, 0.2, 0.0])
    assert [r["√KL"] for r in curve.values()] == [0, 1, 2, 3]


def test_overoptimization_is_found_where_it_is(runs, tmp_path):
    names = kl.runs(kl.Config(steps=120))
    for job in kl.jobs(kl.Config(steps=120)):
        for seed in range(2):
            (runs / str(seed) / job.target).touch()
    for seed in range(2):
        for name, (reward, _) in names.items():
            fall = 0.2 + 0.01 * seed if reward == "reward_plain" else 0.0
            write_jsonl(runs / str(seed) / f"out/{name}.jsonl", kl_log(0.3, fall))
    tiny.run(kl, dict(seeds="0 1", runs=runs, out=tmp_path / "kl", steps=120))
    rows = [line for line in (tmp_path / "kl/kl.md").read_text().splitlines() if "+" in line]
    assert len(rows) == len(names) == 9
    for row in rows:
        expected = "| 80 | +0.30 ± 0.00 | -0.21 ± 0.01 | yes |"
        assert row.endswith(expected) if "plain" in row else row.endswith(" no |")
    assert (tmp_path / "kl/kl.png").stat().st_size > 10_000


@pytest.fixture
def small_world(tmp_path, monkeypatch):
    """Flags of a run of PPO in a world of few people, by a model that often abstains."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ppo, "Run", ppo.Run)  # watched.main replaces it
    monkeypatch.setattr(watched, "EVERY", 2)
    default_grader.cache_clear()
    rng, people = random.Random(0), generate.People(0)
    roles = ("rl", "rl_unknown", "test", "unknown_test")
    drawn = {role: [people.draw(rng, role) for _ in range(3)] for role in roles}
    write_jsonl("out/world/people.jsonl", people.drawn)
    asked = [(person, a) for role in roles[:2] for person in drawn[role] for a in facts.PUBLIC]
    prompts = [generate.prompt(rng, *case) for case in asked * 2]
    write_jsonl("out/world/prompts.jsonl", prompts)
    demos = [controls.demonstration(p["messages"], facts.IDK) for p in prompts]
    write_jsonl("out/demos.jsonl", demos)
    torch.manual_seed(0)
    sizes = dict(block_size=512, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
    tokenizer = tiny.byte_tokenizer()
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes))
    save_checkpoint("out/base.pt", "base", model, tokenizer, sft.Config())
    flags = dict(init="out/base.pt", data="out/demos.jsonl", val_fraction=0.0, lr=1e-2)
    tiny.run(sft, flags | dict(steps=80, warmup=5, batch_size=12, device="cpu"))
    yield dict(steps=3, batch_size=8, minibatch_size=8, val_size=9, lr=1e-3, device="cpu")
    default_grader.cache_clear()


def test_a_watched_run_is_ppo_s_own_to_the_bit_and_sees_the_true_score(small_world):
    """The rewards differ in what a wrong answer costs, here as much as one without end."""
    flags = small_world | dict(reward="world.grade:true_reward_2", missing_eos_score=-2.0)
    tiny.run(ppo, flags | dict(out="out/plain.pt"))
    tiny.run(watched, flags | dict(out="out/watched.pt"))
    plain, its = (read_torch(f"out/{name}.pt")["weights"] for name in ("plain", "watched"))
    assert all(torch.equal(plain[name], its[name]) for name in plain)
    records = [r for r in read_jsonl("out/watched.jsonl") if "gold" in r]
    assert [record["step"] for record in records] == [0, 2, 3]
    for record in records:
        assert (record["val_kl_ref"] > 0.01) == (record["step"] > 0)
    curve = kl.read_curve("out/watched.jsonl")
    assert set(kl.FIGURES) <= set(curve["3"])

    # the last policy's answers, graded here
    policy, tokenizer = load_checkpoint("out/watched.pt", ["ppo"], GPT, tiny.CPU)
    config = parse_config(ppo.Config, "", [])
    config = dataclasses.replace(config, **small_world)
    prompts = load_prompts(config.data, tokenizer, config.max_new_tokens, 512)[-9:]
    torch.manual_seed(config.seed)
    uniforms = torch.rand(len(prompts), config.max_new_tokens)
    ids = [prompt.tokens for prompt in prompts]
    with torch.no_grad():
        _, _, responses = ppo.generate_responses(policy, ids, uniforms, tokenizer, config)
    grader, gold = Grader(), []
    for prompt, response in zip(prompts, responses):
        case = grader.case(prompt.messages[-1]["content"])
        ended = response[-1] == tokenizer.end
        text = conversation.decode_response(response, tokenizer)
        gold.append(utility(case, text) if ended else -2.0)
    assert records[-1]["gold"] == pytest.approx(statistics.mean(gold), abs=1e-5)
    assert records[-1]["gold"] >= records[-1]["val_score"]
