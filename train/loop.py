"""The steps of a training run: progress bar, log, Ctrl-C, and the states that --resume reads.

Every batch is a pure function of (seed, step), so a state needs no data position and no random
numbers: weights, optimizers and the number of steps are all.
"""

import contextlib
import glob
import json
import math
import os
import re
import signal
import time
from pathlib import Path

import torch
from tqdm import tqdm

from train import parallel
from train.checkpoint import read_torch, state_paths
from utils.cli import die
from utils.files import atomic, writing

try:
    import fcntl
except ImportError:  # Windows: there a second run that writes the same output is not refused
    fcntl = None

# Flags that a resumed run may change.
FREE_FLAGS = {"resume", "save_every", "log_every", "eval_every", "device", "micro_batch_size"}
CHECK_EVERY = 10  # steps between looks at the gradient norms: each look waits for the GPU


class Run:
    """Iterating over a Run yields the steps that are left to do.

    models, optimizers: lists of what changes during the run.
    batches: has source(step), for the line that says which data a loss was not finite on.
    state: further numbers that change during the run; read and write them as run.state.

    All of them are saved to <out>.resume each save_every steps, and at Ctrl-C, which ends the run
    after the current step. --resume continues from there, exactly.
    """

    def __init__(self, config, steps, models, optimizers, batches, **state):
        self.config, self.steps, self.batches, self.state = config, steps, batches, state
        self.parts = [*models, *optimizers]
        self.settings = {k: v for k, v in vars(config).items() if k not in FREE_FLAGS}
        self.newest, self.previous = state_paths(config.out)
        self.log_path = log_path(config.out)
        self.grad_norms = []  # those not yet looked at, on the device
        self.saved = self.first_step = self.load_state() if config.resume else 0
        self.start = time.time()
        self.log_file = open_log(self.log_path, self.first_step)
        if parallel.rank == 0:
            self.remove_leftovers()
        for model in models:
            parallel.broadcast_weights(model)

    # ---- the steps

    def __iter__(self):
        interrupted = []

        def on_interrupt(signum, frame):
            interrupted.append(True)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one gets through

        before = signal.getsignal(signal.SIGINT)
        if before in (signal.default_int_handler, signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGINT, on_interrupt)  # else Ctrl-C is a debugger's
        first, steps, hide = self.first_step, self.steps, parallel.rank > 0 or None
        bar = tqdm(total=steps, initial=first, desc=self.log_path.stem, disable=hide)
        try:
            for step in range(first, steps):
                yield step
                bar.update()
                # a signal may reach the processes in different steps
                stop = parallel.all_reduce_sum(torch.tensor(len(interrupted))).item()
                last = step + 1 == steps
                save = stop or ((step + 1) % self.config.save_every == 0 and not last)
                on_gpu = any(norm.device.type != "cpu" for norm in self.grad_norms)
                if save or last or not on_gpu or len(self.grad_norms) >= CHECK_EVERY:
                    self.check_grad_norms(step)
                if save:
                    self.save_state(step + 1)
                if stop:
                    # torchrun kills the others when one exits: wait for the save
                    parallel.all_reduce_sum(torch.zeros(1))
                    die(f"stopped after step {step + 1} of {steps}; --resume goes on from there")
        finally:
            bar.close()
            signal.signal(signal.SIGINT, before)

    def watch(self, grad_norm):
        """Notes a step's gradient norm: one that is not finite ends the run before it is saved."""
        self.grad_norms.append(torch.as_tensor(grad_norm))

    def check_grad_norms(self, step):
        if self.grad_norms:
            finite = torch.stack(self.grad_norms).isfinite().tolist()
            if not all(finite):
                self.stop(step + 2 - len(finite) + finite.index(False), "gradient")
            self.grad_norms.clear()

    @contextlib.contextmanager
    def sampling(self, step):
        """Around what generates after so many steps: logits that are not finite end the run."""
        try:
            yield
        except FloatingPointError:
            self.stop(step, "logits of the next token")

    # ---- the log

    def is_due(self, step, every):
        """Whether to log after this step: each so many steps, and after the last."""
        return (step + 1) % every == 0 or step + 1 == self.steps

    def seconds(self):
        """How long this process has been running the steps."""
        return time.time() - self.start

    def log(self, step, **metrics):
        """Writes one JSON object to <out without suffix>.jsonl, and a line to the terminal."""
        floats = {k: v for k, v in metrics.items() if isinstance(v, float)}
        if wrong := [name for name, value in floats.items() if not math.isfinite(value)]:
            self.stop(step, ", ".join(wrong))
        record = dict(step=step, seconds=round(self.seconds(), 2), **metrics)
        with writing(self.log_path):
            self.log_file.write(json.dumps(record).encode() + b"\n")
            self.log_file.flush()
        shown = [f"{k} {v:.4g}" if k in floats else f"{k} {v}" for k, v in metrics.items()]
        tqdm.write(f"step {step:5d}  {'  '.join(shown)}")

    def stop(self, step, names):
        """Ends the run: after so many steps, the named numbers are not finite."""
        source = self.batches.source(max(step - 1, 0))
        state = f"the state of step {self.saved} is good" if self.saved else "no state was saved"
        remedy = "mend the data and --resume, or start afresh with a lower --lr"
        die(f"step {step}: {names} not finite, on {source}; {state}: {remedy}")

    # ---- the states

    def save_state(self, step):
        parts = [part.state_dict() for part in self.parts]
        content = dict(step=step, settings=self.settings, parts=parts, state=self.state)
        if parallel.rank == 0:
            with atomic(self.newest, keep=self.previous) as f:
                torch.save(content, f)
        self.saved = step

    def load_state(self):
        """Restores the state that --resume asks for. Returns how many steps it has done."""
        newest, previous = self.newest, self.previous
        if not newest.exists() and not previous.exists():
            die(f"{newest}: no such file, nothing to resume; leave --resume out")
        path, remedy = newest, "start afresh, without --resume"
        if self.config.resume == "previous" or not newest.exists():
            path = previous  # a kill between the two renames of a save leaves no newest
        elif previous.exists():
            remedy = "--resume previous goes on from the state before it"
        if not path.exists():
            die(f"{path}: no such file; --resume alone goes on from {newest}")
        saved = read_torch(path, remedy)
        try:
            changed = [k for k, v in self.settings.items() if saved["settings"].get(k) != v]
            if not changed:
                for part, content in zip(self.parts, saved["parts"], strict=True):
                    part.load_state_dict(content)
                self.state = {name: saved["state"][name] for name in self.state}
            step = int(saved["step"])
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as e:
            reason = str(e).splitlines()[-1].strip()
            die(f"{path}: not a state of this run ({reason}); start afresh, without --resume")
        if changed:
            flags = ", --".join(changed)
            die(f"{path}: made with another --{flags}; resume with the same, or start afresh")
        print(f"resumed at step {step} from {path}")
        return step

    def remove_leftovers(self):
        """Removes what killed runs left here. Nobody else writes this output: the log is locked."""
        for path in (Path(self.config.out), self.newest):
            for leftover in path.parent.glob(f"{glob.escape(path.name)}.tmp[0-9]*"):
                leftover.unlink()
        if self.config.resume == "previous":
            self.newest.unlink(missing_ok=True)  # else the next save would push the good one out
        if self.newest.exists() and not self.config.resume:
            print(
                f"{self.newest}: left by an interrupted run; this run starts afresh, replacing it"
            )


def log_path(out):
    if not Path(out).name or os.path.isdir(out) or Path(out).suffix == ".jsonl":
        die(f"--out {out}: must name a checkpoint, such as out/mine.pt; the log is out/mine.jsonl")
    return Path(out).with_suffix(".jsonl")


def open_log(path, n_steps):
    """The log, locked until this process ends, however it does, and cut after step n_steps."""
    if parallel.rank:
        return open(os.devnull, "wb")
    with writing(path):
        file = open(path, "a+b")
        try:
            fcntl and fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            die(f"{path}: another run is writing it; wait for its end, or name another --out")
        size = 0
        file.seek(0)
        for line in file:
            # --data mine.jsonl --out mine.pt must not cost the data
            if not size and not line.startswith(b'{"step": '):
                die(f"{path}: the log would go there, but it is not a log; name another --out")
            record = re.match(rb'{"step": (\d+), .*}\n', line)
            if not n_steps or not record or int(record[1]) > n_steps:
                break
            size += len(line)
        file.truncate(size)
        return file
