"""Runs that are killed, starved of disk or fed NaN.

They end in one line, lose nothing, and resume bit-identical.
"""

import importlib
import io
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sft
import train.loop
import utils.files
from data.tokenizer import load, train_bpe
from model import GPT, GPTConfig
from reward import from_gpt
from train.checkpoint import read_torch, save_checkpoint, state_paths
from utils.files import write_jsonl, write_text

ROOT = Path(__file__).parent.parent
STAGES = ["pretrain", "sft", "reward", "ppo"]
# Processes of their own, that need not import torch again; the optimizers need dynamo.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["__main__", "torch._dynamo", *STAGES, "tests.test_faults"])


# ---- small runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with untrained checkpoints and data of random words."""
    folder, rng = tmp_path_factory.mktemp("made"), random.Random(0)
    torch.manual_seed(0)  # whichever test comes first

    def words():
        known = ["red", "blue", "green", "one", "two", "three"]
        return " ".join(rng.choice(known) for _ in range(rng.randint(1, 6)))

    def user():
        return [{"role": "user", "content": words()}]

    # checkpoints
    tokenizer = train_bpe([words() for _ in range(99)], 270)
    sizes = dict(n_layer=1, n_head=2, n_kv_head=2, n_embd=16, n_inner=32, tied=False)
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, block_size=32, **sizes))
    reward_model = from_gpt(model, logprob_term=True)
    save_checkpoint(folder / "sft.pt", "sft", model, tokenizer, sft.Config())
    save_checkpoint(folder / "reward.pt", "reward", reward_model, tokenizer, sft.Config())

    # data
    write_text(folder / "tokenizer.tiktoken", tokenizer.dumps())
    for name in ("train", "val"):
        ids = [rng.randrange(265) for _ in range(2000)]
        np.array(ids, np.uint16).tofile(folder / f"{name}.bin")
    conversations, pairs, prompts = [], [], []
    for _ in range(40):
        answer = {"role": "assistant", "content": words()}
        conversations.append({"messages": user() + [answer]})
        pairs.append({"messages": user(), "chosen": words(), "rejected": "no"})
        prompts.append({"messages": user()})
    write_jsonl(folder / "sft.jsonl", conversations)
    write_jsonl(folder / "preferences.jsonl", pairs)
    write_jsonl(folder / "prompts.jsonl", prompts)
    return folder


def flags(made, stage, out, **changes):
    sizes = dict(seq_len=16, block_size=32, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
    of_stage = {
        "pretrain": dict(data=made, **sizes, warmup=2, eval_every=2),
        "sft": dict(init=made / "sft.pt", data=made / "sft.jsonl", eval_every=2),
        "reward": dict(init=made / "sft.pt", data=made / "preferences.jsonl", eval_every=2),
        "ppo": dict(init=made / "sft.pt", reward=made / "reward.pt", data=made / "prompts.jsonl"),
    }
    of_stage["reward"] |= dict(calibration_size=4, max_new_tokens=4)
    of_stage["ppo"] |= dict(minibatch_size=2, epochs=2, max_new_tokens=4)
    of_stage["ppo"] |= dict(val_size=4, log_every=2, kl_target=1.0)
    common = dict(steps=6, batch_size=4, save_every=2, device="cpu", out=out)
    return of_stage[stage] | common | changes


def command(stage, flags):
    argv = [f"{stage}.py"]
    for name, value in flags.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


def child(argv, fault, output):
    """In a process of its own: the stage's main with the fault. Prints to the connection output."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = argv
    if fault:
        fault[0](*fault[1:])
    stage_module().main()


def stage_module():
    """The module of the stage that this process runs."""
    return importlib.import_module(sys.argv[0].removesuffix(".py"))


def run(stage, flags, fault=None):
    """A stage that meets the fault (a function that brings it about, and its arguments).

    Returns its exit code and what it printed.
    """
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=child, args=(command(stage, flags), fault, there))
    process.start()
    there.close()
    with open(here.fileno(), closefd=False) as f:
        output = f.read()
    process.join()
    return process.exitcode, output


def weights(path):
    return read_torch(path)["weights"]


def log(path):
    """The log's records without the metrics that measure time."""
    records = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    for record in records:
        for name in [name for name in record if name == "seconds" or name.endswith("_s")]:
            del record[name]
    return records


def is_same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- kill -9 at any moment


class Moments:
    """Kills this process with SIGKILL at the n-th event of a kind, or counts the events of all.

    calls: of functions, Python's or C's.
    bytes: written to files.
    operations: opening, renaming, removing a file.
    """

    def __init__(self, kind=None, n=0, report=None):
        self.kind, self.n, self.counts = kind, n, dict(calls=0, bytes=0, operations=0)
        real_open = train.loop.open_log

        def begin(*args):  # nothing is written before
            if kind in (None, "calls"):
                sys.setprofile(self.on_call)
            sys.addaudithook(self.on_event)
            utils.files.open = train.loop.open = self.open
            return real_open(*args)

        train.loop.open_log = begin
        if report:
            stage, real_save = stage_module(), save_checkpoint

            def save(*args, **made_by):
                real_save(*args, **made_by)
                sys.setprofile(None)
                Path(report).write_text(json.dumps(self.counts))

            stage.save_checkpoint = save

    def on_call(self, frame, event, argument):
        if event in ("call", "c_call"):
            self.count("calls")

    def on_event(self, event, arguments):
        if event in ("open", "os.rename", "os.remove"):
            self.count("operations")

    def count(self, kind, n=1):
        self.counts[kind] += n
        if kind == self.kind and self.counts[kind] >= self.n:
            os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path, mode="r", **options):
        moments = self

        class File(io.FileIO):
            def write(self, content):
                content = bytes(content)
                if moments.kind == "bytes" and moments.counts["bytes"] + len(content) >= moments.n:
                    super().write(content[: moments.n - moments.counts["bytes"]])
                moments.count("bytes", len(content))
                return super().write(content)

        if "b" not in mode or "r" in mode:
            return open(path, mode, **options)
        if "a" in mode:
            return io.BufferedRandom(File(path, "ab+"))
        return io.BufferedWriter(File(path, mode))


@pytest.fixture(scope="module")
def uninterrupted(made):
    """A function of a stage: its checkpoint, and how many events of each kind its run has."""
    cache = {}

    def get(stage):
        if stage not in cache:
            out, report = made / "uninterrupted" / f"{stage}.pt", made / f"{stage}.counts"
            out.parent.mkdir(exist_ok=True)
            code, output = run(stage, flags(made, stage, out), (Moments, None, 0, report))
            assert code == 0, output
            cache[stage] = out, json.loads(report.read_text())
        return cache[stage]

    return get


def kill_and_resume(made, tmp_path, uninterrupted, stage, seed, kinds, kills):
    reference, counts = uninterrupted(stage)
    rng, out = random.Random(f"{stage} {seed}"), tmp_path / f"{stage}.pt"
    out.write_bytes(b"the result of an earlier run")
    for i in range(kills + 1):
        states = [path for path in state_paths(out) if path.exists()]
        resume = dict(resume=True) if states else {}
        kind = rng.choice(kinds)
        fault = (Moments, kind, rng.randint(1, counts[kind])) if i < kills else None
        code, output = run(stage, flags(made, stage, out, **resume), fault)
        expected = -signal.SIGKILL if i == 0 else 0
        assert code == expected or (code == -signal.SIGKILL and fault), (fault, output)
        if code == 0:
            break
        assert out.read_bytes() == b"the result of an earlier run" or is_same(out, reference)
        for path in state_paths(out):
            assert not path.exists() or read_torch(path)["step"] in (2, 4)
    assert is_same(out, reference)
    assert log(out) == log(reference)
    assert {path.name for path in tmp_path.iterdir()} == {f"{stage}.pt", f"{stage}.jsonl"}


@pytest.mark.parametrize("kind", ["calls", "bytes"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(
    made, tmp_path, uninterrupted, stage, kind
):
    kill_and_resume(made, tmp_path, uninterrupted, stage, 0, [kind], kills=1)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 21))
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_again_and_again_resumes_to_the_same_bits(
    made, tmp_path, uninterrupted, stage, seed
):
    kinds = ["calls", "bytes", "operations"]
    kill_and_resume(made, tmp_path, uninterrupted, stage, seed, kinds, kills=3)


def kill_between_the_renames():
    """When the state before has made way and the new one is not yet in its place."""

    def kill(event, arguments):
        if event == "os.rename" and str(arguments[1]).endswith(".resume"):
            if Path(f"{arguments[1]}.previous").exists():
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)


def test_a_kill_between_two_renames_leaves_a_state_to_resume_from(made, tmp_path, uninterrupted):
    out = tmp_path / "sft.pt"
    assert run("sft", flags(made, "sft", out), (kill_between_the_renames,))[0] == -signal.SIGKILL
    newest, previous = state_paths(out)
    assert previous.exists() and not newest.exists()
    code, output = run("sft", flags(made, "sft", out, resume=True))
    assert code == 0 and "resumed at step 2" in output
    assert is_same(out, uninterrupted("sft")[0])


# ---- Ctrl-C


def run_in_a_shell(stage, flags, folder):
    """The stage as a program, in the folder."""
    argv = [sys.executable, ROOT / f"{stage}.py", *command(stage, flags)[1:]]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True)


def test_ctrl_c_before_the_first_step_is_one_line_and_costs_no_earlier_file(made, tmp_path):
    (tmp_path / "rewards.py").write_text(
        "import signal\n\n\ndef f(prompts, responses):\n    signal.raise_signal(signal.SIGINT)\n"
    )
    before = {
        "ppo.pt": b"the result of an earlier run",
        "ppo.jsonl": b'{"step": 1, "of": "an earlier run"}\n',
    }
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    mine = flags(made, "ppo", tmp_path / "ppo.pt", reward="rewards:f")
    done = run_in_a_shell("ppo", mine, tmp_path)
    assert done.returncode == -signal.SIGINT
    assert error_line(done.stderr) == "error: interrupted; no file is half-written"
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("presses", [1, 2])
def test_one_ctrl_c_ends_the_run_after_the_step_and_a_second_one_at_once(made, tmp_path, presses):
    """Both in one line. In step 4: the rollout before the first step is the reward's first call."""
    (tmp_path / "rewards.py").write_text(
        "import signal\n\ncalls = []\n\n\n"
        "def f(prompts, responses):\n"
        "    calls.append(1)\n"
        f"    for _ in range({presses} if len(calls) == 5 else 0):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    return [float(len(response)) for response in responses]\n"
    )
    (tmp_path / "ppo.pt").write_bytes(b"the result of an earlier run")
    mine = flags(made, "ppo", tmp_path / "ppo.pt", reward="rewards:f", save_every=3)
    done = run_in_a_shell("ppo", mine, tmp_path)
    if presses == 1:
        expected = "stopped after step 4 of 6; --resume goes on from there"
        assert done.returncode == 1
    else:
        expected = "interrupted; no file is half-written"
        assert done.returncode == -signal.SIGINT
    assert error_line(done.stderr) == f"error: {expected}"
    assert (tmp_path / "ppo.pt").read_bytes() == b"the result of an earlier run"
    newest, _ = state_paths(tmp_path / "ppo.pt")
    assert read_torch(newest)["step"] == (4 if presses == 1 else 3)
    assert not list(tmp_path.glob("*.tmp*"))


# ---- damaged states


def replace_lr_factor(new):
    """Puts new where the stage of this process passes once a step; new gets the real one."""
    stage = stage_module()
    real = stage.lr_factor
    stage.lr_factor = lambda *args, **options: new(real, *args, **options)


def interrupt(n):
    """Ctrl-C in the n-th step."""
    calls = []

    def lr_factor(real, *args, **options):
        calls.append(args)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    replace_lr_factor(lr_factor)


def error_line(output):
    """The last line, if all of the output's errors are in it."""
    assert "Traceback" not in output and output.count("error: ") == 1, output
    return output.splitlines()[-1]


def flip_a_bit(content):
    """In the middle."""
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    return bytes(flipped)


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_reported_and_the_one_before_it_used_only_on_demand(
    made, tmp_path, uninterrupted, damage
):
    out = tmp_path / "sft.pt"
    mine = flags(made, "sft", out, save_every=1)
    code, output = run("sft", mine, (interrupt, 4))
    assert code == 1
    assert "stopped after step 4 of 6; --resume goes on" in error_line(output)
    newest, previous = state_paths(out)
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, output = run("sft", mine | dict(resume=True))
    assert code == 1 and f"{newest}: not a readable checkpoint" in error_line(output)
    assert error_line(output).endswith("--resume previous goes on from the state before it")
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, output = run("sft", mine | dict(resume="previous"), (interrupt, 1))
    assert code == 1 and f"resumed at step 3 from {previous}" in output
    assert "stopped after step 4" in error_line(output)
    # the damaged one took no good one's place
    assert [read_torch(path)["step"] for path in (newest, previous)] == [4, 3]
    assert run("sft", mine | dict(resume=True))[0] == 0
    assert is_same(out, uninterrupted("sft")[0])
    assert log(out) == log(uninterrupted("sft")[0])


def test_damage_to_the_older_state_stays_unnoticed(made, tmp_path, uninterrupted):
    out = tmp_path / "sft.pt"
    mine = flags(made, "sft", out, save_every=1)
    run("sft", mine, (interrupt, 4))
    state_paths(out)[1].write_bytes(b"")
    assert run("sft", mine | dict(resume=True))[0] == 0
    assert is_same(out, uninterrupted("sft")[0])


def test_where_both_states_are_gone_the_line_says_to_start_afresh(made, tmp_path):
    mine = flags(made, "sft", tmp_path / "sft.pt")
    for value in (True, "previous"):
        code, output = run("sft", mine | dict(resume=value))
        line = error_line(output)
        assert code == 1 and line.endswith("nothing to resume; leave --resume out")
    run("sft", mine, (interrupt, 1))
    newest, previous = state_paths(mine["out"])
    code, output = run("sft", mine | dict(resume="previous"))
    line = f"error: {previous}: no such file; --resume alone goes on from {newest}"
    assert code == 1 and error_line(output) == line
    newest.write_bytes(b"")
    code, output = run("sft", mine | dict(resume=True))
    assert code == 1 and error_line(output).endswith("start afresh, without --resume")
    newest.write_bytes((made / "sft.pt").read_bytes())
    code, output = run("sft", mine | dict(resume=True))
    assert code == 1 and "not a state of this run" in error_line(output)


# ---- two runs with one output


def tell_and_wait(connection):
    """Says that the first step has begun, and stays there."""

    def lr_factor(real, *args, **options):
        connection.send("in step 1")
        connection.recv()

    replace_lr_factor(lr_factor)


def test_a_second_run_with_the_same_output_is_refused_until_the_first_is_dead(
    made, tmp_path, uninterrupted
):
    mine = flags(made, "sft", tmp_path / "sft.pt")
    here, there = PROCESSES.Pipe()
    output = PROCESSES.Pipe(duplex=False)
    args = (command("sft", mine), (tell_and_wait, there), output[1])
    first = PROCESSES.Process(target=child, args=args, daemon=True)
    first.start()
    assert here.recv() == "in step 1"
    for changes in ({}, dict(data=made / "preferences.jsonl")):
        stage = "reward" if changes else "sft"
        code, output = run(stage, flags(made, stage, mine["out"]))
        assert code == 1 and "sft.jsonl: another run is writing it" in error_line(output)
    code, _ = run("sft", mine | dict(out=tmp_path / "other.pt"))
    assert code == 0
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert run("sft", mine)[0] == 0
    assert is_same(mine["out"], uninterrupted("sft")[0])


# ---- a full disk


def limit_file_size(n_bytes):
    """No file may grow beyond n_bytes: to a program it looks like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))


@pytest.mark.parametrize("stage", STAGES)
def test_where_the_state_does_not_fit_on_the_disk_all_that_was_there_stays(
    made, tmp_path, uninterrupted, stage
):
    out = tmp_path / f"{stage}.pt"
    out.write_bytes(b"the result of an earlier run")
    run(stage, flags(made, stage, out), (interrupt, 3))
    newest, _ = state_paths(out)
    state = newest.read_bytes()
    mine = flags(made, stage, out, resume=True)
    code, output = run(stage, mine, (limit_file_size, len(state) - 1))
    line = f"error: {newest}: cannot be written (File too large)"
    assert code == 1 and error_line(output).startswith(line)
    assert newest.read_bytes() == state
    assert out.read_bytes() == b"the result of an earlier run"
    assert not list(tmp_path.glob("*.tmp*"))
    assert run(stage, mine)[0] == 0
    assert is_same(out, uninterrupted(stage)[0])


@pytest.mark.parametrize("stage", STAGES)
def test_where_the_checkpoint_does_not_fit_on_the_disk_all_that_was_there_stays(
    made, tmp_path, uninterrupted, stage
):
    out = tmp_path / f"{stage}.pt"
    out.write_bytes(b"the result of an earlier run")
    size = uninterrupted(stage)[0].stat().st_size
    mine = flags(made, stage, out, save_every=100)
    code, output = run(stage, mine, (limit_file_size, size - 1))
    line = f"error: {out}: cannot be written (File too large)"
    assert code == 1 and error_line(output).startswith(line)
    assert out.read_bytes() == b"the result of an earlier run"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stage}.pt", f"{stage}.jsonl"}


def test_where_the_log_does_not_fit_on_the_disk_the_run_stops(made, tmp_path):
    mine = flags(made, "sft", tmp_path / "sft.pt")
    code, output = run("sft", mine, (limit_file_size, 50))
    assert code == 1
    assert "sft.jsonl: cannot be written (File too large)" in error_line(output)


# ---- too little memory


def test_a_batch_that_memory_cannot_hold_is_one_line_that_says_what_to_lower(made, tmp_path):
    out = tmp_path / "base.pt"
    out.write_bytes(b"the result of an earlier run")
    argv = command("pretrain", flags(made, "pretrain", out, batch_size=40_000))[1:]
    program = """import resource, pretrain
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)
pretrain.main()"""
    argv = [sys.executable, "-c", program, *argv]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    smaller = "--micro_batch_size or --batch_size or --seq_len or --block_size"
    line = f"error: out of memory; less is needed with a smaller {smaller}"
    assert error_line(done.stderr) == line
    assert out.read_bytes() == b"the result of an earlier run"


# ---- NaN


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_diverges_stops_in_one_line(made, tmp_path, stage):
    out = tmp_path / f"{stage}.pt"
    out.write_bytes(b"the result of an earlier run")
    changes = dict(muon_lr=1e30, warmup=0) if stage == "pretrain" else {}
    code, output = run(stage, flags(made, stage, out, lr=1e30, **changes))
    line = error_line(output)
    assert code == 1 and "not finite, on " in line and "start afresh with a lower --lr" in line
    assert out.read_bytes() == b"the result of an earlier run"


def poison(path, name, row):
    """NaN in a row of a matrix of the checkpoint at path, once it is loaded.

    A file with NaN in it would be refused.
    """
    stage = stage_module()
    real = stage.load_checkpoint

    def load_checkpoint(source, *args):
        model, tokenizer = real(source, *args)
        if str(source) == str(path):
            model.state_dict()[name][row] = torch.nan
        return model, tokenizer

    stage.load_checkpoint = load_checkpoint


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize(
    ("stage", "flag"), [("sft", "init"), ("reward", "init"), ("ppo", "init"), ("ppo", "reward")]
)
def test_nan_stops_the_run_at_its_step_and_names_the_lines(made, tmp_path, stage, flag, log_every):
    """NaN in the embedding of one character, which line 17 alone holds."""
    name = {"sft": "sft", "reward": "preferences", "ppo": "prompts"}[stage]
    lines = (made / f"{name}.jsonl").read_text().splitlines()
    lines[16] = lines[16].replace('"content": "', '"content": "Z', 1)
    # every second line is empty: it is now line 33
    (tmp_path / "data.jsonl").write_text("\n\n".join(lines))
    source, embedding = "sft", "embed.weight"
    if flag == "reward":
        source, embedding = "reward", "trunk.embed.weight"
    (character,) = load(made / "tokenizer.tiktoken").encode("Z")
    every = dict(eval_every=log_every)
    if stage == "ppo":
        every = dict(log_every=log_every, max_new_tokens=1)  # 1: no Z that is drawn is read
    mine = flags(made, stage, tmp_path / f"{stage}.pt", save_every=1, steps=18, **every)
    mine |= {"data": tmp_path / "data.jsonl"}
    fault = (poison, made / f"{source}.pt", embedding, character)
    code, output = run(stage, mine, fault)
    assert code == 1
    line = error_line(output)
    step = int(line.split("step ")[1].split(":")[0])
    rows = json.loads(line[line.index("[") : line.index("]") + 1])
    assert f"{tmp_path / 'data.jsonl'}, lines [" in line
    assert len(rows) == 4 and 33 in rows and all(row % 2 for row in rows)
    newest, _ = state_paths(mine["out"])
    assert read_torch(newest)["step"] == step - 1
    assert f"the state of step {step - 1} is good" in line
