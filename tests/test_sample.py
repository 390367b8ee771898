"""sample.py and best_of.py: exact savings, bytes, verifiers by hand, files, bad input.

    pytest tests/test_sample.py
"""
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import best_of
import data
import dit as dits
import encoder as encoders
import flow
import parallel
import run as runs
import sample
import text_model as text
import weights

torch.set_num_threads(1)
TINY = ROOT / "assets/tiny"
TOKENIZER = text.load_tokenizer(TINY)
N, C = 64, 96                                           # of the shipped model's latent


def small_dit(**options):
    model = dits.DiT(24, 16, 64, 2, 4, **options).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():                        # adaLN-zero would hide every difference
        p.copy_(torch.randn(p.shape, generator=g) * 0.3 * p[0].numel() ** -0.5)
    return model


def small_llm(channels=8):
    config = dict(text.TINY, vocab_size=TOKENIZER.get_vocab_size(), hidden_size=32,
                  num_attention_heads=2, num_key_value_heads=1, intermediate_size=48)
    model = text.TextModel(config, 4, channels, 16).requires_grad_(False)
    text.init_weights(model, 0)
    return model


def draws(B, shared, seed=1):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(1 if shared else B, 16, 64, generator=g),
            torch.randn(B, 16, 24, generator=g))


# ------------------------------------------------------------------------------------------------
# The sampler's savings
# ------------------------------------------------------------------------------------------------

def plain(model, cond, noise, alpha, steps, scale, schedule="clean", interval=(0, 1)):
    """Guidance as its equation says: every image twice in one batch, nothing shared, no table."""
    B = len(noise)
    cond = cond.expand(B, -1, -1)
    both = torch.cat([cond, model.y_embedder.dropout_embedding.expand_as(cond)])

    def velocity(x, t):
        if scale == 1 or not interval[0] <= t[0] <= interval[1]:
            return model(x, t, cond)
        v_c, v_u = model(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
        return v_u + scale * (v_c - v_u)
    return flow.euler(velocity, noise, flow.schedule_pairs(schedule, steps, alpha))


@pytest.mark.parametrize("together", [None, 1, 2])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("options", [{}, dict(head_width=96, head_depth=1), dict(qk_norm=True)])
def test_savings_equal_the_plain_form(options, shared, together):
    model, (cond, noise) = small_dit(**options), draws(3, shared)
    for scale, schedule, interval in ((1.0, "clean", (0, 1)), (3.0, "clean", (0, 1)),
                                      (3.0, "compat", (0, 1)), (4.0, "clean", (0.3, 0.8))):
        want = plain(model, cond, noise, 4.0, 6, scale, schedule, interval)
        got = flow.generate(model, cond, noise, 4.0, 6, scale, schedule, None, interval, together)
        assert (got - want).abs().max() <= 1e-5 * max(1, want.abs().max()), (scale, schedule)
    assert (want - noise).abs().max() > 0.1             # the model moves things at all


def test_guidance_acts_only_in_its_interval():
    model, (cond, noise) = small_dit(), draws(1, True)
    draw = (lambda scale, interval: flow.generate(model, cond, noise, 4.0, 6, scale,
                                                  interval=interval))
    off, on, part = draw(1.0, (0, 1)), draw(3.0, (0, 1)), draw(3.0, (0.3, 0.8))
    assert torch.equal(draw(3.0, (0.0, 0.01)), off)     # no step is there
    assert min((on - off).abs().max(), (part - on).abs().max(), (part - off).abs().max()) > 1e-3


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_one_at_a_time_gives_the_same_bytes_in_any_company(scale):
    model, (cond, noise) = small_dit(), draws(5, True)
    whole = flow.generate(model, cond, noise, 4.0, 4, scale, together=1)
    for i in range(5):
        alone = flow.generate(model, cond, noise[i:i + 1], 4.0, 4, scale)
        assert torch.equal(alone[0], whole[i])


def test_modulations_are_made_once():
    """5 steps, 4 images, guided: the condition's once a step, the null's once in all, so 6 calls of
    each block's adaLN, where the plain form makes one for every image, branch and step."""
    model, (cond, noise) = small_dit(), draws(4, True)
    calls = []
    model.dit_blocks[0].adaLN_modulation[1].register_forward_hook(
        lambda module, inputs, output: calls.append(tuple(output.shape)))
    flow.generate(model, cond, noise, 4.0, 5, 3.0, together=1)
    assert calls == [(5, 1, 6 * 64)] + 5 * [(1, 16, 6 * 64)]


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
    for ids, words in ((yes, ("yes", "Yes", "YES")), (no, ("no", "No", "NO"))):
        assert all(set(TOKENIZER.encode(w).ids) <= set(ids) for w in words)
    assert not set(yes) & set(no) and TOKENIZER.token_to_id("Ġ") not in yes + no


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


def test_scores_of_a_real_model_against_full_forward_passes():
    """The cache and the batch change nothing; positions are those that the docstring says."""
    llm, prompt = small_llm(), "a red circle left of a cat"
    z = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    conf, loss = best_of.prompt_scores(llm, TOKENIZER, z, prompt)
    found = best_of.answer_scores(llm, TOKENIZER, z, prompt, limit=5)
    head = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            "<im_start><image><im_end>\n{}<|im_end|>\n<|im_start|>assistant\n")

    def logits(words, more, row):
        ids = text.encode_text(TOKENIZER, head.format(words))
        p = ids.index(text.IMAGE)
        ids = torch.tensor([ids[:p] + [text.IMAGE] * 4 + ids[p + 1:] + more])
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


# ------------------------------------------------------------------------------------------------
# The commands, with the shipped weights
# ------------------------------------------------------------------------------------------------

@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run sample.py in this process, in an empty folder; returns the exit status."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
        try:
            runs.main(sample.main)
        except SystemExit as stopped:
            return stopped.code
        return 0
    return run


def test_ranking_never_decodes(call, capsys, monkeypatch, tmp_path):
    """5 candidates, 2 kept: the decoder sees 2 latents, one by one, after the last score."""
    events, load = [], weights.load_codec
    scores = best_of.scores

    def load_codec(*args, **options):
        encoder, decoder = load(*args, **options)

        def watched(z):
            events.append(z.shape[0])
            return decoder(z)
        return encoder, watched
    monkeypatch.setattr(weights, "load_codec", load_codec)
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


def test_pictures_metadata_and_grid(call):
    command = ["a red circle", "--steps", 3, "--seed", 4, "--direct", "--guidance", 2.5,
               "--guidance-interval", 0.2, 0.9]
    assert call(*command, "--n", 3) == 0
    assert call(*command, "--n", 3, "--grid", "--out", "new/grid.png") == 0
    assert call(*command, "--out", "one.png") == 0
    one = Image.open("one.png")
    assert one.info == dict(prompt="a red circle", seed="4", steps="3", guidance="2.5",
                            schedule="clean", model="tiny", guidance_interval="(0.2, 0.9)",
                            direct="True", dtype="float32")
    assert Path("one.png").read_bytes() == Path("out-0.png").read_bytes()   # in any company
    grid = Image.open("new/grid.png")
    assert grid.size == (130, 130) and grid.info["seed"] == "4 5 6"
    for i, corner in enumerate(((0, 0), (66, 0), (0, 66))):
        part = grid.crop((*corner, corner[0] + 64, corner[1] + 64))
        assert part.tobytes() == Image.open(f"out-{i}.png").tobytes()
    assert grid.getpixel((100, 100)) == (255, 255, 255)                 # the place of no picture


def test_the_null_condition_makes_a_difference_only_when_guided(call):
    for name, *options in (("off", 1), ("on", 4), ("never", 4, "--guidance-interval", 0, 0)):
        assert call("a red circle", "--steps", 3, "--out", f"{name}.png", "--guidance",
                    *options) == 0
    pixels = {n: Image.open(f"{n}.png").tobytes() for n in ("off", "on", "never")}
    assert pixels["off"] == pixels["never"] != pixels["on"]
    assert call("a red circle", "--steps", 3, "--schedule", "compat", "--out", "c.png") == 0
    assert Image.open("c.png").info["guidance"] == "1.0"                # theirs does nothing


def test_layouts_for_the_official_scorers(call):
    records = [{"tag": "single_object", "prompt": "a red apple", "include": []},
               {"tag": "two", "prompt": "a \u00e9t\u00e9 and a star"}]
    Path("g.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    assert call("--prompts", "g.jsonl", "--layout", "geneval", "--steps", 2, "--out", "gen",
                "--template", "Can you generate a photo of {}?") == 0
    for i, record in enumerate(records):
        assert json.loads(Path(f"gen/{i:05d}/metadata.jsonl").read_text()) == record
        names = sorted(p.name for p in Path(f"gen/{i:05d}/samples").iterdir())
        assert names == ["0000.png", "0001.png", "0002.png", "0003.png"]
    info = Image.open("gen/00001/samples/0003.png").info
    assert info["prompt"] == records[1]["prompt"] and info["seed"] == "3"
    assert info["template"] == "Can you generate a photo of {}?"

    Path("dpg").mkdir()
    Path("dpg/COCO12.txt").write_text("a red apple\nand a star\n")
    Path("dpg/7.txt").write_text("two cats")
    for options, side in (((), 128), (("--n", 1), 64), (("--best-of", 2, "--keep", 1), 64)):
        assert call("--prompts", "dpg", "--layout", "dpg", "--steps", 2, "--out", "d",
                    *options) == 0
        assert sorted(p.name for p in Path("d").iterdir()) == ["7.png", "COCO12.png"]
        assert Image.open("d/7.png").size == (side, side)

    Path("lines.txt").write_text("\ufeffa red apple\n\n  two cats  \n")
    assert call("--prompts", "lines.txt", "--steps", 2, "--n", 2) == 0
    assert sorted(p.name for p in Path("out").iterdir()) == ["00000-0.png", "00000-1.png",
                                                            "00001-0.png", "00001-1.png"]
    assert Image.open("out/00001-1.png").info["prompt"] == "two cats"


def test_one_prompt_that_is_answered_in_words_does_not_end_a_run(call, monkeypatch, capsys):
    """Of several it is drawn all the same, and said; of one the user is told how."""
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
    assert Path("out.png").read_bytes() == Path("out/00001-0.png").read_bytes()


def test_prompt_files_keep_the_prompt(call):
    """A line separator that JSON allows inside a string; the record of a folder's text file."""
    Path("u.jsonl").write_text(json.dumps({"prompt": "a red\u2028circle"}, ensure_ascii=False))
    assert [p for _, p, _ in sample.read_prompts(Path("u.jsonl"), None)] == ["a red\u2028circle"]
    Path("t").mkdir()
    Path("t/a.txt").write_text("a red\ncircle\n")
    assert sample.read_prompts(Path("t"), "geneval") == [("a", "a red circle",
                                                          {"prompt": "a red circle"})]


def test_pictures_are_read_as_in_training(tmp_path):
    """Turned as the camera says, transparent on white."""
    clear = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 20, 20))
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                                    # a quarter turn
    Image.linear_gradient("L").resize((40, 20)).save(tmp_path / "phone.jpg", exif=exif)
    for name, size in (("clear.png", (40, 20)), ("phone.jpg", (20, 40))):
        image = sample.open_image(tmp_path / name)
        assert image.size == size
        seen = data.load_image((tmp_path / name).read_bytes(), 64, "squash", None)
        assert np.abs(np.asarray(image.resize((64, 64), Image.BICUBIC)).astype(int) - seen).max() <= 1
    assert sample.open_image(tmp_path / "clear.png").getpixel((39, 0)) == (255, 255, 255)


def test_pictures_are_made_square_as_the_encoder_s_processor_does():
    """SigLIP-2 squashes; DINOv2 takes the middle of the picture with its short side at S."""
    x = np.zeros((20, 60, 3), np.uint8)
    x[:, 20:40, 0], x[:, :20, 1] = 255, 255             # green, red, black
    for kind, ends in (("squash", [1, 0]), ("center", [0, 0])):
        z = sample.to_tensor(Image.fromarray(x), SimpleNamespace(image_size=8, crop=kind,
                                                                resample=3))
        assert z.shape == (1, 3, 8, 8) and z[0, 0, :, 4].min() == 1         # the middle is red
        assert z[0, 1, 4, [0, -1]].tolist() == pytest.approx(ends, abs=0.1)
    assert (encoders.SigLIP2.crop, encoders.DINOv2.crop) == ("squash", "center")
    tall = sample.to_tensor(Image.fromarray(x.swapaxes(0, 1)), SimpleNamespace(
        image_size=7, crop="center", resample=3))
    assert tall.shape == (1, 3, 7, 7) and tall[0, 0, 3].min() > 0.98


def test_stored_latents_decode_to_the_same_picture_and_answer(call, capsys):
    assert call("a red circle", "--steps", 4, "--n", 2, "--save-latent", "z.safetensors") == 0
    assert call("--latent", "z.safetensors", "", "--out", "again.png") == 0    # no question: decode
    sheet = Image.open("again.png")
    assert sheet.size == (130, 64)
    assert sheet.info == {"model": "tiny", "latent": "z.safetensors",
                          "prompt, seed": '[["a red circle", 0], ["a red circle", 1]]'}
    assert sheet.crop((66, 0, 130, 64)).tobytes() == Image.open("out-1.png").tobytes()
    capsys.readouterr()
    assert call("--latent", "z.safetensors", "what is in the picture?", "--max-tokens", 5) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in said] == ["0: ", "1: "] and all(len(line) > 4 for line in said)


def test_matrices_in_bf16_give_the_same_numbers():
    """What is loaded for sampling against the fp32 weights of the file, cast in each product."""
    devices = parallel.Devices("cpu", torch.device("cpu"), 0, 1, torch.bfloat16, {"fsdp": 1})
    *loaded, tokenizer, config = weights.load_model(TINY, devices)
    kept = weights.build_model(config, torch.bfloat16)
    weights.load_model_state(*kept, weights.read_weights(weights.final_of(TINY))[0], "x")
    assert loaded[1].dit_blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    results = []
    with torch.no_grad():
        for llm, dit in (loaded, kept):
            cond = text.direct_condition(llm, tokenizer, ["two cats"], devices.device)
            x = torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(0))
            results.append((cond, flow.generate(dit, cond, x, 6.9, 2, 3.0), llm.logits(cond[..., :128])))
    assert all(torch.equal(a, b) for a, b in zip(*results))


# ------------------------------------------------------------------------------------------------
# Bad input
# ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Every kind of wrong file; `{f}` in a command stands for its folder."""
    f = tmp_path_factory.mktemp("files")
    Image.new("RGB", (64, 64), "red").save(f / "good.png")
    whole = Image.effect_noise((64, 64), 90).convert("RGB")
    whole.save(f / "cut.png")
    (f / "cut.png").write_bytes((f / "cut.png").read_bytes()[:3000])
    (f / "empty.png").touch()
    (f / "text.png").write_text("not a picture")
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
            "list.jsonl": "[1]", "list.json": '["a cat"]', "key.jsonl": '{"text": "a cat"}', "number.jsonl": '{"prompt": 3}',
            "blank.jsonl": '{"prompt": " "}', "same.jsonl": '{"prompt": "a", "item_id": 1}\n' * 2,
            "path.jsonl": '{"prompt": "a", "item_id": "../a"}',
            "name.jsonl": '{"prompt": "a", "item_id": "' + "a" * 300 + '"}',
            "half.jsonl": '{"prompt": "a \\ud83d circle"}'}.items():
        (f / name).write_text(lines)
    (f / "latin.txt").write_bytes("a \u00e9t\u00e9".encode("latin-1"))

    # a model trained with --cond-drop 0: no null condition
    state = load_file(TINY / "model.safetensors")
    state.pop("diff_head.model.y_embedder.dropout_embedding")
    (f / "nonull").mkdir()
    save_file(state, f / "nonull/model.safetensors")
    config = json.loads((TINY / "config.json").read_text())
    (f / "nonull/config.json").write_text(json.dumps({**config, "diffusion_class_dropout_prob": 0}))
    shutil.copy(TINY / "tokenizer.json", f / "nonull")
    return f


# what is typed (a cat: the prompt "a cat"), what the one line must say
BAD = [
    ("cat --n 0", "--n|positive"), ("cat --n -3", "--n"), ("cat --n two", "--n|two"),
    ("cat --steps -5", "--steps"), ("cat --steps 2.5", "--steps|2.5"),
    ("cat --guidance -1", "--guidance"), ("cat --guidance nan", "--guidance|nan"),
    ("cat --guidance inf", "--guidance"), ("cat --seed -1", "--seed"), ("cat --seed x", "--seed"),
    ("cat --seed 5000000000", "--seed"),
    ("cat --schedule fancy", "--schedule|clean|compat"),
    ("cat --schedule compat --steps 2", "--steps 2|at least 3"),
    ("cat --guidance-interval 0.8 0.2", "--guidance-interval 0.8 0.2|LO <= HI"),
    ("cat --guidance-interval -1 1", "--guidance-interval"),
    ("cat --guidance-interval 0 2", "--guidance-interval 0 2"),
    ("cat --guidance-interval nan 1", "--guidance-interval nan 1"),
    ("cat --guidance 1 --guidance-interval 0.2 0.8", "--guidance-interval 0.2 0.8|--guidance"),
    ("cat --schedule compat --guidance-interval 0.2 0.8", "--guidance-interval 0.2 0.8|off"),
    ("cat --best-of 0", "--best-of"), ("cat --best-of 2 --keep 3", "--keep 3|--best-of 2"),
    ("cat --keep 1", "--keep 1|needs --best-of"),
    ("cat --verifier yes", "--verifier yes|--best-of"),
    ("cat --best-of 4 --verifier maybe", "--verifier|prompt|yes-prob"),
    ("cat --best-of 4 --n 2", "--n 2|--keep"),
    ("cat --layout geneval", "--layout geneval|--prompts"),
    ("--prompts {f}/good.txt --layout coco", "--layout|geneval|dpg"),
    ("--prompts {f}/good.txt --layout dpg --n 3", "--n 3|1 or 4"),
    ("--prompts {f}/good.txt --layout dpg --best-of 2", "--best-of 2|1 or 4|--keep"),
    ("cat --template photo", "--template 'photo'|{}"),
    ("cat --template {}+{}", "--template|one {}"),
    ("blank", "prompt is empty"), ("cat --prompts {f}/good.txt", "a cat|--prompts"),
    ("cat --reconstruct {f}/good.png", "a cat|--reconstruct"),
    ("cat --image {f}/good.png --latent {f}/z.safetensors", "--image|--latent"),
    ("--image {f}/good.png --prompts {f}/good.txt", "--image|--prompts"),
    ("--image {f}/good.png", "--image|good.png|question"),
    ("cat --image {f}/good.png --n 4", "--n|--image"),
    ("cat --image {f}/good.png --out a.txt", "--out|printed"),
    ("cat --latent {f}/z.safetensors --out a.png", "--out|printed"),
    ("cat --latent {f}/z.safetensors --best-of 4", "--best-of|--latent"),
    ("--reconstruct {f}/good.png --direct", "--direct|--reconstruct"),
    ("--reconstruct {f}/good.png --out {f}/folder/../good.png", "is the picture of --reconstruct"),
    ("--prompts {f}/list.json", "--prompts|list.json|a .jsonl"),
    (f"--reconstruct {{f}}/good.png --run {ROOT}/assets/tiny/decoder.safetensors",
     "decoder.safetensors|--decoder"),
    ("cat --image {f}/absent.png", "absent.png|no such file"),
    ("cat --image {f}/folder", "folder|not a picture"),
    ("cat --image {f}/empty.png", "empty.png|not a picture"),
    ("cat --image {f}/text.png", "text.png|not a picture"),
    ("cat --image {f}/cut.png", "cut.png|not a picture"),
    ("--reconstruct {f}/cut.png", "cut.png|not a picture"),
    ("--reconstruct {f}/folder", "folder|not a picture"),
    ("cat --image {f}/good.png --max-tokens 0", "--max-tokens"),
    ("cat --image {f}/good.png --encoder {f}/absent", "absent|--encoder"),
    ("cat --image {f}/good.png --encoder {f}/z.safetensors", "z.safetensors|--encoder"),
    ("--latent {f}/wide.safetensors", "--latent|[64, 97]|[64, 96]"),
    ("--latent {f}/long.safetensors", "--latent|[65, 96]|[64, 96]"),
    ("--latent {f}/flat.safetensors", "--latent|[64, 96]"),
    ("--latent {f}/none.safetensors", "--latent|no latent"),
    ("--latent {f}/nan.safetensors", "--latent|not finite"),
    ("--latent {f}/nothing.safetensors", "--latent|[64, 96]"),
    ("--latent {f}/cut.safetensors", "cut.safetensors"),
    ("cat --latent {f}/text.png", "text.png"), ("--latent {f}/folder", "folder"),
    ("--prompts {f}/folder", "--prompts|folder|no prompt"),
    ("--prompts {f}/empty.txt", "empty.txt|no prompt"),
    ("--prompts {f}/latin.txt", "latin.txt|UTF-8|byte 2"),
    ("--prompts {f}/json.jsonl", "json.jsonl|line 2|JSON"),
    ("--prompts {f}/list.jsonl", "list.jsonl|line 1|prompt"),
    ("--prompts {f}/key.jsonl", "key.jsonl|line 1|prompt"),
    ("--prompts {f}/number.jsonl", "number.jsonl|line 1|prompt"),
    ("--prompts {f}/blank.jsonl", "blank.jsonl|empty"),
    ("--prompts {f}/same.jsonl --layout dpg", "same.jsonl|item_id|twice"),
    ("--prompts {f}/path.jsonl --layout dpg", "path.jsonl|item_id|../a"),
    ("--prompts {f}/name.jsonl --layout dpg", "name.jsonl|item_id|aaa"),
    ("--prompts {f}/nested", "a.txt|directory"),
    ("--prompts {f}/chat.txt", "00001|<|im_end|>"),
    ("--prompts {f}/long.txt", "00001|too long|context"),
    ("--prompts {f}/half.jsonl", "00000|not valid Unicode"), ("latin", "not valid Unicode"),
    ("--prompts {f}/good.txt --layout geneval --n 1 --out {f}/more", "--out|0001.png|earlier run"),
    ("--prompts {f}/good.txt --layout geneval --out {f}/other", "--out|00001|earlier run"),
    ("long", "too long|shorten"), ("long --image {f}/good.png", "too long|shorten"),
    ("image", "<image>|leave it out"), ("cat --template a+<image>+{}", "<image>|leave it out"),
    ("cat --out {f}/folder", "--out|folder|.png"), ("cat --out a.jpg", "--out a.jpg|.png"),
    ("cat --out {f}/good.txt/a.png", "--out|good.txt|cannot write"),
    ("--prompts {f}/good.txt --out {f}/good.png", "--out|good.png|folder"),
    ("cat --save-latent z.pt", "--save-latent z.pt|.safetensors"),
    ("cat --save-latent {f}/folder", "--save-latent|folder"),
    ("cat --run {f}/z.safetensors", "--run|z.safetensors|config lacks"),
    ("cat --run {f}/folder", "--run|folder|no weights"),
    ("cat --run {f}/nonull --guidance 3", "--guidance 3|null condition|--guidance 1"),
    ("cat --decoder {f}/absent", "absent|--decoder"),
    ("cat --decoder {f}/z.safetensors", "--decoder|decoder_embed"),
]
WORDS = {"cat": "a cat", "blank": "  \n", "long": "word " * 3000, "image": "a <image> cat",
         "latin": "caf\udce9"}


@pytest.mark.parametrize("command, says", BAD, ids=[c for c, _ in BAD])
def test_bad_input_is_one_clear_line(command, says, call, files, capsys, tmp_path):
    """Exit status 2; the value, and the flag that mends it; no traceback, nothing written."""
    given = [WORDS.get(a, a).replace("{f}", str(files)).replace("+", " ") for a in command.split()]
    assert call(*given) == 2
    said = capsys.readouterr().err
    lines = said.strip().splitlines()
    assert said.count("error:") == 1, said              # missing weights are a list, a line each
    assert "error:" in lines[-1] or "weights are missing" in lines[0], said
    error = said.partition("error:")[2]                 # argparse's usage before it has all flags
    for word in says.replace("<|", "<\0").replace("|>", "\0>").split("|"):
        assert word.replace("\0", "|") in error, (word, said)
    assert len(said) < 2500 and len(lines[-1]) < 900 and not list(tmp_path.iterdir())


def test_a_model_without_null_condition_draws_unguided(call, files):
    assert call("a cat", "--run", files / "nonull", "--steps", 2) == 0
    assert Image.open("out.png").info["guidance"] == "1.0"
