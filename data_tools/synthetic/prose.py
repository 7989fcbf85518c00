"""The prose of the generated world: dialogues, couplets, poems, portraits, places, stories and letters."""

from __future__ import annotations

from data_tools.synthetic.words import Draw


def dialogue(draw: Draw) -> str:
    """Two people who greet, ask and answer, and part."""
    first, second = draw.names(2)
    names = {"a": second, "b": first}
    lines = [f"{first}：{draw.one('dialogue', 'greetings').format(**names)}",
             f"{second}：{draw.one('dialogue', 'replies').format(**names)}"]
    for index, (question, answers) in enumerate(draw.some(2, 4, "dialogue", "turns")):
        asker, answerer = (first, second) if index % 2 == 0 else (second, first)
        filling = draw.filling()
        lines += [f"{asker}：{question}", f"{answerer}：{draw.rng.choice(answers).format(**filling)}"]
    lines.append(f"{draw.rng.choice([first, second])}：{draw.one('dialogue', 'partings').format(kin=draw.one('kin'))}")
    return "\n".join(lines)


def couplet(draw: Draw) -> str:
    """One or two couplets: the second line answers the first word by word."""
    table, lines = draw.words["couplet"], []
    for _ in range(draw.rng.randint(1, 2)):
        pairs = [draw.rng.choice(table[part]) for part in ("openings", "verbs", "places", "ends")]
        if draw.chance(0.5):
            pairs = [pair[::-1] for pair in pairs]
        up, down = ("".join(pair[side] for pair in pairs) for side in (0, 1))
        lines.append(f"{table['head']}{up} {table['tail']}{down}")
    return "\n".join(lines)


def poem(draw: Draw) -> str:
    """Four lines of five characters under a title."""
    lines = [draw.one("poem", part) for part in ("firsts", "seconds", "thirds", "fourths")]
    return f"《{draw.one('poem', 'titles')}》{draw.names(1)[0]}\n{lines[0]}，{lines[1]}。\n{lines[2]}，{lines[3]}。"


def _told(draw: Draw, kind: str, *parts: tuple[str, int, int]) -> str:
    filling = draw.filling()
    patterns = [pattern for part, low, high in parts for pattern in draw.some(low, high, kind, part)]
    return "".join(pattern.format(**filling) for pattern in patterns)


def portrait(draw: Draw) -> str:
    """A person: where from, what they do, eat, learn and own."""
    return _told(draw, "portrait", ("openings", 1, 1), ("bodies", 2, 5), ("endings", 1, 1))


def place(draw: Draw) -> str:
    """A village or a street and who lives there."""
    return _told(draw, "place", ("openings", 1, 1), ("bodies", 2, 4), ("endings", 1, 1))


def story(draw: Draw) -> str:
    """A little story with a trouble, a turn and an end, sometimes with a proverb."""
    text = _told(draw, "story", ("openings", 1, 1), ("troubles", 1, 2), ("turns", 1, 2), ("endings", 1, 1))
    return text + (f"俗话说得好：{draw.one('proverbs')}。" if draw.chance(0.3) else "")


def letter(draw: Draw) -> str:
    """A letter in three paragraphs, signed."""
    filling = draw.filling()
    opening, ending = (draw.one("letter", part).format(**filling) for part in ("openings", "endings"))
    body = "".join(pattern.format(**filling) for pattern in draw.some(2, 4, "letter", "bodies"))
    return f"{opening}\n{body}{ending}\n{filling['name']}"


def recital(draw: Draw) -> str:
    """Someone says a row of words or facts and someone else repeats them."""
    speaker, listener = draw.names(2)
    # Words of any kind in any order: only looking back tells what comes next.
    words = [word for relation in draw.words["relations"] for word in draw.values(relation)]
    row = draw.rng.sample(words, draw.rng.randint(6, 14))
    said, repeated = draw.one("recital", "says"), draw.one("recital", "repeats")
    mark = draw.rng.choice(["，", "、", " "])
    return f"{speaker}{said}：{mark.join(row)}。\n{listener}{repeated}：{mark.join(row)}。"
