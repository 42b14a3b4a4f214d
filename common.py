"""What all scripts share: flags, device, schedule, optimizers, batches, files, checkpoints. The steps of a run: loop.py."""

import argparse
import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch

import parallel

CHECKPOINT_VERSION = 1


def die(message):
    """Ends the program with one line on stderr and exit code 1; with --debug, in a traceback."""
    line = " ".join(str(message).splitlines())  # names of files and others' messages may hold several
    raise (RuntimeError if "--debug" in sys.argv else SystemExit)(f"error: {line}")


# ---- flags


def add_debug(parser):
    parser.add_argument("--debug", action="store_true", help="where something is wrong, end in a traceback, not in one line")


def parse_config(cls, doc, argv=None):
    """An instance of the dataclass from the command line. A field is a flag; the comment on its line is its help."""
    comments = dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(cls):
        kind = dict(type=type(field.default))
        if isinstance(field.default, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(field.default, tuple):
            kind = dict(type=str, nargs="+")
        elif field.name == "resume":
            kind = dict(nargs="?", const="newest", choices=["newest", "previous"])
        text = comments[field.name].replace("%", "%%") + f" (default: {field.default})"
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **kind)
    add_debug(parser)
    values = vars(parser.parse_args(argv))
    config = cls(**{field.name: values[field.name] for field in dataclasses.fields(cls)})
    for field in dataclasses.fields(cls):
        value, default = getattr(config, field.name), field.default
        least = 0 if default == 0 or field.name == "warmup" else 1
        if type(value) is int and not least <= value <= 10**12:  # torch's seeds end at 2**64
            die(f"--{field.name} {value}: must be at least {least}, and at most 10**12")
        if type(value) is float and value != default and not (math.isfinite(value) and (value >= 0 or default < 0)):
            die(f"--{field.name} {value}: must be a finite number" + ", not negative" * (default >= 0))
    return config


# ---- device


def setup(config):
    """Seeds, picks the device and says what it is; under torchrun, joins the other processes."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and parallel.size > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as e:
        die(f"--device {name}: {str(e).splitlines()[0]}; use auto, cpu, cuda or mps")
    for flag in ("batch_size", "minibatch_size"):
        if getattr(config, flag, 0) % parallel.size:
            die(f"--{flag} {getattr(config, flag)}: cannot be split evenly over {parallel.size} processes")
    parallel.start(device)
    sys.excepthook = lambda *error: report_uncaught(config, *error)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    processes = f" x {parallel.size} processes" * (parallel.size > 1)
    threads = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else ""
    print(f"device {device}{threads}{processes}, seed {config.seed}")
    return device


def report_uncaught(config, kind, error, traceback):
    """One line for Ctrl-C outside of a run's steps and for memory that does not suffice; a traceback for all else, which is a bug."""
    memory = issubclass(kind, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
    if "--debug" in sys.argv or not (memory or kind is KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    flags = [f"--{name}" for name in ("micro_batch_size", "batch_size", "block_size") if hasattr(config, name)]
    remedy = f"; less is needed with a smaller {' or '.join(flags)}" if flags else ""
    print(f"error: out of memory{remedy}" if memory else "error: interrupted; no file is half-written", file=sys.stderr)


def autocast(device):
    """bfloat16 where the device computes in it (every CUDA machine we mean, CPUs with AVX512-BF16 or AMX), else nothing."""
    cpu_has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cuda" or (device.type == "cpu" and cpu_has_bf16):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


# ---- schedule and optimizers


def lr_factor(step, steps, warmup):
    """Linear warm-up, then linear to 0: at these lengths as good as cosine or better (arXiv 2502.15938)."""
    return min((step + 1) / warmup if warmup else 1.0, (steps - step) / max(steps - warmup, 1), 1.0)


def make_optimizers(model, lr, muon_lr=0.0, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8):
    """[AdamW], or with muon_lr [Muon on the blocks' matrices, AdamW on the rest (embedding, norms, heads)].

    Muon (torch.optim.Muon) passes the plateau before facts are stored in about half of the tokens AdamW
    needs; 3 of its Newton-Schulz steps do as well as the usual 5, for less time. Weight decay applies to matrices
    only. Each group keeps its lr as initial_lr for the schedule.
    """
    muon, matrices, vectors, optimizers = [], [], [], []
    for name, p in model.named_parameters():
        (vectors if p.dim() != 2 else muon if muon_lr and "blocks." in name else matrices).append(p)
    if muon_lr:
        optimizers.append(torch.optim.Muon(muon, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw", ns_steps=3))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def optimizer_step(model, optimizers, factor, clip=1.0):
    """One clipped step at initial_lr * factor; returns the gradient norm before clipping."""
    parallel.add_gradients(model)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    # a NaN stays in the sum: loop.train_steps looks at it now and then, so that not every step waits for the GPU
    optimizers[0].grad_norm_sum = getattr(optimizers[0], "grad_norm_sum", 0.0) + grad_norm
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return grad_norm


# ---- batches


def hold_out(records, share):
    """(train, val): val is the last share of the records, rounded up; from 1 on share is their number."""
    n_train = len(records) - math.ceil(share if share >= 1 else share * len(records))
    if not 0 < n_train <= len(records):
        die(f"{share:g} cannot be held out of {len(records)} records; give a share below 1, or a number below {len(records)}")
    return records[:n_train], records[n_train:]


class Batches:
    """batches[step]: the indices of the step's rows, rows of like length together so that few pads are computed.

    An epoch is shuffled, sorted by length within chunks of 16 batches, then its batches are shuffled. Lengths are those
    of the prompts: sorted by answers a batch held one kind of answer, and the last batches set the balance between them
    (right pairs of a reward model: 65%, by prompts 70%). An incomplete last batch is left out. len: batches an epoch.
    """

    def __init__(self, lengths, batch_size, seed):
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, None

    def __len__(self):
        return len(self.lengths) // self.batch_size

    def __getitem__(self, step):
        epoch, i = divmod(step, len(self))
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            order = rng.permutation(len(self.lengths))[: len(self) * self.batch_size]
            chunks = np.split(order, range(16 * self.batch_size, len(order), 16 * self.batch_size))
            order = np.concatenate([c[np.argsort(self.lengths[c], kind="stable")] for c in chunks])
            self.epoch, self.order = epoch, rng.permutation(order.reshape(-1, self.batch_size))  # (batches, batch_size)
        return self.order[i]


def pad_rows(rows, pad, device, multiple=8):
    """Lists of ints -> (B, T), padded on the right to a multiple, so that few different shapes occur."""
    T = multiple * math.ceil(max(map(len, rows)) / multiple)
    return torch.tensor([list(r) + [pad] * (T - len(r)) for r in rows], device=device)


# ---- files


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        die(f"{path}: no such file; `make` builds the default ones")
    except IsADirectoryError:
        die(f"{path}: is a folder, not a file")
    except UnicodeDecodeError as e:
        die(f"{path}: not UTF-8 at byte {e.start}; convert it, for example with iconv")
    except (OSError, ValueError) as e:  # a file where a folder should be, no permission, a name that no file can have
        die(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); check the path")


def read_json(path, remedy="download the file again"):
    """The object in a .json file."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        die(f"{path}: not JSON ({e}); {remedy}")
    if not isinstance(content, dict):
        die(f"{path}: not a JSON object; {remedy}")
    return content


@contextlib.contextmanager
def writing(path):
    """Around what writes path: makes its folder; what the disk refuses ends the program in one line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save makes a RuntimeError of what the disk says
        if not isinstance(cause, OSError):
            raise
        die(f"{path}: cannot be written ({cause.strerror}); what was there before is untouched. Make room, or name another place")


@contextlib.contextmanager
def atomic(path, mode="wb", keep=None):
    """A file to write that takes path's place only when it is complete and on the disk; the one before goes to keep."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path, text):
    with atomic(path, "w") as f:
        f.write(text)


class Record(dict):
    """An object of a .jsonl file; line: the number of its line."""


class Row(tuple):
    """What a stage makes of a Record to train on; line: the number of its line."""

    def __new__(cls, line, *parts):
        row = super().__new__(cls, parts)
        row.line = line
        return row


def read_jsonl(path, check):
    """The file's Records. check(record) returns what is wrong with one in a few words, or None."""
    records = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines would also split at U+2028 inside a string
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            die(f"{path}, line {number}: not JSON ({e}); each line must be one whole object")
        problem = check(record) if isinstance(record, dict) else "not a JSON object"
        if problem:
            die(f"{path}, line {number}: {problem}")
        records.append(Record(record))
        records[-1].line = number
    if not records:
        die(f"{path}: holds no records")
    return records


def write_jsonl(path, records):
    with atomic(path, "w") as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


# ---- checkpoints


def state_paths(out):
    """Where the last two states of a run lie, from which --resume goes on: the newest first."""
    return Path(f"{out}.resume"), Path(f"{out}.resume.previous")


def not_finite(weights):
    """The name of a tensor with NaN or infinity in it, or None."""
    return next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)


def save_checkpoint(path, stage, model, tokenizer, config, **made_by):
    """Writes a self-contained checkpoint: weights, model config, tokenizer, and what made it."""
    if parallel.rank:
        return
    if name := not_finite(model.state_dict()):
        die(f"{path}: not written, {name} is not finite")
    content = dict(
        format=CHECKPOINT_VERSION,
        stage=stage,
        model_config=dataclasses.asdict(model.config),
        weights=model.state_dict(),
        tokenizer=tokenizer.dumps(),
        made_by=dict(config=dataclasses.asdict(config), argv=sys.argv, torch=str(torch.__version__), **made_by),
    )
    with atomic(path) as f:
        torch.save(content, f)
    for state in state_paths(path):
        state.unlink(missing_ok=True)
    print(f"wrote {path}")


def read_torch(path, remedy="make or copy it again"):
    """What torch.save wrote to path, if every byte is still the same. Runs no code from the file."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load compares no checksums, and leaves out what is marked as a folder
            if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
                raise ValueError("it has changed since it was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        die(f"{path}: no such file; `make` builds the default ones")
    except Exception as e:  # a damaged file can raise anything
        die(f"{path}: not a readable checkpoint ({(str(e) or type(e).__name__).splitlines()[0][:100]}); {remedy}")


def load_checkpoint(path, stages, model_class, device):
    """(model, tokenizer) of a checkpoint whose stage is among stages."""
    from data.tokenizer import Tokenizer  # here, because data.tokenizer reads its own file through this module
    from model import GPTConfig

    content = read_torch(path)
    parts = {"format", "stage", "model_config", "weights", "tokenizer"}
    if not isinstance(content, dict) or not parts <= content.keys() or not isinstance(content["format"], int):
        die(f"{path}: not a checkpoint of this project")
    if content["format"] != CHECKPOINT_VERSION:
        die(f"{path}: format {content['format']}, this code reads {CHECKPOINT_VERSION}; use the version that wrote it")
    if content["stage"] not in stages:
        die(f"{path}: a checkpoint of stage {content['stage']}; needed here: {' or '.join(stages)}")
    try:
        tokenizer = Tokenizer.loads(content["tokenizer"], path)
        model = model_class(GPTConfig(**content["model_config"]))
        model.load_state_dict(content["weights"])
    except (RuntimeError, ValueError, TypeError, AttributeError) as e:
        die(f"{path}: weights, model_config and tokenizer do not fit this code or each other ({str(e).splitlines()[-1].strip()})")
    if name := not_finite(content["weights"]):
        die(f"{path}: {name} is not finite: the run that made it diverged; train it again with a lower --lr")
    if tokenizer.vocab_size != model.config.vocab_size:
        die(f"{path}: tokenizer of {tokenizer.vocab_size} ids in a model of {model.config.vocab_size}")
    return model.to(device), tokenizer
