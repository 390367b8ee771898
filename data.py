"""The data stream: sources of images with text, mixed, shuffled and loaded. All random numbers.

    python data.py show photos/ --out sheet.png     # draw a contact sheet with captions
    python data.py check shards/                    # read every record and name the broken ones

Sample n of a mixture is a pure function of (sources, resolution, seed, n): n decides the source and
the place in it, and these decide the record, its caption and its crop. So the state of the stream
is the integer n, for any number of ranks and workers, and a run does not change with its mesh.
files.py reads the user's files, and tiny/world.py makes the `builtin:` sources.
"""
import argparse
import atexit
import contextlib
import functools
import hashlib
import itertools
import math
import multiprocessing
import os
import random
import signal
import sys
import textwrap
import traceback

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import cli
from chat import request_of
from cli import DataError, UserError, parsing, printable
from files import CROPS, BrokenRecord, broken_records, expand, file_record, open_source

# ------------------------------------------------------------------------------------------------
# Randomness
# ------------------------------------------------------------------------------------------------

def hash64(*parts) -> int:
    """Return a 64-bit hash of the parts; Python's own hash() differs from process to process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def random_stream(*key):
    """Return a function that gives floats in [0, 1). Python keeps the sequence of random() in all
    versions, but not those of choice() and shuffle()."""
    return random.Random(hash64(*key)).random


def rng(seed: int, purpose: str, n: int = 0) -> np.random.Generator:
    """Return numpy's Philox generator for a seed, a purpose such as "noise", and the number n of
    the sample or step: the source of all noise and weights. Its 128-bit key is blake2b of the text
    "seed/purpose/n", so that another framework can repeat the numbers."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{n}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


# ------------------------------------------------------------------------------------------------
# The stream
# ------------------------------------------------------------------------------------------------

CHUNK, WINDOW = 1024, 4096     # records that a shuffle keeps together; records shuffled at once
BLOCK = 1000                   # number of samples in which every source has exactly its share


def permutation(n: int, *key) -> np.ndarray:
    """Return a permutation, int64 [n]: the order that sorts splitmix64 of a counter. (numpy's own
    permutations may change with its version.)"""
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(hash64(*key))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


_window = functools.lru_cache(maxsize=BLOCK)(permutation)      # BLOCK: the most sources


@functools.lru_cache(maxsize=BLOCK)
def _chunks(size: int, *key) -> tuple:
    """Return the chunks of a source in the order of an epoch, and the place where each starts."""
    order = permutation(-(-size // CHUNK), *key)
    lengths = np.where(order == len(order) - 1, size - CHUNK * (len(order) - 1), CHUNK)
    return order, np.cumsum(lengths) - lengths


def shuffled(size: int, i: int, *key) -> int:
    """Return the number of the i-th record in an endless stream of epochs over `size` records.

    Each epoch has its own order: chunks of consecutive records (pieces of shards) are shuffled,
    then the records within a window, so that reads stay local. The cost is
    O(log size), once the orders of the epoch and of the window are cached.
    """
    epoch, p = divmod(i, size)
    start = p - p % WINDOW
    p = start + int(_window(min(WINDOW, size - start), *key, epoch, start)[p - start])
    order, starts = _chunks(size, *key, epoch)
    c = int(np.searchsorted(starts, p, side="right")) - 1
    return int(order[c]) * CHUNK + p - int(starts[c])


def parse_spec(spec: str) -> tuple:
    """Return (source, weight) of `source[=weight]`. Raises DataError."""
    name, _, number = spec.rpartition("=")
    if not name or "/" in number or os.path.exists(spec):               # such as date=2026/*.tar
        return spec, 1.0
    try:
        return name, cli.positive(float)(number)
    except ValueError as e:
        raise DataError(f"--data {printable(spec)}: the weight {number!r} is not a positive "
                        "number") from e


def parse_specs(specs: list) -> tuple:
    """Return the sources, and weights that sum to 1."""
    names, weights = zip(*map(parse_spec, specs))
    return names, [w / sum(weights) for w in weights]


def world():
    """Return the module of the toy world; nothing else here needs the folder tiny/."""
    from tiny import world
    return world


def is_builtin(name: str) -> bool:
    """Return whether the toy world makes this source. Raises DataError for an unknown name."""
    if name.startswith("builtin:") and name not in world().BUILTIN:
        known = ", ".join(world().BUILTIN)
        raise DataError(f"{printable(name)}: expected one of {known}, or a path")
    return name.startswith("builtin:")


class Mixture:
    """An endless stream of records: mixture[n], n >= 0, is a pure function of the arguments and n.

    A record is a dict: n; key; source; task ("t2i" or "qa"); image uint8 [R, R, 3]; caption or
    None; conversations [{"from": "human"|"gpt", "value": ...}] with at most one `<image>`; scene
    (a Scene, None for files); skipped [(key, reason)], the broken records that this one replaces.
    A built-in question has its kind as `question`. text: leave out images without text in a folder
    or in tars; a record without text of a JSONL, or with a .json, is then a broken one. Raises
    DataError for sources that cannot be used.
    """

    def __init__(self, specs: list, resolution: int, seed: int = 0, crop: str = "squash",
                 text: bool = True, resample: int = 3):
        if crop not in CROPS:
            raise ValueError(f"crop {crop!r} is unknown; expected one of {', '.join(CROPS)}")
        self.resolution, self.seed, self.crop = resolution, seed, crop
        self.text, self.resample = text, resample
        self.names, self.weights = parse_specs(specs)
        for name, weight in zip(self.names, self.weights):
            if weight < 1 / BLOCK:
                raise DataError(f"--data {printable(name)}: its weight is {weight:.2g} of the sum; "
                                f"expected at least 1/{BLOCK}")
        try:
            self.files = [None if is_builtin(n) else open_source(n, text) for n in self.names]
        except DataError as e:
            raise DataError(f"--data {e}") from e
        self.sizes = [world().BUILTIN[name] if files is None else len(files)
                      for name, files in zip(self.names, self.files)]       # None: endless
        # Every block of samples has the same plan. A source with a share of c samples (by largest
        # remainder) has one in each of c equal stretches, so that short windows are fair too.
        shares = [w * BLOCK for w in self.weights]
        self.counts = list(map(int, shares))
        for s in sorted(range(len(shares)), key=lambda s: self.counts[s] - shares[s]):
            self.counts[s] += sum(self.counts) < BLOCK
        rand = random_stream("plan", seed)
        slots = sorted(((k + rand()) / c, s, k)
                       for s, c in enumerate(self.counts) for k in range(c))
        self.plan = [(s, k) for _, s, k in slots]
        order = [s for s, _ in self.plan]
        for s, files in enumerate(self.files):
            if files is not None:
                self[order.index(s)]                      # raises if no record can be read

    def __len__(self):
        """Return the number of records of all sources. Raises TypeError if one is endless."""
        return sum(self.sizes)

    def endless(self) -> bool:
        """Return whether every source is endless, so that another seed gives other images."""
        return not any(self.sizes)

    @property
    def records(self) -> int:
        """The number of records in the user's files."""
        return sum(len(files) for files in self.files if files is not None)

    def describe(self) -> list:
        """Return [{source, weight, size}] for the start table. The weights sum to 1."""
        return [{"source": name, "weight": weight, "size": size or "endless"}
                for name, weight, size in zip(self.names, self.weights, self.sizes)]

    def __getitem__(self, n: int) -> dict:
        n = int(n)                          # numpy's integers have another repr and hash
        block, slot = divmod(n, BLOCK)
        s, k = self.plan[slot]
        i, name, size = block * self.counts[s] + k, self.names[s], self.sizes[s]
        out = {"n": n, "source": name, "skipped": []}
        if self.files[s] is None:
            j = shuffled(size, i, self.seed, name) if size else i
            return {**out, **world().builtin_record(name, self.seed, j, self.resolution)}
        for attempt in range(100):
            j = shuffled(size, i, self.seed, name)
            rand = random_stream("sample", self.seed, n, attempt)
            try:
                return {**out, **file_record(self.files[s], j, self.resolution, self.crop,
                                             self.text, rand, self.resample)}
            except BrokenRecord as e:
                out["skipped"].append((self.files[s].key(j), str(e)))
                i = hash64("instead", self.seed, n, attempt) % size if attempt < 20 else i + 1
        key, why = out["skipped"][-1]
        raise DataError(f"--data {printable(name)}: {attempt + 1} broken records in a row, the "
                        f"last is {key} ({why}); `python data.py check` lists them")


class SkipCounter:
    """Names each broken record once, and ends the run if there are too many.

    records: number of records in the user's files (Mixture.records), if known. More than 10
    distinct broken records end the run if they are more than 10 % of the records (1 % of 10,000 or
    more), or if their share of the samples so far exceeds that by three standard deviations.
    """

    def __init__(self, records: int = 0):
        self.records, self.count, self.seen = records, 0, 0
        self.broken, self.named = set(), set()

    def update(self, skipped: list, seen: int, rejected: list = ()):
        """Count the broken records [(key, reason)] among the last `seen` samples. rejected: intact
        records that cannot be used, such as too long ones. Raises DataError."""
        self.count, self.seen = self.count + len(skipped) + len(rejected), self.seen + seen
        for key, why in (*skipped, *rejected):
            if key not in self.named:
                tqdm.write(f"skipped {key}: {why}", file=sys.stderr)    # above a trainer's bar
            self.named.add(key)
        self.broken.update(key for key, _ in skipped)
        n, share = len(self.broken), 0.1 if (self.records or self.seen) < 10_000 else 0.01
        of_all = self.records and n > share * self.records
        if n > 10 and (of_all or n - 3 * math.sqrt(n) > share * self.seen):
            among = f"{self.records} records" if of_all else f"the first {self.seen} samples"
            raise DataError(f"{n} broken records among {among}, more than {share:.0%}, such as "
                            f"{max(self.broken)}; `python data.py check` lists them; repair them "
                            "or leave the source out of --data")


class WorkerDied(UserError):
    """A worker of the loader ended early."""


def loader(mixture: Mixture, collate, batch: int, start: int = 0, workers: int = 0,
           rank: int = 0, ranks: int = 1):
    """Return an iterator over collate([records]).

    batch: number of samples of all ranks together. Micro-batch k of a rank holds batch//ranks
    samples, from start + k*batch + rank*(batch//ranks) on. collate runs in the workers, if there
    are any. The iterator raises DataError, and WorkerDied if the system kills a worker.
    """
    if batch < 1 or batch % ranks:
        raise DataError(f"a micro-batch of {batch} does not divide over {ranks} ranks; change "
                        "--micro-batch")
    share = batch // ranks
    numbers = (range(n, n + share) for n in itertools.count(start + rank * share, batch))
    if not workers:
        return (collate([mixture[i] for i in n]) for n in numbers)
    # forked workers start at once; from Python 3.14 on, Linux's default is another way
    context, started = multiprocessing.get_context("fork" if sys.platform == "linux" else None), []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=work, args=(mixture, collate, theirs, ours), daemon=True)
        process.start()
        theirs.close()
        atexit.register(process.kill)       # Python would wait for it, because it ignores SIGTERM
        started.append((process, ours))
    for _, pipe in 4 * started:                           # each is up to four batches ahead
        pipe.send(next(numbers))
    return batches(started, numbers)


def work(mixture, collate, pipe, other_end):
    """Answer each range of numbers that comes through the pipe by its batch, or by an exception."""
    import torch
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # the trainer gets the signal, and saves
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    other_end.close()                                     # a fork has the trainer's end too
    with contextlib.suppress(EOFError, ConnectionError):  # until the trainer ends, even by kill -9
        while True:
            numbers = pipe.recv()
            try:
                answer = collate([mixture[n] for n in numbers])
            except UserError as e:
                answer = e
            except Exception:                             # an exception loses its traceback here
                answer = RuntimeError(f"in a loader worker:\n{traceback.format_exc()}")
            pipe.send(answer)


def batches(workers, numbers):
    """Yield the batches of the workers [(process, pipe)], which take turns."""
    for process, pipe in itertools.cycle(workers):
        try:
            batch = pipe.recv()
            pipe.send(next(numbers))
        except (EOFError, OSError) as e:        # its end is closed, or a tensor's file is gone
            process.join(10)
            if process.exitcode is None:
                raise
            raise WorkerDied(f"a loader worker died (exit code {process.exitcode}); the system "
                             "kills one when memory or /dev/shm runs out; use fewer "
                             "--workers") from e
        if isinstance(batch, Exception):
            raise batch
        if isinstance(batch, dict):             # copied: each tensor of a worker is an open file
            batch = {k: v.clone() if hasattr(v, "clone") else v for k, v in batch.items()}
        yield batch


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------

def contact_sheet(images: list, texts: list, columns: int, side: int = 128) -> Image.Image:
    """Draw uint8 [H, W, 3] images in rows, each above its text."""
    pad, tall = 8, 82                                     # six lines of 12 pixels
    sheet = Image.new("RGB", (pad + columns * (side + pad),
                              pad + -(-len(images) // columns) * (side + tall)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for n, (image, text) in enumerate(zip(images, texts)):
        x, y = pad + n % columns * (side + pad), pad + n // columns * (side + tall)
        sheet.paste(Image.fromarray(image).resize((side, side), Image.NEAREST), (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=(190, 190, 190))
        lines = [w for line in text.splitlines() for w in textwrap.wrap(line, side * 2 // 11)]
        draw.multiline_text((x, y + side + 2), "\n".join(lines[:6]), "black", font, spacing=0)
    return sheet


def show(args):
    """draw the first samples of a stream with their captions"""
    sources = args.sources or args.source or ["builtin:web"]
    if not args.out.lower().endswith(".png"):
        raise UserError(f"--out {printable(args.out)}: expected a name such as sheet.png")
    mixture = Mixture(sources, args.resolution, args.seed, text=False)
    if any(os.path.abspath(args.out).startswith(os.path.abspath(s) + "/") for s in mixture.names):
        raise UserError(f"--out {printable(args.out)} lies in the data; give another place")
    with parsing(f"--out {args.out}"):
        out = open(args.out, "wb")
    records, texts = [mixture[n] for n in range(args.count)], []
    for key, why in dict.fromkeys(s for r in records for s in r["skipped"]):
        print(f"skipped {key}: {why}", file=sys.stderr)
    for r in records:
        turns = [turn["value"] for turn in r["conversations"]]
        if r["task"] == "t2i" and turns:                  # an image may have no text
            turns = [request_of(r["conversations"])]
        texts.append(" ".join(turn.replace("<image>", "").strip() for turn in turns))
    sheet = contact_sheet([r["image"] for r in records], texts, min(6, args.count),
                          max(args.resolution, 128))
    with out:
        sheet.save(out, "PNG")
    print(printable(f"{args.out}: {args.count} samples of {' '.join(sources)}"))


def check(args):
    """read every record and name the broken ones; exit with 1 if there are any"""
    total, broken = 0, 0
    for name in (parse_spec(s)[0] for s in args.sources):
        if is_builtin(name):                              # made as needed: nothing to read
            continue
        paths = expand(name)
        if not paths:
            open_source(name)                             # raises the error
        for path in paths:                                # shard by shard: one may be cut short
            try:
                source = open_source(path, text=False)
            except DataError as e:
                total, broken = total + 1, broken + 1
                print(e)
                continue
            total += len(source) + len(getattr(source, "lost", ()))
            for key, why in broken_records(source, args.text):
                broken += 1
                print(f"{key}: {why}")
    print(f"{broken} of {total} records are broken")
    sys.exit(1 if broken else 0)


def main():
    p = cli.Parser(description=__doc__.split("\n")[0])
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True)
    q = commands.add_parser("show", help=show.__doc__, **form)
    q.add_argument("sources", nargs="*", metavar="SOURCE", help="as in --data of the trainers")
    q.add_argument("--source", nargs="+", help=argparse.SUPPRESS)      # the first edition's way
    q.add_argument("--out", default="sheet.png", help="PNG file to write")
    q.add_argument("--count", type=cli.positive(), default=24, help="number of samples")
    q.add_argument("--resolution", type=cli.positive(), default=224, help="pixels per side")
    q.add_argument("--seed", type=cli.seed, default=0, help="seed of the stream")
    q.set_defaults(function=show)
    q = commands.add_parser("check", help=check.__doc__, **form)
    q.add_argument("sources", nargs="+", metavar="SOURCE", help="as in --data of the trainers")
    q.add_argument("--text", action=argparse.BooleanOptionalAction, default=True,
                   help="whether a record without text counts as broken")
    q.set_defaults(function=check)
    args = p.parse_args()
    args.function(args)


if __name__ == "__main__":
    cli.main(main)
