"""The experiments' plan, their controls' files, and the figures against closed forms."""

import importlib
import math
import random
from collections import Counter

import pytest
import tiny
import torch

import common
import experiments
from data import controls, conversation, world
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def people():
    rng, people = random.Random(0), world.People(0)
    return {role: [people.draw(rng, role) for _ in range(n)] for role, n in {"sft": 200, "unknown_dev": 150, "rl": 20, "rl_unknown": 20}.items()}


def test_every_job_comes_after_the_jobs_that_make_its_files():
    plan = experiments.jobs()
    assert len({job[0] for job in plan}) == len(plan)
    made = set()
    for target, command, *after in plan:
        words = {w for w in command.split() if w in {job[0] for job in plan} and w != target}
        assert words | set(after) <= made, target
        made.add(target)


def test_every_checkpoint_of_the_plan_is_trained_once_and_measured():
    *plan, (target, _, *measured) = experiments.jobs()
    assert target == "out/figures.json" and set(measured) == {job[0] for job in plan if job[0].endswith(".pt")}


def test_every_job_that_keeps_a_state_takes_the_flag_to_go_on_from_it(monkeypatch):
    """run_job adds --resume where <target>.resume is there, as an interrupted stage leaves it."""
    for target, command, *_ in experiments.jobs():
        if target.endswith(".pt"):
            script, *flags = command.split()
            module = importlib.import_module(script.removesuffix(".py"))
            assert common.parse_config(module.Config, "", [*flags, "--resume"]).resume == "newest", target


def test_a_job_that_fails_is_reported_with_its_own_error_line(tmp_path):
    """A state that is damaged: the user decides what becomes of it."""
    folder = tmp_path / "0"
    (folder / "out").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"seed 0\) failed: error: out/base.pt: no such file; .*; see .*out_sft.pt.log"):
        experiments.run_job(folder, "out/sft.pt", "sft.py --init out/base.pt --out out/sft.pt", 0)


def test_a_dose_set_holds_its_share_of_unknown_facts_and_its_controls_differ_in_these_alone(people):
    sets = controls.dose_sets(random.Random(0), people["sft"], people["unknown_dev"], 400)
    unknown = {p["name"] for p in people["unknown_dev"]}

    def parts(name):
        about_unknown = [m for m in map(lambda r: r["messages"], sets[name]) if any(n in m[0]["content"] for n in unknown)]
        return Counter(str(r["messages"]) for r in sets[name]), about_unknown

    for dose in controls.DOSES:
        all_, about_unknown = parts(f"dose_{dose}")
        assert sum(all_.values()) == 400 and len(about_unknown) == 4 * dose
        assert world.IDK not in {m[1]["content"] for m in about_unknown}
        if dose:
            removed, none = parts(f"dose_{dose}_removed")
            assert not none and removed == all_ - Counter(map(str, about_unknown))
            idk, relabelled = parts(f"dose_{dose}_idk")
            assert [m[1]["content"] for m in relabelled] == [world.IDK] * 4 * dose
            assert len({m[0]["content"] for m in relabelled}) == len(relabelled) and removed == idk - Counter(map(str, relabelled))


def test_shuffled_facts_are_the_same_answers_for_other_people(people):
    shuffled = controls.shuffled_facts(random.Random(0), people["sft"])
    assert [p["name"] for p in shuffled] == [p["name"] for p in people["sft"]]
    for attribute in world.ATTRIBUTES:
        assert Counter(p[attribute] for p in shuffled) == Counter(p[attribute] for p in people["sft"])
    assert sum(a["job"] == b["job"] for a, b in zip(shuffled, people["sft"])) < 20  # 1 in 32 by chance


def test_demonstrations_are_right_or_refusals_and_with_abstain_idk_about_people_in_no_text(tmp_path, people):
    everybody = [p for group in people.values() for p in group]
    world.common.write_jsonl(tmp_path / "people.jsonl", everybody)
    rng, grader = random.Random(0), world.Grader(tmp_path / "people.jsonl")
    facts = [(p, a) for p in people["rl"] + people["rl_unknown"] for a in world.FACTS]
    prompts = [world.prompt(rng, *fact) for fact in facts]
    for abstain in (False, True):
        for (person, attribute), record in zip(facts, controls.demonstrations(prompts, grader, abstain)):
            grade = world.grade(person, attribute, record["messages"][1]["content"])
            abstains = abstain and person["role"] == "rl_unknown"
            assert grade == ("refusal" if attribute == world.PRIVATE else "idk" if abstains else "right")


def test_sequence_logprobs_are_the_sum_over_tokens_each_from_a_pass_of_its_own():
    model = tiny.gpt().eval()
    prompts, responses = [[1, 2, 3], [4], [5, 6, 7, 8]], [[1], [2, 3, 4], [9, 10]]
    with tiny.in_precision(torch.float32):
        got = experiments.sequence_logprobs(model, prompts, responses)
    for prompt, response, value in zip(prompts, responses, got):
        total = 0.0
        for i, token in enumerate(response):
            total += model(torch.tensor([prompt + response[:i]]))[0, -1].log_softmax(0)[token].item()
        assert abs(total - value.item()) < 1e-4


def test_where_all_answers_pay_alike_the_predicted_odds_grow_with_exp_of_the_pay_over_beta():
    """logit P(answer) - pay / beta is the reference's own odds, the same for every pay; for one person."""
    tokenizer = tiny.byte_tokenizer()
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=128, n_layer=1, n_head=1, n_kv_head=1, n_embd=8))
    person = [{"name": "Ada Byron"} | {h: world.ATTRIBUTES[h][0][0] for h in world.HABITS}]
    odds = {habit: [] for habit in world.HABITS}
    for tenths in range(-80, -30):
        pay = tenths / 10
        reward = lambda habit, prompts, values, responses: torch.tensor([0.0 if v is None else pay for v in values])  # noqa: B023, E731
        for habit, p in experiments.predicted_habits(model, tokenizer, person, random.Random(0), reward).items():
            if 0.01 < p < 0.99:
                odds[habit].append(math.log(p / (1 - p)) - pay / experiments.HABIT_BETA)
    for values in odds.values():
        assert len(values) >= 5 and max(values) - min(values) < 1e-2


def test_expected_utility_is_the_mean_of_the_labeller_s_over_many_people():
    people, rng = world.People(1), random.Random(1)
    drawn = [people.draw(rng, "x") for _ in range(4000)]
    for habit in world.HABITS:
        values = world.ATTRIBUTES[habit][0]
        expected = experiments.expected_utility(2.0)(habit, [None] * len(values), values, None)
        for value, e in zip(values, expected.tolist()):
            mean = sum(world.utility(habit, world.grade(p, habit, f"{value}."), 2.0) for p in drawn) / len(drawn)
            assert abs(mean - e) < 4 * 3 * 0.5 / len(drawn) ** 0.5


def test_the_crossing_of_a_sigmoid_is_its_threshold():
    for threshold in (0.35, 0.5, 0.7):
        answers = {h: 1 / (1 + math.exp(-12 * (p - threshold))) for h, p in world.HABITS.items()}
        assert abs(experiments.crossing(answers) - threshold) < 0.01
    assert experiments.crossing({h: 0.0 for h in world.HABITS}) == 1.0
    assert experiments.crossing({h: 1.0 for h in world.HABITS}) == 0.0
    assert experiments.monotone({h: p for h, p in world.HABITS.items()})
    assert not experiments.monotone({h: 1 - p for h, p in world.HABITS.items()})


def test_prompts_of_the_controls_are_ppo_s_own():
    """As many demonstrations as PPO has episodes, and none of its held-out prompts, the file's last."""
    import ppo

    config = ppo.Config()
    assert controls.N_EPISODES == experiments.PPO_STEPS * config.batch_size <= world.Config.prompts - config.val_prompts


def test_the_margin_is_the_score_above_abstaining_s_after_the_same_prompt(tmp_path, monkeypatch):
    tokenizer, model = tiny.byte_tokenizer(), tiny.critic(tiny.gpt(vocab_size=261, block_size=64))
    monkeypatch.chdir(tmp_path)
    common.save_checkpoint("out/reward.pt", "reward", model, tokenizer, controls.Config())
    experiments.judge.cache_clear()
    prompts, responses = ["Where?", "And when was it?", "Who?"], ["Here.", world.IDK, "That is private."]

    def score(prompt, response):
        start = conversation.render_prompt([{"role": "user", "content": prompt}], tokenizer)
        end = tokenizer.encode(response) + [tokenizer.end]
        return model(torch.tensor([start + end]), torch.tensor([[False] * len(start) + [True] * len(end)]))[0, -1].item()

    with tiny.in_precision(torch.float32):
        got = experiments.margin(prompts, responses)
    experiments.judge.cache_clear()
    assert got == pytest.approx([score(p, r) - score(p, world.IDK) for p, r in zip(prompts, responses)], abs=1e-3)
    assert got[1] == 0 and abs(got[0]) > 0.1
