"""Text to tokenize, and one small vocabulary with tiktoken's encoding of the same ranks beside it."""

from pathlib import Path

import pytest
import tiktoken

from nanochat.tokenizer import Tokenizer

CORPUS = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "text"

ODD_TEXTS = [
    "",
    " ",
    "\n",
    "  \n\n  x",
    "I'll we'VE he'd 'Twas it'ſ y'all're rock'n'roll 'LL 'stuff''s",
    "1 12 123 1234567 ١٢٣ ½²③ 1a1 a1 Ⅷ٣x",
    "\r\n\r\n a\r\n\tb \n\t c   d\u00a0e\u2003\u2028f\u3000g\u0085h\x0b\x0c\x1c\x1d\x1e\x1fi",
    "!!!\n\n ???\r\r  ... -- (a) [b] {c}\n",
    "naïve e\u0301te\u0301 Ελληνικά русский 中文字符 日本語 한국어 العربية हिन्दी ไทย",
    "😀😀 👨\u200d👩\u200d👧\u200d👦 🏖\ufe0f🙏🏽 \U00020000\U0001d400\U000e0041",
    "\u017f'\u017f a'\u017fb \u212a K\u0307 ǅ ʰ ª º",
    "<|bos|> hello <|user_start|>",
    "a" * 300 + " " * 300 + "b",
    "_" * 77 + "\n" * 20 + "\t" * 9 + "z",
]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Real documents, about 9 MB."""
    shards = sorted(CORPUS.glob("*.parquet"))
    if not shards:
        pytest.skip(f"needs the real text of {CORPUS.name}/, which is not on this machine")
    import pyarrow.parquet as pq

    return [text for shard in shards[:1] for text in pq.read_table(shard)["text"].to_pylist()]


def sample_texts() -> list[str]:
    """Some hundred kilobytes of varied text that every machine has: this repository's own."""
    root = Path(__file__).resolve().parents[2]
    files = sorted([*root.glob("nanochat/**/*.py"), *root.glob("*.md"), *root.glob("rustbpe/src/*.rs")])
    return [*(file.read_text(encoding="utf-8") for file in files), *ODD_TEXTS]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return sample_texts()


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> Tokenizer:
    return Tokenizer.train(texts, 2048)


@pytest.fixture(scope="session")
def oracle(tokenizer: Tokenizer) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "oracle", pat_str=tokenizer.pattern, mergeable_ranks=tokenizer.ranks(), special_tokens=tokenizer.specials
    )
