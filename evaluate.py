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
questions of builtin:qa, answered greedily, by kind. Intervals are of 95 %, by bootstrap over
prompts or questions. Pictures are drawn in batches: their last bits may differ from sample.py's.
"""
import argparse
import collections
import json
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import benchmark
import data
import encoder as encoders
import flow
import parallel
import run as runs
import sample
import text_model as text
import vae as vaes
import weights
from parallel import UserError

TINY_VGG = weights.ASSETS / "vgg.safetensors"
SMALL = " (small, trained on the built-in data by train_encoder.py; not the pretrained one)"


def vgg_files(args, tiny):
    """What weights.locate has to find for the perceptual net, by torchvision's and LPIPS' names."""
    lpips = args.lpips_weights or (None if tiny or args.vgg else "vgg.pth")
    return [("VGG16", args.vgg or (TINY_VGG if tiny else "vgg16-397923af.pth"), "--vgg")] + (
        [("LPIPS", lpips, "--lpips-weights")] if lpips else [])


def pictures(mixture, count, devices, batch=64):
    """The first `count` pictures of a stream, by batches [B,3,S,S] in [0,1]."""
    for start in range(0, count, batch):
        records = [mixture[i] for i in range(start, min(count, start + batch))]
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
    file = weights.final_of(args.run)
    config = weights.read_weights(file, "--run")[1]
    if "block_out_channels" in config:
        tiny = len(config["block_out_channels"]) < len(vaes.FLUX["block_out_channels"])
        name = args.features or (weights.TINY_CODEC[0] if tiny else weights.HUB["siglip2"][0])
        path, = weights.locate([("encoder for the features", name, "--features")])
        vae = weights.load_vae(file, devices, "--run")
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
    decoder = weights.load_decoder(file, devices, encoder.channels, encoder.mean, encoder.std)
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
    if args.count < 2:
        raise UserError(f"--count {args.count}: a covariance needs 2 pictures or more")
    devices = parallel.setup(args.device, args.dtype)
    mixtures = {}
    for spec in args.data:                              # bad data is said before weights are read
        name = data.parse_spec(spec)[0]
        mixtures[name] = data.Mixture([spec], 64, args.seed, crop="center", text=False)
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
        for k, v in rows.items():
            everything.setdefault(k, []).append(v)
        show(name, rows)
    if len(mixtures) > 1:
        show("all", {k: torch.cat(v) for k, v in everything.items()})
    last = results.pop("all", None) or next(iter(results.values()))
    print(json.dumps({"task": "decoder", "run": str(args.run), "lpips_net": note, "seed": args.seed,
                      **last, "sources": results}))


# ------------------------------------------------------------------------------------------------
# t2i and vqa
# ------------------------------------------------------------------------------------------------

def interval(groups, draws=2000):
    """[values of a category, ...] -> (mean of the categories' means, low, high): 95 % of bootstrap
    draws, which take each category's values again with replacement."""
    rand, means = np.random.default_rng(0), []
    for values in map(np.asarray, groups):
        again = values[rand.integers(len(values), size=(draws, len(values)))]
        means.append(again.mean(1))
    low, high = np.percentile(np.mean(means, 0), (2.5, 97.5))
    return tuple(round(float(v), 4) for v in (np.mean([np.mean(g) for g in groups]), low, high))


def load_run(args, **parts):
    """--run -> (devices, llm, dit, tokenizer, config, encoder, decoder); fp32 on the CPU unless
    --dtype says otherwise, as sample.py."""
    devices = parallel.setup(args.device, args.dtype)
    if args.dtype is None and devices.kind == "cpu":
        devices.dtype = torch.float32
    path, = weights.locate([("model", args.run, "--run")])
    llm, dit, tokenizer, config = weights.load_model(path, devices)
    return devices, llm, dit, tokenizer, config, *weights.load_codec(config, args, devices, **parts)


@torch.no_grad()
def draw(args, prompts, devices, llm, dit, tokenizer, config, decoder):
    """Prompts -> (k, [n,3,S,S]) for each, in batches of about --batch pictures of whole prompts."""
    base = config.get("diffusion_base_dim") or flow.SHIFT_BASE
    alpha = config.get("shift_alpha") or flow.shift_alpha(dit.tokens, dit.channels, base)
    several = max(1, args.batch // args.n)
    for start in tqdm(range(0, len(prompts), several), desc="drawing",
                      disable=not sys.stderr.isatty()):
        some = prompts[start:start + several]
        cond = sample.direct_condition(llm, tokenizer, some, devices.device)            # [b,N,Z]
        noise = torch.stack([sample.noise_for(p, args.seed + i, dit.tokens, dit.channels)
                             for p in some for i in range(args.n)]).to(devices.device)  # [bn,N,C]
        z = sample.generate(dit, cond.repeat_interleave(args.n, 0), noise, alpha, args.steps,
                            args.guidance)
        yield from enumerate(decoder(z).float().cpu().clamp(0, 1).split(args.n), start)


def read_prompts(path):
    """[{"prompt": ..., "id": ...}] of a .jsonl (GenEval's form: other keys are kept), a folder of
    .txt files (DPG-Bench's: the name is the id), a text file with one a line. Raises UserError."""
    what = f"--prompts {path}"
    if not path.exists():
        raise UserError(f"{what}: no such file or folder")
    if path.is_dir():
        records = [{"prompt": f.read_text().strip(), "id": f.stem}
                   for f in sorted(path.glob("*.txt"))]
    else:
        try:
            lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        except UnicodeDecodeError:
            raise UserError(f"{what}: not a text file; expected .jsonl, one prompt a line, or a "
                            "folder of .txt")
        records = [{"prompt": line} for line in lines]
        for number, line in enumerate(lines if path.suffix == ".jsonl" else [], 1):
            try:
                records[number - 1] = dict(json.loads(line))
            except (ValueError, TypeError):
                raise UserError(f"{what}: line {number} is not a JSON object: {line[:40]!r}")
            if not isinstance(records[number - 1].get("prompt"), str):
                raise UserError(f"{what}: line {number} lacks \"prompt\", a string")
    if not records or not all(r["prompt"].strip() for r in records):
        raise UserError(f"{what}: {'an empty prompt' if records else 'no prompt'} in it")
    return records


def write_pictures(args, model, records):
    """GenEval: OUT/00000/metadata.jsonl, samples/00000.png ...; DPG-Bench: OUT/ID.png, a grid."""
    for k, pictures in draw(args, [r["prompt"] for r in records], *model):
        if args.layout == "dpg":
            runs.save_grid(pictures, args.out / f"{records[k].get('id', f'{k:05d}')}.png",
                           columns=2 if args.n > 1 else 1, space=0)
            continue
        folder = args.out / f"{k:05d}"
        for i, picture in enumerate(pictures):
            sample.save_png(picture, folder / "samples" / f"{i:05d}.png", seed=args.seed + i,
                            prompt=records[k]["prompt"], steps=args.steps, guidance=args.guidance)
        (folder / "metadata.jsonl").write_text(json.dumps(records[k]) + "\n")
    print(f"{args.out}: {len(records)} prompts, {args.n} pictures each")


def failure_sheet(failures, path, columns=8, side=128, tall=82):
    """[(picture, prompt, why)] -> a PNG; when there are many, as many of each category."""
    by = collections.defaultdict(list)
    for f in failures:
        by[f[1].category].append(f)
    shown = [f for group in by.values() for f in group[:48 // len(by)]]
    size = columns * (side + 8) + 8, -(-len(shown) // columns) * (side + tall) + 8
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for k, (picture, prompt, why) in enumerate(shown):
        x, y = 8 + k % columns * (side + 8), 8 + k // columns * (side + tall)
        pixels = (benchmark.to_side(picture) * 255).round().byte().permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.NEAREST), (x, y))
        words = textwrap.wrap(prompt.text, 23)[:3] + textwrap.wrap("> " + why, 23)[:3]
        pen.multiline_text((x, y + side + 2), "\n".join(words), "black", ImageFont.load_default(10),
                           spacing=0)
    sheet.save(path)
    print(f"{path}: {len(shown)} of {len(failures)} failures")


def scene_pictures(prompts, size):
    """The scenes that prompts are true of, rendered: [P,3,size,size] in [0,1]."""
    x = np.stack([data.render(p.scene, size) for p in prompts])
    return torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255


@torch.no_grad()
def reconstruct(encoder, decoder, x, batch=64):
    """[P,3,S,S] -> the same through both, on the CPU."""
    device = next(encoder.parameters()).device
    return torch.cat([decoder(encoder(part.to(device))).float().cpu() for part in x.split(batch)])


def t2i(args):
    """Draw the benchmark's prompts and judge the pictures; or draw --prompts for other scorers."""
    given = [value is not None for value in (args.prompts, args.layout, args.out)]
    if any(given) and not all(given):
        raise UserError("--prompts FILE, --layout geneval|dpg and --out FOLDER go together; for "
                        "the built-in benchmark give none of them")
    records = read_prompts(args.prompts) if args.prompts else None
    if records and args.layout == "dpg" and args.n not in (1, 4):
        raise UserError(f"--n {args.n}: --layout dpg draws a grid of 4 pictures a prompt, or 1")
    if records and (args.out.is_file() or args.out.is_dir() and any(args.out.iterdir())):
        raise UserError(f"--out {args.out}: expected a new or an empty folder")
    if args.sheet and (args.sheet.suffix != ".png" or not args.sheet.parent.is_dir()):
        raise UserError(f"--sheet {args.sheet}: expected a .png in a folder that exists")
    prompts = benchmark.prompts(args.per_category)
    devices, llm, dit, tokenizer, config, encoder, decoder = load_run(args, encoder=not records)
    if args.guidance is None:                           # as sample.py: our runs record their alpha
        args.guidance = 3.0 if "shift_alpha" in config else 1.0
    if args.guidance != 1 and not hasattr(dit, "y_embedder"):
        raise UserError(f"--guidance {args.guidance}: the model has no null condition; use 1")
    model = devices, llm, dit, tokenizer, config, decoder
    if records:
        args.out.mkdir(parents=True, exist_ok=True)
        return write_pictures(args, model, records)

    print(f"{len(prompts)} prompts x {args.n} pictures by {args.run}, {args.steps} steps, guidance "
          f"{args.guidance:g}, on {devices}\n", flush=True)
    x_hat = reconstruct(encoder, decoder, scene_pictures(prompts, encoder.image_size))
    ceiling = [benchmark.judge(x, p)[0] for x, p in zip(x_hat, prompts)]
    scores, failures = [], []
    for k, pictures in draw(args, [p.text for p in prompts], *model):
        verdicts = [benchmark.judge(x, prompts[k]) for x in pictures]
        scores.append(np.mean([passed for passed, _ in verdicts]))
        failures += [(x, prompts[k], why)
                     for x, (passed, why) in zip(pictures, verdicts) if not passed]
    print(f"{'category':<16}{'prompts':>8}{'score':>8}{'95 %':>16}{'seen':>8}{'unseen':>8}"
          f"{'shapes':>8}{'sprites':>8}{'ceiling':>9}")
    results = {}

    def show(name, categories):
        """One row: the mean over `categories` of the share of pictures that pass."""
        def of(values, keep=lambda p: True):
            groups = [[v for v, p in zip(values, prompts) if p.category == c and keep(p)]
                      for c in categories]
            return [g for g in groups if g]
        mean, low, high = interval(of(scores))
        part = {"seen": lambda p: not p.unseen, "unseen": lambda p: p.unseen,
                "shapes": lambda p: p.scene.things and p.scene.things[0].colour,
                "sprites": lambda p: p.scene.things and not p.scene.things[0].colour}
        groups = {k: of(scores, keep) for k, keep in part.items()}
        row = results[name] = {"score": mean, "low": low, "high": high, "ceiling":
                               interval(of(ceiling))[0],
                               **{k: interval(g)[0] if g else None for k, g in groups.items()}}
        cells = "".join(f"{'-' if row[k] is None else format(row[k], '.3f'):>8}" for k in part)
        print(f"{name:<16}{sum(map(len, of(scores))):>8}{mean:>8.3f}"
              f"{f'{low:.3f} to {high:.3f}':>16}{cells}{row['ceiling']:>9.3f}")
    for category in benchmark.CATEGORIES:
        show(category, [category])
    show("overall", benchmark.CATEGORIES)
    show("text", [benchmark.TEXT])
    if args.sheet and failures:
        failure_sheet(failures, args.sheet)
    print(json.dumps({"task": "t2i", "run": str(args.run), "steps": args.steps, "seed": args.seed,
                      "guidance": args.guidance, "n": args.n, "prompts": len(prompts),
                      **results.pop("overall"), "categories": results}))


@torch.no_grad()
def answers(llm, tokenizer, questions, z, limit=48, batch=64):
    """Greedy answers to questions about latents z [n,N,C]; those of one length share a batch, so
    that there is no padding: as sample.answer, many at a time."""
    stop = torch.tensor([tokenizer.token_to_id(t) for t in ("<|im_end|>", "<im_start>")],
                        device=z.device)
    rows, by_length, said = [], collections.defaultdict(list), [""] * len(questions)
    for i, q in enumerate(questions):
        ids = text.prompt_ids(tokenizer, q, image=True)
        rows.append(text.expand(ids, [text.IGNORE] * len(ids), llm.tokens))
        by_length[len(rows[i][0])].append(i)
    groups = [g[k:k + batch] for g in by_length.values() for k in range(0, len(g), batch)]
    for group in tqdm(groups, desc="answering", disable=not sys.stderr.isatty()):
        ids, start = (torch.tensor([rows[i][k] for i in group], device=z.device) for k in (0, 2))
        x = llm.embed(ids, start, torch.zeros_like(start, dtype=torch.bool), z[group])     # [b,L,H]
        cache, written, ended = [], [], torch.zeros_like(start, dtype=torch.bool)
        for _ in range(limit):
            token = llm.logits(llm(x, cache)[:, -1]).argmax(-1)                         # [b]
            ended |= torch.isin(token, stop)
            if ended.all():
                break
            written.append(torch.where(ended, stop[0], token))
            x = llm.embed(token[:, None])
        for i, tokens in zip(group, torch.stack(written, 1).tolist() if written else []):
            said[i] = tokenizer.decode([t for t in tokens if t != stop[0]])
    return said


def right(kind, said, expected):
    """Is it the answer? Of `what`, the things in any order; else word for word."""
    said, expected = (s.strip().rstrip(".").lower() for s in (said, expected))
    if kind == "what":
        return sorted(re.split(", | and ", said)) == sorted(re.split(", | and ", expected))
    return said == expected


def vqa(args):
    """Ask unseen questions of builtin:qa and compare the answers, by kind of question."""
    devices, llm, _, tokenizer, _, encoder, _ = load_run(args, decoder=False)
    mixture = data.Mixture(["builtin:qa"], encoder.image_size, args.seed)
    records = [mixture[i] for i in range(args.count)]
    with torch.no_grad():
        z = torch.cat([encoder(x) for x in pictures(mixture, args.count, devices)])     # [n,N,C]
    asked = [r["conversations"][0]["value"].replace("<image>\n", "") for r in records]
    said = answers(llm, tokenizer, asked, z)
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
    if args.show:
        for r, q, a in list(zip(records, asked, said))[:args.show]:
            print(f"  {q}  {a}  [{r['conversations'][1]['value']}]")
    print(json.dumps({"task": "vqa", "run": str(args.run), "seed": args.seed, **results.pop("all"),
                      "kinds": results}))


def judge(args):
    """How often is the judge right? On scenes and their reconstructions, with the true caption and
    with one attribute of it changed."""
    devices = parallel.setup(args.device, args.dtype or "float32")
    paths = weights.locate([("encoder", args.encoder or weights.TINY_CODEC[0], "--encoder"),
                            ("decoder", args.decoder or weights.TINY_CODEC[1], "--decoder")])
    encoder = weights.load_encoder(paths[0], devices)
    decoder = weights.load_decoder(paths[1], devices, encoder.channels, encoder.mean, encoder.std)
    print(f"{args.count} scenes a row\n\n{'scenes':<12}{'picture':<16}{'true passes':>12}"
          f"{'changed passes':>16}")
    results = {}
    for source in ("web", "synthetic", "text"):
        prompts, i = [], 0
        while len(prompts) < args.count:
            scene, i = data.scene(f"builtin:{source}", args.seed, i), i + 1
            if len(scene.words) < 2:
                prompts.append(benchmark.everything(scene))
        changed = [benchmark.change_one(p, data.generator("change", source, k))
                   for k, p in enumerate(prompts)]
        x = scene_pictures(prompts, encoder.image_size)
        for name, images in (("clean", x), ("reconstruction", reconstruct(encoder, decoder, x))):
            true = [benchmark.judge(x, p)[0] for x, p in zip(images, prompts)]
            false = [benchmark.judge(x, q)[0] for x, (_, q) in zip(images, changed)]
            wrong = collections.Counter(which for f, (which, _) in zip(false, changed) if f)
            results[f"{source} {name}"] = {"true": float(np.mean(true)), "changed":
                                           float(np.mean(false)), "wrong": dict(wrong)}
            print(f"{source:<12}{name:<16}{np.mean(true):>12.3f}{np.mean(false):>16.3f}  "
                  + ", ".join(f"{n} {which}" for which, n in wrong.items()), flush=True)
    print(json.dumps({"task": "judge", "count": args.count, "seed": args.seed, "rows": results}))


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
    q.add_argument("--seed", type=runs.positive(zero=True), default=2000,
                   help="of the pictures (trainings use small ones)")
    q = tasks.add_parser("t2i", help=t2i.__doc__)
    q.set_defaults(function=t2i)
    q.add_argument("--n", type=runs.positive(), default=4, help="pictures a prompt")
    q.add_argument("--steps", type=runs.positive(), default=25)
    q.add_argument("--guidance", type=runs.positive(float, zero=True), help="default: as sample.py")
    q.add_argument("--per-category", type=runs.positive(), default=40, help="prompts a category")
    q.add_argument("--batch", type=runs.positive(), default=32, help="pictures at a time")
    q.add_argument("--seed", type=runs.positive(zero=True), default=0, help="of the noise")
    q.add_argument("--sheet", type=Path, help="draw failures with the judge's reasons: a PNG")
    q.add_argument("--prompts", type=Path, help="instead: a .jsonl, a text file, a folder of .txt")
    q.add_argument("--layout", choices=["geneval", "dpg"], help="of the pictures of --prompts")
    q.add_argument("--out", type=Path, help="folder for the pictures of --prompts")
    q = tasks.add_parser("vqa", help=vqa.__doc__)
    q.set_defaults(function=vqa)
    q.add_argument("--count", type=runs.positive(), default=1000, help="questions")
    q.add_argument("--seed", type=runs.positive(zero=True), default=2000, help="of the questions")
    q.add_argument("--show", type=runs.positive(zero=True), default=0, help="print some answers")
    q = tasks.add_parser("judge", help=judge.__doc__)
    q.set_defaults(function=judge)
    q.add_argument("--count", type=runs.positive(), default=100, help="scenes of each source")
    q.add_argument("--seed", type=runs.positive(zero=True), default=2000, help="of the scenes")
    for name, q in tasks.choices.items():
        q.add_argument("--device", choices=["auto", "cpu", "cuda", "xla"], default="auto")
        q.add_argument("--dtype", choices=["bfloat16", "float32"])
        if name in ("t2i", "vqa"):
            q.add_argument("--run", type=Path, default=weights.ASSETS,
                           help="run folder, released folder or hub id")
        if name != "decoder":
            q.add_argument("--encoder", help="default: the one that belongs to the run")
            q.add_argument("--decoder", help="default: the one that belongs to the encoder")
    args = p.parse_args()
    args.function(args)


if __name__ == "__main__":
    runs.main(main)
