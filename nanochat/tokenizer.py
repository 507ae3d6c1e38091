"""The tokenizer as the pipeline sees it: byte-level BPE over a GPT-4-style split, with nine special tokens at the end.

The work is done by the Rust crate in rustbpe/ (imported as nanochat_rustbpe); this module adds what a pipeline needs
around it: the special tokens, a folder to keep it in, clear errors. Ids equal those of tiktoken given the same ranks.

On disk a tokenizer is text. `settings.json` names the split pattern, the special tokens and the file of ranks, which
has tiktoken's format (base64 of a token's bytes, a space, its id). The settings are written last and name the ranks by
their fingerprint, so that a crash at any moment leaves the old tokenizer or the new one, never a mixture.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from nanochat import runtime
from nanochat.errors import NanochatError, UsageError

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
BOS = SPECIAL_TOKENS[0]
DEFAULT_VOCAB_SIZE = 32_768
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
SETTINGS_FILE = "settings.json"
FORMAT = "nanochat tokenizer 1"

Errors = Literal["strict", "replace"]


def native() -> Any:
    """The Rust module; NanochatError with the remedy when it was not built."""
    try:
        import nanochat_rustbpe
    except ImportError as error:
        raise NanochatError(
            f"the tokenizer's Rust module cannot be imported ({error}); build it with `pip install ./rustbpe` "
            "or run `bash runs/setup.sh`"
        ) from error
    return nanochat_rustbpe


def default_tokenizer_dir() -> Path:
    """Where `nanochat tok-train` puts the tokenizer."""
    return runtime.base_dir() / "tokenizer"


def merges_for(vocab_size: int) -> int:
    """Number of merges in a vocabulary of this size; UsageError when not even the bytes and specials fit."""
    if vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(
            f"a vocabulary of {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens "
            f"need at least {MIN_VOCAB_SIZE}"
        )
    return vocab_size - MIN_VOCAB_SIZE


class Tokenizer:
    """Text to ids and back. Immutable, picklable, safe to share among threads and after a fork.

    Ordinary tokens come first, the nine of SPECIAL_TOKENS last. Text never becomes a special token.
    """

    def __init__(self, encoding: Any):
        """`encoding` is a nanochat_rustbpe.Encoding whose special tokens are its last ids."""
        self._encoding = encoding
        self.specials: dict[str, int] = dict(encoding.specials)
        self.vocab_size: int = encoding.id_limit

    @classmethod
    def from_ranks(
        cls, ranks: dict[bytes, int], pattern: str | None = None, specials: Sequence[str] = SPECIAL_TOKENS
    ) -> "Tokenizer":
        """From token bytes -> id; the special tokens take the next ids. The pattern is our own by default."""
        first = max(ranks.values()) + 1
        numbered = [(name, first + index) for index, name in enumerate(specials)]
        return cls(native().Encoding(ranks, pattern or native().PATTERN_2, numbered))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int = DEFAULT_VOCAB_SIZE,
        threads: int | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> "Tokenizer":
        """Learns a vocabulary of `vocab_size` (specials included) from `texts`.

        The result depends on the texts alone, not on their order or on `threads` (all CPUs by default).
        progress(merges done) is called now and then. UsageError when the texts hold too few merges.
        """
        merges_for(vocab_size)
        counts = native().WordCounts(native().PATTERN_2)
        counts.add(texts, threads)
        return cls.train_from_counts(counts, vocab_size, progress)

    @classmethod
    def train_from_counts(
        cls, counts: Any, vocab_size: int, progress: Callable[[int], object] | None = None
    ) -> "Tokenizer":
        """As `train`, from a nanochat_rustbpe.WordCounts: count once, train several sizes."""
        try:
            merges = counts.train(merges_for(vocab_size), progress)
        except ValueError as error:
            raise UsageError(f"no vocabulary of {vocab_size} can be made: {error}") from error
        return cls.from_ranks(native().ranks_from_merges(merges))

    def with_vocab_size(self, vocab_size: int) -> "Tokenizer":
        """The tokenizer that training for this smaller vocabulary on the same text would have given."""
        if vocab_size > self.vocab_size:
            raise UsageError(f"cannot grow a vocabulary of {self.vocab_size} to {vocab_size}; train one of that size")
        kept = 256 + merges_for(vocab_size)
        ranks = {token: rank for token, rank in self.ranks().items() if rank < kept}
        return Tokenizer.from_ranks(ranks, self.pattern, tuple(self.specials))

    @property
    def bos_id(self) -> int:
        """Id of <|bos|>, which begins every document and conversation."""
        return self.specials[BOS]

    @property
    def pattern(self) -> str:
        """The split pattern as a regex."""
        return self._encoding.pattern

    def ranks(self) -> dict[bytes, int]:
        """Bytes -> id of the ordinary tokens, in order of id: what tiktoken calls mergeable ranks."""
        return self._encoding.ranks()

    def encode(self, text: str, errors: Errors = "strict") -> list[int]:
        """Ids of `text`, ordinary tokens only.

        A lone surrogate, which no UTF-8 has, is a UsageError, or with errors="replace" reads as U+FFFD.
        """
        try:
            return self._encoding.encode(text, errors=errors)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def encode_special(self, name: str) -> int:
        """Id of the special token `name`, such as <|user_start|>."""
        try:
            return self.specials[name]
        except KeyError:
            raise UsageError(f"{name!r} is no special token; there are {', '.join(self.specials)}") from None

    def encode_batch(
        self,
        texts: Sequence[str],
        prepend_bos: bool = False,
        threads: int | None = None,
        errors: Errors = "strict",
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """Ids of all texts end to end and where each begins.

        Returns ids (uint16 when the vocabulary is at most 65,536, else uint32) and offsets [len(texts) + 1]: text i is
        ids[offsets[i]:offsets[i + 1]]. Uses `threads` threads (all CPUs by default) without the GIL; the result does
        not depend on their number.
        """
        first = self.bos_id if prepend_bos else None
        try:
            return self._encoding.encode_batch(texts, first, threads, errors=errors)
        except ValueError as error:
            raise UsageError(str(error)) from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the tokens; broken UTF-8 becomes U+FFFD, a special token its name."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of the tokens, exactly. UsageError for an id outside the vocabulary."""
        try:
            return self._encoding.decode_bytes(ids.tolist() if hasattr(ids, "tolist") else list(ids))
        except (ValueError, OverflowError) as error:
            raise UsageError(f"cannot decode: {error}; ids are 0 to {self.vocab_size - 1}") from error

    def stream_decoder(self) -> Any:
        """Decodes tokens as they come: .push(id) and .flush() return the text that is certain by then.

        A character shows only when all its bytes are there; the outputs together equal `decode` of all ids.
        """
        return self._encoding.stream_decoder()

    def token_bytes(self) -> npt.NDArray[np.int32]:
        """int32 [vocab_size]: bytes of each token, 0 for the specials; turns a loss per token into bits per byte."""
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        for token, rank in self.ranks().items():
            lengths[rank] = len(token)
        return lengths

    @property
    def fingerprint(self) -> str:
        """16 hex digits of a hash of everything that decides ids; checkpoints remember it."""
        return _fingerprint(_ranks_text(self.ranks()), self._settings())

    def to_hugging_face(self) -> dict[str, Any]:
        """The content of a Hugging Face tokenizer.json that gives the same ids (a dict, for json.dump).

        Unlike ours, that library turns the name of a special token in a text into the token.
        """
        shown = {rank: "".join(map(_byte_symbols().__getitem__, token)) for token, rank in self.ranks().items()}
        merges = [[shown[left], shown[right]] for left, right in self._encoding.merges()]
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": rank, "content": name, **flags} for name, rank in self.specials.items()],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": {**byte_level, "use_regex": True},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                # a piece that is a token is that token, whatever the merges would make of it
                "ignore_merges": True,
                "vocab": {text: rank for rank, text in shown.items()} | self.specials,
                "merges": merges,
            },
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "pattern": self.pattern,
            "specials": self.specials,
            "allow_specials": self._encoding.allow_specials,
        }

    def save(self, folder: Path) -> None:
        """Writes the tokenizer into `folder`, replacing one that is there; old or new, but never a mixture."""
        folder = Path(folder)
        ranks, settings = _ranks_text(self.ranks()), self._settings()
        fingerprint = _fingerprint(ranks, settings)
        settings |= {"ranks": f"ranks-{fingerprint}.tiktoken", "fingerprint": fingerprint}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / settings["ranks"], ranks)
            _write(folder / SETTINGS_FILE, json.dumps(settings, indent=2, ensure_ascii=False).encode() + b"\n")
            for old in folder.glob("ranks-*.tiktoken"):
                if old.name != settings["ranks"]:
                    old.unlink(missing_ok=True)
        except OSError as error:
            raise NanochatError(f"cannot write the tokenizer to {folder}: {error.strerror or error}") from error

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The tokenizer in `folder`; NanochatError with the remedy when there is none or it is damaged."""
        folder = Path(folder)
        remedy = "run `nanochat tok-train` to make one"
        try:
            settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
            ranks_text = (folder / settings["ranks"]).read_bytes()
            fields = {name: settings[name] for name in ("format", "pattern", "specials", "allow_specials")}
            expected = settings["fingerprint"]
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NanochatError(
                f"no tokenizer in {folder} ({Path(error.filename).name} is missing); {remedy}"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NanochatError(f"the tokenizer in {folder} cannot be read ({error}); {remedy}") from error
        if fields["format"] != FORMAT:
            raise NanochatError(f"the tokenizer in {folder} has format {fields['format']!r}, not {FORMAT!r}; {remedy}")
        if (found := _fingerprint(ranks_text, fields)) != expected:
            raise NanochatError(
                f"the tokenizer in {folder} is damaged: its fingerprint is {found}, not {expected} as it should be; "
                f"{remedy}"
            )
        try:
            specials = [(name, int(id)) for name, id in fields["specials"].items()]
            ranks = parse_ranks(ranks_text)
            return cls(native().Encoding(ranks, fields["pattern"], specials, fields["allow_specials"]))
        except (ValueError, TypeError, AttributeError) as error:
            raise NanochatError(f"the tokenizer in {folder} is damaged: {error}; {remedy}") from error


def parse_ranks(text: bytes) -> dict[bytes, int]:
    """Reads tiktoken's format: on each line base64 of the bytes, a space, the id. ValueError names a bad line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"line {number} of the ranks is not `base64 id`: {line[:60]!r}") from error
    return ranks


def _byte_symbols() -> list[str]:
    """The printable character that byte-level vocabularies of the Hugging Face kind write for each byte."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _ranks_text(ranks: dict[bytes, int]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())


def _fingerprint(ranks_text: bytes, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(ranks_text)
    return digest.hexdigest()[:16]


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
