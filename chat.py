"""Tokens, the chat format and its labels: what the language model reads. No torch in here.

    drawing:  user "a red apple"            assistant "Here you go:\\n<im_start> q_1..q_N <im_end>"
    asking:   user "<im_start> z_1..z_N <im_end>\\nWhat is this?"      assistant "An apple."

ChatML as in Qwen2.5. The authors' quirks are kept, because their checkpoints expect them (arXiv
2601.16208, reference code `preprocess_qwen`).
"""
import json
import re
from pathlib import Path

import numpy as np
from tokenizers import (
    AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers)

IGNORE = -100          # label of a position without a loss
IMAGE = -200           # input id of a position that an image token or a query fills

SYSTEM = "You are a helpful assistant."
ANSWER = "Here you go:\n<image>"                # the model's words when it draws
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<im_start>", "<im_end>")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system"}
QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


# ------------------------------------------------------------------------------------------------
# The tokenizer
# ------------------------------------------------------------------------------------------------

def byte_level(tokenizer):
    """Give a BPE model the normalisation, splitting and byte alphabet of Qwen2."""
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def add_special(tokenizer, words):
    tokenizer.add_special_tokens([AddedToken(w, normalized=False, special=True) for w in words])


def train_tokenizer(texts, vocab_size=1024):
    """Train a byte-level BPE in Qwen2's form. The special tokens come last, as in the released
    vocabulary."""
    tokenizer = byte_level(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator(texts, trainer)
    add_special(tokenizer, SPECIAL)
    return tokenizer


def read_tokenizer(folder):
    """Read a folder with tokenizer.json, or with vocab.json, merges.txt and added_tokens.json.
    Raises UserError."""
    from cli import UserError, parsing
    folder = Path(folder)
    whole, parts = folder / "tokenizer.json", [folder / f for f in ("vocab.json", "merges.txt")]
    if whole.is_file():
        with parsing(str(whole), whole):
            tokenizer = Tokenizer.from_file(str(whole))
    elif all(p.is_file() for p in (*parts, folder / "added_tokens.json")):
        with parsing(str(folder / "vocab.json"), parts[0]):
            tokenizer = byte_level(Tokenizer(models.BPE.from_file(*map(str, parts))))
        with parsing(str(folder / "added_tokens.json"), folder / "added_tokens.json"):
            added = sorted((int(i), str(word)) for word, i in json.loads(
                (folder / "added_tokens.json").read_text(encoding="utf-8")).items())
        add_special(tokenizer, [word for _, word in added])
        for i, word in added:
            if tokenizer.token_to_id(word) != i:
                raise UserError(f"{folder}/added_tokens.json: {word!r} should have the id {i}, it "
                                f"gets {tokenizer.token_to_id(word)}")
    else:
        raise UserError(f"no tokenizer in {folder}: expected tokenizer.json, or vocab.json with "
                        "merges.txt and added_tokens.json")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def load_tokenizer(folder):
    """Read a tokenizer and add the special tokens that its files lack, at the end: <im_start> and
    <im_end> get the ids 151665 and 151666 after Qwen2.5's. Raises UserError."""
    tokenizer = read_tokenizer(folder)
    add_special(tokenizer, [w for w in SPECIAL if tokenizer.token_to_id(w) is None])
    return tokenizer


def save_tokenizer(tokenizer, folder):
    """Write tokenizer.json, and the files from which the authors' slow Qwen2 tokenizer reads the
    same tokens."""
    folder, added = Path(folder), tokenizer.get_added_tokens_decoder()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))                   # vocab.json, merges.txt
    (folder / "added_tokens.json").write_text(json.dumps({t.content: i for i, t in added.items()}))
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="Qwen2Tokenizer", model_max_length=1024, padding_side="right",
        bos_token=None, unk_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=[t.content for t in added.values()]), indent=1))


def encode_text(tokenizer, text):
    """Return a list of ids. `<image>` becomes IMAGE, special tokens become themselves."""
    ids = []
    for i, piece in enumerate(text.split("<image>")):
        ids += ([IMAGE] if i else []) + tokenizer.encode(piece, add_special_tokens=False).ids
    return ids


# ------------------------------------------------------------------------------------------------
# Conversations
# ------------------------------------------------------------------------------------------------

def request(caption, rand):
    """Turn a caption into the user's words: half of the time the caption itself, else a request.
    rand() returns numbers in [0, 1)."""
    if rand() < 0.5:
        return caption
    words = re.sub(r"^(an? )?(photo|picture|image) of ", "", caption.rstrip("."), flags=re.I)
    if words.startswith(("A ", "An ", "Two ", "Three ", "Four ")):
        words = words[0].lower() + words[1:]
    forms = ("Can you generate a photo of {}?", "Generate an image of {}.",
             "Please create a picture of {}.", "Draw {}.")
    return forms[int(rand() * len(forms))].format(words)


def drawing(caption, rand):
    """Return the conversation of a text-to-image sample."""
    return [{"from": "human", "value": request(caption, rand)}, {"from": "gpt", "value": ANSWER}]


def request_of(conversation):
    """Return the words of the first turn that is the user's."""
    return next(turn["value"] for turn in conversation if ROLES[turn["from"]] == "user")


def chat(tokenizer, conversation, has_image=True):
    """Tokenize [{"from": "human" or "gpt", "value": text}, ...] -> (ids, labels), two lists.

    `<image>` becomes `<im_start><image><im_end>`, with the placeholder IMAGE in the middle.
    has_image: put an image that no turn mentions before the first user's words. Every token of an
    assistant's turn has a label, also its header. In the other turns every newline, <|im_start|>
    and <|im_end|> has one (the authors' quirk). The placeholder in an assistant's turn has the
    label V, which tells insert_image_tokens that the image is to be generated. A first turn that is
    not the human's is dropped.
    """
    turns = [(ROLES[turn["from"]], turn["value"]) for turn in conversation]
    if has_image and not any("<image>" in text for _, text in turns):
        k = next(k for k, (role, _) in enumerate(turns) if role == "user")
        turns[k] = "user", "<image>\n" + turns[k][1]
    if turns[0][0] != "user":
        turns = turns[1:]
    always = {encode_text(tokenizer, s)[0] for s in ("\n", "<|im_start|>", "<|im_end|>")}
    ids, labels = [], []
    for role, text in [("system", SYSTEM), *turns]:
        text = text.replace("<image>", "<im_start><image><im_end>")
        part = encode_text(tokenizer, f"<|im_start|>{role}\n{text}<|im_end|>\n")
        ids += part
        for i in part:
            if role == "assistant":
                labels.append(tokenizer.get_vocab_size() if i == IMAGE else i)
            else:
                labels.append(i if i in always else IGNORE)
    return ids, labels


def insert_image_tokens(ids, labels, tokens):
    """Repeat the placeholder `tokens` times -> (ids, labels, start, answer).

    start: the first image position, or None without an image. answer: whether the image is to be
    generated. Raises ValueError for more than one image (the recipe has at most one per sample).
    """
    places = [i for i, token in enumerate(ids) if token == IMAGE]
    if len(places) > 1:
        raise ValueError(f"{len(places)} images in one sample; at most 1")
    if not places:
        return ids, labels, None, False
    p = places[0]
    answer = labels[p] != IGNORE
    ids = ids[:p] + [IMAGE] * tokens + ids[p + 1:]
    labels = labels[:p] + [IGNORE] * tokens + labels[p + 1:]
    return ids, labels, p, answer


def prompt_ids(tokenizer, text, image=False):
    """Return the ids of a chat up to the assistant's header. image: the user shows an image."""
    turn = {"from": "human", "value": "<image>\n" * image + text}
    return (chat(tokenizer, [turn], has_image=image)[0]
            + encode_text(tokenizer, "<|im_start|>assistant\n"))


def pad_batch(samples, pad_id, multiple=64):
    """Stack [(ids, labels, start, answer), ...] -> ids, labels [B,L], start, answer [B], numpy.

    L is the largest length of the batch, rounded up to `multiple`, not the recipe's fixed 512:
    right padding is invisible under a causal mask and only costs time. Rounding keeps the number of
    shapes, and so of compiled programs, small.
    """
    L = max(len(s[0]) for s in samples)
    L = -(-L // multiple) * multiple
    ids, labels = np.full((len(samples), L), pad_id), np.full((len(samples), L), IGNORE)
    for row, (i, label, _, _) in enumerate(samples):
        ids[row, :len(i)], labels[row, :len(label)] = i, label
    start = np.array([L if s[2] is None else s[2] for s in samples])
    return ids, labels, start, np.array([bool(s[3]) for s in samples])


def labelled(labels, K=None):
    """Find the positions whose next token has a label: labels [B,L] -> where, targets [B,K].

    A row with fewer than K of them is filled with other positions, whose target is IGNORE. K: a
    fixed number, for equal shapes; the default is the largest count of a row, rounded up to 16.
    Raises ValueError if a row has more than K.
    """
    targets = np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)           # [B,L]
    known = targets != IGNORE
    most = int(known.sum(1).max())
    if K and most > K:
        raise ValueError(f"{most} labelled tokens in a sample, more than {K}")
    K = K or -(-max(most, 1) // 16) * 16
    where = np.argsort(~known, axis=1, kind="stable")[:, :K]                # labelled ones first
    return where, np.take_along_axis(targets, where, 1)
