"""Stage 1: the losses, the order of a training step, starts, statistics, the VAE,
evaluation, the small loss networks, bad input.

    pytest -m "" tests/test_stage1.py            # with the slow ones
"""
import json
import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data
import decoder as decoders
import discriminator as gans
import evaluate
import parallel
import perceptual
import run as runs
import train_decoder
import train_encoder
import vae as vaes
import weights

torch.set_num_threads(1)
ENCODER = ROOT / "assets/tiny/encoder.safetensors"
DEVICES = parallel.setup("cpu", "float32")
SMALL = ["--batch", "4", "--workers", "0", "--dtype", "float32", "--device", "cpu",
         "--log-every", "1", "--save-every", "1", "--keep", "9"]


def call(module, *argv):
    """A script's main in this process, with the signal handlers put back."""
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


ON = ["--lpips", "1", "--gram", "100", "--gan", "0.5"]


@pytest.fixture(scope="module")
def gan_run(nets, tmp_path_factory):
    """Two steps with every term on from the first."""
    out = tmp_path_factory.mktemp("gan") / "run"
    call(train_decoder, *SMALL, *nets, *ON, "--steps", "2", "--disc-start", "0", "--gan-start", "0",
         "--out", out)
    return out


def options(*argv):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "argv", ["train_decoder.py", *map(str, argv)])
        return train_decoder.arguments()


# ---- arguments, schedules ----

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
    assert (a.warmup, a.warmup_disc, a.ema) == (5000, 2500, 0.9978)
    assert (a.l1, a.lpips, a.gram, a.gan) == (1, 1, 100, 10) and a.adaptive_gan
    assert options("--size", "xl", "--batch", "256").gan_start == 40_000        # epochs, not steps


def test_a_tiny_term_without_its_network_is_off(monkeypatch, tmp_path):
    monkeypatch.setattr(train_decoder, "TINY_VGG", tmp_path / "vgg.safetensors")
    monkeypatch.setattr(train_decoder, "TINY_DINO", tmp_path / "dino.safetensors")
    a = options()
    assert (a.l1, a.lpips, a.gram, a.gan) == (1, 0, 0, 0)
    assert options("--gan", "2").gan == 2 and options("--vgg", "x").lpips == 0.1
    (tmp_path / "dino.safetensors").touch()
    assert (options().gan > 0, options().lpips) == (True, 0)


def test_schedule(gan_run):
    assert runs.cosine(0, 200_000, 5000, 0.1) == pytest.approx(1 / 5000)
    assert runs.cosine(4999, 200_000, 5000, 0.1) == 1 and runs.cosine(5000, 200_000, 5000, 0.1) == 1
    assert runs.cosine(102_500, 200_000, 5000, 0.1) == pytest.approx(0.55)
    assert runs.cosine(200_000, 200_000, 5000, 0.1) == pytest.approx(0.1)
    a, seen = options(), lines(gan_run)
    assert [line["lr"] for line in seen] == pytest.approx([a.lr / a.warmup, 2 * a.lr / a.warmup])
    assert [line["lr_disc"] for line in seen] == pytest.approx(
        [a.lr_disc / a.warmup_disc, 2 * a.lr_disc / a.warmup_disc], rel=1e-2)


# ---- losses ----

def test_lpips_and_gram_by_hand():
    vgg = perceptual.Perceptual(perceptual.TINY_WIDTH)              # LPIPS weights are 1/8 here
    a, b = torch.zeros(2, 1, 8, 1, 2)
    a[0, 0], b[0, 1] = torch.tensor([3.0, 0.0]), torch.tensor([5.0, 0.0])
    # unit vectors e0 and e1 at one of two positions: (1 + 1) / 8 there, 0 at the other
    assert vgg.lpips([a], [b]).item() == pytest.approx(0.125)
    # G has one entry, 9/16 and 25/16; c*c = 64 entries
    assert vgg.gram([a], [b], [0]).item() == pytest.approx(((9 / 16) ** 2 + (25 / 16) ** 2) / 64)
    assert vgg.gram([a, a], [b, b], [0, 1]).item() == pytest.approx(2 * 706 / 256 / 64)


def test_gradients_reach_the_picture_and_not_the_frozen_nets(nets):
    args = options(*nets, *ON, "--encoder", ENCODER)
    encoder, vgg, disc, found = train_decoder.networks(args, DEVICES)
    x = torch.rand(2, 3, 64, 64)
    x_hat = torch.rand(2, 3, 64, 64, requires_grad=True)
    lpips, gram = vgg(x_hat, x)
    (lpips.sum() + gram.sum() + gans.g_loss(disc(gans.augment(x_hat, torch.rand(2, 5))))).backward()
    assert (x_hat.grad.flatten(1).abs().sum(1) > 0).all()
    frozen = [*encoder.parameters(), *vgg.parameters(), *disc.dino.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    assert all(p.requires_grad for p in disc.heads.parameters())
    assert "not the pretrained one" in found["VGG16"] and "not the pretrained" in found["DINO"]


def test_draws_belong_to_the_image():
    """Not to the batch it is in; streams and seeds differ."""
    a = train_decoder.uniform([5, 6, 7], 3, train_decoder.FAKE_D)
    assert torch.equal(a[1:], train_decoder.uniform([6, 7], 3, train_decoder.FAKE_D))
    others = [train_decoder.uniform([5], s, k) for s, k in ((3, 1), (3, 3), (4, 2))]
    assert all(not torch.equal(a[:1], o) for o in others)
    noise = train_decoder.latent_noise([8, 9], 0, (64, 96), 0.2, "uniform")
    assert torch.equal(noise[1:], train_decoder.latent_noise([9], 0, (64, 96), 0.2, "uniform"))
    assert (noise.std((1, 2)) < 0.21).all()


# ---- the step ----

def first_batch():
    mixture = data.Mixture(train_decoder.DATA, 64, 0, crop="random", text=False)
    return train_decoder.Collate()([mixture[i] for i in range(4)])


def test_first_step_is_the_sum_of_its_terms(gan_run, nets):
    """The gradient (0.1 of it is Adam's first moment) against L.backward() of the whole formula."""
    args = options(*nets, *ON, "--encoder", ENCODER)
    encoder, vgg, disc, _ = train_decoder.networks(args, DEVICES)
    config = decoders.decoder_config("tiny", 96, 64, 8, encoder.mean, encoder.std)
    model = decoders.Decoder(config)
    decoders.init_weights(model, 0)
    batch = first_batch()
    x = batch["images"].float() / 255
    x_hat, W = model(encoder(x)), model.decoder_pred.weight
    l1, (lpips, gram) = (x_hat - x).abs().mean(), (v.mean() for v in vgg(x_hat, x))
    rec = l1 + lpips + 100 * gram
    gan = -disc.eval()(gans.augment(x_hat, batch["fake_g"])).mean()
    a, b = (torch.autograd.grad(v, W, retain_graph=True)[0].norm() for v in (rec, gan))
    weight = (a / (b + 1e-6)).clamp(0, 1e4)
    (rec + 0.5 * weight * gan).backward()
    log, saved = lines(gan_run)[0], state(gan_run, 1)
    for key, value in dict(l1=l1, lpips=lpips, gram=gram, gan=gan, gan_lambda=weight,
                           loss=rec + 0.5 * weight * gan).items():
        assert log[key] == pytest.approx(value.item(), rel=1e-3, abs=1e-6), key
    for name, p in model.named_parameters():
        if p.requires_grad:
            moment = saved[f"optimizer.{name}.exp_avg"] * 10
            assert (moment - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6, name


def test_discriminator_sees_8_bit_pictures_of_the_updated_decoder(gan_run, nets):
    """Its first gradient, from the decoder's weights after its own step, without noise."""
    args = options(*nets, *ON, "--encoder", ENCODER)
    encoder, _, disc, _ = train_decoder.networks(args, DEVICES)
    saved, batch = state(gan_run, 1), first_batch()
    x = batch["images"].float() / 255
    losses = []
    for updated in (True, False):
        model = decoders.Decoder(decoders.decoder_config("tiny", 96, 64, 8, encoder.mean,
                                                         encoder.std))
        decoders.init_weights(model, 0)
        if updated:
            own = model.state_dict()
            model.load_state_dict({k: v for k, v in saved.items() if k in own}, strict=False)
        with torch.no_grad():
            fake = (model(encoder(x)).clamp(0, 1) * 255).round() / 255
        disc.load_state_dict(weights.load_discriminator(args.dino, DEVICES).state_dict())
        disc.train()
        pair = (gans.augment(x, batch["real_d"]),
                gans.augment(fake, batch["fake_d"]))
        real, fake = disc(torch.cat(pair)).chunk(2)
        losses.append(0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()))
        if updated:
            losses[0].backward()
    log = lines(gan_run)[0]
    assert log["disc"] == pytest.approx(losses[0].item(), rel=1e-5)
    assert log["logits_real"] == pytest.approx(real.mean().item(), abs=1e-3)
    assert log["disc"] != pytest.approx(losses[1].item(), rel=1e-5)     # of the old decoder
    for name, p in disc.named_parameters():
        if p.requires_grad:
            moment = saved[f"optimizer.disc.{name}.exp_avg"] * 10
            assert (moment - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-6, name
    assert not any(k.startswith("disc.dino") for k in saved)
    assert (load_file(gan_run / "final/ema.safetensors").keys()
            == load_file(gan_run / "final/model.safetensors").keys())


def test_steps_of_decoder_and_discriminator_leave_each_other_alone(nets, tmp_path):
    """Before the adversarial start D changes nothing for the decoder; before its own it rests."""
    base = [*SMALL, *nets, "--lpips", "1", "--gram", "100", "--steps", "2"]
    call(train_decoder, *base, "--gan", "0.5", "--disc-start", "1", "--gan-start", "2", "--out",
         tmp_path / "a")
    call(train_decoder, *base, "--gan", "0", "--out", tmp_path / "b")
    a, b = state(tmp_path / "a", 2), state(tmp_path / "b", 2)
    assert all(torch.equal(a[k], v) for k, v in b.items()) and len(a) > len(b)
    before, fresh = state(tmp_path / "a", 1), weights.load_discriminator(nets[3], DEVICES)
    for k, v in fresh.state_dict().items():
        if k.startswith("heads."):
            assert torch.equal(before[f"disc.{k}"], v), k
            assert not k.endswith("_orig") or not torch.equal(a[f"disc.{k}"], v), k
    one, two = lines(tmp_path / "a")
    assert "disc" not in one and "disc" in two and "gan" not in two
    assert lines(tmp_path / "b")[1]["loss"] == two["loss"]


def test_accumulation_gives_the_same_first_gradient(nets, tmp_path):
    """With a fixed lambda, which belongs to a micro-batch."""
    command = [*SMALL, *nets, *ON, "--no-adaptive-gan", "--steps", "1", "--disc-start", "0",
               "--gan-start", "0", "--remat", "block", "--ema", "0"]
    call(train_decoder, *command, "--out", tmp_path / "a")
    call(train_decoder, *command, "--micro-batch", "2", "--out", tmp_path / "b")
    a, b = state(tmp_path / "a", 1), state(tmp_path / "b", 1)
    for k, v in a.items():
        if k.startswith("optimizer.decoder") and k.endswith("exp_avg"):
            assert (v - b[k]).norm() <= 1e-3 * v.norm() + 1e-7, k
    assert lines(tmp_path / "a")[0]["loss"] == pytest.approx(lines(tmp_path / "b")[0]["loss"], 1e-4)


def test_the_spectral_norms_take_one_step_whatever_the_micro_batch(nets, tmp_path):
    command = [*SMALL, *nets, *ON, "--steps", "1", "--disc-start", "0", "--gan-start", "1"]
    for name, micro in (("a", "4"), ("b", "1")):
        call(train_decoder, *command, "--micro-batch", micro, "--out", tmp_path / name)
    a, b = state(tmp_path / "a", 1), state(tmp_path / "b", 1)
    vectors = [k for k in a if k.startswith("disc.") and k.endswith(("_u", "_v"))]
    assert vectors and all(torch.equal(a[k], b[k]) for k in vectors)


def test_adaptive_weight_from_gradients_at_the_picture():
    W = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
    x = W @ torch.tensor([1.0, -1.0])
    rec, gan = x.square().sum(), (3 * x).sum()
    direct = gans.adaptive_weight(rec, gan, W)
    g_rec, g_gan = (torch.autograd.grad(v, x, retain_graph=True)[0] for v in (rec, gan))
    at_x = gans.adaptive_weight((x * g_rec).sum(), (x * g_gan).sum(), W)
    # x = (-1, -1): |2x| / |3 (1,1)| = 2/3, the input's norm cancels
    assert direct.item() == at_x.item() == pytest.approx(2 / 3, rel=1e-5)


# ---- latent statistics ----

def test_latent_statistics_round_trip(tmp_path):
    out = tmp_path / "run"
    call(train_decoder, *SMALL, "--lpips", "0", "--gram", "0", "--gan", "0", "--steps", "1",
         "--latent-stats", "auto", "--stats-images", "16", "--out", out)
    encoder = weights.load_encoder(ENCODER, DEVICES)
    model = weights.load_decoder(out / "final/model.safetensors", DEVICES, 96, encoder.mean,
                                 encoder.std)
    mixture = data.Mixture(train_decoder.DATA, 64, 0, crop="random", text=False)
    with torch.no_grad():
        z = encoder(next(evaluate.pictures(mixture, 16, DEVICES)))          # [16,N,C]
        u = model.normalise(z)
        assert u.mean(0).abs().max() < 1e-3
        assert u.var(0, correction=0).median().item() == pytest.approx(1, abs=1e-2)
        plain = decoders.Decoder({**model.config, "latent_stats": False})
        plain.load_state_dict({k: v for k, v in model.state_dict().items() if "latent_" not in k})
        assert torch.allclose(model(u), plain(z), atol=1e-4)
        args = SimpleNamespace(encoder=None, decoder=str(out / "final/model.safetensors"))
        of_stage2 = weights.load_codec(weights.config_of(weights.ASSETS), args, DEVICES)[1]
        assert torch.allclose(of_stage2(z), plain(z), atol=1e-4)            # the latent as it is
        x = next(evaluate.pictures(mixture, 16, DEVICES))
        assert torch.allclose(evaluate.reconstruct(encoder, of_stage2, x), plain(z), atol=1e-4)
        args = SimpleNamespace(run=out / "final/model.safetensors", encoder=None, features=None)
        assert torch.allclose(evaluate.load_codec(args, DEVICES)[0](x), plain(z), atol=1e-4)
    grid = z.unflatten(1, (8, 8))[:, 2, 5]                                  # row 2, column 5
    assert torch.allclose(model.latent_mean[:, 2, 5], grid.mean(0), atol=1e-4)
    save_file({"mean": model.latent_mean, "var": model.latent_var}, tmp_path / "s.safetensors")
    call(train_decoder, *SMALL, "--lpips", "0", "--gram", "0", "--gan", "0", "--steps", "1",
         "--latent-stats", tmp_path / "s.safetensors", "--out", tmp_path / "file")
    a, b = (load_file(d / "final/model.safetensors") for d in (out, tmp_path / "file"))
    assert all(torch.equal(v, b[k]) for k, v in a.items())


# ---- resume ----

# ---- the VAE ----

def test_vae_end_to_end(nets, tmp_path, capsys):
    out = tmp_path / "vae"
    call(train_decoder, *SMALL, *nets, *ON, "--latent", "vae", "--steps", "2", "--disc-start", "0",
         "--gan-start", "0", "--out", out)
    torch.manual_seed(0)
    model, batch = vaes.VAE(vaes.TINY), first_batch()
    with torch.no_grad():
        mean, logvar = model.posterior(batch["images"].float() / 255)
        eps = train_decoder.gaussian(range(4), 0, mean.shape[1:])
        x_hat = (model.decoder(mean + torch.exp(logvar / 2) * eps) + 1) / 2
        l1 = (x_hat - batch["images"] / 255).abs().mean()
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).sum() / 4
    log = lines(out)[0]
    assert log["kl"] == pytest.approx(kl.item(), rel=1e-4)
    assert log["l1"] == pytest.approx(l1.item(), rel=1e-4)
    model = weights.load_vae(out / "final/ema.safetensors", DEVICES)
    assert model.config["scaling_factor"] != 1 and model.shift != 0
    mixture = data.Mixture(train_decoder.DATA, 64, 0, crop="random", text=False)
    z = model.encode(next(evaluate.pictures(mixture, 64, DEVICES)))
    assert z.shape == (64, 64, 64) and z.mean().abs() < 0.2
    capsys.readouterr()
    call(evaluate, "decoder", "--run", out, "--data", "builtin:web", "--count", "4", "--batch", "4",
         *nets[:2])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["images"] == 4 and row["psnr"] > 3 and row["lpips"] > 0
    call(train_decoder, *SMALL, "--latent", "vae", "--lpips", "0", "--gram", "0", "--gan", "0",
         "--steps", "1", "--init", out, "--out", tmp_path / "more")
    assert "psnr" in lines(tmp_path / "more")[-1]


# ---- metrics ----

def test_psnr_and_ssim():
    a = torch.full((2, 3, 16, 16), 0.2)                 # 51 of 255
    b = torch.stack([a[0] + 0.1, a[0]])
    first, second = evaluate.psnr(a, torch.stack([a[0] + 0.103, a[0]]))     # 77.3: stored as 77
    assert first.item() == pytest.approx(-20 * math.log10(26 / 255), abs=1e-3)
    assert second == 100
    # no variance: (2 ma mb + c1) / (ma^2 + mb^2 + c1)
    assert evaluate.ssim(a, b)[0].item() == pytest.approx(0.1201 / 0.1301, abs=1e-4)
    # one window, by the definition
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 1, 11, 11, generator=g, dtype=torch.float64)
    w = torch.exp(-(torch.arange(11.0, dtype=torch.float64) - 5) ** 2 / 4.5)
    w = torch.outer(w, w) / w.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    dx, dy = x - mx, y - my
    vx, vy, cov = (w * dx ** 2).sum(), (w * dy ** 2).sum(), (w * dx * dy).sum()
    want = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert evaluate.ssim_map(x, y)[0, 0, 5, 5].item() == pytest.approx(want.item(), rel=1e-9)


def test_psnr_and_ssim_against_torchmetrics():
    """LPIPS has its golden file, tests/golden/lpips.safetensors."""
    image = pytest.importorskip("torchmetrics.functional.image")
    g = torch.Generator().manual_seed(1)
    a = evaluate.round8(torch.rand(3, 3, 40, 48, generator=g))
    b = evaluate.round8((a + 0.1 * torch.randn(a.shape, generator=g)).clamp(0, 1))
    want = image.structural_similarity_index_measure(a, b, data_range=1.0)
    assert evaluate.ssim(a, b).mean().item() == pytest.approx(want.item(), abs=1e-4)
    want = image.peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none")
    assert torch.allclose(evaluate.psnr(a, b), want, atol=1e-4)


def test_ssim_against_scikit_image():
    """Its gaussian_weights form, at the positions where the window lies inside the picture."""
    metrics = pytest.importorskip("skimage.metrics")
    g = torch.Generator().manual_seed(2)
    a = torch.rand(3, 40, 48, generator=g)
    b = (a + 0.1 * torch.randn(a.shape, generator=g)).clamp(0, 1)
    _, where = metrics.structural_similarity(
        a.numpy(), b.numpy(), data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True)
    found = evaluate.ssim_map(a[None], b[None])[0]
    assert torch.allclose(found[:, 5:-5, 5:-5], torch.from_numpy(where[:, 5:-5, 5:-5]), atol=1e-4)


def test_frechet_distance():
    """Closed forms: a shift; a scale of every axis; and the trace form for any two covariances."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(500, 6, generator=g, dtype=torch.float64)
    assert evaluate.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert evaluate.frechet(a, a + 2) == pytest.approx(6 * 4, rel=1e-9)
    centred = a - a.mean(0)
    spread = torch.cov(a.T).trace().item()
    assert evaluate.frechet(centred, 3 * centred) == pytest.approx(4 * spread, rel=1e-9)
    b = a @ torch.randn(6, 6, generator=g, dtype=torch.float64)
    sa, sb = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(sa @ sb).real.sqrt().sum()
    want = (a.mean(0) - b.mean(0)).square().sum() + sa.trace() + sb.trace() - 2 * cross
    assert evaluate.frechet(a, b) == pytest.approx(want.item(), rel=1e-9)
    few = a[:4]                                     # fewer pictures than features
    assert evaluate.frechet(few, few) == pytest.approx(0, abs=1e-6)


def test_evaluate_decoder(nets, gan_run, capsys):
    call(evaluate, "decoder", "--count", "6", "--batch", "4", "--dtype", "float32", *nets[:2])
    said = capsys.readouterr().out
    row = json.loads(said.splitlines()[-1])
    assert row["task"] == "decoder" and row["images"] == 18 and row["psnr"] > 24
    assert set(row["sources"]) == {"builtin:web", "builtin:synthetic", "builtin:text"}
    mean = sum(r["psnr"] for r in row["sources"].values()) / 3
    assert row["psnr"] == pytest.approx(mean, rel=1e-5) and 0.7 < row["ssim"] < 1
    assert row["fd_enc"] > 0 and row["lpips"] > 0 and "not the pretrained one" in row["lpips_net"]
    call(evaluate, "decoder", "--run", gan_run, "--data", "builtin:web", "--count", "6",
         "--no-lpips")
    worse = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert worse["lpips"] is None and worse["fd_enc"] > row["sources"]["builtin:web"]["fd_enc"]


# ---- planning ----

def test_rfid(nets, gan_run, tmp_path, capsys, monkeypatch):
    """Random Inception weights: equal pictures have distance 0, reconstructions do not."""
    fid = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as m:
        m.setattr(fid, "load_state_dict_from_url", lambda *_, **__: {})
        m.setattr(fid.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = fid.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    f = evaluate.load_inception(tmp_path / "inception.pth", DEVICES)
    x = torch.rand(3, 3, 64, 64)
    assert f(x).shape == (3, 2048) and torch.equal(f(x), f(evaluate.round8(x)))
    call(evaluate, "decoder", "--run", gan_run, "--data", "builtin:web", "--count", "4", *nets[:2],
         "--inception", tmp_path / "inception.pth")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rfid"] > 0


def test_dry_run_of_the_paper_s_decoder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(train_decoder, "--size", "xl", "--dry-run", "--json", "--data", "no/such/data")
    s = json.loads(capsys.readouterr().out)
    parts = s["parameters"]
    assert sum(v for k, v in parts.items() if k != "total") == parts["total"]
    assert parts["decoder"] == pytest.approx(0.4156e9, rel=1e-3) and s["latent"] == [256, 1152]
    assert {"encoder", "decoder", "vgg", "discriminator"} == set(s["train_tflop_per_image"])
    assert s["train_tflop_per_image"]["vgg"] == pytest.approx(3 * 2 * 15.35e9 / 1e12, rel=1e-2)
    memory = s["memory_gb_per_device"]
    assert sum(v for k, v in memory.items() if k != "total") == pytest.approx(memory["total"])
    assert not list(tmp_path.iterdir())
    call(train_decoder, "--size", "b", "--latent", "vae", "--dry-run", "--json")
    s = json.loads(capsys.readouterr().out)
    assert s["latent"] == [256, 64] and s["parameters"]["decoder"] == 83_819_683
    call(train_decoder, "--size", "xl", "--dry-run", "--json", "--mesh", "fsdp=4", "--device", "cuda")
    s = json.loads(capsys.readouterr().out)                                 # 64 images a device
    assert s["memory_gb_per_device"] == pytest.approx(memory, rel=1e-6)
    for arch in ("vit", "vgg", "dino"):
        call(train_encoder, "--arch", arch, "--dry-run", "--json", "--data", "no/such/data")
        s = json.loads(capsys.readouterr().out)
        assert sum(v for k, v in s["parameters"].items() if k != "total") == \
            s["parameters"]["total"] and s["train_tflop_per_image"].keys() == {"encoder", "text"}


def kept_bytes(parameters, function):
    """Bytes that autograd keeps for a backward pass, without the parameters."""
    own, seen = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(t):
        if (s := t.untyped_storage()).data_ptr() not in own:
            seen[s.data_ptr()] = (s.nbytes(), t)
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(n for n, _ in seen.values())


def test_flops_and_activations_against_torch():
    x = torch.rand(2, 3, 64, 64, requires_grad=True)
    model = decoders.Decoder(decoders.decoder_config("tiny", 96, 64, 8, (0.5,) * 3, (0.5,) * 3))
    vgg, disc = perceptual.Perceptual(1 / 8), gans.Discriminator(gans.TINY).eval()
    vae, z = vaes.VAE(vaes.TINY), torch.randn(2, 64, 96)
    attention = 4 * 4 * 65 * 65                     # a channel, in a kernel torch does not count
    for net, function, flops, size, width in (
            (model, lambda: model(z), model.forward_flops(), model.activation_bytes(), 160),
            (vgg, lambda: vgg.maps(x), vgg.forward_flops(64), None, 0),
            (vgg, lambda: vgg(x, x.detach()), None, vgg.activation_bytes(64), 0),
            (disc, lambda: disc(x), sum(disc.forward_flops()), disc.activation_bytes(), 64),
            (vae, lambda: vae.decode(vae.encode(x)), None, vae.activation_bytes(64), 0)):
        with FlopCounterMode(display=False) as counter:
            kept = kept_bytes(net.parameters(), function) / 2
        if flops:
            counted = counter.get_total_flops() / 2
            counts = counted, counted + width * attention
            assert min(abs(c - flops) for c in counts) < 0.01 * flops
        if size:
            assert size == pytest.approx(kept, rel=0.3)


# ---- the small loss networks ----

@pytest.mark.slow
@pytest.mark.parametrize("arch", ["vgg", "dino"])
def test_train_encoder_makes_the_loss_networks(arch, tmp_path, capsys):
    out = tmp_path / arch
    call(train_encoder, *SMALL, "--arch", arch, "--steps", "2", "--sample-every", "2",
         "--tokenizer", ROOT / "assets/tiny", "--out", out)
    said = capsys.readouterr().out
    assert "retrieval among" in said and ("linear probe" in said) == (arch == "dino")
    file, before = out / "final/model.safetensors", state(out, 1)
    first = {"vgg": "features.0.weight", "dino": "patch_embed.proj.weight"}[arch]
    exported = load_file(file)
    assert not torch.equal(before[f"encoder.{first}"], exported[first])
    if arch == "vgg":
        net = weights.load_perceptual(out, None, DEVICES)
        assert net.width == perceptual.TINY_WIDTH and net.lin0["model"][1].weight.unique() == 1 / 8
    else:
        net = weights.load_discriminator(out, DEVICES)
        assert net.config["patch"] == 8 and net.config["image_size"] == 64
        assert torch.equal(net.dino.patch_embed["proj"].weight, exported[first])


# ---- bad input ----

BAD = [
    ("train_decoder", ["--gan", "1", "--disc-start", "200", "--gan-start", "100"],
     ["--gan-start 100", "--disc-start 200"]),
    ("train_decoder", ["--disc-start", "7x"], ["--disc-start"]),
    ("train_decoder", ["--gram-layers", "5"], ["--gram-layers"]),
    ("train_decoder", ["--lpips", "-1"], ["--lpips"]),
    ("train_decoder", ["--latent", "vae", "--patch", "8"], ["--patch", "vae"]),
    ("train_decoder", ["--gram", "1", "--vgg", "no/such.safetensors"], ["no/such", "--vgg"]),
    ("train_decoder", ["--gan", "1", "--dino", ENCODER], ["--dino", "does not fit"]),
    ("train_decoder", ["--lpips", "1", "--vgg", ENCODER], ["--vgg", "features.0.weight"]),
    ("train_decoder", ["--lpips", "0", "--gram", "0", "--gan", "0", "--latent-stats", ENCODER],
     ["--latent-stats", "mean"]),
    ("train_decoder", ["--size", "b", "--encoder", ENCODER],
     ["--vgg", "--lpips-weights", "--dino", "vgg16-397923af", "weights/"]),
    ("evaluate", [], ["task"]),
    ("evaluate", ["decoder", "--run", "no/such"], ["no/such", "--run"]),
    ("evaluate", ["decoder", "--count", "1"], ["--count 1"]),
    ("evaluate", ["decoder", "--data", "builtin:nope"], ["builtin:nope"]),
    ("evaluate", ["decoder", "--run", ENCODER], ["--decoder|--run"]),
    ("train_encoder", ["--arch", "vgg", "--depth", "3"], ["--arch vgg", "--depth"]),
    ("train_encoder", ["--arch", "vgg", "--dense", "1"], ["--dense 1", "vgg"]),
]


@pytest.mark.parametrize("script, argv, words", BAD, ids=[f"{s} {a[-2:]}" for s, a, _ in BAD])
def test_bad_input_is_one_clear_line(script, argv, words, tmp_path, monkeypatch, capsys):
    """Exit status 2, the value and the flag in the message, nothing written."""
    module = globals()[script]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        runs.main(module.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("error:") == 1
    for word in words:
        assert any(w in said for w in word.split("|")), (word, said)
    assert not list(tmp_path.iterdir())
