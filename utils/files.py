"""Text, JSON and JSONL files: read with errors that name the line, written atomically."""

import contextlib
import json
import os
from pathlib import Path

from utils.cli import die


def read_text(path):
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        die(f"{path}: no such file; `make` builds the default ones")
    except IsADirectoryError:
        die(f"{path}: is a folder, not a file")
    except UnicodeDecodeError as e:
        die(f"{path}: not UTF-8 at byte {e.start}; convert it, for example with iconv")
    except (OSError, ValueError) as e:  # no permission, or a name that no file can have
        die(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); check the path")


def read_json(path, remedy="download the file again"):
    """The object in a .json file."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        die(f"{path}: not JSON ({e}); {remedy}")
    if not isinstance(content, dict):
        die(f"{path}: not a JSON object; {remedy}")
    return content


class Record(dict):
    """An object of a .jsonl file; `line` is the number of its line."""


def read_jsonl(path, check=lambda record: None):
    """The file's Records. check(record) says in a few words what is wrong with one, or None."""
    records = []
    lines = read_text(path).split("\n")  # splitlines would also split at U+2028 inside a string
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            die(f"{path}, line {number}: not JSON ({e}); each line must be one whole object")
        problem = check(record) if isinstance(record, dict) else "not a JSON object"
        if problem:
            die(f"{path}, line {number}: {problem}")
        records.append(Record(record))
        records[-1].line = number
    if not records:
        die(f"{path}: holds no records")
    return records


@contextlib.contextmanager
def writing(path):
    """Around what writes path: makes its folder; if the disk fails, the program ends in a line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as e:
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save wraps the disk's error
        if not isinstance(cause, OSError):
            raise
        die(
            f"{path}: cannot be written ({cause.strerror}); what was there before is untouched. "
            "Make room, or name another place"
        )


@contextlib.contextmanager
def atomic(path, mode="wb", keep=None):
    """A file that replaces path once it is complete and on the disk; the old one moves to keep."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with writing(path):
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as f:
                yield f
                f.flush()
                os.fsync(f.fileno())
            if keep and path.exists():
                os.replace(path, keep)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path, text):
    with atomic(path, "w") as f:
        f.write(text)


def write_jsonl(path, records):
    with atomic(path, "w") as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def write_block(path, name, text):
    """Replaces what stands between the lines <!-- name --> and <!-- end of name -->."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, begins, rest = read_text(path).partition(begin)
    _, ends, after = rest.partition(end)
    if not begins or not ends:
        die(f"{path}: the line <!-- {name} --> or its end is missing; restore both")
    write_text(path, before + begin + text + end + after)
