"""Images with text: the built-in world (world.py), folders, JSONL, WebDataset tars, and mixtures.

    python data.py show   --source builtin:web --out sheet.png      # a contact sheet with captions
    python data.py export --source builtin:web --count 10000 --out shards/
    python data.py check  shards/                                   # reads everything

The stream is random access: sample n of a mixture is a pure function of (specs, resolution, seed,
n). n decides the source and the place in it, and from these follow the record, its caption and its
crop. So the whole state of the stream is the integer n, whatever the number of ranks and workers: a
rank takes its slice of n, a worker any of them. This is why a run does not change with its mesh.
"""
import argparse
import contextlib
import fcntl
import functools
import glob
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import tarfile
import textwrap
import zlib
from dataclasses import asdict

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import world
from world import BUILTIN, DataError, builtin_record, drawing, generator, hash64

# ------------------------------------------------------------------------------------------------
# The user's files. A source has a length, key(j), read(j) -> (bytes of the image, its fields), and
# parts(), the files it is made of
# ------------------------------------------------------------------------------------------------

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
# What Pillow, json and a record of the wrong form raise. Anything else is a bug and stops the run.
CORRUPT = (OSError, ValueError, LookupError, TypeError, SyntaxError, AttributeError, struct.error,
           Image.DecompressionBombError)


def reason(error: Exception) -> str:
    """Its kind and words, less the address of a buffer that Pillow puts in: the same each time."""
    return f"{type(error).__name__}: {re.sub(r' <_io[^>]*>', '', str(error))}"


def read_bytes(path: str, offset: int = 0, size: int = -1) -> bytes:
    with open(path, "rb") as f:          # opened each time: nothing to share between forked workers
        f.seek(offset)
        return f.read(size)


class Folder:
    """Images below a folder, with `metadata.jsonl` (`file_name`, `text`) or same-stem .txt files;
    those without a text are left out where `text` is wanted."""
    in_order = False

    def __init__(self, path: str, text: bool):
        self.path, meta, found = path, os.path.join(path, "metadata.jsonl"), []
        if os.path.exists(meta):
            for number, line in enumerate(read_bytes(meta).splitlines(), 1):
                if line.strip():
                    try:
                        fields = json.loads(line)
                        found.append((os.fspath(fields["file_name"]),
                                      fields.get("text") or fields.get("caption"), None))
                    except CORRUPT as e:
                        raise DataError(f"{meta}:{number}: expected an object with file_name and "
                                        f"text, found {line[:60]!r} ({reason(e)})") from None
        else:
            seen = set()                                  # a link to a folder above has no end
            for root, folders, files in os.walk(path, followlinks=True):
                folders[:] = [f for f in sorted(folders) if os.path.realpath(
                    os.path.join(root, f)) not in seen]   # os.walk goes into them in this order
                seen.update(os.path.realpath(os.path.join(root, f)) for f in ("", *folders))
                name = lambda f: os.path.relpath(os.path.join(root, f), path)
                texts = {f[:-4]: name(f) for f in files if f.lower().endswith(".txt")}
                found += [(name(f), None, texts.get(os.path.splitext(f)[0]))
                          for f in sorted(files) if f.lower().endswith(IMAGES)]
        # (image, its text or None, the file of its text or None)
        self.entries = [e for e in found if e[1] or e[2] or not text]
        if not self.entries:
            raise DataError(f"{path}: {len(found)} images, 0 of them with a caption; "
                            f"expected a folder of {', '.join(IMAGES)} files with a "
                            "metadata.jsonl (file_name, text) or a .txt beside each image")

    def __len__(self):
        return len(self.entries)

    def parts(self):
        return [self.key(j) for j in range(len(self))]

    def key(self, j):
        return os.path.join(self.path, self.entries[j][0])

    def read(self, j):
        _, text, file = self.entries[j]
        if file:
            text = read_bytes(os.path.join(self.path, file)).decode("utf-8-sig").strip()
        return read_bytes(self.key(j)), {"caption": text or None}


class JsonLines:
    """LLaVA conversations, or captions, one JSON object a line; images are relative to the file."""
    in_order = False

    def __init__(self, path: str):
        self.path, rows, offset = path, [], 0
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    rows.append((number, offset, len(line)))
                offset += len(line)
        if not rows:
            raise DataError(f"{path}: 0 records; one JSON object a line is expected")
        self.rows = np.array(rows)                                    # 24 bytes a record

    def __len__(self):
        return len(self.rows)

    def parts(self):
        out = [self.path]
        for j in range(len(self)):
            try:
                out.append(self.line(j)[0])
            except CORRUPT:
                pass
        return out

    def key(self, j):
        return f"{self.path}:{self.rows[j, 0]}"

    def line(self, j):
        """-> the path of its image, the object itself."""
        fields = json.loads(read_bytes(self.path, *self.rows[j, 1:].tolist()))
        image = fields.get("image") if isinstance(fields, dict) else None
        if isinstance(image, list) and len(image) == 1:
            image, = image
        if not isinstance(image, str):
            raise ValueError('expected an object with "image", one path (no text alone)')
        return os.path.join(os.path.dirname(self.path), image), fields

    def read(self, j):
        image, fields = self.line(j)
        return read_bytes(image), fields


class Tars:
    """WebDataset shards: members `<key>.jpg|png|webp` with a `<key>.json`, a `<key>.txt`, or both
    (then the .txt is the caption, where the other has no words), found by one pass over the
    headers, which keeps 56 bytes a record."""

    def __init__(self, paths: list, text: bool):
        self.paths = paths
        rows = np.concatenate([
            np.array([(shard, *row) for row in self.index(path)], np.int64).reshape(-1, 7)
            for shard, path in enumerate(paths)])
        images, texts = rows[:, 1] > 0, (rows[:, 3] > 0) | (rows[:, 5] > 0)
        self.rows = rows[images & texts if text else images]
        self.lonely = int((~images).sum())                            # texts without an image
        if not len(self.rows):
            raise DataError(f"{paths[0]}: {images.sum()} images, 0 with a caption, "
                            f"in {len(paths)} shards; expected members <key>.jpg, .png or .webp "
                            "with <key>.txt or .json")
        # What `export` wrote is a stream already: its first epoch keeps the order of the file.
        self.in_order = b'"stream": {"n": 0,' in self.member(0, 5)

    def index(self, path):
        """By key the offset and size of its image, .txt and .json; 0 where there is none."""
        found = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for m in tar:
                    tar.members = []                      # tarfile would keep them all
                    stem, extension = os.path.splitext(m.name)
                    extension = extension.lower()
                    if not m.isfile() or extension not in (*IMAGES, ".json", ".txt"):
                        continue                          # a folder, or what no record has
                    at = 0 if extension in IMAGES else 2 if extension == ".txt" else 4
                    row = found.setdefault(stem, [0] * 6)
                    row[at:at + 2] = m.offset_data, m.size
                tar.fileobj.seek(tar.offset)              # a damaged header looks like the end
                while rest := tar.fileobj.read(2 ** 20):
                    if rest.strip(b"\0"):
                        raise tarfile.ReadError(f"no header at byte {tar.offset}, and it goes on")
        except (tarfile.TarError, OSError) as e:
            mend = "fetch it again"
            if read_bytes(path, 0, 2) == b"\x1f\x8b":
                mend = "it is compressed: unpack it with gunzip"
            raise DataError(f"{path}: unreadable as a tar after {len(found)} records ({e}); "
                            f"{mend}, or leave it out of --data") from None
        return found.values()

    def __len__(self):
        return len(self.rows)

    def parts(self):
        return self.paths

    def member(self, j, column):
        offset, size = self.rows[j, column:column + 2].tolist()
        return read_bytes(self.paths[self.rows[j, 0]], offset, size)

    def key(self, j):                                     # the header before the data has the name
        name = read_bytes(self.paths[self.rows[j, 0]], int(self.rows[j, 1]) - 512, 100)
        return f"{self.paths[self.rows[j, 0]]}/{name.rstrip(bytes(1)).decode(errors='replace')}"

    def read(self, j):
        fields = dict(json.loads(self.member(j, 5))) if self.rows[j, 5] else {}
        if self.rows[j, 3] and not any(
                fields.get(k) for k in ("caption", "prompt", "text", "conversations")):
            fields["caption"] = self.member(j, 3).decode("utf-8-sig").strip() or None
        return self.member(j, 1), fields


def expand(name: str) -> list:
    """The files of `a/{000..123}.tar`, there or not, of a glob, or of a path that is there."""
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", name):
        first, last = braces.groups()
        return [name.replace(braces.group(), str(k).zfill(len(first)))
                for k in range(int(first), int(last) + 1)]
    return [name] if os.path.exists(name) else sorted(glob.glob(name))


def open_source(name: str, text: bool = True):
    """Folder, JsonLines or Tars for a path; shards may be `a/{000..123}.tar`, a glob or a folder of
    tars. Raises DataError."""
    if os.path.isdir(name):
        inside = [os.path.join(name, f) for f in sorted(os.listdir(name))]
        paths = [p for p in inside if p.endswith(".tar")]
        if paths and (lone := sum(p.lower().endswith(IMAGES) for p in inside)):
            print(f"note: {name} holds tars, the {lone} pictures beside them are left out",
                  file=sys.stderr)
        return Tars(paths, text) if paths else Folder(name, text)
    if not name.endswith((".jsonl", ".tar")):
        what = "a file of no known kind" if os.path.exists(name) else "neither built in nor a path"
        raise DataError(f"{name!r} is {what}; expected {', '.join(BUILTIN)}, a folder, a .jsonl, "
                        "or .tar shards, each with =WEIGHT if wanted")
    paths = expand(name)
    if not paths:
        raise DataError(f"{name}: there is no such file")
    if missing := [p for p in paths if not os.path.exists(p)]:
        raise DataError(f"{name}: {len(missing)} files of {len(paths)} are missing, such as "
                        f"{missing[0]}")
    if name.endswith(".tar"):
        return Tars(paths, text)
    if len(paths) > 1:
        raise DataError(f"{name}: {len(paths)} .jsonl files; give each as a source of its own")
    return JsonLines(paths[0])


TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def upright_rgb(image):
    """A Pillow image -> RGB, turned as its camera says, what is transparent on white. (Pillow's
    exif_transpose writes all tags anew and fails where one has another type than it should.)"""
    turn = TURNS.get(image.getexif().get(0x0112))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I"):                        # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255)
                                .astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def load_image(data: bytes, resolution: int, crop: str, rand, resample=3) -> np.ndarray:
    """uint8 [R, R, 3] RGB from a file's bytes. `squash` resizes to a square (as the authors do for
    SigLIP), `center` is ADM's centre crop, `random` cuts R x R from a short side of 1.5 R.
    resample: Pillow's number of a filter, 3 is bicubic."""
    image = Image.open(io.BytesIO(data))
    short = resolution * 3 // 2 if crop == "random" else resolution
    image.draft("RGB", (short, short))                    # JPEG: decodes at 1/2, 1/4 or 1/8
    image = upright_rgb(image)
    if crop == "squash":
        return np.array(image if image.size == (resolution, resolution) else
                        image.resize((resolution, resolution), resample))
    while min(image.size) >= 2 * short:
        image = image.resize([v // 2 for v in image.size], Image.BOX)
    size = [max(short, round(v * short / min(image.size))) for v in image.size]
    at = [int(rand() * (v - resolution + 1)) if crop == "random" else (v - resolution) // 2
          for v in size]                                  # only what the crop shows is resized
    box = [(a + side) * v / w for side in (0, resolution) for a, v, w in zip(at, image.size, size)]
    return np.array(image.resize((resolution, resolution), resample, box=box))


def file_record(source, j: int, resolution: int, crop: str, text: bool, rand,
                resample=3) -> dict:
    """Record j of the user's files. Raises one of CORRUPT when it is broken. resolution 0: no
    picture."""
    data, fields = source.read(j)
    words = fields.get("caption") or fields.get("prompt") or fields.get("text")
    words = words.strip() if isinstance(words, str) else words
    talk = fields.get("conversations")
    for said in [words or "", *(t[k] for t in talk or [] for k in ("from", "value"))]:
        if not isinstance(said, str):
            raise ValueError(f"its text is a {type(said).__name__}, not a string")
        said.encode()                                     # half of a surrogate pair is no text
    if talk:
        drawn = any("<image>" in t["value"] for t in talk if t["from"] in ("gpt", "assistant"))
        if not any("<image>" in t["value"] for t in talk):            # some LLaVA sets leave it out
            asked = [k for k, t in enumerate(talk) if t["from"] in ("human", "user")]
            if not asked:
                raise ValueError("no turn of the human, who shows the picture")
            k = asked[0]
            talk = [*talk[:k], {**talk[k], "value": "<image>\n" + talk[k]["value"]}, *talk[k + 1:]]
    elif text and not words:
        raise ValueError("no caption, prompt or conversations")
    else:
        drawn, talk = True, drawing(words, rand) if words else []
    if (images := sum(t["value"].count("<image>") for t in talk)) > 1:
        raise ValueError(f"{images} images in one sample; at most 1")
    out = {"key": source.key(j), "task": "t2i" if drawn else "qa", "caption": words, "scene": None,
           "image": load_image(data, resolution, crop, rand, resample) if resolution else None,
           "conversations": talk}
    return {**out, "question": fields["question"]} if "question" in fields else out


# ------------------------------------------------------------------------------------------------
# The stream
# ------------------------------------------------------------------------------------------------

CHUNK, WINDOW = 1024, 4096     # records that stay neighbours in a shuffle, records shuffled as one
BLOCK = 1000                   # samples in which every source has exactly its share
CROPS = ("squash", "center", "random")


def permutation(n: int, *key) -> np.ndarray:
    """int64 [n]: the order that sorts splitmix64 of a counter (numpy's may change by version)."""
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(hash64(*key))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


_window = functools.lru_cache(maxsize=BLOCK)(permutation)      # one for each source, at the most


@functools.lru_cache(maxsize=BLOCK)
def _chunks(size: int, *key) -> tuple:
    """The chunks of a source in the order of an epoch, and where each starts in it."""
    order = permutation(-(-size // CHUNK), *key)
    lengths = np.where(order == len(order) - 1, size - CHUNK * (len(order) - 1), CHUNK)
    return order, np.cumsum(lengths) - lengths


def shuffled(size: int, i: int, *key) -> int:
    """Which of `size` records comes i-th in an endless stream of epochs, each with its own order:
    chunks of consecutive records (pieces of shards) at random, then the records within a window at
    random, so that reads stay local. Random access in O(log size)."""
    epoch, p = divmod(i, size)
    start = p - p % WINDOW
    p = start + int(_window(min(WINDOW, size - start), *key, epoch, start)[p - start])
    order, starts = _chunks(size, *key, epoch)
    c = int(np.searchsorted(starts, p, side="right")) - 1
    return int(order[c]) * CHUNK + p - int(starts[c])


def parse_spec(spec: str) -> tuple:
    """(source, weight) of `source[=weight]`. Raises DataError."""
    name, _, number = spec.rpartition("=")
    if not name or "/" in number or os.path.exists(spec):               # date=2026/*.tar
        return spec, 1.0
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (weight > 0 and math.isfinite(weight)):
        raise DataError(f"--data {spec}: the weight {number!r} is not a positive number")
    return name, weight


def parse_specs(specs: list) -> tuple:
    """Their sources, and weights that sum to 1."""
    names, weights = zip(*map(parse_spec, specs))
    return names, [w / sum(weights) for w in weights]


def planned(specs: list) -> list:
    """`Mixture.describe` of sources that are not read."""
    return [{"source": name, "weight": w, "size": None} for name, w in zip(*parse_specs(specs))]


class Mixture:
    """An endless stream of records: mixture[n], n >= 0, is a pure function of the arguments and n.

    A record is a dict: n; key; source; task ("t2i" or "qa"); image uint8 [R, R, 3]; caption or
    None; conversations [{"from": "human"|"gpt", "value": ...}] with `<image>` in the turn that has
    it; scene (a Scene, None for files); skipped [(key, reason)], the broken records in whose place
    this one stands; for questions also question, its type. `text=False` takes images that have no
    caption. Raises DataError, before long work, for what cannot be used.
    """

    def __init__(self, specs: list, resolution: int, seed: int = 0, crop: str = "squash",
                 text: bool = True, resample: int = 3):
        if crop not in CROPS:
            raise DataError(f"crop {crop!r} is unknown; expected one of {', '.join(CROPS)}")
        self.resolution, self.seed, self.text, self.resample = resolution, seed, text, resample
        self.latents = None                             # rows of each source; see `cache_latents`
        self.names, self.weights = parse_specs(specs)
        for name, weight in zip(self.names, self.weights):
            if weight < 1 / BLOCK:
                raise DataError(f"--data {name}: its weight is {weight:.2g} of the sum; "
                                f"at least 1/{BLOCK} is expected")
            if name.startswith("builtin:") and name not in BUILTIN:
                raise DataError(f"--data {name}: expected one of {', '.join(BUILTIN)}, or a path")
        try:
            self.files = [None if n in BUILTIN else open_source(n, text) for n in self.names]
        except (DataError, OSError) as e:
            raise DataError(f"--data {e}") from None
        # What `export` wrote is cropped already.
        self.crops = ["squash" if f and f.in_order else crop for f in self.files]
        # Every block of 1,000 samples has the same plan: each source gets its share (by largest
        # remainder), one sample in each of as many equal stretches, so short windows are fair too.
        shares = [w * BLOCK for w in self.weights]
        self.counts = [int(s) for s in shares]
        for s in sorted(range(len(shares)), key=lambda s: self.counts[s] - shares[s]):
            self.counts[s] += sum(self.counts) < BLOCK
        rand = generator("plan", seed)
        slots = sorted(((k + rand()) / c, s, k)
                       for s, c in enumerate(self.counts) for k in range(c))
        self.plan = [(s, k) for _, s, k in slots]
        for s, files in enumerate(self.files):            # is there a record that can be read?
            if files is not None:
                self[next(n for n, (source, _) in enumerate(self.plan) if source == s)]

    def size(self, s: int):
        """Records of source s, None when it is endless."""
        return BUILTIN[self.names[s]] if self.files[s] is None else len(self.files[s])

    def endless(self):
        """Has another seed other pictures, from every source?"""
        return all(self.size(s) is None for s in range(len(self.names)))

    def __len__(self):
        sizes = [self.size(s) for s in range(len(self.names))]
        if None in sizes:
            raise TypeError(f"{self.names[sizes.index(None)]} is endless")
        return sum(sizes)

    def describe(self) -> list:
        """[{source, weight, size}] for the start-up table; the weights sum to 1."""
        return [{"source": name, "weight": w, "size": self.size(s) or "endless"}
                for s, (name, w) in enumerate(zip(self.names, self.weights))]

    def __getitem__(self, n: int) -> dict:
        block, slot = divmod(int(n), BLOCK)
        s, k = self.plan[slot]
        i, name, files = block * self.counts[s] + k, self.names[s], self.files[s]
        size = self.size(s)
        pixels = 0 if self.latents else self.resolution
        if files is None:
            j = shuffled(size, i, self.seed, name) if size else i
            record = builtin_record(name, self.seed, j, pixels)
            if self.latents:
                record["latent"] = read_latent(self.latents[s], j)
            return {"n": n, "source": name, **record, "skipped": []}
        skipped = []
        for attempt in range(20):
            j = i if files.in_order and i < size else shuffled(size, i, self.seed, name)
            rand = generator("sample", self.seed, n, attempt)
            try:
                record = file_record(files, j, pixels, self.crops[s], self.text, rand,
                                     self.resample)
                if self.latents:
                    record["latent"] = read_latent(self.latents[s], j)
                return {"n": n, "source": name, **record, "skipped": skipped}
            except CORRUPT as e:
                skipped.append((files.key(j), reason(e)))
                i = hash64("instead", self.seed, n, attempt) % size
        raise DataError(f"--data {name}: {len(skipped)} broken records in a row, the last is "
                        f"{skipped[-1][0]} ({skipped[-1][1]}); `python data.py check` lists them")


class SkipCounter:
    """Names each record that is left out once. Raises DataError when the broken ones are more than
    10 and 1 % of the samples; `count` has all, those before a resumption too."""

    def __init__(self):
        self.count, self.broken, self.seen, self.keys = 0, 0, 0, set()

    def update(self, skipped: list, seen: int, unfit: list = ()):
        """Of the last `seen` samples the [(key, reason)] of the broken ones, and of those that are
        whole but of no use, as the too long."""
        self.count += len(skipped) + len(unfit)
        self.broken, self.seen = self.broken + len(skipped), self.seen + seen
        for key, reason in (*skipped, *unfit):
            if key not in self.keys:
                print(f"skipped {key}: {reason}", file=sys.stderr)
            self.keys.add(key)
        certain = self.broken - math.sqrt(self.broken)      # at 1 % chance alone would pass it
        if self.broken > 10 and certain > 0.01 * self.seen:
            raise DataError(f"{self.broken} of {self.seen} samples were broken, above 1 %, such as "
                            f"{skipped[0][0]}; `python data.py check` lists them; mend them or "
                            "leave the source out of --data")


# --cache-latents: what the frozen networks make of every picture of a finite source, in one .npy
# file. A row is `latent`, float32 [N, F], its checksum `crc`, and why the picture is `broken`.

def read_latent(rows, j: int) -> np.ndarray:
    """[N, F] of record j. A broken record raises as its picture did."""
    if rows[j]["broken"]:
        raise ValueError(rows[j]["broken"].decode(errors="replace"))
    latent = np.array(rows[j]["latent"])
    if zlib.crc32(latent) != rows[j]["crc"]:
        raise DataError(f"--cache-latents: record {j} of {rows.filename} is damaged; delete that "
                        "file, and it is made again")
    return latent


class Pictures:
    """The pictures of one source as a dataset: [j] -> uint8 [R, R, 3], or why it has none."""

    def __init__(self, mixture: Mixture, s: int):
        self.mixture, self.s = mixture, s

    def __len__(self):
        return self.mixture.size(self.s)

    def __getitem__(self, j: int):
        m, files = self.mixture, self.mixture.files[self.s]
        if files is None:
            return builtin_record(m.names[self.s], m.seed, j, m.resolution)["image"]
        try:                                              # train_dit.py's crops draw nothing
            return load_image(files.read(j)[0], m.resolution, m.crops[self.s], None, m.resample)
        except CORRUPT as e:
            return reason(e)


def cache_latents(mixture: Mixture, folder: str, what: str, encode, batch: int, workers: int,
                  write: bool = True, wait=lambda: None):
    """Give `mixture` the latents of its sources instead of pictures, from `folder`; made first
    where they are not there or damaged.

    encode: uint8 [B,R,R,3] -> float32 [B,N,F]. what: names encode, up to its weights; a source's
    file is a hash of it, resolution, crop, filter, and the names, sizes and times of the source's
    files. Of several processes one is to `write`, the others wait(). The texts are not kept: their
    form changes from epoch to epoch. Raises DataError.
    """
    mixture.latents, found = None, []
    for s, name in enumerate(mixture.names):
        if mixture.size(s) is None:
            raise DataError(f"--cache-latents: {name} is endless; give finite sources to --data")
        parts = mixture.files[s].parts() if mixture.files[s] else [world.__file__, world.SPRITES]
        stats = [(p, os.stat(p)) for p in parts if os.path.exists(p)]
        state = [(p, stat.st_size, stat.st_mtime_ns) for p, stat in stats]
        key = hash64(what, name, mixture.resolution, mixture.crops[s], mixture.resample,
                     mixture.size(s), state)
        path = os.path.join(folder, f"{key:016x}.npy")
        if write:
            try:
                with alone(path + ".lock"):
                    try:
                        np.load(path, mmap_mode="r")
                    except (OSError, EOFError, ValueError) as e:
                        print(f"{path}: a damaged cache of latents ({e}); making it again"
                              if os.path.exists(path) else f"{name}: encoding {mixture.size(s)} "
                              f"pictures once, into {path}", file=sys.stderr)
                        write_latents(Pictures(mixture, s), path, encode, batch, workers)
            except OSError as e:
                raise DataError(f"--cache-latents {folder}: cannot write: {e}") from None
        wait()
        try:
            found.append(np.load(path, mmap_mode="r"))
        except (OSError, EOFError, ValueError) as e:
            raise DataError(f"--cache-latents {folder}: {e}; give a folder that all hosts "
                            "see") from None
    mixture.latents = found


@contextlib.contextmanager
def alone(path: str):
    """One process at a time; another that fills the same file is waited for."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that fills {path[:-5]}", file=sys.stderr)
            fcntl.lockf(f, fcntl.LOCK_EX)
        yield


def write_latents(pictures: Pictures, path: str, encode, batch: int, workers: int):
    """Encode them all into `path`, under another name until it is whole."""
    from torch.utils.data import DataLoader
    size, R, rows = len(pictures), pictures.mixture.resolution, None
    with contextlib.suppress(FileNotFoundError):
        os.remove(path + ".writing")                      # of one that was cut: it takes room
    blank = np.zeros((R, R, 3), np.uint8)
    loaded = DataLoader(pictures, batch, collate_fn=list, num_workers=workers,
                        worker_init_fn=start_worker,
                        multiprocessing_context=FORK if workers else None)
    for start, images in zip(range(0, size, batch), loaded):
        broken = [v.encode()[:200] if isinstance(v, str) else b"" for v in images]
        images = [blank if why else v for v, why in zip(images, broken)]
        padded = images + [blank] * (batch - len(images))               # one shape: compiled once
        latents = encode(np.stack(padded))[:len(images)]
        if rows is None:
            row = np.dtype([("latent", np.float32, latents.shape[1:]), ("crc", np.uint32),
                            ("broken", "S200")])
            need, free = size * row.itemsize, shutil.disk_usage(os.path.dirname(path)).free
            if need > free:
                raise OSError(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
            rows = np.lib.format.open_memmap(path + ".writing", "w+", row, (size,))
        for j, (latent, why) in enumerate(zip(latents, broken), start):
            rows[j] = latent, zlib.crc32(np.ascontiguousarray(latent)), why
    rows.flush()
    os.replace(path + ".writing", path)


# Forked workers start at once and notice when kill -9 takes the trainer. From Python 3.14 on Linux'
# default is a server that forks them, and then they would not.
FORK = "fork" if sys.platform == "linux" else None


def start_worker(_):
    import torch
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # Ctrl-C is for the trainer, which saves
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader(mixture: Mixture, collate, batch: int, start: int = 0, workers: int = 0,
           rank: int = 0, ranks: int = 1):
    """Iterator over collate([records]). Micro-batch k of a rank holds samples start + k*batch +
    rank*(batch//ranks) and the batch//ranks - 1 after it: `batch` counts all ranks. With workers,
    collate runs in them, on the CPU. Raises DataError."""
    from torch.utils.data import DataLoader
    if batch < 1 or batch % ranks:
        raise DataError(f"a micro-batch of {batch} does not divide over {ranks} ranks; change "
                        "--micro-batch")
    share = batch // ranks
    batches = (range(n, n + share) for n in itertools.count(start + rank * share, batch))
    started = iter(DataLoader(mixture, batch_sampler=batches, collate_fn=collate,
                              num_workers=workers, worker_init_fn=start_worker,
                              multiprocessing_context=FORK if workers else None,
                              prefetch_factor=4 if workers else None))

    def one_line():                                     # a worker's error comes with its traceback
        try:
            for sent in started:        # copied, as a worker's tensor stays an open file else
                yield {k: v.clone() if hasattr(v, "clone") else v for k, v in sent.items()} \
                    if workers and isinstance(sent, dict) else sent
        except DataError as e:
            line = str(e).strip().splitlines()[-1]
            raise DataError(line.removeprefix("world.DataError: ")) from None
    return one_line()


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------

def contact_sheet(images: list, texts: list, columns: int, side: int = 128) -> Image.Image:
    """uint8 [H, W, 3] pictures in rows, each above its text."""
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
    """Draw the first samples of a stream with their captions."""
    form = Image.registered_extensions().get(os.path.splitext(args.out)[1].lower())
    if form not in Image.SAVE:
        raise DataError(f"--out {args.out}: expected the name of a picture, such as sheet.png")
    mixture, texts = Mixture([args.source], args.resolution, args.seed, args.crop, text=False), []
    records = [mixture[n] for n in range(args.count)]
    for key, why in dict.fromkeys(s for r in records for s in r["skipped"]):
        print(f"skipped {key}: {why}", file=sys.stderr)
    for r in records:
        turns = [t["value"].replace("<image>", "").strip() for t in r["conversations"]]
        texts.append(" ".join(turns[:1] if r["task"] == "t2i" else turns))
    contact_sheet([r["image"] for r in records], texts, min(args.columns, args.count),
                  max(args.resolution, 128)).save(args.out)
    print(f"{args.out}: {args.count} samples of {args.source}")


def export(args):
    """Write the first samples of a stream as tars; given to --data, they are that stream again."""
    mixture = Mixture([args.source], args.resolution, args.seed, args.crop, text=False)
    os.makedirs(args.out, exist_ok=True)
    for what, ends in (("tars", ".tar"), ("pictures", IMAGES)):
        if any(f.lower().endswith(ends) for f in os.listdir(args.out)):
            raise DataError(f"--out {args.out} holds {what} already; give another --out or empty "
                            "it")
    skips = SkipCounter()
    for first in range(0, args.count, args.shard):
        with tarfile.open(os.path.join(args.out, f"{first // args.shard:05d}.tar"), "w") as tar:
            for n in range(first, min(first + args.shard, args.count)):
                r, png = mixture[n], io.BytesIO()
                skips.update(r["skipped"], 1)
                Image.fromarray(r["image"]).save(png, "PNG")
                fields = {"stream": {"n": n, "source": args.source, "seed": args.seed}}
                fields.update({k: r[k] for k in ("key", "task", "caption", "question",
                                                 "conversations") if k in r})
                fields["scene"] = asdict(r["scene"]) if r["scene"] else None
                for name, data in (("png", png.getvalue()), ("json", json.dumps(fields).encode())):
                    member = tarfile.TarInfo(f"{n:09d}.{name}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    print(f"{args.out}: {args.count} samples of {args.source}")


def check(args):
    """Read every record and name the broken ones; exit with 1 if there are any."""
    total, broken = 0, 0
    for name in args.shards:
        inside = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar"))) or expand(name)
        if not inside:
            raise DataError(f"{name}: there is no such file or folder")
        for path in inside:                               # shard by shard: one may be cut short
            try:
                source = open_source(path, text=False)
            except (DataError, OSError) as e:
                total, broken = total + 1, broken + 1
                print(e)
                continue
            lonely = getattr(source, "lonely", 0)
            total, broken = total + len(source) + lonely, broken + lonely
            if lonely:
                print(f"{path}: {lonely} records without an image (links are not followed)")
            for j in range(len(source)):
                try:
                    file_record(source, j, 64, "squash", args.text, random.random)
                except CORRUPT as e:
                    broken += 1
                    print(f"{source.key(j)}: {reason(e)}")
    print(f"{broken} of {total} records are broken")
    sys.exit(1 if broken else 0)


def positive(value: str) -> int:
    if not value.isdigit() or not int(value):
        raise argparse.ArgumentTypeError(f"{value!r} is not a positive whole number")
    return int(value)


def main():
    form = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], **form)
    commands = p.add_subparsers(dest="command", required=True)
    for command, out, count in ((show, "sheet.png", 24), (export, "shards", 10000)):
        q = commands.add_parser(command.__name__, help=command.__doc__, **form)
        q.add_argument("--source", default="builtin:web", help="as in --data of the trainers")
        q.add_argument("--out", default=out, help="what to write")
        q.add_argument("--count", type=positive, default=count, help="number of samples")
        q.add_argument("--resolution", type=positive, default=224, help="pixels a side; "
                       "of an export: those of the training to come (tiny: 64)")
        q.add_argument("--crop", choices=CROPS, default="squash", help="how to make it a square")
        q.add_argument("--seed", type=int, default=0, help="seed of the stream")
        if command is show:
            q.add_argument("--columns", type=positive, default=6, help="pictures in a row")
        else:
            q.add_argument("--shard", type=positive, default=1000, help="samples a tar")
    q = commands.add_parser("check", help=check.__doc__, **form)
    q.add_argument("shards", nargs="+", help="shards, folders or .jsonl files to read")
    q.add_argument("--text", action=argparse.BooleanOptionalAction, default=True,
                   help="does a record without a text count as broken?")
    args = p.parse_args()
    try:
        globals()[args.command](args)
    except (DataError, OSError) as e:
        what = str(e).replace("--data", "--source") if isinstance(e, DataError) else f"--out: {e}"
        print(f"error: {what}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
