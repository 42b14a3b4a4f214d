"""Real data sets, and your own files, in the formats that the stages read.

    python -m data.fetch text shakespeare --out out/shakespeare    # or tinystories, fineweb-edu
    python -m data.fetch text --from my_texts/ --out out/mine      # a file, or a folder of them
    python -m data.fetch instructions alpaca --out out/alpaca      # or llms-from-scratch
    python -m data.fetch preferences hh-harmless --out out/hh      # or ultrafeedback, and others

text          train.bin, val.bin and tokenizer.tiktoken. Records need "text", or are those of
              sft.jsonl and preferences.jsonl. Each record, and each .txt of a folder, is a document
              and gets an end token. A single .txt is one stream, with an end at <|endoftext|>.
instructions  sft.jsonl, from {"messages": [...]} or {"instruction", "input", "output"} (Alpaca;
              input may be missing).
preferences   preferences.jsonl and prompts.jsonl, from "chosen" and "rejected": answers, with the
              prompt in "messages", "prompt" or "instruction" and "input"; or conversations, as
              lists of messages (UltraFeedback) or transcripts of Human: and Assistant: (HH-RLHF).

Files are .txt, .jsonl, .json or .parquet, and may be .gz. --from touches no network. After an
interruption the same command continues where it stopped.
"""

import argparse
import collections
import hashlib
import http.client
import json
import os
import re
import shutil
import urllib.error
import urllib.request
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from data import conversation, stream
from data.stream import read_messages, string
from utils.cli import add_debug_flag, die
from utils.files import write_jsonl

GITHUB, HUB = "https://raw.githubusercontent.com", "https://huggingface.co/datasets"
CHAR_RNN = f"{GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
ALPACA = f"{GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a"
BOOK = f"{GITHUB}/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57/ch07"
DEMOS = f"{BOOK}/01_main-chapter-code"
PAIRS = f"{BOOK}/04_preference-tuning-with-dpo"
HH = f"{GITHUB}/anthropics/hh-rlhf/354e5c3cb8960630860dd5774a6ac2a58313bf4d/harmless-base"
TINYSTORIES = f"{HUB}/roneneldan/TinyStories/resolve/main"
FINEWEB_EDU = f"{HUB}/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT"
ULTRAFEEDBACK = f"{HUB}/HuggingFaceH4/ultrafeedback_binarized/resolve/main/data"
# SHA-256 of the files that we could hash ourselves
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
DEMOS_SHA256 = "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944"
PAIRS_SHA256 = "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e"
HH_TEST_SHA256 = "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03"
# kind: {name: (address, SHA-256 or None)}
SOURCES = {
    "text": {
        "shakespeare": (f"{CHAR_RNN}/data/tinyshakespeare/input.txt", SHAKESPEARE_SHA256),
        "tinystories": (f"{TINYSTORIES}/TinyStoriesV2-GPT4-train.txt", None),
        "fineweb-edu": (f"{FINEWEB_EDU}/000_00000.parquet", None),
    },
    "instructions": {
        "alpaca": (f"{ALPACA}/alpaca_data.json", None),
        "llms-from-scratch": (f"{DEMOS}/instruction-data.json", DEMOS_SHA256),
    },
    "preferences": {
        "hh-harmless": (f"{HH}/train.jsonl.gz", None),
        "hh-harmless-test": (f"{HH}/test.jsonl.gz", HH_TEST_SHA256),
        "ultrafeedback": (f"{ULTRAFEEDBACK}/train_prefs-00000-of-00001.parquet", None),
        "llms-from-scratch": (f"{PAIRS}/instruction-data-with-preference.json", PAIRS_SHA256),
    },
}


# ---- downloading


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def download_rest(url, part):
    """Appends to part what it lacks of url; <part>.etag tells versions apart: two never mix."""
    have, etag = size_of(part), Path(f"{part}.etag")
    headers = {"User-Agent": "threefold"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if etag.exists():
            headers["If-Range"] = etag.read_text()
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as e:
        if e.code == 416:  # no such range: part is whole, or longer than the file is now
            if e.headers.get("Content-Range") == f"bytes */{have}":
                return
            part.unlink()
        raise
    with answer:
        if answer.status != 206:
            have = 0  # the server ignores ranges or has another version, and sends everything
        total = have + int(answer.headers.get("Content-Length", 0))
        etag.unlink(missing_ok=True)
        if "ETag" in answer.headers:
            etag.write_text(answer.headers["ETag"])
        with open(part, "ab" if have else "wb") as f:
            size = dict(total=total, initial=have)
            with tqdm.wrapattr(f, "write", desc=part.stem, disable=None, **size) as out:
                shutil.copyfileobj(answer, out)
    if size_of(part) < total:
        raise OSError(f"the connection ended after {size_of(part):,} of {total:,} bytes")


def download(url, path, sha256):
    """url -> path, which appears when it is whole and its hash right; until then <path>.part."""
    part = Path(f"{path}.part")
    if path.exists():
        print(f"{path} was downloaded before; delete it to download it again")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        download_rest(url, part)
    except (OSError, http.client.HTTPException, ValueError) as e:
        die(f"{url}: {e}; {size_of(part):,} bytes are kept in {part}; run it again, or use --from")
    Path(f"{part}.etag").unlink(missing_ok=True)
    if sha256 and (found := sha256_of(part)) != sha256:
        part.unlink()
        die(f"{url}: SHA-256 is {found}, not {sha256}; removed; run it again, or use --from")
    os.replace(part, path)


# ---- conversations


def assistant(text):
    return {"role": "assistant", "content": text}


def read_prompt(record):
    """The messages that an answer follows."""
    if "messages" in record:
        return read_messages(record["messages"])
    text = string(record, "prompt" if "prompt" in record else "instruction")
    if record.get("input"):
        text += f"\n\n{string(record, 'input')}"
    return [{"role": "user", "content": text}]


def read_transcript(text):
    """The messages of "\\n\\nHuman: …\\n\\nAssistant: …"."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2])
    return [{"role": roles[speaker], "content": content.strip()} for speaker, content in turns]


def is_blank(messages):
    return any(not message["content"].strip() for message in messages)


def to_conversation(record):
    """A record of sft.jsonl; or why a sound record is left out, in a few words."""
    if "messages" in record:
        messages = read_messages(record["messages"])
    else:
        messages = read_prompt(record) + [assistant(string(record, "output"))]
    if messages[-1]["role"] != "assistant":
        raise ValueError("the conversation must end in an assistant message")
    return "an empty message" if is_blank(messages) else {"messages": messages}


def to_pair(record):
    """A record of preferences.jsonl; or why a sound record is left out, in a few words."""
    both = [record.get("chosen"), record.get("rejected")]
    if all(isinstance(answer, list) for answer in both):
        both = [read_messages(answer) for answer in both]
    elif all(str(answer).startswith("\n\nHuman:") for answer in both):
        both = [read_transcript(string(record, key)) for key in ("chosen", "rejected")]
        if any(conversation.check(messages) for messages in both):
            return "turns out of order"
    else:
        prompt = read_prompt(record)
        answers = [string(record, key) for key in ("chosen", "rejected")]
        both = [read_messages(prompt + [assistant(answer)]) for answer in answers]
    (*prompt, chosen), (*other_prompt, rejected) = both
    if prompt != other_prompt:
        return "different prompts"
    if not prompt or chosen["role"] != "assistant" or rejected["role"] != "assistant":
        return "no answer at the end"
    if is_blank([*prompt, chosen, rejected]):
        return "an empty message"
    if chosen == rejected:
        return "two equal answers"
    return {"messages": prompt, "chosen": chosen["content"], "rejected": rejected["content"]}


def convert(source, to_record):
    """The source's records in our form. Those that cannot be used are counted."""
    records = []
    for path in stream.find_files(source):
        with stream.open_file(path) as (f, _):
            records += stream.read_records(path, f, to_record)
    kept = [record for record in records if isinstance(record, dict)]
    left_out = collections.Counter(reason for reason in records if isinstance(reason, str))
    reasons = [f"{n:,} with {reason}" for reason, n in left_out.most_common()]
    print(f"{source}: {len(kept):,} records, left out: {', '.join(reasons) or 'none'}")
    if not kept:
        die(f"{source}: holds no usable records")
    return kept


# ---- the command


def parse_arguments(argv):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("kind", choices=SOURCES, help="what to make")
    add("name", nargs="?", help="a public source")
    add("--from", dest="path", type=Path, help="a local file or folder in its place")
    add("--url", help="another address of the source, or that of any file")
    add("--out", type=Path, required=True, help="folder to write")
    add = parser.add_argument_group("options of text").add_argument
    add("--tokenizer", help="char, bpe:SIZE, gpt2 or a .tiktoken file (default: bpe:4096)")
    add("--val_fraction", type=float, help="the last tokens (default: 0.1, but at most a million)")
    add("--sample_mb", type=int, default=10, help="million characters for bpe (default: 10)")
    add("--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)")
    add_debug_flag(parser)
    args = parser.parse_args(argv)

    known = ", ".join(SOURCES[args.kind])
    if args.name and args.name not in SOURCES[args.kind]:
        die(f"{args.name}: not a public source of {args.kind}; use {known}, or --from PATH")
    if not (args.name or args.path or args.url):
        die(f"which {args.kind}? name one of {known}, or use --from PATH or --url ADDRESS")
    if args.val_fraction is not None and not 0 < args.val_fraction < 1:
        die(f"--val_fraction {args.val_fraction}: must be between 0 and 1")
    if args.workers < 1 or args.sample_mb < 1:
        die("--workers and --sample_mb must be at least 1")
    return args


def get_source(args):
    """The file or folder to read, downloaded if need be."""
    if args.path:
        return args.path
    url, sha256 = SOURCES[args.kind].get(args.name, (args.url, None))
    file_name = re.split("[?#]", url)[0].rpartition("/")[2]
    if not file_name.removesuffix(".gz").endswith(stream.ENDINGS):
        die(f"{url}: must end in one of {', '.join(stream.ENDINGS)}, or with .gz; or use --from")
    if args.name:
        file_name = args.name + "".join(Path(file_name).suffixes)
    path = args.out / file_name
    if path.suffix == ".parquet":
        stream.import_parquet(path)  # rather than find it missing after gigabytes
    download(args.url or url, path, sha256)
    return path


def main(argv=None):
    args = parse_arguments(argv)
    out = args.out
    try:
        source = get_source(args)
        if args.kind == "text":
            is_shakespeare = source.is_file() and sha256_of(source) == SHAKESPEARE_SHA256
            tokenizer = args.tokenizer or ("char" if is_shakespeare else "bpe:4096")
            stream.write(source, out, tokenizer, args.val_fraction, args.sample_mb, args.workers)
        elif args.kind == "instructions":
            write_jsonl(out / "sft.jsonl", convert(source, to_conversation))
        else:
            pairs = convert(source, to_pair)
            unique = {json.dumps(pair["messages"]): pair["messages"] for pair in pairs}
            prompts = [{"messages": messages} for messages in unique.values()]
            write_jsonl(out / "preferences.jsonl", pairs)
            write_jsonl(out / "prompts.jsonl", prompts)
            print(f"{out}: {len(pairs):,} pairs, {len(prompts):,} prompts")
    except KeyboardInterrupt:
        die("stopped; the same command continues from here")
    except BrokenProcessPool:
        die("a worker was killed, perhaps out of memory; run it again, with fewer --workers")


if __name__ == "__main__":
    main()
