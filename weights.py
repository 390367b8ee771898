"""Weight files: found, opened, checked, and built into networks; ours go out in the same layout.

Files are safetensors, or a .pt, .pth or .bin that holds tensors alone (a file with code in it is
refused). An opened file knows its shapes and gives rows on demand, so that no process reads more
than its share (`parallel.build`). docs/released.md describes the released folders.
"""
import json
import math
import re
import sys
import zlib
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open

import chat
import parallel
from cli import UserError, parsing, printable
from decoder import Decoder, DecoderConfig
from dit import DiT, DiTConfig
from encoder import ENCODERS, ViT, our_key
from losses import DiscConfig, Discriminator, Perceptual, init_discriminator, zero_k_bias
from text_model import LLMConfig, TextModel
from vae import VAE, VAEConfig, from_ldm

HERE = Path(__file__).parent
TINY = HERE / "tiny"
TINY_ENCODER, TINY_VAE = "tiny/encoder.safetensors", "tiny/vae.safetensors"     # as configs say it
TINY_PAIR = (TINY_ENCODER, "tiny/decoder.safetensors")
FLUX_VAE = "black-forest-labs/FLUX.1-dev"               # its vae/ folder
HUB = {"siglip2": ("google/siglip2-so400m-patch14-224", "nyu-visionx/siglip2_decoder"),
       "webssl": ("facebook/webssl-dino300m-full2b-224", "nyu-visionx/webssl300m_decoder")}
HUB["vae"] = HUB["siglip2"]                             # the encoder that understands there
FILES = ("model.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
         "pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")
# prefixes that FSDP (of torch and torch_xla), torch.compile and DDP leave anywhere in a key
WRAPPERS = re.compile(r"(?<![^.])((_orig_|_fsdp_wrapped_|_fpw_)?module|_orig_mod)[.]")


# ------------------------------------------------------------------------------------------------
# Finding
# ------------------------------------------------------------------------------------------------

def locate(wanted):
    """Find [(what, path or hub id, flag), ...] -> paths that exist.

    A name is looked for here and beside this file, as it is and in weights/; then, as a hub id, it
    is downloaded into the local hub cache. Raises one UserError that lists every missing one, the
    places that were searched, and its flag.
    """
    paths, missing = [], []
    for what, name, flag in wanted:
        name = re.sub("^assets/tiny/", "tiny/", str(name))      # as the first edition called it
        if name in ENCODERS:
            paths.append(name)                                  # an encoder that needs no file
            continue
        local = Path("weights") / Path(name).name
        places = (place / p for p in (name, local) for place in (Path(), HERE))
        if found := next((p for p in places if p.exists()), None):
            paths.append(found)
            continue
        searched = f"{name}, {local}"
        if re.fullmatch(r"(?!(weights|runs|tiny)/)[\w.-]+/[\w.-]+", name):
            from huggingface_hub import snapshot_download
            part = ["vae/*"] if what == "vae" else None         # FLUX's other files are 50 GB
            try:                                        # without a network: what is in the cache
                paths.append(Path(snapshot_download(name, allow_patterns=part)))
                continue
            except Exception as error:                  # the hub's client raises many kinds
                searched += f", the hub cache, the hub ({type(error).__name__})"
        missing.append(f"  {what}: {flag} {printable(name)}\n      searched {printable(searched)}; "
                       f"give {flag} PATH")
    if missing:
        raise UserError("weights are missing:\n" + "\n".join(missing))
    return paths


def portable_path(name):
    """Return a name for configs, which are read from any folder: an absolute path for files and
    folders; tiny/, hub ids, built-in names and None stay as they are."""
    if not name or not Path(name).exists():
        return name
    path = Path(name).resolve()
    return str(path.relative_to(HERE.resolve()) if path.is_relative_to(TINY.resolve()) else path)


def checkpoints(folder):
    """Return the checkpoints of a run folder, oldest first. A folder without meta.json is none."""
    return sorted((p for p in (Path(folder) / "checkpoints").glob("*")
                   if re.fullmatch(r"step-\d+", p.name) and (p / "meta.json").is_file()),
                  key=lambda p: int(p.name[5:]))


def weights_of(path):
    """Return the place of a model's weights: a run folder stands for its final/ (EMA where there is
    one), or, before it ends, for its newest checkpoint."""
    final = Path(path) / "final"
    if final.is_dir():
        ema = final / "ema.safetensors"
        return ema if ema.is_file() else final
    return next(reversed(checkpoints(path)), Path(path))


# ------------------------------------------------------------------------------------------------
# Opening
# ------------------------------------------------------------------------------------------------

class Weights:
    """An opened weight file or folder. `config`: the dict of its config.json or metadata; `shapes`:
    {key: shape}. `pieces`: {key: [(first row, shape, is it floating point, read(first, last),
    checksum or None)]}, because processes save a checkpoint in pieces."""

    def __init__(self, what, config, pieces):
        self.what, self.config, self.pieces = what, config, pieces
        self.shapes = {}
        for key, parts in pieces.items():
            parts.sort(key=lambda part: part[0])
            shape = parts[0][1]
            rows = [sum(part[1][0] for part in parts)] if shape else []
            self.shapes[key] = (*rows, *shape[1:])

    def rows(self, key, first=0, last=None):
        """Read rows of a tensor. Raises UserError for damaged values and values that are not
        finite."""
        last = self.shapes[key][0] if last is None and self.shapes[key] else last
        found = []
        for start, shape, floating, read, checksum in self.pieces[key]:
            count = shape[0] if shape else 1
            a, b = max(0, first - start), min(count, last - start) if shape else 1
            if b <= a and found:
                continue
            if checksum is None:
                tensor = read(a, max(a, b))
            else:                       # a checksum holds for the whole piece
                tensor = read(0, count)
                if crc32(tensor) != checksum:
                    raise UserError(f"{self.what} is damaged: {key} does not match its checksum")
                tensor = tensor[a:max(a, b)] if shape else tensor
            if floating and not torch.isfinite(tensor).all():
                raise UserError(f"{self.what}: {key} holds NaN or infinity")
            found.append(tensor)
        return torch.cat(found) if len(found) > 1 else found[0]

    def renamed(self, rename):
        """Return the same weights under other keys; those for which rename(key) is None are left
        out."""
        pieces = {rename(key): parts for key, parts in self.pieces.items()}
        pieces.pop(None, None)
        return Weights(self.what, self.config, pieces)

    def depth(self, blocks):
        """Count the blocks `blocks`.0, .1, ... among the keys."""
        numbers = (k[len(blocks) + 1:].split(".")[0] for k in self.shapes
                   if k.startswith(blocks + "."))
        return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)

    def size(self, key, axis=0):
        """Return one side of a tensor, 0 where the key is missing."""
        return self.shapes[key][axis] if len(self.shapes.get(key, ())) > axis else 0


def crc32(tensor):
    return zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def read_slice(file, key, first, last):
    part = file.get_slice(key)
    return part[first:last] if part.get_shape() else file.get_tensor(key)


def open_safetensors(path, what):
    """Return the pieces of one file, and its metadata."""
    with parsing(f"{what}: {path.name}", path):
        file = safe_open(path, "pt")
        meta = file.metadata() or {}
        first, sums = (json.loads(meta.get(k, "{}")) for k in ("first_row", "crc32"))
        pieces = {}
        for key in file.keys():
            part = file.get_slice(key)
            pieces[key] = [(first.get(key, 0), tuple(part.get_shape()),
                            part.get_dtype().startswith(("F", "BF")),
                            partial(read_slice, file, key), sums.get(key))]
    return pieces, meta


def open_pickle(path, what):
    """Return the pieces of one file that torch.save wrote. Of several state dicts the average's is
    taken, and a line says so."""
    with parsing(f"{what}: {path.name}", path):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if torch.is_tensor(state):
        state = {path.stem: state}                      # the authors' --save-latent
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
    read = lambda v, first, last: v[first:last] if v.dim() else v
    return {str(k): [(0, tuple(v.shape), v.is_floating_point(), partial(read, v), None)]
            for k, v in state.items()}, {}


def open_checkpoint(path):
    """Open a checkpoint with everything in it -> Weights."""
    pieces = {}
    for part in sorted(path.glob("state*.safetensors")):
        for key, parts in open_safetensors(part, f"checkpoint {path}")[0].items():
            pieces.setdefault(key, []).extend(parts)
    return Weights(f"checkpoint {path}", {}, pieces)


def open_weights(path, flag="--init"):
    """Open a run, one of its checkpoints, a released folder or a file -> Weights.

    A config in a file's metadata comes before the config.json beside it; a checkpoint has its
    run's, and its averages come before its weights. Raises UserError.
    """
    what, file = f"{flag} {printable(path)}", weights_of(path)
    if not file.exists():
        raise UserError(f"{what}: no such file or folder")
    folder, saved = (file if file.is_dir() else file.parent), (file / "meta.json").is_file()
    if saved:
        files = sorted(file.glob("state*.safetensors"))
        folder = file.parent.parent                                 # the run has the config
    elif file.is_dir():
        packed = [*folder.glob("*.zst"), *folder.glob("*.zstd")]
        files = [p for p in (folder / n for n in FILES) if p.is_file()][:1] or packed[:1]
    else:
        files = [file]
    if not files:
        raise UserError(f"{what}: no weights; expected one of {', '.join(FILES)}, or a run folder "
                        "with a checkpoint")
    if files[0].suffix in (".zst", ".zstd"):
        raise UserError(f"{what}: {files[0].name} is compressed; unpack it once: zstd -d {files[0]}")
    config, pieces = {}, {}
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json", what)
    if files[0].name.endswith(".index.json"):
        index = read_json(files[0], what).get("weight_map")
        if not isinstance(index, dict):
            raise UserError(f"{what}: {files[0].name} has no weight_map")
        files = [folder / str(name) for name in sorted(set(index.values()))]
        if absent := [f.name for f in files if not f.is_file()]:
            raise UserError(f"{what} names {len(files)} shards, {len(absent)} are not there "
                            f"(first: {absent[0]})")
    for part in files:
        found, meta = (open_safetensors if part.suffix == ".safetensors" else
                       open_pickle)(part, what)
        for key, parts in found.items():
            pieces.setdefault(WRAPPERS.sub("", key), []).extend(parts)
        if "config" in meta:
            with parsing(f"{what}: the config in {part.name}"):
                config = dict(json.loads(meta["config"]))
    opened = Weights(what, config, pieces)
    return opened.renamed(partial(exported_key, pieces)) if saved else opened


def read_json(path, what):
    """Read an object of a JSON file. Raises UserError."""
    with parsing(f"{what}: {path.name}", path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def exported_key(keys, key):
    """Return the name that a checkpoint's tensor has in final/, or None. The average comes first."""
    if key.startswith(("optimizer.", "disc.")) or f"ema.{key}" in keys:
        return None
    key = key.removeprefix("ema.")
    return stage2_key(key) if key.startswith(("llm.", "dit.", "repa.")) else key


# ------------------------------------------------------------------------------------------------
# Checking
# ------------------------------------------------------------------------------------------------

def check_keys(want, have, what):
    """Compare {key: shape} of a model and of a file. Raises UserError with the first of each kind."""
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    wrong = [f"{k} is {list(have[k])}, expected {list(want[k])}"
             for k in sorted(want.keys() & have.keys()) if list(have[k]) != list(want[k])]
    problems = [f"{len(keys)} {name} (first: {keys[0]})" for name, keys in
                (("missing", missing), ("unexpected", extra), ("of another shape", wrong)) if keys]
    if problems:
        raise UserError(f"{what} does not fit the model: {'; '.join(problems)}")


def rows_for(model, source, fallback=(), ignore=()):
    """Check that a file fits a model -> its rows, for `parallel.build`.

    fallback: {key: tensor} for keys that the file may lack; parameters that are not on the meta
    device (tables of positions) are always among them. ignore: parts of keys that are not read,
    because they are recomputed; their shapes must fit all the same.
    """
    own, skip = model.state_dict(), lambda k: any(i in k for i in ignore)
    fallback = {**{k: v for k, v in own.items() if not v.is_meta}, **dict(fallback)}
    have = {k: s for k, s in source.shapes.items() if k in own or not skip(k)}
    want = {k: tuple(v.shape) for k, v in own.items() if k in have or k not in fallback}
    check_keys(want, have, source.what)
    for key in have:
        if own[key].is_floating_point() and not source.pieces[key][0][2]:
            raise UserError(f"{source.what}: {key} is not floating point (quantised weights are "
                            "not read)")
    return lambda key, first, last: (source.rows(key, first, last) if key in have and not skip(key)
                                     else parallel.rows_of(fallback)(key, first, last))


def load(model, source, devices, fallback=(), ignore=()):
    """Fill a model that is on the meta device -> the frozen model, in eval mode, on its device."""
    parallel.build(model, rows_for(model, source, fallback, ignore), devices)
    return model.requires_grad_(False).eval()


def check_config(config, found, what):
    """Compare fields of a config with what the tensors' shapes say. Raises UserError with both."""
    wrong = [f"{k} is {config[k]!r} in the config, {v!r} in the weights"
             for k, v in found.items() if v and config.get(k) is not None and config[k] != v]
    if wrong:
        raise UserError(f"{what}: {'; '.join(wrong)}")


def read_fields(cls, values, what):
    """Make a dataclass of a JSON object. Raises UserError for fields that are unknown, missing or
    of another type."""
    known = {f.name: f for f in fields(cls)}
    if unknown := sorted(values.keys() - known.keys()):
        raise UserError(f"{what}: unknown field {', '.join(unknown)}; this code does not know what "
                        "it asks for")
    lacks = [k for k, f in known.items() if f.default is MISSING and k not in values]
    if lacks:
        raise UserError(f"{what}: its config lacks {', '.join(lacks)}")
    out = {}
    for key, value in values.items():
        kind = known[key].type if isinstance(known[key].type, type) else object
        value = float(value) if kind is float and type(value) is int else value
        value = tuple(value) if isinstance(value, list) else value
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise UserError(f"{what}: {key} is {value!r}, expected {kind.__name__}")
        out[key] = value
    with parsing(what):                     # __post_init__ refuses sizes that do not divide
        return cls(**out)


# ------------------------------------------------------------------------------------------------
# The frozen networks
# ------------------------------------------------------------------------------------------------

def load_encoder(path, devices):
    """Load a frozen encoder in the compute dtype: a file of ours, a published folder, or the name
    of an encoder that needs no weights."""
    if str(path) in ENCODERS:
        return ENCODERS[str(path)]({}, devices.dtype).to(devices.device)
    source = open_weights(path, "--encoder")
    config = source.config.get("vision_config", source.config)
    kind = config.get("model_type", "siglip_vision_model") if isinstance(config, dict) else None
    if kind not in ENCODERS:
        raise UserError(f"{source.what}: model_type is {kind!r}; known are "
                        f"{', '.join(sorted(ENCODERS))}")
    source = source.renamed(partial(our_key, dino=kind == "dinov2") if ENCODERS[kind] is
                            ENCODERS["dinov2"] else lambda key: key)
    check_config(config, dict(num_hidden_layers=source.depth("blocks"),
                              hidden_size=source.size("patch_embed.weight"),
                              intermediate_size=source.size("blocks.0.mlp.fc1.weight")),
                 source.what)
    with parsing(source.what), torch.device("meta"):
        model = ENCODERS[kind](source.config, devices.dtype)
    model = load(model, source, devices)
    processor = Path(path) / "preprocessor_config.json"
    if processor.is_file():                                     # of a published folder
        with parsing(source.what, processor):
            model.resample = int(read_json(processor, source.what).get("resample", model.resample))
    return model


def load_decoder(path, devices, encoder, flag="--decoder"):
    """Load a frozen decoder in the compute dtype for the latents of `encoder`, which gives the
    channels and the normalisation (a published config does not hold them)."""
    source = open_weights(path, flag)
    if any(k.startswith("decoder.decoder_") for k in source.shapes):
        source = source.renamed(diffusers_decoder_key)
    ends = ("decoder_embed.weight", "decoder_layers.0.intermediate.dense.weight",
            "decoder_pred.weight")
    if lacks := [k for k in ends if k not in source.shapes]:
        raise UserError(f"{source.what} is not a decoder: it lacks {', '.join(lacks)}")
    (W, C), (hidden, _), (pixels, _) = (source.shapes[k] for k in ends)     # [W,C], [h,W], [3pp,W]
    if C != encoder.channels:
        raise UserError(f"{source.what} takes latents of {C} channels, the encoder gives "
                        f"{encoder.channels}; give the decoder of this encoder")
    config = source.config
    if config.get("latent_stats") or config.get("layers", 1) != 1:
        raise UserError(f"{source.what}: trained on a latent of the first edition (latent_stats or "
                        "layers in its config), which this code does not make")
    found = dict(decoder_hidden_size=W, decoder_intermediate_size=hidden,
                 decoder_num_hidden_layers=source.depth("decoder_layers"))
    check_config(config, found, source.what)
    N = source.size("decoder_pos_embed", 1) - 1
    if N < 1:
        N = config.get("num_patches") or (config.get("image_size", 224)
                                          // config.get("patch_size", 14)) ** 2
    patch = math.isqrt(pixels // 3)
    given = {k: v for k, v in config.items() if k in DecoderConfig.__dataclass_fields__}
    values = {"decoder_num_attention_heads": 16, "image_mean": encoder.mean,
              "image_std": encoder.std, **given, **found, "hidden_size": C, "num_patches": N,
              "patch_size": patch, "image_size": patch * math.isqrt(N)}
    values = read_fields(DecoderConfig, values, source.what)
    with torch.device("meta"):
        model = Decoder(values, devices.dtype)
    return load(model, source, devices)


def diffusers_decoder_key(key):
    """Rename a key of diffusers' AutoencoderRAE, or drop it if it is the encoder's."""
    return key.removeprefix("decoder.") if key.startswith("decoder.decoder_") or key == \
        "decoder.trainable_cls_token" else None


def note_pair(decoder, encoder, flag="--decoder"):
    """Say so if a decoder was trained for another encoder than the one in use (names; a hub id may
    lie in a folder of its name)."""
    theirs = re.sub("^assets/tiny/", "tiny/", decoder.config.encoder or "")
    theirs, used = portable_path(theirs), portable_path(str(encoder))
    hub_id = theirs != TINY_ENCODER and not Path(theirs).is_absolute()
    if theirs and theirs != used and not (hub_id and Path(theirs).name == Path(used).name):
        print(f"note: {flag} was trained for the encoder {theirs}, this one is {used}",
              file=sys.stderr)


def vae_inside(path):
    """Return the place of the VAE in a run folder or a published one, else the path itself."""
    path = weights_of(path)
    return next((p for p in (path / "vae", path / "ae.safetensors") if p.exists()), path)


def load_vae(path, devices, flag="--vae"):
    """Load FLUX's VAE: ae.safetensors, diffusers' file, a folder with either or with vae/, or a
    run. A file without a config is FLUX.1's."""
    source = open_weights(vae_inside(path), flag)
    if any(k.startswith("decoder.up.") for k in source.shapes):
        source = from_ldm_pieces(source)
    known = VAEConfig.__dataclass_fields__
    values = {k: v for k, v in source.config.items() if k in known}
    blocks = source.depth("encoder.down_blocks.0.resnets")
    check_config(values, dict(layers_per_block=blocks), source.what)
    config = read_fields(VAEConfig, values, source.what)
    if len(config.block_out_channels) != source.depth("encoder.down_blocks"):
        raise UserError(f"{source.what}: block_out_channels {config.block_out_channels} in the "
                        f"config, {source.depth('encoder.down_blocks')} levels in the weights")
    with torch.device("meta"):
        model = VAE(config)
    return load(model, source, devices)


def from_ldm_pieces(source):
    """Give a file in ae.safetensors' layout diffusers' keys and shapes."""
    state = from_ldm({key: source.rows(key) for key in source.shapes})
    pieces = {key: [(0, tuple(v.shape), v.is_floating_point(), partial(torch_rows, v), None)]
              for key, v in state.items()}
    return Weights(source.what, source.config, pieces)


def torch_rows(tensor, first, last):
    return tensor[first:last] if tensor.dim() else tensor


def vgg_files(args, tiny, lpips=True):
    """Return what `locate` needs for the perceptual net. lpips False: Gram terms alone."""
    lpips = lpips and (args.lpips_weights or (None if tiny or args.vgg else "vgg.pth"))
    vgg = args.vgg or (TINY / "vgg.safetensors" if tiny else "vgg16-397923af.pth")
    return [("VGG16", vgg, "--vgg")] + [("LPIPS", lpips, "--lpips-weights")] * bool(lpips)


def dino_file(args, tiny):
    """Return what `locate` needs for the discriminator's trunk."""
    dino = args.dino or (TINY / "dino.safetensors" if tiny else "dino_vitsmall16_pretrain.pth")
    return [("DINO", dino, "--dino")]


def load_perceptual(vgg, lpips, devices, needed=True):
    """Load torchvision's VGG16 and the `lin*` of LPIPS v0.1 (lpips None: they are in `vgg`, or in
    their usual place). The first convolution tells the width. A net of full width must have
    `lin*`, unless they are not `needed`; a narrower one keeps 1/C."""
    source = open_weights(vgg, "--vgg")
    whole = source.size("features.0.weight") >= 64
    if needed and whole and not lpips and not any(k.startswith("lin") for k in source.shapes):
        lpips, = locate([("LPIPS", "vgg.pth", "--lpips-weights")])
    pieces = {k: v for k, v in source.pieces.items() if not k.startswith("classifier.")}
    what = source.what
    if lpips:
        more = open_weights(lpips, "--lpips-weights")
        pieces, what = {**pieces, **more.pieces}, f"{what}, {more.what}"
    source = Weights(what, source.config, pieces)
    if "features.0.weight" not in source.shapes:
        raise UserError(f"{what}: no key features.0.weight; expected torchvision's VGG16 layout")
    with torch.device("meta"):
        model = Perceptual(source.size("features.0.weight") / 64, devices.dtype)
    fallback = {} if needed and whole else {
        k: torch.full(v.shape, 1 / v.shape[1]) for k, v in model.state_dict().items()
        if k.startswith("lin")}
    return load(model, source, devices, fallback)


def load_discriminator(path, devices, seed=0):
    """Load a DINO trunk with new heads, or a whole discriminator. Without a config it is DINO
    ViT-S/16. The k biases become zero, as in the RAE code."""
    source = open_weights(path, "--dino")
    config = read_fields(DiscConfig, source.config, source.what)
    whole = any(k.startswith("dino.") for k in source.shapes)
    if not whole:
        source = source.renamed(lambda key: f"dino.{key}")
    check_config(asdict(config), dict(depth=source.depth("dino.blocks"),
                                      dim=source.size("dino.cls_token", 2)), source.what)
    twin = Discriminator(config)
    init_discriminator(twin, seed)
    fallback = {} if whole else {k: v for k, v in twin.state_dict().items()
                                 if k.startswith(("heads.", "dino.x_"))}
    with torch.device("meta"):
        model = Discriminator(config)
    parallel.build(model, rows_for(model, source, fallback), devices)
    return zero_k_bias(model)


def load_codec(config, args, devices, encoder=True, decoder=True):
    """Load the encoder and the decode function of a ModelConfig; None for one not asked for.

    --encoder and --decoder come first, then the config's, then the released pair. A run on a VAE's
    latent has two encoders: alone, it is the one that understands; with the decoder, the VAE.
    """
    if config.vae and decoder:
        if encoder and args.encoder:
            raise UserError(f"--encoder {args.encoder}: the latent of {args.run} is a VAE's, which "
                            "is its own encoder; --decoder replaces it")
        model = load_vae(*locate([("vae", args.decoder or config.vae, "--decoder")]), devices,
                         "--decoder")
        model.image_size = math.isqrt(config.dit.tokens) * model.stride
        return (model if encoder else None), model.decode
    name = args.encoder or config.encoder
    pairs = dict([*HUB.values(), TINY_PAIR])
    found = args.decoder or config.decoder or pairs.get(config.encoder)
    if decoder and not found:
        raise UserError(f"{args.run} has the encoder {config.encoder} and names no decoder; give "
                        "--decoder")
    wanted = [("encoder", name, "--encoder"), ("decoder", found, "--decoder")]
    paths = locate([w for w, needed in zip(wanted, (encoder, decoder)) if needed])
    e = load_encoder(paths[0], devices) if encoder else None
    if not decoder:
        return e, None
    d = load_decoder(paths[-1], devices, e or Normalisation(config.dit.channels, name))
    note_pair(d, name)
    return e, d


class Normalisation:
    """What `load_decoder` asks of an encoder, where the encoder itself is not loaded."""

    def __init__(self, channels, name):
        dino = "dino" in str(name).lower()
        self.channels = channels
        self.mean = (0.485, 0.456, 0.406) if dino else (0.5,) * 3
        self.std = (0.229, 0.224, 0.225) if dino else (0.5,) * 3


# ------------------------------------------------------------------------------------------------
# Stage 2: the language model and the DiT
# ------------------------------------------------------------------------------------------------

DIT = "diff_head.model."                                # the DiT's prefix in the released keys
RECOMPUTED = ("rope.freqs_", "rotary_emb.inv_freq")     # in files, but recomputed in fp32


@dataclass(frozen=True)
class ModelConfig:
    """A stage-2 model: everything that a file of weights does not say itself."""
    dit: DiTConfig
    llm: LLMConfig
    image_channels: int         # of the features that the LLM sees
    alpha: float                # time shift
    encoder: str                # name of the encoder
    decoder: str | None = None  # name of the decoder; None: the encoder's own
    vae: str | None = None      # name of the VAE whose latent the DiT draws
    context: int = 1024         # tokens
    released: bool = False      # the authors' model, which they sample without guidance


def stage2_key(name):
    """Return the released key of a parameter of ScaleRAE (train_dit.py), None for REPA's."""
    if name.startswith("repa."):
        return None
    return DIT + name[4:] if name.startswith("dit.") else name.removeprefix("llm.")


def our_stage2_key(key):
    """Return ScaleRAE's name of a released key."""
    return "dit." + key.removeprefix(DIT) if key.startswith(DIT) else "llm." + key


def save_config(config):
    """Return config.json's dict. Our block `scale_rae` holds the constructors' arguments as they
    are; the other fields are those that the authors' code needs."""
    k, c = config.dit, asdict(config)
    wide = k.head_depth > 0
    pair = lambda a, b: [a, b or a] if wide else a
    base = k.tokens * k.channels / config.alpha ** 2    # None is the paper's 4096
    authors = dict(
        asdict(config.llm), architectures=["ScaleRAEQwenForCausalLM"], model_type="cambrian_qwen",
        torch_dtype="float32", hidden_act="silu", max_position_embeddings=32768, rope_scaling=None,
        vision_loss="diffusion-loss", vision_loss_mode="query", dit_cls="DDT" if wide else "DiT",
        diffusion_model_hidden_size=pair(k.width, k.head_width),
        diffusion_model_depth=pair(k.depth, k.head_depth),
        diffusion_model_heads=pair(k.heads, k.head_heads), diffusion_model_channels=k.channels,
        diffusion_model_z_channels=k.cond_width or k.width,
        diffusion_class_dropout_prob=0.1 if k.null else 0.0,
        diffusion_base_dim=None if abs(base - 4096) < 1 else base, diffusion_norm_stats_path=None,
        diffusion_split_per_token=k.tokens, ddt_encoder_depth=2,
        vision_tower_aux_token_len_list=[k.tokens], mm_vision_tower_aux_token_len_list=[k.tokens],
        mm_vision_tower_aux_list=[config.encoder], mm_vision_select_layer=-1,
        mm_hidden_size=config.image_channels, mm_projector_type="mlp2x_gelu",
        mm_use_im_start_end=True, mm_use_im_patch_token=False, image_aspect_ratio="square",
        tokenizer_model_max_length=config.context, tokenizer_padding_side="right",
        generation_alignment_tower=config.vae, patch_size=2,
        vision_hidden_size=config.image_channels, connector_only=True, si_token_len=729,
        miv_token_len=0, image_position=35)
    return {**authors, "scale_rae": c}


def llm_config(config, what, vocab_size=None):
    """Read Qwen2's config.json -> LLMConfig. Raises UserError for one that asks for more than plain
    Qwen2."""
    for key in ("rope_scaling", "rope_parameters"):
        scaling = config.get(key) or {}
        if (kind := scaling.get("rope_type", scaling.get("type", "default"))) != "default":
            raise UserError(f"{what}: {key} asks for {kind}; only plain rotary angles are built")
    values = {k: v for k, v in config.items()
              if k in LLMConfig.__dataclass_fields__ and v is not None}
    if theta := (config.get("rope_parameters") or {}).get("rope_theta"):
        values["rope_theta"] = theta
    if vocab_size:
        values["vocab_size"] = vocab_size
    return read_fields(LLMConfig, values, what)


def model_config(source):
    """Read the config of an opened stage-2 model -> ModelConfig, checked against the shapes.
    Raises UserError."""
    config, what, size = source.config, source.what, source.size
    if "scale_rae" in config:
        block = dict(config["scale_rae"])
        for name, cls in (("dit", DiTConfig), ("llm", LLMConfig)):
            block[name] = read_fields(cls, dict(block.get(name) or {}), f"{what} ({name})")
        out = read_fields(ModelConfig, block, what)
    else:
        out = released_config(source)
    k, lm = out.dit, out.llm
    hd, hd1, hd2 = (size(f"{DIT}{r}_rope.freqs_cos", 1) for r in ("feat", "enc", "dec"))
    found = dict(hidden_size=(lm.hidden_size, size("model.embed_tokens.weight", 1)),
                 vocab_size=(lm.vocab_size, size("model.embed_tokens.weight")),
                 num_hidden_layers=(lm.num_hidden_layers, source.depth("model.layers")),
                 intermediate_size=(lm.intermediate_size,
                                    size("model.layers.0.mlp.gate_proj.weight")),
                 image_channels=(out.image_channels, size("model.mm_projector.0.weight", 1)),
                 tokens=(k.tokens, size("model.latent_queries")),
                 channels=(k.channels, size(DIT + "x_embedder.proj.weight", 1)),
                 cond_width=(k.cond_width or k.width, size("diff_head_projector.weight")),
                 width=(k.width, size(DIT + "x_embedder.proj.weight")),
                 head_width=(k.head_depth and (k.head_width or k.width),
                             size(DIT + "s_embedder.proj.weight")),
                 depth=(k.depth + k.head_depth, source.depth(DIT + "dit_blocks")),
                 heads=(k.heads, k.width // (hd or hd1) if hd or hd1 else 0),
                 head_heads=(k.head_heads or k.heads,
                             (k.head_width or k.width) // hd2 if hd2 else 0))
    check_config({key: a for key, (a, _) in found.items()}, {key: b for key, (_, b) in
                                                             found.items()}, what)
    return out


def released_config(source):
    """Translate the authors' config.json -> ModelConfig."""
    c, what = source.config, source.what
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "intermediate_size", "diffusion_model_hidden_size", "diffusion_model_depth",
              "diffusion_model_heads")
    if lacks := [k for k in needed if c.get(k) is None]:
        raise UserError(f"{what}: its config lacks {', '.join(lacks)}; expected a Scale-RAE model "
                        "folder with its config.json")
    if c.get("vision_loss_mode", "query") != "query" or (c.get("encoder_layers") or 1) != 1:
        raise UserError(f"{what}: vision_loss_mode {c.get('vision_loss_mode')!r}, encoder_layers "
                        f"{c.get('encoder_layers')!r}; known are 'query' and 1")
    with parsing(f"{what}: diffusion_model_hidden_size, _depth and _heads"):
        D, depth, heads = (c[f"diffusion_model_{k}"] for k in ("hidden_size", "depth", "heads"))
        head = {}
        if isinstance(D, list):
            (D, D2), (depth, depth2), (heads, heads2) = D, depth, heads
            head = dict(head_width=D2, head_depth=depth2, head_heads=heads2)
        elif c.get("vision_loss") == "ddt-loss":        # one width, split: the classic DDT
            depth, depth2 = c["ddt_encoder_depth"], depth - c["ddt_encoder_depth"]
            head = dict(head_width=D, head_depth=depth2, head_heads=heads)
        tokens = (c.get("vision_tower_aux_token_len_list") or [0])[0]
        encoder = (c.get("mm_vision_tower_aux_list") or ["encoder"])[0]
    plain = lambda name: re.sub("^assets/tiny/", "tiny/", re.sub(r"-(interp|res)\d+$", "", name))
    N = source.size("model.latent_queries") or tokens
    C = source.size(DIT + "x_embedder.proj.weight", 1) or c.get("diffusion_model_channels", 0)
    Z = source.size("diff_head_projector.weight") or c.get("diffusion_model_z_channels", 0)
    given = dict(channels=c.get("diffusion_model_channels"), tokens=tokens or None,
                 z_channels=c.get("diffusion_model_z_channels"), mm_hidden_size=c.get(
                     "mm_hidden_size"))
    check_config(given, dict(channels=C, tokens=N, z_channels=Z, mm_hidden_size=source.size(
        "model.mm_projector.0.weight", 1)), what)
    values = dict(channels=C, tokens=N, width=D, depth=depth, heads=heads, cond_width=Z, **head,
                  null=DIT + "y_embedder.dropout_embedding" in source.shapes,
                  qk_norm=bool(c.get("diffusion_qk_norm")))
    base = c.get("diffusion_base_dim") or 4096
    return ModelConfig(
        dit=read_fields(DiTConfig, values, what),
        llm=llm_config(c, what, source.size("model.embed_tokens.weight")),
        image_channels=source.size("model.mm_projector.0.weight", 1) or c.get("mm_hidden_size"),
        alpha=c.get("shift_alpha") or math.sqrt(N * C / base), encoder=plain(encoder),
        decoder=c.get("decoder"), vae=plain(c.get("generation_alignment_tower") or "") or None,
        context=c.get("tokenizer_model_max_length") or 1024, released="shift_alpha" not in c)


def build_stage2(config, dtype):
    """Build the LLM and the DiT of a ModelConfig (under torch.device("meta"): their shapes)."""
    llm = TextModel(config.llm, config.dit.tokens, config.image_channels,
                    config.dit.cond_width or config.dit.width, dtype)
    return llm, DiT(config.dit, dtype)


def llm_source(path, tokenizer):
    """Open a pretrained Qwen2.5 folder -> Weights with one embedding row per token.

    Rows of the LLM's own tokens are kept; rows beyond them (Qwen pads its matrices) are dropped;
    tokens that `tokenizer` adds begin as the mean of all others, each matrix its own.
    """
    source = open_weights(path, "--llm")
    V, own = tokenizer.get_vocab_size(), chat.read_tokenizer(path).get_vocab_size()
    pieces = dict(source.pieces)
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key not in pieces:
            continue
        rows, width = source.shapes[key]
        if rows < own:
            raise UserError(f"{source.what}: {key} has {rows} rows, the tokenizer {own} tokens")
        known = partial(source.rows, key)
        mean = RowMean(known, own, width)
        pieces[key] = [(0, (own, width), True, known, None)]
        if V > own:
            pieces[key].append((own, (V - own, width), True, mean.rows, None))
    if source.config.get("tie_word_embeddings"):
        pieces.pop("lm_head.weight", None)
    return Weights(source.what, source.config, pieces)


class RowMean:
    """The mean of a matrix's first `count` rows, read once, in parts."""

    def __init__(self, read, count, width):
        self.read, self.count, self.width = read, count, width

    @cached_property
    def mean(self):
        total = torch.zeros(self.width, dtype=torch.float64)
        for first in range(0, self.count, 8192):
            total += self.read(first, min(first + 8192, self.count)).double().sum(0)
        return (total / self.count).float()

    def rows(self, first, last):
        return self.mean.expand(last - first, -1)


@dataclass
class Stage2:
    llm: TextModel
    dit: DiT
    tokenizer: object
    config: ModelConfig


def load_run(path, devices, flag="--run"):
    """Load a run, a checkpoint or a released folder -> Stage2, in eval mode.

    Matrices are kept in the compute dtype, to which each product would cast them anyway: in bf16
    half the memory, the same numbers. Raises UserError.
    """
    source = open_weights(path, flag)
    config = model_config(source)
    with torch.device("meta"):
        llm, dit = build_stage2(config, devices.dtype)
    for model in (llm, dit):
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and "t_embedder" not in name:
                module.to(devices.dtype)                # the time's MLP computes in fp32
    tied = ("lm_head.weight",) if config.llm.tie_word_embeddings else ()
    head, rest = (source.renamed(lambda k: k.removeprefix(DIT) if k.startswith(DIT) else None),
                  source.renamed(lambda k: None if k.startswith(DIT) else k))
    load(llm, rest, devices, ignore=RECOMPUTED + tied)
    load(dit, head, devices, ignore=RECOMPUTED)
    folder = tokenizer_folder(path)
    tokenizer = chat.load_tokenizer(folder)
    if tokenizer.get_vocab_size() > config.llm.vocab_size:
        raise UserError(f"{source.what}: the tokenizer has {tokenizer.get_vocab_size()} tokens, "
                        f"the embedding {config.llm.vocab_size} rows")
    return Stage2(llm, dit, tokenizer, config)


def tokenizer_folder(path):
    """Return the folder of a model's tokenizer: its own, or its run's."""
    place = weights_of(path)
    folder = place if place.is_dir() else place.parent
    return folder.parent.parent if (folder / "meta.json").is_file() else folder
