"""Use a trained model: prompt -> image, image + question -> text, reconstruct, best of N.

    python sample.py "a red star on a white background"        # shipped weights; writes out.png
    python sample.py "a cat" --run runs/dit-2b --n 4 --guidance 3 --seed 0
    python sample.py "a cat" --best-of 8 --keep 1 --verifier prompt
    python sample.py --image photo.png "how many cats are there?"
    python sample.py --reconstruct photo.png
    python sample.py --prompts prompts.txt --out folder/
    python sample.py "a cat" --save-latent z.safetensors;  python sample.py --latent z.safetensors

    cond = LLM(prompt, queries);  z = flow.sample(dit, cond, noise);  image = decoder(z)

The schedule `euler` walks from t = 1 to 0. `authors` is the authors' sampler with its stray last
step and their noise, to repeat their numbers; guidance does nothing in their code, so it is off
with this schedule unless it is given. The same prompt and seed give the same image in any batch, up
to rounding (one of 255 levels).
"""
import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import cli               # before torch: it sets how threads wait
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import best_of
import flow
import parallel
import weights
import stage2
from best_of import check_finite
from chat import IMAGE, SPECIAL, prompt_ids
from training import image_sheet
from cli import UserError, printable
from files import open_image
from prompts import check_geneval, png_files, read_prompts
from text_model import direct_condition


# ------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def answer(llm, tokenizer, question, z=None, limit=512):
    """Answer greedily: yield the text as it is written and, if the model opens an image, its
    condition [1,N,Z] at the end. The model writes `<im_start>` itself; the queries follow.

    question: the user's words. z [1,N,C]: the image that they are about, or None.
    """
    opens = tokenizer.token_to_id("<im_start>")
    cache, written, shown = [], [], ""
    x = best_of.question(llm, tokenizer, z, question)
    for _, token, alive in best_of.greedy(llm, tokenizer, x, limit, cache):             # [1]
        if token == opens:                              # then the queries, in one forward pass
            start = torch.ones_like(token)
            ids = F.pad(token[None], (0, llm.tokens), value=IMAGE)                      # [1,1+N]
            yield llm.condition(llm(llm.embed(ids, start), cache), start)
        if not alive:
            return
        written.append(token.item())
        now = tokenizer.decode(written)
        if not now.endswith("\ufffd"):                  # half of a character: wait for the rest
            yield now[len(shown):]
            shown = now


def check_text(words, flag, model):
    """Raise UserError for words that break the chat format or leave no room in the context."""
    if any("\ud800" <= c <= "\udfff" for c in words):
        raise UserError(f"{flag} is not valid Unicode: {words[:40]!r}")
    for s in (*SPECIAL, "<image>"):
        if s in words:
            raise UserError(f"{flag} holds {s}, which the chat format uses; leave it out")
    length = len(prompt_ids(model.tokenizer, words)) + model.llm.tokens + 10    # 10: its own words
    if length > model.config.context:
        raise UserError(f"{flag} is too long: {length} tokens with the image's {model.llm.tokens}, "
                        f"the context has {model.config.context}; shorten it ({words[:40]!r}...)")


# ------------------------------------------------------------------------------------------------
# Images and files
# ------------------------------------------------------------------------------------------------

def to_tensor(image, encoder):
    """Pillow image -> [1,3,S,S] in [0,1], made square as the encoder's processor does it."""
    S, (W, H) = encoder.image_size, image.size
    w, h = S, S
    if encoder.crop != "squash":                        # the short side becomes S, then the middle
        w, h = (max(S, int(S * v / min(W, H))) for v in (W, H))
    left, top = (w - S) // 2, (h - S) // 2
    if max(w, h) > 20 * S:              # a strip: cut first, or the resized image fills the memory
        image = image.crop((left * W // w, top * H // h, (left + S) * W // w, (top + S) * H // h))
        w, h, left, top = S, S, 0, 0
    image = image.resize((w, h), encoder.resample)
    image = np.asarray(image.crop((left, top, left + S, top + S)))
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


def save_png(image, path, **info):
    """Write an image [3,H,W] in [0,1] as a PNG with the settings in its metadata. Values are
    rounded to 8 bits; with the schedule `authors` they are cut off, as in the authors' code."""
    check_finite("the decoded image", image)
    meta = PngImagePlugin.PngInfo()
    for key, value in info.items():
        meta.add_itxt(key, str(value))
    x = image.float().cpu().clamp(0, 1) * 255
    x = (x if info.get("schedule") == "authors" else x.round()).byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, pnginfo=meta)


def read_latent(path, tokens, channels):
    """Read a file of --save-latent, ours or the authors' -> [n,N,C]. Raises UserError."""
    source = weights.open_weights(path, "--latent")
    key, shape = next(iter(source.shapes.items()), ("", ()))
    if shape[-2:] != (tokens, channels) or len(shape) > 3 or not math.prod(shape):
        raise UserError(f"{source.what}: a tensor of {list(shape)}; this model's latents are n x "
                        f"{[tokens, channels]}, n at least 1")
    return source.rows(key).float().reshape(-1, tokens, channels)


def check_out(path, flag, suffix=None):
    """Raise UserError unless `path` can be written: a file that ends in `suffix`, or a folder when
    suffix is None. Tries it, and removes again what it made."""
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"{flag} {printable(path)}: expected a file name that ends in {suffix}")
    made = [p for p in (path, *path.parents) if not os.path.lexists(p)]     # innermost first
    try:
        (path.parent if suffix else path).mkdir(parents=True, exist_ok=True)
        (open(path, "ab") if suffix else tempfile.TemporaryFile(dir=path)).close()
    except OSError as error:
        raise UserError(f"{flag} {printable(path)} cannot be written as a "
                        f"{'file' if suffix else 'folder'}: {error.strerror}") from error
    finally:
        for p in made:
            if os.path.lexists(p):
                p.unlink() if p.is_file() else p.rmdir()


# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

def schedule(text):
    """Argparse type: a schedule; the first edition's names stand for the same two."""
    return {"clean": "euler", "compat": "authors"}.get(text, text)


def template(text):
    """Argparse type: text with one {} where the prompt goes."""
    if text.count("{}") != 1:
        raise argparse.ArgumentTypeError(f"expected one {{}} where the prompt goes, not {text!r}")
    return text


def model_flags(parser):
    """Add the flags that name a model and its device."""
    a = parser.add_argument_group("model").add_argument
    a("--run", default=weights.TINY,
      help="run folder, checkpoint folder, released folder or hub id (default: the shipped model)")
    a("--encoder", help="file, folder or hub id (default: the one the run was trained with)")
    a("--decoder", help="file, folder or hub id (default: the one that belongs to the encoder)")
    a("--device", choices=["auto", "cpu", "cuda", "xla"], default="auto")
    a("--dtype", choices=["bfloat16", "float32"],
      help="of matrix products (default: bfloat16 on accelerators, float32 on the CPU)")


def sampler_flags(group, steps=50, seed=0):
    """Add the sampler's flags to an argument group and return their actions."""
    a = group.add_argument
    return [a("--steps", type=cli.positive(), default=steps, help=f"default {steps}"),
            a("--guidance", type=cli.positive(float, zero=True), help="guidance scale; 1: off "
              "(default: 3; 1 for released weights and with --schedule authors)"),
            a("--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"), default=(0.0, 1.0),
              help="guide only at times t from LO to HI (1 is noise)"),
            a("--seed", type=cli.seed, default=seed, help="seed of a prompt's first image"),
            a("--schedule", type=schedule, choices=["euler", "authors"], default="euler"),
            a("--solver", choices=["euler", "heun"], default="euler")]


def arguments(argv=None):
    """Parse and check the flags. Raises UserError."""
    p = cli.Parser(description=__doc__.split("\n")[0])
    p.add_argument("text", nargs="?", help="the prompt, or the question about --image or --latent")
    p.add_argument("--out", type=Path, help="PNG, or folder for --prompts (default: out.png, out/)")
    p.add_argument("--max-tokens", type=cli.positive(), default=512, help="length of an answer")
    a = p.add_mutually_exclusive_group().add_argument
    a("--image", type=Path, help="image that the text asks about")
    a("--reconstruct", type=Path, help="encode and decode an image, side by side")
    a("--latent", type=Path, help="decode saved latents, or answer a question about them")
    a("--prompts", type=Path, help="draw many prompts: a text file with one per line, a .jsonl "
      "with \"prompt\", or a folder of .txt")
    model_flags(p)
    g = p.add_argument_group("drawing")
    a, number, drawing = g.add_argument, g.add_mutually_exclusive_group(), sampler_flags(g)
    drawing += [
        number.add_argument("--n", type=cli.positive(), help="images per prompt (1; --layout: 4)"),
        number.add_argument("--best-of", type=cli.positive(), metavar="N",
                            help="candidates per prompt, ranked without decoding (best_of.py)"),
        a("--keep", type=cli.positive(), metavar="K", help="decode the K best (default 1)"),
        a("--verifier", choices=list(best_of.KEYS), help="ranks the candidates (default prompt)"),
        a("--direct", action="store_true",
          help="skip the LLM's own words: open the image at once, in one prefill"),
        a("--template", type=template, help="words around the prompt, such as 'Can you generate a "
          "photo of {}?'; verifiers are asked about the bare prompt"),
        a("--layout", choices=["geneval", "dpg"], help="of --prompts, for official scorers"),
        a("--grid", action="store_true", help="put the images of a prompt into one PNG"),
        a("--save-latent", type=Path, help="save the latents [n,N,C] as safetensors")]
    args = p.parse_args(argv)
    check_arguments(p, args, drawing)
    default = min(4, args.best_of or 4) if args.layout else 1
    args.n = (args.keep if args.best_of else args.n) or default
    if args.best_of and args.n > args.best_of or args.layout == "dpg" and args.n not in (1, 4):
        p.error(f"{args.n} images per prompt ({'--keep' if args.best_of else '--n'}): expected at "
                f"most --best-of {args.best_of}; and 1 or 4 for DPG-Bench's scorer")
    args.verifier = args.verifier or "prompt"
    if args.image or args.latent and args.text:
        if args.out:
            p.error(f"--out {args.out}: the answer to a question is printed, not written")
    else:
        args.out = args.out or Path("out" if args.prompts else "out.png")
    return args


def check_arguments(parser, args, drawing):
    """Refuse flags that would be ignored. drawing: the actions of flags for drawing prompts."""
    mode = next((k for k in ("image", "reconstruct", "latent", "prompts") if getattr(args, k)), "")
    args.text = (args.text or "").strip() and args.text
    if args.text and mode in ("prompts", "reconstruct"):
        parser.error(f"{args.text!r} and --{mode}: give one of them")
    if not args.text and mode in ("", "image"):
        parser.error("the prompt (or question) is missing; give some words in quotes")
    for action in drawing:
        if mode not in ("", "prompts") and getattr(args, action.dest) != action.default:
            parser.error(f"{action.option_strings[0]} is for drawing prompts, not for --{mode}")
    if args.layout and not args.prompts:
        parser.error(f"--layout {args.layout} needs --prompts FILE")
    if (args.keep or args.verifier) and not args.best_of:
        parser.error("--keep and --verifier need --best-of N")
    check_sampler(args)


def check_sampler(args):
    """Raise UserError for fewer steps than the schedule needs, and for impossible times."""
    if args.schedule == "authors" and args.steps < 3:
        raise UserError(f"--steps {args.steps}: --schedule authors needs at least 3")
    lo, hi = args.guidance_interval = tuple(args.guidance_interval)
    if not 0 <= lo <= hi <= 1:
        raise UserError(f"--guidance-interval {lo:g} {hi:g}: expected 0 <= LO <= HI <= 1")


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------

def setup(args):
    """Start the device of --device; float32 on the CPU unless --dtype says otherwise."""
    devices = parallel.setup(args.device, args.dtype)
    if args.dtype is None and devices.kind == "cpu":
        devices.dtype = torch.float32
    return devices


def guidance_of(args, model):
    """Return --guidance or its default. Raises UserError for a model without a null condition."""
    null = model.dit.config.null
    default = 3.0 if null and not model.config.released and args.schedule == "euler" else 1.0
    guidance = default if args.guidance is None else args.guidance
    if guidance != 1 and not null:
        raise UserError(f"--guidance {guidance:g}: this model has no null condition (trained with "
                        "--cond-drop 0); use --guidance 1")
    if guidance == 1 and args.guidance_interval != (0.0, 1.0):
        raise UserError(f"--guidance-interval {' '.join(map(str, args.guidance_interval))}: "
                        "guidance is off; give --guidance too")
    return guidance


def sample_latents(args, model, cond, drawn, guidance, devices, progress=lambda: None):
    """Draw the latent of each (prompt, seed) of `drawn`, with the flags of `sampler_flags`.

    cond: [B,N,Z], or [1,N,Z] for one prompt. progress() is called after each step. Returns finite
    latents [B,N,C] or raises UserError.
    """
    def on_step():
        parallel.step_done(devices)                     # XLA computes now: one program per step
        progress()

    check_finite("the condition (made by the language model)", cond)
    N, C = model.dit.config.tokens, model.dit.config.channels
    where = devices.device if devices.kind == "cuda" else "cpu"     # XLA has no generator
    noise = torch.stack([flow.noise_for(prompt, seed, N, C, args.schedule, where)
                         for prompt, seed in drawn])                        # [B,N,C]
    z = flow.sample(model.dit, cond, noise.to(cond.device), model.config.alpha, args.steps,
                    guidance, args.schedule, args.solver, args.guidance_interval, on_step)
    return check_finite(f"the latent (made by the DiT with guidance {guidance:g})", z)


def reconstruct(args, image, encoder, decode, device):
    """Encode and decode an image; write both side by side and print the PSNR."""
    x = to_tensor(image, encoder).to(device)
    x_hat = decode(check_finite("the latent (made by the encoder)", encoder(x)))
    x_hat = check_finite("the decoded image", x_hat).clamp(0, 1)
    x = F.interpolate(x, x_hat.shape[-2:], mode="area")
    error = ((x * 255).round() - (x_hat * 255).round()).square().mean().item() / 255 ** 2
    save_png(image_sheet(torch.cat([x, x_hat]), 2), args.out, model=printable(Path(args.run).name),
             picture=printable(args.reconstruct.name))
    print(f"{printable(args.out)}  left: the image, right: its reconstruction, "
          f"PSNR {-10 * math.log10(max(error, 1e-10)):.2f} dB")


def ask(args, model, z):
    """Print the answer about each latent of z [n,N,C] as it is written."""
    for i, row in enumerate(z):
        print(f"{i}: " if len(z) > 1 else "", end="", flush=True)
        for piece in answer(model.llm, model.tokenizer, args.text, row[None], args.max_tokens):
            print(piece if isinstance(piece, str) else "(it opens an image)", end="", flush=True)
        print()


def condition(args, model, words, device):
    """Let the LLM read a prompt -> cond [1,N,Z], and whether it was forced to open the image.

    --direct forces it. Without, an answer in words is an error for a single prompt; a prompt of
    many is then forced, and a line says so, because one prompt should not end the run.
    """
    if not args.direct:
        *said, cond = list(answer(model.llm, model.tokenizer, words, limit=args.max_tokens)) or [""]
        if not isinstance(cond, str):
            return cond, False
        said = f"the model answered {''.join(said) + cond!r:.200} instead of drawing"
        if not args.prompts:
            raise UserError(f"{said}; ask for an image (\"Can you generate a photo of ...?\") or "
                            "force one: --direct")
        tqdm.write(f"{words}: {said}; drawn as with --direct", file=sys.stderr)
    return direct_condition(model.llm, model.tokenizer, [words], device), True


def draw(args, items, model, decode, guidance, devices):
    """Draw prompts [(name, prompt, record)] and write their PNG files, with one progress bar."""
    count, latents, drawn = args.best_of or args.n, [], []
    steps = len(flow.sampling_times(args.schedule, args.steps, 1.0))
    bar = tqdm(total=len(items) * steps, unit="step", disable=not sys.stderr.isatty())
    for name, prompt, record in items:
        bar.set_description(prompt[:40])
        words = (args.template or "{}").replace("{}", prompt)
        cond, forced = condition(args, model, words, devices.device)        # [1,N,Z]
        seeds = [args.seed + i for i in range(count)]
        z = sample_latents(args, model, cond, [(prompt, seed) for seed in seeds], guidance,
                           devices, bar.update)                             # [n,N,C]
        info = dict(prompt=prompt, steps=args.steps, guidance=guidance, schedule=args.schedule,
                    model=printable(Path(args.run).name), dtype=str(devices.dtype)[len("torch."):])
        for key, value, default in (("guidance_interval", args.guidance_interval, (0.0, 1.0)),
                                    ("solver", args.solver, "euler"), ("direct", forced, False),
                                    ("template", args.template, None)):
            if value != default:
                info[key] = value
        if args.best_of:
            rows = best_of.scores(model.llm, model.tokenizer, z, prompt)
            order = best_of.rank(rows, args.verifier)
            bar.write(f"{prompt}: {count} candidates, best first by {args.verifier}\n"
                      + best_of.table(rows, order, seeds, args.n))
            kept = order[:args.n]
            z, seeds = z[kept], [seeds[i] for i in kept]
            info.update(best_of=count, verifier=args.verifier)
        images = torch.cat([decode(row[None]) for row in z])                # [n,3,H,W]
        latents.append(z.cpu())
        drawn += [[prompt, seed] for seed in seeds]
        for path, image, seed in png_files(args, name, record, images, seeds):
            save_png(image, path, seed=seed, **info)
            bar.write(printable(path))
    bar.close()
    if args.save_latent:
        args.save_latent.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(latents)}, args.save_latent,
                  {"prompt, seed": json.dumps(drawn)})
        print(printable(args.save_latent))


def show_latents(args, z, decode):
    """Decode stored latents [n,N,C] into one PNG, with their prompts and seeds if the file has
    them."""
    images, info = torch.cat([decode(row[None]) for row in z]), {}
    if args.latent.suffix == ".safetensors":
        with safe_open(args.latent, "pt") as f:
            info = {k: v for k, v in (f.metadata() or {}).items() if k == "prompt, seed"}
    save_png(image_sheet(images, min(4, len(images))), args.out, latent=printable(args.latent.name),
             model=printable(Path(args.run).name), **info)
    print(printable(args.out))


@torch.no_grad()
def main(argv=None):
    args = arguments(argv)
    if args.reconstruct and args.out.resolve() == args.reconstruct.resolve():
        raise UserError(f"--out {args.out} would overwrite the image; take another --out")
    if args.out:
        check_out(args.out, "--out", None if args.prompts else ".png")
    if args.save_latent:
        check_out(args.save_latent, "--save-latent", ".safetensors")
    image = args.image or args.reconstruct
    image = open_image(image) if image else None
    items = read_prompts(args.prompts, args.layout) if args.prompts else [
        ("", args.text, {"prompt": args.text})]
    if args.layout == "geneval":
        check_geneval(args, {name for name, *_ in items})
    path, = weights.locate([("model", args.run, "--run")])
    devices = setup(args)
    if args.reconstruct:
        config = stage2.model_config(weights.open_weights(path, "--run"))
        codec = stage2.load_codec(config, args, devices)
        return reconstruct(args, image, *codec, devices.device)

    model = stage2.load_run(path, devices)
    N, C, z = model.dit.config.tokens, model.dit.config.channels, None
    if model.config.image_channels != C and (args.best_of or args.latent and args.text):
        raise UserError(f"--run {args.run} draws latents of {C} channels and reads latents of "
                        f"{model.config.image_channels}: it cannot judge what it draws (a VAE)")
    for name, words, _ in items if args.prompts or args.text else ():
        flag = f"--prompts: {printable(name)}" if args.prompts else "the prompt"
        check_text((args.template or "{}").replace("{}", words), flag, model)
    if args.latent:
        z = read_latent(args.latent, N, C).to(devices.device)
    if args.image:
        encoder, _ = stage2.load_codec(model.config, args, devices, decoder=False)
        z = encoder(to_tensor(image, encoder).to(devices.device))
        check_finite("the latent (made by the encoder)", z)
    if z is not None and args.text:                     # a question: no pixels needed
        return ask(args, model, z)
    guidance = guidance_of(args, model)
    _, decode = stage2.load_codec(model.config, args, devices, encoder=False)
    if args.latent:
        return show_latents(args, z, decode)
    draw(args, items, model, decode, guidance, devices)


if __name__ == "__main__":
    cli.main(main)
