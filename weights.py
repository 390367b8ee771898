"""Weight files: found, opened, checked, and read row by row.

A file is safetensors, or a .pt, .pth or .bin that holds only tensors (one with code in it is
refused). An opened file knows its shapes and reads rows on demand, so that each process reads its
own share (`parallel.build`). networks.py loads the frozen networks, stage2.py the LLM and the DiT.
"""
import json
import math
import re
import sys
import zipfile
import zlib
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open

import parallel
from cli import UserError, parsing, printable
from encoder import ENCODERS

HERE = Path(__file__).parent
TINY = HERE / "tiny"
TINY_ENCODER, TINY_VAE = "tiny/encoder.safetensors", "tiny/vae.safetensors"     # names in configs
TINY_PAIR = (TINY_ENCODER, "tiny/decoder.safetensors")
FLUX_VAE = "black-forest-labs/FLUX.1-dev"               # its vae/ folder
HUB = {"siglip2": ("google/siglip2-so400m-patch14-224", "nyu-visionx/siglip2_decoder"),
       "webssl": ("facebook/webssl-dino300m-full2b-224", "nyu-visionx/webssl300m_decoder")}
HUB["vae"] = HUB["siglip2"]                             # its encoder is for understanding
FILES = ("model.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
         "pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DIT = "diff_head.model."                                # the DiT's prefix in the released keys
# Prefixes that FSDP (of torch and torch_xla), torch.compile and DDP leave anywhere in a key
WRAPPERS = re.compile(r"(?<![^.])((_orig_|_fsdp_wrapped_|_fpw_)?module|_orig_mod)[.]")


# ------------------------------------------------------------------------------------------------
# Finding
# ------------------------------------------------------------------------------------------------

def locate(wanted):
    """Find [(what, path or hub id, flag), ...] -> existing paths, or names in ENCODERS.

    Each name is searched in the working folder and beside this file, as it is and in weights/. A
    hub id is then downloaded into the local hub cache. Raises one UserError for all missing files,
    with the places that were searched and the flag to set.
    """
    paths, missing = [], []
    for what, name, flag in wanted:
        name = str(name)
        local = Path("weights") / Path(name).name
        places = (place / p for p in (name, local) for place in (Path(), HERE))
        found = name if name in ENCODERS else next((p for p in places if p.exists()), None)
        searched = f"{name}, {local}"
        if not found and re.fullmatch(r"(?!(weights|runs|tiny)/)[\w.-]+/[\w.-]+", name):
            from huggingface_hub import snapshot_download
            # the other files of FLUX are 50 GB
            part = ["vae/*"] if what == "vae" or name == FLUX_VAE else None
            try:                                                # without a network, from the cache
                found = Path(snapshot_download(name, allow_patterns=part))
            except Exception as error:                          # the hub's client raises many kinds
                searched += f", the hub cache, the hub ({type(error).__name__})"
        paths.append(found)
        if not found:
            missing.append(f"  {what}: {flag} {printable(name)}\n      searched "
                           f"{printable(searched)}; give {flag} PATH")
    if missing:
        raise UserError("weights are missing:\n" + "\n".join(missing))
    return paths


def portable_path(name):
    """Return a name that a config can hold, which is read from any folder: an absolute path for
    files and folders. Leave tiny/, hub ids, built-in names and None unchanged."""
    if not name or name in ENCODERS or not Path(name).exists():
        return name
    path = Path(name).resolve()
    return str(path.relative_to(HERE.resolve()) if path.is_relative_to(TINY.resolve()) else path)


def checkpoints(folder):
    """Return the checkpoints of a run folder, oldest first. Each has a meta.json."""
    return sorted((p for p in (Path(folder) / "checkpoints").glob("*")
                   if re.fullmatch(r"step-\d+", p.name) and (p / "meta.json").is_file()),
                  key=lambda p: int(p.name[5:]))


def weights_of(path):
    """Return the file or folder with a model's weights. For a run folder this is its final/, or
    before the run ends its newest checkpoint; in a folder with ema.safetensors, that file."""
    final = Path(path) / "final"
    folder = final if final.is_dir() else next(reversed(checkpoints(path)), Path(path))
    ema = folder / "ema.safetensors"
    return ema if ema.is_file() else folder


def model_folder(path):
    """Return the folder with a model's config.json and tokenizer: its own, or its run's."""
    place = weights_of(path)
    folder = place if place.is_dir() else place.parent
    return folder.parent.parent if (folder / "meta.json").is_file() else folder


# ------------------------------------------------------------------------------------------------
# Opening
# ------------------------------------------------------------------------------------------------

class Weights:
    """An opened weight file or folder. what: its name in errors. config: the dict of config.json or
    of the metadata. shapes: {key: shape}. pieces: {key: [(first row, shape, read(first, last),
    checksum or None)]}; a checkpoint of several processes has several."""

    def __init__(self, what, config, pieces):
        self.what, self.config, self.pieces = what, config, pieces
        self.shapes = {}
        for key, parts in pieces.items():
            parts.sort(key=lambda part: part[0])
            shape = parts[0][1]
            rows = [sum(part[1][0] for part in parts)] if shape else []
            self.shapes[key] = (*rows, *shape[1:])

    def rows(self, key, first=0, last=None):
        """Read rows of a tensor, by default all. Raises UserError for damaged bytes, and for values
        that are not finite."""
        last = self.shapes[key][0] if last is None and self.shapes[key] else last
        found = []
        for k, (start, shape, read, checksum) in enumerate(self.pieces[key], 1):
            count = shape[0] if shape else 1
            a = max(0, first - start)
            b = max(a, min(count, last - start)) if shape else 1
            others = found or k < len(self.pieces[key])
            if a == b and others:               # without rows one piece is enough, for the shape
                continue
            if checksum is None:
                tensor = read(a, b)
            else:                               # a checksum is that of a whole piece
                tensor = read(0, count)
                if crc32(tensor) != checksum:
                    raise UserError(f"{self.what} is damaged: {key} does not match its checksum")
                tensor = parallel.cut(tensor, a, b)
            if tensor.dtype in FLOATS and not torch.isfinite(tensor).all():
                raise UserError(f"{self.what}: {key} holds NaN or infinity")
            found.append(tensor)
        return torch.cat(found) if len(found) > 1 else found[0]

    def dtype(self, key):
        """Return the dtype of a tensor."""
        _, _, read, _ = self.pieces[key][0]
        return read(0, 0).dtype

    def renamed(self, rename):
        """Return the same weights under other keys, without those for which rename(key) is None."""
        pieces = {rename(key): parts for key, parts in self.pieces.items()}
        pieces.pop(None, None)
        return Weights(self.what, self.config, pieces)

    def depth(self, blocks):
        """Return the number of blocks `blocks`.0, .1, ... among the keys."""
        numbers = (k[len(blocks) + 1:].split(".")[0] for k in self.shapes
                   if k.startswith(blocks + "."))
        return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)

    def size(self, key, axis=0):
        """Return one dimension of a tensor, 0 if the key is missing."""
        return self.shapes[key][axis] if len(self.shapes.get(key, ())) > axis else 0


def crc32(tensor):
    """Return the checksum of a tensor's bytes."""
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def read_slice(file, key, first, last):
    """Return rows of a tensor in an opened safetensors file; a scalar has none."""
    part = file.get_slice(key)
    return part[first:last] if part.get_shape() else file.get_tensor(key)


def open_safetensors(path, what):
    """Return the pieces of one file and its metadata."""
    with parsing(f"{what}: {path.name}", path):
        file = safe_open(path, "pt")
        meta = file.metadata() or {}
        first, sums = (json.loads(meta.get(k, "{}")) for k in ("first_row", "crc32"))
        pieces = {}
        for key in file.keys():
            part = file.get_slice(key)
            pieces[key] = [(first.get(key, 0), tuple(part.get_shape()),
                            partial(read_slice, file, key), sums.get(key))]
    return pieces, meta


def open_pickle(path, what):
    """Return the pieces of a file that torch.save wrote, and no metadata. If it holds several state
    dicts, take the average's and print a note."""
    with parsing(f"{what}: {path.name}", path):
        state = torch.load(path, map_location="cpu", weights_only=True,
                           mmap=zipfile.is_zipfile(path))       # torch before 1.6 wrote no zip file
    if torch.is_tensor(state):
        state = {path.stem: state}                      # from the authors' --save-latent
    is_state = lambda v: isinstance(v, dict) and v and all(map(torch.is_tensor, v.values()))
    if not is_state(state):
        inside = [k for k, v in state.items() if is_state(v)] if isinstance(state, dict) else []
        known = [k for k in ("ema", "ema_model", "model_ema", "model", "state_dict") if k in inside]
        if not known:
            raise UserError(f"{what}: {path.name}: expected a state dict of tensors, bare or under "
                            "the key 'model' or 'ema'")
        if len(inside) > 1:
            print(f"note: {printable(path)} holds {', '.join(map(str, inside))}; {known[0]} is "
                  "taken", file=sys.stderr)
        state = state[known[0]]
    return in_memory(state), {}


def in_memory(state):
    """Return the pieces of {key: tensor}."""
    return {str(k): [(0, tuple(v.shape), partial(parallel.cut, v), None)]
            for k, v in state.items()}


def open_checkpoint(path):
    """Open a checkpoint -> Weights of all its tensors, those of the optimizers too."""
    pieces = {}
    for part in sorted(path.glob("state*.safetensors")):
        for key, parts in open_safetensors(part, f"checkpoint {path}")[0].items():
            pieces.setdefault(key, []).extend(parts)
    return Weights(f"checkpoint {path}", {}, pieces)


def weight_files(path, what):
    """Return the weight files in a folder, or the file itself. Raises UserError."""
    files = [path]
    if path.is_dir():
        files = (sorted(path.glob("state*.safetensors"))
                 or [path / name for name in FILES if (path / name).is_file()][:1]
                 or sorted(path.glob("*.zst*")))
    if not files:
        raise UserError(f"{what}: no weights; expected one of {', '.join(FILES)}, or a run folder "
                        "with a checkpoint")
    if files[0].suffix in (".zst", ".zstd"):
        raise UserError(f"{what}: {files[0].name} is compressed; unpack it: zstd -d {files[0]}")
    if not files[0].name.endswith(".index.json"):
        return files
    index = read_json(files[0], what).get("weight_map")
    if not isinstance(index, dict):
        raise UserError(f"{what}: {files[0].name} has no weight_map")
    files = [files[0].parent / name for name in sorted({str(v) for v in index.values()})]
    if absent := [f.name for f in files if not f.is_file()]:
        raise UserError(f"{what} names {len(files)} shards, {len(absent)} are not there "
                        f"(first: {absent[0]})")
    return files


def open_weights(path, flag="--init"):
    """Open a run, one of its checkpoints, a released folder or a file -> Weights.

    The config in a file's metadata comes before the config.json beside it. A checkpoint has the
    config of its run, and gives averages instead of weights if it has them. Raises UserError.
    """
    what, file = f"{flag} {printable(path)}", weights_of(path)
    if not file.exists():
        raise UserError(f"{what}: no such file or folder")
    files, config, pieces = weight_files(file, what), {}, {}
    beside = model_folder(path) / "config.json"
    if beside.is_file():
        config = read_json(beside, what)
    for part in files:
        open_file = open_safetensors if part.suffix == ".safetensors" else open_pickle
        found, meta = open_file(part, what)
        for key, parts in found.items():
            pieces.setdefault(WRAPPERS.sub("", key), []).extend(parts)
        if "config" in meta:
            with parsing(f"{what}: the config in {part.name}"):
                config = dict(json.loads(meta["config"]))
    opened = Weights(what, config, pieces)
    saved = (file / "meta.json").is_file()              # a checkpoint
    return opened.renamed(partial(exported_key, pieces)) if saved else opened


def read_json(path, what):
    """Return the object in a JSON file. Raises UserError."""
    with parsing(f"{what}: {path.name}", path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def exported_key(keys, key):
    """Return the key in final/ of a checkpoint's tensor, None if it has none. keys: all keys of the
    checkpoint; an average replaces its weight."""
    if key.startswith(("optimizer.", "disc.")) or f"ema.{key}" in keys:
        return None
    key = key.removeprefix("ema.")
    return stage2_key(key) if key.startswith(("llm.", "dit.", "repa.")) else key


def stage2_key(name):
    """Return the released key of a parameter of train_dit.ScaleRAE, None for REPA's projector."""
    if name.startswith("repa."):
        return None
    return DIT + name[4:] if name.startswith("dit.") else name.removeprefix("llm.")


# ------------------------------------------------------------------------------------------------
# Checking
# ------------------------------------------------------------------------------------------------

def check_keys(want, have, what):
    """Raise UserError if {key: shape} of a file differs from that of a model."""
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    wrong = [f"{k} is {list(have[k])}, expected {list(want[k])}"
             for k in sorted(want.keys() & have.keys()) if list(have[k]) != list(want[k])]
    problems = [f"{len(keys)} {name} (first: {keys[0]})" for name, keys in
                (("missing", missing), ("unexpected", extra), ("of another shape", wrong)) if keys]
    if problems:
        raise UserError(f"{what} does not fit the model: {'; '.join(problems)}")


def rows_for(model, source, otherwise, optional, ignore=()):
    """Check that a file fits a model -> `rows` for `parallel.build`.

    The file may lack keys for which optional(key) is true and tensors that are not on the meta
    device (tables of positions). Their values come from `otherwise`, the `rows` that
    `parallel.initial_rows` returns. ignore: parts of keys that are recomputed instead of read;
    their shapes must fit too.
    """
    own, skip = model.state_dict(), lambda k: any(i in k for i in ignore)
    have = {k: s for k, s in source.shapes.items() if k in own or not skip(k)}
    want = {k: tuple(v.shape) for k, v in own.items()
            if k in have or v.is_meta and not optional(k)}
    check_keys(want, have, source.what)
    for key in have:
        if own[key].is_floating_point() and source.dtype(key) not in FLOATS:
            raise UserError(f"{source.what}: {key} is {source.dtype(key)}; quantised weights are "
                            "not read")

    def rows(key, first, last):
        read = source.rows if key in have and not skip(key) else otherwise
        return read(key, first, last)
    return rows


def load(model, source, devices, fallback=(), ignore=()):
    """Fill a model that is on the meta device -> the frozen model, in eval mode, on its device.
    fallback: {key: tensor} for keys that the file may lack. ignore: see `rows_for`."""
    otherwise = parallel.initial_rows(model, lambda key, *_: fallback[key], 0)
    rows = rows_for(model, source, otherwise, lambda key: key in fallback, ignore)
    parallel.build(model, rows, devices)
    return model.requires_grad_(False).eval()


def check_config(config, found, what):
    """Raise UserError if a field of a config differs from `found`, {field: its value by the
    tensors' shapes}; 0 means that the file does not show it."""
    wrong = [f"{k} is {config[k]!r} in the config, {v!r} in the weights"
             for k, v in found.items() if v and config.get(k) is not None and config[k] != v]
    if wrong:
        raise UserError(f"{what}: {'; '.join(wrong)}")


def read_fields(cls, values, what):
    """Make a dataclass of a JSON object. Raises UserError for fields that are unknown, missing or
    of another type."""
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(values.keys() - known.keys()):
        raise UserError(f"{what}: its config has the unknown field {', '.join(unknown)}; expected "
                        f"{', '.join(known)}")
    lacks = [k for k, f in known.items() if f.default is MISSING and k not in values]
    if lacks:
        raise UserError(f"{what}: its config lacks {', '.join(lacks)}")
    out = {}
    for key, value in values.items():
        kind = known[key].type                          # a class, or `str | None`
        value = float(value) if type(value) is int and isinstance(0.0, kind) else value
        value = tuple(value) if isinstance(value, list) else value
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{what}: {key} is {value!r}, expected "
                            f"{getattr(kind, '__name__', kind)}")
        if kind is int and value < 0 or isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{what}: {key} is {value!r}")
        out[key] = value
    with parsing(what):                     # __post_init__ refuses values that no network can have
        return cls(**out)
