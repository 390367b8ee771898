"""Use a trained model: prompt -> picture, picture + question -> text, reconstruct.

    python sample.py "a red circle left of a blue star"        # built-in weights; writes out.png
    python sample.py "a cat" --run runs/dit-2b --n 4 --guidance 3 --seed 0
    python sample.py --image photo.png "how many cats are there?"
    python sample.py --reconstruct photo.png
    python sample.py --prompts prompts.txt --out folder/

Schedules: `clean` is 50 Euler steps from t = 1 to 0, with guidance that works (off at scale 1);
`compat` is the authors' sampler, stray last step and all, for their numbers.
"""
import argparse
import functools
import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

import flow
import parallel
import run as runs
import text_model as text
import weights
from parallel import UserError


# ------------------------------------------------------------------------------------------------
# Prompt -> condition -> latent
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def direct_condition(llm, tokenizer, prompts, device):
    """Prompts -> cond [B,N,Z]: the chat with the fixed answer, in one prefill (no decoding)."""
    rows = []
    for prompt in prompts:
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": text.ANSWER}]
        rows.append(text.expand(*text.chat(tokenizer, turns), llm.tokens))
    ids, _, start, answer = text.pad_batch(rows, tokenizer.token_to_id("<|endoftext|>"))
    start = start.to(device)
    return llm.condition(llm(llm.embed(ids.to(device), start, answer.to(device))), start)


@torch.no_grad()
def answer(llm, tokenizer, question, device, z=None, limit=512):
    """Greedy answer with a KV cache: yields text as it comes, and last, when the model opens an
    image, its condition [1,N,Z] (spec: the model writes `<im_start>` itself, then the queries).

    question: the user's words; z [1,N,C]: the picture they are about, or None.
    """
    ids = text.prompt_ids(tokenizer, question, image=z is not None)
    ids, _, start, _ = text.expand(ids, [text.IGNORE] * len(ids), llm.tokens)
    ids = torch.tensor([ids], device=device)
    if z is None:
        x = llm.embed(ids)
    else:
        x = llm.embed(ids, torch.tensor([start], device=device),
                      torch.tensor([False], device=device), z)
    opens, ends = tokenizer.token_to_id("<im_start>"), tokenizer.token_to_id("<|im_end|>")
    cache, written, shown = [], [], ""
    for _ in range(limit):
        token = llm.logits(llm(x, cache)[:, -1]).argmax(-1)                 # [1]
        if token == opens:                      # <im_start>, then the queries, in one forward pass
            start = torch.tensor([1], device=device)
            block = torch.cat([token[None], torch.full((1, llm.tokens), text.IMAGE,
                                                       device=device)], 1)  # [1,1+N]
            yield llm.condition(llm(llm.embed(block, start), cache), start)
            return
        if token == ends:
            return
        written.append(token.item())
        now = tokenizer.decode(written)
        if not now.endswith("\ufffd"):          # half of a character: wait for the rest
            yield now[len(shown):]
            shown = now
        x = llm.embed(token[None])


@torch.no_grad()
def generate(dit, cond, noise, alpha, steps, guidance=1.0, schedule="clean", progress=None):
    """cond [B,N,Z], noise [B,N,C] -> latents [B,N,C].

    The unconditional branch of guidance has one null vector an image, so cond is [1,1,Z] there.
    """
    null = dit.null_condition(1) if guidance != 1 else None

    def velocity(x, t):
        v = dit(x, t, cond)
        return v if null is None else flow.guide(v, dit(x, t, null), guidance)

    return flow.euler(velocity, noise, flow.schedule_pairs(schedule, steps, alpha), progress)


def noise_for(prompt, seed, tokens, channels):
    """[N,C] from (prompt, seed) alone: the batch it is sampled in never changes a picture."""
    key = int.from_bytes(hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[:7], "big")
    return torch.randn(tokens, channels, generator=torch.Generator().manual_seed(key))


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def open_image(path):
    """A picture file -> RGB Pillow image. Raises UserError."""
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file")
    except Exception as error:      # Pillow raises many kinds
        raise UserError(f"{path}: not a picture that Pillow can read ({type(error).__name__})")


def to_tensor(image, size):
    """Pillow image -> [1,3,size,size] in [0,1], squashed to a square (the authors' processing)."""
    image = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


def save_png(image, path, **info):
    """image [3,H,W] in [0,1] -> PNG with the settings in its metadata."""
    meta = PngImagePlugin.PngInfo()
    for key, value in info.items():
        meta.add_text(key, str(value))
    x = (image.float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path, pnginfo=meta)


# ------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------

def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("text", nargs="?", help="the prompt, or the question about --image")
    p.add_argument("--run", default=weights.ASSETS, help="run folder, released folder or hub id")
    p.add_argument("--encoder", help="default: the one the run was trained with")
    p.add_argument("--decoder", help="default: the one that belongs to the encoder")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--dtype", choices=["bfloat16", "float32"],
                   help="default: bfloat16 on accelerators, float32 on CPU")
    g = p.add_argument_group("picture")
    g.add_argument("--n", type=runs.positive(), default=1, help="pictures a prompt")
    g.add_argument("--steps", type=runs.positive(), default=50)
    g.add_argument("--guidance", type=runs.positive(float, zero=True),
                   help="1: off (default for released weights); tiny default: 3")
    g.add_argument("--seed", type=runs.positive(zero=True), default=0)
    g.add_argument("--schedule", choices=["clean", "compat"], default="clean")
    g.add_argument("--direct", action="store_true",
                   help="skip the LLM's own words: open the image at once, in one prefill")
    g.add_argument("--prompts", type=Path, help="a text file, one prompt a line; --out is a folder")
    g.add_argument("--out", type=Path, default=Path("out.png"))
    g.add_argument("--save-latent", type=Path, help="keep the latents [n,N,C] as safetensors")
    g = p.add_argument_group("understanding")
    g.add_argument("--image", type=Path, help="the picture that the text asks about")
    g.add_argument("--latent", type=Path, help="a stored latent instead: decode it, or ask about it")
    g.add_argument("--max-tokens", type=runs.positive(), default=512, help="of an answer")
    g.add_argument("--reconstruct", type=Path, help="encode and decode a picture, side by side")
    args = p.parse_args()
    given = [bool(args.text), args.prompts is not None, args.reconstruct is not None,
             args.latent is not None]
    if not any(given):
        p.error("nothing to do: give a prompt, --prompts, --latent or --reconstruct (see --help)")
    if args.image and not (args.text or "").strip():
        p.error(f"--image {args.image}: give the question too, in quotes")
    if args.text is not None and not args.text.strip():
        p.error("the prompt is empty; expected some words in quotes")
    if args.schedule == "compat" and args.steps < 3:
        p.error(f"--steps {args.steps}: --schedule compat needs at least 3")
    return args


def read_prompts(args):
    if not args.prompts:
        return [args.text]
    if not args.prompts.is_file():
        raise UserError(f"--prompts {args.prompts}: no such file")
    prompts = [line.strip() for line in args.prompts.read_text().splitlines() if line.strip()]
    if not prompts:
        raise UserError(f"--prompts {args.prompts}: no prompt in it; expected one a line")
    return prompts


def main():
    args = arguments()
    devices = parallel.setup(args.device, args.dtype or None)
    if args.dtype is None and devices.kind == "cpu":
        devices.dtype = torch.float32
    device = devices.device
    picture = open_image(args.image or args.reconstruct) if args.image or args.reconstruct else None
    prompts = read_prompts(args)
    if args.latent and not args.latent.is_file():
        raise UserError(f"--latent {args.latent}: no such file")
    run, = weights.locate([("model", args.run, "--run")])

    if args.reconstruct:
        encoder, decoder = weights.load_codec(weights.config_of(run), args, devices)
        x = to_tensor(picture, encoder.image_size).to(device)
        with torch.no_grad():
            x_hat = decoder(encoder(x)).clamp(0, 1)
        x = torch.nn.functional.interpolate(x, x_hat.shape[-2:], mode="area")
        error = ((x * 255).round() - (x_hat * 255).round()).square().mean().item() / 255 ** 2
        runs.save_grid(torch.cat([x, x_hat]), args.out, columns=2)
        print(f"{args.out}  left: the picture, right: its reconstruction, "
              f"PSNR {-10 * math.log10(max(error, 1e-10)):.2f} dB")
        return

    llm, dit, tokenizer, config = weights.load_model(run, devices)
    N, C = dit.tokens, dit.channels
    tiny = "shift_alpha" in config                      # our runs record theirs
    alpha = config.get("shift_alpha") or flow.shift_alpha(N, C, config.get("diffusion_base_dim")
                                                          or flow.SHIFT_BASE)
    guidance = args.guidance if args.guidance is not None else 3.0 if tiny else 1.0

    # ---- a question about a picture, or about a stored latent: no pixels needed there ----
    if args.image or (args.latent and args.text):
        if args.image:
            encoder, _ = weights.load_codec(config, args, devices, decoder=False)
            with torch.no_grad():
                z = encoder(to_tensor(picture, encoder.image_size).to(device))
        else:
            z = weights.read_latent(args.latent, N, C).to(device)[:1]
        for piece in answer(llm, tokenizer, args.text, device, z, args.max_tokens):
            if isinstance(piece, str):
                print(piece, end="", flush=True)
        print()
        return

    _, decoder = weights.load_codec(config, args, devices, encoder=False)
    if args.latent:
        z = weights.read_latent(args.latent, N, C).to(device)
        with torch.no_grad():
            runs.save_grid(decoder(z), args.out, columns=4)
        print(args.out)
        return

    # ---- prompts -> pictures ----
    folder = args.out if args.prompts else None
    if folder is not None and folder.suffix:
        folder = folder.with_suffix("")
    kept = []
    for k, prompt in enumerate(prompts):
        if args.direct:
            cond = direct_condition(llm, tokenizer, [prompt], device)
        else:
            *words, cond = list(answer(llm, tokenizer, prompt, device)) or [""]
            if isinstance(cond, str):
                raise UserError(f"the model answered {''.join(words) + cond!r} instead of drawing; "
                                "ask for a picture (\"Can you generate a photo of ...?\") or force "
                                "one with --direct")
        bar = functools.partial(tqdm, desc=prompt[:40], disable=not sys.stderr.isatty())
        # One picture at a time: products of another batch size round otherwise, and a picture must
        # not depend on the batch that it was drawn in.
        noise = [noise_for(prompt, args.seed + i, N, C)[None].to(device) for i in range(args.n)]
        latents = [generate(dit, cond, x, alpha, args.steps, guidance, args.schedule, bar)
                   for x in noise]
        z = torch.cat(latents)                                              # [n,N,C]
        with torch.no_grad():
            images = [decoder(row[None])[0] for row in z]
        kept.append(z.cpu())
        info = dict(prompt=prompt, seed=args.seed, steps=args.steps, guidance=guidance,
                    schedule=args.schedule, model=Path(run).name)
        for i, image in enumerate(images):
            if folder is not None:
                path = folder / f"{k:05d}-{args.seed + i}.png"
            else:
                path = args.out if args.n == 1 else args.out.with_stem(f"{args.out.stem}-{i}")
            save_png(image, path, **{**info, "seed": args.seed + i})
            print(path)
    if args.save_latent:
        from safetensors.torch import save_file
        save_file({"latents": torch.cat(kept)}, args.save_latent)
        print(args.save_latent)


if __name__ == "__main__":
    runs.main(main)
