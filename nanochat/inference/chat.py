"""`nanochat chat`: talk to a model in the terminal, one answer with -p, or a question from a pipe.

It is the serving engine with one user: an answer streams as it is generated, and a next question finds the conversation
so far in the cache, so that only what is new is read. Calls of the calculator are shown as such: [12*12 → 144]. Without
a terminal there are no colors, no prompt and no line editing; with one, no more than plain text, colors and readline,
so that it works over any ssh.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.text import Text

from nanochat import runtime
from nanochat.chat_format import render_prompt
from nanochat.errors import NanochatError, UsageError
from nanochat.inference.batch_engine import BatchConfig, BatchEngine, Output, Request
from nanochat.inference.loading import StageName, load
from nanochat.inference.row import Kind, parts_of
from nanochat.inference.runner import WeightsName, make_runner
from nanochat.inference.sampling import SamplingParams
from nanochat.runtime import DeviceName, DtypeName

ANSWER_ROOM = 4  # at least a quarter of the context is kept free for the answer
# What a terminal would obey rather than show: a model's answer is text and nothing more.
CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model."""

    prompt: Annotated[str | None, tyro.conf.arg(aliases=["-p"])] = None
    """Print the answer to this and exit. Without it a question is read from a pipe, or a conversation begins."""
    stage: StageName = "auto"
    """auto takes the furthest stage that has a checkpoint: rl, sft, base (which only continues text)."""
    tag: str | None = None
    """Model tag; by default the one written last."""
    step: int | None = None
    """Checkpoint step; by default the newest."""
    system: str | None = None
    """A system message."""
    temperature: float = 0.6
    """0 always takes the most likely token; 1 draws as the model believes."""
    top_k: int = 50
    """Draw from the k most likely tokens; 0 = from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability; 1 = from all."""
    min_p: float = 0.0
    """Leave out tokens less likely than this fraction of the most likely one."""
    repetition_penalty: float = 1.0
    """Above 1 discourages tokens that have occurred."""
    max_tokens: int = 512
    """Tokens of an answer at most."""
    seed: int = 42
    """The same seed and settings give the same answers."""
    device: DeviceName = "auto"
    """auto takes the first there is of cuda, mps, cpu."""
    dtype: DtypeName = "auto"
    """Compute dtype; auto takes bfloat16 where the GPU has it."""
    kernels: str = "auto"
    """auto, torch, fused, or op=backend,..."""
    weights: WeightsName = "auto"
    """Precision of the weights in memory; auto takes the compute dtype."""

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            max_tokens=self.max_tokens,
            seed=self.seed,
        )


class Printer:
    """Writes events as they come; a call of the tool appears as [expression → result]."""

    STYLES = {"text": "", "python": "cyan", "output": "cyan"}

    def __init__(self, console: Console) -> None:
        self.console = console
        self.kind: Kind = "text"
        self.arrow = " → " if console.encoding.lower().startswith("utf") else " -> "

    def show(self, event: Output) -> None:
        if not event.text:
            return
        if event.kind != self.kind:
            opens = {"python": "[", "output": self.arrow if self.kind == "python" else "["}
            closes = "]" if self.kind != "text" and event.kind != "output" else ""
            self._write(closes + opens.get(event.kind, ""), "cyan")
            self.kind = event.kind
        self._write(event.text, self.STYLES[event.kind])

    def end(self) -> None:
        self._write("]\n" if self.kind != "text" else "\n", "cyan" if self.kind != "text" else "")
        self.kind = "text"

    def _write(self, text: str, style: str) -> None:
        if self.console.is_terminal:
            self.console.print(Text(text.translate(CONTROLS), style), end="", soft_wrap=True)
        else:
            self.console.file.write(text)
        self.console.file.flush()


def stream(engine: BatchEngine, prompt: Sequence[int], params: SamplingParams) -> Generator[Output, None, None]:
    """One answer, token by token. Whoever stops listening gives it up. NanochatError when a step fails."""
    engine.add(Request("chat", tuple(prompt), params, tool=params.tools))
    try:
        while engine.has_work:
            for output in engine.step():
                if output.finish == "error":
                    raise NanochatError(f"a step of the engine failed: {engine.error}") from engine.error
                yield output
    finally:
        engine.cancel("chat")


class Chat:
    """A conversation and its settings. A base model has no turns: it continues each text from the beginning."""

    def __init__(
        self, engine: BatchEngine, params: SamplingParams, console: Console, system: str | None = None,
        base: bool = False,
    ) -> None:  # fmt: skip
        self.engine, self.params, self.console = engine, params, console
        self.system, self.base = system, base
        self.messages: list[dict] = []
        self.answers = 0  # so that a repeated question gets a fresh draw

    def prompt_ids(self) -> list[int]:
        """The conversation as tokens; its oldest turns are dropped until there is room for an answer."""
        if self.base:
            tokenizer = self.engine.tokenizer
            return [tokenizer.bos_id, *tokenizer.encode(self.messages[-1]["content"])]
        room = self.engine.context - self.engine.context // ANSWER_ROOM
        while True:
            first = [{"role": "system", "content": self.system}] if self.system else []
            ids = render_prompt(self.engine.tokenizer, [*first, *self.messages])
            if len(ids) <= room or len(self.messages) < 3:
                return ids
            self.messages = self.messages[2:]
            self.note("(the oldest turn no longer fits in the context and was dropped)")

    def ask(self, text: str) -> None:
        """Adds a user message and streams the answer. Ctrl-C ends the answer; what was said of it stays."""
        self.messages.append({"role": "user", "content": text})
        printer, pieces = Printer(self.console), []
        params = replace(self.params, seed=self.params.seed + self.answers)
        self.answers += 1
        try:
            with contextlib.closing(stream(self.engine, self.prompt_ids(), params)) as events:
                for event in events:
                    pieces.append((event.kind, event.text))
                    printer.show(event)
        except KeyboardInterrupt:
            if not self.console.is_terminal:
                raise
        except NanochatError:
            self.messages.pop()  # a question that cannot be asked must not spoil those to come
            raise
        printer.end()
        self.messages.append({"role": "assistant", "content": parts_of(pieces)})

    def note(self, text: str) -> None:
        """A line that is not part of the conversation."""
        if self.console.is_terminal:
            self.console.print(Text(text, "dim"))
        else:
            print(text, file=sys.stderr)

    # The commands: each takes what follows its name.

    def help(self, _: str) -> None:
        for name, (usage, about, _function) in COMMANDS.items():
            self.note(f"  {name + ' ' + usage:<22} {about}")
        self.note('  A line that ends in \\ goes on in the next; """ begins and ends a text of several lines.')
        self.note("  Ctrl-C stops an answer, Ctrl-D ends the conversation.")

    def clear(self, _: str) -> None:
        self.messages = []
        self.note("The conversation begins anew.")

    def set_system(self, text: str) -> None:
        self.system = text or None
        self.note(f"System message: {self.system or 'none'}")

    def set_temperature(self, text: str) -> None:
        self._set("temperature", float, text)

    def set_top_k(self, text: str) -> None:
        self._set("top_k", int, text)

    def set_max_tokens(self, text: str) -> None:
        self._set("max_tokens", int, text)

    def retry(self, _: str) -> None:
        if len(self.messages) < 2:
            raise UsageError("there is no answer to try again; ask something first")
        question = self.messages[-2]["content"]
        self.messages = self.messages[:-2]
        self.ask(question)

    def save(self, text: str) -> None:
        path = Path(text or "chat.json").expanduser()
        first = [{"role": "system", "content": self.system}] if self.system else []
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"messages": [*first, *self.messages]}, file, ensure_ascii=False, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise NanochatError(f"cannot save to {path}: {error.strerror}; give another path") from error
        self.note(f"Saved {len(self.messages)} messages to {path}.")

    def _set(self, name: str, kind: Callable, text: str) -> None:
        if text:
            try:
                self.params = replace(self.params, **{name: kind(text)})
            except ValueError:
                raise UsageError(f"{text!r} is not a number") from None
        self.note(f"{name} is {getattr(self.params, name)}")


COMMANDS: dict[str, tuple[str, str, Callable[[Chat, str], None]]] = {
    "/help": ("", "show this list", Chat.help),
    "/clear": ("", "forget the conversation", Chat.clear),
    "/system": ("TEXT", "set the system message; without TEXT, none", Chat.set_system),
    "/temp": ("NUMBER", "temperature, from 0", Chat.set_temperature),
    "/topk": ("NUMBER", "draw from the k most likely tokens; 0 is all", Chat.set_top_k),
    "/max": ("NUMBER", "tokens of an answer at most", Chat.set_max_tokens),
    "/retry": ("", "answer the last question again", Chat.retry),
    "/save": ("PATH", "write the conversation as JSON", Chat.save),
    "/quit": ("", "end", lambda chat, _: None),
}
QUIT = ("/quit", "/exit", "/q")


def read_message(read: Callable[[str], str], first: str = "> ", more: str = ". ") -> str:
    """One message from the keyboard: a line, lines joined by a final backslash, or what stands between two \"\"\"."""
    line = read(first)
    if line.lstrip().startswith('"""'):
        lines = [line.lstrip()[3:]]
        while not lines[-1].rstrip().endswith('"""'):
            lines.append(read(more))
        lines[-1] = lines[-1].rstrip()[:-3]
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read(more))
    return "\n".join(lines)


def converse(chat: Chat, read: Callable[[str], str]) -> None:
    """Reads, answers, until the end of input or /quit. Errors of one message are told and survived."""
    while True:
        try:
            text = read_message(read).strip()
        except EOFError:
            chat.note("")
            return
        except KeyboardInterrupt:
            chat.note("(Ctrl-D or /quit ends the conversation)")
            continue
        name, _, rest = text.partition(" ")
        if name in QUIT:
            return
        try:
            if name in COMMANDS:
                COMMANDS[name][2](chat, rest.strip())
            elif name.startswith("/") and name[1:].isalpha():
                raise UsageError(f"unknown command {name}; /help lists them")
            elif text:
                chat.ask(text)
        except NanochatError as error:
            chat.note(str(error))


def _once(prompt: str | None) -> str | None:
    """The one question that was asked by -p or comes from a pipe; None for a conversation."""
    if prompt is None and sys.stdin is not None and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise UsageError('the question is empty; ask with -p "...", a pipe, or in a terminal')
    return prompt


def run(config: ChatConfig) -> int:
    """The command. Returns the exit code."""
    params, question = config.sampling(), _once(config.prompt)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that knows only ASCII still gets its answer
    machine = runtime.start(config.device, config.dtype, config.seed)
    loaded = load(machine, config.stage, config.tag, config.step, config.kernels)
    console = Console(highlight=False, markup=False, emoji=False)
    runner = make_runner(loaded.model, config.weights, loaded.model.plan)
    engine = BatchEngine(loaded.model, loaded.tokenizer, BatchConfig(max_batch=1), runner)
    chat = Chat(engine, params, console, config.system, base=loaded.stage == "base")
    if question is not None:
        chat.ask(question)
        return 0
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and history)
    chat.note(
        f"{loaded.name}, on {machine.device} in {str(machine.dtype).removeprefix('torch.')}. /help lists commands."
    )
    if chat.base:
        chat.note("This is a base model: it continues your text. `nanochat sft` teaches it to answer.")
    converse(chat, input)
    return 0
