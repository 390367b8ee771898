"""Files of prompts, the prompts of a trainer's samples, and image folders as the official scorers
read them.

    lines.txt    one prompt per line
    x.jsonl      one {"prompt": ...} per line (GenEval's); DPG-Bench's layout reads "item_id" too
    folder/      one prompt per .txt file (DPG-Bench's)
"""
import contextlib
import json
import math
import os

from chat import ANSWER, ROLES
from cli import UserError, parsing, printable
from files import BrokenRecord, is_system, read_fields
from training import image_sheet


def read_prompts(path, layout=None, flag="--prompts"):
    """Read the file or folder of a flag -> [(name, prompt, record)]. Raises UserError."""
    flag, items = f"{flag} {printable(path)}", []
    if path.suffix.lower() in (".json", ".csv", ".tsv", ".parquet"):
        raise UserError(f"{flag}: expected a text file of lines, a .jsonl or a folder of .txt")
    files = [f for f in sorted(path.glob("*.txt")) if not is_system(f.name)]
    for file in files if path.is_dir() else [path]:
        with parsing(f"{flag}: {file.name}" if path.is_dir() else flag, file):
            text = file.read_text(encoding="utf-8-sig")
        if path.is_dir():
            prompt = " ".join(text.split())
            items.append((file.stem, prompt, {"prompt": prompt}))
            continue
        for number, line in enumerate(text.split("\n"), 1):     # JSON may hold other line breaks
            record, name = {"prompt": line}, f"{len(items):05d}"
            if not line.strip():
                continue
            if path.suffix.lower() == ".jsonl":
                with parsing(f"{flag}, line {number}", file):
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
            raise UserError(f"{flag}: item_id {name!r} is no file name")
        if not prompt:
            raise UserError(f"{flag}: the prompt of {printable(name)} is empty")
    if len({name for name, *_ in items}) < len(items):
        raise UserError(f"{flag}: an item_id comes twice; its images would overwrite each other")
    return items


def sample_prompts(file, mixture, collate, count=16):
    """Return the prompts of a trainer's samples: those of --sample-prompts (`file`), else captions
    of the first records of the user's data, else fixed ones of the toy world.

    collate.row says which ones do not fit the chat: a UserError for those of `file`, else left out.
    """
    fault = lambda prompt: collate.row({"conversations": [
        {"from": "human", "value": prompt}, {"from": "gpt", "value": ANSWER}]})[1]
    if file:
        prompts = [prompt for _, prompt, _ in read_prompts(file, flag="--sample-prompts")]
        for prompt in prompts:
            what = f"--sample-prompts {printable(file)}: {prompt[:40]!r}"
            with parsing(what):
                prompt.encode()                         # half of a surrogate pair is no text
            if why := "it holds <image>" if "<image>" in prompt else fault(prompt):
                raise UserError(f"{what}: {why}")
        return prompts
    sources = [source for source in mixture.files if source is not None]
    if not sources:
        from tiny import judge
        return judge.FIXED
    prompts = []
    for source in sources:
        for j in range(min(len(source), math.ceil(count / len(sources)))):
            with contextlib.suppress(BrokenRecord):
                record = read_fields(source.read(j)[1], True, float)    # float() is 0.0
                if record["task"] == "t2i":
                    prompts.append(next(turn["value"] for turn in record["conversations"]
                                        if ROLES[turn["from"]] == "user"))
    return [prompt for prompt in dict.fromkeys(prompts) if not fault(prompt)]


def check_geneval(args, names):
    """Raise UserError if --out holds images that GenEval's scorer would count besides the ones of
    the prompts with these names."""
    for p in args.out.glob("*/samples/*.png"):
        if p.parts[-3] not in names or p.stem >= f"{args.n:04d}":
            raise UserError(f"--out {args.out} holds {p} of an earlier run, which the scorer would "
                            "count too; take another --out")


def png_files(args, name, record, images, seeds):
    """Return the PNG files of one prompt: [(path, image [3,H,W], its seed or seeds)]."""
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
