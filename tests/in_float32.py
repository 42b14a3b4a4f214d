"""Runs stages one after the other in float32: in bfloat16, rounding would hide a difference between 1 and 2 processes.

    torchrun --nproc_per_node=2 tests/in_float32.py '{"sft": {"init": "out/base.pt", …}, …}'
"""

import contextlib
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import common

common.autocast = lambda device: contextlib.nullcontext()
for module, flags in json.loads(sys.argv[1]).items():
    sys.argv = [f"{module}.py"] + [f"--{name}={value}" for name, value in flags.items()]
    importlib.import_module(module).main()
