"""What --compile does on a GPU, as far as a machine without one can tell."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sft
import train.device
from utils.cli import parse_config

no_driver = "the pretended GPU needs g++" if not shutil.which("g++") else ""
if torch.version.cuda:
    no_driver = "the pretended GPU needs a CPU build of torch"


@pytest.mark.skipif(bool(no_driver), reason=no_driver)
def test_on_cuda_attention_is_one_kernel_in_every_layer():
    """In training and generation under bfloat16 autocast; with pads, grouped queries, qk_norm.

    A causal kernel without a mask where there are neither pads nor a cache.
    """
    script = Path(__file__).with_name("fusion_on_cuda.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    counts = json.loads(result.stdout.splitlines()[-1])
    assert len(counts) == 6
    assert counts == dict.fromkeys(counts, 2)


@pytest.mark.parametrize(
    ("device", "flags", "expected"),
    [
        ("cuda", [], True),
        ("cuda:1", [], True),
        ("cpu", [], False),
        ("mps", [], False),
        ("cuda", ["--no-compile"], False),
        ("cpu", ["--compile"], True),
    ],
)
def test_compiling_is_the_default_on_cuda_alone(monkeypatch, device, flags, expected):
    monkeypatch.setattr(train.device, "has_triton", lambda: True)
    config = parse_config(sft.Config, "", flags)
    assert train.device.should_compile(config, torch.device(device)) is expected


@pytest.mark.parametrize("flags", [[], ["--compile"]])
def test_without_triton_as_on_windows_a_gpu_runs_uncompiled_and_says_so(monkeypatch, capsys, flags):
    monkeypatch.setattr(train.device, "has_triton", lambda: False)
    config = parse_config(sft.Config, "", flags)
    assert train.device.should_compile(config, torch.device("cuda")) is False
    assert capsys.readouterr().out.count("\n") == 1
