"""Talk to a checkpoint, or put the same questions to several.

    python chat.py                                               # out/ppo.pt
    python chat.py --model out/sft.pt --temperature 0
    python chat.py --compare out/base.pt out/sft.pt out/ppo.pt   # answers side by side
    echo "Where was Covo Dronard born?" | python chat.py         # one answer a line

/model PATH  continue with another checkpoint     /temperature 0.7     /help     /quit
/system TEXT  set a system message, empty to remove it     /reset  forget the conversation
/raw  continue text instead of chatting, and back
Ctrl-C stops an answer, Ctrl-D ends the program.
"""

import codecs
import contextlib
import importlib
import itertools
import shutil
import signal
import sys
import textwrap
from dataclasses import dataclass

import torch

from data import conversation
from model import GPT
from train import show
from train.checkpoint import LANGUAGE_MODELS, load_checkpoint
from train.device import autocast, setup
from utils.cli import die, parse_config


@dataclass
class Config:
    model: str = "out/ppo.pt"  # checkpoint to talk to
    compare: tuple = ()  # several checkpoints, which answer side by side instead
    temperature: float = 0.7  # 0: the most likely token each time
    top_k: int = 50  # sample among this many tokens; 0: all
    top_p: float = 0.95  # sample among the likeliest tokens that together have this probability
    max_new_tokens: int = 64  # longest answer
    raw: bool = False  # continue text instead of chatting
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # of the sampling


class Chat:
    """One checkpoint and its side of the conversation."""

    def __init__(self, path, device):
        self.messages, self.system = [], []
        self.load(path, device)

    def load(self, path, device):
        self.model, self.tokenizer = load_checkpoint(path, LANGUAGE_MODELS, GPT, device)
        self.path = path

    def prompt(self, text, raw, room):
        """At most room token ids to continue; None if the question alone has more.

        Forgets the oldest turns to make room.
        """
        if raw:
            return ([self.tokenizer.separator] + self.tokenizer.encode(text))[-room:]
        question = {"role": "user", "content": text}
        for n in range(0, len(self.messages) + 1, 2):
            kept = [*self.system, *self.messages[n:], question]
            tokens = conversation.render_prompt(kept, self.tokenizer)
            if len(tokens) <= room:
                if n:
                    print(f"[context full: forgot the oldest {n} messages]", file=sys.stderr)
                del self.messages[:n]
                return tokens
        print(f"[too long: the model reads {room} tokens at most]", file=sys.stderr)

    def answer(self, text, config, write):
        """Generates an answer, whose pieces write gets as they come; Ctrl-C stops it."""
        block_size = self.model.config.block_size
        max_new_tokens = min(config.max_new_tokens, block_size // 2)
        tokens = self.prompt(text, config.raw, block_size - max_new_tokens)
        if tokens is None:
            return ""
        end = self.tokenizer.separator if config.raw else self.tokenizer.end
        # a character may be split over tokens
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        ids = []

        def on_token(new_ids):
            ids.extend(new_ids)
            if ids[-1] != end:
                write(decoder.decode(self.tokenizer.encoding.decode_single_token_bytes(ids[-1])))

        sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        sampling |= dict(end_id=end, on_token=on_token)
        try:
            with autocast(self.model.device):
                self.model.generate([tokens], max_new_tokens, **sampling)
            write(decoder.decode(b"", final=True))
        except KeyboardInterrupt:
            write(" [stopped]")
        whole = self.tokenizer.decode(ids[:-1] if ids[-1:] == [end] else ids)
        if not config.raw:
            self.messages.append({"role": "user", "content": text})
            self.messages.append({"role": "assistant", "content": whole})
        return whole


def show_columns(titles, texts):
    """The texts side by side, wrapped to the terminal's width."""
    columns = max(10, shutil.get_terminal_size((100, 24)).columns // len(texts) - 3)
    cells = []
    for text in texts:
        lines = []
        for line in text.splitlines():
            is_wide = show.width(line) > len(line)  # Chinese: as if each character took two columns
            lines += textwrap.wrap(line, columns // 2 if is_wide else columns) or [""]
        cells.append(lines)
    rules = ["-" * min(columns, len(title)) for title in titles]
    for row in [titles, rules, *itertools.zip_longest(*cells, fillvalue="")]:
        print(" | ".join(show.ljust(cell[:columns], columns) for cell in row).rstrip())


def respond(text, chats, config):
    """Prints a single model's answer as it comes, several models' side by side."""
    if len(chats) == 1:
        chats[0].answer(text, config, lambda piece: print(piece, end="", flush=True))
        print()
    else:
        texts = [chat.answer(text, config, lambda piece: None) for chat in chats]
        show_columns([chat.path for chat in chats], texts)


def command(line, chats, config, device):
    """Carries out a line that begins with a slash."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/model":
        chats[0].load(value or chats[0].path, device)
        del chats[1:]
    elif name == "/temperature":
        try:
            config.temperature = max(0.0, float(value))
        except ValueError:
            print(f"now {config.temperature}; a number changes it, such as /temperature 0.7")
    elif name == "/system":
        for chat in chats:
            chat.system = [{"role": "system", "content": value}] if value else []
    elif name == "/reset":
        for chat in chats:
            chat.messages = []
    elif name == "/raw":
        config.raw = not config.raw
    else:
        print(__doc__[__doc__.index("/model") :].rstrip())


def open_input():
    """Prepares stdin. Returns whether somebody types there."""
    if not sys.stdin or not sys.stdout:  # closed by `<&-` or `>&-`
        die("no place to read questions from or write answers to; give a terminal, pipe or file")
    sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows has none: its console edits lines itself
            importlib.import_module("readline")  # gives input() line editing and a history
        print("/help lists the commands")
        return True
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nobody is there to continue after Ctrl-C
    if hasattr(signal, "SIGPIPE"):  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nor after `| head` has read enough
    return False


def main():
    config = parse_config(Config, __doc__)
    with contextlib.redirect_stdout(sys.stderr):  # a pipe gets the answers alone
        device = setup(config)
    chats = [Chat(path, device) for path in config.compare or [config.model]]
    torch.manual_seed(config.seed)
    interactive = open_input()

    while True:
        prompt = "continue> " if config.raw else "you> "
        try:
            line = input(prompt if interactive else "")
            if line.strip() in ("/quit", "/exit"):
                break
            if line.startswith("/"):
                command(line.strip(), chats, config, device)
            elif line.strip():
                respond(line, chats, config)
        except KeyboardInterrupt:  # at the prompt: a fresh one
            print()
        except EOFError:
            print(end="\n" * interactive)
            break
        except SystemExit as e:  # a wrong path ends a pipe, not the program of somebody who types
            if not interactive:
                raise
            print(e)


if __name__ == "__main__":
    main()
