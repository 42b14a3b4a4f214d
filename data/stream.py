"""Files of records, and text of any size turned into a token stream: the readers of data/fetch.py.

Neither the text nor its tokens are ever in memory as a whole. Pieces of text go to one process a
core, and these write parts of the stream to <out>/.parts. Finished parts outlive a kill; at the
end they are joined to train.bin and val.bin.
"""

import collections
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
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tqdm import tqdm

import data.tokenizer
from data import conversation
from utils.cli import die
from utils.files import atomic, read_text, write_text

ENDINGS = (".txt", ".jsonl", ".json", ".parquet")
PIECE = 1 << 20  # characters; a longer text is read and tokenized in pieces of about this size
PART = 1 << 22  # characters in a part of the stream, about 1M tokens: a kill loses seconds of work
MAX_VAL = 1_000_000  # validation tokens unless asked for: pretrain.py goes through all of them
LAYOUT = "a .jsonl file holds one object a line, a .json file one list of objects"


# ---- files


def find_files(source):
    """The readable files of a path, which may be a folder; sorted, to be the same everywhere."""
    if not source.exists():
        die(f"{source}: no such file or folder")
    paths = sorted(source.rglob("*")) if source.is_dir() else [source]
    files = [p for p in paths if p.is_file() and p.name.removesuffix(".gz").endswith(ENDINGS)]
    if not files:
        die(f"{source}: no {', '.join(ENDINGS)} file, nor one with .gz; rename or convert it")
    return files


@contextlib.contextmanager
def open_file(path):
    """(f, raw): the content, unpacked, and the file on the disk, whose tell() shows progress."""
    try:
        with open(path, "rb") as raw:
            yield gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw, raw
    except (OSError, EOFError, zlib.error) as e:
        die(f"{path}: cannot be read ({e}); if it is damaged, get it again")


def import_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        die(f"{path}: Parquet needs pyarrow; `pip install pyarrow`, or convert the file to .jsonl")
    return pyarrow


def parse_json(where, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        die(f"{where}: not JSON in UTF-8 ({e}); {LAYOUT}")


def parquet_rows(path, f, columns):
    pyarrow = import_parquet(path)
    try:
        for batch in pyarrow.parquet.ParquetFile(f).iter_batches(1000, columns=columns):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as e:
        die(f"{path}: not a Parquet file ({e}); get it again")


def read_records(path, f, convert, columns=None):
    """convert(record) for each record of the file; its ValueError says what is wrong with one."""
    ending = path.name.removesuffix(".gz").rpartition(".")[2]
    if ending == "parquet":
        unit, records = "row", parquet_rows(path, f, columns)
    elif ending == "jsonl":
        unit, records = "line", f
    else:
        content = parse_json(path, f.read())
        unit, records = "record", content if isinstance(content, list) else [content]
    for number, record in enumerate(records, 1):
        where = f"{path}, {unit} {number}"
        if unit == "line":
            if not record.strip():
                continue
            record = parse_json(where, record)
        if not isinstance(record, dict):
            die(f"{where}: not an object; {LAYOUT}")
        try:
            yield convert(record)
        except ValueError as e:
            die(f"{where}: {e}")


def string(record, key):
    """record[key], which must be text."""
    if not isinstance(record.get(key), str):
        raise ValueError(f'needs "{key}" with text in it; --help lists the forms')
    # half a surrogate pair, which JSON can hold and UTF-8 cannot, becomes U+FFFD
    return record[key].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_messages(messages):
    """Sound messages with nothing in them but role and content."""
    if problem := conversation.check(messages):
        raise ValueError(problem)
    return [{"role": m["role"], "content": string(m, "content")} for m in messages]


# ---- text


def record_text(record):
    """A document: the record's "text", or all that its conversation and answers say."""
    if "text" in record or "messages" not in record:
        return string(record, "text")
    texts = [message["content"] for message in read_messages(record["messages"])]
    texts += [string(record, key) for key in ("chosen", "rejected") if key in record]
    return "\n\n".join(texts)


SEPARATOR = re.compile(r"<\|endoftext\|>\s*(?=\S)")
# A token always ends here, so the pieces give the tokens of the whole.
CUT = re.compile(r"(?<=[^\W_])(?=[ \n])")


def split_text(path, f, is_document):
    """(text, whether a document ends there) for the pieces of a .txt file of any length."""
    text, rest = io.TextIOWrapper(f, encoding="utf-8-sig"), ""
    try:
        while block := text.read(PIECE):
            *documents, rest = SEPARATOR.split(rest + block)
            for document in documents:
                yield document.rstrip(), True
            cut = CUT.search(rest, PIECE)
            if cut or len(rest) > 8 * PIECE:
                # with nowhere to cut in all that, one token may come out as two
                end = cut.start() if cut else len(rest)
                yield rest[:end], False
                rest = rest[end:]
    except UnicodeDecodeError:
        f.seek(0)
        lines = enumerate(f, 1)
        number = next(n for n, line in lines if line.decode(errors="ignore").encode() != line)
        die(f"{path}, line {number}: not UTF-8; convert it, for example with iconv")
    last, separator, _ = rest.partition("<|endoftext|>")
    yield last.rstrip() if separator else last, is_document or bool(separator)


def read_pieces(source):
    """(text, whether a document ends there) for all that the source holds, in order."""
    paths = find_files(source)
    size = sum(path.stat().st_size for path in paths)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc="reading", disable=None)
    for path in paths:
        start = bar.n
        with open_file(path) as (f, raw):
            if path.name.removesuffix(".gz").endswith(".txt"):
                pieces = split_text(path, f, is_document=source.is_dir())
            else:
                texts = read_records(path, f, record_text, ["text"])
                pieces = zip(texts, itertools.repeat(True))
            for piece in pieces:
                yield piece
                bar.update(start + raw.tell() - bar.n)
    bar.close()


def group(pieces, size):
    """Lists of pieces, about size characters each."""
    batch, n_chars = [], 0
    for piece in pieces:
        batch.append(piece)
        n_chars += len(piece[0])
        if n_chars >= size:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def make_tokenizer(name, source, sample_mb):
    """A Tokenizer by name, or from a .tiktoken file; bpe learns from the first sample_mb."""
    if name.endswith(".tiktoken"):
        return data.tokenizer.load(name)
    pieces = read_pieces(source)
    if name != "char":  # which needs to see all of the text
        pieces = next(group(pieces, sample_mb * 1e6), [])
    return data.tokenizer.make(name, (text for text, _ in pieces))


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
    with atomic(path) as f:
        for text, ends in pieces:
            ids = tokenizer.encode(text) + [tokenizer.separator] * ends
            f.write(np.array(ids, tokenizer.id_type).tobytes())


def write_parts(source, folder, tokenizer, workers):
    """Tokenizes the source into the parts that folder lacks -> paths of all parts, characters."""
    paths, n_chars, pending = [], 0, collections.deque()
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(tokenizer.dumps(),))
    with pool:
        for pieces in group(read_pieces(source), PART):
            paths.append(folder / f"{len(paths):05d}.bin")
            n_chars += sum(len(text) for text, _ in pieces)
            if not paths[-1].exists():
                pending.append(pool.submit(write_part, paths[-1], pieces))
            if len(pending) > workers + 1:  # no more than these are in memory
                pending.popleft().result()
        for future in pending:
            future.result()
    return paths, n_chars


def join(paths, out, dtype, n_train):
    """The parts as <out>/train.bin, which gets the first n_train tokens, and <out>/val.bin."""
    with atomic(out / "train.bin") as train, atomic(out / "val.bin") as val:
        for path in paths:
            ids = np.fromfile(path, dtype)
            train.write(ids[:n_train].tobytes())
            val.write(ids[n_train:].tobytes())
            n_train -= min(n_train, len(ids))


def write(source, out, tokenizer_name, val_fraction, sample_mb, workers):
    """train.bin, val.bin (the last val_fraction; None: a tenth, MAX_VAL at most), the tokenizer."""
    tokenizer = make_tokenizer(tokenizer_name, source, sample_mb)

    # parts of an earlier run, which count only if made with this tokenizer from these files
    parts = out / ".parts"
    made_from = [tokenizer.dumps(), PIECE, PART]
    for path in find_files(source):
        made_from += [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
    made_from, label = json.dumps(made_from), parts / "made_from.json"
    if label.exists() and read_text(label) == made_from:
        print(f"{parts}: continuing where an earlier run stopped")
    else:
        shutil.rmtree(parts, ignore_errors=True)
        write_text(label, made_from)

    # tokens
    paths, n_chars = write_parts(source, parts, tokenizer, workers)
    dtype = tokenizer.id_type
    total = sum(path.stat().st_size for path in paths) // dtype.itemsize
    n_train = int(total * (1 - (val_fraction or 0.1)))
    if val_fraction is None:
        n_train = max(n_train, total - MAX_VAL)
    if not 0 < n_train < total:
        die(f"{source}: {total} tokens are too few to split into training and validation")
    join(paths, out, dtype, n_train)
    write_text(out / "tokenizer.tiktoken", tokenizer.dumps())
    shutil.rmtree(parts)
    sizes = f"{n_train:,} + {total - n_train:,} tokens ({dtype})"
    print(f"{out}: {sizes}, {n_chars / total:.3f} characters each, {tokenizer.vocab_size:,} ids")
