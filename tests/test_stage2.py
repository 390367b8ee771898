"""Stage 2, train_dit.py: the recipe, every --latent, --init, optimizers, faults of a long run, plans,
and the expected loss curve (images of one's own: test_finetuning.py). A first step is computed here from the equations: at the start
the DiT's velocity is 0 and its blocks are the identity.

    pytest tests/test_stage2.py
    python tests/test_stage2.py --write         # tests/expected/train_dit.json, after a real change
"""
import json
import math
import os
import shutil
import signal
import sys
import types
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import chat
import checkpoint
import cli
import data
import flow
import networks
import parallel
import recipe
import sample
import stage2
import text_model
import train_dit
import training
import weights
from conftest import init_weights
from cli import UserError
from decoder import Decoder, size_config
from decoder import initial as init_decoder
from dit import DiT, DiTConfig, Block
from dit import initial as init_dit
from text_model import TextModel
from tiny import judge
from vae import TINY as TINY_VAE
from vae import VAE, pack

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
CPU = parallel.setup("cpu", "float32")
BASE = ["--device", "cpu", "--dtype", "float32", "--workers", "0", "--log-every", "1",
        "--sample-every", "99", "--save-every", "99", "--sample-steps", "1", "--guidance", "1",
        "--batch", "4"]
TOKENIZER = chat.load_tokenizer(weights.TINY)
LLM = replace(text_model.TINY, vocab_size=1024)
CAPTIONED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": chat.ANSWER}]


def call(*args):
    """Run train_dit.py in this process, for one step if not told otherwise -> its exit status."""
    one = [] if {"--steps", "--epochs"} & set(args) else ["--steps", "1"]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["train_dit.py", *BASE, *one, *map(str, args)])
        few = training.check_colours                # 2 of 128 shapes at the end: time alone
        m.setattr(training, "check_colours", lambda draw, seed, n, *bar: few(draw, seed, 2, *bar))
        try:
            cli.main(train_dit.main)
        except SystemExit as stopped:
            return stopped.code
        finally:
            for s, handler in handlers.items():
                signal.signal(s, handler)
    return 0


def train(out, *args, status=0):
    """Train -> the lines of the run's log."""
    assert call(*args, "--out", out) == status
    path = Path(out) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(lines):
    return [line["loss"] for line in lines]


def last_state(out):
    return load_file(weights.checkpoints(out)[-1] / "state.safetensors")


def first_batch(encoder, sources, vae=None, batch=4):
    """Return what the first step of a run on `sources` with seed 0 sees: the batch, and the
    encoder's features u [B,N,C']."""
    mixture = data.Mixture(sources, 64)
    collate = train_dit.Collate(TOKENIZER, 64, (vae or encoder).channels, 0, 0.1,
                                posterior=vae is not None)
    batch = collate([mixture[i] for i in range(batch)])
    with torch.no_grad():
        return batch, encoder(batch["images"].float() / 255)


def new_llm(image_channels=96, dtype=torch.float32):
    llm = TextModel(LLM, 64, image_channels, 160, dtype)
    init_weights(llm, text_model.initial)
    return llm


def new_dit(channels=96, dtype=torch.float32, **fields):
    values = dict(channels=channels, tokens=64, width=160, depth=6, heads=5)
    dit = DiT(DiTConfig(**{**values, **fields}), dtype)
    init_weights(dit, init_dit)
    return dit


def loss_of_zero(batch, z):
    """Return the flow loss of v = 0, as an untrained DiT has it."""
    each = (batch["eps"] - z).square().mean((1, 2))                         # [B]
    return pytest.approx(each[batch["answer"]].mean().item(), rel=1e-5)


@pytest.fixture(scope="module")
def encoder():
    return networks.load_encoder(weights.locate([("", weights.TINY_ENCODER, "")])[0], CPU)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A short run on builtin:hq that others are compared with."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return out, train(out, "--data", "builtin:hq", "--steps", 2, "--save-every", 1)


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    torch.manual_seed(0)
    config, path = TINY_VAE, tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(VAE(config).state_dict(), path, metadata={"config": json.dumps(asdict(config))})
    return path


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A tiny DINOv2 with random weights in the published layout of webssl, and a decoder for it.
    Its latent has more channels (192) than the tiny DiT is wide (160)."""
    folder, C, depth, side, patch = tmp_path_factory.mktemp("dino"), 192, 2, 64, 8
    torch.manual_seed(0)
    linear = {"attention.attention.query": (C, C), "attention.attention.key": (C, C),
              "attention.attention.value": (C, C), "attention.output.dense": (C, C),
              "mlp.fc1": (4 * C, C), "mlp.fc2": (C, 4 * C)}
    state = {"embeddings.cls_token": torch.randn(1, 1, C), "embeddings.mask_token": torch.zeros(1, C),
             "embeddings.position_embeddings": torch.randn(1, 1 + (side // patch) ** 2, C),
             "embeddings.patch_embeddings.projection.weight": torch.randn(C, 3, patch, patch) / 9,
             "embeddings.patch_embeddings.projection.bias": torch.randn(C),
             "layernorm.weight": 1 + torch.randn(C), "layernorm.bias": torch.randn(C)}
    for i in range(depth):
        layer = f"encoder.layer.{i}."
        for name, shape in linear.items():
            state[f"{layer}{name}.weight"] = torch.randn(shape) * shape[1] ** -0.5
            state[f"{layer}{name}.bias"] = torch.randn(shape[0]) * 0.1
        for k in (1, 2):
            state[f"{layer}norm{k}.weight"], state[f"{layer}norm{k}.bias"] = torch.randn(2, C)
            state[f"{layer}layer_scale{k}.lambda1"] = torch.randn(C)
    (folder / "encoder").mkdir()
    save_file(state, folder / "encoder/model.safetensors")
    (folder / "encoder/config.json").write_text(json.dumps(dict(
        model_type="dinov2", hidden_size=C, num_hidden_layers=depth, num_attention_heads=4,
        mlp_ratio=4, image_size=side, patch_size=patch, layer_norm_eps=1e-6)))
    (folder / "encoder/preprocessor_config.json").write_text('{"resample": 3}')
    config = size_config("tiny", C, 64, 8, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    decoder = Decoder(config)
    init_weights(decoder, init_decoder)
    save_file(decoder.state_dict(), folder / "decoder.safetensors",
              metadata={"config": json.dumps(asdict(config))})
    return ["--latent", "webssl", "--encoder", folder / "encoder", "--decoder",
            folder / "decoder.safetensors"]


# ------------------------------------------------------------------------------------------------
# The recipe
# ------------------------------------------------------------------------------------------------

def test_one_step_by_hand(tmp_path, encoder):
    """Images to generate and questions in one batch of a mixture; losses over the whole batch, not
    a micro-batch; the clip at 1; two learning rates and betas, no decay; the average's first step.
    """
    sources, lr = ["builtin:synthetic=3", "builtin:qa=1"], {True: 3e-4, False: 2e-5}
    line, = train(tmp_path / "r", "--data", *sources, "--batch", 8, "--micro-batch", 4, "--lr",
                  lr[True], "--lr-llm", lr[False], "--warmup", 0)
    batch, z = first_batch(encoder, sources, batch=8)
    llm, dit = new_llm(), new_dit()
    assert 0 < batch["answer"].sum() < 8
    with torch.no_grad():
        h = llm(llm.embed(batch["ids"], batch["start"], batch["answer"], z))
        known = batch["targets"] != chat.IGNORE                             # [B,K]
        rows = torch.arange(8)[:, None].expand_as(known)[known]
        ce = F.cross_entropy(llm.logits(h)[rows, batch["where"][known]],
                             batch["targets"][known]).item()
        c = llm.condition(h, batch["start"])[batch["answer"]]       # of all images to generate
        spread = (c.var(0, correction=0).sum() / c.square().mean(0).sum()).sqrt().item()
    assert line["cond_spread"] == pytest.approx(spread, rel=1e-3)
    assert batch["targets"][known].equal(batch["ids"][rows, batch["where"][known] + 1])
    assert line["flow"] == loss_of_zero(batch, z)
    assert line["text"] == pytest.approx(ce, rel=1e-5)
    assert line["loss"] == pytest.approx(line["text"] + 2 * line["flow"], rel=1e-5)

    before = {f"llm.{k}": v for k, v in llm.named_parameters()}
    before.update((f"dit.{k}", v) for k, v in dit.named_parameters() if v.requires_grad)
    after, square, moved = last_state(tmp_path / "r"), 0, set()
    for key in before:
        of_dit = key.startswith("dit.") or "diff_head" in key
        first, second = (after[f"optimizer.{key}.exp_avg{m}"] for m in ("", "_sq"))
        square += (first / 0.1).square().sum().item()               # of the clipped gradient
        big = second > 1e-18                                        # not lost to rounding
        assert torch.allclose((first ** 2 / second)[big], torch.tensor(0.1 ** 2 / (
            0.05 if of_dit else 0.001)), rtol=1e-3), key
        change = (after[key] - before[key]).abs().max().item()
        assert change == 0 or change == pytest.approx(lr[of_dit], rel=2e-2), key
        moved |= {key} if change else set()
        average = before[key].lerp(after[key], 0.9)                 # 1 - 1/10 at first
        assert torch.allclose(after[f"ema.{key}"], average, atol=1e-7), key
    assert line["grad_norm"] > 1 and square == pytest.approx(1, rel=1e-3)
    assert {"dit.final_layer.linear.weight", "llm.model.latent_queries", "llm.model.norm.weight",
            "llm.model.mm_projector.0.weight", "llm.model.embed_tokens.weight"} <= moved


def test_schedule_and_freeze(tmp_path):
    """Warm-up, then cosine; --freeze llm does not change the LLM. (The condition has an effect from
    step 3 on: the layers after it start at zero.)"""
    lines = train(tmp_path / "r", "--freeze", "llm", "--steps", 4, "--warmup", 0.5, "--lr", 1e-3,
                  "--lr-llm", 1e-4, "--data", "builtin:synthetic")
    factors = [0.5, 1, 1, 0.5]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * f for f in factors])
    assert [line["lr_llm"] for line in lines] == pytest.approx([1e-4 * f for f in factors])
    state = load_file(tmp_path / "r/final/model.safetensors")
    for key, value in new_llm().named_parameters():
        trained = "latent_queries" in key or "diff_head" in key
        assert torch.equal(state[key], value) != trained, key


def test_a_batch_of_questions_leaves_the_dit_out(tmp_path, encoder):
    """In a batch without an image to generate the DiT does not run and is not updated, and the LLM
    learns the same."""
    start, end = tmp_path / "start", tmp_path / "end"
    train(start, "--data", "builtin:align", "--init-only")
    line, = train(end, "--data", "builtin:align")
    before, after = (load_file(out / "final/model.safetensors") for out in (start, end))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved and not any("diff_head" in k or "latent_queries" in k for k in moved)
    assert line["loss"] == line["text"] > 0 and not {"flow", "cond_spread"} & set(line)

    llm, dit = new_llm(), new_dit()
    model = train_dit.ScaleRAE(llm, dit, 1.0)
    batch, u = first_batch(encoder, ["builtin:align"])
    found = []
    for has_targets in (True, False):
        model.zero_grad(set_to_none=True)
        text, flow_loss, *_ = model(u, u, batch, has_targets)
        (text + flow_loss.sum()).backward()
        assert (flow_loss == 0).all()
        assert (dit.x_embedder.proj.weight.grad is None) == (not has_targets)
        found.append({k: p.grad for k, p in llm.named_parameters() if p.grad is not None
                      and "diff_head" not in k and "latent_queries" not in k})
    assert found[1] and all(torch.equal(found[0][k], g) for k, g in found[1].items())


def test_draws_depend_on_seed_and_sample_alone():
    """One image in ten loses its condition; nothing depends on the rest of the batch; a sample that
    is too long has no loss and is named."""
    collate = train_dit.Collate(TOKENIZER, 2, 3, seed=5, cond_drop=0.1)
    records = [dict(n=n, key=f"k{n}", skipped=[], conversations=CAPTIONED,
                    image=np.zeros((8, 8, 3), np.uint8)) for n in range(2000)]
    batch = collate(records)
    assert abs(batch["drop"].float().mean() - 0.1) < 0.02                   # 3 deviations
    assert abs(batch["normal"].mean()) < 0.07 and abs(batch["normal"].std() - 1) < 0.05
    long = dict(records[9], conversations=[{"from": "human", "value": "b " * 2000}, CAPTIONED[1]])
    part = collate([records[7], long])
    other = train_dit.Collate(TOKENIZER, 2, 3, seed=6, cond_drop=0.1)(records)
    for key in ("normal", "drop", "eps"):
        assert torch.equal(part[key][0], batch[key][7]), key
        assert not torch.equal(batch[key], other[key]), key
    assert part["ids"].shape == (2, 64) and part["answer"].tolist() == [True, False]
    assert (part["targets"][1] == chat.IGNORE).all() and part["start"][1] == 64
    (key, why), = part["rejected"]
    assert key == "k9" and "more than 1024" in why and not part["skipped"]
    collate = train_dit.Collate(TOKENIZER, 2, 3, 5, 0.1, length=96)         # --length
    assert collate(records[:3])["ids"].shape == (3, 96)
    posterior = train_dit.Collate(TOKENIZER, 2, 3, 5, 0.1, posterior=True)(records[:3])
    assert torch.equal(posterior["eps"], batch["eps"][:3]) and "posterior" not in batch


def test_as_many_tokens_as_length_fit():
    record = dict(n=0, key="k", skipped=[], conversations=CAPTIONED,
                  image=np.zeros((8, 8, 3), np.uint8))
    length = len(chat.insert_image_tokens(*chat.chat(TOKENIZER, CAPTIONED), 2)[0])
    for limit, fits in ((length, True), (length - 1, False)):
        batch = train_dit.Collate(TOKENIZER, 2, 3, 0, 0.1, limit)([record])
        assert (batch["answer"].tolist(), batch["rejected"] == []) == ([fits], fits)


def test_words_of_the_chat_format_are_rejected():
    turns = [{"from": "human", "value": "a <|im_end|> b"}, CAPTIONED[1]]
    record = dict(n=0, key="k", skipped=[], conversations=turns,
                  image=np.zeros((8, 8, 3), np.uint8))
    batch = train_dit.Collate(TOKENIZER, 2, 3, 0, 0.1)([record])
    (key, why), = batch["rejected"]
    assert key == "k" and "<|im_end|>" in why and not batch["answer"].any()


def test_bf16_and_its_fp32_islands(encoder, monkeypatch):
    """With bf16 products: weights, gradients, norm statistics, time embedding, interpolation, loss
    and the Euler update are fp32; every other Linear of the DiT multiplies bf16."""
    llm, dit = new_llm(dtype=torch.bfloat16), new_dit(dtype=torch.bfloat16, depth=2)
    seen = {"norm": set(), "time": set(), "product": set()}
    real = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda x, *a, **k: (seen["norm"].add(x.dtype),
                                                           real(x, *a, **k))[1])
    for name, m in [*dit.named_modules(), *llm.named_modules()]:
        if isinstance(m, torch.nn.Linear):
            kind = "time" if name.startswith("t_embedder") else "product"
            m.register_forward_hook(lambda _, x, y, kind=kind: seen[kind].update(
                [x[0].dtype, y.dtype]))
    batch, z = first_batch(encoder, ["builtin:synthetic"])
    model = train_dit.ScaleRAE(llm, dit, 1.0)
    text, flow_loss, _, _ = model(z, z, batch)
    (text + flow_loss.sum()).backward()
    assert seen["norm"] == seen["time"] == {torch.float32} and seen["product"] == {torch.bfloat16}
    logits = llm.logits(torch.zeros(1, 128).bfloat16())
    assert {x.dtype for x in (text, flow_loss, z, logits)} == {torch.float32}
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) > 50 and {g.dtype for g in grads} == {torch.float32}
    x = torch.full((1, 64, 96), 1000.0)                             # 0.25 is lost in bf16
    ones = lambda x, t: torch.ones_like(x).bfloat16()
    assert (flow.integrate(ones, x, [(0.0, 0.25)]) == 1000.25).all()
    assert flow.interpolate(x, x + 1, torch.tensor([0.25]))[0, 0, 0] == 1000.25


def test_blocks_compile_whole(plain, tmp_path, monkeypatch):
    """--compile: each block of both networks is one graph, also when the run draws samples."""
    blocks, real = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: (
        blocks.append((type(self), options)), real(self, **options, backend="eager"))[1])
    lines = train(tmp_path / "r", "--data", "builtin:hq", "--steps", 2, "--compile")
    assert losses(lines) == pytest.approx(losses(plain[1]), rel=1e-6)
    assert blocks == [(k, {"fullgraph": True}) for k in [text_model.Layer] * 3 + [Block] * 6]


def test_recomputed_activations_give_the_same_step(plain, tmp_path):
    lines = train(tmp_path / "r", "--data", "builtin:hq", "--steps", 2, "--remat", "block")
    assert losses(lines) == pytest.approx(losses(plain[1]), rel=1e-6)


# ------------------------------------------------------------------------------------------------
# Latents and networks
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [{}, dict(scaling_factor=0.3611, shift_factor=0.1159)])
def test_vae_latent_has_two_encoders(scale, tmp_path, encoder, vae_file):
    """The DiT's latent is a draw from the VAE's posterior, packed, shifted and scaled; the LLM and
    REPA see the encoder's features. Both losses by hand: the fourth block still has the embedding.
    """
    state, config = load_file(vae_file), replace(TINY_VAE, **scale)
    file, out, source = tmp_path / "vae.safetensors", tmp_path / "r", ["builtin:synthetic"]
    save_file(state, file, metadata={"config": json.dumps(asdict(config))})
    line, = train(out, "--latent", "vae", "--vae", file, "--repa", 4, "--data", *source)
    vae, alpha = networks.load_vae(file, CPU), math.sqrt(32)
    batch, u = first_batch(encoder, source, vae)
    with torch.no_grad():
        mean, logvar = map(pack, vae.posterior(batch["images"].float() / 255))
        z = mean + (logvar / 2).exp() * batch["posterior"]
        z = (z - config.shift_factor) * config.scaling_factor
        model = train_dit.ScaleRAE(None, new_dit(64), alpha, 4, 96)
        init_weights(model.repa, init_dit)
        t = alpha / (alpha - 1 + (1 / torch.sigmoid(batch["normal"])))[:, None, None]
        x_t = (1 - t) * z + t * batch["eps"]
        tokens = model.dit.x_embedder(x_t) + model.dit.pos_embed
        cosine = F.cosine_similarity(model.repa(tokens), u, dim=-1).mean(1)
    assert line["flow"] == loss_of_zero(batch, z)
    assert line["repa"] == pytest.approx(1 - cosine[batch["answer"]].mean().item(), rel=1e-4)
    whole = line["text"] + 2 * (line["flow"] + 0.5 * line["repa"])      # REPA is part of the flow
    assert line["loss"] == pytest.approx(whole, rel=1e-5)
    if scale:
        return
    found = stage2.load_run(out, CPU)
    assert found.config.dit.channels == 64 and found.llm.model.mm_projector[0].in_features == 96
    assert found.config.vae == str(file) and found.config.alpha == pytest.approx(alpha)
    assert not any("repa" in k for k in load_file(out / "final/model.safetensors"))
    repeat, = train(tmp_path / "init", "--init", out, "--data", *source)    # a VAE's, by its config
    assert repeat["flow"] < line["flow"]


def test_repa_reaches_its_block_and_no_later_one(encoder):
    dit = DiT(DiTConfig(channels=8, tokens=4, width=32, depth=3, heads=4))
    for p in dit.parameters():                                          # no zeros: gradients pass
        torch.nn.init.normal_(p, std=0.2)
    model = train_dit.ScaleRAE(None, dit, 1.0, repa=2, channels=8)
    dit(torch.randn(1, 4, 8), torch.rand(1), torch.randn(1, 4, 32))
    model.repa(model.tapped).sum().backward()
    assert [b.mlp.w3.weight.grad is not None for b in dit.dit_blocks] == [True, True, False]


def test_repa_of_questions_is_zero(encoder):
    model = train_dit.ScaleRAE(new_llm(), new_dit(depth=2), 1.0, repa=1, channels=96)
    batch, z = first_batch(encoder, ["builtin:synthetic=1", "builtin:qa=1"])
    assert 0 < batch["answer"].sum() < 4
    _, flow_loss, repa_loss, *_ = model(z, z, batch)
    assert (repa_loss != 0).equal(batch["answer"]) and (flow_loss != 0).equal(batch["answer"])


def test_webssl_wide_head_and_no_shift(tmp_path, dino, capsys):
    """A DINOv2 in the published layout; the width warning; DiT-DH, qk-norm, --shift none."""
    options = [*dino, "--shift", "none", "--head-width", 240, "--head-depth", 1, "--qk-norm",
               "--data", "builtin:synthetic"]
    train(tmp_path / "r", *options, status=2)
    said = capsys.readouterr().err
    assert "width 160 is not above the latent's 192 channels" in said and "--allow-narrow" in said
    line, = train(tmp_path / "r", *options, "--allow-narrow")
    encoder = networks.load_encoder(dino[3], CPU)
    batch, z = first_batch(encoder, ["builtin:synthetic"])
    assert abs(z.mean(-1)).max() > 0.1                                  # its own affine norm
    assert line["flow"] == loss_of_zero(batch, z)
    config = json.loads((tmp_path / "r/final/config.json").read_text())
    assert config["diffusion_model_hidden_size"] == [160, 240]
    assert config["diffusion_model_depth"] == [6, 1] and config["diffusion_model_channels"] == 192
    found = stage2.load_run(tmp_path / "r", CPU)
    k = found.config.dit
    assert (found.config.alpha, k.qk_norm, k.head_width, k.head_depth) == (1, True, 240, 1)
    assert found.dit.s_embedder.proj.weight.shape[:2] == (240, 192)


@pytest.mark.parametrize("latent", ["siglip2", "webssl", "vae"])
def test_every_latent_at_a_size_of_its_own(latent, tmp_path, dino, vae_file):
    """--width, --depth, --heads, --llm-width and --llm-depth; the run draws an image."""
    flags = {"siglip2": [], "webssl": [*dino, "--allow-narrow"],
             "vae": ["--latent", "vae", "--vae", vae_file]}[latent]
    sizes = ["--width", 128, "--depth", 2, "--heads", 2, "--llm-width", 64, "--llm-depth", 1]
    line, = train(tmp_path / "r", *flags, *sizes, "--data", "builtin:synthetic", "--sample-every", 1)
    assert math.isfinite(line["loss"]) and (tmp_path / "r/samples/step-0000001.png").is_file()
    found = stage2.load_run(tmp_path / "r", CPU)
    k, m = found.config.dit, found.config.llm
    assert (k.width, k.depth, k.heads) == (128, 2, 2)
    assert (m.hidden_size, m.num_hidden_layers) == (64, 1)
    assert found.dit.x_embedder.proj.weight.shape[0] == 128 and len(found.llm.model.layers) == 1
    if latent != "siglip2":             # drawn with the run's own decoder
        draw(tmp_path / "r", tmp_path / "o.png")
        assert Image.open(tmp_path / "o.png").size == (64, 64)


def draw(run, out, *args):
    sample.main(["a cat", "--direct", "--steps", "1", "--device", "cpu", "--dtype", "float32",
                 "--run", str(run), "--out", str(out), *map(str, args)])


def test_no_null_condition(tmp_path, capsys):
    """--cond-drop 0: the parameter does not exist, the config says so, nothing is guided. final/
    also holds what the authors' slow tokenizer reads."""
    line, = train(tmp_path / "r", "--cond-drop", 0, "--data", "builtin:synthetic")
    assert line["skipped_records"] == 0
    final = tmp_path / "r/final"
    assert not [k for k in load_file(final / "ema.safetensors") if "y_embedder" in k]
    config = json.loads((final / "config.json").read_text())
    assert config["diffusion_class_dropout_prob"] == 0 and not config["scale_rae"]["dit"]["null"]
    assert {"tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
            "tokenizer_config.json", "config.json"} <= {f.name for f in final.iterdir()}
    draw(tmp_path / "r", tmp_path / "o.png")
    assert Image.open(tmp_path / "o.png").info["guidance"] == "1.0"
    with pytest.raises(UserError, match="no null condition"):
        draw(tmp_path / "r", tmp_path / "p.png", "--guidance", 3)
    train(tmp_path / "i", "--init", tmp_path / "r", "--cond-drop", 0.2, status=2)
    assert "--cond-drop 0.2: the network of --init" in capsys.readouterr().err


@pytest.mark.slow
def test_predict_x(tmp_path, encoder, capsys):
    """The last layer gives the clean latent, at first 0: the velocity is x_t / t (with JiT's bound
    on t), and the loss is that of the velocity. An unknown --predict in a config is refused."""
    source = ["builtin:synthetic"]
    line, = train(tmp_path / "r", "--predict", "x", "--data", *source)
    batch, z = first_batch(encoder, source)
    alpha = math.sqrt(48)
    t = flow.sample_time(batch["normal"], alpha)
    v = new_dit(predict="x")(flow.interpolate(z, batch["eps"], t), t, torch.zeros(1, 1, 160))
    want = flow.flow_loss(v, z, batch["eps"])[batch["answer"]].mean().item()
    x_t = flow.interpolate(z, batch["eps"], t)
    assert torch.allclose(v, x_t / t.clamp(min=0.05)[:, None, None], rtol=1e-4, atol=1e-5)
    assert line["flow"] == pytest.approx(want, rel=1e-5)
    assert stage2.load_run(tmp_path / "r", CPU).config.dit.predict == "x"
    draw(tmp_path / "r", tmp_path / "o.png")
    assert Image.open(tmp_path / "o.png").size == (64, 64)
    train(tmp_path / "init", "--init", tmp_path / "r", "--predict", "v", status=2)
    assert "--predict asks for v" in capsys.readouterr().err
    state, config = read(tmp_path / "r/final/ema.safetensors")
    config["scale_rae"]["dit"]["predict"] = "eps"
    write(tmp_path / "odd", state, config)
    train(tmp_path / "init", "--init", tmp_path / "odd", status=2)
    said = capsys.readouterr().err
    assert "predict" in said and "eps" in said and said.count("error:") == 1


def read(file):
    """Return a file's state and the config in its metadata."""
    return load_file(file), weights.open_weights(file).config


def write(folder, state, config):
    """Write a folder as a released one, with the tiny tokenizer."""
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(weights.TINY / "tokenizer.json", folder)
    return folder


def test_unknown_fields_of_a_config_are_refused(plain, tmp_path, capsys):
    state, config = read(plain[0] / "final/ema.safetensors")
    config["scale_rae"]["dit"]["sharpness"] = 2
    train(tmp_path / "r", "--init", write(tmp_path / "odd", state, config), status=2)
    assert "unknown field sharpness" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Finetuning: --init, --epochs; --init-only
# ------------------------------------------------------------------------------------------------

def test_finetuning(plain, tmp_path):
    """--init takes the EMA of a run; with a negligible learning rate the result is the same.
    --epochs: passes over finite data, rounded up; with the paper's rates."""
    out, lines = plain
    train(tmp_path / "a", "--init", out, "--init-only")
    got, want = (load_file(path) for path in (tmp_path / "a/final/model.safetensors",
                                              out / "final/ema.safetensors"))
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    recipe = ["--init", out, "--epochs", 0.01, "--lr", 5.66e-4, "--lr-llm", 5.66e-5, "--warmup",
              0.03]
    tuned = train(tmp_path / "b", *recipe, "--data", "builtin:hq")
    assert len(tuned) == math.ceil(0.01 * 600 / 4) == 2
    assert [line["lr"] for line in tuned] == pytest.approx([5.66e-4, 5.66e-4])
    assert [line["lr_llm"] for line in tuned] == pytest.approx([5.66e-5, 5.66e-5])
    assert tuned[0]["loss"] < lines[0]["loss"] - 1                      # on the same four images
    train(tmp_path / "c", *recipe, "--data", "builtin:web", status=2)   # endless


def test_a_checkpoint_is_a_model(plain, tmp_path):
    """--init and --run take checkpoints/step-N, averages first, with the run's config.json and
    tokenizer; a run without final/ stands for its newest checkpoint."""
    out, _ = plain
    step = out / "checkpoints/step-0000001"
    saved = load_file(step / "state.safetensors")
    train(tmp_path / "a", "--init", step, "--init-only")
    got = load_file(tmp_path / "a/final/model.safetensors")
    assert torch.equal(got["model.norm.weight"], saved["ema.llm.model.norm.weight"])
    assert torch.equal(got["diff_head.model.final_layer.linear.weight"],
                       saved["ema.dit.final_layer.linear.weight"])
    draw(step, tmp_path / "a.png")
    shutil.copytree(out, tmp_path / "unfinished", ignore=shutil.ignore_patterns("final"))
    draw(tmp_path / "unfinished", tmp_path / "b.png")
    draw(out, tmp_path / "c.png")                                       # its final/ is step 2's EMA
    images = [Image.open(tmp_path / f"{k}.png").tobytes() for k in "abc"]
    assert images[1] == images[2] != images[0]


def test_a_checkpoint_of_frozen_weights_is_whole(tmp_path):
    """With --freeze llm --ema 0, the LLM's weights are in the checkpoint too."""
    train(tmp_path / "r", "--freeze", "llm", "--ema", 0, "--data", "builtin:hq")
    found = stage2.load_run(tmp_path / "r/checkpoints/step-0000001", CPU)
    assert torch.equal(found.llm.model.norm.weight, new_llm().model.norm.weight)
    assert not (tmp_path / "r/final/ema.safetensors").exists()


def test_config_and_tokenizer_exist_from_the_start(tmp_path, monkeypatch):
    """A run that stops in its first step has what a reader of its checkpoints needs."""
    monkeypatch.setattr(training, "update_ema", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "r", "--data", "builtin:hq")
    config = json.loads((tmp_path / "r/config.json").read_text())
    assert config["scale_rae"]["dit"]["width"] == 160 and config["vocab_size"] == 1024
    assert (tmp_path / "r/tokenizer.json").is_file() and (tmp_path / "r/args.json").is_file()
    assert not (tmp_path / "r/final").exists()


@pytest.mark.parametrize("flags, words", [
    (["--width", 192], "--width asks for 192, the network of"),
    (["--depth", 5], "--depth asks for 5"), (["--heads", 2], "--heads asks for 2"),
    (["--size", "2b"], "--size asks for"), (["--llm-width", 64], "--llm-width asks for 64"),
    (["--llm-depth", 9], "--llm-depth asks for 9"), (["--qk-norm"], "--qk-norm asks for True"),
    (["--head-width", 240, "--head-depth", 2], "--head-width asks for 240"),
    (["--predict", "x"], "--predict asks for x"), (["--random-init"], "--random-init"),
    (["--llm", "random"], "--llm")])
def test_flags_that_contradict_init_are_errors(flags, words, plain, tmp_path, capsys):
    train(tmp_path / "r", "--init", plain[0], *flags, status=2)
    said = capsys.readouterr().err
    assert words in said and said.count("error:") == 1 and not (tmp_path / "r").exists()


@pytest.mark.parametrize("size, flag, layers, width", [
    ("2b", "random", 28, 1536), ("9b", "random", 28, 3584), ("2b", "a/hub-id", 2, 64)])
def test_the_llm_of_a_size(size, flag, layers, width, tmp_path):
    """Random weights have the size's own shapes; a located folder has those of its config."""
    (tmp_path / "config.json").write_text(json.dumps(dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=2000)))
    args = types.SimpleNamespace(size=size, llm=flag, random_init=False, cond_drop=0.1, shift=1.0,
                                 encoder="e", decoder="d", vae=None,
                                 **dict.fromkeys([*recipe.DIT_FLAGS, *recipe.LLM_FLAGS]))
    codec = types.SimpleNamespace(channels=1152, tokens=256)
    files = {"llm": weights.TINY if flag == "random" else tmp_path}
    llm = stage2.new_config(args, codec, None, TOKENIZER, files).llm
    assert (llm.num_hidden_layers, llm.hidden_size) == (layers, width)


def test_flags_that_agree_with_init_are_fine(plain, tmp_path, capsys):
    """--width of the model itself; another --shift is taken and said."""
    train(tmp_path / "a", "--init", plain[0], "--size", "tiny", "--width", 160, "--init-only")
    assert "was trained with" not in capsys.readouterr().err
    train(tmp_path / "b", "--init", plain[0], "--shift", 3, "--init-only")
    said = capsys.readouterr().err
    assert "was trained with --shift 6.92820" in said and "this run takes 3.0" in said
    assert stage2.load_run(tmp_path / "b", CPU).config.alpha == 3


def test_init_only_writes_initial_weights(tmp_path):
    train(tmp_path / "r", "--init-only")
    assert not weights.checkpoints(tmp_path / "r")
    for name in ("model", "ema"):
        state = load_file(tmp_path / f"r/final/{name}.safetensors")
        for key, value in new_llm().named_parameters():
            assert torch.equal(state[key], value), key
        for key, value in new_dit().named_parameters():
            assert torch.equal(state[weights.DIT + key], value), key
    draw(tmp_path / "r", tmp_path / "o.png")                            # noise, but an image


def test_a_run_knows_its_own_encoder_and_decoder(tmp_path, monkeypatch, capsys):
    """Found from any folder; a pair that does not belong together is named at training, drawing and
    finetuning."""
    state, config = read(weights.TINY / "decoder.safetensors")
    shutil.copy(weights.TINY / "encoder.safetensors", tmp_path / "enc.safetensors")
    save_file(state, tmp_path / "dec.safetensors", metadata={"config": json.dumps(
        dict(config, encoder=str(tmp_path / "enc.safetensors")))})
    monkeypatch.chdir(tmp_path)
    train("a", "--encoder", "enc.safetensors", "--init-only")
    note = f"was trained for the encoder tiny/encoder.safetensors, this one is {tmp_path}/enc"
    assert note in capsys.readouterr().err
    train("b", "--encoder", "enc.safetensors", "--decoder", "dec.safetensors", "--init-only")
    assert "note" not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "a")
    for name, decoder in (("a", "tiny/decoder.safetensors"), ("b", f"{tmp_path}/dec.safetensors")):
        found = json.loads((tmp_path / name / "final/config.json").read_text())
        assert found["mm_vision_tower_aux_list"] == [f"{tmp_path}/enc.safetensors"]
        assert found["scale_rae"]["decoder"] == decoder
        draw(tmp_path / name, tmp_path / "o.png")
        assert (note in capsys.readouterr().err) == (name == "a")
    train("c", "--init", tmp_path / "b", "--decoder", tmp_path / "a/none", status=2)
    other = ROOT / "tiny/decoder.safetensors"
    train("c", "--init", tmp_path / "b", "--decoder", other, "--init-only")
    said = capsys.readouterr().err
    assert f"was trained with --decoder {tmp_path}/dec.safetensors, this run takes" in said
    state, config = read(tmp_path / "b/final/ema.safetensors")
    config["scale_rae"]["decoder"] = None
    save_file(state, tmp_path / "b/final/ema.safetensors",
              metadata={"config": json.dumps(config)})
    with pytest.raises(UserError, match="names no decoder; give --decoder"):
        draw(tmp_path / "b", tmp_path / "o.png")


# ------------------------------------------------------------------------------------------------
# Optimizers
# ------------------------------------------------------------------------------------------------

def test_a_checkpoint_holds_the_buffers_of_a_fork(tmp_path, monkeypatch):
    """A statistic that a fork counts in a buffer goes on after a resumption."""
    init, forward = DiT.__init__, DiT.forward

    def counting(self, *inputs):
        self.steps_bias += self.training
        return forward(self, *inputs)

    monkeypatch.setattr(DiT, "__init__", lambda self, *arguments: (
        init(self, *arguments), self.register_buffer("steps_bias", torch.zeros(1)))[0])
    monkeypatch.setattr(DiT, "forward", counting)
    flags = ["--data", "builtin:hq", "--steps", 2, "--save-every", 1]
    train(tmp_path / "r", *flags)
    shutil.rmtree(tmp_path / "r/checkpoints/step-0000002")
    train(tmp_path / "r", *flags)
    assert last_state(tmp_path / "r")["dit.steps_bias"] == 2


def test_muon(tmp_path):
    """Muon for the DiT's matrices, AdamW for everything else; a resumed run is identical."""
    flags = ["--data", "builtin:hq", "--optimizer", "muon", "--steps", 4, "--save-every", 2,
             "--width", 100, "--depth", 1, "--heads", 5, "--log-every", 1]
    whole = train(tmp_path / "a", *flags)
    state = last_state(tmp_path / "a")
    muon = {k.split(".", 1)[1].removesuffix(".momentum_buffer") for k in state
            if k.endswith("momentum_buffer")}
    adam = {k.split(".", 1)[1].removesuffix(".exp_avg") for k in state if k.endswith(".exp_avg")}
    named = {k: v for k, v in state.items() if k.startswith(("dit.", "llm.")) and "pos_" not in k}
    assert muon == {k for k, v in named.items() if k.startswith("dit.dit_blocks.") and v.dim() == 2}
    assert muon and adam == named.keys() - muon
    assert losses(whole)[3] < losses(whole)[0]
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a/checkpoints/step-0000002",
                    tmp_path / "b/checkpoints/step-0000002")
    assert losses(train(tmp_path / "b", *flags)) == losses(whole)[2:]
    again = last_state(tmp_path / "b")
    assert again.keys() == state.keys() and all(torch.equal(again[k], state[k]) for k in state)
    for name in ("model", "ema"):
        a, b = ((tmp_path / r / f"final/{name}.safetensors").read_bytes() for r in "ab")
        assert a == b


# ------------------------------------------------------------------------------------------------
# Long runs
# ------------------------------------------------------------------------------------------------

def test_updates_that_are_not_finite(tmp_path, monkeypatch, capsys):
    """Skipped, counted, and logged with the samples' keys; ten in a row stop the run."""
    states, real = [], parallel.clip_grad

    def clip(parameters, *rest):                        # a gradient that is not a number, at times
        parameters = list(parameters)
        states.append([p.detach().clone() for p in parameters])
        if len(states) == 2 or len(states) > 3:
            parameters[-1].grad.view(-1)[0] = math.nan
        return real(parameters, *rest)
    monkeypatch.setattr(parallel, "clip_grad", clip)
    lines = train(tmp_path / "r", "--steps", 20, "--data", "builtin:hq", status=2)
    assert [line["skipped_updates"] for line in lines] == [0, 1, 1, *range(2, 11)]
    assert lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0      # JSON has no nan
    assert len(lines[1]["skipped_samples"]) == 4 and "skipped_samples" not in lines[2]
    assert all(k.startswith("builtin:hq/") for k in lines[1]["skipped_samples"])
    same = [all(map(torch.equal, a, b)) for a, b in zip(states, states[1:])]
    assert same == [False, True, False] + [True] * 9                        # 13 steps were tried
    said = capsys.readouterr().err
    assert said.count("error: ten steps in a row") == 1 and "step 13" in said and "--lr" in said
    assert "samples builtin:hq/" in said and "Traceback" not in said


def test_muon_skips_updates_that_are_not_finite(monkeypatch):
    p = torch.nn.Parameter(torch.eye(4))
    optimizer = torch.optim.Muon([p], lr=0.1, weight_decay=0.0)
    for norm, moved in ((math.nan, False), (1.0, True)):
        p.grad = torch.ones(4, 4)
        parallel.guarded_step(optimizer, torch.tensor(norm), CPU)
        assert (not torch.equal(p, torch.eye(4))) == moved


def test_wandb_is_optional(tmp_path, monkeypatch, capsys):
    """A stand-in package records what it gets; without one, the error says what to do."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(checkpoint.importlib.util, "find_spec", lambda name: None)
    train(tmp_path / "a", "--wandb", "rae", status=2)
    assert "--wandb rae: the wandb package is not installed; pip" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "wandb.py").write_text("""
told = []

class Run:
    def log(self, values, step):
        told.append((step, values["loss"]))

    def finish(self):
        told.append("finished")

def init(**options):
    told.append(options)
    return Run()
""")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    lines = train(tmp_path / "b", "--wandb", "rae", "--steps", 2)
    told = sys.modules.pop("wandb").told
    assert told[0]["project"] == "rae" and told[0]["config"]["steps"] == 2
    assert told[1:-1] == [(line["step"], line["loss"]) for line in lines] and told[-1] == "finished"
    assert told[0]["id"] == (tmp_path / "b/wandb-id").read_text() and told[0]["resume"] == "allow"


def test_samples_and_exports_are_the_average(tmp_path):
    """The sample grid of the last step against final/ema.safetensors; both files under their
    names. The colours are counted on shapes of another seed than the training's."""
    seeds, real = [], judge.single_shapes
    with pytest.MonkeyPatch.context() as m:
        m.setattr(judge, "single_shapes", lambda seed, n: (seeds.append(seed), real(seed, 2))[1])
        train(tmp_path / "r", "--data", "builtin:synthetic", "--steps", 2, "--warmup", 0, "--seed",
              5, "--sample-every", 2, "--sample-steps", 2, "--guidance", 2)
    assert seeds and 5 not in seeds
    saved, final = last_state(tmp_path / "r"), tmp_path / "r/final"
    for name, prefix in (("model", ""), ("ema", "ema.")):
        state = load_file(final / f"{name}.safetensors")
        assert torch.equal(state["model.norm.weight"], saved[f"{prefix}llm.model.norm.weight"])
    assert not torch.equal(saved["llm.model.norm.weight"], saved["ema.llm.model.norm.weight"])
    run = stage2.load_run(tmp_path / "r", CPU)
    encoder, decoder = stage2.load_codec(
        run.config, type("Args", (), dict(run="", encoder=None, decoder=None)), CPU)
    noise = torch.stack([flow.noise_for(prompt, 0, 64, 96) for prompt in judge.FIXED])
    with torch.no_grad():
        cond = text_model.direct_condition(run.llm, run.tokenizer, judge.FIXED, "cpu")
        z = flow.sample(run.dit, cond, noise, math.sqrt(64 * 96 / 128), 2, 2.0)
        training.save_captioned(decoder(z), judge.FIXED, tmp_path / "grid.png")
    grids = [np.asarray(Image.open(p)).astype(int)
             for p in (tmp_path / "grid.png", tmp_path / "r/samples/step-0000002.png")]
    assert np.abs(grids[0] - grids[1]).max() <= 1 and grids[0].std() > 10


# ------------------------------------------------------------------------------------------------
# Plans, defaults, the meter
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, latent, alpha, parameters", [
    (["--size", "2.4B"], [256, 1152], math.sqrt(72), 2.4359e9),
    (["--size", "2b", "--latent", "webssl"], [256, 1024], 8.0, None),
    (["--size", "0.5b", "--latent", "vae", "--shift", "none"], [256, 64], 1.0, None)])
def test_dry_run(flags, latent, alpha, parameters, capsys):
    """Shapes alone: the latent, its shift, the mixture; the 2.4B's parameters and FLOPs."""
    assert call("--dry-run", "--json", *flags, "--data", "builtin:web=3", "builtin:qa") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["latent"] == latent and told["alpha"] == pytest.approx(alpha)
    total = told["parameters"].pop("total")
    assert sum(told["parameters"].values()) == total
    assert [round(s["weight"], 2) for s in told["data"]] == [0.75, 0.25]
    if parameters:
        assert told["parameters"]["dit"] == pytest.approx(parameters, rel=1e-4)
        assert told["train_tflop_per_image"]["dit"] == pytest.approx(3.787, rel=1e-2)


def test_dry_run_needs_no_data(tmp_path, capsys):
    assert call("--dry-run", "--json", "--data", tmp_path / "none", "--out", tmp_path / "r") == 0
    said = capsys.readouterr()
    assert "planned without the data" in said.err and "none" in said.err
    assert json.loads(said.out)["latent"] == [64, 96] and not (tmp_path / "r").exists()


@pytest.mark.parametrize("flags, want", [(["--latent", "vae"], ("squash", 1)),
                                         (["--latent", "webssl"], ("center", 3))])
def test_images_are_prepared_as_the_network_was_trained(flags, want, monkeypatch):
    """The crop is the understanding encoder's, the filter that of the network with the latent."""
    made, real = [], data.Mixture
    monkeypatch.setattr(data, "Mixture", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    assert call("--size", "0.5b", "--allow-narrow", "--dry-run", *flags, "--data",
                "builtin:web") == 0
    assert (made[0].crop, made[0].resample) == want


def defaults(*argv):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["train_dit.py", *argv])
        args = train_dit.arguments()
    train_dit.fill_defaults(args, None)
    return args


def test_defaults_are_the_paper_s():
    a = defaults("--size", "2.4B")
    assert (a.size, a.steps, a.batch, a.lr, a.lr_llm) == ("2b", 30_000, 2048, 5e-4, 5e-5)
    assert (a.warmup, a.ema, a.clip, a.cond_drop) == (0.0134, 0.9999, 1.0, 0.1)
    assert (a.betas, a.betas_llm, a.diffusion_weight) == ([0.9, 0.95], [0.9, 0.999], 2.0)
    assert (a.shift, a.shift_base, a.remat, a.optimizer) == ("auto", 4096, "block", "adamw")
    a = defaults()
    assert (a.size, a.latent, a.guidance, a.encoder) == ("tiny", "siglip2", 3.0,
                                                         "tiny/encoder.safetensors")
    assert defaults("--cond-drop", "0").guidance == 1.0


def test_logged_averages_are_over_the_steps_that_have_the_value():
    meter = training.Meter()
    for values in (dict(a=1.0), dict(a=3.0, b=5.0), dict(a=5.0)):
        meter.add(**{k: torch.tensor(v) for k, v in values.items()})
        meter.step(4, 1.0)
    values = meter.read(CPU)
    assert (values["a"], values["b"]) == (3, 5)


# ------------------------------------------------------------------------------------------------
# Overfit, and the expected curve
# ------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_overfit(tmp_path):
    """What --help states."""
    lines = train(tmp_path / "r", "--overfit", "--steps", 60, "--lr", 3e-3, "--lr-llm", 3e-3)
    assert lines[0]["loss"] > 10 and lines[-1]["loss"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["same", "fresh"])
def test_a_resumed_overfit_takes_the_same_batch(noise, tmp_path):
    """The same four images; with `fresh`, new times and noise in each step."""
    options = "--overfit", noise, "--save-every", 2, "--batch", 4, "--micro-batch", 2
    whole = train(tmp_path / "a", *options, "--steps", 4, "--lr", 1e-12, "--lr-llm", 1e-12)
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a/checkpoints/step-0000002", tmp_path / "b/checkpoints/step-0000002")
    resumed = train(tmp_path / "b", *options, "--steps", 4, "--lr", 1e-12, "--lr-llm", 1e-12)
    assert [line["step"] for line in resumed] == [3, 4]
    assert losses(resumed) == losses(whole)[2:]
    assert len({line["text"] for line in whole}) == 1
    assert len({line["flow"] for line in whole}) == (4 if noise == "fresh" else 1)


CURVE = ROOT / "tests/expected/train_dit.json"
TOLERANCE = dict(loss=2e-6, text=2e-6, flow=2e-6, grad_norm=2e-5, cond_spread=5e-4)
HYPER_PARAMETERS = ("size", "batch", "steps", "seed", "lr", "lr_llm", "betas", "betas_llm",
                    "warmup", "clip", "ema", "shift", "shift_base", "cond_drop",
                    "diffusion_weight", "data")


def curve(out):
    """Return the values of the eight steps, and the hyper-parameters in use."""
    lines = train(out, "--batch", 8, "--steps", 8)
    args = json.loads((out / "args.json").read_text())
    used = {k: args[k] for k in HYPER_PARAMETERS}
    return ([{k: line[k] for k in ("step", *TOLERANCE)} for line in lines],
            {**used, "adam_eps": 1e-8, "clip_eps": 1e-6, "weight_decay": 0.0})


def test_expected_curve(tmp_path):
    """Within the tolerances of the file, which a right port reaches too. The spread is one less a
    sum that is nearly one, so its rounding is larger: 1.8e-4 between one and two processes."""
    want = json.loads(CURVE.read_text())
    got, used = curve(tmp_path / "r")
    assert want["tolerance"] == TOLERANCE and want["hyper_parameters"] == used
    assert len(got) == len(want["steps"]) == 8
    for a, b in zip(got, want["steps"]):
        for key, tolerance in TOLERANCE.items():
            assert a[key] == pytest.approx(b[key], rel=tolerance), (key, a, b)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python {sys.argv[0]} --write")
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        rows, used = curve(Path(folder) / "run")
    command = "train_dit.py --device cpu --dtype float32 --batch 8 --steps 8 --log-every 1"
    head = {"command": command, "tolerance": TOLERANCE, "hyper_parameters": used}
    CURVE.write_text("{\n" + "".join(f" {json.dumps(k)}: {json.dumps(v)},\n"
                                     for k, v in head.items())
                     + ' "steps": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n")
    print(CURVE)
