"""Best of N without pixels: the model ranks the latents it drew (the paper's test-time scaling).

The language model reads images as latents, so it reads a generated latent without decoding it:

    prompt    sequence = chat("Describe this image.", z) + p;  score = -mean log(V softmax(logits)),
              the mean over the positions of p and the vocabulary: self-certainty (arXiv 2502.18581)
    yes       "Does this image align with the prompt: p?", answered greedily; logits of its words
    yes-prob  ours: probability of yes against no as the first word of that answer, one prefill
    loss      ours: cross-entropy of p after "Describe this image."

`scores` computes all four for each candidate and `rank` orders by one of them.
"""
import math

import torch
import torch.nn.functional as F

from chat import encode_text
from prompts import check_finite
from text_model import greedy, question

DESCRIBE = "Describe this image."
QUESTION = "Does this image align with the prompt: {}?"
WORDS = {"yes": ("yes", "Yes", "YES"), "no": ("no", "No", "NO")}
# Sort keys of a row of `scores`, ascending. The first two are the authors' selection keys.
KEYS = {"prompt": lambda r: (-r["prompt_conf"], -r["yes_logit"], r["no_logit"]),
        "yes": lambda r: (-r["score"], -r["yes_logit"], r["no_logit"]),
        "yes-prob": lambda r: -r["yes_prob"],
        "loss": lambda r: r["prompt_loss"]}


def decode(tokenizer, steps):
    """Turn the tokens [B] of each step, -1 after the end of an answer, into B strings."""
    return [tokenizer.decode([i for i in row if i >= 0]) for row in torch.stack(steps, 1).tolist()]


@torch.no_grad()
def answers(llm, tokenizer, z, words, limit=48):
    """Answer the question `words` about the images z [B,N,C] greedily, all at once -> B strings."""
    steps = greedy(llm, tokenizer, question(llm, tokenizer, z, words), limit, [])
    return decode(tokenizer, [token.masked_fill(~alive, -1) for _, token, alive in steps])


def certainty(logits):
    """Logits [...,V] -> [...]: -mean over the vocabulary of log(V p), 0 for a uniform p. fp32."""
    return -(F.log_softmax(logits.float(), -1).mean(-1) + math.log(logits.shape[-1]))


@torch.no_grad()
def prompt_scores(llm, tokenizer, z, prompt):
    """z [B,N,C] -> self-certainty over the T tokens of the prompt [B], and the mean cross-entropy
    of its tokens 2 to T [B] (0 when T is 1).

    The authors read the logits at the positions of the prompt itself: the prediction after its last
    token counts, the prediction of its first token does not.
    """
    ids = encode_text(tokenizer, prompt)
    h = llm(question(llm, tokenizer, z, DESCRIBE, ids))[:, -len(ids):]                  # [B,T,H]
    conf, loss, targets = [], [], torch.tensor(ids[1:], device=z.device)
    for row in h:                                       # one by one: V is large
        logits = llm.logits(row)                                                        # [T,V]
        conf.append(certainty(logits).mean())
        loss.append(F.cross_entropy(logits[:-1], targets) if len(targets) else conf[-1] * 0)
    return torch.stack(conf), torch.stack(loss)


def word_ids(tokenizer, first=False):
    """Return the ids of yes and the ids of no: every token (with `first`, the first token) of each
    spelling, with and without a space before it. Tokens of both words, such as a bare space in a
    small vocabulary, are left out."""
    yes, no = ({i for w in WORDS[word] for form in (w, " " + w)
                for i in encode_text(tokenizer, form)[:1 if first else None]}
               for word in ("yes", "no"))
    return sorted(yes - no), sorted(no - yes)


@torch.no_grad()
def answer_scores(llm, tokenizer, z, prompt, limit=512):
    """z [B,N,C] -> dict of [B]: score (1: said yes), yes_logit and no_logit (the raw logit of the
    word where it is written, the last time if often, 0 if never), yes_prob; `answer`, B strings.

    Answers all candidates at once, greedily, with one KV cache.
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
    """Score the candidates z [B,N,C] of one prompt -> B dicts with a value for each verifier."""
    found = answer_scores(llm, tokenizer, z, prompt)
    conf, loss = prompt_scores(llm, tokenizer, z, prompt)
    answers = found.pop("answer")
    found = {"prompt_conf": conf, "prompt_loss": loss, **found}
    for name, values in found.items():
        check_finite(f"the verifier's {name}", values)
    rows = zip(*(v.tolist() for v in found.values()))
    return [{**dict(zip(found, row)), "answer": a} for row, a in zip(rows, answers)]


def rank(rows, verifier):
    """Return the indices of the rows of `scores`, best first; ties keep their order."""
    return sorted(range(len(rows)), key=lambda i: KEYS[verifier](rows[i]))
