"""The tokenizer as Hugging Face's tokenizer.json, with equal ids for ordinary text.

Their byte-level BPE spells bytes as printable characters (GPT-2's table: printable Latin-1 stands for itself, the other
68 bytes for U+0100 and up), replays merges in order, and splits with the same regular expression. One difference
remains, and lies in the format: there, text that spells a special token becomes it.
"""

import json
import os
from pathlib import Path
from typing import Any

from nanochat.errors import NanochatError
from nanochat.tokenizer import Tokenizer


def byte_alphabet() -> list[str]:
    """The character that stands for each byte, 256 of them."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of a tokenizer.json."""
    alphabet = byte_alphabet()

    def spell(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    ranks = tokenizer.ranks()
    spelled = {rank: spell(token) for token, rank in ranks.items()}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, number in tokenizer.specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a whole piece that is a token needs no merges, as in tiktoken
            "vocab": {spelled[rank]: rank for rank in sorted(spelled)},
            "merges": [[spelled[left], spelled[right]] for left, right in _merges(tokenizer)],
        },
    }


def _merges(tokenizer: Tokenizer) -> list[tuple[int, int]]:
    """For each token longer than a byte, in order of id, the two tokens that join into it.

    They follow from the ranks: merging a token's bytes by the rules of lower rank alone must end in two pieces.
    """
    ranks, found = tokenizer.ranks(), []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            lowest = min(pairs)
            if lowest >= rank:
                break
            at = pairs.index(lowest)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:  # else no text can produce the token by merging; whole pieces still can
            found.append((ranks[parts[0]], ranks[parts[1]]))
    return found


def write_tokenizer_json(tokenizer: Tokenizer, path: Path) -> None:
    """Writes tokenizer.json to `path`, complete or not at all."""
    path = path / "tokenizer.json" if path.is_dir() else path
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(tokenizer_json(tokenizer), ensure_ascii=False, indent=1), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise NanochatError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
