"""A cut vocabulary: the corpus under its mapped ids and with the same scores, other texts in smaller pieces."""

import json
import tempfile
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from jaxslm.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from jaxslm.config import PromptConfig, RankerConfig
from jaxslm.data_files import Item, read_items
from jaxslm.errors import InputError
from jaxslm.model.decoder import Decoder
from jaxslm.model.head import label_logits, label_rows
from jaxslm.model.layout import Rows
from jaxslm.prompt import Prompt, text_tokenizer
from jaxslm.prune.vocab import cut_vocabulary
from tests.demo_data import demo_folder, smollm2
from tests.tiny import NOT_MARKED_SPECIAL, QWEN_PATTERN, SPECIALS, tiny_config, tiny_params

WORDS = [
    *(
        "python",
        "developer",
        "engineer",
        "engineering",
        "nurse",
        "nursing",
        "welder",
        "welding",
        "the",
        "then",
        "there",
    ),
    *("yes", "no", "café", "東京", "job", "jobs", "posting:", "(12)", "truck-driver", "...", "!?", "\n\n", "tab\t", ""),
]
GENERATOR = np.random.default_rng(0)
SYLLABLES = [first + second for first in "bdfklmnprst" for second in ("a", "e", "in", "or", "us")]
MADE = ["".join(GENERATOR.choice(SYLLABLES, 3)) for _ in range(200)]
TRAINING = [
    " ".join(GENERATOR.choice(WORDS + MADE, 20)) + str(GENERATOR.choice([".", "?\n", "\n\n", " yes no"]))
    for _ in range(600)
]
CORPUS = ["python engineering, the café.", " welder (12)\n\nwelding? ", "<|im_end|> is no control token", "東京"]
ROWS = 900
"""Rows of the models' tables: more than there are tokens, as in real models."""


@cache
def trained(kind: str) -> str:
    """A BPE tokenizer trained on made text.

    "last": Qwen's splitting, control tokens behind the vocabulary. "first": control tokens are its first ids, as in
    SmolLM2, and texts get one in front. "whole-words": Llama 3's, where a word that is a token is taken as it is.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "whole-words"))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "first")
    tokenizer.pre_tokenizer = to_bytes
    if kind != "first":
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"), to_bytes]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(SPECIALS) if kind == "first" else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TRAINING, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in NOT_MARKED_SPECIAL])
    if kind == "first":
        start = tokenizer.token_to_id(SPECIALS[1])
        tokenizer.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(single=f"{SPECIALS[1]} $A", special_tokens=[(SPECIALS[1], start)]),
            ]
        )
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id(SPECIALS[2]), pad_token=SPECIALS[2])
    return str(tokenizer.to_str())


KINDS = ("last", "first", "whole-words")


def saved(path: Path, tokenizer_json: str, *, tied: bool = True, **files: bytes) -> Checkpoint:
    prompt = PromptConfig(template="yes-no", instruction="Match?", labels=(" no", " yes"), max_tokens=200)
    labels = Prompt(tokenizer_json, prompt).label_token_ids
    config = RankerConfig(
        model=tiny_config("llama", vocab_size=ROWS, tie_embeddings=tied), prompt=prompt, label_token_ids=labels
    )
    contents = {"tokenizer.json": tokenizer_json.encode()}
    contents |= {f"{name}.json": content for name, content in files.items()}
    save_checkpoint(path, config, tiny_params(config.model), contents, source="random")
    return load_checkpoint(path)


@cache
def uncut(kind: str) -> Checkpoint:
    with tempfile.TemporaryDirectory() as folder:
        return saved(Path(folder) / "ckpt", trained(kind), tied=kind != "last")


@cache
def cut_tokenizer(kind: str) -> Tokenizer:
    return texts_of(cut_vocabulary(uncut(kind), CORPUS)[0])


def tokenizer_of(checkpoint: Checkpoint) -> Tokenizer:
    return Tokenizer.from_str(checkpoint.tokenizer_files["tokenizer.json"].decode())


def texts_of(checkpoint: Checkpoint) -> Tokenizer:
    return text_tokenizer(checkpoint.tokenizer_files["tokenizer.json"].decode())


def new_ids(keep: np.ndarray) -> dict[int, int]:
    return {int(old): new for new, old in enumerate(np.flatnonzero(keep))}


def mapped(checkpoint: Checkpoint, keep: np.ndarray, text: str) -> list[int]:
    """The old ids of a text, renumbered; KeyError if one is not kept."""
    return [new_ids(keep)[old] for old in texts_of(checkpoint).encode(text, add_special_tokens=False).ids]


def label_logits_of(checkpoint: Checkpoint, row: list[int]) -> np.ndarray:
    """The logits of (no, yes) after a row of token ids, [1, 2]."""
    layout = Rows(jnp.ones((1, len(row)), bool))
    states: Any = Decoder(checkpoint.config.model).apply({"params": checkpoint.params}, jnp.asarray([row]), layout)
    return np.asarray(label_logits(states, label_rows(checkpoint.params, checkpoint.config.label_token_ids)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_corpus_keeps_its_tokens_and_scores(tmp_path: Path, kind: str) -> None:
    before = uncut(kind)
    cut, keep = cut_vocabulary(before, iter(CORPUS))
    save_checkpoint(tmp_path / "cut", cut.config, cut.params, cut.tokenizer_files, source="cut")
    after = load_checkpoint(tmp_path / "cut")
    assert 256 < after.config.model.vocab_size == keep.sum() < 450 < before.prompt.vocab_size
    for text in CORPUS:
        found = texts_of(after).encode(text, add_special_tokens=False).ids
        assert found == mapped(before, keep, text)
    query = CORPUS[0]
    items: list[str | Item] = [*CORPUS, Item(id="i", title=CORPUS[0], text=CORPUS[1])]
    old, new = before.prompt.encode(query, items), after.prompt.encode(query, items)
    ids = new_ids(keep)
    assert new.prefix_ids == [ids[number] for number in old.prefix_ids]
    assert new.item_ids == [[ids[number] for number in row] for row in old.item_ids]
    row = old.prefix_ids + old.item_ids[0]
    np.testing.assert_array_equal(label_logits_of(after, [ids[number] for number in row]), label_logits_of(before, row))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_bytes_control_tokens_and_closed_under_merges(kind: str) -> None:
    before = uncut(kind)
    cut, keep = cut_vocabulary(before, CORPUS)
    old, new = tokenizer_of(before), tokenizer_of(cut)
    control = {token.content for token in old.get_added_tokens_decoder().values()}
    assert {token.content for token in new.get_added_tokens_decoder().values()} == control
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= new.get_vocab().keys()
    ids = new_ids(keep)
    expected = {token: ids[number] for token, number in old.get_vocab().items() if number in ids}
    assert new.get_vocab() == expected
    assert sorted(expected.values()) == list(range(len(expected)))
    for token in expected.keys() - control:
        pieces = [[piece.value for piece in each.model.tokenize(token)] for each in (old, new)]
        assert pieces[0] == pieces[1]
    np.testing.assert_array_equal(cut.params["embedding"], before.params["embedding"][np.flatnonzero(keep)])
    if "head" in before.params:
        np.testing.assert_array_equal(cut.params["head"], before.params["head"][np.flatnonzero(keep)])
    assert cut.prompt.label_token_ids == cut.config.label_token_ids


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=40) | st.lists(st.sampled_from(WORDS)).map(" ".join))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(kind: str, text: str) -> None:
    tokenizer = cut_tokenizer(kind)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == (text if kind == "first" else unicodedata.normalize("NFC", text))


@pytest.mark.parametrize("kind", KINDS)
@given(corpus=st.lists(st.lists(st.sampled_from(WORDS), min_size=1).map(" ".join), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_any_corpus_keeps_its_tokens(kind: str, corpus: list[str]) -> None:
    before = uncut(kind)
    cut, keep = cut_vocabulary(before, corpus)
    for text in corpus:
        assert texts_of(cut).encode(text, add_special_tokens=False).ids == mapped(before, keep, text)
    again, all_kept = cut_vocabulary(cut, corpus)
    assert all_kept.all()
    assert again.tokenizer_files["tokenizer.json"] == cut.tokenizer_files["tokenizer.json"]


def test_ids_in_the_other_files_follow(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(trained("first"))
    think = tokenizer.token_to_id("<think>")
    config = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {str(think): {"content": "<think>"}}}
    before = saved(
        tmp_path / "ckpt",
        trained("first"),
        tokenizer_config=json.dumps(config).encode(),
        added_tokens=json.dumps({"<think>": think}).encode(),
    )
    cut, _ = cut_vocabulary(before, CORPUS)
    new = tokenizer_of(cut)
    moved = new.token_to_id("<think>")
    assert moved is not None
    assert think is not None
    assert moved < think
    written = json.loads(cut.tokenizer_files["tokenizer_config.json"])
    assert written["added_tokens_decoder"] == {str(moved): {"content": "<think>"}}
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert json.loads(cut.tokenizer_files["added_tokens.json"]) == {"<think>": moved}
    assert new.encode("the").tokens == tokenizer.encode("the").tokens
    assert new.padding is not None
    assert new.padding["pad_id"] == new.token_to_id(SPECIALS[2])
    broken = saved(tmp_path / "broken", trained("first"), added_tokens=b"[3]")
    with pytest.raises(InputError, match=r"added_tokens\.json: broken"):
        cut_vocabulary(broken, CORPUS)


@pytest.mark.parametrize(
    ("texts", "message"),
    [([], "needs at least one text"), (["fine", "\ud800"], "halves of surrogate pairs")],
    ids=["none", "surrogate"],
)
def test_texts_that_cannot_be_read(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cut_vocabulary(uncut("last"), texts)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({" no": 0, " yes": 1, "?": 2}, unk_token="?"))
    with pytest.raises(InputError, match="only BPE tokenizers can be cut, this one is WordLevel"):
        cut_vocabulary(saved(tmp_path / "words", words.to_str()), ["yes"])


@pytest.mark.demo
def test_smollm2_on_the_job_postings() -> None:
    before = smollm2()
    items = list(read_items(demo_folder() / "jobs" / "items.jsonl").values())
    texts = [item.text for item in items] + [item.title or "" for item in items]
    cut, keep = cut_vocabulary(before, texts)
    assert 5_000 < cut.config.model.vocab_size < 20_000
    ids = new_ids(keep)
    assert cut.prompt.text_ids(texts) == [[ids[old] for old in row] for row in before.prompt.text_ids(texts)]
    assert texts_of(cut).decode(texts_of(cut).encode("zyzzyva 東京 🙂").ids) == "zyzzyva 東京 🙂"
