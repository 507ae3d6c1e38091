"""`nanochat import` and `nanochat export`: the doors to karpathy/nanochat and to Hugging Face transformers.

Both only translate. An imported checkpoint is one of ours from then on: it can be evaluated, fine-tuned, served,
exported. An export changes nothing here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from nanochat.errors import NanochatError, UsageError
from nanochat.exchange import upstream
from nanochat.model import checkpoint
from nanochat.model.compat import (
    config_from_nanochat,
    state_from_nanochat,
    to_nanochat_config,
    to_nanochat_state,
)
from nanochat.model.gpt import GPT
from nanochat.runtime import DTYPES, base_dir
from nanochat.tokenizer import Tokenizer, default_tokenizer_dir

Stage = Literal["base", "sft", "rl"]


@dataclass(frozen=True)
class ImportConfig:
    """Takes over a checkpoint and its tokenizer. Nothing in its files is run, whatever they hold."""

    from_nanochat: Annotated[Path, tyro.conf.arg(help="folder of karpathy/nanochat with model_<step>.pt in it")]
    step: Annotated[int | None, tyro.conf.arg(help="which step; the last one by default")] = None
    tokenizer: Annotated[Path | None, tyro.conf.arg(help="its tokenizer.pkl; by default looked for nearby")] = None
    stage: Annotated[Stage | None, tyro.conf.arg(help="what it is; by default told by the folder's place")] = None
    tag: Annotated[str | None, tyro.conf.arg(help="name of the model here; the folder's by default")] = None


@dataclass(frozen=True)
class ExportConfig:
    """Writes a model, or its tokenizer, for use elsewhere. Several targets may be given."""

    hf: Annotated[Path | None, tyro.conf.arg(help="folder for Hugging Face transformers")] = None
    to_nanochat: Annotated[Path | None, tyro.conf.arg(help="checkpoint folder for karpathy/nanochat")] = None
    tokenizer_json: Annotated[Path | None, tyro.conf.arg(help="file for Hugging Face tokenizers")] = None
    stage: Annotated[Stage, tyro.conf.arg(help="which stage's model")] = "base"
    tag: Annotated[str | None, tyro.conf.arg(help="which model; the newest by default")] = None
    step: Annotated[int | None, tyro.conf.arg(help="which step; the last one by default")] = None
    dtype: Annotated[
        Literal["float32", "bfloat16"], tyro.conf.arg(help="of the Hugging Face weights; float32 loses nothing")
    ] = "float32"


def run_import(config: ImportConfig) -> Path:
    """Imports and returns the folder of the new checkpoint. Raises NanochatError, leaving nothing half-written."""
    source = config.from_nanochat.expanduser()
    if not source.is_dir():
        raise UsageError(f"{source} is no folder; give the one that holds model_<step>.pt")
    source = source.resolve()
    tokenizer_path = config.tokenizer or upstream.find_tokenizer(source)
    if tokenizer_path is None:
        raise NanochatError(f"no {upstream.TOKENIZER} in or near {source}; name it with --tokenizer FILE")
    tokenizer = upstream.read_tokenizer(tokenizer_path)
    step, theirs, meta = upstream.read_checkpoint(source, config.step)
    model = config_from_nanochat(meta["model_config"], theirs)
    if tokenizer.vocab_size != model.vocab_size:
        raise NanochatError(
            f"{tokenizer_path} has {tokenizer.vocab_size:,} tokens, the model {model.vocab_size:,}: they do not belong "
            "together; name the right one with --tokenizer FILE"
        )
    state = state_from_nanochat(theirs, model)
    with torch.device("meta"):
        checkpoint.load_parameters(GPT(model), {k: v.to("meta") for k, v in state.items()}, str(source))
    stage = config.stage or upstream.STAGES.get(source.parent.name, "base")
    target = base_dir() / f"{stage}_checkpoints" / (config.tag or source.name)
    if checkpoint.latest(target) is not None:
        raise NanochatError(f"{target} already holds a model; choose another name with --tag")
    _adopt(tokenizer)
    facts = {
        "stage": stage,
        "config": model.to_dict(),
        "tokenizer": tokenizer.fingerprint,
        "val_bpb": meta.get("val_bpb"),
        "run": {"imported_from": "karpathy/nanochat", "settings": meta.get("user_config")},
    }
    path = checkpoint.save(target, step, state, None, facts)
    left = len(list(source.glob("optim_*")))
    print(f"imported step {step} of {source.name} ({model.architecture} architecture, {model.layers} layers) to {path}")
    if left:
        print(
            f"its optimizer state ({left} files) stays behind: training that goes on from here starts with a fresh one"
        )
    return path


def _adopt(tokenizer: Tokenizer) -> None:
    """Puts the tokenizer where the pipeline looks for it, unless another one is there, which other models need."""
    folder = default_tokenizer_dir()
    try:
        present = Tokenizer.load(folder).fingerprint
    except NanochatError:
        if any(folder.glob("*")):
            raise
        tokenizer.save(folder)
        return
    if present != tokenizer.fingerprint:
        raise NanochatError(
            f"{folder} holds another tokenizer ({present}, the imported one is {tokenizer.fingerprint}), which the "
            "models here need; import into a folder of its own by setting NANOCHAT_BASE_DIR"
        )


def run_export(config: ExportConfig) -> None:
    """Writes every target that was asked for."""
    if config.hf is None and config.to_nanochat is None and config.tokenizer_json is None:
        raise UsageError("say what to export: --hf DIR, --to-nanochat DIR or --tokenizer-json FILE")
    tokenizer = Tokenizer.load(default_tokenizer_dir())
    if config.tokenizer_json is not None:
        from nanochat.exchange.tokenizer_json import write_tokenizer_json

        write_tokenizer_json(tokenizer, config.tokenizer_json)
        print(f"wrote {config.tokenizer_json}")
    if config.hf is None and config.to_nanochat is None:
        return
    folder = checkpoint.find(config.stage, config.tag)
    step = config.step if config.step is not None else checkpoint.latest(folder)
    model, meta = checkpoint.load_model(folder, step)
    if meta.get("tokenizer") not in (None, tokenizer.fingerprint):
        raise NanochatError(
            f"{folder} was trained with the tokenizer {meta['tokenizer']}, but {default_tokenizer_dir()} holds "
            f"{tokenizer.fingerprint}; set NANOCHAT_BASE_DIR to where both belong together"
        )
    if config.to_nanochat is not None:
        out, state = config.to_nanochat, checkpoint.load_state(folder, step)
        theirs = {
            "step": meta["step"],
            "val_bpb": meta.get("val_bpb"),
            "model_config": to_nanochat_config(model.config),
        }
        upstream.write_checkpoint(out, meta["step"], to_nanochat_state(state, model.config), theirs)
        upstream.write_tokenizer(out / "tokenizer", tokenizer)
        print(f"wrote {out}, a checkpoint folder of karpathy/nanochat, with its tokenizer in {out / 'tokenizer'}")
    if config.hf is not None:
        from nanochat.exchange.hugging_face import write_model

        print(write_model(config.hf, model, tokenizer, DTYPES[config.dtype]))
