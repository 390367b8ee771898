"""Measure what was trained.

    python evaluate.py decoder                                          # the shipped tiny decoder
    python evaluate.py decoder --run runs/decoder-xl --data folder/ --count 50000
    python evaluate.py t2i --run runs/dit-tiny --guidance 3 --sheet failures.png
    python evaluate.py t2i --prompts geneval.jsonl --layout geneval --out folder
    python evaluate.py vqa
    python evaluate.py judge                                            # is the judge right?

decoder: PSNR, SSIM, LPIPS and a Frechet distance of reconstructions of unseen pictures, a row a
source and one for all. FD-enc is taken in the features of a frozen encoder (--features), not of
Inception: it is no rFID, and compares only with another FD-enc in the same features on as many
pictures. --inception PATH adds the Frechet distance of the field, rFID, in those of InceptionV3.

t2i: the built-in compositional benchmark (benchmark.py), or pictures for the official scorers; vqa:
built-in questions, answered greedily, by kind. Intervals are of 95 %, by bootstrap over
prompts or questions. Pictures are drawn as with sample.py's --direct, in batches: their last bits
may differ from its.
"""
import argparse
import collections
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import benchmark
import best_of
import data
import encoder as encoders
import flow
import parallel
import run as runs
import sample
import text_model as text
import vae as vaes
import weights
import world
from parallel import UserError

TINY_VGG = weights.ASSETS / "vgg.safetensors"
SMALL = " (small, trained on the built-in data by train_encoder.py; not the pretrained one)"


def vgg_files(args, tiny, lpips=True):
    """What weights.locate has to find for the perceptual net, by torchvision's and LPIPS' names
    (load_perceptual looks for the latter too). lpips False: Gram terms alone."""
    lpips = lpips and (args.lpips_weights or (None if tiny or args.vgg else "vgg.pth"))
    return [("VGG16", args.vgg or (TINY_VGG if tiny else "vgg16-397923af.pth"), "--vgg")] + (
        [("LPIPS", lpips, "--lpips-weights")] if lpips else [])


def pictures(mixture, count, devices, batch=64):
    """The first `count` pictures of a stream, by batches [B,3,S,S] in [0,1]. Broken ones are named;
    DataError when they are many."""
    skips = data.SkipCounter()
    for start in range(0, count, batch):
        records = [mixture[i] for i in range(start, min(count, start + batch))]
        for r in records:
            skips.update(r["skipped"], 1)
        images = torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records])
        yield parallel.place({"images": images}, devices)["images"].float() / 255


# ------------------------------------------------------------------------------------------------
# Metrics
# ------------------------------------------------------------------------------------------------

def round8(x):
    """[0,1] as a picture file stores it: clamped, 8 bits."""
    return (x.clamp(0, 1) * 255).round() / 255


def psnr(a, b):
    """[B,3,H,W] in [0,1], both rounded to 8 bits -> [B] in dB (100 for equal pictures)."""
    return -10 * (round8(a) - round8(b)).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()


def ssim_map(a, b, window=11, sigma=1.5, k1=0.01, k2=0.03):
    """[B,3,H,W] in [0,1], sides >= 6 -> [B,3,H,W] (Wang et al. 2004): Gaussian window, pictures
    mirrored at the border."""
    x = torch.arange(window, device=a.device, dtype=torch.float64) - window // 2
    g = torch.exp(-x.square() / (2 * sigma ** 2))
    kernel = torch.outer(g, g) / g.sum() ** 2                               # [11,11]
    kernel = kernel.to(a.dtype).expand(a.shape[1], 1, -1, -1)

    def blur(y):
        return F.conv2d(F.pad(y, [window // 2] * 4, "reflect"), kernel, groups=y.shape[1])
    c1, c2, ma, mb = k1 ** 2, k2 ** 2, blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    return (2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))


def ssim(a, b):
    """[B,3,H,W] in [0,1] -> [B], the map's mean over space and channels (torchmetrics 1.x)."""
    return ssim_map(a, b).mean(dim=(1, 2, 3))


def frechet(a, b):
    """Features [n,d], [m,d] -> |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2).

    float64. The matrix under the root is symmetric, unlike S_a S_b of the usual form, and has the
    same eigenvalues, so eigenvalues are all it takes and no root of it can turn complex.
    """
    a, b = a.double().cpu(), b.double().cpu()
    sa, sb = (torch.cov(x.T).reshape(x.shape[1], -1) for x in (a, b))       # [d,d]
    values, vectors = torch.linalg.eigh(sa)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ sb @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + sa.trace() + sb.trace() - 2 * cross).item()


# ------------------------------------------------------------------------------------------------
# decoder
# ------------------------------------------------------------------------------------------------

def load_codec(args, devices):
    """-> reconstruct: [B,3,S,S] -> [B,3,S,S]; S; the encoder of the features; is it the tiny size?

    A decoder's config names its encoder; a published one has none: its width tells.
    """
    file = weights.vae_inside(*weights.locate([("decoder or VAE", args.run, "--run")]))
    state, config = weights.read_weights(file, "--run")
    if any(k.startswith("decoder.up") for k in state):
        if args.encoder:
            raise UserError(f"--encoder {args.encoder}: {args.run} is a VAE, its own encoder; "
                            "--features names the network of FD-enc")
        vae = weights.load_vae(file, devices, "--run")
        tiny = len(vae.config["block_out_channels"]) < len(vaes.FLUX["block_out_channels"])
        name = args.features or (weights.TINY_CODEC[0] if tiny else weights.HUB["siglip2"][0])
        path, = weights.locate([("encoder for the features", name, "--features")])
        encoder = weights.load_encoder(path, devices)
        return lambda x: vae.decode(vae.encode(x)), 64 if tiny else 256, encoder, tiny
    by_width = {encoders.SO400M["hidden_size"]: weights.HUB["siglip2"][0],
                encoders.WEBSSL_300M["hidden_size"]: weights.HUB["webssl"][0]}
    name = config.get("encoder", by_width.get(config.get("hidden_size"), weights.TINY_TOWER))
    tiny = name == weights.TINY_TOWER or config.get("image_size", 224) <= 64
    name = args.encoder or (weights.TINY_CODEC[0] if name == weights.TINY_TOWER else name)
    wanted = [("encoder", name, "--encoder")]
    wanted += [("encoder for the features", args.features, "--features")] * bool(args.features)
    paths = weights.locate(wanted)
    encoder = weights.load_encoder(paths[0], devices, config.get("layers", 1))
    decoder = weights.load_decoder(file, devices, encoder.channels, encoder.mean, encoder.std,
                                   flag="--run")
    weights.note_pair(decoder, name, "--run")
    features = weights.load_encoder(paths[1], devices) if args.features else encoder
    resolution = decoder.patch * decoder.grid
    return lambda x: decoder(decoder.normalise(encoder(x))), resolution, features, tiny


def load_inception(path, devices):
    """--inception -> f: [B,3,H,W] in [0,1] -> [B,2048], torch-fidelity's `inception-v3-compat` (the
    TensorFlow network of FID, its resizing included). Raises UserError."""
    path, = weights.locate([("InceptionV3", path, "--inception")])
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(f"--inception {path} needs torch-fidelity ({error}): pip install "
                        "torch-fidelity, or leave the flag out")
    weights.read_weights(path, "--inception")           # tensors alone: theirs would run code
    with weights.user_errors(f"--inception {path}"):
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(path))
    net.to(devices.device).eval()
    return lambda x: net((x * 255).round().byte())[0]


@torch.no_grad()
def measure(reconstruct, images, features, vgg, inception=None):
    """Batches of pictures -> {metric: tensor}: psnr, ssim, lpips [n] and the features of both."""
    rows = {}
    for x in images:
        x_hat = round8(reconstruct(x))
        row = dict(psnr=psnr(x_hat, x), ssim=ssim(x_hat, x), real=features(x).mean(1),  # [B,C]
                   fake=features(x_hat).mean(1))
        if inception:
            row.update(real_inception=inception(x), fake_inception=inception(x_hat))    # [B,2048]
        if vgg:
            row["lpips"] = vgg.lpips(vgg.maps(x_hat), vgg.maps(x))
        for k, v in row.items():
            rows.setdefault(k, []).append(v.float().cpu())
    return {k: torch.cat(v) for k, v in rows.items()}


def summary(rows):
    """{metric: tensor} -> the numbers of a table's row."""
    return dict(images=len(rows["psnr"]), psnr=rows["psnr"].mean().item(),
                ssim=rows["ssim"].mean().item(),
                lpips=rows["lpips"].mean().item() if "lpips" in rows else None,
                fd_enc=frechet(rows["real"], rows["fake"]),
                rfid=frechet(rows["real_inception"], rows["fake_inception"])
                if "real_inception" in rows else None)


def decoder(args):
    """Reconstruct unseen pictures (ADM's centre crop) and print the errors."""
    devices = sample.devices_of(args)
    mixtures = {}
    for spec in args.data:                              # bad data is said before weights are read
        name = data.parse_spec(spec)[0]
        mixtures[name] = data.Mixture([spec], 64, args.seed, crop="center", text=False)
        if min(args.count, mixtures[name].size(0) or 2) < 2:
            raise UserError(f"--data {name} --count {args.count}: 1 picture; a covariance needs "
                            "2 pictures or more")
    inception = load_inception(args.inception, devices) if args.inception else None
    reconstruct, resolution, features, tiny = load_codec(args, devices)
    vgg, note = None, "left out (--no-lpips)"
    if args.lpips and tiny and not args.vgg and not TINY_VGG.is_file():
        note = f"left out: {TINY_VGG} is not there (train_encoder.py --arch vgg makes it)"
    elif args.lpips:
        paths = weights.locate(vgg_files(args, tiny))
        vgg = weights.load_perceptual(paths[0], paths[1] if len(paths) > 1 else None, devices)
        note = str(paths[0]) + SMALL * (vgg.width < 1)
    print(f"reconstructions by {args.run}, {resolution} px, on {devices}\nLPIPS net: {note}\n")
    header = f"{'source':<28}{'images':>8}{'PSNR dB':>9}{'SSIM':>8}{'LPIPS':>8}{'FD-enc':>10}"
    header += f"{'rFID':>10}" if inception else ""
    print(header)
    results, everything = {}, {}

    def show(name, rows):
        r = results[name] = summary(rows)
        lpips = "-" if r["lpips"] is None else f"{r['lpips']:.4f}"
        print(f"{name[-27:]:<28}{r['images']:>8}{r['psnr']:>9.2f}{r['ssim']:>8.4f}{lpips:>8}"
              f"{r['fd_enc']:>10.4f}" + (f"{r['rfid']:>10.4f}" if inception else ""), flush=True)
    for name, mixture in mixtures.items():
        mixture.resolution = resolution
        count = min(args.count, mixture.size(0) or args.count)
        rows = measure(reconstruct, pictures(mixture, count, devices, args.batch), features, vgg,
                       inception)
        if bad := [k for k, v in rows.items() if not v.isfinite().all()]:
            raise UserError(f"--run {args.run}: its reconstructions of {name} are not finite "
                            f"({', '.join(bad)})")
        for k, v in rows.items():
            everything.setdefault(k, []).append(v)
        show(name, rows)
    if len(mixtures) > 1:
        show("all", {k: torch.cat(v) for k, v in everything.items()})
    last = results.pop("all", None) or next(iter(results.values()))
    print(json.dumps({"task": "decoder", "run": str(args.run), "lpips_net": note, "seed": args.seed,
                      "dtype": str(devices.dtype), **last, "sources": results}))


# ------------------------------------------------------------------------------------------------
# t2i and vqa
# ------------------------------------------------------------------------------------------------

def interval(groups):
    """[values of a category, ...] -> (mean of the categories' means, low, high): 95 % of 2,000
    bootstrap draws, which take each category's values again with replacement."""
    rand, means = np.random.default_rng(0), []
    for values in map(np.asarray, groups):
        again = values[rand.integers(len(values), size=(2000, len(values)))]
        means.append(again.mean(1))
    low, high = np.percentile(np.mean(means, 0), (2.5, 97.5))
    return tuple(round(float(v), 4) for v in (np.mean([np.mean(g) for g in groups]), low, high))


def load_run(args, **parts):
    """--run -> (devices, llm, dit, tokenizer, config, encoder, decoder)."""
    devices = sample.devices_of(args)
    path, = weights.locate([("model", args.run, "--run")])
    llm, dit, tokenizer, config = weights.load_model(path, devices)
    return devices, llm, dit, tokenizer, config, *weights.load_codec(config, args, devices, **parts)


@torch.no_grad()
def draw(args, prompts, device, llm, dit, tokenizer, decoder, alpha, guidance):
    """Prompts -> [n,3,S,S] for each, in batches of about --batch pictures of whole prompts."""
    several = max(1, args.batch // args.n)
    for start in tqdm(range(0, len(prompts), several), desc="drawing",
                      disable=not sys.stderr.isatty()):
        some = prompts[start:start + several]
        cond = text.direct_condition(llm, tokenizer, some, device)                      # [b,N,Z]
        noise = torch.stack([flow.noise_for(p, args.seed + i, dit.tokens, dit.channels,
                                            args.schedule, device)
                             for p in some for i in range(args.n)]).to(device)          # [bn,N,C]
        z = flow.generate(dit, cond.repeat_interleave(args.n, 0), noise, alpha, args.steps,
                          guidance, args.schedule, interval=args.guidance_interval)
        yield from decoder(z).float().cpu().clamp(0, 1).split(args.n)


def failure_sheet(failures, path):
    """[(picture, prompt, why)] -> a PNG; when there are many, as many of each category."""
    by = collections.defaultdict(list)
    for f in failures:
        by[f[1].category].append(f)
    shown = [f for group in by.values() for f in group[:48 // len(by)]]
    images = [(benchmark.to_side(x) * 255).round().byte().permute(1, 2, 0).numpy()
              for x, _, _ in shown]
    path.parent.mkdir(parents=True, exist_ok=True)
    data.contact_sheet(images, [f"{p.text}\n> {why}" for _, p, why in shown], 8).save(path)
    print(f"{path}: {len(shown)} of {len(failures)} failures")


def scene_pictures(prompts, size):
    """The scenes that prompts are true of, rendered: [P,3,size,size] in [0,1]."""
    x = np.stack([world.render(p.scene, size) for p in prompts])
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def reconstruct(encoder, decoder, x, batch=64):
    """[P,3,S,S] -> the same through both, on the CPU."""
    device = next(encoder.parameters()).device
    return torch.cat([decoder(encoder(part.to(device))).float().cpu() for part in x.split(batch)])


PARTS = {"seen": lambda p: not p.unseen, "unseen": lambda p: p.unseen,
         "shapes": lambda p: p.scene.things and p.scene.things[0].colour,
         "sprites": lambda p: p.scene.things and not p.scene.things[0].colour}


def score(prompts, scores, ceiling, categories):
    """The share of pictures that pass, mean of `categories`: a table's row as a dict."""
    def of(values, keep=lambda p: True):
        groups = [[v for v, p in zip(values, prompts) if p.category == c and keep(p)]
                  for c in categories]
        return [g for g in groups if g]
    mean, low, high = interval(of(scores))
    parts = {k: of(scores, keep) for k, keep in PARTS.items()}
    return {"prompts": sum(map(len, of(scores))), "score": mean, "low": low, "high": high,
            **{k: interval(g)[0] if g else None for k, g in parts.items()},
            "ceiling": interval(of(ceiling))[0]}


def t2i(args):
    """Draw the benchmark's prompts and judge the pictures; or draw --prompts for other scorers."""
    given = [value is not None for value in (args.prompts, args.layout, args.out)]
    if any(given) and not all(given):
        raise UserError("--prompts FILE, --layout geneval|dpg and --out FOLDER go together; for "
                        "the built-in benchmark give none of them")
    for flag in ("--per-category", "--batch", "--sheet"):
        if args.prompts and getattr(args, flag[2:].replace("-", "_")):
            raise UserError(f"{flag} is for the built-in benchmark, not for --prompts")
    if args.prompts:                    # sample.py does that; it refuses what it has no flag for
        sample.main(sys.argv[2:])
        return print(json.dumps({"task": "t2i", **{k: str(getattr(args, k)) for k in (
            "run", "prompts", "layout", "out")}}))
    args.steps, args.batch = args.steps or 25, args.batch or 32
    sample.check_schedule(args)
    if args.sheet:
        sample.check_out(args.sheet, "--sheet", ".png")
    prompts = benchmark.prompts(args.per_category or 40)
    devices, llm, dit, tokenizer, config, encoder, decoder = load_run(args)
    alpha, guidance = sample.alpha_and_guidance(args, dit, config)
    at = "" if (where := args.guidance_interval) == (0, 1) else f" at t in {list(where)}"
    print(f"{len(prompts)} prompts x {args.n} pictures by {args.run}, {args.steps} steps "
          f"({args.schedule}), guidance {guidance:g}{at}, on {devices}\n", flush=True)
    x_hat = reconstruct(encoder, decoder, scene_pictures(prompts, encoder.image_size))
    ceiling = [benchmark.judge(x, p)[0] for x, p in zip(x_hat, prompts)]
    scores, failures = [], []
    for drawn, p in zip(draw(args, [p.text for p in prompts], devices.device, llm, dit, tokenizer,
                             decoder, alpha, guidance), prompts):
        verdicts = [benchmark.judge(x, p) for x in drawn]
        scores.append(np.mean([passed for passed, _ in verdicts]))
        failures += [(x, p, why) for x, (passed, why) in zip(drawn, verdicts) if not passed]
    print(f"{'category':<16}{'prompts':>8}{'score':>8}{'95 %':>16}"
          + "".join(f"{k:>9}" for k in (*PARTS, "ceiling")))
    results = {}
    for name in (*benchmark.CATEGORIES, "overall", benchmark.TEXT):
        r = results[name] = score(prompts, scores, ceiling,
                                  benchmark.CATEGORIES if name == "overall" else [name])
        print(f"{name:<16}{r['prompts']:>8}{r['score']:>8.3f}"
              f"{'{low:.3f} to {high:.3f}'.format(**r):>16}"
              + "".join(f"{'-' if r[k] is None else format(r[k], '.3f'):>9}"
                        for k in (*PARTS, "ceiling")))
    print("\nceiling: the same scenes, rendered and reconstructed by the decoder")
    if args.sheet:
        failure_sheet(failures, args.sheet)
    print(json.dumps({"task": "t2i", "run": str(args.run), "steps": args.steps,
                      "schedule": args.schedule, "seed": args.seed,
                      "guidance": guidance, "guidance_interval": args.guidance_interval,
                      "n": args.n, "dtype": str(devices.dtype),
                      **results.pop("overall"), "categories": results}))


def answers(llm, tokenizer, z, questions, batch=64):
    """Greedy answers to questions about latents [n,N,C]; those of one length share a batch, so that
    there is no padding."""
    by_length, said = collections.defaultdict(list), [None] * len(questions)
    for i, q in enumerate(questions):
        by_length[len(text.encode_text(tokenizer, q))].append(i)
    groups = [g[k:k + batch] for g in by_length.values() for k in range(0, len(g), batch)]
    for g in tqdm(groups, desc="answering", disable=not sys.stderr.isatty()):
        for i, a in zip(g, best_of.answers(llm, tokenizer, z[g], [questions[i] for i in g])):
            said[i] = a
    return said


def right(kind, said, expected):
    """Is it the answer? Of `what`, the things in any order; else word for word."""
    said, expected = (s.strip().rstrip(".").lower() for s in (said, expected))
    if kind == "what":
        return sorted(re.split(", | and ", said)) == sorted(re.split(", | and ", expected))
    return said == expected


def vqa(args):
    """Ask unseen questions and compare the answers, by kind of question."""
    devices, llm, _, tokenizer, _, encoder, _ = load_run(args, decoder=False)
    mixture = data.Mixture([args.data], encoder.image_size, args.seed)
    records = [mixture[i] for i in range(args.count)]
    with torch.no_grad():
        z = torch.cat([encoder(x) for x in pictures(records, args.count, devices)])     # [n,N,C]
    asked = [r["conversations"][0]["value"].replace("<image>\n", "") for r in records]
    said = answers(llm, tokenizer, z, asked)
    good, expected = collections.defaultdict(list), collections.defaultdict(list)
    for r, a in zip(records, said):
        expected[r["question"]].append(r["conversations"][1]["value"])
        good[r["question"]].append(right(r["question"], a, expected[r["question"]][-1]))
    print(f"{args.count} questions to {args.run} on {devices}\n\n{'kind':<10}{'questions':>10}"
          f"{'right':>8}{'95 %':>16}{'commonest':>11}")
    results = {}
    for kind in [*sorted(good), "all"]:                 # all: of all questions, whatever their kind
        values = good[kind] if kind != "all" else sum(good.values(), [])
        mean, low, high = interval([values])
        most = sum(collections.Counter(e).most_common(1)[0][1] for k, e in expected.items()
                   if kind in (k, "all")) / len(values)
        results[kind] = {"questions": len(values), "accuracy": mean, "low": low, "high": high,
                         "commonest": round(most, 4)}
        print(f"{kind:<10}{len(values):>10}{mean:>8.3f}{f'{low:.3f} to {high:.3f}':>16}"
              f"{most:>11.3f}")
    print("\ncommonest: right by always saying the commonest answer of the kind")
    for r, q, a in list(zip(records, asked, said))[:args.show]:
        print(f"  {q}  {a}  [{r['conversations'][1]['value']}]")
    print(json.dumps({"task": "vqa", "run": str(args.run), "seed": args.seed, **results.pop("all"),
                      "kinds": results}))


def judge_scenes(source, count, seed):
    """`count` scenes of a source, as prompts that ask for all of it."""
    scenes = (world.scene(source, seed, i) for i in itertools.count())
    return list(itertools.islice((benchmark.everything(s) for s in scenes if len(s.words) < 2),
                                 count))


def judge_the_judge(prompts, pictures):
    """Pictures [P,3,S,S] of the prompts' scenes -> do they pass [P], and for each attribute, does
    the prompt with that one changed pass: {attribute: [...]}."""
    true, false = [], collections.defaultdict(list)
    for k, (x, p) in enumerate(zip(pictures, prompts)):
        seen = None if p.word else benchmark.look(x)
        passes = (lambda q: benchmark.compare(*seen, q)[0] if seen else benchmark.read(x, q)[0])
        true.append(passes(p))
        for which, q in benchmark.changes(p, world.generator("change", p.text, k)).items():
            false[which].append(passes(q))
    return true, false


def judge(args):
    """How often is the judge right? On scenes and their reconstructions, with the true caption and
    with one attribute of it changed."""
    devices = sample.devices_of(args)
    paths = weights.locate([("encoder", args.encoder or weights.TINY_CODEC[0], "--encoder"),
                            ("decoder", args.decoder or weights.TINY_CODEC[1], "--decoder")])
    encoder = weights.load_encoder(paths[0], devices)
    decoder = weights.load_decoder(paths[1], devices, encoder.channels, encoder.mean, encoder.std,
                                   as_it_is=True)
    print(f"{'scenes':<12}{'picture':<16}{'true pass':>10}{'95 %':>16}{'changed pass':>14}")
    rows = {}
    for source in ("web", "synthetic", "text"):
        prompts = judge_scenes(f"builtin:{source}", args.count, args.seed)
        x = scene_pictures(prompts, encoder.image_size)
        for name, images in (("clean", x), ("reconstruction", reconstruct(encoder, decoder, x))):
            true, false = judge_the_judge(prompts, images)
            mean, low, high = interval([true])
            every = np.mean(sum(false.values(), []))
            rows[f"{source} {name}"] = {
                "scenes": len(true), "true": mean, "low": low, "high": high, "changed": every,
                **{which: [sum(v), len(v)] for which, v in false.items()}}
            print(f"{source:<12}{name:<16}{mean:>10.3f}{f'{low:.3f} to {high:.3f}':>16}"
                  f"{every:>14.4f}  "
                  + ", ".join(f"{k} {sum(v)}/{len(v)}" for k, v in false.items()), flush=True)
    print(json.dumps({"task": "judge", "count": args.count, "seed": args.seed, "rows": rows}))


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    tasks = p.add_subparsers(dest="task", required=True)
    q = tasks.add_parser("decoder", help=decoder.__doc__)
    q.set_defaults(function=decoder)
    q.add_argument("--run", type=Path, default=weights.TINY_CODEC[1],
                   help="run folder, file or released folder of a decoder or a VAE")
    q.add_argument("--encoder", help="of the decoder (default: the one its config names)")
    q.add_argument("--features", help="encoder whose features FD-enc uses (default: the decoder's)")
    q.add_argument("--vgg", help="torchvision's VGG16 (tiny: assets/tiny/vgg.safetensors)")
    q.add_argument("--lpips-weights", help="LPIPS v0.1 lin0..4, where --vgg's file lacks them")
    q.add_argument("--inception", help="InceptionV3 of torch-fidelity "
                   "(pt_inception-2015-12-05-6726825d.pth): adds rFID")
    q.add_argument("--lpips", action=argparse.BooleanOptionalAction, default=True)
    q.add_argument("--data", nargs="+", metavar="SOURCE",
                   default=["builtin:web", "builtin:synthetic", "builtin:text"])
    q.add_argument("--count", type=runs.positive(), default=500, help="pictures of each source")
    q.add_argument("--batch", type=runs.positive(), default=50)
    q.add_argument("--seed", type=runs.seed, default=2000,
                   help="of the pictures (trainings use small ones)")
    q = tasks.add_parser("t2i", help=t2i.__doc__)
    q.set_defaults(function=t2i)
    q.add_argument("--n", type=runs.positive(), default=4, help="pictures a prompt")
    q.add_argument("--steps", type=runs.positive(), help="default 25; of --prompts 50")
    q.add_argument("--schedule", choices=["clean", "compat"], default="clean")
    q.add_argument("--guidance", type=runs.positive(float, zero=True), help="default: as sample.py")
    q.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"),
                   help="guide only at times t in it; default 0 1, all (1 is noise)")
    q.add_argument("--per-category", type=runs.positive(), help="prompts a category (40)")
    q.add_argument("--batch", type=runs.positive(), help="pictures at a time (32)")
    q.add_argument("--seed", type=runs.seed, default=0, help="of the noise")
    q.add_argument("--sheet", type=Path, help="draw failures with the judge's reasons: a PNG")
    q.add_argument("--prompts", type=Path, help="instead: a .jsonl, a text file, a folder of .txt")
    q.add_argument("--layout", choices=["geneval", "dpg"], help="of the pictures of --prompts")
    q.add_argument("--out", type=Path, help="folder for the pictures of --prompts")
    q = tasks.add_parser("vqa", help=vqa.__doc__)
    q.set_defaults(function=vqa)
    q.add_argument("--count", type=runs.positive(), default=1000, help="questions")
    q.add_argument("--seed", type=runs.seed, default=2000, help="of the questions")
    q.add_argument("--data", choices=["builtin:qa", "builtin:align"], default="builtin:qa",
                   help="align: only what the verifiers of best_of.py ask")
    q.add_argument("--show", type=runs.positive(zero=True), default=0, help="print some answers")
    q = tasks.add_parser("judge", help=judge.__doc__)
    q.set_defaults(function=judge)
    q.add_argument("--count", type=runs.positive(), default=100, help="scenes of each source")
    q.add_argument("--seed", type=runs.seed, default=2000, help="of the scenes")
    for name, q in tasks.choices.items():
        q.add_argument("--device", choices=["auto", "cpu", "cuda", "xla"], default="auto")
        q.add_argument("--dtype", choices=["bfloat16", "float32"])
        if name in ("t2i", "vqa"):
            q.add_argument("--run", type=Path, default=weights.ASSETS,
                           help="run folder, released folder or hub id")
        if name != "decoder":
            q.add_argument("--encoder", help="default: the one that belongs to the run")
        q.set_defaults(decoder=None)
        if name in ("t2i", "judge"):
            q.add_argument("--decoder", help="default: the one that belongs to the encoder")
    args = p.parse_args()
    args.function(args)


if __name__ == "__main__":
    runs.main(main)
