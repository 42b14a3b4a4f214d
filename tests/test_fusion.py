"""What --compile does on a GPU, as far as a machine without one can tell."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from torch._inductor.graph import GraphLowering

import sft
import train.device
from model import KVCache
from utils.cli import parse_config

no_driver = "the pretended GPU needs g++" if not shutil.which("g++") else ""
if torch.version.cuda:
    no_driver = "the pretended GPU needs a CPU build of torch"


needs_driver = pytest.mark.skipif(bool(no_driver), reason=no_driver)
has_compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(
    not has_compiler, reason="torch.compile on a CPU needs a C++ compiler"
)


@pytest.fixture(scope="module")
def traced():
    """What fusion_on_cuda.py prints."""
    script = Path(__file__).with_name("fusion_on_cuda.py")
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@needs_driver
def test_on_cuda_attention_is_one_kernel_in_every_layer(traced):
    """In training and generation under bfloat16 autocast; with pads, grouped queries, qk_norm.

    A causal kernel without a mask where there are neither pads nor a cache.
    """
    counts = traced["attentions"]
    assert len(counts) == 6
    assert counts == dict.fromkeys(counts, 2)


@needs_driver
@pytest.mark.parametrize("stage", ["pretraining", "fine_tuning", "ppo_logprobs"])
def test_on_cuda_the_loss_is_compiled_with_the_model(traced, stage):
    """One graph from the weights to the loss, and nothing after it.

    Of the logits it keeps one copy for the backward pass, in bfloat16. GPT-2's in float32, for
    16 x 1024 tokens, would be 3.3 GB each.
    """
    operations, kept_logits = traced["losses"][stage]
    assert operations == ["CompiledFunctionBackward"]
    assert kept_logits == ["torch.bfloat16"]


# ---- the KV cache


class FarEnough(Exception):
    """The code is written; compiling it would take 20 s more."""


def generated_code(function, *args):
    """The code that the inductor writes for one graph."""
    codes = []

    def stop(code):
        codes.append(code)
        raise FarEnough

    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False),
        mock.patch.object(GraphLowering, "save_output_code", stop),
        pytest.raises(Exception, match="FarEnough"),  # the compiler wraps it
    ):
        torch.compile(function, fullgraph=True)(*args)
    return codes[0]


@needs_compiler
def test_decoding_a_token_updates_the_cache_in_place():
    """No buffer of the generated code is as large as a layer's keys, so that none is a copy."""
    B, S = 4, 32
    model = tiny.gpt(n_kv_head=2)
    cache = KVCache(model.config, B, S, torch.bfloat16, tiny.CPU)
    tokens, n_pad = torch.randint(11, (B, 1)), torch.arange(B)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        code = generated_code(model.next_logits, tokens, n_pad, cache, torch.tensor([5]))
    # made by the code itself, and by PyTorch's kernels that it calls
    made = re.findall(r"(?:empty_strided\w*\(|assert_size_stride\(buf\d+, )\(([\d, ]+)\)", code)
    sizes = [math.prod(map(int, re.findall(r"\d+", shape))) for shape in made]
    assert len(sizes) >= 10
    assert max(sizes) < cache.k[0].numel()


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
