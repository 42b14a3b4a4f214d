"""Runs stages one after the other in float32.

In bfloat16, rounding would hide a difference between one and two processes.

    torchrun --nproc_per_node=2 tests/in_float32.py '{"sft": {"init": "out/base.pt", …}, …}'
"""

import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
device = importlib.import_module("train.device")

device.computes_in_bfloat16 = lambda device: False
for module, flags in json.loads(sys.argv[1]).items():
    sys.argv = [f"{module}.py"] + [f"--{name}={value}" for name, value in flags.items()]
    importlib.import_module(module).main()
