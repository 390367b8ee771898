"""The data stream: pure, true to its captions, the same from files, for any ranks and workers.

    pytest tests/test_data.py
"""
import collections
import gzip
import io
import itertools
import json
import pathlib
import signal
import struct
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import best_of                                                          # noqa: E402
import data                                                             # noqa: E402
import run as runs                                                      # noqa: E402
import train_dit                                                        # noqa: E402
import world                                                            # noqa: E402
from data import DataError, Mixture, SkipCounter                       # noqa: E402
from world import Scene, Thing, held_out, relation                     # noqa: E402

ALL = ["builtin:web=4", "builtin:synthetic=3", "builtin:text", "builtin:hq", "builtin:qa"]


def digest(record):
    """All that training sees of a record."""
    return world.hash64(record["image"].tobytes(), record["conversations"], record["caption"])


def collate(records):
    return [(r["n"], digest(r)) for r in records]


def run(*args):
    return subprocess.run([sys.executable, ROOT / "data.py", *map(str, args)], capture_output=True,
                          text=True)


# ---- a pure function ----

def test_same_in_any_order_and_process():
    numbers = [7, 0, 123_456_789, 999, 31]
    once = {n: digest(Mixture(ALL, 64, seed=3)[n]) for n in numbers}
    mixture = Mixture(ALL, 64, seed=3)
    assert {n: digest(mixture[n]) for n in reversed(numbers)} == once
    code = ("import sys; sys.path[:0] = sys.argv[1:3]\nimport data, test_data as t\n"
            f"m = data.Mixture(t.ALL, 64, seed=3)\nprint([t.digest(m[n]) for n in {numbers}])")
    out = subprocess.run([sys.executable, "-c", code, ROOT, ROOT / "tests"], check=True, text=True,
                         capture_output=True, env={"PYTHONHASHSEED": "5"}).stdout
    assert json.loads(out) == [once[n] for n in numbers]
    assert digest(Mixture(ALL, 64, seed=4)[7]) != once[7]


def test_caches_never_change_a_pixel():
    scenes = [world.scene(s, 0, i) for s in world.BUILTIN for i in range(40)]
    warm = [world.render(s, 64) for s in scenes]
    for s, image in zip(scenes, warm):
        for f in (world.shape, world.sprite, world.letters, world.backdrop):
            f.cache_clear()
        assert np.array_equal(world.render(s, 64), image)


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


@pytest.mark.parametrize("size", [1, 600, 4097, 9999])
def test_epochs_are_permutations(size):
    epochs = [[data.shuffled(size, e * size + i, 0, "x") for i in range(size)] for e in range(2)]
    assert all(sorted(e) == list(range(size)) for e in epochs)
    assert size == 1 or epochs[0] != epochs[1]


def test_hq_is_600_scenes_of_any_seed():
    mixture = Mixture(["builtin:hq"], 16)
    assert len(mixture) == 600 and len({mixture[n]["key"] for n in range(600)}) == 600
    assert world.scene("builtin:hq", 1, 5) == world.scene("builtin:hq", 2, 605)
    with pytest.raises(TypeError, match="builtin:web is endless"):
        len(Mixture(["builtin:hq", "builtin:web"], 16))


# ---- scenes and captions ----

SOURCES = ("builtin:web", "builtin:synthetic", "builtin:hq", "builtin:qa")


def test_held_out_never_appears():
    assert sum(held_out(s, c) for s in world.SHAPES for c in world.COLOURS) == 4
    assert held_out("cat", "dog", "left of") == held_out("dog", "cat", "right of")
    share = np.mean([held_out(a, b, "above") for a in world.KINDS for b in world.KINDS[:50]])
    assert 0.04 < share < 0.06
    related = 0
    for source in SOURCES:
        for i in range(5000):
            things = world.scene(source, 0, i).things
            for t in things:
                assert not (t.colour and held_out(t.kind, t.colour))
            for a, b in itertools.combinations(things, 2):
                related += relation(a, b) is not None
                assert not (relation(a, b) and held_out(a.kind, b.kind, relation(a, b)))
    assert related > 5000
    pairs = [f"{c} {s}" for s in world.SHAPES for c in world.COLOURS if held_out(s, c)]
    for source in ("builtin:synthetic", "builtin:qa"):
        mixture = Mixture([source], 8)
        for n in range(1500):
            text = mixture[n]["conversations"][0]["value"]
            assert not any(p in text for p in pairs)


def test_things_are_apart_inside_and_visible():
    counts = collections.Counter()
    for source in SOURCES:
        for i in range(1500):
            s = world.scene(source, 1, i)
            counts[len(s.things)] += 1
            for t in s.things:
                assert min(t.x, t.y) - t.size / 2 > 0 and max(t.x, t.y) + t.size / 2 < 1
                assert world.stands_out(t, s.background)
            for a, b in itertools.combinations(s.things, 2):
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > (a.size + b.size) / 2
    assert sorted(counts) == [1, 2, 3, 4] and all(counts[k] > 300 for k in counts)


def test_drawn_pixels_stay_in_their_boxes():
    for source in SOURCES:
        for i in range(60):
            s = world.scene(source, 2, i)
            drawn = (world.render(s, 96) != world.render(Scene(s.background), 96)).any(-1)
            boxes = np.zeros_like(drawn)
            for t in s.things:
                x0, x1, y0, y1 = (round(96 * v) for v in (
                    t.x - t.size / 2, t.x + t.size / 2, t.y - t.size / 2, t.y + t.size / 2))
                box = slice(max(0, y0 - 1), y1 + 1), slice(max(0, x0 - 1), x1 + 1)
                boxes[box] = True
                assert drawn[box].mean() > 0.1
            assert not (drawn & ~boxes).any()


def parse(text, scene):
    """Read a complete caption back: ({(kind, colour): count}, relation, background words)."""
    body, _, background = text.rpartition(" on a ")
    where = next((r for r in world.RELATIONS if f" {r} " in body), None)
    parts = body.split(f" {where} ") if where else body.replace(" and ", ", ").split(", ")
    names = {}
    for kind, colour, count in world.groups(scene):
        names[world.noun(kind, colour, count)] = kind, colour, count
    assert set(parts) == set(names)
    return [names[p] for p in parts], where, background.removesuffix(" background")


@pytest.mark.parametrize("source", ["builtin:synthetic", "builtin:hq"])
def test_captions_are_true(source):
    relations = 0
    mixture = Mixture([source], 8, seed=5)
    for n in range(1500):
        r = mixture[n]
        s = r["scene"]
        items, where, background = parse(r["caption"], s)
        assert sum(c for _, _, c in items) == len(s.things)
        assert s.background[1] in background
        if where:
            relations += 1
            a, b = (next(t for t in s.things if (t.kind, t.colour) == g[:2]) for g in items)
            dx, dy = b.x - a.x, b.y - a.y
            assert {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[where] >= 0.25
    assert relations > 150


def test_web_captions_leave_out_but_never_invent():
    incomplete = 0
    mixture = Mixture(["builtin:web"], 8)
    for n in range(1500):
        r = mixture[n]
        text = r["caption"].lower()
        there = [world.noun(*g, article=False) for g in world.groups(r["scene"])]
        incomplete += not (all(t in text for t in there) and r["scene"].background[1] in text)
        if not text.endswith((" image", " background")):
            assert any(t.kind in text or world.PLURALS[t.kind] in text for t in r["scene"].things)
    assert 0.1 < incomplete / 1500 < 0.3


def test_answers_are_right():
    types, mixture = collections.Counter(), Mixture(["builtin:qa"], 8, seed=1)
    for n in range(3000):
        r = mixture[n]
        q, a = (t["value"] for t in r["conversations"])
        s, kind = r["scene"], r["question"]
        types[kind, a if kind in ("exists", "align") else ""] += 1
        if kind == "count":
            what = next(k for k in {t.kind for t in s.things} if f"many {world.PLURALS[k]} " in q)
            assert a.lower() == world.NUMBERS[sum(t.kind == what for t in s.things)] + "."
        elif kind == "exists":
            yes = any(world.noun(t.kind) in q for t in s.things)
            assert a == ("Yes." if yes else "No.")
        elif kind == "align":
            text = q.split("the prompt: ")[1][:-1]
            assert (text == world.caption(s)) == (a == "Yes.")
        elif kind == "where":
            assert relation(*s.things) in a.lower()
    for kind in ("exists", "align"):
        assert 0.8 < types[kind, "Yes."] / types[kind, "No."] < 1.25
    assert len(types) == 8


def test_verifiers_questions_are_those_of_best_of():
    """builtin:align trains what best_of.py asks, word for word; it shows shapes only, in six of ten
    scenes two different ones."""
    asked, pairs, mixture = collections.Counter(), 0, Mixture(["builtin:align"], 8, seed=1)
    for n in range(400):
        r = mixture[n]
        q, a = (t["value"] for t in r["conversations"])
        words = q.removeprefix("<image>\n").split(": ")[-1].removesuffix("?")
        assert all(t.colour for t in r["scene"].things)
        if r["question"] == "describe":
            assert q == f"<image>\n{best_of.DESCRIBE}" and a == world.caption(r["scene"])
        else:
            assert q == f"<image>\n{best_of.QUESTION.format(words)}"
        asked[r["question"]] += 1
        pairs += len(world.groups(r["scene"])) == 2
    assert set(asked) == {"describe", "align"} and 0.4 < asked["align"] / 400 < 0.6
    assert 0.55 < pairs / 400 < 0.7


def test_brief_captions_say_less():
    """builtin:brief: one or two different shapes, all named in the order of the scene; a relation
    seldom, and then the true one; a background seven times in ten."""
    said = collections.Counter()
    for i in range(400):
        r = world.builtin_record("builtin:brief", 1, i, 0)
        s, text = r["scene"], r["caption"]
        assert len(world.groups(s)) == len(s.things) <= 2 and not world.is_held_out(s)
        where = [w for w in world.RELATIONS if f" {w} " in text]
        assert where in ([], [world.relation_of(s)])
        on = s.background if text.endswith(" background") else None
        assert text == world.describe(world.groups(s), *(where or [None]), on)
        said.update(two=len(s.things) == 2, where=bool(where), on=bool(on))
    assert 200 < said["two"] < 300 and 15 < said["where"] < 60 and 250 < said["on"] < 310


@pytest.mark.parametrize("others, low, high", [(True, 0.4, 0.6), (False, 1, 1)])
def test_half_of_the_wrong_prompts_change_one_attribute(others, low, high):
    """One attribute changed leaves most words of the caption in place. Without other scenes to
    describe, as in builtin:align, all do."""
    close = []
    for i in range(600):
        s = world.scene("builtin:qa", 0, i)
        rand, more = world.generator("t", i), itertools.count(1000 * (i + 1))
        other = lambda: world.scene("builtin:qa", 0, next(more))
        text = world.wrong_description(s, rand, other if others else None)
        assert text != world.caption(s)
        close.append(text.endswith(world.background_words(s.background) + " background")
                     or text.startswith(world.describe(world.groups(s), world.relation_of(s))))
    assert low <= np.mean(close) <= high


def test_looks_alike_at_any_resolution():
    for source in world.BUILTIN:
        values = []
        for i in range(40):
            s = world.scene(source, 0, i)
            small = world.render(s, 64).astype(float)
            large = Image.fromarray(world.render(s, 224)).resize((64, 64), Image.BICUBIC)
            values.append(10 * np.log10(255 ** 2 / (((small - np.asarray(large)) ** 2).mean() + 1)))
        assert np.mean(values) > 24 and min(values) > 17, (source, np.mean(values), min(values))


def test_scene_by_hand():
    image = world.render(Scene(("plain", "white"), (Thing("circle", "red", 0.5),)), 64)
    assert tuple(image[32, 32]) == world.COLOURS["red"]
    assert tuple(image[2, 2]) == world.BACKGROUNDS["white"]
    area = (image != world.BACKGROUNDS["white"]).any(-1).sum() / 64 ** 2
    assert area == pytest.approx(np.pi / 16, rel=0.1)
    with pytest.raises(DataError, match="'blob'"):
        world.render(Scene(("plain", "white"), (Thing("blob", "red"),)), 64)


# ---- ranks and workers ----

@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2])
def test_loader_is_random_access(workers, world):
    mixture, batch, start = Mixture(ALL, 32), 6, 100
    ranks = [data.loader(mixture, collate, batch, start, workers, r, world) for r in range(world)]
    got = [x for _ in range(3) for rank in ranks for x in next(rank)]
    assert got == collate([mixture[n] for n in range(start, start + 3 * batch)])
    with pytest.raises(DataError, match="micro-batch of 5 .* 2 ranks"):
        data.loader(mixture, collate, 5, ranks=2)


# ---- the user's files ----

def pictures(folder, n=12, ext="png"):
    """n images of their own colours and sizes; returns their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        Image.new("RGB", (30 + k, 20), (20 * k, 100, 50)).save(folder / f"{k:03d}.{ext}")
    return [f"picture number {k}" for k in range(n)]


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(k):
    out = io.BytesIO()
    Image.new("RGB", (16, 16), (k % 256, 100, k // 256)).save(out, "PNG")
    return out.getvalue()


def make(form, folder):
    """The same 12 pictures and captions in one of the formats; returns the source."""
    texts = pictures(folder)
    names = [f"{k:03d}.png" for k in range(12)]
    if form == "txt":
        for name, text in zip(names, texts):
            (folder / name).with_suffix(".txt").write_text(text + "\n")
    elif form == "metadata":
        (folder / "metadata.jsonl").write_text("\n".join(
            json.dumps({"file_name": n, "text": t}) for n, t in zip(names, texts)))
    elif form == "jsonl":
        (folder / "all.jsonl").write_text("\n".join(       # a path, or a list of one
            json.dumps({"image": [n] if k % 2 else n, "caption": t})
            for k, (n, t) in enumerate(zip(names, texts))))
        return str(folder / "all.jsonl")
    else:
        for shard in range(3):
            write_tar(folder / f"{shard:05d}.tar", [
                m for k in range(4 * shard, 4 * shard + 4) for m in (
                    (names[k], (folder / names[k]).read_bytes()),
                    (names[k][:-3] + "txt", texts[k].encode()) if k % 2 else
                    (names[k][:-3] + "json", json.dumps({"prompt": texts[k]}).encode()))])
        return {"tars": str(folder), "glob": str(folder / "*.tar"),
                "braces": str(folder / "{00000..00002}.tar")}[form]
    return str(folder)


@pytest.mark.parametrize("caption", ["A photo of a cat.", "an image of a cat", "Picture of a cat"])
def test_requests_name_the_picture_once(caption):
    asked = {world.prompt(caption, iter([0.9, k / 4]).__next__) for k in range(4)}
    assert asked == {"Can you generate a photo of a cat?", "Generate an image of a cat.",
                     "Please create a picture of a cat.", "Draw a cat."}
    assert world.prompt(caption, lambda: 0.1) == caption


@pytest.mark.parametrize("form", ["txt", "metadata", "jsonl", "tars", "glob", "braces"])
def test_formats(form, tmp_path):
    mixture = Mixture([make(form, tmp_path)], 16)
    assert len(mixture) == 12
    for epoch in range(2):
        records = [mixture[n] for n in range(12 * epoch, 12 * epoch + 12)]
        assert {r["caption"] for r in records} == {f"picture number {k}" for k in range(12)}
        for r in records:
            assert r["image"].shape == (16, 16, 3) and r["image"].dtype == np.uint8
            assert r["image"][8, 8, 0] == 20 * int(r["caption"].split()[-1])
            assert r["task"] == "t2i" and r["conversations"][1]["value"].endswith("<image>")
            assert r["caption"] in r["conversations"][0]["value"] and not r["skipped"]
    got = [x for b in itertools.islice(data.loader(mixture, collate, 4, workers=2), 4) for x in b]
    assert got == collate([mixture[n] for n in range(16)])


def test_what_is_left_out_is_said(tmp_path):
    """By `show` broken pictures; of a folder those beside its tars; of a compressed tar why."""
    pictures(tmp_path / "in", 12)
    for k in range(12):
        (tmp_path / f"in/{k:03d}.txt").write_text(f"  picture {k}\n")
    (tmp_path / "in/003.png").write_bytes(b"x")
    done = run("show", "--source", tmp_path / "in", "--count", 12, "--out", tmp_path / "sheet.png")
    assert done.returncode == 0 and f"skipped {tmp_path}/in/003.png" in done.stderr
    many = tmp_path / "many"
    pictures(many, 30)
    for k in range(0, 30, 2):                               # `show` shows what can be shown
        (many / f"{k:03d}.png").write_bytes(b"x")
    done = run("show", "--source", many, "--count", 30, "--out", tmp_path / "sheet.png")
    assert done.returncode == 0 and done.stderr.count("skipped") == 15, done.stderr
    write_tar(tmp_path / "in/a.tar", [("0.png", png(0)), ("0.txt", b"a cat")])
    assert len(Mixture([str(tmp_path / "in")], 8)) == 1
    done = run("check", tmp_path / "in/a.tar")
    assert done.returncode == 0
    done = run("show", "--source", tmp_path / "in", "--count", 1, "--out", tmp_path / "sheet.png")
    assert "the 12 pictures beside them are left out" in done.stderr
    (tmp_path / "b.tar").write_bytes(gzip.compress((tmp_path / "in/a.tar").read_bytes()))
    with pytest.raises(DataError, match="b.tar.*compressed: unpack it"):
        Mixture([str(tmp_path / "b.tar")], 8)
    (tmp_path / "a.jsonl").write_text('{"image": "in/000.png", "caption": "  "}\n')
    assert run("check", tmp_path / "a.jsonl").returncode == 1


def test_a_tar_of_a_folder(tmp_path):
    """As `tar cf` packs one: with the folder itself, and files that no record has."""
    pictures(tmp_path / "in", 2)
    for k in range(2):
        (tmp_path / f"in/00{k}.txt").write_text("a cat")
    (tmp_path / "in/notes.md").write_text("of no use")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "in", "in")
    done = run("check", tmp_path / "a.tar")
    assert done.returncode == 0, done.stdout
    assert len(Mixture([str(tmp_path / "a.tar")], 16)) == 2


def test_a_mended_caption_is_used_with_cached_latents(tmp_path):
    """The cache keeps what the pictures are, not what their texts were."""
    folder = tmp_path / "in"
    pictures(folder, 2)
    for k, words in enumerate(("a cat", "")):
        (folder / f"00{k}.txt").write_text(words)

    def cached():
        mixture = Mixture([str(folder)], 8)
        data.cache_latents(mixture, str(tmp_path / "cache"), "x",
                           lambda x: x.reshape(len(x), 1, -1).astype(np.float32), 2, 0)
        return mixture
    skipped = [s for n in range(4) for s in cached()[n]["skipped"]]
    assert {k[-7:] for k, _ in skipped} == {"001.png"} and "no caption" in skipped[0][1]
    (folder / "001.txt").write_text("a dog")
    assert {cached()[n]["caption"] for n in range(2)} == {"a cat", "a dog"}


def test_two_processes_fill_one_cache(tmp_path):
    """The second waits for the first, and reads what it made."""
    pictures(tmp_path / "in", 4)
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import data, numpy as np\n"
            f"m = data.Mixture([{str(tmp_path / 'in')!r}], 8, text=False)\n"
            "def slow(x):\n    time.sleep(1)\n"
            "    return x.reshape(len(x), 1, -1).astype(np.float32)\n"
            f"data.cache_latents(m, {str(tmp_path / 'cache')!r}, 'x', slow, 2, 0)\n"
            "print(m[0]['latent'].sum())")
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert said[0][0] == said[1][0] and sum("encoding" in err for _, err in said) == 1


def test_conversations(tmp_path):
    pictures(tmp_path, 2)
    ask = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    draw = [{"from": "human", "value": "Draw a cat"}, {"from": "gpt", "value": "<image>"}]
    (tmp_path / "a.jsonl").write_text("\n".join(
        json.dumps({"image": f"00{k}.png", "conversations": c}) for k, c in enumerate((ask, draw))))
    mixture = Mixture([str(tmp_path / "a.jsonl")], 16)
    seen = {r["task"]: r["conversations"] for r in (mixture[0], mixture[1])}
    assert seen == {"qa": ask, "t2i": draw}


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
    with pytest.raises(DataError, match="'round'"):
        record("round")


def test_jpeg_rotation_and_transparency(tmp_path):
    image = Image.new("RGB", (400, 200), "black")
    image.paste("white", (0, 0, 200, 200))                          # its left half is white
    exif = Image.Exif()
    exif[0x0112] = 6                                                # to be shown turned right
    image.save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "b.png")
    mixture = Mixture([str(tmp_path)], 16, text=False)
    images = {mixture[n]["key"][-5:]: mixture[n]["image"] for n in range(2)}
    assert images["a.jpg"][3].min() > 240 and images["a.jpg"][12].max() < 15
    assert images["b.png"].min() == 255
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(256, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")               # 16 bits
    seen = data.load_image((tmp_path / "deep.png").read_bytes(), 16, "squash", None)
    assert 120 < seen.mean() < 136 and seen[0, 0, 0] < 20 and seen[0, -1, 0] > 235


def test_pictures_are_resized_by_the_processor_s_filter(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))
    image.save(tmp_path / "a.png")
    for given, used in (({}, Image.BICUBIC), ({"resample": 2}, Image.BILINEAR)):
        seen = Mixture([str(tmp_path)], 16, text=False, **given)[0]["image"]
        assert np.array_equal(seen, image.resize((16, 16), used))


@pytest.mark.parametrize("source", ["builtin:web", "builtin:qa"])
def test_export_is_the_same_stream(source, tmp_path):
    done = run("export", "--source", source, "--count", 25, "--out", tmp_path, "--resolution", 32,
               "--shard", 10, "--seed", 2)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.tar"))) == 3
    copy, live = Mixture([str(tmp_path)], 32, seed=2), Mixture([source], 32, seed=2)
    assert [digest(copy[n]) for n in range(25)] == [digest(live[n]) for n in range(25)]
    assert [copy[n]["task"] for n in range(25)] == [live[n]["task"] for n in range(25)]
    again = [digest(copy[n]) for n in range(25, 50)]                # the next epoch is reshuffled
    assert sorted(again) == sorted(digest(live[n]) for n in range(25))
    assert again != [digest(live[n]) for n in range(25)]
    for crop in ("random", "center"):                               # what is written stays as it is
        other = Mixture([str(tmp_path)], 32, seed=2, crop=crop)
        assert [digest(other[n]) for n in range(25)] == [digest(live[n]) for n in range(25)]
    assert run("check", tmp_path).returncode == 0
    assert "holds tars already" in run("export", "--out", tmp_path).stderr
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.PNG").touch()
    assert "holds pictures already" in run("export", "--out", tmp_path / "in").stderr


def train(out, *argv, monkeypatch):
    """train_dit.py in this process -> its exit status and the losses of its log."""
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "argv", [
        "train_dit.py", "--device", "cpu", "--dtype", "float32", "--workers", "0", "--log-every",
        "1", "--sample-every", "99", "--sample-steps", "1", "--guidance", "1", "--out", str(out),
        *map(str, argv)])
    handlers, status = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}, 0
    try:
        runs.main(train_dit.main)
    except SystemExit as stopped:
        status = stopped.code
    for s, handler in handlers.items():
        signal.signal(s, handler)
    lines = (out / "log.jsonl").read_text().splitlines()
    return status, [json.loads(line)["loss"] for line in lines]


def test_export_trains_to_the_same_curve(tmp_path, monkeypatch):
    """Losses and weights, bit for bit."""
    shards, results = tmp_path / "shards", []
    done = run("export", "--source", "builtin:web", "--count", 8, "--shard", 3, "--resolution", 64,
               "--out", shards)
    assert done.returncode == 0, done.stderr
    for source in ("builtin:web", shards):
        out = tmp_path / f"run{len(results)}"
        status, losses = train(out, "--data", source, "--batch", 4, "--steps", 2,
                               monkeypatch=monkeypatch)
        assert status == 0 and len(losses) == 2
        results.append((losses, (out / "final/model.safetensors").read_bytes()))
    assert results[0] == results[1]


# ---- what is broken ----

def test_broken_records_are_skipped_and_counted(tmp_path, capsys):
    members = [(f"{k:04d}.{e}", c) for k in range(300)
               for e, c in (("png", png(k)), ("txt", b"a cat"))]
    members[2 * 7] = ("0007.png", png(7)[:50])                      # cut short
    members[2 * 50] = ("0050.png", b"no picture")
    members[2 * 90 + 1] = ("0090.txt", b"\xff\xfe")                 # not UTF-8
    members[2 * 120 + 1] = ("0120.txt", b"<image> of a cat")        # and the one that is drawn
    write_tar(tmp_path / "a.tar", members)
    mixture, counter = Mixture([str(tmp_path)], 16), SkipCounter()
    records = [mixture[n] for n in range(600)]
    skipped = [s for r in records for s in r["skipped"]]
    assert {key.rsplit("/")[-1] for key, _ in skipped} == {"0007.png", "0050.png", "0090.png",
                                                            "0120.png"}
    assert len(skipped) >= 8                                        # each once an epoch, or more
    again = Mixture([str(tmp_path)], 16)
    for n in range(300):
        assert digest(again[n]) == digest(records[n])
        assert again[n]["skipped"] == records[n]["skipped"]
    for r in records[:300]:
        counter.update(r["skipped"], 1)
    assert capsys.readouterr().err.count("skipped ") == len(counter.keys) == 4
    done = run("check", tmp_path)
    assert done.returncode == 1 and "4 of 300 records are broken" in done.stdout


def test_check_reads_every_file_of_a_pattern(tmp_path):
    """Also after one that is cut, and where one is missing."""
    good = [(f"{k}.{e}", c) for k in range(4) for e, c in (("png", png(k)), ("txt", b"a cat"))]
    for k in range(3):
        write_tar(tmp_path / f"{k}.tar", good)
    (tmp_path / "0.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    for pattern, found in (("*.tar", "1 of 9"), ("{0..2}.tar", "1 of 9"), ("{1..3}.tar", "1 of 9"),
                           ("", "1 of 9"), ("{1..2}.tar", "0 of 8")):
        done = run("check", tmp_path / pattern)
        assert f"{found} records are broken" in done.stdout and done.returncode == (found[0] == "1")


def test_a_turn_without_a_speaker_is_a_broken_record(tmp_path):
    """The first turn alone tells that the picture is drawn; the others are read all the same."""
    pictures(tmp_path, 2)
    drawn = {"from": "gpt", "value": "<image>"}
    rows = [[drawn, {"value": "b"}], [drawn, {"from": ["human"], "value": "b"}], [drawn]]
    (tmp_path / "a.jsonl").write_text("\n".join(
        json.dumps({"image": sorted(tmp_path.glob("*.png"))[0].name, "conversations": row})
        for row in rows))
    done = run("check", tmp_path / "a.jsonl")
    assert "2 of 3 records are broken" in done.stdout and done.stdout.count("a.jsonl:") == 2


def test_a_broken_line_is_a_broken_record(tmp_path):
    """Skipped and named, wherever in the file it is."""
    pictures(tmp_path, 1)
    good = '{"image": "000.png", "caption": "x"}\n'
    (tmp_path / "a.jsonl").write_text(good + '{"image": "0\n' + "[1]\n" + good)
    mixture = Mixture([str(tmp_path / "a.jsonl")], 16)
    skipped = {k.rsplit(":")[-1] for n in range(40) for k, _ in mixture[n]["skipped"]}
    assert skipped == {"2", "3"} and len(mixture) == 4


def test_above_one_percent_the_run_stops():
    counter = SkipCounter()
    counter.update([], 0, [(f"long{j}", "of no use") for j in range(50)])   # whole, so not counted
    counter.update([(f"k{j}", "bad") for j in range(10)], 20)       # many, but no more than 10
    counter.update([], 2000)
    counter.update([("k10", "bad")], 1)                             # 11, but below 1 %
    chance = SkipCounter()
    chance.update([(f"k{j}", "bad") for j in range(12)], 1184)      # of records of which 1 % are
    with pytest.raises(DataError, match="31 of 2031 .* 1 %"):
        counter.update([(f"m{j}", "bad") for j in range(20)], 10)


def test_a_run_stops_above_one_percent(tmp_path, monkeypatch, capsys):
    """Before its first update: of 32 samples 16 are broken. The words are those of the counter."""
    write_tar(tmp_path / "half.tar", [(f"{k:03d}.{e}", c) for k in range(64) for e, c in
                                      (("png", png(k) if k % 2 else b"x"), ("txt", b"a cat"))])
    status, losses = train(tmp_path / "run", "--data", tmp_path / "half.tar", "--batch", 32,
                           "--steps", 3, monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert status == 2 and not losses and "Traceback" not in said
    assert "of 32 samples were broken, above 1 %, such as" in said and "half.tar/0" in said
    assert not list((tmp_path / "run/checkpoints").iterdir())


def test_nothing_but_broken_records(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{k}.{e}", b"x") for k in range(9) for e in ("jpg", "txt")])
    with pytest.raises(DataError, match="20 broken records in a row"):
        Mixture([str(tmp_path)], 16)[0]


@pytest.mark.parametrize("spec, message", [
    ("builtin:wep", "builtin:wep.*builtin:web, builtin:synthetic"),
    ("builtin:web=0", "'0' is not a positive"), ("builtin:web=-1", "'-1'"),
    ("builtin:web=much", "'much'"), ("builtin:web=nan", "'nan'"), ("builtin:web=", "''"),
    ("/nowhere/at/all", "'/nowhere/at/all' is neither"), ("/nowhere/{0..2}.tar", "3 files of 3"),
    ("/nowhere/*.tar", r"/nowhere/\*.tar: there is no"), ("/nowhere/a.jsonl", "a.jsonl: there is no"),
    ("/nowhere/date=2026/{0..2}.tar", "3 files of 3"), ("/nowhere/*.tar=0", "'0' is not")])
def test_bad_specs(spec, message):
    with pytest.raises(DataError, match=message):
        Mixture([spec], 16)


def test_bad_files(tmp_path):
    def refused(source, message):
        with pytest.raises(DataError, match=message):
            Mixture([str(source)], 16)
    refused(tmp_path, "0 images")
    pictures(tmp_path / "plain", 3)
    refused(tmp_path / "plain", "3 images, 0 of them with a caption")
    assert Mixture([str(tmp_path / "plain")], 16, text=False)[0]["conversations"] == []
    lines = tmp_path / "a.jsonl"
    for text, message in (("", "0 records"), ("[1]", ":1 .*expected an object"),
                          ('{"caption": "x"}', ':1 .ValueError: .*with "image"'),
                          ('{"image": ["plain/000.png", "b.png"]}', ':1 .ValueError: .*one path'),
                          ('{"image": "plain/000.png"}', ":1 .*: no caption, prompt or conv")):
        lines.write_text(text)
        refused(lines, message)
    tar = tmp_path / "t" / "a.tar"
    tar.parent.mkdir()
    write_tar(tar, [])
    refused(tar, "0 images")
    write_tar(tar, [("a.png", png(1))])
    refused(tar, "1 images, 0 with a caption")
    write_tar(tar, [("a.txt", b"x"), ("a.png", png(1) + bytes(9000))])
    tar.write_bytes(tar.read_bytes()[:3000])
    refused(tar, "a.tar: unreadable as a tar")
    assert run("check", tar.parent).returncode == 1
    with pytest.raises(DataError, match="weight is 1e-06"):
        Mixture(["builtin:web", "builtin:text=1e-6"], 16)


def test_commands(tmp_path):
    done = run("show", "--source", "builtin:text", "--out", tmp_path / "s.png", "--count", 5)
    assert done.returncode == 0 and Image.open(tmp_path / "s.png").width > 600
    for args in (("show", "--source", "builtin:wep"), ("show", "--crop", "round"),
                 ("show", "--out", "/nowhere/s.png"), ("show", "--count", "0"),
                 ("show", "--out", "sheet"), ("check", "/nowhere"), ("check", "builtin:web")):
        done = run(*args)
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr


# ------------------------------------------------------------------------------------------------
# What users' files are like
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("damage", ["zeros", "flipped", "two in one"])
def test_a_tar_that_ends_early_is_an_error(damage, tmp_path):
    """tarfile takes zeros, or a header whose sum is wrong, for the end of the archive."""
    whole = tmp_path / "a.tar"
    write_tar(whole, [m for k in range(9) for m in ((f"{k}.png", png(1)), (f"{k}.txt", b"a cat"))])
    assert len(Mixture([str(whole)], 8)) == 9
    content = bytearray(whole.read_bytes())
    at = content.index(b"4.png")
    if damage == "zeros":
        content[at:at + 512] = bytes(512)
    elif damage == "flipped":
        content[at] ^= 1
    else:
        content *= 2
    whole.write_bytes(content)
    with pytest.raises(DataError, match="unreadable as a tar .*no header at byte"):
        Mixture([str(whole)], 8)
    assert run("check", whole).returncode == 1


def test_a_photo_with_odd_exif_is_read(tmp_path):
    """Pillow's exif_transpose writes the tags anew, and fails where one has the wrong type."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 5
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.jpg", exif=exif)
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    at = content.index(b"Exif") + 6
    order = ">H" if content[at:at + 2] == b"MM" else "<H"
    tag = content.index(struct.pack(order, 0x0100), at + 8)
    content[tag + 2:tag + 4] = struct.pack(order, 2)                    # a number, said to be text
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(Exception):
        ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    assert data.upright_rgb(Image.open(tmp_path / "a.jpg")).size == (20, 40)


def test_metadata_beside_a_caption_in_a_tar(tmp_path):
    """img2dataset's: .json with url and size, .txt with the words; names in capitals, a BOM."""
    path = tmp_path / "a.tar"
    write_tar(path, [
        ("0.png", png(1)), ("0.txt", b"a cat"), ("0.json", b'{"url": "x", "caption": null}'),
        ("1.PNG", png(1)), ("1.TXT", b"\xef\xbb\xbfa dog"),
        ("2.png", png(1)), ("2.json", b'{"caption": "a bird"}'), ("2.txt", b"else")])
    assert {r["key"][-5]: r["caption"] for r in map(Mixture([str(path)], 8).__getitem__, range(3))} \
        == {"0": "a cat", "1": "a dog", "2": "a bird"}


def test_folders_with_capitals_a_loop_and_a_wrong_name(tmp_path):
    (tmp_path / "in/below").mkdir(parents=True)
    (tmp_path / "in/A.JPG").write_bytes(png(1))
    (tmp_path / "in/A.TXT").write_bytes(b"\xef\xbb\xbfa cat")
    (tmp_path / "in/below/up").symlink_to(tmp_path / "in")
    mixture = Mixture([str(tmp_path / "in")], 8)
    assert len(mixture) == 1 and mixture[0]["caption"] == "a cat"
    (tmp_path / "in/metadata.jsonl").write_text('{"file_name": 5, "text": "a"}\n')
    with pytest.raises(DataError, match="metadata.jsonl:1: .* file_name .* found .* 5,"):
        Mixture([str(tmp_path / "in")], 8)


@pytest.mark.parametrize("talk, task, where", [
    ([("system", "Be brief."), ("human", "What?"), ("gpt", "A cat.")], "qa", 1),
    ([("user", "Draw."), ("assistant", "<image>")], "t2i", 1),
    ([("gpt", "A cat.")], None, None)])
def test_the_picture_is_in_the_turn_that_has_it(talk, task, where, tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    talk = [{"from": who, "value": said} for who, said in talk]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "conversations": talk}))
    if task is None:
        with pytest.raises(DataError, match="no turn of the human"):
            Mixture([str(tmp_path / "a.jsonl")], 8)[0]
        return
    record = Mixture([str(tmp_path / "a.jsonl")], 8)[0]
    assert record["task"] == task
    assert ["<image>" in t["value"] for t in record["conversations"]].index(True) == where


def test_many_sources_do_not_slow_the_stream():
    data.shuffled(5000, 0, 0, "a")
    made = data._window.cache_info().misses
    for n in range(300):
        data.shuffled(5000, n // 100, 0, f"source {n % 100}")
    assert data._window.cache_info().misses - made <= 100
