"""Comparison with the libraries themselves: their files load here and give their numbers.

    pip install transformers diffusers lpips torchvision
    python -m pytest -q tests/test_libraries.py

Tests are skipped where a library is not installed; the golden files hold such outputs for everyone.
The models are small, with random weights and odd widths and depths, written by `save_pretrained`.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import chat  # noqa: E402
import golden  # noqa: E402
import networks  # noqa: E402
import parallel  # noqa: E402
import sample  # noqa: E402
import stage2  # noqa: E402
import weights  # noqa: E402
from text_model import TextModel  # noqa: E402
from tiny.train_encoder import SiglipHead  # noqa: E402

hf = pytest.importorskip("transformers", reason="an optional comparison")
CPU = parallel.setup("cpu", "float32")
VISION = dict(hidden_size=40, intermediate_size=100, num_hidden_layers=3, num_attention_heads=5,
              image_size=20, patch_size=4, layer_norm_eps=1e-5)
DINO = dict(hidden_size=40, mlp_ratio=3, num_hidden_layers=3, num_attention_heads=5, image_size=28,
            patch_size=14)
QWEN = dict(vocab_size=1200, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
            num_attention_heads=6)
HEADS = {"tied": dict(tie_word_embeddings=True, num_key_value_heads=2),
         "untied": dict(tie_word_embeddings=False, num_key_value_heads=6, rms_norm_eps=1e-5)}
PROCESSORS = {"squash": ("SiglipImageProcessor", dict(size=dict(height=64, width=64))),
              "center": ("BitImageProcessor", dict(size=dict(shortest_edge=64),
                                                   crop_size=dict(height=64, width=64)))}


def random_weights(model):
    """Draw larger weights than an initialisation's, so that every part of the network matters."""
    golden.randomise(model)
    return model.eval()


def close(ours, theirs):
    scale = max(1.0, theirs.abs().max().item())
    assert theirs.std() > 1e-3 and (ours - theirs).abs().max() <= 1e-5 * scale


def normalised(images, encoder):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.mean, encoder.std))
    return (images - mean) / std


@pytest.mark.parametrize("form", ["vision alone", "with the text"])
@torch.no_grad()
def test_siglip(form, tmp_path):
    if form == "vision alone":              # transformers 5 leaves `vision_model.` out of the keys
        vision = model = random_weights(hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)))
    else:
        words = dict(hidden_size=40, intermediate_size=60, num_hidden_layers=1, vocab_size=50,
                     num_attention_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0)
        model = random_weights(hf.SiglipModel(hf.SiglipConfig(vision_config=VISION,
                                                              text_config=words)))
        vision = model.vision_model
    model.save_pretrained(tmp_path)
    ours, x = networks.load_encoder(tmp_path, CPU), torch.rand(3, 3, 20, 20)
    theirs = vision(normalised(x, ours), output_hidden_states=True)
    hidden = theirs.hidden_states[-1]                                       # [B,25,40]
    close(ours(x), F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6))
    # the pooling head that tiny/train_encoder.py trains has the published keys
    head = SiglipHead(40, 100, 5, 1e-5)
    file = weights.open_weights(tmp_path)
    head.load_state_dict({k.split("head.", 1)[1]: file.rows(k) for k in file.shapes
                          if k.removeprefix("vision_model.").startswith("head.")})
    close(head(theirs.last_hidden_state), theirs.pooler_output)


@torch.no_grad()
def test_dinov2(tmp_path):
    model = random_weights(hf.Dinov2Model(hf.Dinov2Config(**DINO)))
    model.save_pretrained(tmp_path)
    ours, x = networks.load_encoder(tmp_path, CPU), torch.rand(2, 3, 28, 28)
    close(ours(x), model(normalised(x, ours)).last_hidden_state[:, 1:])


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("heads", list(HEADS))
@torch.no_grad()
def test_qwen2(heads, theta, tmp_path):
    """In shards with their index; hidden states, logits, and greedy tokens through the cache."""
    model = random_weights(hf.Qwen2ForCausalLM(hf.Qwen2Config(**QWEN, **HEADS[heads],
                                                              rope_theta=theta)))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    chat.save_tokenizer(chat.read_tokenizer(weights.TINY), tmp_path)
    tokenizer = chat.load_tokenizer(tmp_path)
    source, V = stage2.llm_source(tmp_path, tokenizer), tokenizer.get_vocab_size()
    config = stage2.llm_config(source.config, "llm", V)
    with torch.device("meta"):
        ours = TextModel(config)
    ours = weights.load(ours, source, CPU)
    ids = torch.randint(V, (2, 19), generator=torch.Generator().manual_seed(1))
    theirs, hidden = model(ids, output_hidden_states=True), ours(ours.embed(ids))
    close(hidden, theirs.hidden_states[-1])
    close(ours.logits(hidden)[..., :V], theirs.logits[..., :V])
    sequence, new, cache = ids[:1], ids[:1], []
    for _ in range(8):
        new = ours.logits(ours(ours.embed(new), cache)[:, -1:])[..., :V].argmax(-1)      # [1,1]
        assert new.equal(model(sequence).logits[:, -1:, :V].argmax(-1))
        sequence = torch.cat([sequence, new], 1)


@torch.no_grad()
def test_flux_vae(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="an optional comparison")
    model = random_weights(diffusers.AutoencoderKL(
        block_out_channels=(16, 24, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=2, latent_channels=8,
        norm_num_groups=8, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.5,
        shift_factor=-0.2))
    model.save_pretrained(tmp_path / "vae")
    ours, x = networks.load_vae(tmp_path, CPU), torch.rand(2, 3, 48, 48)
    theirs = model.encode(2 * x - 1).latent_dist
    close(ours.posterior(x)[0], theirs.mean)
    close(ours.posterior(x)[1], theirs.logvar)
    close(ours.decode(ours.encode(x)), model.decode(theirs.mean).sample / 2 + 0.5)


@torch.no_grad()
def test_rae_decoder(tmp_path):
    """The decoder of AutoencoderRAE, in one file with its encoder. (On other grids than 16 x 16
    diffusers scales the table of positions, which the authors' code does not.)"""
    diffusers = pytest.importorskip("diffusers", reason="an optional comparison")
    if not hasattr(diffusers, "AutoencoderRAE"):
        pytest.skip("this diffusers has no AutoencoderRAE")
    model = random_weights(diffusers.AutoencoderRAE(
        encoder_type="dinov2", encoder_hidden_size=64, encoder_num_hidden_layers=1,
        decoder_hidden_size=32, decoder_num_hidden_layers=2,
        decoder_num_attention_heads=4, decoder_intermediate_size=48, patch_size=10))
    model.save_pretrained(tmp_path)
    encoder = SimpleNamespace(tokens=256, channels=64, mean=(0.5,) * 3, std=(0.5,) * 3)
    ours, z = networks.load_decoder(tmp_path, CPU, encoder), torch.randn(2, 256, 64)
    close(ours(z), model.decode(z.mT.unflatten(-1, (16, 16))).sample)


@torch.no_grad()
def test_lpips(tmp_path):
    """The published `lin*`, which the package brings, on VGG16 with random weights."""
    torchvision = pytest.importorskip("torchvision", reason="an optional comparison")
    lpips = pytest.importorskip("lpips", reason="an optional comparison")
    vgg = random_weights(torchvision.models.vgg16())
    torch.save(vgg.state_dict(), tmp_path / "vgg16.pth")
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
    slices = [m for i in range(1, 6) for m in getattr(theirs.net, f"slice{i}")]
    for mine, other in zip(slices, vgg.features):       # the same layers in five parts
        mine.load_state_dict(other.state_dict())
    lin = Path(lpips.__file__).parent / "weights/v0.1/vgg.pth"
    ours = networks.load_perceptual(tmp_path / "vgg16.pth", lin, CPU)
    a, b = torch.rand(2, 2, 3, 64, 64)
    b[0] = a[0].lerp(b[0], 0.1)                         # one pair alike
    close(ours.lpips(ours.maps(a), ours.maps(b)), theirs(2 * a - 1, 2 * b - 1).flatten())


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("size", [(320, 200), (57, 301), (64, 64)])
@pytest.mark.parametrize("crop", list(PROCESSORS))
def test_preprocessing(crop, size, resample):
    """The image that the encoder sees, to the bit."""
    name, options = PROCESSORS[crop]
    make = getattr(hf, name + "Pil", None) or getattr(hf, name)             # 5 has two; 4 this one
    noise = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.BICUBIC)
    theirs = make(**options, resample=resample, do_normalize=False)(image, return_tensors="pt")
    ours = sample.to_tensor(image, SimpleNamespace(image_size=64, crop=crop, resample=resample))
    assert (ours - theirs["pixel_values"]).abs().max() < 1e-6


def test_tokens():
    """The real vocabulary, from the files that a slow tokenizer saves; every range of letters."""
    folder = HERE / "golden" / "qwen_tokenizer"
    theirs, ours = hf.AutoTokenizer.from_pretrained(folder), chat.load_tokenizer(folder)
    rand = np.random.default_rng(0)
    letters = [*map(chr, range(32, 127)), *" \n\t'é ßñçüあ漢字한ﬁ½²٣🙂👩‍🚀مشן́", "'ll", "  ", "<|im_end|>"]
    for _ in range(500):
        words = "".join(rand.choice(letters, rand.integers(1, 40)))
        assert chat.encode_text(ours, words) == theirs(words, add_special_tokens=False).input_ids
