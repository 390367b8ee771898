"""The files of a run: its folder, files that are either whole or absent, its log and plot."""
import contextlib
import itertools
import json
import math
import os
import uuid
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from cli import UserError, parsing, printable, table

# Files that a run would replace
OURS = {"args.json", "config.json", "log.jsonl", "tokenizer.json", "vocab.json", "merges.txt"}
DISK = (OSError, SafetensorError)       # what a full or vanished disk raises

# ------------------------------------------------------------------------------------------------
# The folder
# ------------------------------------------------------------------------------------------------

def check_folder(path, args, saved):
    """Raise UserError if a run in the folder --out, whose checkpoints are `saved`, would replace or
    move what is not its own."""
    here = path.resolve()
    inside = {p.name for p in here.glob("*")}           # none if another process moves it now
    lost = sorted(inside if args.fresh else inside & OURS)
    if lost and not saved and "lock" not in inside:
        raise UserError(f"--out {path} holds {printable(lost[0])} and is not the folder of a run; "
                        "give another --out")
    if not saved and not args.fresh and "final" in inside:
        raise UserError(f"--out {path} holds final/ and no checkpoint to go on from; --fresh moves "
                        "it aside, or give another --out")
    used = [Path.cwd(), Path(args.init or ".").resolve()]
    if args.fresh and any(here in (place, *place.parents) for place in used):
        raise UserError(f"--out {path} --fresh would move aside the working folder or --init; give "
                        "another --out")


def open_folder(path, fresh):
    """Make and lock a run folder -> the lock, which must be kept. fresh: first move an old run
    aside. Raises UserError."""
    folder = path.resolve()                                 # a link to a folder stays a link
    try:
        if fresh and folder.is_dir() and any(folder.iterdir()):
            old = lock(folder)                              # refuses a run that still trains
            asides = (folder.with_name(f"{folder.name}.old{k}") for k in itertools.count(1))
            aside = next(place for place in asides if not place.exists())
            folder.rename(aside)
            old.close()
            print(f"moved the old run to {aside}")
        folder.mkdir(parents=True, exist_ok=True)
        locked = lock(folder)
        for name in ("checkpoints", "samples"):
            (folder / name).mkdir(exist_ok=True)
        return locked
    except BlockingIOError:
        raise UserError(f"--out {path} is in use by another process; give another --out")
    except OSError as error:
        raise UserError(f"--out {path}: cannot write or lock {error.filename or path}: "
                        f"{error.strerror}")


def lock(folder):
    """Take a run folder's POSIX lock. It ends with this process, even by kill -9, and the loader's
    workers, which may live for seconds longer, do not inherit it."""
    try:
        import fcntl
    except ImportError:
        raise UserError("training needs Linux or macOS: this system has no file locks (fcntl)")
    handle = open(folder / "lock", "w")
    fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


@contextlib.contextmanager
def naming_the_older(saved):
    """Add to an error of the last checkpoint in `saved` how to go on from the one before."""
    try:
        yield
    except UserError as error:
        before = saved[-2].name if len(saved) > 1 else "the start"
        raise UserError(f"{error}; if other code wrote it, go on with that code, else delete "
                        f"{saved[-1]} to go on from {before}") from None


def read_meta(folder):
    """Return the arguments and the optimizers' plain numbers of a checkpoint. Raises UserError."""
    with parsing(f"checkpoint {folder} is damaged: meta.json", folder / "meta.json"):
        meta = json.loads((folder / "meta.json").read_text())
        state = dict(meta.get("state", {}))
        return dict(meta["args"]), {**state, "groups": list(map(dict, state.get("groups", ())))}


# ------------------------------------------------------------------------------------------------
# Writing
# ------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def surviving(report):
    """Go on if the disk fails, after report(error)."""
    try:
        yield
    except DISK as error:
        report(str(error))


def save_tensors(tensors, path, metadata):
    """Write a safetensors file and sync it to disk. safetensors itself ignores the umask."""
    save_file(tensors, path, metadata)
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
    fsync(path)


def write_text(path, text):
    """Write a text file under a temporary name first, so that no reader sees half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.rename(path)


def fsync(path):
    """Sync a file or a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# ------------------------------------------------------------------------------------------------
# The log
# ------------------------------------------------------------------------------------------------

def read_log(path):
    """Return the lines of log.jsonl as dicts, without the damaged ones."""
    lines = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            values = json.loads(line)
            if isinstance(values, dict) and "step" in values and all(
                    isinstance(values.get(k, 0), int)
                    for k in ("step", "skipped_records", "skipped_updates")):
                lines.append(values)
    return lines


def plain(value):
    """Return a value for JSON, which has neither NaN nor infinity: null stands for both."""
    if isinstance(value, float):
        return round(value, 7) if math.isfinite(value) else None
    return value


def plot_log(folder, keys):
    """Draw loss.png from log.jsonl, with one panel for each of `keys` that the log holds."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    lines = read_log(folder / "log.jsonl")
    keys = [k for k in keys if any(k in line for line in lines)]
    if not keys:
        return
    figure, axes = plt.subplots(1, len(keys), figsize=(4 * len(keys), 3), squeeze=False)
    for axis, key in zip(axes[0], keys):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        axis.plot(*zip(*points), linewidth=1)
        axis.set(title=key, xlabel="step")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    try:
        figure.savefig(folder / "loss.png", dpi=110)
    finally:
        plt.close(figure)


def print_bench(values, flops, steps):
    """Print the means over `steps` steps as a table and as one JSON object. The speed of a part of
    the model is its share of the FLOPs: to time the parts would slow the whole."""
    means = {k: values[k] for k in ("images_per_s", "tflops", "mfu", "memory_gb", "data_wait_s",
                                    "step_s")}
    for k in ("tflops", "mfu"):
        means[f"{k}_by_part"] = means[k] and {
            part: means[k] * v / sum(flops.values()) for part, v in flops.items()}
    table(f"bench: mean of {steps} steps", list(means.items()))
    print(json.dumps({"steps": steps, **means}))


def start_wandb(folder, project, config):
    """Start a Weights & Biases run, or continue the one whose id the run folder holds."""
    import wandb                                            # installed by those who ask for it
    path = folder / "wandb-id"
    if not path.exists():
        write_text(path, uuid.uuid4().hex)
    return wandb.init(project=project, config=config, name=folder.name, id=path.read_text(),
                      resume="allow")
