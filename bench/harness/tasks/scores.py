"""How the tasks are scored; the harness finds these by the names in the YAML files."""

import re
from collections import Counter


def holds_answer(doc, results):
    """1 where the text has the number that was asked for."""
    return {"found": float(doc["answer"] in results[0])}


def word_overlap(doc, results):
    """F1 of the words of the text and of the answer."""
    ours, theirs = (
        Counter(re.findall(r"\w+", text.lower())) for text in (results[0], doc["answer"])
    )
    shared = sum((ours & theirs).values())
    total = sum(ours.values()) + sum(theirs.values())
    return {"f1": 2 * shared / total if total else 0.0}


def nats_a_letter(doc, results):
    """How unlikely the answer is, by its length in characters."""
    logprob, _ = results[0]
    return {"nats_a_letter": -logprob / max(len(doc["answer"]), 1)}
