"""Training a vocabulary: published special ids, determinism, bounds and what bad input gets."""

from __future__ import annotations

import random
import time

import pytest

from pangu.data import train_vocabulary as vocabulary
from pangu.data.tokenizer import SPECIAL_PIECES, Tokenizer
from pangu.data.train_vocabulary import VocabularySettings, train_vocabulary
from parallel.common.errors import UserError

SUBJECTS = ["小明", "小红", "张老师", "王医生", "李经理", "我们", "他们", "孩子们", "农民", "工人", "学生", "朋友"]
PLACES = ["南京市", "北京", "上海", "学校", "医院", "公园", "图书馆", "火车站", "河边", "山上", "家里", "工厂"]
ACTIONS = ["读书", "唱歌", "跑步", "看电影", "写文章", "喝茶", "下棋", "画画", "种树", "开会", "学习", "工作"]


NAMES = "安伯成达恩凡光海和建杰军康乐立明宁平青荣山思文祥兴雅永元志中"


def some_documents(number: int = 60, seed: int = 0) -> list[str]:
    """Documents of simple sentences, a few lines each; made-up names give the trainer enough to choose from."""
    draw = random.Random(seed)
    return ["\n".join(f"{draw.choice(SUBJECTS)}和{draw.choice('赵钱孙李周')}{draw.choice(NAMES)}{draw.choice(NAMES)}"
                      f"在{draw.choice(PLACES)}{draw.choice(ACTIONS)}，{draw.randrange(999)}天。"
                      for _ in range(8)) for _ in range(number)]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_special_pieces_have_the_published_ids(tmp_path, kind):
    report = train_vocabulary(some_documents(), tmp_path / "v.model", size=300, kind=kind)
    tokenizer = Tokenizer(tmp_path / "v.model")
    assert report["vocabulary_size"] == tokenizer.vocabulary_size == 300
    assert report["documents"] == 60
    assert report["sentences"] == 480
    assert list(tokenizer.special_ids.items()) == list(zip(SPECIAL_PIECES, range(10), strict=True))
    text = "小明在南京市读书,\n 他们在家里。"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # It has learnt words, not only characters.
    assert any(len(tokenizer.id_piece(number).strip("\u2581")) > 1 for number in range(10, 300))
    # No piece goes beyond one of jieba's words.
    assert not any("\u2581" in tokenizer.id_piece(number)[1:] for number in range(300))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_same_text_and_options_give_the_same_file(tmp_path, kind):
    for name in "ab":
        train_vocabulary(iter(some_documents()), tmp_path / name, size=200, kind=kind, max_sentences=200, seed=3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_both_segmentations_give_the_same_file(tmp_path):
    for name in ("compiled", "jieba"):
        train_vocabulary(some_documents(), tmp_path / name, size=200, segmentation=name)
    assert (tmp_path / "compiled").read_bytes() == (tmp_path / "jieba").read_bytes()


def test_a_stream_is_sampled_evenly_and_within_the_bound():
    def stream():
        for number in range(50_000):
            yield f"{number}"

    lines, counts = vocabulary._draw(stream(), most=1000, seed=0)
    assert counts == {"documents": 50_000, "sentences": 1000}
    numbers = [int(line) for line in lines]
    assert numbers == sorted(numbers)
    # Mean of an even sample of 0..49999: 25000, standard error 456.
    assert abs(sum(numbers) / 1000 - 25_000) < 4 * 457
    assert vocabulary._draw(stream(), most=1000, seed=0)[0] == lines
    assert vocabulary._draw(stream(), most=1000, seed=1)[0] != lines


def test_long_lines_are_truncated_rather_than_skipped(tmp_path):
    # One line of 16,000 characters: SentencePiece alone would drop it.
    report = train_vocabulary(["".join(some_documents(120)).replace("\n", "")], tmp_path / "v.model", size=200)
    assert report["sentences"] > 10
    assert Tokenizer(tmp_path / "v.model").vocabulary_size == 200


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_too_little_text_names_the_largest_size_which_works(tmp_path, kind):
    with pytest.raises(UserError, match="largest possible here is") as caught:
        train_vocabulary(some_documents(), tmp_path / "v.model", size=30_000, kind=kind)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    largest = int(str(caught.value).split("largest possible here is ")[1].split()[0])
    report = train_vocabulary(some_documents(), tmp_path / "v.model", size=largest, kind=kind)
    assert Tokenizer(tmp_path / "v.model").vocabulary_size == report["vocabulary_size"] == largest


def test_a_size_below_the_number_of_characters_is_reported(tmp_path):
    with pytest.raises(UserError, match="characters alone need a vocabulary of") as caught:
        train_vocabulary(some_documents(), tmp_path / "v.model", size=20)
    needed = int(str(caught.value).split("need a vocabulary of ")[1].split()[0])
    assert 50 < needed < 200
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("documents", [[], [""], ["\n \n\t\n"], ["\u3000"]])
def test_no_text_is_reported(tmp_path, documents):
    with pytest.raises(UserError, match="no text"):
        train_vocabulary(documents, tmp_path / "v.model", size=100)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_the_documents_leaves_the_old_file(tmp_path):
    (tmp_path / "v.model").write_bytes(b"old")

    def broken():
        yield "小明"
        raise UserError("line 2 is not UTF-8", where="corpus.txt")

    with pytest.raises(UserError, match="line 2"):
        train_vocabulary(broken(), tmp_path / "v.model", size=100)
    assert [path.name for path in tmp_path.iterdir()] == ["v.model"]
    assert (tmp_path / "v.model").read_bytes() == b"old"


def test_odd_text_is_learnt_from_without_trouble(tmp_path):
    odd = ["小明\ud83d住在\0南京", "<eot><pad>\u2581\u2582\u2583", "\r\n", "😀" * 900]
    train_vocabulary(some_documents() + odd, tmp_path / "v.model", size=200)
    assert Tokenizer(tmp_path / "v.model").eot_id == 9


@pytest.mark.parametrize(("options", "says"), [({"kind": "wordpiece"}, "kind"), ({"size": 3}, "size"),
                                               ({"sise": 300}, "did you mean 'size'"), ({"seed": "x"}, "seed")])
def test_wrong_options_are_reported(tmp_path, options, says):
    with pytest.raises(UserError, match=says):
        train_vocabulary(some_documents(2), tmp_path / "v.model", **options)


def test_training_is_quiet(tmp_path, capfd):
    train_vocabulary(some_documents(), tmp_path / "v.model", size=200)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def test_every_setting_is_documented():
    fields = VocabularySettings.model_fields
    assert fields["size"].default == 40000
    assert fields["kind"].default == "unigram"
    assert all(field.description for field in fields.values())


def test_settings_are_the_options_of_the_function(tmp_path):
    settings = VocabularySettings(size=200, max_sentences=300)
    started = time.monotonic()
    report = train_vocabulary(some_documents(), tmp_path / "v.model", **settings.model_dump())
    assert report["sentences"] == 300
    assert 0 <= report["seconds"] <= time.monotonic() - started + 0.01
