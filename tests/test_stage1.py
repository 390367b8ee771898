"""Stage 1, train_decoder.py: arguments, the order and the numbers of a training step, schedules,
averages, the VAE, every --latent, planning, bad input.

    pytest tests/test_stage1.py

The losses and the networks themselves are in test_losses.py, kill and resume in test_resume.py.
"""
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import cli
import data
import decoder as decoders
import evaluate
import metrics
import networks
import parallel
import train_decoder
import training
import vae as vaes
from conftest import init_weights
from losses import Discriminator, adaptive_weight, augment, g_loss

pytestmark = pytest.mark.usefixtures("one_thread")
ENCODER = ROOT / "tiny/encoder.safetensors"
CPU = parallel.setup("cpu", "float32")
SMALL = ["--batch", "4", "--workers", "0", "--dtype", "float32", "--device", "cpu",
         "--log-every", "1", "--save-every", "1", "--keep", "9"]
ON = ["--lpips", "1", "--gram", "100", "--gan", "0.5"]


def call(module, *argv):
    """Run a script's main in this process and put the signal handlers back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", [module.__name__ + ".py", *map(str, argv)])
        try:
            module.main()
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def lines(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def state(out, step):
    return load_file(out / f"checkpoints/step-{step:07d}/state.safetensors")


def options(*argv):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["train_decoder.py", *map(str, argv)])
        return train_decoder.arguments()


def mixture(seed=0, crop="random"):
    return data.Mixture(train_decoder.DATA, 64, seed, crop=crop, text=False)


def first_batch(first=0):
    records = mixture()
    return train_decoder.Collate()([records[first + i] for i in range(4)])


def new_decoder(encoder, seed=0):
    model = decoders.Decoder(decoders.size_config("tiny", 96, 64, 8, encoder.mean, encoder.std))
    init_weights(model, decoders.initial, seed)
    return model


def check_first_gradients(model, saved, prefix=""):
    """Compare each gradient with Adam's first moment, which is a tenth of it."""
    for name, p in model.named_parameters():
        if p.requires_grad:
            moment = saved[f"optimizer.{prefix}{name}.exp_avg"] * 10
            assert (moment - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6, name


def discriminator_loss(disc, encoder, model, batch, loss):
    """Return the loss and the logits of the discriminator's step, by its definition."""
    x = batch["images"].float() / 255
    with torch.no_grad():
        fake = (model(encoder(x)).clamp(0, 1) * 255).round() / 255
    disc.train()
    both = torch.cat([augment(x, batch["real_d"]), augment(fake, batch["fake_d"])])
    real, fake = disc(both).chunk(2)
    return loss(real, fake), real, fake


@pytest.fixture(scope="module")
def gan_run(nets, tmp_path_factory):
    """Two steps with every term on from the first."""
    out = tmp_path_factory.mktemp("gan") / "run"
    call(train_decoder, *SMALL, *nets, *ON, "--steps", "2", "--warmup", "20", "--disc-start", "0",
         "--gan-start", "0", "--out", out)
    return out


@pytest.fixture(scope="module")
def long_run(nets, tmp_path_factory):
    """Four steps with every option that is off by default."""
    out = tmp_path_factory.mktemp("long") / "run"
    adamw, given, made, real = parallel.adamw, [], [], data.Mixture

    def record(sources, resolution, seed, crop, text):
        made.append((seed, crop, text))
        return real(sources, resolution, seed, crop=crop, text=text)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(parallel, "adamw", lambda *a, **o: (given.append(o), adamw(*a, **o))[1])
        m.setattr(data, "Mixture", record)
        call(train_decoder, *SMALL, *nets, *ON, "--l1", "0.5", "--gram-layers", "1", "3",
             "--disc-loss", "vanilla", "--noise-tau", "0.5", "--steps", "4", "--warmup", "1",
             "--warmup-disc", "1", "--lr-disc", "1e-3", "--lr-disc-final", "1e-4",
             "--disc-start", "1", "--gan-start", "4", "--out", out)
    assert [o["weight_decay"] for o in given] == [0, 0]
    # training crops at random; measuring takes the middle of images of another seed
    assert made == [(0, "random", False), (1000, "center", False)]
    return out


# ------------------------------------------------------------------------------------------------
# Arguments and schedules
# ------------------------------------------------------------------------------------------------

def test_starts_in_epochs_and_steps():
    assert train_decoder.steps_of("7e", 512) == 17_500 and train_decoder.steps_of("500", 512) == 500
    assert train_decoder.steps_of("0.5e", 64) == 10_000
    for bad in ("7x", "-1", "-1e", "nan", "infe", "1.5", ""):
        with pytest.raises(ValueError):
            train_decoder.steps_of(bad)


@pytest.mark.parametrize("latent, lr, lr_disc, starts", [
    ("siglip2", (4e-4, 4e-5), (5e-5, 5e-6), (17_500, 20_000)),
    ("webssl", (2e-4, 2e-5), (2e-5, 2e-6), (25_000, 27_500))])
def test_defaults_are_the_paper_s(latent, lr, lr_disc, starts):
    a = options("--size", "xl", "--latent", latent)
    assert (a.lr, a.lr_final) == lr and (a.lr_disc, a.lr_disc_final) == lr_disc
    assert (a.disc_start, a.gan_start) == starts and (a.steps, a.batch) == (200_000, 512)
    assert (a.warmup, a.warmup_disc, a.ema, a.betas) == (5000, 2500, 0.9978, [0.9, 0.95])
    assert (a.l1, a.lpips, a.gram, a.gan) == (1, 1, 100, 10) and a.adaptive_gan
    assert options("--size", "xl", "--batch", "256").gan_start == 40_000        # epochs, not steps


def test_schedules_of_decoder_and_discriminator(gan_run, long_run):
    """Linear warm-up, then a cosine to the final rate; the discriminator's begins at its start."""
    cosine = training.cosine
    assert cosine(0, 200_000, 5000, 0.1) == pytest.approx(1 / 5000)
    assert cosine(4999, 200_000, 5000, 0.1) == 1 and cosine(5000, 200_000, 5000, 0.1) == 1
    assert cosine(102_500, 200_000, 5000, 0.1) == pytest.approx(0.55)
    assert cosine(200_000, 200_000, 5000, 0.1) == pytest.approx(0.1)
    a, seen = options(), lines(gan_run)
    assert [line["lr"] for line in seen] == pytest.approx([a.lr / 20, 2 * a.lr / 20])
    assert [line["lr_disc"] for line in seen] == pytest.approx(
        [a.lr_disc / a.warmup_disc, 2 * a.lr_disc / a.warmup_disc], rel=1e-2)

    def rate(k, steps, first, last):                        # after one step of warm-up
        return last + (first - last) * (1 + math.cos(math.pi * max(0, k - 1) / (steps - 1))) / 2

    seen = lines(long_run)
    assert a.lr_final > 0
    assert [s["lr"] for s in seen] == pytest.approx(
        [rate(k, 4, a.lr, a.lr_final) for k in range(4)], abs=1e-7)
    assert "lr_disc" not in seen[0]
    assert [s["lr_disc"] for s in seen[1:]] == pytest.approx(
        [rate(k, 3, 1e-3, 1e-4) for k in range(3)], abs=1e-7)


# ------------------------------------------------------------------------------------------------
# Draws
# ------------------------------------------------------------------------------------------------

def test_draws_belong_to_the_image():
    """They do not depend on the rest of the batch; purposes and seeds differ."""
    uniform = train_decoder.uniform
    a = uniform([5, 6, 7], 3, "a")
    assert torch.equal(a[1:], uniform([6, 7], 3, "a"))
    others = [uniform([5], 3, "b"), uniform([5], 4, "a"), uniform([3], 5, "a")]
    assert all(not torch.equal(a[:1], o) for o in others)
    batch = first_batch()
    draws = [batch[k] for k in ("fake_g", "fake_d", "real_d")]
    assert all(not torch.equal(draws[i], draws[i - 1]) for i in range(3))
    noise = train_decoder.latent_noise([8, 9], 0, (64, 96), "uniform", 0.2)
    assert torch.equal(noise[1:], train_decoder.latent_noise([9], 0, (64, 96), "uniform", 0.2))
    assert (noise.std((1, 2)) < 0.21).all()


@pytest.mark.parametrize("dist, mean, std", [
    ("half-normal", 0.2 * math.sqrt(2 / math.pi), 0.2 * math.sqrt(1 - 2 / math.pi)),
    ("uniform", 0.1, 0.2 / math.sqrt(12))])
def test_strength_of_the_latent_noise(dist, mean, std):
    strength = train_decoder.latent_noise(range(2000), 0, (16, 32), dist, 0.2).std((1, 2))
    assert strength.mean() == pytest.approx(mean, rel=0.06)
    assert strength.std() == pytest.approx(std, rel=0.08)


# ------------------------------------------------------------------------------------------------
# The step
# ------------------------------------------------------------------------------------------------

def test_gradients_reach_the_image_and_not_the_frozen_networks(nets):
    encoder, vgg, disc, _ = networks.stage1_networks(options(*nets, *ON), CPU)
    x, x_hat = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64, requires_grad=True)
    lpips, gram = vgg(x_hat, x)
    (lpips.sum() + gram.sum() + g_loss(disc(augment(x_hat, torch.rand(2, 5))))).backward()
    assert (x_hat.grad.flatten(1).abs().sum(1) > 0).all()
    frozen = [*encoder.parameters(), *vgg.parameters(), *disc.dino.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert all(p.requires_grad for p in disc.heads.parameters())


def test_at_image_keeps_value_and_gradient():
    """The loss' own network gets no gradient, and the adaptive weight stays the same."""
    W = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
    critic = torch.tensor(3.0, requires_grad=True)
    x = W @ torch.tensor([1.0, -1.0])
    rec, gan = x.square().sum(), (critic * x).sum()
    direct = adaptive_weight(rec, gan, W)
    a, b = (train_decoder.at_image(v, x) for v in (rec, gan))
    assert (a.item(), b.item()) == (rec.item(), gan.item())
    # x = (-1, -1): |2x| / |3 (1,1)| = 2/3, the input's norm cancels
    assert direct.item() == adaptive_weight(a, b, W).item() == pytest.approx(2 / 3, rel=1e-5)
    (a + b).backward()
    assert torch.equal(W.grad, torch.outer(2 * x + 3, torch.tensor([1.0, -1.0])).detach())
    assert critic.grad is None


def test_the_first_step_is_the_sum_of_its_terms(gan_run, nets):
    """The logged values and the gradient, against L.backward() of the whole formula."""
    encoder, vgg, disc, _ = networks.stage1_networks(options(*nets, *ON), CPU)
    model, batch = new_decoder(encoder), first_batch()
    x = batch["images"].float() / 255
    x_hat, W = model(encoder(x)), model.decoder_pred.weight
    l1, (lpips, gram) = (x_hat - x).abs().mean(), (v.mean() for v in vgg(x_hat, x))
    rec = l1 + lpips + 100 * gram
    gan = -disc.eval()(augment(x_hat, batch["fake_g"])).mean()
    a, b = (torch.autograd.grad(v, W, retain_graph=True)[0].norm() for v in (rec, gan))
    weight = (a / (b + 1e-6)).clamp(0, 1e4)
    (rec + 0.5 * weight * gan).backward()
    log, saved = lines(gan_run)[0], state(gan_run, 1)
    for key, value in dict(l1=l1, lpips=lpips, gram=gram, gan=gan, gan_lambda=weight,
                           loss=rec + 0.5 * weight * gan).items():
        assert log[key] == pytest.approx(value.item(), rel=1e-3, abs=1e-6), key
    check_first_gradients(model, saved)
    assert (load_file(gan_run / "final/ema.safetensors").keys()
            == load_file(gan_run / "final/model.safetensors").keys())


def test_terms_have_their_options(long_run, nets):
    """The first step by hand: noise in the latent, half of L1, two of Gram's layers."""
    encoder, vgg, _, _ = networks.stage1_networks(options(*nets, *ON), CPU)
    model, x = new_decoder(encoder), first_batch()["images"].float() / 255
    noise = train_decoder.latent_noise(range(4), 0, (64, 96), "half-normal", 0.5)
    x_hat = model(encoder(x) + noise)
    maps, truth = vgg.maps(x_hat), vgg.maps(x)
    l1, lpips = (x_hat - x).abs().mean(), vgg.lpips(maps, truth).mean()
    gram = vgg.gram(maps, truth, [1, 3]).mean()
    loss = 0.5 * l1 + lpips + 100 * gram
    loss.backward()
    for key, value in dict(l1=l1, lpips=lpips, gram=gram, loss=loss).items():
        assert lines(long_run)[0][key] == pytest.approx(value.item(), rel=1e-4, abs=1e-7), key
    check_first_gradients(model, state(long_run, 1))


def test_discriminator_sees_8_bit_images_of_the_updated_decoder(gan_run, nets):
    """Its first gradient, from the decoder's weights after the decoder's own step."""
    encoder, _, _, _ = networks.stage1_networks(options(*nets, *ON), CPU)
    saved, batch, found = state(gan_run, 1), first_batch(), []
    hinge = lambda real, fake: 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())
    for updated in (False, True):
        model, disc = new_decoder(encoder), networks.load_discriminator(nets[3], CPU)
        if updated:
            own = model.state_dict()
            model.load_state_dict({k: v for k, v in saved.items() if k in own}, strict=False)
        loss, real, _ = discriminator_loss(disc, encoder, model, batch, hinge)
        found.append(loss.item())
    loss.backward()
    log = lines(gan_run)[0]
    assert log["disc"] == pytest.approx(found[1], rel=1e-5)
    assert log["disc"] != pytest.approx(found[0], rel=1e-5)             # of the old decoder
    assert log["logits_real"] == pytest.approx(real.mean().item(), abs=1e-3)
    check_first_gradients(disc, saved, "disc.")
    assert not any(k.startswith("disc.dino") for k in saved)


def test_discriminator_sees_reconstructions_without_noise(long_run, nets):
    """Its first step with the vanilla loss."""
    encoder, _, disc, _ = networks.stage1_networks(options(*nets, *ON), CPU)
    model = new_decoder(encoder)
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in state(long_run, 2).items() if k in own}, strict=False)
    vanilla = lambda real, fake: 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())
    loss, *_ = discriminator_loss(disc, encoder, model, first_batch(4), vanilla)
    assert lines(long_run)[1]["disc"] == pytest.approx(loss.item(), rel=1e-5)


def test_decoder_and_discriminator_leave_each_other_alone(nets, tmp_path):
    """Before the GAN's start the discriminator changes nothing for the decoder; before its own
    start it does not train."""
    base = [*SMALL, *nets, "--lpips", "1", "--gram", "100", "--steps", "2"]
    call(train_decoder, *base, "--gan", "0.5", "--disc-start", "1", "--gan-start", "2", "--out",
         tmp_path / "a")
    call(train_decoder, *base, "--gan", "0", "--out", tmp_path / "b")
    a, b = state(tmp_path / "a", 2), state(tmp_path / "b", 2)
    assert all(torch.equal(a[k], v) for k, v in b.items()) and len(a) > len(b)
    before, fresh = state(tmp_path / "a", 1), networks.load_discriminator(nets[3], CPU)
    for k, v in fresh.state_dict().items():
        if k.startswith("heads."):
            assert torch.equal(before[f"disc.{k}"], v), k
            assert not k.endswith("_orig") or not torch.equal(a[f"disc.{k}"], v), k
    one, two = lines(tmp_path / "a")
    assert "disc" not in one and "disc" in two and "gan" not in two
    assert lines(tmp_path / "b")[1]["loss"] == two["loss"]


@pytest.mark.slow
def test_micro_batches(nets, tmp_path, monkeypatch):
    """With a fixed lambda (which belongs to a micro-batch) the first gradient is the same; the
    spectral norms take one power iteration per step; the decoder's step takes none."""
    modes, forward = [], Discriminator.forward
    monkeypatch.setattr(Discriminator, "forward", lambda self, x:
                        (modes.append(self.training), forward(self, x))[1])
    command = [*SMALL, *nets, *ON, "--no-adaptive-gan", "--steps", "1", "--disc-start", "0",
               "--gan-start", "0", "--remat", "block", "--ema", "0"]
    call(train_decoder, *command, "--out", tmp_path / "a")
    call(train_decoder, *command, "--micro-batch", "2", "--out", tmp_path / "b")
    assert modes == [False, True] + [False, False, True, False]
    a, b = state(tmp_path / "a", 1), state(tmp_path / "b", 1)
    vectors = [k for k in a if k.startswith("disc.") and k.endswith(("_u", "_v"))]
    assert vectors and all(torch.equal(a[k], b[k]) for k in vectors)
    for k, v in a.items():
        if k.startswith("optimizer.decoder") and k.endswith("exp_avg"):
            assert (v - b[k]).norm() <= 1e-3 * v.norm() + 1e-7, k
    assert lines(tmp_path / "a")[0]["loss"] == pytest.approx(lines(tmp_path / "b")[0]["loss"], 1e-4)


def test_averages_and_exports(long_run):
    """ema += w (p - ema), w = 1 - min(decay, (1 + step) / (10 + step)), 0.9 at first. final/ has
    both under their names. The logged PSNR is the average's, on images of another seed."""
    assert training.ema_weight(0.998, 0) == pytest.approx(0.9)
    assert training.ema_weight(0.998, 10 ** 6) == pytest.approx(0.002)
    one, two, last = (state(long_run, k) for k in (1, 2, 4))
    key = "decoder_pred.weight"
    assert torch.allclose(two[f"ema.{key}"], one[f"ema.{key}"].lerp(two[key], 9 / 11), atol=1e-7)
    for name, prefix in (("model", ""), ("ema", "ema.")):
        found = load_file(long_run / f"final/{name}.safetensors")
        assert torch.equal(found[key], last[prefix + key])
    assert not torch.equal(last[key], last[f"ema.{key}"])
    encoder = networks.load_encoder(ENCODER, CPU)
    model = networks.load_decoder(long_run / "final/ema.safetensors", CPU, encoder)
    unseen = mixture(1000, "center")
    x = torch.stack([torch.from_numpy(unseen[i]["image"]) for i in range(64)])
    x = x.permute(0, 3, 1, 2) / 255                         # [B,3,S,S]
    with torch.no_grad():
        off = (x - (model(encoder(x)).clamp(0, 1) * 255).round() / 255).square().mean((1, 2, 3))
    assert lines(long_run)[-1]["psnr"] == pytest.approx((-10 * off.log10()).mean().item(), abs=1e-3)


# ------------------------------------------------------------------------------------------------
# The VAE
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vae_run(nets, tmp_path_factory):
    out = tmp_path_factory.mktemp("vae") / "run"
    with pytest.MonkeyPatch.context() as m:                 # scale and PSNR on 16 images, for speed
        m.setattr(train_decoder, "images", lambda m, n, d: metrics.images(m, min(n, 16), d))
        call(train_decoder, *SMALL, *nets, *ON, "--latent", "vae", "--kl", "0.01", "--steps", "2",
             "--lr", "3e-3", "--warmup", "0", "--disc-start", "0", "--gan-start", "0", "--out", out)
    return out


def test_first_step_of_the_vae(vae_run, nets):
    """KL = 0.5 (mean^2 + var - 1 - log var) with its weight in the loss and in the gradient; lambda
    is measured at the decoder's last layer, without the KL."""
    vae, batch = vaes.VAE(vaes.TINY), first_batch()
    for name, p in vae.named_parameters():
        p.data.copy_(vaes.initial(name, p.shape, 0))
    _, vgg, disc, _ = networks.stage1_networks(options(*nets, *ON, "--latent", "vae"), CPU)
    x = batch["images"].float() / 255
    mean, logvar = vae.posterior(x)
    noise = train_decoder.latent_noise(range(4), 0, mean.shape[1:], "posterior")
    x_hat = (vae.decoder(mean + (logvar / 2).exp() * noise) + 1) / 2
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
    l1, (lpips, gram) = (x_hat - x).abs().mean(), (v.mean() for v in vgg(x_hat, x))
    rec = l1 + lpips + 100 * gram
    gan = -disc.eval()(augment(x_hat, batch["fake_g"])).mean()
    lam = adaptive_weight(rec, gan, vae.decoder.conv_out.weight)
    loss = rec + 0.5 * lam * gan + 0.01 * kl
    loss.backward()
    line, saved = lines(vae_run)[0], state(vae_run, 1)
    for key, value in dict(kl=kl, l1=l1, gan=gan, gan_lambda=lam, loss=loss).items():
        assert line[key] == pytest.approx(value.item(), rel=1e-3), key
    assert kl > 1
    check_first_gradients(vae, saved)


def test_each_exported_vae_has_its_own_scale(vae_run):
    for name in ("model", "ema"):
        vae = networks.load_vae(vae_run / f"final/{name}.safetensors", CPU)
        found = vae.measure(metrics.images(mixture(), 16, CPU))
        assert (vae.scale, vae.shift) != (1, 0)
        assert (vae.scale, vae.shift) == pytest.approx(
            (found["scaling_factor"], found["shift_factor"]), rel=1e-4)
    z = vae.encode(next(metrics.images(mixture(), 16, CPU)))
    assert z.shape == (16, 64, 64) and z.mean().abs() < 0.2


# ------------------------------------------------------------------------------------------------
# Every --latent, --init
# ------------------------------------------------------------------------------------------------

def dinov2_folder(folder, C=24, hidden=48, depth=2, side=56, patch=14):
    """Write random weights in the layout of facebook/webssl-dino300m-full2b-224."""
    g = torch.Generator().manual_seed(0)
    N = (side // patch) ** 2
    shapes = {"embeddings.cls_token": [1, 1, C], "embeddings.mask_token": [1, C],
              "embeddings.position_embeddings": [1, 1 + N, C],
              "embeddings.patch_embeddings.projection.weight": [C, 3, patch, patch],
              "embeddings.patch_embeddings.projection.bias": [C],
              "layernorm.weight": [C], "layernorm.bias": [C]}
    for i in range(depth):
        pairs = {"attention.attention.query": [C, C], "attention.attention.key": [C, C],
                 "attention.attention.value": [C, C], "attention.output.dense": [C, C],
                 "mlp.fc1": [hidden, C], "mlp.fc2": [C, hidden], "norm1": [C], "norm2": [C]}
        for name, shape in pairs.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        shapes.update({f"encoder.layer.{i}.layer_scale{k}.lambda1": [C] for k in (1, 2)})
    tensors = {k: torch.randn(s, generator=g) * 0.2 + ("norm" in k or "scale" in k)
               for k, s in shapes.items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dict(
        model_type="dinov2", hidden_size=C, mlp_ratio=hidden // C, num_hidden_layers=depth,
        num_attention_heads=4, image_size=side, patch_size=patch)))
    return folder


@pytest.fixture(scope="module")
def webssl_run(nets, tmp_path_factory):
    """One step on a tiny DINOv2, in a process of its own."""
    folder = tmp_path_factory.mktemp("webssl")
    command = [sys.executable, ROOT / "train_decoder.py", *SMALL, *nets, *ON, "--latent", "webssl",
               "--encoder", dinov2_folder(folder / "dinov2"), "--steps", "1", "--disc-start", "0",
               "--gan-start", "0", "--out", folder / "run"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize("latent", ["siglip2", "vae",
                                    pytest.param("webssl", marks=pytest.mark.slow)])
def test_every_latent(latent, request):
    """The run ends, has its config from the start, and evaluate.py reads it."""
    out = request.getfixturevalue({"siglip2": "gan_run"}.get(latent, f"{latent}_run"))
    line = lines(out)[-1]
    assert all(math.isfinite(line[k]) for k in ("loss", "gan", "disc", "psnr"))
    with safe_open(out / "final/ema.safetensors", "pt") as f:
        config = json.loads(f.metadata()["config"])
    assert json.loads((out / "config.json").read_text()).keys() == config.keys()
    if latent == "webssl":
        assert config["encoder"] == str(out.parent / "dinov2") and config["hidden_size"] == 24
        assert config["image_mean"] == pytest.approx([0.485, 0.456, 0.406])
    args = SimpleNamespace(run=str(out), encoder=None, features=None)
    reconstruct, side, *_ = evaluate.load_reconstruction(args, CPU)
    x = torch.rand(2, 3, side, side)
    with torch.no_grad():
        assert reconstruct(x).shape == x.shape


@pytest.mark.parametrize("latent", ["siglip2", "vae"])
def test_init_takes_runs_checkpoints_and_files(latent, gan_run, vae_run):
    run = gan_run if latent == "siglip2" else vae_run
    final, last = run / "final/ema.safetensors", run / "checkpoints/step-0000002"
    want, encoder = load_file(final), networks.load_encoder(ENCODER, CPU)
    if latent == "vae":
        encoder = None
    for source in (run, last, final):
        model = train_decoder.build(options("--latent", latent, "--init", source), encoder, CPU)
        assert all(torch.equal(v, want[k]) for k, v in model.state_dict().items())
        trained = {k for k, p in model.named_parameters() if p.requires_grad}
        assert trained == want.keys() - {"decoder_pos_embed"} and model.training


def test_init_with_flags_that_contradict_it(gan_run):
    encoder = networks.load_encoder(ENCODER, CPU)
    for extra, word in ((["--patch", "16"], "patch_size"), (["--size", "b"], "--size")):
        with pytest.raises(cli.UserError, match=word):
            train_decoder.build(options("--init", gan_run, *extra), encoder, CPU)


# ------------------------------------------------------------------------------------------------
# Planning and bad input
# ------------------------------------------------------------------------------------------------

def test_dry_run_of_the_paper_s_decoder(capsys, tmp_path, monkeypatch):
    """It needs neither files nor data, and writes nothing."""
    monkeypatch.chdir(tmp_path)

    def plan(*argv):
        call(train_decoder, *argv, "--dry-run", "--json", "--data", "no/such/data")
        return json.loads(capsys.readouterr().out)

    s = plan("--size", "xl", "--dtype", "float32")
    parts, memory = s["parameters"], s["memory_gb_per_device"]
    assert sum(v for k, v in parts.items() if k != "total") == parts["total"]
    assert parts["decoder"] == pytest.approx(0.4156e9, rel=1e-3) and s["latent"] == [256, 1152]
    assert {"encoder", "decoder", "vgg", "discriminator"} == set(s["train_tflop_per_image"])
    assert s["train_tflop_per_image"]["vgg"] == pytest.approx(3 * 2 * 15.35e9 / 1e12, rel=1e-2)
    assert sum(v for k, v in memory.items() if k != "total") == pytest.approx(memory["total"])
    trained = parts["decoder"] + parts["discriminator"]
    assert memory["moments"] == pytest.approx(8 * trained / 1e9)
    s = plan("--size", "xl", "--latent", "webssl")
    assert s["latent"] == [256, 1024]
    s = plan("--size", "b", "--latent", "vae")
    assert s["latent"] == [256, 64] and s["parameters"]["decoder"] == 83_819_683
    s = plan("--size", "xl", "--mesh", "fsdp=4", "--device", "cuda")
    assert s["images_at_a_time"] == 256                                     # 64 images per device
    assert not list(tmp_path.iterdir())


BAD = [
    (["--gan", "1", "--disc-start", "200", "--gan-start", "100"],
     ["--gan-start 100", "--disc-start 200"]),
    (["--disc-start", "7x"], ["--disc-start"]),
    (["--gram-layers", "5"], ["--gram-layers"]),
    (["--lpips", "-1"], ["--lpips"]),
    (["--encoder", ""], ["--encoder"]),
    (["--latent", "vae", "--patch", "8"], ["--patch", "vae"]),
    (["--gram", "1", "--vgg", "no/such.safetensors"], ["no/such", "--vgg"]),
    (["--gan", "1", "--dino", ENCODER], ["--dino"]),
    (["--lpips", "1", "--vgg", ENCODER], ["--vgg", "features.0.weight"]),
    (["--size", "b", "--encoder", ENCODER],
     ["--vgg", "--lpips-weights", "--dino", "vgg16-397923af", "weights/"]),
]


@pytest.mark.parametrize("argv, words", BAD, ids=[" ".join(map(str, a[-2:])) for a, _ in BAD])
def test_bad_input_is_one_clear_line(argv, words, tmp_path, monkeypatch, capsys):
    """Exit status 2, the value and the flag in the message, nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_decoder.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.main(train_decoder.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("error:") == 1
    for word in words:
        assert word in said, (word, said)
    assert not list(tmp_path.iterdir())
