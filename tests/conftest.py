import signal

import pytest
import torch
from hypothesis import settings

# The same examples in every run, and nothing remembered between runs: a planted bug's failures
# must not come back elsewhere.
settings.register_profile("threefold", deadline=None, derandomize=True, database=None)
settings.load_profile("threefold")
# A shell starts what it sends to the background deaf to Ctrl-C, and what that starts inherits it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def same_draws_in_every_run():
    torch.set_num_threads(1)  # these sizes only lose by more
    torch.manual_seed(0)
