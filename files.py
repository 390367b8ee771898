"""The user's files: one image, one record, and folders, JSONL files and tars of records.

Formats: a folder of images with `metadata.jsonl` or with .txt files of the same names; a .jsonl in
LLaVA's form; WebDataset tar shards. Damage to one record is a BrokenRecord, which data.py skips and
counts. Damage that hides an unknown number of records is a DataError.
"""
import contextlib
import glob
import io
import json
import os
import re
import sys
import tarfile
import warnings

import numpy as np
from PIL import Image

from chat import ROLES, drawing
from cli import DataError, parsing, printable

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
CAPTIONS = ("caption", "prompt", "text")    # fields with a caption; the first one counts


class BrokenRecord(DataError):
    """One record that cannot be used."""


def read_file(path: str, offset: int = 0, size: int = -1) -> bytes:
    """Read bytes of a regular file. It is opened each time, so forked workers share no handle."""
    if not os.path.isfile(path):
        what = "not a regular file" if os.path.exists(path) else "no such file"
        raise BrokenRecord(f"{printable(path)}: {what}")
    with parsing(path, error=BrokenRecord), open(path, "rb") as f:
        f.seek(offset)
        return f.read(size)


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------

CROPS = ("squash", "center", "random")
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}


def open_image(source, short: int = 0) -> Image.Image:
    """Open an image file: turned as its EXIF tag says, RGB, transparent pixels on white.

    source: path or bytes. short: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as
    its short side keeps this many pixels. Metadata that Pillow cannot read is dropped. Raises
    BrokenRecord for damaged pixels, for more pixels than Pillow's limit against decompression
    bombs, and for anything but a regular file.
    """
    what = "image" if isinstance(source, bytes) else source
    data = source if isinstance(source, bytes) else read_file(source)
    with warnings.catch_warnings(), parsing(what, data, BrokenRecord):
        warnings.simplefilter("ignore")                   # Pillow's, about metadata
        try:
            return decode(data, short)
        except Exception:               # from Pillow alone; the reason may be metadata
            return decode(without_metadata(data), short)


def decode(data, short):
    """Decode the bytes of an image file with Pillow; see `open_image`."""
    image, turn = Image.open(io.BytesIO(data)), None
    if short:
        image.draft("RGB", (short, short))
    image.load()
    with contextlib.suppress(Exception):                  # ImageOps.exif_transpose rewrites all
        turn = TURNS.get(image.getexif().get(0x0112))     # tags, and fails if one is damaged
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I"):                        # 16 bits, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def without_metadata(data: bytes) -> bytes:
    """Return a PNG, WebP or JPEG file with only the chunks that its pixels need."""
    png, webp = data.startswith(b"\x89PNG"), data.startswith(b"RIFF")
    at = 8 if png else 12 if webp else 2
    kept = [data[:at]]
    while at < len(data):
        if png:                         # length, type, content, checksum
            kind, end = data[at + 4:at + 8], at + 12 + int.from_bytes(data[at:at + 4], "big")
            keep = kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
        elif webp:                      # type, length, content of an even length
            kind, size = data[at:at + 4], int.from_bytes(data[at + 4:at + 8], "little")
            end, keep = at + 8 + size + size % 2, kind not in (b"EXIF", b"ICCP", b"XMP ")
        else:                           # type, length, content; APP14 tells how to read the colours
            kind, end = data[at:at + 2], at + 2 + int.from_bytes(data[at + 2:at + 4], "big")
            end = len(data) if kind == b"\xff\xda" else end                # the pixels begin here
            keep = not (b"\xff\xe0" <= kind < b"\xff\xee" or kind in (b"\xff\xef", b"\xff\xfe"))
        if keep:
            kept.append(data[at:end])
        at = end
    if webp:
        kept[0] = b"RIFF" + (sum(map(len, kept)) - 8).to_bytes(4, "little") + b"WEBP"
    return b"".join(kept)


def make_square(image, resolution: int, crop: str, rand=None, resample: int = 3) -> np.ndarray:
    """Cut and resize an RGB image -> uint8 [R, R, 3].

    crop: `squash` resizes to a square (as the authors do for SigLIP); `center` is ADM's centre
    crop; `random` makes the short side 1.5 R and cuts R x R at a place that rand() chooses.
    resample: Pillow's number of a filter; 3 is bicubic. Only the crop is resized, so that memory is
    bounded for an image of any shape.
    """
    if crop == "squash":
        return np.array(image if image.size == (resolution, resolution) else
                        image.resize((resolution, resolution), resample))
    short = resolution * 3 // 2 if crop == "random" else resolution
    while min(image.size) >= 2 * short:
        image = image.resize([v // 2 for v in image.size], Image.BOX)
    size = [max(short, round(v * short / min(image.size))) for v in image.size]
    at = [int(rand() * (v - resolution + 1)) if crop == "random" else (v - resolution) // 2
          for v in size]
    box = [(a + side) * v / w for side in (0, resolution) for a, v, w in zip(at, image.size, size)]
    return np.array(image.resize((resolution, resolution), resample, box=box))


def load_image(source, resolution: int, crop: str, rand=None, resample: int = 3) -> np.ndarray:
    """Return uint8 [R, R, 3] of an image file; see `open_image` and `make_square`."""
    short = resolution * 3 // 2 if crop == "random" else resolution
    return make_square(open_image(source, short=short), resolution, crop, rand, resample)


# ------------------------------------------------------------------------------------------------
# Records: all formats have the same fields and rules
# ------------------------------------------------------------------------------------------------

def read_fields(fields: dict, text: bool, rand) -> dict:
    """Return {task, caption, conversations} of a record's fields. text: whether a record without
    text is broken. rand() chooses the request for a caption."""
    caption = next((fields[k] for k in CAPTIONS if fields.get(k)), "")
    if not isinstance(caption, str):
        raise BrokenRecord(f"its caption is a {type(caption).__name__}, not a string")
    caption, turns, task = caption.strip(), fields.get("conversations"), "t2i"
    if turns:
        task = task_of(turns)
        if text and "assistant" not in [ROLES[t["from"]] for t in turns[1:]]:
            raise BrokenRecord("conversations: no turn is from the assistant")
    elif "<image>" in caption:
        raise BrokenRecord("its caption contains <image>")
    elif caption:
        turns = drawing(caption, rand)
    elif text:
        raise BrokenRecord(f"no {', '.join(CAPTIONS)} or conversations")
    with parsing("text", error=BrokenRecord):             # half of a surrogate pair is no text
        "".join([caption, *(t["value"] for t in turns or [])]).encode()
    return {"task": task, "caption": caption or None, "conversations": turns or []}


def task_of(turns) -> str:
    """Check conversations, and return their task: "t2i" if the assistant shows the image, else
    "qa". (chat.chat gives an image that no turn mentions to the human's first turn, and drops a
    first turn that is not the human's.)"""
    if not (isinstance(turns, list) and all(
            isinstance(t, dict) and isinstance(t.get("from"), str)
            and isinstance(t.get("value"), str) for t in turns)):
        raise BrokenRecord('conversations: expected a list of {"from": ..., "value": ...}')
    if unknown := [t["from"] for t in turns if t["from"] not in ROLES]:
        raise BrokenRecord(f"conversations: a turn is from {unknown[0]!r:.60}; expected one of "
                           f"{', '.join(ROLES)}")
    roles = [ROLES[t["from"]] for t in turns]
    start = int(roles[0] != "user")
    if "user" not in roles[start:]:
        raise BrokenRecord("conversations: no turn is from the human")
    shown = [k for k, t in enumerate(turns) for _ in range(t["value"].count("<image>"))]
    if len(shown) > 1:
        raise BrokenRecord(f"{len(shown)} images in one sample; at most 1")
    if shown and shown[0] < start:
        raise BrokenRecord("conversations: the first turn has the image, but is not the human's")
    return "t2i" if shown and roles[shown[0]] == "assistant" else "qa"


# ------------------------------------------------------------------------------------------------
# Sources. Each has a length; key(j), the printable name of record j; and read(j) -> (path or bytes
# of its image, its fields)
# ------------------------------------------------------------------------------------------------

def is_system(path: str) -> bool:
    """Return whether macOS or Windows left this file beside the data."""
    return any(part.startswith("._") or part in (".DS_Store", "Thumbs.db", "__MACOSX")
               for part in path.split("/"))


def note(text: str):
    print(f"note: {printable(text)}", file=sys.stderr)


def text_of(data: bytes) -> str:
    with parsing("text", data, BrokenRecord):
        return data.decode("utf-8-sig").strip()


def json_of(data: bytes) -> dict:
    with parsing("json", data, BrokenRecord):
        fields = json.loads(data)
    if not isinstance(fields, dict):
        raise BrokenRecord(f"expected a JSON object, found {data[:60]!r}")
    return fields


class Folder:
    """The images below a folder, with .txt files of the same names. text: leave out images without
    one."""

    def __init__(self, path: str, text: bool):
        found, seen, alone = [], set(), 0                 # seen: a link may lead to a folder above
        left_out = lambda error: note(f"{error.filename} is left out: {error.strerror}")
        for root, folders, files in os.walk(path, onerror=left_out, followlinks=True):
            folders[:] = [f for f in sorted(folders) if not is_system(f) and os.path.realpath(
                os.path.join(root, f)) not in seen]       # os.walk enters these, in this order
            seen.update(os.path.realpath(os.path.join(root, f)) for f in ("", *folders))
            files = [f for f in sorted(files) if not is_system(f)]
            texts = {f[:-4]: os.path.join(root, f) for f in files if f.lower().endswith(".txt")}
            shown = {f: os.path.splitext(f)[0] for f in files if f.lower().endswith(IMAGES)}
            found += [(os.path.join(root, f), texts.get(stem)) for f, stem in shown.items()]
            alone += len(texts.keys() - shown.values())
        self.entries = [e for e in found if e[1] or not text]
        if not self.entries:
            raise DataError(f"{printable(path)}: {len(found)} images, 0 of them with a caption; "
                            f"expected a folder of {', '.join(IMAGES)} files with a metadata.jsonl "
                            "(file_name, text) or a .txt beside each image")
        if left := len(found) - len(self.entries):
            note(f"{path}: {left} of {len(found)} images have no .txt and are left out")
        if alone:
            note(f"{path}: {alone} .txt files without an image beside them ({', '.join(IMAGES)})")

    def __len__(self):
        return len(self.entries)

    def key(self, j):
        return printable(self.entries[j][0])

    def read(self, j):
        image, text = self.entries[j]
        return image, {"caption": text_of(read_file(text))} if text else {}


class JsonLines:
    """A file with one JSON object per line. The path of its image, relative to the file, is in
    `image` as in LLaVA's files, or in `file_name` as in Hugging Face's metadata.jsonl."""

    def __init__(self, path: str):
        self.path, rows, offset = path, [], 0
        read_file(path, size=1)                           # raises if it cannot be read
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    rows.append((number, offset, len(line)))
                offset += len(line)
        if not rows:
            raise DataError(f"{printable(path)}: 0 records; expected one JSON object per line")
        self.rows = np.array(rows)                                    # 24 bytes per record

    def __len__(self):
        return len(self.rows)

    def key(self, j):
        return printable(f"{self.path}:{self.rows[j, 0]}")

    def read(self, j):
        fields = json_of(read_file(self.path, *self.rows[j, 1:].tolist()))
        image = fields.get("image", fields.get("file_name"))
        if isinstance(image, list) and len(image) == 1:
            image, = image
        if not isinstance(image, str):
            raise BrokenRecord(f'expected "image" or "file_name", one path, found {image!r:.60}')
        return os.path.join(os.path.dirname(self.path), image), fields


def tar_members(path: str) -> list:
    """Return [(name, offset of the header, offset of the data, size)] of the files in a tar. The
    size of a link is -1."""
    if read_file(path, 0, 2) == b"\x1f\x8b":
        raise DataError(f"{printable(path)}: this tar is compressed; unpack it with gunzip")
    found = []
    with parsing(path, path, DataError), tarfile.open(path, "r:", encoding="utf-8") as tar:
        while member := tar.next():
            tar.members = []                              # tarfile would keep them all
            if not member.isdir():
                size = member.size if member.isfile() else -1       # a link
                found.append((member.name, member.offset, member.offset_data, size))
        tar.fileobj.seek(tar.offset)
        while rest := tar.fileobj.read(2 ** 20):          # a damaged header looks like an end
            if rest.strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}, but the file goes on: "
                                        "damaged, or several tars in one")
    return found


class Tars:
    """WebDataset shards: members `<key>.jpg|png|webp` with `<key>.json`, `<key>.txt` or both (then
    the .txt counts if the .json has no text). One pass over the headers keeps 64 bytes per record.
    lost: [(name, reason)] of members that no record uses. text: leave out images without text."""
    IMAGE, TXT, JSON, HEADER = 1, 3, 5, 7                 # columns of offsets, then sizes; 0: shard

    def __init__(self, paths: list, text: bool):
        self.paths, self.lost = paths, []
        rows = np.concatenate([self.index(shard) for shard in range(len(paths))])
        images, texts = rows[:, self.IMAGE] > 0, rows[:, [self.TXT, self.JSON]].any(1)
        self.rows = rows[images & texts if text else images]
        if not len(self.rows):
            raise DataError(f"{printable(paths[0])}: {images.sum()} images, 0 with a caption, in "
                            f"{len(paths)} shards; expected members <key>.jpg, .png or .webp with "
                            "<key>.txt or .json")
        if left := len(self.lost) + images.sum() - len(self.rows):
            note(f"{paths[0]}: {left} members in {len(paths)} shards make no record; "
                 "`python data.py check` names them")

    def index(self, shard):
        """Return int64 [records, 8]: offset and size of each member, 0 where there is none."""
        found, path = {}, self.paths[shard]
        columns = {**dict.fromkeys(IMAGES, self.IMAGE), ".txt": self.TXT, ".json": self.JSON}
        for name, header, offset, size in tar_members(path):
            stem, extension = os.path.splitext(name)
            at = columns.get(extension.lower())
            if at is None or is_system(name):
                continue
            if size < 0:
                self.lost.append((printable(f"{path}/{name}"), "a link; pack the file itself"))
                continue
            row = found.setdefault(stem, [shard] + [0] * 7)
            if row[at]:
                self.lost.append((printable(f"{path}/{name}"), "a second one for the same record"))
                continue
            row[at:at + 2] = offset, size
            row[self.HEADER] = header if at == self.IMAGE else row[self.HEADER]
        self.lost += [(printable(f"{path}/{stem}"), "text without an image")
                      for stem, row in found.items() if not row[self.IMAGE]]
        return np.array(list(found.values()), np.int64).reshape(-1, 8)

    def __len__(self):
        return len(self.rows)

    def member(self, j, at):
        return read_file(self.paths[self.rows[j, 0]], *self.rows[j, at:at + 2].tolist())

    def key(self, j):
        path = self.paths[self.rows[j, 0]]
        with parsing(path, error=BrokenRecord), open(path, "rb") as f:
            f.seek(int(self.rows[j, self.HEADER]))        # the header knows names of any length
            name = tarfile.open(fileobj=f, mode="r:", encoding="utf-8").firstmember.name
        return printable(f"{path}/{name}")

    def read(self, j):
        fields = json_of(self.member(j, self.JSON)) if self.rows[j, self.JSON] else {}
        has_text = any(fields.get(k) for k in (*CAPTIONS, "conversations"))
        if self.rows[j, self.TXT] and not has_text:
            fields["caption"] = text_of(self.member(j, self.TXT))
        return self.member(j, self.IMAGE), fields


def expand(name: str) -> list:
    """Return the paths that a source names: all of `a/{000..123}.tar`, even if missing; those of a
    glob; the tars of a folder that holds tars; otherwise the name itself, if it exists."""
    if braces := re.search(r"\{(\d+)\.\.(\d+)\}", name):
        first, last = braces.groups()
        return [name.replace(braces.group(), str(k).zfill(len(first)))
                for k in range(int(first), int(last) + 1)]
    if not os.path.isdir(name):
        return [name] if os.path.exists(name) else sorted(glob.glob(name))
    with parsing(name, error=DataError):
        inside = [os.path.join(name, f) for f in sorted(os.listdir(name)) if not is_system(f)]
    tars = [p for p in inside if p.endswith(".tar")]
    if tars and (images := sum(p.lower().endswith(IMAGES) for p in inside)):
        note(f"{name} holds tars; the {images} images beside them are left out")
    return tars or [name]


def open_source(name: str, text: bool = True):
    """Return the Folder, JsonLines or Tars of a path or pattern. text: as in data.Mixture. Raises
    DataError."""
    shown, paths = printable(name), expand(name)
    if not paths and not name.endswith((".jsonl", ".tar")):
        raise DataError(f"{shown!r} is neither built in nor a path; expected a builtin: source, a "
                        "folder, a .jsonl or .tar shards, each with an optional =WEIGHT")
    if missing := [p for p in paths or [name] if not os.path.exists(p)]:
        raise DataError(f"{shown}: there is no such file" if len(paths) < 2 else
                        f"{shown}: {len(missing)} files of {len(paths)} are missing, such as "
                        f"{printable(missing[0])}")
    if all(p.endswith(".tar") for p in paths):
        return Tars(paths, text)
    if len(paths) > 1:
        raise DataError(f"{shown}: {len(paths)} files; give each as a source of its own")
    if os.path.isdir(paths[0]):
        metadata = os.path.join(paths[0], "metadata.jsonl")
        return JsonLines(metadata) if os.path.exists(metadata) else Folder(paths[0], text)
    if paths[0].endswith(".jsonl"):
        return JsonLines(paths[0])
    raise DataError(f"{shown!r} is a file of no known kind; expected a folder, a .jsonl or a .tar")


def file_record(source, j: int, resolution: int, crop: str, text: bool, rand,
                resample: int = 3) -> dict:
    """Return record j of a source. Raises BrokenRecord with a reason without the record's key."""
    key = source.key(j)
    try:
        image, fields = source.read(j)
        return {"key": key, "scene": None, **read_fields(fields, text, rand),
                "image": load_image(image, resolution, crop, rand, resample)}
    except BrokenRecord as e:
        raise BrokenRecord(str(e).removeprefix(f"{key}: ")) from e


def broken_records(source, text: bool):
    """Read all records of a source; yield (key, reason) for each broken or lost one."""
    yield from getattr(source, "lost", ())
    for j in range(len(source)):
        try:
            file_record(source, j, 64, "squash", text, lambda: 0.0)
        except BrokenRecord as e:
            yield source.key(j), str(e)
