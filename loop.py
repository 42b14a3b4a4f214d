"""The steps of a training run and what is kept of them: the states to resume from, and the log.

Every batch is a pure function of (seed, step), so a resumed run needs no data position and no random state.
"""

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

import common
import parallel

try:
    import fcntl
except ImportError:  # Windows: there a second run that writes the same output is not refused
    fcntl = None


def load_state(config, settings, parts):
    """Puts the state that --resume asks for into the parts; returns how many steps it has done."""
    newest, previous = common.state_paths(config.out)
    if not newest.exists() and not previous.exists():
        common.die(f"{newest}: no such file, nothing to resume; give the same command without --resume")
    path, remedy = newest, "start afresh, without --resume"
    if config.resume == "previous" or not newest.exists():  # a kill between the two renames of a save leaves only previous
        path = previous
    elif previous.exists():
        remedy = "--resume previous goes on from the state before it"
    if not path.exists():
        common.die(f"{path}: no such file; --resume alone goes on from {newest}")
    saved = common.read_torch(path, remedy)
    try:
        changed = [k for k, v in settings.items() if saved["settings"].get(k) != v]
        if not changed:
            for name, part in parts.items():
                part.load_state_dict(saved["parts"][name])
        step = int(saved["step"])
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as e:
        common.die(f"{path}: no state of this run ({str(e).splitlines()[-1].strip()}); start afresh, without --resume")
    if changed:
        common.die(f"{path}: made with another --{', --'.join(changed)}; resume with the same settings, or start afresh")
    print(f"resumed at step {step} from {path}")
    return step


def train_steps(config, steps, parts, log):
    """Yields the steps to do, with a progress bar. parts: {name: object with state_dict}, all that a resumed run needs.

    Saves them to <out>.resume each save_every steps and at Ctrl-C, which ends the run after the current step;
    --resume continues from there, exactly. A gradient that is not finite ends the run before anything more is saved.
    """
    newest, previous = common.state_paths(config.out)
    settings = {k: v for k, v in vars(config).items() if k not in ("resume", "save_every", "log_every", "eval_every", "device")}
    first = load_state(config, settings, parts) if config.resume else 0
    log.open(first)
    parallel.start_alike(parts.values())
    for path in (Path(config.out), newest) if parallel.rank == 0 else ():
        for leftover in path.parent.glob(f"{glob.escape(path.name)}.tmp[0-9]*"):
            leftover.unlink()  # of a run that was killed while writing; nobody else writes here, the log is locked
    if config.resume == "previous" and parallel.rank == 0:
        newest.unlink(missing_ok=True)  # else the next state would push the good one out
    if newest.exists() and not config.resume:
        print(f"{newest}: an interrupted run left it, and --resume would go on from it; this run starts afresh and will replace it")
    unseen, interrupted = [], []
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        for step in tqdm(range(first, steps), initial=first, total=steps, desc=Path(config.out).stem, disable=parallel.rank > 0 or None):
            yield step
            stop = parallel.total(torch.tensor(len(interrupted))).item()  # a signal may reach the processes in different steps
            save = stop or ((step + 1) % config.save_every == 0 and step + 1 < steps)
            idle = not torch.cuda.is_initialized() or torch.cuda.current_stream().query()  # else a look would make it so
            unseen.append(sum(part.grad_norm_sum for part in parts.values() if hasattr(part, "grad_norm_sum")))  # on the device
            if idle or save or step + 1 == steps or len(unseen) == 10:
                finite = torch.stack(unseen).isfinite().tolist()
                if not all(finite):
                    log.stop(step + 2 - len(unseen) + finite.index(False), "gradient")
                unseen.clear()
            if save:
                if parallel.rank == 0:
                    with common.atomic(newest, keep=previous) as f:
                        torch.save(dict(step=step + 1, settings=settings, parts={k: part.state_dict() for k, part in parts.items()}), f)
                log.saved = step + 1
            if stop:
                parallel.total(torch.zeros(1))  # wait for the save: torchrun ends all processes with the first that ends
                common.die(f"stopped after step {step + 1} of {steps}; the same command with --resume goes on from there")
    finally:
        signal.signal(signal.SIGINT, before)


class Log:
    """One JSON object a logged step in <out without suffix>.jsonl, and a line on the terminal.

    source(step): where the batch of a step (from 0) came from, for the line that says that it made the loss NaN.
    """

    def __init__(self, out, source):
        if not Path(out).name or os.path.isdir(out) or Path(out).suffix == ".jsonl":
            common.die(f"--out {out}: must be a file for the checkpoint, such as out/mine.pt; the log goes beside it, to mine.jsonl")
        self.path, self.source, self.start, self.saved = Path(out).with_suffix(".jsonl"), source, time.time(), 0

    def open(self, saved):
        """Locks the file until this process ends, however it does, and cuts it after the step that was saved."""
        self.saved, size = saved, 0
        if parallel.rank:
            self.file = open(os.devnull, "wb")
            return
        with common.writing(self.path):
            self.file = open(self.path, "a+b")
            try:
                fcntl and fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                common.die(f"{self.path}: another run is writing it; wait for its end, or name another --out")
            self.file.seek(0)
            for line in self.file:
                if not size and not line.startswith(b'{"step": '):  # --data mine.jsonl --out mine.pt must not cost the data
                    common.die(f"{self.path}: the log would go there, but it is no log of a run; name another --out")
                record = re.match(rb'{"step": (\d+), .*}\n', line)
                if not saved or not record or int(record[1]) > saved:
                    break
                size += len(line)
            self.file.truncate(size)

    def stop(self, step, names):
        state = f"{self.path.stem}'s last state is good, of step {self.saved}" if self.saved else "no state was saved yet"
        remedy = "mend the data and --resume, or start afresh with a lower --lr"
        common.die(f"step {step}: {names} not finite, on {self.source(max(step - 1, 0))}; {state}: {remedy}")

    def __call__(self, step, **values):
        bad = [name for name, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            self.stop(step, ", ".join(bad))
        record = dict(step=step, seconds=round(time.time() - self.start, 2), **values)
        with common.writing(self.path):
            self.file.write(json.dumps(record).encode() + b"\n")
            self.file.flush()
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        tqdm.write(f"step {step:5d}  {shown}")
