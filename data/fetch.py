"""Real data sets, and your own files, in the formats that the stages read.

    python -m data.fetch text shakespeare --out data/shakespeare            # or tinystories, fineweb-edu
    python -m data.fetch text --from my_texts/ --out data/mine              # a .txt, .jsonl or .parquet file, or a folder of them
    python -m data.fetch instructions alpaca --out data/alpaca              # or llms-from-scratch
    python -m data.fetch preferences --from pairs.jsonl.gz --out data/hh    # or hh-harmless, ultrafeedback, llms-from-scratch

text          train.bin, val.bin and tokenizer.tiktoken. Records need "text", or are those of sft.jsonl and
              preferences.jsonl; each is a document and gets an end token, as does each .txt of a folder. A single .txt
              is one stream, and ends where it has <|endoftext|>.
instructions  sft.jsonl, from {"messages": [...]} or {"instruction", "input", "output"} (Alpaca; input may be missing).
preferences   preferences.jsonl and prompts.jsonl, from "chosen" and "rejected": answers, with the prompt in "messages",
              "prompt" or "instruction" and "input"; or whole conversations, as lists of messages (UltraFeedback) or as
              transcripts of Human: and Assistant: (HH-RLHF).

Files may be .gz. --from touches no network. After an interruption the same command goes on where it was.
"""

import argparse
import collections
import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

import common
from data import conversation, stream
from data.stream import string

GITHUB, HUB = "https://raw.githubusercontent.com", "https://huggingface.co/datasets"
CHAR_RNN = f"{GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
ALPACA = f"{GITHUB}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a"
BOOK = f"{GITHUB}/rasbt/LLMs-from-scratch/28c65cdfbc3338e2e040016eea4b7fdf556e4d57/ch07"
HH = f"{GITHUB}/anthropics/hh-rlhf/354e5c3cb8960630860dd5774a6ac2a58313bf4d/harmless-base"
TINYSTORIES = f"{HUB}/roneneldan/TinyStories/resolve/main"
FINEWEB_EDU = f"{HUB}/HuggingFaceFW/fineweb-edu/resolve/main/sample/10BT"
ULTRAFEEDBACK = f"{HUB}/HuggingFaceH4/ultrafeedback_binarized/resolve/main/data"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
# kind: {name: (address, SHA-256; None: unpinned, because we could not hash the file ourselves)}
SOURCES = {
    "text": {
        "shakespeare": (f"{CHAR_RNN}/data/tinyshakespeare/input.txt", SHAKESPEARE_SHA256),
        "tinystories": (f"{TINYSTORIES}/TinyStoriesV2-GPT4-train.txt", None),
        "fineweb-edu": (f"{FINEWEB_EDU}/000_00000.parquet", None),
    },
    "instructions": {
        "alpaca": (f"{ALPACA}/alpaca_data.json", None),
        "llms-from-scratch": (
            f"{BOOK}/01_main-chapter-code/instruction-data.json",
            "7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944",
        ),
    },
    "preferences": {
        "hh-harmless": (f"{HH}/train.jsonl.gz", None),
        "hh-harmless-test": (f"{HH}/test.jsonl.gz", "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03"),
        "ultrafeedback": (f"{ULTRAFEEDBACK}/train_prefs-00000-of-00001.parquet", None),
        "llms-from-scratch": (
            f"{BOOK}/04_preference-tuning-with-dpo/instruction-data-with-preference.json",
            "305315abf14f65fa42c01a0877572f832606571c2a7d49f152ac1d758b16756e",
        ),
    },
}


# ---- downloading


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download_rest(url, part):
    """Appends to part what it lacks of url. <part>.etag says which version part belongs to, so that two never mix."""
    have, etag = part.stat().st_size if part.exists() else 0, Path(f"{part}.etag")
    headers = {"User-Agent": "threefold"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": etag.read_text()} if etag.exists() else {})
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60)
    except urllib.error.HTTPError as e:
        if e.code == 416 and e.headers.get("Content-Range") == f"bytes */{have}":
            return  # no such range, because nothing is missing
        if e.code == 416:
            part.unlink()  # longer than the file is now
        raise
    with answer:
        if answer.status != 206:
            have = 0  # the server ignores ranges or has another version, and sends everything
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        etag.unlink(missing_ok=True)
        if "ETag" in answer.headers:
            etag.write_text(answer.headers["ETag"])
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with open(part, "ab" if have else "wb") as f, bar:
            while block := answer.read(1 << 16):
                f.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")


def download(url, path, sha256):
    """url -> path, which appears when it is whole and its hash right. What an interrupted run got stays in <path>.part."""
    part = Path(f"{path}.part")
    if path.exists():
        print(f"{path} was downloaded before; delete it to download it again")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        download_rest(url, part)
    except (OSError, http.client.HTTPException, ValueError) as e:
        reason = f"HTTP {e.code} {e.reason}" if isinstance(e, urllib.error.HTTPError) else getattr(e, "reason", None) or e
        have = part.stat().st_size if part.exists() else 0
        kept = f"{have:,} bytes are kept in {part}, the same command goes on from there" if have else "nothing is kept, try again"
        common.die(f"{url}: {reason}; {kept}, or give a copy of your own with --from")
    Path(f"{part}.etag").unlink(missing_ok=True)
    if sha256 and (found := sha256_of(part)) != sha256:
        part.unlink()
        common.die(f"{url}: SHA-256 is {found}, not {sha256}; the download was removed; try again, or give a copy with --from")
    os.replace(part, path)


# ---- conversations


def read_messages(messages):
    """Sound messages with nothing in them but role and content."""
    if problem := conversation.check(messages):
        raise ValueError(problem)
    return [{"role": m["role"], "content": string(m, "content")} for m in messages]


def read_prompt(record):
    """The messages that an answer follows."""
    if "messages" in record:
        return read_messages(record["messages"])
    text = string(record, "prompt" if "prompt" in record else "instruction")
    return [{"role": "user", "content": text + (f"\n\n{string(record, 'input')}" if record.get("input") else "")}]


def read_transcript(text):
    """The messages of "\\n\\nHuman: …\\n\\nAssistant: …"."""
    _, *turns = re.split(r"\n\n(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(turns[::2], turns[1::2])]


def is_blank(messages):
    return any(not m["content"].strip() for m in messages)


def to_conversation(record):
    """A record of sft.jsonl; or what a sound record lacks, in a few words."""
    if "messages" in record:
        messages = read_messages(record["messages"])
    elif "output" in record:
        messages = read_prompt(record) + [{"role": "assistant", "content": string(record, "output")}]
    else:
        raise ValueError('needs "messages", or "instruction" and "output"')
    if messages[-1]["role"] != "assistant":
        raise ValueError("the conversation must end in an assistant message")
    return "an empty message" if is_blank(messages) else {"messages": messages}


def to_pair(record):
    """A record of preferences.jsonl; or what a sound record lacks, in a few words."""
    both = [record.get("chosen"), record.get("rejected")]
    if all(isinstance(answer, list) for answer in both):
        both = [read_messages(answer) for answer in both]
    elif {"messages", "prompt", "instruction"} & set(record):
        prompt = read_prompt(record)
        both = [read_messages(prompt + [{"role": "assistant", "content": string(record, key)}]) for key in ("chosen", "rejected")]
    elif all(isinstance(answer, str) and answer.startswith("\n\nHuman:") for answer in both):
        both = [read_transcript(string(record, key)) for key in ("chosen", "rejected")]
        if any(conversation.check(messages) for messages in both):
            return "turns out of order"
    else:
        raise ValueError('needs "chosen" and "rejected": two lists of messages, two transcripts, or two answers to a "prompt"')
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
    kept, left_out = [], collections.Counter()
    for path in stream.find_files(source):
        with stream.open_file(path) as (f, _):
            for record in stream.read_records(path, f, to_record):
                if isinstance(record, str):
                    left_out[record] += 1
                else:
                    kept.append(record)
    reasons = ", ".join(f"{n:,} with {reason}" for reason, n in left_out.most_common()) or "none"
    print(f"{source}: {len(kept):,} records, left out: {reasons}")
    if not kept:
        common.die(f"{source}: holds no usable records")
    return kept


# ---- the command


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=SOURCES, help="what to make")
    parser.add_argument("name", nargs="?", help="a public source")
    parser.add_argument("--from", dest="path", type=Path, help="a local file or folder in its place; touches no network")
    parser.add_argument("--url", help="another address of the source, or that of any file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--tokenizer", help="text: char, bpe:SIZE, gpt2, or a .tiktoken file (default: bpe:4096, but char for "
                        "tiny Shakespeare, as in nanoGPT)")  # fmt: skip
    parser.add_argument("--val_share", type=float, help="text: share of the tokens, the last ones, for validation (default: 0.1, "
                        f"but at most {stream.MAX_VAL:,} tokens)")  # fmt: skip
    parser.add_argument("--sample_mb", type=int, default=10, help="text: million characters that bpe learns from (default: 10)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="text: processes that tokenize (default: one a core)")
    common.add_debug(parser)
    args = parser.parse_args(argv)
    known = ", ".join(SOURCES[args.kind])
    if args.name and args.name not in SOURCES[args.kind]:
        common.die(f"{args.name}: not a public source of {args.kind}; use {known}, or --from PATH")
    if not (args.name or args.path or args.url):
        common.die(f"which {args.kind}? name one of {known}, or use --from PATH or --url ADDRESS")
    if args.val_share is not None and not 0 < args.val_share < 1:
        common.die(f"--val_share {args.val_share}: must be between 0 and 1")
    if args.workers < 1 or args.sample_mb < 1:
        common.die("--workers and --sample_mb must be at least 1")
    return args


def get_source(args):
    """The file or folder to read, downloaded if need be."""
    if args.path:
        return args.path
    url, sha256 = SOURCES[args.kind].get(args.name, (args.url, None))
    file_name = url.partition("?")[0].partition("#")[0].rpartition("/")[2]
    if not file_name.removesuffix(".gz").endswith(stream.ENDINGS):
        common.die(f"{url}: must end in {', '.join(stream.ENDINGS)} or one of these with .gz, or use --from")
    path = args.out / (args.name + "".join(Path(file_name).suffixes) if args.name else file_name)
    if path.suffix == ".parquet":
        stream.import_parquet(path)  # rather than find it missing after gigabytes
    download(args.url or url, path, sha256)
    return path


def main(argv=None):
    args = parse_arguments(argv)
    try:
        source = get_source(args)
        if args.kind == "text":
            small = source.is_file() and source.stat().st_size < 1 << 21
            default = "char" if small and sha256_of(source) == SHAKESPEARE_SHA256 else "bpe:4096"
            stream.write(source, args.out, args.tokenizer or default, args.val_share, args.sample_mb, args.workers)
        elif args.kind == "instructions":
            common.write_jsonl(args.out / "sft.jsonl", convert(source, to_conversation))
        else:
            pairs = convert(source, to_pair)
            prompts = {json.dumps(pair["messages"]): {"messages": pair["messages"]} for pair in pairs}  # each once
            common.write_jsonl(args.out / "preferences.jsonl", pairs)
            common.write_jsonl(args.out / "prompts.jsonl", prompts.values())
            print(f"{args.out}: {len(pairs):,} pairs, {len(prompts):,} prompts")
    except KeyboardInterrupt:
        common.die("stopped; the same command goes on from here")
    except BrokenProcessPool:
        common.die("a worker was killed, perhaps for want of memory; the same command goes on from here, with fewer --workers")


if __name__ == "__main__":
    main()
