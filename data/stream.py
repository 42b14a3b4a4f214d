"""Files of records, and text of any size turned into a token stream: the readers behind data/fetch.py.

Text is never in memory as a whole, nor are its tokens: pieces of it go to one process a core, which write parts of
the stream to <out>/.parts. Finished parts outlive a kill; at the end they are joined to train.bin and val.bin.
"""

import collections
import concurrent.futures
import contextlib
import gzip
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zlib

import numpy as np
from tqdm import tqdm

import common
import data.tokenizer
from data import conversation

ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
PIECE = 1 << 20  # characters; a longer text is read and tokenized in pieces of about this size
PART = 1 << 22  # characters in a part of the stream, about 1M tokens: a kill loses seconds of work
MAX_VAL = 1_000_000  # validation tokens at most, unless asked for: pretrain.py goes through all of them
LAYOUT = "a .jsonl file holds one object a line, a .json file one list of objects"


# ---- files


def find_files(source):
    """The readable files of a path, which may be a folder: sorted, so that their order is the same everywhere."""
    if not source.exists():
        common.die(f"{source}: no such file or folder")
    paths = sorted(source.rglob("*")) if source.is_dir() else [source]
    files = [p for p in paths if p.is_file() and p.name.removesuffix(".gz").endswith(ENDINGS)]
    if not files:
        common.die(f"{source}: no {', '.join(ENDINGS)} file, or one of these with .gz; rename or convert it")
    return files


@contextlib.contextmanager
def open_file(path):
    """(f, raw): the content, unpacked, and the file as it lies on the disk, whose tell() shows how far we are."""
    try:
        with open(path, "rb") as raw:
            yield gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, raw
    except (OSError, EOFError, zlib.error) as e:
        common.die(f"{path}: cannot be read ({e}); if it is damaged, get it again")


def import_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        common.die(f"{path}: Parquet needs pyarrow; `pip install pyarrow`, or convert the file to .jsonl")
    return pyarrow


def parse_json(where, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        common.die(f"{where}: not JSON in UTF-8 ({e}); {LAYOUT}")


def read_records(path, f, convert, columns=None):
    """convert(record) for each record of a .jsonl, .json or .parquet file; its ValueError is what is wrong with one."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pyarrow = import_parquet(path)
        try:
            batches = pyarrow.parquet.ParquetFile(f).iter_batches(batch_size=1000, columns=columns)
        except pyarrow.ArrowInvalid as e:
            common.die(f"{path}: not a Parquet file ({str(e).splitlines()[0]}); get it again")
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        records = ((f"row {n}", row) for n, row in enumerate(rows, 1))
    elif name.endswith(".jsonl"):
        records = ((f"line {n}", parse_json(f"{path}, line {n}", line)) for n, line in enumerate(f, 1) if line.strip())
    else:
        content = parse_json(path, f.read())
        records = ((f"record {n}", r) for n, r in enumerate(content if isinstance(content, list) else [content], 1))
    for where, record in records:
        if not isinstance(record, dict):
            common.die(f"{path}, {where}: not an object; {LAYOUT}")
        try:
            yield convert(record)
        except ValueError as e:
            common.die(f"{path}, {where}: {e}")


def string(record, key):
    """record[key], which must be text. Half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD."""
    if key not in record or not isinstance(record[key], str):
        raise ValueError(f'needs "{key}" with text in it')
    return record[key].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- text


def record_text(record):
    """A document: the record's "text", or all that is said in its conversation and in the two answers of a preference pair."""
    if "text" in record or "messages" not in record:
        return string(record, "text")
    if problem := conversation.check(record["messages"]):
        raise ValueError(problem)
    answers = [string(record, key) for key in ("chosen", "rejected") if key in record]
    return "\n\n".join([string(m, "content") for m in record["messages"]] + answers)


SEPARATOR = re.compile(r"<\|endoftext\|>\s*(?=\S)")
CUT = re.compile(r"(?<=[^\W_])(?=[ \n])")  # a token always ends here, so pieces give the tokens of the whole


def split_text(path, f, is_document):
    """(text, whether a document ends there) for the pieces of a .txt file of any length."""
    text, rest = io.TextIOWrapper(f, encoding="utf-8-sig"), ""
    try:
        while block := text.read(PIECE):
            *documents, rest = SEPARATOR.split(rest + block)
            yield from ((document.rstrip(), True) for document in documents)
            cut = CUT.search(rest, PIECE)
            if cut or len(rest) > 8 * PIECE:  # nowhere to cut in all that: one token may come out as two
                end = cut.start() if cut else len(rest)
                yield rest[:end], False
                rest = rest[end:]
    except UnicodeDecodeError:
        f.seek(0)
        line = next(n for n, line in enumerate(f, 1) if line.decode(errors="ignore").encode() != line)
        common.die(f"{path}, line {line}: not UTF-8; convert it, for example with iconv")
    last, separator, _ = rest.partition("<|endoftext|>")
    yield last.rstrip() if separator else last, is_document or bool(separator)


def read_pieces(source, bar=None):
    """(text, whether a document ends there) for all that the source holds, in order."""
    done = 0  # bytes
    for path in find_files(source):
        with open_file(path) as (f, raw):
            if path.name.removesuffix(".gz").endswith(".txt"):
                pieces = split_text(path, f, is_document=source.is_dir())
            else:
                pieces = read_records(path, f, lambda record: (record_text(record), True), ["text"])
            for piece in pieces:
                yield piece
                if bar is not None:
                    bar.update(done + raw.tell() - bar.n)
        done += path.stat().st_size


def group(pieces):
    """Lists of pieces, about PART characters each."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= PART:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def take(texts, size):
    """The first texts, until they have size characters."""
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


def make_tokenizer(name, source, sample_mb):
    """A Tokenizer by name, or from a .tiktoken file. BPE learns from the first sample_mb million characters."""
    if name.endswith(".tiktoken"):
        return data.tokenizer.load(name)
    texts = (text for text, _ in read_pieces(source))
    if name == "char":  # needs to see all of the text, but just one of each character
        return data.tokenizer.make(name, [set().union(*(set(text) for text in texts))])
    return data.tokenizer.make(name, take(texts, sample_mb * 1e6))


# ---- tokens


def start_worker(tokenizer_text):
    global tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    tokenizer = data.tokenizer.Tokenizer.loads(tokenizer_text)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    multiprocessing.parent_process().join()  # returns also when the parent was killed
    os._exit(1)


def write_part(path, pieces):
    """Tokenizes [(text, whether a document ends there)] into a file; runs in a worker."""
    with common.atomic(path) as f:
        for text, ends in pieces:
            f.write(np.array(tokenizer.encode(text) + [tokenizer.end] * ends, tokenizer.id_type).tobytes())


def write_parts(source, folder, tokenizer, workers):
    """Tokenizes the source into the parts that folder lacks. Returns the paths of all, in order, and the characters read."""
    paths, n_chars, pending = [], 0, collections.deque()
    size = sum(path.stat().st_size for path in find_files(source))
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None)
    with concurrent.futures.ProcessPoolExecutor(workers, initializer=start_worker, initargs=(tokenizer.dumps(),)) as pool, bar:
        for pieces in group(read_pieces(source, bar)):
            paths.append(folder / f"{len(paths):05d}.bin")
            n_chars += sum(len(text) for text, _ in pieces)
            if not paths[-1].exists():
                pending.append(pool.submit(write_part, paths[-1], pieces))
            if len(pending) > workers + 1:  # so many are in memory and no more
                pending.popleft().result()
        for future in pending:
            future.result()
    return paths, n_chars


def join(paths, out, dtype, n_train):
    """The parts as <out>/train.bin, which gets the first n_train tokens, and <out>/val.bin."""
    with common.atomic(out / "train.bin") as train, common.atomic(out / "val.bin") as val:
        for path in paths:
            ids = np.fromfile(path, dtype)
            train.write(ids[:n_train].tobytes())
            val.write(ids[n_train:].tobytes())
            n_train -= min(n_train, len(ids))


def write(source, out, tokenizer_name, val_share, sample_mb, workers):
    """train.bin, val.bin (the last val_share of the tokens; None: a tenth, MAX_VAL at most) and tokenizer.tiktoken."""
    parts, made_from = out / ".parts", [tokenizer_name, sample_mb, PIECE, PART]
    made_from += [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in find_files(source)]
    made_from += [common.read_text(tokenizer_name)] if tokenizer_name.endswith(".tiktoken") else []
    made_from = json.dumps(made_from)
    if not (parts / "made_from").exists() or common.read_text(parts / "made_from") != made_from:
        shutil.rmtree(parts, ignore_errors=True)
        common.write_text(parts / "made_from", made_from)
    if (parts / "tokenizer.tiktoken").exists():
        print(f"{parts}: going on where an earlier run stopped")
        tokenizer = data.tokenizer.load(parts / "tokenizer.tiktoken")
    else:
        tokenizer = make_tokenizer(tokenizer_name, source, sample_mb)
        common.write_text(parts / "tokenizer.tiktoken", tokenizer.dumps())
    paths, n_chars = write_parts(source, parts, tokenizer, workers)

    dtype = tokenizer.id_type
    total = sum(path.stat().st_size for path in paths) // dtype.itemsize
    n_train = max(int(total * 0.9), total - MAX_VAL) if val_share is None else int(total * (1 - val_share))
    if not 0 < n_train < total:
        common.die(f"{source}: {total} tokens are too few to split into training and validation")
    join(paths, out, dtype, n_train)
    common.write_text(out / "tokenizer.tiktoken", tokenizer.dumps())
    shutil.rmtree(parts)
    sizes = f"{n_train:,} + {total - n_train:,} tokens ({dtype})"
    print(f"{out}: {sizes}, {n_chars / total:.3f} characters each, {tokenizer.vocab_size:,} ids")
