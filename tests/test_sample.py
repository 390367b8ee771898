"""flow.sample, best_of.py and sample.py: the sampler, verifiers by hand, files, bad input.

    pytest tests/test_sample.py
"""
import json
import math
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"                      # a missing file is not waited for
import best_of                                                          # noqa: E402
import cli                                                              # noqa: E402
import flow                                                             # noqa: E402
import parallel                                                         # noqa: E402
import prompts                                                          # noqa: E402
import sample                                                           # noqa: E402
import text_model                                                       # noqa: E402
import weights                                                          # noqa: E402
import stage2
from chat import IMAGE, encode_text, load_tokenizer                     # noqa: E402
from conftest import init_weights   # noqa: E402
from dit import DiT, DiTConfig                                          # noqa: E402
from files import load_image, open_image                                # noqa: E402
from text_model import LLMConfig, TextModel, direct_condition     # noqa: E402

torch.set_num_threads(1)
TOKENIZER = load_tokenizer(weights.TINY)
N, C = 64, 96                                           # the shipped model's latent
CPU = parallel.setup("cpu", "float32")


def small_dit(dtype=torch.float32, **options):
    model = DiT(DiTConfig(24, 16, 64, 2, 4, **options), dtype).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():                        # adaLN-zero would hide every difference
        p.copy_(torch.randn(p.shape, generator=g) * 0.3 * p[0].numel() ** -0.5)
    return model


def small_llm(channels=8):
    config = LLMConfig(32, 3, 2, 1, 48, TOKENIZER.get_vocab_size(), True)
    model = TextModel(config, 4, channels, 16).requires_grad_(False)
    init_weights(model, text_model.initial)
    return model


def draws(B, shared, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(1 if shared else B, 16, 64, generator=g),
            torch.randn(B, 16, 24, generator=g))


# ------------------------------------------------------------------------------------------------
# The sampler
# ------------------------------------------------------------------------------------------------

def plain(model, cond, noise, alpha, steps, scale, schedule="euler"):
    """Euler steps with guidance as its equation says, each image alone, nothing broadcast."""
    out = []
    for x, y in zip(noise, cond.expand(len(noise), -1, -1)):
        null = model.y_embedder.dropout_embedding.expand_as(y)
        for a, b in flow.sampling_times(schedule, steps, alpha):
            v, v_null = (model(x[None], torch.tensor([a]), c[None])[0] for c in (y, null))
            x = x + (b - a) * (v_null + scale * (v - v_null))
        out.append(x)
    return torch.stack(out)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("options", [{}, dict(head_width=96, head_depth=1), dict(qk_norm=True),
                                     dict(predict="x")])
def test_samples_equal_the_plain_form(options, shared):
    """A condition for all images broadcasts; a batch changes nothing but rounding."""
    model, (cond, noise) = small_dit(**options), draws(3, shared)
    for scale, schedule in ((1.0, "euler"), (3.0, "euler"), (3.0, "authors")):
        want = plain(model, cond, noise, 4.0, 6, scale, schedule)
        got = flow.sample(model, cond, noise, 4.0, 6, scale, schedule)
        assert (got - want).abs().max() <= 1e-4 * max(1, want.abs().max()), (scale, schedule)
    assert (want - noise).abs().max() > 0.1             # the model moves things at all


def test_images_of_a_prompt_share_their_modulation():
    """5 steps, 4 images, guided: one modulation per step and branch, not per image."""
    model, (cond, noise) = small_dit(), draws(4, True)
    calls = []
    model.dit_blocks[0].adaLN_modulation[1].register_forward_hook(
        lambda module, inputs, output: calls.append(tuple(output.shape)))
    flow.sample(model, cond, noise, 4.0, 5, 3.0)
    assert sorted(calls) == 5 * [(1, 1, 6 * 64)] + 5 * [(1, 16, 6 * 64)]


def test_guidance_is_computed_in_fp32(monkeypatch):
    seen, guide, (cond, noise) = set(), flow.guide, draws(1, True)
    monkeypatch.setattr(flow, "guide", lambda a, b, s:
                        (seen.update([a.dtype, b.dtype]), guide(a, b, s))[1])
    flow.sample(small_dit(torch.bfloat16), cond, noise, 4.0, 2, 3.0)
    assert seen == {torch.float32}


def test_heun_by_hand():
    """dx/dt = x over one step from 1 to 0: Euler gives 0; Heun with an end at t > 0 takes the mean
    of both slopes; and each step calls on_step once."""
    def velocity(x, t):
        return x
    x, steps = torch.ones(1, 1, 1), []
    assert flow.integrate(velocity, x, [(1.0, 0.0)]).item() == 0
    half = flow.integrate(velocity, x, [(1.0, 0.5)], "heun", lambda: steps.append(1)).item()
    assert half == pytest.approx(1 - 0.5 * (1 + 0.5) / 2)
    times = flow.sampling_times("euler", 8, 1.0)
    errors = [abs(flow.integrate(velocity, x, times[:-1], solver).item() - math.exp(-7 / 8))
              for solver in ("euler", "heun")]
    assert len(steps) == 1 and errors[1] < errors[0] / 20


def test_the_default_schedule_is_shifted():
    pairs = flow.sampling_times("euler", 4, 8.0)
    assert [a for a, _ in pairs] == pytest.approx([1, 24 / 25, 8 / 9, 8 / 11])
    assert [b for _, b in pairs] == pytest.approx([24 / 25, 8 / 9, 8 / 11, 0])
    assert [a for a, _ in flow.sampling_times("euler", 4, 1.0)] == pytest.approx(
        [1, 0.75, 0.5, 0.25])


def test_noise_depends_on_prompt_and_seed_alone():
    a, b, c = (flow.noise_for(*key, 4, 3) for key in (("a", 0), ("b", 0), ("a", 1)))
    assert not torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(a, flow.noise_for("a", 0, 4, 3)) and abs(a.std() - 1) < 0.5
    assert not torch.equal(flow.noise_for("1 cat", 1, 4, 3), flow.noise_for(" cat", 11, 4, 3))


# ------------------------------------------------------------------------------------------------
# Verifiers
# ------------------------------------------------------------------------------------------------

def test_certainty_by_hand():
    """V = 3: p = (1/2, 1/4, 1/4): -(log 3 + (log 1/2 + 2 log 1/4) / 3) = (5/3) log 2 - log 3."""
    logits = torch.tensor([[0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]]).log() + 7.0
    assert best_of.certainty(logits).tolist() == pytest.approx(
        [5 / 3 * math.log(2) - math.log(3), 0.0], abs=1e-6)


class Scripted:
    """A language model whose logits are written by hand: one [B,V] for each decoding step."""
    tokens = 4

    def __init__(self, steps):
        self.steps, self.prefills = list(steps), 0

    def embed(self, ids, start=None, answer=None, z=None):
        self.prefills += z is not None
        return torch.zeros(*ids.shape, 1)

    def __call__(self, x, cache):
        return x

    def logits(self, h):
        return self.steps.pop(0)


def test_answers_by_hand():
    """Four candidates: "Yes", "No", "Yes No Yes", and one that says neither."""
    word = {w: TOKENIZER.encode(w).ids[0] for w in ("Yes", "No", "the")}
    word["end"] = TOKENIZER.token_to_id("<|im_end|>")

    def step(*says):
        logits = torch.full((len(says), TOKENIZER.get_vocab_size()), -50.0)
        for row, values in zip(logits, says):
            for w, value in values.items():
                row[word[w]] = value
        return logits

    end = {"end": 9.0}
    llm = Scripted([step({"Yes": 5.0, "No": 2.0}, {"No": 4.0, "Yes": 1.0},
                         {"Yes": 6.0, "No": 5.0}, {"the": 3.0, "Yes": -1.0, "No": 0.0}),
                    step(end, end, {"No": 7.0}, end), step(end, end, {"Yes": 8.0}, end),
                    step(end, end, end, end)])
    found = best_of.answer_scores(llm, TOKENIZER, torch.zeros(4, 4, 8), "a cat")
    assert llm.prefills == 1 and not llm.steps
    assert found["score"].tolist() == [1, 0, 1, 0]
    assert found["yes_logit"].tolist() == [5, 0, 8, 0]              # the last hit wins, 0 if absent
    assert found["no_logit"].tolist() == [0, 4, 7, 0]
    sigmoid = (lambda x: 1 / (1 + math.exp(-x)))
    assert found["yes_prob"].tolist() == pytest.approx(
        [sigmoid(3), sigmoid(-3), sigmoid(1), sigmoid(-1)], abs=1e-6)
    assert found["answer"] == ["Yes", "No", "YesNoYes", "the"]
    one = best_of.answer_scores(Scripted([step({"Yes": 5.0, "No": 2.0})]), TOKENIZER,
                                torch.zeros(1, 4, 8), "a cat", limit=1)
    assert one["yes_prob"].item() == pytest.approx(sigmoid(3))      # one prefill is enough


def test_word_ids_hold_every_spelling_and_no_token_of_both():
    yes, no = best_of.word_ids(TOKENIZER)
    space = TOKENIZER.token_to_id("\u0120")
    for ids, words in ((yes, ("yes", "Yes", "YES")), (no, ("no", "No", "NO"))):
        assert all(set(TOKENIZER.encode(w).ids) <= set(ids) for w in words)
        assert all(set(TOKENIZER.encode(" " + w).ids) - {space} <= set(ids) for w in words)
    assert not set(yes) & set(no) and space not in yes + no


def test_selection_keys_of_the_authors():
    row = (lambda conf, score, yes, no, prob=0.5, loss=1.0: dict(
        prompt_conf=conf, score=score, yes_logit=yes, no_logit=no, yes_prob=prob, prompt_loss=loss))
    rows = [row(1.0, 0, 0.0, 9.0, 0.1, 2.0), row(3.0, 1, 4.0, 0.0, 0.6, 3.0),
            row(3.0, 1, 5.0, 0.0, 0.7, 1.0), row(2.0, 0, 0.0, 7.0, 0.8, 4.0)]
    assert best_of.rank(rows, "prompt") == [2, 1, 3, 0]     # confidence, then the higher yes_logit
    assert best_of.rank(rows, "yes") == [2, 1, 3, 0]        # yes before no, then the lower no_logit
    assert best_of.rank(rows, "yes-prob") == [3, 2, 1, 0]
    assert best_of.rank(rows, "loss") == [2, 0, 1, 3]
    assert best_of.rank(rows[:1] * 3, "prompt") == [0, 1, 2]


def test_ties_between_candidates():
    def row(yes, no):
        return dict(prompt_conf=1.0, score=1, yes_logit=yes, no_logit=no, yes_prob=0.5,
                    prompt_loss=1.0)
    for verifier in ("prompt", "yes"):                  # the higher yes, then the lower no
        assert best_of.rank([row(4.0, 1.0), row(5.0, 2.0), row(5.0, 1.0)], verifier) == [2, 1, 0]


def test_scores_of_a_real_model_against_full_forward_passes():
    """The cache and the batch change nothing; positions are those that the docstring says."""
    llm, prompt = small_llm(), "a red circle left of a cat"
    z = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    conf, loss = best_of.prompt_scores(llm, TOKENIZER, z, prompt)
    found = best_of.answer_scores(llm, TOKENIZER, z, prompt, limit=5)
    head = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<im_start><image><im_end>\n{}<|im_end|>\n<|im_start|>assistant\n")

    def logits(words, more, row):
        ids = encode_text(TOKENIZER, head.format(words))
        p = ids.index(IMAGE)
        ids = torch.tensor([ids[:p] + [IMAGE] * 4 + ids[p + 1:] + more])
        x = llm.embed(ids, torch.tensor([p]), torch.tensor([False]), row[None])
        return llm.logits(llm(x))[0]                                        # [L,V]

    ids = TOKENIZER.encode(prompt).ids
    for i, row in enumerate(z):
        p = logits("Describe this image.", ids, row)[-len(ids):].double().softmax(-1)
        assert conf[i].item() == pytest.approx(-(p * p.shape[-1]).log().mean().item(), abs=1e-5)
        nll = [-p[k, ids[k + 1]].log().item() for k in range(len(ids) - 1)]
        assert loss[i].item() == pytest.approx(sum(nll) / len(nll), abs=1e-4)
        said = []
        for _ in range(5):
            last = logits(f"Does this image align with the prompt: {prompt}?", said, row)[-1]
            said.append(last.argmax().item())
        assert found["answer"][i] == TOKENIZER.decode(said)


def test_scores_that_are_not_finite_are_an_error():
    llm, z = small_llm(), torch.zeros(1, 4, 8)
    llm.model.norm.weight.data[0] = float("nan")
    with pytest.raises(cli.UserError, match="verifier's prompt_conf.* not finite"):
        best_of.scores(llm, TOKENIZER, z, "a cat")


# ------------------------------------------------------------------------------------------------
# The commands, with the shipped weights
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run sample.py in this process, in an empty folder, on the CPU; returns the exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*args, main=sample.main):
        monkeypatch.setattr(sys, "argv", [main.__module__, *map(str, args), "--device", "cpu"])
        try:
            cli.main(main)
        except SystemExit as stopped:
            return stopped.code
        return 0
    return run


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def close(a, b):
    """Equal up to one of 255 levels."""
    return np.abs(pixels(a) - pixels(b)).max() <= 1


def test_ranking_never_decodes(call, capsys, monkeypatch):
    """5 candidates, 2 kept: the decoder sees 2 latents, one by one, after the last score."""
    events, load, scores = [], stage2.load_codec, best_of.scores

    def load_codec(*args, **options):
        encoder, decode = load(*args, **options)
        return encoder, lambda z: events.append(z.shape[0]) or decode(z)
    monkeypatch.setattr(stage2, "load_codec", load_codec)
    monkeypatch.setattr(best_of, "scores", lambda *a: events.append("scores") or scores(*a))
    command = ["a red circle", "--best-of", 5, "--keep", 2, "--steps", 2, "--seed", 7]
    assert call(*command, "--save-latent", "z.safetensors") == 0
    assert events == ["scores", 1, 1]
    said = capsys.readouterr().out
    assert said.count("*") == 2 and "prompt_conf" in said
    kept = [int(line.split()[1]) for line in said.splitlines() if line.startswith("*")]
    assert [int(Image.open(f"out-{i}.png").info["seed"]) for i in range(2)] == kept
    assert load_file("z.safetensors")["latents"].shape == (2, N, C)
    first = [Path(f"out-{i}.png").read_bytes() for i in range(2)]
    assert call(*command) == 0                                          # again: the same bytes
    assert [Path(f"out-{i}.png").read_bytes() for i in range(2)] == first


def test_a_kept_image_is_of_the_seed_it_names(call, monkeypatch):
    monkeypatch.setattr(best_of, "rank", lambda rows, verifier: [3, 1, 0, 2])
    command = ["a red circle", "--direct", "--steps", 3]
    assert call(*command, "--best-of", 4, "--keep", 2, "--out", "b.png") == 0
    for i, seed in enumerate((3, 1)):
        assert call(*command, "--seed", seed, "--out", "a.png") == 0
        assert Image.open(f"b-{i}.png").info["seed"] == str(seed) and close(f"b-{i}.png", "a.png")


def test_images_metadata_and_grid(call):
    command = ["a red circle", "--steps", 3, "--seed", 4, "--direct", "--guidance", 2.5]
    assert call(*command, "--n", 3) == 0
    assert call(*command, "--n", 3, "--grid", "--out", "new/grid.png") == 0
    assert call(*command, "--out", "one.png") == 0
    one = Image.open("one.png")
    assert one.info == dict(prompt="a red circle", seed="4", steps="3", guidance="2.5",
                            schedule="euler", solver="euler", model="tiny",
                            direct="True", dtype="float32")
    assert close("one.png", "out-0.png")                                # alone or in a batch
    grid = Image.open("new/grid.png")
    assert grid.size == (130, 130) and grid.info["seed"] == "4 5 6"
    for i, corner in enumerate(((0, 0), (66, 0), (0, 66))):
        part = grid.crop((*corner, corner[0] + 64, corner[1] + 64))
        assert part.tobytes() == Image.open(f"out-{i}.png").tobytes()
    assert grid.getpixel((100, 100)) == (255, 255, 255)                 # the place of no image


def test_guidance_makes_a_difference(call):
    for scale in (1, 4):
        assert call("a red circle", "--steps", 3, "--direct", "--out", f"{scale}.png",
                    "--guidance", scale) == 0
    assert (pixels("1.png") != pixels("4.png")).any()


def test_schedules_and_solvers(call):
    """The first edition's names are aliases; the authors' schedule is not guided by default; each
    choice draws another image."""
    for name, *flags in (("euler",), ("clean", "--schedule", "clean"), ("heun", "--solver", "heun"),
                         ("authors", "--schedule", "authors"), ("compat", "--schedule", "compat")):
        assert call("a red circle", "--steps", 3, "--direct", "--out", f"{name}.png", *flags) == 0
    assert close("euler.png", "clean.png") and close("authors.png", "compat.png")
    assert not close("euler.png", "heun.png") and not close("euler.png", "authors.png")
    info = {n: Image.open(f"{n}.png").info for n in ("euler", "heun", "authors", "compat")}
    assert (info["euler"]["solver"], info["heun"]["solver"]) == ("euler", "heun")
    assert info["compat"]["schedule"] == "authors"
    assert (info["euler"]["guidance"], info["authors"]["guidance"]) == ("3.0", "1.0")


def test_pngs_are_rounded_and_those_of_the_authors_schedule_cut(tmp_path):
    x = torch.full((3, 2, 2), 100.7 / 255)
    for schedule, value in (("euler", 101), ("authors", 100)):
        sample.save_png(x, tmp_path / "a.png", schedule=schedule)
        assert (pixels(tmp_path / "a.png") == value).all()


def test_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = sample.arguments(["a cat"])
    assert (a.steps, a.seed, a.schedule, a.solver) == (50, 0, "euler", "euler")
    assert (a.verifier, a.n, a.max_tokens) == ("prompt", 1, 512)


def test_guidance_by_default():
    """Released models and the authors' schedule are not guided by default."""
    for schedule, released, null, want in (("euler", False, True, 3), ("euler", True, True, 1),
                                           ("authors", False, True, 1), ("euler", False, False, 1)):
        model = SimpleNamespace(dit=SimpleNamespace(config=SimpleNamespace(null=null)),
                                config=SimpleNamespace(released=released))
        args = SimpleNamespace(guidance=None, schedule=schedule)
        assert sample.guidance_of(args, model) == want


def test_layouts_for_the_official_scorers(call):
    records = [{"tag": "single_object", "prompt": "a red apple", "include": []},
               {"tag": "two", "prompt": "a \u00e9t\u00e9 and a star"}]
    Path("g.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    assert call("--prompts", "g.jsonl", "--layout", "geneval", "--steps", 2, "--out", "gen") == 0
    for i, record in enumerate(records):
        assert json.loads(Path(f"gen/{i:05d}/metadata.jsonl").read_text()) == record
        names = sorted(p.name for p in Path(f"gen/{i:05d}/samples").iterdir())
        assert names == ["0000.png", "0001.png", "0002.png", "0003.png"]
    info = Image.open("gen/00001/samples/0003.png").info
    assert info["prompt"] == records[1]["prompt"] and info["seed"] == "3"

    Path("dpg").mkdir()
    Path("dpg/COCO12.txt").write_text("a red apple\nand a star\n")
    Path("dpg/7.txt").write_text("two cats")
    Path("dpg/._7.txt").write_bytes(b"\0\5\x16\7")          # what macOS leaves is no prompt
    for options, side in (((), 128), (("--n", 1), 64), (("--best-of", 2, "--keep", 1), 64)):
        assert call("--prompts", "dpg", "--layout", "dpg", "--steps", 2, "--direct", "--out", "d",
                    *options) == 0
        assert sorted(p.name for p in Path("d").iterdir()) == ["7.png", "COCO12.png"]
        assert Image.open("d/7.png").size == (side, side)

    Path("lines.txt").write_text("\ufeffa red apple\n\n  two cats  \n")
    assert call("--prompts", "lines.txt", "--steps", 2, "--n", 2, "--direct") == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["00000-0.png", "00000-1.png",
                                                            "00001-0.png", "00001-1.png"]
    assert Image.open("out/00001-1.png").info["prompt"] == "two cats"


def test_file_names_that_are_not_utf_8(call, capsys):
    """They work, and are printed without bytes that a terminal cannot show."""
    Path("p").mkdir()
    Path(os.fsdecode(b"p/caf\xe9.txt")).write_text("a red circle")
    assert call("--prompts", "p", "--steps", 1, "--direct") == 0
    assert call("a red circle", "--steps", 1, "--direct", "--out", os.fsdecode(b"\xe9.png")) == 0
    assert os.listdir(b"out") == [b"caf\xe9-0.png"] and os.path.isfile(b"\xe9.png")
    assert "out/caf\\udce9-0.png" in capsys.readouterr().out
    os.rename(b"\xe9.png", b"a\xe9.png")
    assert call("--reconstruct", os.fsdecode(b"a\xe9.png"), "--out", "b.png") == 0
    assert Image.open("b.png").info["picture"] == "a\\udce9.png"


def test_one_prompt_that_is_answered_in_words_does_not_end_a_run(call, monkeypatch, capsys):
    """One of several is drawn all the same, with a line; for a single one it is an error."""
    real, asked = sample.answer, []

    def answer(llm, tokenizer, question, limit):
        asked.append(limit)
        return ["No", "."] if "cat" in question else real(llm, tokenizer, question, limit=limit)
    monkeypatch.setattr(sample, "answer", answer)
    Path("p.txt").write_text("a red circle\na cat\na blue star\n")
    assert call("--prompts", "p.txt", "--steps", 2, "--max-tokens", 40) == 0
    said = capsys.readouterr().err
    assert said.count("instead of drawing") == 1 and "a cat: the model answered 'No.'" in said
    assert len(list(Path("out").iterdir())) == 3 and asked == [40, 40, 40]
    assert call("a cat", "--steps", 2) == 2 and "--direct" in capsys.readouterr().err
    assert call("a cat", "--steps", 2, "--direct") == 0
    assert close("out.png", "out/00001-0.png")


def test_prompt_files_keep_the_prompt(tmp_path):
    """A line separator that JSON allows inside a string; the record of a folder's text file."""
    file, folder = tmp_path / "u.jsonl", tmp_path / "t"
    file.write_text(json.dumps({"prompt": "a red\u2028circle"}, ensure_ascii=False))
    assert [p for _, p, _ in prompts.read_prompts(file)] == ["a red\u2028circle"]
    folder.mkdir()
    (folder / "a.txt").write_text("a red\ncircle\n")
    assert prompts.read_prompts(folder, "geneval") == [("a", "a red circle",
                                                       {"prompt": "a red circle"})]


def test_images_are_read_as_in_training(tmp_path):
    """Turned as the camera says, transparent on white."""
    clear = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 20, 20))
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # a quarter turn
    Image.linear_gradient("L").resize((40, 20)).save(tmp_path / "phone.jpg", exif=exif)
    encoder = SimpleNamespace(image_size=64, crop="squash", resample=Image.BICUBIC)
    for name, size in (("clear.png", (40, 20)), ("phone.jpg", (20, 40))):
        image = open_image(tmp_path / name)
        assert image.size == size
        seen = load_image((tmp_path / name).read_bytes(), 64, "squash", None)
        x = sample.to_tensor(image, encoder)[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(x - seen).max() <= 1.001
    assert open_image(tmp_path / "clear.png").getpixel((39, 0)) == (255, 255, 255)


def test_images_are_made_square_as_the_encoder_s_processor_does():
    """SigLIP-2 squashes; DINOv2 takes the middle of the image with its short side at S; both with
    the filter that the processor names, and without a copy that grows with the aspect ratio."""
    x = np.zeros((20, 60, 3), np.uint8)
    x[:, 20:40, 0], x[:, :20, 1] = 255, 255             # green, red, black
    for kind, ends in (("squash", [1, 0]), ("center", [0, 0])):
        z = sample.to_tensor(Image.fromarray(x), SimpleNamespace(image_size=8, crop=kind,
                                                                 resample=3))
        assert z.shape == (1, 3, 8, 8) and z[0, 0, :, 4].min() == 1         # the middle is red
        assert z[0, 1, 4, [0, -1]].tolist() == pytest.approx(ends, abs=0.1)
    tall = sample.to_tensor(Image.fromarray(x.swapaxes(0, 1)), SimpleNamespace(
        image_size=7, crop="center", resample=3))
    assert tall.shape == (1, 3, 7, 7) and tall[0, 0, 3].min() > 0.98
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 57, 3), np.uint8))
    for resample in (1, 2, 3):
        for crop in ("squash", "center"):
            whole = image.resize((16, 16) if crop == "squash" else (22, 16), resample)
            want = np.asarray(whole.crop((0, 0, 16, 16) if crop == "squash" else (3, 0, 19, 16)))
            found = sample.to_tensor(image, SimpleNamespace(image_size=16, crop=crop,
                                                            resample=resample))
            found = (found[0] * 255).round().permute(1, 2, 0).numpy()
            assert np.abs(found - want.astype(int)).max() <= 1
    thin = sample.to_tensor(Image.new("RGB", (65_500, 1)), SimpleNamespace(
        image_size=224, crop="center", resample=3))
    assert thin.shape == (1, 3, 224, 224)


def test_stored_latents_decode_to_the_same_image_and_answer(call, capsys):
    assert call("a red circle", "--steps", 4, "--n", 2, "--save-latent", "z.safetensors") == 0
    assert call("--latent", "z.safetensors", "", "--out", "again.png") == 0    # no question: decode
    sheet = Image.open("again.png")
    assert sheet.size == (130, 64)
    assert sheet.info == {"model": "tiny", "latent": "z.safetensors"}
    assert sheet.crop((66, 0, 130, 64)).tobytes() == Image.open("out-1.png").tobytes()
    capsys.readouterr()
    assert call("--latent", "z.safetensors", "what is in the picture?", "--max-tokens", 5) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in said] == ["0: ", "1: "] and all(len(line) > 4 for line in said)


def test_reconstruction_and_question(call, capsys):
    from tiny import world
    Image.fromarray(world.builtin_record("builtin:synthetic", 2000, 0, 64)["image"]).save("a.png")
    assert call("--reconstruct", "a.png", "--out", "b.png") == 0
    assert float(capsys.readouterr().out.split()[-2]) > 22 and Image.open("b.png").size == (130, 64)
    assert np.abs(pixels("b.png")[:, :64] - pixels("a.png")).max() <= 1
    assert call("--image", "a.png", "What is in the picture?") == 0
    said = capsys.readouterr().out
    assert said.startswith(("A ", "An ", "Two ", "Three ", "Four ")) and said.endswith(".\n")


def test_a_character_of_several_tokens_comes_whole():
    ids = TOKENIZER.encode("a \u732b!").ids + [TOKENIZER.token_to_id("<|im_end|>")]
    steps = [F.one_hot(torch.tensor([i]), TOKENIZER.get_vocab_size()).float() for i in ids]
    said = list(sample.answer(Scripted(steps), TOKENIZER, "what?", torch.zeros(1, 4, 8)))
    assert len(ids) > 5 and "".join(said) == "a \u732b!" and not any("\ufffd" in s for s in said)


def test_the_model_opens_the_image_where_training_has_it():
    """The shipped model writes its answer; the queries then stand where `direct_condition` puts
    them in one prefill."""
    model = stage2.load_run(weights.TINY, CPU)
    words = "a red circle on a white background"
    *said, condition = sample.answer(model.llm, model.tokenizer, words)
    assert "".join(said) == "Here you go:\n"
    direct = direct_condition(model.llm, model.tokenizer, [words], "cpu")
    assert condition.shape == direct.shape and (condition - direct).abs().max() < 1e-4
    assert direct.std() > 0.1


def test_the_shipped_model_draws_what_it_is_told(call):
    """Single shapes, which it draws right nearly always: three of four images must pass."""
    from tiny import judge, world
    passed = 0
    for colour, kind, on in (("red", "circle", "white"), ("blue", "square", "pink"),
                             ("green", "heart", "beige"), ("yellow", "star", "black")):
        assert call(f"a {colour} {kind} on a {on} background", "--steps", 10, "--guidance", 3,
                    "--dtype", "float32", "--direct") == 0
        x = torch.from_numpy(pixels("out.png")).permute(2, 0, 1) / 255
        scene = world.Scene(("plain", on), (world.Thing(kind, colour, 0.5, 0.5, 0.5),))
        passed += judge.judge(x, judge.everything(scene))
    assert passed >= 3


def test_matrices_in_bf16_give_the_same_numbers():
    """Matrices that are kept in bf16 for sampling, against fp32 weights cast in each product."""
    devices = parallel.Devices("cpu", torch.device("cpu"), 0, 1, torch.bfloat16, {"fsdp": 1})
    kept = stage2.load_run(weights.TINY, devices)
    exact = stage2.load_run(weights.TINY, CPU)
    exact.llm.dtype = exact.dit.dtype = torch.bfloat16
    assert kept.dit.dit_blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    results = []
    with torch.no_grad():
        for m in (kept, exact):
            cond = direct_condition(m.llm, m.tokenizer, ["two cats"], devices.device)
            x = torch.randn(1, N, C, generator=torch.Generator().manual_seed(0))
            results.append((cond, flow.sample(m.dit, cond, x, 6.9, 2, 3.0),
                            m.llm.logits(cond[..., :128])))
    assert all(torch.equal(a, b) for a, b in zip(*results))


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------

def with_nan(file, key, path):
    """Copy a shipped file with one NaN in the first tensor whose name ends in `key`."""
    state = load_file(weights.TINY / file)
    name = next(k for k in state if k.endswith(key))
    state[name] = state[name].clone()
    state[name].view(-1)[3] = float("nan")
    with open(weights.TINY / file, "rb") as f:
        size = int.from_bytes(f.read(8), "little")
        config = json.loads(f.read(size)).get("__metadata__")
    save_file(state, path, config)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every kind of wrong file; `{f}` in a command stands for its folder."""
    f = tmp_path_factory.mktemp("files")
    Image.new("RGB", (64, 64), "red").save(f / "good.png")
    whole = Image.effect_noise((64, 64), 90).convert("RGB")
    whole.save(f / "cut.png")
    (f / "cut.png").write_bytes((f / "cut.png").read_bytes()[:3000])
    (f / "empty.png").touch()
    (f / "text.png").write_text("not an image")
    (f / "folder").mkdir()
    (f / "nested/a.txt").mkdir(parents=True)
    save_file({"latents": torch.zeros(1, N, C)}, f / "z.safetensors")
    for name, shape in (("wide", (1, N, C + 1)), ("long", (1, N + 1, C)), ("flat", (C,)),
                        ("none", (0, N, C))):
        save_file({"latents": torch.zeros(shape)}, f / f"{name}.safetensors")
    save_file({}, f / "nothing.safetensors")
    (f / "more/00000/samples").mkdir(parents=True)
    for i in range(2):
        (f / f"more/00000/samples/{i:04d}.png").touch()
    shutil.copytree(f / "more/00000", f / "other/00001")
    save_file({"latents": torch.full((1, N, C), float("nan"))}, f / "nan.safetensors")
    (f / "cut.safetensors").write_bytes((f / "z.safetensors").read_bytes()[:300])
    for name, lines in {
            "empty.txt": "\n \n", "good.txt": "a cat", "chat.txt": "a cat\na <|im_end|> dog",
            "long.txt": "a cat\n" + "word " * 3000, "json.jsonl": '{"prompt": "a"}\n{"prompt": ',
            "list.jsonl": "[1]", "list.json": '["a cat"]', "key.jsonl": '{"text": "a cat"}',
            "number.jsonl": '{"prompt": 3}', "blank.jsonl": '{"prompt": " "}',
            "same.jsonl": '{"prompt": "a", "item_id": 1}\n' * 2,
            "path.jsonl": '{"prompt": "a", "item_id": "../a"}',
            "noname.jsonl": '{"prompt": "a", "item_id": ""}',
            "null.jsonl": '{"prompt": "a", "item_id": null}',
            "halfname.jsonl": '{"prompt": "a", "item_id": "\\ud800"}',
            "name.jsonl": '{"prompt": "a", "item_id": "' + "a" * 300 + '"}',
            "half.jsonl": '{"prompt": "a \\ud83d circle"}'}.items():
        (f / name).write_text(lines)
    (f / "latin.txt").write_bytes("a \u00e9t\u00e9".encode("latin-1"))
    with_nan("decoder.safetensors", "decoder_pred.weight", f / "nandecoder.safetensors")

    for name in ("nonull", "nanrun"):   # a model trained with --cond-drop 0; one with a NaN
        (f / name).mkdir()
        for file in ("tokenizer.json", "config.json"):
            shutil.copy(weights.TINY / file, f / name)
    with_nan("model.safetensors", "dit_blocks.2.mlp.w12.weight", f / "nanrun/model.safetensors")
    state = load_file(weights.TINY / "model.safetensors")
    state.pop("diff_head.model.y_embedder.dropout_embedding")
    save_file(state, f / "nonull/model.safetensors")
    config = json.loads((weights.TINY / "config.json").read_text())
    config["scale_rae"]["dit"]["null"] = False
    (f / "nonull/config.json").write_text(json.dumps(config))
    return f


# what is typed (a cat: the prompt "a cat"), what the one line must say
BAD = [
    ("cat --n 0", "--n|positive"), ("cat --n -3", "--n"), ("cat --n two", "--n|two"),
    ("cat --steps -5", "--steps"), ("cat --steps 2.5", "--steps|2.5"),
    ("cat --guidance -1", "--guidance"), ("cat --guidance nan", "--guidance|nan"),
    ("cat --guidance inf", "--guidance"), ("cat --seed -1", "--seed"), ("cat --seed x", "--seed"),
    ("cat --seed 5000000000", "--seed"), ("cat --solver rk4", "--solver|heun"),
    ("cat --schedule fancy", "--schedule|euler|authors"), ("cat --stepps 3", "--stepps"),
    ("cat --schedule authors --steps 2", "--steps 2|at least 3"),
    ("cat --best-of 0", "--best-of"), ("cat --best-of 2 --keep 3", "--keep|--best-of 2"),
    ("cat --keep 1", "--keep|--best-of"), ("cat --verifier yes", "--verifier|--best-of"),
    ("cat --best-of 4 --verifier maybe", "--verifier|prompt|yes-prob"),
    ("cat --best-of 4 --n 2", "--n|--best-of"),
    ("cat --layout geneval", "--layout geneval|--prompts"),
    ("--prompts {f}/good.txt --layout coco", "--layout|geneval|dpg"),
    ("--prompts {f}/good.txt --layout dpg --n 3", "--n|1 or 4"),
    ("--prompts {f}/good.txt --layout dpg --best-of 2", "--keep 2|1 or 4"),
    ("", "prompt"), ("blank", "prompt"), ("cat --prompts {f}/good.txt", "a cat|--prompts"),
    ("cat --reconstruct {f}/good.png", "a cat|--reconstruct"),
    ("cat --image {f}/good.png --latent {f}/z.safetensors", "--image|--latent"),
    ("--image {f}/good.png --prompts {f}/good.txt", "--image|--prompts"),
    ("--image {f}/good.png", "question"), ("cat --image {f}/good.png --n 4", "--n|--image"),
    ("cat --image {f}/good.png --out a.txt", "--out|printed"),
    ("cat --latent {f}/z.safetensors --out a.png", "--out|printed"),
    ("cat --latent {f}/z.safetensors --best-of 4", "--best-of|--latent"),
    ("--reconstruct {f}/good.png --direct", "--direct|--reconstruct"),
    ("--reconstruct {f}/good.png --out {f}/folder/../good.png", "overwrite"),
    ("--prompts {f}/list.json", "--prompts|list.json|a .jsonl"),
    ("--reconstruct {f}/good.png --run {t}/decoder.safetensors", "decoder.safetensors"),
    ("cat --image {f}/absent.png", "absent.png"), ("cat --image {f}/folder", "folder"),
    ("cat --image {f}/empty.png", "empty.png"), ("cat --image {f}/text.png", "text.png"),
    ("cat --image {f}/cut.png", "cut.png"), ("--reconstruct {f}/cut.png", "cut.png"),
    ("--reconstruct {f}/folder", "folder"),
    ("cat --image {f}/good.png --max-tokens 0", "--max-tokens"),
    ("cat --image {f}/good.png --encoder {f}/absent", "absent|--encoder"),
    ("cat --image {f}/good.png --encoder {f}/z.safetensors", "z.safetensors|--encoder"),
    ("--latent {f}/wide.safetensors", "--latent|64, 97]|[64, 96]"),
    ("--latent {f}/long.safetensors", "--latent|65, 96]|[64, 96]"),
    ("--latent {f}/flat.safetensors", "--latent|[64, 96]"),
    ("--latent {f}/none.safetensors", "--latent|none.safetensors"),
    ("--latent {f}/nan.safetensors", "--latent|NaN"),
    ("--latent {f}/nothing.safetensors", "--latent"),
    ("--latent {f}/cut.safetensors", "cut.safetensors"),
    ("cat --latent {f}/text.png", "text.png"), ("--latent {f}/folder", "folder"),
    ("--latent {f}/absent.safetensors", "absent.safetensors"),
    ("--prompts {f}/folder", "--prompts|folder|no prompt"), ("--prompts {f}/absent", "absent"),
    ("--prompts {f}/empty.txt", "empty.txt|no prompt"),
    ("--prompts {f}/latin.txt", "latin.txt|utf-8|position 2"),
    ("--prompts {f}/json.jsonl", "json.jsonl|line 2|JSON"),
    ("--prompts {f}/list.jsonl", "list.jsonl|line 1|prompt"),
    ("--prompts {f}/key.jsonl", "key.jsonl|line 1|prompt"),
    ("--prompts {f}/number.jsonl", "number.jsonl|line 1|prompt"),
    ("--prompts {f}/blank.jsonl", "blank.jsonl|empty"),
    ("--prompts {f}/same.jsonl --layout dpg", "same.jsonl|item_id|twice"),
    ("--prompts {f}/path.jsonl --layout dpg", "path.jsonl|item_id|../a|no file name"),
    ("--prompts {f}/name.jsonl --layout dpg", "name.jsonl|item_id|aaa|no file name"),
    ("--prompts {f}/noname.jsonl --layout dpg", "noname.jsonl|item_id|no file name"),
    ("--prompts {f}/null.jsonl --layout dpg", "null.jsonl|item_id None|no file name"),
    ("--prompts {f}/halfname.jsonl --layout dpg", "halfname.jsonl|ud800|no file name"),
    ("--prompts {f}/nested", "a.txt|directory"),
    ("--prompts {f}/chat.txt", "00001|<|im_end|>"),
    ("--prompts {f}/long.txt", "00001|too long|context"),
    ("--prompts {f}/half.jsonl", "00000|not valid Unicode"), ("latin", "not valid Unicode"),
    ("--prompts {f}/good.txt --layout geneval --n 1 --out {f}/more", "--out|0001.png|earlier run"),
    ("--prompts {f}/good.txt --layout geneval --out {f}/other", "--out|00001|earlier run"),
    ("long", "too long|shorten"), ("long --image {f}/good.png", "too long|shorten"),
    ("image", "<image>|leave it out"),
    ("cat --out {f}/folder", "--out|folder|.png"), ("cat --out a.jpg", "--out|a.jpg|.png"),
    ("cat --out {f}/good.txt/a.png", "--out|good.txt|cannot be written"),
    ("cat --out /dev/null/a.png", "--out|cannot be written"),
    ("cat --out " + "a" * 300 + ".png", "--out|cannot be written"),
    ("--prompts {f}/good.txt --out {f}/good.png", "--out|good.png|folder"),
    ("cat --save-latent z.pt", "--save-latent|z.pt|.safetensors"),
    ("cat --save-latent {f}/folder", "--save-latent|folder"),
    ("cat --run {f}/z.safetensors", "--run|z.safetensors"),
    ("cat --run {f}/folder", "--run|folder|no weights"),
    ("cat --run {f}/nonull --guidance 3", "--guidance 3|null condition|--guidance 1"),
    ("cat --decoder {f}/absent", "absent|--decoder"),
    ("cat --decoder {f}/z.safetensors", "--decoder|z.safetensors"),
    # nothing that is not finite becomes an image
    ("cat --run {f}/nanrun", "nanrun|NaN|w12"),
    ("cat --steps 2 --guidance 1e38 --direct", "the decoded image|not finite"),
    ("cat --steps 9 --guidance 3e38 --direct", "the latent|guidance 3e+38|not finite"),
    ("cat --decoder {f}/nandecoder.safetensors", "nandecoder|NaN"),
    ("--reconstruct {f}/good.png --decoder {f}/nandecoder.safetensors", "nandecoder|NaN"),
]
WORDS = {"cat": "a cat", "blank": "  \n", "long": "word " * 3000, "image": "a <image> cat",
         "latin": "caf\udce9"}


@pytest.mark.parametrize("command, says", BAD, ids=[c[:80] for c, _ in BAD])
def test_bad_input_is_one_clear_line(command, says, call, files, capsys, tmp_path):
    """Exit status 2; the value, and the flag that mends it; no traceback, nothing written."""
    given = [WORDS.get(a, a).replace("{f}", str(files)).replace("{t}", str(weights.TINY))
             for a in command.split()]
    assert call(*given) == 2
    said = capsys.readouterr().err
    assert said.startswith("error:") and said.count("error:") == 1, said
    assert said.count("\n") == 1 or "weights are missing" in said, said    # these are a list
    for word in says.replace("<|", "<\0").replace("|>", "\0>").split("|"):
        assert word.replace("\0", "|") in said, (word, said)
    assert len(said) < 1500 and not list(tmp_path.iterdir())


def test_a_model_without_null_condition_draws_unguided(call, files):
    assert call("a cat", "--run", files / "nonull", "--steps", 2, "--direct") == 0
    assert Image.open("out.png").info["guidance"] == "1.0"
