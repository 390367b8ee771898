"""Numbers worked out by hand or by another library, where other tests hold the code against itself
(a run resumed against a run whole, a saving against the plain form): a wrong sign or a swapped pair
that is the same on both sides shows here. Each one kills a one-line change that the others let by.
"""
import collections
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import benchmark
import data
import decoder as decoders
import discriminator as gans
import dit as dits
import encoder as encoders
import flow
import parallel
import run as runs
import sample
import text_model as text
import train_decoder
import train_dit
import train_encoder
import vae as vaes
import weights
import networks
import world
from test_stage1 import SMALL, call, first_batch, lines, options, state

torch.set_num_threads(1)
CPU = parallel.setup("cpu", "float32")


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------

def test_sizes_are_those_of_the_paper():
    """Width, depth and heads; the heads change neither counts nor FLOPs."""
    assert {k: (s.width, s.depth, s.heads) for k, s in dits.SIZES.items() if k != "tiny"} == {
        "0.5b": (1280, 16, 32), "2b": (2048, 32, 32), "3b": (2304, 32, 32), "5b": (3072, 32, 32),
        "9b": (4096, 32, 32)}
    assert dits.PAPER_NAMES == {"0.5B": "0.5b", "2.4B": "2b", "3.3B": "3b", "3.1B": "3b",
                                "5.5B": "5b", "9.8B": "9b"}
    assert {k: v for k, v in decoders.SIZES.items() if k != "tiny"} == {
        "b": (12, 768, 12, 3072), "l": (24, 1024, 16, 4096), "xl": (28, 1152, 16, 4096)}


def test_defaults_of_stage_2_are_the_paper_s(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_dit.py", "--size", "2b"])
    a = train_dit.arguments()
    assert (a.steps, a.batch, a.lr, a.lr_llm) == (30_000, 2048, 5e-4, 5e-5)
    assert (a.warmup, a.ema, a.clip, a.cond_drop) == (0.0134, 0.9999, 1.0, 0.1)
    assert (a.betas, a.betas_llm, a.diffusion_weight) == ([0.9, 0.95], [0.9, 0.999], 2.0)
    assert (a.shift, a.shift_base, a.remat) == ("auto", 4096, "block")


def test_what_a_resumption_may_change():
    """Nothing that changes what is computed."""
    assert runs.FREE == {
        "out", "fresh", "workers", "device", "compile", "log_every", "sample_every", "save_every",
        "keep", "wandb", "dry_run", "bench", "json", "mesh", "sample_steps", "guidance", "decoder",
        "export", "scan", "remat"}


@pytest.mark.parametrize("name, peak", [("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H200", 989.4),
                                        ("NVIDIA H100 PCIe", 756.5), ("NVIDIA A100-SXM4", 312),
                                        ("Some GPU", None)])
def test_mfu_is_of_all_devices(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(parallel, "memory_gb", lambda devices: 0.0)
    gpus = parallel.Devices("cuda", torch.device("cpu"), 0, 1, torch.bfloat16,
                            {"fsdp": 4, "tensor": 2})
    assert parallel.peak_tflops(gpus) == peak
    meter = runs.Meter()
    meter.add(loss=torch.tensor(1.0))
    meter.step(10, 2e12)
    values = meter.read(gpus)
    assert values["mfu"] == (pytest.approx(values["tflops"] / 8 / peak) if peak else None)
    assert values["tflops"] == pytest.approx(2 * values["images_per_s"])


# ------------------------------------------------------------------------------------------------
# Attention, heads, images
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("module", [dits, text, encoders, decoders], ids=lambda m: m.__name__)
def test_attention_in_bf16_is_that_in_fp32(module):
    """The form that a CPU takes in bf16, against torch's, causal in the language model."""
    q, k, v = torch.randn(3, 2, 4, 24, 16, generator=torch.Generator().manual_seed(0))
    want = F.scaled_dot_product_attention(2 * q, k, v, is_causal=module is text)
    q, k, v = (x.bfloat16() for x in (2 * q, k, v))
    if module is encoders:                              # takes [B,L,C]
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
        got = module.attention(q, k, v, 4).unflatten(-1, (4, -1)).transpose(1, 2)
    else:
        got = module.attention(q, k, v)
    assert (got.float() - want).abs().max() < 0.03 and want.std() > 0.3


def test_qk_norm_is_of_both():
    torch.manual_seed(0)
    attention, x = dits.Attention(32, 4, qk_norm=True), torch.randn(2, 9, 32)
    q, k, v = attention.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    q, k = (y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    y = (q @ k.mT / 8 ** 0.5).softmax(-1) @ v
    want = attention.proj(y.transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x, lambda t: t), want, atol=1e-6)


@pytest.mark.parametrize("kind", ["siglip2", "dinov2"])
def test_layers_sum_the_last_blocks(kind):
    """The outputs of the last two blocks, read by hooks; and pictures of another size are resized
    bicubically."""
    torch.manual_seed(0)
    if kind == "siglip2":
        net = encoders.SigLIP2(encoders.TINY, layers=2)
        stack, start = net.vision_model.encoder.layers, 0
        norm = lambda x: F.layer_norm(x, x.shape[-1:], eps=1e-6)
    else:
        config = {**encoders.WEBSSL_300M, "hidden_size": 32, "num_hidden_layers": 3,
                  "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        net = encoders.DINOv2(config, layers=2)
        stack, start, norm = net.encoder.layer, 1, net.layernorm
    encoders.init_weights(net, 0)
    seen = []
    for block in stack:
        block.register_forward_hook(lambda block, inputs, out: seen.append(out))
    x = torch.rand(2, 3, net.image_size, net.image_size)
    with torch.no_grad():
        z = net(x)
        assert torch.allclose(z, norm(seen[-1] + seen[-2])[:, start:], atol=1e-5)
        large = torch.rand(2, 3, 96, 96)
        small = F.interpolate(large, [net.image_size] * 2, mode="bicubic", align_corners=False)
        assert torch.allclose(net(large), net(small), atol=1e-4)


def test_decoder_undoes_the_encoder_s_normalisation():
    """x std + mean, by channel: at 0.5 and 0.5 the two could be exchanged."""
    config = decoders.decoder_config("tiny", 96, 64, 8, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    model, z = decoders.Decoder(config), torch.randn(2, 64, 96)
    decoders.init_weights(model, 0)
    with torch.no_grad():
        x = model.unpatchify(model.patches(z))
        want = torch.stack([x[:, 0] * 0.4 + 0.1, x[:, 1] * 0.5 + 0.2, x[:, 2] * 0.6 + 0.3], 1)
        assert torch.allclose(model(z), want, atol=1e-6)


def test_vae_is_measured_and_its_posterior_clamped():
    """The scale is that of draws, not of means."""
    torch.manual_seed(0)
    vae, x = vaes.VAE(vaes.TINY), torch.rand(64, 3, 16, 16)
    with torch.no_grad():
        vae.encoder.conv_out.bias[16:] = 0.5                # log variances
        vae.scale, vae.shift = (vae.measure([x])[k] for k in ("scaling_factor", "shift_factor"))
        z = vae.encode(x, torch.Generator().manual_seed(1))
        assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
        vae.encoder.conv_out.bias[16:] = 99
        assert vae.posterior(x)[1].max() == 20
        vae.encoder.conv_out.bias[16:] = -99
        assert vae.posterior(x)[1].min() == -30


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_turn_of_a_camera(turn, tmp_path):
    """EXIF's eight orientations, as Pillow turns them."""
    image = Image.fromarray(np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3)
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        want = np.array(ImageOps.exif_transpose(opened))
        assert np.array_equal(np.array(data.upright_rgb(opened)), want)


def test_pngs_are_rounded_and_compat_ones_cut(tmp_path):
    x = torch.full((3, 2, 2), 100.7 / 255)
    for schedule, value in (("clean", 101), ("compat", 100)):
        sample.save_png(x, tmp_path / "a.png", schedule=schedule)
        assert (np.asarray(Image.open(tmp_path / "a.png")) == value).all()
    runs.save_grid(torch.arange(6)[:, None, None, None].expand(6, 3, 4, 4) / 10,
                   tmp_path / "grid.png", columns=4)
    grid = np.asarray(Image.open(tmp_path / "grid.png"))[..., 0] / 25.5
    assert grid.shape == (14, 26)                           # row by row: 0 1 2 3, then 4 5
    assert np.allclose(grid[4, [4, 10, 16, 22]], range(4), atol=0.03)
    assert np.allclose(grid[10, [4, 10, 16]], [4, 5, 10], atol=0.03)


# ------------------------------------------------------------------------------------------------
# Flow and sampling
# ------------------------------------------------------------------------------------------------

def test_the_default_schedule_is_shifted():
    pairs = flow.schedule_pairs("clean", 4, 8.0)
    assert [a for a, _ in pairs] == pytest.approx([1, 24 / 25, 8 / 9, 8 / 11])
    assert [b for _, b in pairs] == pytest.approx([24 / 25, 8 / 9, 8 / 11, 0])
    assert flow.clean_schedule(4, 1.0).tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_noise_is_of_prompt_and_seed():
    a, b, c = (flow.noise_for(*key, 4, 3) for key in (("a", 0), ("b", 0), ("a", 1)))
    assert not torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a, flow.noise_for("a", 0, 4, 3)) and abs(a.std() - 1) < 0.5


def test_draws_are_of_the_seed():
    """t, noise and drop of train_dit.py."""
    tokenizer = text.load_tokenizer(weights.ASSETS)
    records = [data.Mixture(["builtin:web"], 8)[0]]
    one, two, again = (train_dit.Collate(tokenizer, 4, 3, s, 0.1)(records) for s in (5, 6, 5))
    for key in ("normal", "eps"):
        assert torch.equal(one[key], again[key]) and not torch.equal(one[key], two[key])


def test_the_model_opens_the_image_where_training_has_it():
    """The shipped model writes its answer; the queries then stand where `direct_condition` puts
    them in one prefill."""
    llm, _, tokenizer, _ = weights.load_model(weights.ASSETS, CPU)
    *said, condition = sample.answer(llm, tokenizer, "a red circle on a white background")
    assert "".join(said) == "Here you go:\n"
    direct = text.direct_condition(llm, tokenizer, ["a red circle on a white background"], "cpu")
    assert condition.shape == direct.shape and (condition - direct).abs().max() < 1e-4
    assert direct.std() > 0.1


def test_the_shipped_model_draws_what_it_is_told(tmp_path, monkeypatch):
    """Single shapes, which it draws right nearly always: three of four pictures must pass."""
    monkeypatch.chdir(tmp_path)
    passed = 0
    for colour, kind, on in (("red", "circle", "white"), ("blue", "square", "pink"),
                             ("green", "heart", "beige"), ("yellow", "star", "black")):
        words = f"a {colour} {kind} on a {on} background"
        monkeypatch.setattr(sys, "argv", ["sample.py", words, "--steps", "10", "--guidance", "3",
                                          "--dtype", "float32", "--device", "cpu", "--direct"])
        sample.main()
        x = torch.from_numpy(np.array(Image.open("out.png"))).permute(2, 0, 1) / 255
        scene = world.Scene(("plain", on), (world.Thing(kind, colour, 0.5, 0.5, 0.5),))
        passed += benchmark.judge(x, benchmark.everything(scene))[0]
    assert passed >= 3


def test_what_training_draws_and_exports_is_the_average(tmp_path, monkeypatch):
    """The sample grid of the last step against final/ema.safetensors; both files under their names."""
    out = tmp_path / "run"
    call(train_dit, *SMALL, "--data", "builtin:synthetic", "--steps", "2", "--warmup", "0",
         "--sample-every", "2", "--sample-steps", "2", "--guidance", "2", "--out", out)
    saved, key = state(out, 2), "llm.model.norm.weight"
    for ema, prefix in ((False, ""), (True, "ema.")):
        llm, dit, tokenizer, _ = weights.load_model(out, CPU, ema=ema)
        assert torch.equal(llm.model.norm.weight, saved[prefix + key])
    assert not torch.equal(saved[key], saved[f"ema.{key}"])
    encoder = networks.load_encoder(weights.TINY_CODEC[0], CPU)
    decoder = networks.load_decoder(weights.TINY_CODEC[1], CPU, 96, encoder.mean, encoder.std)
    noise = torch.stack([torch.randn(64, 96, generator=torch.Generator().manual_seed(i))
                         for i in range(len(benchmark.FIXED))])
    with torch.no_grad():
        cond = text.direct_condition(llm, tokenizer, benchmark.FIXED, "cpu")
        z = flow.generate(dit, cond, noise, math.sqrt(64 * 96 / 128), 2, 2.0)
        runs.save_grid(decoder(z), tmp_path / "grid.png")
    grids = [np.asarray(Image.open(p)).astype(int)
             for p in (tmp_path / "grid.png", out / "samples/step-0000002.png")]
    assert np.abs(grids[0] - grids[1]).max() <= 1 and grids[0].std() > 20


# ------------------------------------------------------------------------------------------------
# Stage 1
# ------------------------------------------------------------------------------------------------

def test_augment_by_hand():
    """Translation by an eighth with grey, brightness, saturation, contrast, one at a time."""
    x = torch.zeros(1, 3, 8, 8)
    x[:, 0, :, :4], x[:, 1] = 1.0, 0.25                     # two colours
    none = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5]])        # the middle of every range
    assert torch.allclose(gans.augment(x, none), x, atol=1e-6)

    def one(column, value):
        draws = none.clone()
        draws[0, column] = value
        return gans.augment(x, draws)
    down = torch.cat([torch.full_like(x[:, :, :1], 0.5), x[:, :, :-1]], 2)
    right = torch.cat([torch.full_like(x[..., :1], 0.5), x[..., :-1]], 3)
    assert torch.allclose(one(0, 0.0), down, atol=1e-6)
    assert torch.allclose(one(1, 0.0), right, atol=1e-6)
    assert torch.allclose(one(2, 0.9), x + 0.2, atol=1e-6)  # 0.4 in [-1,1]
    grey, mean = x.mean(1, keepdim=True), x.mean()
    assert torch.allclose(one(3, 0.1), grey + 0.2 * (x - grey), atol=1e-6)
    assert torch.allclose(one(4, 0.9), mean + 1.4 * (x - mean), atol=1e-6)


@pytest.mark.parametrize("dist, mean, std", [
    ("half-normal", 0.2 * math.sqrt(2 / math.pi), 0.2 * math.sqrt(1 - 2 / math.pi)),
    ("uniform", 0.1, 0.2 / math.sqrt(12))])
def test_strength_of_the_latent_noise(dist, mean, std):
    strength = train_decoder.latent_noise(range(2000), 0, (16, 32), 0.2, dist).std((1, 2))
    assert strength.mean() == pytest.approx(mean, rel=0.06)
    assert strength.std() == pytest.approx(std, rel=0.08)


@pytest.fixture(scope="module")
def long_run(nets, tmp_path_factory):
    """Four steps with every option that is off by default."""
    out = tmp_path_factory.mktemp("by hand") / "run"
    with pytest.MonkeyPatch.context() as m:
        adamw, given = parallel.adamw, []
        m.setattr(parallel, "adamw", lambda *a, **o: (given.append(o), adamw(*a, **o))[1])
        call(train_decoder, *SMALL, *nets, "--l1", "0.5", "--lpips", "1", "--gram", "100", "--gan",
             "0.5", "--gram-layers", "1", "3", "--disc-loss", "vanilla", "--noise-tau", "0.5",
             "--steps", "4", "--warmup", "1", "--warmup-disc", "1", "--disc-start", "2",
             "--gan-start", "4", "--out", out)
    assert [o["weight_decay"] for o in given] == [0, 0]
    return out


def test_terms_of_the_decoder_s_loss_have_their_options(long_run, nets):
    """The first step, by hand: noise in the latent, half of L1, two of Gram's layers."""
    args = options(*nets, "--lpips", "1", "--gram", "100", "--gan", "0.5")
    encoder, vgg, _, _ = train_decoder.networks(args, CPU)
    model = decoders.Decoder(decoders.decoder_config("tiny", 96, 64, 8, encoder.mean, encoder.std))
    decoders.init_weights(model, 0)
    x = first_batch()["images"].float() / 255
    noise = train_decoder.latent_noise(range(4), 0, (64, 96), 0.5, "half-normal")
    x_hat = model(encoder(x) + noise)
    maps, truth = vgg.maps(x_hat), vgg.maps(x)
    l1, lpips = (x_hat - x).abs().mean(), vgg.lpips(maps, truth).mean()
    gram = vgg.gram(maps, truth, [1, 3]).mean()
    loss = 0.5 * l1 + lpips + 100 * gram
    loss.backward()
    line, saved = lines(long_run)[0], state(long_run, 1)
    for key, value in dict(l1=l1, lpips=lpips, gram=gram, loss=loss).items():
        assert line[key] == pytest.approx(value.item(), rel=1e-4), key
    for name, p in model.named_parameters():
        if p.requires_grad:
            first = saved[f"optimizer.{name}.exp_avg"] * 10
            assert (first - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6, name


def test_the_discriminator_judges_clean_reconstructions(long_run, nets):
    """Its first step: the vanilla loss, on what the updated decoder makes of the latent without
    noise."""
    args = options(*nets, "--gan", "0.5")
    encoder, _, disc, _ = train_decoder.networks(args, CPU)
    model = decoders.Decoder(decoders.decoder_config("tiny", 96, 64, 8, encoder.mean, encoder.std))
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in state(long_run, 3).items() if k in own}, strict=False)
    mixture = data.Mixture(train_decoder.DATA, 64, 0, crop="random", text=False)
    batch = train_decoder.Collate()([mixture[8 + i] for i in range(4)])
    x = batch["images"].float() / 255
    with torch.no_grad():
        fake = (model(encoder(x)).clamp(0, 1) * 255).round() / 255
        disc.train()
        real, fake = disc(torch.cat([gans.augment(x, batch["real_d"]),
                                     gans.augment(fake, batch["fake_d"])])).chunk(2)
        loss = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    line = lines(long_run)[2]
    assert line["disc"] == pytest.approx(loss.item(), rel=1e-5)


def test_schedules_of_decoder_and_discriminator(long_run):
    """Cosine to the final rates; the discriminator's begins with it."""
    a = options()

    def rate(k, steps, first, last):                        # after one step of warm-up
        return last + (first - last) * (1 + math.cos(math.pi * max(0, k - 1) / (steps - 1))) / 2
    seen = lines(long_run)
    assert a.lr_final > 0 and a.lr_disc_final > 0
    assert [s["lr"] for s in seen] == pytest.approx(
        [rate(k, 4, a.lr, a.lr_final) for k in range(4)], abs=1e-7)
    assert [s.get("lr_disc") for s in seen] == [None, None, pytest.approx(a.lr_disc, abs=1e-7),
                                                pytest.approx(a.lr_disc, abs=1e-7)]


def test_averages_of_the_decoder_and_what_is_exported(long_run):
    """ema += w (p - ema), w = 1 - min(decay, (1 + step) / (10 + step)), 0.9 at first; final/ has
    both under their own names; the pictures it is measured on are of another seed, and drawn by the
    average."""
    assert runs.ema_weight(0.998, 0) == pytest.approx(0.9)
    assert runs.ema_weight(0.998, 10 ** 6) == pytest.approx(0.002)
    one, two, last = (state(long_run, k) for k in (1, 2, 4))
    key = "decoder_pred.weight"
    assert torch.allclose(two[f"ema.{key}"], one[f"ema.{key}"].lerp(two[key], 9 / 11), atol=1e-7)
    for name, prefix in (("model", ""), ("ema", "ema.")):
        found = load_file(long_run / f"final/{name}.safetensors")
        assert torch.equal(found[key], last[prefix + key])
    assert not torch.equal(last[key], last[f"ema.{key}"])
    encoder = networks.load_encoder(weights.TINY_CODEC[0], CPU)
    model = networks.load_decoder(long_run / "final/ema.safetensors", CPU, 96, encoder.mean,
                                 encoder.std)
    mixture = data.Mixture(train_decoder.DATA, 64, 1000, crop="center", text=False)
    x = torch.stack([torch.from_numpy(mixture[i]["image"]) for i in range(64)])
    x = x.permute(0, 3, 1, 2) / 255                         # [B,3,S,S]
    with torch.no_grad():
        off = (x - (model(encoder(x)).clamp(0, 1) * 255).round() / 255).square().mean((1, 2, 3))
    assert lines(long_run)[-1]["psnr"] == pytest.approx((-10 * off.log10()).mean().item(), abs=1e-3)


def test_kl_reaches_the_vae(tmp_path):
    """Its weight times 0.5 (mean^2 + var - 1 - log var), in the loss and in the first gradient."""
    out = tmp_path / "run"
    call(train_decoder, *SMALL, "--latent", "vae", "--lpips", "0", "--gram", "0", "--gan", "0",
         "--kl", "0.01", "--steps", "1", "--out", out)
    torch.manual_seed(0)
    vae, x = vaes.VAE(vaes.TINY), first_batch()["images"].float() / 255
    mean, logvar = vae.posterior(x)
    noise = train_decoder.gaussian(range(4), 0, mean.shape[1:])
    x_hat = (vae.decoder(mean + (logvar / 2).exp() * noise) + 1) / 2
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
    loss = (x_hat - x).abs().mean() + 0.01 * kl
    loss.backward()
    line, saved = lines(out)[0], state(out, 1)
    assert line["kl"] == pytest.approx(kl.item(), rel=1e-4) and kl > 1
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-4)
    name = "encoder.conv_out.weight"
    first = saved[f"optimizer.{name}.exp_avg"] * 10
    assert (first - vae.encoder.conv_out.weight.grad).norm() < 1e-3 * first.norm()


# ------------------------------------------------------------------------------------------------
# The encoder's trainer
# ------------------------------------------------------------------------------------------------

def test_sigmoid_loss_and_hidden_patches():
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    want = -sum(math.log(1 / (1 + math.exp(-s))) for s in (1, 2, -0.5, 3)) / 2
    assert train_encoder.sigmoid_loss(logits).item() == pytest.approx(want)
    x = torch.zeros(40, 3, 64, 64)
    seen = train_encoder.hide(x, 8, 0.1, torch.Generator().manual_seed(0))
    grey = (seen == 0.5).all(1).float()                     # [B,H,W]
    assert 0.07 < grey.mean() < 0.13
    patches = F.avg_pool2d(grey[:, None], 8)
    assert ((patches == 0) | (patches == 1)).all()


def test_the_dense_term_has_its_weight(tmp_path):
    call(train_encoder, *SMALL, "--width", "48", "--depth", "2", "--dense", "7", "--steps", "1",
         "--tokenizer", weights.ASSETS, "--out", tmp_path / "run")
    line = lines(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(line["contrast"] + 7 * line["dense"], rel=1e-5)
    assert line["dense"] > 0.1


# ------------------------------------------------------------------------------------------------
# Data, questions, counts
# ------------------------------------------------------------------------------------------------

def test_answers_of_builtin_questions():
    """Each answer worked out from the scene and the words of the question."""
    seen = collections.Counter()
    for i in range(3000):
        r = world.builtin_record("builtin:qa", 1, i, 0)
        s, q, a = r["scene"], *(t["value"].removeprefix("<image>\n") for t in r["conversations"])
        groups = world.groups(s)
        if r["question"] == "exists":
            kind, = (k for k in world.PLURALS if f"Is there {world.noun(k)} in the picture?" == q)
            assert a == ("Yes." if kind in {t.kind for t in s.things} else "No.")
        elif r["question"] == "where":
            at = [f"Where is the {world.noun(*g, article=False)}?" for g in groups].index(q)
            relation = world.relation(s.things[at], s.things[1 - at])
            other = world.noun(*groups[1 - at], article=False)
            assert a == f"{relation.capitalize()} the {other}."
        elif r["question"] == "what":
            assert a[0].lower() + a[1:-1] == world.describe(groups)
        elif r["question"] == "colour":
            if "background" in q:
                assert a[0].lower() + a[1:-1] == world.background_words(s.background)
            else:
                words = re.fullmatch(r"What colour (?:is|are) the (.+)\?", q)[1]
                colours = {g[1] for g in groups if words == world.noun(g[0], None, g[2], False)}
                assert a[:-1].lower() in colours
        seen[r["question"]] += 1
    assert all(seen[k] > 100 for k in ("exists", "where", "what", "colour"))


def test_a_stream_is_of_its_seed(tmp_path):
    """Crops differ by seed; chunks come in another order in the next epoch; a cache of latents is
    of one resolution."""
    rng = np.random.default_rng(0)
    for k in range(2):
        Image.fromarray(rng.integers(0, 255, (90, 120, 3), np.uint8)).save(tmp_path / f"{k}.png")
    a, b = (data.Mixture([str(tmp_path)], 32, seed, "random", text=False) for seed in (0, 1))
    crops = [[r["image"].tobytes() for r in (m[n] for n in range(8))] for m in (a, b)]
    assert not set(crops[0]) & set(crops[1]) and len(set(crops[0])) == 8
    size, order = 8 * data.CHUNK, []
    for epoch in range(2):
        picks = [data.shuffled(size, epoch * size + i, 0, "s") // data.CHUNK for i in range(size)]
        order.append([collections.Counter(picks[k:k + data.WINDOW]).keys()
                      for k in range(0, size, data.WINDOW)])
    assert order[0] != order[1]
    for resolution in (16, 32, 16):
        mixture = data.Mixture([str(tmp_path)], resolution, text=False)
        data.cache_latents(mixture, str(tmp_path / "cache"), "x", lambda x: x.reshape(
            len(x), -1, 3).astype(np.float32), 2, 0)
        assert mixture[0]["latent"].shape == (resolution ** 2, 3)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


def test_colours_are_counted():
    """Two scenes, of which one has another object and one another background."""
    def shape(colour, on):
        return world.Scene(("plain", on), (world.Thing("square", colour, 0.5, 0.5, 0.5),))
    asked = [shape("red", "white"), shape("blue", "black"), shape("green", "white")]
    drawn = [shape("red", "white"), shape("blue", "white"), shape("blue", "white")]
    images = torch.stack([torch.from_numpy(world.render(s, 64)).permute(2, 0, 1) for s in drawn])
    back, colour = benchmark.colours_right(images / 255, [asked[0]] * 2 + [asked[2]])
    assert (back, colour) == (1, pytest.approx(1 / 3))
    back, colour = benchmark.colours_right(images / 255, asked)
    assert (back, colour) == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_a_resumed_log_goes_on_counting(tmp_path):
    out = tmp_path / "run"
    (out / "samples").mkdir(parents=True)
    step = out / "checkpoints/step-0000002"
    step.mkdir(parents=True)
    (step / "meta.json").write_text('{"step": 2, "args": {}}')
    (out / "log.jsonl").write_text("".join(json.dumps(
        {"step": k, "skipped_updates": k + 1, "skipped_records": 5 * k}) + "\n" for k in (1, 2, 3)))
    run = runs.Run(type("Args", (), dict(out=out, fresh=False, wandb=None, bench=None))(), CPU)
    run._open()
    run._trim_log()
    assert (run.skipped, run.skips.count) == (3, 10)
    run.lock.close()
