"""Parity with the reference modules: recompute every output of a golden file.

    python tests/golden.py                      # all files of tests/golden/, or the given FILEs
    python tests/golden.py --device cuda --dtype bfloat16
    python tests/golden.py --write DIR          # write such files from our own modules

A file holds one component's `weights.*` (under the released keys), its inputs `in.*`, and the
reference's outputs `out.*`. Its metadata hold `component`, `config` and `tolerance`: the largest
allowed absolute error, relative to the largest output where that is above 1. This script prints the
error of each output. Its exit status is 1 if an error is above the tolerance or an output cannot be
recomputed. It builds the model from the file's config alone, so it reads other sizes and seeds too.

In bfloat16 every product is rounded, so the error is the rms of the difference over the rms of the
output, and ROUNDED is allowed. (The VAE and the discriminator stay in fp32, as in training.)
"""
import argparse
import json
import re
import sys
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import flow  # noqa: E402
import golden_step  # noqa: E402
from chat import chat, encode_text, load_tokenizer  # noqa: E402
from decoder import Decoder, DecoderConfig  # noqa: E402
from dit import DiT, DiTConfig  # noqa: E402
from encoder import LayerNorm, ViT, our_key, vit_config  # noqa: E402
from losses import DiscConfig, Discriminator, Perceptual  # noqa: E402
from stage2 import llm_config  # noqa: E402
from text_model import TextModel  # noqa: E402
from tiny.train_encoder import SiglipHead, released_key  # noqa: E402
from vae import VAE, VAEConfig  # noqa: E402

DEVICE, DTYPE = "cpu", torch.float32        # main sets them
ROUNDED = 0.05


def load(model, weights, ours=str, theirs=str, optional=()):
    """Load `weights` strictly into `model`.

    ours: returns our name of a file's key, or None for a key that the model does not use. theirs:
    returns the file's key of our name. optional: beginnings of our names that the file may lack. An
    empty dict is filled with random weights (for --write).
    """
    if not weights:
        randomise(model)
        weights.update({theirs(k): v.clone() for k, v in model.state_dict().items()})
    state = {ours(k): v for k, v in weights.items()}
    state.pop(None, None)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [k for k in missing if not k.startswith(tuple(optional))]
    if missing or unexpected:
        raise ValueError(f"keys do not fit: missing {missing}, unexpected {unexpected}")
    return model.eval().to(DEVICE)


def known_fields(cls, config):
    """Make a config of its fields in a reference's config."""
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()
                  if k in cls.__dataclass_fields__})


def randomise(model, seed=0):
    """Draw matrices from N(0, 1/fan in), biases from N(0, 0.1^2), other vectors from
    N(1, 0.1^2)."""
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        vector = 0.1 * noise + (0 if name.endswith("bias") else 1)
        p.data.copy_(noise / p[0].numel() ** 0.5 if p.dim() > 1 else vector)
    for module in model.modules():                      # spectral norm: singular vectors
        if hasattr(module, "weight_u"):
            U, _, Vh = torch.linalg.svd(module.weight_orig.data.flatten(1), full_matrices=False)
            module.weight_u, module.weight_v = U[:, 0].clone(), Vh[0].clone()


# ------------------------------------------------------------------------------------------------
# One function per component: (config, weights, inputs) -> {name: output}
# ------------------------------------------------------------------------------------------------

def siglip2(config, weights, inputs):
    """The ViT, and the pooling head with its norm that tiny/train_encoder.py trains beside it."""
    model, k = ViT(vit_config(config), DTYPE), vit_config(config)
    model.post_layernorm = LayerNorm(k.hidden_size, eps=k.layer_norm_eps)
    model.head = SiglipHead(k.hidden_size, k.intermediate_size, k.num_attention_heads,
                            k.layer_norm_eps)
    ours = lambda key: our_key(key, False) or key.removeprefix("vision_model.")
    load(model, weights, ours, released_key, ["head."])
    hidden = model.last_block(inputs["pixels"])                             # [B,N,C]
    last = model.post_layernorm(hidden)
    return {"features_hidden_last_then_layernorm": model(inputs["pixels"]),
            "features_postln_then_layernorm": F.layer_norm(last, last.shape[-1:], eps=1e-6),
            "hidden_states_last": hidden, "last_hidden_state": last,
            "pooler_output": model.head(last)}


def dinov2(config, weights, inputs):
    model = load(ViT(vit_config({"model_type": "dinov2", **config}), DTYPE), weights,
                 lambda key: our_key(key, True), dino_key)
    hidden = model.last_block(inputs["pixels"])                             # [B,1+N,C]
    last = model.norm(hidden)
    # the latent leaves out the class token; forward must agree with the other rows
    last = torch.cat([last[:, :1], model(inputs["pixels"])], 1)
    return {"hidden_states_last": hidden, "last_hidden_state": last}


def dino_key(name):
    """Return DINOv2's published key of a parameter of the ViT."""
    for ours, theirs in ((r"^(cls_token)$", r"embeddings.\1"),
                         (r"^pos_embed$", "embeddings.position_embeddings"),
                         (r"^patch_embed\.", "embeddings.patch_embeddings.projection."),
                         (r"^norm\.", "layernorm."), (r"^blocks\.", "encoder.layer."),
                         (r"\.scale([12])$", r".layer_scale\1.lambda1"),
                         (r"\.attn\.q_proj\.", ".attention.attention.query."),
                         (r"\.attn\.k_proj\.", ".attention.attention.key."),
                         (r"\.attn\.v_proj\.", ".attention.attention.value."),
                         (r"\.attn\.out_proj\.", ".attention.output.dense.")):
        name = re.sub(ours, theirs, name)
    return name


def qwen2(config, weights, inputs):
    if config.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    model = load(TextModel(llm_config(config, "golden file"), dtype=DTYPE), weights)
    ids = inputs["input_ids"]
    hidden = model(model.embed(ids))                                        # [B,L,H]
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    greedy, cache = ids[:1, mask[0]], []                                    # [1,L]
    new = greedy
    for _ in range(12):                                 # through the key-value cache
        last = model(model.embed(new), cache)[:, -1:]
        new = model.logits(last).argmax(-1)                                 # [1,1]
        greedy = torch.cat([greedy, new], 1)
    return {"last_hidden_state": hidden, "logits": model.logits(hidden), "greedy_ids": greedy}


def dit(config, weights, inputs):
    """The authors' diffusion head; with a list of two widths the wide head (dit_dh)."""
    c, pair = config, lambda v: v if isinstance(v, list) else [v, 0]
    (D, D2), (depth, depth2), (heads, heads2) = (
        pair(c[f"model_{k}"]) for k in ("hidden_size", "depth", "heads"))
    N, C = c["diffusion_tokens"], c["diffusion_channels"]
    model = DiT(DiTConfig(
        channels=C, tokens=N, width=D, depth=depth, heads=heads, cond_width=c["z_channels"] or 0,
        head_width=D2, head_depth=depth2, head_heads=heads2, null=c["class_dropout_prob"] > 0),
        DTYPE)
    load(model, weights, lambda key: key.removeprefix("model."), "model.{}".format)
    x, t, cond, noise = (inputs[k] for k in ("x", "t", "cond", "noise"))
    xt, alpha = flow.interpolate(x, noise, t), flow.shift_alpha(N, C)
    pairs = flow.sampling_times("authors", 50, alpha)
    sample = lambda scale: flow.sample(model, cond, noise, alpha, 50, scale, "authors")
    out = {"velocity": model(inputs.get("xt", xt), t, cond),
           "loss": flow.flow_loss(model(xt, t, cond), x, noise),
           # the grid in ascending order, from the steps that walk it downwards (stray step last)
           "time_grid": torch.tensor([pairs[-2][1], *[a for a, _ in pairs[-2::-1]], pairs[-1][1]],
                                     dtype=torch.float64),
           "sample_cfg1": sample(1.0)}
    if c["class_dropout_prob"] > 0:
        out["sample_cfg"] = sample(c["cfg_scale"])
    if "shift_in" in inputs:
        out["shift_out"] = flow.time_shift(inputs["shift_in"], alpha)
    return out


def rae_decoder(config, weights, inputs):
    model = load(Decoder(known_fields(DecoderConfig, config), DTYPE), weights,
                 optional=["decoder_pos_embed"])
    patches = model.patches(inputs["latents"])                              # [B,N,p*p*3]
    return {"patches": patches, "pixels_before_denorm": model.unpatchify(patches)}


def dino_disc(config, weights, inputs):
    model = load(Discriminator(known_fields(DiscConfig, config)), weights)
    images = (inputs["images_pm1"] + 1) / 2
    activations = {f"activation.{i}": a for i, a in enumerate(model.dino(images))}
    return {**activations, "logits": model(images)}


def lpips(config, weights, inputs):
    """Without weights in the file, draw them by the recipe in its metadata: VGG16 is 59 MB."""
    model = Perceptual(config.get("width", 1.0), DTYPE)
    if "recipe" not in config:
        load(model, weights)
    else:
        seed = int(re.search(r"manual_seed\((\d+)", config["recipe"])[1])
        convs = [m for m in model.features if isinstance(m, nn.Conv2d)]
        lins = [model.get_submodule(f"lin{k}")["model"][1] for k in range(5)]
        for i, conv in enumerate(convs):
            g = torch.Generator().manual_seed(seed + i)
            weight = torch.randn(conv.weight.shape, generator=g)
            conv.weight.data.copy_(weight * (2 / weight[0].numel()) ** 0.5)     # in its own dtype
            conv.bias.data.copy_(0.1 * torch.randn(conv.bias.shape, generator=g))
        for k, lin in enumerate(lins):
            g = torch.Generator().manual_seed(seed + 100 + k)
            lin.weight.data = torch.rand(lin.weight.shape, generator=g)
        model.to(DEVICE)
    a, b = (model.maps((inputs[k] + 1) / 2) for k in "ab")
    means = {f"relu{i + 1}.mean": f.mean(dim=(2, 3)) for i, f in enumerate(a)}
    return {"lpips": model.lpips(a, b), **means}


def flux_vae(config, weights, inputs):
    model = load(VAE(known_fields(VAEConfig, config)), weights)
    images = (inputs["pixels_pm1"] + 1) / 2
    (mean, logvar), tokens = model.posterior(images), model.encode(images)
    return {"mean": mean, "logvar": logvar, "scaled_latent": (mean - model.shift) * model.scale,
            "tokens_flux_packing": tokens, "reconstruction": 2 * model.decode(tokens) - 1}


def step(config, weights, inputs):
    return golden_step.step(inputs, DEVICE, DTYPE)


def step_decoder(config, weights, inputs):
    return golden_step.step_decoder(inputs, DEVICE, DTYPE)


COMPONENTS = dict(siglip2=siglip2, dinov2=dinov2, qwen2=qwen2, dit=dit, dit_dh=dit,
                  rae_decoder=rae_decoder, dino_disc=dino_disc, lpips=lpips, flux_vae=flux_vae,
                  step=step, step_decoder=step_decoder)


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def read(path):
    """Read a golden file -> component, config, tolerance, weights, inputs, outputs."""
    with safe_open(path, "pt") as f:
        meta, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}
    parts = [{k[len(p):]: v for k, v in tensors.items() if k.startswith(p)}
             for p in ("weights.", "in.", "out.")]
    if "shift_in" in parts[2]:                          # an input, filed among the outputs
        parts[1]["shift_in"] = parts[2].pop("shift_in")
    config = json.loads(meta.get("config", "{}"))
    if "recipe" in meta and not parts[0]:
        config["recipe"] = meta["recipe"]
    return meta["component"], config, float(meta["tolerance"]), *parts


@torch.no_grad()
def check(path):
    """Recompute the outputs of a file -> [(output, error, tolerance, note)]. A failure has a
    note."""
    component, config, tolerance, weights, inputs, want = read(path)
    if component not in COMPONENTS:
        return [(component, None, tolerance, f"unknown component; known: {', '.join(COMPONENTS)}")]
    if not weights and "recipe" not in config:
        return [("weights.*", None, tolerance, "the file has no weights")]
    got = COMPONENTS[component](config, weights, {k: v.to(DEVICE) for k, v in inputs.items()})
    got, rows = {k: v.cpu() for k, v in got.items()}, []
    mask = inputs.get("attention_mask")                 # outputs at padded positions mean nothing
    for name, b in want.items():
        if name.startswith("gradient.") and DTYPE == torch.bfloat16:
            continue        # differences of nearly equal numbers, of which bf16 leaves no digit
        a = got.get(name)
        if a is None or a.shape != b.shape:
            note = f"shape {list(a.shape)}, expected {list(b.shape)}" if a is not None else (
                f"{component} here does not compute it")
            rows.append((name, None, tolerance, note))
            continue
        if mask is not None and b.shape[:2] == mask.shape:
            a, b = a[mask.bool()], b[mask.bool()]
        a, b, exact = a.double(), b.double(), not b.is_floating_point()
        if DTYPE == torch.bfloat16 and not exact:
            error, limit = ((a - b).square().mean() / b.square().mean()).sqrt().item(), ROUNDED
        else:
            least = config.get("least_scale", 1.0)      # gradients are small
            error = ((a - b).abs().max() / max(least, b.abs().max())).item()
            limit = 0.0 if exact else tolerance
        rows.append((name, error, limit, "" if error <= limit else "above the tolerance"))
    return rows or [("-", None, tolerance, "the file has no outputs")]


def check_sequence(path, tokenizer=None):
    """Compare token ids and labels with sequence.json -> rows as of `check`, where the error is
    the number of wrong places."""
    data, rows = json.loads(Path(path).read_text()), []
    tokenizer = load_tokenizer(tokenizer or Path(path).with_name("qwen_tokenizer"))

    def compare(name, a, b):
        wrong = sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b))
        rows.append((name, float(wrong), 0.0, f"{a}, expected {b}" if wrong else ""))

    for i, sample in enumerate(data["conversations"]):
        has_image = any("<image>" in turn["value"] for turn in sample["conversation"])
        ids, labels = chat(tokenizer, sample["conversation"], has_image)
        compare(f"conversation {i} input_ids", ids, sample["input_ids"])
        compare(f"conversation {i} labels", labels, sample["labels"])
    for sample in data["encode"]:
        compare(f"encode {sample['text']!r}", encode_text(tokenizer, sample["text"]), sample["ids"])
    return rows


# Small examples for --write: a config and the shape of each input (of input_ids the last number is
# the vocabulary's size)
EXAMPLES = dict(
    siglip2=(dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=2, image_size=32, patch_size=8), dict(pixels=(2, 3, 32, 32))),
    dinov2=(dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=4,
                 image_size=32, patch_size=8), dict(pixels=(2, 3, 32, 32))),
    qwen2=(dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
           dict(input_ids=(2, 9, 50))),
    dit=(dict(diffusion_tokens=16, diffusion_channels=8, z_channels=24, model_hidden_size=32,
              model_depth=2, model_heads=2, class_dropout_prob=0.1, cfg_scale=2.0),
         dict(x=(2, 16, 8), noise=(2, 16, 8), cond=(2, 16, 24), t=(2,))),
    dit_dh=(dict(diffusion_tokens=16, diffusion_channels=8, z_channels=24,
                 model_hidden_size=[32, 48], model_depth=[2, 1], model_heads=[2, 2],
                 class_dropout_prob=0.1, cfg_scale=2.0),
            dict(x=(2, 16, 8), noise=(2, 16, 8), cond=(2, 16, 24), t=(2,))),
    rae_decoder=(dict(hidden_size=24, decoder_hidden_size=32, decoder_num_hidden_layers=2,
                      decoder_num_attention_heads=2, decoder_intermediate_size=48, patch_size=8,
                      num_patches=16), dict(latents=(2, 16, 24))),
    dino_disc=(dict(dim=32, depth=3, num_heads=2, key_depths=[0, 2], patch=8, kernel_size=5,
                    image_size=32), dict(images_pm1=(2, 3, 32, 32))),
    lpips=(dict(width=0.125), dict(a=(2, 3, 32, 32), b=(2, 3, 32, 32))),
    flux_vae=(dict(block_out_channels=[8, 16], layers_per_block=1, latent_channels=4,
                   norm_num_groups=4), dict(pixels_pm1=(2, 3, 16, 16))),
)


@torch.no_grad()
def write(folder, seed=0):
    """Write one file per component with our own outputs, for another implementation to check."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (config, shapes) in EXAMPLES.items():
        g, weights = torch.Generator().manual_seed(seed), {}
        inputs = {k: torch.randint(s[-1], s[:-1], generator=g) if k == "input_ids" else
                  torch.rand(s, generator=g) for k, s in shapes.items()}
        meta = dict(component=name, config=json.dumps(config), tolerance="1e-4",
                    source="this repository, tests/golden.py --write, random weights")
        save(folder / f"{name}.safetensors", meta, weights, inputs,
             COMPONENTS[name](config, weights, inputs))
    for name, inputs in (("step", golden_step.step_inputs()),
                         ("step_decoder", golden_step.step_decoder_inputs())):
        meta = dict(component=name, config=json.dumps({"least_scale": 1e-3}), tolerance="1e-5",
                    source="this repository, tests/golden.py --write", recipe="the weights of tiny/")
        save(folder / f"{name}.safetensors", meta, {}, inputs, COMPONENTS[name]({}, {}, inputs))


def save(path, meta, weights, inputs, outputs):
    parts = {"weights.": weights, "in.": inputs, "out.": outputs}
    tensors = {prefix + k: v.detach().contiguous().clone()
               for prefix, part in parts.items() for k, v in part.items()}
    save_file(tensors, path, meta)
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE",
                        help=".safetensors or sequence.json (default: all in tests/golden/)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder for a .json file (default: "
                        "qwen_tokenizer/ beside it)")
    parser.add_argument("--write", type=Path, metavar="DIR", help="write our own files to DIR")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    global DEVICE, DTYPE
    DEVICE, DTYPE = args.device, getattr(torch, args.dtype)
    torch.backends.cudnn.allow_tf32 = False             # of convolutions: fp32 means fp32
    if not args.files and not args.write:
        args.files = [str(p) for p in sorted((Path(__file__).parent / "golden").iterdir())]
    torch.set_num_threads(1)            # tiny tensors: threads would mostly wait for each other
    if args.write:
        write(args.write)
    failed = 0
    # golden/* also has a tokenizer's folder and a README
    files = [f for f in args.files if not (Path(f).is_dir() or f.endswith(".md"))]
    if args.files and not files:
        parser.error(f"no golden file in {' '.join(args.files)}; "
                     "expected .safetensors or sequence.json")
    for path in files:
        print(path)
        try:
            rows = (check_sequence(path, args.tokenizer) if path.endswith(".json") else check(path))
        except Exception as error:                      # one bad file must not hide the others
            rows = [("-", None, 0.0, f"{type(error).__name__}: {error}")]
        for name, error, tolerance, note in rows:
            failed += bool(note)
            shown = "-" if error is None else f"{error:.2e}"
            verdict = f"FAIL {note}" if note else "ok"
            print(f"  {name:<40} {shown:>9}  (<= {tolerance:.0e})  {verdict}")
    if files:
        print(f"{failed} of the outputs FAILED" if failed else "all outputs agree")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
