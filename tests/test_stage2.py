"""Stage 2 through train_dit.py: the recipe, the baselines, finetuning, what goes wrong in a long
run, and the expected loss curve. What a step must give is worked out here from the equations: at
the start the DiT's velocity is 0 and its blocks are the identity.

    pytest tests/test_stage2.py
    python tests/test_stage2.py --write         # tests/expected/train_dit.json, after a real change
"""
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import data
import decoder as decoders
import dit as dits
import encoder as encoders
import parallel
import run as runs
import sample
import text_model as text
import train_dit
import vae as vaes
import weights
import world

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
CPU = parallel.Devices("cpu", torch.device("cpu"), 0, 1, torch.float32, {"fsdp": 1, "tensor": 1})
BASE = ["--device", "cpu", "--dtype", "float32", "--workers", "0", "--log-every", "1",
        "--sample-every", "99", "--save-every", "99", "--sample-steps", "1", "--guidance", "1",
        "--batch", "4"]


def call(*args):
    """train_dit.py in this process, one step if not told -> its exit status."""
    one = [] if {"--steps", "--epochs"} & set(args) else ["--steps", "1"]
    old, sys.argv = sys.argv, ["train_dit.py", *BASE, *one, *map(str, args)]
    try:
        runs.main(train_dit.main)
    except SystemExit as stopped:
        return stopped.code
    finally:
        sys.argv = old
    return 0


def train(out, *args, status=0):
    """-> the lines of its log."""
    assert call(*args, "--out", out) == status
    path = Path(out) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def losses(lines):
    return [line["loss"] for line in lines]


def first_batch(encoder, sources, vae=None, batch=4):
    """What the first step of a run on `sources` with seed 0 sees -> batch, features u [B,N,C']."""
    mixture = data.Mixture(sources, 64)
    collate = train_dit.Collate(text.load_tokenizer(weights.ASSETS), 64,
                                (vae or encoder).channels, 0, 0.1, posterior=vae is not None)
    batch = collate([mixture[i] for i in range(batch)])
    with torch.no_grad():
        return batch, encoder(batch["images"].float() / 255)


def by_time(batch, z, alpha):
    """The flow loss of v = 0 in each tenth of t, None without an image there; and of all."""
    t, answer = torch.sigmoid(batch["normal"]), batch["answer"]
    t = alpha * t / (1 + (alpha - 1) * t)
    each = (batch["eps"] - z).square().mean((1, 2))                         # [B]
    tenths = [each[answer & (t >= k / 10) & (t < (k + 1) / 10)] for k in range(10)]
    return ([pytest.approx(e.mean().item(), rel=1e-5) if len(e) else None for e in tenths],
            pytest.approx(each[answer].mean().item(), rel=1e-5))


@pytest.fixture(scope="module")
def encoder():
    return weights.load_encoder(weights.TINY_CODEC[0], CPU)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A short run on builtin:hq that others are held against."""
    out = tmp_path_factory.mktemp("plain") / "run"
    return out, train(out, "--data", "builtin:hq", "--steps", 2)


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    torch.manual_seed(0)
    model, path = vaes.VAE(vaes.TINY), tmp_path_factory.mktemp("vae") / "vae.safetensors"
    save_file(model.state_dict(), path, metadata={"config": json.dumps(model.config)})
    return path


# ------------------------------------------------------------------------------------------------
# The recipe
# ------------------------------------------------------------------------------------------------

def test_one_step_by_hand(tmp_path, encoder):
    """T2I and questions in one batch, of a mixture; losses over the whole batch, not a micro-batch;
    the clip at 1; two learning rates and betas, no decay; the average's first step."""
    sources, lr = ["builtin:synthetic=3", "builtin:qa=1"], {True: 3e-4, False: 2e-5}
    line, = train(tmp_path / "r", "--data", *sources, "--batch", 8, "--micro-batch", 4, "--lr",
                  lr[True], "--lr-llm", lr[False], "--warmup", 0)
    batch, z = first_batch(encoder, sources, batch=8)
    llm = text.TextModel(dict(text.TINY, vocab_size=1024), 64, 96, 160)
    dit = dits.DiT(96, 64, 160, 6, 5)
    text.init_weights(llm, 0)
    dits.init_weights(dit, 0)
    assert 0 < batch["answer"].sum() < 8
    with torch.no_grad():
        h = llm(llm.embed(batch["ids"], batch["start"], batch["answer"], z))
        known = batch["targets"] != text.IGNORE                             # [B,K]
        rows = torch.arange(8)[:, None].expand_as(known)[known]
        ce = F.cross_entropy(llm.logits(h)[rows, batch["where"][known]],
                             batch["targets"][known]).item()
        c = llm.condition(h, batch["start"])[batch["answer"]]               # of all that are drawn
        spread = (c.var(0, correction=0).sum() / c.square().mean(0).sum()).sqrt().item()
    assert line["cond_spread"] == pytest.approx(spread, rel=1e-3)
    assert batch["targets"][known].equal(batch["ids"][rows, batch["where"][known] + 1])
    tenths, flow = by_time(batch, z, math.sqrt(64 * 96 / 128))
    assert line["flow_by_t"] == tenths and line["flow"] == flow
    assert line["text"] == pytest.approx(ce, rel=1e-5)
    assert line["loss"] == pytest.approx(line["text"] + 2 * line["flow"], rel=1e-5)

    before = {f"llm.{k}": v for k, v in llm.state_dict().items()}
    before.update((f"dit.{k}", v) for k, v in dit.state_dict().items() if "freqs" not in k)
    after = load_file(tmp_path / "r/checkpoints/step-0000001/state.safetensors")
    square, moved = 0, set()
    for key in before.keys() - {"dit.pos_embed"}:
        of_dit = key.startswith("dit.") or "diff_head" in key
        first, second = (after[f"optimizer.{key}.exp_avg{m}"] for m in ("", "_sq"))
        square += (first / 0.1).square().sum().item()                   # of the clipped gradient
        big = second > 1e-18                                                # not lost to rounding
        assert torch.allclose((first ** 2 / second)[big], torch.tensor(0.1 ** 2 / (
            0.05 if of_dit else 0.001)), rtol=1e-3), key
        change = (after[key] - before[key]).abs().max().item()
        assert change == 0 or change == pytest.approx(lr[of_dit], rel=2e-2), key
        moved |= {key} if change else set()
        average = before[key].lerp(after[key], 0.9)                         # 1 - 1/10 at first
        assert torch.allclose(after[f"ema.{key}"], average, atol=1e-7), key
    assert line["grad_norm"] > 1 and square == pytest.approx(1, rel=1e-3)
    assert {"dit.final_layer.linear.weight", "llm.model.latent_queries", "llm.model.norm.weight",
            "llm.model.mm_projector.0.weight", "llm.model.embed_tokens.weight"} <= moved


def test_schedule_and_freeze(tmp_path):
    """Warm-up, then cosine; --freeze llm leaves the LLM's bytes alone. (The condition is felt from
    step 3 on: everything after it starts from zero.)"""
    lines = train(tmp_path / "r", "--freeze", "llm", "--steps", 4, "--warmup", 0.5, "--lr", 1e-3,
                  "--lr-llm", 1e-4, "--data", "builtin:synthetic")
    factors = [0.5, 1, 1, 0.5]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * f for f in factors])
    assert [line["lr_llm"] for line in lines] == pytest.approx([1e-4 * f for f in factors])
    state = load_file(tmp_path / "r/final/model.safetensors")
    fresh = text.TextModel(dict(text.TINY, vocab_size=1024), 64, 96, 160)
    text.init_weights(fresh, 0)
    for key, value in fresh.state_dict().items():
        trained = "latent_queries" in key or "diff_head" in key
        assert torch.equal(state[key], value) != trained, key


def test_questions_alone_leave_the_dit_out(tmp_path, encoder):
    """A batch without an image to draw: the DiT does not run, is not updated, and the LLM learns
    the same from it."""
    start, end = tmp_path / "start", tmp_path / "end"
    train(start, "--data", "builtin:align", "--lr", 1e-12, "--lr-llm", 1e-12)
    line, = train(end, "--data", "builtin:align")
    before, after = (load_file(out / "final/model.safetensors") for out in (start, end))
    moved = {k for k in before if not torch.allclose(before[k], after[k], atol=1e-9)}
    assert moved and not any("diff_head" in k or "latent_queries" in k for k in moved)
    assert line["loss"] == line["text"] > 0 and not {"flow", "cond_spread"} & set(line)

    llm, dit, _, config = weights.load_model(start, CPU)
    model = train_dit.ScaleRAE(llm, dit, config["shift_alpha"]).requires_grad_(True)
    batch, u = first_batch(encoder, ["builtin:align"])
    found = []
    for draws in (True, False):
        model.zero_grad(set_to_none=True)
        ce, mse, *_ = model(u, u, batch, draws)
        (ce + mse.sum()).backward()
        assert (mse == 0).all() and (dit.x_embedder.proj.weight.grad is None) == (not draws)
        found.append({k: p.grad for k, p in llm.named_parameters() if p.grad is not None
                      and "diff_head" not in k and "latent_queries" not in k})
    assert found[1] and all(torch.equal(found[0][k], g) for k, g in found[1].items())


def test_draws_belong_to_the_image():
    """One image in ten loses its condition; nothing depends on what is in the batch beside it; a
    sample that is too long has no loss and is named."""
    collate = train_dit.Collate(text.load_tokenizer(weights.ASSETS), 2, 3, seed=5, cond_drop=0.1)
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": text.ANSWER}]
    records = [dict(n=n, key=f"k{n}", skipped=[], conversations=turns,
                    image=np.zeros((8, 8, 3), np.uint8)) for n in range(2000)]
    batch = collate(records)
    assert abs(batch["drop"].float().mean() - 0.1) < 0.02                   # 3 deviations
    assert abs(batch["normal"].mean()) < 0.07 and abs(batch["normal"].std() - 1) < 0.05
    long = dict(records[9], conversations=[{"from": "human", "value": "b " * 2000}, turns[1]])
    part = collate([records[7], long])
    for key in ("normal", "drop", "eps"):
        assert torch.equal(part[key][0], batch[key][7]), key
    assert part["ids"].shape == (2, 64) and part["answer"].tolist() == [True, False]
    assert (part["targets"][1] == text.IGNORE).all() and part["start"][1] == 64
    (key, why), = part["unfit"]
    assert key == "k9" and "more than 1024" in why and not part["skipped"]
    collate = train_dit.Collate(collate.tokenizer, 2, 3, 5, 0.1, length=96)         # --length
    assert collate(records[:3])["ids"].shape == (3, 96)


def test_bf16_and_its_fp32_islands(encoder, monkeypatch):
    """With bf16 products: weights, gradients, norm statistics, time embedding, interpolation, loss
    and the Euler update are fp32; every other Linear of the DiT multiplies bf16."""
    dit = dits.DiT(96, 64, 160, 2, 5, dtype=torch.bfloat16)
    llm = text.TextModel(dict(text.TINY, vocab_size=1024), 64, 96, 160, torch.bfloat16)
    text.init_weights(llm, 0)
    dits.init_weights(dit, 0)
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
    ce, mse, _, t, _ = model(z, z, batch)
    (ce + mse.sum()).backward()
    assert seen["norm"] == seen["time"] == {torch.float32} and seen["product"] == {torch.bfloat16}
    assert {x.dtype for x in (ce, mse, t, z, llm.logits(torch.zeros(1, 128).bfloat16()))} == \
        {torch.float32}
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) > 50 and {g.dtype for g in grads} == {torch.float32}
    x = torch.full((1, 64, 96), 1000.0)                                     # 0.25 is lost in bf16
    assert (train_dit.flow.euler(lambda x, t: torch.ones_like(x).bfloat16(), x,
                                 [(0.0, 0.25)]) == 1000.25).all()
    assert train_dit.flow.interpolate(x, x + 1, torch.tensor([0.25]))[0, 0, 0] == 1000.25


def test_blocks_compile_whole(plain, tmp_path, monkeypatch):
    """--compile: each block of both networks is one graph, also when it samples."""
    blocks, real = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: (
        blocks.append((type(self), options)), real(self, **options, backend="eager"))[1])
    lines = train(tmp_path / "r", "--data", "builtin:hq", "--steps", 2, "--compile")
    assert losses(lines) == pytest.approx(losses(plain[1]), rel=1e-6)
    assert blocks == [(kind, {"fullgraph": True}) for kind in [text.Layer] * 3 + [dits.Block] * 6]


# ------------------------------------------------------------------------------------------------
# Baselines
# ------------------------------------------------------------------------------------------------

def test_vae_latent_has_two_towers(tmp_path, encoder, vae_file):
    """The DiT's latent is a draw from the VAE's posterior, packed and scaled; the LLM and REPA look
    at the encoder's features. Both losses by hand: the fourth block still has the embedding."""
    out, source = tmp_path / "r", ["builtin:synthetic"]
    line, = train(out, "--latent", "vae", "--vae", vae_file, "--repa", 4, "--data", *source)
    vae, dit, alpha = weights.load_vae(vae_file, CPU), dits.DiT(64, 64, 160, 6, 5), math.sqrt(32)
    batch, u = first_batch(encoder, source, vae)
    with torch.no_grad():
        mean, logvar = map(vaes.pack, vae.posterior(batch["images"].float() / 255))
        z = (mean + (logvar / 2).exp() * batch["posterior"] - vae.shift) * vae.scale
        tenths, flow = by_time(batch, z, alpha)
        dits.init_weights(dit, 0)
        model = train_dit.ScaleRAE(None, dit, alpha, 4, 96)
        dits.init_weights(model.repa, 2)
        t = alpha / (alpha - 1 + (1 / torch.sigmoid(batch["normal"])))[:, None, None]
        tokens = dit.x_embedder((1 - t) * z + t * batch["eps"]) + dit.pos_embed
        cosine = F.cosine_similarity(model.repa(tokens), u, dim=-1).mean(1)
    assert line["flow"] == flow and line["flow_by_t"] == tenths
    assert line["repa"] == pytest.approx(1 - cosine[batch["answer"]].mean().item(), rel=1e-4)
    whole = line["text"] + 2 * (line["flow"] + 0.5 * line["repa"])      # REPA is part of the flow
    assert line["loss"] == pytest.approx(whole, rel=1e-5)

    llm, dit, _, config = weights.load_model(out, CPU)
    assert dit.channels == 64 and llm.model.mm_projector[0].in_features == 96
    assert config["generation_alignment_tower"] == str(vae_file)
    assert config["shift_alpha"] == pytest.approx(alpha)
    assert not any("repa" in k for k in load_file(out / "final/model.safetensors"))


def test_repa_reaches_its_block_and_no_later_one():
    dit = dits.DiT(8, 4, 32, 3, 4)
    for p in dit.parameters():                                          # no zeros: gradients pass
        torch.nn.init.normal_(p, std=0.2)
    model = train_dit.ScaleRAE(None, dit, 1.0, repa=2, channels=8)
    dit(torch.randn(1, 4, 8), torch.rand(1), torch.randn(1, 4, 32))
    model.repa(model.tokens).sum().backward()
    assert [b.mlp.w3.weight.grad is not None for b in dit.dit_blocks] == [True, True, False]


def test_webssl_narrow_wide_head_and_no_shift(tmp_path, capsys):
    """A small DINOv2 with random weights of more channels (192) than the DiT has (160)."""
    torch.manual_seed(0)
    kind = dict(encoders.WEBSSL_300M, hidden_size=192, num_hidden_layers=2, num_attention_heads=4,
                image_size=64, patch_size=8)
    dino = encoders.build_encoder(kind)
    for name, p in dino.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    save_file(dino.state_dict(), tmp_path / "e.safetensors", metadata={"config": json.dumps(kind)})
    c = decoders.decoder_config("tiny", 192, 64, 8, dino.mean, dino.std)
    save_file(decoders.Decoder(c).state_dict(), tmp_path / "d.safetensors",
              metadata={"config": json.dumps(c)})
    options = ["--latent", "webssl", "--encoder", tmp_path / "e.safetensors", "--decoder",
               tmp_path / "d.safetensors", "--shift", "none", "--head-width", 240, "--head-depth",
               1, "--qk-norm", "--data", "builtin:synthetic"]
    train(tmp_path / "r", *options, status=2)
    said = capsys.readouterr().err
    assert "width 160 is not above the latent's 192 channels" in said and "--allow-narrow" in said
    line, = train(tmp_path / "r", *options, "--allow-narrow")
    batch, z = first_batch(weights.load_encoder(tmp_path / "e.safetensors", CPU),
                           ["builtin:synthetic"])
    assert abs(z.mean(-1)).max() > 0.1                                      # its own affine norm
    tenths, flow = by_time(batch, z, 1.0)
    assert line["flow"] == flow and line["flow_by_t"] == tenths
    _, dit, _, config = weights.load_model(tmp_path / "r", CPU)
    assert config["shift_alpha"] == 1 and config["diffusion_model_hidden_size"] == [160, 240]
    assert config["diffusion_model_depth"] == [6, 1] and config["diffusion_model_channels"] == 192
    assert dit.s_embedder.proj.weight.shape[:2] == (240, 192) and config["diffusion_qk_norm"]


def test_layers(tmp_path, capsys):
    """The last two blocks' sum is another latent: it needs a decoder that was trained on it."""
    train(tmp_path / "r", "--layers", 2, status=2)
    assert "train_decoder.py --layers 2" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    state, config = weights.read_weights(weights.TINY_CODEC[1])
    save_file(state, tmp_path / "two.safetensors",
              metadata={"config": json.dumps({**config, "layers": 2})})
    line, = train(tmp_path / "r", "--layers", 2, "--decoder", tmp_path / "two.safetensors",
                  "--data", "builtin:synthetic")
    encoder = weights.load_encoder(weights.TINY_CODEC[0], CPU, layers=2)
    batch, z = first_batch(encoder, ["builtin:synthetic"])
    assert line["flow"] == by_time(batch, z, 1.0)[1]
    config = weights.config_of(tmp_path / "r")
    args = type("Args", (), dict(encoder=None, decoder=None))
    assert weights.load_codec(config, args, CPU)[1] is not None         # the run names its decoder
    args.decoder = weights.TINY_CODEC[1]
    with pytest.raises(parallel.UserError, match="--layers 1, these are of --layers 2"):
        weights.load_codec(config, args, CPU)


def test_no_null_condition(tmp_path):
    """--cond-drop 0: the parameter does not exist, the config says so, nothing is guided. And what
    the authors' slow tokenizer reads is in final/."""
    line, = train(tmp_path / "r", "--cond-drop", 0, "--data", "builtin:synthetic")
    assert line["skipped_records"] == 0
    final = tmp_path / "r/final"
    assert not [k for k in load_file(final / "ema.safetensors") if "y_embedder" in k]
    assert weights.config_of(tmp_path / "r")["diffusion_class_dropout_prob"] == 0
    assert {"tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json",
            "tokenizer_config.json", "config.json"} <= {f.name for f in final.iterdir()}
    command = ["a cat", "--direct", "--steps", "2", "--run", str(tmp_path / "r"), "--out"]
    sample.main([*command, str(tmp_path / "o.png")])
    assert Image.open(tmp_path / "o.png").info["guidance"] == "1.0"
    with pytest.raises(parallel.UserError, match="no null condition"):
        sample.main([*command, str(tmp_path / "p.png"), "--guidance", "3"])


# ------------------------------------------------------------------------------------------------
# Finetuning: --init, --epochs, --cache-latents
# ------------------------------------------------------------------------------------------------

def test_finetuning(plain, tmp_path, capsys):
    """--init: the EMA of a run; with no learning rate to speak of the result is the same. --epochs:
    passes over finite data, rounded up; with the paper's rates, from cached latents."""
    out, lines = plain
    train(tmp_path / "a", "--init", out, "--lr", 1e-12, "--lr-llm", 1e-12)
    assert "was trained with" not in capsys.readouterr().err
    train(tmp_path / "shift", "--init", out, "--shift", 3)
    assert ("was trained with --shift 6.928203, this run takes 3; --shift 6.928203 keeps"
            in capsys.readouterr().err)
    state, config = weights.read_weights(out / "final/ema.safetensors")
    config.update(encoder_layers=3, mm_vision_tower_aux_list=["my/tower-interp64"])
    (tmp_path / "other").mkdir()
    save_file(state, tmp_path / "other/model.safetensors", metadata={"config": json.dumps(config)})
    shutil.copy(out / "final/tokenizer.json", tmp_path / "other")
    train(tmp_path / "tower", "--init", tmp_path / "other")
    said = capsys.readouterr().err
    assert "was trained with --layers 3, this run takes 1" in said
    assert "was trained with --encoder my/tower, this run takes" in said
    got, want = (load_file(path) for path in (tmp_path / "a/final/model.safetensors",
                                              out / "final/ema.safetensors"))
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[k], want[k], atol=1e-9) for k in want)
    recipe = ["--init", out, "--epochs", 0.01, "--lr", 5.66e-4, "--lr-llm", 5.66e-5, "--warmup",
              0.03]
    tuned = train(tmp_path / "b", *recipe, "--data", "builtin:hq", "--cache-latents",
                  tmp_path / "latents")
    assert len(tuned) == math.ceil(0.01 * 600 / 4) == 2
    assert [line["lr"] for line in tuned] == pytest.approx([5.66e-4, 5.66e-4])
    assert [line["lr_llm"] for line in tuned] == pytest.approx([5.66e-5, 5.66e-5])
    assert tuned[0]["loss"] < lines[0]["loss"] - 1                  # of the same four pictures
    train(tmp_path / "c", *recipe, "--data", "builtin:web", status=2)       # endless


def test_a_run_knows_its_own_encoder_and_decoder(tmp_path, monkeypatch, capsys):
    """Named from the folder they lie in, found from any; a pair that does not belong together is
    named, at training, drawing and finetuning."""
    state, config = weights.read_weights(weights.TINY_CODEC[1])
    shutil.copy(weights.TINY_CODEC[0], tmp_path / "enc.safetensors")
    save_file(state, tmp_path / "dec.safetensors", metadata={"config": json.dumps(
        dict(config, encoder=str(tmp_path / "enc.safetensors")))})
    draw = ["a cat", "--direct", "--steps", "1", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    train("a", "--encoder", "enc.safetensors")
    note = f"was trained for the encoder assets/tiny/encoder.safetensors, this one is {tmp_path}/enc"
    assert note in capsys.readouterr().err
    train("b", "--encoder", "enc.safetensors", "--decoder", "dec.safetensors")
    assert "note" not in capsys.readouterr().err
    monkeypatch.chdir(tmp_path / "a")
    for name, decoder in (("a", "assets/tiny/decoder.safetensors"),
                          ("b", f"{tmp_path}/dec.safetensors")):
        found = weights.config_of(tmp_path / name)
        assert found["mm_vision_tower_aux_list"] == [f"{tmp_path}/enc.safetensors"]
        assert found["decoder"] == decoder
        sample.main([*draw, "--run", str(tmp_path / name)])
        assert (note in capsys.readouterr().err) == (name == "a")
    train("c", "--init", tmp_path / "b")
    said = capsys.readouterr().err
    assert f"was trained with --decoder {tmp_path}/dec.safetensors, this run takes its encoder's" in said
    state, config = weights.read_weights(tmp_path / "b/final")
    save_file(state, tmp_path / "b/final/ema.safetensors", metadata={"config": json.dumps(
        dict(config, decoder=None))})
    with pytest.raises(parallel.UserError, match="names no decoder; give --decoder"):
        sample.main([*draw, "--run", str(tmp_path / "b")])


def test_no_cached_latents_on_several_xla_hosts(monkeypatch, capsys):
    hosts = parallel.Devices("xla", torch.device("cpu"), 0, 2, torch.float32, {"fsdp": 4, "tensor": 1})
    monkeypatch.setattr(parallel, "setup", lambda *args: hosts)
    assert call("--cache-latents") == 2
    assert "--cache-latents: not on several XLA hosts" in capsys.readouterr().err


def test_cached_latents_give_the_same_losses(tmp_path, vae_file, capsys):
    """A folder with a broken picture, latents of a VAE: what is skipped and drawn is the same too.
    Damage is made good, or refused where it cannot be seen at once; another VAE, another entry."""
    folder, cache = tmp_path / "pictures", tmp_path / "cache"
    folder.mkdir()
    for i in range(8):
        record = world.builtin_record("builtin:synthetic", 0, i, 80)
        Image.fromarray(record["image"]).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(record["caption"])
    (folder / "3.png").write_bytes(b"not a picture")
    options = ["--data", folder, "--latent", "vae", "--vae", vae_file, "--steps", 2]

    def errors():
        said = capsys.readouterr().err
        return re.findall(r"skipped (\S+):", said), said

    want = losses(train(tmp_path / "a", *options))
    broken = errors()[0]
    assert json.loads((tmp_path / "a/log.jsonl").read_text().splitlines()[-1])["skipped_records"] > 0
    assert len(broken) == 1 and "3.png" in broken[0]
    options += ["--cache-latents", cache]
    assert losses(train(tmp_path / "b", *options)) == pytest.approx(want, rel=1e-5)
    again, said = errors()
    assert again == broken and "encoding 8 pictures once" in said
    entry, = cache.glob("*.npy")
    made = entry.stat().st_mtime_ns
    assert losses(train(tmp_path / "c", *options, "--workers", 1)) == pytest.approx(want, rel=1e-5)
    assert entry.stat().st_mtime_ns == made                                 # read, by a worker
    for k, size in enumerate((10_000, 0)):
        os.truncate(entry, size)
        train(tmp_path / f"d{k}", *options, "--steps", 1)
        assert "making it again" in errors()[1] and entry.stat().st_size > 10_000
    rows = np.load(entry, mmap_mode="r+")
    rows["latent"][:, 0, 0] += 1
    rows.flush()
    train(tmp_path / "e", *options, status=2)
    said = errors()[1]
    assert said.count("error: --cache-latents: record ") == 1 and "delete that file" in said
    state, config = weights.read_weights(vae_file)
    key = next(k for k in state if k.startswith("encoder.") and k.endswith("bias"))
    save_file({**state, key: state[key] + 1}, tmp_path / "other.safetensors",
              metadata={"config": json.dumps(config)})
    train(tmp_path / "f", *options, "--steps", 1, "--vae", tmp_path / "other.safetensors")
    assert len(list(cache.glob("*.npy"))) == 2


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


def test_wandb_is_asked_for_and_optional(tmp_path, monkeypatch, capsys):
    """A stand-in package notes what it is told; without one, a clear line."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
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


@pytest.mark.parametrize("flags, latent, alpha, parameters", [
    (["--size", "2.4B"], [256, 1152], math.sqrt(72), 2.4359e9),
    (["--size", "2b", "--latent", "webssl"], [256, 1024], 8.0, None),
    (["--size", "0.5b", "--latent", "vae", "--shift", "none"], [256, 64], 1.0, None)])
def test_dry_run(flags, latent, alpha, parameters, capsys):
    """Nothing but shapes: the latent, its shift, the mixture; the 2.4B's parameters and FLOPs."""
    assert call("--dry-run", "--json", *flags, "--data", "builtin:web=3", "builtin:qa") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["latent"] == latent and told["alpha"] == pytest.approx(alpha)
    total = told["parameters"].pop("total")
    assert sum(told["parameters"].values()) == total
    assert [round(s["weight"], 2) for s in told["data"]] == [0.75, 0.25]
    if parameters:
        assert told["parameters"]["dit"] == pytest.approx(parameters, rel=1e-4)
        assert told["train_tflop_per_image"]["dit"] == pytest.approx(3.787, rel=1e-2)


def test_overfit(tmp_path):
    """What --help states."""
    lines = train(tmp_path / "r", "--overfit", "--steps", 60, "--lr", 3e-3, "--lr-llm", 3e-3)
    assert lines[0]["loss"] > 10 and lines[-1]["loss"] < 0.1


def test_a_resumed_overfit_takes_the_same_batch(tmp_path):
    options = "--overfit", "--save-every", 2
    whole = train(tmp_path / "a", *options, "--steps", 4)
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a/checkpoints/step-0000002", tmp_path / "b/checkpoints/step-0000002")
    resumed = train(tmp_path / "b", *options, "--steps", 4)
    assert [line["step"] for line in resumed] == [3, 4]
    assert losses(resumed) == losses(whole)[2:]


# ------------------------------------------------------------------------------------------------
# The expected curve
# ------------------------------------------------------------------------------------------------

CURVE = ROOT / "tests/expected/train_dit.json"
CURVE_KEYS = ("loss", "text", "flow", "grad_norm", "cond_spread")


def curve(out):
    lines = train(out, "--batch", 8, "--steps", 8)
    return [{k: line[k] for k in ("step", *CURVE_KEYS)} for line in lines]


def test_expected_curve(tmp_path):
    """torch 2.9 and 2.13, 1 and 2 threads: the same digits; the tolerance is for other machines."""
    want = json.loads(CURVE.read_text())
    got = curve(tmp_path / "r")
    assert len(got) == len(want["steps"])
    for a, b in zip(got, want["steps"]):
        for key in CURVE_KEYS:
            assert a[key] == pytest.approx(b[key], rel=want["tolerance"]), (key, a, b)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(f"usage: python {sys.argv[0]} --write")
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        rows = curve(Path(folder) / "run")
    command = "train_dit.py --device cpu --dtype float32 --batch 8 --steps 8 --log-every 1"
    head = {"command": command, "tolerance": 1e-4}
    CURVE.write_text(json.dumps(head, indent=1)[:-2] + ',\n "steps": [\n  '
                     + ",\n  ".join(map(json.dumps, rows)) + "\n ]\n}\n")
    print(CURVE)
