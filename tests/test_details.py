"""Details that the docstrings promise and that no other test sees: each of these fails on a small,
plausible mistake (a sign, an axis, an epsilon, a default, a seed that collides) on which all other
tests passed.

    pytest tests/test_details.py
"""
import json
import math
import os
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import benchmark
import best_of
import data
import decoder as decoders
import discriminator as gans
import dit as dits
import encoder as encoders
import evaluate
import flow
import parallel
import perceptual
import run as runs
import sample
import test_released as r
import test_stage2 as t
import text_model as text
import train_decoder
import train_dit
import train_encoder
import vae as vaes
import weights
import stage2
import networks
import world
from data import Mixture
from test_data import png, write_tar
from test_resume import arguments
from test_sample import TOKENIZER, Scripted, draws, small_dit
from test_stage1 import SMALL, call, first_batch, lines

CPU = parallel.setup("cpu", "float32")
OFF = ["--lpips", "0", "--gram", "0"]
ENCODER = ["--width", "48", "--depth", "1", "--tokenizer", weights.ASSETS]


def test_the_noise_of_a_prompt_and_a_seed_is_no_other_s():
    assert not torch.equal(flow.noise_for("1 cat", 1, 4, 3), flow.noise_for(" cat", 11, 4, 3))


def test_guidance_is_computed_in_fp32(monkeypatch):
    seen, guide, (cond, noise) = set(), flow.guide, draws(1, True)
    monkeypatch.setattr(flow, "guide", lambda a, b, s:
                        (seen.update([a.dtype, b.dtype]), guide(a, b, s))[1])
    flow.generate(small_dit(dtype=torch.bfloat16), cond, noise, 4.0, 2, 3.0)
    assert seen == {torch.float32}


def test_both_ends_belong_to_the_guidance_interval():
    """Both ends belong to the interval; alpha 1 and two steps: t is 1 and 0.5."""
    model, (cond, noise) = small_dit(), draws(1, True)
    at = [flow.generate(model, cond, noise, 1.0, 2, 3.0, interval=(lo, 1.0)) for lo in (0.4, 0.5, 0.6)]
    assert torch.equal(at[0], at[1]) and not torch.equal(at[1], at[2])


def test_the_modulation_is_fp32_up_to_its_cast():
    model, (cond, _) = small_dit(dtype=torch.bfloat16), draws(2, False)
    t = torch.tensor([0.3, 0.8])
    want = F.silu(F.silu(model.t_embedder(t)[:, None] + cond)).bfloat16()
    assert torch.equal(model.modulation_input(t, cond), want)


@pytest.mark.parametrize("norm", [dits.RMSNorm(64), text.RMSNorm(64, 1e-6)])
def test_a_norm_casts_back_before_its_weight(norm):
    """Cast back, then the weight."""
    g = torch.Generator().manual_seed(0)
    norm.weight.data = torch.randn(64, generator=g)
    x = torch.randn(9, 64, generator=g).bfloat16()
    y = x.float() / (x.float().square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), y.bfloat16() * norm.weight.bfloat16())


def test_qk_norm_comes_before_the_rotation():
    """Norm, then rotation: with weights that are not all one the order shows."""
    torch.manual_seed(0)
    attention, rope, x = dits.Attention(32, 4, qk_norm=True), dits.RoPE(8, 3), torch.randn(2, 9, 32)
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.data = torch.rand(8) + 0.5
    q, k, v = attention.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    q, k = (rope(y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * n.weight)
            for y, n in ((q, attention.q_norm), (k, attention.k_norm)))
    y = (q @ k.mT / 8 ** 0.5).softmax(-1) @ v
    want = attention.proj(y.transpose(1, 2).flatten(2))
    assert torch.allclose(attention(x, rope), want, atol=1e-6)


def test_positions_above_256_in_bf16():
    """bf16 has no 257: positions and angles are fp32."""
    llm, seen = text.TextModel(dict(text.TINY, vocab_size=9), dtype=torch.bfloat16), []
    llm.run = lambda layers, x, cos, sin: (seen.append((cos, sin)), x)[1]
    llm(torch.zeros(1, 600, 128, dtype=torch.bfloat16))
    angle = torch.arange(600)[:, None] * 1e6 ** (-torch.arange(0, 32, 2) / 32)
    for got, want in zip(seen[0], (angle.cos(), angle.sin())):
        assert (got.float() - want.repeat(1, 2)).abs().max() < 0.01


def test_a_tokenizer_that_truncates_and_pads(tmp_path):
    """Truncation and padding that a tokenizer.json asks for."""
    tokenizer = text.load_tokenizer(weights.ASSETS)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    words = "a red circle left of a blue star"
    assert (text.encode_text(text.load_tokenizer(tmp_path), words)
            == text.encode_text(text.load_tokenizer(weights.ASSETS), words))


def test_ids_of_added_tokens_must_fit(tmp_path):
    weights.save_tokenizer(text.load_tokenizer(weights.ASSETS), tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    added["<|im_end|>"] += 7
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    with pytest.raises(ValueError, match="'<|im_end|>' should be id"):
        text.load_tokenizer(tmp_path)


def test_blocks_are_summed_in_fp32():
    net = encoders.SigLIP2(encoders.TINY, layers=3, dtype=torch.bfloat16)
    encoders.init_weights(net, 0)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        total = sum(y.float() for y in net.blocks(x))
        assert torch.equal(net(x), F.layer_norm(total, (96,), eps=1e-6))


def test_heads_of_the_published_encoders():
    """No shape tells them."""
    assert (encoders.SO400M["num_attention_heads"],
            encoders.WEBSSL_300M["num_attention_heads"]) == (16, 16)


def test_what_transformers_leaves_out_of_a_config():
    with torch.device("meta"):
        for kind in ("siglip_vision_model", "dinov2"):
            c = encoders.build_encoder(dict(model_type=kind)).config
            assert (c["num_attention_heads"], c["hidden_size"], c["num_hidden_layers"]) == (12, 768, 12)


def test_the_latent_s_variance_has_an_epsilon():
    model = decoders.Decoder({
        **decoders.decoder_config("tiny", 96, 64, 8, (.5, ) * 3, (.5, ) * 3), "latent_stats":
        True
    })
    model.latent_var.fill_(3e-5)
    assert model.statistics()[1].max().item() == pytest.approx(4e-5**0.5)


def test_the_filters_of_the_published_processors():
    assert (vaes.VAE.crop, vaes.VAE.resample) == ("squash", 1)      # 1 is Lanczos
    assert (encoders.SigLIP2.resample, encoders.DINOv2.resample) == (3, 3)


def test_the_vae_s_epsilon():
    assert {m.eps for m in vaes.VAE(vaes.TINY).modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}


def test_the_epsilon_of_lpips():
    vgg = perceptual.Perceptual(perceptual.TINY_WIDTH)
    a, b = torch.zeros(2, 1, 8, 1, 1)
    a[0, 0] = 4e-10                                         # 1e-10 is added to the norm: u = 0.8
    assert vgg.lpips([a], [b]).item() == pytest.approx(0.64 / 8)


def test_losses_of_bf16_maps_are_fp32():
    """The losses of bf16 maps are those of the same maps in fp32."""
    vgg, g = perceptual.Perceptual(perceptual.TINY_WIDTH), torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1, 8, 9, 9, generator=g).bfloat16()
    for loss in (vgg.lpips, lambda a, b: vgg.gram(a, b, [0])):
        assert loss([a], [b]).equal(loss([a.float()], [b.float()]))


def test_the_discriminator_sees_other_sizes_bilinearly():
    """Pictures of another size: bilinear, corners not aligned."""
    disc, x = gans.Discriminator(gans.TINY).eval(), torch.rand(2, 3, 80, 80)
    gans.init_weights(disc, 0)
    small = F.interpolate(x, (64, 64), mode="bilinear", align_corners=False)
    assert torch.allclose(disc(x), disc(small), atol=1e-5)


def test_the_epsilon_of_the_local_norm():
    x = torch.tensor([[[1e-3, -1e-3]]])                     # variance 1e-6, and 1e-6 is added
    assert gans.LocalNorm(1)(x).flatten().tolist() == pytest.approx([0.5 ** 0.5, -0.5 ** 0.5], rel=1e-4)


def test_the_largest_shift_of_the_augmentation():
    x, draws = torch.rand(1, 3, 8, 8), torch.tensor([[0.99, 0.5, 0.5, 0.5, 0.5]])
    up = torch.cat([x[:, :, 1:], torch.full_like(x[:, :, :1], 0.5)], 2)
    left = torch.cat([x[..., 1:], torch.full_like(x[..., :1], 0.5)], 3)
    assert torch.allclose(gans.augment(x, draws), up, atol=1e-6)
    assert torch.allclose(gans.augment(x, draws[:, [1, 0, 2, 3, 4]]), left, atol=1e-6)


def test_ties_between_candidates():
    row = lambda yes, no: dict(
        prompt_conf=1.0, score=1, yes_logit=yes, no_logit=no, yes_prob=0.5, prompt_loss=1.0)
    for verifier in ("prompt", "yes"):  # equal: the higher yes, then the lower no
        assert best_of.rank([row(4.0, 1.0), row(5.0, 2.0), row(5.0, 1.0)], verifier) == [2, 1, 0]


def test_yes_and_no_after_a_space_count():
    space = TOKENIZER.token_to_id("Ġ")
    for ids, words in zip(best_of.word_ids(TOKENIZER), (("yes", "Yes", "YES"), ("no", "No", "NO"))):
        assert all(set(TOKENIZER.encode(" " + w).ids) - {space} <= set(ids) for w in words)


def test_metrics_are_of_stored_pictures():
    """Metrics are of pictures as a file stores them: clamped, 8 bits."""
    x = torch.rand(4, 3, 16, 16)
    rows = evaluate.measure(lambda x: 3 * x - 1, [x], lambda x: x.flatten(2), None)
    stored = evaluate.round8(3 * x - 1)
    assert torch.equal(rows["ssim"], evaluate.ssim(stored, x))
    assert torch.equal(rows["fake"], stored.flatten(2).mean(1))


@pytest.fixture
def mixtures(monkeypatch):
    """The mixtures that a script makes, in order."""
    made, real = [], data.Mixture

    def make(*args, **options):
        made.append(real(*args, **options))
        return made[-1]

    monkeypatch.setattr(data, "Mixture", make)
    return made


def test_decoders_are_measured_on_adm_s_crop(mixtures):
    call(evaluate, "decoder", "--count", "2", "--no-lpips", "--data", "builtin:web", "--device", "cpu")
    assert [(m.crops, m.text) for m in mixtures] == [(["center"], False)]


@pytest.fixture
def asked(monkeypatch):
    """Arguments of evaluate.py's tasks as they are parsed."""
    def parse(*argv):
        seen = []
        for task in ("decoder", "t2i", "vqa", "judge"):
            monkeypatch.setattr(evaluate, task, seen.append)
        call(evaluate, *argv)
        return seen[0]
    return parse


def test_the_seed_of_decoder_s_pictures_is_not_a_training_s(asked):
    """Trainings use small seeds."""
    assert asked("decoder").seed == 2000


def test_nor_are_those_of_questions_and_the_judge(asked):
    assert asked("vqa").seed == asked("judge").seed == 2000


def two_blocks(path):
    """The tiny decoder as one that takes the sum of the encoder's last two blocks."""
    state, config = weights.read_weights(weights.TINY_CODEC[1])
    save_file(state, path, metadata={"config": json.dumps({**config, "layers": 2})})
    return path


def test_a_decoder_of_two_blocks_is_measured_on_their_sum(tmp_path):
    """A decoder of the last two blocks' sum is measured on that latent."""
    path = two_blocks(tmp_path / "two.safetensors")
    reconstruct, *_ = evaluate.load_codec(
        types.SimpleNamespace(run=path, encoder=None, features=None), CPU)
    encoder = networks.load_encoder(weights.TINY_CODEC[0], CPU, layers=2)
    decoder = networks.load_decoder(path, CPU, 96, encoder.mean, encoder.std)
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(reconstruct(x), decoder(encoder(x)), atol=1e-5)


def test_ssim_mirrors_the_picture_at_its_border():
    """In a corner: the picture is mirrored at the border, the edge not repeated."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 12, 12, generator=g, dtype=torch.float64).numpy()
    px, py = (np.pad(v, 5, mode="reflect")[:11, :11] for v in (x, y))
    w = np.exp(-(np.arange(11) - 5)**2 / 4.5)
    w = np.outer(w, w) / w.sum()**2
    mx, my = (w * px).sum(), (w * py).sum()
    vx, vy, cov = (w * px * px).sum() - mx**2, (w * py * py).sum() - my**2, (w * px *
                                                                             py).sum() - mx * my
    want = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    found = evaluate.ssim_map(*(torch.from_numpy(v)[None, None] for v in (x, y)))
    assert found[0, 0, 0, 0].item() == pytest.approx(want, rel=1e-6)


def test_a_diagonal_is_in_no_relation():
    cat = benchmark.Found("cat", None, 1.0, 0.2, 0.2, 0.3)
    dog = benchmark.Found("dog", None, 1.0, 0.6, 0.7, 0.3)
    p = benchmark.Prompt("position", "", None, (("cat", None, 1), ("dog", None, 1)), "left of")
    assert benchmark.compare(None, [cat, dog], p) == (False, "not left of")


def test_logged_averages_are_over_the_steps_that_have_the_value():
    meter = runs.Meter()
    for values in (dict(a=1.0), dict(a=3.0, b=5.0), dict(a=5.0)):
        meter.add(**{k: torch.tensor(v) for k, v in values.items()})
        meter.step(4, 1.0)
    values = meter.read(CPU)
    assert (values["a"], values["b"]) == (3, 5)


def test_room_for_one_checkpoint_more_than_are_kept(tmp_path, monkeypatch):
    """Room for --keep checkpoints and the one that is being written."""
    tensors = {"a": torch.zeros(1000)}                      # 4000 bytes
    usage = shutil.disk_usage(tmp_path)
    for free in (12_000, 11_999):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
        run = runs.Run(arguments(tmp_path / f"run{free}", keep=2), CPU)
        if free < 12_000:
            with pytest.raises(parallel.UserError, match="--keep"):
                run.load(tensors)
        else:
            run.load(tensors)
        run.lock.close()


def pngs(folder, n, size=(20, 20)):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        Image.new("RGB", size, (10 * k, 100, 50)).save(folder / f"{k:03d}.png")
    return str(folder)


def test_the_order_of_files_is_of_the_seed(tmp_path):
    source = pngs(tmp_path, 12)
    orders = [[m[n]["key"] for n in range(12)]
              for m in (Mixture([source], 8, seed, text=False) for seed in (0, 1))]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_each_window_has_an_order_of_its_own():
    size, W = 2 * data.WINDOW, data.WINDOW
    order, starts = data._chunks(size, 0, "x", 0)
    place = {int(c): int(s) for c, s in zip(order, starts)}
    picks = [data.shuffled(size, i, 0, "x") for i in range(size)]
    at = [place[r // data.CHUNK] + r % data.CHUNK for r in picks]           # before the chunks moved
    assert at[:W] != [p - W for p in at[W:]]


def test_many_broken_records(tmp_path):
    """In the place of a broken record another is tried each time, twenty of them."""
    source = Path(pngs(tmp_path, 40))
    for k in range(1, 40, 2):
        (source / f"{k:03d}.png").write_bytes(b"x")
    mixture = Mixture([str(source)], 8, text=False)
    for n in range(200):
        skipped = [key for key, _ in mixture[n]["skipped"]]
        assert len(skipped) < 20
    assert max(len(mixture[n]["skipped"]) for n in range(200)) > 2


def test_shares_of_a_mixture_by_largest_remainder():
    assert Mixture(["builtin:web=2", "builtin:text=1"], 8).counts == [667, 333]


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (0, 0, 4, 8))
    image.save(tmp_path / "a.png", transparency=0)          # a palette's colour that is transparent
    seen = data.upright_rgb(Image.open(tmp_path / "a.png"))
    assert (seen.getpixel((0, 0)), seen.getpixel((7, 0))) == ((255, 0, 0), (255, 255, 255))


def test_a_name_in_two_folders_of_a_tar(tmp_path):
    """The same name in two folders of a tar: two records."""
    write_tar(tmp_path / "a.tar", [(f"{d}/0.{e}", c) for d, k in (("a", 1), ("b", 2))
                                   for e, c in (("png", png(k)), ("txt", f"picture {k}".encode()))])
    records = [Mixture([str(tmp_path / "a.tar")], 8)[n] for n in range(2)]
    assert {(r["caption"], r["image"][0, 0, 0].item())
            for r in records} == {("picture 1", 1), ("picture 2", 2)}


def test_blank_lines_in_a_jsonl(tmp_path):
    pngs(tmp_path, 2)
    row = lambda k: json.dumps({"image": f"00{k}.png", "caption": f"picture {k}"})
    (tmp_path / "a.jsonl").write_text(row(0) + "\n\n  \n" + row(1) + "\n")
    mixture = Mixture([str(tmp_path / "a.jsonl")], 8)
    records = [mixture[n] for n in range(2)]
    assert {(r["caption"], r["key"].split(":")[-1])
            for r in records} == {("picture 0", "1"), ("picture 1", "4")}


def cached(source, folder, crop="squash"):
    mixture = Mixture([source], 8, crop=crop, text=False)
    data.cache_latents(mixture, str(folder), "x",
                       lambda x: x.reshape(len(x), 1, -1).astype(np.float32), 2, 0)
    return mixture[0]["latent"]


def test_a_changed_picture_is_encoded_anew(tmp_path):
    """Another picture under the same name is encoded anew."""
    source = pngs(tmp_path / "in", 1)
    before = cached(source, tmp_path / "cache")
    Image.new("RGB", (20, 20), (200, 0, 0)).save(tmp_path / "in/000.png")
    os.utime(tmp_path / "in/000.png", (1, 1))
    assert not np.array_equal(before, cached(source, tmp_path / "cache"))


def test_a_cache_of_latents_is_of_one_crop(tmp_path):
    (tmp_path / "in").mkdir()
    Image.linear_gradient("L").resize((40, 20)).rotate(90, expand=True).save(tmp_path / "in/0.png")
    assert not np.array_equal(*(cached(str(tmp_path / "in"), tmp_path / "cache", crop)
                                for crop in ("squash", "center")))


def test_adm_s_centre_crop(tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (264, 300, 3), np.uint8))
    image.save(tmp_path / "a.png")
    seen = data.load_image((tmp_path / "a.png").read_bytes(), 32, "center", None)
    while min(image.size) >= 64:
        image = image.resize([v // 2 for v in image.size], Image.BOX)
    image = image.resize([round(v * 32 / min(image.size)) for v in image.size], Image.BICUBIC)
    left, top = ((v - 32) // 2 for v in image.size)
    want = np.asarray(image.crop((left, top, left + 32, top + 32))).astype(int)
    assert np.abs(want - seen).mean() < 1


def test_the_last_place_of_a_random_crop(tmp_path):
    """The last place counts: of 30 pixels R = 20 begin at 0 to 10."""
    x = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
    Image.fromarray(x).save(tmp_path / "a.png")
    for value, at in ((0.0, 0), (0.9999, 10)):
        seen = data.load_image((tmp_path / "a.png").read_bytes(), 20, "random", lambda: value)
        assert np.array_equal(seen, x[at:at + 20, at:at + 20])


def test_of_several_texts_the_caption_comes_first(tmp_path):
    pngs(tmp_path, 1)
    (tmp_path / "a.jsonl").write_text(
        json.dumps({
            "image": "000.png",
            "caption": "a",
            "prompt": "b",
            "text": "c"
        }))
    assert Mixture([str(tmp_path / "a.jsonl")], 8)[0]["caption"] == "a"


def test_a_decoder_s_normalisation_without_its_encoder(tmp_path):
    """Drawing loads no encoder: the decoder's normalisation follows from the tower's name."""
    r.decoder_folder(tmp_path / "d")
    for tower, kind in ((weights.HUB["webssl"][0], encoders.DINOv2), (weights.HUB["siglip2"][0],
                                                                      encoders.SigLIP2)):
        config = dict(vision_tower_aux_token_len_list=[16],
                      diffusion_model_channels=24,
                      mm_vision_tower_aux_list=[tower])
        args = types.SimpleNamespace(encoder=None, decoder=tmp_path / "d")
        _, decoder = stage2.load_codec(config, args, CPU, encoder=False)
        assert decoder.image_mean.flatten().tolist() == pytest.approx(kind.mean)
        assert decoder.image_std.flatten().tolist() == pytest.approx(kind.std)


def test_heads_of_a_published_decoder(tmp_path):
    """Its config has none, and no shape tells them."""
    state = r.random_state(r.decoder_keys(24, 64, 2, 48, 16, 14), seed=1)
    r.write(tmp_path / "d", {}, state, "model.pt", tokenizer=False)
    assert networks.load_decoder(tmp_path / "d", CPU, 24, (.5, ) * 3,
                                (.5, ) * 3).decoder_layers[0].heads == 16


def test_a_config_in_the_file_is_before_one_beside_it(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"config": '{"of": "the file"}'})
    (tmp_path / "config.json").write_text('{"of": "the folder"}')
    assert weights.read_weights(tmp_path)[1] == {"of": "the file"}


def test_new_heads_are_of_the_seed(nets):
    a, b = (networks.load_discriminator(nets[3], CPU, seed=s).heads[0][0][0].weight_orig for s in (0, 1))
    assert not torch.equal(a, b)


def test_names_of_towers_without_what_the_authors_add():
    assert {weights.plain_name(f"my/tower{end}")
            for end in ("", "-interp256", "-res384")} == {"my/tower"}
    assert weights.plain_name(weights.HUB["webssl"][0]) == weights.HUB["webssl"][0]


def test_seeds_do_not_share_draws():
    """Seeds do not share samples' draws."""
    for module in (train_dit, train_decoder):
        one, two = (module.generators(*at)[0]
                    for at in (((0, [1]), (1, [0])) if module is train_dit else (([1], 0), ([0],
                                                                                            1))))
        assert not torch.equal(torch.rand(4, generator=one), torch.rand(4, generator=two))


def test_streams_do_not_share_draws():
    """Streams of neighbouring images do not coincide."""
    D = train_decoder
    assert not torch.equal(D.uniform([5], 0, D.REAL_D), D.uniform([6], 0, D.FAKE_D))


@pytest.mark.parametrize("config", [dict(scaling_factor=0.3611, shift_factor=0.1159)])
def test_a_vae_s_latent_is_shifted_and_scaled(config, tmp_path):
    """The DiT's latent is shifted, then scaled, as FLUX's VAE says."""
    torch.manual_seed(0)
    vae, path = vaes.VAE(dict(vaes.TINY, **config)), tmp_path / "vae.safetensors"
    save_file(vae.state_dict(), path, metadata={"config": json.dumps(vae.config)})
    line, = t.train(tmp_path / "r", "--latent", "vae", "--vae", path, "--data", "builtin:synthetic")
    encoder = networks.load_encoder(weights.TINY_CODEC[0], CPU)
    batch, _ = t.first_batch(encoder, ["builtin:synthetic"], vae)
    with torch.no_grad():
        mean, logvar = map(vaes.pack, vae.posterior(batch["images"].float() / 255))
        z = (mean + (logvar / 2).exp() * batch["posterior"] - 0.1159) * 0.3611
    assert line["flow"] == t.by_time(batch, z, math.sqrt(32))[1]


def test_repa_of_questions_is_zero():
    """Images in questions count zero in REPA too."""
    encoder = networks.load_encoder(weights.TINY_CODEC[0], CPU)
    llm, dit = text.TextModel(dict(text.TINY, vocab_size=1024), 64, 96,
                              160), dits.DiT(96, 64, 160, 2, 5)
    text.init_weights(llm, 0)
    dits.init_weights(dit, 0)
    model = train_dit.ScaleRAE(llm, dit, 1.0, repa=1, channels=96)
    batch, z = t.first_batch(encoder, ["builtin:synthetic=1", "builtin:qa=1"])
    assert 0 < batch["answer"].sum() < 4
    _, mse, apart, *_ = model(z, z, batch)
    assert (apart != 0).equal(batch["answer"]) and (mse != 0).equal(batch["answer"])


def test_colours_are_counted_on_unseen_shapes(tmp_path, monkeypatch):
    """The shapes whose colours are counted are of another seed than the training's."""
    seeds, real = [], benchmark.single_shapes
    monkeypatch.setattr(benchmark, "single_shapes", lambda seed, count:
                        (seeds.append(seed), real(seed, 2))[1])
    t.train(tmp_path / "r", "--data", "builtin:hq", "--seed", 5)
    assert seeds and 5 not in seeds


def test_as_many_tokens_as_length_fit():
    """As many tokens as --length is not too many."""
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": text.ANSWER}]
    record = dict(n=0, key="k", skipped=[], conversations=turns, image=np.zeros((8, 8, 3), np.uint8))
    length = len(text.expand(*text.chat(TOKENIZER, turns), 2)[0])
    for limit, fits in ((length, True), (length - 1, False)):
        batch = train_dit.Collate(TOKENIZER, 2, 3, 0, 0.1, limit)([record])
        assert (batch["answer"].tolist(), batch["unfit"] == []) == ([fits], fits)


@pytest.mark.parametrize("flags, want", [(["--latent", "vae"], (["squash"], 1)),
                                         (["--latent", "webssl"], (["center"], 3))])
def test_pictures_are_as_the_network_wants_them(flags, want, mixtures, capsys):
    """Pictures are made square and resized as the network that sees them wants it."""
    assert t.call("--size", "0.5b", "--allow-narrow", "--dry-run", *flags, "--data",
                  "builtin:web") == 0
    assert (mixtures[0].crops, mixtures[0].resample) == want


def test_latents_of_other_blocks_are_another_cache(tmp_path):
    """Latents of other blocks are another entry of the cache."""
    decoder = two_blocks(tmp_path / "two.safetensors")
    (tmp_path / "in").mkdir()
    for i in range(4):
        r = world.builtin_record("builtin:synthetic", 0, i, 64)
        Image.fromarray(r["image"]).save(tmp_path / f"in/{i}.png")
        (tmp_path / f"in/{i}.txt").write_text(r["caption"])
    options = ["--data", tmp_path / "in", "--cache-latents", tmp_path / "cache"]
    a, = t.train(tmp_path / "a", *options)
    b, = t.train(tmp_path / "b", *options, "--layers", 2, "--decoder", decoder)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2 and a["flow"] != b["flow"]


def test_the_discriminator_s_rate_reaches_its_end(nets, tmp_path):
    """The discriminator's rate: its own cosine, from its start to the run's end, to its own final rate."""
    call(train_decoder, *SMALL, *nets, *OFF, "--gan", "0.5", "--steps", "6", "--disc-start", "1", "--gan-start", "6", "--warmup-disc", "1", "--lr-disc", "1e-3",
         "--lr-disc-final", "1e-4", "--out", tmp_path / "r")
    want = [1e-4 + 9e-4 * (1 + math.cos(math.pi * max(0, k - 1) / 4)) / 2 for k in range(5)]
    assert [line["lr_disc"] for line in lines(tmp_path / "r")[1:]] == pytest.approx(want, abs=1e-7)


def test_crops_of_training_and_of_measuring(mixtures, tmp_path):
    call(train_decoder, *SMALL, *OFF, "--gan", "0", "--steps", "1", "--out", tmp_path / "r")
    sources = len(train_decoder.DATA)
    assert [m.crops for m in mixtures] == [["random"] * sources, ["center"] * sources]


def test_lambda_of_the_vae_is_of_its_last_layer(nets, tmp_path):
    """Lambda of the VAE is of its decoder's last layer."""
    call(train_decoder, *SMALL, *nets, *OFF, "--latent", "vae", "--gan", "0.5", "--kl", "0",
         "--steps", "1", "--disc-start", "0", "--gan-start", "0", "--out", tmp_path / "r")
    torch.manual_seed(0)
    vae, batch = vaes.VAE(vaes.TINY), first_batch()
    disc, x = networks.load_discriminator(nets[3], CPU).eval(), batch["images"].float() / 255
    mean, logvar = vae.posterior(x)
    noise = train_decoder.gaussian(range(4), 0, mean.shape[1:])
    x_hat = (vae.decoder(mean + (logvar / 2).exp() * noise) + 1) / 2
    rec, gan = (x_hat - x).abs().mean(), -disc(gans.augment(x_hat, batch["fake_g"])).mean()
    want = gans.adaptive_weight(rec, gan, vae.decoder.conv_out.weight)
    assert lines(tmp_path / "r")[0]["gan_lambda"] == pytest.approx(want.item(), rel=1e-3)


def test_each_exported_vae_has_its_own_scale(tmp_path, monkeypatch):
    pictures = evaluate.pictures
    monkeypatch.setattr(train_decoder, "pictures", lambda m, n, d: pictures(m, min(n, 16), d))
    call(train_decoder, *SMALL, *OFF, "--latent", "vae", "--gan", "0", "--steps", "3",
         "--lr", "3e-3", "--warmup", "0", "--out", tmp_path / "r")
    mixture = data.Mixture(train_decoder.DATA, 64, 0, crop="random", text=False)
    for name in ("model", "ema"):
        vae = networks.load_vae(tmp_path / f"r/final/{name}.safetensors", CPU)
        found = vae.measure(evaluate.pictures(mixture, 16, CPU))
        assert {k: vae.config[k] for k in found} == pytest.approx(found, rel=1e-4)


def test_last_is_the_end_token():
    records = [dict(caption=c, key=c, skipped=[], image=np.zeros((8, 8, 3), np.uint8))
               for c in ("a cat", "a red circle")]
    batch = train_encoder.Collate(TOKENIZER)(records)
    for ids, last, r in zip(batch["ids"], batch["last"], records):
        assert ids[:last].tolist() == TOKENIZER.encode(r["caption"]).ids
        assert ids[last] == TOKENIZER.token_to_id("<|endoftext|>")


def trainee():
    """The encoder and its text tower, as train_encoder.py begins."""
    args = types.SimpleNamespace(arch="vit", patch=8, width=48, depth=1, heads=4, resolution=16, seed=0)
    return train_encoder.build(args, 64, torch.float32)[0]


def test_similarities_begin_as_siglip_s():
    """SigLIP's: t = 10, b = -10."""
    image = F.normalize(torch.randn(3, 48), dim=-1)
    with torch.no_grad():
        assert torch.allclose(trainee().similarity(image, image), 10 * image @ image.T - 10, atol=1e-4)


def test_psnr_of_the_encoder_s_probe():
    """PSNR of an error of pixels in [-1,1]."""
    model = lambda *a: (torch.eye(2), torch.eye(2), torch.tensor(0.04), torch.randn(2, 4, 3))
    batch = dict(images=torch.zeros(2, 3, 8, 8), ids=None, last=None)
    values = train_encoder.evaluate(model, batch)
    assert values["probe_psnr"] == pytest.approx(20) and values["retrieval"] == 1


def test_the_encoder_is_measured_on_unseen_pictures(tmp_path, mixtures):
    call(train_encoder, *SMALL, *ENCODER, "--steps", "1", "--seed", "3", "--out", tmp_path / "r")
    assert [m.seed for m in mixtures] == [3, 1003]          # what trains; what is measured


def encoder_hides(tmp_path, monkeypatch, *flags):
    """Train two steps -> the seeds by which patches were hidden."""
    seeds, hide = [], train_encoder.hide
    monkeypatch.setattr(train_encoder, "hide", lambda x, p, s, g:
                        (seeds.append(g.initial_seed()), hide(x, p, s, g))[1])
    call(train_encoder, *SMALL, *ENCODER, "--steps", "2", *flags, "--out", tmp_path / "r")
    return seeds


def test_micro_batches_hide_other_patches(tmp_path, monkeypatch):
    """Every micro-batch hides other patches."""
    seeds = encoder_hides(tmp_path, monkeypatch, "--micro-batch", "2")
    assert len(seeds) == len(set(seeds)) == 4


def test_accumulated_gradients_of_the_encoder_are_a_mean(tmp_path):
    """The gradient is the mean over the micro-batches (seen before the clip)."""
    common = [*SMALL, *ENCODER, "--steps", "1", "--mask", "0"]
    a = []
    for micro in ("4", "2"):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(train_encoder, "sigmoid_loss", lambda s: s.diagonal().mean())
            real = parallel.clip_grad
            m.setattr(parallel, "clip_grad", lambda p, *r: (lambda n: (a.append(n.item()), n)[1])
                      (real(p, *r)))
            call(train_encoder, *common, "--micro-batch", micro, "--out", tmp_path / micro)
    assert a[0] == pytest.approx(a[1], rel=1e-3)


def test_defaults_of_sample():
    a = sample.arguments(["a cat"])
    assert (a.steps, a.seed, a.schedule) == (50, 0, "clean")
    assert (a.verifier, a.n, a.max_tokens) == ("prompt", 1, 512)


def sample_call(*args):
    sample.main([*map(str, args), "--device", "cpu"])


def test_a_kept_picture_is_of_the_seed_it_names(tmp_path, monkeypatch):
    """A kept picture is that of the seed it names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(best_of, "rank", lambda rows, verifier: [3, 1, 0, 2])
    sample_call("a red circle", "--direct", "--steps", 3, "--best-of", 4, "--keep", 2, "--out", "b.png")
    for i, seed in enumerate((3, 1)):
        sample_call("a red circle", "--direct", "--steps", 3, "--seed", seed, "--out", "a.png")
        best, alone = (np.asarray(Image.open(p)).astype(int) for p in (f"b-{i}.png", "a.png"))
        assert Image.open(f"b-{i}.png").info["seed"] == str(seed) and abs(best - alone).max() <= 1


def test_verifiers_are_asked_about_the_bare_prompt(tmp_path, monkeypatch):
    """The template is for the model that draws; the verifier is asked about the bare prompt."""
    monkeypatch.chdir(tmp_path)
    told, scores = [], best_of.scores
    monkeypatch.setattr(
        best_of, "scores", lambda llm, tokenizer, z, prompt:
        (told.append(prompt), scores(llm, tokenizer, z, prompt))[1])
    sample_call("a red circle", "--direct", "--steps", 1, "--best-of", 2, "--template", "Draw {}.",
                "--verifier", "loss")
    assert told == ["a red circle"]


def test_a_config_s_base_of_the_time_shift():
    args = types.SimpleNamespace(guidance=None, schedule="clean", guidance_interval=(0.0, 1.0))
    dit = dits.DiT(24, 16, 64, 1, 4)
    for base in (128, None):
        alpha, _ = sample.alpha_and_guidance(args, dit, {"diffusion_base_dim": base})
        assert alpha == pytest.approx(math.sqrt(16 * 24 / (base or 4096)))


def test_guidance_by_default():
    """Released models (their config has no shift_alpha) and `compat` are not guided by default."""
    dit = dits.DiT(24, 16, 64, 1, 4)
    for schedule, config, want in (("clean", {"shift_alpha": 2.0}, 3), ("clean", {}, 1),
                                   ("compat", {"shift_alpha": 2.0}, 1)):
        args = types.SimpleNamespace(guidance=None, schedule=schedule,
                                     guidance_interval=(0.0, 1.0))
        assert sample.alpha_and_guidance(args, dit, config)[1] == want


def test_a_character_of_several_tokens_comes_whole():
    ids = TOKENIZER.encode("a \u732b!").ids + [TOKENIZER.token_to_id("<|im_end|>")]
    steps = [F.one_hot(torch.tensor([i]), TOKENIZER.get_vocab_size()).float() for i in ids]
    said = list(sample.answer(Scripted(steps), TOKENIZER, "what?", torch.zeros(1, 4, 8)))
    assert len(ids) > 5 and "".join(said) == "a \u732b!" and not any("\ufffd" in s for s in said)


def test_asked_pictures_take_the_encoder_s_filter():
    """By the filter that the encoder's processor names."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))
    for resample in (1, 2, 3):
        x = sample.to_tensor(image,
                             types.SimpleNamespace(image_size=16, crop="squash", resample=resample))
        want = np.asarray(image.resize((16, 16), resample))
        assert np.array_equal((x[0] * 255).round().byte().permute(1, 2, 0).numpy(), want)


def test_cached_pictures_take_the_filter_too(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(tmp_path / "in/0.png")
    mixture = Mixture([str(tmp_path / "in")], 8, text=False, resample=1)
    want = mixture[0]["image"]
    data.cache_latents(mixture, str(tmp_path / "c"), "x",
                       lambda x: x.reshape(len(x), 1, -1).astype(np.float32), 2, 0)
    assert np.array_equal(mixture[0]["latent"].reshape(8, 8, 3), want)


def test_cond_drop_is_in_the_config():
    dit, llm = dits.DiT(24, 16, 64, 1, 4), text.TextModel(dict(text.TINY, vocab_size=9), 16, 24, 64)
    assert stage2.model_config(llm, dit, "x", 1.0,
                                cond_drop=0.2)["diffusion_class_dropout_prob"] == 0.2


def test_a_caption_in_metadata_jsonl(tmp_path):
    pngs(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "000.png", "caption": "a cat"}')
    assert Mixture([str(tmp_path)], 8)[0]["caption"] == "a cat"


def test_the_width_of_a_published_decoder_tells_its_encoder(tmp_path, monkeypatch):
    """A published decoder has no encoder in its config: its width tells which."""
    asked = []
    monkeypatch.setattr(weights, "locate",
                        lambda wanted: [asked.append(n) or Path(n) for _, n, _ in wanted])
    monkeypatch.setattr(weights, "load_encoder", lambda *a: 1 / 0)
    for width, name in ((1152, "siglip2"), (1024, "webssl")):
        save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors",
                  {"config": json.dumps({"hidden_size": width})})
        with pytest.raises(ZeroDivisionError):
            evaluate.load_codec(types.SimpleNamespace(run=tmp_path, encoder=None, features=None),
                                CPU)
        assert asked[-1] == weights.HUB[name][0]


def test_processes_hide_other_patches(tmp_path, monkeypatch):
    """Every process hides other patches."""
    monkeypatch.setattr(parallel, "total",
                        lambda values, devices: [devices.world * v for v in values])
    seeds = []
    for rank in (0, 1):
        devices = parallel.Devices("cpu", torch.device("cpu"), rank, 2, torch.float32, {
            "fsdp": 2,
            "tensor": 1
        })
        devices.replicas = 1
        (tmp_path / f"{rank}/r").mkdir(parents=True)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(parallel, "setup", lambda *a: devices)
            seeds += encoder_hides(tmp_path / str(rank), m)
    assert len(seeds) == len(set(seeds)) == 4


def test_recomputed_tables_must_fit():
    """Tables that are recomputed must fit all the same."""
    dit = dits.DiT(24, 16, 64, 1, 4)
    state = {**dit.state_dict(), "feat_rope.freqs_cos": torch.zeros(16, 8)}
    with pytest.raises(parallel.UserError, match=r"freqs_cos is \[16, 8\], expected \[16, 16\]"):
        weights.load_strict(dit, state, "x", stage2.RECOMPUTED)


def test_the_generator_s_pass_of_the_discriminator_is_in_eval_mode(nets, tmp_path, monkeypatch):
    """The generator's pass takes no step of the power iteration, in no step of the run."""
    modes, forward = [], gans.Discriminator.forward
    monkeypatch.setattr(gans.Discriminator, "forward", lambda self, x:
                        (modes.append(self.training), forward(self, x))[1])
    call(train_decoder, *SMALL, *nets, *OFF, "--gan", "0.5", "--steps", "2", "--disc-start", "0", "--gan-start", "0", "--out", tmp_path / "r")
    assert modes == [False, True] * 2
