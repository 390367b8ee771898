"""The benchmark of the toy world: prompts with the structure they ask for, a judge, the scores.

    for p in judge.prompts(): passed, why = judge.judge(image, p)        # image [3,H,W] in [0,1]

Six categories as in GenEval (arXiv 2310.11513), and one of written words. Half of the prompts show
held-out compositions, which are in no training source (world.held_out): a coloured shape, or two
things in a relation; for words, ones that the training words lack.

The judge is a program, because every background, shape, colour and sprite of the world is known. It
subtracts the background, matches the templates of all things over positions and sizes, keeps the
best that do not overlap, and compares them with the prompt. `python evaluate.py judge` measures how
often it is right.
"""
import collections
import dataclasses
import functools
import itertools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from cli import DataError
from data import contact_sheet, hash64, random_stream
from metrics import interval
from tiny import world
from tiny.world import Scene, Thing, pick

CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "attribution")
TEXT = "text"
NEW_WORDS = tuple("""CUBE FERN GOLD HERB JUNE LIME MAZE MOTH NOON OATS PALM QUAY RUST SEAL TUNA
URN VINE WASP YARN ZINC ELK FIG GUM HUT IVY JOG KIN LOG MOP OX RAT TIN VAN WIG ANVIL CHESS CLOWN
FROST GHOST HONEY MEDAL OLIVE PEARL ROYAL SHELF TOWEL TULIP""".split())


# ------------------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Prompt:
    """A prompt with the structure that the judge compares; None means not asked for.

    scene: one for which the prompt is true. things: ((kind, colour or None for any, count), ...),
    each to be shown exactly `count` times. relation: the first thing's place as seen from the
    second. word: the word to be written.
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


def compose(category, unseen, shapes, rand):
    """Draw a Prompt; None if the draw does not belong to this category and half."""
    if category == TEXT:
        scene = world.write_words(rand)
        word = scene.words[0]
        if unseen:
            fit = [w for w in NEW_WORDS if len(w) == len(word.text)]
            word = dataclasses.replace(word, text=pick(rand, fit)) if fit else None
        if len(scene.words) > 1 or word is None:
            return None
        scene = Scene(scene.background, (), (word,))
        return Prompt(category, world.caption(scene), scene, word=word.text, unseen=unseen)
    pairs = 2 if category in ("two objects", "position", "attribution") else 1
    n = 1 + int(4 * rand()) if category == "counting" else pairs
    what = [(pick(rand, world.SHAPES), pick(rand, tuple(world.COLOURS))) if shapes
            else (pick(rand, world.KINDS), None) for _ in range(pairs)]
    if unseen and category != "position":
        held = [(k, c) for k in world.SHAPES for c in world.COLOURS if world.held_out(k, c)]
        what[int(rand() * pairs)] = pick(rand, held)
    things = tuple(Thing(*what[k % pairs], *at) for k, at in enumerate(world.place(rand, n, False)))
    form = pick(rand, ("plain", "two-tone", "gradient", "textured")
                if not shapes and category != "colours" else ("plain",))
    a, b = pick(rand, tuple(world.BACKGROUNDS)), pick(rand, tuple(world.BACKGROUNDS))
    background = {"plain": (form, a), "textured": (form, a, pick(rand, world.TEXTURES))}.get(
        form, (form, a, b, pick(rand, ("across", "down"))))
    scene = Scene(background, things)
    where = world.relation_of(scene) if category == "position" else None
    held = (bool(where) and world.held_out(what[0][0], what[1][0], where)
            if category == "position" else any(c and world.held_out(k, c) for k, c in what))
    if (a == b or not all(world.stands_out(t, background) for t in things)
            or len({k for k, _ in what}) < pairs or pairs == 2 and what[0][1] == what[1][1] != None
            or (category == "position" and not where) or held != unseen
            or (not unseen and world.is_held_out(scene))):
        return None
    items = world.groups(scene)
    with_colour = category in ("colours", "attribution")
    return Prompt(category, world.describe(items, where, background), scene,
                  tuple((k, c if with_colour else None, count) for k, c, count in items), where,
                  background if category == "colours" and not shapes else None, unseen=unseen)


@functools.lru_cache(maxsize=4)
def prompts(per_category=40):
    """Return the benchmark: a tuple of Prompts, the same on every machine.

    The first half of a category shows seen compositions, shapes and sprites in turn. The second
    half shows unseen ones: shapes, because sprites have no colour to hold out (both in `position`).
    Raises DataError if there are not that many different prompts.
    """
    out = []
    for category, unseen in itertools.product(CATEGORIES + (TEXT,), (False, True)):
        found = {}
        want = per_category // 2 if unseen else -(-per_category // 2)
        for attempt in range(20_000):
            if len(found) == want:
                break
            shapes = (len(found) % 2 == 0 or category == "attribution"
                      or (unseen and category != "position"))
            rand = random_stream("prompt", category, unseen, attempt)
            p = compose(category, unseen, shapes, rand)
            if p:
                found.setdefault(p.text, p)
        if len(found) < want:
            raise DataError(f"--per-category {per_category}: there are only {len(found)} different "
                            f"{'unseen' if unseen else 'seen'} prompts in {category!r}; lower it")
        out += found.values()
    return tuple(out)


def changes(prompt, rand):
    """Return {attribute: the prompt with that attribute changed} for each that the prompt has. No
    changed prompt is true for its scene. The text stays."""
    replace = functools.partial(dataclasses.replace, prompt)
    if prompt.word:
        others = [w for w in world.WORDS if w != prompt.word]
        same = [w for w in others if len(w) == len(prompt.word)]
        return {"word": replace(word=pick(rand, same or others))}
    at, (form, first, *rest) = int(rand() * len(prompt.things)), prompt.scene.background
    kind, colour, count = prompt.things[at]
    taken = {t[:2] for t in prompt.things}
    kinds = [k for k in (world.SHAPES if colour else world.KINDS) if k not in {t[0] for t in taken}]
    other = {"kind": (pick(rand, kinds), colour, count),
             "count": (kind, colour, pick(rand, [n for n in (1, 2, 3, 4) if n != count]))}
    if colour:
        free = [c for c in world.COLOURS if (kind, c) not in taken]
        other["colour"] = kind, pick(rand, free), count
    out = {which: replace(things=prompt.things[:at] + (thing,) + prompt.things[at + 1:])
           for which, thing in other.items()}
    if prompt.relation:
        out["relation"] = replace(relation=world.RELATIONS[prompt.relation])
    new = pick(rand, [b for b in world.BACKGROUNDS if b not in (first, *rest)])
    return {**out, "background": replace(background=(form, new, *rest))}


# ------------------------------------------------------------------------------------------------
# The judge: what an image shows
#
# F is the image minus its background B. A template, colours P times its mask A, would give
# D = P - A B there. The match is S = 2 <F,D> / (|F|^2 + |D|^2) in a window that is a margin wider
# than the template: 1 where F = D, less for another shape, colour or brightness, and for a part of
# a larger thing. All products are matrix products of unfolded windows.
# ------------------------------------------------------------------------------------------------

SIDE = 64                                               # the judge looks at 64 pixels
THINGS = tuple((k, c) for k in world.SHAPES for c in world.COLOURS) + tuple(
    (k, None) for k in world.KINDS)
TURNS = (0, -10, 10)                                    # degrees; the coarse scan turns shapes only
SIZES = (8, 9, 10, 11, 12, 14, 16, 18, 20, 23, 26)      # of the coarse scan, at half resolution
FOUND = 0.7                                             # a weaker match counts as nothing


@dataclass(frozen=True)
class Found:
    """A thing that the judge sees, with its match and its place as in world.Thing."""
    kind: str
    colour: str
    score: float
    x: float
    y: float
    size: float


@functools.lru_cache(maxsize=4096)
def template(kind, colour, angle, px):
    """Return P and A of a thing with a longer side of px and a margin of 2: [4,px+4,px+4]."""
    if colour:
        mask = np.asarray(world.shape(kind, angle, px), np.float32) / 255
        rgb = np.array(world.COLOURS[colour], np.float32) / 255
    else:
        rgba = np.asarray(world.sprite_at(kind, angle, 0.9, px), np.float32) / 255
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
    names = tuple(world.BACKGROUNDS)
    out = [("plain", a) for a in names] + [("textured", *b)
                                           for b in itertools.product(names, world.TEXTURES)]
    out += [(form, *ab, way) for form in ("two-tone", "gradient")
            for ab in itertools.permutations(names, 2) for way in ("across", "down")]
    images = np.stack([np.asarray(world.backdrop(b, SIDE)) for b in out])
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
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
    return 2 * dot / (ff + dd + 1e-3)


def coarse(f, index):
    """Return the local maxima over positions and sizes, best first: [(rank, size, x, y, [kinds])],
    with the centre x, y in pixels of 64."""
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
    trials = [(i, px) for i in kinds for px in sizes for _ in range(5)]
    w = sizes[-1] + 4
    templates = torch.zeros(len(trials), 4, w, w)
    for row, (i, px), angle in zip(templates, trials, itertools.cycle((-12, -6, 0, 6, 12))):
        at = (w - px - 4) // 2
        row[:, at:at + px + 4, at:at + px + 4] = template(*THINGS[i], angle, px)
    pad, left, top = w // 2 + 4, x - w // 2, y - w // 2
    cut = (slice(None), slice(top + pad - 2, top + pad + w + 2), slice(left + pad - 2,
                                                                       left + pad + w + 2))
    f = F.pad(f, (pad,) * 4)[cut]
    b = F.pad(b[None], (pad,) * 4, mode="replicate")[0][cut]                # [3,w+4,w+4]
    ff, dd = layers(f, b)
    product, energy, constant = rows(templates)
    total = F.avg_pool2d(f.square().sum(0)[None], w, 1).flatten() * w * w   # [25]
    s = match(product @ F.unfold(ff, w)[0], total, energy @ F.unfold(dd, w)[0] + constant)
    trial, shift = divmod(int(s.argmax()), 25)
    (i, px), score = trials[trial], s.max().item()
    return Found(*THINGS[i], round(score, 3), (x + shift % 5 - 2) / SIDE,
                 (y + shift // 5 - 2) / SIDE, px / SIDE)


def to_side(image):
    """Resize an image [3,H,W] in [0,1] -> [3,64,64] float32 on the CPU."""
    return F.interpolate(image.float().cpu().clamp(0, 1)[None], (SIDE, SIDE), mode="area")[0]


def find_background(image):
    """Find the background of an image [3,64,64] -> (index, the background, its image).

    It has the smallest error at half resolution. The error of a pixel is limited, and counts less
    in the interior, where the things are.
    """
    names, images, small = backgrounds()
    error = (small - F.avg_pool2d(image, 2)).square().sum(1).sqrt().clamp(max=0.3)
    error[:, 2:-2, 2:-2] *= 0.3                                             # [256,32,32]
    index = int(error.mean((1, 2)).argmin())
    return index, names[index], images[index]


@torch.no_grad()
def look(image):
    """Find what an image [3,H,W] in [0,1] shows -> (background, [Found, ...] best first)."""
    image = to_side(image)
    index, name, b = find_background(image)
    f, kept = image - b, []
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
    for style, part in itertools.product(world.STYLES, (0.75, 0.8, 0.85, 0.9, 0.95, 1)):
        mask, w = world.letters(word, style), round(widest * part)
        h = max(1, min(round(w * mask.height / mask.width), round(0.4 * SIDE)))
        out.append(np.zeros((SIDE, SIDE), np.float32))
        out[-1][:h, :w] = np.asarray(mask.resize((w, h), Image.BICUBIC), np.float32) / 255
    masks = torch.from_numpy(np.stack(out))
    return torch.fft.rfft2(masks).conj(), masks.square().sum((1, 2))


@torch.no_grad()
def read_word(image, colour, candidates):
    """Match candidate words to an image [3,H,W] in [0,1] -> {candidate: match}, as above with the
    amount of ink in `colour` as F."""
    image = to_side(image)
    _, _, b = find_background(image)
    ink = torch.tensor(world.COLOURS[colour])[:, None, None] / 255 - b       # [3,64,64]
    m = ((image - b) * ink).sum(0) / ink.square().sum(0).clamp(min=0.05)  # 1 where there is ink
    m, scores = m.clamp(-0.5, 1.5), {}
    spectrum = torch.fft.rfft2(m)
    for word in candidates:
        masks, dd = word_masks(word)
        dot = torch.fft.irfft2(masks * spectrum, s=m.shape).flatten(1).amax(1)              # [K]
        scores[word] = match(dot, m.square().sum(), dd).max().item()
    return scores


def judge(image, prompt):
    """Tell whether an image [3,H,W] in [0,1] shows a prompt -> (passed, why not)."""
    if not image.isfinite().all():
        return False, "values that are not finite"
    return read(image, prompt) if prompt.word else compare(*look(image), prompt)


def read(image, prompt):
    """Judge a word. It must match well, and best among 40 words, first those of the same length.
    (For 160 clean scenes, 1.3 % of all 21,102 wrong words of the same length pass.)"""
    others = sorted(set(world.WORDS + NEW_WORDS) - {prompt.word}, key=lambda w: (
        len(w) != len(prompt.word), hash64("candidates", prompt.word, w)))
    scores = read_word(image, prompt.scene.words[0].colour, [prompt.word, *others[:39]])
    best = max(scores, key=scores.get)
    if scores[best] < 0.75:
        return False, "no word"
    return best == prompt.word, "" if best == prompt.word else f'reads "{best}"'


def compare(background, found, prompt):
    """Judge things from the result of `look`."""
    first = []
    for kind, colour, count in prompt.things:
        same = [t for t in found if t.kind == kind and colour in (None, t.colour)]
        if len(same) != count:
            name = functools.partial(world.noun, article=False)
            seen = ", ".join(name(t.kind, t.colour) for t in found) or "nothing"
            return False, f"{len(same)} {name(kind, colour)}; sees {seen}"
        first += same[:1]
    if prompt.relation:
        a, b = first[:2]
        ahead = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y,
                 "below": a.y - b.y}[prompt.relation]
        if ahead < 0.15 or ahead < 0.95 * max(abs(a.x - b.x), abs(a.y - b.y)):
            return False, f"not {prompt.relation}"
    if prompt.background and prompt.background != background:
        return False, f"background {world.background_words(background)}"
    return True, ""


# ------------------------------------------------------------------------------------------------
# Scores, and the judge of the judge
# ------------------------------------------------------------------------------------------------

PARTS = {"seen": lambda p: not p.unseen, "unseen": lambda p: p.unseen,
         "shapes": lambda p: p.scene.things and p.scene.things[0].colour,
         "sprites": lambda p: p.scene.things and not p.scene.things[0].colour}


def score(prompts, scores, ceiling, categories):
    """Return a row of the table: the share of images that pass, averaged over `categories`.

    scores, ceiling: a share for each prompt, of its images and of its scene after the decoder.
    """
    def by_category(values, keep=lambda p: True):
        groups = [[v for v, p in zip(values, prompts) if p.category == c and keep(p)]
                  for c in categories]
        return [g for g in groups if g]
    groups = by_category(scores)
    mean, low, high = interval(groups)
    parts = {k: by_category(scores, keep) for k, keep in PARTS.items()}
    return {"prompts": sum(map(len, groups)), "score": mean, "low": low, "high": high,
            **{k: interval(g)[0] if g else None for k, g in parts.items()},
            "ceiling": interval(by_category(ceiling))[0]}


def score_table(prompts, scores, ceiling):
    """Print `score` of each category and overall -> {category: row}."""
    columns, results = (*PARTS, "ceiling"), {}
    print(f"{'category':<16}{'prompts':>8}{'score':>8}{'95 %':>16}"
          + "".join(f"{k:>9}" for k in columns))
    for name in (*CATEGORIES, "overall", TEXT):
        r = results[name] = score(prompts, scores, ceiling,
                                  CATEGORIES if name == "overall" else [name])
        print(f"{name:<16}{r['prompts']:>8}{r['score']:>8.3f}"
              f"{'{low:.3f} to {high:.3f}'.format(**r):>16}"
              + "".join(f"{'-' if r[k] is None else format(r[k], '.3f'):>9}" for k in columns))
    print("\nceiling: the same scenes, rendered and reconstructed by the decoder")
    return results


def failure_sheet(failures, path):
    """Draw [(image, prompt, why)] as a PNG; if there are many, the same number per category."""
    by_category = collections.defaultdict(list)
    for failure in failures:
        by_category[failure[1].category].append(failure)
    shown = [f for group in by_category.values() for f in group[:48 // len(by_category)]]
    images = [(to_side(x) * 255).round().byte().permute(1, 2, 0).numpy() for x, _, _ in shown]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(images, [f"{p.text}\n> {why}" for _, p, why in shown], 8).save(path)
    print(f"{path}: {len(shown)} of {len(failures)} failures")


def scene_images(prompts, size):
    """Render the scenes of prompts: [P,3,size,size] in [0,1]."""
    x = np.stack([world.render(p.scene, size) for p in prompts])
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def reconstruct(encoder, decode, x, batch=64):
    """Encode and decode images [P,3,S,S] -> the same on the CPU."""
    device = next(encoder.parameters()).device
    return torch.cat([decode(encoder(part.to(device))).float().cpu() for part in x.split(batch)])


def judge_scenes(source, count, seed):
    """Return `count` scenes of a source as Prompts that ask for all of the scene."""
    scenes = (world.scene(source, seed, i) for i in itertools.count())
    return list(itertools.islice((everything(s) for s in scenes if len(s.words) < 2), count))


def judge_the_judge(prompts, images):
    """Judge images [P,3,S,S] of the prompts' scenes -> do they pass [P], and for each attribute, do
    they pass for the prompt with that attribute changed: {attribute: [...]}."""
    true, false = [], collections.defaultdict(list)
    for k, (x, p) in enumerate(zip(images, prompts)):
        seen = None if p.word else look(x)
        passes = (lambda q: compare(*seen, q)[0] if seen else read(x, q)[0])
        true.append(passes(p))
        for which, q in changes(p, random_stream("change", p.text, k)).items():
            false[which].append(passes(q))
    return true, false


def judge_table(encoder, decode, count, seed):
    """Print how often the judge is right about `count` scenes of each source, clean and
    reconstructed -> {"source kind": row}."""
    print(f"{'scenes':<12}{'image':<16}{'true pass':>10}{'95 %':>16}{'changed pass':>14}")
    rows = {}
    for source in ("web", "synthetic", "text"):
        prompts = judge_scenes(f"builtin:{source}", count, seed)
        x = scene_images(prompts, encoder.image_size)
        for name, images in (("clean", x), ("reconstruction", reconstruct(encoder, decode, x))):
            true, false = judge_the_judge(prompts, images)
            mean, low, high = interval([true])
            every = np.mean(sum(false.values(), []))
            rows[f"{source} {name}"] = {
                "scenes": len(true), "true": mean, "low": low, "high": high, "changed": every,
                **{which: [sum(v), len(v)] for which, v in false.items()}}
            print(f"{source:<12}{name:<16}{mean:>10.3f}{f'{low:.3f} to {high:.3f}':>16}"
                  f"{every:>14.4f}  "
                  + ", ".join(f"{k} {sum(v)}/{len(v)}" for k, v in false.items()), flush=True)
    return rows


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
    palette = {**world.BACKGROUNDS, **world.COLOURS}
    names = list(palette)
    rgb = torch.tensor([palette[n] for n in names]).float() / 255           # [K,3]
    pixels = images.float().cpu().clamp(0, 1).permute(0, 2, 3, 1)           # [B,S,S,3]
    nearest = (pixels[..., None, :] - rgb).square().sum(-1).argmin(-1)      # [B,S,S]
    backgrounds, objects = 0, 0
    same = torch.cdist(rgb, rgb) < 0.16                                     # [K,K]: look alike
    for grid, scene in zip(nearest, scenes):
        border = torch.cat([grid[:4].flatten(), grid[-4:].flatten(),
                            grid[:, :4].flatten(), grid[:, -4:].flatten()])
        back = border.bincount(minlength=len(names)).argmax().item()
        backgrounds += same[names.index(scene.background[1]), back].item()
        inside = grid[8:-8, 8:-8].flatten().bincount(minlength=len(names))
        inside[same[back]] = 0
        objects += same[names.index(scene.things[0].colour), inside.argmax()].item()
    return backgrounds / len(scenes), objects / len(scenes)
