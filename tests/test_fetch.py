"""data/fetch.py and data/stream.py: downloads from a server of our own, conversions, and text as tokens."""

import contextlib
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import data.tokenizer
from data import conversation, fetch, stream
from pretrain import load_stream

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "real"
WORDS = "".join(f"Line {i}: the {'quick brown fox'[i % 9 :]} — über {i * i} dogs.\n\n" for i in range(300))
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs the real files beside the repository")


def run(*argv):
    fetch.main([str(a) for a in argv])


def failure(*argv):
    """The one line that a failing run ends with."""
    with pytest.raises(SystemExit) as e:
        run(*argv)
    message = e.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def write(path, content):
    """Writes text, bytes, or objects in the form that the file's name asks for; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.removesuffix(".gz").endswith(".jsonl") and isinstance(content, list):
        content = "".join(json.dumps(record) + "\n" for record in content)
    elif path.suffix == ".json" and not isinstance(content, (str, bytes)):
        content = json.dumps(content, indent=1)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def read_tokens(out):
    """(train, val, tokenizer) as pretrain.py reads them."""
    tokenizer = data.tokenizer.load(out / "tokenizer.tiktoken")
    return *(load_stream(out, name, tokenizer) for name in ("train", "val")), tokenizer


def read_documents(out):
    """The texts between the end tokens; the last one is what follows the last end token."""
    train, val, tokenizer = read_tokens(out)
    ids = np.concatenate([train, val])
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.end) + 1)
    return [tokenizer.decode(d[d != tokenizer.end].tolist()) for d in documents]


def read_jsonl(path):
    return common.read_jsonl(path, lambda record: conversation.check(record["messages"]))


# ---- downloading


@pytest.fixture
def server(monkeypatch):
    """A server on 127.0.0.1 for server.files = {path: bytes}; server.requests are the headers it got."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(dict(self.headers))
            content = server.files.get(self.path)
            if content is None:
                return self.send_error(404)
            tag, start = f'"{hashlib.md5(content).hexdigest()}"', 0
            asked = self.headers.get("Range") if server.knows_ranges and self.headers.get("If-Range", tag) == tag else None
            if asked:
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", tag)
            self.end_headers()
            self.wfile.write(content[start : server.cut_at])
            self.close_connection = True

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.requests, server.knows_ranges, server.cut_at = {}, [], True, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def pinned(server, monkeypatch):
    """The server's only file, which is the source `pinned` with its true hash: (bytes, arguments of the command)."""
    content = WORDS.encode()
    server.files["/words.txt"] = content
    source = (f"{server.url}/words.txt", hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(fetch.SOURCES["text"], "pinned", source)
    return content, ["text", "pinned", "--tokenizer", "char"]


def test_a_named_source_is_downloaded_and_asked_for_just_once(server, pinned, tmp_path):
    content, command = pinned
    run(*command, "--out", tmp_path)
    assert (tmp_path / "pinned.txt").read_bytes() == content
    assert "".join(read_documents(tmp_path)) == WORDS
    assert [r.get("Range") for r in server.requests] == [None]
    assert not list(tmp_path.glob("*.part*"))
    run(*command, "--out", tmp_path)
    assert len(server.requests) == 1


def test_a_download_cut_half_way_keeps_what_it_has_and_the_same_command_fetches_the_rest(server, pinned, tmp_path):
    content, command = pinned
    server.cut_at = 5000
    message = failure(*command, "--out", tmp_path)
    assert all(word in message for word in (server.url, "5,000", f"{len(content):,}", "pinned.txt.part", "--from"))
    assert (tmp_path / "pinned.txt.part").read_bytes() == content[:5000]
    assert not (tmp_path / "pinned.txt").exists() and not (tmp_path / "train.bin").exists()
    server.cut_at = None
    run(*command, "--out", tmp_path)
    assert [r.get("Range") for r in server.requests] == [None, "bytes=5000-"]
    assert (tmp_path / "pinned.txt").read_bytes() == content
    assert not list(tmp_path.glob("*.part*"))


def test_a_part_left_by_a_kill_is_continued(server, pinned, tmp_path):
    content, command = pinned
    write(tmp_path / "pinned.txt.part", content[:1234])
    run(*command, "--out", tmp_path)
    assert server.requests[0]["Range"] == "bytes=1234-"
    assert (tmp_path / "pinned.txt").read_bytes() == content


def test_a_part_that_is_whole_already_is_taken(server, pinned, tmp_path):
    content, command = pinned
    write(tmp_path / "pinned.txt.part", content)
    run(*command, "--out", tmp_path)
    assert (tmp_path / "pinned.txt").read_bytes() == content


def test_a_server_that_ignores_ranges_still_gives_the_right_file(server, pinned, tmp_path):
    content, command = pinned
    server.knows_ranges = False
    write(tmp_path / "pinned.txt.part", content[:1234])
    run(*command, "--out", tmp_path)
    assert server.requests[0]["Range"] == "bytes=1234-"
    assert (tmp_path / "pinned.txt").read_bytes() == content


def test_two_versions_of_a_source_are_never_mixed(server, tmp_path):
    command = ["text", "--url", f"{server.url}/own.txt", "--out", tmp_path, "--tokenizer", "char"]
    server.files["/own.txt"], server.cut_at = WORDS.encode(), 3000
    failure(*command)
    server.files["/own.txt"], server.cut_at = WORDS.upper().encode(), None
    run(*command)
    assert server.requests[1]["Range"] == "bytes=3000-"
    assert (tmp_path / "own.txt").read_bytes() == WORDS.upper().encode()


def test_a_part_longer_than_the_source_is_removed(server, pinned, tmp_path):
    content, command = pinned
    write(tmp_path / "pinned.txt.part", content + b"more")
    assert "nothing is kept" in failure(*command, "--out", tmp_path)
    run(*command, "--out", tmp_path)
    assert (tmp_path / "pinned.txt").read_bytes() == content


def test_a_wrong_hash_is_named_and_nothing_is_overwritten(server, tmp_path):
    server.files["/input.txt"] = WORDS.encode()
    old = write(tmp_path / "train.bin", b"old")
    message = failure("text", "shakespeare", "--url", f"{server.url}/input.txt", "--out", tmp_path)
    found, expected = hashlib.sha256(WORDS.encode()).hexdigest(), fetch.SOURCES["text"]["shakespeare"][1]
    assert f"is {found}, not {expected}; the download was removed" in message
    assert old.read_bytes() == b"old" and list(tmp_path.iterdir()) == [old]


def test_404_is_said_in_one_line_with_the_address(server, tmp_path):
    message = failure("instructions", "--url", f"{server.url}/none.jsonl", "--out", tmp_path)
    assert f"{server.url}/none.jsonl: HTTP 404 Not Found; nothing is kept" in message and "--from" in message


def test_a_404_later_keeps_what_is_there(server, tmp_path):
    part = write(tmp_path / "none.jsonl.part", b"some bytes")
    assert f"10 bytes are kept in {part}" in failure("instructions", "--url", f"{server.url}/none.jsonl", "--out", tmp_path)
    assert part.read_bytes() == b"some bytes"


def test_an_unreachable_server_is_said_in_one_line(tmp_path):
    with socket.socket() as s:  # a port on which nobody listens
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/a.txt"
        assert f"{url}: " in failure("text", "--url", url, "--out", tmp_path)


def test_from_touches_no_network(server, pinned, tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError(f"network: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    path = write(tmp_path / "mine.txt", WORDS)
    run("text", "shakespeare", "--url", f"{server.url}/words.txt", "--from", path, "--tokenizer", "char", "--out", tmp_path / "out")
    assert "".join(read_documents(tmp_path / "out")) == WORDS
    assert server.requests == []


def test_parquet_without_pyarrow_is_said_before_anything_is_downloaded(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = failure("text", "fineweb-edu", "--url", f"{server.url}/a.parquet", "--out", tmp_path)
    assert "pip install pyarrow" in message and server.requests == []


def test_every_public_source_has_https_a_readable_ending_and_a_sound_hash():
    for sources in fetch.SOURCES.values():
        for url, sha256 in sources.values():
            assert url.startswith("https://") and url.removesuffix(".gz").endswith(stream.ENDINGS)
            assert sha256 is None or re.fullmatch("[0-9a-f]{64}", sha256)


# ---- text


def nanogpt(text):
    """What nanoGPT's data preparation for characters computes: (train, val) ids."""
    ids = {c: i for i, c in enumerate(sorted(set(text)))}
    train, val = text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]
    return [ids[c] for c in train], [ids[c] for c in val]


@pytest.mark.parametrize("length", [10, 11, 4999, 5000])
def test_characters_are_split_as_nanogpt_does(tmp_path, length):
    path = write(tmp_path / "a.txt", WORDS[:length])
    run("text", "--from", path, "--tokenizer", "char", "--out", tmp_path / "out")
    train, val, tokenizer = read_tokens(tmp_path / "out")
    assert (train.tolist(), val.tolist()) == nanogpt(WORDS[:length])
    assert tokenizer.decode(train) + tokenizer.decode(val) == WORDS[:length]


@needs_real
def test_tiny_shakespeare_gets_characters_and_nanogpts_split_without_being_told(tmp_path):
    run("text", "--from", REAL / "tinyshakespeare.txt", "--out", tmp_path)
    train, val, tokenizer = read_tokens(tmp_path)
    assert (len(train), len(val), len(tokenizer.ranks)) == (1003854, 111540, 65)  # as nanoGPT's README says
    assert (train.tolist(), val.tolist()) == nanogpt((REAL / "tinyshakespeare.txt").read_text())


def test_other_text_gets_a_bpe_that_learns_from_the_first_megabytes(tmp_path):
    path = write(tmp_path / "a.txt", "lower lowest newer " * 60000 + "zzzzzzzz " * 60000)
    run("text", "--from", path, "--out", tmp_path / "out", "--sample_mb", "1")
    ranks = read_tokens(tmp_path / "out")[2].ranks
    assert b" lowest" in ranks and b"zz" not in ranks


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_records_are_documents_that_end_in_the_end_token(tmp_path, name):
    texts = ["First.\n", "zweiter – \u2028 \U0001f600", "", " third"]
    path = write(tmp_path / name, [{"text": t, "id": i} for i, t in enumerate(texts)])
    run("text", "--from", path, "--tokenizer", "char", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out") == [*texts, ""]


def test_parquet_rows_are_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {i}" for i in range(2500)]
    parquet.write_table(pyarrow.table({"text": texts, "score": list(range(2500))}), tmp_path / "a.parquet")
    run("text", "--from", tmp_path / "a.parquet", "--tokenizer", "char", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out") == [*texts, ""]
    parquet.write_table(pyarrow.table({"story": texts}), tmp_path / "b.parquet")
    assert 'b.parquet, row 1: needs "text"' in failure("text", "--from", tmp_path / "b.parquet", "--out", tmp_path / "out2")
    write(tmp_path / "c.parquet", b"no parquet at all")
    assert "c.parquet: not a Parquet file" in failure("text", "--from", tmp_path / "c.parquet", "--out", tmp_path / "out2")


def test_each_text_of_a_folder_is_a_document_in_the_order_of_names(tmp_path):
    for name, text in ("b.txt", "second\n"), ("sub/c.txt.gz", "third"), ("a.txt", "first"), ("notes.md", "no"):
        write(tmp_path / "texts" / name, text)
    run("text", "--from", tmp_path / "texts", "--tokenizer", "char", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out") == ["first", "second\n", "third", ""]


def test_what_is_said_in_conversations_and_pairs_is_text_too(tmp_path):
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a\nb"}]
    write(tmp_path / "texts/1.jsonl", [{"messages": turns}, {"messages": turns[:2], "chosen": "yes", "rejected": "no"}])
    write(tmp_path / "texts/2.jsonl", [{"messages": turns, "text": "t"}])
    run("text", "--from", tmp_path / "texts", "--tokenizer", "char", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out") == ["s\n\nq\n\na\nb", "s\n\nq\n\nyes\n\nno", "t", ""]


@pytest.mark.parametrize("piece", [3, 10, 1 << 20])
def test_endoftext_in_a_text_ends_a_document(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(stream, "PIECE", piece)
    stories = ["Once upon a time.", "There was\n\na fox", "The end"]
    path = write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(stories[:2]) + "<|endoftext|>" + stories[2] + "\n<|endoftext|>\n")
    run("text", "--from", path, "--tokenizer", "char", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out") == [*stories, ""]


def test_a_single_text_holds_no_end_token(tmp_path):
    path = write(tmp_path / "a.txt", WORDS)
    run("text", "--from", path, "--tokenizer", "bpe:300", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out") == [WORDS]


def test_the_validation_share_is_the_end_of_the_tokens_and_a_million_at_most(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", WORDS)
    command = ["text", "--from", path, "--tokenizer", "char", "--out", tmp_path / "out"]
    run(*command, "--val_share", "0.25")
    assert tuple(map(len, read_tokens(tmp_path / "out")[:2])) == (int(len(WORDS) * 0.75), len(WORDS) - int(len(WORDS) * 0.75))
    monkeypatch.setattr(stream, "MAX_VAL", 100)
    run(*command)
    assert len(read_tokens(tmp_path / "out")[1]) == 100


@pytest.mark.parametrize("n_ids, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_ids_are_uint16_as_long_as_they_fit(tmp_path, n_ids, dtype):
    made_up = [b"\xff\xff" + i.to_bytes(3, "big") for i in range(n_ids - 256 - len(data.tokenizer.SPECIAL_TOKENS))]
    tokenizer = data.tokenizer.Tokenizer({token: rank for rank, token in enumerate([bytes([b]) for b in range(256)] + made_up)})
    assert tokenizer.vocab_size == n_ids
    write(tmp_path / "big.tiktoken", tokenizer.dumps())
    path = write(tmp_path / "a.jsonl", [{"text": WORDS}])
    run("text", "--from", path, "--tokenizer", tmp_path / "big.tiktoken", "--out", tmp_path / "out")
    train, _, _ = read_tokens(tmp_path / "out")
    assert train.dtype == dtype and np.fromfile(tmp_path / "out/val.bin", dtype)[-1] == tokenizer.end
    assert read_documents(tmp_path / "out") == [WORDS, ""]


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs tiktoken's cache, TIKTOKEN_CACHE_DIR")
def test_gpt2_tokens_are_tiktokens(tmp_path):
    path = write(tmp_path / "a.txt", WORDS)
    run("text", "--from", path, "--tokenizer", "gpt2", "--out", tmp_path / "out")
    train, val, _ = read_tokens(tmp_path / "out")
    assert [*train, *val] == tiktoken.get_encoding("gpt2").encode(WORDS)


QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
bits = st.sampled_from(["a", "Bc", "été", "٣", "7", "42", "中", "_", "'s", ".", "?!", "—", " ", "  ", "\n", "\n\n", " \n", "\t", "\u3000"])


@pytest.mark.parametrize("pattern", [data.tokenizer.BPE_PATTERN, QWEN_PATTERN])
@settings(deadline=None, max_examples=300)
@given(st.lists(bits, max_size=40))
def test_a_text_read_in_pieces_has_the_pre_tokens_of_the_whole(pattern, parts):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "PIECE", 10)  # so 80 characters can pass before a piece is cut anywhere
        pieces = [piece for piece, _ in stream.split_text("a.txt", io.BytesIO(text.encode()), False)]
    assert "".join(pieces) == text
    assert list(itertools.chain.from_iterable(regex.findall(pattern, piece) for piece in pieces)) == regex.findall(pattern, text)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_reading_text_takes_the_same_memory_however_long_it_is(tmp_path, monkeypatch, name):
    monkeypatch.setattr(stream, "PIECE", 20_000)
    peaks = []
    for n in 10, 300:
        path = write(tmp_path / name, [{"text": WORDS}] * n if ".jsonl" in name else WORDS * n)
        tracemalloc.start()
        assert sum(len(text) for text, _ in stream.read_pieces(path)) == n * len(WORDS)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 100_000 < 300 * len(WORDS) / 5


def test_the_result_depends_neither_on_the_processes_nor_on_the_parts(tmp_path, monkeypatch):
    texts = [WORDS[i : i + 100 + i % 7] for i in range(0, len(WORDS) - 200, 97)]
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    results = {}
    for workers, part in (1, 1 << 22), (1, 700), (3, 700):
        monkeypatch.setattr(stream, "PART", part)
        out = tmp_path / f"{workers} {part}"
        run("text", "--from", path, "--tokenizer", "bpe:300", "--out", out, "--workers", workers)
        results[out.name] = [(out / name).read_bytes() for name in ("train.bin", "val.bin", "tokenizer.tiktoken")]
        assert not (out / ".parts").exists()
    assert results["1 4194304"] == results["1 700"] == results["3 700"]
    assert read_documents(tmp_path / "3 700") == [*texts, ""]


def stop_half_way(folder, workers, stop):
    """Starts tokenizing in folder and stops it by stop(process id) when some parts are done. Returns (the source, what it printed)."""
    path = write(folder / "a.txt", WORDS * 200)
    code = "import sys; from data import fetch, stream; stream.PIECE, stream.PART = 5000, 20000; fetch.main(sys.argv[1:])"
    command = ["text", "--from", path, "--tokenizer", "bpe:300", "--workers", str(workers), "--out", folder / "out"]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", code, *command], **options)
    while not (folder / "out/.parts/00002.bin").exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            pytest.fail(f"ended with {process.wait(0.01)} before it could be stopped: {process.stdout.read()}")
    stop(process.pid)
    printed, _ = process.communicate(timeout=60)  # ends when nobody holds the pipe any more: the workers went with their parent
    assert process.returncode != 0
    assert 2 < len(list((folder / "out/.parts").glob("*.bin"))) < len(path.read_text()) / 20000
    assert not (folder / "out/train.bin").exists()
    return path, printed


def test_ctrl_c_is_answered_in_one_line(tmp_path):
    _, printed = stop_half_way(tmp_path, 1, lambda pid: os.killpg(pid, signal.SIGINT))  # as a terminal does
    assert printed == "error: stopped; the same command goes on from here\n"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(the source, the folder that a killed run left): some parts are finished, most are not."""
    folder = tmp_path_factory.mktemp("killed")
    path, _ = stop_half_way(folder, 2, lambda pid: os.kill(pid, signal.SIGKILL))
    return path, folder / "out"


def go_on(killed, tmp_path, monkeypatch, *more):
    """The killed run's command again, on a copy whose first finished part now holds 0s only. Returns that part's length."""
    path, left = killed
    shutil.copytree(left, tmp_path / "out")
    first = tmp_path / "out/.parts/00000.bin"
    n = first.stat().st_size // 2
    first.write_bytes(bytes(2 * n))
    monkeypatch.setattr(stream, "PIECE", 5000)
    monkeypatch.setattr(stream, "PART", 20000)
    run("text", "--from", path, "--out", tmp_path / "out", *(more or ["--tokenizer", "bpe:300"]))
    return n


def test_after_a_kill_the_same_command_keeps_the_finished_parts_and_does_the_rest(killed, tmp_path, monkeypatch):
    path, _ = killed
    run("text", "--from", path, "--tokenizer", "bpe:300", "--out", tmp_path / "whole")
    whole, _, _ = read_tokens(tmp_path / "whole")
    n = go_on(killed, tmp_path, monkeypatch)
    train, _, _ = read_tokens(tmp_path / "out")
    assert 1000 < n < len(whole) and (train[:n] == 0).all() and (train[n:] == whole[n:]).all()
    assert (tmp_path / "out/val.bin").read_bytes() == (tmp_path / "whole/val.bin").read_bytes()
    assert not (tmp_path / "out/.parts").exists()


@pytest.mark.parametrize("more", [["--tokenizer", "char"], ["--tokenizer", "bpe:300", "--sample_mb", "1"]])
def test_parts_of_other_settings_are_not_used(killed, tmp_path, monkeypatch, more):
    go_on(killed, tmp_path, monkeypatch, *more)
    assert read_documents(tmp_path / "out") == [killed[0].read_text()]


def test_parts_of_another_text_are_not_used(killed, tmp_path, monkeypatch):
    path = shutil.copy2(killed[0], tmp_path / "a.txt")
    go_on((path, killed[1]), tmp_path, monkeypatch)
    assert read_documents(tmp_path / "out") == [path.read_text()]


# ---- conversations


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "record, messages",
    [
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, [user("Add.\n\n1 1"), assistant("2")]),
        ({"instruction": "Sing.", "input": "", "output": "la"}, [user("Sing."), assistant("la")]),
        ({"instruction": "Sing.", "output": "la", "text": "both in a template"}, [user("Sing."), assistant("la")]),
        ({"messages": [{**user("a"), "id": 1}, assistant("b")], "source": "x"}, [user("a"), assistant("b")]),
        ({"messages": [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c"), assistant("d")]}, None),
        ({"instruction": "half \ud83d", "output": "whole \ud83d\ude00"}, [user("half \ufffd"), assistant("whole \U0001f600")]),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_instructions_become_conversations(tmp_path, name, record, messages):
    path = write(tmp_path / name, [record])
    run("instructions", "--from", path, "--out", tmp_path / "out")
    assert read_jsonl(tmp_path / "out/sft.jsonl") == [{"messages": messages or record["messages"]}]


HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Joke?\n\nAssistant: "
TURNS = [user("Hi"), assistant("Hello!"), user("Joke?")]


@pytest.mark.parametrize(
    "record, prompt",
    [
        ({"chosen": HH + "Yes.", "rejected": HH + "No.\n\nNever."}, TURNS),
        ({"messages": TURNS, "chosen": "Yes.", "rejected": "No.\n\nNever."}, TURNS),
        ({"prompt": "Joke?", "chosen": "Yes.", "rejected": "No.\n\nNever."}, TURNS[2:]),
        ({"instruction": "Joke", "input": "now", "output": "x", "chosen": "Yes.", "rejected": "No.\n\nNever."}, [user("Joke\n\nnow")]),
        ({"prompt": "Joke?", "chosen": [*TURNS, assistant("Yes.")], "rejected": [*TURNS, assistant("No.\n\nNever.")], "score": 1}, TURNS),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_preferences_of_each_form_become_pairs_and_prompts(tmp_path, name, record, prompt):
    path = write(tmp_path / name, [record, {**record, "rejected": record["chosen"]}, record])
    run("preferences", "--from", path, "--out", tmp_path / "out")
    pair = {"messages": prompt, "chosen": "Yes.", "rejected": "No.\n\nNever."}
    assert read_jsonl(tmp_path / "out/preferences.jsonl") == [pair, pair]
    assert read_jsonl(tmp_path / "out/prompts.jsonl") == [{"messages": prompt}]


def test_parquet_pairs_are_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    run("preferences", "--from", tmp_path / "a.parquet", "--out", tmp_path / "out")
    assert read_jsonl(tmp_path / "out/preferences.jsonl") == [{"messages": [user("a")], "chosen": "b", "rejected": "c"}]


@pytest.mark.parametrize(
    "chosen, rejected, reason",
    [
        (HH + "Yes.", HH.replace("Joke", "Song") + "No.", "different prompts"),
        (HH + "Yes.", HH + "Yes.", "two equal answers"),
        (HH + "Yes.", HH + " ", "an empty message"),
        (HH + "Yes.", HH + "No.\n\nAssistant: And no.", "turns out of order"),
        (HH + "Yes.\n\nHuman: Thanks", HH + "Yes.\n\nHuman: Why?", "no answer at the end"),
        ([assistant("b")], [assistant("c")], None),
        ([user("a")], [user("b")], "no answer at the end"),
    ],
)
def test_pairs_that_cannot_be_used_are_left_out_and_counted(tmp_path, capsys, chosen, rejected, reason):
    good = {"chosen": HH + "Yes.", "rejected": HH + "No."}
    path = write(tmp_path / "a.jsonl", [good, {"chosen": chosen, "rejected": rejected}])
    if reason is None:
        assert "a.jsonl, line 2: roles must be" in failure("preferences", "--from", path, "--out", tmp_path / "out")
        return
    run("preferences", "--from", path, "--out", tmp_path / "out")
    assert f"1 records, left out: 1 with {reason}" in capsys.readouterr().out
    assert len(read_jsonl(tmp_path / "out/preferences.jsonl")) == 1


def test_instructions_without_an_answer_are_left_out_and_counted(tmp_path, capsys):
    path = write(tmp_path / "a.json", [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": " "}])
    run("instructions", "--from", path, "--out", tmp_path / "out")
    assert "1 records, left out: 1 with an empty message" in capsys.readouterr().out


@needs_real
def test_the_real_files_convert(tmp_path):
    both = REAL / "instruction-data-with-preference.json"
    run("instructions", "--from", both, "--out", tmp_path)
    run("preferences", "--from", both, "--out", tmp_path)
    assert len(read_jsonl(tmp_path / "sft.jsonl")) == 1100
    same = sum(r["chosen"] == r["rejected"] for r in json.loads(both.read_text()))
    assert len(read_jsonl(tmp_path / "preferences.jsonl")) == 1100 - same
    run("preferences", "--from", REAL / "hh-rlhf-harmless-base-test.jsonl.gz", "--out", tmp_path)
    pairs = read_jsonl(tmp_path / "preferences.jsonl")
    assert 2290 < len(pairs) < 2312
    with gzip.open(REAL / "hh-rlhf-harmless-base-test.jsonl.gz") as f:
        transcripts = {"".join(json.loads(line)["chosen"].split()) for line in f}
    speakers = {"user": "Human", "assistant": "Assistant"}
    for pair in pairs:  # put together again, they are the transcripts
        turns = [*pair["messages"], assistant(pair["chosen"])]
        assert "".join("".join(f"{speakers[m['role']]}: {m['content']}" for m in turns).split()) in transcripts


# ---- wrong input


@pytest.mark.parametrize(
    "kind, name, content, expected",
    [
        ("text", "a.txt", b"fine\n\xc3\xa9\nbad \xff byte\n", "a.txt, line 3: not UTF-8"),
        ("text", "a.txt", "", "a.txt: 0 tokens are too few"),
        ("text", "a.txt", "x", "a.txt: 1 tokens are too few"),
        ("text", "a.md", "x", "a.md: no .txt, .jsonl"),
        ("text", "a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', "a.jsonl, line 3: not JSON"),
        ("text", "a.jsonl", '{"text": "a"}\n{"content": "b"}\n', 'a.jsonl, line 2: needs "text"'),
        ("text", "a.jsonl", '{"text": 1}\n', 'a.jsonl, line 1: needs "text"'),
        ("text", "a.jsonl", '{"messages": [1]}\n', "a.jsonl, line 1: message 1 must be"),
        ("text", "a.jsonl", [{"messages": [user("p")], "chosen": 1}], 'a.jsonl, line 1: needs "chosen"'),
        ("text", "a.jsonl", b'{"text": "\xff"}\n', "a.jsonl, line 1: not JSON in UTF-8"),
        ("text", "a.jsonl", '[{"text": "a"}]\n', "a.jsonl, line 1: not an object"),
        ("text", "a.json", '{"text": "a"}\n{"text": "b"}\n', "a.json: not JSON"),
        ("text", "a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("instructions", "a.json", "[" * 100_000, "a.json: not JSON"),
        ("text", "a.json", ["a"], "a.json, record 1: not an object"),
        ("instructions", "a.jsonl", "", "a.jsonl: holds no usable records"),
        ("instructions", "a.jsonl", [{"instruction": "a", "output": ""}], "a.jsonl: holds no usable records"),
        ("instructions", "a.jsonl", [{"question": "a", "answer": "b"}], 'a.jsonl, line 1: needs "messages", or "instruction"'),
        ("instructions", "a.json", [{"instruction": "a", "output": "b"}, {"output": "b"}], 'a.json, record 2: needs "instruction"'),
        ("instructions", "a.jsonl", [{"instruction": "a", "output": None}], 'a.jsonl, line 1: needs "output"'),
        ("instructions", "a.jsonl", [{"messages": [user("a")]}], "a.jsonl, line 1: the conversation must end in"),
        ("instructions", "a.jsonl", [{"messages": [user("a"), user("b")]}], "a.jsonl, line 1: roles must be"),
        ("instructions", "a.jsonl", [{"messages": "a"}], "a.jsonl, line 1: messages must be a list"),
        ("preferences", "a.jsonl", [{"chosen": "a", "rejected": "b"}], 'a.jsonl, line 1: needs "chosen" and "rejected"'),
        ("preferences", "a.jsonl", [{"prompt": "p", "chosen": "a"}], 'a.jsonl, line 1: needs "rejected"'),
        ("preferences", "a.jsonl", [{"prompt": "p", "chosen": "a", "rejected": [user("p")]}], 'a.jsonl, line 1: needs "rejected"'),
        ("preferences", "a.jsonl", [{"messages": TURNS[:2], "chosen": "a", "rejected": "b"}], "a.jsonl, line 1: roles must be"),
        ("preferences", "a.jsonl", [{"chosen": [1], "rejected": [2]}], "a.jsonl, line 1: message 1 must be"),
        ("preferences", "a.txt", "what is this", "a.txt: not JSON"),
    ],
)
def test_wrong_input_is_named_in_one_line_and_nothing_is_written(tmp_path, kind, name, content, expected):
    path = write(tmp_path / name, content)
    assert expected in failure(kind, "--from", path, "--out", tmp_path / "out")
    assert not any(p for p in (tmp_path / "out").glob("*") if p.name != ".parts")


def test_a_damaged_archive_is_named_in_one_line(tmp_path):
    path = write(tmp_path / "a.jsonl.gz", [{"instruction": f"{i}", "output": "b"} for i in range(1000)])
    for content in path.read_bytes()[:-100], b"no gzip", path.read_bytes()[:50] + b"\0" * 50 + path.read_bytes()[100:]:
        path.write_bytes(content)
        assert "a.jsonl.gz: cannot be read" in failure("instructions", "--from", path, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["text"], "which text? name one of shakespeare"),
        (["instructions", "shakespeare"], "shakespeare: not a public source of instructions; use alpaca"),
        (["text", "--from", "missing.txt"], "missing.txt: no such file or folder"),
        (["text", "--from", "tests/test_fetch.py"], "test_fetch.py: no .txt"),
        (["text", "--from", "missing.txt", "--val_share", "1"], "--val_share 1.0: must be between 0 and 1"),
        (["text", "--from", "missing.txt", "--workers", "0"], "--workers and --sample_mb must be at least 1"),
        (["text", "--url", "http://127.0.0.1/"], "http://127.0.0.1/: must end in .txt"),
        (["text", "--url", "mine.txt"], "mine.txt: unknown url type"),
        (["text", "--url", "http://[::1/mine.txt"], "http://[::1/mine.txt: Invalid IPv6 URL"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(ROOT)
    assert expected in failure(*arguments, "--out", tmp_path / "out")


@pytest.mark.parametrize("name", ["words", "bpe:12", "bpe:x", "bpe:²", "none.tiktoken"])
def test_a_wrong_tokenizer_is_said_in_one_line(tmp_path, name):
    path = write(tmp_path / "a.txt", WORDS)
    assert name.removeprefix("bpe:") in failure("text", "--from", path, "--tokenizer", name, "--out", tmp_path)
    assert not (tmp_path / "train.bin").exists()
