"""Talk to a checkpoint, or put the same questions to several.

    python chat.py                                                  # out/ppo.pt
    python chat.py --model out/sft.pt --temperature 0
    python chat.py --compare out/base.pt out/sft.pt out/ppo.pt      # answers side by side
    echo "Where was Mira Tolvan born?" | python chat.py             # one answer a line

/model PATH  another checkpoint     /temperature 0.7     /system TEXT  a system message, empty to remove
/reset  forget the conversation     /raw  continue text instead of chatting, and back     /help     /quit
Ctrl-C stops an answer, Ctrl-D ends the program.
"""

import codecs
import itertools
import shutil
import sys
import textwrap
from dataclasses import dataclass

import torch

import common
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


class Chat:
    """One checkpoint and its side of the conversation."""

    def __init__(self, path, device):
        self.path = path
        self.model, self.tokenizer = common.load_checkpoint(path, STAGES, GPT, device)
        self.messages, self.system = [], []

    def prompt(self, text, raw, max_new_tokens):
        """Token ids to continue, and a notice if old turns had to go."""
        room = self.model.config.block_size - max_new_tokens
        if raw:
            return ([self.tokenizer.end] + self.tokenizer.encode(text))[-room:], ""
        self.messages.append({"role": "user", "content": text})
        n_turns = len(self.messages)
        while True:
            tokens = conversation.render_prompt(self.system + self.messages, self.tokenizer)
            if len(tokens) <= room or len(self.messages) == 1:
                break
            self.messages = self.messages[2:]  # the oldest question and its answer
        dropped = (n_turns - len(self.messages)) // 2
        notice = f"[the context is full: forgot the oldest {dropped} turn{'s' * (dropped > 1)}]" if dropped else ""
        return (tokens if len(tokens) <= room else None), notice

    def answer(self, text, raw, config, write):
        """Generates an answer, handing pieces of text to write as they come; Ctrl-C stops it. Returns the whole."""
        max_new_tokens = min(config.max_new_tokens, self.model.config.block_size // 2)
        tokens, notice = self.prompt(text, raw, max_new_tokens)
        if notice:
            print(notice)
        if tokens is None:
            self.messages.pop()
            print(f"[too long: the model reads {self.model.config.block_size - max_new_tokens} tokens at most]")
            return ""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a character may be split over tokens
        pieces = []

        def on_token(ids):
            if ids[0] != self.tokenizer.end:
                pieces.append(decoder.decode(self.tokenizer.encoding.decode_single_token_bytes(ids[0])))
                write(pieces[-1])

        sampling = dict(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
        try:
            with common.autocast(self.model.device):
                self.model.generate([tokens], max_new_tokens, **sampling, end_id=self.tokenizer.end, on_token=on_token)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        if not raw:
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
        return "".join(pieces)


def show_columns(titles, texts):
    """The texts side by side, wrapped to the terminal's width."""
    width = shutil.get_terminal_size((100, 24)).columns // len(texts) - 3
    cells = [sum((textwrap.wrap(line, width) or [""] for line in text.splitlines()), []) for text in texts]
    rows = [titles, ["-" * min(width, len(t)) for t in titles], *itertools.zip_longest(*cells, fillvalue="")]
    for row in rows:
        print(" | ".join(cell[:width].ljust(width) for cell in row).rstrip())


def command(line, chats, config, device):
    """Carries out a line that begins with a slash."""
    name, _, value = line.partition(" ")
    value = value.strip()
    if name == "/model":
        try:
            chats[:] = [Chat(value, device)]
        except SystemExit as e:  # a wrong path must not end the program
            print(e)
    elif name == "/temperature":
        try:
            config.temperature = max(0.0, float(value))
        except ValueError:
            print("a number, such as /temperature 0.7")
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
    interactive = sys.stdin.isatty()
    device = common.setup(config) if interactive else torch.device("cpu")
    torch.manual_seed(config.seed)
    chats = [Chat(path, device) for path in config.compare or [config.model]]
    raw = False
    if interactive:
        import readline  # noqa: F401  line editing and history for input()

        print("/help lists the commands")
    while True:
        try:
            line = input("continue> " if raw else "you> ") if interactive else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            break
        except KeyboardInterrupt:
            print()
            continue
        if not line.strip():
            continue
        if line in ("/quit", "/exit"):
            break
        if line == "/raw":
            raw = not raw
        elif line.startswith("/"):
            command(line, chats, config, device)
        elif len(chats) == 1:
            chats[0].answer(line, raw, config, lambda piece: print(piece, end="", flush=True))
            print()
        else:
            texts = [chat.answer(line, raw, config, lambda piece: None) for chat in chats]
            show_columns([chat.path for chat in chats], texts)


if __name__ == "__main__":
    main()
