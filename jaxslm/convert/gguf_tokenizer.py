"""The byte-level BPE tokenizer that a GGUF file's metadata describes, as files of a Hugging Face folder.

GGUF names the splitting rule (`tokenizer.ggml.pre`) instead of spelling it out; the rules below are those of llama.cpp
for the model families that we convert, in the form of the `tokenizers` package.
"""

import json
from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from jaxslm.errors import InputError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    words = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2(digits: bool) -> pre_tokenizers.PreTokenizer:
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_]) if digits else bytes_


_SPLITTING: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: _gpt2(digits=False),
    "smollm": lambda: _gpt2(digits=True),
    "llama-bpe": lambda: _split(_WORDS % "{1,3}"),
    "qwen2": lambda: _split(_WORDS % ""),
}


def build_tokenizer_files(field: Callable[..., Any]) -> dict[str, bytes]:
    """Returns `tokenizer.json`, `tokenizer_config.json` and, if there is one, `chat_template.jinja`.

    Args:
        field: `field(name, default)` returns a metadata value; without a default, a missing one is an InputError.

    Raises:
        InputError: the tokenizer is no byte-level BPE, its splitting rule is unknown, or its lists do not fit together.
    """
    model, rule = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    if model != "gpt2" or rule not in _SPLITTING:
        raise InputError(
            f"tokenizer {model!r} with splitting {rule!r} is not supported (gpt2 with {', '.join(_SPLITTING)} is)"
        )
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = field("tokenizer.ggml.merges")
    if not (_strings(tokens) and _strings(merges)) or not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise InputError("tokenizer: tokens and merges must be lists of strings, with a type for each token")
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise InputError("tokenizer: a token stands twice in the vocabulary")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys():
            raise InputError(f"tokenizer: merge {' '.join(pair)!r} is not made of tokens")
    # Llama 3 takes a word that is a token as it is, whatever the merges say.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=rule == "llama-bpe"))
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _SPLITTING[rule]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in _pairs(tokens, kinds) if kind == _CONTROL])
    tokenizer.add_tokens(
        [AddedToken(t, normalized=False) for t, kind in _pairs(tokens, kinds) if kind == _USER_DEFINED]
    )
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": _config(field, tokens)}
    template = field("tokenizer.chat_template", "")
    return files | ({"chat_template.jinja": template.encode()} if template else {})


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _pairs(tokens: list[str], kinds: list[int]) -> list[tuple[str, int]]:
    return list(zip(tokens, kinds, strict=True))


def _config(field: Callable[..., Any], tokens: list[str]) -> bytes:
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for role, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = field(f"tokenizer.ggml.{name}_token_id", -1)
        if not isinstance(number, int) or number >= len(tokens):
            raise InputError(f"tokenizer: {name}_token_id {number!r} is not one of {len(tokens)} tokens")
        if number >= 0:
            config[f"{role}_token"] = tokens[number]
    return (json.dumps(config, indent=1) + "\n").encode()
