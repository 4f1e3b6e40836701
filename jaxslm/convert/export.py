"""From checkpoints to Hugging Face folders that `transformers` loads with plain Auto classes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from jaxslm.atomic import cannot_write, new_folder, refuse_existing
from jaxslm.checkpoint import Checkpoint, load_checkpoint, params_sha256
from jaxslm.config import ModelConfig
from jaxslm.convert.hf import NAMES
from jaxslm.convert.ranker_file import RANKER_FILE, RankerFile
from jaxslm.convert.tensors import is_matrix
from jaxslm.convert.uniform import fill_up
from jaxslm.errors import InputError
from jaxslm.model.cost import count_parameters
from jaxslm.model.decoder import Params
from jaxslm.model.head import label_rows

_CLASSES = {"qwen3": "Qwen3", "llama": "Llama"}
_ROLES = ("bos", "eos", "pad")
_CARD = """\
---
library_name: transformers
pipeline_tag: {pipeline}
tags: [text-ranking]
---

A relevance ranker, exported by jaxslm (source: {source}; params_sha256 {sha256}). It reads rows of this text (written
as a JSON string), tokenised without tokens added around it (`add_special_tokens=False`). An item that is too long loses
its end, never the words after it.

```json
{row}
```

{head}
"""
_VOCABULARY = """\
`AutoModelForCausalLM`. With z the logits after the last token, P(yes) = sigmoid(z[{yes}] - z[{no}])."""
_CLASSIFIER = """\
`AutoModelForSequenceClassification` with `num_labels = 1`. The logit is z_yes - z_no and its sigmoid P(yes): `score` is
the vocabulary row of yes ({yes}) minus that of no ({no}), read after the last token that is not padding. `transformers`
finds that token by `pad_token_id` = {pad}, so rows of different lengths must be padded with it, on either side and with
an attention mask. No row ends in it by itself."""


def export_hf(checkpoint: Path, out: Path, *, classifier: bool = False) -> dict[str, Any]:
    """Writes a checkpoint as a Hugging Face folder: config, safetensors, tokenizer and a card that states the prompt.

    Values and dtype of the parameters are kept, so `jaxslm convert` gives them back bit for bit; `jaxslm.json` tells it
    prompt and calibration (the card's prompt is for people). A Hugging Face config has one width for all layers: where
    pruning left several, narrower layers are filled up with zeros.

    Args:
        classifier: for `AutoModelForSequenceClassification` with one label, whose logit is z_yes - z_no after the last
            token that is not padding, in place of the vocabulary head. `convert` does not read it back.

    Returns:
        What was written, as the command line prints it.

    Raises:
        InputError: `out` exists or cannot be written, the checkpoint cannot be loaded, or (for a classifier) no token
            can serve as padding. Nothing is left behind.
    """
    refuse_existing(out)
    loaded = load_checkpoint(checkpoint)
    model, params = fill_up(loaded.config.model, loaded.params)
    config = hf_config(model, loaded.manifest.params_dtype, classifier=classifier)
    tokens = _Tokens(loaded)
    if classifier:
        tokens.choose_padding()
    config |= {f"{role}_token_id": number for role, number in tokens.ids.items()}
    tensors = hf_tensors(params)
    if classifier:
        tensors = classifier_tensors(tensors, params, loaded.config.label_token_ids)
    ranker = RankerFile(
        prompt=loaded.config.prompt,
        calibration=loaded.manifest.calibration,
        params_sha256=params_sha256(params),
        template_sha256=loaded.manifest.template_sha256,
    )
    with new_folder(out) as folder:
        try:
            write_hf_model(folder, config, tensors)
            for name, content in tokens.files().items():
                (folder / name).write_bytes(content)
            (folder / RANKER_FILE).write_text(ranker.model_dump_json(indent=1) + "\n", encoding="utf-8")
            (folder / "README.md").write_text(_card(loaded, tokens.ids["pad"], classifier=classifier), encoding="utf-8")
        except OSError as error:
            raise cannot_write(out, error) from error
    return {
        "out": str(out),
        "format": "hf",
        "architecture": config["architectures"][0],
        "dtype": loaded.manifest.params_dtype,
        "parameters": sum(tensor.size for tensor in tensors.values()),
        "zeros_added": count_parameters(model).total - count_parameters(loaded.config.model).total,
        "params_sha256": loaded.manifest.params_sha256,
    }


def write_hf_model(folder: Path, config: Mapping[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Writes `config.json` and `model.safetensors` to an existing folder. Raises OSError when the disk does not."""
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error


def hf_config(config: ModelConfig, dtype: str = "float32", *, classifier: bool = False) -> dict[str, Any]:
    """Returns the content of `config.json` for a model of uniform widths.

    Args:
        dtype: of the stored parameters. classifier: one label in place of the vocabulary head.

    Raises:
        InputError: widths differ between layers, which no Hugging Face config can say.
    """
    for name, widths in (("mlp_width", config.mlp_width_by_layer), ("num_kv_heads", config.kv_heads_by_layer)):
        if len(set(widths)) != 1:
            raise InputError(
                f"{name} differs between layers ({', '.join(map(str, widths))}), and a Hugging Face config has one"
                " number for all layers"
            )
    K = config.kv_heads_by_layer[0]
    scaling = {}
    if config.rope_scaling:
        scaling = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    head = "ForSequenceClassification" if classifier else "ForCausalLM"
    tree = {
        "architectures": [_CLASSES[config.family] + head],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width_by_layer[0],
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": K * config.queries_per_kv,
        "num_key_value_heads": K,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        # transformers 5 reads `rope_parameters`, older releases only the two names below it.
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling or None,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "torch_dtype": dtype,
    }
    return tree | ({"id2label": {"0": "relevant"}, "label2id": {"relevant": 0}} if classifier else {})


def hf_tensors(params: Params) -> dict[str, np.ndarray]:
    """Returns parameters under Hugging Face's names, linear maps as (out, in), in their own dtype."""
    tensors = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = tuple(key.key for key in keys)
        array = np.asarray(leaf)
        tensors[NAMES.of(path)] = np.ascontiguousarray(array.T if is_matrix(path) else array)
    return tensors


def classifier_tensors(
    tensors: Mapping[str, np.ndarray], params: Params, label_token_ids: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Returns `hf_tensors` with one row in place of the vocabulary head, whose logit is z_yes - z_no."""
    no, yes = np.asarray(label_rows(params, label_token_ids))
    body = {name: tensor for name, tensor in tensors.items() if name != NAMES.head}
    return body | {"score.weight": (yes - no)[None].astype(tensors[NAMES.embedding].dtype)}


class _Tokens:
    """A checkpoint's tokenizer files, and the tokens they name for the beginning, the end and padding."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._files = checkpoint.tokenizer_files
        self._tokenizer = Tokenizer.from_str(self._files["tokenizer.json"].decode())
        self._ends_rows = checkpoint.prompt.suffix_ids[-1]
        # Without a class of its own, `transformers` would build the family's tokenizer and ignore how this one splits.
        self._config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        try:
            self._config |= dict(json.loads(self._files.get("tokenizer_config.json", b"{}")))
        except (ValueError, TypeError) as error:
            raise InputError(f"tokenizer_config.json: broken JSON ({error})") from None
        self.ids: dict[str, int | None] = {role: self._named(role) for role in _ROLES}

    def files(self) -> dict[str, bytes]:
        """Returns the files as a Hugging Face folder holds them."""
        config = json.dumps(self._config, indent=1, ensure_ascii=False) + "\n"
        return dict(self._files) | {"tokenizer_config.json": config.encode()}

    def choose_padding(self) -> None:
        """Pads with the tokenizer's own token, the end token, or any other special one that no row ends in.

        Raises:
            InputError: there is none: the last token of a row could not be told from padding.
        """
        added = self._tokenizer.get_added_tokens_decoder()
        special = [number for number, token in sorted(added.items()) if token.special]
        for number in (self.ids["pad"], self.ids["eos"], *special):
            if number is not None and number != self._ends_rows:
                self.ids["pad"], self._config["pad_token"] = number, self._tokenizer.id_to_token(number)
                return
        raise InputError("export: a classifier needs a special token for padding, and the tokenizer has none to spare")

    def _named(self, role: str) -> int | None:
        token = self._config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found: int | None = self._tokenizer.token_to_id(token) if isinstance(token, str) else None
        return found


def _card(checkpoint: Checkpoint, pad: int | None, *, classifier: bool) -> str:
    no, yes = checkpoint.config.label_token_ids
    row = checkpoint.prompt.text_of_row("{query}", "{item}")
    return _CARD.format(
        pipeline="text-classification" if classifier else "text-generation",
        source=checkpoint.manifest.source,
        sha256=checkpoint.manifest.params_sha256,
        row=json.dumps(row, ensure_ascii=False),
        head=(_CLASSIFIER if classifier else _VOCABULARY).format(yes=yes, no=no, pad=pad),
    )
