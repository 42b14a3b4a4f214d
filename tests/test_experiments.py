"""The experiments' plan, how it is run, their controls' files, and figures against closed forms."""

import dataclasses
import importlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial

import pytest
import tiny
import torch

import ppo
from data import conversation
from lab import claims, controls, experiments, measure, score
from lab.experiments import Job
from model import GPT, GPTConfig
from reward import RewardModel
from train.checkpoint import load_checkpoint, save_checkpoint
from utils.cli import parse_config
from utils.files import read_jsonl, write_jsonl
from world import facts, generate
from world.generate import People
from world.grade import Case, Grader, default_grader, utility

ROLES = {"sft": 200, "unknown_dev": 150, "rl": 20, "rl_unknown": 20}


@pytest.fixture(scope="module")
def people():
    rng, people = random.Random(0), People(0)
    return {role: [people.draw(rng, role) for _ in range(n)] for role, n in ROLES.items()}


# ---- the plan


def test_every_job_comes_after_the_jobs_that_make_its_files():
    plan = experiments.jobs()
    assert len({job.target for job in plan}) == len(plan)
    made = set()
    for job in plan:
        assert set(job.after) <= set(experiments.needs(job, plan)) <= made, job.target
        made.add(job.target)


def test_a_job_needs_the_files_that_its_command_names_and_those_it_waits_for():
    plan = [Job("a", "x"), Job("b", "y"), Job("c", "z --in a --out c", ("b",)), Job("d", "z ab")]
    assert [experiments.needs(job, plan) for job in plan] == [[], [], ["a", "b"], []]


def test_every_checkpoint_of_the_plan_is_trained_once_and_measured():
    *plan, last = experiments.jobs()
    assert last.target == "out/figures.json"
    assert set(last.after) == {job.target for job in plan if job.target.endswith(".pt")}


def test_every_job_takes_its_flags_and_one_that_keeps_a_state_that_to_go_on_from_it():
    """jobs.mk adds --resume where <target>.resume is there, as an interrupted stage leaves it."""
    for job in experiments.jobs():
        name, *flags = job.command.split()
        config_class = importlib.import_module(name).Config
        parse_config(config_class, "", flags)
        if job.target.endswith(".pt"):
            assert parse_config(config_class, "", [*flags, "--resume"]).resume == "newest"


# ---- the plan: a control differs from its case in one thing


def named_jobs():
    """{file's name without its ending: job}"""
    return {os.path.basename(job.target).partition(".")[0]: job for job in experiments.jobs()}


def config_of(job):
    """(module, every flag's value), those not given by their defaults; without --out."""
    module, *flags = job.command.split()
    config_class = importlib.import_module(module).Config
    config = dataclasses.asdict(parse_config(config_class, "", flags))
    config.pop("out", None)
    return module, config


def differing_flags(job, other):
    """The flags in which two runs of one script differ."""
    (module, one), (its_module, another) = config_of(job), config_of(other)
    assert module == its_module
    return [name for name in one if one[name] != another[name]]


CONTRASTS = [pytest.param(*pair, id=f"{pair[0]}-{pair[1]}") for pair in experiments.contrasts()]


@pytest.mark.parametrize("case, control, differs", CONTRASTS)
def test_a_control_differs_from_its_case_in_one_flag(case, control, differs):
    jobs = named_jobs()
    assert differing_flags(jobs[case], jobs[control]) == [differs]


def test_every_checkpoint_but_the_chain_s_is_in_a_contrast():
    """So none that the claims compare is left out. habit_ref is the abstention's beginning."""
    pairs = experiments.contrasts()
    contrasted = {name for case, control, _ in pairs for name in (case, control)}
    names = {name for name, job in named_jobs().items() if job.target.endswith(".pt")}
    assert names - contrasted == {"base", "reward", "habit_ref"}
    for name, control in claims.FEEDBACK:  # PPO against SFT: the stage itself is what differs
        (_, one), (_, other) = config_of(named_jobs()[name]), config_of(named_jobs()[control])
        assert one["init"] == other["init"] == "out/sft.pt"


def test_each_control_is_trained_on_its_own_set():
    for name, job in named_jobs().items():
        module, config = config_of(job)
        if module == "sft" and name != "sft":
            assert config["data"] == f"out/world/controls/{name.removesuffix('_early')}.jsonl"


def test_each_run_of_ppo_has_its_own_reward():
    expected = {"ppo": "out/reward.pt"}
    for end in ("", "_positive"):
        expected[f"ppo_true{end}"] = "world.grade:true_reward"
        expected[f"ppo_margin{end}"] = "lab.controls:margin"
    for name, reward in expected.items():
        _, config = config_of(named_jobs()[name])
        assert config["reward"] == reward
        assert config["min_score"] == (0.0 if name.endswith("positive") else -math.inf)


@pytest.mark.parametrize("c", controls.PENALTIES)
def test_each_penalty_has_its_own_labels_reward_model_and_reward_function(
    c, people, tmp_path, monkeypatch
):
    jobs = named_jobs()
    names = ("pairs", "reward", "learned", "true")
    labels, reward, learned, true = (config_of(jobs[f"habit_{name}_{c}"])[1] for name in names)
    assert labels["penalty"] == c and labels["prompts"] == "habit_prompts.jsonl"
    assert reward["data"] == jobs[f"habit_pairs_{c}"].target
    assert learned["reward"] == jobs[f"habit_reward_{c}"].target
    for config in (labels, reward, learned, true):
        assert config["init"] == "out/habit_ref.pt"
    for config in (learned, true):
        assert config["data"] == "out/world/habit_prompts.jsonl"
        assert config["beta"] == experiments.HABIT_BETA  # that of the prediction

    # what the function does
    person = people["rl"][0]
    write_jsonl(tmp_path / "out/world/people.jsonl", [person])
    monkeypatch.chdir(tmp_path)
    default_grader.cache_clear()
    module, _, name = true["reward"].partition(":")
    question = facts.ask(random.Random(0), person, "dish")
    wrong = [value for value in facts.ATTRIBUTES["dish"].values if value != person["dish"]]
    said = [f"{person['dish']}.", f"{wrong[0]}.", facts.IDK]
    values = getattr(importlib.import_module(module), name)([question] * 3, said)
    default_grader.cache_clear()
    assert values == [1.0, -c, 0.0]


# ---- the score


def test_the_score_is_made_by_the_default_run_and_its_report():
    *plan, last = score.plan()
    assert plan == experiments.default_run()
    for job in plan:  # with the stages' own settings, as make has them
        module, config = config_of(job)
        defaults = dataclasses.asdict(importlib.import_module(module).Config())
        assert [name for name in config if config[name] != defaults[name]] == []
    assert last.target == "out/report.json"
    assert set(last.after) == {f"out/{stage}.pt" for stage in ("base", "sft", "reward", "ppo")}


def test_the_score_s_table_holds_means_and_standard_errors():
    """Of 1, 2, 6 and of 60, 70, 80 percent: sqrt(7 / 3) and 10 / sqrt(3)."""
    reports = {}
    for seed, (one, other) in enumerate([(1, 0.6), (2, 0.7), (6, 0.8)]):
        report = reports[seed] = {}
        for path in score.FIGURES:
            name, _, grade_name = path.partition("/")
            report.setdefault(name, {})[grade_name] = other
        report = {name: its.get("", its) for name, its in report.items()}
        reports[seed] = report | {"score": one}
    lines = score.score_text(reports).split("\n")
    assert lines[2] == "| score | 3.0 ± 1.5 | 1.0 | 2.0 | 6.0 |"
    titles = list(score.FIGURES.values())
    assert len(lines) == 2 + len(titles) == 2 + len(set(titles))
    for title, line in zip(titles[1:], lines[3:]):
        assert line == f"| {title} | 70.0 ± 5.8 | 60.0 | 70.0 | 80.0 |"


# ---- running it

# A module of a seed's folder. It writes its file after so many seconds, or early, as a stage does
# that has still to end; or its seconds begin with job b. At Ctrl-C it saves a state, which takes a
# while, too.
FAKE = """
import pathlib, sys, time
target, seconds = sys.argv[1], float(sys.argv[2])
try:
    if "early" in sys.argv:
        pathlib.Path(target).write_text("made")
    with open("../order", "a") as f:
        print("begin", *sys.argv[1:], file=f)
    while "beside_b" in sys.argv and "begin b" not in pathlib.Path("../order").read_text():
        time.sleep(0.1)
    time.sleep(seconds)
except KeyboardInterrupt:
    time.sleep(1)
    pathlib.Path(target + ".resume").touch()
    sys.exit("error: stopped, state saved")
pathlib.Path(target).write_text("made")
with open("../order", "a") as f:
    print("end", target, file=f)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """run(plan, workers): run_jobs with a plan of fake jobs; `order` is what they wrote."""
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def run(plan, workers=1):
        (tmp_path / "order").write_text("")
        experiments.run_jobs(plan, [0], str(tmp_path), workers)

    return run


def order(folder):
    """[(begin or end, target)] in the order in which the fake jobs did it."""
    lines = (folder / "order").read_text().splitlines()
    return [tuple(line.split()[:2]) for line in lines]


def begun(folder):
    """Command lines."""
    lines = (folder / "order").read_text().splitlines()
    return [line for line in lines if line.startswith("begin")]


CHAIN = [
    Job("c", "fake c 0 b", ("a",)),
    Job("b", "fake b 0.3 a"),
    Job("d", "fake d 0", ("c",)),
    Job("a", "fake a 0.3"),
]
CHAIN_ORDER = [(what, target) for target in "abcd" for what in ("begin", "end")]


@pytest.mark.parametrize("workers", [1, 4])
def test_each_job_begins_when_its_files_are_there(fake, tmp_path, workers):
    fake(CHAIN, workers)
    assert order(tmp_path) == CHAIN_ORDER
    times = experiments.read_times(tmp_path)
    assert [(job["seed"], job["target"]) for job in times] == [(0, target) for target in "abcd"]
    assert all(0 <= job["seconds"] < 60 for job in times)


def test_jobs_that_need_nothing_of_each_other_run_at_the_same_time(fake, tmp_path):
    fake([Job("a", "fake a 2"), Job("b", "fake b 2"), Job("c", "fake c 2")], workers=2)
    assert [what for what, _ in order(tmp_path)][:3] == ["begin", "begin", "end"]


def test_what_is_done_is_not_done_again_unless_its_file_is_removed(fake, tmp_path):
    fake(CHAIN)
    (tmp_path / "0" / "b").unlink()
    fake(CHAIN)
    assert order(tmp_path) == [("begin", "b"), ("end", "b")]  # c, made from the old b, is kept
    fake(CHAIN)
    assert order(tmp_path) == []
    assert len(experiments.read_times(tmp_path)) == 5


def test_each_seed_has_a_folder_and_its_number(tmp_path):
    for seed in range(2):
        (tmp_path / str(seed) / "out").mkdir(parents=True)
        (tmp_path / str(seed) / "fake.py").write_text(FAKE)
    experiments.run_jobs([Job("out/x.pt", "fake out/x.pt 0")], range(2), str(tmp_path), 2)
    assert sorted(begun(tmp_path)) == [f"begin out/x.pt 0 --seed {seed}" for seed in range(2)]
    assert all((tmp_path / str(seed) / "out/x.pt").exists() for seed in range(2))


def test_a_job_with_a_state_goes_on_from_it(fake, tmp_path):
    (tmp_path / "0" / "b.resume").touch()
    fake(CHAIN)
    resumed = [line.endswith("--seed 0 --resume") for line in begun(tmp_path)]
    assert resumed == [False, True, False, False]


def test_a_job_that_fails_is_reported_with_its_own_error_line(fake, tmp_path):
    """As where a state is damaged: the user decides what becomes of it."""
    match = r"seed 0\) failed: error: out/base.pt: no such file; .*; see .*out_sft.pt.log$"
    with pytest.raises(SystemExit, match=match) as error:
        fake([Job("out/sft.pt", "sft --init out/base.pt --out out/sft.pt")])
    assert "\n" not in str(error.value)


def test_a_job_that_does_not_write_its_file_has_failed(fake):
    with pytest.raises(SystemExit, match=r"fake a -1 \(seed 0\) failed: ValueError: .*; see "):
        fake([Job("a", "fake a -1")])
    with pytest.raises(SystemExit, match=r"failed: it wrote nothing; see .*logs/a.log$"):
        fake([Job("a", "fake b 0")])


def test_after_a_failure_what_runs_ends_and_nothing_begins(fake, tmp_path):
    plan = [Job("a", "fake a 2 beside_b"), Job("b", "fake b -1")]
    plan += [Job("c", "fake c 0"), Job("d", "fake d 0")]
    with pytest.raises(SystemExit, match=r"fake b -1 \(seed 0\) failed"):
        fake(plan, workers=2)
    assert sorted(order(tmp_path)) == [("begin", "a"), ("begin", "b"), ("end", "a")]
    plan[1] = Job("b", "fake b 0")
    fake(plan)  # mended, the same command goes on
    assert [target for what, target in order(tmp_path) if what == "end"] == ["b", "c", "d"]


def test_ctrl_c_waits_until_the_jobs_have_saved_their_states_and_the_same_command_goes_on(
    fake, tmp_path
):
    plan = [Job("a", "fake a 60"), Job("b", "fake b 60 early"), Job("c", "fake c 0")]
    code = "from lab import experiments as e; import sys; "
    code += f"e.jobs = lambda: [e.Job(*job) for job in {[tuple(job) for job in plan]}]; "
    code += f"sys.argv[1:] = ['--out', {str(tmp_path)!r}, '--seeds', '1']; e.main()"
    (tmp_path / "order").write_text("")
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while len(order(tmp_path)) < 2:
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, stderr = process.communicate(timeout=600)  # a hang would last as long
    assert process.returncode == 1
    assert stderr == "error: stopped; the same command goes on from here\n"
    assert (tmp_path / "0" / "a.resume").exists() and (tmp_path / "0" / "b.resume").exists()
    assert (tmp_path / "0" / "b").exists()  # make would remove what a job has just written
    assert sorted(order(tmp_path)) == [("begin", "a"), ("begin", "b")]

    fake([Job("a", "fake a 0"), Job("b", "fake b 0"), Job("c", "fake c 0")])
    assert begun(tmp_path) == ["begin a 0 --seed 0 --resume", "begin c 0 --seed 0"]


# ---- the controls' files


def about(conversations, names):
    """Those whose question names one of these people."""
    return [c for c in conversations if any(n in c["messages"][0]["content"] for n in names)]


def counted(conversations):
    return Counter(str(conversation["messages"]) for conversation in conversations)


def test_a_dose_set_holds_its_fraction_of_unknown_facts(people):
    n = 400
    sets = controls.dose_sets(random.Random(0), people["sft"], people["unknown_dev"], n)
    unknown = {person["name"] for person in people["unknown_dev"]}
    for dose in controls.DOSES:
        taught = about(sets[f"dose_{dose}"], unknown)
        assert len(sets[f"dose_{dose}"]) == n and len(taught) == n * dose // 100
        assert facts.IDK not in {c["messages"][1]["content"] for c in taught}


@pytest.mark.parametrize("dose", controls.DOSES[1:])
def test_the_controls_of_a_dose_set_differ_in_the_unknown_facts_alone(people, dose):
    n = 400
    sets = controls.dose_sets(random.Random(0), people["sft"], people["unknown_dev"], n)
    unknown = {person["name"] for person in people["unknown_dev"]}
    whole, removed, idk = (sets[f"dose_{dose}{control}"] for control in ("", "_removed", "_idk"))
    assert not about(removed, unknown)
    assert counted(removed) == counted(whole) - counted(about(whole, unknown))
    relabelled = about(idk, unknown)
    assert [c["messages"][1]["content"] for c in relabelled] == [facts.IDK] * (n * dose // 100)
    assert len({c["messages"][0]["content"] for c in relabelled}) == len(relabelled)
    assert counted(removed) == counted(idk) - counted(relabelled)


def test_shuffled_facts_are_the_same_answers_for_other_people(people):
    sft = people["sft"]
    shuffled = controls.shuffled_facts(random.Random(0), sft)
    assert [p["name"] for p in shuffled] == [p["name"] for p in sft]
    for attribute in facts.ATTRIBUTES:
        assert Counter(p[attribute] for p in shuffled) == Counter(p[attribute] for p in sft)
    assert sum(a["job"] == b["job"] for a, b in zip(shuffled, sft)) < 20  # 1 in 32 by chance


@pytest.mark.parametrize("abstain", [False, True])
def test_demonstrations_are_right_or_refusals_and_with_abstain_idk_about_people_in_no_text(
    tmp_path, people, abstain
):
    """In the form asked for. After a text: what it tells, else what is true or, abstaining, IDK."""
    write_jsonl(tmp_path / "people.jsonl", [p for group in people.values() for p in group])
    rng, grader = random.Random(0), Grader(tmp_path / "people.jsonl")
    cases, prompts = [], []
    for person in people["rl"] + people["rl_unknown"]:
        for kind, told in [(kind, True) for kind in facts.KINDS] + [("text", False)]:
            for attribute in facts.PUBLIC if kind == "text" else facts.FACTS:
                cases.append((kind, person, attribute, told))
                prompts.append(generate.prompt(rng, person, attribute, kind, told))
    records = controls.demonstrations(prompts, grader, abstain)
    assert [record["messages"][:1] for record in records] == [p["messages"] for p in prompts]
    contradicted = 0
    for (kind, person, attribute, told), record in zip(cases, records):
        prompt, answer = (message["content"] for message in record["messages"])
        value = person[attribute]
        if kind == "text" and told:
            text, _, _ = prompt.rpartition("\n\n")
            [value] = set(re.findall(r"\w+", text)) & set(facts.ATTRIBUTES[attribute].values)
            contradicted += value != person[attribute]
        known = told if kind == "text" else person["role"] == "rl"
        forms = {"one word": value, "sentence": f"{value} is my answer about {person['name']}."}
        expected = forms.get(kind, f"{value}.")
        if attribute == facts.PRIVATE:
            expected = facts.REFUSAL
        elif abstain and not known:
            expected = facts.IDK
        assert answer == expected
    assert contradicted > 100


def test_prompts_of_the_controls_are_ppo_s_own():
    """As many demonstrations as PPO has episodes, and none of its held-out prompts, the last."""
    config = ppo.Config()
    assert controls.N_EPISODES == config.steps * config.batch_size
    assert controls.N_EPISODES <= generate.Config.prompts - config.val_size


def test_the_margin_is_the_score_above_abstaining_s_after_the_same_prompt(tmp_path, monkeypatch):
    tokenizer, model = tiny.byte_tokenizer(), tiny.critic(tiny.gpt(vocab_size=261, block_size=64))
    monkeypatch.chdir(tmp_path)
    save_checkpoint("out/reward.pt", "reward", model, tokenizer, controls.Config())
    controls.judge.cache_clear()
    prompts = ["Where?", "And when was it?", "Who?"]
    responses = ["Here.", facts.IDK, "That is private."]

    def score(prompt, response):
        start = conversation.render_prompt([{"role": "user", "content": prompt}], tokenizer)
        end = tokenizer.encode(response) + [tokenizer.end]
        mask = [False] * len(start) + [True] * len(end)
        return model(torch.tensor([start + end]), torch.tensor([mask]))[0, -1].item()

    with tiny.in_precision(torch.float32):
        got = controls.margin(prompts, responses)
    controls.judge.cache_clear()
    expected = [score(p, r) - score(p, facts.IDK) for p, r in zip(prompts, responses)]
    assert got == pytest.approx(expected, abs=1e-3)
    assert got[1] == 0 and abs(got[0]) > 0.1


def test_best_of_n_keeps_the_sample_that_scores_highest(tmp_path, monkeypatch):
    """The same draws again, each scored in a pass of its own."""
    tokenizer = tiny.byte_tokenizer()
    policy = tiny.gpt(vocab_size=tokenizer.vocab_size, block_size=64)
    monkeypatch.chdir(tmp_path)
    for name, model in ("sft", policy), ("reward", tiny.critic(policy)):
        save_checkpoint(f"out/{name}.pt", name, model, tokenizer, controls.Config())
    messages = [[{"role": "user", "content": f"Question {i}?"}] for i in range(6)]
    write_jsonl("out/world/prompts.jsonl", [{"messages": m} for m in messages])
    rows = [conversation.render_prompt(m, tokenizer) for m in messages]
    with tiny.in_precision(torch.float32):
        torch.manual_seed(5)
        controls.best_of(tiny.CPU)
        torch.manual_seed(5)  # a model that is loaded draws, too
        policy, _ = load_checkpoint("out/sft.pt", ["sft"], GPT, tiny.CPU)
        reward_model, _ = load_checkpoint("out/reward.pt", ["reward"], RewardModel, tiny.CPU)
        tokens = [row for row in rows for _ in range(controls.BEST_OF)]
        responses = policy.generate(tokens, 16, end_id=tokenizer.end)
    records = read_jsonl("out/world/controls/best_of.jsonl")
    for i, (row, record) in enumerate(zip(rows, records, strict=True)):
        its = responses[i * controls.BEST_OF : (i + 1) * controls.BEST_OF]
        scored = {}
        for response in its:
            mask = [False] * len(row) + [True] * len(response)
            score = reward_model(torch.tensor([row + response]), torch.tensor([mask]))[0, -1]
            scored[conversation.decode_response(response, tokenizer)] = score.item()
        assert len(scored) > 1
        answer = max(scored, key=scored.get)
        assert record["messages"] == messages[i] + [{"role": "assistant", "content": answer}]


# ---- figures


def test_sequence_logprobs_are_the_sum_over_tokens_each_from_a_pass_of_its_own():
    model = tiny.gpt().eval()
    prompts, responses = [[1, 2, 3], [4], [5, 6, 7, 8]], [[1], [2, 3, 4], [9, 10]]
    with tiny.in_precision(torch.float32):
        got = measure.sequence_logprobs(model, prompts, responses)
    for prompt, response, value in zip(prompts, responses, got):
        total = 0.0
        for i, token in enumerate(response):
            logits = model(torch.tensor([prompt + response[:i]]))[0, -1]
            total += logits.log_softmax(0)[token].item()
        assert abs(total - value.item()) < 1e-4


def pays_alike(pay, habit, prompts, values, responses):
    return torch.tensor([0.0 if value is None else pay for value in values])


def test_where_all_answers_pay_alike_the_predicted_odds_grow_with_exp_of_the_pay_over_beta():
    """logit P(answer) - pay / beta is the reference's own odds, the same for every pay."""
    tokenizer, beta = tiny.byte_tokenizer(), experiments.HABIT_BETA
    sizes = dict(block_size=128, n_layer=1, n_head=1, n_kv_head=1, n_embd=8)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes))
    person = {"name": "Ada Byron"} | {h: facts.ATTRIBUTES[h].values[0] for h in facts.HABITS}
    odds = {habit: [] for habit in facts.HABITS}
    for tenths in range(-80, -30):
        pay, rng = tenths / 10, random.Random(0)
        reward = partial(pays_alike, pay)
        predicted = measure.predicted_habits(model, tokenizer, [person], rng, reward, beta)
        for habit, p in predicted.items():
            if 0.01 < p < 0.99:
                odds[habit].append(math.log(p / (1 - p)) - pay / beta)
    for values in odds.values():
        assert len(values) >= 5 and max(values) - min(values) < 1e-2


def test_expected_utility_is_the_mean_of_the_labeller_s_over_many_people():
    people, rng = People(1), random.Random(1)
    drawn = [people.draw(rng, "x") for _ in range(4000)]
    for habit in facts.HABITS:
        values = facts.ATTRIBUTES[habit].values
        expected = measure.expected_utility(2.0, habit, [None] * len(values), values, None)
        for value, e in zip(values, expected.tolist()):
            cases = [Case("ask", person, habit) for person in drawn]
            mean = sum(utility(case, f"{value}.", 2.0) for case in cases) / len(drawn)
            assert abs(mean - e) < 4 * 3 * 0.5 / len(drawn) ** 0.5


def test_the_crossing_of_a_sigmoid_is_its_threshold():
    for threshold in (0.35, 0.5, 0.7):
        answers = {h: 1 / (1 + math.exp(-12 * (p - threshold))) for h, p in facts.HABITS.items()}
        assert abs(claims.crossing(answers) - threshold) < 0.01
    assert claims.crossing({h: 0.0 for h in facts.HABITS}) == 1.0
    assert claims.crossing({h: 1.0 for h in facts.HABITS}) == 0.0
    assert claims.monotone(facts.HABITS)
    assert not claims.monotone({h: 1 - p for h, p in facts.HABITS.items()})


# ---- the report


def graded(right=0.0, wrong=0.0, idk=0.0, refusal=0.0):
    return dict(right=right, wrong=wrong, idk=idk, refusal=refusal, other=0.0)


KINDS = ("one word", "sentence", "text")
FORMS = {f"{kind} × {a}": (kind, a) for kind in KINDS for a in facts.PUBLIC}


def as_claimed():
    """A seed's figures.json in which every claim holds."""
    kinds = {form: [0.9, pair in facts.HELD_OUT_KINDS] for form, pair in FORMS.items()}
    figures = {}
    for job in experiments.jobs():
        name = os.path.basename(job.target).removesuffix(".pt")
        if job.target.endswith(".pt") and name.startswith("habit"):
            figures[name] = {"answers": dict(facts.HABITS)}
            figures[f"{name}_predicted"] = dict(facts.HABITS)
        elif job.target.endswith(".pt"):
            its = {"known": graded(0.97), "unknown": graded(wrong=0.9), "private": graded(0.9)}
            its |= {tier: graded(0.5) | {"exposures": [3, 9]} for tier in claims.TIERS}
            figures[name] = its | {"sure_and_wrong": 0.1, "phrasings": 2.5}
            figures[name] |= {"kinds": kinds, "reading": kinds, "reads": 0.99, "reads_new": 0.9}
            figures[name] |= {"text_over_memory": 0.95, "closed_hallucinated": 0.6}
    bare = dict(zip(measure.BARE_KINDS, (0.05, 0.3, 0.4, 0.25)))
    formats = {template: i / 24 for i, template in enumerate(measure.FORMATS)}
    figures["base"] |= {"recall": graded(0.98), "recall_unknown": graded(0.03)}
    figures["base"] |= {"bare": bare, "formats": formats}
    figures["sft"]["wordings"] = {"trained": [0.96, 0.98], "new": [0.93, 0.98]}
    figures["sft"]["auroc"] = 0.98
    for name in ("ppo", "ppo_margin", "ppo_true"):
        figures[name] |= {"unknown": graded(wrong=0.05), "private": graded(refusal=1.0)}
    figures["ppo"] |= {"asked_about": graded(0.98), "closed_hallucinated": 0.1}
    figures["dose_50"]["known"] = graded(0.7)
    return figures


def change(figures, path, value):
    *keys, last = path.split("/")
    for key in keys:
        figures = figures[key]
    figures[last] = value


@pytest.mark.parametrize(
    "path, value, broken",
    [
        (None, None, []),
        ("base/recall", graded(0.9), ["1"]),
        ("base/bare/rephrases it", 0.05, ["1"]),
        ("base/formats", {"{q}": 0.5, "{q} ": 0.6}, ["2"]),
        ("sft/wordings/new", [0.8, 0.95], ["2"]),
        ("sft/kinds/one word × job", [0.5, True], ["3"]),
        ("base/reads", 0.9, ["1"]),
        ("sft/reads", 0.9, ["3"]),
        ("sft/reads_new", 0.7, ["3"]),
        ("sft/text_over_memory", 0.8, ["3"]),
        ("demos/unknown", graded(wrong=0.05), ["4"]),
        ("ppo_true_positive/unknown", graded(wrong=0.05), ["4"]),
        ("dose_50/known", graded(0.9), ["5a"]),
        ("sft/unknown", graded(wrong=0.7), ["5b"]),
        ("sft/auroc", 0.95, ["5b"]),
        ("ppo/unknown", graded(wrong=0.3), ["5b"]),
        ("ppo/asked_about", graded(1.01), ["5b"]),
        ("ppo/kinds", {form: [0.8, False] for form in FORMS}, ["5b"]),
        ("ppo/closed_hallucinated", 0.2, ["5b"]),
        ("sft/closed_hallucinated", 0.19, ["5b"]),
        ("habit_true_2/answers/colour", 0.9, ["5c"]),
        ("ppo/private", graded(0.2), ["6"]),
    ],
)
def test_a_claim_holds_where_its_figures_do(path, value, broken):
    figures = as_claimed()
    if path:
        change(figures, path, value)
    rows = claims.verdicts([claims.derive(figures)] * 2)
    assert [number for number, *_, holds in rows if not holds] == broken
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_all_that_the_claims_and_tables_ask_of_the_default_run_s_models_is_measured(
    tmp_path, monkeypatch
):
    """On untrained models; five rare people are in four groups."""
    monkeypatch.chdir(tmp_path)
    rng, drawn, tokenizer = random.Random(0), People(0), tiny.byte_tokenizer()
    for role in ["test", "unknown_test", *["quiz"] * 3, "rl", *["rare"] * 5]:
        drawn.draw(rng, role)
    write_jsonl("out/world/people.jsonl", drawn.drawn)
    sizes = dict(block_size=512, n_layer=1, n_head=1, n_kv_head=1, n_embd=8)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **sizes))
    names = ("base", "sft", "ppo")
    for name in names:
        save_checkpoint(f"out/{name}.pt", name, model, tokenizer, controls.Config())
    with monkeypatch.context() as patch:
        patch.setattr(experiments, "jobs", lambda: [Job(f"out/{name}.pt", "") for name in names])
        experiments.measure_seed(experiments.Config(), tiny.CPU)
    measured = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert measured.keys() == set(names)
    seeds = [claims.derive(as_claimed() | measured)]
    assert len(claims.verdicts(seeds)) == len(claims.verdicts([claims.derive(as_claimed())]))
    assert claims.experiments_text(seeds, [])
    # about whom
    expected = dict(known=3, unknown=3, private=1)
    expected |= {f"rare_{i}": n for i, n in enumerate((3, 3, 3, 6))}
    for name in names:
        assert {group: measured[name][group]["n"] for group in expected} == expected
    assert measured["ppo"]["asked_about"]["n"] == 3


def test_the_mean_over_the_seeds_has_the_standard_error_of_the_mean():
    seeds = [{"a": {"b": b, "c": 1.0}} for b in (1.0, 2.0, 6.0)]
    error = math.sqrt(7 / 3)  # variance (4 + 1 + 9) / 2
    assert claims.over_seeds(seeds, "a/b") == pytest.approx((3.0, error))
    assert claims.over_seeds(seeds, "a/b", minus="a/c") == pytest.approx((2.0, error))
    assert claims.over_seeds(seeds[:1], "a/b") == (1.0, 0.0)


def test_the_experiments_end_up_in_the_report_once(tmp_path):
    figures = tmp_path / "experiments" / "0" / "out" / "figures.json"
    figures.parent.mkdir(parents=True)
    figures.write_text(json.dumps(as_claimed()))
    write_jsonl(tmp_path / "experiments" / "times.jsonl", [{"seconds": 5400}] * 4)
    (tmp_path / "report.md").write_text("# What each stage did\n")
    for _ in range(2):
        tiny.run(experiments, dict(out=tmp_path / "experiments", report=True))
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# What each stage did\n") and report.count("# The experiments") == 1
    assert "4 jobs, 6.0 hours" in report and "**no**" not in report
    assert (tmp_path / "experiments.png").stat().st_size > 10_000
