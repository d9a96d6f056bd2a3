"""Captions of digit scenes: one small grammar, written out in five languages and three degrees of detail.

A template is a sentence or several with slots in braces, ``{ink}``, and alternatives in brackets, ``[one|a single]``.
Slots are filled with the form of the word that the sentence needs there: French ink is feminine, its strokes are a
masculine plural. Which template and which alternatives a scene gets is a hash of the scene, so that captions vary and
still are the same wherever they are asked for.
"""

import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import cache
from itertools import product
from typing import Literal, get_args

from wellposed.data.digit_scenes import DigitScene, attributes, stable_number

__all__ = ["LANGUAGES", "STYLES", "Language", "Style", "caption", "mentioned"]

Style = Literal["dense", "medium", "brief"]
Language = Literal["en", "zh", "fr", "ja", "es"]

STYLES: tuple[Style, ...] = get_args(Style)
LANGUAGES: tuple[Language, ...] = get_args(Language)

MENTIONED: Mapping[Style, tuple[str, ...]] = {
    "dense": ("digit", "colour", "position", "background"),
    "medium": ("digit", "colour"),
    "brief": ("digit",),
}

ALTERNATIVES = re.compile(r"\[([^\]]*)\]")
SENTENCE_START = re.compile(r"(?:^|(?<=\. ))\w")


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """A language.

    Attributes:
        words: for each property of a scene the slots that speak of it, and for each slot one word or phrase per class,
            in the order of :data:`wellposed.data.digit_scenes.ATTRIBUTES`.
        templates: what is said, in each style.
    """

    words: Mapping[str, Mapping[str, tuple[str, ...]]]
    templates: Mapping[Style, tuple[str, ...]]


def caption(scene: DigitScene, *, style: Style = "dense", language: Language = "en", variant: int = 0) -> str:
    """What the scene shows, in words.

    Args:
        scene: what is described.
        style: "dense" says everything in two or three sentences, "medium" names digit and ink, "brief" the digit only.
        language: "en", "zh", "fr", "ja" or "es".
        variant: another number, another wording (now and then the same one).

    Raises:
        ValueError: an unknown style or language.
    """
    _check_style(style)
    if language not in LANGUAGES:
        raise ValueError(f"language is {language!r}; write one of {', '.join(map(repr, LANGUAGES))}")
    number = stable_number("caption", *astuple(scene), style, language, variant)
    templates = _wordings(style, language)
    number, template = divmod(number, len(templates))
    sentences = templates[template][number % len(templates[template])]
    classes = attributes(scene)
    forms = {
        slot: words[classes[name]] for name, slots in GRAMMARS[language].words.items() for slot, words in slots.items()
    }
    return SENTENCE_START.sub(lambda found: found[0].upper(), sentences.format(**forms))


def mentioned(style: Style) -> tuple[str, ...]:
    """The properties that a caption of this style speaks of.

    Raises:
        ValueError: an unknown style.
    """
    _check_style(style)
    return MENTIONED[style]


@cache
def _wordings(style: Style, language: Language) -> tuple[tuple[str, ...], ...]:
    """For each template, what it becomes by every choice of alternatives."""
    found: list[tuple[str, ...]] = []
    for template in GRAMMARS[language].templates[style]:
        # Split at a pattern with one group: text and alternatives take turns, text first and last.
        parts = [part.split("|") if i % 2 else [part] for i, part in enumerate(ALTERNATIVES.split(template))]
        found.append(tuple("".join(reversed(chosen)) for chosen in product(*reversed(parts))))
    return tuple(found)


def _check_style(style: str) -> None:
    if style not in STYLES:
        raise ValueError(f"style is {style!r}; write one of {', '.join(map(repr, STYLES))}")


ENGLISH = Grammar(
    words={
        "digit": {"digit": ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")},
        "colour": {"ink": ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")},
        "position": {
            "place": (
                "in the upper left",
                "in the upper right",
                "in the lower left",
                "in the lower right",
                "in the centre",
            ),
            "borders": (
                "close to the top and left edges",
                "close to the top and right edges",
                "close to the bottom and left edges",
                "close to the bottom and right edges",
                "well away from every edge",
            ),
        },
        "background": {"ground": ("grey", "brown", "pink", "turquoise", "beige", "lavender")},
    },
    templates={
        "dense": (
            "[A single|One] digit {digit}, written by hand in {ink} ink, [stands|sits] {place} of the picture, "
            "{borders}. The background is [a plain|an even] {ground}, and nothing else [is drawn|appears] on it.",
            "On [a plain|an even] {ground} background, {place} of the picture and {borders}, there is a handwritten "
            "digit. It is the digit {digit}, [drawn|written] in {ink} strokes.",
            "The picture [shows|holds] [one|a single] handwritten digit on a {ground} ground. The digit is {digit} and "
            "its ink is {ink}. It [was placed|lies] {place}, {borders}.",
            "{place} of [the image|this picture], {borders}, someone has written the digit {digit} by hand. The ink is "
            "{ink}; the ground [around it|underneath] is [plain|evenly] {ground} and otherwise [empty|bare].",
            "{ink} ink on [plain|even] {ground}: here is the digit {digit}, written by hand. It [stands|can be found] "
            "{place} of the [picture|image], {borders}.",
            "The whole picture is [plain|evenly] {ground} but for one {ink} digit, [drawn|written] by hand. It is the "
            "digit {digit}, and it [stands|sits] {place}, {borders}.",
        ),
        "medium": (
            "The digit {digit} in {ink} ink.",
            "A handwritten digit {digit}, [drawn|written] in {ink}.",
            "The {ink} handwritten digit {digit}.",
        ),
        "brief": (
            "The handwritten digit {digit}.",
            "[The|A] digit {digit}, written by hand.",
            "The digit {digit}.",
            "A picture of the digit {digit}.",
        ),
    },
)

CHINESE = Grammar(
    words={
        "digit": {"digit": tuple("零一二三四五六七八九")},
        "colour": {"ink": ("红色", "绿色", "蓝色", "黄色", "紫色", "橙色", "白色", "黑色")},
        "position": {
            "place": ("左上角", "右上角", "左下角", "右下角", "正中央"),
            "borders": ("靠近上边和左边", "靠近上边和右边", "靠近下边和左边", "靠近下边和右边", "离四边都很远"),
        },
        "background": {"ground": ("灰色", "棕色", "粉色", "绿松石色", "米色", "薰衣草色")},
    },
    templates={
        "dense": (
            "[一个|单独一个]手写的数字{digit}用{ink}墨水写在图片的{place}，{borders}。背景是[纯净|均匀]的{ground}，"
            "上面没有[其他|别的]内容。",
            "在{ground}的[纯色|单色]背景上，图片的{place}[有|写着]一个手写数字，{borders}。它是数字{digit}，笔画是"
            "{ink}的。",
            "[这张图片|画面]里只有一个手写数字，背景为{ground}。这个数字是{digit}，墨水是{ink}的。它[位于|处在]"
            "{place}，{borders}。",
            "在图片的{place}，{borders}的[地方|位置]，有人手写了数字{digit}。墨水是{ink}的，周围的背景[全是|都是]"
            "{ground}，没有别的东西。",
            "{ink}墨水，{ground}背景：[这是|这里是]手写的数字{digit}。它[位于|出现在]图片的{place}，{borders}。",
            "整张图片都是[纯净|均匀]的{ground}，只有一个{ink}的手写数字。这是数字{digit}，[位于|写在]{place}，"
            "{borders}。",
        ),
        "medium": ("用{ink}墨水写的数字{digit}。", "一个{ink}的手写数字{digit}。", "手写的{ink}数字{digit}。"),
        "brief": ("手写的数字{digit}。", "一个手写数字{digit}。", "数字{digit}。", "数字{digit}的图片。"),
    },
)

FRENCH = Grammar(
    words={
        "digit": {"digit": ("zéro", "un", "deux", "trois", "quatre", "cinq", "six", "sept", "huit", "neuf")},
        "colour": {
            "ink": ("rouge", "vert", "bleu", "jaune", "violet", "orange", "blanc", "noir"),
            "ink_feminine": ("rouge", "verte", "bleue", "jaune", "violette", "orange", "blanche", "noire"),
            "ink_plural": ("rouges", "verts", "bleus", "jaunes", "violets", "orange", "blancs", "noirs"),
        },
        "position": {
            "place": ("en haut à gauche", "en haut à droite", "en bas à gauche", "en bas à droite", "au centre"),
            "borders": (
                "près des bords supérieur et gauche",
                "près des bords supérieur et droit",
                "près des bords inférieur et gauche",
                "près des bords inférieur et droit",
                "loin de tous les bords",
            ),
        },
        "background": {"ground": ("gris", "marron", "rose", "turquoise", "beige", "lavande")},
    },
    templates={
        "dense": (
            "Un [seul|unique] chiffre {digit}, écrit à la main à l'encre {ink_feminine}, [se trouve|figure] {place} de "
            "l'image, {borders}. Le fond est d'un {ground} uni et rien d'autre n'y [apparaît|est dessiné].",
            "Sur un fond {ground} uni, {place} de l'image et {borders}, on [voit|lit] un chiffre manuscrit. C'est le "
            "chiffre {digit}, dessiné [en|avec des] traits {ink_plural}.",
            "L'image [montre|contient] un seul chiffre manuscrit sur un fond {ground}. Ce chiffre est le {digit} et "
            "son encre est {ink_feminine}. Il [est placé|se trouve] {place}, {borders}.",
            "{place} de [l'image|cette image], {borders}, quelqu'un a écrit à la main le chiffre {digit}. L'encre est "
            "{ink_feminine} ; le fond est [uniformément|entièrement] {ground} et vide [pour le reste|par ailleurs].",
            "De l'encre {ink_feminine} sur un fond {ground} : [voici|c'est] le chiffre {digit}, écrit à la main. "
            "[On le trouve|Il se tient] {place} de l'image, {borders}.",
            "Toute l'image est d'un {ground} uni, [sauf|excepté] un chiffre {ink}, [tracé|écrit] à la main. C'est le "
            "chiffre {digit}, et il se trouve {place}, {borders}.",
        ),
        "medium": (
            "Le chiffre {digit} à l'encre {ink_feminine}.",
            "Un chiffre {digit} manuscrit, [tracé|écrit] en {ink}.",
            "Le chiffre {digit}, {ink} et manuscrit.",
        ),
        "brief": (
            "Le chiffre {digit}, manuscrit.",
            "Le chiffre {digit}.",
            "Un chiffre {digit} manuscrit.",
            "Une image du chiffre {digit}.",
        ),
    },
)

JAPANESE = Grammar(
    words={
        "digit": {"digit": tuple("零一二三四五六七八九")},
        "colour": {
            "ink": ("赤", "緑", "青", "黄色", "紫", "オレンジ色", "白", "黒"),
            "ink_before_noun": ("赤い", "緑の", "青い", "黄色い", "紫の", "オレンジ色の", "白い", "黒い"),
        },
        "position": {
            "place": ("左上", "右上", "左下", "右下", "中央"),
            "borders": (
                "上と左の端に近い",
                "上と右の端に近い",
                "下と左の端に近い",
                "下と右の端に近い",
                "どの端からも遠い",
            ),
        },
        "background": {
            "ground": ("灰色", "茶色", "ピンク色", "ターコイズ色", "ベージュ色", "ラベンダー色"),
        },
    },
    templates={
        "dense": (
            "手書きの数字の{digit}が[一つだけ|ただ一つ]、{ink_before_noun}インクで画像の{place}に書かれています。"
            "{borders}[位置|場所]です。背景は[無地の|一様な]{ground}で、ほかには何も[ありません|描かれていません]。",
            "[無地の|一様な]{ground}の背景の上、画像の{place}の{borders}所に、手書きの数字が[あります|見えます]。"
            "それは数字の{digit}で、{ink_before_noun}線で[描かれて|書かれて]います。",
            "[この画像|この絵]には、{ground}の背景に手書きの数字が一つあります。数字は{digit}で、インクの色は{ink}です。"
            "[位置|場所]は{place}で、{borders}所にあります。",
            "画像の{place}、{borders}所に、誰かが手で数字の{digit}を書きました。インクは{ink}で、周りの背景は"
            "[すべて|一面]{ground}、ほかには何もありません。",
            "{ground}の[地|背景]に{ink_before_noun}インク。これは手書きの数字の{digit}です。画像の{place}、{borders}"
            "[所|位置]に[あります|書かれています]。",
            "画像全体は[無地の|一様な]{ground}で、{ink_before_noun}手書きの数字が一つだけあります。それは数字の{digit}で、"
            "{place}の{borders}[所|位置]にあります。",
        ),
        "medium": (
            "{ink_before_noun}インクで書かれた数字の{digit}。",
            "手書きの{ink_before_noun}数字、{digit}。",
            "{ink_before_noun}手書きの数字の{digit}。",
        ),
        "brief": ("手書きの数字の{digit}。", "手で書かれた数字の{digit}。", "数字の{digit}。", "数字の{digit}の画像。"),
    },
)

SPANISH = Grammar(
    words={
        "digit": {"digit": ("cero", "uno", "dos", "tres", "cuatro", "cinco", "seis", "siete", "ocho", "nueve")},
        "colour": {
            "ink": ("rojo", "verde", "azul", "amarillo", "morado", "naranja", "blanco", "negro"),
            "ink_feminine": ("roja", "verde", "azul", "amarilla", "morada", "naranja", "blanca", "negra"),
            "ink_plural": ("rojos", "verdes", "azules", "amarillos", "morados", "naranjas", "blancos", "negros"),
        },
        "position": {
            "place": (
                "en la parte superior izquierda",
                "en la parte superior derecha",
                "en la parte inferior izquierda",
                "en la parte inferior derecha",
                "en el centro",
            ),
            "borders": (
                "cerca de los bordes superior e izquierdo",
                "cerca de los bordes superior y derecho",
                "cerca de los bordes inferior e izquierdo",
                "cerca de los bordes inferior y derecho",
                "lejos de todos los bordes",
            ),
        },
        "background": {"ground": ("gris", "marrón", "rosa", "turquesa", "beige", "lavanda")},
    },
    templates={
        "dense": (
            "Un [solo|único] número {digit}, escrito a mano con tinta {ink_feminine}, [está|aparece] {place} de la "
            "imagen, {borders}. El fondo es de un {ground} liso y no [hay|se ve] nada más [en|sobre] él.",
            "Sobre un fondo {ground} liso, {place} de la imagen y {borders}, [se ve|hay] una cifra manuscrita. Es el "
            "número {digit}, [dibujado|hecho] con trazos {ink_plural}.",
            "La imagen [muestra|contiene] una sola cifra manuscrita sobre un fondo {ground}. La cifra es el {digit} y "
            "su tinta es {ink_feminine}. [Está|Se encuentra] {place}, {borders}.",
            "{place} de [la|esta] imagen, {borders}, alguien ha escrito a mano el número {digit}. La tinta es "
            "{ink_feminine}; el fondo es [enteramente|uniformemente] {ground} y por lo demás [está vacío|no hay nada].",
            "Tinta {ink_feminine} sobre un fondo {ground}: [este es|aquí está] el número {digit}, escrito a mano. "
            "[Aparece|Se encuentra] {place} de la imagen, {borders}.",
            "Toda la imagen es de un {ground} liso, salvo un número {ink}, [escrito|trazado] a mano. Es el {digit}, y "
            "[está|se halla] {place}, {borders}.",
        ),
        "medium": (
            "El número {digit} en tinta {ink_feminine}.",
            "Un número {digit} manuscrito, [trazado|escrito] en {ink}.",
            "El número {digit}, {ink} y manuscrito.",
        ),
        "brief": (
            "El número {digit}, manuscrito.",
            "El número {digit}.",
            "Un número {digit} manuscrito.",
            "Una imagen del número {digit}.",
        ),
    },
)

GRAMMARS: Mapping[Language, Grammar] = {
    "en": ENGLISH,
    "zh": CHINESE,
    "fr": FRENCH,
    "ja": JAPANESE,
    "es": SPANISH,
}
