"""What every script shares: errors, argument types, the trainers' common flags, the end of a run.

A UserError is bad input: one line on stderr and exit status 2. Exceptions of our own code, or of a
fork's, are never caught: they end in a traceback.
"""
import argparse
import contextlib
import errno
import itertools
import os
import re
import select
import signal
import sys
import textwrap
from pathlib import Path

# Threads that wait for each other spin. Beside other work they then take the core that the awaited
# thread needs. A short spin is as fast on an idle machine, and 2.5 times as fast on a busy one.
# libgomp reads this when torch is imported, so scripts import cli first (LOG.md, 2026-11-29).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class UserError(Exception):
    """Bad input: what is wrong, the value found, what is accepted, the flag that fixes it."""


class DataError(UserError):
    """Bad input in a user's data."""


class Stopped(Exception):
    """Stopped(number): the run was saved, and this signal ends it."""


# ------------------------------------------------------------------------------------------------
# Files that others wrote
# ------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def parsing(what, source=None, error=UserError):
    """Surround one call into a parser: Pillow, json, tarfile, tokenizers, safetensors, torch.load.

    It may also surround a constructor that takes a file's values. Any exception inside becomes one
    `error` that begins with `what`, because the file is at fault.
    source: the file's path or its bytes, whose first bytes may say what the file really is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:              # parsers raise many kinds
        raise error(f"{printable(what)}: {fault(e, source)}") from e


def fault(error, source=None):
    """Describe a parser's exception in one line, with the help of the file's first bytes."""
    head = source[:200] if isinstance(source, bytes) else b""
    if isinstance(source, (str, os.PathLike)) and os.path.isfile(source):
        with contextlib.suppress(OSError), open(source, "rb") as f:     # it may be unreadable
            head = f.read(200)
    if head.startswith(b"version https://git-lfs"):
        return "this is a Git LFS pointer, not the file itself; `git lfs pull` fetches it"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "this is a web page, not the file itself; download the file again"
    words = str(error)
    if code := re.search(r"GLOBAL ([\w.]+)", words):
        return (f"refused: the file holds code to run ({code[1]}), not only tensors; convert it to "
                "safetensors if you trust it")
    if "Weights only load failed" in words:
        return "damaged, or not a file of tensors that torch.save wrote"
    words = re.sub(r" <_io[^>]*>", "", words)               # the address of a buffer says nothing
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return printable(f"{type(error).__name__}: {'; '.join(lines[:3])}")


def printable(text):
    """Escape control characters and unpaired surrogates, which file names may hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
                   for c in str(text))


# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which refuses empty values (an unset shell
    variable in quotes)."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)
        self.register("type", Path, self.path)          # what type=Path calls

    def error(self, message):
        self.exit(2, f"error: {printable(message)} (see {self.prog} --help)\n")

    @staticmethod
    def path(text):
        if not text.strip():                            # Path("") would be the working folder
            raise argparse.ArgumentTypeError("it is empty")
        return Path(text)

    def parse_known_args(self, args=None, namespace=None):
        args, rest = super().parse_known_args(args, namespace)
        for key, value in vars(args).items():
            values = value if isinstance(value, list) else [value]
            if any(isinstance(v, str) and not v for v in values) and key != "text":
                self.error(f"--{key.replace('_', '-')} is empty")
        return args, rest


def positive(kind=int, zero=False):
    """Return an argparse type: a number above zero (with `zero`, or zero) and below 1e100."""
    def parse(text):
        value = kind(text)
        if not (value > 0 or (zero and value == 0)) or value >= 1e100:
            raise ValueError
        return value
    parse.__name__ = f"{'non-negative' if zero else 'positive'} {kind.__name__}"
    return parse


def share(text):
    """Argparse type: a number from 0 to below 1."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, not {text}")
    return float(text)


def seed(text):
    """Argparse type: a seed, below 2**32."""
    if not 0 <= int(text) < 2 ** 32:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 2**32 - 1, not {text!r}")
    return int(text)


def device_flags(a, dtype="bfloat16 on accelerators, float32 on the CPU"):
    """Add --device and --dtype. a: a parser's add_argument. dtype: the default, in words."""
    a("--device", choices=["auto", "cpu", "cuda", "xla"], default="auto",
      help="auto: a TPU if PJRT_DEVICE is set, else CUDA, else the CPU")
    a("--dtype", choices=["bfloat16", "float32"],
      help=f"dtype of matrix products (default: {dtype})")


def training_flags(parser, steps, batch, data, log=20, sample=250, save=500, remat="none",
                   blocks=True):
    """Add the flags that the trainers share. The arguments are defaults; None is filled later.
    blocks: whether the trainer can compile its blocks and recompute their activations."""
    a = parser.add_argument_group("run").add_argument
    a("--out", type=Path, help="run folder; one that holds a checkpoint is resumed")
    a("--fresh", action="store_true", help="move an old run in --out aside first")
    a("--steps", type=positive(), default=steps, help="optimizer steps")
    a("--batch", type=positive(), default=batch, help="images per step, over all devices")
    a("--micro-batch", type=positive(), help="images at a time; gradients accumulate to --batch")
    a("--seed", type=seed, default=0, help="random seed")
    a("--init", help="start from these weights: a run, a checkpoint, a released folder, a "
      "file or a hub id (train_dit.py: also tiny, the shipped model)")
    a = parser.add_argument_group("data").add_argument
    a("--data", nargs="+", default=data, metavar="SOURCE[=WEIGHT]",
      help="builtin:web|synthetic|text|hq|qa|align|brief, a folder, a .jsonl, or tar shards")
    a("--workers", type=positive(zero=True), default=1, help="data loading processes")
    a = parser.add_argument_group("device").add_argument
    device_flags(a, "bfloat16 where the device has it")
    a("--mesh", help="fsdp=8 or fsdp=16,tensor=4 (default: all devices on fsdp)")
    if blocks:
        a("--compile", action=argparse.BooleanOptionalAction,
          help="torch.compile each block (default: on CUDA)")
        a("--remat", choices=["none", "block"], default=remat,
          help="recompute each block's activations in the backward pass")
    a = parser.add_argument_group("log").add_argument
    a("--log-every", type=positive(), default=log, help="steps between two log lines")
    a("--sample-every", type=positive(zero=True), default=sample,
      help="steps between two sample grids; 0: never")
    a("--save-every", type=positive(), default=save, help="steps between two checkpoints")
    a("--keep", type=positive(), default=2, help="number of checkpoints to keep")
    a("--wandb", metavar="PROJECT", help="log to Weights & Biases too")
    a = parser.add_argument_group("instead of training").add_mutually_exclusive_group().add_argument
    a("--dry-run", action="store_true", help="print the start-up table and exit")
    a("--bench", type=positive(), nargs="?", const=20, metavar="N",
      help="time N steps; the first 20 %% are warm-up and not counted; write nothing")
    parser.add_argument("--json", action="store_true", help="with --dry-run: print one JSON object")


def table(title, rows):
    """Print a title and [(name, value)], wrapped at 80 columns; a list of texts or dicts takes one
    line per item."""
    def show(value):
        if isinstance(value, dict):
            return ", ".join(f"{k} {show(v)}" for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return " x ".join(map(show, value))
        if isinstance(value, float):
            return f"{value:.4g}"
        return f"{value:,}" if isinstance(value, int) else printable(value)

    print(title)
    for name, value in rows:
        several = isinstance(value, list) and not all(isinstance(v, int) for v in value)
        lines = [line for item in (value if several else [value]) for line in textwrap.wrap(
            show(item), 55, break_long_words=False, break_on_hyphens=False)]
        for label, line in itertools.zip_longest([name.replace("_", " ")], lines, fillvalue=""):
            print(f"  {label:<22} {line}")


# ------------------------------------------------------------------------------------------------

def main(function):
    """Run a script's main. Bad input is one line on stderr and exit status 2, a full disk 1; a run
    that a signal stopped ends by that signal, so that a shell loop around it stops too."""
    for name in ("stdout", "stderr"):           # None if it was closed (>&-)
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))
        # a terminal that is not UTF-8 must not end a run
        getattr(sys, name).reconfigure(errors="backslashreplace")
    status, number = 0, None
    try:
        function()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except ModuleNotFoundError as error:
        if error.name != "tiny":
            raise
        print("error: this needs the toy world, whose folder tiny/ is missing; restore it, or give "
              "--data of your own", file=sys.stderr)
        status = 2
    except Stopped as stopped:
        number, = stopped.args
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        number = signal.SIGINT
    except BrokenPipeError:
        output = select.poll()
        for handle in (1, 2):
            output.register(handle, 0)
        if not output.poll(0):                  # another pipe
            raise
        for handle in (1, 2):                   # the reader of `| head` has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), handle)
        status = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error}; free some space and run the same command again", file=sys.stderr)
        status = 1
    if not status and "parallel" in sys.modules:
        sys.modules["parallel"].finish()    # here, where nothing of the script is alive any more
    if number is not None:
        sys.stdout.flush()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    sys.exit(status)
