"""Every cleaning rule: a text that it takes, one that it leaves, and its boundary."""

from __future__ import annotations

import pytest

from data_tools.rules import Removal, discover

SENTENCE = "今天天气很好，我们一起去公园散步。"


def rule(name: str, **settings):
    return discover()[name](**settings)


def removed(name: str, text: str, title: str = "", **settings) -> bool:
    try:
        rule(name, **settings).apply(text, title)
    except Removal as removal:
        assert str(removal)
        return True
    return False


def test_the_eight_rules_are_found_in_their_order():
    assert list(discover()) == ["navigation", "special_symbols", "traditional", "duplicate_paragraphs", "advertisement",
                                "title_only", "chinese_share", "length"]


@pytest.mark.parametrize("han, other, goes", [(60, 40, False), (59, 41, True), (100, 0, False), (0, 50, True),
                                              (0, 0, True)])
def test_chinese_share(han, other, goes):
    assert removed("chinese_share", "中" * han + " \n" + "a" * other) is goes


def test_chinese_share_can_leave_punctuation_out():
    text = "中" * 5 + "，。！？"
    assert removed("chinese_share", text)
    assert not removed("chinese_share", text, count_punctuation=False)
    assert not removed("chinese_share", "中" * 59 + "a" * 41, minimum=0.59)


@pytest.mark.parametrize("count, goes", [(150, False), (149, True), (0, True)])
def test_length(count, goes):
    assert removed("length", "中" * count) is goes
    assert removed("length", " \n".join("中" * count)) is goes


def test_title_only():
    assert removed("title_only", "某某新闻网", title="某某新闻网")
    assert removed("title_only", "本站消息\n某某新闻网", title="本站消息 - 某某新闻网")
    assert not removed("title_only", "某某新闻网\n" + SENTENCE, title="某某新闻网")
    assert removed("title_only", " \n")
    assert removed("title_only", "中" * 60) and not removed("title_only", "中" * 61)
    assert not removed("title_only", "中" * 59 + "。")


def test_special_symbols():
    clean = rule("special_symbols").apply
    assert clean("◆标题★\ue844正文\u200b□，完。\x07", "") == "标题正文，完。"
    assert clean("“引号”、3.5℃ ￥20 a+b=c（注）—— ……\n新行", "") == "“引号”、3.5℃ ￥20 a+b=c（注）—— ……\n新行"
    assert clean("行\r\n行\u3000空", "") == "行\n行 空"
    assert clean("！" * 7 + "=" * 6, "") == "！" * 6 + "=" * 6
    assert rule("special_symbols", keep="★").apply("★◆", "") == "★"
    assert clean("哈" * 20, "") == "哈" * 20


def test_duplicate_paragraphs():
    clean = rule("duplicate_paragraphs").apply
    assert clean(f"{SENTENCE}\n别的话也要说。\n {SENTENCE}\n", "") == f"{SENTENCE}\n别的话也要说。\n"
    assert clean("中" * 10 + "\n" + "中" * 10, "") == "中" * 10
    assert clean("中" * 9 + "\n" + "中" * 9, "") == "中" * 9 + "\n" + "中" * 9


def test_advertisement():
    assert removed("advertisement", SENTENCE + "请加微信了解详情")
    assert removed("advertisement", SENTENCE + "请加qq群了解") and removed("advertisement", "请加QQ群")
    assert not removed("advertisement", SENTENCE + "他在微信上给母亲发了消息。")
    assert not removed("advertisement", "全场包邮，全场包邮", hits=2)
    assert removed("advertisement", "全场包邮，货到付款", hits=2)
    assert removed("advertisement", "某牌子", keywords=["某牌子"])


def test_advertisement_keywords_of_the_user(tmp_path):
    (tmp_path / "words.txt").write_text("# 我的\n促销\n", "utf-8")
    path = str(tmp_path / "words.txt")
    assert removed("advertisement", "大促销", keywords_file=path)
    assert not removed("advertisement", "全场包邮", keywords_file=path)


def test_traditional():
    clean = rule("traditional").apply
    assert clean("漢語與計算機", "") == "汉语与计算机"
    assert clean("頭髮發財，乾燥乾坤", "") == "头发发财，干燥乾坤"
    assert clean("汉语与计算机", "") == "汉语与计算机"


def test_navigation():
    clean = rule("navigation").apply
    assert clean(f"首页 | 新闻 | 体育 | 财经\n{SENTENCE}", "") == SENTENCE
    assert clean(f"首页 | 新闻 | 体育\n{SENTENCE}", "").startswith("首页")  # three items: below the boundary of four
    assert clean(f"{SENTENCE}\n关于我们 联系我们", "") == SENTENCE
    assert clean("首页\n新闻\n体育\n登录\n财经\n" + SENTENCE, "") == SENTENCE
    assert clean(f"首页 新闻 体育 财经\n{SENTENCE}", "") == SENTENCE
    for line in ("春眠不觉晓 处处闻啼鸟 夜来风雨声 花落知多少", "张三 李四 王五 赵六"):
        assert clean(line, "") == line
    verse = "床前明月光\n疑是地上霜\n举头望明月\n低头思故乡\n天下谁人知"
    assert clean(verse, "") == verse
    assert clean("他走到首页登录处，想了想，还是决定不注册了。" * 3, "").startswith("他走")


def test_a_rule_can_be_turned_off_and_unknown_keys_are_reported():
    from data_tools.settings import DataSettings
    from parallel.common.errors import UserError
    from parallel.common.settings import load_settings

    settings = load_settings(DataSettings, None, ["rules.length.enabled=false"])
    from data_tools.steps.clean import CleanStep

    assert "length" not in dict(CleanStep(settings.rules)._active)
    with pytest.raises(UserError, match="minimum_characters"):
        load_settings(DataSettings, None, ["rules.length.minimum_character=10"])
