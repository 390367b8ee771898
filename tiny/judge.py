"""The judge of the toy world's benchmark: does an image show what its prompt asks for?

    passed = judge(image, everything(scene))                # image [3,H,W] in [0,1]

The judge is a program, because every background, shape, colour and sprite of the world is known. It
subtracts the background, matches the templates of all things over positions and sizes, keeps the
best that do not overlap, and compares them with the prompt. `python evaluate.py judge` measures how
often it is right.
"""
import collections
import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import hash64
from tiny import world
from tiny.scenes import (BACKGROUNDS, COLOURS, KINDS, SHAPES, STYLES, TEXTURES, Scene, letters,
                         render, shape, sprite_at)


@dataclass(frozen=True)
class Prompt:
    """A prompt with the structure that the judge compares; None means not asked for.

    scene: a scene for which the prompt is true. things: ((kind, colour or None for any, count),
    ...), each to be shown exactly `count` times. relation: where the first thing is as seen from
    the second. word: the word to be written.
    """
    category: str
    text: str
    scene: Scene
    things: tuple = ()
    relation: str = None
    background: tuple = None
    word: str = None
    unseen: bool = False


def everything(scene):
    """Return a Prompt that asks for a scene's complete caption."""
    word = scene.words[0].text if scene.words else None
    return Prompt("scene", world.caption(scene), scene, tuple(world.groups(scene)),
                  world.relation_of(scene), scene.background, word)


# ------------------------------------------------------------------------------------------------
# What an image shows
#
# F is the image minus its background B. A template has a mask A, and P, its colours times A. A
# thing that is drawn exactly so gives F = D = P - A B. The match is S = 2 <F,D> / (|F|^2 + |D|^2)
# in a window that is a margin wider than the template: 1 where F = D, less for another shape,
# colour or brightness, and for a part of a larger thing. All products are matrix products of
# unfolded windows.
# ------------------------------------------------------------------------------------------------

SIDE = 64                                               # the judge looks at 64 pixels
THINGS = [(k, c) for k in SHAPES for c in COLOURS] + [(k, None) for k in KINDS]
TURNS = (0, -10, 10)                                    # degrees; the coarse scan turns shapes only
SIZES = (8, 9, 10, 11, 12, 14, 16, 18, 20, 23, 26)      # of the coarse scan, at half resolution
FOUND = 0.7                                             # a weaker match counts as nothing
# A thing that the judge sees, with its match (the score) and its place as in scenes.Thing
Found = collections.namedtuple("Found", "kind colour score x y size")


def scene_images(scenes, size):
    """Render scenes -> [B,3,size,size] in [0,1]."""
    x = np.stack([render(scene, size) for scene in scenes])
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255


@functools.lru_cache(maxsize=4096)
def template(kind, colour, angle, px):
    """Return P and A of a thing with a longer side of px and a margin of 2: [4,px+4,px+4]."""
    if colour:
        mask = np.asarray(shape(kind, angle, px), np.float32) / 255
        rgb = np.array(COLOURS[colour], np.float32) / 255
    else:
        rgba = np.asarray(sprite_at(kind, angle, 0.9, px), np.float32) / 255    # of 0.76 to 1
        mask, rgb = rgba[..., 3], rgba[..., :3]
    (h, w), out = mask.shape, np.zeros((4, px + 4, px + 4), np.float32)
    y, x = (px + 4 - h) // 2, (px + 4 - w) // 2
    out[:3, y:y + h, x:x + w] = (rgb * mask[..., None]).transpose(2, 0, 1)
    out[3, y:y + h, x:x + w] = mask
    return torch.from_numpy(out)


def rows(templates):
    """Prepare templates [K,4,w,w] for products with windows of (F, -F B): [K,4ww], of (B, |B|^2):
    [K,4ww], and |P|^2: [K,1]. They give <F,D> and |D|^2."""
    P, A = templates[:, :3], templates[:, 3:]
    energy = torch.cat([-2 * A * P, A * A], 1)
    return templates.flatten(1), energy.flatten(1), P.square().sum((1, 2, 3))[:, None]


def layers(f, b):
    """Return (F, -F B) and (B, |B|^2), each [1,4,H,W], from F and B, each [3,H,W]."""
    return (torch.cat([f, -(f * b).sum(0, keepdim=True)])[None],
            torch.cat([b, b.square().sum(0, keepdim=True)])[None])


@functools.lru_cache(maxsize=None)
def backgrounds():
    """Return all backgrounds, their images [256,3,64,64], and those at half size [256,3,32,32]."""
    names = tuple(BACKGROUNDS)
    out = [("plain", a) for a in names] + [("textured", *b)
                                           for b in itertools.product(names, TEXTURES)]
    out += [(form, *ab, way) for form in ("two-tone", "gradient")
            for ab in itertools.permutations(names, 2) for way in ("across", "down")]
    images = scene_images([Scene(b) for b in out], SIDE)
    return out, images, F.avg_pool2d(images, 2)


@functools.lru_cache(maxsize=None)
def bank(size):
    """Return the coarse templates of one size: their index into THINGS [K], and `rows`."""
    all_of = [(i, turn) for i, (_, colour) in enumerate(THINGS)
              for turn in (TURNS if colour else TURNS[:1])]
    templates = torch.stack([template(*THINGS[i], turn, 2 * size) for i, turn in all_of])
    return torch.tensor([i for i, _ in all_of]), rows(F.avg_pool2d(templates, 2))


@functools.lru_cache(maxsize=16 * len(SIZES))
def energies(index, size):
    """Return |D|^2 [K,L] of all coarse templates of a size at all positions on a background."""
    b = F.pad(backgrounds()[2][index][None], (1, 1, 1, 1), mode="replicate")[0]
    _, (_, energy, constant) = bank(size)
    return energy @ F.unfold(layers(b, b)[1], size + 2)[0] + constant


def match(dot, ff, dd):
    """Return the match S from <F,D>, |F|^2 and |D|^2."""
    return 2 * dot / (ff + dd + 1e-3)


def coarse(f, index):
    """Return each size's local maxima over the positions, best first: [(score, size, x, y, indices
    of THINGS)], with size and the centre x, y in pixels of 64. `look` removes those that overlap.
    """
    x = F.pad(layers(F.avg_pool2d(f[None], 2)[0], backgrounds()[2][index])[0], (1, 1, 1, 1))
    peaks = []
    for size in SIZES:
        w = size + 2
        kinds, (product, _, _) = bank(size)
        dd = energies(index, size)                                          # [K,L]
        ff = F.avg_pool2d(x[:, :3].square().sum(1, keepdim=True), w, 1).flatten() * w * w   # [L]
        dot = product @ F.unfold(x, w)[0]                                   # [K,L]
        s = match(dot, ff, dd)
        top, which = s.max(0)                                               # [L]
        gain = (2 * dot - dd).gather(0, which[None])[0].clamp(min=0)        # |F|^2 - |F-D|^2
        n = 34 - w + 1
        best = F.max_pool2d(top.view(1, n, n), 3, 1, 1).flatten()
        for at in ((top == best) & (top > FOUND - 0.15)).nonzero().flatten().tolist():
            order = kinds[s[:, at].topk(12).indices].tolist()
            peaks.append((top[at].item() ** 4 * gain[at].item() ** 0.5, 2 * size,
                          2 * (at % n) + size, 2 * (at // n) + size,
                          list(dict.fromkeys(order))[:6]))
    return sorted(peaks, key=lambda p: -p[0])


def refine(f, b, peak):
    """Match the kinds of a peak again at full resolution, turned and moved -> Found."""
    _, size, x, y, kinds = peak
    sizes = sorted({round(size * z) for z in (0.92, 1, 1.08)})
    trials = [(i, px, angle) for i in kinds for px in sizes for angle in (-12, -6, 0, 6, 12)]
    w = sizes[-1] + 4
    templates = torch.zeros(len(trials), 4, w, w)
    for row, (i, px, angle) in zip(templates, trials):
        at = (w - px - 4) // 2
        row[:, at:at + px + 4, at:at + px + 4] = template(*THINGS[i], angle, px)
    pad = (w // 2 + 4,) * 4                                 # a window around the peak, 2 wider
    window = (slice(None), slice(y + 2, y + w + 6), slice(x + 2, x + w + 6))
    f = F.pad(f, pad)[window]                                               # [3,w+4,w+4]
    b = F.pad(b[None], pad, mode="replicate")[0][window]
    f_layers, b_layers = layers(f, b)
    product, energy, constant = rows(templates)
    ff = F.avg_pool2d(f.square().sum(0)[None], w, 1).flatten() * w * w      # [25]
    dd = energy @ F.unfold(b_layers, w)[0] + constant                       # [K,25]
    s = match(product @ F.unfold(f_layers, w)[0], ff, dd)
    best, shift = divmod(int(s.argmax()), 25)
    (i, px, _), score = trials[best], s.max().item()
    return Found(*THINGS[i], round(score, 3), (x + shift % 5 - 2) / SIDE,
                 (y + shift // 5 - 2) / SIDE, px / SIDE)


def find_background(image):
    """Find the background of an image [3,H,W] -> (index, the background, B and F [3,64,64]).

    It has the smallest error at half resolution. The error of a pixel is limited, and counts less
    in the interior, where the things are.
    """
    image = F.interpolate(image.float().cpu().clamp(0, 1)[None], (SIDE, SIDE), mode="area")[0]
    names, images, small = backgrounds()
    error = (small - F.avg_pool2d(image, 2)).square().sum(1).sqrt().clamp(max=0.3)
    error[:, 2:-2, 2:-2] *= 0.3                                             # [256,32,32]
    index = int(error.mean((1, 2)).argmin())
    return index, names[index], images[index], image - images[index]


def look(image):
    """Find what an image [3,H,W] in [0,1] shows -> (background, [Found, ...] best first)."""
    index, name, b, f = find_background(image)
    kept = []
    for peak in coarse(f, index):
        _, size, x, y, _ = peak
        if all(max(abs(x - x2), abs(y - y2)) > 0.4 * (size + size2)
               for _, size2, x2, y2, _ in kept):
            kept.append(peak)
    found = [refine(f, b, peak) for peak in kept]
    return name, [t for t in found if t.score >= FOUND]


@functools.lru_cache(maxsize=64)
def word_masks(word):
    """Return the spectra [K,64,33] of a word in every style at six widths, and the energies [K]."""
    widest, out = SIDE * min(0.92, 0.2 * len(word)), []
    for style, part in itertools.product(STYLES, (0.75, 0.8, 0.85, 0.9, 0.95, 1)):
        mask, w = letters(word, style), round(widest * part)
        h = max(1, min(round(w * mask.height / mask.width), round(0.4 * SIDE)))
        out.append(np.zeros((SIDE, SIDE), np.float32))
        out[-1][:h, :w] = np.asarray(mask.resize((w, h), Image.BICUBIC), np.float32) / 255
    masks = torch.from_numpy(np.stack(out))
    return torch.fft.rfft2(masks).conj(), masks.square().sum((1, 2))


# ------------------------------------------------------------------------------------------------
# Verdicts
# ------------------------------------------------------------------------------------------------

def judge(image, prompt):
    """Tell whether an image [3,H,W] in [0,1] shows what a prompt asks for."""
    return read(image, prompt) if prompt.word else compare(*look(image), prompt)


def read(image, prompt):
    """Tell whether an image shows a prompt's word: the same match, with the amount of ink in the
    prompt's colour as F.

    The word must match well, and best among 40 words, preferably of its length. (For 160 clean
    scenes, 1.3 % of all 21,102 wrong words of the same length pass.)
    """
    others = sorted(set(world.WORDS + world.NEW_WORDS) - {prompt.word}, key=lambda w: (
        len(w) != len(prompt.word), hash64("candidates", prompt.word, w)))
    _, _, b, f = find_background(image)
    ink = torch.tensor(COLOURS[prompt.scene.words[0].colour])[:, None, None] / 255 - b  # [3,64,64]
    amount = (f * ink).sum(0) / ink.square().sum(0).clamp(min=0.05)                     # [64,64]
    amount, scores = amount.clamp(-0.5, 1.5), {}            # 1 where there is ink
    spectrum = torch.fft.rfft2(amount)
    for word in (prompt.word, *others[:39]):
        masks, dd = word_masks(word)
        dot = torch.fft.irfft2(masks * spectrum, s=amount.shape).flatten(1).amax(1)     # [K]
        scores[word] = match(dot, amount.square().sum(), dd).max().item()
    best = max(scores, key=scores.get)
    return best == prompt.word and scores[best] >= 0.75


def compare(background, found, prompt):
    """Tell whether the result of `look` is what a prompt asks for."""
    first = []
    for kind, colour, count in prompt.things:
        same = [t for t in found if t.kind == kind and colour in (None, t.colour)]
        if len(same) != count:
            return False
        first += same[:1]
    if prompt.relation:
        a, b = first[:2]
        ahead = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y,
                 "below": a.y - b.y}[prompt.relation]
        if ahead < 0.15 or ahead < 0.95 * max(abs(a.x - b.x), abs(a.y - b.y)):
            return False
    return prompt.background in (None, background)


# ------------------------------------------------------------------------------------------------
# During training: fixed prompts to look at, and a count of colours, which come right first
# ------------------------------------------------------------------------------------------------

FIXED = [
    "a red circle on a white background", "a blue square on a pink background",
    "a yellow star on a black background", "a green heart on a beige background",
    "a purple triangle on a light green background", "an orange ring on a light blue background",
    "a white cross on a brown background", "a black diamond on a grey background",
    "a red circle left of a blue star on a white background",
    "a yellow heart above a purple square on a black background",
    "three green squares on a white background", "two orange stars on a light blue background",
    "an apple on a white background", "a cat on a light green background",
    "two dogs on a beige background", "the word \"MOON\" in red on white"]


def single_shapes(seed, count):
    """Return `count` scenes of one shape. A seed that no training uses gives unseen ones."""
    scenes = (world.scene("builtin:synthetic", seed, i) for i in itertools.count())
    return list(itertools.islice((s for s in scenes if len(s.things) == 1), count))


def colours_right(images, scenes):
    """Return the share of right backgrounds and of right object colours in images [B,3,S,S] of
    scenes with one shape.

    Each pixel counts for the nearest colour of the palette. The background is the most frequent
    colour on the border, the object the most frequent other colour in the interior.
    """
    palette = {**BACKGROUNDS, **COLOURS}
    names = list(palette)
    rgb = torch.tensor([palette[n] for n in names]).float() / 255           # [K,3]
    alike = torch.cdist(rgb, rgb) < 0.16                                    # [K,K]
    pixels = images.float().cpu().clamp(0, 1).permute(0, 2, 3, 1)           # [B,S,S,3]
    nearest = (pixels[..., None, :] - rgb).square().sum(-1).argmin(-1)      # [B,S,S]
    backgrounds, objects = 0, 0
    for grid, scene in zip(nearest, scenes):
        border = torch.cat([grid[:4].flatten(), grid[-4:].flatten(),
                            grid[:, :4].flatten(), grid[:, -4:].flatten()])
        back = border.bincount(minlength=len(names)).argmax()
        inside = grid[8:-8, 8:-8].flatten().bincount(minlength=len(names))
        inside[alike[back]] = 0
        backgrounds += alike[names.index(scene.background[1]), back].item()
        objects += alike[names.index(scene.things[0].colour), inside.argmax()].item()
    return backgrounds / len(scenes), objects / len(scenes)
