"""Arithmetic, letter counting and spelling as conversations; the first two are answered through the calculator.

What the model has to learn is to copy operands and to pick the expression, so phrasings vary much and numbers evenly.
Copying is easy for attention only if the tokens are the same in the question and in the expression. Digits always are (they
split off in pairs). A word is not: after a blank it begins another token than after a quotation mark. Hence an
unquoted word is written into the expression with its blank, `" lantern".count("n")`: the same tokens, whatever the
vocabulary, and the same count. A quoted word keeps its form; no token of a vocabulary learned here joins a quotation mark
to a small letter, so its tokens are the same too.
"""

# ruff: noqa: E501 (tables of sentences, one to a line)

import random

from nanochat.data.builtin.splits import Split, held_out_words, pair_split, words
from nanochat.data.builtin.templates import fill

Message = dict[str, object]

# operator: phrasings with {a} {b} as they stand in the expression "a operator b"
_PHRASES = {
    "+": ("{a} + {b}", "{a}+{b}", "{a} plus {b}", "the sum of {a} and {b}", "{a} and {b} together", "{b} added to {a}"),
    "-": ("{a} - {b}", "{a}-{b}", "{a} minus {b}", "the difference of {a} and {b}", "{b} less than {a}",
          "{a} take away {b}"),
    "*": ("{a} * {b}", "{a}*{b}", "{a} times {b}", "{a} x {b}", "the product of {a} and {b}", "{a} multiplied by {b}"),
    "/": ("{a} / {b}", "{a}/{b}", "{a} divided by {b}", "{a} over {b}"),
}  # fmt: skip
_COMMANDS = {
    "+": ("Add {a} and {b}.", "Add {a} to {b}.", "If I have {a} and get {b} more, how many do I have?"),
    "-": ("Subtract {b} from {a}.", "Take {b} away from {a}.", "If I have {a} and give away {b}, how many are left?"),
    "*": ("Multiply {a} by {b}.", "Multiply {a} and {b}.", "How much are {a} groups of {b}?"),
    "/": ("Divide {a} by {b}.", "Share {a} among {b}.", "How often does {b} go into {a}?"),
}
_FRAMES = (
    "[What is|What's|How much is|what is] {phrase}?", "[Calculate|Compute|Work out|Find] {phrase}.", "{phrase}", "{phrase} = ?", "{phrase}?",
    "[Please|Can you] [calculate|compute|work out] {phrase}[.|, please.]", "[Can you tell me|Do you know] what {phrase} is?", "Tell me what {phrase} is.",
    "[Hi|Hello|Hey]! What is {phrase}?", "I need {phrase}.", "Let me see what you can do: {phrase}",
)  # fmt: skip
_SYMBOL_ANSWERS = {"+": "{a} + {b} = {r}", "-": "{a} - {b} = {r}", "*": "{a} x {b} = {r}", "/": "{a} / {b} = {r}"}


def tool_call(expression: str, result: int) -> list[dict[str, str]]:
    """The python part and its output; that the calculator agrees with `result` is tested, not assumed."""
    return [{"type": "python", "text": expression}, {"type": "python_output", "text": str(result)}]


def compute(a: int, op: str, b: int) -> int:
    """`a op b` in whole numbers; divisions here always come out even."""
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[op]


def number(rng: random.Random) -> int:
    """A number of one, two or three digits, each length equally likely."""
    return rng.randint(*rng.choice(((0, 9), (10, 99), (100, 999))))


def operands(rng: random.Random, op: str, split: Split) -> tuple[int, int]:
    """Operands of 1 to 3 digits whose pair belongs to `split`; division comes out even."""
    while True:
        a, b = number(rng), number(rng)
        if op == "/":
            b = max(b, 1)
            a = b * rng.randint(1, max(1, 999 // b))
        elif op == "-" and a < b and rng.random() < 0.8:
            a, b = b, a
        if pair_split(a, b) == split:
            return a, b


def arithmetic_phrase(rng: random.Random, op: str, a: int, b: int) -> str:
    """`a op b` in words or symbols, without a frame around it."""
    return rng.choice(_PHRASES[op]).format(a=a, b=b)


def arithmetic(rng: random.Random, split: Split) -> tuple[list[Message], str]:
    """One question and its answer by the calculator; returns (messages, result)."""
    op = rng.choice("++--**/")
    a, b = operands(rng, op, split)
    if rng.random() < 0.25:
        question = rng.choice(_COMMANDS[op]).format(a=a, b=b)
    else:
        question = fill(rng.choice(_FRAMES), rng, {"phrase": arithmetic_phrase(rng, op, a, b)})
        if question.startswith("the "):
            question = "T" + question[1:]
    if "among" in question and b == 1 or " groups of " in question and a == 1:
        question = f"What is {a} {op} {b}?"
    call = tool_call(f"{a}{op}{b}", compute(a, op, b))
    result = call[1]["text"]
    answer = rng.choice(("The answer is {r}.", "That is {r}.", _SYMBOL_ANSWERS[op])).format(a=a, b=b, r=result)
    return exchange(question, [*call, text(answer)]), result


_COUNT_QUESTIONS = (
    "How many {l}'s are in {w}?", "How many times does {l} [appear|occur] in {w}?", "How many {l} are there in {w}?",
    "How often does the letter {l} [appear|occur] in {w}?", "[Count|Please count] the letter {l} in {w}.",
    "[Count|Please count] the {l}'s in {w}.", "How many {l}'s [does {w} have|are there in {w}]?",
    "How many times is the letter {l} in [the word |]{w}?", "Tell me how many {l}'s are in {w}.", "Can you tell me how many {l}'s are in [the word |]{w}?",
    "In the word {w}, how many {l}'s are there?", "Take the word {w}. How many times does it have the letter {l}?",
    "How many of the letters in {w} are {l}?", "[Hi|Hello]! How many {l}'s are in {w}?", "how many {l}'s in {w}",
    "The word is {w}. How many {l}'s do you [see|find]?", "Number of {l}'s in {w}?",
)  # fmt: skip
_SYLLABLES = ("ba", "be", "bo", "ca", "co", "da", "del", "di", "er", "fa", "fen", "ga", "gol", "ha", "in", "ka", "la", "lin",
              "lo", "ma", "mi", "mo", "na", "ner", "no", "on", "pa", "pim", "po", "ra", "ri", "ro", "sa", "sel", "so", "sta",
              "ta", "ten", "ti", "tor", "tu", "un", "va", "vel", "wa", "win", "ya", "zi", "zo")  # fmt: skip


def invented_word(rng: random.Random) -> str:
    """A word that does not exist, for copying: it has no habits to fall back on.

    Half of them are the beginning of one listed word and the end of another: they are made of the very tokens that
    unseen words are made of, but knowing the listed words does not help to go on after the first.
    """
    while True:
        if rng.random() < 0.5:
            word = "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 4)))
        else:
            first, second = rng.sample(words("train"), 2)
            word = first[: rng.randint(2, len(first) - 1)] + second[rng.randint(1, len(second) - 2) :]
        if 4 <= len(word) <= 12 and word not in held_out_words():
            return word


def practice_word(rng: random.Random, split: Split) -> str:
    """A listed word of `split`; in training more often than not an invented one."""
    return invented_word(rng) if split == "train" and rng.random() < 0.6 else rng.choice(words(split))


def a_letter(rng: random.Random, word: str) -> str:
    """A letter to count in `word`: often one that stands there twice, sometimes one that may not be there at all."""
    repeated = [letter for letter in word if word.count(letter) > 1]
    if repeated and rng.random() < 0.4:
        return rng.choice(repeated)
    return rng.choice(word if rng.random() < 0.85 else "abcdefghijklmnopqrstuvwxyz")


def count_expression(word: str, letter: str, quoted: bool) -> str:
    return f'"{"" if quoted else " "}{word}".count("{letter}")'


def letter_count(rng: random.Random, split: Split) -> tuple[list[Message], str]:
    """How often a letter stands in a word, by the calculator; returns (messages, result)."""
    word = practice_word(rng, split)
    letter = a_letter(rng, word)
    quoted = rng.random() < 0.25
    shown = f'"{word}"' if quoted else word
    question = fill(rng.choice(_COUNT_QUESTIONS), rng, {"l": letter, "w": shown})
    call = tool_call(count_expression(word, letter, quoted), word.count(letter))
    result = call[1]["text"]
    answer = rng.choice((f"The letter {letter} appears {times(result)} in {shown}.",
                         f"The answer is {result}.", f"I count {result}."))  # fmt: skip
    return exchange(question, [*call, text(answer)]), result


def times(count: str) -> str:
    return f"{count} time" if count == "1" else f"{count} times"


_SPELL_QUESTIONS = (
    "[How do you spell|How is|How do I spell] {w}?", "[Spell|Please spell] [the word |]{w}.", "[Can you spell|Could you spell] {w}?",
    "What are the letters of {w}?", "Spell {w}, letter by letter.",
)  # fmt: skip


def spelling(rng: random.Random, split: Split) -> tuple[list[Message], str]:
    """The letters of a word, one by one; returns (messages, spelled word)."""
    word = practice_word(rng, split)
    question = fill(rng.choice(_SPELL_QUESTIONS), rng, {"w": word})
    if question.startswith("How is "):
        question = question[:-1] + " spelled?"
    spelled = "-".join(word)
    return exchange(question, rng.choice((f"{word}: {spelled}", f"It is spelled {spelled}."))), spelled


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


def exchange(question: str, answer: str | list[dict[str, str]]) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
