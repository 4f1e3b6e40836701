"""Prompts as token ids: the bytes of the templates, seams, control tokens, truncation, hashes."""

from functools import cache
from typing import Any

import jaxtyping
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jaxslm.config import PromptConfig
from jaxslm.data_files import Item
from jaxslm.errors import InputError
from jaxslm.prompt import Prompt
from tests.demo_data import smollm2
from tests.tiny import NOT_MARKED_SPECIAL, SPECIALS, tiny_tokenizer_json

QWEN3_RERANKER = (
    "<|im_start|>system\n"
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the"
    ' answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
YES_NO = (
    "{instruction}\nQuery: {query}\nDocument: {document}\n"
    "Does the document match the query, yes or no? Answer:"
)  # fmt: skip
BRIEF = "{instruction}\nQuery: {query}\nWhich document matches the query best?\nDocument: {document}\nMatch:"
TEXTS = {"qwen3-reranker": QWEN3_RERANKER, "yes-no": YES_NO, "brief": BRIEF}


@cache
def prompt(template: str = "qwen3-reranker", **settings: object) -> Prompt:
    return Prompt(tiny_tokenizer_json(), PromptConfig.model_validate({"template": template} | settings))


@cache
def plain_tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json)


def whole_text_ids(template: str, query: str, document: str, tokenizer_json: str) -> list[int]:
    text = TEXTS[template].format(
        instruction=PromptConfig(template="yes-no").instruction, query=query, document=document
    )
    ids: list[int] = plain_tokenizer(tokenizer_json).encode(text, add_special_tokens=False).ids
    return ids


# Weighted to what stands at seams: spaces, newlines, digits, punctuation, combining marks, other scripts.
words = st.sampled_from(
    ["job", "the", " ", "\n", "\n\n", "\r\n", "\t", ".", "?", ")", "!!", "12", "7", "é", "\u0301", "'s"]
)
texts = st.lists(st.one_of(words, st.text(max_size=3)), max_size=8).map("".join)
texts = texts.filter(lambda text: text.strip() and not any(token in text for token in SPECIALS + NOT_MARKED_SPECIAL))
titles = st.none() | texts


@pytest.mark.parametrize("template", TEXTS)
@settings(max_examples=150, deadline=None)
@given(query=texts, title=titles, text=texts)
@example(query="engineer?", title="Engineer (m/f).", text="We pay 12.")
@example(query="12", title="7", text="12")
@example(query="(", title=")", text="?")
def test_rows_equal_the_whole_text(template: str, query: str, title: str | None, text: str) -> None:
    built = prompt(template).encode(query, [Item(id="a", title=title, text=text)])
    document = text.strip() if title is None else f"{title.strip()}\n{text.strip()}"
    expected = whole_text_ids(template, query.strip(), document, tiny_tokenizer_json())
    assert built.prefix_ids + built.item_ids[0] == expected
    assert built.truncated == [False]


@pytest.mark.parametrize("template", TEXTS)
def test_a_title_without_text_is_the_document(template: str) -> None:
    items = [
        Item(id="a", title="Nurse.", text=" "),
        Item(id="b", title=None, text="Nurse."),
        Item(id="c", title="", text="Nurse."),
    ]
    built = prompt(template).encode("nurse", items)
    expected = whole_text_ids(template, "nurse", "Nurse.", tiny_tokenizer_json())
    assert [built.prefix_ids + ids for ids in built.item_ids] == [expected] * 3


@pytest.mark.parametrize("query", ["welder", "Weld pipes?", "x" * 40])
def test_the_query_is_read_from_itself_or_from_the_question_behind_it(query: str) -> None:
    plain, asked = prompt("yes-no"), prompt("brief")
    tokenizer = plain_tokenizer(tiny_tokenizer_json())
    own = plain.encode_query(query)[plain.query_from :]
    assert tokenizer.decode(own, skip_special_tokens=False).lstrip() == f"{query}\nDocument:"
    behind = asked.encode_query(query)[asked.query_from :]
    assert behind[1:] == asked.encode_query("any")[asked.query_from + 1 :]
    assert tokenizer.decode(behind[1:]) == "Which document matches the query best?\nDocument:"


def test_qwen3_reranker_bytes() -> None:
    built = prompt().encode("python developer", ["We need a developer."])
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json())
    text = tokenizer.decode(built.prefix_ids + built.item_ids[0], skip_special_tokens=False)
    assert text == QWEN3_RERANKER.format(
        instruction="Given a web search query, retrieve relevant passages that answer the query",
        query="python developer",
        document="We need a developer.",
    )
    control = {tokenizer.token_to_id(token) for token in SPECIALS + NOT_MARKED_SPECIAL}
    found = [tokenizer.id_to_token(token) for token in built.prefix_ids + built.item_ids[0] if token in control]
    assert found == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"]


@pytest.mark.parametrize("token", SPECIALS + NOT_MARKED_SPECIAL)
def test_control_tokens_in_text_stay_text(token: str) -> None:
    (control,) = plain_tokenizer(tiny_tokenizer_json()).encode(token).ids
    plain = prompt().encode("q", [Item(id="a", title="t", text="x")])
    built = prompt().encode(f"q {token}", [Item(id="a", title=f"t {token}", text=f"x {token} {token}y")])
    for found, expected in ((built.prefix_ids, plain.prefix_ids), (built.item_ids[0], plain.item_ids[0])):
        assert found.count(control) == expected.count(control)


@pytest.mark.parametrize("template", TEXTS)
@settings(max_examples=60, deadline=None)
@given(text=texts, repeats=st.integers(1, 60), title=titles)
@example(text="We need.\n", repeats=60, title="Engineer?")
def test_truncation_cuts_the_body_only(template: str, text: str, repeats: int, title: str | None) -> None:
    item = Item(id="a", title=title, text=text * repeats)
    whole = prompt(template, max_tokens=100_000).encode("job?", [item, "x"])
    short = prompt(template, max_tokens=len(whole.prefix_ids) + len(prompt(template).suffix_ids) + 60)
    built = short.encode("job?", [item, "x"])
    room = short.config.max_tokens - len(built.prefix_ids)
    assert built.prefix_ids == whole.prefix_ids
    assert built.item_ids[1] == whole.item_ids[1]
    assert built.truncated == [len(whole.item_ids[0]) > room, False]
    if built.truncated[0]:
        newline = [plain_tokenizer(tiny_tokenizer_json()).token_to_id("Ċ")] if template != "qwen3-reranker" else []
        end = newline + short.suffix_ids
        assert built.item_ids[0] == whole.item_ids[0][: room - len(end)] + end
    else:
        assert built.item_ids[0] == whole.item_ids[0]


def test_truncation_uses_all_the_room() -> None:
    short = prompt(max_tokens=400)
    built = short.encode("job", [Item(id="a", title="Title", text="word " * 1000), "short", "x" * 1000])
    lengths = [len(built.prefix_ids) + len(ids) for ids in built.item_ids]
    assert lengths[0] == lengths[2] == 400 > lengths[1]
    assert built.truncated == [True, False, True]
    title = Tokenizer.from_str(tiny_tokenizer_json()).encode(" Title\n").ids
    assert built.item_ids[0][: len(title)] == title


def test_rows_do_not_depend_on_the_other_items() -> None:
    items: list[str | Item] = ["We need a developer.", Item(id="b", title="Nurse", text="Care " * 900), "x"]
    together = prompt().encode("python", items)
    for number, item in enumerate(items):
        alone = prompt().encode("python", [item])
        assert (alone.item_ids[0], alone.truncated[0]) == (together.item_ids[number], together.truncated[number])


def test_a_million_characters_are_cut() -> None:
    built = prompt().encode("job", ["a" * 1_000_000])
    assert built.truncated == [True]
    assert len(built.prefix_ids) + len(built.item_ids[0]) == 2048


@pytest.mark.parametrize(
    ("query", "items", "message"),
    [
        ("", ["x"], "query: must not be empty"),
        (" \n", ["x"], "query: must not be empty"),
        ("job", [], "items: a request needs at least one"),
        ("job", ["x", " \t"], "item 1: has no text"),
        ("job", [Item(id="a", title=" ", text="")], "item 0: has no text"),
        ("job \ud800", ["x"], "text: must be a string without halves of surrogate pairs"),
        ("job", ["x", "\udfff"], "text: must be a string without halves of surrogate pairs"),
        ("job " * 3000, ["x"], "query: 30[0-9]{2} tokens leave no room"),
        ("job", ["x", Item(id="a", title="word " * 3000, text="x")], "item 1: title of [0-9]+ tokens leaves no room"),
    ],
)
def test_unusable_requests_are_refused(query: str, items: list[str | Item], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        prompt().encode(query, items)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("query", "items", "message"),
    [
        (None, ["x"], "query: must be a text, is NoneType"),
        ("job", "one text", "items: must be a list of texts, is one str"),
        ("job", Item(id="a", text="x"), "items: must be a list of texts, is one Item"),
        ("job", None, "items: must be a list of texts, is one NoneType"),
        ("job", ["x", None], "item 1: must be a text or an Item, is NoneType"),
        ("job", [{"text": "x"}], "item 0: must be a text or an Item, is dict"),
        ("job", np.array([["x"]]), "item 0: must be a text or an Item, is ndarray"),
    ],
)
def test_what_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch, query: Any, items: Any, message: str) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # it checks types in tests alone
    with pytest.raises(InputError, match=message):
        prompt().encode(query, items)


def test_texts_may_be_an_array(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    texts: Any = np.array(["a", "b c"])
    assert prompt().encode("job", texts) == prompt().encode("job", ["a", "b c"])


def test_labels_are_single_tokens() -> None:
    tokenizer = Tokenizer.from_str(tiny_tokenizer_json())
    assert prompt().label_token_ids == (tokenizer.token_to_id("no"), tokenizer.token_to_id("yes"))
    assert prompt("yes-no").label_token_ids == (tokenizer.token_to_id("Ġno"), tokenizer.token_to_id("Ġyes"))
    without_merges = Tokenizer.from_str(tiny_tokenizer_json())
    without_merges.model = type(without_merges.model)(vocab=without_merges.get_vocab(False), merges=[])
    with pytest.raises(InputError, match="label 'no': must be one token of this tokenizer, is 2"):
        Prompt(without_merges.to_str(), PromptConfig(template="qwen3-reranker"))


def test_the_hash_changes_with_anything_that_changes_rows() -> None:
    variants = [
        prompt(),
        prompt("yes-no"),
        prompt(instruction="Given a job search, find postings"),
        prompt(max_tokens=1024),
        prompt(max_item_tokens=16),
    ]
    assert len({variant.sha256 for variant in variants}) == len(variants)
    assert Prompt(tiny_tokenizer_json(), PromptConfig(template="yes-no")).sha256 == prompt("yes-no").sha256


@pytest.mark.demo
@settings(max_examples=100, deadline=None)
@given(query=texts, title=titles, text=texts)
def test_rows_equal_the_whole_text_with_smollm2(query: str, title: str | None, text: str) -> None:
    tokenizer_json = smollm2().tokenizer_files["tokenizer.json"].decode()
    built = smollm2_prompt().encode(query, [Item(id="a", title=title, text=text)])
    document = text.strip() if title is None else f"{title.strip()}\n{text.strip()}"
    expected = whole_text_ids("yes-no", query.strip(), document, tokenizer_json)
    assert built.prefix_ids + built.item_ids[0] == expected


@cache
def smollm2_prompt() -> Prompt:
    return smollm2().prompt


def test_items_can_be_cut_shorter_than_the_row_allows() -> None:
    qwen = prompt()
    whole = qwen.encode("python", ["a job " * 20, "b"])
    cut = qwen.encode("python", ["a job " * 20, "b"], max_item_tokens=7)
    assert cut.truncated == [True, False]
    assert cut.item_ids == [whole.item_ids[0][:7] + qwen.suffix_ids, whole.item_ids[1]]
    assert prompt(max_item_tokens=7).encode("python", ["a job " * 20, "b"]) == cut
    assert prompt(max_item_tokens=7).encode("python", ["a job " * 20, "b"], max_item_tokens=9) == cut


def test_prompts_that_others_built_keep_their_control_tokens() -> None:
    qwen = prompt()
    assert qwen.raw_ids(["<|im_start|>a"])[0][0] == qwen.prefix_ids[0]
    assert qwen.text_ids(["<|im_start|>a"])[0][0] != qwen.prefix_ids[0]
