"""Between foreign model formats and checkpoints."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxslm.atomic import refuse_existing
from jaxslm.checkpoint import Manifest, params_sha256, save_checkpoint
from jaxslm.config import (
    DEFAULT_MAX_TOKENS,
    Calibration,
    ModelConfig,
    PromptConfig,
    RankerConfig,
    TemplateName,
    validate,
)
from jaxslm.convert.ranker_file import RankerFile, read_ranker_file
from jaxslm.errors import InputError
from jaxslm.model.decoder import Params
from jaxslm.progress import console
from jaxslm.prompt import Prompt

__all__ = ["convert"]


def convert(
    source: str,
    out: Path,
    *,
    template: TemplateName | None = None,
    instruction: str | None = None,
    max_tokens: int | None = None,
    max_item_tokens: int | None = None,
    labels: tuple[str, str] | None = None,
) -> Manifest:
    """Makes a checkpoint from a Hugging Face folder, a hub id or a .gguf file; returns its manifest.

    Args:
        source: a folder, a file that ends in .gguf, or `owner/name` of the Hugging Face hub.
        template: by default the Qwen3-Reranker prompt for the qwen3 family, else the plain yes/no prompt.
        instruction, max_tokens, max_item_tokens, labels: of the prompt; see `PromptConfig`. A row has by default at
            most 2,048 tokens, and never more than the model's `max_positions`.

    What is not given is as `jaxslm export` wrote it, where the folder is one of its own; its calibration comes along if
    weights and prompt are still those that it was fitted for.

    Raises:
        InputError: `out` exists, or the source is missing, damaged or of a kind that is not supported (tokenizers other
            than byte-level BPE are not).
    """
    refuse_existing(out)
    path = Path(source)
    if source.endswith(".gguf"):
        from jaxslm.convert.gguf import GGUF

        file = GGUF(path)
        model, tokenizer_files = file.read_config(), file.read_tokenizer_files()
        params, known = file.read_params(model), None
        origin = f"{path.name} (GGUF, dequantised from {file.quantisation})"
    else:
        from jaxslm.convert.hf import read_config, read_params, read_tokenizer_files

        folder = path if path.is_dir() else _download(source)
        model, tokenizer_files = read_config(folder), read_tokenizer_files(folder)
        params, known = read_params(folder, model), read_ranker_file(folder)
        origin = f"{path.name if path.is_dir() else source} (Hugging Face)"
    given = {
        "template": template,
        "instruction": instruction,
        "max_tokens": max_tokens,
        "max_item_tokens": max_item_tokens,
        "labels": labels,
    }
    prompt = _prompt(model, known, given)
    built = Prompt(tokenizer_files["tokenizer.json"].decode(), prompt)
    if built.vocab_size > model.vocab_size:
        raise InputError(f"{source}: the tokenizer has {built.vocab_size} ids, the model {model.vocab_size} rows")
    if not built.joins_as_one_text():
        raise InputError(
            f"{source}: the tokenizer reads the pieces of a prompt in another way than the whole text, as those of the"
            " SentencePiece kind do; it must be byte-level BPE"
        )
    tree = {"model": model, "prompt": prompt, "label_token_ids": built.label_token_ids}
    config = validate(RankerConfig, tree, source)
    calibration = _calibration(known, params, built) if known is not None else None
    return save_checkpoint(out, config, params, tokenizer_files, source=origin, calibration=calibration)


def _prompt(model: ModelConfig, known: RankerFile | None, given: Mapping[str, Any]) -> PromptConfig:
    """Returns the prompt of what is given, else of what the export says, else of defaults that suit the model."""
    settings: dict[str, Any] = {
        "template": "qwen3-reranker" if model.family == "qwen3" else "yes-no",
        "max_tokens": min(DEFAULT_MAX_TOKENS, model.max_positions),
    }
    if known is not None:
        settings = known.prompt.model_dump()
    return validate(
        PromptConfig, settings | {name: value for name, value in given.items() if value is not None}, "prompt"
    )


def _calibration(known: RankerFile, params: Params, prompt: Prompt) -> Calibration | None:
    """Returns an export's calibration if it was fitted for these parameters and this prompt; says so otherwise."""
    if known.calibration is None:
        return None
    if (known.params_sha256, known.template_sha256) == (params_sha256(params), prompt.sha256):
        return known.calibration
    console().print("the calibration is left out: it was fitted for other weights or another prompt")
    return None


def _download(hub_id: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        raise InputError(f"{hub_id}: no such folder, and not a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.jinja"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"{hub_id}: cannot be fetched from the hub ({str(error).splitlines()[0]})") from error
