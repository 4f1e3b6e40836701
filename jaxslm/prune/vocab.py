"""Vocabulary: keep the tokens that a corpus uses, and rewrite the tokenizer and the tables to match.

A BPE tokenizer applies merges in the order of their ranks. A token that survives needs every symbol on its way from
single characters (its merge closure); with those, any text of the corpus goes through the same merges as before and
encodes to the same tokens under their new ids. Other texts lose merges, so they encode to smaller pieces, in the end to
bytes, which all stay.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain, islice, pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from tokenizers import Tokenizer, pre_tokenizers

from jaxslm.checkpoint import Checkpoint
from jaxslm.errors import InputError
from jaxslm.prompt import Prompt, text_tokenizer

_TEXTS_PER_CALL = 1000


def cut_vocabulary(checkpoint: Checkpoint, texts: Iterable[str]) -> tuple[Checkpoint, Bool[np.ndarray, " V"]]:
    """Returns the checkpoint with the part of its vocabulary that `texts` need, and which old rows that is.

    Kept are the tokens of the texts wherever a prompt puts them, the prompt's own words and its labels, all bytes, all
    added (control) tokens, what the post-processor inserts, and the merge closure of these. Ids become dense in their
    old order; rows of the tables that no token has are dropped. Cost: tokenising the corpus a few times.

    Args:
        texts: queries, titles and texts of items, as they are in the data files.

    Returns:
        The cut checkpoint, whose manifest is the parent's but for configuration, tokenizer and template; and True for
        each of the old V rows that is kept: row i of the new tables is the i-th of these.

    Raises:
        InputError: no texts, a text that is no Unicode, or a tokenizer whose ids cannot be rewritten.
    """
    source = checkpoint.tokenizer_files["tokenizer.json"].decode()
    tokenizer = Tokenizer.from_str(source)
    tree = json.loads(tokenizer.to_str())
    _check_kind(tree["model"])
    kept = _used_ids(checkpoint.prompt, text_tokenizer(source), texts) | _fixed_ids(tree, tokenizer)
    kept |= _merge_closure(tree["model"], kept)
    keep_vocab_V = np.zeros(checkpoint.config.model.vocab_size, bool)
    keep_vocab_V[list(kept)] = True
    new_ids = {old: new for new, old in enumerate(np.flatnonzero(keep_vocab_V).tolist())}
    files = dict(checkpoint.tokenizer_files) | {"tokenizer.json": json.dumps(_renumbered(tree, new_ids)).encode()}
    _check_ids(files["tokenizer.json"].decode(), tokenizer, new_ids)
    _renumber_companions(files, new_ids)
    return _with_tables(checkpoint, files, keep_vocab_V, new_ids), keep_vocab_V


def _check_kind(model: Mapping[str, Any]) -> None:
    if model["type"] != "BPE":
        raise InputError(f"vocabulary: only BPE tokenizers can be cut, this one is {model['type']}")
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model[option]:
            raise InputError(f"vocabulary: a BPE tokenizer with {option} cannot be cut")


def _used_ids(prompt: Prompt, tokenizer: Tokenizer, texts: Iterable[str]) -> set[int]:
    """Ids of the texts, of the prompt's words and labels."""
    used = {*prompt.prefix_ids, *prompt.suffix_ids, *prompt.label_token_ids}
    ends = dict.fromkeys(("", "\n", prompt.template.after_query, prompt.template.after_item))
    rest, any_text = iter(texts), False
    while some := list(islice(rest, _TEXTS_PER_CALL)):
        any_text = True
        # A tokenizer may join what meets at the ends of a text, so it is encoded with every neighbour it can have.
        placed = [front + text.strip() + end for text in some for front in ("", " ") for end in ends]
        try:
            encodings = tokenizer.encode_batch_fast([*some, *placed, *ends], add_special_tokens=False)
        except TypeError as error:
            raise InputError("text: must be a string without halves of surrogate pairs") from error
        used.update(chain.from_iterable(encoding.ids for encoding in encodings))
    if not any_text:
        raise InputError("vocabulary: needs at least one text to keep the tokens of")
    return used


def _fixed_ids(tree: Mapping[str, Any], tokenizer: Tokenizer) -> set[int]:
    """Ids that stay whatever the corpus is: bytes, added tokens, the unknown one, padding, what is put around texts."""
    model, vocab = tree["model"], tree["model"]["vocab"]
    symbols = (*pre_tokenizers.ByteLevel.alphabet(), *(f"<0x{byte:02X}>" for byte in range(256)), model["unk_token"])
    fixed = {vocab[symbol] for symbol in symbols if symbol in vocab}
    fixed |= {token["id"] for token in tree["added_tokens"]}
    fixed |= {tree["padding"]["pad_id"]} if tree["padding"] else set()
    return fixed | {*tokenizer.encode("").ids, *tokenizer.encode("", "").ids}


def _merge_closure(model: Mapping[str, Any], kept: set[int]) -> set[int]:
    """Ids of all symbols that merging passes through on the way from the characters of the kept tokens to them."""
    vocab = model["vocab"]
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    symbols = chain.from_iterable(_merged(token, ranks) for token, number in vocab.items() if number in kept)
    return {vocab[symbol] for symbol in symbols if symbol in vocab}


def _merged(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """Every symbol that byte-pair encoding of `token` makes, its characters among them."""
    symbols = list(token)
    seen = set(symbols)
    while True:
        pairs = list(pairwise(symbols))
        ranked = [(ranks[pair], place) for place, pair in enumerate(pairs) if pair in ranks]
        if not ranked:
            return seen
        _, place = min(ranked)
        symbols[place : place + 2] = ["".join(pairs[place])]
        seen.add(symbols[place])


def _renumbered(tree: Mapping[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    """Returns the content of `tokenizer.json` with the tokens of `new_ids` alone, under their new ids."""
    model = tree["model"]
    vocab = {token: new_ids[number] for token, number in model["vocab"].items() if number in new_ids}
    merges = [pair for pair in model["merges"] if {*pair, "".join(pair)} <= vocab.keys()]
    return {
        **tree,
        "model": model | {"vocab": vocab, "merges": merges},
        "added_tokens": [token | {"id": new_ids[token["id"]]} for token in tree["added_tokens"]],
        "post_processor": tree["post_processor"] and _processor(tree["post_processor"], new_ids),
        "padding": tree["padding"] and tree["padding"] | {"pad_id": new_ids[tree["padding"]["pad_id"]]},
    }


def _processor(tree: dict[str, Any], new_ids: Mapping[int, int]) -> dict[str, Any]:
    match tree["type"]:
        case "Sequence":
            return tree | {"processors": [_processor(each, new_ids) for each in tree["processors"]]}
        case "TemplateProcessing":
            special = tree["special_tokens"].items()
            renumbered = {name: token | {"ids": [new_ids[old] for old in token["ids"]]} for name, token in special}
            return tree | {"special_tokens": renumbered}
        case "BertProcessing" | "RobertaProcessing":
            return tree | {name: [tree[name][0], new_ids[tree[name][1]]] for name in ("sep", "cls")}
        case _:
            return tree  # inserts nothing


def _renumber_companions(files: dict[str, bytes], new_ids: Mapping[int, int]) -> None:
    """Brings the ids in the other files of a tokenizer up to date."""
    try:
        if "added_tokens.json" in files:
            added = json.loads(files["added_tokens.json"])
            files["added_tokens.json"] = json.dumps({token: new_ids[old] for token, old in added.items()}).encode()
        if "tokenizer_config.json" in files:
            # A class of the family would rebuild the tokenizer its own way; this one takes `tokenizer.json` as it is.
            config = json.loads(files["tokenizer_config.json"]) | {"tokenizer_class": "PreTrainedTokenizerFast"}
            if decoder := config.get("added_tokens_decoder"):
                config["added_tokens_decoder"] = {str(new_ids[int(old)]): token for old, token in decoder.items()}
            files["tokenizer_config.json"] = (json.dumps(config, indent=1, ensure_ascii=False) + "\n").encode()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"tokenizer_config.json or added_tokens.json: broken ({error!r})") from None


def _check_ids(tokenizer_json: str, before: Tokenizer, new_ids: Mapping[int, int]) -> None:
    """The package numbers added tokens itself: what it makes of the new file is compared with what was meant."""
    cut = Tokenizer.from_str(tokenizer_json)
    expected = {token: new_ids[old] for token, old in before.get_vocab(True).items() if old in new_ids}
    around = [new_ids[old] for old in before.encode("", "").ids]
    if cut.get_vocab(True) != expected or cut.encode("", "").ids != around:
        raise InputError("vocabulary: this tokenizer's ids cannot be made dense")


def _with_tables(
    checkpoint: Checkpoint, files: Mapping[str, bytes], keep_vocab_V: np.ndarray, new_ids: Mapping[int, int]
) -> Checkpoint:
    rows = jnp.asarray(np.flatnonzero(keep_vocab_V))
    tables = {name: checkpoint.params[name][rows] for name in ("embedding", "head") if name in checkpoint.params}
    config = checkpoint.config
    no, yes = (new_ids[old] for old in config.label_token_ids)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"vocab_size": len(new_ids)}), "label_token_ids": (no, yes)}
    )
    tokenizer_json = files["tokenizer.json"]
    changes = {
        "ranker": config,
        "tokenizer_sha256": hashlib.sha256(tokenizer_json).hexdigest(),
        "template_sha256": Prompt(tokenizer_json.decode(), config.prompt).sha256,
    }
    manifest = checkpoint.manifest.model_copy(update=changes)
    return replace(checkpoint, manifest=manifest, params=checkpoint.params | tables, tokenizer_files=files)
