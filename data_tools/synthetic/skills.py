"""The three measurable skills of the generated world: their documents for training and their questions for the test.

A document ends in pairs of lines `问：...` and `答：...`; a question is the same text ending after `答：`.
"""

from __future__ import annotations

import functools
import zlib

from data_tools.synthetic.words import Draw, reserved

LARGEST_TERM = 10
CHOICES = 4
SAME_RELATION = 0.3  # passages whose facts differ in the person only; in the others the relation alone tells
_TRIES = 200


# ---------------------------------------------------------------- a fact that stands in the context

def _facts(draw: Draw, count: int) -> list[tuple[str, str, str]]:
    """`count` facts (name, relation, value): all of one relation, or each of its own."""
    relations = list(draw.words["relations"])
    same = draw.chance(SAME_RELATION)
    kinds = [draw.rng.choice(relations)] * count if same else draw.rng.sample(relations, count)
    facts: list[tuple[str, str, str]] = []
    while len(facts) < count:
        name, relation = draw.neighbours(1)[0], kinds[len(facts)]
        value = draw.value_for(name, relation, tuple(fact[2] for fact in facts), common=True)
        if value is not None and name not in [fact[0] for fact in facts]:
            facts.append((name, relation, value))
    return facts


def _sentence(draw: Draw, name: str, relation: str, value: str) -> str:
    return name + draw.words["relations"][relation]["verb"] + value


def _passage(draw: Draw, facts: list[tuple[str, str, str]]) -> str:
    """The facts told in a row, with connectives and now and then an idle sentence between them."""
    text = draw.one("context", "heads")
    if draw.chance(0.3):
        text += draw.one("context", "asides")
    for index, fact in enumerate(facts):
        if draw.chance(0.2) and text[-1] not in "而过是":
            text += draw.one("context", "openings")
        text += _sentence(draw, *fact)
        text += draw.one("context", "joins") if index + 1 < len(facts) else "。"
    if draw.chance(0.2):
        text += draw.one("context", "asides")
    return text


def _asked(draw: Draw, fact: tuple[str, str, str]) -> str:
    name, relation, value = fact
    form = "who" if draw.chance(0.1) and not draw.held_out else "ask"
    return draw.one("relations", relation, form).format(name=name, value=value)


def context_document(draw: Draw) -> str:
    """A passage of one to three facts, now and then told once more in another order, and questions about the facts.

    A passage of one fact leaves nothing to choose from: from it a model learns soonest that the answer is copied.
    """
    facts = _facts(draw, draw.rng.randint(1, 3))
    lines = [_passage(draw, facts)]
    if draw.chance(0.4):
        again = draw.rng.sample(facts, len(facts))
        lines.append(draw.one("context", "again") + "".join(_sentence(draw, *fact) + "。" for fact in again))
    # The same fact may be asked for twice, in other words: a model learns to look back from that soonest.
    for fact in draw.rng.choices(facts, k=draw.rng.randint(1, 3)):
        lines += ["问：" + _asked(draw, fact), "答：" + _sentence(draw, *fact) + "。"]
    return "\n".join(lines)


def context_question(draw: Draw) -> dict:
    """A question about one of two or three facts; wrong choices come first from the other facts of the passage."""
    facts = _facts(draw, draw.rng.randint(2, 3))
    name, relation, value = draw.rng.choice(facts)
    prompt = f"{_passage(draw, facts)}\n问：{_asked(draw, (name, relation, value))}\n答："
    wrong = [fact[2] for fact in facts if fact[1] == relation and fact[2] != value]
    others = [other for other in draw.common_values(relation) if other != value and other not in wrong]
    wrong += draw.rng.sample(others, CHOICES - 1 - len(wrong))
    return _item(draw, prompt, [_sentence(draw, name, relation, word) + "。" for word in [value, *wrong]])


# ---------------------------------------------------------------- sentiment of an opinion

def _review(draw: Draw) -> tuple[str, int]:
    """An opinion on this side of the held-out border and its label (0 good, 1 bad)."""
    for _ in range(_TRIES):
        opinion, closing, label = _any_review(draw)
        # Without its closing words: with others it would be shown in training all the same.
        if reserved(opinion) == draw.held_out:
            break
    return opinion + closing, label


def _any_review(draw: Draw) -> tuple[str, str, int]:
    label = draw.rng.randrange(2)
    mood, opposite = ("good", "bad") if label == 0 else ("bad", "good")
    subject = draw.words["sentiment"]["subjects"][draw.rng.choice(list(draw.words["sentiment"]["subjects"]))]
    aspects = draw.rng.sample([key for key in subject if key != "names"], 2)
    first, second = (aspect + draw.rng.choice(subject[aspect][mood]) for aspect in aspects)
    opinion = draw.rng.choice(subject["names"])
    if draw.chance(0.12):
        other = aspects[0] + draw.rng.choice(subject[aspects[0]][opposite])
        opinion += draw.one("sentiment", "concessions").format(other=other, main=second) + "。"
        return opinion, draw.one("sentiment", "closings", mood), label
    opinion += "，" + first
    if draw.chance(0.7):
        opinion += draw.one("sentiment", "turns") + second
    closing = draw.one("sentiment", "closings", mood) if draw.chance(0.4) else ""
    return opinion + "。", closing, label


def sentiment_document(draw: Draw) -> str:
    """One to three opinions, each followed by the question and its answer."""
    lines = []
    for _ in range(draw.rng.randint(1, 3)):
        body, label = _review(draw)
        lines += [draw.one("sentiment", "heads") + body, "问：" + draw.one("sentiment", "questions"),
                  f"答：{draw.words['sentiment']['labels'][label]}。"]
    return "\n".join(lines)


def sentiment_question(draw: Draw) -> dict:
    """One opinion that training never showed; the choices are the two labels."""
    body, label = _review(draw)
    prompt = f"{draw.one('sentiment', 'heads')}{body}\n问：{draw.one('sentiment', 'questions')}\n答："
    labels = draw.words["sentiment"]["labels"]
    return _item(draw, prompt, [labels[label] + "。", labels[1 - label] + "。"])


# ---------------------------------------------------------------- one-step arithmetic

@functools.cache
def held_out_sum(a: int, b: int) -> bool:
    """True for the ordered sums a + b (and differences (a+b) - a) that only questions may use.

    Of a quarter of the pairs a < b one order is kept back; the other order stays in training, so the skill asked for is
    to know that order does not matter (and, for differences, which of two numbers is left).
    """
    code = zlib.crc32(f"{min(a, b)}+{max(a, b)}".encode())
    return a != b and code % 4 == 0 and (a < b) == bool(code >> 8 & 1)


def _terms(draw: Draw) -> tuple[int, int]:
    while True:
        a, b = draw.rng.randint(0, LARGEST_TERM), draw.rng.randint(0, LARGEST_TERM)
        if held_out_sum(a, b) == draw.held_out:
            return a, b


def _sum(draw: Draw, in_words: float) -> tuple[str, str, int, int, int]:
    """A question, the answer up to its number, the number and the two terms; `in_words`: chance of a little story."""
    a, b = _terms(draw)
    add, story = draw.chance(0.5), draw.chance(in_words)
    first, second, answer = (a, b, a + b) if add else (a + b, a, b)
    pattern = draw.one("arithmetic", ("gain" if add else "lose") if story else ("add" if add else "subtract"))
    # A thing is written with its measure word first.
    thing = draw.one("arithmetic", "things")
    question = pattern.format(a=first, b=second, name=draw.neighbours(1)[0], kin=draw.one("kin"),
                              thing=thing, measure=thing[0])
    return question, f"{first}{'加' if add else '减'}{second}等于", answer, first, second


def _statement(draw: Draw) -> str:
    """A sum told, a row counted, or a comparison."""
    a, b = _terms(draw)
    roll = draw.rng.random()
    if roll < 0.3:
        low = draw.rng.randint(0, LARGEST_TERM)
        high = low + draw.rng.randint(3, 9)
        row = list(range(low, high + 1))
        head = draw.one("arithmetic", "counting").format(a=low, b=high)
        if draw.chance(0.4):
            row, head = row[::-1], draw.one("arithmetic", "back").format(a=low, b=high)
        return head + "、".join(map(str, row)) + "。"
    if roll < 0.5:
        return draw.one("arithmetic", "compare").format(a=a + b, b=a, c=b)
    return f"{a}加{b}等于{a + b}。" if roll < 0.75 else f"{a + b}减{a}等于{b}。"


def arithmetic_document(draw: Draw) -> str:
    """Three to six sums with their answers, now and then a sum told or a row counted first."""
    lines = [draw.one("arithmetic", "heads") + (_statement(draw) if draw.chance(0.4) else "")]
    for _ in range(draw.rng.randint(3, 6)):
        question, sentence, answer, _, _ = _sum(draw, in_words=0.15)
        lines += ["问：" + question, f"答：{sentence}{answer}。"]
    return "\n".join(lines)


def arithmetic_question(draw: Draw) -> dict:
    """A sum or difference that training never showed; wrong choices are near the answer or of the wrong kind."""
    question, sentence, answer, first, second = _sum(draw, in_words=0.15)
    near = {answer + step for step in (-3, -2, -1, 1, 2, 3)} | {first + second, abs(first - second)}
    wrong = sorted(number for number in near - {answer} if number >= 0)
    prompt = f"{draw.one('arithmetic', 'heads')}\n问：{question}\n答："
    return _item(draw, prompt, [f"{sentence}{number}。" for number in [answer, *draw.rng.sample(wrong, CHOICES - 1)]])


def _item(draw: Draw, prompt: str, choices: list[str]) -> dict:
    """Shuffles `choices`, whose first is the right one."""
    order = draw.rng.sample(range(len(choices)), len(choices))
    return {"prompt": prompt, "choices": [choices[index] for index in order], "answer": order.index(0)}
