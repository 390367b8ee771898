"""Best of N without pixels: the model judges the latents it drew (the paper's test-time scaling).

The latent is what the language model sees of a picture, so a drawn one goes back into it as it is:

    prompt    sequence = chat("Describe this image.", z) + p;  score = -mean log(V softmax(logits))
              over the positions of p and over the vocabulary: self-certainty (arXiv 2502.18581)
    yes       "Does this image align with the prompt: p?" answered greedily; logits of its words
    yes-prob  ours: probability of yes against no as the answer's first word, one prefill
    loss      ours: cross-entropy of p after the same "Describe this image."

`scores` gives all of them for each candidate, `rank` orders by one; neither knows of a decoder.
"""
import math

import torch
import torch.nn.functional as F

import text_model as text

DESCRIBE = "Describe this image."
QUESTION = "Does this image align with the prompt: {}?"
WORDS = {"yes": ("yes", "Yes", "YES"), "no": ("no", "No", "NO")}
# What a row of `scores` is sorted by, ascending. The first two are the authors' selection keys.
KEYS = {"prompt": lambda r: (-r["prompt_conf"], -r["yes_logit"], r["no_logit"]),
        "yes": lambda r: (-r["score"], -r["yes_logit"], r["no_logit"]),
        "yes-prob": lambda r: -r["yes_prob"],
        "loss": lambda r: r["prompt_loss"]}


def question(llm, tokenizer, z, words, more=()):
    """z [B,N,C], or None for no picture, and the user's words about it: one text for all, or a list
    of B of one length in tokens -> embeddings [B,L,H] of the chat up to the assistant's header,
    then the ids `more`."""
    rows = [text.prompt_ids(tokenizer, w, image=z is not None) + list(more)
            for w in ([words] if isinstance(words, str) else words)]
    rows = [text.expand(ids, [text.IGNORE] * len(ids), llm.tokens) for ids in rows]
    ids = torch.tensor([ids for ids, *_ in rows])                                       # [B,L]
    if z is None:
        return llm.embed(ids.to(llm.head_weight().device))
    start = torch.full((len(z),), rows[0][2], device=z.device)
    return llm.embed(ids.to(z.device).expand(len(z), -1), start, start < 0, z)


def greedy(llm, tokenizer, x, limit, cache):
    """Embeddings [B,L,H] that end where B answers begin -> each step: logits [B,V], tokens [B], and
    which answers go on [B] (it ends when none does). The cache, a list, begins empty."""
    ends = torch.tensor([tokenizer.token_to_id(s) for s in ("<|im_end|>", "<im_start>")],
                        device=x.device)
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(limit):
        logits = llm.logits(llm(x, cache)[:, -1])                                       # [B,V]
        token = logits.argmax(-1)                                                       # [B]
        alive = alive & ~torch.isin(token, ends)
        yield logits, token, alive
        if not alive.any():
            return
        x = llm.embed(token[:, None])


def decode(tokenizer, steps):
    """Tokens [B] a step, -1 after an answer's end -> B strings."""
    return [tokenizer.decode([i for i in row if i >= 0]) for row in torch.stack(steps, 1).tolist()]


@torch.no_grad()
def answers(llm, tokenizer, z, words, limit=48):
    """`question` answered greedily, all at once: B strings."""
    steps = greedy(llm, tokenizer, question(llm, tokenizer, z, words), limit, [])
    return decode(tokenizer, [token.masked_fill(~alive, -1) for _, token, alive in steps])


def certainty(logits):
    """Logits [...,V] -> [...]: -mean over the vocabulary of log(V p), 0 for a uniform p. fp32."""
    return -(F.log_softmax(logits.float(), -1).mean(-1) + math.log(logits.shape[-1]))


@torch.no_grad()
def prompt_scores(llm, tokenizer, z, prompt):
    """z [B,N,C] -> [B] self-certainty over the prompt's T tokens, [B] mean cross-entropy of its
    tokens 2 to T (0 when there is one). The authors read the logits at the T positions of the
    prompt itself: the prediction after its last token counts, that of its first does not."""
    ids = text.encode_text(tokenizer, prompt)
    h = llm(question(llm, tokenizer, z, DESCRIBE, ids))[:, -len(ids):]                  # [B,T,H]
    conf, loss, targets = [], [], torch.tensor(ids[1:], device=z.device)
    for row in h:                                       # one by one: V is large
        logits = llm.logits(row)                                                        # [T,V]
        conf.append(certainty(logits).mean())
        loss.append(F.cross_entropy(logits[:-1], targets) if len(targets) else conf[-1] * 0)
    return torch.stack(conf), torch.stack(loss)


def word_ids(tokenizer, first=False):
    """-> ids of yes, ids of no: of each spelling, with and without a space before it, every token
    (or the first). A token of both words, as a bare space in a small vocabulary, tells nothing."""
    yes, no = ({i for w in WORDS[word] for form in (w, " " + w)
                for i in text.encode_text(tokenizer, form)[:1 if first else None]}
               for word in ("yes", "no"))
    return sorted(yes - no), sorted(no - yes)


@torch.no_grad()
def answer_scores(llm, tokenizer, z, prompt, limit=512):
    """z [B,N,C] -> dict of [B]: score (1: said yes), yes_logit and no_logit (raw, of the word when
    it is written, the last one counts, else 0), yes_prob; and `answer`, B strings.

    Greedy, all candidates at once with one KV cache; at most `limit` tokens. yes_prob needs 1.
    """
    yes, no, yes1, no1 = (torch.tensor(ids, device=z.device) for ids in
                          (*word_ids(tokenizer), *word_ids(tokenizer, first=True)))
    score, yes_logit, no_logit = torch.zeros(3, len(z), device=z.device)
    yes_prob, written = None, []
    x = question(llm, tokenizer, z, QUESTION.format(prompt))
    for logits, token, alive in greedy(llm, tokenizer, x, limit, []):
        if yes_prob is None:
            yes_prob = torch.sigmoid(logits[:, yes1].logsumexp(-1) - logits[:, no1].logsumexp(-1))
        raw, hit = logits.amax(-1), alive & torch.isin(token, yes)                      # [B]
        score, yes_logit = score.masked_fill(hit, 1), torch.where(hit, raw, yes_logit)
        no_logit = torch.where(alive & torch.isin(token, no), raw, no_logit)
        written.append(token.masked_fill(~alive, -1))
    return dict(score=score, yes_logit=yes_logit, no_logit=no_logit, yes_prob=yes_prob,
                answer=decode(tokenizer, written))


def scores(llm, tokenizer, z, prompt):
    """Latents [B,N,C] drawn for `prompt` -> B dicts, a value of each verifier."""
    found = answer_scores(llm, tokenizer, z, prompt)
    conf, loss = prompt_scores(llm, tokenizer, z, prompt)
    answers = found.pop("answer")
    found = {"prompt_conf": conf, "prompt_loss": loss, **found}
    rows = zip(*(v.tolist() for v in found.values()))
    return [{**dict(zip(found, row)), "answer": a} for row, a in zip(rows, answers)]


def rank(rows, verifier):
    """Indices of `scores` rows, best first; of equals the earlier comes first."""
    return sorted(range(len(rows)), key=lambda i: KEYS[verifier](rows[i]))


def table(rows, order, seeds, keep):
    """The rows in order as text; `*` marks the `keep` that are kept."""
    names = [k for k in rows[0] if k != "answer"]
    lines = [f"  {'seed':>6} " + "".join(f"{k:>13}" for k in names) + "  answer"]
    for place, i in enumerate(order):
        lines.append(f"{'*' if place < keep else ' '} {seeds[i]:>6} "
                     + "".join(f"{rows[i][k]:>13.4f}" for k in names) + f"  {rows[i]['answer']}")
    return "\n".join(lines)
