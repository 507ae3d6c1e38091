"""Folders of karpathy/nanochat, read and written.

    model_000123.pt, meta_000123.json      a state_dict and its settings, per step
    tokenizer.pkl, token_bytes.pt          a pickled tiktoken.Encoding, and the bytes of each token

A pickle is a program: loading one runs whatever its author wrote. Here tensors are read by torch with
`weights_only=True`, and the tokenizer by an unpickler that knows one class by name and gives a mere record of fields
for it, so that nothing of the file is ever run. What else a file asks for is refused by name.
"""

import io
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat.errors import NanochatError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, native

TOKENIZER_LIMIT = 256 << 20  # bytes; one of 65,536 tokens takes about a megabyte
TOKENIZER, TOKEN_BYTES = "tokenizer.pkl", "token_bytes.pt"
STAGES = {  # its folders of checkpoints, and our stages
    "base_checkpoints": "base",
    "mid_checkpoints": "sft",
    "chatsft_checkpoints": "sft",
    "chatrl_checkpoints": "rl",
}


class Checkpoint(NamedTuple):
    """What one step of a folder holds: its state_dict as stored, and its settings."""

    step: int
    state: dict[str, Tensor]
    meta: dict[str, Any]


def read_checkpoint(folder: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step`, by default the last one. NanochatError says what is missing or refused."""
    found = {
        int(m[1]): path for path in folder.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d+)\.pt", path.name))
    }
    if not found:
        inner = sorted({str(path.parent.relative_to(folder)) for path in folder.glob("**/model_*.pt")})
        hint = f"give one of its folders: {', '.join(inner)}" if inner else "give the folder with model_<step>.pt in it"
        raise NanochatError(f"there is no model_<step>.pt in {folder}; {hint}")
    step = max(found) if step is None else step
    if step not in found:
        raise NanochatError(f"there is no step {step} in {folder}; it has {', '.join(map(str, sorted(found)))}")
    meta_path = found[step].with_name(found[step].name.replace("model_", "meta_")).with_suffix(".json")
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NanochatError(f"{meta_path} cannot be read ({error}); it belongs to {found[step].name}") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("model_config"), dict):
        raise NanochatError(f"{meta_path} has no model_config; is this a checkpoint of karpathy/nanochat?")
    return Checkpoint(step, _read_tensors(found[step]), meta)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {wanted[1]}" if wanted else str(error).splitlines()[0]
        raise NanochatError(
            f"{path} is refused: a state_dict holds tensors only, but {why}; nothing of the file was run"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise NanochatError(f"{path} cannot be read ({str(error).splitlines()[0]}); copy it again") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise NanochatError(f"{path} is not a state_dict: it must map names to tensors")
    return state


class _EncodingRecord:
    """Stands where the pickle has a tiktoken.Encoding, and keeps its fields unexamined."""

    fields: Any = None

    def __setstate__(self, fields: Any) -> None:
        self.fields = fields


class _TokenizerUnpickler(pickle.Unpickler):
    """Knows the name of one class; everything a pickle could call goes through here."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _EncodingRecord
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.pkl. NanochatError when it is missing, holds anything else, or cannot work."""
    try:
        if (size := path.stat().st_size) > TOKENIZER_LIMIT:
            raise NanochatError(f"{path} has {size:,} bytes; a tokenizer has at most {TOKENIZER_LIMIT:,}")
        record = _TokenizerUnpickler(io.BytesIO(path.read_bytes())).load()
    except OSError as error:
        raise NanochatError(f"{path} cannot be read: {error.strerror or error}") from error
    except NanochatError:
        raise
    except Exception as error:  # a broken pickle can raise anything, and nothing of ours runs inside
        raise NanochatError(
            f"{path} is refused: {error or type(error).__name__}; only a pickled tiktoken.Encoding is read, "
            "and nothing of the file was run"
        ) from error
    fields: Any = record.fields if isinstance(record, _EncodingRecord) else None
    if isinstance(fields, str):
        raise NanochatError(f"{path} only names tiktoken's encoding {fields!r}; a trained vocabulary is needed")
    try:
        ranks, pattern, specials = (fields[name] for name in ("mergeable_ranks", "pat_str", "special_tokens"))
        fits = isinstance(pattern, str) and all(
            isinstance(table, dict) and all(type(k) is kind and type(v) is int for k, v in table.items())
            for table, kind in ((ranks, bytes), (specials, str))
        )
    except (TypeError, KeyError):
        fits = False
    if not fits:
        raise NanochatError(f"{path} is not a tiktoken.Encoding with ranks, a pattern and special tokens")
    if missing := [name for name in SPECIAL_TOKENS if name not in specials]:
        raise NanochatError(f"{path} lacks the special tokens {', '.join(missing)}")
    ordered = sorted(specials.items(), key=lambda item: item[1])
    try:
        return Tokenizer(native().Encoding(ranks, pattern, ordered))
    except (ValueError, OverflowError) as error:
        raise NanochatError(f"the vocabulary in {path} cannot work: {error}") from error


def find_tokenizer(folder: Path) -> Path | None:
    """tokenizer.pkl beside a checkpoint, in its tokenizer/, or in that of the base folder two levels up."""
    places = (folder, folder / "tokenizer", folder.parent / "tokenizer", folder.parent.parent / "tokenizer")
    return next((path for place in places if (path := place / TOKENIZER).is_file()), None)


def write_checkpoint(folder: Path, step: int, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """model_<step>.pt and meta_<step>.json, each complete or absent."""
    state = dict(state)
    _replace(folder / f"model_{step:06d}.pt", lambda file: torch.save(state, file))
    text = json.dumps(meta, indent=2).encode()
    _replace(folder / f"meta_{step:06d}.json", lambda file: file.write(text))


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.pkl and token_bytes.pt, which karpathy/nanochat looks for in its tokenizer/ folder. Needs tiktoken."""
    try:
        import tiktoken
    except ImportError as error:
        raise NanochatError("writing a tokenizer.pkl needs tiktoken: pip install tiktoken") from error
    encoding = tiktoken.Encoding(
        "rustbpe", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks(), special_tokens=tokenizer.specials
    )
    _replace(folder / TOKENIZER, lambda file: pickle.dump(encoding, file))
    lengths = torch.from_numpy(tokenizer.token_bytes())
    _replace(folder / TOKEN_BYTES, lambda file: torch.save(lengths, file))


def _replace(path: Path, write: Callable[[Any], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise NanochatError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
