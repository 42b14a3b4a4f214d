"""chat.py as its users meet it: typed into a terminal, fed by a pipe, several models at once."""

import dataclasses
import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import tiny
import torch

import chat
import sft
from data import conversation
from train import show
from train.checkpoint import LANGUAGE_MODELS, save_checkpoint
from train.device import autocast

COMMAND = [sys.executable, Path(__file__).parent.parent / "chat.py", "--device", "cpu"]
TOKENIZER = tiny.byte_tokenizer()
GREEDY = chat.Config(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """a.pt and b.pt, which answer differently, and long.pt, whose answers go on and on."""
    folder = tmp_path_factory.mktemp("chat")
    for seed, (name, block_size) in enumerate([("a", 96), ("b", 96), ("long", 65536)]):
        torch.manual_seed(seed)
        model = tiny.gpt(vocab_size=TOKENIZER.vocab_size, block_size=block_size)
        if name == "long":  # a logit of 0 is not among the 50 highest
            model.embed.weight.data[TOKENIZER.end] = 0
        save_checkpoint(folder / f"{name}.pt", "ppo", model, TOKENIZER, sft.Config())
    return folder


def load(folder, name="a"):
    return chat.Chat(folder / f"{name}.pt", tiny.CPU)


def ignore(piece):
    pass


def reply(model, tokens):
    """What the model says greedily, by itself."""
    with autocast(tiny.CPU):
        [ids] = model.generate([tokens], 12, temperature=0, end_id=TOKENIZER.end)
    return conversation.decode_response(ids, TOKENIZER)


def render(messages):
    return conversation.render_prompt(messages, TOKENIZER)


def messages(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


def piped(text, *flags):
    command = [*COMMAND, "--temperature", "0", "--max_new_tokens", "12", *flags]
    env = os.environ | dict(COLUMNS="60", PYTHONIOENCODING="utf-8:strict")
    return subprocess.run(command, input=text, capture_output=True, env=env)


def test_each_piped_line_is_answered_on_stdout_alone(folder):
    done = piped(b"hello\n\n/reset\nwho \xff?\n", "--model", folder / "a.pt")
    model = load(folder).model
    answers = [reply(model, render(messages(text))) for text in ("hello", "who �?")]
    assert done.returncode == 0 and b"device cpu" in done.stderr
    assert done.stdout.decode() == "".join(f"{answer}\n" for answer in answers)


def test_without_an_input_it_ends_in_one_line(folder):
    command = [*COMMAND, "--model", folder / "a.pt"]
    close_stdin = dict(preexec_fn=lambda: os.close(0))
    done = subprocess.run(command, capture_output=True, text=True, **close_stdin)
    last_line = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert last_line.startswith("error: no place to read questions from")
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_ends_it_silently(folder):
    """As in `python chat.py < questions.txt | head -1`."""
    command, pipe = [*COMMAND, "--model", folder / "a.pt"], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        process.stdin.write(b"hello\n" * 50)
        process.stdin.close()
        process.stdout.readline()
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait() == -signal.SIGPIPE


def test_compared_models_answer_in_columns_of_equal_width(folder):
    done = piped(b"hello\n", "--compare", folder / "a.pt", folder / "b.pt")
    shown = done.stdout.decode()
    titles, rules = shown.splitlines()[:2]
    titles = re.fullmatch(r"(.{27}) \|(?: (.*))?", titles).groups()
    rules = re.fullmatch(r"(.{27}) \|(?: (.*))?", rules).groups()
    assert titles[0].strip() == str(folder / "a.pt")[:27].strip()
    assert set(rules[0].strip()) == {"-"}
    for name in "ab":
        answer = reply(load(folder, name).model, render(messages("hello")))
        assert all(word[:9] in shown for word in answer.split())


def test_columns_stay_in_line_whatever_the_widths_of_their_characters(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    chinese = "我不知道这个人的出生地在哪里，请问别人。" * 2
    english = "I do not know.\n\nAsk somebody else, who may have been there."
    chat.show_columns(["a.pt", "b.pt"], [chinese, english])
    lines = capsys.readouterr().out.splitlines()
    assert {show.width(line.split(" |")[0]) for line in lines} == {22}
    assert max(map(show.width, lines)) <= 50
    left = [line.split(" |")[0].strip() for line in lines[2:]]
    right = [line.split(" | ")[1] for line in lines[2:] if " | " in line]
    assert "".join(left) == chinese
    assert " ".join(right) == english.replace("\n\n", " ")


def test_an_answer_streams_token_by_token_and_a_split_character_comes_whole(folder, monkeypatch):
    one, pieces, written = load(folder), [], []
    real = one.model.logits

    def logits(hidden):
        written.append(len(pieces))
        return real(hidden)

    monkeypatch.setattr(one.model, "logits", logits)
    answer = one.answer("hello", GREEDY, pieces.append)
    assert written == list(range(12))  # when a token is computed, those before it are on the screen
    assert "".join(pieces) == answer == reply(one.model, render(messages("hello")))
    whole = [c for c in answer if c not in "�" and ord(c) > 127]
    # tokens are bytes here: each character came in three
    assert whole and all(any(c in piece for piece in pieces) for c in whole)
    assert one.messages == messages("hello", answer)


def test_the_oldest_turns_are_forgotten_with_a_notice_when_the_context_is_full(folder, capsys):
    one = load(folder)
    one.system = [{"role": "system", "content": "be brief"}]
    room, seen, forgot = 96 - 12, [], 0
    real = one.model.generate

    def generate(prompts, *args, **kwargs):
        seen.append(prompts[0])
        return real(prompts, *args, **kwargs)

    one.model.generate = generate
    for i in range(8):
        one.answer(f"question number {i}?", GREEDY, ignore)
        said = capsys.readouterr().err
        forgot += int((re.findall(r"forgot the oldest (\d) messages", said) or [0])[0]) // 2
        # the newest remain, with none missing
        questions = [m["content"] for m in one.messages[::2]]
        assert questions == [f"question number {j}?" for j in range(forgot, i + 1)]
        assert [m["role"] for m in one.messages] == ["user", "assistant"] * len(questions)
        assert seen[-1] == render(one.system + one.messages[:-1])
        assert len(seen[-1]) <= room
    assert forgot > 4

    # a refused question costs nothing
    before = list(one.messages)
    assert one.answer("much " * 30, GREEDY, print) == ""
    assert one.messages == before
    assert "too long: the model reads 84 tokens at most" in capsys.readouterr().err


def test_raw_continues_the_text_itself_and_remembers_nothing(folder):
    one = load(folder)
    tokens = [TOKENIZER.end] + TOKENIZER.encode("Once upon")
    raw = dataclasses.replace(GREEDY, raw=True)
    assert one.answer("Once upon", raw, ignore) == reply(one.model, tokens)
    assert one.messages == []


def test_a_pipe_can_continue_text(folder):
    done = piped(b"Once upon\n", "--raw", "--model", folder / "a.pt")
    tokens = [TOKENIZER.end] + TOKENIZER.encode("Once upon")
    assert done.stdout.decode() == reply(load(folder).model, tokens) + "\n"


@pytest.mark.parametrize("stage", LANGUAGE_MODELS)
def test_any_language_model_can_be_talked_to(folder, tmp_path, stage):
    save_checkpoint(tmp_path / "x.pt", stage, load(folder).model, TOKENIZER, sft.Config())
    answers = [one.answer("hello", GREEDY, ignore) for one in (load(folder), load(tmp_path, "x"))]
    assert answers[0] == answers[1]


def test_commands_change_the_model_the_system_message_and_the_conversation(folder, capsys):
    chats, config = [load(folder)], chat.Config()
    chats[0].messages = messages("hello", "hi")
    model = f"/model {folder / 'b.pt'}"
    for line in ("/system be kind", model, "/temperature 0.25", "/temperature hot", "/what"):
        chat.command(line, chats, config, tiny.CPU)
    assert chats[0].path == str(folder / "b.pt")
    assert chats[0].messages == messages("hello", "hi")
    assert chats[0].system == [{"role": "system", "content": "be kind"}]
    assert config.temperature == 0.25
    said = capsys.readouterr().out
    assert "now 0.25" in said and "/reset  forget the conversation" in said
    for line in ("/reset", "/system"):
        chat.command(line, chats, config, tiny.CPU)
    assert chats[0].messages == chats[0].system == []
    chat.command("/raw", chats, config, tiny.CPU)
    assert config.raw
    chat.command("/raw", chats, config, tiny.CPU)
    assert not config.raw


def own_the_terminal():
    """So that Ctrl-C goes to this program."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Terminal:
    """A program that believes somebody types."""

    def __init__(self, *command):
        self.master, slave = pty.openpty()
        self.program = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | dict(TERM="xterm", INPUTRC="/dev/null", PYTHONUTF8="1"),
            start_new_session=True,
            preexec_fn=own_the_terminal,
        )
        os.close(slave)

    def type(self, keys):
        os.write(self.master, keys.encode())

    def read_until(self, pattern, again=""):
        """Reads all that the program writes up to and with the pattern.

        A program that hangs is given up after ten minutes: beside ten busy processes, importing
        PyTorch has taken one. The keys `again` are typed each second that nothing comes.
        """
        text, deadline = "", time.time() + 600
        while not re.search(pattern, text):
            if select.select([self.master], [], [], 1)[0]:
                text += os.read(self.master, 1).decode(errors="replace")
            else:
                assert time.time() < deadline, f"no {pattern!r} in {text!r}"
                self.type(again)


def test_in_a_terminal_ctrl_c_stops_the_answer_and_the_program_goes_on(folder):
    terminal = Terminal(*COMMAND, "--model", folder / "long.pt", "--max_new_tokens", "32768")
    terminal.read_until("you> ")
    terminal.type("hello\n")
    # The first piece of an answer that cannot end by itself, however late Ctrl-C comes: its 32768
    # bytes and more do not fit into a terminal's buffers, which nobody empties.
    terminal.read_until(r"hello\r\n.")
    terminal.type("\x03")
    terminal.read_until(r" \[stopped\]\r\n.*you> ")
    terminal.type("/model nowhere.pt\n")
    terminal.read_until(r"error: nowhere.pt: no such file.*\r\n.*you> ")
    terminal.type("/temperature hot\n")
    terminal.read_until(r"now 0.7; a number.*\r\n.*you> ")
    terminal.type("\x1b[A\n")  # arrow up: the line before
    terminal.read_until(r"now 0.7; a number.*\r\n.*you> ")
    terminal.type("/raw\n")
    terminal.read_until("continue> ")
    terminal.type("half a line")
    terminal.read_until("half a line")
    # Python notices one that comes just before it begins to wait for a key only with the next key
    terminal.type("\x03")
    terminal.read_until("continue> ", again="\x03")
    terminal.type("\x04")
    assert terminal.program.wait(timeout=600) == 0
