"""The decoder, its losses and the VAE as modules: closed-form numbers, definitions worked out by
hand, files, FLOPs.

    pytest tests/test_losses.py

Closed-form cases were computed with the reference modules in fp32 on the CPU: tolerance 1e-4 on
elements and 1e-2 on sums. Golden files of the same modules are checked in test_golden.py.
"""
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import decoder as decoders
import losses
import networks
import parallel
import vae as vaes
from cli import UserError
from conftest import init_discriminator, init_vgg, init_weights
from decoder import Decoder, DecoderConfig, size_config
from losses import (
    TINY_DISC, TINY_WIDTH, Discriminator, LocalNorm, Perceptual, SpectralConv1d,
    adaptive_weight, augment, d_loss_hinge, d_loss_vanilla, g_loss)
from vae import VAE, VAEConfig

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = parallel.setup("cpu", "float32")
HALVES = (0.5,) * 3


@pytest.fixture(scope="module")
def disc():
    return init_discriminator(Discriminator(TINY_DISC))


@pytest.fixture
def vgg():
    return init_vgg(Perceptual(TINY_WIDTH))


# ------------------------------------------------------------------------------------------------
# The decoder
# ------------------------------------------------------------------------------------------------

def test_decoder_against_the_reference():
    """Key of rank k (sorted), flat index i: 0.1 sin(0.37 i + 0.11 k), plus 1 for norm weights."""
    model = Decoder(DecoderConfig(hidden_size=24, decoder_hidden_size=32,
                                  decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
                                  decoder_intermediate_size=48))
    learned = {k: p for k, p in sorted(model.named_parameters()) if k != "decoder_pos_embed"}
    assert len(learned) == 39
    for k, (name, p) in enumerate(learned.items()):
        value = 0.1 * torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + 0.11 * k)
        p.data = (value + ("norm" in name and name.endswith("weight"))).float().view(p.shape)
    z = torch.cos(0.05 * torch.arange(256 * 24, dtype=torch.float64)).float().view(1, 256, 24)
    with torch.no_grad():
        out = model.unpatchify(model.patches(z))
    assert out.shape == (1, 3, 224, 224)
    out = out.flatten()
    assert out.sum().item() == pytest.approx(-57.585491, abs=1e-2)
    assert out.abs().mean().item() == pytest.approx(1.000322, abs=1e-4)
    assert out[:6].tolist() == pytest.approx(
        [1.35407, -0.02231, -1.51895, 1.73749, -0.2952, -1.22641], abs=1e-4)
    assert out[-3:].tolist() == pytest.approx([1.41853, -0.35918, -0.98195], abs=1e-4)


def test_decoder_inverts_the_encoder_s_normalisation():
    """x std + mean per channel. (With 0.5 for both a mix-up of the two would not show.)"""
    model = Decoder(size_config("tiny", 96, 64, 8, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    init_weights(model, decoders.initial)
    z = torch.randn(2, 64, 96)
    with torch.no_grad():
        x = model.unpatchify(model.patches(z))
        want = torch.stack([x[:, 0] * 0.4 + 0.1, x[:, 1] * 0.5 + 0.2, x[:, 2] * 0.6 + 0.3], 1)
        assert torch.allclose(model(z), want, atol=1e-6)


def test_decoder_attention_in_bf16_equals_fp32():
    """The form that a CPU uses in bf16, against torch's kernel."""
    q, k, v = torch.randn(3, 2, 4, 24, 16, generator=torch.Generator().manual_seed(0))
    want = F.scaled_dot_product_attention(2 * q, k, v)
    got = decoders.attention((2 * q).bfloat16(), k.bfloat16(), v.bfloat16())
    assert (got.float() - want).abs().max() < 0.03 and want.std() > 0.3


def test_decoder_sizes_and_their_comments():
    """The sizes are the paper's; the comments beside them give the counts."""
    assert {k: v for k, v in decoders.SIZES.items() if k != "tiny"} == {
        "b": (12, 768, 12, 3072), "l": (24, 1024, 16, 4096), "xl": (28, 1152, 16, 4096)}
    text = Path(decoders.__file__).read_text()
    for size in decoders.SIZES:
        with torch.device("meta"):
            model = Decoder(size_config(size, 1152, 256, 14, HALVES, HALVES))
        count, tflop = sum(p.numel() for p in model.parameters()), model.forward_flops() / 1e12
        line = next(x for x in text.splitlines() if x.lstrip().startswith(f'"{size}":'))
        assert f"{count / 1e6:.1f} M  {tflop:.3f}" in line, line


@pytest.mark.parametrize("wrong", [dict(decoder_hidden_size=36), dict(num_patches=60)])
def test_decoder_sizes_that_do_not_fit(wrong):
    good = size_config("tiny", 96, 64, 8, HALVES, HALVES)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        dataclasses.replace(good, **wrong)


def test_initial_weights_of_the_decoder():
    model = Decoder(size_config("tiny", 96, 64, 8, HALVES, HALVES))
    init_weights(model, decoders.initial)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.15) and p.abs().max() <= 2, name
        elif name.endswith("bias") or name == "trainable_cls_token":
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
    table = model.decoder_pos_embed[0]
    assert not model.decoder_pos_embed.requires_grad and (table[0] == 0).all()
    grid = table[1:].view(8, 8, 160)                        # [row, column, width]
    assert (grid[..., :80] == grid[:1, :, :80]).all() and (grid[..., 80:] == grid[:, :1, 80:]).all()
    assert grid[0, 3, 0].item() == pytest.approx(torch.tensor(3.0).sin().item())


# ------------------------------------------------------------------------------------------------
# LPIPS and Gram
# ------------------------------------------------------------------------------------------------

def test_lpips_and_gram_by_hand():
    net = Perceptual(TINY_WIDTH)                                    # LPIPS weights are 1/8 here
    a, b = torch.zeros(2, 1, 8, 1, 2)
    a[0, 0], b[0, 1] = torch.tensor([3.0, 0.0]), torch.tensor([5.0, 0.0])
    # unit vectors e0 and e1 at one of two positions: (1 + 1) / 8 there, 0 at the other
    assert net.lpips([a], [b]).item() == pytest.approx(0.125)
    # G has one entry, 9/16 and 25/16; c*c = 64 entries
    assert net.gram([a], [b], [0]).item() == pytest.approx(((9 / 16) ** 2 + (25 / 16) ** 2) / 64)
    assert net.gram([a, a], [b, b], [0, 1]).item() == pytest.approx(2 * 706 / 256 / 64)
    a, b = torch.zeros(2, 1, 8, 1, 1)
    a[0, 0] = 4e-10                                         # 1e-10 is added to the norm: u = 0.8
    assert net.lpips([a], [b]).item() == pytest.approx(0.64 / 8)


def test_losses_of_bf16_maps_are_fp32(vgg):
    a, b = torch.rand(2, 1, 8, 9, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    for loss in (vgg.lpips, lambda a, b: vgg.gram(a, b, [0])):
        assert loss([a], [b]).equal(loss([a.float()], [b.float()]))


def test_gradient_is_finite_where_all_features_are_zero(vgg):
    vgg.features[0].bias.data.fill_(-100.0)                 # switches every later feature off
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    lpips, gram = vgg(x, torch.rand(2, 3, 32, 32))
    (lpips + gram).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_perceptual_files(tmp_path):
    model = init_vgg(Perceptual(TINY_WIDTH), 1)
    state = model.state_dict()
    features = {k: v for k, v in state.items() if k.startswith("features.")}
    torch.save({**features, "classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg16.pth")
    save_file({k: 2 * v for k, v in state.items() if k.startswith("lin")},
              tmp_path / "lpips.safetensors")
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a, _ = model(x, y)
    b, _ = networks.load_perceptual(tmp_path / "vgg16.pth", None, CPU)(x, y)
    lpips = tmp_path / "lpips.safetensors"
    c, _ = networks.load_perceptual(tmp_path / "vgg16.pth", lpips, CPU)(x, y)
    assert torch.equal(a, b) and torch.allclose(2 * a, c)
    full = Perceptual().state_dict()            # a network of full width must have LPIPS' weights
    torch.save({k: v for k, v in full.items() if not k.startswith("lin")}, tmp_path / "full.pth")
    with pytest.raises(UserError, match="--lpips-weights"):
        networks.load_perceptual(tmp_path / "full.pth", None, CPU)
    networks.load_perceptual(tmp_path / "full.pth", None, CPU, needed=False)     # for Gram alone


# ------------------------------------------------------------------------------------------------
# The discriminator
# ------------------------------------------------------------------------------------------------

def test_spectral_norm_is_pytorch_s():
    torch.manual_seed(0)
    conv = nn.Conv1d(6, 5, 9, padding=4, padding_mode="circular")
    theirs, ours = nn.utils.spectral_norm(conv), SpectralConv1d(6, 5, 9)
    ours.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 6, 20)
    for train in (True, False, True):
        a, b = (m.train(train)(x) + m(x) for m in (theirs, ours))   # twice before one backward
        assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(theirs.weight_orig.grad, ours.weight_orig.grad)
    assert torch.equal(theirs.weight_u, ours.weight_u)


def test_discriminator_files_and_modes(tmp_path, disc):
    trunk = {k[5:]: v.clone() for k, v in disc.state_dict().items()
             if k.startswith("dino.") and "x_s" not in k}
    config = {"config": json.dumps(dataclasses.asdict(TINY_DISC))}
    save_file(trunk, tmp_path / "dino.safetensors", config)
    loaded = networks.load_discriminator(tmp_path / "dino.safetensors", CPU)
    images = torch.rand(2, 3, 64, 64)
    before = {k: v.clone() for k, v in loaded.state_dict().items()}
    logits = loaded.eval()(images)
    assert logits.shape == (2, 3 * 64)
    assert all(torch.equal(v, before[k]) for k, v in loaded.state_dict().items())
    loaded.train()(images).mean().backward()
    changed = {k for k, v in loaded.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all(k.endswith(("weight_u", "weight_v")) for k in changed)
    assert all(p.grad is None for p in loaded.dino.parameters())
    assert all(p.grad is not None for p in loaded.heads.parameters())
    one, two = (networks.load_discriminator(tmp_path / "dino.safetensors", CPU, seed=s)
                .heads[0][0][0].weight_orig for s in (0, 1))
    assert not torch.equal(one, two)                                # new heads depend on the seed
    save_file(trunk, tmp_path / "deep.safetensors", {"config": json.dumps(
        {**dataclasses.asdict(TINY_DISC), "key_depths": [1, 4]})})
    with pytest.raises(UserError, match=r"key_depths \(1, 4\) of 4 blocks"):
        networks.load_discriminator(tmp_path / "deep.safetensors", CPU)
    save_file(trunk | {"pos_embed": torch.zeros(1, 5, 64)}, tmp_path / "wrong.safetensors", config)
    with pytest.raises(UserError, match=r"pos_embed is \[1, 5, 64\], expected \[1, 65, 64\]"):
        networks.load_discriminator(tmp_path / "wrong.safetensors", CPU)


def test_discriminator_resizes_bilinearly(disc):
    """Corners are not aligned."""
    x = torch.rand(2, 3, 80, 80)
    small = F.interpolate(x, (64, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(disc.eval()(x), disc(small), atol=1e-5)


def test_the_bias_of_the_keys_changes_nothing(disc):
    """The RAE code zeroes it on loading; softmax does not see it."""
    x, bias = torch.rand(2, 3, 64, 64), disc.dino.blocks[0].attn["qkv"].bias
    with torch.no_grad():
        before = disc.eval()(x)
        bias[64:128] = torch.randn(64, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(disc(x), before, atol=1e-4)
        bias[64:128] = 0


def test_epsilon_of_the_local_norm():
    x = torch.tensor([[[1e-3, -1e-3]]])                     # variance 1e-6, and 1e-6 is added
    assert LocalNorm(1)(x).flatten().tolist() == pytest.approx([0.5 ** 0.5, -0.5 ** 0.5], rel=1e-4)


# ------------------------------------------------------------------------------------------------
# Augmentation and GAN losses
# ------------------------------------------------------------------------------------------------

def test_augment():
    """The shape stays, every draw differs, and gradients reach the images."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 32, 32, generator=g).requires_grad_()
    draws, others = torch.rand(2, 4, 5, generator=g)
    out = augment(images, draws)
    assert out.shape == images.shape and torch.equal(out, augment(images, draws))
    assert not torch.equal(out, augment(images, others))
    out.sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    # colour draws keep a grey image grey; its level moves by at most 0.25 (0.5 on [-1,1])
    grey = augment(torch.full((64, 3, 16, 16), 0.5), torch.rand(64, 5, generator=g))
    assert (grey - grey[:, :1, :1, :1]).abs().max() < 1e-6
    assert 0.2 < (grey - 0.5).abs().max() <= 0.25 + 1e-6


def test_augment_by_hand():
    """Translation by an eighth with grey fill, brightness, saturation, contrast, one at a time."""
    x = torch.zeros(1, 3, 8, 8)
    x[:, 0, :, :4], x[:, 1] = 1.0, 0.25                     # two colours
    neutral = torch.full((1, 5), 0.5)                       # the middle of every range
    assert torch.allclose(augment(x, neutral), x, atol=1e-6)

    def one(column, value):
        draws = neutral.clone()
        draws[0, column] = value
        return augment(x, draws)

    row, column = torch.full_like(x[:, :, :1], 0.5), torch.full_like(x[..., :1], 0.5)
    down, up = torch.cat([row, x[:, :, :-1]], 2), torch.cat([x[:, :, 1:], row], 2)
    right, left = torch.cat([column, x[..., :-1]], 3), torch.cat([x[..., 1:], column], 3)
    grey, mean = x.mean(1, keepdim=True), x.mean()
    for got, want in ((one(0, 0.0), down), (one(0, 0.99), up), (one(1, 0.0), right),
                      (one(1, 0.99), left), (one(2, 0.9), x + 0.2),         # 0.4 in [-1,1]
                      (one(3, 0.1), grey + 0.2 * (x - grey)),
                      (one(4, 0.9), mean + 1.4 * (x - mean))):
        assert torch.allclose(got, want, atol=1e-6)


def test_gan_losses_and_adaptive_weight():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert d_loss_hinge(real, fake).item() == pytest.approx(0.5 * (0.25 + 1.0))
    expected = 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    assert torch.equal(d_loss_vanilla(real, fake), expected)
    assert g_loss(fake).item() == pytest.approx(1.0)
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight(w.square().sum() / 2, w.sum(), w)      # norms 5 and sqrt 2
    assert weight.item() == pytest.approx(5 / 2 ** 0.5, rel=1e-5) and not weight.requires_grad
    assert adaptive_weight(w.sum(), 0 * w.sum(), w).item() == 1e4


# ------------------------------------------------------------------------------------------------
# The VAE
# ------------------------------------------------------------------------------------------------

def bfl_keys(state):
    """Rename diffusers' keys to those of ae.safetensors, independently of networks.from_ldm."""
    words = {"down_blocks": "down", "up_blocks": "up", "conv_norm_out": "norm_out",
             "conv_shortcut": "nin_shortcut"}
    mid = {"resnets.0": "block_1", "resnets.1": "block_2", "attentions.0": "attn_1"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    out = {}
    for key, value in state.items():
        p = key.split(".")
        if p[1] == "mid_block":
            name = [p[0], "mid", mid[f"{p[2]}.{p[3]}"], attention.get(p[4], p[4]), p[-1]]
            if p[2] == "attentions" and value.dim() == 2:
                value = value[:, :, None, None]             # 1x1 convolutions there
        elif p[2:3] and p[2].isdigit():
            level = 2 - int(p[2]) if p[1] == "up_blocks" else int(p[2])
            rest = {"downsamplers": ["downsample"], "upsamplers": ["upsample"]}.get(
                p[3], ["block", p[4]])
            name = [p[0], words[p[1]], str(level), *rest, words.get(p[5], p[5]), p[-1]]
        else:
            name = [p[0], words.get(p[1], p[1]), p[-1]]
        out[".".join(name)] = value.contiguous()
    return out


def test_vae_reads_both_layouts(tmp_path):
    torch.manual_seed(0)
    model = VAE(vaes.TINY)
    state = bfl_keys(model.state_dict())
    assert "decoder.up.2.block.1.conv1.weight" in state     # the first to run, lowest resolution
    assert "decoder.mid.attn_1.proj_out.bias" in state and len(state) == len(model.state_dict())
    save_file(state, tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(vaes.TINY)))
    same = networks.load_vae(tmp_path / "ae.safetensors", CPU).state_dict()
    assert all(torch.equal(same[k], v) for k, v in model.state_dict().items())

    state = model.state_dict()
    state["decoder.conv_in.bias"], extra = torch.zeros(3), state.pop("encoder.conv_in.bias")
    save_file({**state, "encoder.bias": extra}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "ae.safetensors").unlink()
    with pytest.raises(UserError) as error:
        networks.load_vae(tmp_path, CPU)
    for text in ("decoder.conv_in.bias is [3], expected [64]", "encoder.conv_in.", "encoder.bias"):
        assert text in str(error.value)


def test_vae_tokens():
    model = VAE(vaes.TINY).requires_grad_(False)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = model.encode(images)
    assert tokens.shape == (2, 64, 64) and model.decode(tokens).shape == images.shape
    mean, _ = model.posterior(images)                       # [2,16,16,16]
    assert torch.allclose(vaes.unpack(tokens) / model.scale + model.shift, mean, atol=1e-6)
    z = torch.arange(16.).view(1, 1, 4, 4)                  # token 0 is the top left 2 x 2 pixels
    assert vaes.pack(z)[0, :2].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_vae_is_measured_and_its_posterior_clamped():
    """The scale is measured on draws, not on means."""
    torch.manual_seed(0)
    vae, x = VAE(vaes.TINY), torch.rand(64, 3, 16, 16)
    with torch.no_grad():
        vae.encoder.conv_out.bias[16:] = 0.5                # log variances
        found = vae.measure([x])
        mean, logvar = vae.posterior(x)
        eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        z = mean + (0.5 * logvar).exp() * eps
        z = (z - found["shift_factor"]) * found["scaling_factor"]
        assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
        vae.encoder.conv_out.bias[16:] = 99
        assert vae.posterior(x)[1].max() == 20
        vae.encoder.conv_out.bias[16:] = -99
        assert vae.posterior(x)[1].min() == -30


def test_vae_details():
    assert (VAE.crop, VAE.resample) == ("squash", 1)        # the published processor; 1 is Lanczos
    norms = [m for m in VAE(vaes.TINY).modules() if isinstance(m, nn.GroupNorm)]
    assert {m.eps for m in norms} == {1e-6}
    assert (VAEConfig().scaling_factor, VAEConfig().shift_factor) == (0.3611, 0.1159)


# ------------------------------------------------------------------------------------------------

def test_flops_against_torch(disc, vgg):
    model = Decoder(size_config("tiny", 96, 64, 8, HALVES, HALVES))
    x, z = torch.rand(2, 3, 64, 64), torch.randn(2, 64, 96)
    attention = 4 * 4 * 65 * 65                     # per channel, in a kernel torch does not count
    for function, flops, width in ((lambda: model(z), model.forward_flops(), 160),
                                   (lambda: vgg.maps(x), vgg.forward_flops(64), 0),
                                   (lambda: disc.eval()(x), sum(disc.forward_flops()), 64)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            function()
        counted = counter.get_total_flops() / 2
        assert min(abs(c - flops) for c in (counted, counted + width * attention)) < 0.01 * flops
