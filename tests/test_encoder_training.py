"""tiny/train_encoder.py: its losses, batches, draws, the exported files, bad input.

    pytest tests/test_encoder_training.py
"""
import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import chat
import cli
import data
import losses
import networks
import parallel
import weights
from test_stage1 import CPU, SMALL, call, lines, state
from tiny import train_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = chat.load_tokenizer(weights.TINY)
NARROW = ["--width", "48", "--depth", "2", "--tokenizer", weights.TINY]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of a narrow encoder with micro-batches -> the folder, the mixtures that the script
    made, and the keys of the draws that hid patches."""
    out = tmp_path_factory.mktemp("encoder") / "run"
    mixtures, hidden, mixture = [], [], data.Mixture
    with pytest.MonkeyPatch.context() as m:
        m.setattr(data, "Mixture", lambda sources, resolution, seed:
                  (mixtures.append(seed), mixture(sources, resolution, seed))[1])
        record_hidden(m, hidden)
        call(train_encoder, *SMALL, *NARROW, "--dense", "7", "--steps", "2", "--seed", "3",
             "--micro-batch", "2", "--out", out)
    return types.SimpleNamespace(out=out, mixtures=mixtures, hidden=hidden)


def record_hidden(monkeypatch, keys):
    """Add the key of every draw that hides patches to `keys`."""
    rng = data.rng

    def record(seed, purpose, n=0):
        if purpose == "hidden patches":
            keys.append((seed, n))
        return rng(seed, purpose, n)

    monkeypatch.setattr(data, "rng", record)


def trainee(arch="vit", **changed):
    """A network as the script begins with it."""
    args = types.SimpleNamespace(arch=arch, patch=8, width=48, depth=2, heads=4, resolution=16,
                                 seed=0, init=None, **changed)
    with torch.device("meta"):
        model, config, _ = train_encoder.network(args, 64, torch.float32)
    return parallel.build(model, train_encoder.initial_rows(model, args), CPU), config


# ------------------------------------------------------------------------------------------------
# Losses and measures
# ------------------------------------------------------------------------------------------------

def test_sigmoid_loss_and_hidden_patches():
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    want = -sum(math.log(1 / (1 + math.exp(-s))) for s in (1, 2, -0.5, 3)) / 2
    assert train_encoder.sigmoid_loss(logits).item() == pytest.approx(want)
    x = torch.zeros(40, 3, 64, 64)
    seen = train_encoder.hide(x, 8, 0.1, data.rng(0, "test"))
    grey = (seen == 0.5).all(1).float()                     # [B,H,W]
    assert 0.07 < grey.mean() < 0.13
    patches = F.avg_pool2d(grey[:, None], 8)
    assert ((patches == 0) | (patches == 1)).all()


def test_similarities_begin_as_siglip_s():
    """t = 10, b = -10."""
    image = F.normalize(torch.randn(3, 48), dim=-1)
    with torch.no_grad():
        found = trainee()[0].similarity(image, image)
    assert torch.allclose(found, 10 * image @ image.T - 10, atol=1e-4)


def test_psnr_of_the_probe():
    """The error is of pixels in [-1,1]."""
    model = lambda *a: (torch.eye(2), torch.eye(2), torch.tensor(0.04), torch.randn(2, 4, 3))
    batch = dict(images=torch.zeros(2, 3, 8, 8), ids=None, last=None)
    values = train_encoder.evaluate(model, batch)
    assert values["probe_psnr"] == pytest.approx(20) and values["retrieval"] == 1


def test_dense_term_has_its_weight(run):
    line = lines(run.out)[0]
    assert line["loss"] == pytest.approx(line["contrast"] + 7 * line["dense"], rel=1e-5)
    assert line["dense"] > 0.1


# ------------------------------------------------------------------------------------------------
# Batches and draws
# ------------------------------------------------------------------------------------------------

def test_last_is_the_end_token():
    records = [dict(caption=c, key=c, skipped=[], image=np.zeros((8, 8, 3), np.uint8))
               for c in ("a cat", "a red circle")]
    batch = train_encoder.collate(records, TOKENIZER)
    for ids, last, r in zip(batch["ids"], batch["last"], records):
        assert ids[:last].tolist() == TOKENIZER.encode(r["caption"]).ids
        assert ids[last] == TOKENIZER.token_to_id("<|endoftext|>")


def test_words_of_images_without_a_caption():
    turns = [{"value": "<image>\nWhat is this?"}, {"value": "A cat."}]
    asked = dict(caption=None, conversations=turns, task="i2t")
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": " Draw a cat.\n"},
             {"from": "gpt", "value": "Here:\n<image>"}]
    drawn = dict(caption=None, conversations=turns, task="t2i")
    assert train_encoder.words_of(asked) == "What is this? A cat."
    assert train_encoder.words_of(drawn) == "Draw a cat."


def test_measured_images_are_of_another_seed(run):
    assert run.mixtures == [3, 1003]                        # training, measuring


def test_every_micro_batch_and_process_hides_other_patches(run, tmp_path, monkeypatch):
    assert len(run.hidden) == len(set(run.hidden)) == 4     # two steps of two micro-batches
    monkeypatch.setattr(parallel, "total",
                        lambda values, devices: [devices.world * v for v in values])
    hidden = []
    record_hidden(monkeypatch, hidden)
    for rank in (0, 1):
        devices = parallel.Devices("cpu", torch.device("cpu"), rank, 2, torch.float32,
                                   {"fsdp": 2, "tensor": 1})
        devices.replicas = 1
        (tmp_path / f"{rank}/r").mkdir(parents=True)
        monkeypatch.setattr(parallel, "setup", lambda *a: devices)
        call(train_encoder, *SMALL, *NARROW, "--steps", "1", "--out", tmp_path / f"{rank}/r")
    assert len(hidden) == len(set(hidden)) == 2


def test_accumulated_gradients_are_a_mean(tmp_path, monkeypatch):
    """The gradient before the clip is the mean over the micro-batches."""
    monkeypatch.setattr(train_encoder, "sigmoid_loss", lambda s: s.diagonal().mean())
    norms, clip_grad = [], parallel.clip_grad

    def record(*args):
        norms.append(clip_grad(*args))
        return norms[-1]

    monkeypatch.setattr(parallel, "clip_grad", record)
    for micro in ("4", "2"):
        call(train_encoder, *SMALL, *NARROW, "--steps", "1", "--mask", "0", "--micro-batch", micro,
             "--out", tmp_path / micro)
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=1e-3)


# ------------------------------------------------------------------------------------------------
# Files
# ------------------------------------------------------------------------------------------------

def test_the_exported_encoder_gives_the_trained_latent(run):
    """In the layout of the shipped file, head included; the head is ignored on loading."""
    def layout(state):
        return {k for k in state if ".layers." not in k or ".layers.0." in k}
    exported = load_file(run.out / "final/model.safetensors")
    assert layout(exported) == layout(load_file(weights.TINY / "encoder.safetensors"))
    args = types.SimpleNamespace(arch="vit", patch=8, width=48, depth=2, heads=4, resolution=64,
                                 seed=5)
    model, config, _ = train_encoder.network(args, 1024, torch.float32)
    model.load_state_dict({k: v for k, v in state(run.out, 2).items()
                           if not k.startswith("optimizer.")})
    assert json.loads((run.out / "config.json").read_text()) == config
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        _, z = model.encode(x)
        assert torch.equal(networks.load_encoder(run.out, CPU)(x), z)
    for args.init in (run.out, run.out / "checkpoints/step-0000002"):       # --init takes both
        with torch.device("meta"):
            model, _, _ = train_encoder.network(args, 1024, torch.float32)
        parallel.build(model, train_encoder.initial_rows(model, args), CPU)
        assert all(torch.equal(v, exported[train_encoder.released_key(k)])
                   for k, v in model.encoder.state_dict().items())


@pytest.mark.parametrize("arch", ["vgg", "dino"])
def test_the_exported_loss_networks(arch, tmp_path, capsys):
    out = tmp_path / arch
    call(train_encoder, *SMALL, "--arch", arch, "--steps", "1", "--tokenizer", weights.TINY,
         "--out", out)
    call(train_encoder, *SMALL, "--arch", arch, "--steps", "1", "--tokenizer", weights.TINY,
         "--init", out / "checkpoints/step-0000001", "--out", tmp_path / "further")
    said = capsys.readouterr().out
    assert "retrieval among" in said and ("linear probe" in said) == (arch == "dino")
    exported = load_file(out / "final/model.safetensors")
    for key, value in state(out, 1).items():
        if key.startswith("encoder."):
            assert torch.equal(value, exported[key.removeprefix("encoder.")]), key
    if arch == "vgg":
        net = networks.load_perceptual(out, None, CPU)
        assert net.width == losses.TINY_WIDTH and net.lin0["model"][1].weight.unique() == 1 / 8
    else:
        net = networks.load_discriminator(out, CPU)
        assert net.config == losses.TINY_DISC
        assert torch.equal(net.dino.patch_embed["proj"].weight, exported["patch_embed.proj.weight"])


@pytest.mark.parametrize("arch", ["vit", "vgg", "dino"])
def test_dry_run(arch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    call(train_encoder, "--arch", arch, "--dry-run", "--json", "--data", "no/such/data")
    s = json.loads(capsys.readouterr().out)
    assert sum(v for k, v in s["parameters"].items() if k != "total") == s["parameters"]["total"]
    assert s["train_tflop_per_image"].keys() == {"encoder", "text"}
    assert not list(tmp_path.iterdir())


def test_it_runs_as_a_script_from_anywhere(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "tiny/train_encoder.py", "--help"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "--arch" in done.stdout


BAD = [
    (["--arch", "vgg", "--depth", "3"], ["--arch vgg", "--depth"]),
    (["--arch", "vgg", "--dense", "1"], ["--dense", "vgg"]),
    (["--resolution", "60"], ["--resolution 60", "--patch 8"]),
    (["--width", "50"], ["--width 50", "--heads 4"]),
    (["--init", "no/such"], ["--init", "no/such"]),
    (["--tokenizer", "no/such"], ["no/such"]),
    (["--compile"], ["unrecognized arguments", "--compile"]),
    (["--remat", "block"], ["unrecognized arguments", "--remat"]),
]


@pytest.mark.parametrize("argv, words", BAD, ids=[" ".join(a[-2:]) for a, _ in BAD])
def test_bad_input_is_one_clear_line(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    extra = [] if "--tokenizer" in argv else ["--tokenizer", str(weights.TINY)]
    monkeypatch.setattr(sys, "argv", ["train_encoder.py", *argv, *extra])
    with pytest.raises(SystemExit) as stopped:
        cli.main(train_encoder.main)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("error:") == 1
    for word in words:
        assert word in said, (word, said)
    assert not list(tmp_path.iterdir())
