"""`nanochat <command> [--flags]`: one table of commands, and what happens to their errors.

A command is a frozen dataclass, whose fields and their docstrings become the flags and their help, and a function that
takes it. Modules are imported only when their command is chosen, so that `nanochat --help` answers at once and a broken
optional dependency hurts nobody else.

Exit codes: 0 done, 1 the run failed, 2 the call was wrong, 130 interrupted. What a user can mend is printed as one
message; everything else is a bug and keeps its traceback.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from nanochat import __version__
from nanochat.errors import NanochatError


@dataclass(frozen=True)
class Command:
    """One command: `module` holds the class `config` and the `function` that takes it.

    Without a config the function takes the arguments as they are: it hands them on to another program.
    """

    name: str
    stage: str
    help: str
    module: str
    config: str = ""
    function: str = "run"

    def load(self) -> tuple[type | None, Callable[[Any], Any]]:
        """The config class and the function, imported now."""
        module = importlib.import_module(self.module)
        return getattr(module, self.config) if self.config else None, getattr(module, self.function)


# In the order of the pipeline; the commands of one stage stand together.
COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        Command("data", "Data", "download, convert or generate the text to train on",
                "nanochat.data.command", "DataConfig"),
        Command("tok-train", "Tokenizer", "learn a vocabulary from the text",
                "nanochat.tok_commands", "TokTrainConfig", "tok_train"),
        Command("tok-eval", "Tokenizer", "bytes per token, beside well-known vocabularies",
                "nanochat.tok_commands", "TokEvalConfig", "tok_eval"),
        Command("train", "Base model", "train a base model on packed text",
                "nanochat.training.pretrain", "PretrainConfig"),
        Command("sft", "Chat model", "teach a base model to answer",
                "nanochat.training.sft", "SftConfig"),
        Command("rl", "Chat model", "practice problems whose answers can be checked",
                "nanochat.training.rl", "RlConfig"),
        Command("eval", "Evaluation", "CORE, bits per byte and samples of a model",
                "nanochat.evaluation.base_eval", "EvalConfig"),
        Command("chat-eval", "Evaluation", "grade a chat model on ARC, MMLU, GSM8K, HumanEval and more",
                "nanochat.evaluation.chat_eval", "ChatEvalConfig"),
        Command("report", "Evaluation", "one page about everything that was made, with plots",
                "nanochat.report.command", "ReportConfig"),
        Command("chat", "Use it", "talk to a model: in the terminal, through a pipe, or one question",
                "nanochat.inference.chat", "ChatConfig"),
        Command("serve", "Use it", "an OpenAI-compatible server and a web page, for many users at once",
                "nanochat.serving.command", "ServeConfig"),
        Command("import", "Use it", "take over a checkpoint of karpathy/nanochat",
                "nanochat.exchange.commands", "ImportConfig", "run_import"),
        Command("export", "Use it", "write a model or its tokenizer for other programs",
                "nanochat.exchange.commands", "ExportConfig", "run_export"),
        Command("verify", "Kernels", "check every backend of every kernel against its reference",
                "nanochat_kernels.verify", "VerifyConfig", "main"),
        Command("bench", "Kernels", "measure kernels, training, inference and more; compare and report",
                "nanochat.measure.bench_command"),
        Command("profile", "Kernels", "where the time of a step goes, by kernel and by op, beside the ceilings",
                "nanochat.measure.profile", "ProfileConfig"),
        Command("doctor", "Machine", "what this machine offers, what is missing and how to get it",
                "nanochat.doctor", "DoctorConfig"),
    )
}  # fmt: skip


def _rank() -> int:
    """This process's rank under torchrun, read here too because torch is not imported yet when a call goes wrong."""
    return int(os.environ.get("RANK", "0"))


def _print_error(message: str) -> None:
    """In red on a terminal. Under torchrun the other ranks say one line, so that rank 0's message is not buried."""
    rank = _rank()
    if rank > 0:
        message = f"(rank {rank}) {message.splitlines()[0] if message else ''}"
    label = "\033[1;31merror:\033[0m" if sys.stderr.isatty() and "NO_COLOR" not in os.environ else "error:"
    print(f"{label} {message}", file=sys.stderr)


def help_text() -> str:
    """The list of commands, grouped by stage of the pipeline."""
    width = max(map(len, COMMANDS))
    lines = ["usage: nanochat <command> [--flags]        nanochat <command> --help lists the flags", ""]
    for stage, commands in groupby(COMMANDS.values(), key=lambda command: command.stage):
        lines += [f"{stage}:", *(f"  {command.name:<{width}}  {command.help}" for command in commands), ""]
    lines += [
        "Without a command: what exists so far, and what to do next.",
        "On several GPUs: torchrun --nproc_per_node=8 -m nanochat <command> [--flags]",
    ]
    return "\n".join(lines)


def _is_kernel_unavailable(error: BaseException) -> bool:
    """A backend asked for by name that cannot run is a wrong call; nanochat_kernels knows nothing of UsageError."""
    kernels = sys.modules.get("nanochat_kernels")
    return kernels is not None and isinstance(error, getattr(kernels, "KernelUnavailable", ()))


def run_command(command: Command, arguments: Sequence[str]) -> int:
    """Parses `arguments` (SystemExit 2 with a message when they are wrong), runs the command, returns the exit code."""
    try:
        config_class, function = command.load()
        config: Any = list(arguments)
        if config_class is not None:
            import tyro

            # help and refusals are rank 0's affair, as all of them see the same arguments
            config = tyro.cli(config_class, prog=f"nanochat {command.name}", args=config, console_outputs=_rank() == 0)
        code = function(config)  # a function may return what it made, for callers in Python
        return code if isinstance(code, int) else 0
    except NanochatError as error:
        _print_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 130
    except Exception as error:
        if not _is_kernel_unavailable(error):
            raise
        _print_error(str(error))
        return 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    try:
        code = _dispatch(*(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `nanochat ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(name: str = "", *rest: str) -> int:
    if not name:
        from nanochat import status

        status.show(COMMANDS)
        return 0
    if name in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if name in ("-V", "--version", "version"):
        print(f"nanochat {__version__}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        _print_error(f"unknown command {name!r}; {hint}nanochat --help lists them: {', '.join(COMMANDS)}")
        return 2
    return run_command(command, rest)
