"""Parity with the reference modules: golden files, closed-form numbers, PyTorch's spectral norm.

    python -m pytest -q tests/test_golden.py

tests/golden/README.md says what the files are. The closed-form cases were computed with the
reference in fp32 on the CPU: tolerance 1e-4 on elements, 1e-2 on sums.
"""
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import discriminator  # noqa: E402
import flow  # noqa: E402
import golden  # noqa: E402
import parallel  # noqa: E402
import perceptual  # noqa: E402
import vae  # noqa: E402
import weights  # noqa: E402
import networks
from decoder import Decoder  # noqa: E402
from dit import DiT  # noqa: E402
from parallel import UserError  # noqa: E402

CPU = parallel.setup("cpu", "float32")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are tiny: on a busy machine several threads mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


FILES = sorted((HERE / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_file(path, dtype, monkeypatch):
    monkeypatch.setattr(golden, "DTYPE", dtype)
    rows = golden.check(path)
    assert rows and not [row for row in rows if row[3]]


def test_sequence():
    rows = golden.check_sequence(HERE / "golden" / "sequence.json")
    assert rows and not [row for row in rows if row[3]]


def test_write_makes_files_that_check(tmp_path):
    golden.write(tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert {f.stem for f in files} == set(golden.COMPONENTS)
    for path in files:
        assert not [row for row in golden.check(path) if row[3]], path


def change(path, out, edit, metadata):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, out, metadata)
    return golden.check(out)


def test_check_fails_on_wrong_unknown_and_missing(tmp_path):
    path, meta = HERE / "golden" / "rae_decoder.safetensors", {}
    with golden.safe_open(path, "pt") as f:
        meta = f.metadata()

    def failures(edit, metadata=meta):
        rows = change(path, tmp_path / "x.safetensors", edit, metadata)
        return [name for name, _, _, note in rows if note]

    assert failures(lambda t: None) == []
    assert failures(lambda t: t["weights.decoder_norm.bias"].add_(0.01)) == [
        "patches", "pixels_before_denorm"]
    assert failures(lambda t: t["out.patches"][0, 0].fill_(float("nan"))) == ["patches"]
    assert failures(lambda t: t.update({"out.attention": torch.zeros(3)})) == ["attention"]
    assert failures(lambda t: None, {**meta, "component": "unet"}) == ["unet"]
    with pytest.raises(ValueError, match="decoder_norm.bias"):
        failures(lambda t: t.pop("weights.decoder_norm.bias"))


# ------------------------------------------------------------------------------------------------
# Closed-form numbers
# ------------------------------------------------------------------------------------------------

def fill(model, tensors):
    """Key of rank k (sorted), flat index i: 0.1 sin(0.37 i + 0.11 k), plus 1 for norm weights."""
    fixed = ("pos_embed", "decoder_pos_embed")
    learned = {k: p for k, p in sorted(model.named_parameters()) if k not in fixed}
    assert len(learned) == tensors
    for k, (name, p) in enumerate(learned.items()):
        value = 0.1 * torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) + 0.11 * k)
        p.data = (value + ("norm" in name and name.endswith("weight"))).float().view(p.shape)
    return model.eval().requires_grad_(False)


def wave(function, step, *shape):
    n = torch.Size(shape).numel()
    return function(step * torch.arange(n, dtype=torch.float64)).float().view(shape)


IMAGE_X = wave(torch.sin, 0.1, 2, 8, 16, 16)                # [B,C,16,16]
X = IMAGE_X.flatten(2).mT                                   # [B,256,8]
Y = wave(torch.cos, 0.05, 2, 256, 24)                       # [B,256,Z]
T = torch.tensor([0.3, 0.9])


def agree(out, total, first, last=(), mean_abs=None):
    """out: as the reference lays it out."""
    out = out.flatten()
    assert out.sum().item() == pytest.approx(total, abs=1e-2)
    assert out[:len(first)].tolist() == pytest.approx(first, abs=1e-4)
    if last:
        assert out[-len(last):].tolist() == pytest.approx(last, abs=1e-4)
    if mean_abs:
        assert out.abs().mean().item() == pytest.approx(mean_abs, abs=1e-4)


def channels_first(v):
    return v.mT                                             # [B,256,C] -> [B,C,256]


@pytest.fixture(scope="module")
def dit():
    return fill(DiT(8, 256, 64, 2, 4, cond_width=24), 36)


def test_time_embedding(dit):
    agree(dit.t_embedder(T), -1.020890, [-0.15614, 0.03358, -0.11434, -0.14045, 0.00366, -0.2177])


def test_dit_forward(dit):
    agree(channels_first(dit(X, T, Y)), -468.389355,
          [0.51484, 0.5077, 0.39815, 0.26218, 0.16126, 0.217], [0.76218, 0.85216, 1.056], 0.489962)


def test_compat_sampler(dit):
    alpha = flow.shift_alpha(256, 8)
    assert alpha == pytest.approx(0.70710678)
    out = flow.euler(lambda x, t: dit(x, t, Y[:1]), X[:1], flow.compat_schedule(50, alpha))
    agree(channels_first(out), 239.721797,
          [-0.47278, -0.37454, -0.17689, 0.0482, 0.24083, 0.28135],
          [-0.88107, -1.05149, -1.39776], 0.744459)


def test_flow_loss(dit):
    eps = wave(torch.cos, 0.07, 2, 8, 16, 16).flatten(2).mT
    loss = flow.flow_loss(dit(flow.interpolate(X, eps, T), T, Y), X, eps)
    assert loss.tolist() == pytest.approx([1.4174619, 1.4288635], abs=1e-5)


def test_wide_head():
    model = fill(DiT(8, 256, 64, 2, 4, cond_width=24, head_width=96, head_depth=1), 52)
    agree(channels_first(model(X, T, Y)), -112.192742,
          [2.09063, 2.08283, 2.07308, 2.06236, 2.05069, 2.03941], mean_abs=1.436396)


def test_single_width_ddt():
    model = fill(DiT(8, 256, 64, 2, 4, cond_width=24, head_depth=1), 50)    # no s_projector
    agree(channels_first(model(X, T, Y)), -375.447140,
          [1.36268, 1.3527, 1.33569, 1.31409, 1.29392, 1.28334], mean_abs=0.856533)


def test_decoder():
    config = dict(hidden_size=24, decoder_hidden_size=32, decoder_num_hidden_layers=2,
                  decoder_num_attention_heads=4, decoder_intermediate_size=48, patch_size=14)
    model = fill(Decoder(config), 39)
    out = model.unpatchify(model.patches(Y[:1]))
    assert out.shape == (1, 3, 224, 224)
    agree(out, -57.585491, [1.35407, -0.02231, -1.51895, 1.73749, -0.2952, -1.22641],
          [1.41853, -0.35918, -0.98195], 1.000322)


# ------------------------------------------------------------------------------------------------
# Weight files and the discriminator's spectral norm
# ------------------------------------------------------------------------------------------------

def test_vae_reads_both_layouts(tmp_path):
    """ae.safetensors (BFL's names, 1x1 convolutions in attention, levels by resolution)."""
    torch.manual_seed(0)
    model, words = vae.VAE(vae.TINY), {
        "down_blocks": "down", "up_blocks": "up", "resnets": "block", "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut"}
    mid = {"resnets.0": "block_1", "resnets.1": "block_2", "attentions.0": "attn_1"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    state = {}
    for key, value in model.state_dict().items():
        p = key.split(".")
        if p[1] == "mid_block":
            name = [p[0], "mid", mid[f"{p[2]}.{p[3]}"], attention.get(p[4], p[4]), p[-1]]
            if p[2] == "attentions" and p[4] != "group_norm":
                value = value[:, :, None, None] if value.dim() == 2 else value
        elif p[2:3] and p[2].isdigit():
            level = 2 - int(p[2]) if p[1] == "up_blocks" else int(p[2])
            rest = {"downsamplers": ["downsample"], "upsamplers": ["upsample"]}.get(
                p[3], ["block", p[4]])
            name = [p[0], words[p[1]], str(level), *rest, words.get(p[5], p[5]), p[-1]]
        else:
            name = [p[0], words.get(p[1], p[1]), p[-1]]
        state[".".join(name)] = value.contiguous()
    assert "decoder.up.2.block.1.conv1.weight" in state     # the first to run, lowest resolution
    assert "decoder.mid.attn_1.proj_out.bias" in state and len(state) == len(model.state_dict())
    save_file(state, tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(golden.json.dumps(vae.TINY))
    same = networks.load_vae(tmp_path / "ae.safetensors", CPU).state_dict()
    assert all(torch.equal(same[k], v) for k, v in model.state_dict().items())

    state = model.state_dict()
    state["decoder.conv_in.bias"], extra = torch.zeros(3), state.pop("encoder.conv_in.bias")
    save_file({**state, "encoder.bias": extra}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "ae.safetensors").unlink()
    with pytest.raises(UserError) as error:
        networks.load_vae(tmp_path, CPU)
    for text in ("decoder.conv_in.bias is [3], expected [64]", "1 missing (first: encoder.conv_in.",
                 "1 unexpected (first: encoder.bias)"):
        assert text in str(error.value)


def test_vae_tokens():
    model = vae.VAE(vae.TINY).requires_grad_(False)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens = model.encode(images)
    assert tokens.shape == (2, 64, 64) and model.decode(tokens).shape == images.shape
    draw = [model.encode(images, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    mean, logvar = model.posterior(images)
    z = (vae.unpack(draw[0]) / model.scale + model.shift - mean) / (0.5 * logvar).exp()
    assert abs(z.mean()) < 0.03 and abs(z.std() - 1) < 0.03     # 8192 standard normals
    z = torch.arange(16.).view(1, 1, 4, 4)                  # token 0 is the top left 2 x 2 pixels
    assert vae.pack(z)[0, :2].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    with pytest.raises(ValueError, match="divide by 8"):
        model.encode(torch.zeros(1, 3, 60, 64))


def test_perceptual_gradient_is_finite_where_all_features_are_zero():
    model = perceptual.Perceptual(perceptual.TINY_WIDTH)
    perceptual.init_weights(model, 0)
    model.features[0].bias.data.fill_(-100.0)               # switches every later feature off
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    lpips, gram = model(x, torch.rand(2, 3, 32, 32))
    (lpips + gram).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_perceptual_files(tmp_path):
    model = perceptual.Perceptual(perceptual.TINY_WIDTH)
    perceptual.init_weights(model, 1)
    state = model.state_dict()
    vgg = {k: v for k, v in state.items() if k.startswith("features.")}
    torch.save({**vgg, "classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg16.pth")
    lins = {k: 2 * v for k, v in state.items() if k.startswith("lin")}
    save_file(lins, tmp_path / "lpips.safetensors")
    x, y = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    a, _ = model(x, y)
    b, _ = networks.load_perceptual(tmp_path / "vgg16.pth", None, CPU)(x, y)
    c, _ = networks.load_perceptual(tmp_path / "vgg16.pth", tmp_path / "lpips.safetensors", CPU)(x, y)
    assert torch.equal(a, b) and torch.allclose(2 * a, c)
    full = perceptual.Perceptual().state_dict()         # of full width: LPIPS' weights must be there
    torch.save({k: v for k, v in full.items() if not k.startswith("lin")}, tmp_path / "full.pth")
    with pytest.raises(UserError, match="LPIPS: --lpips-weights vgg.pth"):      # where it looked
        networks.load_perceptual(tmp_path / "full.pth", None, CPU)
    networks.load_perceptual(tmp_path / "full.pth", None, CPU, needed=False)     # for Gram alone


def test_spectral_norm_is_pytorchs():
    torch.manual_seed(0)
    conv = nn.Conv1d(6, 5, 9, padding=4, padding_mode="circular")
    theirs, ours = nn.utils.spectral_norm(conv), discriminator.SpectralConv1d(6, 5, 9)
    ours.load_state_dict({k: v.clone() for k, v in theirs.state_dict().items()})
    x = torch.randn(2, 6, 20)
    for train in (True, False, True):
        a, b = (m.train(train)(x) + m(x) for m in (theirs, ours))   # twice before one backward
        assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    assert torch.equal(theirs.weight_orig.grad, ours.weight_orig.grad)
    assert torch.equal(theirs.weight_u, ours.weight_u)


def test_discriminator_files_and_modes(tmp_path):
    model = discriminator.Discriminator(discriminator.TINY)
    discriminator.init_weights(model, 0)
    state = model.state_dict()
    trunk = {k[5:]: v for k, v in state.items() if k.startswith("dino.") and "x_s" not in k}
    trunk["blocks.0.attn.qkv.bias"] = torch.ones(192)
    save_file(trunk, tmp_path / "dino.safetensors")
    loaded = networks.load_discriminator(tmp_path / "dino.safetensors", CPU, discriminator.TINY)
    bias = loaded.dino.blocks[0].attn["qkv"].bias
    assert bias.view(3, 64).sum(1).tolist() == [64, 0, 64]      # k's third is zeroed
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
    save_file(trunk | {"pos_embed": torch.zeros(1, 5, 64)}, tmp_path / "wrong.safetensors")
    with pytest.raises(UserError, match=r"pos_embed is \[1, 5, 64\], expected \[1, 65, 64\]"):
        networks.load_discriminator(tmp_path / "wrong.safetensors", CPU, discriminator.TINY)


def test_augment():
    """Translation keeps the picture, every draw differs, and gradients reach the images."""
    g = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 32, 32, generator=g).requires_grad_()
    draws, others = torch.rand(2, 4, 5, generator=g)
    out = discriminator.augment(images, draws)
    assert out.shape == images.shape
    assert torch.equal(out, discriminator.augment(images, draws))
    assert not torch.equal(out, discriminator.augment(images, others))
    out.sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    # colour draws keep a grey image grey; its level moves by at most 0.25 (0.5 on [-1,1])
    grey = discriminator.augment(torch.full((64, 3, 16, 16), 0.5),
                                 torch.rand(64, 5, generator=g))
    assert (grey - grey[:, :1, :1, :1]).abs().max() < 1e-6
    assert 0.2 < (grey - 0.5).abs().max() <= 0.25 + 1e-6


def test_gan_losses_and_adaptive_weight():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])
    assert discriminator.d_loss_hinge(real, fake).item() == pytest.approx(0.5 * (0.25 + 1.0))
    softplus = nn.functional.softplus
    expected = 0.5 * (softplus(-real).mean() + softplus(fake).mean())
    assert torch.equal(discriminator.d_loss_vanilla(real, fake), expected)
    assert discriminator.g_loss(fake).item() == pytest.approx(1.0)
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = discriminator.adaptive_weight(w.square().sum() / 2, w.sum(), w)    # norms 5, sqrt 2
    assert weight.item() == pytest.approx(5 / 2 ** 0.5, rel=1e-5) and not weight.requires_grad
    assert discriminator.adaptive_weight(w.sum(), 0 * w.sum(), w).item() == 1e4
