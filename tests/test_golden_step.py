"""One training step of each stage against its golden file, and that the files see the mistakes that
the first steps of a training do not.

    python -m pytest -q tests/test_golden_step.py
"""
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import dit  # noqa: E402
import golden  # noqa: E402
import networks  # noqa: E402
import stage2  # noqa: E402
from text_model import TextModel  # noqa: E402


def wrong(name):
    """Return the outputs of a golden file that do not agree."""
    return [output for output, *_, note in golden.check(HERE / f"golden/{name}.safetensors") if note]


def change(m, module, loader, edit):
    """Let a loader give a model with a mistake."""
    load = getattr(module, loader)

    def changed(*args):
        model = load(*args)
        edit(model)
        return model
    m.setattr(module, loader, changed)


def set_eps(model, kinds):
    for module in model.modules():
        if isinstance(module, kinds):
            module.eps = 1e-5


def scale_frequencies(net):
    net.dit.t_embedder.frequencies *= 1.001


MISTAKES = {
    "no attention": lambda m: m.setattr(dit, "attention", lambda q, k, v: torch.zeros_like(v)),
    "no condition": lambda m: m.setattr(
        TextModel, "condition", lambda self, h, start: h.new_zeros(len(h), 64, 160)),
    "wrong time frequencies": lambda m: change(m, stage2, "load_run", scale_frequencies),
    "tanh GELU in mm_projector": lambda m: change(
        m, stage2, "load_run",
        lambda net: setattr(net.llm.model.mm_projector[1], "approximate", "tanh")),
    "eps of the DiT": lambda m: change(
        m, stage2, "load_run", lambda net: set_eps(net.dit, dit.RMSNorm)),
    "no shift of the times": lambda m: change(
        m, stage2, "load_run",
        lambda net: setattr(net, "config", stage2.replace(net.config, alpha=1.0))),
}


def test_the_right_code():
    assert wrong("step") == wrong("step_decoder") == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_of_stage_2(mistake, monkeypatch):
    MISTAKES[mistake](monkeypatch)
    assert wrong("step")


@pytest.mark.parametrize("edit", [
    lambda model: set_eps(model, torch.nn.LayerNorm),
    lambda model: model.image_mean.add_(0.01)],
    ids=["eps of the decoder", "normalisation"])
def test_mistakes_of_stage_1(edit, monkeypatch):
    change(monkeypatch, networks, "load_decoder", edit)
    assert wrong("step_decoder")
