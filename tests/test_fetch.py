"""data/fetch.py and data/stream.py: downloads, conversions, and text as tokens."""

import contextlib
import gzip
import hashlib
import http.server
import io
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

import data.tokenizer
from data import conversation, fetch, stream
from data.examples import load_stream
from utils import files

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "real"
WORDS = [f"Line {i}: the {'quick brown fox'[i % 9 :]} — über {i * i} dogs.\n\n" for i in range(300)]
WORDS = "".join(WORDS)
needs_real = pytest.mark.skipif(not REAL.exists(), reason="needs the real files")


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
    """Writes text, bytes, or objects in the form that the file's name asks for; returns path."""
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
    train, val = [load_stream(out, name, tokenizer, seq_len=0) for name in ("train", "val")]
    return train, val, tokenizer


def read_documents(out):
    """The texts between the end tokens; the last one is what follows the last end token."""
    train, val, tokenizer = read_tokens(out)
    ids = np.concatenate([train, val])
    documents = np.split(ids, np.flatnonzero(ids == tokenizer.end) + 1)
    return [tokenizer.decode(d[d != tokenizer.end].tolist()) for d in documents]


def read_jsonl(path):
    return files.read_jsonl(path, lambda record: conversation.check(record["messages"]))


# ---- downloading


@pytest.fixture
def server(monkeypatch):
    """A server on 127.0.0.1: server.files is {path: bytes}, server.requests the headers it got."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(dict(self.headers))
            content = server.files.get(self.path)
            if content is None:
                return self.send_error(404)
            tag, start = f'"{hashlib.md5(content).hexdigest()}"', 0
            is_same = self.headers.get("If-Range", tag) == tag
            asked = self.headers.get("Range") if server.knows_ranges and is_same else None
            if asked:
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
            self.send_response(206 if asked else 200)
            if asked:
                sent = f"bytes {start}-{len(content) - 1}/{len(content)}"
                self.send_header("Content-Range", sent)
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
    """The server's only file, the source `pinned` with its true hash: (bytes, arguments)."""
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


def test_a_download_cut_half_way_is_kept_and_continued(server, pinned, tmp_path):
    content, command = pinned
    server.cut_at = 5000
    message = failure(*command, "--out", tmp_path)
    said = (server.url, "5,000", f"{len(content):,}", "pinned.txt.part", "--from")
    assert all(word in message for word in said)
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
    assert "; 0 bytes are kept" in failure(*command, "--out", tmp_path)
    run(*command, "--out", tmp_path)
    assert (tmp_path / "pinned.txt").read_bytes() == content


def test_a_wrong_hash_is_named_and_nothing_is_overwritten(server, tmp_path):
    server.files["/input.txt"] = WORDS.encode()
    old = write(tmp_path / "train.bin", b"old")
    message = failure("text", "shakespeare", "--url", f"{server.url}/input.txt", "--out", tmp_path)
    found = hashlib.sha256(WORDS.encode()).hexdigest()
    expected = fetch.SOURCES["text"]["shakespeare"][1]
    assert f"is {found}, not {expected}; removed" in message
    assert old.read_bytes() == b"old" and list(tmp_path.iterdir()) == [old]


def test_404_is_said_in_one_line_with_the_address(server, tmp_path):
    message = failure("instructions", "--url", f"{server.url}/none.jsonl", "--out", tmp_path)
    assert f"{server.url}/none.jsonl: HTTP Error 404: Not Found; 0 bytes are kept" in message
    assert "--from" in message


def test_a_404_later_keeps_what_is_there(server, tmp_path):
    part = write(tmp_path / "none.jsonl.part", b"some bytes")
    message = failure("instructions", "--url", f"{server.url}/none.jsonl", "--out", tmp_path)
    assert f"10 bytes are kept in {part}" in message
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
    source = ["shakespeare", "--url", f"{server.url}/words.txt", "--from", path]
    run("text", *source, "--tokenizer", "char", "--out", tmp_path / "out")
    assert "".join(read_documents(tmp_path / "out")) == WORDS
    assert server.requests == []


def test_missing_pyarrow_is_said_before_anything_is_downloaded(server, tmp_path, monkeypatch):
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
    sizes = (len(train), len(val), len(tokenizer.ranks))
    assert sizes == (1003854, 111540, 65)  # as nanoGPT's README says
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
    table = pyarrow.table({"text": texts, "score": list(range(2500))})
    parquet.write_table(table, tmp_path / "a.parquet")
    run("text", "--from", tmp_path / "a.parquet", "--tokenizer", "char", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out") == [*texts, ""]
    parquet.write_table(pyarrow.table({"story": texts}), tmp_path / "b.parquet")
    message = failure("text", "--from", tmp_path / "b.parquet", "--out", tmp_path / "out2")
    assert 'b.parquet, row 1: needs "text"' in message
    write(tmp_path / "c.parquet", b"no parquet at all")
    message = failure("text", "--from", tmp_path / "c.parquet", "--out", tmp_path / "out2")
    assert "c.parquet: not a Parquet file" in message


def test_each_text_of_a_folder_is_a_document_in_the_order_of_names(tmp_path):
    texts = {"b.txt": "second\n", "sub/c.txt.gz": "third", "a.txt": "first", "notes.md": "no"}
    for name, text in texts.items():
        write(tmp_path / "texts" / name, text)
    run("text", "--from", tmp_path / "texts", "--tokenizer", "char", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out") == ["first", "second\n", "third", ""]


def test_what_is_said_in_conversations_and_pairs_is_text_too(tmp_path):
    turns = [system("s"), user("q"), assistant("a\nb")]
    pair = {"messages": turns[:2], "chosen": "yes", "rejected": "no"}
    write(tmp_path / "texts/1.jsonl", [{"messages": turns}, pair])
    write(tmp_path / "texts/2.jsonl", [{"messages": turns, "text": "t"}])
    run("text", "--from", tmp_path / "texts", "--tokenizer", "char", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out") == ["s\n\nq\n\na\nb", "s\n\nq\n\nyes\n\nno", "t", ""]


@pytest.mark.parametrize("piece", [3, 10, 1 << 20])
def test_endoftext_in_a_text_ends_a_document(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(stream, "PIECE", piece)
    stories = ["Once upon a time.", "There was\n\na fox", "The end"]
    text = "\n<|endoftext|>\n".join(stories[:2]) + "<|endoftext|>" + stories[2]
    path = write(tmp_path / "a.txt", text + "\n<|endoftext|>\n")
    run("text", "--from", path, "--tokenizer", "char", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out") == [*stories, ""]


def test_a_single_text_holds_no_end_token(tmp_path):
    path = write(tmp_path / "a.txt", WORDS)
    run("text", "--from", path, "--tokenizer", "bpe:300", "--out", tmp_path / "out")
    assert read_documents(tmp_path / "out") == [WORDS]


def test_validation_takes_the_last_tokens_and_a_million_at_most(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", WORDS)
    command = ["text", "--from", path, "--tokenizer", "char", "--out", tmp_path / "out"]
    run(*command, "--val_fraction", "0.25")
    n_train = int(len(WORDS) * 0.75)
    train, val, _ = read_tokens(tmp_path / "out")
    assert (len(train), len(val)) == (n_train, len(WORDS) - n_train)
    monkeypatch.setattr(stream, "MAX_VAL", 100)
    run(*command)
    assert len(read_tokens(tmp_path / "out")[1]) == 100


@pytest.mark.parametrize("n_ids, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_ids_are_uint16_as_long_as_they_fit(tmp_path, n_ids, dtype):
    ranks = {bytes([b]): b for b in range(256)}
    for i in range(n_ids - 256 - len(data.tokenizer.SPECIAL_TOKENS)):
        ranks[b"\xff\xff" + i.to_bytes(3, "big")] = 256 + i
    tokenizer = data.tokenizer.Tokenizer(ranks)
    assert tokenizer.vocab_size == n_ids
    write(tmp_path / "big.tiktoken", tokenizer.dumps())
    path = write(tmp_path / "a.jsonl", [{"text": WORDS}])
    run("text", "--from", path, "--tokenizer", tmp_path / "big.tiktoken", "--out", tmp_path / "out")
    train, _, _ = read_tokens(tmp_path / "out")
    assert train.dtype == dtype
    assert np.fromfile(tmp_path / "out/val.bin", dtype)[-1] == tokenizer.end
    assert read_documents(tmp_path / "out") == [WORDS, ""]


@pytest.mark.skipif("TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs TIKTOKEN_CACHE_DIR")
def test_gpt2_tokens_are_tiktokens(tmp_path):
    path = write(tmp_path / "a.txt", WORDS)
    run("text", "--from", path, "--tokenizer", "gpt2", "--out", tmp_path / "out")
    train, val, _ = read_tokens(tmp_path / "out")
    assert [*train, *val] == tiktoken.get_encoding("gpt2").encode(WORDS)


QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BITS = "a Bc été ٣ 7 42 中 _ 's . ?! —".split() + [" ", "  ", "\n", "\n\n", " \n", "\t", "\u3000"]


@pytest.mark.parametrize("pattern", [data.tokenizer.BPE_PATTERN, QWEN_PATTERN])
@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(BITS), max_size=40))
def test_a_text_read_in_pieces_has_the_pre_tokens_of_the_whole(pattern, parts):
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        # so 80 characters can pass before a piece is cut anywhere
        patch.setattr(stream, "PIECE", 10)
        whole = io.BytesIO(text.encode())
        pieces = [piece for piece, _ in stream.split_text("a.txt", whole, False)]
    assert "".join(pieces) == text
    words = [word for piece in pieces for word in regex.findall(pattern, piece)]
    assert words == regex.findall(pattern, text)


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


TEXT_FILES = ("train.bin", "val.bin", "tokenizer.tiktoken")


def test_the_result_depends_neither_on_the_processes_nor_on_the_parts(tmp_path, monkeypatch):
    texts = [WORDS[i : i + 100 + i % 7] for i in range(0, len(WORDS) - 200, 97)]
    path = write(tmp_path / "a.jsonl", [{"text": t} for t in texts])
    results = {}
    for workers, part in (1, 1 << 22), (1, 700), (3, 700):
        monkeypatch.setattr(stream, "PART", part)
        out = tmp_path / f"{workers} {part}"
        run("text", "--from", path, "--tokenizer", "bpe:300", "--out", out, "--workers", workers)
        results[out.name] = [(out / name).read_bytes() for name in TEXT_FILES]
        assert not (out / ".parts").exists()
    assert results["1 4194304"] == results["1 700"] == results["3 700"]
    assert read_documents(tmp_path / "3 700") == [*texts, ""]


def stop_half_way(folder, workers, stop):
    """Starts tokenizing in folder and stops it by stop(process id) when some parts are done.

    Returns (the source, what it printed).
    """
    path = write(folder / "a.txt", WORDS * 200)
    code = (
        "import sys; from data import fetch, stream; "
        "stream.PIECE, stream.PART = 5000, 20000; fetch.main(sys.argv[1:])"
    )
    command = ["text", "--from", path, "--out", folder / "out"]
    command += ["--tokenizer", "bpe:300", "--workers", str(workers)]
    options = dict(cwd=ROOT, text=True, start_new_session=True)
    options |= dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = subprocess.Popen([sys.executable, "-c", code, *command], **options)
    while not (folder / "out/.parts/00002.bin").exists():
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(0.01)
            pytest.fail(f"ended with {code} before it could be stopped: {process.stdout.read()}")
    stop(process.pid)
    # ends when nobody holds the pipe any more: the workers went with their parent
    printed, _ = process.communicate(timeout=600)
    assert process.returncode != 0
    assert 2 < len(list((folder / "out/.parts").glob("*.bin"))) < len(path.read_text()) / 20000
    assert not (folder / "out/train.bin").exists()
    return path, printed


def test_ctrl_c_is_answered_in_one_line(tmp_path):
    def as_a_terminal_does(pid):
        os.killpg(pid, signal.SIGINT)

    _, printed = stop_half_way(tmp_path, 1, as_a_terminal_does)
    assert printed == "error: stopped; the same command continues from here\n"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """(the source, the folder that a killed run left): some parts are finished, most are not."""
    folder = tmp_path_factory.mktemp("killed")
    path, _ = stop_half_way(folder, 2, lambda pid: os.kill(pid, signal.SIGKILL))
    return path, folder / "out"


def go_on(killed, tmp_path, monkeypatch, *more):
    """The killed run's command again, on a copy whose first finished part now holds 0s only.

    Returns that part's length.
    """
    path, left = killed
    shutil.copytree(left, tmp_path / "out")
    first = tmp_path / "out/.parts/00000.bin"
    n = first.stat().st_size // 2
    first.write_bytes(bytes(2 * n))
    monkeypatch.setattr(stream, "PIECE", 5000)
    monkeypatch.setattr(stream, "PART", 20000)
    run("text", "--from", path, "--out", tmp_path / "out", *(more or ["--tokenizer", "bpe:300"]))
    return n


def test_after_a_kill_finished_parts_are_kept_and_the_rest_is_done(killed, tmp_path, monkeypatch):
    path, _ = killed
    run("text", "--from", path, "--tokenizer", "bpe:300", "--out", tmp_path / "whole")
    whole, _, _ = read_tokens(tmp_path / "whole")
    n = go_on(killed, tmp_path, monkeypatch)
    train, _, _ = read_tokens(tmp_path / "out")
    assert 1000 < n < len(whole) and (train[:n] == 0).all() and (train[n:] == whole[n:]).all()
    assert (tmp_path / "out/val.bin").read_bytes() == (tmp_path / "whole/val.bin").read_bytes()
    assert not (tmp_path / "out/.parts").exists()


@pytest.mark.parametrize(
    "more", [["--tokenizer", "char"], ["--tokenizer", "bpe:300", "--sample_mb", "1"]]
)
def test_parts_of_other_settings_are_not_used(killed, tmp_path, monkeypatch, more):
    go_on(killed, tmp_path, monkeypatch, *more)
    assert read_documents(tmp_path / "out") == [killed[0].read_text()]


def test_parts_of_another_text_are_not_used(killed, tmp_path, monkeypatch):
    path = shutil.copy2(killed[0], tmp_path / "a.txt")
    go_on((path, killed[1]), tmp_path, monkeypatch)
    assert read_documents(tmp_path / "out") == [path.read_text()]


# ---- conversations


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "record, messages",
    [
        (
            {"instruction": "Add.", "input": "1 1", "output": "2"},
            [user("Add.\n\n1 1"), assistant("2")],
        ),
        ({"instruction": "Sing.", "input": "", "output": "la"}, [user("Sing."), assistant("la")]),
        (
            {"instruction": "Sing.", "output": "la", "text": "both in a template"},
            [user("Sing."), assistant("la")],
        ),
        (
            {"messages": [{**user("a"), "id": 1}, assistant("b")], "source": "x"},
            [user("a"), assistant("b")],
        ),
        (
            {"messages": [system("s"), user("a"), assistant("b"), user("c"), assistant("d")]},
            None,
        ),
        (
            {"instruction": "half \ud83d", "output": "whole \ud83d\ude00"},
            [user("half \ufffd"), assistant("whole \U0001f600")],
        ),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.jsonl.gz"])
def test_instructions_become_conversations(tmp_path, name, record, messages):
    path = write(tmp_path / name, [record])
    run("instructions", "--from", path, "--out", tmp_path / "out")
    assert read_jsonl(tmp_path / "out/sft.jsonl") == [{"messages": messages or record["messages"]}]


HH = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Joke?\n\nAssistant: "
TURNS = [user("Hi"), assistant("Hello!"), user("Joke?")]
ANSWERS = {"chosen": "Yes.", "rejected": "No.\n\nNever."}
TRANSCRIPTS = {key: HH + answer for key, answer in ANSWERS.items()}
CHATS = {key: [*TURNS, assistant(answer)] for key, answer in ANSWERS.items()}


@pytest.mark.parametrize(
    "record, prompt",
    [
        (TRANSCRIPTS, TURNS),
        ({"messages": TURNS, **ANSWERS}, TURNS),
        ({"prompt": "Joke?", **ANSWERS}, TURNS[2:]),
        ({"instruction": "Joke", "input": "now", "output": "x", **ANSWERS}, [user("Joke\n\nnow")]),
        ({"prompt": "Joke?", **CHATS, "score": 1}, TURNS),
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
    chosen, rejected = [user("a"), assistant("b")], [user("a"), assistant("c")]
    rows = [{"prompt": "a", "chosen": chosen, "rejected": rejected}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    run("preferences", "--from", tmp_path / "a.parquet", "--out", tmp_path / "out")
    pair = {"messages": [user("a")], "chosen": "b", "rejected": "c"}
    assert read_jsonl(tmp_path / "out/preferences.jsonl") == [pair]


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
def test_unusable_pairs_are_left_out_and_counted(tmp_path, capsys, chosen, rejected, reason):
    good = {"chosen": HH + "Yes.", "rejected": HH + "No."}
    path = write(tmp_path / "a.jsonl", [good, {"chosen": chosen, "rejected": rejected}])
    if reason is None:
        message = failure("preferences", "--from", path, "--out", tmp_path / "out")
        assert "a.jsonl, line 2: roles must be" in message
        return
    run("preferences", "--from", path, "--out", tmp_path / "out")
    assert f"1 records, left out: 1 with {reason}" in capsys.readouterr().out
    assert len(read_jsonl(tmp_path / "out/preferences.jsonl")) == 1


def test_instructions_without_an_answer_are_left_out_and_counted(tmp_path, capsys):
    records = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": " "}]
    path = write(tmp_path / "a.json", records)
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
        text = "".join(f"{speakers[m['role']]}: {m['content']}" for m in turns)
        assert "".join(text.split()) in transcripts


# ---- wrong input


DEMO = {"instruction": "a", "output": "b"}
QA = {"question": "a", "answer": "b"}
PAIR = {"chosen": "a", "rejected": "b"}
END = ", line 1: the conversation must end in"
MESSAGE = ", line 1: message 1 must be"
ROLES = ", line 1: roles must be"
REJECTED = ', line 1: needs "rejected"'


@pytest.mark.parametrize(
    "kind, name, content, expected",
    [
        ("text", "a.txt", b"fine\n\xc3\xa9\nbad \xff byte\n", ", line 3: not UTF-8"),
        ("text", "a.txt", "", ": 0 tokens are too few"),
        ("text", "a.txt", "x", ": 1 tokens are too few"),
        ("text", "a.md", "x", ": no .txt, .jsonl"),
        ("text", "a.jsonl", '{"text": "a"}\n\n{"text": "b"\n', ", line 3: not JSON"),
        ("text", "a.jsonl", '{"text": "a"}\n{"content": "b"}\n', ', line 2: needs "text"'),
        ("text", "a.jsonl", '{"text": 1}\n', ', line 1: needs "text"'),
        ("text", "a.jsonl", '{"messages": [1]}\n', MESSAGE),
        ("text", "a.jsonl", [{"messages": [user("p")], "chosen": 1}], ', line 1: needs "chosen"'),
        ("text", "a.jsonl", b'{"text": "\xff"}\n', ", line 1: not JSON in UTF-8"),
        ("text", "a.jsonl", '[{"text": "a"}]\n', ", line 1: not an object"),
        ("text", "a.json", '{"text": "a"}\n{"text": "b"}\n', ": not JSON"),
        ("text", "a.jsonl", "[" * 100_000, ", line 1: not JSON"),
        ("instructions", "a.json", "[" * 100_000, ": not JSON"),
        ("text", "a.json", ["a"], ", record 1: not an object"),
        ("instructions", "a.jsonl", "", ": holds no usable records"),
        ("instructions", "a.jsonl", [DEMO | {"output": ""}], ": holds no usable records"),
        ("instructions", "a.jsonl", [QA], ', line 1: needs "instruction" with text'),
        ("instructions", "a.json", [DEMO, {"output": "b"}], ', record 2: needs "instruction"'),
        ("instructions", "a.jsonl", [DEMO | {"output": None}], ', line 1: needs "output"'),
        ("instructions", "a.jsonl", [{"messages": [user("a")]}], END),
        ("instructions", "a.jsonl", [{"messages": [user("a"), user("b")]}], ROLES),
        ("instructions", "a.jsonl", [{"messages": "a"}], ", line 1: messages must be a list"),
        ("preferences", "a.jsonl", [PAIR], ', line 1: needs "instruction" with text'),
        ("preferences", "a.jsonl", [{"prompt": "p"}], ', line 1: needs "chosen"'),
        ("preferences", "a.jsonl", [{"prompt": "p", "chosen": "a"}], REJECTED),
        ("preferences", "a.jsonl", [PAIR | {"prompt": "p", "rejected": [user("p")]}], REJECTED),
        ("preferences", "a.jsonl", [PAIR | {"messages": TURNS[:2]}], ROLES),
        ("preferences", "a.jsonl", [{"chosen": [1], "rejected": [2]}], MESSAGE),
        ("preferences", "a.txt", "what is this", ": not JSON"),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(tmp_path, kind, name, content, expected):
    path = write(tmp_path / name, content)
    assert name + expected in failure(kind, "--from", path, "--out", tmp_path / "out")
    assert not any(p for p in (tmp_path / "out").glob("*") if p.name != ".parts")


def test_a_damaged_archive_is_named_in_one_line(tmp_path):
    records = [{"instruction": f"{i}", "output": "b"} for i in range(1000)]
    path = write(tmp_path / "a.jsonl.gz", records)
    whole = path.read_bytes()
    for content in whole[:-100], b"no gzip", whole[:50] + b"\0" * 50 + whole[100:]:
        path.write_bytes(content)
        message = failure("instructions", "--from", path, "--out", tmp_path / "out")
        assert "a.jsonl.gz: cannot be read" in message


MISSING = ["text", "--from", "missing.txt"]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["text"], "which text? name one of shakespeare"),
        (
            ["instructions", "shakespeare"],
            "shakespeare: not a public source of instructions; use alpaca",
        ),
        (MISSING, "missing.txt: no such file or folder"),
        (["text", "--from", "tests/test_fetch.py"], "test_fetch.py: no .txt"),
        ([*MISSING, "--val_fraction", "1"], "--val_fraction 1.0: must be between 0 and 1"),
        ([*MISSING, "--workers", "0"], "--workers and --sample_mb must be at least 1"),
        (["text", "--url", "http://127.0.0.1/"], "http://127.0.0.1/: must end in one of .txt"),
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
    message = failure("text", "--from", path, "--tokenizer", name, "--out", tmp_path)
    assert name.removeprefix("bpe:") in message
    assert not (tmp_path / "train.bin").exists()
