"""Runs that are killed, starved of disk or fed NaN: they end in one line, lose nothing, and resume bit-identical."""

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

import common
import loop
import sft
from data.tokenizer import load, train_bpe
from model import GPT, GPTConfig
from reward import RewardModel

ROOT = Path(__file__).parent.parent
STAGES = ["pretrain", "sft", "reward", "ppo"]
PROCESSES = multiprocessing.get_context("forkserver")  # processes of their own, that need not import torch again
PROCESSES.set_forkserver_preload(["__main__", "torch._dynamo", *STAGES, "tests.test_faults"])  # the optimizers need dynamo


# ---- small runs


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with untrained checkpoints and data of random words."""
    folder, rng = tmp_path_factory.mktemp("made"), random.Random(0)
    torch.manual_seed(0)  # whichever test comes first

    def words():
        return " ".join(rng.choice(["red", "blue", "green", "one", "two", "three"]) for _ in range(rng.randint(1, 6)))

    def user():
        return [{"role": "user", "content": words()}]

    tokenizer = train_bpe([words() for _ in range(99)], 270)
    sizes = dict(vocab_size=tokenizer.vocab_size, block_size=32, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, n_inner=32, tied=False)
    model = GPT(GPTConfig(**sizes))
    common.save_checkpoint(folder / "sft.pt", "sft", model, tokenizer, sft.Config())
    common.save_checkpoint(folder / "reward.pt", "reward", RewardModel(model.config), tokenizer, sft.Config())
    common.write_text(folder / "tokenizer.tiktoken", tokenizer.dumps())
    for name in ("train", "val"):
        np.array([rng.randrange(265) for _ in range(2000)], np.uint16).tofile(folder / f"{name}.bin")
    common.write_jsonl(folder / "sft.jsonl", [{"messages": user() + [{"role": "assistant", "content": words()}]} for _ in range(40)])
    pairs = [{"messages": user(), "chosen": words(), "rejected": "no"} for _ in range(40)]
    common.write_jsonl(folder / "preferences.jsonl", pairs)
    common.write_jsonl(folder / "prompts.jsonl", [{"messages": user()} for _ in range(40)])
    return folder


def flags(made, stage, out, **changes):
    of_stage = {
        "pretrain": dict(data=made, block_size=16, context=32, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, warmup=2, eval_every=2),
        "sft": dict(init=made / "sft.pt", data=made / "sft.jsonl", eval_every=2),
        "reward": dict(init=made / "sft.pt", data=made / "preferences.jsonl", eval_every=2, calibration=4, max_new_tokens=4),
        "ppo": dict(init=made / "sft.pt", reward=made / "reward.pt", data=made / "prompts.jsonl", minibatch_size=2, epochs=2,
                    max_new_tokens=4, val_prompts=4, log_every=2, kl_target=1.0),
    }[stage]  # fmt: skip
    return of_stage | dict(steps=6, batch_size=4, save_every=2, device="cpu", out=out) | changes


def command(stage, flags):
    return [f"{stage}.py", *(str(x) for name, value in flags.items() for x in ([f"--{name}"] if value is True else [f"--{name}", value]))]


def child(argv, fault, output):
    """In a process of its own: the stage's main with the fault. What it prints goes to the connection output."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = argv
    if fault:
        fault[0](*fault[1:])
    __import__(argv[0].removesuffix(".py")).main()


def run(stage, flags, fault=None):
    """The exit code of a stage that meets the fault (a function that brings it about, and its arguments), and what it printed."""
    here, there = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=child, args=(command(stage, flags), fault, there))
    process.start()
    there.close()
    with open(here.fileno(), closefd=False) as f:
        output = f.read()
    process.join()
    return process.exitcode, output


def weights(path):
    return common.read_torch(path)["weights"]


def log(path):
    """The log's records without the figures that measure time."""
    records = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds" and not k.endswith(("_s", "per_s"))} for r in records]


def is_same(a, b):
    return weights(a).keys() == weights(b).keys() and all(torch.equal(weights(a)[name], weights(b)[name]) for name in weights(a))


# ---- kill -9 at any moment


class Moments:
    """Kills this process with SIGKILL at the n-th event of a kind, or counts the events of all kinds.

    calls: of functions, Python's or C's.  bytes: written to files.  operations: opening, renaming, removing a file.
    """

    def __init__(self, kind=None, n=0, report=None):
        self.kind, self.n, self.counts = kind, n, dict(calls=0, bytes=0, operations=0)
        real_open = loop.Log.open

        def begin(*args):  # nothing is written before
            if kind in (None, "calls"):
                sys.setprofile(lambda frame, event, argument: event in ("call", "c_call") and self.count("calls"))
            sys.addaudithook(lambda event, arguments: event in ("open", "os.rename", "os.remove") and self.count("operations"))
            common.open = loop.open = self.open
            return real_open(*args)

        loop.Log.open = begin
        if report:
            real_save = common.save_checkpoint

            def save(*args, **made_by):
                real_save(*args, **made_by)
                sys.setprofile(None)
                Path(report).write_text(json.dumps(self.counts))

            common.save_checkpoint = save

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
        return io.BufferedRandom(File(path, "ab+")) if "a" in mode else io.BufferedWriter(File(path, mode))


@pytest.fixture(scope="module")
def uninterrupted(made):
    """{stage: (its checkpoint, how many events of each kind its run has)}, each made when first asked for."""
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
        states = [path for path in common.state_paths(out) if path.exists()]
        resume = dict(resume=True) if states else {}
        kind = rng.choice(kinds)
        fault = (Moments, kind, rng.randint(1, counts[kind])) if i < kills else None
        code, output = run(stage, flags(made, stage, out, **resume), fault)
        assert code == (-signal.SIGKILL if i == 0 else 0) or (code == -signal.SIGKILL and fault), (fault, output)
        if code == 0:
            break
        assert out.read_bytes() == b"the result of an earlier run" or is_same(out, reference)
        for path in common.state_paths(out):
            assert not path.exists() or common.read_torch(path)["step"] in (2, 4)
    assert is_same(out, reference)
    assert log(out) == log(reference)
    assert {path.name for path in tmp_path.iterdir()} == {f"{stage}.pt", f"{stage}.jsonl"}


@pytest.mark.parametrize("kind", ["calls", "bytes"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(made, tmp_path, uninterrupted, stage, kind):
    kill_and_resume(made, tmp_path, uninterrupted, stage, 0, [kind], kills=1)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 21))
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_again_and_again_resumes_to_the_same_bits(made, tmp_path, uninterrupted, stage, seed):
    kill_and_resume(made, tmp_path, uninterrupted, stage, seed, ["calls", "bytes", "operations"], kills=3)


def kill_between_the_renames():
    """When the state before has made way and the new one is not yet in its place."""

    def kill(event, arguments):
        if event == "os.rename" and str(arguments[1]).endswith(".resume") and Path(f"{arguments[1]}.previous").exists():
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill)


def test_a_kill_between_two_renames_leaves_a_state_to_resume_from(made, tmp_path, uninterrupted):
    out = tmp_path / "sft.pt"
    assert run("sft", flags(made, "sft", out), (kill_between_the_renames,))[0] == -signal.SIGKILL
    newest, previous = common.state_paths(out)
    assert previous.exists() and not newest.exists()
    code, output = run("sft", flags(made, "sft", out, resume=True))
    assert code == 0 and "resumed at step 2" in output
    assert is_same(out, uninterrupted("sft")[0])


def test_ctrl_c_before_the_first_step_is_one_line_and_costs_no_earlier_file(made, tmp_path):
    (tmp_path / "rewards.py").write_text("import signal\n\n\ndef f(prompts, responses):\n    signal.raise_signal(signal.SIGINT)\n")
    before = {"ppo.pt": b"the result of an earlier run", "ppo.jsonl": b'{"step": 1, "of": "an earlier run"}\n'}
    for name, content in before.items():
        (tmp_path / name).write_bytes(content)
    argv = command("ppo", flags(made, "ppo", tmp_path / "ppo.pt", reward="rewards:f"))[1:]
    done = subprocess.run([sys.executable, ROOT / "ppo.py", *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and error_line(done.stderr) == "error: interrupted; no file is half-written"
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


# ---- damaged states


def interrupt(n):
    """Ctrl-C in the n-th step."""
    real, calls = common.lr_factor, []

    def lr_factor(*args):
        calls.append(args)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    common.lr_factor = lr_factor


def error_line(output):
    """The last line, if all of the output's errors are in it."""
    assert "Traceback" not in output and output.count("error: ") == 1, output
    return output.splitlines()[-1]


DAMAGES = {
    "a flipped bit": lambda content: content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 1]) + content[len(content) // 2 + 1 :],
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_reported_and_the_one_before_it_used_only_on_demand(made, tmp_path, uninterrupted, damage):
    out = tmp_path / "sft.pt"
    mine = flags(made, "sft", out, save_every=1)
    code, output = run("sft", mine, (interrupt, 4))
    assert code == 1 and "stopped after step 4 of 6; the same command with --resume" in error_line(output)
    newest, previous = common.state_paths(out)
    newest.write_bytes(DAMAGES[damage](newest.read_bytes()))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, output = run("sft", mine | dict(resume=True))
    assert code == 1 and f"{newest}: not a readable checkpoint" in error_line(output)
    assert error_line(output).endswith("--resume previous goes on from the state before it")
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, output = run("sft", mine | dict(resume="previous"), (interrupt, 1))
    assert code == 1 and f"resumed at step 3 from {previous}" in output and "stopped after step 4" in error_line(output)
    assert [common.read_torch(path)["step"] for path in (newest, previous)] == [4, 3]  # the damaged one took no good one's place
    assert run("sft", mine | dict(resume=True))[0] == 0
    assert is_same(out, uninterrupted("sft")[0]) and log(out) == log(uninterrupted("sft")[0])


def test_damage_to_the_older_state_stays_unnoticed(made, tmp_path, uninterrupted):
    out = tmp_path / "sft.pt"
    mine = flags(made, "sft", out, save_every=1)
    run("sft", mine, (interrupt, 4))
    common.state_paths(out)[1].write_bytes(b"")
    assert run("sft", mine | dict(resume=True))[0] == 0
    assert is_same(out, uninterrupted("sft")[0])


def test_where_both_states_are_gone_the_line_says_to_start_afresh(made, tmp_path):
    mine = flags(made, "sft", tmp_path / "sft.pt")
    for value in (True, "previous"):
        code, output = run("sft", mine | dict(resume=value))
        assert code == 1 and error_line(output).endswith("nothing to resume; give the same command without --resume")
    run("sft", mine, (interrupt, 1))
    newest, previous = common.state_paths(mine["out"])
    code, output = run("sft", mine | dict(resume="previous"))
    assert code == 1 and error_line(output) == f"error: {previous}: no such file; --resume alone goes on from {newest}"
    newest.write_bytes(b"")
    code, output = run("sft", mine | dict(resume=True))
    assert code == 1 and error_line(output).endswith("start afresh, without --resume")
    newest.write_bytes((made / "sft.pt").read_bytes())
    code, output = run("sft", mine | dict(resume=True))
    assert code == 1 and "no state of this run" in error_line(output)


# ---- two runs with one output


def tell_and_wait(connection):
    """Says that the first step has begun, and stays there."""

    def lr_factor(*args):
        connection.send("in step 1")
        connection.recv()

    common.lr_factor = lr_factor


def test_a_second_run_with_the_same_output_is_refused_until_the_first_is_dead(made, tmp_path, uninterrupted):
    mine = flags(made, "sft", tmp_path / "sft.pt")
    here, there = PROCESSES.Pipe()
    output = PROCESSES.Pipe(duplex=False)
    first = PROCESSES.Process(target=child, args=(command("sft", mine), (tell_and_wait, there), output[1]), daemon=True)
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
def test_where_the_state_does_not_fit_on_the_disk_all_that_was_there_stays(made, tmp_path, uninterrupted, stage):
    out = tmp_path / f"{stage}.pt"
    out.write_bytes(b"the result of an earlier run")
    run(stage, flags(made, stage, out), (interrupt, 3))
    newest, _ = common.state_paths(out)
    state = newest.read_bytes()
    code, output = run(stage, flags(made, stage, out, resume=True), (limit_file_size, len(state) - 1))
    assert code == 1 and error_line(output).startswith(f"error: {newest}: cannot be written (File too large)")
    assert newest.read_bytes() == state and out.read_bytes() == b"the result of an earlier run"
    assert not list(tmp_path.glob("*.tmp*"))
    assert run(stage, flags(made, stage, out, resume=True))[0] == 0
    assert is_same(out, uninterrupted(stage)[0])


@pytest.mark.parametrize("stage", STAGES)
def test_where_the_checkpoint_does_not_fit_on_the_disk_all_that_was_there_stays(made, tmp_path, uninterrupted, stage):
    out = tmp_path / f"{stage}.pt"
    out.write_bytes(b"the result of an earlier run")
    size = uninterrupted(stage)[0].stat().st_size
    code, output = run(stage, flags(made, stage, out, save_every=100), (limit_file_size, size - 1))
    assert code == 1 and error_line(output).startswith(f"error: {out}: cannot be written (File too large)")
    assert out.read_bytes() == b"the result of an earlier run"
    assert {path.name for path in tmp_path.iterdir()} == {f"{stage}.pt", f"{stage}.jsonl"}


def test_where_the_log_does_not_fit_on_the_disk_the_run_stops(made, tmp_path):
    code, output = run("sft", flags(made, "sft", tmp_path / "sft.pt"), (limit_file_size, 150))
    assert code == 1 and "sft.jsonl: cannot be written (File too large)" in error_line(output)


# ---- too little memory


def test_a_batch_that_memory_cannot_hold_is_one_line_that_says_what_to_lower(made, tmp_path):
    out = tmp_path / "base.pt"
    out.write_bytes(b"the result of an earlier run")
    argv = command("pretrain", flags(made, "pretrain", out, batch_size=40_000))[1:]
    program = """import resource, pretrain
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)
pretrain.main()"""
    done = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert error_line(done.stderr) == "error: out of memory; less is needed with a smaller --batch_size or --block_size"
    assert out.read_bytes() == b"the result of an earlier run"


# ---- NaN


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_diverges_stops_in_one_line(made, tmp_path, stage):
    out = tmp_path / f"{stage}.pt"
    out.write_bytes(b"the result of an earlier run")
    changes = dict(muon_lr=1e30, warmup=0) if stage == "pretrain" else {}
    code, output = run(stage, flags(made, stage, out, lr=1e30, **changes))
    assert code == 1 and "not finite, on " in error_line(output) and "start afresh with a lower --lr" in error_line(output)
    assert out.read_bytes() == b"the result of an earlier run"


def poison(path, name, row):
    """NaN in a row of a matrix of the checkpoint at path, once it is loaded: a file with NaN in it would be refused."""
    real = common.load_checkpoint

    def load_checkpoint(source, *args):
        model, tokenizer = real(source, *args)
        if str(source) == str(path):
            model.state_dict()[name][row] = torch.nan
        return model, tokenizer

    common.load_checkpoint = load_checkpoint


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize(("stage", "flag"), [("sft", "init"), ("reward", "init"), ("ppo", "init"), ("ppo", "reward")])
def test_nan_stops_the_run_at_its_step_and_names_the_lines(made, tmp_path, stage, flag, log_every):
    """NaN in the embedding of one character, which line 17 alone holds."""
    name = {"sft": "sft", "reward": "preferences", "ppo": "prompts"}[stage]
    lines = (made / f"{name}.jsonl").read_text().splitlines()
    lines[16] = lines[16].replace('"content": "', '"content": "Z', 1)
    (tmp_path / "data.jsonl").write_text("\n\n".join(lines))  # every second line is empty: it is now line 33
    source, embedding = ("reward", "trunk.embed.weight") if flag == "reward" else ("sft", "embed.weight")
    (character,) = load(made / "tokenizer.tiktoken").encode("Z")
    every = dict(log_every=log_every, max_new_tokens=1) if stage == "ppo" else dict(eval_every=log_every)  # 1: no drawn Z is read
    mine = flags(made, stage, tmp_path / f"{stage}.pt", save_every=1, steps=18, **every)
    mine |= {"data": tmp_path / "data.jsonl"}
    code, output = run(stage, mine, (poison, made / f"{source}.pt", embedding, character))
    assert code == 1
    line = error_line(output)
    step, rows = int(line.split("step ")[1].split(":")[0]), json.loads(line[line.index("[") : line.index("]") + 1])
    assert len(rows) == 4 and 33 in rows and all(row % 2 for row in rows)
    assert common.read_torch(common.state_paths(mine["out"])[0])["step"] == step - 1
    assert f"last state is good, of step {step - 1}" in line
