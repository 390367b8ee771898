"""tiny/scenes.py and tiny/world.py: scenes, their images, captions, questions and sources.

    pytest tests/test_world.py
"""
import collections
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import best_of                                                          # noqa: E402
import cli                                                              # noqa: E402
import data                                                             # noqa: E402
import evaluate                                                         # noqa: E402
import train_dit                                                        # noqa: E402
from chat import request                                                # noqa: E402
from data import Mixture, random_stream                                 # noqa: E402
from tiny import scenes, world                                          # noqa: E402
from tiny.scenes import Scene, Thing                                    # noqa: E402
from tiny.world import held_out, relation                               # noqa: E402

SOURCES = ("builtin:web", "builtin:synthetic", "builtin:hq", "builtin:qa")


def records(source, count, seed=0):
    """The first records of a source, without images."""
    return [world.builtin_record(source, seed, i, 0) for i in range(count)]


# ------------------------------------------------------------------------------------------------
# Scenes and images
# ------------------------------------------------------------------------------------------------

def test_held_out_compositions_never_appear():
    assert sum(held_out(s, c) for s in world.SHAPES for c in world.COLOURS) == 4
    assert held_out("cat", "dog", "left of") == held_out("dog", "cat", "right of")
    share = np.mean([held_out(a, b, "above") for a in world.KINDS for b in world.KINDS[:50]])
    assert 0.04 < share < 0.06
    related = 0
    for source in SOURCES:
        for i in range(3000):
            things = world.scene(source, 0, i).things
            for t in things:
                assert not (t.colour and held_out(t.kind, t.colour))
            for a, b in itertools.combinations(things, 2):
                related += relation(a, b) is not None
                assert not (relation(a, b) and held_out(a.kind, b.kind, relation(a, b)))
    assert related > 3000
    pairs = [f"{c} {s}" for s in world.SHAPES for c in world.COLOURS if held_out(s, c)]
    for source in ("builtin:synthetic", "builtin:qa"):
        for r in records(source, 1500):
            assert not any(p in r["conversations"][0]["value"] for p in pairs)


def test_things_are_apart_inside_and_visible():
    counts = collections.Counter()
    for source in SOURCES:
        for i in range(1000):
            s = world.scene(source, 1, i)
            counts[len(s.things)] += 1
            for t in s.things:
                assert min(t.x, t.y) - t.size / 2 > 0 and max(t.x, t.y) + t.size / 2 < 1
                assert world.stands_out(t, s.background)
            for a, b in itertools.combinations(s.things, 2):
                assert max(abs(a.x - b.x), abs(a.y - b.y)) > (a.size + b.size) / 2
    assert sorted(counts) == [1, 2, 3, 4] and all(counts[k] > 200 for k in counts)


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


def test_caches_never_change_a_pixel():
    drawn = [world.scene(s, 0, i) for s in world.BUILTIN for i in range(40)]
    warm = [world.render(s, 64) for s in drawn]
    for s, image in zip(drawn, warm):
        for f in (scenes.shape, scenes.sprite, scenes.letters, scenes.backdrop):
            f.cache_clear()
        assert np.array_equal(world.render(s, 64), image)


def test_scenes_look_alike_at_any_resolution():
    for source in world.BUILTIN:
        values = []
        for i in range(40):
            s = world.scene(source, 0, i)
            small = world.render(s, 64).astype(float)
            large = Image.fromarray(world.render(s, 224)).resize((64, 64), Image.BICUBIC)
            values.append(10 * np.log10(255 ** 2 / (((small - np.asarray(large)) ** 2).mean() + 1)))
        assert np.mean(values) > 24 and min(values) > 17, (source, np.mean(values), min(values))


def test_a_scene_by_hand():
    image = world.render(Scene(("plain", "white"), (Thing("circle", "red", 0.5),)), 64)
    assert tuple(image[32, 32]) == world.COLOURS["red"]
    assert tuple(image[2, 2]) == world.BACKGROUNDS["white"]
    area = (image != world.BACKGROUNDS["white"]).any(-1).sum() / 64 ** 2
    assert area == pytest.approx(np.pi / 16, rel=0.1)


def test_hq_scenes_do_not_depend_on_the_seed():
    assert world.scene("builtin:hq", 1, 5) == world.scene("builtin:hq", 2, 5)
    assert world.scene("builtin:web", 1, 5) != world.scene("builtin:web", 2, 5)


# ------------------------------------------------------------------------------------------------
# Captions and questions
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("caption", ["A photo of a cat.", "an image of a cat", "Picture of a cat"])
def test_requests_name_the_image_once(caption):
    asked = {request(caption, iter([0.9, k / 4]).__next__) for k in range(4)}
    assert asked == {"Can you generate a photo of a cat?", "Generate an image of a cat.",
                     "Please create a picture of a cat.", "Draw a cat."}
    assert request(caption, lambda: 0.1) == caption


def parse(text, scene):
    """Read a complete caption -> ([(kind, colour, count)], relation, background words)."""
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
    for r in records(source, 1200, 5):
        s = r["scene"]
        items, where, background = parse(r["caption"], s)
        assert sum(c for _, _, c in items) == len(s.things)
        assert s.background[1] in background
        if where:
            relations += 1
            a, b = (next(t for t in s.things if (t.kind, t.colour) == g[:2]) for g in items)
            dx, dy = b.x - a.x, b.y - a.y
            assert {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[where] >= 0.25
    assert relations > 120


def test_web_captions_leave_out_but_never_invent():
    incomplete = 0
    for r in records("builtin:web", 1500):
        text = r["caption"].lower()
        there = [world.noun(*g, article=False) for g in world.groups(r["scene"])]
        incomplete += not (all(t in text for t in there) and r["scene"].background[1] in text)
        if not text.endswith((" image", " background")):
            assert any(t.kind in text or world.PLURALS[t.kind] in text for t in r["scene"].things)
    assert 0.1 < incomplete / 1500 < 0.3


def test_answers_are_right():
    kinds = collections.Counter()
    for r in records("builtin:qa", 3000, 1):
        q, a = (t["value"] for t in r["conversations"])
        s, kind = r["scene"], r["question"]
        kinds[kind, a if kind in ("exists", "align") else ""] += 1
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
        assert 0.8 < kinds[kind, "Yes."] / kinds[kind, "No."] < 1.25
    assert len(kinds) == 8


def test_verifiers_questions_are_those_of_best_of():
    """builtin:align trains what best_of.py asks, word for word. It shows shapes only, in six of ten
    scenes two different ones."""
    asked, pairs = collections.Counter(), 0
    for r in records("builtin:align", 400, 1):
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
    """One or two different shapes, all named in the order of the scene; rarely a relation, always
    a true one; a background seven times in ten."""
    said = collections.Counter()
    for r in records("builtin:brief", 400, 1):
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
    """A change of one attribute leaves most words of the caption in place. Without other scenes to
    describe, as in builtin:align, all prompts change one."""
    close = []
    for i in range(600):
        s = world.scene("builtin:qa", 0, i)
        rand, more = random_stream("t", i), itertools.count(1000 * (i + 1))
        other = lambda: world.scene("builtin:qa", 0, next(more))
        text = world.wrong_description(s, rand, other if others else None)
        assert text != world.caption(s)
        close.append(text.endswith(world.background_words(s.background) + " background")
                     or text.startswith(world.describe(world.groups(s), world.relation_of(s))))
    assert low <= np.mean(close) <= high


def test_records_of_all_sources():
    for source, size in world.BUILTIN.items():
        r = Mixture([source], 16)[3]
        assert r["image"].shape == (16, 16, 3) and r["source"] == source
        assert np.array_equal(r["image"], world.render(r["scene"], 16))
        asks = source in ("builtin:qa", "builtin:align")
        assert r["task"] == ("qa" if asks else "t2i") and (r["caption"] is None) == asks
        assert ["<image>" in t["value"] for t in r["conversations"]] == [asks, not asks]
        assert size in (None, 600)


@pytest.mark.parametrize("script, words", [
    (data, "data.py show builtin:web"), (train_dit, "train_dit.py --dry-run"),
    (evaluate, "evaluate.py t2i"), (evaluate, "evaluate.py colours --run x")],
    ids=["show", "dry-run", "t2i", "colours"])
def test_without_the_folder_the_error_is_one_line(script, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tiny", None)                      # as if it were moved away
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit, match="2"):
        cli.main(script.main)
    said = capsys.readouterr().err
    assert said.startswith("error: this needs the toy world, whose folder tiny/ is missing")
