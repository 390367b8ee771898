"""What sample.py reads and writes: prompts, images, latents and PNG files; and the checks of them.
Also the prompts of a trainer's samples.

    lines.txt    one prompt per line
    x.jsonl      one {"prompt": ...} per line (GenEval's); DPG-Bench's layout reads "item_id" too
    folder/      one prompt per .txt file (DPG-Bench's)
"""
import contextlib
import json
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin

import weights
from chat import SPECIAL, prompt_ids, request_of
from cli import UserError, parsing, printable
from files import is_system, read_fields
from training import image_sheet

# ------------------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------------------

def read_prompts(path, layout=None, flag="--prompts"):
    """Read the file or folder of a flag -> [(name, prompt, record)]. Raises UserError."""
    flag, items = f"{flag} {printable(path)}", []
    if path.suffix.lower() in (".json", ".csv", ".tsv", ".parquet"):
        raise UserError(f"{flag}: expected a text file of lines, a .jsonl or a folder of .txt")
    lines = []
    if path.is_dir():
        for file in (f for f in sorted(path.glob("*.txt")) if not is_system(f.name)):
            with parsing(f"{flag}: {file.name}", file):
                prompt = " ".join(file.read_text(encoding="utf-8-sig").split())
            items.append((file.stem, prompt, {"prompt": prompt}))
    else:
        with parsing(flag, path):
            lines = path.read_text(encoding="utf-8-sig").split("\n")
    for number, line in enumerate(lines, 1):                # JSON may hold other line breaks
        record, name = {"prompt": line}, f"{len(items):05d}"
        if not line.strip():
            continue
        if path.suffix.lower() == ".jsonl":
            with parsing(f"{flag}, line {number}", path):
                record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                raise UserError(f"{flag}, line {number}: expected {{\"prompt\": ...}}")
        if layout == "dpg":
            name = record.get("item_id", name)
            name = str(name) if isinstance(name, int) else name
        items.append((name, record["prompt"].strip(), record))
    if not items:
        raise UserError(f"{flag}: no prompt in it; expected one per line, or .txt files in a "
                        "folder")
    for name, prompt, _ in items:
        with parsing(f"{flag}: item_id {name!r} is no file name"):
            size = len(os.fsencode(name))               # raises for null, and half a surrogate pair
        if not 0 < size <= 200 or name[0] == "." or set(name) & {"/", "\0"}:
            raise UserError(f"{flag}: item_id {name!r} is no file name of 1 to 200 bytes")
        if not prompt:
            raise UserError(f"{flag}: the prompt of {printable(name)} is empty")
    if len({name for name, *_ in items}) < len(items):
        raise UserError(f"{flag}: an item_id comes twice; its images would overwrite each other")
    return items


def sample_prompts(file, mixture, model):
    """Return the prompts of a trainer's samples: those of --sample-prompts (`file`), else captions
    of the first 16 records of the user's data, else fixed ones of the toy world.

    `check_text` with `model` says which ones cannot be drawn: a UserError for those of `file`;
    captions are left out.
    """
    if file:
        prompts = [prompt for _, prompt, _ in read_prompts(file, flag="--sample-prompts")]
        for prompt in prompts:
            check_text(prompt, f"--sample-prompts {printable(file)}: {prompt[:40]!r}", model)
        return prompts
    sources = [source for source in mixture.files if source is not None]
    if not sources:
        from tiny import judge
        return judge.FIXED
    prompts = []
    for source in sources:
        for j in range(min(len(source), math.ceil(16 / len(sources)))):
            with contextlib.suppress(UserError):        # a broken record, or words that do not fit
                record = read_fields(source.read(j)[1], True, lambda: 0.0)
                if record["task"] == "t2i":
                    prompt = request_of(record["conversations"])
                    check_text(prompt, "caption", model)
                    prompts.append(prompt)
    return list(dict.fromkeys(prompts))


def check_text(words, flag, model):
    """Raise UserError for words that break the chat format or leave no room in the context."""
    if any("\ud800" <= c <= "\udfff" for c in words):
        raise UserError(f"{flag} is not valid Unicode: {words[:40]!r}")
    for s in (*SPECIAL, "<image>"):
        if s in words:
            raise UserError(f"{flag} holds {s}, which the chat format uses; leave it out")
    answer = 10                             # "Here you go:" and the marks around the image
    length = len(prompt_ids(model.tokenizer, words)) + model.llm.tokens + answer
    if length > model.config.context:
        raise UserError(f"{flag} is too long: {length} tokens with the image's {model.llm.tokens}, "
                        f"the context has {model.config.context}; shorten it ({words[:40]!r}...)")


# ------------------------------------------------------------------------------------------------
# Flags that would be ignored, and files that cannot be written
# ------------------------------------------------------------------------------------------------

def check_arguments(parser, args, drawing):
    """Refuse flags of sample.py that would be ignored. drawing: the flags that only draw."""
    mode = next((k for k in ("image", "reconstruct", "latent", "prompts") if getattr(args, k)), "")
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
    if args.out and (args.image or args.latent and args.text):
        parser.error(f"--out {args.out}: the answer to a question is printed, not written")


def check_sampler(args):
    """Raise UserError for fewer steps than the schedule needs."""
    if args.schedule == "authors" and args.steps < 3:
        raise UserError(f"--steps {args.steps}: --schedule authors needs at least 3")


def check_out(path, flag, suffix=None, inputs=()):
    """Raise UserError unless `path` can be written: a file that ends in `suffix`, or a folder if
    suffix is None. What the attempt makes is removed again. inputs: files not to overwrite."""
    if any(Path(p).resolve() == path.resolve() for p in inputs if p):
        raise UserError(f"{flag} {printable(path)} would overwrite the input; give another name")
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


def check_finite(name, tensor):
    """Return the tensor. Raises UserError, with its name, if it holds NaN or infinity."""
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise UserError(f"{name}: {bad:,} of {tensor.numel():,} values are not finite (NaN or "
                        "infinity); what it was computed from is finite")
    return tensor


# ------------------------------------------------------------------------------------------------
# Images and latents
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
    image = np.asarray(image.crop((left, top, left + S, top + S)))          # [S,S,3]
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255


def read_latent(path, tokens, channels):
    """Read a file of --save-latent, ours or the authors' -> [n,N,C]. Raises UserError."""
    source = weights.open_weights(path, "--latent")
    key, shape = next(iter(source.shapes.items()), ("", ()))
    if shape[-2:] != (tokens, channels) or len(shape) > 3 or not math.prod(shape):
        raise UserError(f"{source.what}: a tensor of {list(shape)}; this model's latents are n x "
                        f"{[tokens, channels]}, n at least 1")
    return source.rows(key).float().reshape(-1, tokens, channels)           # [n,N,C]


def save_png(image, path, **info):
    """Write an image [3,H,W] in [0,1] as a PNG with the settings in its metadata. Values are
    rounded to 8 bits; with the schedule `authors` they are cut off, as in the authors' code."""
    check_finite("the decoded image", image)
    meta = PngImagePlugin.PngInfo()
    for key, value in info.items():
        meta.add_itxt(key, str(value))
    x = image.float().cpu().clamp(0, 1) * 255
    x = (x if info.get("schedule") == "authors" else x.round()).byte()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(path, pnginfo=meta)    # [H,W,3]


def settings(args, prompt, guidance, dtype, forced):
    """Return what the metadata of a drawn image say besides its seed. forced: whether the model was
    made to open the image."""
    info = dict(prompt=prompt, steps=args.steps, guidance=guidance, schedule=args.schedule,
                solver=args.solver, direct=forced, model=printable(Path(args.run).name),
                dtype=str(dtype).removeprefix("torch."))
    return {**info, "best_of": args.best_of, "verifier": args.verifier} if args.best_of else info


# ------------------------------------------------------------------------------------------------
# Layouts of the official scorers
# ------------------------------------------------------------------------------------------------

def check_geneval(args, names):
    """Raise UserError if --out holds images that GenEval's scorer would count besides the ones of
    the prompts with these names."""
    for p in args.out.glob("*/samples/*.png"):
        if p.parts[-3] not in names or p.stem >= f"{args.n:04d}":
            raise UserError(f"--out {args.out} holds {p} of an earlier run, which the scorer would "
                            "count too; take another --out")


def png_files(args, name, record, images, seeds):
    """Return the PNG files of one prompt: [(path, image [3,H,W], its seed or seeds)]. With
    GenEval's layout, also make the prompt's folder and write its metadata.jsonl."""
    n, all_seeds = len(images), " ".join(map(str, seeds))
    grid = image_sheet(images, math.ceil(math.sqrt(n)), 0 if args.layout == "dpg" else 2)
    if args.layout == "geneval":        # NAME/metadata.jsonl, NAME/samples/0000.png, NAME/grid.png
        folder = args.out / name
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        (folder / "metadata.jsonl").write_text(json.dumps(record) + "\n")
        files = [(folder / "samples" / f"{i:04d}.png", images[i], seeds[i]) for i in range(n)]
        return files + [(folder / "grid.png", grid, all_seeds)] * args.grid
    if args.layout == "dpg" or args.prompts and args.grid:      # NAME.png, of 1, or of 2 x 2
        return [(args.out / f"{name}.png", grid, all_seeds)]
    if args.prompts:
        return [(args.out / f"{name}-{seeds[i]}.png", images[i], seeds[i]) for i in range(n)]
    if args.grid or n == 1:
        return [(args.out, grid, all_seeds)]
    return [(args.out.with_stem(f"{args.out.stem}-{i}"), images[i], seeds[i]) for i in range(n)]


def table(rows, order, seeds, keep):
    """Format the rows of best_of.scores in order as text; `*` marks the first `keep`."""
    names = [k for k in rows[0] if k != "answer"]
    lines = [f"  {'seed':>6} " + "".join(f"{k:>13}" for k in names) + "  answer"]
    for place, i in enumerate(order):
        lines.append(f"{'*' if place < keep else ' '} {seeds[i]:>6} "
                     + "".join(f"{rows[i][k]:>13.4f}" for k in names) + f"  {rows[i]['answer']}")
    return "\n".join(lines)
