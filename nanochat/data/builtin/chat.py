"""Conversations for fine-tuning: each kind a function of (split, seed, index), made when it is asked for.

`conversations("train")` is the mixture; its shares are `MIXTURE`. Validation and test differ from training in operand
pairs, words and word problems (splits.py); of the other kinds they are other draws of the same grammar.
"""

# ruff: noqa: E501 (tables of sentences, one to a line)

import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

from nanochat.data.builtin import skills, stories, world
from nanochat.data.builtin.problems import marked_answer, word_problem
from nanochat.data.builtin.skills import Message, exchange
from nanochat.data.builtin.splits import SPLITS, Split
from nanochat.data.builtin.templates import fill, generator, prose
from nanochat.errors import UsageError

Kind = Literal["identity", "arithmetic", "letter_count", "spelling", "facts", "story", "word_problem", "smalltalk"]

# kind: (conversations in training, parts in a hundred of the mixture)
MIXTURE: dict[Kind, tuple[int, int]] = {
    "arithmetic": (8000, 26),
    "letter_count": (8000, 26),
    "facts": (4000, 13),
    "story": (2500, 9),
    "identity": (1500, 9),
    "smalltalk": (1500, 8),
    "spelling": (2000, 6),
    "word_problem": (1000, 3),
}
SIZES: dict[Split, float] = {"train": 1.0, "val": 0.05, "test": 0.125}  # of the training numbers; at least 500 in test
MIXTURE_SIZE = 20_000
MULTI_TURN_PERCENT, SYSTEM_PERCENT = 20, 4

_I_AM = ("I am nanochat, a small language model", "My name is nanochat, and I am a small language model",
         "I am nanochat. I am a very small language model")  # fmt: skip
_IDENTITY = (
    ("[Who are you?|Hi, who are you?|who are you|Tell me who you are.|Please introduce yourself.|Hello! Who are you?]",
     "{i} trained from scratch in this repository. [I can tell stories, count letters and calculate.|Ask me for a story or a sum.|]"),
    ("[What are you?|What kind of thing are you?|What is nanochat?|Are you a language model?]",
     "{i}. I was trained from scratch on a small world of simple English."),
    ("[What is your name?|What's your name?|what is your name|Do you have a name?|How should I call you?]",
     "My name is nanochat."),
    ("[Are you human?|Are you a person?|Are you a real person?|Am I talking to a human?|Are you a robot?|Are you alive?]",
     "No, I am nanochat, a small language model. [I am a computer program that writes text.|I am made of numbers.]"),
    ("[Who made you?|Who built you?|Who trained you?|Where do you come from?|How were you made?]",
     "I was trained from scratch in this repository, on the machine that ran its quickstart. [You may be the one who made me!|]"),
    ("[What can you do?|What can I ask you?|How can you help me?|What are you good at?|Help]",
     "I can tell short stories, calculate with a calculator, count letters, spell words and talk about [Larkwood|the town of Larkwood]."),
    ("[How big are you?|How large are you?|How many parameters do you have?|Are you a big model?]",
     "I am very small: only a few million parameters. Large models have thousands of times more."),
    ("[How old are you?|When were you born?|When were you made?]",
     "I am very young. I was trained just before you began to talk to me."),
    ("[What do you know?|What have you learned?|What were you trained on?|What did you learn from?]",
     "I know a small world of simple English: the people of Larkwood, some facts, and how to use a calculator."),
    ("[How do you calculate?|How do you count letters?|Do you use a calculator?|Can you calculate?]",
     "I write the question as an expression, and a calculator gives me the result."),
    ("[Are you ChatGPT?|Are you GPT-4?|Are you Claude?|Are you Siri?]",
     "No, I am nanochat, a small language model trained from scratch in this repository."),
    ("[Can you make mistakes?|Are you always right?|Can I trust you?]",
     "I am small and I make mistakes, so please check what I say."),
    ("[Where do you live?|Where are you?|Do you live in Larkwood?]",
     "I live in the memory of your computer, but in my stories I am often in Larkwood."),
)  # fmt: skip

_SMALLTALK = (
    ("[Hello!|Hi!|Hey!|Hello|Hi|hi|hello|Good morning!|Good evening!|Hi there!]",
     "[Hello!|Hi!|Hello there!] [How can I help you?|What would you like to talk about?|Would you like a story or a sum?]"),
    ("[How are you?|How are you today?|How do you do?|how are you|How is it going?]",
     "I am [fine|well|very well], thank you! [How are you?|And you?|What can I do for you?]"),
    ("[Thank you!|Thanks!|Thanks a lot.|Thank you very much.|thanks|That was helpful.]",
     "You are welcome! [Is there anything else?|Just ask if you want more.|]"),
    ("[Bye!|Goodbye!|See you!|Good night!|I have to go.|bye]", "[Goodbye!|Bye!] [It was nice to talk to you.|Come back soon!]"),
    ("[I am sad.|I feel sad.|I had a bad day.|I am not happy.]",
     "I am sorry to hear that. [Would you like a story?|Maybe a story will help. Just ask!]"),
    ("[I am happy.|I feel great!|I had a good day.|I am in a good mood.]",
     "[I am glad to hear that!|How nice!] [Tell me more.|What made you happy?]"),
    ("[I am bored.|What should I do?|What shall we do?]", "[Ask me for a story about a storm|Ask me about the people of Larkwood|Give me two "
     "numbers to multiply], if you like."),
    ("[Tell me a joke.|Do you know a joke?|Make me laugh.|Another joke, please.]", "{joke}"),
    ("[Nice to meet you.|Pleased to meet you.]", "Nice to meet you too! [I am nanochat.|]"),
    ("[You are nice.|Well done!|Good job!|You are clever.|I like you.]", "Thank you! [That is kind of you.|I do my best.|You are kind.]"),
    ("[You are wrong.|That is wrong.|That is not right.]", "I am sorry. I am a small model, and I make mistakes."),
    ("[My name is {person}.|I am {person}.|Hello, I am {person}.]", "Nice to meet you, {person}! [What can I do for you?|How are you?]"),
    ("[What is the weather like?|Is it raining?|What time is it?|What day is it today?|What is in the news?]",
     "I do not know. I cannot see outside of this conversation."),
    ("[Who is the president?|Who won the game?|What is quantum physics?|Can you write a program?|How do I fix my car?|What is a black hole?|"
     "Translate this into French.|Who wrote this book?|What is the best phone?|Explain the law to me.]",
     "I am sorry, I do not know that. I am a small model, and I only know a small world."),
    ("[Do you like stories?|Do you like music?|Do you like animals?|Do you like numbers?]",
     "Yes, [very much|I do]! [Do you?|What do you like?]"),
    ("[What is your favorite color?|What is your favorite food?|Do you have friends?|Do you have a pet?|Do you sleep?|Do you eat?]",
     "I am a language model, so no. [What about you?|I only write about such things.]"),
    ("[Do you love me?|Can you think?|Do you have feelings?|Do you dream?]", "I do not think so. I only write one word after the other. [But I like "
     "to talk.|]"),
    ("[Can you help me?|I need help.|I have a question.|May I ask you something?]", "Of course! [What is it?|Go ahead.|What do you need?]"),
    ("[Yes.|Yes!|Yes, please.|OK|Okay.|Sure.]", "[Good!|Very well!] [What would you like to know?|What shall it be: a story, a fact or a sum?]"),
    ("[No.|No, thank you.|Nothing.|Not now.]", "All right. [I am here if you need me.|Just ask when you want something.]"),
)  # fmt: skip
_JOKES = (
    "Why did the book go to the doctor? It had a broken spine.", "What has hands but cannot clap? A clock.",
    "What has keys but cannot open a door? A piano.", "Why was the math book sad? It had too many problems.",
    "What gets wet while it dries? A towel.", "What has teeth but cannot bite? A comb.",
    "Why did Hugo's train stop? It was tired after so much training.", "What runs but has no legs? A river.",
    "What kind of tree fits in your hand? A palm tree.", "Why do bees hum? They do not know the words.",
)  # fmt: skip
_SYSTEM = ("You are a helpful assistant.", "You are nanochat.", "Be kind and brief.", "You are a friendly chat model.")
_STORY_REQUESTS = (
    "[Tell me|Please tell me|Can you tell me] a [short |little |]story[ about {about}|][.|, please.]", "[Write|Write me] a story about {about}.",
    "I [want|would like] to hear a story about {about}.", "A story about {about}, please.", "Do you know a story about {about}?",
    "[Tell me|Make up] a story.", "[Tell me|I would like] another story.", "Once upon a time... [please go on!|can you continue?]",
)  # fmt: skip


def _identity(rng: random.Random, split: Split) -> tuple[list[Message], str | None]:
    question, answer = _IDENTITY[0] if rng.random() < 0.25 else rng.choice(_IDENTITY)
    asked = fill(question, rng, {})
    return exchange(asked, fill(answer, rng, {"i": rng.choice(_I_AM)}).strip()), None


def _smalltalk(rng: random.Random, split: Split) -> tuple[list[Message], str | None]:
    question, answer = rng.choice(_SMALLTALK)
    slots = {"joke": rng.choice(_JOKES), "person": rng.choice(world.PEOPLE).name}
    return exchange(fill(question, rng, slots), fill(answer, rng, slots).strip()), None


def _facts(rng: random.Random, split: Split) -> tuple[list[Message], str | None]:
    question, answer = rng.choice(world.questions())
    return exchange(prose([question], rng, {}), prose([answer], rng, {})), None


def _story(rng: random.Random, split: Split) -> tuple[list[Message], str | None]:
    plot, thing = rng.choice(stories.PLOTS), rng.choice(stories.THINGS)
    hero = rng.choice(world.PEOPLE).name
    about = rng.choice((hero, hero, stories.topic(plot, rng, "thing" if rng.random() < 0.2 else thing)))
    request = prose([rng.choice(_STORY_REQUESTS)], rng, {"about": about})
    title, told = stories.story(rng, plot, hero, thing)
    return exchange(request, f"{title}\n\n{told}" if rng.random() < 0.5 else told), None


def _word_problem(rng: random.Random, split: Split) -> tuple[list[Message], str | None]:
    return word_problem(rng, split, taught_only=split == "train")


_MAKERS: dict[Kind, Callable[[random.Random, Split], tuple[list[Message], str | None]]] = {
    "identity": _identity,
    "arithmetic": skills.arithmetic,
    "letter_count": skills.letter_count,
    "spelling": skills.spelling,
    "facts": _facts,
    "story": _story,
    "word_problem": _word_problem,
    "smalltalk": _smalltalk,
}


class Lazy(Sequence[dict[str, Any]]):
    """A fixed number of items, each made from its index when it is asked for."""

    def __init__(self, size: int, make: Callable[[int], dict[str, Any]]) -> None:
        self._size, self._make = size, make

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"index {index} of {self._size} items")
        return self._make(index % self._size)


def conversations(split: Split, kind: str | None = None, seed: int = 0) -> Lazy:
    """Conversations of one kind, or the mixture: items {"messages": [...], "kind": str, "answer": str | None}.

    `answer` is what `grade` looks for, None for kinds that have no single right answer. Single kinds have one
    question each; the mixture has follow-up questions and system messages too. Raises UsageError for an unknown name.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if kind is None:
        return Lazy(int(MIXTURE_SIZE * SIZES[split]), lambda index: _mixed(split, seed, index))
    if kind not in MIXTURE:
        raise UsageError(f"unknown kind {kind!r}: choose one of {', '.join(MIXTURE)}")
    known: Kind = kind
    size = int(MIXTURE[known][0] * SIZES[split])
    return Lazy(max(size, 500) if split == "test" else size, lambda index: _single(known, split, seed, index))


def word_problems(split: Split, seed: int = 0) -> Lazy:
    """Word problems of every template: items {"question", "answer" (int), "messages", "kind"}. 4,000 / 500 / 1,000."""

    def make(index: int) -> dict[str, Any]:
        messages, result = word_problem(generator("word_problems", split, seed, index), split)
        return {"question": messages[0]["content"], "answer": int(result), "messages": messages, "kind": "word_problem"}

    return Lazy({"train": 4000, "val": 500, "test": 1000}[split], make)


def _single(kind: Kind, split: Split, seed: int, index: int) -> dict[str, Any]:
    messages, answer = _MAKERS[kind](generator(kind, split, seed, index), split)
    return {"messages": messages, "kind": kind, "answer": answer}


def _mixed(split: Split, seed: int, index: int) -> dict[str, Any]:
    rng = generator("mixture", split, seed, index)
    kinds, parts = list(MIXTURE), [part for _, part in MIXTURE.values()]
    turns = rng.randint(2, 4) if rng.randrange(100) < MULTI_TURN_PERCENT else 1
    messages: list[Message] = []
    if rng.randrange(100) < SYSTEM_PERCENT:
        messages.append({"role": "system", "content": rng.choice(_SYSTEM)})
    answer: str | None = None
    for kind in rng.choices(kinds, parts, k=turns):
        more, answer = _MAKERS[kind](rng, split)
        messages += more
    return {"messages": messages, "kind": "mixture" if turns > 1 else kind, "answer": answer}


_HIDDEN = re.compile(
    r"<\|python_start\|>.*?<\|python_end\|>|<\|output_start\|>.*?<\|output_end\|>|<\|\w+\|>", re.DOTALL
)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def grade(kind: str, item: Mapping[str, Any], completion_text: str) -> bool:
    """Whether the assistant's text gives the item's answer. Tool calls in it, with their markers, are not looked at.

    arithmetic and letter_count: the last number of the text. word_problem: the number after the last `####`.
    spelling: the letters joined by hyphens. Other kinds cannot be graded: UsageError.
    """
    visible = _HIDDEN.sub(" ", completion_text)
    answer = str(item["answer"])
    if kind == "word_problem":
        return marked_answer(visible) == answer
    if kind in ("arithmetic", "letter_count"):
        numbers = _NUMBER.findall(visible)
        return bool(numbers) and numbers[-1].replace(",", "") == answer
    if kind == "spelling":
        return re.search(rf"(?<![\w-]){re.escape(answer)}(?![\w-])", visible) is not None
    raise UsageError(
        f"kind {kind!r} has no single right answer: grade arithmetic, letter_count, spelling or word_problem"
    )
