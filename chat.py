"""Talk to a checkpoint, or put the same questions to several.

    python chat.py                                                  # out/ppo.pt
    python chat.py --model out/sft.pt --temperature 0
    python chat.py --compare out/base.pt out/sft.pt out/ppo.pt      # answers side by side
    echo "Where was Mira Tolvan born?" | python chat.py             # one answer a line

/model PATH  another checkpoint goes on     /temperature 0.7     /system TEXT  a system message, empty to remove
/reset  forget the conversation     /raw  continue text instead of chatting, and back     /help     /quit
Ctrl-C stops an answer, Ctrl-D ends the program.
"""

import codecs
import contextlib
import itertools
import shutil
import signal
import sys
import textwrap
from dataclasses import dataclass

import torch

import common
import show
from data import conversation
from model import GPT

STAGES = ["base", "sft", "ppo"]


@dataclass
class Config:
    model: str = "out/ppo.pt"  # checkpoint to talk to
    compare: tuple = ()  # several checkpoints, which answer side by side instead
    temperature: float = 0.7  # 0: the most likely token each time
    top_k: int = 50  # sample among this many tokens; 0: all
    top_p: float = 0.95  # sample among the most likely tokens that have this probability together
    max_new_tokens: int = 64  # longest answer
    device: str = "auto"  # auto, cpu, cuda or mps
    seed: int = 0  # of the sampling


def notice(text):
    print(f"[{text}]", file=sys.stderr)


class Chat:
    """One checkpoint and its side of the conversation."""

    def __init__(self, path, device):
        self.path = path
        self.model, self.tokenizer = common.load_checkpoint(path, STAGES, GPT, device)
        self.messages, self.system = [], []

    def prompt(self, text, raw, room):
        """At most room token ids to continue, or None if the question alone has more. Forgets the oldest turns to make room."""
        if raw:
            return ([self.tokenizer.end] + self.tokenizer.encode(text))[-room:]
        for n_dropped in range(len(self.messages) // 2 + 1):
            kept = self.messages[2 * n_dropped :]
            tokens = conversation.render_prompt(self.system + kept + [{"role": "user", "content": text}], self.tokenizer)
            if len(tokens) <= room:
                if n_dropped:
                    notice(f"the context is full: forgot the oldest {n_dropped} turn{'s' * (n_dropped > 1)}")
                self.messages = kept
                return tokens
        notice(f"too long: the model reads {room} tokens at most")

    def answer(self, text, raw, config, write):
        """Generates an answer, handing pieces of text to write as they come; Ctrl-C stops it. Returns the whole."""
        max_new_tokens = min(config.max_new_tokens, self.model.config.block_size // 2)
        tokens = self.prompt(text, raw, self.model.config.block_size - max_new_tokens)
        if tokens is None:
            return ""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be split over tokens
        pieces = []

        def say(data, final=False):
            pieces.append(decoder.decode(data, final))
            write(pieces[-1])

        def on_token(ids):
            if ids[0] != self.tokenizer.end:
                say(self.tokenizer.encoding.decode_single_token_bytes(ids[0]))

        sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        try:
            with common.autocast(self.model.device):
                self.model.generate([tokens], max_new_tokens, **sampling, end_id=self.tokenizer.end, on_token=on_token)
            say(b"", final=True)
        except KeyboardInterrupt:
            write(" [stopped]")
        if not raw:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "".join(pieces)}]
        return "".join(pieces)


def show_columns(titles, texts):
    """The texts side by side, wrapped to the terminal's width."""
    width = max(10, shutil.get_terminal_size((100, 24)).columns // len(texts) - 3)
    cells = [[] for _ in texts]
    for cell, text in zip(cells, texts):
        for line in text.splitlines():
            wide = show.width(line) > len(line)  # Chinese: as if each character took two columns
            cell += textwrap.wrap(line, width // (1 + wide)) or [""]
    rows = [titles, ["-" * min(width, len(t)) for t in titles], *itertools.zip_longest(*cells, fillvalue="")]
    for row in rows:
        print(" | ".join(show.ljust(cell[:width], width) for cell in row).rstrip())


def command(line, chats, config, device):
    """Carries out a line that begins with a slash."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/model":
        successor = Chat(value or chats[0].path, device)
        successor.messages, successor.system = chats[0].messages, chats[0].system
        chats[:] = [successor]
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
    else:
        print(__doc__[__doc__.index("/model") :].rstrip())


def main():
    config = common.parse_config(Config, __doc__)
    with contextlib.redirect_stdout(sys.stderr):  # a pipe gets the answers alone
        device = common.setup(config)
    chats = [Chat(path, device) for path in config.compare or [config.model]]
    torch.manual_seed(config.seed)
    if not sys.stdin or not sys.stdout:  # closed by `<&-` or `>&-`
        common.die("there is nowhere to read questions from or to write answers to; give it a terminal, a pipe or a file")
    raw, interactive = False, sys.stdin.isatty()
    sys.stdin.reconfigure(errors="replace")
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has none: its console edits lines itself
            import readline  # noqa: F401  line editing and history for input()
        print("/help lists the commands")
    else:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nobody is there to go on after a stopped answer
        if hasattr(signal, "SIGPIPE"):  # not on Windows
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nor after `| head` has read enough
    while True:
        try:
            line = input("" if not interactive else "continue> " if raw else "you> ")
            if line.strip() in ("/quit", "/exit"):
                break
            if line.strip() == "/raw":
                raw = not raw
            elif line.startswith("/"):
                command(line, chats, config, device)
            elif line.strip() and len(chats) == 1:
                chats[0].answer(line, raw, config, lambda piece: print(piece, end="", flush=True))
                print()
            elif line.strip():
                texts = [chat.answer(line, raw, config, lambda piece: None) for chat in chats]
                show_columns([chat.path for chat in chats], texts)
        except KeyboardInterrupt:  # at the prompt: a fresh one
            print()
        except EOFError:
            print(end="\n" * interactive)
            break
        except SystemExit as e:  # a wrong path or an unknown character ends a pipe, not the program of somebody who types
            if not interactive:
                raise
            print(e)


if __name__ == "__main__":
    main()
