"""The toy world: the sources of scenes, their captions, questions and records.

    s = world.scene("builtin:web", seed, i);  world.render(s, 224);  world.caption(s)

Scene i of a source is a pure function of (source, seed, i). The sources stand in for the paper's
data (arXiv 2601.16208): `builtin:web` for web images, `builtin:synthetic` for images made by FLUX,
`builtin:text` for RenderedText, `builtin:hq` for BLIP3o-60k, `builtin:qa` for Cambrian-7M.
`builtin:align` asks only the questions of best_of.py's verifiers, about shapes. `builtin:brief`
writes short captions like a person's, which rarely mention positions and do not always name the
background. tiny/scenes.py defines a scene and draws it.
"""
import collections
import functools
import itertools
from pathlib import Path

import numpy as np

from chat import drawing
from data import hash64, random_stream
from tiny.scenes import (BACKGROUNDS, COLOURS, KINDS, SHAPES, SPRITES, STYLES, TEXTURES, Scene,
                         Thing, Word, render, sprite)

BUILTIN = {"builtin:web": None, "builtin:synthetic": None, "builtin:text": None,
           "builtin:hq": 600, "builtin:qa": None,
           "builtin:align": None, "builtin:brief": None}    # source -> scenes; None: endless
LISTS = (Path(__file__).parent / "words.txt").read_text().split("\n\n")
WORDS, NEW_WORDS = (tuple(text.split()) for text in LISTS)  # NEW_WORDS: the benchmark's alone
NUMBERS = ("no", "one", "two", "three", "four")
PLURALS = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
PLURALS.update({name: plural for name, (plural, _, _) in SPRITES.items()})
RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def pick(rand, items):
    """Return one of the items. rand: returns a float in [0, 1)."""
    return items[int(rand() * len(items))]


# ------------------------------------------------------------------------------------------------
# Scenes
# ------------------------------------------------------------------------------------------------

def relation(a: Thing, b: Thing):
    """Return where a is as seen from b: a key of RELATIONS, or None when it is not clear."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) >= 0.25 and abs(dx) >= 1.5 * abs(dy):
        return "left of" if dx > 0 else "right of"
    if abs(dy) >= 0.25 and abs(dy) >= 1.5 * abs(dx):
        return "above" if dy > 0 else "below"
    return None


@functools.lru_cache(maxsize=1 << 18)
def held_out(*parts: str) -> bool:
    """Tell whether this composition is kept out of every training source; one in 20 is.

    parts: (object, colour) or (object, object, relation), the objects without their colours. "a
    left of b" and "b right of a" are one composition.
    """
    if len(parts) == 3 and parts[2] in ("right of", "below"):
        parts = parts[1], parts[0], RELATIONS[parts[2]]
    # This salt holds out four of the 64 coloured shapes, with four shapes and four colours.
    return hash64("held out 47", *parts) % 20 == 0


def is_held_out(scene: Scene) -> bool:
    """Tell whether the scene shows a held-out composition, even if its caption does not name it."""
    return (any(t.colour and held_out(t.kind, t.colour) for t in scene.things)
            or any(held_out(a.kind, b.kind, relation(a, b))
                   for a, b in itertools.combinations(scene.things, 2) if relation(a, b)))


def distance(a, b) -> np.ndarray:
    """Return the perceived distance of colours [...,3] ("redmean"; black to white is 765)."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    red, d = (a[..., 0] + b[..., 0]) / 2, (a - b) ** 2
    return np.sqrt((2 + red / 256) * d[..., 0] + 4 * d[..., 1] + (3 - red / 256) * d[..., 2])


@functools.lru_cache(maxsize=None)
def apart(kind: str, colour: str, tone: tuple) -> bool:
    """Tell whether a shape, or more than 70 % of a sprite's pixels, differ clearly from a tone."""
    if colour:
        return distance(COLOURS[colour], tone) > 200
    pixels = np.asarray(sprite(kind, 0))
    pixels = pixels[pixels[..., 3] > 128][:, :3]
    return (distance(pixels, tone) < 120).mean() < 0.3


def stands_out(thing: Thing, background: tuple) -> bool:
    """Tell whether a thing differs clearly from every tone of a background."""
    tones = [BACKGROUNDS[b] for b in background[1:3] if b in BACKGROUNDS]
    if background[0] == "gradient":                       # its middle may look like the thing
        tones.append(tuple(sum(v) // 2 for v in zip(*tones)))
    return all(apart(thing.kind, thing.colour, tone) for tone in tones)


def place(rand, n: int, neat: bool) -> list:
    """Return [(size, x, y)] of n things whose square boxes lie inside the image and do not touch.
    neat: on a regular grid."""
    margin, gap = 0.02, 0.04
    wobble = (lambda room: 0.0) if neat else (lambda room: (2 * rand() - 1) * room)
    size = lambda lo, hi: round(64 * (hi - 0.02 if neat else lo + (hi - lo) * rand())) / 64
    if n == 1:
        s = size(0.45, 0.8)
        return [(s, *(0.5 + wobble(0.5 - margin - s / 2) for _ in "xy"))]
    if n == 2:                                            # along an axis, with some freedom across
        s, s2 = size(0.3, 0.45), size(0.3, 0.45)
        room = 1 - 2 * margin - gap - s - s2
        start, between = (0.25, 0.5) if neat else (rand(), rand())
        a = margin + room * start + s / 2
        b = a + s / 2 + gap + room * (1 - start) * between + s2 / 2
        tilt = 1.0 if rand() < 0.25 else 0.35             # a quarter is diagonal
        out = [(k, at, 0.5 + wobble(tilt * (0.5 - margin - k / 2))) for k, at in ((s, a), (s2, b))]
    elif n == 3 and rand() < 0.5:                         # in a row
        level, sizes = wobble(0.25), [size(0.25, 0.29) for _ in range(3)]
        out = [(s, (k + 0.5) / 3 + wobble((1 / 3 - s) / 2 - 0.015), 0.5 + level + wobble(0.08))
               for k, s in enumerate(sizes)]
    else:                                                 # in the quarters of the image
        sizes = [size(0.25, 0.36) for _ in range(4)]
        out = [(s, *(0.25 + 0.5 * at + wobble(0.25 - margin - s / 2) for at in (k % 2, k // 2)))
               for k, s in enumerate(sizes)]
        return sorted(out, key=lambda _: rand())[:n]
    if rand() < 0.4:
        out = [(s, y, x) for s, x, y in out]              # a column
    return out if rand() < 0.5 else out[::-1]


def compose(rand, sprites: bool, neat: bool, forms: tuple):
    """Return a scene of one to four things on a background of one of `forms`; None if it is held
    out, or if none of ten backgrounds differs clearly from the things."""
    u, kinds, colours = rand(), KINDS if sprites else SHAPES, tuple(COLOURS)
    n = 1 if u < 0.45 else 2 if u < 0.80 else 3 if u < 0.90 else 4
    same = rand() < (0.25 if n == 2 else 0.8)             # most scenes of 3 or 4 teach counting
    what = [(pick(rand, kinds), None if sprites else pick(rand, colours)) for _ in range(n)]
    things = []
    for k, (size, x, y) in enumerate(place(rand, n, neat)):
        angle = 0 if neat else 6 * int(5 * rand()) - 12
        light = 1.0 if neat or not sprites else 1 - 0.08 * int(4 * rand())
        things.append(Thing(*what[0 if same else k], size, x, y, angle, light))
    names = tuple(BACKGROUNDS)
    for _ in range(10):
        form, a, b = pick(rand, forms), pick(rand, names), pick(rand, names)
        if form == "plain":
            background = form, a
        elif form == "textured":
            background = form, a, pick(rand, TEXTURES)
        else:
            background = form, a, b, pick(rand, ("across", "down"))
        if a != b and all(stands_out(t, background) for t in things):
            s = Scene(background, tuple(things))
            return None if is_held_out(s) else s
    return None


def write_words(rand) -> Scene:
    """Return a scene of one or two words in one colour, which differs clearly from the plain
    background."""
    colour, style, two = pick(rand, tuple(COLOURS)), pick(rand, STYLES), rand() < 0.35
    names = [b for b in BACKGROUNDS if distance(BACKGROUNDS[b], COLOURS[colour]) > 250]
    background, words = ("plain", pick(rand, names)), []
    for k in range(1 + two):
        text = pick(rand, WORDS)
        width = round(64 * min(0.92, 0.2 * len(text)) * (0.75 + 0.25 * rand())) / 64
        x = 0.5 + (2 * rand() - 1) * (0.48 - width / 2)
        y = (0.3 + 0.4 * k if two else 0.5) + (rand() - 0.5) * (0.12 if two else 0.5)
        words.append(Word(text, colour, style, width, x, y))
    return Scene(background, (), tuple(words))


def scene(source: str, seed: int, i: int) -> Scene:
    """Return scene i of a built-in source: a pure function of the arguments, without held-out
    compositions. The 600 scenes of builtin:hq do not depend on the seed."""
    rand = random_stream("scene", source, 0 if BUILTIN[source] else seed, i)
    if source == "builtin:text":
        return write_words(rand)
    while True:
        if source == "builtin:web":
            s = compose(rand, True, False, ("plain", "two-tone", "gradient", "textured"))
        elif source == "builtin:synthetic":
            s = compose(rand, False, False, ("plain",))
        elif source == "builtin:brief":     # two different things, or in two scenes of five one
            s = compose(rand, False, False, ("plain",))
            if s and len(s.things) != len(groups(s)):       # two things are the same
                s = None
            elif s and len(s.things) != (1 if rand() < 0.25 else 2):
                s = None
        elif source == "builtin:hq":
            s = compose(rand, rand() < 0.7, True, ("plain", "plain", "gradient"))
        else:                           # qa; align without sprites, which take longer to learn
            s = compose(rand, source == "builtin:qa" and rand() < 0.5, False,
                        ("plain", "plain", "two-tone", "gradient"))
            if source == "builtin:align" and s and len(groups(s)) != 2 and rand() < 0.8:
                continue                # to check two things is learned later than one
        if s:
            return s


# ------------------------------------------------------------------------------------------------
# Captions and questions
# ------------------------------------------------------------------------------------------------

def noun(kind: str, colour=None, count: int = 1, article: bool = True) -> str:
    """Return `a red circle` or `two cats`; without the article `red circle`."""
    name = (colour + " " if colour else "") + (kind if count == 1 else PLURALS[kind])
    if count > 1:
        return f"{NUMBERS[count]} {name}" if article else name
    vowel = name[0] in "aeiou" and not name.startswith(("unicorn", "ufo")) or name == "hourglass"
    return f"{'an' if vowel else 'a'} {name}" if article else name


def groups(scene: Scene) -> list:
    """Return [(kind, colour, count)] of the things, in the scene's order."""
    counts = collections.Counter((t.kind, t.colour) for t in scene.things)
    return [(*what, count) for what, count in counts.items()]


def background_words(background: tuple) -> str:
    """Return `white`, `white and pink`, `white to pink gradient` or `dotted white`."""
    form = {"plain": "{1}", "two-tone": "{1} and {2}", "gradient": "{1} to {2} gradient",
            "textured": "{2} {1}"}[background[0]]
    return form.format(*background)


def describe(items: list, where=None, background=None) -> str:
    """Describe (kind, colour, count) groups, the relation of the first two, and a background."""
    names = [noun(*g) for g in items]
    if where:
        text = f"{names[0]} {where} {names[1]}"
    elif len(names) > 1:
        text = ", ".join(names[:-1]) + " and " + names[-1]
    else:
        text = names[0]
    return f"{text} on a {background_words(background)} background" if background else text


def relation_of(scene: Scene):
    """Return the relation of a scene's two things if they differ, else None."""
    return relation(*scene.things) if len(scene.things) == 2 == len(groups(scene)) else None


def caption(scene: Scene, rand=None, web: bool = False) -> str:
    """Return a true caption: without `rand` a complete one.

    With rand, six captions in ten name a relation. With `web` too, captions have the forms of alt
    text, four in ten name a relation, and a fifth of all leave something out. The caption of words
    is always complete.
    """
    if scene.words:
        w = scene.words[0]
        text = " ".join(w.text for w in scene.words)
        on = background_words(scene.background)
        return f'the word{"s" if len(scene.words) > 1 else ""} "{text}" in {w.colour} on {on}'
    items, where = groups(scene), relation_of(scene)
    if rand and rand() >= (0.4 if web else 0.6):
        where = None
    if not web:
        return describe(items, where, scene.background)
    text, on = describe(items, where), background_words(scene.background) + " background"
    if rand() < 0.2:                                      # as alt text often does
        kind, _, count = pick(rand, items)
        category = SPRITES[kind][1] if kind in SPRITES else "object"
        return pick(rand, (text, noun(kind, None, 2 if count > 1 else 1, False), f"{kind} picture",
                           f"{category} image", f"a photo of {text}", on))
    return pick(rand, (f"{text} on a {on}", f"a photo of {text} on a {on}", f"{text}, {on}",
                       f"a {on} with {text}", f"picture of {text}, {on}",
                       f"{text[0].upper()}{text[1:]} on a {on}."))


def wrong_description(scene: Scene, rand, other=None):
    """Return a caption that is false for the scene and names no held-out composition.

    It differs from the true one in one attribute. other: a function that returns further scenes;
    then half of the captions describe one of these, with other kinds and another background.
    """
    items, where, background = groups(scene), relation_of(scene), scene.background
    shapes = scene.things[0].colour is not None
    taken = {g[0] for g in items}
    if other and rand() < 0.5:
        while True:
            s = other()
            if s.background != background and not taken & {t.kind for t in s.things}:
                return describe(groups(s), relation_of(s), s.background)
    while True:
        new, at, new_where, bg = list(items), int(rand() * len(items)), where, background
        kind, colour, count = new[at]
        what = pick(rand, ("kind", "count", "background", "colour" if shapes else "kind",
                           "relation" if where else "kind"))
        if what == "kind":
            kind = pick(rand, SHAPES if shapes else KINDS)
            good = kind not in taken
        elif what == "colour":
            colour = pick(rand, tuple(COLOURS))
            good = all((kind, colour) != g[:2] for g in items)
        elif what == "count":                             # "one" is also true where there are two
            old, count, new_where = count, 2 + int(3 * rand()), None
            good = count != old and sum(g[2] for g in items) + count - old <= 4
        elif what == "relation":
            new_where, good = RELATIONS[where], True
        else:
            bg = ("plain", pick(rand, tuple(BACKGROUNDS)))
            good = background[0] == "plain" and bg != background
        new[at] = kind, colour, count
        if (good and not (colour and held_out(kind, colour))
                and not (new_where and held_out(new[0][0], new[1][0], new_where))):
            return describe(new, new_where, bg)


def question(scene: Scene, rand, other, verify=False) -> tuple:
    """Return (kind, question, answer) about a scene with things.

    other: returns further scenes. verify: only the two kinds that best_of.py asks, in its words;
    then all wrong prompts differ in one attribute, because bad candidates do.
    """
    items, where = groups(scene), relation_of(scene)
    kind, colour, count = pick(rand, items)
    total = sum(g[2] for g in items if g[0] == kind)
    sentence = lambda s: s[0].upper() + s[1:] + "."
    form = pick(rand, ("describe", "align") if verify else
                ("what", "count", "colour", "where" if where else "what", "exists", "align"))
    if form == "describe":
        return form, "Describe this image.", caption(scene)
    if form == "what":
        q = pick(rand, ("What is in the picture?", "What does this image show?",
                        "What do you see?"))
        return form, q, sentence(describe(items))
    if form == "count":
        q = pick(rand, ("How many {} are there?", "How many {} do you see?"))
        return form, q.format(PLURALS[kind]), sentence(NUMBERS[total])
    if form == "colour":
        if colour and total == count and rand() < 0.7:
            q = f"What colour {'is' if count == 1 else 'are'} the {noun(kind, None, count, False)}?"
            return form, q, sentence(colour)
        return form, "What colour is the background?", sentence(background_words(scene.background))
    if form == "where":
        a, b = (noun(*g, article=False) for g in items)
        return form, f"Where is the {a}?", sentence(f"{where} the {b}")
    if form == "exists":
        taken, yes = {g[0] for g in items}, rand() < 0.5
        while not yes and kind in taken:
            kind = pick(rand, SHAPES if colour else KINDS)
        return form, f"Is there {noun(kind)} in the picture?", "Yes." if yes else "No."
    yes = rand() < 0.5
    text = caption(scene) if yes else wrong_description(scene, rand, None if verify else other)
    return form, f"Does this image align with the prompt: {text}?", "Yes." if yes else "No."


def builtin_record(source: str, seed: int, i: int, resolution: int) -> dict:
    """Return record i of a built-in source, with the keys that data.Mixture describes.
    resolution 0: without an image."""
    s = scene(source, seed, i)
    rand = random_stream("text", source, seed, i)
    out = {"key": f"{source}/{i}", "task": "t2i", "scene": s,
           "image": render(s, resolution) if resolution else None}
    if source in ("builtin:qa", "builtin:align"):
        more = itertools.count(1)
        other = lambda: scene(source, seed, i + 1000 * next(more))
        out["task"], out["caption"] = "qa", None
        out["question"], q, a = question(s, rand, other, source == "builtin:align")
        out["conversations"] = [{"from": "human", "value": f"<image>\n{q}"},
                                {"from": "gpt", "value": a}]
        return out
    if source == "builtin:brief":
        where = relation_of(s) if rand() < 0.2 else None
        out["caption"] = describe(groups(s), where, s.background if rand() < 0.7 else None)
    elif source == "builtin:hq":
        out["caption"] = caption(s)
    else:
        out["caption"] = caption(s, rand, source == "builtin:web")
    out["conversations"] = drawing(out["caption"], rand)
    return out
