"""Scenes of the toy world as structures, and their images at any resolution.

    render(Scene(("plain", "white"), (Thing("circle", "red"),)), 64)     # uint8 [64,64,3]
"""
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

COLOURS = {"red": (214, 30, 40), "orange": (250, 125, 15), "yellow": (252, 222, 20),
           "green": (25, 140, 50), "blue": (30, 75, 220), "purple": (135, 35, 175),
           "black": (20, 20, 24), "white": (252, 252, 252)}
BACKGROUNDS = {"white": (248, 248, 248), "black": (16, 16, 20), "grey": (142, 142, 146),
               "pink": (250, 180, 205), "light blue": (165, 212, 248),
               "light green": (178, 232, 165), "beige": (232, 212, 170), "brown": (112, 70, 42)}
TEXTURES = ("striped", "dotted", "checkered")
STYLES = ("regular", "bold", "outlined", "slanted", "wide")   # of letters: Pillow ships one font


@dataclass(frozen=True)
class Thing:
    """A shape (one of SHAPES, with a colour) or a sprite (one of KINDS, colour None).

    size: the longer side; x, y: the centre, y down; all as fractions of the image. angle: degrees,
    anticlockwise. brightness: of a sprite, 0 to 1.
    """
    kind: str
    colour: str = None
    size: float = 0.6
    x: float = 0.5
    y: float = 0.5
    angle: float = 0.0
    brightness: float = 1.0


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


# ------------------------------------------------------------------------------------------------
# Shapes, sprites and letters
# ------------------------------------------------------------------------------------------------

def polygon(corners: int, inner: float = 1.0) -> list:
    """Return the corners of a regular polygon of radius 1; every second one at radius `inner`."""
    out = []
    for k in range(corners):
        radius, angle = inner if k % 2 else 1.0, 2 * math.pi * k / corners
        out.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return out


# The corners [(x, y)] of each shape, y down, in its own units. `shape` cuts the hole of the ring.
OUTLINES = {
    "circle": polygon(180),
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": polygon(3),
    "star": polygon(10, inner=0.42),
    "heart": [(16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t)
                                        - 2 * math.cos(3 * t) - math.cos(4 * t)))
              for t in (2 * math.pi * k / 120 for k in range(120))],
    "diamond": [(0, -1), (0.68, 0), (0, 1), (-0.68, 0)],
    "cross": [(-0.34, -1), (0.34, -1), (0.34, -0.34), (1, -0.34), (1, 0.34), (0.34, 0.34),
              (0.34, 1), (-0.34, 1), (-0.34, 0.34), (-1, 0.34), (-1, -0.34), (-0.34, -0.34)],
    "ring": polygon(180),
}
SHAPES = tuple(OUTLINES)


def read_sprites() -> dict:
    """Return name -> (plural, category, PNG bytes) of the images in sprites.tar."""
    rename = {"ring": "diamond ring", "diamond": "gemstone"}   # the bare names are shapes here
    with tarfile.open(Path(__file__).parent / "sprites.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}
    out = {}
    for info in (json.loads(files[f]) for f in files if f.endswith(".json")):
        name = rename.get(info["name"], info["name"])
        plural = info["plural"] if name == info["name"] else name + "s"
        out[name] = plural, info["category"], files[info["name"].replace(" ", "_") + ".png"]
    return out


SPRITES = read_sprites()
KINDS = tuple(SPRITES)


@functools.lru_cache(maxsize=4096)
def shape(kind: str, angle: int, px: int) -> Image.Image:
    """Return the anti-aliased mask (mode L) of a shape whose longer side is px pixels."""
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    points = np.array([(c * x + s * y, c * y - s * x) for x, y in OUTLINES[kind]])
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
    image = Image.open(io.BytesIO(SPRITES[kind][2])).convert("RGBA")
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


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------

@functools.lru_cache(maxsize=256)
def backdrop(background: tuple, resolution: int) -> Image.Image:
    """Return the RGB image of a background."""
    form, first, *rest = background
    a = np.array(BACKGROUNDS[first], np.int64)
    if form == "plain":
        return Image.new("RGB", (resolution, resolution), BACKGROUNDS[first])
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
    b, ramp = np.array(BACKGROUNDS[rest[0]], np.int64), np.arange(resolution)[:, None]
    if form == "two-tone":
        line = np.where(ramp < resolution // 2, a, b)                            # [R,3]
    else:
        line = (a * (resolution - 1 - ramp) + b * ramp) // max(1, resolution - 1)
    pixels = np.broadcast_to(line[:, None], (resolution, resolution, 3)).astype(np.uint8)
    return Image.fromarray(pixels.transpose(1, 0, 2).copy() if rest[1] == "across" else pixels)


def render(scene: Scene, resolution: int) -> np.ndarray:
    """Draw a scene -> uint8 [R,R,3], anti-aliased. Sizes and angles are rounded to whole pixels and
    degrees before a cache sees them, so the caches never change a pixel."""
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
