"""Where evaluations leave their numbers: beside the checkpoint, and in results/<stage>.json for the report."""

import json
import os
from pathlib import Path
from typing import Any

from nanochat.errors import NanochatError
from nanochat.runtime import base_dir


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all. Raises NanochatError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise NanochatError(f"cannot write {path}: {error.strerror}; free some space or change its folder") from error


def record(stage: str, name: str, values: Any) -> Path:
    """Sets `name` in results/<stage>.json, keeping what other evaluations wrote there; returns the file."""
    path = base_dir() / "results" / f"{stage}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    write_json(path, {**content, name: values})
    return path
