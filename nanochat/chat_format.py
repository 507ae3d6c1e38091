"""How a conversation becomes tokens, and which of them the model is asked to learn.

    <|bos|> <|user_start|> text <|user_end|> <|assistant_start|> parts <|assistant_end|> <|user_start|> ...

An assistant's parts are text, python (<|python_start|> expression <|python_end|>) and the tool's answer to it
(<|output_start|> text <|output_end|>). A system message has no tokens of its own: it opens the first user message, with
a blank line between. The model learns what it must say itself: the assistant's text, its python parts with their
markers, and <|assistant_end|>. The tool's output is forced in when generating, so it is read, never learned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from nanochat.errors import UsageError
from nanochat.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]
PartType = Literal["text", "python", "python_output"]

# The markers around a part, and whether the part is learned.
_PARTS: dict[str, tuple[str | None, str | None, bool]] = {
    "text": (None, None, True),
    "python": ("<|python_start|>", "<|python_end|>", True),
    "python_output": ("<|output_start|>", "<|output_end|>", False),
}


@dataclass(frozen=True)
class Part:
    """A stretch of an assistant's message."""

    type: PartType
    text: str


@dataclass(frozen=True)
class Message:
    """One turn. Only an assistant's may have parts that are not text."""

    role: Role
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """The texts of all parts, joined."""
        return "".join(part.text for part in self.parts)


@dataclass(frozen=True)
class Conversation:
    """Messages in a valid order: at most one system message, first; then user and assistant in turn."""

    messages: tuple[Message, ...]

    @classmethod
    def parse(cls, data: Any) -> "Conversation":
        """From {"messages": [...]} or the list itself, each message {"role": ..., "content": text or parts}.

        Raises UsageError naming the message that is wrong, what is wrong with it, and what would be right.
        """
        if isinstance(data, Conversation):
            return data
        messages = data.get("messages") if isinstance(data, Mapping) else data
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
            raise UsageError(f"a conversation is a list of messages, or an object with `messages`; not {_show(data)}")
        parsed = tuple(_parse_message(message, index) for index, message in enumerate(messages))
        _check_order(parsed)
        return cls(parsed)

    def without_system(self) -> tuple[Message, ...]:
        """The messages, a system message prepended to the first user message with a blank line between."""
        if self.messages[0].role != "system":
            return self.messages
        system, user, *rest = self.messages
        return (replace(user, parts=(Part("text", f"{system.text}\n\n{user.text}"),)), *rest)


def render(tokenizer: Tokenizer, conversation: Any, max_tokens: int | None = None) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and a mask of equal length: 1 where the token is learned, 0 elsewhere.

    `conversation` is a Conversation or what `Conversation.parse` takes. Both lists are cut to `max_tokens`.
    """
    ids, mask = [tokenizer.bos_id], [0]

    def add(new: list[int], learned: bool) -> None:
        ids.extend(new)
        mask.extend([int(learned)] * len(new))

    def special(name: str, learned: bool = False) -> None:
        add([tokenizer.encode_special(name)], learned)

    for message in Conversation.parse(conversation).without_system():
        special(f"<|{message.role}_start|>")
        if message.role == "user":
            add(tokenizer.encode(message.text), False)
        else:
            for part in message.parts:
                start, end, learned = _PARTS[part.type]
                if start:
                    special(start, learned)
                add(tokenizer.encode(part.text), learned)
                if end:
                    special(end, learned)
        special(f"<|{message.role}_end|>", message.role == "assistant")
    return ids[:max_tokens], mask[:max_tokens]


def render_prompt(tokenizer: Tokenizer, messages: Any) -> list[int]:
    """Ids that ask for the assistant's next message: the messages, the last a user's, and <|assistant_start|>."""
    conversation = Conversation.parse(messages)
    last = conversation.messages[-1].role
    if last != "user":
        raise UsageError(f"the last message must be the user's, to be answered; it is the {last}'s")
    return [*render(tokenizer, conversation)[0], tokenizer.encode_special("<|assistant_start|>")]


def _parse_message(message: Any, index: int) -> Message:
    where = f"message {index}"
    if not isinstance(message, Mapping):
        raise UsageError(f'{where} must be an object like {{"role": "user", "content": "..."}}, not {_show(message)}')
    content = message.get("content")
    role: Role | None = next((role for role in get_args(Role) if role == message.get("role")), None)
    if role is None:
        raise UsageError(f"{where} has role {_show(message.get('role'))}; use {', '.join(get_args(Role))}")
    if isinstance(content, str):
        return Message(role, (Part("text", content),))
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UsageError(f"the content of {where} must be text or a list of parts, not {_show(content)}")
    parts = tuple(_parse_part(part, f"part {number} of {where}") for number, part in enumerate(content))
    for part in parts:
        if role != "assistant" and part.type != "text":
            raise UsageError(f"{where} of the {role} has a {part.type} part; only an assistant's may")
    return Message(role, parts)


def _parse_part(part: Any, where: str) -> Part:
    if not isinstance(part, Mapping) or part.get("type") not in _PARTS or not isinstance(part.get("text"), str):
        raise UsageError(
            f'{where} must be {{"type": ..., "text": "..."}} with a type of {", ".join(_PARTS)}; not {_show(part)}'
        )
    return Part(part["type"], part["text"])


def _check_order(messages: tuple[Message, ...]) -> None:
    if not messages:
        raise UsageError("a conversation needs at least one message")
    turns = messages[1:] if messages[0].role == "system" else messages
    if not turns:
        raise UsageError("a conversation of only a system message says nothing; add a user message")
    first = len(messages) - len(turns)
    for number, message in enumerate(turns):
        expected = ("user", "assistant")[number % 2]
        if message.role != expected:
            raise UsageError(
                f"message {first + number} is the {message.role}'s where the {expected}'s belongs; after at most one "
                "system message, user and assistant take turns"
            )


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
