"""Weight files: found, read, checked and built into networks; and written in the released layout.

Files are read with safetensors, a .pt only with weights_only=True. Every key and shape must fit;
what does not is one error that names the first of each kind.
"""
import json
import re
from pathlib import Path

import torch
from safetensors import safe_open

import decoder as decoders
import dit as dits
import encoder as encoders
import text_model as text
from parallel import UserError

WRAPPERS = ("_orig_module.", "_fsdp_wrapped_module.", "_fpw_module.", "_orig_mod.", "module.")


def read_weights(path, flag="--init"):
    """A weight file or folder -> (state dict, config dict).

    A folder holds config.json and model.safetensors, an index of shards, model.pt or
    pytorch_model.bin; a file is .safetensors (config in its metadata or beside it) or a .pt/.pth of
    tensors, bare or under "model" (read with weights_only: code inside is refused). Prefixes that
    wrappers leave in keys are stripped. Raises UserError naming `flag`.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{flag} {path}: no such file or folder")
    config, state = {}, {}
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        names = ["model.safetensors.index.json", "model.safetensors",
                 "diffusion_pytorch_model.safetensors", "pytorch_model.bin.index.json",
                 "pytorch_model.bin", "model.pt", "model.pth"]
        found = next((path / n for n in names if (path / n).is_file()), None)
        if found is None:
            raise UserError(f"{flag} {path}: no weights; expected one of {', '.join(names)}")
        path = found
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
    try:
        files = [path]
        if path.name.endswith(".index.json"):
            shards = set(json.loads(path.read_text())["weight_map"].values())
            files = [folder / shard for shard in sorted(shards)]
        for file in files:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as f:
                    config = json.loads((f.metadata() or {}).get("config", "null")) or config
                    state.update((k, f.get_tensor(k)) for k in f.keys())
            else:
                part = torch.load(file, map_location="cpu", weights_only=True)
                state.update(part.get("model", part) if isinstance(part, dict) else part)
    except Exception as error:      # whatever a damaged file raises, the user gets one line
        raise UserError(f"{flag} {file}: unreadable weights ({type(error).__name__}: "
                        f"{str(error).splitlines()[0]})")
    for wrapper in WRAPPERS:
        state = {k.replace(wrapper, ""): v for k, v in state.items()}
    return state, config


def check_keys(want, have, what):
    """Compare {key: shape} of a model and of a file. Raises UserError naming the first of each."""
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    wrong = [f"{k} is {list(have[k])}, expected {list(want[k])}" for k in sorted(want.keys() & have.keys())
             if list(have[k]) != list(want[k])]
    problems = [f"{len(keys)} {name} (first: {keys[0]})" for name, keys in
                (("missing", missing), ("unexpected", extra), ("of another shape", wrong)) if keys]
    if problems:
        raise UserError(f"{what} does not fit the model: {'; '.join(problems)}")


def load_strict(module, state, what, ignore=(), optional=()):
    """Load every key or raise UserError. ignore: substrings of file keys that are dropped (they are
    recomputed); optional: substrings of model keys that a file may lack."""
    state = {k: v for k, v in state.items() if not any(i in k for i in ignore)}
    own = module.state_dict()
    want = {k: v.shape for k, v in own.items() if not any(i in k for i in ignore)
            and not (any(o in k for o in optional) and k not in state)}
    check_keys(want, {k: v.shape for k, v in state.items()}, what)
    module.load_state_dict(state, strict=False)
    return module

# ------------------------------------------------------------------------------------------------
# The networks: where they are found, and how they are built
# ------------------------------------------------------------------------------------------------

ASSETS = Path(__file__).parent / "assets" / "tiny"
HUB = {"siglip2": ("google/siglip2-so400m-patch14-224", "nyu-visionx/siglip2_decoder"),
       "webssl": ("facebook/webssl-dino300m-full2b-224", "nyu-visionx/webssl300m_decoder")}


TINY_TOWER = "assets/tiny/encoder.safetensors"          # in configs; found beside this file


def locate(wanted):
    """[(what, path or hub id, flag), ...] -> paths that exist.

    A hub id is looked for in weights/NAME and in the local hub cache, then downloaded. Raises one
    UserError that lists every missing one, where it was looked for, and its flag.
    """
    paths, missing = [], []
    for what, name, flag in wanted:
        local = Path("weights") / Path(str(name)).name
        if Path(name).exists() or local.exists():
            paths.append(Path(name) if Path(name).exists() else local)
            continue
        looked = f"{name}, {local}"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
            from huggingface_hub import snapshot_download
            try:
                try:
                    paths.append(Path(snapshot_download(name, local_files_only=True)))
                except Exception:                       # not in the cache: ask the network
                    paths.append(Path(snapshot_download(name)))
                continue
            except Exception as error:                  # no network, no such repository, ...
                looked += f", the hub cache, the hub ({type(error).__name__})"
        missing.append(f"  {what}: {name}\n      looked in {looked}; give {flag} PATH")
    if missing:
        raise UserError("weights are missing:\n" + "\n".join(missing))
    return paths


def load_encoder(path, devices, layers=1):
    """A frozen encoder in the compute dtype, from a file of ours or a published folder."""
    state, config = read_weights(path, "--encoder")
    model = encoders.build_encoder(config, layers, devices.dtype)
    if any(k.startswith("vision_model.") for k in state):       # the full SigLIP file has text too
        state = {k: v for k, v in state.items() if k.startswith("vision_model.")}
    load_strict(model, state, f"encoder {path}", optional=("mask_token",))
    return model.requires_grad_(False).eval().to(devices.device)


def load_decoder(path, devices, channels, mean, std):
    """A decoder in the compute dtype; its latent must have `channels` channels. mean, std: of the
    encoder's normalisation, because a published decoder's config does not hold them."""
    state, config = read_weights(path, "--decoder")
    config.setdefault("image_mean", list(mean))
    config.setdefault("image_std", list(std))
    if "decoder_embed.weight" in state:             # the encoder's width wins over the config's
        config["hidden_size"] = state["decoder_embed.weight"].shape[1]
        config["patch_size"] = int((len(state["decoder_pred.weight"]) / 3) ** 0.5)
    if config.get("hidden_size") != channels:
        raise UserError(f"decoder {path} takes latents of {config.get('hidden_size')} channels, the "
                        f"encoder gives {channels}; give the decoder of this encoder by --decoder")
    model = decoders.Decoder(config, devices.dtype)
    load_strict(model, state, f"decoder {path}", optional=("decoder_pos_embed",))
    return model.requires_grad_(False).eval().to(devices.device)


def model_config(llm, dit, encoder_name, alpha):
    """config.json of a stage-2 model in the authors' field names (Qwen2's fields stay)."""
    wide = dit.head_depth > 0
    pair = (lambda a, b: [a, b] if wide else a)
    return {**llm.config, "model_type": "cambrian_qwen", "vision_loss": "diffusion-loss",
            "vision_loss_mode": "query", "dit_cls": "DDT" if wide else "DiT",
            "diffusion_model_hidden_size": pair(dit.width, dit.head_width),
            "diffusion_model_depth": pair(dit.depth, dit.head_depth),
            "diffusion_model_heads": pair(dit.heads, dit.head_heads),
            "diffusion_model_channels": dit.channels,
            "diffusion_model_z_channels": dit.cond_width,
            "diffusion_class_dropout_prob": 0.1,
            "vision_tower_aux_token_len_list": [dit.tokens],
            "mm_vision_tower_aux_list": [str(encoder_name)],
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": llm.model.mm_projector[0].in_features,
            "mm_use_im_start_end": True, "image_aspect_ratio": "square", "shift_alpha": alpha}


def build_model(config, dtype):
    """The LLM and the DiT of a stage-2 config, weights not yet meaningful. Raises UserError."""
    lengths = config.get("vision_tower_aux_token_len_list", [256])
    first = lambda v: v[0] if isinstance(v, list) else v
    second = lambda v: v[1] if isinstance(v, list) else 0
    D, depth, heads = (config[f"diffusion_model_{k}"] for k in ("hidden_size", "depth", "heads"))
    try:
        llm = text.TextModel(config, lengths[0], config["mm_hidden_size"],
                             config["diffusion_model_z_channels"], dtype)
        dit = dits.DiT(config["diffusion_model_channels"], lengths[0], first(D), first(depth),
                       first(heads), config["diffusion_model_z_channels"], second(D), second(depth),
                       second(heads) or None, null=config.get("diffusion_class_dropout_prob", 0) > 0,
                       qk_norm=config.get("diffusion_qk_norm", False), dtype=dtype)
    except (ValueError, KeyError) as error:
        raise UserError(f"stage-2 config: {error}")
    return llm, dit


RECOMPUTED = ("rope.freqs_", "rotary_emb.inv_freq")     # in files, but recomputed in fp32


def model_state(llm, dit):
    """The two networks' tensors under the released keys."""
    return {**llm.state_dict(), **{f"diff_head.model.{k}": v for k, v in dit.state_dict().items()}}


def load_model_state(llm, dit, state, what):
    """Fill LLM and DiT from released keys; a tied model ignores a stored lm_head."""
    head = {k.removeprefix("diff_head.model."): v for k, v in state.items()
            if k.startswith("diff_head.model.")}
    rest = {k: v for k, v in state.items() if not k.startswith("diff_head.model.")}
    tied = ("lm_head.weight",) if llm.config["tie_word_embeddings"] else ()
    load_strict(dit, head, f"{what} (diff_head)", RECOMPUTED, optional=("pos_embed",))
    load_strict(llm, rest, what, RECOMPUTED + tied)


def load_model(path, devices, flag="--run", ema=True):
    """A run folder or a released folder -> (llm, dit, tokenizer, config), in eval mode.

    A run folder gives its final/ with the EMA weights.
    """
    folder = Path(path)
    if (folder / "final").is_dir():
        folder = folder / "final"
    file = folder / "ema.safetensors" if ema and (folder / "ema.safetensors").is_file() else folder
    state, config = read_weights(file, flag)
    if "diffusion_model_hidden_size" not in config:
        raise UserError(f"{flag} {path}: its config has no diffusion_model_hidden_size; this is not "
                        "a Scale-RAE model folder")
    llm, dit = build_model(config, devices.dtype)
    load_model_state(llm, dit, state, f"{flag} {path}")
    for model in (llm, dit):
        model.requires_grad_(False).eval().to(devices.device)
    return llm, dit, text.load_tokenizer(folder if file.parent == folder or file == folder
                                         else file.parent), config


def final_of(path):
    """A run folder stands for its final/ weights (EMA where there are some)."""
    final = Path(path) / "final"
    if final.is_dir():
        return final / "ema.safetensors" if (final / "ema.safetensors").is_file() else final
    return path


def find_parts(args, tiny, llm):
    """Paths of the frozen networks and tokenizer that train_dit.py needs: flags first, then
    assets/tiny for the tiny preset, else the published ones. Raises UserError listing what lacks."""
    if tiny:
        encoder, decoder = ASSETS / "encoder.safetensors", ASSETS / "decoder.safetensors"
        wanted = [("encoder", args.encoder or encoder, "--encoder"),
                  ("tokenizer", args.llm or ASSETS, "--llm"),
                  ("decoder", args.decoder or decoder, "--decoder")]
    else:
        encoder, decoder = HUB[args.latent]
        wanted = [("encoder", args.encoder or encoder, "--encoder"),
                  ("tokenizer", args.llm or llm, "--llm"),
                  ("decoder", args.decoder or decoder, "--decoder")]
    return dict(zip((w[0] for w in wanted), locate(wanted)))


def load_codec(config, args, devices, encoder=True, decoder=True):
    """The encoder and decoder that belong to a stage-2 config (None for one not asked for).

    --encoder and --decoder win; else the config's tower, with the tiny or the released decoder.
    """
    tower = re.sub(r"-(interp|res)\d+$", "", config["mm_vision_tower_aux_list"][0])
    if tower == TINY_TOWER:
        names = ASSETS / "encoder.safetensors", ASSETS / "decoder.safetensors"
    else:
        names = tower, next((d for e, d in HUB.values() if e == tower), "decoder")
    wanted = [("encoder", args.encoder or names[0], "--encoder"),
              ("decoder", args.decoder or names[1], "--decoder")]
    paths = locate([w for w, needed in zip(wanted, (encoder, decoder)) if needed])
    e = load_encoder(paths[0], devices) if encoder else None
    if not decoder:
        return e, None
    mean, std = (e.mean, e.std) if e else (encoders.SigLIP2.mean, encoders.SigLIP2.std)
    if "dino" in tower:
        mean, std = encoders.DINOv2.mean, encoders.DINOv2.std
    return e, load_decoder(paths[-1], devices, config["diffusion_model_channels"], mean, std)


def config_of(path):
    """The config of a model folder without its weights."""
    folder = Path(path) / "final" if (Path(path) / "final").is_dir() else Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"--run {path}: no config.json in {folder}")
    return json.loads((folder / "config.json").read_text())


def read_latent(path, tokens, channels):
    """A file of --save-latent -> [n,N,C]. Raises UserError on another size."""
    if not Path(path).is_file():
        raise UserError(f"--latent {path}: no such file")
    state, _ = read_weights(path, "--latent")
    z = next(iter(state.values())).float()
    z = z[None] if z.dim() == 2 else z
    if list(z.shape[1:]) != [tokens, channels]:
        raise UserError(f"--latent {path}: latents of {list(z.shape[1:])}, the model's are "
                        f"[{tokens}, {channels}]")
    return z
