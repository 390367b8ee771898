"""Weight files: found, read, checked and built into networks; our own go out in the same layout.

Files are safetensors, or a .pt/.pth/.bin that holds tensors alone (weights_only: one with code in
it is refused). Every key and shape must fit; what does not is one UserError that names the first of
each kind. Layout of the released folders: README.md, "Use the released weights".
"""
import contextlib
import hashlib
import json
import math
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open

import decoder as decoders
import discriminator
import dit as dits
import encoder as encoders
import parallel
import perceptual
import text_model as text
import vae as vaes
from parallel import UserError

ASSETS = Path(__file__).parent / "assets" / "tiny"
TINY_TOWER = "assets/tiny/encoder.safetensors"          # in configs; found beside this file
TINY_CODEC = (ASSETS / "encoder.safetensors", ASSETS / "decoder.safetensors")
TINY_VAE = "assets/tiny/vae.safetensors"
FLUX_VAE = "black-forest-labs/FLUX.1-dev"               # its vae/ folder
HUB = {"siglip2": ("google/siglip2-so400m-patch14-224", "nyu-visionx/siglip2_decoder"),
       "webssl": ("facebook/webssl-dino300m-full2b-224", "nyu-visionx/webssl300m_decoder")}
HUB["vae"] = HUB["siglip2"]                             # which understands there
FILES = ("model.safetensors", "model.safetensors.index.json", "diffusion_pytorch_model.safetensors",
         "pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "model.pth")

# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

# what torch_xla's and torch's FSDP, torch.compile and DDP leave anywhere in a key
WRAPPERS = re.compile(r"(?<![^.])((_orig_|_fsdp_wrapped_|_fpw_)?module|_orig_mod)[.]")


@contextlib.contextmanager
def user_errors(what):
    """What a damaged file or a component makes of it becomes one UserError that begins `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:      # torch, safetensors, json and tokenizers raise many kinds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
            lines = [f"refused, it holds code to run ({code[1]}), not only tensors; convert it to "
                     "safetensors where you trust it"]
        elif "Weights only load failed" in str(error):
            lines = ["damaged, or not a file of tensors that torch.save wrote"]
        more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise UserError(f"{what}: {'; '.join(lines[:3])}{more} ({type(error).__name__})") from error


def _config_inside(file):
    """The config in the metadata of an open safetensors file, or {}."""
    return json.loads((file.metadata() or {}).get("config", "{}"))


def _read_file(path):
    """One file -> (state dict, the config in its metadata or {})."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, _config_inside(f)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if torch.is_tensor(state):
        state = {path.stem: state}                      # the authors' --save-latent
    state = state.get("model", state) if isinstance(state, dict) else {}
    if not state or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise ValueError("expected a state dict of tensors, bare or under the key 'model'")
    return state, {}


def read_weights(path, flag="--init"):
    """A weight file or folder -> (state dict, config dict).

    A folder holds config.json and one of FILES, whole or in shards with their index; a file has its
    config in its metadata or beside it. Wrappers' prefixes are stripped from the keys. Raises
    UserError naming `flag`: nothing there, compressed, damaged, code inside, a shard missing.
    """
    file = folder = Path(path)
    if not file.exists():
        raise UserError(f"{flag} {path}: no such file or folder")
    if folder.is_dir():
        packed = [*folder.glob("*.zst"), *folder.glob("*.zstd")]
        file = next((folder / n for n in FILES if (folder / n).is_file()), *packed[:1] or [None])
        if file is None:
            raise UserError(f"{flag} {path}: no weights; expected one of {', '.join(FILES)} (in a "
                            "run folder: final/, written when the run ends, or of train_dit.py by "
                            "the same command with --export)")
    else:
        folder = file.parent
    if file.suffix in (".zst", ".zstd"):
        raise UserError(f"{flag} {file} is compressed; unpack it once: "
                        f"zstd -d {file} -o {file.with_suffix('')}")
    state, config, files = {}, {}, [file]
    with user_errors(f"{flag} {folder / 'config.json'}"):
        if (folder / "config.json").is_file():
            config = dict(json.loads((folder / "config.json").read_text()))
    with user_errors(f"{flag} {file}: unreadable index"):
        if file.name.endswith(".index.json"):
            index = json.loads(file.read_text())["weight_map"]
            files = [folder / shard for shard in sorted(set(index.values()))]
    absent = [f.name for f in files if not f.is_file()]
    if absent:
        raise UserError(f"{flag} {file} names {len(files)} shards, {len(absent)} are not there "
                        f"(first: {absent[0]})")
    for part in files:
        with user_errors(f"{flag} {part}: unreadable weights"):
            tensors, inside = _read_file(part)
            state.update((WRAPPERS.sub("", k), v) for k, v in tensors.items())
            config = inside or config
    return state, config


def check_keys(want, have, what):
    """Compare {key: shape} of a model and of a file. Raises UserError naming the first of each."""
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    wrong = [f"{k} is {list(have[k])}, expected {list(want[k])}"
             for k in sorted(want.keys() & have.keys()) if list(have[k]) != list(want[k])]
    problems = [f"{len(keys)} {name} (first: {keys[0]})" for name, keys in
                (("missing", missing), ("unexpected", extra), ("of another shape", wrong)) if keys]
    if problems:
        raise UserError(f"{what} does not fit the model: {'; '.join(problems)}")


def load_strict(module, state, what, ignore=(), optional=()):
    """Load every key, whatever its stored dtype, or raise UserError.

    ignore: substrings of keys that are not loaded because they are recomputed; their shapes must
    fit all the same. optional: substrings of keys that the file may lack. A module built on the
    meta device takes the file's tensors for its own, without a copy.
    """
    own, skip = module.state_dict(), lambda k: any(i in k for i in ignore)
    have = {k: v.shape for k, v in state.items() if k in own or not skip(k)}
    want = {k: v.shape for k, v in own.items()
            if k in have or not (skip(k) or any(o in k for o in optional))}
    check_keys(want, have, what)
    if other := [k for k in have if k in own and own[k].is_floating_point()
                 and not state[k].is_floating_point()]:
        raise UserError(f"{what}: {other[0]} holds {state[other[0]].dtype}, expected floating "
                        "point (quantised weights are not read)")
    state = {k: state[k].to(own[k].dtype) for k in have if not skip(k)}
    state.update((k, torch.zeros(v.shape, dtype=v.dtype)) for k, v in own.items()
                 if v.is_meta and k not in state)       # optional ones that the file lacks
    module.load_state_dict(state, strict=False, assign=any(v.is_meta for v in own.values()))
    return module


def check_config(config, found, what):
    """Fields of a config against what the tensors' shapes say. Raises UserError with both."""
    wrong = [f"{k} is {config[k]!r} in the config, {v!r} in the weights"
             for k, v in found.items() if config.get(k) is not None and config[k] != v]
    if wrong:
        raise UserError(f"{what}: {'; '.join(wrong)}")


def depth_of(state, blocks):
    """The number of blocks `blocks`.0, .1, ... among the keys."""
    numbers = (k[len(blocks) + 1:].split(".")[0] for k in state if k.startswith(blocks + "."))
    return 1 + max(map(int, numbers), default=-1)

# ------------------------------------------------------------------------------------------------
# Finding
# ------------------------------------------------------------------------------------------------

def locate(wanted):
    """[(what, path or hub id, flag), ...] -> paths that exist.

    A name is looked for here and beside this file, itself and in weights/; then, as a hub id (which
    weights/NAME and runs/NAME are not), downloaded into the local hub cache. Raises one UserError
    that lists every missing one, where it was looked for, and its flag.
    """
    paths, missing = [], []
    for what, name, flag in wanted:
        local = Path("weights") / Path(str(name)).name
        places = (place / p for p in (name, local) for place in (Path(), Path(__file__).parent))
        if found := next((p for p in places if p.exists()), None):
            paths.append(found)
            continue
        looked = f"{name}, {local}"
        if re.fullmatch(r"(?!(weights|runs)/)[\w.-]+/[\w.-]+", str(name)):
            from huggingface_hub import snapshot_download
            part = ["vae/*"] if what == "vae" else None         # FLUX's other files are 50 GB
            try:                                        # without a network: what is in the cache
                paths.append(Path(snapshot_download(name, allow_patterns=part)))
                continue
            except Exception as error:                  # no network, no such repository, ...
                looked += f", the hub cache, the hub ({type(error).__name__})"
        missing.append(f"  {what}: {flag} {name}\n      looked in {looked}; give {flag} PATH")
    if missing:
        raise UserError("weights are missing:\n" + "\n".join(missing))
    return paths


def final_of(path, ema=True):
    """A run folder stands for its final/ weights (EMA where there are some) -> Path."""
    final = Path(path) / "final"
    if not final.is_dir():
        return Path(path)
    return final / "ema.safetensors" if ema and (final / "ema.safetensors").is_file() else final


def config_of(path, flag="--run"):
    """The config of a model folder or file without its weights. Raises UserError."""
    place = final_of(path, ema=False)
    with user_errors(f"{flag} {path}"):
        if place.suffix == ".safetensors":
            with safe_open(place, "pt") as f:
                if inside := _config_inside(f):
                    return inside
            place = place.parent
        return json.loads((place / "config.json").read_text())


def read_latent(path, tokens, channels):
    """A file of --save-latent, ours or the authors' -> [n,N,C]. Raises UserError."""
    state, _ = read_weights(path, "--latent")
    z = next(iter(state.values()), torch.empty(0)).float()
    z = z[None] if z.dim() == 2 else z
    if list(z.shape[1:]) != [tokens, channels]:
        raise UserError(f"--latent {path}: latents of {list(z.shape[1:])}, the model's are "
                        f"[{tokens}, {channels}]")
    return z

# ------------------------------------------------------------------------------------------------
# The frozen networks. Built on the meta device: nothing is initialised that a file replaces
# ------------------------------------------------------------------------------------------------

def load_encoder(path, devices, layers=1):
    """A frozen encoder in the compute dtype, from a file of ours or a published folder."""
    what = f"--encoder {path}"
    state, config = read_weights(final_of(path), "--encoder")
    if any(k.startswith("vision_model.") for k in state):       # the full SigLIP file has text too
        state = {k: v for k, v in state.items() if k.startswith("vision_model.")}
    elif "embeddings.patch_embedding.weight" in state:          # the tower alone, by transformers 5
        state = {f"vision_model.{k}": v for k, v in state.items()}
    with user_errors(what), torch.device("meta"):
        model = encoders.build_encoder(config, layers, devices.dtype)
    headless = () if any(".head." in k for k in state) else ("vision_model.head.",)
    load_strict(model, state, what, optional=("mask_token", *headless))     # neither is in z's way
    processor = Path(path) / "preprocessor_config.json"
    if processor.is_file():                                     # of a published folder
        with user_errors(f"{what}: {processor.name}"):
            found = json.loads(processor.read_text())
            model.resample = int(found.get("resample", model.resample))
    return model.requires_grad_(False).eval().to(devices.device)


def lasting(name):
    """A name for configs, which are read from any folder: of a file or folder its whole path, of
    the tiny networks and of hub ids (and of None) itself."""
    if not name or not Path(name).exists():
        return name
    whole, assets = Path(name).resolve(), ASSETS.resolve()
    return str(whole.relative_to(assets.parent.parent) if whole.is_relative_to(assets) else whole)


def note_pair(decoder, encoder, flag="--decoder"):
    """Say where a decoder was trained for another encoder than the one in use, each as it was named
    (a hub id may lie in a folder of its name)."""
    theirs, used = lasting(decoder.config.get("encoder")), lasting(str(encoder))
    if not theirs or theirs == used:
        return
    hub_id = theirs != TINY_TOWER and not Path(theirs).is_absolute()
    if not (hub_id and Path(theirs).name == Path(used).name):
        print(f"note: {flag} was trained for the encoder {theirs}, this one is {used}",
              file=sys.stderr)


def load_decoder(path, devices, channels, mean, std, layers=None, as_it_is=False,
                 flag="--decoder"):
    """A decoder in the compute dtype for latents of `channels` channels, which sum `layers` blocks
    of the encoder (None: do not check). mean, std: of the encoder's normalisation, because a
    published decoder's config does not hold them; nor need its hidden_size and patch_size be right:
    the weights' win. as_it_is: takes the encoder's latent, also where it was trained on a latent
    normalised by its statistics. Raises UserError."""
    what = f"{flag} {path}"
    state, config = read_weights(final_of(path), flag)
    ends = ("decoder_embed.weight", "decoder_layers.0.intermediate.dense.weight",
            "decoder_pred.weight")
    if lacks := [k for k in ends if k not in state]:
        raise UserError(f"{what} is not a decoder: it lacks {', '.join(lacks)}")
    embed, hidden, pixels = (state[k].shape for k in ends)              # [W,C], [h,W], [p*p*3,W]
    if embed[1] != channels:
        raise UserError(f"{what} takes latents of {embed[1]} channels, the encoder gives "
                        f"{channels}; give the decoder of this encoder")
    if layers not in (None, config.get("layers", 1)):
        raise UserError(f"{what} was trained on latents of --layers {config.get('layers', 1)}, "
                        f"these are of --layers {layers}; train one: train_decoder.py --layers "
                        f"{layers}")
    found = dict(decoder_hidden_size=embed[0], decoder_intermediate_size=hidden[0],
                 decoder_num_hidden_layers=depth_of(state, "decoder_layers"))
    check_config(config, found, what)
    tokens = config.get("num_patches") or (config.get("image_size", 224)
                                           // config.get("patch_size", 14)) ** 2
    if "decoder_pos_embed" in state:
        tokens = state["decoder_pos_embed"].shape[1] - 1
    config = {"decoder_num_attention_heads": 16, "image_mean": list(mean), "image_std": list(std),
              **config, **found, "hidden_size": channels, "num_patches": tokens,
              "patch_size": math.isqrt(pixels[0] // 3)}
    with user_errors(what), torch.device("meta"):
        model = decoders.Decoder(config, devices.dtype)
    load_strict(model, state, what, optional=("decoder_pos_embed",))
    if as_it_is:
        model.config["latent_stats"] = False
    return model.requires_grad_(False).eval().to(devices.device)


def check_encoder(encoder, args):
    """Raises UserError when --encoder is of another kind than --latent says."""
    if isinstance(encoder, encoders.DINOv2) != (args.latent == "webssl"):
        raise UserError(f"--encoder {args.encoder} is a {type(encoder).__name__}, --latent is "
                        f"{args.latent}; expected webssl with a DINOv2, else a SigLIP-2")


def checksum(model):
    """A short name of a network's weights, for caches of what it computes."""
    digest = hashlib.blake2b(digest_size=8)
    parts = (parallel.apart(k, v.detach().cpu()) for k, v in model.state_dict().items())
    for key, value in sorted((k, v) for part in parts for k, v in part.items()):
        digest.update(key.encode() + value.contiguous().view(-1).view(
            torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def vae_inside(path):
    """Where a run folder or a published one has its VAE, if it has one, else its final weights."""
    path = final_of(path)
    return next((p for p in (path / "vae", path / "ae.safetensors") if p.exists()), path)


def load_vae(path, devices, flag="--vae"):
    """FLUX's VAE: ae.safetensors, diffusers' file, a folder that holds either or vae/, or a run.
    A file without a config is FLUX.1's."""
    state, config = read_weights(path := vae_inside(path), flag)
    if any(k.startswith("decoder.up.") for k in state):
        state = vaes.from_ldm(state)
    with user_errors(f"{flag} {path}"):
        model = load_strict(vaes.VAE(config), state, f"{flag} {path}")
    return model.requires_grad_(False).eval().to(devices.device)


def random_towers(args, dtype, device="meta"):
    """For --dry-run and --random-init: the encoder of --latent at its published size, and the VAE
    or None; random, the same at every start, or shapes alone."""
    torch.manual_seed(args.seed)
    with user_errors("the encoder"), torch.device(device):
        encoder = encoders.build_encoder(encoders.WEBSSL_300M if args.latent == "webssl" else
                                         encoders.SO400M, args.layers, dtype)
        return encoder, vaes.VAE() if args.latent == "vae" else None


def load_towers(args, tiny, llm, devices):
    """What train_dit.py freezes -> (encoder, VAE or None, decoder or None, tokenizer, their paths).

    By the flags, else from assets/tiny for the tiny preset, else the published ones; llm: where the
    language model is, or its tokenizer. Raises UserError (see locate).
    """
    vae = args.latent == "vae"                          # decodes too
    if tiny and args.latent == "webssl" and not (args.encoder and args.decoder):
        raise UserError("--latent webssl: there is no tiny one; give --encoder and --decoder, or a "
                        "larger --size")
    encoder, decoder = TINY_CODEC if tiny else HUB[args.latent]
    codec = ("decoder", args.decoder or decoder, "--decoder")
    if vae:
        codec = ("vae", args.vae or (ASSETS / "vae.safetensors" if tiny else FLUX_VAE), "--vae")
    wanted = [("encoder", args.encoder or encoder, "--encoder"),
              ("llm", ASSETS if llm in ("tiny", "random") else llm, "--llm"), codec]
    files = dict(zip((w[0] for w in wanted), locate(wanted)))
    encoder = load_encoder(files["encoder"], devices, args.layers)
    check_encoder(encoder, args)
    with user_errors(f"--llm {files['llm']}"):
        tokenizer = text.load_tokenizer(files["llm"])
    if vae:
        codec = load_vae(files["vae"], devices), None
    else:
        codec = None, load_decoder(files["decoder"], devices, encoder.channels, encoder.mean,
                                   encoder.std, args.layers, as_it_is=True)
        if devices.main:
            note_pair(codec[1], wanted[0][1])
    files = {k: "random weights" if (k, llm) == ("llm", "random") else str(v)
             for k, v in files.items()}
    return encoder, *codec, tokenizer, files


def load_perceptual(vgg, lpips, devices, needed=True):
    """torchvision's VGG16 and the `lin*` of LPIPS v0.1; lpips None: they are in `vgg`, or in their
    usual place.

    The width is that of the first convolution. A net of full width has to have `lin*`, unless they
    are not `needed`; a narrower one, or one without, keeps 1/C.
    """
    state = {k: v for k, v in read_weights(final_of(vgg), "--vgg")[0].items()
             if not k.startswith("classifier.")}
    whole = len(state.get("features.0.weight", ())) >= perceptual.WIDTHS[0]
    if needed and whole and not lpips and not any(k.startswith("lin") for k in state):
        lpips, = locate([("LPIPS", "vgg.pth", "--lpips-weights")])
    what = f"--vgg {vgg}" + (f", --lpips-weights {lpips}" if lpips else "")
    if lpips:
        state.update(read_weights(lpips, "--lpips-weights")[0])
    if "features.0.weight" not in state:
        raise UserError(f"{what}: no key features.0.weight, expected torchvision's VGG16 layout")
    width = len(state["features.0.weight"]) / perceptual.WIDTHS[0]
    model = perceptual.Perceptual(width, devices.dtype)
    load_strict(model, state, what, optional=() if needed and whole else ("lin",))
    return model.to(devices.device)


def load_discriminator(path, devices, config=None, seed=0):
    """A DINO trunk's file with new heads, or a whole discriminator's. config: None takes the file's
    own, else DINO ViT-S/16. The k biases become zero, as in the RAE code."""
    state, found = read_weights(final_of(path), "--dino")
    whole = any(k.startswith("dino.") for k in state)
    with user_errors(f"--dino {path}"):
        model = discriminator.Discriminator(config or found)
        discriminator.init_weights(model, seed)
    load_strict(model, state if whole else {f"dino.{k}": v for k, v in state.items()},
                f"--dino {path}", optional=() if whole else ("heads.", "dino.x_"))
    return discriminator.zero_k_bias(model).to(devices.device)


def plain_name(tower):
    """A tower's name without what the authors add: the size it runs at."""
    return re.sub(r"-(interp|res)\d+$", "", tower)


def tower_of(config):
    """The encoder that a stage-2 config names, or None."""
    towers = config.get("mm_vision_tower_aux_list")
    return towers and plain_name(towers[0])


def load_codec(config, args, devices, encoder=True, decoder=True):
    """The encoder and decoder that belong to a stage-2 config (None for one not asked for).

    --encoder and --decoder win; else the config's tower, with the decoder that the run was trained
    with, the tiny or the released one. A run with a VAE's latent has two towers: alone, the encoder
    is the one that understands; with the decoder it is the VAE: the two are always one codec.
    """
    N, C = config["vision_tower_aux_token_len_list"][0], config["diffusion_model_channels"]
    tower = tower_of(config) or "encoder"
    vae = plain_name(config.get("generation_alignment_tower") or "")
    names = TINY_CODEC if tower == TINY_TOWER else (
        tower, next((d for e, d in HUB.values() if e == tower), None))
    if vae and decoder:
        if encoder and args.encoder:
            raise UserError(f"--encoder {args.encoder}: the latent of {args.run} is a VAE's, which "
                            "is its own encoder; --decoder replaces it")
        name = args.decoder or (ASSETS / "vae.safetensors" if vae == TINY_VAE else vae)
        model = load_vae(*locate([("vae", name, "--decoder")]), devices, "--decoder")
        model.image_size = math.isqrt(N) * model.stride
        return (model if encoder else None), model.decode
    wanted = [("encoder", args.encoder or names[0], "--encoder"),
              ("decoder", args.decoder or config.get("decoder") or names[1], "--decoder")]
    if decoder and not wanted[1][1]:
        raise UserError(f"{args.run} has the encoder {tower} and names no decoder; give --decoder")
    paths = locate([w for w, needed in zip(wanted, (encoder, decoder)) if needed])
    layers = config.get("encoder_layers") or 1
    e = load_encoder(paths[0], devices, layers) if encoder else None
    if not decoder:
        return e, None
    dino = "dino" in f"{tower} {args.encoder}".lower()
    kind = e or (encoders.DINOv2 if dino else encoders.SigLIP2)
    d = load_decoder(paths[-1], devices, C, kind.mean, kind.std, layers, as_it_is=True)
    note_pair(d, wanted[0][1])
    return e, d

# ------------------------------------------------------------------------------------------------
# Stage 2: the language model and the DiT
# ------------------------------------------------------------------------------------------------

DIT = "diff_head.model."                                # the DiT's prefix in the released keys
RECOMPUTED = ("rope.freqs_", "rotary_emb.inv_freq")     # in files, but recomputed in fp32
REQUIRED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "intermediate_size", "diffusion_model_hidden_size", "diffusion_model_depth",
            "diffusion_model_heads")


def load_llm(path, tokenizer, tokens, channels, cond_width, dtype):
    """A pretrained Qwen2.5 folder -> TextModel; what Scale-RAE adds to it is not yet initialised.

    Rows beyond the tokenizer's (Qwen pads its matrices) are dropped; those of <im_start> and
    <im_end> begin as the mean of all others, each matrix its own. Raises UserError.
    """
    what = f"--llm {path}"
    state, config = read_weights(path, "--llm")
    V = tokenizer.get_vocab_size()
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        if key in state and len(state[key]) != V:
            if len(state[key]) < V - 2:
                raise UserError(f"{what}: {key} has {len(state[key])} rows, the tokenizer {V} "
                                "tokens")
            known = state[key][:V - 2].float()
            state[key] = torch.cat([known, known.mean(0, keepdim=True).expand(2, -1)])
    if config.get("tie_word_embeddings"):
        state.pop("lm_head.weight", None)
    with user_errors(what), torch.device("cpu"):
        model = text.TextModel({**config, "vocab_size": V}, tokens, channels, cond_width, dtype)
    added = ("latent_queries", "mm_projector", "diff_head_projector")
    return load_strict(model, state, what, RECOMPUTED, optional=added)


def model_config(llm, dit, encoder_name, alpha, vae_name=None, layers=1, decoder_name=None,
                 cond_drop=0.1):
    """config.json of a stage-2 model in the authors' field names, with Qwen2's.

    Complete for their code, which reads some fields that do nothing here. encoder_name: the hub id
    (or path) of the encoder; vae_name: of the VAE, where the latent is a VAE's; decoder_name: of
    the decoder, where it is not the one that belongs to the encoder.
    """
    wide, N = dit.head_depth > 0, dit.tokens
    pair = (lambda a, b: [a, b] if wide else a)
    base = N * dit.channels / alpha ** 2                # theirs is None where it is the paper's
    C = llm.model.mm_projector[0].in_features           # of the encoder that understands
    return dict(
        {"hidden_act": "silu", "max_position_embeddings": 32768, **llm.config},
        architectures=["ScaleRAEQwenForCausalLM"], model_type="cambrian_qwen",
        torch_dtype="float32", rope_theta=llm.rope_theta, rope_scaling=None,
        vision_loss="diffusion-loss", vision_loss_mode="query", dit_cls="DDT" if wide else "DiT",
        diffusion_model_hidden_size=pair(dit.width, dit.head_width),
        diffusion_model_depth=pair(dit.depth, dit.head_depth),
        diffusion_model_heads=pair(dit.heads, dit.head_heads),
        diffusion_model_channels=dit.channels, diffusion_model_z_channels=dit.cond_width,
        diffusion_class_dropout_prob=cond_drop if hasattr(dit, "y_embedder") else 0.0,
        diffusion_base_dim=None if abs(base - 4096) < 1 else base, shift_alpha=alpha,
        diffusion_qk_norm=hasattr(dit.dit_blocks[0].attn.q_norm, "weight"),     # ours, as the alpha
        diffusion_norm_stats_path=None, diffusion_split_per_token=N, ddt_encoder_depth=2,
        vision_tower_aux_token_len_list=[N], mm_vision_tower_aux_token_len_list=[N],
        mm_vision_tower_aux_list=[str(encoder_name)], mm_vision_select_layer=-1, mm_hidden_size=C,
        mm_projector_type="mlp2x_gelu", mm_use_im_start_end=True, mm_use_im_patch_token=False,
        image_aspect_ratio="square", tokenizer_model_max_length=1024,
        tokenizer_padding_side="right", generation_alignment_tower=vae_name and str(vae_name),
        encoder_layers=layers, decoder=decoder_name, patch_size=2,              # ours, as the alpha
        vision_hidden_size=C, connector_only=True, si_token_len=729, miv_token_len=0,
        image_position=35)


def dit_sizes(config):
    """Width, depth and heads of the trunk, then of the wide head (0: there is none)."""
    D, depth, heads = (config[f"diffusion_model_{k}"] for k in ("hidden_size", "depth", "heads"))
    if isinstance(D, list):
        return D[0], depth[0], heads[0], D[1], depth[1], heads[1]
    if config.get("vision_loss") == "ddt-loss":         # one width, split: the classic DDT
        k = config["ddt_encoder_depth"]
        return D, k, heads, D, depth - k, heads
    return D, depth, heads, 0, 0, 0


def stage2_config(config, state, what):
    """The config checked against the tensors' shapes; the vocabulary's size is the file's.

    Raises UserError: fields lacking, another kind of model, every size that config and weights give
    differently (heads too, which only the stored rotary table tells).
    """
    lacks = [k for k in REQUIRED if config.get(k) is None]
    if lacks:
        raise UserError(f"{what}: its config lacks {', '.join(lacks)}; expected a Scale-RAE model "
                        "folder with its config.json")
    if config.get("vision_loss_mode", "query") != "query":
        raise UserError(f"{what}: vision_loss_mode is {config['vision_loss_mode']!r}; known: query")
    size = (lambda key, axis=0: state[key].shape[axis] if key in state else 0)
    pair = (lambda a, b: [a, b] if b else a)
    with user_errors(f"{what}: diffusion_model_hidden_size, _depth and _heads"):
        D, depth, heads, D2, depth2, heads2 = dit_sizes(config)
    hd, hd1, hd2 = (size(f"{DIT}{r}_rope.freqs_cos", 1) for r in ("feat", "enc", "dec"))
    found = {"hidden_size": size("model.embed_tokens.weight", 1),
             "num_hidden_layers": depth_of(state, "model.layers"),
             "intermediate_size": size("model.layers.0.mlp.gate_proj.weight"),
             "mm_hidden_size": size("model.mm_projector.0.weight", 1),
             "vision_tower_aux_token_len_list": [size("model.latent_queries")],
             "diffusion_model_channels": size(DIT + "x_embedder.proj.weight", 1),
             "diffusion_model_z_channels": size("diff_head_projector.weight"),
             "diffusion_model_hidden_size": pair(size(DIT + "x_embedder.proj.weight"),
                                                 size(DIT + "s_embedder.proj.weight")),
             "diffusion_model_depth": depth_of(state, DIT + "dit_blocks"),
             "diffusion_model_heads": D // hd if hd else hd1 and hd2 and [D // hd1, D2 // hd2]}
    found = {k: v for k, v in found.items() if v and v != [0]}
    check_config({**config, "diffusion_model_hidden_size": pair(D, D2),
                  "diffusion_model_depth": depth + depth2,
                  "diffusion_model_heads": heads if hd else pair(heads, heads2)}, found, what)
    null = DIT + "y_embedder.dropout_embedding" in state
    found["diffusion_class_dropout_prob"] = 0.1 if null else 0.0        # where the config is silent
    given = {k: v for k, v in config.items() if v is not None or k not in found}
    return {**found, **given, "vocab_size": size("model.embed_tokens.weight")}


def build_model(config, dtype, what="stage-2 config"):
    """The LLM and the DiT of a stage-2 config, weights not yet meaningful. Raises UserError."""
    with user_errors(what):
        N, Z = config["vision_tower_aux_token_len_list"][0], config["diffusion_model_z_channels"]
        D, depth, heads, D2, depth2, heads2 = dit_sizes(config)
        llm = text.TextModel(config, N, config["mm_hidden_size"], Z, dtype)
        dit = dits.DiT(config["diffusion_model_channels"], N, D, depth, heads, Z, D2, depth2,
                       heads2 or None, null=config["diffusion_class_dropout_prob"] > 0,
                       qk_norm=config.get("diffusion_qk_norm", False), dtype=dtype)
    return llm, dit


def model_state(llm, dit):
    """The two networks' tensors under the released keys."""
    return {**llm.state_dict(), **{DIT + k: v for k, v in dit.state_dict().items()}}


def load_model_state(llm, dit, state, what):
    """Fill LLM and DiT from released keys; a tied model ignores a stored lm_head. A stored
    pos_embed is kept. Raises UserError."""
    head = {k.removeprefix(DIT): v for k, v in state.items() if k.startswith(DIT)}
    rest = {k: v for k, v in state.items() if not k.startswith(DIT)}
    tied = ("lm_head.weight",) if llm.config["tie_word_embeddings"] else ()
    load_strict(llm, rest, what, RECOMPUTED + tied)
    load_strict(dit, head, f"{what} (diff_head)", RECOMPUTED, optional=("pos_embed",))


def load_model(path, devices, flag="--run", ema=True):
    """A run folder or a released folder -> (llm, dit, tokenizer, config), in eval mode.

    A run folder gives its final/ with the EMA weights. Matrices are kept in the compute dtype, to
    which each product would cast them anyway: in bf16 half the memory, the same numbers. Raises
    UserError.
    """
    what, file = f"{flag} {path}", final_of(path, ema)
    state, config = read_weights(file, flag)
    config = stage2_config(config, state, what)
    with torch.device("meta"):
        llm, dit = build_model(config, devices.dtype, what)
    load_model_state(llm, dit, state, what)
    for model in (llm, dit):
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)) and "t_embedder" not in name:
                module.to(devices.dtype)                        # the time's MLP computes in fp32
        for p in model.parameters():        # in a mapped file a tensor begins at any byte, and the
            if p.dtype == torch.float32:    # CPU's products round by that
                p.data = p.data.clone()
        model.requires_grad_(False).eval().to(devices.device)
    with user_errors(what):
        tokenizer = text.load_tokenizer(file if file.is_dir() else file.parent)
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise UserError(f"{what}: the tokenizer has {tokenizer.get_vocab_size()} tokens, the "
                        f"embedding {config['vocab_size']} rows")
    return llm, dit, tokenizer, config


def save_tokenizer(tokenizer, folder):
    """tokenizer.json, and the files from which the authors' slow Qwen2 tokenizer reads the same."""
    folder, added = Path(folder), tokenizer.get_added_tokens_decoder()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))                   # vocab.json, merges.txt
    (folder / "added_tokens.json").write_text(json.dumps({t.content: i for i, t in added.items()}))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="Qwen2Tokenizer", model_max_length=1024, padding_side="right",
        bos_token=None, unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=[t.content for t in added.values()]), indent=1))
