"""Self-contained checkpoints: weights, model config, tokenizer and what made them."""

import dataclasses
import sys
import zipfile
from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from train import parallel
from utils.cli import die
from utils.files import atomic

FORMAT = 1
LANGUAGE_MODELS = ("base", "sft", "ppo", "dpo", "grpo")  # stages whose checkpoints hold a GPT


def state_paths(out):
    """Where the last two states of a run lie, from which --resume continues: the newest first."""
    return Path(f"{out}.resume"), Path(f"{out}.resume.previous")


def find_not_finite(weights):
    """The name of a tensor that holds NaN or infinity, or None."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            return name


def save_checkpoint(path, stage, model, tokenizer, config, **made_by):
    """Writes the checkpoint of a finished run and removes the states it could have resumed from."""
    if parallel.rank:
        return
    if name := find_not_finite(model.state_dict()):
        die(f"{path}: not written, {name} is not finite")
    made_by |= dict(config=dataclasses.asdict(config), argv=sys.argv, torch=str(torch.__version__))
    content = dict(
        format=FORMAT,
        stage=stage,
        model_config=dataclasses.asdict(model.config),
        weights=model.state_dict(),
        tokenizer=tokenizer.dumps(),
        made_by=made_by,
    )
    with atomic(path) as f:
        torch.save(content, f)
    for state in state_paths(path):
        state.unlink(missing_ok=True)
    print(f"wrote {path}")


def read_torch(path, remedy="make or copy it again"):
    """What torch.save wrote to path, if every byte is still the same. Runs no code of the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load compares no checksums, and leaves out what is marked as a folder
            if archive.testzip() or any(entry.external_attr for entry in archive.infolist()):
                raise ValueError("it has changed since it was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        die(f"{path}: no such file; `make` builds the default ones")
    except Exception as e:  # a damaged file can raise anything
        reason = (str(e) or type(e).__name__).splitlines()[0][:100]
        die(f"{path}: not a readable checkpoint ({reason}); {remedy}")


def load_checkpoint(path, stages, model_class, device):
    """(model, tokenizer) of a checkpoint whose stage is among stages."""
    content = read_torch(path)
    parts = {"format", "stage", "model_config", "weights", "tokenizer"}
    is_ours = isinstance(content, dict) and parts <= content.keys()
    if not is_ours or not isinstance(content["format"], int):
        die(f"{path}: not a checkpoint of this project")
    if content["format"] != FORMAT:
        die(f"{path}: format {content['format']}, not {FORMAT}; use the version that wrote it")
    if content["stage"] not in stages:
        die(f"{path}: a checkpoint of stage {content['stage']}; needed here: {' or '.join(stages)}")
    try:
        tokenizer = Tokenizer.loads(content["tokenizer"], path)
        model = model_class(model_class.config_class(**content["model_config"]))
        model.load_state_dict(content["weights"])
    except (RuntimeError, ValueError, TypeError, AttributeError) as e:
        reason = str(e).splitlines()[-1].strip()
        die(f"{path}: its parts do not fit each other or this code ({reason}); make it again")
    if name := find_not_finite(content["weights"]):
        die(f"{path}: {name} is not finite, the run diverged; train it again with a lower --lr")
    if tokenizer.vocab_size != model.config.vocab_size:
        sizes = f"tokenizer of {tokenizer.vocab_size} ids, model of {model.config.vocab_size}"
        die(f"{path}: {sizes}; make it again")
    return model.to(device), tokenizer
