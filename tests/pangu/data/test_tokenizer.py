"""The tokenizer against the release's published ids, and the fast segmentation against jieba."""

from __future__ import annotations

import copy
import itertools
import json
import lzma
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pangu.data import segmentation
from pangu.data.segmentation import Segmenter
from pangu.data.tokenizer import SPECIAL_PIECES, StreamDecoder, Tokenizer
from pangu.data.train_vocabulary import train_vocabulary
from parallel.common.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data"
PUBLISHED = SHARED / "tokenizer" / "pangu_alpha_vocab.model"
CORPUS = SHARED / "corpus" / "classics_modern_zh.jsonl.xz"

# Text and ids under the published vocabulary (jieba 0.42.1).
VECTORS = [
    ("今天是一个好天气", [465, 16, 46, 70, 2786]),
    ("四川的省会是哪里？\n", [3826, 11, 21652, 16, 1329, 28, 13, 3]),
    ("上联：欢天喜地度佳节 下联：", [39, 2401, 17, 6557, 235, 4207, 226, 2026, 13, 22025, 13, 4, 82, 2401, 17]),
    ("阅读文章：中国\n问：首都\n答：", [1195, 11774, 17, 96, 13, 3, 476, 17, 6539, 13, 3, 3330, 17]),
    ("Hello World 2021，你好！😀",
     [2142, 12372, 4541, 13, 4, 13, 29237, 13, 4, 15284, 10, 5772, 29, 13, 0]),
    ("你好，今天天气不错。", [5772, 10, 465, 235, 464, 1123, 12]),
]

VOCABULARY = 300
SMALL_TEXTS = [
    "小明住在南京市，他喜欢吃苹果。\n问：小明住在哪里？\n答：南京市。",
    "今天天气不错，我们去长江大桥看日出。 明天下雨，就在家里读书。",
    "张老师说：三加五等于八，九减四等于五。Hello World 2021",
    "这部电影很好看，演员的表演也很精彩！下联：春风送暖入屠苏。",
]


@pytest.fixture(scope="module")
def jieba_cut():
    return segmentation.plain_cut()


@pytest.fixture(scope="module")
def segmenter():
    return Segmenter("compiled")


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "small.model"
    draw = random.Random(0)
    names = "安伯成达恩凡光海建杰军康乐立明宁平青荣山思文祥兴雅永元志中的一是了我不在人们有来他这上个到大说就去"
    varied = ["".join(draw.choices(names, k=30)) for _ in range(200)]
    train_vocabulary(SMALL_TEXTS * 20 + varied, path, size=VOCABULARY, character_coverage=1.0)
    return path


@pytest.fixture(scope="module")
def tokenizer(model_file):
    return Tokenizer(model_file)


@pytest.fixture(scope="module")
def published():
    if not PUBLISHED.is_file():
        pytest.skip("the published vocabulary is not in ../shared")
    return Tokenizer(PUBLISHED)


def plain_ids(tokenizer: Tokenizer, jieba_words: list[str]) -> list[int]:
    """The release's way, word by word, written out."""
    marks = str.maketrans(" \n", "\u2582\u2583")
    return tokenizer._model.encode(" ".join([word.translate(marks) for word in jieba_words]))


# ---- segmentation -------------------------------------------------------------------------------------------------

han = st.integers(0x4E00, 0x9FD5).map(chr)
common = st.sampled_from("的一是了我不在人们有来他这上着个地到大里说就去子得也和那要下看天时过出小么起你都")
rare = st.one_of(
    st.integers(0x3400, 0x4DFF).map(chr), st.integers(0x9FCF, 0x9FFF).map(chr), st.integers(0xF900, 0xFAFF).map(chr),
    st.integers(0x20000, 0x2A6DF).map(chr), st.integers(0x2A700, 0x2EBEF).map(chr),
    st.integers(0x2F7F0, 0x323AF).map(chr),
)
connected = st.text("aZ09+#&._%-", max_size=8)
punctuation = st.sampled_from("，。！？：；、（）《》“”…—·~!@$^*()=[]{}|\\;:'\",<>/?`γβ１２ＡＢａｂ．％＿")
whitespace = st.sampled_from([" ", "\n", "\r\n", "\r", "\t", "\v", "\f", "\x1c", "\x85", "\u3000", "\u2028", "\xa0"])
emoji = st.sampled_from(["😀", "👨‍👩‍👧", "🇨🇳", "❤️", "\U0001f600", "\u2581", "\u2582", "\u2583", "\0", "\ufffd"])
surrogate = st.integers(0xD800, 0xDFFF).map(chr)
dictionary = st.sampled_from([
    "AT&T", "C++", "c#", "T恤", "卡拉OK", "K歌之王", "IP地址", "B超", "中国", "南京市长江大桥", "今天天气",
    "一九九八年", "网易", "1.5%", "v2.0-rc.1", "3.14.15", "a.b_c-d%", "www.a.com",
])
anything = st.characters(codec="utf-8")
texts = st.lists(
    st.one_of(han, common, common, rare, connected, punctuation, whitespace, emoji, dictionary, anything), max_size=40
).map("".join)


@settings(max_examples=1000, deadline=None)
@given(text=texts)
def test_fast_segmentation_equals_jieba_on_any_text(segmenter, jieba_cut, text):
    assert segmenter.cut(text) == jieba_cut(text)


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.one_of(common, surrogate, connected, rare), max_size=12).map("".join))
def test_fast_segmentation_equals_jieba_on_lone_surrogates(segmenter, jieba_cut, text):
    assert segmenter.cut(text) == jieba_cut(text)


def test_fast_segmentation_equals_jieba_on_every_short_run_of_its_symbols(segmenter, jieba_cut):
    # One character of each class that either package's patterns know; every text of up to 5 of them, and Chinese
    # characters before, between and behind for up to 4.
    every = itertools.chain(
        *(itertools.product("a1+#&._%-", repeat=length) for length in range(6)),
        *(itertools.product("a1.%-_天的", repeat=length) for length in range(5)),
    )
    wrong = [text for text in map("".join, every) if segmenter.cut(text) != jieba_cut(text)]
    assert wrong == []


def test_fast_segmentation_equals_jieba_on_every_word_of_its_dictionary(segmenter, jieba_cut):
    import jieba

    with jieba.get_dict_file() as file:
        words = [line.decode().split(" ")[0] for line in file]
    assert len(words) > 300_000
    chosen = words[::29] + [word for word in words if word.isascii() or not word.isalpha()]
    assert [word for word in chosen if segmenter.cut(word) != jieba_cut(word)] == []


def test_fast_segmentation_equals_jieba_where_two_are_nearly_as_good(segmenter, jieba_cut):
    # The two best cuts differ by 1.5e-7 in log probability: probabilities of six decimals would take the other one.
    assert jieba_cut("常在他") == segmenter.cut("常在他") == ["常", "在", "他"]


def test_fast_segmentation_equals_jieba_on_runs_for_the_markov_model(segmenter, jieba_cut):
    # Surnames and rare characters, of which few words are in the dictionary, go through the hidden Markov model.
    draw = random.Random(0)
    runs = ["".join(chr(draw.randint(0x4E00, 0x9FD5)) for _ in range(draw.randint(2, 30))) for _ in range(2000)]
    assert [run for run in runs if segmenter.cut(run) != jieba_cut(run)] == []


def test_probes_are_what_jieba_gives(jieba_cut):
    assert {text: jieba_cut(text) for text in segmentation._PROBES} == segmentation._PROBES


def test_words_added_to_jieba_do_not_reach_the_segmentation(jieba_cut, segmenter):
    import jieba

    text = "他爱吃苹果派小饼"
    before = jieba_cut(text)
    jieba.add_word("苹果派小饼", freq=10_000_000)
    try:
        assert jieba.lcut(text) != before
        assert jieba_cut(text) == segmenter.cut(text) == before
    finally:
        jieba.del_word("苹果派小饼")
        jieba.finalseg.Force_Split_Words.discard("苹果派小饼")


@pytest.mark.parametrize("trouble", ["no compiler", "compiler fails", "no place"])
def test_without_the_compiled_segmentation_jieba_is_used_and_it_is_logged_once(
    monkeypatch, capsys, tmp_path, tokenizer, model_file, trouble
):
    says = {"no compiler": "no C++ compiler found", "compiler fails": "failed", "no place": "no place"}[trouble]
    cache = tmp_path / "cache"
    if trouble == "no place":
        cache.write_text("a file, not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(segmentation, "_COMPILERS", {"no compiler": ("no-such-compiler",)}.get(trouble, ("false",)))
    monkeypatch.setattr(segmentation, "_shared", [])
    monkeypatch.setattr(segmentation, "_said", set())
    slow, again = Tokenizer(model_file), Tokenizer(model_file)
    assert slow.engine == again.engine == "jieba"
    output = capsys.readouterr().err.strip().splitlines()
    assert len(output) == 1
    assert says in output[0]
    texts = [*SMALL_TEXTS, "小明\r\n住在 \ud83d南京"]
    assert [slow.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
    with pytest.raises(UserError, match="fast segmentation cannot be used"):
        Segmenter("compiled")


def test_a_build_that_segments_otherwise_is_not_used(monkeypatch, capsys):
    class Otherwise:
        def cut(self, text):
            return list(text)

    monkeypatch.setattr(segmentation, "_shared", [Otherwise()])
    monkeypatch.setattr(segmentation, "_said", set())
    assert Segmenter().engine == "jieba"
    assert "differs from jieba" in capsys.readouterr().err


def test_the_compiled_segmentation_is_built_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = segmentation._library()
    assert first.is_file()
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    monkeypatch.setattr(segmentation, "_COMPILERS", ("no-such-compiler",))
    assert segmentation._library() == first


def test_unknown_engine_is_refused():
    with pytest.raises(UserError, match="auto, compiled or jieba"):
        Segmenter("nltk")


# ---- the published vocabulary ---------------------------------------------------------------------------------------


@pytest.mark.shared_data
@pytest.mark.parametrize("engine", ["compiled", "jieba"])
def test_published_vectors(engine):
    if not PUBLISHED.is_file():
        pytest.skip("the published vocabulary is not in ../shared")
    tokenizer = Tokenizer(PUBLISHED, engine=engine)
    assert [tokenizer.encode(text) for text, _ in VECTORS] == [ids for _, ids in VECTORS]
    assert [tokenizer.encode(text) for text, _ in VECTORS] == [ids for _, ids in VECTORS]
    assert tokenizer.decode(VECTORS[2][1]) == "上联:欢天喜地度佳节 下联:"
    assert tokenizer.decode(VECTORS[1][1]) == "四川的省会是哪里?\n"


@pytest.mark.shared_data
def test_published_special_ids(published):
    assert published.vocabulary_size == 40000
    assert list(published.special_ids.items()) == list(zip(SPECIAL_PIECES, range(10), strict=True))
    assert (published.eot_id, published.pad_id, published.unknown_id) == (9, 6, 0)


@pytest.mark.shared_data
def test_published_ids_of_a_sample_of_the_corpus(published, jieba_cut):
    if not CORPUS.is_file():
        pytest.skip("the corpus is not in ../shared")
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        sample = [json.loads(line)["text"][:20_000] for line in itertools.islice(file, 0, 3000, 60)]
    for text in sample:
        words = jieba_cut(text)
        assert published.words(text) == words
        assert published.encode(text) == plain_ids(published, words)


@pytest.mark.slow
@pytest.mark.shared_data
def test_published_ids_of_the_whole_corpus(published, jieba_cut):
    if not CORPUS.is_file():
        pytest.skip("the corpus is not in ../shared")
    documents = characters = 0
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            text, words = record["text"], jieba_cut(record["text"])
            assert published.words(text) == words, record["id"]
            assert published.encode(text) == plain_ids(published, words), record["id"]
            documents, characters = documents + 1, characters + len(text)
    assert documents > 5000
    assert characters > 25_000_000


# ---- encoding and decoding with a small vocabulary ------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(text=texts)
def test_ids_equal_the_release_s_way(tokenizer, jieba_cut, text):
    assert tokenizer.encode(text) == plain_ids(tokenizer, jieba_cut(text))


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_decoding_an_encoding_settles(tokenizer, text):
    # The round trip loses what the normaliser and unknown characters lose, and then nothing more.
    once = tokenizer.decode(tokenizer.encode(text)).replace("\u2047", "")
    twice = tokenizer.decode(tokenizer.encode(once)).replace("\u2047", "")
    assert tokenizer.decode(tokenizer.encode(twice)).replace("\u2047", "") == twice


def test_spaces_and_newlines_survive(tokenizer):
    for text in ("小明 住在\n南京市", "\n\n小明", "小明  小明 ", " \n "):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_windows_line_ends_are_encoded_as_the_release_does(tokenizer, jieba_cut):
    assert "\r\n" in jieba_cut("小明\r\n住在")
    assert tokenizer.encode("小明\r\n住在") == plain_ids(tokenizer, jieba_cut("小明\r\n住在"))


@pytest.mark.parametrize("special", SPECIAL_PIECES[5:] + SPECIAL_PIECES[:3])
def test_special_tokens_never_come_out_of_text(tokenizer, special):
    ids = tokenizer.encode(f"小明{special}住在{special}")
    allowed = {tokenizer.special_ids["<unk>"]}
    assert not (set(ids) & set(tokenizer.special_ids.values())) - allowed
    assert tokenizer.special_ids[special] not in ids or special == "<unk>"


def test_special_ids_decode_to_their_names(tokenizer):
    assert tokenizer.decode([tokenizer.eot_id, tokenizer.pad_id]) == "<eot><pad>"
    assert tokenizer.decode([tokenizer.unknown_id]) == "\u2047"
    assert tokenizer.decode([]) == ""


ids_lists = st.lists(st.integers(0, VOCABULARY - 1), max_size=40)


@settings(max_examples=300, deadline=None)
@given(ids=ids_lists)
def test_streamed_text_equals_decoded_text(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    shown = ""
    for count, number in enumerate(ids, 1):
        shown += decoder.feed(number)
        assert shown == tokenizer.decode(ids[:count])
    assert shown + decoder.finish() == tokenizer.decode(ids)


def streamed(tokenizer, ids):
    decoder = tokenizer.stream()
    return [*map(decoder.feed, ids), decoder.finish()]


def test_streaming_holds_bytes_until_they_make_characters(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["小明 住在 南京市 ，"] * 20), model_writer=model, vocab_size=300, byte_fallback=True,
        user_defined_symbols=list(SPECIAL_PIECES[3:]), minloglevel=3, hard_vocab_limit=False)
    (tmp_path / "bytes.model").write_bytes(model.getvalue())
    tokenizer = Tokenizer(tmp_path / "bytes.model")
    ids = tokenizer.encode("小明😀住在🀄龘")
    assert tokenizer.decode(ids) == "小明😀住在🀄龘"
    shown = streamed(tokenizer, ids)
    assert "".join(shown) == "小明😀住在🀄龘"
    assert all("\ufffd" not in text for text in shown)
    assert "".join(streamed(tokenizer, ids[:-1])) == tokenizer.decode(ids[:-1])


@pytest.mark.parametrize("number", [-1, VOCABULARY, 10**9])
def test_an_id_outside_the_vocabulary_is_reported(tokenizer, number):
    for attempt in (lambda: tokenizer.decode([3, number]), lambda: tokenizer.stream().feed(number),
                    lambda: tokenizer.id_piece(number)):
        with pytest.raises(UserError, match="outside the vocabulary of 300"):
            attempt()


def test_a_lone_surrogate_counts_as_the_replacement_character(tokenizer):
    assert tokenizer.encode("小明\ud83d住在") == tokenizer.encode("小明\ufffd住在")


def test_a_copy_made_for_another_process_gives_the_same_ids(tokenizer):
    other = copy.copy(tokenizer)
    assert other is not tokenizer
    assert other.encode(SMALL_TEXTS[0]) == tokenizer.encode(SMALL_TEXTS[0])
    assert other.fingerprint == tokenizer.fingerprint


# ---- files that are no vocabulary -----------------------------------------------------------------------------------


def test_missing_model_is_reported_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no such vocabulary file") as caught:
        Tokenizer(tmp_path / "nothing.model")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such vocabulary file"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("damage", ["empty", "text", "zeros", "first half", "cut end"])
def test_damaged_model_is_reported_in_one_line(tmp_path, model_file, damage, capfd):
    full = model_file.read_bytes()
    content = {"empty": b"", "text": "今天天气不错".encode() * 50, "zeros": bytes(4096),
               "first half": full[: len(full) // 2], "cut end": full[:-500]}[damage]
    path = tmp_path / "damaged.model"
    path.write_bytes(content)
    # A model that says its own digest is found changed before it is parsed.
    with pytest.raises(UserError, match="not a SentencePiece model|it has changed since it was written") as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_model_of_another_family_is_reported(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["今天 天气 不错"] * 20), model_writer=model, vocab_size=20, minloglevel=3,
        hard_vocab_limit=False)
    path = tmp_path / "other.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(UserError, match="no piece <eot>"):
        Tokenizer(path)


def test_importing_the_tokenizer_does_not_load_mindspore():
    code = "import sys, pangu.data.tokenizer, pangu.data.train_vocabulary; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
