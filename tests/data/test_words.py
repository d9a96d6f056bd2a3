"""Words in texts with and without blanks between them."""

import pytest

from wellposed.data.words import word_count, words_of


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A red-and-white lighthouse — at dusk, 3 birds.", "A red-and-white lighthouse at dusk, 3 birds."),
        ("un phare rouge,  l'été\n«oui»", "un phare rouge, l'été «oui»"),
        ("一座红色的灯塔，黄昏", "一 座 红 色 的 灯 塔 黄 昏"),
        ("赤い灯台が3つ、コーヒー・カップ", "赤 い 灯 台 が 3 つ コ ー ヒ ー カ ッ プ"),
        ("a sign says「営業中」today", "a sign says「 営 業 中 」today"),
        ("빨간 등대", "빨간 등대"),
        ("красный маяк", "красный маяк"),
        ("か\u3099 ﾊ 々 𠮷", "か ﾊ 々 𠮷"),
        ("🌊 … — « »", ""),
        ("", ""),
    ],
)
def test_words(text, words):
    assert words_of(text) == words.split()
    assert word_count(text) == len(words.split())
