"""metrics.py by hand and against other libraries; questions.py; evaluate.py's commands; bad input.

    pytest tests/test_evaluate.py
"""
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import init_weights
from test_sample import call, close, with_nan               # noqa: F401  (call is a fixture)

import data
import decoder
import dit
import encoder
import evaluate
import metrics
import parallel
import questions
import sample
import text_model
import weights
import stage2
import networks
from flow import flow_loss, interpolate
from text_model import direct_condition
from tiny import benchmark

torch.set_num_threads(1)
CPU = parallel.setup("cpu", "float32")


def run(call, *args):                                       # noqa: F811
    return call(*args, main=evaluate.main)


def last_line(capsys):
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


# ------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------

def test_psnr_and_ssim():
    a = torch.full((2, 3, 16, 16), 0.2)                 # 51 of 255
    b = torch.stack([a[0] + 0.1, a[0]])
    first, second = metrics.psnr(a, torch.stack([a[0] + 0.103, a[0]]))     # 77.3: stored as 77
    assert first.item() == pytest.approx(-20 * math.log10(26 / 255), abs=1e-3)
    assert second == 100
    # no variance: (2 ma mb + c1) / (ma^2 + mb^2 + c1)
    assert metrics.ssim(a, b)[0].item() == pytest.approx(0.1201 / 0.1301, abs=1e-4)
    # one window, by the definition
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 1, 1, 11, 11, generator=g, dtype=torch.float64)
    w = torch.exp(-(torch.arange(11.0, dtype=torch.float64) - 5) ** 2 / 4.5)
    w = torch.outer(w, w) / w.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    dx, dy = x - mx, y - my
    vx, vy, cov = (w * dx ** 2).sum(), (w * dy ** 2).sum(), (w * dx * dy).sum()
    want = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert metrics.ssim_map(x, y)[0, 0, 5, 5].item() == pytest.approx(want.item(), rel=1e-9)


def test_psnr_and_ssim_against_torchmetrics():
    """LPIPS has its golden file, tests/golden/lpips.safetensors."""
    image = pytest.importorskip("torchmetrics.functional.image")
    g = torch.Generator().manual_seed(1)
    a = metrics.round8(torch.rand(3, 3, 40, 48, generator=g))
    b = metrics.round8((a + 0.1 * torch.randn(a.shape, generator=g)).clamp(0, 1))
    want = image.structural_similarity_index_measure(a, b, data_range=1.0)
    assert metrics.ssim(a, b).mean().item() == pytest.approx(want.item(), abs=1e-4)
    want = image.peak_signal_noise_ratio(a, b, data_range=1.0, dim=(1, 2, 3), reduction="none")
    assert torch.allclose(metrics.psnr(a, b), want, atol=1e-4)


def test_ssim_against_scikit_image():
    """Its gaussian_weights form, at the positions where the window lies inside the image."""
    metrics = pytest.importorskip("skimage.metrics")
    g = torch.Generator().manual_seed(2)
    a = torch.rand(3, 40, 48, generator=g)
    b = (a + 0.1 * torch.randn(a.shape, generator=g)).clamp(0, 1)
    _, where = metrics.structural_similarity(
        a.numpy(), b.numpy(), data_range=1.0, channel_axis=0, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False, full=True)
    found = metrics.ssim_map(a[None], b[None])[0]
    assert torch.allclose(found[:, 5:-5, 5:-5], torch.from_numpy(where[:, 5:-5, 5:-5]), atol=1e-4)


def test_frechet_distance():
    """Closed forms: a shift; a scale of every axis; and the trace form for any two covariances."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(500, 6, generator=g, dtype=torch.float64)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert metrics.frechet(a, a + 2) == pytest.approx(6 * 4, rel=1e-9)
    centred = a - a.mean(0)
    spread = torch.cov(a.T).trace().item()
    assert metrics.frechet(centred, 3 * centred) == pytest.approx(4 * spread, rel=1e-9)
    b = a @ torch.randn(6, 6, generator=g, dtype=torch.float64)
    sa, sb = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvals(sa @ sb).real.sqrt().sum()
    want = (a.mean(0) - b.mean(0)).square().sum() + sa.trace() + sb.trace() - 2 * cross
    assert metrics.frechet(a, b) == pytest.approx(want.item(), rel=1e-9)
    few = a[:4]                                     # fewer images than features
    assert metrics.frechet(few, few) == pytest.approx(0, abs=1e-6)


def test_ssim_mirrors_the_image_at_its_border():
    """In a corner: the image is mirrored at the border, and the edge is not repeated."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 12, 12, generator=g, dtype=torch.float64).numpy()
    px, py = (np.pad(v, 5, mode="reflect")[:11, :11] for v in (x, y))
    w = np.exp(-(np.arange(11) - 5)**2 / 4.5)
    w = np.outer(w, w) / w.sum()**2
    mx, my = (w * px).sum(), (w * py).sum()
    vx, vy, cov = ((w * px * px).sum() - mx**2, (w * py * py).sum() - my**2,
                   (w * px * py).sum() - mx * my)
    want = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    found = metrics.ssim_map(*(torch.from_numpy(v)[None, None] for v in (x, y)))
    assert found[0, 0, 0, 0].item() == pytest.approx(want, rel=1e-6)


def test_metrics_are_of_stored_images():
    """Metrics see images as a file stores them: clamped, 8 bits."""
    x = torch.rand(4, 3, 16, 16)
    rows = metrics.measure(lambda x: 3 * x - 1, [x], lambda x: x.flatten(2), None)
    stored = metrics.round8(3 * x - 1)
    assert torch.equal(rows["ssim"], metrics.ssim(stored, x))
    assert torch.equal(rows["fake"], stored.flatten(2).mean(1))


def test_intervals_by_hand():
    assert metrics.interval([[1, 1, 1]]) == (1, 1, 1)
    assert metrics.interval([[0, 1]]) == (0.5, 0, 1)   # 0, 1/2, 1 with odds 1/4, 1/2, 1/4
    assert metrics.interval([[1] * 4, [0] * 4]) == (0.5, 0.5, 0.5)     # within categories only
    mean, low, high = metrics.interval([[1, 0, 0, 0] * 25])            # binomial(100, 1/4)
    assert mean == 0.25 and abs(low - 0.17) <= 0.01 and abs(high - 0.34) <= 0.01
    mean, low, high = metrics.interval([[0, 1] * 50] * 4)   # standard error 1/20, of all 1/40
    assert mean == 0.5 and abs(low - 0.451) <= 0.008 and abs(high - 0.549) <= 0.008
    assert metrics.interval([[0, 1] * 50] * 4) == (mean, low, high)    # the same draws each time


def test_which_answers_are_right():
    assert questions.right("what", "A cat and a red star.", "A red star and a cat.")
    assert questions.right("what", "Two dogs, a cat and a cup", "A cat, two dogs and a cup.")
    assert not questions.right("what", "A cat.", "A cat and a red star.")
    assert not questions.right("what", "A cat and a cat.", "A cat.")
    assert questions.right("count", " two", "Two.")
    assert not questions.right("count", "Two two", "Two.")
    assert not questions.right("exists", "", "No.")


def test_accuracy_by_hand():
    """Kind a: 2 of 3 right, the commonest reference 2 of 3; kind b: 0 of 1."""
    rows = [dict(kind=k, answer=a, reference=r) for k, a, r in
            (("a", "Yes.", "yes"), ("a", "no", "No."), ("a", "no", "yes"), ("b", "2", "3"))]
    found = {kind: questions.accuracy(rows, kind) for kind in ("a", "b", "all")}
    assert (found["a"]["accuracy"], found["a"]["commonest"]) == (0.6667, 0.6667)
    assert (found["b"]["accuracy"], found["b"]["commonest"]) == (0, 1)
    assert (found["all"]["questions"], found["all"]["accuracy"]) == (4, 0.5)
    assert found["all"]["commonest"] == 0.75


# ------------------------------------------------------------------------------------------------
# decoder
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A decoder with random weights, as a file."""
    config = decoder.size_config("tiny", 96, 64, 8, (.5,) * 3, (.5,) * 3, weights.TINY_ENCODER)
    model = decoder.Decoder(config)
    init_weights(model, decoder.initial)
    path = tmp_path_factory.mktemp("decoder") / "decoder.safetensors"
    save_file(model.state_dict(), path, {"config": json.dumps(asdict(config))})
    return path


def test_decoder(call, capsys, untrained):                  # noqa: F811
    assert run(call, "decoder", "--count", 6, "--batch", 4, "--dtype", "float32") == 0
    out, row = last_line(capsys)
    assert row["task"] == "decoder" and row["images"] == 18 and row["psnr"] > 24
    assert set(row["sources"]) == {"builtin:web", "builtin:synthetic", "builtin:text"}
    mean = sum(r["psnr"] for r in row["sources"].values()) / 3
    assert row["psnr"] == pytest.approx(mean, rel=1e-5) and 0.7 < row["ssim"] < 1
    assert row["fd_enc"] > 0 and row["lpips"] > 0 and "not the pretrained one" in row["lpips_net"]
    assert run(call, "decoder", "--run", untrained, "--data", "builtin:web", "--count", 6,
               "--no-lpips") == 0
    worse = last_line(capsys)[1]
    assert worse["lpips"] is None and worse["fd_enc"] > row["sources"]["builtin:web"]["fd_enc"]


def test_rfid_and_fid(call, capsys, untrained, tmp_path, monkeypatch):      # noqa: F811
    """Random Inception weights: equal images have distance 0, others do not."""
    fid = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with monkeypatch.context() as m:
        m.setattr(fid, "load_state_dict_from_url", lambda *_, **__: {})
        m.setattr(fid.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = fid.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    f = metrics.load_inception(tmp_path / "inception.pth", CPU)
    x = torch.rand(3, 3, 64, 64)
    assert f(x).shape == (3, 2048) and torch.equal(f(x), f(metrics.round8(x)))
    options = ["--data", "builtin:web", "--count", 4, "--inception", tmp_path / "inception.pth"]
    assert run(call, "decoder", "--run", untrained, "--no-lpips", *options) == 0
    assert last_line(capsys)[1]["rfid"] > 0
    assert run(call, "fid", "--steps", 2, *options) == 0
    assert last_line(capsys)[1]["fid"] > 0


@pytest.fixture
def mixtures(monkeypatch):
    """The mixtures that a script makes, in order."""
    made, real = [], data.Mixture

    def make(*args, **options):
        made.append(real(*args, **options))
        return made[-1]

    monkeypatch.setattr(data, "Mixture", make)
    return made


def test_decoders_are_measured_on_adm_s_crop(call, mixtures):               # noqa: F811
    assert run(call, "decoder", "--count", 2, "--no-lpips", "--data", "builtin:web") == 0
    assert [(m.crop, m.text) for m in mixtures] == [("center", False)]


def test_the_width_of_a_published_decoder_tells_its_encoder(tmp_path, monkeypatch):
    """A published decoder has no encoder in its config; diffusers' keys have a prefix."""
    asked = []
    monkeypatch.setattr(weights, "locate",
                        lambda wanted: [asked.append(n) or Path(n) for _, n, _ in wanted])
    monkeypatch.setattr(networks, "load_encoder", lambda *a: 1 / 0)
    args = SimpleNamespace(run=tmp_path, encoder=None)
    for width, name, prefix in ((1152, "siglip2", ""), (1024, "webssl", "decoder.")):
        save_file({f"{prefix}decoder_embed.weight": torch.zeros(4, width)},
                  tmp_path / "model.safetensors")
        with pytest.raises(ZeroDivisionError):
            evaluate.load_reconstruction(args, CPU)
        assert asked[-1] == weights.HUB[name][0]


@pytest.mark.parametrize("task", ["decoder", "vqa", "flow", "fid", "judge"])
def test_seeds_of_unseen_data_are_not_a_training_s(task, monkeypatch):
    """Trainings use small seeds."""
    seen = []
    function = seen.append
    monkeypatch.setattr(evaluate, task, lambda args: function(args))
    monkeypatch.setattr(getattr(evaluate, task), "__name__", task)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", task])
    evaluate.main()
    assert seen[0].seed == 2000


# ------------------------------------------------------------------------------------------------
# Generated images
# ------------------------------------------------------------------------------------------------

def test_t2i_from_end_to_end(call, capsys):                 # noqa: F811
    assert run(call, "t2i", "--per-category", 1, "--n", 2, "--steps", 3, "--batch", 3) == 0
    out, found = last_line(capsys)
    rows = {line[:16].strip(): line[16:].split() for line in out.splitlines()[2:12]}
    names = [*benchmark.CATEGORIES, "text"]
    assert list(found["categories"]) == names
    assert (found["task"], found["guidance"], found["steps"], found["n"]) == ("t2i", 3.0, 3, 2)
    for name, r in {**found["categories"], "overall": found}.items():
        assert rows[name][:2] == [str(r["prompts"]), f"{r['score']:.3f}"]
        assert 0 <= r["low"] <= r["score"] <= r["high"] <= 1
        assert r["score"] in (0, 0.5, 1) or name == "overall"
    assert found["score"] == pytest.approx(
        np.mean([found["categories"][n]["score"] for n in names[:6]]), abs=1e-4)
    assert found["ceiling"] >= 0.9                      # of the decoder: the judge passes these


def test_images_of_the_benchmark_are_those_of_sample(call):             # noqa: F811
    """The same prompt, seed and settings, in a batch of 6 or alone: at most one of 255 levels."""
    args = SimpleNamespace(run=weights.TINY, encoder=None, decoder=None, device="cpu", dtype=None,
                           batch=6, steps=3, guidance=None, schedule="euler", solver="euler")
    devices, model = evaluate.load_model(args)
    _, decode = stage2.load_codec(model.config, args, devices, encoder=False)
    prompts = ["a red circle", "two cats", "a blue star left of a dog"]
    with torch.no_grad():
        drawn = torch.stack(list(evaluate.draw(args, prompts, [[3, 4]] * 3, model, decode,
                                               sample.guidance_of(args, model), devices)))
    assert drawn.shape == (3, 2, 3, 64, 64)
    assert call("two cats", "--n", 2, "--seed", 3, "--steps", 3, "--direct") == 0
    for i in range(2):
        theirs = np.asarray(Image.open(f"out-{i}.png"), int)
        ours = (drawn[1, i] * 255).round().permute(1, 2, 0).numpy()
        assert abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("layout, names", [
    ("geneval", ["00000/metadata.jsonl", "00000/samples/0000.png", "00001/metadata.jsonl",
                 "00001/samples/0000.png"]), ("dpg", ["00000.png", "b.png"])])
def test_images_for_other_scorers_are_those_of_sample(call, layout, names, capsys):    # noqa: F811
    Path("p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "two cats", "item_id": "b"}\n')
    command = ["--prompts", "p.jsonl", "--layout", layout, "--n", 1, "--steps", 2, "--seed", 5]
    assert run(call, "t2i", *command, "--out", "ours") == 0
    assert last_line(capsys)[1] == dict(task="t2i", run=str(weights.TINY), prompts="p.jsonl",
                                        layout=layout, out="ours")
    assert call(*command, "--out", "theirs") == 0
    for folder in ("ours", "theirs"):
        assert sorted(str(f.relative_to(folder)) for f in Path(folder).rglob("*.*")) == names
    for name in names:
        assert Path("ours", name).read_bytes() == Path("theirs", name).read_bytes()


def test_fid_by_hand(call, capsys):                         # noqa: F811
    """Real images against images of their captions, drawn as sample.py draws them; in the features
    of the run's encoder. More steps come closer."""
    few = ["fid", "--data", "builtin:synthetic", "--count", 5, "--batch", 2]
    assert run(call, *few, "--steps", 8) == 0
    found = last_line(capsys)[1]
    assert (found["images"], found["fid"], found["data"]) == (5, None, ["builtin:synthetic"])
    net, _ = stage2.load_codec(stage2.load_run(weights.TINY, CPU).config,
                                SimpleNamespace(encoder=None, decoder=None), CPU, decoder=False)
    mixture, images = data.Mixture(["builtin:synthetic"], 64, 2000, net.crop), []
    for i in range(5):
        words = mixture[i]["conversations"][0]["value"]
        assert call(words, "--direct", "--steps", 8, "--seed", 2000 + i) == 0
        images.append(np.asarray(Image.open("out.png")))
    with torch.no_grad():
        real, fake = (net(torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2) / 255).mean(1)
                      for x in ([mixture[i]["image"] for i in range(5)], images))
    assert found["fd_enc"] == pytest.approx(metrics.frechet(real, fake), rel=0.02)
    assert run(call, *few, "--steps", 1) == 0
    assert last_line(capsys)[1]["fd_enc"] > 1.3 * found["fd_enc"]


# ------------------------------------------------------------------------------------------------
# Flow loss
# ------------------------------------------------------------------------------------------------

def test_the_words_that_ask_for_an_image_are_the_user_s():
    turns = [("system", "Be brief."), ("human", "a cat"), ("gpt", "Here: <image>")]
    record = {"task": "t2i", "key": "k",
              "conversations": [{"from": who, "value": words} for who, words in turns]}
    assert evaluate.prompt_of(record) == "a cat"


def test_flow_by_hand(call, capsys):                        # noqa: F811
    """The same numbers in any batch: |v - (eps - z)|^2 at the given times, with the noise of each
    image's number; and the prompt as training asks it."""
    assert run(call, "flow", "--count", 5, "--batch", 2, "--times", 0.3, 0.8, "--data",
               "builtin:web", "--dtype", "float32") == 0
    out, found = last_line(capsys)
    assert found["images"] == 5 and [r["t"] for r in found["times"]] == [0.3, 0.8]
    model = stage2.load_run(weights.TINY, CPU)
    net = networks.load_encoder(weights.TINY / "encoder.safetensors", CPU)
    mixture = data.Mixture(["builtin:web"], 64, 2000)
    records = [mixture[i] for i in range(5)]
    with torch.no_grad():
        z = net(torch.stack([torch.from_numpy(r["image"]).permute(2, 0, 1) for r in records]) / 255)
        cond = direct_condition(model.llm, model.tokenizer,
                                [r["conversations"][0]["value"] for r in records], "cpu")
        eps = torch.stack([torch.from_numpy(data.rng(2000, "evaluate flow", i).standard_normal(
            (64, 96), dtype=np.float32)) for i in range(5)])
        for row in found["times"]:
            t = torch.full((5,), row["t"])
            want = flow_loss(model.dit(interpolate(z, eps, t), t, cond), z, eps).mean().item()
            assert row["loss"] == pytest.approx(want, abs=1e-4)
            assert row["low"] < row["loss"] < row["high"]
    assert found["flow"] == pytest.approx(np.mean([r["loss"] for r in found["times"]]), abs=1e-4)


def test_finite_data_is_used_once(call, capsys, tmp_path):              # noqa: F811
    """Three images with captions: no fourth; a source of questions is refused."""
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a wall")
    assert run(call, "flow", "--data", tmp_path, "--times", 0.5) == 0
    assert last_line(capsys)[1]["images"] == 3
    assert run(call, "flow", "--data", "builtin:qa", "--count", 2) == 2
    assert "is a question" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Questions
# ------------------------------------------------------------------------------------------------

def test_vqa_from_end_to_end(call, capsys):                 # noqa: F811
    assert run(call, "vqa", "--count", 30) == 0
    found = last_line(capsys)[1]
    assert found["questions"] == sum(r["questions"] for r in found["kinds"].values()) == 30
    assert found["accuracy"] == pytest.approx(sum(
        r["accuracy"] * r["questions"] for r in found["kinds"].values()) / 30, abs=1e-3)
    assert {"what", "count", "colour", "exists", "align"} <= set(found["kinds"])
    assert all(r["low"] <= r["accuracy"] <= r["high"] and 0 < r["commonest"] <= 1
               for r in found["kinds"].values())
    assert run(call, "vqa", "--count", 30) == 0
    assert last_line(capsys)[1] == found                # the same questions, the same answers


def test_vqa_of_a_file(call, capsys):                       # noqa: F811
    """The same questions as a LLaVA-style JSONL have the same answers; without a reference an
    answer is only written; other scorers find every answer."""
    mixture, rows = data.Mixture(["builtin:qa"], 64, 2000), []
    for i in range(12):
        r = mixture[i]
        Image.fromarray(r["image"]).save(f"{i}.png")
        rows.append({"id": f"q{i}", "image": f"{i}.png", "category": r["question"],
                     "conversations": r["conversations"]})
    rows += [{"question_id": 99, "image": "0.png", "text": "What is in the picture?"},
             {"image": "1.png", "conversations": rows[1]["conversations"][:1]}]
    Path("q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert run(call, "vqa", "--count", 12, "--answers", "new/builtin.jsonl") == 0
    builtin = last_line(capsys)[1]
    assert run(call, "vqa", "--data", "q.jsonl", "--answers", "answers.jsonl") == 0
    out, found = last_line(capsys)
    assert "14 questions" in out and "12 with a reference" in out
    flags = {k: builtin[k] for k in ("data", "count", "answers")}
    assert {**found, **flags} == builtin
    said = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert [a["question_id"] for a in said] == [f"q{i}" for i in range(12)] + [99, 13]
    assert said[12]["prompt"] == "What is in the picture?" and said[12]["reference"] is None
    same = [json.loads(line)["text"] for line in Path("new/builtin.jsonl").read_text().splitlines()]
    assert [a["text"] for a in said[:12]] == same and said[13]["text"] == said[1]["text"]
    assert run(call, "vqa", "--data", "q.jsonl", "--count", 1) == 0
    assert last_line(capsys)[1]["questions"] == 1
    rows[-2]["answer"] = 5                              # a number is a reference, a list is not
    Path("q.jsonl").write_text(json.dumps(rows[-2]))
    assert run(call, "vqa", "--data", "q.jsonl") == 0 and last_line(capsys)[1]["questions"] == 1
    assert run(call, "vqa", "--data", "q.jsonl", "--answers", "q.jsonl") == 2
    rows[-2]["answer"] = ["5", "five"]
    Path("q.jsonl").write_text(json.dumps(rows[-2]))
    assert run(call, "vqa", "--data", "q.jsonl") == 2
    Path("q.jsonl").write_text(json.dumps(rows[-1]))    # no reference at all
    assert run(call, "vqa", "--data", "q.jsonl") == 0
    assert last_line(capsys)[1] == dict(
        task="vqa", run=str(weights.TINY), data="q.jsonl", seed=2000, dtype="torch.float32",
        encoder=None, decoder=None, count=None, max_tokens=48, answers=None, questions=0, kinds={})


def test_answers_of_a_batch_are_those_of_one():
    model = stage2.load_run(weights.TINY, CPU)
    z = torch.randn(7, 64, 96, generator=torch.Generator().manual_seed(0))
    asked = ["What is in the picture?", "How many cats are there?", "What do you see?",
             "Is there a dog in the picture?", "What colour is the background?",
             "What is in the picture?", "What does this image show?"]
    said = questions.answers(model.llm, model.tokenizer, z, asked, batch=3)
    assert said == ["".join(sample.answer(model.llm, model.tokenizer, q, row[None], 48))
                    for q, row in zip(asked, z)]
    assert all(said) and len(set(said)) > 2


def test_judge_from_end_to_end(call, capsys):               # noqa: F811
    assert run(call, "judge", "--count", 2) == 0
    out, found = last_line(capsys)
    assert list(found["rows"]) == [f"{s} {k}" for s in ("web", "synthetic", "text")
                                   for k in ("clean", "reconstruction")]
    assert len(out.splitlines()) == 8 and found["rows"]["web clean"]["kind"][1] == 2
    assert all(r["scenes"] == 2 for r in found["rows"].values())


# ------------------------------------------------------------------------------------------------
# A VAE's latent
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def vae_run(tmp_path_factory):
    """A model with random weights that draws the tiny VAE's latent, as a folder."""
    folder = tmp_path_factory.mktemp("vae run")
    config = stage2.ModelConfig(
        dit=dit.DiTConfig(64, 64, 80, 1, 5), llm=replace(text_model.TINY, num_hidden_layers=1),
        image_channels=96, alpha=5.0, encoder=weights.TINY_ENCODER, vae=weights.TINY_VAE)
    llm, model = stage2.build_stage2(config, torch.float32)
    init_weights(llm, text_model.initial)
    init_weights(model, dit.initial)
    state = {**{f"llm.{k}": v for k, v in llm.state_dict().items()},
             **{f"dit.{k}": v for k, v in model.state_dict().items()}}
    save_file({weights.stage2_key(k): v.contiguous() for k, v in state.items()},
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(stage2.save_config(config)))
    (folder / "tokenizer.json").write_bytes((weights.TINY / "tokenizer.json").read_bytes())
    return folder


def test_a_run_on_a_vae_latent(call, capsys, vae_run):      # noqa: F811
    """Its benchmark, questions, flow loss and Frechet distance; it cannot rank what it draws."""
    assert run(call, "t2i", "--run", vae_run, "--per-category", 1, "--n", 1, "--steps", 1) == 0
    assert 0.5 < last_line(capsys)[1]["ceiling"] <= 1                   # the VAE passes most
    assert run(call, "vqa", "--run", vae_run, "--count", 2) == 0
    assert run(call, "flow", "--run", vae_run, "--count", 4, "--times", 0.5) == 0
    assert 1 < last_line(capsys)[1]["flow"] < 4         # v is 0 at first: |eps - z|^2, about 2
    assert run(call, "fid", "--run", vae_run, "--count", 3, "--steps", 1) == 0
    assert last_line(capsys)[1]["fd_enc"] > 0
    assert run(call, "t2i", "--run", vae_run, "--encoder", "absent") == 2
    assert "--encoder absent" in capsys.readouterr().err
    assert call("a cat", "--run", vae_run, "--best-of", 2, "--direct") == 2
    assert "cannot judge what it draws" in capsys.readouterr().err


def test_a_vae_alone_and_a_published_one(call, capsys):     # noqa: F811
    """Reconstructions of the tiny VAE, and the same in the folder that FLUX's comes in."""
    few = ["--count", 4, "--no-lpips", "--data", "builtin:web", "--encoder",
           weights.TINY / "encoder.safetensors"]
    assert run(call, "decoder", "--run", weights.TINY / "vae.safetensors", *few) == 0
    want = last_line(capsys)[1]["psnr"]
    Path("flux/vae").mkdir(parents=True)
    save_file(load_file(weights.TINY / "vae.safetensors"),
              "flux/vae/diffusion_pytorch_model.safetensors")
    config = weights.open_weights(weights.TINY / "vae.safetensors").config
    Path("flux/vae/config.json").write_text(json.dumps(config))
    assert run(call, "decoder", "--run", "flux", *few) == 0
    assert last_line(capsys)[1]["psnr"] == want > 20


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    f = tmp_path_factory.mktemp("files")
    (f / "folder").mkdir()
    (f / "good.txt").write_text("a cat")
    for name, line in {"blank.jsonl": '{"prompt": " "}', "number.jsonl": '{"prompt": 3}',
                       "half.jsonl": '{"prompt": "a"}\n{"prompt": ',
                       "lost.jsonl": '{"image": "gone.png", "text": "what?"}',
                       "roles.jsonl": '{"image": "a.png", "conversations": [{"from": "cat", '
                                      '"value": "meow"}]}',
                       "mute.jsonl": '{"image": "a.png"}',
                       "chat.jsonl": '{"image": "a.png", "text": "what <im_start>?"}'}.items():
        (f / name).write_text(line)
    Image.new("RGB", (20, 20)).save(f / "a.png")
    (f / "cut.safetensors").write_bytes((weights.TINY / "decoder.safetensors").read_bytes()[:999])
    save_file({"x": torch.zeros(1)}, f / "other.safetensors")
    with_nan("decoder.safetensors", "decoder_pred.weight", f / "nan.safetensors")
    for name, count, broken in (("one", 1, 0), ("broken", 40, 14)):
        (f / name).mkdir()
        for i in range(count):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(f / name / f"{i:02d}.png")
        for i in range(broken):
            (f / name / f"{i:02d}.png").write_bytes(b"x")
    (f / "one/00.txt").write_text("a wall")
    return f


PROMPTS = "t2i --prompts {f}/good.txt --layout geneval"
BAD = [
    ("", "task"), ("draw", "draw|t2i|vqa"),
    ("t2i --n 0", "--n"), ("t2i --steps 0", "--steps"), ("t2i --guidance -1", "--guidance"),
    ("t2i --guidance nan", "--guidance|nan"), ("t2i --batch 0", "--batch"),
    ("t2i --seed -1", "--seed"), ("t2i --per-category 0", "--per-category"),
    ("t2i --per-category 41", "--per-category 41|40 prompts"),
    ("t2i --prompts {f}/good.txt", "--layout|--out"), ("t2i --layout dpg", "--prompts"),
    ("t2i --out x", "--prompts"), (PROMPTS, "--out"),
    (PROMPTS + " --out o --per-category 3", "--per-category"),
    (PROMPTS + " --out o --batch 3", "--batch"),
    ("t2i --prompts {f}/good.txt --layout coco --out o", "--layout|coco|geneval"),
    ("t2i --prompts {f}/good.txt --layout dpg --out o --n 3", "--n 3|1 or 4"),
    (PROMPTS + " --out {f}/good.txt", "--out|good.txt|folder"),
    ("t2i --prompts {f}/absent --layout dpg --out o", "--prompts|absent"),
    ("t2i --prompts {f}/folder --layout dpg --out o", "--prompts|folder|no prompt"),
    ("t2i --prompts {f}/blank.jsonl --layout dpg --out o", "blank.jsonl|empty"),
    ("t2i --prompts {f}/number.jsonl --layout dpg --out o", "number.jsonl|line 1"),
    ("t2i --prompts {f}/half.jsonl --layout dpg --out o", "half.jsonl|line 2|JSON"),
    ("t2i --run {f}/absent", "--run|absent"), ("t2i --run {f}/folder", "--run|folder"),
    ("t2i --run {f}/other.safetensors", "--run|other.safetensors"),
    ("t2i --encoder {f}/absent", "--encoder|absent"),
    ("t2i --decoder {f}/cut.safetensors", "--decoder|cut.safetensors"),
    ("t2i --decoder {f}/nan.safetensors", "--decoder|nan.safetensors|NaN"),
    ("t2i --per-category 1 --steps 2 --guidance 3e38", "the latent|guidance 3e+38|not finite"),
    ("vqa --count 0", "--count"), ("vqa --count ten", "--count|ten"),
    ("vqa --run {f}/absent", "--run|absent"), ("vqa --encoder {f}/other.safetensors", "--encoder"),
    ("vqa --decoder {f}/absent", "--decoder"), ("vqa --data {f}/absent.jsonl", "absent.jsonl"),
    ("vqa --data {f}/lost.jsonl", "gone.png"), ("vqa --data {f}/half.jsonl", "half.jsonl"),
    ("vqa --data {f}/roles.jsonl", "roles.jsonl|'cat'"),
    ("vqa --data {f}/mute.jsonl", 'mute.jsonl:1: expected "question"'),
    ("vqa --data {f}/chat.jsonl", "<im_start>|chat format"),
    ("vqa --answers a.txt", "--answers|a.txt|.jsonl"), ("vqa --data builtin:web", "builtin:web"),
    ("judge --count 0", "--count"), ("judge --decoder {f}/absent", "--decoder|absent"),
    ("judge --encoder {f}/cut.safetensors", "--encoder|cut.safetensors"),
    ("judge --dtype half", "--dtype|half|float32"),
    ("decoder --count 1", "--count 1|at least 2"), ("decoder --data {f}/absent", "absent"),
    ("decoder --data builtin:cats", "builtin:cats|builtin:web"),
    ("decoder --run {f}/absent", "--run|absent"), ("decoder --vgg {f}/absent", "--vgg|absent"),
    ("decoder --data {f}/one", "--data|1 image"),
    ("decoder --data {f}/broken --count 40 --no-lpips", "broken records|10%"),
    ("decoder --run {a}/vae.safetensors --encoder {f}/absent", "--encoder|absent"),
    ("decoder --run {f}/nan.safetensors", "--run|nan.safetensors|NaN"),
    ("decoder --run {a}/encoder.safetensors", "--run|encoder.safetensors|not a decoder"),
    ("decoder --inception {f}/absent", "--inception|absent"),
    ("flow --times 1.5", "--times|1.5"), ("flow --data {f}/absent", "absent"),
    ("flow --data {f}/broken", "broken|caption"), ("flow --count 0", "--count"),
    ("fid --data {f}/one", "1 image|at least 2"), ("fid --inception {f}/absent", "--inception"),
    ("fid --schedule authors --steps 2", "--steps 2|at least 3"),
]


@pytest.mark.parametrize("command, says", BAD, ids=[c for c, _ in BAD])
def test_bad_input_is_one_clear_line(command, says, call, files, capsys, tmp_path):    # noqa: F811
    """Exit status 2; the value, and the flag that mends it; no traceback, nothing written."""
    given = command.format(f=files, a=weights.TINY).split()
    assert (run(call, *given) if command else run(lambda *a, main: call(main=main))) == 2
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and "Traceback" not in said, said
    for word in says.split("|"):
        assert word in said.partition("error:")[2], (word, said)
    assert len(said) < 2500 and not list(tmp_path.iterdir())
