"""Use a trained model: prompt -> picture, picture + question -> text, reconstruct, best of N.

    python sample.py "a red star on a white background"        # built-in weights; writes out.png
    python sample.py "a cat" --run runs/dit-2b --n 4 --guidance 3 --seed 0
    python sample.py "a cat" --best-of 8 --keep 1 --verifier prompt
    python sample.py --image photo.png "how many cats are there?"
    python sample.py --reconstruct photo.png
    python sample.py --prompts prompts.txt --out folder/
    python sample.py "a cat" --save-latent z.safetensors;  python sample.py --latent z.safetensors

Schedules: `clean` is 50 Euler steps from t = 1 to 0, with guidance that works (off at scale 1);
`compat` is the authors' sampler, stray last step and all, for their numbers, with their noise for
a seed on the same kind of device (guidance, which does nothing in theirs, is off unless given).

The same prompt, seed and settings give the same bytes whatever is drawn beside them: images go
through the matrix products one at a time. Only --best-of draws its candidates several at a time,
for speed: the same command gives the same bytes, but they may differ from those of a plain run with
the kept seed by the rounding of the products.
"""
import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import best_of
import data
import flow
import parallel
import run as runs
import text_model as text
import weights
from flow import candidates_together, generate, noise_for
from parallel import UserError


# ------------------------------------------------------------------------------------------------
# Prompt -> condition
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def answer(llm, tokenizer, question, z=None, limit=512):
    """Greedy answer with a KV cache: yields text as it comes, and last, when the model opens an
    image, its condition [1,N,Z] (spec: the model writes `<im_start>` itself, then the queries).

    question: the user's words; z [1,N,C]: the picture they are about, or None.
    """
    opens = tokenizer.token_to_id("<im_start>")
    cache, written, shown = [], [], ""
    x = best_of.question(llm, tokenizer, z, question)
    for _, token, alive in best_of.greedy(llm, tokenizer, x, limit, cache):             # [1]
        if token == opens:                      # <im_start>, then the queries, in one forward pass
            start = torch.ones_like(token)
            block = F.pad(token[None], (0, llm.tokens), value=text.IMAGE)               # [1,1+N]
            yield llm.condition(llm(llm.embed(block, start), cache), start)
        if not alive:
            return
        written.append(token.item())
        now = tokenizer.decode(written)
        if not now.endswith("\ufffd"):          # half of a character: wait for the rest
            yield now[len(shown):]
            shown = now


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def open_image(path):
    """A picture file -> RGB Pillow image, as training sees it. Raises UserError."""
    try:
        return data.upright_rgb(Image.open(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file")
    except Exception as error:      # Pillow raises many kinds
        raise UserError(f"{path}: not a picture that Pillow can read ({type(error).__name__})")


def to_tensor(image, encoder):
    """Pillow image -> [1,3,S,S] in [0,1], made square as the encoder's processor does it."""
    S, (w, h) = encoder.image_size, image.size
    if encoder.crop == "squash":
        w, h = S, S
    else:                                               # the short side, then the middle
        w, h = (max(S, int(S * v / min(w, h))) for v in (w, h))
    image = image.resize((w, h), encoder.resample)
    left, top = (w - S) // 2, (h - S) // 2
    image = np.asarray(image.crop((left, top, left + S, top + S)))
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


def save_png(image, path, **info):
    """image [3,H,W] in [0,1] -> PNG with the settings in its metadata. Rounded to 8 bits; with the
    schedule `compat` cut off, as the authors do it."""
    meta = PngImagePlugin.PngInfo()
    for key, value in info.items():
        meta.add_itxt(key, str(value))
    x = image.float().cpu().clamp(0, 1) * 255
    x = (x if info.get("schedule") == "compat" else x.round()).byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, pnginfo=meta)


def check_out(path, flag, suffix=None):
    """Can `path` be written (suffix None: as a folder)? Asked before the work. Raises UserError."""
    if suffix is None and path.exists() and not path.is_dir():
        raise UserError(f"{flag} {path} is a file; expected a folder, for more than one prompt")
    if suffix and path.is_dir():
        raise UserError(f"{flag} {path} is a folder; expected a file name that ends in {suffix}")
    if suffix and path.suffix.lower() != suffix:
        raise UserError(f"{flag} {path}: expected a file name that ends in {suffix}")
    above = next(p for p in (path if suffix is None else path.parent, *path.absolute().parents)
                 if p.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"{flag} {path}: cannot write in {above}")


def read_prompts(path, layout):
    """--prompts -> [(id, prompt, record)]: a text file of lines, a .jsonl of records with "prompt"
    (GenEval's), or a folder of .txt files (DPG-Bench's). Raises UserError."""
    flag = f"--prompts {path}"
    if not path.exists():
        raise UserError(f"{flag}: no such file or folder")
    if path.suffix.lower() in (".json", ".csv", ".tsv", ".parquet"):
        raise UserError(f"{flag}: expected a text file of lines, a .jsonl or a folder of .txt")
    items, files = [], sorted(path.glob("*.txt")) if path.is_dir() else [path]
    try:
        for file in files:
            whole = file.read_text(encoding="utf-8-sig")
            if path.is_dir():
                words = " ".join(whole.split())
                items.append((file.stem, words, {"prompt": words}))
                continue
            for number, line in enumerate(whole.split("\n"), 1):     # JSON may hold other breaks
                if not line.strip():
                    continue
                record = {"prompt": line.strip()}
                if path.suffix.lower() == ".jsonl":
                    try:
                        record = json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{flag}, line {number}: not JSON ({error})")
                    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                        raise UserError(f"{flag}, line {number}: expected {{\"prompt\": ...}}")
                name = f"{len(items):05d}"
                if layout == "dpg":
                    name = str(record.get("item_id", name))
                items.append((name, record["prompt"].strip(), record))
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {file}: not UTF-8 text ({error.reason} at byte {error.start})")
    except OSError as error:
        raise UserError(f"--prompts {file}: {error.strerror}")
    if not items:
        raise UserError(f"{flag}: no prompt in it; expected one a line, or .txt files in a folder")
    for name, prompt, _ in items:
        if not prompt:
            raise UserError(f"{flag}: the prompt of {name} is empty")
        if "/" in name or "\0" in name or name.startswith(".") or len(name.encode()) > 200:
            raise UserError(f"{flag}: item_id {name!r} is no file name")
    if len({name for name, _, _ in items}) < len(items):
        raise UserError(f"{flag}: an item_id comes twice; pictures would overwrite each other")
    return items


# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

def arguments(argv=None):
    """Flags, checked against each other. Raises UserError."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("text", nargs="?", help="the prompt, or the question about --image or --latent")
    p.add_argument("--run", default=weights.ASSETS, help="run folder, released folder or hub id")
    p.add_argument("--encoder", help="default: the one the run was trained with")
    p.add_argument("--decoder", help="default: the one that belongs to the encoder")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--dtype", choices=["bfloat16", "float32"],
                   help="default: bfloat16 on accelerators, float32 on CPU")
    p.add_argument("--out", type=Path, help="PNG, or folder for --prompts (default: out.png, out/)")
    a = p.add_argument_group("picture").add_argument
    draw = [a("--n", type=runs.positive(), help="pictures a prompt (default 1)"),
            a("--steps", type=runs.positive(), help="default 50"),
            a("--guidance", type=runs.positive(float, zero=True),
              help="1: off (default for released weights, and for compat); else 3"),
            a("--guidance-interval", type=float, nargs=2, metavar=("LO", "HI"),
              help="guide only at times t in it; default 0 1, all (1 is noise)"),
            a("--seed", type=runs.seed, help="of the first picture (default 0)"),
            a("--schedule", choices=["clean", "compat"], help="default clean"),
            a("--direct", action="store_true",
              help="skip the LLM's own words: open the image at once, in one prefill"),
            a("--template", help="what the model is told, e.g. 'Can you generate a photo of {}?'; "
              "verifiers are asked about the bare prompt"),
            a("--prompts", type=Path,
              help="one prompt a line, a .jsonl with \"prompt\", or a folder of .txt"),
            a("--layout", choices=["geneval", "dpg"],
              help="of the folder, for the official scorers; 4 pictures a prompt"),
            a("--grid", action="store_true", help="the pictures of a prompt in one PNG"),
            a("--save-latent", type=Path, help="keep the latents [n,N,C] as safetensors")]
    a = p.add_argument_group("best of N: latents ranked, not decoded (best_of.py)").add_argument
    draw += [a("--best-of", type=runs.positive(), metavar="N", help="candidates"),
             a("--keep", type=runs.positive(), metavar="K", help="decode the K best (default 1)"),
             a("--verifier", choices=list(best_of.KEYS), help="default prompt")]
    g = p.add_argument_group("understanding")
    g.add_argument("--image", type=Path, help="the picture that the text asks about")
    g.add_argument("--latent", type=Path, help="stored latents instead: decode, or ask about them")
    g.add_argument("--max-tokens", type=runs.positive(), default=512, help="of an answer")
    g.add_argument("--reconstruct", type=Path, help="encode and decode a picture, side by side")
    args = p.parse_args(argv)

    inputs = [k for k in ("prompts", "image", "latent", "reconstruct") if getattr(args, k)]
    if len(inputs) > 1:
        raise UserError(f"--{inputs[0]} and --{inputs[1]} cannot go together; give one of them")
    mode = inputs[0] if inputs else "prompt"
    if args.latent and not (args.text or "").strip():
        args.text = None                                # no question: decode
    if args.text is not None and not args.text.strip():
        raise UserError("the prompt is empty; expected some words in quotes")
    if args.text is None and mode == "prompt":
        raise UserError("nothing to do: give a prompt, --prompts, --image with a question, "
                        "--latent or --reconstruct (see --help)")
    if args.text is None and mode == "image":
        raise UserError(f"--image {args.image}: give the question too, in quotes")
    if args.text is not None and mode in ("prompts", "reconstruct"):
        raise UserError(f"{args.text!r} and --{mode}: give one of them")
    if mode not in ("prompt", "prompts"):
        for action in draw:
            if getattr(args, action.dest) not in (None, False):
                raise UserError(f"{action.option_strings[0]} is for drawing a prompt; it has no "
                                f"meaning with --{mode}")
    for flag, needs, there in (("--keep", "--best-of N", args.best_of),
                               ("--verifier", "--best-of N", args.best_of),
                               ("--layout", "--prompts FILE", args.prompts)):
        if getattr(args, flag[2:]) and not there:
            raise UserError(f"{flag} {getattr(args, flag[2:])} needs {needs}")
    if args.best_of and args.n:
        raise UserError(f"--n {args.n} with --best-of {args.best_of}: give --keep for the number "
                        "of pictures")
    if args.best_of and (args.keep or 1) > args.best_of:
        raise UserError(f"--keep {args.keep} of --best-of {args.best_of}: cannot keep more than "
                        "are drawn")
    if args.template and ("{}" not in args.template or args.template.count("{") > 1):
        raise UserError(f"--template {args.template!r}: expected one {{}} where the prompt goes")
    given = args.keep if args.best_of else args.n
    args.n = given or (min(4, args.best_of or 4) if args.layout else 1)
    if args.layout == "dpg" and args.n not in (1, 4):
        flag = f"--best-of {args.best_of} --keep" if args.best_of else "--n"
        raise UserError(f"{flag} {args.n}: DPG-Bench's scorer takes 1 or 4 pictures a prompt")
    args.steps, args.seed = args.steps or 50, args.seed or 0
    args.schedule, args.verifier = args.schedule or "clean", args.verifier or "prompt"
    check_schedule(args)
    prints = mode == "image" or mode == "latent" and args.text
    if prints and args.out:
        raise UserError(f"--out {args.out} has no meaning with a question: its answer is printed")
    args.out = args.out or Path("out" if args.prompts else "out.png")
    if not prints:
        check_out(args.out, "--out", None if args.prompts else ".png")
    if args.reconstruct and args.out.resolve() == args.reconstruct.resolve():
        raise UserError(f"--out {args.out} is the picture of --reconstruct; give another --out")
    if args.save_latent:
        check_out(args.save_latent, "--save-latent", ".safetensors")
    return args


def check_geneval(args, names):
    """Raises UserError where --out holds pictures that GenEval's scorer would count besides those
    of the prompts with these names. (DPG-Bench's go by item_id: several runs may fill a folder.)"""
    for p in args.out.glob("*/samples/*.png"):
        if p.parts[-3] not in names or p.stem >= f"{args.n:04d}":
            raise UserError(f"--out {args.out} holds {p} of an earlier run, which the scorer would "
                            "count too; take another --out")


def check_schedule(args):
    """Raises UserError for fewer steps than the schedule takes, and times that are none. Fills
    --guidance-interval."""
    if args.schedule == "compat" and args.steps < 3:
        raise UserError(f"--steps {args.steps}: --schedule compat needs at least 3")
    lo, hi = args.guidance_interval = tuple(args.guidance_interval or (0.0, 1.0))
    if not 0 <= lo <= hi <= 1:
        raise UserError(f"--guidance-interval {lo:g} {hi:g}: expected 0 <= LO <= HI <= 1")


def check_text(words, flag, tokenizer, config, tokens):
    """Raises UserError for words that break the chat, or that leave no room in the context."""
    if any("\ud800" <= c <= "\udfff" for c in words):
        raise UserError(f"{flag} is not valid Unicode: {words[:40]!r}")
    for s in (*text.SPECIAL, "<image>"):
        if s in words:
            raise UserError(f"{flag} holds {s}, which the chat format uses; leave it out")
    limit = config.get("tokenizer_model_max_length") or 1024
    length = len(text.prompt_ids(tokenizer, words)) + tokens + 10       # with the model's own words
    if length > limit:
        raise UserError(f"{flag} is too long: {length} tokens with the {tokens} of the image, the "
                        f"model's context has {limit}; shorten it ({words[:40]!r}...)")


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def reconstruct(args, picture, run, devices):
    config = weights.config_of(run)
    if "diffusion_model_channels" not in config:
        raise UserError(f"--run {args.run} is not a model that draws; to reconstruct with a "
                        f"decoder give --decoder {args.run} (evaluate.py decoder --run takes "
                        "VAEs too)")
    encoder, decoder = weights.load_codec(config, args, devices)
    x = to_tensor(picture, encoder).to(devices.device)
    x_hat = decoder(encoder(x)).clamp(0, 1)
    x = F.interpolate(x, x_hat.shape[-2:], mode="area")
    error = ((x * 255).round() - (x_hat * 255).round()).square().mean().item() / 255 ** 2
    save_png(runs.sheet(torch.cat([x, x_hat]), 2), args.out, picture=args.reconstruct.name,
             model=Path(args.run).name)
    print(f"{args.out}  left: the picture, right: its reconstruction, "
          f"PSNR {-10 * math.log10(max(error, 1e-10)):.2f} dB")


def ask(args, llm, tokenizer, z):
    """Print the answer about each latent [n,N,C] as it is written."""
    for i, row in enumerate(z):
        print(f"{i}: " if len(z) > 1 else "", end="", flush=True)
        for piece in answer(llm, tokenizer, args.text, row[None], args.max_tokens):
            print(piece if isinstance(piece, str) else "(it opens an image)", end="", flush=True)
        print()


def condition(args, llm, tokenizer, words, device):
    """What the LLM makes of a prompt: cond [1,N,Z], and whether it was made to, as by --direct.
    When it does not draw: UserError, or of many prompts, which should not end for one, a line that
    it was made to."""
    if not args.direct:
        *said, cond = list(answer(llm, tokenizer, words, limit=args.max_tokens)) or [""]
        if not isinstance(cond, str):
            return cond, False
        said = f"the model answered {''.join(said) + cond!r:.200} instead of drawing"
        if not args.prompts:
            raise UserError(f"{said}; ask for a picture (\"Can you generate a photo of ...?\") or "
                            "force one: --direct")
        tqdm.write(f"{words}: {said}; drawn as with --direct", file=sys.stderr)
    return text.direct_condition(llm, tokenizer, [words], device), True


@torch.no_grad()
def draw(args, items, llm, dit, tokenizer, decoder, alpha, guidance, device):
    """Prompts [(id, prompt, record)] -> PNG files, one bar with ETA over all of it."""
    N, count, latents, seeds = dit.tokens, args.best_of or args.n, [], []
    together = candidates_together(N, device) if args.best_of else 1
    pairs = flow.schedule_pairs(args.schedule, args.steps, alpha)
    bar = tqdm(total=len(items) * count * len(pairs), unit="step", disable=not sys.stderr.isatty())

    def progress(pairs):
        for pair in pairs:
            yield pair
            bar.update(count)

    for name, prompt, record in items:
        bar.set_description(prompt[:40])
        words = (args.template or "{}").replace("{}", prompt)
        cond, made = condition(args, llm, tokenizer, words, device)         # [1,N,Z]
        drawn = [args.seed + i for i in range(count)]
        noise = torch.stack([noise_for(prompt, seed, N, dit.channels, args.schedule, device)
                             for seed in drawn])
        z = generate(dit, cond, noise.to(device), alpha, args.steps, guidance, args.schedule,
                     progress, args.guidance_interval, together)            # [n,N,C]
        info = dict(prompt=prompt, steps=args.steps, guidance=guidance, schedule=args.schedule,
                    model=Path(args.run).name, dtype=str(dit.dtype).removeprefix("torch."))
        if args.guidance_interval != (0.0, 1.0):
            info["guidance_interval"] = args.guidance_interval
        if args.template:
            info["template"] = args.template
        if made:
            info["direct"] = True
        if args.best_of:
            rows = best_of.scores(llm, tokenizer, z, prompt)
            order = best_of.rank(rows, args.verifier)
            bar.write(f"{prompt}: {count} candidates, best first by {args.verifier}\n"
                      + best_of.table(rows, order, drawn, args.n))
            kept = order[:args.n]
            z, drawn = z[kept], [drawn[i] for i in kept]
            info.update(best_of=count, verifier=args.verifier)
        images = torch.stack([decoder(row[None])[0] for row in z])          # [n,3,H,W]
        latents.append(z.cpu())
        seeds += [[prompt, seed] for seed in drawn]
        for path, image, seed in files_of(args, name, record, images, drawn):
            save_png(image, path, seed=seed, **info)
            bar.write(str(path))
    bar.close()
    if args.save_latent:
        args.save_latent.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(latents)}, args.save_latent,
                  {"prompt, seed": json.dumps(seeds)})
        print(args.save_latent)


def files_of(args, name, record, images, drawn):
    """The PNG files of one prompt: [(path, image [3,H,W], its seed or seeds)]."""
    n, seeds = len(images), " ".join(map(str, drawn))
    grid = runs.sheet(images, math.ceil(math.sqrt(n)), 0 if args.layout == "dpg" else 2)
    if args.layout == "geneval":        # NAME/metadata.jsonl, NAME/samples/0000.png, NAME/grid.png
        folder = args.out / name
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(json.dumps(record) + "\n")
        files = [(folder / "samples" / f"{i:04d}.png", images[i], drawn[i]) for i in range(n)]
        return files + [(folder / "grid.png", grid, seeds)] * args.grid
    if args.layout == "dpg" or args.prompts and args.grid:      # NAME.png, of 1, or of 2 x 2
        return [(args.out / f"{name}.png", grid, seeds)]
    if args.prompts:
        return [(args.out / f"{name}-{drawn[i]}.png", images[i], drawn[i]) for i in range(n)]
    if args.grid or n == 1:
        return [(args.out, grid, seeds)]
    return [(args.out.with_stem(f"{args.out.stem}-{i}"), images[i], drawn[i]) for i in range(n)]


def devices_of(args):
    """--device and --dtype; fp32 on the CPU unless told otherwise."""
    devices = parallel.setup(args.device, args.dtype)
    if args.dtype is None and devices.kind == "cpu":
        devices.dtype = torch.float32
    return devices


def alpha_and_guidance(args, dit, config):
    """The model's time shift, and --guidance or its default. Raises UserError."""
    alpha = config.get("shift_alpha")                   # our runs record theirs
    guided = hasattr(dit, "y_embedder")                 # it has learned a null condition
    default = 3.0 if alpha and guided and args.schedule == "clean" else 1.0
    guidance = default if args.guidance is None else args.guidance
    if guidance != 1 and not guided:
        raise UserError(f"--guidance {guidance:g}: this model has no null condition (trained with "
                        "--cond-drop 0); use --guidance 1")
    if guidance == 1 and args.guidance_interval != (0.0, 1.0):
        raise UserError(f"--guidance-interval {' '.join(map(str, args.guidance_interval))}: "
                        "guidance is off; give --guidance too")
    base = config.get("diffusion_base_dim") or flow.SHIFT_BASE
    return alpha or flow.shift_alpha(dit.tokens, dit.channels, base), guidance


def main(argv=None):
    args = arguments(argv)
    devices = devices_of(args)
    device = devices.device
    if devices.kind == "xla":
        raise UserError("PJRT_DEVICE is set, but sample.py does not run on xla; give --device cpu")
    picture = open_image(args.image or args.reconstruct) if args.image or args.reconstruct else None
    items = read_prompts(args.prompts, args.layout) if args.prompts else [
        ("", args.text, {"prompt": args.text})]
    if args.layout == "geneval":
        check_geneval(args, {name for name, *_ in items})
    if args.latent and not args.latent.is_file():
        raise UserError(f"--latent {args.latent}: no such file")
    run, = weights.locate([("model", args.run, "--run")])
    if args.reconstruct:
        return reconstruct(args, picture, run, devices)

    llm, dit, tokenizer, config = weights.load_model(run, devices)
    N, C = dit.tokens, dit.channels
    seen = llm.model.mm_projector[0].in_features        # channels of the latent that the LLM reads
    z = weights.read_latent(args.latent, N, C).to(device) if args.latent else None
    if z is not None and not (len(z) and z.isfinite().all()):
        raise UserError(f"--latent {args.latent}: "
                        f"{'its values are not finite' if len(z) else 'no latent in it'}")
    if seen != C and (args.best_of or args.latent and args.text):
        raise UserError(f"--run {args.run} draws latents of {C} channels and reads those of "
                        f"{seen}: it cannot judge what it draws (a VAE's latent has no words)")
    for name, words, _ in items:
        if words is not None:
            flag = f"--prompts: {name}" if args.prompts else "the prompt"
            check_text((args.template or "{}").replace("{}", words), flag, tokenizer, config, N)
    if args.image:                                      # a question about a picture
        encoder, _ = weights.load_codec(config, args, devices, decoder=False)
        with torch.no_grad():
            z = encoder(to_tensor(picture, encoder).to(device))
    if args.text and z is not None:                     # or about latents: no pixels needed there
        return ask(args, llm, tokenizer, z)

    alpha, guidance = alpha_and_guidance(args, dit, config)
    _, decoder = weights.load_codec(config, args, devices, encoder=False)
    if args.latent:
        with torch.no_grad():
            images = torch.cat([decoder(row[None]) for row in z])
        info = {}                                       # of our files: what was drawn
        if args.latent.suffix == ".safetensors":
            with safe_open(args.latent, "pt") as f:
                info = {k: v for k, v in (f.metadata() or {}).items() if k == "prompt, seed"}
        save_png(runs.sheet(images, min(4, len(images))), args.out, model=Path(args.run).name,
                 latent=args.latent.name, **info)
        print(args.out)
        return
    draw(args, items, llm, dit, tokenizer, decoder, alpha, guidance, device)


if __name__ == "__main__":
    runs.main(main)
