"""Questions about images: read from a file, answered in batches, compared with their references."""
import collections
import re

import best_of
from chat import ROLES, encode_text
from cli import UserError
from files import BrokenRecord, open_image, open_source, task_of
from metrics import interval
from prompts import to_tensor


def file_questions(path, count, encoder):
    """Yield ({id, image, kind, question, reference}, image [1,3,S,S]) of a LLaVA-style JSONL or
    another source: the human's first question and the answer after it, or None. Raises UserError.
    """
    source = open_source(path, text=False)
    for j in range(min(count or len(source), len(source))):
        try:
            file, fields = source.read(j)
            image = to_tensor(open_image(file), encoder)
            asked = fields.get("question", fields.get("text"))
            turns = fields.get("conversations") or [{"from": "human", "value": asked}]
            if asked is None and not fields.get("conversations"):
                raise BrokenRecord("expected \"question\", \"text\" or \"conversations\"")
            task_of(turns)                              # raises if they are no conversation
            if isinstance(fields.get("answer"), (list, dict)):
                raise BrokenRecord("its answer is no string")
        except BrokenRecord as error:
            raise UserError(f"--data {source.key(j)}: {error}") from error
        k = next(k for k, turn in enumerate(turns) if ROLES[turn["from"]] == "user")
        reference = turns[k + 1]["value"] if k + 1 < len(turns) else fields.get("answer")
        yield dict(id=fields.get("question_id", fields.get("id", j)),
                   reference=None if reference is None else str(reference),
                   image=fields.get("image", source.key(j)),
                   kind=str(fields.get("category", "any")),
                   question=turns[k]["value"].replace("<image>", "").strip()), image


def answers(llm, tokenizer, z, questions, limit=48, batch=64):
    """Answer questions about latents [n,N,C] greedily -> strings. Questions of equal length share a
    batch, so there is no padding."""
    by_length, said = collections.defaultdict(list), [None] * len(questions)
    for i, q in enumerate(questions):
        by_length[len(encode_text(tokenizer, q))].append(i)
    groups = [g[k:k + batch] for g in by_length.values() for k in range(0, len(g), batch)]
    for g in groups:
        for i, a in zip(g, best_of.answers(llm, tokenizer, z[g], [questions[i] for i in g], limit)):
            said[i] = a
    return said


def right(kind, said, expected):
    """Tell whether an answer is right: word for word; for `what`, the things in any order."""
    said, expected = (s.strip().rstrip(".").lower() for s in (said, expected))
    if kind == "what":
        return sorted(re.split(", | and ", said)) == sorted(re.split(", | and ", expected))
    return said == expected


def accuracy(rows, kind):
    """Return the table's row of one kind of question, or of `all`."""
    some = [r for r in rows if kind in ("all", r["kind"])]
    mean, low, high = interval([[right(r["kind"], r["answer"], r["reference"]) for r in some]])
    references = collections.defaultdict(collections.Counter)
    for r in some:
        references[r["kind"]][r["reference"]] += 1
    commonest = sum(c.most_common(1)[0][1] for c in references.values())
    return {"questions": len(some), "accuracy": mean, "low": low, "high": high,
            "commonest": round(commonest / len(some), 4)}
