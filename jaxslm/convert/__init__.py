"""Between foreign model formats and checkpoints."""

import re
from pathlib import Path

from jaxslm.atomic import refuse_existing
from jaxslm.checkpoint import Manifest, save_checkpoint
from jaxslm.config import PromptConfig, RankerConfig, TemplateName, validate
from jaxslm.errors import InputError
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
        instruction, max_tokens, max_item_tokens, labels: of the prompt; see `PromptConfig`.

    Raises:
        InputError: `out` exists, or the source is missing, damaged or of a kind that is not supported.
    """
    refuse_existing(out)
    path = Path(source)
    if source.endswith(".gguf"):
        from jaxslm.convert.gguf import GGUF

        file = GGUF(path)
        model, tokenizer_files = file.read_config(), file.read_tokenizer_files()
        params = file.read_params(model)
        origin = f"{path.name} (GGUF, dequantised from {file.quantisation})"
    else:
        from jaxslm.convert.hf import read_config, read_params, read_tokenizer_files

        folder = path if path.is_dir() else _download(source)
        model, tokenizer_files = read_config(folder), read_tokenizer_files(folder)
        params = read_params(folder, model)
        origin = f"{path.name if path.is_dir() else source} (Hugging Face)"
    settings = {
        "template": template or ("qwen3-reranker" if model.family == "qwen3" else "yes-no"),
        "instruction": instruction,
        "max_tokens": max_tokens,
        "max_item_tokens": max_item_tokens,
        "labels": labels,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    prompt = validate(PromptConfig, settings, "prompt")
    built = Prompt(tokenizer_files["tokenizer.json"].decode(), prompt)
    if built.vocab_size > model.vocab_size:
        raise InputError(f"{source}: the tokenizer has {built.vocab_size} ids, the model {model.vocab_size} rows")
    config = RankerConfig(model=model, prompt=prompt, label_token_ids=built.label_token_ids)
    return save_checkpoint(out, config, params, tokenizer_files, source=origin)


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
