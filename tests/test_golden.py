"""Parity with the reference modules: golden files, and closed-form numbers of the DiT.

    python -m pytest -q tests/test_golden.py

tests/golden/README.md says where the files come from. The closed-form cases were computed with the
reference in fp32 on the CPU: tolerance 1e-4 on elements, 1e-2 on sums.
"""
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import flow  # noqa: E402
import golden  # noqa: E402
from dit import DiT, DiTConfig  # noqa: E402


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
    return fill(DiT(DiTConfig(8, 256, 64, 2, 4, cond_width=24)), 36)


def test_time_embedding(dit):
    agree(dit.t_embedder(T), -1.020890, [-0.15614, 0.03358, -0.11434, -0.14045, 0.00366, -0.2177])


def test_dit_forward(dit):
    agree(channels_first(dit(X, T, Y)), -468.389355,
          [0.51484, 0.5077, 0.39815, 0.26218, 0.16126, 0.217], [0.76218, 0.85216, 1.056], 0.489962)


def test_authors_sampler(dit):
    alpha = flow.shift_alpha(256, 8)
    assert alpha == pytest.approx(0.70710678)
    out = flow.sample(dit, Y[:1], X[:1], alpha, 50, schedule="authors")
    agree(channels_first(out), 239.721797,
          [-0.47278, -0.37454, -0.17689, 0.0482, 0.24083, 0.28135],
          [-0.88107, -1.05149, -1.39776], 0.744459)


def test_flow_loss(dit):
    eps = wave(torch.cos, 0.07, 2, 8, 16, 16).flatten(2).mT
    loss = flow.flow_loss(dit(flow.interpolate(X, eps, T), T, Y), X, eps)
    assert loss.tolist() == pytest.approx([1.4174619, 1.4288635], abs=1e-5)


def test_wide_head():
    model = fill(DiT(DiTConfig(8, 256, 64, 2, 4, cond_width=24, head_width=96, head_depth=1)), 52)
    agree(channels_first(model(X, T, Y)), -112.192742,
          [2.09063, 2.08283, 2.07308, 2.06236, 2.05069, 2.03941], mean_abs=1.436396)


def test_single_width_ddt():
    """Without s_projector."""
    model = fill(DiT(DiTConfig(8, 256, 64, 2, 4, cond_width=24, head_depth=1)), 50)
    agree(channels_first(model(X, T, Y)), -375.447140,
          [1.36268, 1.3527, 1.33569, 1.31409, 1.29392, 1.28334], mean_abs=0.856533)
