"""Flags from a dataclass, and the one line that a program ends with when its input is wrong."""

import argparse
import dataclasses
import inspect
import math
import re
import sys


def die(message):
    """Ends the program with one line on stderr and exit code 1; with --debug, in a traceback."""
    line = " ".join(str(message).splitlines())  # file names and foreign messages may hold several
    raise (AssertionError if "--debug" in sys.argv else SystemExit)(f"error: {line}")


def add_debug_flag(parser):
    text = "end in a traceback where something is wrong, not in one line"
    parser.add_argument("--debug", action="store_true", help=text)


def parse_config(cls, doc, argv=None):
    """An instance of the dataclass from the command line.

    Each field is a flag. The comment on its line is the flag's help.
    """
    comments = dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", inspect.getsource(cls), re.M))
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fields = dataclasses.fields(cls)
    for field in fields:
        kind = dict(type=type(field.default))
        if isinstance(field.default, bool) or field.type == (bool | None):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(field.default, tuple):
            kind = dict(type=str, nargs="+")
        elif field.name == "resume":
            kind = dict(nargs="?", const="newest", choices=["newest", "previous"])
        comment = comments.get(field.name, "").replace("%", "%%")
        text = f"{comment} (default: {field.default})"
        parser.add_argument(f"--{field.name}", default=field.default, help=text, **kind)
    add_debug_flag(parser)
    values = vars(parser.parse_args(argv))
    values = {field.name: values[field.name] for field in fields}
    for field in fields:
        check_number(field.name, values[field.name], field.default)
    return cls(**values)


def check_number(name, value, default):
    """Ends the program if a flag's number makes no sense.

    0 is allowed where it is the default, and for warmup (none) and top_k (all).
    """
    if type(value) is int:
        least = 0 if default == 0 or name in ("warmup", "top_k") else 1
        if not least <= value <= 10**12:  # PPO's seeds, 10**6 times as large, end at 2**64
            die(f"--{name} {value}: must be at least {least}, and at most 10**12")
    if type(value) is float and value != default:
        if not math.isfinite(value) or (value < 0 <= default):
            die(f"--{name} {value}: must be a finite number" + ", not negative" * (default >= 0))
