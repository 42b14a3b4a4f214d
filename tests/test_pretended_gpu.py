"""The stages on a GPU, without one: pretend.py is the device, pretended_runs.py runs them on it.

That process loads the device before torch, which this one cannot.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

from bench import gpu
from train.device import report_uncaught

TESTS = Path(__file__).parent
# How often the host may wait for the device in a step; PPO's once more for each token.
MOST_WAITS = dict(pretrain=1, sft=1, reward=3, dpo=4, ppo=30, grpo=30)
MAX_NEW_TOKENS = 4  # of tiny.stage_flags


def test_lack_of_memory_on_a_mac_is_one_line(capsys):
    """There it is a plain RuntimeError."""
    error = RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB, max allowed: 9 GB)")
    config = SimpleNamespace(micro_batch_size=0)
    report_uncaught(config, RuntimeError, error, None)
    expected = "error: out of memory; less is needed with a smaller --micro_batch_size\n"
    assert capsys.readouterr().err == expected


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("no g++, which builds the pretended GPU")
    if torch.version.cuda or not torch.__version__.startswith("2.13"):
        pytest.skip(f"torch {torch.__version__}: the pretended GPU is for a CPU build of 2.13")
    folder = tmp_path_factory.mktemp("pretended")
    command = [sys.executable, TESTS / "pretended_runs.py", folder]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize("stage", MOST_WAITS)
def test_a_stage_ends_on_a_gpu_as_on_the_cpu(seen, stage):
    """In float32 with the same random numbers: three steps, which move weights by 0.01 each."""
    assert seen["differences"][stage] < 1e-4


def test_chat_says_on_a_gpu_what_it_says_on_the_cpu(seen):
    on_gpu, on_cpu = seen["answers"]
    assert on_gpu == on_cpu and len(on_gpu.splitlines()) == 2


def test_a_resumed_run_on_a_gpu_ends_like_one_that_was_not_interrupted(seen):
    assert seen["differences"]["resumed"] == 0


@pytest.mark.parametrize("stage", MOST_WAITS)
def test_a_gpu_shows_what_it_trains_on(seen, stage):
    assert seen["shown"][stage] > 200  # characters


@pytest.mark.parametrize("stage", MOST_WAITS)
def test_the_host_seldom_waits_for_the_gpu(seen, stage):
    waits = seen["waits"][stage]
    most = MOST_WAITS[stage] + MAX_NEW_TOKENS * (stage in ("ppo", "grpo"))
    assert sum(n for _, _, n in waits) <= most, waits


def test_the_second_gpu_becomes_the_current_one(seen):
    """Of which memory figures, streams and the support of bfloat16 are asked."""
    assert seen["current_device"] == 1


def test_the_bench_of_a_gpu_replaces_its_figures_and_nothing_else(seen):
    before, block, after = re.split("<!-- .*bench.gpu -->", seen["bench"])
    assert (before, after) == ("before\n", "\nafter\n") and "old" not in block
    assert "Pretended H100, 80.0 GB" in block
    header, _, *rows = [line for line in block.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in [header, *rows]} == {7}
    kinds = [re.match(r"\| ([\w ]+)", row)[1].split()[0] for row in rows]
    assert kinds == ["pretraining"] * 2 + ["attention", "generation", "PPO", "tiny"]
    assert not re.search(r"\bnan\b", block)


def test_without_a_gpu_the_bench_is_one_line_and_writes_nothing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit, match="^error: no CUDA GPU on this machine"):
        tiny.run(gpu, dict(out=tmp_path / "gpu.md"))
    assert not list(tmp_path.iterdir())


ERRORS = [
    "a mask of the keys on the CPU",
    "windows stay on the CPU",
    "the copied reward model stays on the CPU",
    "who has ended is on the CPU",
    "advantages on the CPU",
    "values of no critic on the CPU",
]


@pytest.mark.parametrize("bug", ERRORS)
def test_a_tensor_on_the_wrong_device_is_an_error(seen, bug):
    assert "on the CPU" in str(seen["bugs"][bug])


def test_float64_is_an_error_where_the_device_has_none(seen):
    assert "float64" in str(seen["bugs"]["float64 on the device"])


def test_planted_waits_exceed_what_is_allowed(seen):
    ppo = seen["bugs"]["minibatches by indices on the CPU"]
    assert ppo > MOST_WAITS["ppo"] + MAX_NEW_TOKENS
    assert seen["bugs"]["uploads from pageable memory"] > MOST_WAITS["sft"]
