"""Images with text: the built-in world, folders, JSONL files, WebDataset tars, and their mixtures.

    python data.py show   --source builtin:web --out sheet.png      # a contact sheet with captions
    python data.py export --source builtin:web --count 10000 --out shards/
    python data.py check  shards/                                   # reads everything

The stream is random access: sample n of a mixture is a pure function of (specs, resolution, seed,
n). n decides the source and the place in it, and from these follow the record, its caption and its
crop. So the whole state of the stream is the integer n, whatever the number of ranks and workers: a
rank takes its slice of n, a worker any of them. This is why a run does not change with its mesh.

The built-in world stands in for the paper's data (arXiv 2601.16208): `builtin:web` for web images,
`builtin:synthetic` for FLUX-generated ones, `builtin:text` for RenderedText, `builtin:hq` for
BLIP3o-60k, `builtin:qa` for Cambrian-7M; `builtin:align` asks, about shapes alone, what the
verifiers of best_of.py ask. A scene is a structure that renders at any resolution.
"""
import argparse
import collections
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tarfile
import textwrap
import zlib
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps


class DataError(Exception):
    """One line for the user: what is wrong, the value found, what was expected, what fixes it."""


# ------------------------------------------------------------------------------------------------
# Randomness: everything below is keyed by a hash, so that it is the same on every machine
# ------------------------------------------------------------------------------------------------

def hash64(*parts) -> int:
    """64-bit hash of the parts; Python's own hash() differs from process to process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def generator(*key):
    """A function that gives floats in [0, 1). Python promises the sequence of random() for ever,
    that of choice() and shuffle() it does not, so nothing else is used."""
    return random.Random(hash64(*key)).random


def pick(rand, items):
    return items[int(rand() * len(items))]


def permutation(n: int, *key) -> np.ndarray:
    """int64 [n]: the order that sorts splitmix64 of a counter (numpy's may change by version)."""
    x = np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(hash64(*key))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


# ------------------------------------------------------------------------------------------------
# The built-in world: scenes
# ------------------------------------------------------------------------------------------------

COLOURS = {"red": (214, 30, 40), "orange": (250, 125, 15), "yellow": (252, 222, 20),
           "green": (25, 140, 50), "blue": (30, 75, 220), "purple": (135, 35, 175),
           "black": (20, 20, 24), "white": (252, 252, 252)}
BACKGROUNDS = {"white": (248, 248, 248), "black": (16, 16, 20), "grey": (142, 142, 146),
               "pink": (250, 180, 205), "light blue": (165, 212, 248),
               "light green": (178, 232, 165), "beige": (232, 212, 170), "brown": (112, 70, 42)}
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "ring")
TEXTURES = ("striped", "dotted", "checkered")
STYLES = ("regular", "bold", "outlined", "slanted", "wide")   # of letters: Pillow ships one font
NUMBERS = ("no", "one", "two", "three", "four")
WORDS = tuple("""
ACID AGE AIR ANT APPLE ARCH ARM ARROW ART ATOM BABY BACK BAG BALL BAND BANK BARK BARN BASE BATH
BEACH BEAN BEAR BEE BELL BELT BENCH BIKE BIRD BLOCK BOAT BODY BONE BOOK BOOT BOSS BOWL BOX BRAIN
BREAD BRICK BRUSH BUG BUS CAB CAKE CAMP CAN CAP CAR CARD CART CASE CASH CAT CAVE CHAIR CHALK CHEF
CHIP CITY CLAY CLIFF CLOCK CLOUD CLUB COAL COAST COAT CODE COIN COLD COOK CORK CORN COW CREAM CROW
CROWN CUP DAD DAWN DAY DEAL DEER DESK DICE DISH DOG DOLL DOOR DOT DOVE DRUM DUCK DUSK DUST EAR EAST
EGG ELM EXIT EYE FACE FACT FAN FARM FAST FIRE FISH FLAG FLUTE FOG FOOD FOOT FORK FOX FREE FROG FUEL
FUN GAME GATE GEM GIFT GLASS GLOVE GLUE GOAL GOAT GOLF GRAIN GRASS GYM HAIR HALL HAND HARP HAT HAWK
HERO HILL HOME HOOK HOPE HORN HORSE HOT HOTEL HOUSE ICE INK IRON JAM JAR JAZZ JEEP JET JOB JOKE JOY
JUICE JUMP KEY KID KIND KING KITE KNEE KNIFE LACE LAKE LAMB LAMP LAND LAVA LAW LEAF LEG LEMON LIFE
LIGHT LION LOCK LOVE LUCK LUNCH MAGIC MAP MARKET MASK MILK MIND MINT MOM MONEY MOON MOUSE MOVIE MUD
MUSIC NAIL NAME NECK NEST NET NEWS NIGHT NORTH NOSE NOTE NUT OAK OCEAN OIL ONE OPEN OWL PAGE PAN
PAPER PARK PARTY PATH PEACE PEAR PEN PIANO PIG PILOT PINE PIPE PIZZA PLANE PLANT POEM POND POOL PORT
POST QUEEN QUIET QUIZ RADIO RAIN RICE RIDE RING RIVER ROAD ROBOT ROCK ROOF ROOM ROOT ROPE ROSE RUN
SAIL SALE SALT SAND SEA SEED SHIP SHOE SHOP SHOW SILK SKY SLOW SNOW SOAP SOCK SODA SOUP SOUTH SPACE
SPOON STAR STEAM STONE STOP STORM SUGAR SUN SWAN TAXI TEA TEAM TENT TIGER TIME TOAST TOP TOWN TOY
TRAIN TREE TRUCK VASE VOICE WALL WATER WAVE WEST WHALE WIND WOLF WOOD WOOL WORD YARD ZEBRA ZERO
ZOO""".split())
SPRITES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets", "sprites.tar")


def read_sprites() -> dict:
    """name -> (plural, category, PNG bytes) of the pictures in assets/sprites.tar."""
    if not os.path.exists(SPRITES):
        raise DataError(f"{SPRITES} is missing: the pictures of the built-in data, part of this "
                        "repository; `git checkout assets/sprites.tar` brings it back")
    rename = {"ring": "diamond ring", "diamond": "gemstone"}   # the bare names are shapes here
    with tarfile.open(SPRITES) as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    out = {}
    for info in (json.loads(files[f]) for f in files if f.endswith(".json")):
        name = rename.get(info["name"], info["name"])
        plural = info["plural"] if name == info["name"] else name + "s"
        out[name] = plural, info["category"], files[info["name"].replace(" ", "_") + ".png"]
    return out


_SPRITES = read_sprites()
KINDS = tuple(_SPRITES)
PLURALS = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
PLURALS.update({name: plural for name, (plural, _, _) in _SPRITES.items()})


@dataclass(frozen=True)
class Thing:
    """A shape (one of SHAPES, with a colour) or a sprite (one of KINDS, colour None). `size` is its
    longer side and (x, y) its centre, in fractions of the image, y down; degrees, anticlockwise."""
    kind: str
    colour: str = None
    size: float = 0.6
    x: float = 0.5
    y: float = 0.5
    angle: float = 0.0
    brightness: float = 1.0      # of sprites, 0 to 1


@dataclass(frozen=True)
class Word:
    """A word in capitals; `size` is its width, (x, y) its centre, in fractions of the image."""
    text: str
    colour: str
    style: str = "regular"
    size: float = 0.8
    x: float = 0.5
    y: float = 0.5


@dataclass(frozen=True)
class Scene:
    """`background` is ("plain", colour), ("two-tone" or "gradient", colour, colour, direction) or
    ("textured", colour, texture), the direction "across" or "down"; the lists are above."""
    background: tuple
    things: tuple = ()
    words: tuple = ()


RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def relation(a: Thing, b: Thing):
    """Where a is as seen from b: a key of RELATIONS, or None when no one would be sure."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) >= 0.25 and abs(dx) >= 1.5 * abs(dy):
        return "left of" if dx > 0 else "right of"
    if abs(dy) >= 0.25 and abs(dy) >= 1.5 * abs(dx):
        return "above" if dy > 0 else "below"
    return None


@functools.lru_cache(maxsize=1 << 18)
def held_out(*parts: str) -> bool:
    """Is this composition kept out of every training source? One in 20 is. `parts` is (object,
    colour) or (object, object, relation), objects without their colours; "a left of b" and "b right
    of a" are one composition."""
    if len(parts) == 3 and parts[2] in ("right of", "below"):
        parts = parts[1], parts[0], RELATIONS[parts[2]]
    # The salt holds out four of the 64 coloured shapes, of four shapes and four colours.
    return hash64("held out 47", *parts) % 20 == 0


def is_held_out(scene: Scene) -> bool:
    """Does the scene show a held-out composition, whether or not its caption would say so?"""
    return (any(t.colour and held_out(t.kind, t.colour) for t in scene.things)
            or any(held_out(a.kind, b.kind, relation(a, b))
                   for a, b in itertools.combinations(scene.things, 2) if relation(a, b)))


def distance(a, b) -> np.ndarray:
    """Perceived distance of colours [..., 3] (the "redmean" formula; black to white is 765)."""
    a, b = np.asarray(a, float), np.asarray(b, float)
    red, d = (a[..., 0] + b[..., 0]) / 2, (a - b) ** 2
    return np.sqrt((2 + red / 256) * d[..., 0] + 4 * d[..., 1] + (3 - red / 256) * d[..., 2])


@functools.lru_cache(maxsize=None)
def apart(kind: str, colour: str, tone: tuple) -> bool:
    """Is a shape, or are at least 70 % of a sprite's pixels, far in colour from an RGB tone?"""
    if colour:
        return distance(COLOURS[colour], tone) > 200
    pixels = np.asarray(sprite(kind, 0))
    pixels = pixels[pixels[..., 3] > 128][:, :3]
    return (distance(pixels, tone) < 120).mean() < 0.3


def stands_out(thing: Thing, background: tuple) -> bool:
    tones = [BACKGROUNDS[b] for b in background[1:3] if b in BACKGROUNDS]
    if background[0] == "gradient":                       # half way it may be the thing
        tones.append(tuple(sum(v) // 2 for v in zip(*tones)))
    return all(apart(thing.kind, thing.colour, tone) for tone in tones)


def place(rand, n: int, neat: bool) -> list:
    """[(size, x, y)] of n things whose square boxes lie inside the image and apart from each other.
    `neat` puts them on a regular grid."""
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
    """A scene of one to four things on a background of one of `forms`; None if it is held out, or
    if the things stand out from no background."""
    u, kinds, colours = rand(), KINDS if sprites else SHAPES, tuple(COLOURS)
    n = 1 if u < 0.45 else 2 if u < 0.80 else 3 if u < 0.90 else 4
    same = rand() < (0.25 if n == 2 else 0.8)             # three and four are mostly for counting
    what = [(pick(rand, kinds), None if sprites else pick(rand, colours)) for _ in range(n)]
    things = []
    for k, (size, x, y) in enumerate(place(rand, n, neat)):
        angle = 0 if neat else 6 * int(5 * rand()) - 12
        light = 1.0 if neat or not sprites else 1 - 0.08 * int(4 * rand())
        things.append(Thing(*what[0 if same else k], size, x, y, angle, light))
    names = tuple(BACKGROUNDS)
    for _ in range(10):
        form, a, b = pick(rand, forms), pick(rand, names), pick(rand, names)
        background = (form, a) if form == "plain" else (form, a, pick(rand, TEXTURES)) \
            if form == "textured" else (form, a, b, pick(rand, ("across", "down")))
        if a != b and all(stands_out(t, background) for t in things):
            s = Scene(background, tuple(things))
            return None if is_held_out(s) else s
    return None


def write_words(rand) -> Scene:
    """One or two words in one colour, which is far from that of the plain background."""
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


BUILTIN = {"builtin:web": None, "builtin:synthetic": None, "builtin:text": None,
           "builtin:hq": 600, "builtin:qa": None,
           "builtin:align": None}   # source -> number of scenes; None: endless


def scene(source: str, seed: int, i: int) -> Scene:
    """Scene i of a built-in source, a pure function of its arguments. It shows no held-out
    composition. The 600 of builtin:hq do not depend on the seed. Raises DataError."""
    if source not in BUILTIN:
        raise DataError(f"unknown source {source!r}; the built-in ones are {', '.join(BUILTIN)}")
    if BUILTIN[source]:
        seed, i = 0, i % BUILTIN[source]
    rand = generator("scene", source, seed, i)
    if source == "builtin:text":
        return write_words(rand)
    while True:
        if source == "builtin:web":
            s = compose(rand, True, False, ("plain", "two-tone", "gradient", "textured"))
        elif source == "builtin:synthetic":
            s = compose(rand, False, False, ("plain",))
        elif source == "builtin:hq":
            s = compose(rand, rand() < 0.7, True, ("plain", "plain", "gradient"))
        else:                           # qa; align without sprites, which want far longer training
            s = compose(rand, source == "builtin:qa" and rand() < 0.5, False,
                        ("plain", "plain", "two-tone", "gradient"))
        if s:
            return s


# ------------------------------------------------------------------------------------------------
# The built-in world: pictures
# ------------------------------------------------------------------------------------------------

def outline(kind: str) -> list:
    """Corners [(x, y)] of a shape, y down, in its own units."""
    turn = lambda n, start, radius=lambda k: 1.0: [
        (radius(k) * math.sin(start + 2 * math.pi * k / n),
         -radius(k) * math.cos(start + 2 * math.pi * k / n)) for k in range(n)]
    if kind == "circle" or kind == "ring":
        return turn(180, 0.0)
    if kind == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if kind == "triangle":
        return turn(3, 0.0)
    if kind == "star":
        return turn(10, 0.0, lambda k: 0.42 if k % 2 else 1.0)
    if kind == "diamond":
        return [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)]
    if kind == "cross":
        a = 0.34
        return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a),
                (-1, a), (-1, -a), (-a, -a)]
    if kind == "heart":
        ts = (2 * math.pi * k / 120 for k in range(120))
        return [(16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t)
                                          - 2 * math.cos(3 * t) - math.cos(4 * t))) for t in ts]
    raise DataError(f"unknown kind {kind!r}: neither a shape nor a sprite")


@functools.lru_cache(maxsize=4096)
def shape(kind: str, angle: int, px: int) -> Image.Image:
    """Anti-aliased mask (mode L) of a shape; its longer side is px pixels."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    points = np.array([(c * x + s * y, c * y - s * x) for x, y in outline(kind)])
    low, high = points.min(0), points.max(0)
    scale = px / (high - low).max()                       # pixels a unit
    w, h = (max(1, round(v)) for v in (high - low) * scale)
    scale = 4 * scale                                     # drawn at four times the size
    image = Image.new("L", (4 * w, 4 * h))
    points = (points - (low + high) / 2) * scale + (2 * w - 0.5, 2 * h - 0.5)
    draw = ImageDraw.Draw(image)
    draw.polygon([tuple(p) for p in points.tolist()], fill=255)
    if kind == "ring":
        middle = points.mean(0)
        draw.polygon([tuple(p) for p in ((points - middle) * 0.58 + middle).tolist()], fill=0)
    return image.reduce(4)


@functools.lru_cache(maxsize=2048)
def sprite(kind: str, angle: int) -> Image.Image:
    """RGBA picture of a sprite at its own size (about 64 pixels), turned, cut to what shows."""
    if kind not in _SPRITES:
        raise DataError(f"unknown kind {kind!r}: neither a shape nor a sprite")
    image = Image.open(io.BytesIO(_SPRITES[kind][2])).convert("RGBA")
    image = image.rotate(angle, Image.BICUBIC, expand=True) if angle else image
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())


def sprite_at(kind: str, angle: int, brightness: float, px: int) -> Image.Image:
    """RGBA picture of a sprite; its longer side is px pixels. (Too many to cache.)"""
    image = sprite(kind, angle)
    scale = px / max(image.size)
    image = image.resize([max(1, round(v * scale)) for v in image.size], Image.BICUBIC)
    dark = (round(255 * brightness),) * 3 + (255,)
    return ImageChops.multiply(image, Image.new("RGBA", image.size, dark))


@functools.lru_cache(maxsize=2048)
def letters(text: str, style: str) -> Image.Image:
    """Mask (mode L) of a word, about 48 pixels high, cut to what shows."""
    font = ImageFont.load_default(64)
    stroke = {"bold": 3, "outlined": 4}.get(style, 0)
    left, top, right, bottom = font.getbbox(text, stroke_width=stroke)
    size, at = (right - left + 48, bottom - top + 8), (24 - left, 4 - top)
    image = Image.new("L", size)
    draw = ImageDraw.Draw(image)
    draw.text(at, text, fill=255, font=font, stroke_width=stroke, stroke_fill=255)
    if style == "outlined":
        draw.text(at, text, fill=0, font=font)
    if style == "slanted":
        image = image.transform(size, Image.AFFINE, (1, 0.3, -0.15 * size[1], 0, 1, 0),
                                Image.BICUBIC)
    image = image.crop(image.getbbox())
    return image.resize((round(1.5 * image.width), image.height)) if style == "wide" else image


@functools.lru_cache(maxsize=256)
def backdrop(background: tuple, resolution: int) -> Image.Image:
    """RGB picture of a background."""
    form, first, *rest = background
    a = np.array(BACKGROUNDS[first], np.int64)
    if form == "textured":                                # a pattern in a shade of the same colour
        shade = tuple((a + (26 if a.mean() < 60 else -26)).clip(0, 255).tolist())
        r, cell = 4 * resolution, resolution / 2          # drawn at four times the size: 8 cells
        image = Image.new("RGB", (r, r), BACKGROUNDS[first])
        draw = ImageDraw.Draw(image)
        for y, x in itertools.product(range(8), range(8)):
            left, top, right, bottom = (round(v * cell) for v in (x, y, x + 1, y + 1))
            if rest[0] == "dotted":
                d = round(cell / 4)
                draw.ellipse((left + d, top + d, right - d - 1, bottom - d - 1), shade)
            elif (x if rest[0] == "striped" else x + y) % 2:
                draw.rectangle((left, top, right - 1, bottom - 1), shade)
        return image.reduce(4)
    if form == "plain":
        return Image.new("RGB", (resolution, resolution), BACKGROUNDS[first])
    b, ramp = np.array(BACKGROUNDS[rest[0]], np.int64), np.arange(resolution)[:, None]
    if form == "two-tone":
        line = np.where(ramp < resolution // 2, a, b)                            # [R, 3]
    else:
        line = (a * (resolution - 1 - ramp) + b * ramp) // max(1, resolution - 1)
    pixels = np.broadcast_to(line[:, None], (resolution, resolution, 3)).astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 0, 2).copy() if rest[1] == "across" else pixels)


def render(scene: Scene, resolution: int) -> np.ndarray:
    """uint8 [R, R, 3] RGB, anti-aliased. Sizes and angles are rounded to whole pixels and degrees
    before anything is looked up, so the caches change the speed and never a pixel."""
    image = backdrop(scene.background, resolution).copy()
    for t in scene.things:
        px, angle = max(1, round(t.size * resolution)), round(t.angle)
        if t.colour:
            ink, mask = COLOURS[t.colour], shape(t.kind, angle, px)
        else:
            ink = mask = sprite_at(t.kind, angle, t.brightness, px)
        x, y = (round(v * resolution - m / 2) for v, m in zip((t.x, t.y), mask.size))
        image.paste(ink, (x, y, x + mask.width, y + mask.height), mask)
    for w in scene.words:
        mask = letters(w.text, w.style)
        width = max(1, round(w.size * resolution))
        height = max(1, min(round(width * mask.height / mask.width), round(0.4 * resolution)))
        mask = mask.resize((width, height), Image.BICUBIC)
        x, y = round(w.x * resolution - width / 2), round(w.y * resolution - height / 2)
        image.paste(COLOURS[w.colour], (x, y, x + width, y + height), mask)
    return np.array(image)


# ------------------------------------------------------------------------------------------------
# The built-in world: captions and questions
# ------------------------------------------------------------------------------------------------

def noun(kind: str, colour=None, count: int = 1, article: bool = True) -> str:
    """`a red circle`, `two cats`, without the article `red circle`."""
    name = (colour + " " if colour else "") + (kind if count == 1 else PLURALS[kind])
    if count > 1:
        return f"{NUMBERS[count]} {name}" if article else name
    vowel = name[0] in "aeiou" and not name.startswith(("unicorn", "ufo")) or name == "hourglass"
    return f"{'an' if vowel else 'a'} {name}" if article else name


def groups(scene: Scene) -> list:
    """[(kind, colour, count)] of the things, in the scene's order."""
    counts = collections.Counter((t.kind, t.colour) for t in scene.things)
    return [(*what, count) for what, count in counts.items()]


def background_words(background: tuple) -> str:
    """`white`, `white and pink`, `white to pink gradient`, `dotted white`."""
    form = {"plain": "{1}", "two-tone": "{1} and {2}", "gradient": "{1} to {2} gradient",
            "textured": "{2} {1}"}[background[0]]
    return form.format(*background)


def describe(items: list, where=None, background=None) -> str:
    """One sentence from (kind, colour, count) groups, a relation of the first two, a background."""
    names = [noun(*g) for g in items]
    text = f"{names[0]} {where} {names[1]}" if where else ", ".join(names[:-1]) + (
        " and " if len(names) > 1 else "") + names[-1]
    return f"{text} on a {background_words(background)} background" if background else text


def relation_of(scene: Scene):
    """The relation of the two things of a scene that has two different ones, else None."""
    return relation(*scene.things) if len(scene.things) == 2 == len(groups(scene)) else None


def caption(scene: Scene, rand=None, web: bool = False) -> str:
    """A true caption, complete without `rand`. With it, a relation is named six times in ten; with
    `web` also, it takes the forms of alt text, a fifth of which leave something out."""
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
    if rand() < 0.2:                                      # as alt text is
        kind, _, count = pick(rand, items)
        category = _SPRITES[kind][1] if kind in _SPRITES else "object"
        return pick(rand, (text, noun(kind, None, 2 if count > 1 else 1, False), f"{kind} picture",
                           f"{category} image", f"a photo of {text}", on))
    return pick(rand, (f"{text} on a {on}", f"a photo of {text} on a {on}", f"{text}, {on}",
                       f"a {on} with {text}", f"picture of {text}, {on}",
                       f"{text[0].upper()}{text[1:]} on a {on}."))


def wrong_description(scene: Scene, rand, other=None):
    """A caption that the scene does not match, differing in one attribute (without `other`, which
    gives further scenes, always; else half of the time) or in everything; it states nothing held
    out."""
    items, where, background = groups(scene), relation_of(scene), scene.background
    shapes = scene.things[0].colour is not None
    taken = {g[0] for g in items}
    if other and rand() < 0.5:
        while True:
            s = other()
            if s.background != background and not taken & {t.kind for t in s.things}:
                return describe(groups(s), relation_of(s), s.background)
    while True:
        new, at, place, bg = list(items), int(rand() * len(items)), where, background
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
            old, count, place = count, 2 + int(3 * rand()), None
            good = count != old and sum(g[2] for g in items) + count - old <= 4
        elif what == "relation":
            place, good = RELATIONS[where], True
        else:
            bg = ("plain", pick(rand, tuple(BACKGROUNDS)))
            good = background[0] == "plain" and bg != background
        new[at] = kind, colour, count
        if (good and not (colour and held_out(kind, colour))
                and not (place and held_out(new[0][0], new[1][0], place))):
            return describe(new, place, bg)


def question(scene: Scene, rand, other, verify=False) -> tuple:
    """(type of the question, question, answer) about a scene with things. verify: only the two
    that best_of.py asks, with its words; of one prompt's candidates the bad ones are wrong in one
    attribute, so all wrong prompts are here."""
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


def prompt(text: str, rand) -> str:
    """The user's turn for a caption: as it is half of the time, else as a request."""
    if rand() < 0.5:
        return text
    text = re.sub(r"^(a photo|picture) of ", "", text.rstrip("."))
    text = text[0].lower() + text[1:] if text.startswith(("A ", "An ", "Two ", "Three ", "Four ")) \
        else text
    return pick(rand, ("Can you generate a photo of {}?", "Generate an image of {}.",
                       "Please create a picture of {}.", "Draw {}.")).format(text)


def drawing(text: str, rand) -> list:
    """The conversation of a text-to-image sample."""
    return [{"from": "human", "value": prompt(text, rand)},
            {"from": "gpt", "value": "Here you go:\n<image>"}]


def builtin_record(source: str, seed: int, i: int, resolution: int) -> dict:
    """Record i of a built-in source; see Mixture for the keys. resolution 0: no picture."""
    s = scene(source, seed, i)
    i = i % (BUILTIN[source] or i + 1)
    rand = generator("text", source, seed, i)
    out = {"key": f"{source}/{i}", "task": "t2i", "scene": s,
           "image": render(s, resolution) if resolution else None}
    if source in ("builtin:qa", "builtin:align"):
        more = itertools.count(1)
        other = lambda: scene(source, seed, i + 1000 * next(more))
        out["task"], out["caption"] = "qa", None
        out["question"], q, a = question(s, rand, other, source == "builtin:align")
        out["conversations"] = [{"from": "human", "value": f"<image>\n{q}"},
                                {"from": "gpt", "value": a}]
    else:
        complete = source == "builtin:hq"
        out["caption"] = caption(s, None if complete else rand, source == "builtin:web")
        out["conversations"] = drawing(out["caption"], rand)
    return out


# ------------------------------------------------------------------------------------------------
# The user's files. A source has a length, key(j), read(j) -> (bytes of the image, its fields), and
# parts(), the files it is made of
# ------------------------------------------------------------------------------------------------

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
# What Pillow, json and a record of the wrong form raise. Anything else is a bug and stops the run.
CORRUPT = (OSError, ValueError, LookupError, TypeError, SyntaxError, AttributeError,
           Image.DecompressionBombError)


def reason(error: Exception) -> str:
    """Its kind and words, less the address of a buffer that Pillow puts in: the same each time."""
    return f"{type(error).__name__}: {re.sub(r' <_io[^>]*>', '', str(error))}"


def read_bytes(path: str, offset: int = 0, size: int = -1) -> bytes:
    with open(path, "rb") as f:          # opened each time: nothing to share between forked workers
        f.seek(offset)
        return f.read(size)


def parse_line(line: bytes, where: str, *need: tuple) -> dict:
    """The object of a line, with one key of each tuple in `need`. Raises DataError."""
    try:
        fields = dict(json.loads(line))
    except (ValueError, TypeError) as e:
        raise DataError(f"{where}: not a JSON object ({e}): {line[:60]!r}") from None
    for keys in need:
        if not any(fields.get(k) for k in keys):
            raise DataError(f"{where}: no {' or '.join(keys)}, only "
                            f"{', '.join(fields) or 'nothing'}")
    return fields


class Folder:
    """Images below a folder, with `metadata.jsonl` (`file_name`, `text`) or same-stem .txt files;
    those without a text are left out where `text` is wanted."""
    in_order = False

    def __init__(self, path: str, text: bool):
        self.path, meta, found = path, os.path.join(path, "metadata.jsonl"), []
        if os.path.exists(meta):
            for number, line in enumerate(read_bytes(meta).splitlines(), 1):
                if line.strip():
                    fields = parse_line(line, f"{meta}:{number}", ("file_name",))
                    found.append((fields["file_name"], fields.get("text") or fields.get("caption")))
        else:
            for root, folders, files in os.walk(path, followlinks=True):
                folders.sort()                            # os.walk goes into them in this order
                stems = {f[:-4] for f in files if f.endswith(".txt")}
                found += [(os.path.relpath(os.path.join(root, f), path), os.path.splitext(f)[0]
                           in stems) for f in sorted(files) if f.lower().endswith(IMAGES)]
        self.entries = [e for e in found if e[1] or not text]         # (name, text or "it has one")
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
        text = self.entries[j][1]
        if text is True:
            text = read_bytes(os.path.splitext(self.key(j))[0] + ".txt").decode().strip()
        return read_bytes(self.key(j)), {"caption": text or None}


class JsonLines:
    """LLaVA conversations, or captions, one JSON object a line; images are relative to the file.
    If `strict`, the first 1,000 lines are checked at once; the others when their turn comes."""
    in_order = False

    def __init__(self, path: str, text: bool, strict: bool):
        self.path, rows, offset = path, [], 0
        need = [("image",)] + [("conversations", "caption")] * text
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    if strict and len(rows) < 1000:
                        parse_line(line, f"{path}:{number}", *need)
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
                fields = json.loads(read_bytes(self.path, *self.rows[j, 1:].tolist()))
                out.append(os.path.join(os.path.dirname(self.path), fields["image"]))
            except CORRUPT:
                pass
        return out

    def key(self, j):
        return f"{self.path}:{self.rows[j, 0]}"

    def read(self, j):
        fields = json.loads(read_bytes(self.path, *self.rows[j, 1:].tolist()))
        return read_bytes(os.path.join(os.path.dirname(self.path), fields["image"])), fields


class Tars:
    """WebDataset shards: members `<key>.jpg|png|webp` with a `<key>.json` or `<key>.txt`, found by
    one pass over the headers, which keeps 48 bytes a record."""

    def __init__(self, paths: list, text: bool):
        self.paths, rows = paths, []
        for shard, path in enumerate(paths):
            rows += [(shard, *row) for row in self.index(path)]
        self.rows = np.array([r for r in rows if r[1] and (r[3] or not text)])
        self.lonely = sum(not r[1] for r in rows)                     # texts without an image
        if not len(self.rows):
            raise DataError(f"{paths[0]}: {sum(r[1] > 0 for r in rows)} images, 0 with a caption, "
                            f"in {len(paths)} shards; expected members <key>.jpg, .png or .webp "
                            "with <key>.txt or .json")
        # What `export` wrote is a stream already: its first epoch keeps the order of the file.
        self.in_order = b'"stream": {"n": 0,' in self.member(0, 3)

    def index(self, path):
        """(image offset, size, text offset, size, is JSON) by key; offset 0 where there is none."""
        found = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for m in tar:
                    tar.members = []                      # tarfile would keep them all
                    stem, extension = os.path.splitext(m.name)
                    row = found.setdefault(stem, [0] * 5)
                    if extension.lower() in IMAGES:
                        row[:2] = m.offset_data, m.size
                    elif extension == ".json" or extension == ".txt" and not row[4]:
                        row[2:] = m.offset_data, m.size, extension == ".json"
        except (tarfile.TarError, OSError) as e:
            raise DataError(f"{path}: unreadable as a tar after {len(found)} records ({e}); "
                            "fetch it again, or leave it out of --data") from None
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
        text = self.member(j, 3) if self.rows[j, 3] else b""
        fields = json.loads(text) if self.rows[j, 5] else {"caption": text.decode().strip() or None}
        return self.member(j, 1), fields


def open_source(name: str, text: bool = True, strict: bool = True):
    """Folder, JsonLines or Tars for a path; shards may be `a/{000..123}.tar`, a glob or a folder of
    tars. Raises DataError."""
    if os.path.isdir(name):
        paths = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        return Tars(paths, text) if paths else Folder(name, text)
    if not name.endswith((".jsonl", ".tar")):
        what = "a file of no known kind" if os.path.exists(name) else "neither built in nor a path"
        raise DataError(f"{name!r} is {what}; expected {', '.join(BUILTIN)}, a folder, a .jsonl, "
                        "or .tar shards, each with =WEIGHT if wanted")
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if braces:
        first, last = braces.groups()
        paths = [name.replace(braces.group(), str(k).zfill(len(first)))
                 for k in range(int(first), int(last) + 1)]
    else:
        paths = [name] if os.path.exists(name) else sorted(glob.glob(name))
    missing = [p for p in paths if not os.path.exists(p)]
    if missing or not paths:
        raise DataError(f"{name}: {len(missing)} files of {len(paths)} are missing, such as "
                        f"{(missing or [name])[0]}")
    return JsonLines(paths[0], text, strict) if name.endswith(".jsonl") else Tars(paths, text)


def load_image(data: bytes, resolution: int, crop: str, rand) -> np.ndarray:
    """uint8 [R, R, 3] RGB from a file's bytes. `squash` resizes to a square (as the authors do for
    SigLIP), `center` is ADM's centre crop, `random` cuts R x R from a short side of 1.5 R."""
    image = Image.open(io.BytesIO(data))
    short = resolution * 3 // 2 if crop == "random" else resolution
    image.draft("RGB", (short, short))                    # JPEG: decodes at 1/2, 1/4 or 1/8
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if crop == "squash":
        return np.array(image if image.size == (resolution, resolution) else
                        image.resize((resolution, resolution), Image.BICUBIC))
    while min(image.size) >= 2 * short:
        image = image.resize([v // 2 for v in image.size], Image.BOX)
    size = [max(short, round(v * short / min(image.size))) for v in image.size]
    at = [int(rand() * (v - resolution + 1)) if crop == "random" else (v - resolution) // 2
          for v in size]                                  # only what the crop shows is resized
    box = [(a + side) * v / w for side in (0, resolution) for a, v, w in zip(at, image.size, size)]
    return np.array(image.resize((resolution, resolution), Image.BICUBIC, box=box))


def file_record(source, j: int, resolution: int, crop: str, text: bool, rand) -> dict:
    """Record j of the user's files. Raises one of CORRUPT when it is broken. resolution 0: no
    picture."""
    data, fields = source.read(j)
    words = fields.get("caption") or fields.get("prompt") or fields.get("text")
    talk = fields.get("conversations")
    if talk:
        drawn = any("<image>" in t["value"] for t in talk if t["from"] == "gpt")
        if not any("<image>" in t["value"] for t in talk):            # some LLaVA sets leave it out
            talk = [{**talk[0], "value": "<image>\n" + talk[0]["value"]}] + talk[1:]
    elif text and not words:
        raise ValueError("no caption, prompt or conversations")
    else:
        drawn, talk = True, drawing(words, rand) if words else []
    if (images := sum(t["value"].count("<image>") for t in talk)) > 1:
        raise ValueError(f"{images} images in one sample; at most 1")
    out = {"key": source.key(j), "task": "t2i" if drawn else "qa", "caption": words, "scene": None,
           "image": load_image(data, resolution, crop, rand) if resolution else None,
           "conversations": talk}
    return {**out, "question": fields["question"]} if "question" in fields else out


# ------------------------------------------------------------------------------------------------
# The stream
# ------------------------------------------------------------------------------------------------

CHUNK, WINDOW = 1024, 4096     # records that stay neighbours in a shuffle, records shuffled as one
BLOCK = 1000                   # samples in which every source has exactly its share
CROPS = ("squash", "center", "random")
_window = functools.lru_cache(maxsize=32)(permutation)


@functools.lru_cache(maxsize=32)
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
    if "=" not in spec or os.path.exists(spec):
        return spec, 1.0
    name, _, number = spec.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not (weight > 0 and math.isfinite(weight)):
        raise DataError(f"--data {spec}: the weight {number!r} is not a positive number")
    return name, weight


class Mixture:
    """An endless stream of records: mixture[n], n >= 0, is a pure function of the arguments and n.

    A record is a dict: n; key; source; task ("t2i" or "qa"); image uint8 [R, R, 3]; caption or
    None; conversations [{"from": "human"|"gpt", "value": ...}] with `<image>` in the turn that has
    it; scene (a Scene, None for files); skipped [(key, reason)], the broken records in whose place
    this one stands; for questions also question, its type. `text=False` takes images that have no
    caption. Raises DataError, before long work, for what cannot be used.
    """

    def __init__(self, specs: list, resolution: int, seed: int = 0, crop: str = "squash",
                 text: bool = True):
        if crop not in CROPS:
            raise DataError(f"crop {crop!r} is unknown; expected one of {', '.join(CROPS)}")
        if not specs or resolution < 1:
            raise DataError(f"--data {specs} at {resolution} pixels; expected one source or more, "
                            "such as builtin:web, and a positive resolution")
        self.resolution, self.seed, self.crop, self.text = resolution, seed, crop, text
        self.latents = None                             # one Latents a source; see `cache_latents`
        self.names, weights = zip(*map(parse_spec, specs))
        self.weights = [w / sum(weights) for w in weights]
        for name, weight in zip(self.names, self.weights):
            if weight < 1 / BLOCK:
                raise DataError(f"--data {name}: its weight is {weight:.2g} of the sum; "
                                f"at least 1/{BLOCK} is expected")
            if name.startswith("builtin:") and name not in BUILTIN:
                raise DataError(f"--data {name}: expected one of {', '.join(BUILTIN)}, or a path")
        try:
            self.files = [None if n in BUILTIN else open_source(n, text) for n in self.names]
        except DataError as e:
            raise DataError(f"--data {e}") from None
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

    def __len__(self):
        sizes = [self.size(s) for s in range(len(self.names))]
        if None in sizes:
            raise TypeError(f"{self.names[sizes.index(None)]} is endless: give --steps, not epochs")
        return sum(sizes)

    def describe(self) -> list:
        """[{source, weight, size}] for the start-up table; the weights sum to 1."""
        return [{"source": name, "weight": w, "size": self.size(s) or "endless"}
                for s, (name, w) in enumerate(zip(self.names, self.weights))]

    def __getitem__(self, n: int) -> dict:
        block, slot = divmod(int(n), BLOCK)
        if block < 0:
            raise IndexError(f"sample {n}: the stream starts at 0")
        s, k = self.plan[slot]
        i, name, files = block * self.counts[s] + k, self.names[s], self.files[s]
        size = self.size(s)
        pixels = 0 if self.latents else self.resolution
        if files is None:
            j = shuffled(size, i, self.seed, name) if size else i
            record = builtin_record(name, self.seed, j, pixels)
            if self.latents:
                record["latent"] = self.latents[s].read(j)
            return {"n": n, "source": name, **record, "skipped": []}
        skipped = []
        for attempt in range(20):
            j = i if files.in_order and i < size else shuffled(size, i, self.seed, name)
            rand = generator("sample", self.seed, n, attempt)
            try:
                record = file_record(files, j, pixels, self.crop, self.text, rand)
                if self.latents:
                    record["latent"] = self.latents[s].read(j)
                return {"n": n, "source": name, **record, "skipped": skipped}
            except CORRUPT as e:
                skipped.append((files.key(j), reason(e)))
                i = hash64("instead", self.seed, n, attempt) % size
        raise DataError(f"--data {name}: {len(skipped)} broken records in a row, the last is "
                        f"{skipped[-1][0]} ({skipped[-1][1]}); `python data.py check` lists them")


class SkipCounter:
    """Names each broken record once. Raises DataError above 10 and 1 % of the samples."""

    def __init__(self):
        self.count, self.seen, self.keys = 0, 0, set()

    def update(self, skipped: list, seen: int):
        """`skipped`: the [(key, reason)] of the last `seen` samples."""
        self.count, self.seen = self.count + len(skipped), self.seen + seen
        for key, reason in skipped:
            if key not in self.keys:
                print(f"skipped {key}: {reason}", file=sys.stderr)
            self.keys.add(key)
        if self.count > 10 and self.count > 0.01 * self.seen:
            raise DataError(f"{self.count} of {self.seen} samples were broken, above 1 %, such as "
                            f"{sorted(self.keys)[0]}; `python data.py check` lists them; mend them "
                            "or leave the source out of --data")


class Latents:
    """What the frozen networks make of every picture of one finite source, on disk: float32
    [size, N, F] in latents.npy, a CRC of every record and the broken ones in meta.json. Raises
    DataError where the files are damaged."""

    def __init__(self, folder: str):
        self.path = os.path.join(folder, "latents.npy")
        try:
            meta = json.loads(read_bytes(os.path.join(folder, "meta.json")))
            self.crcs, self.broken = meta["crcs"], {int(j): r for j, r in meta["broken"].items()}
            self.array = np.load(self.path, mmap_mode="r")
            if len(self.crcs) != len(self.array):
                raise ValueError(f"{len(self.crcs)} sums for {len(self.array)} records")
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
            raise DataError(f"{folder}: a damaged cache of latents ({e})") from None

    def read(self, j: int) -> np.ndarray:
        """[N, F] of record j. A broken record raises as its picture did."""
        if j in self.broken:
            raise ValueError(self.broken[j])
        latent = np.array(self.array[j])
        if zlib.crc32(latent) != self.crcs[j]:
            raise DataError(f"--cache-latents: record {j} of {self.path} is damaged; delete that "
                            "folder, and it is made again")
        return latent


class Pictures:
    """The pictures of one source as a dataset: [j] -> uint8 [R, R, 3], or why it has none."""

    def __init__(self, mixture: Mixture, s: int):
        self.mixture, self.s = mixture, s

    def __getitem__(self, j: int):
        m, files = self.mixture, self.mixture.files[self.s]
        if files is None:
            return builtin_record(m.names[self.s], m.seed, j, m.resolution)["image"]
        try:                                              # a squash draws nothing at random
            return file_record(files, j, m.resolution, "squash", m.text, generator())["image"]
        except CORRUPT as e:
            return reason(e)


def cache_latents(mixture: Mixture, folder: str, what: str, encode, batch: int, workers: int,
                  write: bool = True, wait=lambda: None):
    """Give `mixture` the latents of its sources instead of pictures, from `folder`; made first
    where they are not there or damaged.

    encode: uint8 [B,R,R,3] -> float32 [B,N,F]. what: names encode, up to its weights; a source's
    subfolder is a hash of it, the resolution, and the names, sizes and times of the source's files.
    Of several processes one is to `write`, the others wait(). The texts are not kept: their form
    changes from epoch to epoch. Raises DataError.
    """
    mixture.latents, found = None, []
    for s, name in enumerate(mixture.names):
        if mixture.size(s) is None:
            raise DataError(f"--cache-latents: {name} is endless; give finite sources to --data")
        parts = mixture.files[s].parts() if mixture.files[s] else [__file__, SPRITES]
        stats = [(p, os.stat(p)) for p in parts if os.path.exists(p)]
        state = [(p, stat.st_size, stat.st_mtime_ns) for p, stat in stats]
        key = f"{hash64(what, name, mixture.resolution, mixture.size(s), state):016x}"
        place = os.path.join(folder, key)
        try:
            if write:
                found.append(Latents(place))
        except DataError as e:
            print(f"{e}; making it again" if os.path.exists(place) else f"{name}: encoding "
                  f"{mixture.size(s)} pictures once, into {place}", file=sys.stderr)
            try:
                write_latents(Pictures(mixture, s), mixture.size(s), place, encode, batch, workers)
            except OSError as e:
                raise DataError(f"--cache-latents {folder}: cannot write: {e}") from None
            found.append(Latents(place))
        wait()
        if not write:
            found.append(Latents(place))
    mixture.latents = found


def write_latents(pictures, size: int, place: str, encode, batch: int, workers: int):
    """Encode them all into `place`, under another name until it is whole."""
    from torch.utils.data import DataLoader
    temporary, array, crcs, broken = place + ".writing", None, [], {}
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    groups = [range(k, min(k + batch, size)) for k in range(0, size, batch)]
    for group, rows in zip(groups, DataLoader(pictures, batch_sampler=groups, collate_fn=list,
                                              num_workers=workers, worker_init_fn=start_worker,
                                              multiprocessing_context=FORK if workers else None)):
        broken.update({j: r for j, r in zip(group, rows) if isinstance(r, str)})
        blank = np.zeros((pictures.mixture.resolution,) * 2 + (3,), np.uint8)
        rows = [blank if isinstance(r, str) else r for r in rows]
        rows += [blank] * (batch - len(rows))             # one shape: compiled once
        latents = encode(np.stack(rows))[:len(group)]
        if array is None:
            need, free = 4 * size * latents[0].size, shutil.disk_usage(temporary).free
            if need > free:
                raise OSError(f"{need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")
            array = np.lib.format.open_memmap(os.path.join(temporary, "latents.npy"), "w+",
                                              np.float32, (size, *latents.shape[1:]))
        array[group.start:group.stop] = latents
        crcs += [zlib.crc32(np.ascontiguousarray(row)) for row in array[group.start:group.stop]]
    array.flush()
    with open(os.path.join(temporary, "meta.json"), "w") as f:
        json.dump({"crcs": crcs, "broken": broken}, f)
    shutil.rmtree(place, ignore_errors=True)
    os.rename(temporary, place)


# Forked workers start at once and notice when kill -9 takes the trainer. From Python 3.14 on Linux'
# default is a server that forks them, and then they would not.
FORK = "fork" if sys.platform == "linux" else None


def start_worker(_):
    import torch
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)          # Ctrl-C is for the trainer, which saves
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader(mixture: Mixture, collate, batch: int, start: int = 0, workers: int = 0,
           rank: int = 0, world: int = 1):
    """Iterator over collate([records]). Micro-batch k of a rank holds samples start + k*batch +
    rank*(batch//world) and the batch//world - 1 after it: `batch` counts all ranks. With workers,
    collate runs in them, on the CPU. Raises DataError."""
    from torch.utils.data import DataLoader
    if batch < 1 or batch % world:
        raise DataError(f"a micro-batch of {batch} does not divide over {world} ranks; change "
                        "--micro-batch")
    share = batch // world
    batches = (range(n, n + share) for n in itertools.count(start + rank * share, batch))
    started = iter(DataLoader(mixture, batch_sampler=batches, collate_fn=collate,
                              num_workers=workers, worker_init_fn=start_worker,
                              multiprocessing_context=FORK if workers else None,
                              prefetch_factor=4 if workers else None))

    def one_line():                                     # a worker's error comes with its traceback
        try:
            yield from started
        except DataError as e:
            line = str(e).strip().splitlines()[-1]
            raise DataError(line.removeprefix("data.DataError: ")) from None
    return one_line()


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------

def show(args):
    """Draw the first samples of a stream with their captions."""
    mixture = Mixture([args.source], args.resolution, args.seed, args.crop, text=False)
    side, pad, tall = max(args.resolution, 128), 10, 76
    columns = min(args.columns, args.count)
    sheet = Image.new("RGB", (pad + columns * (side + pad),
                              pad + -(-args.count // columns) * (side + tall)), "white")
    draw = ImageDraw.Draw(sheet)
    for n in range(args.count):
        record = mixture[n]
        x, y = pad + n % columns * (side + pad), pad + n // columns * (side + tall)
        image = Image.fromarray(record["image"]).resize((side, side), Image.NEAREST)
        sheet.paste(image, (x, y))
        draw.rectangle((x - 1, y - 1, x + side, y + side), outline=(190, 190, 190))
        turns = [t["value"].replace("<image>", "").strip() for t in record["conversations"]]
        text = " ".join(turns[:1] if record["task"] == "t2i" else turns)
        draw.multiline_text((x, y + side + 3), "\n".join(textwrap.wrap(text, side * 2 // 13)[:5]),
                            fill="black", font=ImageFont.load_default(12), spacing=1)
    sheet.save(args.out)
    print(f"{args.out}: {args.count} samples of {args.source}")


def export(args):
    """Write the first samples of a stream as tars; given to --data, they are that stream again."""
    mixture = Mixture([args.source], args.resolution, args.seed, args.crop, text=False)
    os.makedirs(args.out, exist_ok=True)
    if glob.glob(os.path.join(glob.escape(args.out), "*.tar")):
        raise DataError(f"--out {args.out} holds tars already; give another --out or empty it")
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
        inside = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        for path in inside or [name]:                     # shard by shard: one may be cut short
            try:
                source = open_source(path, text=False, strict=False)
            except DataError as e:
                total, broken = total + 1, broken + 1
                print(e)
                continue
            lonely = getattr(source, "lonely", 0)
            total, broken = total + len(source) + lonely, broken + lonely
            if lonely:
                print(f"{path}: {lonely} records without an image")
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
        q.add_argument("--resolution", type=positive, default=224, help="pixels a side")
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
        print(f"error: {'' if isinstance(e, DataError) else '--out: '}{e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
