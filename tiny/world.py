"""The toy world: scenes of shapes and emoji, their images, captions and questions.

    s = world.scene("builtin:web", seed, i);  world.render(s, 224);  world.caption(s)

Scene i of a source is a pure function of (source, seed, i): a background and things on it, which
can be rendered at any resolution. The sources stand in for the paper's data (arXiv 2601.16208):
`builtin:web` for web images, `builtin:synthetic` for images made by FLUX, `builtin:text` for
RenderedText, `builtin:hq` for BLIP3o-60k, `builtin:qa` for Cambrian-7M. `builtin:align` asks only
the questions of best_of.py's verifiers, about shapes. `builtin:brief` writes short captions like a
person's, which rarely mention positions and do not always name the background.
"""
import collections
import functools
import io
import itertools
import json
import math
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFont

from chat import drawing
from cli import DataError
from data import hash64, random_stream


def pick(rand, items):
    return items[int(rand() * len(items))]


# ------------------------------------------------------------------------------------------------
# Scenes
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
SPRITES = Path(__file__).parent / "sprites.tar"


def read_sprites() -> dict:
    """Return name -> (plural, category, PNG bytes) of the images in sprites.tar."""
    if not SPRITES.exists():
        raise DataError(f"{SPRITES} is missing; the toy world needs it, and it is part of this "
                        "repository: `git checkout tiny/sprites.tar` restores it")
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
    """A shape (one of SHAPES, with a colour) or a sprite (one of KINDS, colour None).

    size: the longer side; x, y: the centre, y down; all as fractions of the image. angle: degrees,
    anticlockwise.
    """
    kind: str
    colour: str = None
    size: float = 0.6
    x: float = 0.5
    y: float = 0.5
    angle: float = 0.0
    brightness: float = 1.0      # of sprites, 0 to 1


@dataclass(frozen=True)
class Word:
    """A word in capitals. size: its width; x, y: its centre; all as fractions of the image."""
    text: str
    colour: str
    style: str = "regular"
    size: float = 0.8
    x: float = 0.5
    y: float = 0.5


@dataclass(frozen=True)
class Scene:
    """A background with things and words on it.

    background: ("plain", colour), ("two-tone" or "gradient", colour, colour, "across" or "down") or
    ("textured", colour, texture), from BACKGROUNDS and TEXTURES.
    """
    background: tuple
    things: tuple = ()
    words: tuple = ()


RELATIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


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
    """Return the perceived distance of colours [..., 3] ("redmean"; black to white is 765)."""
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
        background = (form, a) if form == "plain" else (form, a, pick(rand, TEXTURES)) \
            if form == "textured" else (form, a, b, pick(rand, ("across", "down")))
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


BUILTIN = {"builtin:web": None, "builtin:synthetic": None, "builtin:text": None,
           "builtin:hq": 600, "builtin:qa": None,
           "builtin:align": None, "builtin:brief": None}    # source -> scenes; None: endless


def scene(source: str, seed: int, i: int) -> Scene:
    """Return scene i of a built-in source: a pure function of the arguments, without held-out
    compositions. The 600 scenes of builtin:hq do not depend on the seed. Raises DataError."""
    if source not in BUILTIN:
        raise DataError(f"unknown source {source!r}; the built-in ones are {', '.join(BUILTIN)}")
    if BUILTIN[source]:
        seed, i = 0, i % BUILTIN[source]
    rand = random_stream("scene", source, seed, i)
    if source == "builtin:text":
        return write_words(rand)
    while True:
        if source == "builtin:web":
            s = compose(rand, True, False, ("plain", "two-tone", "gradient", "textured"))
        elif source == "builtin:synthetic":
            s = compose(rand, False, False, ("plain",))
        elif source == "builtin:brief":     # two different things, or rarely one
            s = compose(rand, False, False, ("plain",))
            s = s if s and len(s.things) == len(groups(s)) == (1 if rand() < 0.25 else 2) else None
        elif source == "builtin:hq":
            s = compose(rand, rand() < 0.7, True, ("plain", "plain", "gradient"))
        else:                           # qa; align without sprites, which take longer to learn
            s = compose(rand, source == "builtin:qa" and rand() < 0.5, False,
                        ("plain", "plain", "two-tone", "gradient"))
            if source == "builtin:align" and s and len(groups(s)) != 2 and rand() < 0.8:
                continue                # checking two things takes more questions than one
        if s:
            return s


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------

def outline(kind: str) -> list:
    """Return the corners [(x, y)] of a shape, y down, in its own units."""
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
    """Return the anti-aliased mask (mode L) of a shape whose longer side is px pixels."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    points = np.array([(c * x + s * y, c * y - s * x) for x, y in outline(kind)])
    low, high = points.min(0), points.max(0)
    scale = px / (high - low).max()                       # pixels per unit
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
    """Return the RGBA image of a sprite in its own size (about 64 pixels), turned and cropped."""
    if kind not in _SPRITES:
        raise DataError(f"unknown kind {kind!r}: neither a shape nor a sprite")
    image = Image.open(io.BytesIO(_SPRITES[kind][2])).convert("RGBA")
    image = image.rotate(angle, Image.BICUBIC, expand=True) if angle else image
    return image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())


def sprite_at(kind: str, angle: int, brightness: float, px: int) -> Image.Image:
    """Return the RGBA image of a sprite whose longer side is px pixels (too many to cache)."""
    image = sprite(kind, angle)
    scale = px / max(image.size)
    image = image.resize([max(1, round(v * scale)) for v in image.size], Image.BICUBIC)
    dark = (round(255 * brightness),) * 3 + (255,)
    return ImageChops.multiply(image, Image.new("RGBA", image.size, dark))


@functools.lru_cache(maxsize=2048)
def letters(text: str, style: str) -> Image.Image:
    """Return the mask (mode L) of a word, about 48 pixels high, cropped."""
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
    """Return the RGB image of a background."""
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
    """Draw a scene -> uint8 [R, R, 3], anti-aliased. Sizes and angles are rounded to whole pixels
    and degrees before any cache is asked, so the caches never change a pixel."""
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
    text = f"{names[0]} {where} {names[1]}" if where else ", ".join(names[:-1]) + (
        " and " if len(names) > 1 else "") + names[-1]
    return f"{text} on a {background_words(background)} background" if background else text


def relation_of(scene: Scene):
    """Return the relation of a scene's two things if they differ, else None."""
    return relation(*scene.things) if len(scene.things) == 2 == len(groups(scene)) else None


def caption(scene: Scene, rand=None, web: bool = False) -> str:
    """Return a true caption: without `rand` a complete one.

    With rand, six captions in ten name the relation. With `web` too, four in ten do, in the forms
    of alt text, and a fifth of them leave something out.
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
        category = _SPRITES[kind][1] if kind in _SPRITES else "object"
        return pick(rand, (text, noun(kind, None, 2 if count > 1 else 1, False), f"{kind} picture",
                           f"{category} image", f"a photo of {text}", on))
    return pick(rand, (f"{text} on a {on}", f"a photo of {text} on a {on}", f"{text}, {on}",
                       f"a {on} with {text}", f"picture of {text}, {on}",
                       f"{text[0].upper()}{text[1:]} on a {on}."))


def wrong_description(scene: Scene, rand, other=None):
    """Return a caption that is false for the scene and names no held-out composition.

    It differs in one attribute. other: returns further scenes; then half of the captions describe
    such a scene that has nothing in common with this one.
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
    i = i % (BUILTIN[source] or i + 1)
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
    elif source == "builtin:brief":
        where = relation_of(s) if rand() < 0.2 else None
        out["caption"] = describe(groups(s), where, s.background if rand() < 0.7 else None)
        out["conversations"] = drawing(out["caption"], rand)
    else:
        complete = source == "builtin:hq"
        out["caption"] = caption(s, None if complete else rand, source == "builtin:web")
        out["conversations"] = drawing(out["caption"], rand)
    return out
