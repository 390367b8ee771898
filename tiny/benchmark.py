"""The benchmark of the toy world: prompts, questions, the table of scores, the judge's own score.

Six categories as in GenEval (arXiv 2310.11513), and one of written words. benchmark.jsonl holds 40
scenes per category, seen ones first. The unseen half shows compositions that are in no training
source (world.held_out): a coloured shape, or two things in a relation; for words, ones that the
training words lack.
"""
import collections
import dataclasses
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import torch

from best_of import KEYS, rank
from cli import DataError
from data import random_stream
from metrics import interval
from tiny import world
from tiny.judge import Prompt, compare, everything, look, read, scene_images
from tiny.scenes import BACKGROUNDS, COLOURS, KINDS, SHAPES, Scene, Thing, Word
from tiny.world import pick

CATEGORIES = ("single object", "two objects", "counting", "colours", "position", "attribution")
TEXT = "text"


# ------------------------------------------------------------------------------------------------
# Prompts and questions
# ------------------------------------------------------------------------------------------------

def prompts(per_category=40):
    """Return the benchmark: a list of Prompts, half of each category unseen. Raises DataError."""
    if per_category > 40:
        raise DataError(f"--per-category {per_category}: there are 40 prompts per category")
    rows = (Path(__file__).parent / "benchmark.jsonl").read_text().splitlines()
    found = []
    for start in range(0, len(rows), 40):                 # a category: 20 seen, 20 unseen
        seen, unseen = rows[start:start + 20], rows[start + 20:start + 40]
        found += seen[:(per_category + 1) // 2] + unseen[:per_category // 2]
    return [prompt(json.loads(row)) for row in found]


def prompt(row):
    """Return the Prompt of a row of benchmark.jsonl. Every text names the background, and the
    colours of shapes. The judge checks colours only in `colours` and `attribution`, and the
    background only behind the sprites of `colours`."""
    background = tuple(row["background"])
    if row["category"] == TEXT:
        scene = Scene(background, (), (Word(*row["word"]),))
        return Prompt(TEXT, world.caption(scene), scene, word=row["word"][0], unseen=row["unseen"])
    scene = Scene(background, tuple(Thing(*thing) for thing in row["things"]))
    category, items = row["category"], world.groups(scene)
    where = world.relation_of(scene) if category == "position" else None
    with_colour = category in ("colours", "attribution")
    things = tuple((kind, colour if with_colour else None, n) for kind, colour, n in items)
    asked = background if category == "colours" and not items[0][1] else None
    return Prompt(category, world.describe(items, where, background), scene, things, where, asked,
                  unseen=row["unseen"])


def changes(prompt, rand):
    """Return {attribute: the prompt with that attribute changed} for each that the prompt has. No
    changed prompt is true for its scene. The text stays."""
    replace = functools.partial(dataclasses.replace, prompt)
    if prompt.word:
        others = [w for w in world.WORDS if w != prompt.word]
        same = [w for w in others if len(w) == len(prompt.word)]
        return {"word": replace(word=pick(rand, same or others))}
    at = int(rand() * len(prompt.things))
    form, first, *rest = prompt.scene.background
    kind, colour, count = prompt.things[at]
    taken = {kind for kind, _, _ in prompt.things}
    kinds = [k for k in (SHAPES if colour else KINDS) if k not in taken]
    other = {"kind": (pick(rand, kinds), colour, count),
             "count": (kind, colour, pick(rand, [n for n in (1, 2, 3, 4) if n != count]))}
    if colour:
        coloured = {thing[:2] for thing in prompt.things}
        free = [c for c in COLOURS if (kind, c) not in coloured]
        other["colour"] = kind, pick(rand, free), count
    out = {which: replace(things=prompt.things[:at] + (thing,) + prompt.things[at + 1:])
           for which, thing in other.items()}
    if prompt.relation:
        out["relation"] = replace(relation=world.RELATIONS[prompt.relation])
    new = pick(rand, [b for b in BACKGROUNDS if b not in (first, *rest)])
    return {**out, "background": replace(background=(form, new, *rest))}


def questions(source, count, seed, size):
    """Yield `count` questions of a source: ({id, image, kind, question, reference}, image
    [1,3,size,size] in [0,1]). Raises DataError for a source without questions."""
    if source not in ("builtin:qa", "builtin:align"):
        raise DataError(f"--data {source}: expected builtin:qa, builtin:align or a file of "
                        "questions")
    for i in range(count):
        r = world.builtin_record(source, seed, i, 0)
        question, reference = (t["value"].replace("<image>\n", "") for t in r["conversations"])
        yield dict(id=i, image=r["key"], kind=r["question"], question=question,
                   reference=reference), scene_images([r["scene"]], size)


# ------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------

PARTS = {"seen": lambda p: not p.unseen, "unseen": lambda p: p.unseen,
         "shapes": lambda p: p.scene.things and p.scene.things[0].colour,
         "sprites": lambda p: p.scene.things and not p.scene.things[0].colour}


def score(prompts, scores, ceiling, categories):
    """Return a row of the table: the share of images that pass, averaged over `categories`.

    scores: for each prompt, the share of its images that pass. ceiling: whether the prompt's own
    scene passes after encoder and decoder.
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


def picks(rows, passed, n, keep, verifier):
    """Return the share of right images among the best `keep` of every n candidates of one prompt.

    rows: `best_of.scores` of all candidates. passed: the judge's verdicts. Each n candidates in
    turn form a group. Without a verifier, the share is that of a random pick.
    """
    found = []
    for k in range(0, len(rows) - n + 1, n):
        order = rank(rows[k:k + n], verifier)[:keep] if verifier else range(n)
        found += [passed[k + i] for i in order]
    return float(np.mean(found))


def candidates_table(found, n):
    """Print, for each verifier, how often its picks among up to n candidates are right -> rows.
    found: for each prompt, the arguments `rows` and `passed` of `picks`."""
    print(f"{'verifier':<10}{'keep':>5}{'of':>5}{'right':>8}{'gain over a random pick, 95 %':>34}")
    sizes, rows = [2 ** k for k in range(n.bit_length())], []
    for verifier, keep, size in itertools.product(KEYS, (1, 4), sizes):
        if keep > size:
            continue
        share = [picks(*both, size, keep, verifier) for both in found]
        gain = [a - picks(*both, size, keep, None) for a, both in zip(share, found)]
        mean, low, high = interval([gain])
        right = float(np.mean(share))
        rows.append(dict(verifier=verifier, keep=keep, n=size, right=right, gain=mean, low=low,
                         high=high))
        print(f"{verifier:<10}{keep:>5}{size:>5}{right:>8.3f}"
              f"{f'{mean:+.3f} ({low:+.3f} to {high:+.3f})':>34}")
    return rows


@torch.no_grad()
def reconstruct(encoder, decode, x):
    """Encode and decode images [P,3,S,S] -> [P,3,S,S] on the CPU."""
    device = next(encoder.parameters()).device
    return torch.cat([decode(encoder(part.to(device))).float().cpu() for part in x.split(64)])


# ------------------------------------------------------------------------------------------------
# The judge's own score
# ------------------------------------------------------------------------------------------------

def judge_scenes(source, count, seed):
    """Return Prompts for the complete captions of `count` scenes of a source."""
    scenes = (world.scene(source, seed, i) for i in itertools.count())
    return list(itertools.islice((everything(s) for s in scenes if len(s.words) < 2), count))


def judge_the_judge(prompts, images):
    """Judge images [P,3,S,S] of the prompts' scenes. Return whether each passes for its prompt [P],
    and whether it passes for the prompt with one attribute changed: {attribute: [...]}."""
    true, false = [], collections.defaultdict(list)
    for k, (x, p) in enumerate(zip(images, prompts)):
        seen = None if p.word else look(x)                # once per image: it is the slow part

        def passes(q):
            return read(x, q) if q.word else compare(*seen, q)

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
        x = scene_images([p.scene for p in prompts], encoder.image_size)
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
