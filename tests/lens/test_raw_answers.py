"""What is read out of raw answers in GPT-OSS's format, with thoughts, and wrapped up."""

import pytest

from wellposed.lens.raw_answers import read_answer

FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"


@pytest.mark.parametrize(
    ("answer", "description"),
    [
        ("A red fox.", "A red fox."),
        ("  A red\n\n fox\t. ", "A red fox ."),
        ("黄昏的 红色灯塔", "黄昏的 红色灯塔"),
        ("夕暮れの赤い灯台 🌊", "夕暮れの赤い灯台 🌊"),
        (f"{ANALYSIS}They want a fox.<|end|><|start|>assistant{FINAL}A red fox.<|return|>", "A red fox."),
        (f"{FINAL}A draft.<|end|><|start|>assistant{FINAL}A red fox.", "A red fox."),
        ("<|channel|>final <|constrain|>text<|message|>A red fox.<|end|>", "A red fox."),
        (f"{FINAL}<|return|>", ""),
        (f"{ANALYSIS}They want a fox, a final", ""),
        ("<|channel|>commentary<|message|>A red fox.", ""),
        ("analysisThey want a fox.assistantfinalA red fox.", "A red fox."),
        ("assistantfinalA red fox.", "A red fox."),
        ("analysisThey want a fox.", ""),
        ("analysis用户想要狐狸。assistantfinal一只红狐狸", "一只红狐狸"),
        ("analysis of a painting, hung in a museum", "analysis of a painting, hung in a museum"),
        ("Analysis charts on a wall", "Analysis charts on a wall"),
        ("<think>They want\na fox.</think>A red fox.", "A red fox."),
        ("They want a fox.</think>\n\nA red fox.", "A red fox."),
        ("<THINKING>one</THINKING>A red <think>two</think>fox.", "A red fox."),
        ("<think>They want a fox, and", ""),
        ("A red fox.<|im_end|><|endoftext|>", "A red fox."),
        ("```\nA red fox.\n```", "A red fox."),
        ("```text\nA red\nfox.\n```", "A red fox."),
        ('"A red fox."', "A red fox."),
        ("“A red fox.”", "A red fox."),
        ("«Un renard roux.»", "Un renard roux."),
        ("「赤い狐」", "赤い狐"),
        ('```\n"A red fox."\n```', "A red fox."),
        ('"OPEN" above a door that says "CLOSED"', '"OPEN" above a door that says "CLOSED"'),
        ('A sign that says "OPEN"', 'A sign that says "OPEN"'),
        ('"', '"'),
        ("", ""),
    ],
)
def test_what_is_read_out_of_an_answer(answer, description):
    assert read_answer(answer) == description
    assert read_answer(description) == description
