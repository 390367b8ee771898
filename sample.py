"""Use a trained model: prompt -> image, image + question -> text, reconstruct, best of N.

    python sample.py "a red star on a white background"        # shipped weights; writes out.png
    python sample.py "a cat" --run runs/dit-2b --n 4 --guidance 3 --seed 0
    python sample.py "a cat" --best-of 8 --keep 1 --verifier prompt
    python sample.py --image photo.png "how many cats are there?"
    python sample.py --reconstruct photo.png
    python sample.py --prompts prompts.txt --out folder/
    python sample.py "a cat" --save-latent z.safetensors;  python sample.py --latent z.safetensors

    cond = LLM(prompt, queries);  z = flow.sample(dit, cond, noise);  image = decoder(z)

The schedule `euler` walks from t = 1 to 0. `authors` is the authors' sampler, with their noise and
their stray last step, to repeat their numbers. Guidance does nothing in their code, so guidance is
off with this schedule unless you give --guidance. The same prompt and seed give the same image in
any batch, up to rounding (one of 255 levels). prompts.py holds prompt files, checks and PNG files.
"""
import json
import sys
from pathlib import Path

import cli               # before torch: it sets how threads wait
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tqdm import tqdm

import best_of
import flow
import parallel
import stage2
import weights
from chat import IMAGE
from cli import UserError, printable
from files import open_image
from metrics import psnr
from prompts import (
    check_arguments, check_finite, check_geneval, check_out, check_sampler, check_text, png_files,
    read_latent, read_prompts, save_png, settings, table, to_tensor)
from text_model import direct_condition, greedy, question
from training import image_sheet

# ------------------------------------------------------------------------------------------------
# Arguments
# ------------------------------------------------------------------------------------------------

def schedule(text):
    """Argparse type: a schedule; the first edition's names stand for the same two."""
    return {"clean": "euler", "compat": "authors"}.get(text, text)


def sampler_flags(group, steps=50, seed=0, seed_help="seed of a prompt's first image"):
    """Add the sampler's flags to an argument group and return their actions."""
    a = group.add_argument
    return [a("--steps", type=cli.positive(), default=steps, help=f"default {steps}"),
            a("--guidance", type=cli.positive(float, zero=True), help="guidance scale; 1: off "
              "(default: 3; 1 for released weights and with --schedule authors)"),
            a("--seed", type=cli.seed, default=seed, help=seed_help),
            a("--schedule", type=schedule, choices=["euler", "authors"], default="euler",
              help="euler: --steps steps from 1 to 0; authors: the authors' sampler"),
            a("--solver", choices=["euler", "heun"], default="euler",
              help="heun: two network calls per step")]


def arguments(argv=None):
    """Parse and check the flags. Raises UserError."""
    p = cli.Parser(description=__doc__.split("\n")[0])
    p.add_argument("text", nargs="?", help="the prompt, or the question about --image or --latent")
    p.add_argument("--out", type=Path,
                   help="PNG, or folder for --prompts (default: out.png, out/)")
    p.add_argument("--max-tokens", type=cli.positive(), default=512, help="length of an answer")
    a = p.add_mutually_exclusive_group().add_argument
    a("--image", type=Path, help="image that the text asks about")
    a("--reconstruct", type=Path, help="encode and decode an image, side by side")
    a("--latent", type=Path, help="decode saved latents, or answer a question about them")
    a("--prompts", type=Path, help="draw many prompts: a text file with one per line, a .jsonl "
      "with \"prompt\", or a folder of .txt")
    a = p.add_argument_group("model").add_argument
    a("--run", default=weights.TINY,
      help="run, checkpoint, released folder, file or hub id (default: the shipped model)")
    a("--encoder", help="file, folder or hub id (default: the one the run was trained with)")
    a("--decoder", help="file, folder or hub id (default: the one that belongs to the encoder)")
    cli.device_flags(a)
    g = p.add_argument_group("drawing")
    a, number, drawing = g.add_argument, g.add_mutually_exclusive_group(), sampler_flags(g)
    drawing += [
        number.add_argument("--n", type=cli.positive(), help="images per prompt (1; --layout: 4)"),
        number.add_argument("--best-of", type=cli.positive(), metavar="N",
                            help="candidates per prompt, ranked without decoding (best_of.py)"),
        a("--keep", type=cli.positive(), metavar="K", help="decode the K best (default 1)"),
        a("--verifier", choices=list(best_of.KEYS), help="ranks the candidates (default prompt)"),
        a("--direct", action="store_true",
          help="start the image at once: do not let the LLM answer first"),
        a("--layout", choices=["geneval", "dpg"], help="layout of the images of --prompts, "
          "for the official scorers"),
        a("--grid", action="store_true", help="put the images of a prompt into one PNG"),
        a("--save-latent", type=Path, help="save the latents [n,N,C] as safetensors")]
    args = p.parse_args(argv)
    args.text = args.text if (args.text or "").strip() else None
    check_arguments(p, args, drawing)
    check_sampler(args)
    default = min(4, args.best_of or 4) if args.layout else 1
    args.n = (args.keep if args.best_of else args.n) or default
    flag = "--keep" if args.best_of else "--n"
    if args.best_of and args.n > args.best_of:
        p.error(f"{flag} {args.n}: expected at most --best-of {args.best_of}")
    if args.layout == "dpg" and args.n not in (1, 4):
        p.error(f"{flag} {args.n}: DPG-Bench's scorer expects 1 or 4 images per prompt")
    args.verifier = args.verifier or "prompt"
    if not (args.image or args.latent and args.text):   # an answer is printed
        args.out = args.out or Path("out" if args.prompts else "out.png")
    return args


# ------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def answer(llm, tokenizer, words, z=None, limit=512):
    """Answer greedily: yield the text as it is written and, if the model opens an image, its
    condition [1,N,Z] at the end. The model writes `<im_start>` itself; the queries follow.

    words: the user's text. z [1,N,C]: the image that the text is about, or None.
    """
    opens = tokenizer.token_to_id("<im_start>")
    cache, written, shown = [], [], ""
    x = question(llm, tokenizer, z, words)                                              # [1,L,H]
    for _, token, alive in greedy(llm, tokenizer, x, limit, cache):                     # [1]
        if token == opens:                              # then the queries, in one forward pass
            start = torch.ones_like(token)              # right after <im_start>, at position 0
            ids = F.pad(token[None], (0, llm.tokens), value=IMAGE)                      # [1,1+N]
            yield llm.condition(llm(llm.embed(ids, start), cache), start)               # [1,N,Z]
        if not alive:
            return
        written.append(token.item())
        now = tokenizer.decode(written)
        if not now.endswith("\ufffd"):                  # half of a character: wait for the rest
            yield now[len(shown):]
            shown = now


def ask(args, model, z):
    """Print the answer about each latent of z [n,N,C] as it is written."""
    for i, row in enumerate(z):
        print(f"{i}: " if len(z) > 1 else "", end="", flush=True)
        for piece in answer(model.llm, model.tokenizer, args.text, row[None], args.max_tokens):
            print(piece if isinstance(piece, str) else "(it opens an image)", end="", flush=True)
        print()


def condition(args, model, words, device):
    """Let the LLM read a prompt -> cond [1,N,Z], and whether it was forced to open the image.

    --direct forces it. Without --direct, an answer in words is an error for a single prompt. With
    --prompts, such a prompt is forced and named, because one prompt should not end the run.
    """
    if not args.direct:
        pieces = list(answer(model.llm, model.tokenizer, words, limit=args.max_tokens))
        if pieces and torch.is_tensor(pieces[-1]):
            return pieces[-1], False
        said = f"the model answered {''.join(pieces)!r:.200} instead of drawing"
        if not args.prompts:
            raise UserError(f"{said}; ask for an image (\"Can you generate a photo of ...?\") or "
                            "force one: --direct")
        tqdm.write(f"{words}: {said}; drawn as with --direct", file=sys.stderr)
    return direct_condition(model.llm, model.tokenizer, [words], device), True


# ------------------------------------------------------------------------------------------------
# Images
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
                    guidance, args.schedule, args.solver, on_step)
    return check_finite(f"the latent (made by the DiT with guidance {guidance:g})", z)


def draw(args, items, model, decode, guidance, devices):
    """Draw prompts [(name, prompt, record)] and write their PNG files, with one progress bar."""
    count, latents, drawn = args.best_of or args.n, [], []
    steps = len(flow.sampling_times(args.schedule, args.steps, 1.0))
    bar = tqdm(total=len(items) * steps, unit="step", disable=not sys.stderr.isatty())
    for name, prompt, record in items:
        bar.set_description(prompt[:40])
        cond, forced = condition(args, model, prompt, devices.device)       # [1,N,Z]
        seeds = [args.seed + i for i in range(count)]
        z = sample_latents(args, model, cond, [(prompt, seed) for seed in seeds], guidance,
                           devices, bar.update)                             # [count,N,C]
        if args.best_of:
            rows = best_of.scores(model.llm, model.tokenizer, z, prompt)
            order = best_of.rank(rows, args.verifier)
            bar.write(f"{prompt}: {count} candidates, best first by {args.verifier}\n"
                      + table(rows, order, seeds, args.n))
            kept = order[:args.n]
            z, seeds = z[kept], [seeds[i] for i in kept]                    # [n,N,C]
        images = torch.cat([decode(row[None]) for row in z])                # [n,3,H,W]
        latents.append(z.cpu())
        drawn += [[prompt, seed] for seed in seeds]
        info = settings(args, prompt, guidance, devices.dtype, forced)
        for path, image, seed in png_files(args, name, record, images, seeds):
            save_png(image, path, seed=seed, **info)
            bar.write(printable(path))
    bar.close()
    if args.save_latent:
        args.save_latent.parent.mkdir(parents=True, exist_ok=True)
        save_file({"latents": torch.cat(latents)}, args.save_latent,
                  {"prompt, seed": json.dumps(drawn)})
        print(printable(args.save_latent))


def reconstruct(args, image, encoder, decode, device):
    """Encode and decode an image; write both side by side and print the PSNR."""
    x = to_tensor(image, encoder).to(device)                                # [1,3,S,S]
    x_hat = decode(check_finite("the latent (made by the encoder)", encoder(x)))
    x_hat = check_finite("the decoded image", x_hat).clamp(0, 1)            # [1,3,H,W]
    x = F.interpolate(x, x_hat.shape[-2:], mode="area")                     # [1,3,H,W]
    save_png(image_sheet(torch.cat([x, x_hat]), 2), args.out, model=printable(Path(args.run).name),
             picture=printable(args.reconstruct.name))
    print(f"{printable(args.out)}  left: the image, right: its reconstruction, "
          f"PSNR {psnr(x_hat, x).item():.2f} dB")


@torch.no_grad()
def main(argv=None):
    args = arguments(argv)
    if args.out:
        check_out(args.out, "--out", None if args.prompts else ".png", [args.reconstruct])
    if args.save_latent:
        check_out(args.save_latent, "--save-latent", ".safetensors", [args.latent])
    image = args.image or args.reconstruct
    image = open_image(image) if image else None
    items = [("", args.text, {"prompt": args.text})] if args.text else []
    if args.prompts:
        items = read_prompts(args.prompts, args.layout)
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
    for name, words, _ in items:
        flag = f"--prompts: {printable(name)}" if args.prompts else "the prompt"
        check_text(words, flag, model)
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
        images = torch.cat([decode(row[None]) for row in z])                # [n,3,H,W]
        save_png(image_sheet(images, min(4, len(z))), args.out,
                 latent=printable(args.latent.name), model=printable(Path(args.run).name))
        return print(printable(args.out))
    draw(args, items, model, decode, guidance, devices)


if __name__ == "__main__":
    cli.main(main)
