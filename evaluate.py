"""Measure trained models. Each command prints its numbers and ends with one JSON line.

    python evaluate.py decoder --run runs/decoder-xl --data folder/ --count 50000
    python evaluate.py t2i --guidance 3                         # the built-in benchmark
    python evaluate.py t2i --prompts geneval.jsonl --layout geneval --out folder
    python evaluate.py vqa --data questions.jsonl --answers answers.jsonl
    python evaluate.py flow --run runs/dit-tiny --data folder/
    python evaluate.py fid --run runs/dit-tiny --data folder/ --count 5000
    python evaluate.py colours --run runs/dit-tiny              # what comes right first
    python evaluate.py candidates --n 32                        # best of N, by each verifier
    python evaluate.py judge                                    # how often is the judge right?

FD-enc is a Frechet distance in the features of the frozen encoder. It is not FID: compare it only
with another FD-enc in the same features on as many images. --inception PATH adds the Frechet
distance in the features of InceptionV3: rFID for reconstructions, FID for generated images.
Intervals are 95 %, by bootstrap. Images are drawn as with sample.py --direct, those of --prompts as
with sample.py.
"""
import collections
import itertools
import json
import sys
from pathlib import Path

import cli               # before torch: it sets how threads wait
import numpy as np
import torch
from tqdm import tqdm

import best_of
import data
import sample
import weights
import stage2
import networks
from chat import request_of
from cli import UserError, printable
from flow import flow_loss, interpolate
from metrics import (add_features, distances, image_count, images, images_and_records, interval,
                     load_inception, measure, round8)
from prompts import check_finite, check_out, check_sampler, check_text
from questions import accuracy, answers, file_questions
from text_model import direct_condition

SMALL = " (small, trained on the built-in data by tiny/train_encoder.py; not the pretrained one)"


def report(args, devices, **values):
    """Print one JSON object: the flags, and the numbers."""
    flags = {k: v for k, v in vars(args).items() if k not in ("function", "device", "batch")}
    print(json.dumps({**flags, "dtype": str(devices.dtype), **values}, default=str))


# ------------------------------------------------------------------------------------------------
# decoder
# ------------------------------------------------------------------------------------------------

def load_reconstruction(args, devices):
    """Load --run -> reconstruct: [B,3,S,S] -> [B,3,S,S]; S; the encoder of FD-enc; whether the
    networks are tiny. A decoder's config names its encoder; without it the latent's channels tell.
    """
    path, = weights.locate([("decoder or VAE", args.run, "--run")])
    source = weights.open_weights(networks.vae_inside(path), "--run")
    if is_vae := any(k.startswith("decoder.up") for k in source.shapes):
        vae = networks.load_vae(path, devices, "--run")
        tiny = len(vae.config.block_out_channels) < 4
        name = args.encoder or (weights.TINY_ENCODER if tiny else weights.HUB["siglip2"][0])
    else:
        channels = next((shape[1] for key, shape in source.shapes.items()
                         if key.endswith("decoder_embed.weight")), 0)
        known = {1152: weights.HUB["siglip2"][0], 1024: weights.HUB["webssl"][0]}
        name = (args.encoder or source.config.get("encoder")
                or known.get(channels, weights.TINY_ENCODER))
    place, = weights.locate([("encoder", name, "--encoder")])
    encoder = networks.load_encoder(place, devices)
    if is_vae:
        return lambda x: vae.decode(vae.encode(x)), 64 if tiny else 256, encoder, tiny
    decode = networks.load_decoder(path, devices, encoder, "--run")
    networks.note_pair(decode, name, "--run")
    resolution = decode.config.image_size
    tiny = decode.config.decoder_hidden_size < 512
    return lambda x: decode(encoder(x)), resolution, encoder, tiny


def show_row(name, rows):
    """Print a row of the table for the tensors of `measure` -> its numbers."""
    fd_enc, rfid = distances(rows)
    means = {k: rows[k].mean().item() if k in rows else None for k in ("psnr", "ssim", "lpips")}
    r = {"images": len(rows["psnr"]), **means, "fd_enc": fd_enc, "rfid": rfid}
    lpips, rfid = ("-" if v is None else f"{v:.4f}" for v in (r["lpips"], rfid))
    print(f"{printable(name)[-27:]:<28}{r['images']:>8}{r['psnr']:>9.2f}{r['ssim']:>8.4f}"
          f"{lpips:>8}{fd_enc:>10.4f}{rfid:>10}", flush=True)
    return r


def decoder(args):
    """reconstruct images (ADM's center crop) and measure the error"""
    devices, mixtures, counts = sample.setup(args), {}, {}
    for spec in args.data:                              # bad data is reported before weights load
        name = data.parse_spec(spec)[0]
        mixtures[name] = data.Mixture([spec], 64, args.seed, crop="center", text=False)
        counts[name] = image_count(mixtures[name], args.count, least=2)
    inception = load_inception(args.inception, devices) if args.inception else None
    reconstruct, resolution, encoder, tiny = load_reconstruction(args, devices)
    vgg, note = None, "left out (--no-lpips)"
    if not args.no_lpips:
        path, *lpips = weights.locate(networks.vgg_files(args, tiny))
        vgg = networks.load_perceptual(path, lpips[0] if lpips else None, devices)
        note = str(path) + SMALL * (vgg.width < 1)
    print(f"reconstructions by {args.run}, {resolution} px, on {devices}\nLPIPS net: {note}\n\n"
          f"{'source':<28}{'images':>8}{'PSNR dB':>9}{'SSIM':>8}{'LPIPS':>8}{'FD-enc':>10}"
          f"{'rFID':>10}")
    results, every = {}, []
    for name, mixture in mixtures.items():
        mixture.resolution = resolution
        x = images(mixture, counts[name], devices, args.batch)
        every.append(measure(reconstruct, x, encoder, vgg, inception))
        total = results[name] = show_row(name, every[-1])
    if len(every) > 1:
        total = show_row("all", {k: torch.cat([rows[k] for rows in every]) for k in every[0]})
    report(args, devices, lpips_net=note, **total, sources=results)


# ------------------------------------------------------------------------------------------------
# Generated images: t2i, fid, candidates and flow
# ------------------------------------------------------------------------------------------------

def load_model(args):
    """Load --run -> (devices, model)."""
    devices = sample.setup(args)
    path, = weights.locate([("model", args.run, "--run")])
    return devices, stage2.load_run(path, devices)


def load_sampler(args):
    """Check the sampler's flags and load --run -> (devices, model, guidance, decode)."""
    check_sampler(args)
    devices, model = load_model(args)
    _, decode = stage2.load_codec(model.config, args, devices, encoder=False)
    return devices, model, sample.guidance_of(args, model), decode


def draw(args, prompts, seeds, model, decode, guidance, devices):
    """Draw each prompt with each of its n seeds and yield its images [n,3,S,S] in [0,1].

    prompts: P texts. seeds: P lists of n. A batch holds whole prompts, about --batch images.
    """
    n = len(seeds[0])
    each = max(1, args.batch // n)
    starts = range(0, len(prompts), each)
    for start in tqdm(starts, desc="drawing", disable=not sys.stderr.isatty()):
        some = slice(start, start + each)
        cond = direct_condition(model.llm, model.tokenizer, prompts[some], devices.device)
        drawn = [(prompt, seed) for prompt, own in zip(prompts[some], seeds[some]) for seed in own]
        z = sample.sample_latents(args, model, cond.repeat_interleave(n, 0), drawn, guidance,
                                  devices)                                  # [bn,N,C]
        x = check_finite("the decoded image", decode(z)).float().cpu().clamp(0, 1)
        yield from x.split(n)


def t2i(args):
    """draw the built-in benchmark and judge the images; or draw --prompts for other scorers"""
    given = [args.prompts, args.layout, args.out]
    if any(given) and not all(given):
        raise UserError("--prompts FILE, --layout geneval|dpg and --out FOLDER go together")
    if args.prompts:                    # sample.py draws them, and refuses flags that it lacks
        sample.main(sys.argv[2:])
        values = {k: str(getattr(args, k)) for k in ("run", "prompts", "layout", "out")}
        return print(json.dumps({"task": "t2i", **values}))
    from tiny import benchmark
    from tiny.judge import judge
    check_sampler(args)
    prompts = benchmark.prompts(args.per_category)
    devices, model = load_model(args)
    guidance = sample.guidance_of(args, model)
    encoder, decode = stage2.load_codec(model.config, args, devices)
    print(f"{len(prompts)} prompts x {args.n} images by {args.run}, {args.steps} steps "
          f"({args.schedule}), guidance {guidance:g}, on {devices}\n", flush=True)
    x = benchmark.scene_images([p.scene for p in prompts], encoder.image_size)
    x_hat = benchmark.reconstruct(encoder, decode, x)
    ceiling = [judge(x, p) for x, p in zip(x_hat, prompts)]
    seeds = [range(args.seed, args.seed + args.n)] * len(prompts)
    drawn = draw(args, [p.text for p in prompts], seeds, model, decode, guidance, devices)
    scores = [np.mean([judge(x, p) for x in images]) for images, p in zip(drawn, prompts)]
    results = benchmark.score_table(prompts, scores, ceiling)
    report(args, devices, guidance=guidance, **results.pop("overall"), categories=results)


def captioned(args, encoder, least=1):
    """Open --data for an encoder -> (mixture, number of images)."""
    mixture = data.Mixture(args.data, encoder.image_size, args.seed, encoder.crop,
                           resample=encoder.resample)
    return mixture, image_count(mixture, args.count, least)


def prompt_of(record):
    """Return the words that ask for a record's image. Raises UserError for a question."""
    if record["task"] != "t2i":
        raise UserError(f"--data: {record['key']} is a question, not a caption; leave it out")
    return request_of(record["conversations"])


def fid(args):
    """measure the Frechet distance between images and images drawn from their captions"""
    devices, model, guidance, decode = load_sampler(args)
    inception = load_inception(args.inception, devices) if args.inception else None
    encoder, _ = stage2.load_codec(model.config, args, devices, decoder=False)
    mixture, count = captioned(args, encoder, least=2)
    rows, prompts = collections.defaultdict(list), []
    for x, records in images_and_records(mixture, count, devices, args.batch):
        prompts += [prompt_of(r) for r in records]
        add_features(rows, "real", x, encoder, inception)
    seeds = [[args.seed + i] for i in range(count)]     # equal captions give different images
    for x in draw(args, prompts, seeds, model, decode, guidance, devices):
        add_features(rows, "fake", round8(x.to(devices.device)), encoder, inception)
    fd_enc, score = distances({k: torch.cat(v) for k, v in rows.items()})
    print(f"{count} images by {args.run}, {args.steps} steps ({args.schedule}), guidance "
          f"{guidance:g}, on {devices}\n\nFD-enc {fd_enc:.4f}"
          + (f"   FID {score:.4f}" if inception else ""))
    report(args, devices, images=count, guidance=guidance, fd_enc=fd_enc, fid=score)


def colours(args):
    """draw single shapes that no training has seen, and count right backgrounds and colours"""
    from tiny import judge, world
    devices, model, guidance, decode = load_sampler(args)
    scenes = judge.single_shapes(args.seed, args.count)
    prompts, seeds = [world.caption(scene) for scene in scenes], [[args.seed]] * len(scenes)
    drawn = draw(args, prompts, seeds, model, decode, guidance, devices)
    background, colour = judge.colours_right(torch.cat(list(drawn)), scenes)
    print(f"{args.count} single shapes by {args.run}, guidance {guidance:g}, on {devices}: "
          f"background right {background:.1%}, object colour right {colour:.1%}")
    report(args, devices, images=args.count, guidance=guidance, background=background,
           colour=colour)


def candidates(args):
    """rank candidates for the benchmark's prompts about shapes, and judge the picks"""
    from tiny import benchmark
    from tiny.judge import judge
    devices, model, guidance, decode = load_sampler(args)
    prompts = [p for p in benchmark.prompts(args.per_category)
               if p.things and all(thing.colour for thing in p.scene.things)]
    seeds, found = range(args.seed, args.seed + args.n), []
    for p in tqdm(prompts, desc="drawing", disable=not sys.stderr.isatty()):
        cond = direct_condition(model.llm, model.tokenizer, [p.text], devices.device)   # [1,N,Z]
        z = sample.sample_latents(args, model, cond, [(p.text, s) for s in seeds], guidance,
                                  devices)                                  # [n,N,C]
        passed = [judge(x, p) for x in check_finite("the decoded image", decode(z))]
        found.append((best_of.scores(model.llm, model.tokenizer, z, p.text), passed))
    print(f"{len(prompts)} prompts x {args.n} candidates by {args.run}, on {devices}\n")
    rows = benchmark.candidates_table(found, args.n)
    report(args, devices, prompts=len(prompts), guidance=guidance, rows=rows)


# ------------------------------------------------------------------------------------------------
# Flow loss
# ------------------------------------------------------------------------------------------------

def flow(args):
    """measure the flow loss on images at fixed times, with fixed noise"""
    devices, model = load_model(args)
    # with its decoder, a VAE's run gives the VAE, whose latent the DiT draws
    encoder, _ = stage2.load_codec(model.config, args, devices, decoder=bool(model.config.vae))
    shape = model.dit.config.tokens, model.dit.config.channels
    mixture, count = captioned(args, encoder)
    loss = [[] for _ in args.times]
    for x, records in images_and_records(mixture, count, devices, args.batch):
        prompts = [prompt_of(r) for r in records]
        cond = direct_condition(model.llm, model.tokenizer, prompts, devices.device)    # [B,N,Z]
        z = check_finite("the latent (made by the encoder)", encoder(x).float())        # [B,N,C]
        generators = [data.rng(args.seed, "evaluate flow", r["n"]) for r in records]
        eps = np.stack([g.standard_normal(shape, np.float32) for g in generators])      # [B,N,C]
        eps = torch.from_numpy(eps).to(z.device)
        for values, time in zip(loss, args.times):
            t = torch.full((len(z),), time, device=z.device)
            v = model.dit(interpolate(z, eps, t), t, cond)
            values += check_finite("the flow loss", flow_loss(v, z, eps)).tolist()
    print(f"flow loss of {args.run} on {count} images, on {devices}\n\n"
          f"{'t':>8}{'loss':>10}{'95 %':>20}")
    rows = []
    for time, values in zip(args.times, loss):
        mean, low, high = interval([values])
        rows.append({"t": time, "loss": mean, "low": low, "high": high})
        print(f"{time:>8g}{mean:>10.4f}{f'{low:.4f} to {high:.4f}':>20}")
    report(args, devices, images=count, alpha=model.config.alpha, flow=float(np.mean(loss)),
           times=rows)


# ------------------------------------------------------------------------------------------------
# Questions
# ------------------------------------------------------------------------------------------------

def vqa(args):
    """ask questions about images and compare the answers with the references, by kind"""
    if args.answers:
        check_out(args.answers, "--answers", ".jsonl", [args.data])
    devices, model = load_model(args)
    encoder, _ = stage2.load_codec(model.config, args, devices, decoder=False)
    if args.data.startswith("builtin:"):
        from tiny.benchmark import questions
        stream = questions(args.data, args.count or 1000, args.seed, encoder.image_size)
    else:
        stream = file_questions(args.data, args.count, encoder)
    rows, bar = [], tqdm(desc="answering", unit="", disable=not sys.stderr.isatty())
    while some := list(itertools.islice(stream, 256)):
        for row, _ in some:
            check_text(row["question"], f"--data: question {row['id']}", model)
        z = torch.cat([encoder(torch.cat([x for _, x in some[k:k + 64]]).to(devices.device))
                       for k in range(0, len(some), 64)])                   # [n,N,C]
        check_finite("the latent (made by the encoder)", z)
        said = answers(model.llm, model.tokenizer, z, [row["question"] for row, _ in some],
                       args.max_tokens)
        rows += [{**row, "answer": a} for (row, _), a in zip(some, said)]
        bar.update(len(some))
    bar.close()
    if args.answers:
        args.answers.parent.mkdir(parents=True, exist_ok=True)
        args.answers.write_text("".join(json.dumps(
            {"question_id": r["id"], "image": r["image"], "prompt": r["question"],
             "text": r["answer"], "reference": r["reference"]}) + "\n" for r in rows))
    known, results = [r for r in rows if r["reference"] is not None], {"all": {"questions": 0}}
    print(f"{len(rows)} questions to {args.run} on {devices}, {len(known)} with a reference\n\n"
          f"{'kind':<10}{'questions':>10}{'right':>8}{'95 %':>16}{'commonest':>11}")
    for kind in [*sorted({r["kind"] for r in known}), "all"] if known else ():
        r = results[kind] = accuracy(known, kind)
        print(f"{kind:<10}{r['questions']:>10}{r['accuracy']:>8.3f}"
              f"{'{low:.3f} to {high:.3f}'.format(**r):>16}{r['commonest']:>11.3f}")
    print("\ncommonest: accuracy of always giving the commonest answer of the kind")
    report(args, devices, **results.pop("all"), kinds=results)


def judge(args):
    """measure the benchmark's judge: scenes and their reconstructions, with the true caption and
    with one attribute of it changed"""
    from tiny.benchmark import judge_table
    devices = sample.setup(args)
    config = stage2.model_config(weights.open_weights(weights.TINY, "--run"))
    encoder, decode = stage2.load_codec(config, args, devices)
    rows = judge_table(encoder, decode, args.count, args.seed)
    report(args, devices, count=args.count, rows=rows)


def main():
    p = cli.Parser(description=__doc__.split("\n")[0])
    tasks, add, positive = p.add_subparsers(dest="task", required=True), {}, cli.positive()
    for function in (decoder, t2i, colours, candidates, vqa, flow, fid, judge):
        q = tasks.add_parser(function.__name__, help=function.__doc__,
                             description=function.__doc__)
        q.set_defaults(function=function, encoder=None, decoder=None)
        add[function] = a = q.add_argument
        if function != judge:
            run = weights.TINY / "decoder.safetensors" if function == decoder else weights.TINY
            a("--run", default=run, help="run, checkpoint, released folder, file or hub id "
              "(default: the shipped one)")
        cli.device_flags(a)
        a("--encoder", help="default: the one that belongs to the run or decoder")
        if function in (t2i, colours, candidates, flow, fid, judge):
            a("--decoder", help="default: the one that belongs to the encoder")
        if function in (t2i, candidates):
            sample.sampler_flags(q, steps=25)
        elif function in (colours, fid):
            sample.sampler_flags(q, 25, 2000, "seed of the unseen data and of the first image "
                                 "(default 2000; trainings use small seeds)")
        else:
            a("--seed", type=cli.seed, default=2000,
              help="seed of the unseen data (default 2000; trainings use small seeds)")
        if function in (decoder, t2i, colours, flow, fid):
            a("--batch", type=positive, default=32, help="images at a time (default 32)")
        if function in (decoder, fid):
            a("--inception", help="InceptionV3 of torch-fidelity "
              "(pt_inception-2015-12-05-6726825d.pth): adds rFID or FID")
        if function in (flow, fid):
            a("--data", nargs="+", metavar="SOURCE", default=["builtin:web", "builtin:synthetic"],
              help="images with captions (default: builtin:web builtin:synthetic)")

    for function, count, what in ((decoder, 500, "images of each source"), (flow, 256, "images"),
                                  (colours, 256, "shapes"), (fid, 1000, "images of each kind"),
                                  (judge, 100, "scenes of each source")):
        add[function]("--count", type=positive, default=count, help=f"{what} (default {count})")
    a = add[decoder]
    a("--data", nargs="+", metavar="SOURCE", help="images (default: three built-in sources)",
      default=["builtin:web", "builtin:synthetic", "builtin:text"])
    a("--vgg", help="torchvision's VGG16 (default for a tiny decoder: tiny/vgg.safetensors)")
    a("--lpips-weights", help="LPIPS v0.1 lin0..4, if the file of --vgg lacks them")
    a("--no-lpips", action="store_true", help="leave LPIPS out")
    a = add[t2i]
    a("--n", type=positive, default=4, help="images per prompt (default 4)")
    a("--per-category", type=positive, default=40, help="prompts of each category (default 40)")
    a("--prompts", type=Path, help="draw these instead: a .jsonl, a text file, a folder of "
      ".txt; takes the flags and defaults of sample.py")
    a("--layout", choices=["geneval", "dpg"], help="layout of the images of --prompts")
    a("--out", type=Path, help="folder for the images of --prompts")
    a = add[candidates]
    a("--n", type=positive, default=32, help="candidates per prompt (default 32)")
    a("--per-category", type=positive, default=40, help="prompts, with those that are not about "
      "shapes alone, which are left out (default 40)")
    a = add[vqa]
    a("--data", default="builtin:qa", metavar="SOURCE", help="builtin:qa (default), builtin:align "
      "(what the verifiers of best_of.py ask) or a LLaVA-style .jsonl")
    a("--count", type=positive, help="questions (default: 1000 built-in ones, all of a file)")
    a("--max-tokens", type=positive, default=48, help="length of an answer (default 48)")
    a("--answers", type=Path, help="write every answer into this .jsonl, for other scorers")
    add[flow]("--times", type=cli.share, nargs="+", metavar="T",
              help="times t, from 0 to below 1 (default 0.1 0.2 ... 0.9)",
              default=[k / 10 for k in range(1, 10)])
    args = p.parse_args()
    with torch.no_grad():
        args.function(args)


if __name__ == "__main__":
    cli.main(main)
