"""What test_pretended_gpu.py asks about: the stages on a pretended GPU, all in one process.

python tests/pretended_runs.py FOLDER    # works in the folder, writes seen.json there
"""

import pretend  # isort: skip  before torch

import contextlib
import inspect
import io
import json
import signal
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(pretend.ROOT))
import tiny  # noqa: E402
import torch  # noqa: E402

import chat  # noqa: E402
import model  # noqa: E402
import ppo  # noqa: E402
import pretrain  # noqa: E402
import reward  # noqa: E402
import sft  # noqa: E402
import train.batches  # noqa: E402
import train.loop  # noqa: E402
from bench import gpu as bench_gpu  # noqa: E402
from forks import dpo, grpo  # noqa: E402
from train.device import setup  # noqa: E402

STAGES = dict(pretrain=pretrain, sft=sft, reward=reward, ppo=ppo, dpo=dpo, grpo=grpo)
NO_FLOAT64 = [torch.float64]  # as on Apple's MPS

# name: (owner, function, what it says, what the bug says, the stage that must notice)
UPLOAD = "to_device(torch.tensor(ended), scores.device)"
BUGS = {
    "a mask of the keys on the CPU": (
        model,
        "causal_mask",
        "torch.arange(n_keys, device=query_positions.device)",
        "torch.arange(n_keys)",
        "sft",
    ),
    "windows stay on the CPU": (
        pretrain,
        "read_windows",
        "to_device(torch.from_numpy(windows.astype(np.int64)), device)",
        "torch.from_numpy(windows.astype(np.int64))",
        "pretrain",
    ),
    "the copied reward model stays on the CPU": (
        reward,
        "from_gpt",
        "RewardModel(config).to(gpt.device)",
        "RewardModel(config)",
        "reward",
    ),
    "float64 on the device": (
        reward,
        "logprob_spread",
        "(chosen - rejected).square()",
        "(chosen - rejected).double().square()",
        "reward",
    ),
    "who has ended is on the CPU": (ppo, "rollout", UPLOAD, "torch.tensor(ended)", "ppo"),
    "advantages on the CPU": (
        ppo,
        "gae",
        "torch.zeros_like(values)",
        "torch.zeros(values.shape)",
        "ppo",
    ),
    "values of no critic on the CPU": (
        grpo,
        "no_critic",
        "torch.zeros(tokens.shape, device=tokens.device)",
        "torch.zeros(tokens.shape)",
        "grpo",
    ),
    # these run, and wait
    "minibatches by indices on the CPU": (
        ppo,
        "update",
        'to_device(torch.randperm(len(batch["mask"])), policy.device)',
        'torch.randperm(len(batch["mask"]))',
        "ppo",
    ),
    "uploads from pageable memory": (
        train.batches,
        "pad_rows",
        "return to_device(",
        "return torch.Tensor.to(",
        "sft",
    ),
}


@contextlib.contextmanager
def planted(owner, function, right, wrong):
    """The function with an edit of its source, while this is open."""
    real = inspect.unwrap(getattr(owner, function))
    source = textwrap.dedent(inspect.getsource(real))
    assert source.count(right) == 1, f"{function} no longer says `{right}` once: plant anew"
    edited = {}
    exec(source.replace(right, wrong), real.__globals__, edited)
    with mock.patch.object(owner, function, edited[function]):
        yield


def run(stage, flags):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        tiny.run(STAGES[stage], flags)
    return printed.getvalue()


def weights(flags):
    return torch.load(flags["out"], weights_only=True)["weights"]


def difference(one, other):
    """The largest of any number."""
    assert one.keys() == other.keys()
    return max((x - other[name]).abs().max().item() for name, x in one.items())


def waits_of(gpu, stage, flags):
    """[[kind, place, how often]] of a step that neither validates nor logs."""
    with pretend.counted_steps(gpu) as steps:
        run(stage, flags)
    return [[*where, n] for where, n in steps[-2].items()]


def interrupted_and_resumed(stage, flags):
    """The weights of a run that Ctrl-C ended after its first step, and that went on."""
    real = train.loop.Run.__iter__

    def with_interrupt(steps):
        for step in real(steps):
            if step == 1:
                signal.raise_signal(signal.SIGINT)
            yield step

    with mock.patch.object(train.loop.Run, "__iter__", with_interrupt):
        # chat.py leaves Ctrl-C to the system
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with contextlib.suppress(SystemExit):
            run(stage, flags)
    assert not flags["out"].exists()
    assert "resumed at step 2" in run(stage, flags | dict(resume="newest"))
    return weights(flags)


def talk(path, device):
    """What chat.py answers to two piped lines."""
    flags = dict(model=path, device=device, temperature=0, max_new_tokens=4)
    stdin = io.TextIOWrapper(io.BytesIO(b"hello\nand then?\n"))
    with (
        mock.patch.object(sys, "stdin", stdin),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        tiny.run(chat, flags)
    return printed.getvalue()


def bench(folder):
    """The document that `make gpu` writes, of tiny sizes."""
    document = folder / "gpu.md"
    document.write_text("before\n<!-- bench.gpu -->\nold\n<!-- end of bench.gpu -->\nafter\n")
    with contextlib.redirect_stdout(io.StringIO()):
        tiny.run(bench_gpu, dict(quick=True, out=document, shakespeare=folder))
    return document.read_text()


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    flags = tiny.stage_flags(folder)
    for stage, its in flags.items():  # that only the last step logs
        every = "log_every" if stage in ("ppo", "grpo") else "eval_every"
        its |= {"device": "cuda", "steps": 3, every: 100}
    seen = dict(waits={}, shown={}, differences={}, bugs={})

    with tiny.in_precision(torch.float32):
        for stage in STAGES:
            run(stage, flags[stage] | dict(device="cpu"))
            on_cpu = weights(flags[stage])
            with pretend.active(NO_FLOAT64) as gpu:
                seen["waits"][stage] = waits_of(gpu, stage, flags[stage])
            seen["differences"][stage] = difference(on_cpu, weights(flags[stage]))
        answers = talk(flags["ppo"]["init"], "cpu")
        with pretend.active(NO_FLOAT64):
            seen["answers"] = talk(flags["ppo"]["init"], "cuda"), answers

    with pretend.active(NO_FLOAT64) as gpu:
        # in bfloat16
        for stage in STAGES:
            seen["shown"][stage] = len(run(stage, flags[stage] | dict(show=True)))
        run("sft", flags["sft"])
        whole = weights(flags["sft"])
        flags["sft"]["out"].unlink()
        resumed = interrupted_and_resumed("sft", flags["sft"])
        seen["differences"]["resumed"] = difference(resumed, whole)
        with mock.patch.object(torch.cuda, "set_device") as set_device:
            setup(SimpleNamespace(device="cuda:1", seed=0))
        seen["current_device"] = set_device.call_args.args[0]

        seen["bench"] = bench(folder)
        for name, (*bug, stage) in BUGS.items():
            with planted(*bug):
                try:
                    waits = waits_of(gpu, stage, flags[stage] | dict(steps=2))
                    seen["bugs"][name] = sum(n for _, _, n in waits)
                except (RuntimeError, TypeError) as e:
                    seen["bugs"][name] = str(e)
    (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
