"""data.py and files.py: the stream is a pure function, files of every kind are read as they should
be, broken ones are named, and the loader ends.

    pytest tests/test_data.py
"""
import collections
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cli                                                              # noqa: E402
import data                                                             # noqa: E402
import files                                                            # noqa: E402
from data import DataError, Mixture, SkipCounter, WorkerDied           # noqa: E402

ALL = ["builtin:web=4", "builtin:synthetic=3", "builtin:text", "builtin:hq", "builtin:qa"]


def digest(record):
    """A hash of all that training sees of a record."""
    return data.hash64(record["image"].tobytes(), record["conversations"], record["caption"])


def collate(records):
    return [(r["n"], digest(r)) for r in records]


@pytest.fixture
def run(monkeypatch, capsys):
    """Run data.py's main in this process -> (exit status, stdout, stderr)."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, args)])
        status = 0
        try:
            cli.main(data.main)
        except SystemExit as stopped:
            status = stopped.code
        return status, *capsys.readouterr()
    return call


def script(code, *args, **options):
    """Run a script of a user's own -> a Popen with pipes."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n{code}"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


# ------------------------------------------------------------------------------------------------
# A pure function
# ------------------------------------------------------------------------------------------------

def test_same_in_any_order_and_process():
    numbers = [7, 0, 123_456_789, 999, 31]
    once = {n: digest(Mixture(ALL, 64, seed=3)[n]) for n in numbers}
    mixture = Mixture(ALL, 64, seed=3)
    assert {n: digest(mixture[n]) for n in reversed(numbers)} == once
    code = ("import data, test_data as t\n"
            f"m = data.Mixture(t.ALL, 64, seed=3)\nprint([t.digest(m[n]) for n in {numbers}])")
    out, _ = script(code, env={"PYTHONHASHSEED": "5"}).communicate()
    assert json.loads(out) == [once[n] for n in numbers]
    assert digest(Mixture(ALL, 64, seed=4)[7]) != once[7]


def test_random_numbers_are_these():
    """Values that a port must repeat: Philox keyed by blake2b of "seed/purpose/n"."""
    assert data.hash64("a", 1) == 12444202034427101082
    assert data.random_stream("a", 1)() == pytest.approx(0.1246003, abs=1e-6)
    draws = data.rng(0, "noise", 5).standard_normal(3, np.float32)
    key = int.from_bytes(hashlib.blake2b(b"0/noise/5", digest_size=16).digest(), "little")
    want = np.random.Generator(np.random.Philox(key=key)).standard_normal(3, np.float32)
    assert draws.tolist() == want.tolist()
    assert draws.tolist() == pytest.approx([0.6524351, -0.5509550, -0.6669132], abs=1e-6)
    others = [(1, "noise", 5), (0, "drop", 5), (0, "noise", 6), (0, "noise")]
    assert len({tuple(data.rng(*o).random(2)) for o in others}) == 4


def test_proportions():
    mixture = Mixture(ALL, 64)
    share = {s["source"]: s["weight"] for s in mixture.describe()}
    assert sum(share.values()) == pytest.approx(1)
    for start in (0, 950, 12_340):
        seen = collections.Counter(mixture.names[mixture.plan[n % data.BLOCK][0]]
                                   for n in range(start, start + 100))
        for name, weight in share.items():
            assert abs(seen[name] - 100 * weight) <= 2
    # Each source's records come in order, none twice, none left out.
    keys = collections.defaultdict(list)
    for n in range(300):
        keys[mixture[n]["source"]].append(mixture[n]["key"])
    assert keys["builtin:web"] == [f"builtin:web/{i}" for i in range(len(keys["builtin:web"]))]
    assert Mixture(["builtin:web=2", "builtin:text=1"], 8).counts == [667, 333]


@pytest.mark.parametrize("size", [1, 600, 4097, 9999])
def test_epochs_are_permutations(size):
    epochs = [[data.shuffled(size, e * size + i, 0, "x") for i in range(size)] for e in range(2)]
    assert all(sorted(e) == list(range(size)) for e in epochs)
    assert size == 1 or epochs[0] != epochs[1]


def test_each_window_has_its_own_order():
    size, W = 2 * data.WINDOW, data.WINDOW
    order, starts = data._chunks(size, 0, "x", 0)
    place = {int(c): int(s) for c, s in zip(order, starts)}
    picks = [data.shuffled(size, i, 0, "x") for i in range(size)]
    at = [place[r // data.CHUNK] + r % data.CHUNK for r in picks]       # before the chunks moved
    assert at[:W] != [p - W for p in at[W:]]


def test_many_sources_do_not_slow_the_stream():
    data.shuffled(5000, 0, 0, "a")
    made = data._window.cache_info().misses
    for n in range(300):
        data.shuffled(5000, n // 100, 0, f"source {n % 100}")
    assert data._window.cache_info().misses - made <= 100


def test_finite_and_endless_sources():
    mixture = Mixture(["builtin:hq"], 16)
    assert len(mixture) == 600 and len({mixture[n]["key"] for n in range(600)}) == 600
    assert not mixture.endless() and Mixture(["builtin:web"], 8).endless()
    with pytest.raises(TypeError):
        len(Mixture(["builtin:hq", "builtin:web"], 16))


def test_the_toy_world_is_not_needed_for_files(tmp_path):
    """With the folder tiny/ moved away, and without torch at import."""
    source = images(tmp_path / "in", 3, texts=True)
    for f in ("data.py", "files.py", "cli.py", "chat.py"):
        (tmp_path / f).write_text((ROOT / f).read_text())
    code = (f"import sys; sys.path = [{str(tmp_path)!r}, *[p for p in sys.path if p != '']]\n"
            "import data\nassert 'torch' not in sys.modules and 'tiny' not in sys.modules\n"
            f"print(len(data.Mixture([{source!r}], 8)), data.Mixture([{source!r}], 8)[0]['task'])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=tmp_path)
    assert done.stdout == "3 t2i\n", done.stderr


# ------------------------------------------------------------------------------------------------
# Formats
# ------------------------------------------------------------------------------------------------

def png(k):
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (k % 256, 100, k // 256)).save(out, "PNG")
    return out.getvalue()


def images(folder, n=12, texts=False):
    """Write n images with their own colours and sizes -> the folder's name."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        Image.new("RGB", (30 + k, 20), (20 * k % 256, 100, 50)).save(folder / f"{k:03d}.png")
        if texts:
            (folder / f"{k:03d}.txt").write_text(f"image number {k}\n")
    return str(folder)


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(n, text=b"a cat"):
    return [(f"{k:04d}.{e}", c) for k in range(n) for e, c in (("png", png(k)), ("txt", text))]


def make(form, folder):
    """The same 12 images and captions in one of the formats -> the source."""
    images(folder, texts=form == "txt")
    texts = [f"image number {k}" for k in range(12)]
    names = [f"{k:03d}.png" for k in range(12)]
    if form == "metadata":
        write_jsonl(folder / "metadata.jsonl",
                    *({"file_name": n, "text": t} for n, t in zip(names, texts)))
    elif form == "jsonl":                                   # a path, or a list with one
        return write_jsonl(folder / "all.jsonl", *({"image": [n] if k % 2 else n, "caption": t}
                                                   for k, (n, t) in enumerate(zip(names, texts))))
    elif form != "txt":
        for shard in range(3):
            write_tar(folder / f"{shard:05d}.tar", [
                m for k in range(4 * shard, 4 * shard + 4) for m in (
                    (names[k], (folder / names[k]).read_bytes()),
                    (names[k][:-3] + "txt", texts[k].encode()) if k % 2 else
                    (names[k][:-3] + "json", json.dumps({"prompt": texts[k]}).encode()))])
        return {"tars": str(folder), "glob": str(folder / "*.tar"),
                "braces": str(folder / "{00000..00002}.tar")}[form]
    return str(folder)


@pytest.mark.parametrize("form", ["txt", "metadata", "jsonl", "tars", "glob", "braces"])
def test_formats(form, tmp_path):
    mixture = Mixture([make(form, tmp_path)], 16)
    assert len(mixture) == mixture.records == 12
    assert not list(files.broken_records(mixture.files[0], text=True))
    for epoch in range(2):
        records = [mixture[n] for n in range(12 * epoch, 12 * epoch + 12)]
        assert {r["caption"] for r in records} == {f"image number {k}" for k in range(12)}
        for r in records:
            assert r["image"].shape == (16, 16, 3) and r["image"].dtype == np.uint8
            assert r["image"][8, 8, 0] == 20 * int(r["caption"].split()[-1])
            assert r["task"] == "t2i" and r["conversations"][1]["value"].endswith("<image>")
            assert r["caption"] in r["conversations"][0]["value"] and not r["skipped"]
    other = Mixture(mixture.names, 16, seed=1)
    orders = [[m[n]["caption"] for n in range(12)] for m in (mixture, other)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
DRAW = [{"from": "user", "value": "Draw a cat"}, {"from": "assistant", "value": "<image>"}]


@pytest.mark.parametrize("fields, task, caption", [
    ({"caption": "a", "prompt": "b", "text": "c"}, "t2i", "a"), ({"prompt": " b "}, "t2i", "b"),
    ({"caption": "", "text": "c"}, "t2i", "c"), ({"text": "a", "conversations": TALK}, "qa", "a"),
    ({"conversations": DRAW}, "t2i", None), ({"conversations": TALK}, "qa", None),
    ({"caption": "<image> of a cat"}, None, "contains <image>"),
    ({"caption": " "}, None, "no caption"),
    ({"caption": 5}, None, "caption is a int"), ({"caption": ["a"]}, None, "caption is a list"),
    ({"caption": "a\ud83d"}, None, "UnicodeEncodeError"), ({}, None, "no caption, prompt, text"),
], ids=str)
def test_fields_mean_the_same_in_every_format(fields, task, caption, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.png").write_bytes(png(1))
    sources = [write_jsonl(tmp_path / "a.jsonl", {"image": "in/0.png", **fields}),
               write_tar(tmp_path / "a.tar", [("0.png", png(1)),
                                              ("0.json", json.dumps(fields).encode())])]
    write_jsonl(tmp_path / "in/metadata.jsonl", {"file_name": "0.png", **fields})
    for source in (*sources, str(tmp_path / "in")):
        if task is None:
            with pytest.raises(DataError, match=caption):
                Mixture([source], 8)
            continue
        record = Mixture([source], 8)[0]
        assert (record["task"], record["caption"]) == (task, caption)
        if "conversations" in fields:
            assert record["conversations"] == fields["conversations"]


@pytest.mark.parametrize("talk, want", [
    ([("human", "What?"), ("gpt", "A cat.")], ("qa", 0)),
    ([("system", "Be brief."), ("human", "What?"), ("gpt", "A cat.")], ("qa", 1)),
    ([("gpt", "Hello."), ("human", "What?"), ("gpt", "A cat.")], ("qa", 1)),
    ([("user", "Draw."), ("assistant", "<image>")], ("t2i", 1)),
    ([("gpt", "Hello."), ("human", "Draw."), ("gpt", "<image>")], ("t2i", 2)),
    ([("gpt", "<image>"), ("human", "Thanks.")], "first turn has the image"),
    ([("gpt", "A cat.")], "no turn is from the human"), ([("gpt", "<image>")], "no turn"),
    ([("human", "<image>What?")], "no turn is from the assistant"),
    ([("gpt", "Hello."), ("human", "What?")], "no turn is from the assistant"),
    ([("human", "<image>"), ("gpt", "<image>")], "2 images"), ([("human", "<image><image>")], "2"),
    ([("USER", "<image>"), ("ASSISTANT", "A cat.")], "from 'USER'; expected one of human"),
    ([("human", "<image>"), ("<|im_end|>", "A cat.")], "from '<|im_end|>'"),
    ([("human", "<image>"), ("gpt", 5)], "expected a list"), ("text", "expected a list"),
    ([(None, "a")], "expected a list"), ([{"value": "a"}], "expected a list"),
], ids=str)
def test_conversations(talk, want, tmp_path):
    """The image is in one turn, which chat.py keeps; other conversations are broken records."""
    (tmp_path / "a.png").write_bytes(png(1))
    talk = [t if isinstance(t, (dict, str)) else {"from": t[0], "value": t[1]} for t in talk]
    source = write_jsonl(tmp_path / "a.jsonl", {"image": "a.png", "conversations": talk})
    if isinstance(want, str):
        (_, why), = files.broken_records(files.open_source(source), True)
        assert want in why
        return
    from chat import IMAGE, chat, load_tokenizer
    record, (task, where) = Mixture([source], 8)[0], want
    assert (record["task"], record["conversations"]) == (task, talk)
    tokenizer, shown = load_tokenizer(ROOT / "tiny"), talk
    if not any("<image>" in t["value"] for t in talk):
        shown = [dict(t, value="<image>\n" * (k == where) + t["value"]) for k, t in enumerate(talk)]
    assert "<image>" in shown[where]["value"]
    assert chat(tokenizer, record["conversations"]) == chat(tokenizer, shown)
    assert chat(tokenizer, shown)[0].count(IMAGE) == 1


def test_lines_of_a_jsonl(tmp_path, run):
    """Blank lines are no records; damaged lines are broken records, named by their number."""
    images(tmp_path, 2)
    row = lambda k: json.dumps({"image": f"00{k}.png", "caption": f"image {k}"}).encode() + b"\n"
    bad = [b'{"image": "0\n', b"[1]\n", b'{"caption": "x"}\n', b'{"image": ["a", "b"]}\n',
           b'{"image": "absent.png", "text": "x"}\n', b'{"image": "a\\u0000b", "text": "x"}\n',
           b"\xff\xfe\n", b"version https://git-lfs.github.com/spec/v1\n",
           b'{"image": "/dev/null", "text": "x"}\n']
    (tmp_path / "a.jsonl").write_bytes(row(0) + b"\n  \n" + b"".join(bad) + row(1).strip())
    mixture = Mixture([str(tmp_path / "a.jsonl")], 8)
    good = {r["caption"]: r["key"].split(":")[-1] for r in map(mixture.__getitem__, range(40))}
    assert good == {"image 0": "1", "image 1": "13"}
    reasons = {int(k.split(":")[-1]): why for k, why in
               files.broken_records(mixture.files[0], text=True)}
    assert sorted(reasons) == list(range(4, 13)) and len(mixture) == 11
    for number, words in {5: "expected a JSON object", 6: 'expected "image"', 7: "one path",
                          8: "absent.png: no such file", 9: "no such file", 11: "Git LFS pointer",
                          12: "/dev/null: not a regular file"}.items():
        assert words in reasons[number], reasons[number]
    status, out, _ = run("check", tmp_path / "a.jsonl")
    assert status == 1 and "9 of 11 records are broken" in out and f"{tmp_path}/a.jsonl:4: " in out


def test_json_and_text_of_one_image_in_a_tar(tmp_path):
    """img2dataset's form: .json with url and size, .txt with the words; capitals; a BOM."""
    source = write_tar(tmp_path / "a.tar", [
        ("0.png", png(1)), ("0.txt", b"a cat"), ("0.json", b'{"url": "x", "caption": null}'),
        ("1.PNG", png(1)), ("1.TXT", b"\xef\xbb\xbfa dog"),
        ("2.png", png(1)), ("2.json", b'{"caption": "a bird"}'), ("2.txt", b"else")])
    mixture = Mixture([source], 8)
    assert {mixture[n]["key"][-5]: mixture[n]["caption"] for n in range(3)} == {
        "0": "a cat", "1": "a dog", "2": "a bird"}


def test_a_tar_of_folders(tmp_path, run):
    """As `tar cf` packs them: with the folders, files without use, and one name in two folders."""
    for d in "ab":
        images(tmp_path / "in" / d, 1)
        (tmp_path / f"in/{d}/000.txt").write_text(f"image {d}")
    (tmp_path / "in/notes.md").write_text("of no use")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "in", "in")
    assert run("check", tmp_path / "a.tar")[0] == 0
    mixture = Mixture([str(tmp_path / "a.tar")], 16)
    assert {mixture[n]["caption"] for n in range(2)} == {"image a", "image b"}


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.txt").write_text("a wall")
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(os, "scandir", scandir)
    assert len(files.Folder(str(tmp_path), True)) == 1
    assert "closed is left out: Permission denied" in capsys.readouterr().err


def test_a_number_of_numpy_gives_the_same_sample(tmp_path):
    for k in range(4):
        (tmp_path / f"{k}.png").write_bytes(png(k))
        (tmp_path / f"{k}.txt").write_text("a wall of stone")
    mixture = Mixture([str(tmp_path)], 8, crop="random")
    for n in range(8):
        a, b = mixture[n], mixture[np.int64(n)]
        assert (a["image"] == b["image"]).all() and a["conversations"] == b["conversations"]


def test_a_folder_with_capitals_a_loop_and_a_missing_text(tmp_path, capsys):
    (tmp_path / "in/below").mkdir(parents=True)
    (tmp_path / "in/A.JPG").write_bytes(png(1))
    (tmp_path / "in/A.TXT").write_bytes(b"\xef\xbb\xbfa cat")
    (tmp_path / "in/below/b.png").write_bytes(png(1))
    (tmp_path / "in/below/up").symlink_to(tmp_path / "in")
    mixture = Mixture([str(tmp_path / "in")], 8)
    assert len(mixture) == 1 and mixture[0]["caption"] == "a cat"
    assert "1 of 2 images have no .txt" in capsys.readouterr().err
    assert len(Mixture([str(tmp_path / "in")], 8, text=False)) == 2


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------

def test_crops(tmp_path):
    x = np.zeros((40, 80, 3), np.uint8)
    x[:, :, 0] = np.arange(80) * 3
    Image.fromarray(x).save(tmp_path / "a.png")
    record = lambda crop, n=0: Mixture([str(tmp_path)], 20, crop=crop, text=False)[n]["image"]
    red = {crop: record(crop)[10, :, 0].astype(int) for crop in data.CROPS}
    assert red["squash"][0] < 12 and red["squash"][-1] > 225
    assert 55 < red["center"][0] < 70 and 170 < red["center"][-1] < 185
    assert np.ptp(red["random"]) == pytest.approx(20 * 80 / 60 * 3, abs=8)
    assert np.array_equal(record("random", 3), record("random", 3))
    assert len({record("random", n).tobytes() for n in range(6)}) > 3
    with pytest.raises(ValueError, match="'round'"):
        record("round")


def test_adm_s_centre_crop_and_the_last_place_of_a_random_one():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (264, 300, 3), np.uint8))
    seen = files.make_square(image, 32, "center")
    small = image
    while min(small.size) >= 64:
        small = small.resize([v // 2 for v in small.size], Image.BOX)
    small = small.resize([round(v * 32 / min(small.size)) for v in small.size], Image.BICUBIC)
    left, top = ((v - 32) // 2 for v in small.size)
    want = np.asarray(small.crop((left, top, left + 32, top + 32))).astype(int)
    assert np.abs(want - seen).mean() < 1
    image = image.crop((0, 0, 30, 30))                      # of 30 pixels, 20 begin at 0 to 10
    for value, at in ((0.0, 0), (0.9999, 10)):
        seen = files.make_square(image, 20, "random", lambda: value)
        assert np.array_equal(seen, np.asarray(image)[at:at + 20, at:at + 20])


def test_images_are_resized_by_the_processor_s_filter(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))
    image.save(tmp_path / "a.png")
    for given, used in (({}, Image.BICUBIC), ({"resample": 2}, Image.BILINEAR)):
        seen = Mixture([str(tmp_path)], 16, text=False, **given)[0]["image"]
        assert np.array_equal(seen, image.resize((16, 16), used))


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_orientation_of_a_camera(turn, tmp_path):
    """EXIF's eight orientations, as Pillow turns them."""
    image = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3)
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        want = np.array(ImageOps.exif_transpose(opened))
    assert np.array_equal(np.array(files.open_image(tmp_path / "a.png")), want)


def test_modes_become_rgb(tmp_path):
    """Transparent pixels on white, also of a palette; 16 bits; a JPEG decoded at a fraction."""
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "b.png")
    assert np.array(files.open_image(str(tmp_path / "b.png"))).min() == 255
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, 4, 8))
    image.save(tmp_path / "a.png", transparency=0)
    seen = files.open_image(str(tmp_path / "a.png"))
    assert (seen.getpixel((0, 0)), seen.getpixel((7, 0))) == ((255, 0, 0), (255, 255, 255))
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(256, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    seen = files.load_image((tmp_path / "deep.png").read_bytes(), 16, "squash")
    assert 120 < seen.mean() < 136 and seen[0, 0, 0] < 20 and seen[0, -1, 0] > 235
    Image.new("CMYK", (900, 700), (0, 255, 255, 0)).save(tmp_path / "c.jpg")
    assert files.open_image(str(tmp_path / "c.jpg"), short=64).size == (113, 88)
    assert files.open_image(str(tmp_path / "c.jpg")).size == (900, 700)


PIXELS = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
EXIF = Image.Exif()
EXIF[0x0112] = 6


def save(form, **options):
    out = io.BytesIO()
    PIXELS.save(out, form, **options)
    return out.getvalue()


def in_jpeg(marker, content):
    plain = save("JPEG")
    at = 4 + struct.unpack(">H", plain[4:6])[0]
    return (plain[:at] + b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content
            + plain[at:])


def in_png(kind, content, end=False, crc=None):
    plain = save("PNG")
    at = len(plain) - 12 if end else 33
    crc = zlib.crc32(kind + content) if crc is None else crc
    return (plain[:at] + struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
            + plain[at:])


def in_webp(cut=0, **options):
    whole = save("WEBP", lossless=True, **options)
    return whole[:len(whole) - cut]


BIG = zlib.compress(bytes(2 ** 22))
METADATA = {
    "jpeg exif of no kind": lambda: in_jpeg(0xE1, b"Exif\0\0b'Exif\\x00\\x00MM'"),
    "jpeg exif that is empty": lambda: in_jpeg(0xE1, b"Exif\0\0II*\0"),
    "jpeg jfif too short": lambda: in_jpeg(0xE0, b"JFIF\0"),
    "jpeg photoshop cut": lambda: in_jpeg(0xED, b"Photoshop 3.0\0" b"8BIM\3\xed\0\0\0\0\0\x10ab"),
    "jpeg icc": lambda: in_jpeg(0xE2, b"ICC_PROFILE\0"),
    "jpeg mpf": lambda: in_jpeg(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff"),
    "png exif": lambda: in_png(b"eXIf", b"\0\x08\0\2\1\x12\0\3"),
    "png exif as text": lambda: in_png(b"tEXt", b"Raw profile type exif\0\nexif\n 9\nzz\n"),
    "png large text": lambda: in_png(b"zTXt", b"key\0\0" + BIG),
    "png large text at its end": lambda: in_png(b"zTXt", b"key\0\0" + BIG, end=True),
    "png large international text": lambda: in_png(b"iTXt", b"key\0\1\0en\0k\0" + BIG),
    "png large colour profile": lambda: in_png(b"iCCP", b"name\0\0" + BIG),
    "png unknown compression": lambda: in_png(b"zTXt", b"key\0\7xx"),
    "png wrong checksum": lambda: in_png(b"tEXt", b"key\0text", crc=5),
    "png short chunk": lambda: in_png(b"pHYs", b"\0"),
    "png animation": lambda: in_png(b"acTL", b"\0\0\0\1\0\0\0\0"),
    "png cut in its last text": lambda: in_png(b"tEXt", b"k\0" + bytes(99), end=True)[:-60],
    "webp exif": lambda: in_webp(exif=b"\0\x08\0\2\1\x12\0\3"),
    "webp cut in its exif": lambda: in_webp(exif=bytes(99), cut=50),
    "webp cut in its xmp": lambda: in_webp(xmp=b"<x/>" * 30, icc_profile=b"abc", cut=20),
}


@pytest.mark.parametrize("kind", METADATA)
def test_metadata_never_condemns_whole_pixels(kind):
    seen = np.asarray(files.open_image(METADATA[kind]())).astype(int)
    assert np.abs(seen - np.asarray(PIXELS)).max() < (9 if kind.startswith("jpeg") else 1)
    assert seen.shape == (30, 40, 3)


def test_without_metadata_the_pixels_stay():
    """Also of an image with metadata that is right, and with an alpha channel or a palette."""
    for form in ("PNG", "JPEG", "WEBP"):
        plain, full = save(form), save(form, exif=EXIF, icc_profile=bytes(200))
        for content in (plain, full):
            a, b = (Image.open(io.BytesIO(c)) for c in (content, files.without_metadata(content)))
            assert np.array_equal(np.asarray(a), np.asarray(b)) and not b.getexif()
        assert files.open_image(full).size == (30, 40)       # turned, so the tag was read
    out, image = io.BytesIO(), PIXELS.convert("RGBA")
    image.putalpha(99)
    image.save(out, "WEBP", lossless=True, exif=EXIF)
    assert Image.open(io.BytesIO(files.without_metadata(out.getvalue()))).mode == "RGBA"


def test_a_photo_with_a_tag_of_a_wrong_type_is_turned(tmp_path):
    """Pillow's exif_transpose writes the tags anew, and fails on it."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 5
    content = bytearray(save("JPEG", exif=exif))
    at = content.index(b"Exif") + 6
    order = ">H" if content[at:at + 2] == b"MM" else "<H"
    tag = content.index(struct.pack(order, 0x0100), at + 8)
    content[tag + 2:tag + 4] = struct.pack(order, 2)        # a number that claims to be text
    with pytest.raises(Exception):
        ImageOps.exif_transpose(Image.open(io.BytesIO(bytes(content))))
    assert files.open_image(bytes(content)).size == (30, 40)


def test_what_is_no_image_is_named(tmp_path):
    for name, content, words in (
            ("cut.png", png(1)[:50], "OSError"), ("text.png", b"no image", "cannot identify"),
            ("cut.jpg", save("JPEG")[:400], "OSError: .runcated"),
            ("empty.jpg", b"", "cannot identify"),
            ("lfs.png", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
            ("page.jpg", b"<!DOCTYPE html><html>", "web page")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(files.BrokenRecord, match=words) as error:
            files.open_image(tmp_path / name)
        assert name in str(error.value)
    os.mkfifo(tmp_path / "fifo.png")
    for path, words in (("/dev/zero", "not a regular file"), (tmp_path / "fifo.png", "regular"),
                        (tmp_path, "not a regular file"), (tmp_path / "absent", "no such file")):
        with pytest.raises(DataError, match=words):
            files.open_image(path)


def test_memory_is_bounded(tmp_path):
    """A line of 65,500 pixels under every crop, and a PNG that claims 4 gigapixels."""
    code = ("import data, files\n"
            "for crop in data.CROPS:\n"
            "    for name in sys.argv[1:3]:\n"
            "        assert files.load_image(name, 256, crop, float).shape == (256, 256, 3)\n"
            "try:\n    files.open_image(sys.argv[3])\n"
            "except data.DataError as e:\n    print(e)\n"
            "status = open('/proc/self/status').read()\n"
            "print(int(status.split('VmHWM:')[1].split()[0]) // 1024)")
    for name, size in (("a.png", (65500, 1)), ("b.jpg", (1, 65500))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    bomb = bytearray(png(1))
    bomb[16:24] = struct.pack(">II", 65535, 65535)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    (tmp_path / "bomb.png").write_bytes(bomb)
    out, said = script(code, *(tmp_path / n for n in ("a.png", "b.jpg", "bomb.png"))).communicate()
    assert "DecompressionBombError" in out and int(out.split()[-1]) < 400, out + said


# ------------------------------------------------------------------------------------------------
# Files from the field
# ------------------------------------------------------------------------------------------------

def test_files_that_systems_leave_are_no_data(tmp_path, run):
    """In a folder, in a tar, in a folder of shards."""
    images(tmp_path / "f", 3, texts=True)
    junk = b"\0\5\x16\7\0\2\0\0Mac OS X        " + b"\xff" * 60
    for name in ("._000.png", "._000.txt", ".DS_Store", "Thumbs.db"):
        (tmp_path / "f" / name).write_bytes(junk)
    (tmp_path / "f/__MACOSX").mkdir()
    (tmp_path / "f/__MACOSX/a.png").write_bytes(junk)
    (tmp_path / "f/__MACOSX/a.txt").write_text("a")
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as tar:
        tar.add(tmp_path / "f", "f")
    (shards / "._0.tar").write_bytes(junk)
    for source in (tmp_path / "f", shards / "0.tar", shards, shards / "*.tar"):
        status, out, said = run("check", source)
        assert status == 0 and "0 of 3 records" in out and not said, out + said


def test_nothing_in_a_tar_is_lost_silently(tmp_path, run):
    """A repeated member, two images of one key, a text without an image, a link."""
    members = [*pairs(3), ("0001.png", png(9)), ("0002.JPG", png(9)), ("5.txt", b"a cat")]
    source = write_tar(tmp_path / "a.tar", members)
    with tarfile.open(source, "a") as tar:
        link = tarfile.TarInfo("6.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0000.png"
        tar.addfile(link)
    mixture = Mixture([source], 8)
    assert len(mixture) == 3 and mixture[0]["image"][0, 0, 0] < 3       # the first one counts
    status, out, said = run("check", source)
    assert status == 1 and "4 of 7 records are broken" in out
    for words in ("a.tar/6.png: a link", "a.tar/0001.png: a second one",
                  "a.tar/0002.JPG: a second one", "a.tar/5: text without an image"):
        assert words in out
    assert "4 members in 1 shards make no record" in said


def test_a_caption_without_an_image_is_named(tmp_path, run):
    """The photo beside it may be of an unknown kind (.heic)."""
    source = images(tmp_path / "in", 2, texts=True)
    (tmp_path / "in/7.heic").write_bytes(b"")
    (tmp_path / "in/7.txt").write_text("a cat")
    assert "1 .txt files without an image" in run("check", source)[2]
    said = run("show", source, "--out", f"{source}/sheet.png")[2]
    assert "lies in the data" in said and not (tmp_path / "in/sheet.png").exists()


@pytest.mark.parametrize("damage", ["zeros", "flipped", "joined", "cut"])
def test_a_damaged_tar_is_an_error(damage, tmp_path, run):
    """tarfile takes zeros, or a header whose sum is wrong, for the end of the archive."""
    whole = tmp_path / "a.tar"
    write_tar(whole, pairs(9))
    assert len(Mixture([str(whole)], 8)) == 9
    content = bytearray(whole.read_bytes())
    at = content.index(b"0004.png")
    if damage == "zeros":
        content[at:at + 512] = bytes(512)
    elif damage == "flipped":
        content[at] ^= 1
    else:
        content = content * 2 if damage == "joined" else content[:700]
    whole.write_bytes(content)
    with pytest.raises(DataError, match="a.tar: ReadError: .*" + (
            "unexpected end" if damage == "cut" else "no header at byte")):
        Mixture([str(whole)], 8)
    assert run("check", whole)[0] == 1


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_names_in_tars_are_the_real_ones(form, tmp_path):
    """Long ones in all three forms, non-ASCII ones, and bytes that are not UTF-8."""
    folder = "a" * 90 + "/" + "b" * 60
    names = [f"{folder}/{k}.png" for k in range(2)] + ["caf\u00e9.png", "br\udce9k.png"]
    source = write_tar(tmp_path / "a.tar", [(n, b"broken") for n in names], format=form,
                       errors="surrogateescape", encoding="utf-8")
    keys = [k for k, _ in files.broken_records(files.open_source(source, False), False)]
    assert keys == [f"{source}/{n}" for n in (*names[:3], "br\\udce9k.png")]
    assert all(k.encode() for k in keys)


def test_file_names_that_are_not_utf8(tmp_path, run):
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    for name, content in ((b"caf\xe9", png(1)), (b"br\xe9k\x1b[2J", b"no")):
        with open(folder + b"/" + name + b".png", "wb") as f:
            f.write(content)
        with open(folder + b"/" + name + b".txt", "wb") as f:
            f.write(b"a wall")
    mixture = Mixture([str(tmp_path / "in")], 8)
    assert {mixture[n]["key"][-12:] for n in range(4)} == {"/caf\\udce9.png"[-12:]}
    status, out, _ = run("check", tmp_path / "in")
    assert status == 1 and "br\\udce9k\\x1b[2J.png: UnidentifiedImageError" in out
    os.rename(folder, folder + b"\xe9")
    source = os.fsdecode(folder + b"\xe9")
    assert run("show", source, "--count", 2, "--out", tmp_path / "s.png")[0] == 0
    assert run("check", source + "x")[0] == 2
    (tmp_path / "a.jsonl").write_text('{"image": "a\\ud83d.png", "caption": "x"}')
    status, out, _ = run("check", tmp_path / "a.jsonl")
    assert status == 1 and "a\\ud83d.png: no such file" in out


# ------------------------------------------------------------------------------------------------
# What is broken
# ------------------------------------------------------------------------------------------------

def test_broken_records_are_skipped_and_counted(tmp_path, capsys, run):
    members = pairs(300)
    members[2 * 7] = ("0007.png", png(7)[:50])                      # cut
    members[2 * 50] = ("0050.png", b"no image")
    members[2 * 90 + 1] = ("0090.txt", b"\xff\xfe")                 # not UTF-8
    members[2 * 120 + 1] = ("0120.txt", b"<image> of a cat")        # beside the image to be drawn
    write_tar(tmp_path / "a.tar", members)
    mixture, counter = Mixture([str(tmp_path)], 16), SkipCounter(300)
    records = [mixture[n] for n in range(600)]
    skipped = [s for r in records for s in r["skipped"]]
    assert {key.rsplit("/")[-1] for key, _ in skipped} == {"0007.png", "0050.png", "0090.png",
                                                           "0120.png"}
    assert len(skipped) >= 8                                        # each once per epoch, or more
    again = Mixture([str(tmp_path)], 16)
    for n in range(300):
        assert digest(again[n]) == digest(records[n])
        assert again[n]["skipped"] == records[n]["skipped"]
    for r in records:
        counter.update(r["skipped"], 1)
    assert capsys.readouterr().err.count("skipped ") == len(counter.broken) == 4
    assert counter.count == len(skipped)
    status, out, _ = run("check", tmp_path)
    assert status == 1 and "4 of 300 records are broken" in out


def test_another_record_replaces_a_broken_one(tmp_path):
    source = images(tmp_path, 40)
    for k in range(1, 40, 2):
        (tmp_path / f"{k:03d}.png").write_bytes(b"x")
    mixture = Mixture([source], 8, text=False)
    lengths = [len(mixture[n]["skipped"]) for n in range(200)]
    assert 2 < max(lengths) < 30
    for k in range(0, 38, 2):                               # one good record is left
        (tmp_path / f"{k:03d}.png").write_bytes(b"x")
    assert {Mixture([source], 8, text=False)[n]["key"][-7:] for n in range(20)} == {"038.png"}
    (tmp_path / "038.png").write_bytes(b"x")
    with pytest.raises(DataError, match="100 broken records in a row, the last is .*png"):
        Mixture([source], 8, text=False)


def broken(n, name="k"):
    return [(f"{name}{j}", "bad") for j in range(n)]


@pytest.mark.parametrize("records, n, seen, ends", [
    (40, 10, 20, False),                # no more than 10
    (100, 11, 5, True),                 # 11 of 100
    (500, 45, 20_000, False),           # 9 %, after many epochs
    (500, 45, 480, False), (500, 51, 20_000, True),
    (9_999, 900, 20_000, False), (20_000, 190, 40_000, False), (20_000, 201, 40_000, True),
    (20_000, 24, 500, True),            # 5 % of a large set, long before its end
    (10 ** 9, 12, 1184, False),         # of records with 1 % broken; an unlucky beginning
    (0, 12, 184, False), (0, 200, 12_000, True), (0, 100, 12_000, False)])
def test_how_many_broken_records_end_a_run(records, n, seen, ends):
    counter = SkipCounter(records)
    counter.update([], 0, broken(50, "too long"))           # intact, so not counted as broken
    counter.update([], seen - 1)
    for _ in range(4):
        counter.update(broken(10), 0)                       # the same ones again
    if ends:
        with pytest.raises(DataError, match=f"{n} broken records among .* more than 10?%, such as"):
            counter.update(broken(n), 1)
    else:
        counter.update(broken(n), 1)
    assert counter.count == 50 + 40 + n


def test_mistakes_of_ours_are_tracebacks(tmp_path, monkeypatch):
    source = images(tmp_path, 3, texts=True)
    mixture = Mixture([source], 8)
    monkeypatch.setattr(files, "drawing", lambda *_: 1 + "a")
    with pytest.raises(TypeError):
        mixture[0]
    monkeypatch.undo()
    monkeypatch.setattr(files, "make_square", lambda *_: None.x)
    with pytest.raises(AttributeError):
        mixture[0]


@pytest.mark.parametrize("spec, message", [
    ("builtin:wep", "builtin:wep.*builtin:web, builtin:synthetic"),
    ("builtin:web=0", "'0' is not a positive"), ("builtin:web=-1", "'-1'"),
    ("builtin:web=much", "'much'"), ("builtin:web=nan", "'nan'"), ("builtin:web=", "''"),
    ("/nowhere/at/all", "'/nowhere/at/all' is neither"), ("/nowhere/{0..2}.tar", "3 files of 3"),
    ("/nowhere/*.tar", r"/nowhere/\*.tar: there is no"),
    ("/nowhere/a.jsonl", "a.jsonl: there is no"),
    ("/nowhere/date=2026/{0..2}.tar", "3 files of 3"), ("/nowhere/*.tar=0", "'0' is not"),
    (__file__, "a file of no known kind"), ("/dev/null", "a file of no known kind")])
def test_bad_specs(spec, message):
    with pytest.raises(DataError, match=f"--data .*{message}"):
        Mixture([spec], 16)


def test_bad_sources(tmp_path):
    def refused(source, message, **options):
        with pytest.raises(DataError, match=message):
            Mixture([str(source)], 16, **options)
    refused(tmp_path, "0 images")
    images(tmp_path / "plain", 3)
    refused(tmp_path / "plain", "3 images, 0 of them with a caption")
    assert Mixture([str(tmp_path / "plain")], 16, text=False)[0]["conversations"] == []
    (tmp_path / "a.jsonl").write_text("")
    refused(tmp_path / "a.jsonl", "0 records")
    write_jsonl(tmp_path / "b.jsonl", {})
    refused(tmp_path / "*.jsonl", "2 files; give each")
    os.mkfifo(tmp_path / "fifo.jsonl")
    refused(tmp_path / "fifo.jsonl", "not a regular file")
    (tmp_path / "meta").mkdir()
    write_jsonl(tmp_path / "meta/metadata.jsonl", {"file": "a.png", "text": "x"})
    refused(tmp_path / "meta", 'metadata.jsonl:1 .*"file_name"')
    tar = tmp_path / "t" / "a.tar"
    tar.parent.mkdir()
    refused(write_tar(tar, []), "0 images")
    refused(write_tar(tar, [("a.png", png(1))]), "1 images, 0 with a caption")
    for content, words in ((b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
                           (b"<html>", "a web page"), (gzip.compress(b"x"), "compressed; unpack")):
        tar.write_bytes(content)
        refused(tar, f"a.tar: .*{words}")
    with pytest.raises(DataError, match="weight is 1e-06"):
        Mixture(["builtin:web", "builtin:text=1e-6"], 16)


# ------------------------------------------------------------------------------------------------
# The commands
# ------------------------------------------------------------------------------------------------

def test_show(tmp_path, run):
    sheet = tmp_path / "s.png"
    plain = images(tmp_path / "plain", 3)                    # without captions
    assert run("show", plain, "--out", sheet, "--count", 3)[0] == 0
    assert run("show", "builtin:text", "--out", sheet, "--count", 5)[0] == 0
    assert Image.open(sheet).size == (5 * 232 + 8, 224 + 82 + 8)
    one = sheet.read_bytes()
    assert run("show", "builtin:text", "--out", sheet, "--count", 5)[0] == 0
    assert sheet.read_bytes() == one
    source = images(tmp_path / "many", 30, texts=True)
    for k in range(0, 30, 2):                               # it shows what can be shown
        (tmp_path / f"many/{k:03d}.png").write_bytes(b"x")
    status, out, said = run("show", source, "builtin:web", "--count", 60, "--out", sheet)
    assert status == 0 and 10 < said.count("skipped") <= 15 and "60 samples" in out, said
    write_tar(tmp_path / "many/a.tar", pairs(1))
    assert "the 30 images beside them" in run("show", source, "--count", 1, "--out", sheet)[2]


def test_check_reads_every_part(tmp_path, run):
    """Also after a tar that is cut, and where one is missing; several sources, with weights."""
    for k in range(3):
        write_tar(tmp_path / f"{k}.tar", pairs(4))
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    for pattern, found in (("*.tar", "1 of 9"), ("{0..2}.tar", "1 of 9"), ("{1..3}.tar", "1 of 9"),
                           ("", "1 of 9"), ("{1..2}.tar", "0 of 8"), ("1.tar=2", "0 of 4")):
        status, out, _ = run("check", tmp_path / pattern)
        assert f"{found} records are broken" in out and status == int(found[0])
    images(tmp_path / "plain", 2)
    assert "2 of 6" in run("check", tmp_path / "plain", tmp_path / "1.tar", "builtin:web")[1]
    assert "0 of 2" in run("check", "--no-text", tmp_path / "plain")[1]


@pytest.mark.parametrize("args, words", [
    (("show", "builtin:wep"), "builtin:wep"),
    (("show", "--out", "/nowhere/s.png"), "--out /nowhere/s.png"),
    (("show", "--count", "0"), "--count"), (("check", "/nowhere"), "/nowhere"),
    (("show", "--out", "sheet"), "expected a name such as sheet.png"),
    (("check", "builtin:wep"), "builtin:wep"), (("check",), "SOURCE"), ((), "command"),
    (("show", "--out", "s.psd"), "s.psd"), (("show", "--seed", "-1"), "--seed")], ids=str)
def test_bad_commands(args, words, run):
    status, _, said = run(*args)
    assert status == 2 and words in said and said.count("\n") == 1 and "Traceback" not in said


# ------------------------------------------------------------------------------------------------
# The loader
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers, ranks, method", [
    (0, 1, "fork"), (0, 2, "fork"), (2, 1, "fork"), (2, 2, "fork"), (1, 1, "spawn")])
def test_loader_is_random_access(workers, ranks, method, monkeypatch):
    """macOS starts its workers by spawn."""
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    mixture, batch, start = Mixture(ALL, 32), 6, 100
    parts = [data.loader(mixture, collate, batch, start, workers, r, ranks) for r in range(ranks)]
    got = [x for _ in range(3) for part in parts for x in next(part)]
    assert got == collate([mixture[n] for n in range(start, start + 3 * batch)])
    with pytest.raises(DataError, match="micro-batch of 5 .* 2 ranks"):
        data.loader(mixture, collate, 5, ranks=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_data_is_one_error(workers, tmp_path):
    source = images(tmp_path, 30, texts=True)
    mixture = Mixture([source], 8)
    for k in range(30):
        (tmp_path / f"{k:03d}.png").write_bytes(b"x")
    with pytest.raises(DataError) as error:
        next(data.loader(mixture, collate, 2, workers=workers))
    assert "\n" not in str(error.value) and "broken records in a row" in str(error.value)


SCRIPT = """
import time, torch, data
def collate(records):
    if records[0]["n"] >= 40:
        sys.argv[1:] and 1 / 0
        time.sleep(60)                                      # busy as the script ends
    return dict(x=torch.zeros(3))
batches = data.loader(data.Mixture(["builtin:hq"], 8), collate, 4, workers=2)
for k in range(5):
    next(batches)
print("done", flush=True)
"""


@pytest.mark.parametrize("end, args, status", [
    ("", [], 0), ("1 / 0", [], 1),
    pytest.param("sys.exit(3)", [], 3, marks=pytest.mark.slow),
    pytest.param("list(batches)", ["mistake"], 1, marks=pytest.mark.slow)])
def test_a_script_of_a_user_s_own_ends(end, args, status):
    """Normally or by an exception, though its workers are busy and ignore SIGTERM; a mistake in its
    collate is a traceback."""
    begin = time.monotonic()
    process = script(SCRIPT + end, *args)
    out, said = process.communicate(timeout=50)
    assert process.returncode == status and "done" in out and time.monotonic() - begin < 45, said
    assert ("ZeroDivisionError" in said) == (status == 1)


def test_a_worker_that_cannot_send_is_one_error():
    """Also when it has sent batches, whose tensors end with it."""
    import multiprocessing
    import torch

    def unsendable(records):
        return torch.ones(9) if records[0]["n"] < 3 else lambda: 0
    before = multiprocessing.active_children()
    batches = data.loader(Mixture(["builtin:hq"], 8), unsendable, 1, workers=1)
    worker, = (p for p in multiprocessing.active_children() if p not in before)
    worker.join()
    with pytest.raises(WorkerDied, match="exit code 1.*--workers"):
        for _ in range(4):
            next(batches)


def test_a_worker_that_is_killed_is_one_error():
    """Not in the middle of other work; and not for signals that only the trainer should see."""
    import multiprocessing
    before = multiprocessing.active_children()
    batches = data.loader(Mixture(["builtin:hq"], 8), collate, 4, workers=1)
    next(batches)
    worker, = (p for p in multiprocessing.active_children() if p not in before)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len(next(batches)) == 4
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert sum(range(10 ** 6)) > 0                          # no exception comes from a handler
    with pytest.raises(WorkerDied, match="exit code -9.*--workers"):
        for _ in range(20):
            next(batches)
