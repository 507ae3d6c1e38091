"""The CORE evaluation bundle: one zip of 22 tasks, downloaded once, unpacked whole or not at all."""

import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import filelock

from nanochat.data.download import OFFLINE_VARIABLE, download, is_offline
from nanochat.errors import NanochatError
from nanochat.evaluation.core import load_tasks
from nanochat.runtime import base_dir

URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
INSIDE = "eval_bundle"  # the folder in the zip


def zip_problem(path: Path) -> str | None:
    """Why `path` is not a whole zip file (every checksum in it is verified); None when it is one."""
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return str(error)
    return f"{bad} in it is damaged" if bad else None


def fetch(data: Path | None = None, url: str = URL) -> Path:
    """The folder of the bundle: `data` where it is given, else the one in the base folder, downloaded when missing.

    Any number of processes may call this at once. Raises NanochatError.
    """
    if data is not None:
        return Path(data).expanduser()
    folder = base_dir() / "eval_bundle"
    if folder.exists():
        return folder
    if is_offline():
        raise NanochatError(f"{OFFLINE_VARIABLE} is set and {folder} does not exist; unset it, or give --data PATH")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_name(".eval_bundle.lock")):
        if not folder.exists():
            archive = folder.with_name("eval_bundle.zip")
            download(url, archive, problem=zip_problem)
            _unpack(archive, folder)
            archive.unlink()
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Unpacks beside `folder` and renames, so that `folder` never holds a part of the bundle."""
    temporary = Path(tempfile.mkdtemp(prefix=".eval_bundle-", dir=folder.parent))
    try:
        with zipfile.ZipFile(archive) as content:
            content.extractall(temporary)  # drops absolute paths and ".." of its own accord
        inside = temporary / INSIDE
        load_tasks(inside)
        os.replace(inside, folder)
    except OSError as error:
        raise NanochatError(f"cannot unpack {archive}: {error.strerror or error}; free some space") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
