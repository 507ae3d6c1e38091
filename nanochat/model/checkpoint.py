"""Checkpoints: one folder per step, complete or absent.

    <base dir>/base_checkpoints/<tag>/step_000500/
        model.safetensors       parameters by name
        optimizer.safetensors   "<parameter>.<field>", whole tensors: independent of the number of ranks
        checkpoint.json         {"meta": what a run needs to go on, "files": {name: {bytes, crc32}}}

A checkpoint is written into a hidden folder, synced, and renamed: a kill at any moment leaves the old ones untouched
and at most a hidden leftover, removed at the next save. checkpoint.json is the manifest: a folder counts only if every
file it lists has its size, and the checksums are verified when the file is read. The tensors are written here rather
than by the safetensors library, which would copy the whole model to bytes first; reading goes through it,
memory-mapped. Nothing is pickled.
"""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanochat.errors import NanochatError, UsageError
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT
from nanochat.runtime import base_dir
from nanochat_kernels import KernelPlan

MODEL, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "checkpoint.json"
STAGES = {"base": "nanochat train", "sft": "nanochat sft", "rl": "nanochat rl"}  # and the command that makes them
PIECE = 1 << 24  # bytes written, or summed, at a time
OUT_OF_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def save(
    folder: Path,
    step: int,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor] | None,
    meta: dict[str, Any],
    keep_last: int | None = None,
) -> Path:
    """Writes the checkpoint of `step` and then removes all but the `keep_last` newest; returns its folder.

    Called on rank 0 alone. Raises NanochatError, leaving nothing half-written, when the disk is full or not writable.
    """
    target = step_folder(folder, step)
    hidden = folder / f".{target.name}.partial"
    tensors = {MODEL: model_state} | ({OPTIMIZER: optimizer_state} if optimizer_state is not None else {})
    need = sum(t.numel() * t.element_size() for state in tensors.values() for t in state.values())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".step_*"):
            shutil.rmtree(leftover, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        if free < need:
            raise OSError(errno.ENOSPC, f"{free / 1e9:.2f} GB free")
        hidden.mkdir()
        files = {name: _write_tensors(hidden / name, state) for name, state in tensors.items()}
        _write_json(hidden / MANIFEST, {"meta": meta | {"step": step}, "files": files})
        _sync_folder(hidden)
        if target.exists():  # the same step again: the new one is complete, so the old one may go
            shutil.rmtree(target)
        os.replace(hidden, target)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        raise _save_failed(error, target, need, latest(folder)) from error
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    if keep_last is not None:
        for old in steps(folder)[: -max(1, keep_last)]:
            shutil.rmtree(step_folder(folder, old), ignore_errors=True)
    return target


def annotate(folder: Path, step: int, **values: Any) -> None:
    """Adds to the meta of a saved checkpoint what became known after it was written, such as val_bpb."""
    path = step_folder(folder, step) / MANIFEST
    content = _manifest(folder, step)
    content["meta"] |= values
    try:
        _write_json(path.with_suffix(".partial"), content)
        os.replace(path.with_suffix(".partial"), path)
    except OSError as error:
        path.with_suffix(".partial").unlink(missing_ok=True)
        raise _save_failed(error, path, 1 << 20, step) from error


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    found = []
    for path in folder.glob("step_*"):
        digits = path.name.removeprefix("step_")
        if digits.isdigit() and _damage(path) is None:
            found.append(int(digits))
    return sorted(found)


def damaged(folder: Path) -> dict[str, str]:
    """The checkpoints in `folder` that do not count, and what is wrong with each."""
    found = {path.name: _damage(path) for path in sorted(folder.glob("step_*"))}
    return {name: damage for name, damage in found.items() if damage is not None}


def latest(folder: Path) -> int | None:
    """The newest complete step, or None."""
    found = steps(folder)
    return found[-1] if found else None


def load_meta(folder: Path, step: int | None = None) -> dict[str, Any]:
    """What was saved as meta at `step`, by default the newest complete one."""
    return _manifest(folder, _choose(folder, step))["meta"]


def load_state(folder: Path, step: int | None = None) -> dict[str, Tensor]:
    """The model's parameters by name, memory-mapped, as stored."""
    return _read_tensors(folder, _choose(folder, step), MODEL)


def load_optimizer(folder: Path, step: int | None = None) -> dict[str, Tensor]:
    """The optimizer's state, whole tensors by "<parameter>.<field>", memory-mapped."""
    return _read_tensors(folder, _choose(folder, step), OPTIMIZER)


def has_optimizer(folder: Path, step: int | None = None) -> bool:
    """Whether a checkpoint holds an optimizer's state; imported ones do not."""
    return (step_folder(folder, _choose(folder, step)) / OPTIMIZER).exists()


def load_model(
    folder: Path,
    step: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    plan: KernelPlan | None = None,
) -> tuple[GPT, dict[str, Any]]:
    """The model of a checkpoint on `device`, computing in `dtype` with the backends of `plan`, and its meta."""
    step = _choose(folder, step)
    meta = load_meta(folder, step)
    with torch.device("meta"):
        model = GPT(GPTConfig.from_dict(meta["config"]), plan=plan, dtype=dtype)
    model.to_empty(device=device)
    load_parameters(model, _read_tensors(folder, step, MODEL), str(step_folder(folder, step)))
    return model, meta


def load_parameters(model: GPT, state: Mapping[str, Tensor], source: str) -> None:
    """Copies `state` into the model, converting dtypes. Raises NanochatError where names or shapes differ."""
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]
        raise NanochatError(
            f"{source} does not fit its own configuration ({' '.join(first).strip() or error}); "
            "it was written by another version, or altered: use an earlier step or train again"
        ) from error


def find(stage: str, tag: str | None = None) -> Path:
    """The folder of the checkpoints of `tag` at a stage (base, sft, rl); the most recently written tag when None."""
    if stage not in STAGES:
        raise UsageError(f"unknown stage {stage!r}; use one of {', '.join(STAGES)}")
    root = base_dir() / f"{stage}_checkpoints"
    tags = {path.name: path for path in root.glob("*") if path.is_dir() and steps(path)}
    if not tags:
        raise NanochatError(f"there is no {stage} checkpoint in {root}; make one with: {STAGES[stage]}")
    if tag is None:
        return max(tags.values(), key=lambda path: (step_folder(path, steps(path)[-1]) / MANIFEST).stat().st_mtime)
    if tag not in tags:
        have = ", ".join(sorted(tags))
        raise NanochatError(f"there is no {stage} checkpoint called {tag!r} in {root}; it has {have}")
    return tags[tag]


def _choose(folder: Path, step: int | None) -> int:
    if step is not None and step_folder(folder, step).is_dir():
        return step
    complete = steps(folder)
    if not complete:
        detail = "; ".join(f"{name}: {damage}" for name, damage in damaged(folder).items())
        detail = f" ({detail})" if detail else ""
        raise NanochatError(f"no complete checkpoint in {folder}{detail}; train, or point to another folder or tag")
    if step is not None:
        raise NanochatError(f"no checkpoint of step {step} in {folder}; it has {', '.join(map(str, complete))}")
    return complete[-1]


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint folder at a glance (manifest and sizes), or None."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, facts in files.items():
            size = (path / name).stat().st_size
            if size != facts["bytes"]:
                return f"{name} has {size:,} bytes, {facts['bytes']:,} were written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None


def _manifest(folder: Path, step: int) -> dict[str, Any]:
    path = step_folder(folder, step)
    damage = _damage(path)
    if damage:
        raise _unreadable(path, damage)
    return json.loads((path / MANIFEST).read_text(encoding="utf-8"))


def _unreadable(path: Path, damage: str) -> NanochatError:
    others = [str(s) for s in steps(path.parent) if step_folder(path.parent, s) != path]
    remedy = f"use another step ({', '.join(others)})" if others else "no other step is complete: train again"
    return NanochatError(f"the checkpoint {path} is damaged: {damage}; delete that folder and {remedy}")


def _save_failed(error: OSError, target: Path, need: int, last_good: int | None) -> NanochatError:
    kept = "no earlier checkpoint exists" if last_good is None else f"the checkpoint of step {last_good} is untouched"
    if error.errno in OUT_OF_SPACE:
        return NanochatError(
            f"no room for {target}, which takes {need / 1e9:.2f} GB: {error.strerror}; {kept}. Free some space, lower "
            "--keep-last, or set NANOCHAT_BASE_DIR to a larger disk, then run the same command to go on"
        )
    return NanochatError(f"cannot write {target}: {error}; {kept}. Check the folder's permissions, then run again")


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in order, a piece at a time."""
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel():
        data = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        for start in range(0, len(data), PIECE):
            yield data[start : start + PIECE]


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Writes a safetensors file: 8 bytes with the length of a JSON header, the header, the raw tensors one by one."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crc = size = 0
    with open(path, "xb", buffering=0) as file:

        def write(piece: bytes | memoryview) -> None:
            nonlocal crc, size
            crc, size = zlib.crc32(piece, crc), size + len(piece)
            while piece:  # a raw write may take a part only
                piece = piece[file.write(piece) :]

        write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in _pieces(tensor):
                write(piece)
        os.fsync(file.fileno())
    return {"bytes": size, "crc32": crc}


def _read_tensors(folder: Path, step: int, name: str) -> dict[str, Tensor]:
    facts = _manifest(folder, step)["files"].get(name)
    path = step_folder(folder, step) / name
    if facts is None:
        raise NanochatError(f"{path.parent} was saved without {name}; it serves for inference, not to go on training")
    crc = 0
    try:
        with open(path, "rb") as file:
            while piece := file.read(PIECE):
                crc = zlib.crc32(piece, crc)
        if crc != facts["crc32"]:
            raise _unreadable(path.parent, f"the checksum of {name} is wrong")
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path.parent, f"{name} cannot be read ({error})") from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Makes new names durable. Some file systems cannot sync a folder; then there is nothing to wait for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
