"""BM25 equals its formula, and candidate lists depend on ids and texts only."""

import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest

from jaxslm.data_files import Item, Judged, Query
from jaxslm.errors import InputError
from jaxslm.evaluate.candidates import Bm25, candidates

ITEMS = {
    "a": Item(id="a", title="Python developer", text="writes python services"),
    "b": Item(id="b", text="Developer of the web front end"),
    "c": Item(id="c", title="Nurse", text="cares for patients"),
}
# What the tokeniser leaves of them: the words without "of", "the" and "for".
TOKENS = {
    "a": ["python", "developer", "writes", "python", "services"],
    "b": ["developer", "web", "front", "end"],
    "c": ["nurse", "cares", "patients"],
}


def hand_bm25(query: list[str], document: list[str]) -> float:
    total = 0.0
    mean_length = sum(map(len, TOKENS.values())) / len(TOKENS)
    for word in query:
        holding = sum(word in tokens for tokens in TOKENS.values())
        count = document.count(word)
        idf = math.log(1 + (len(TOKENS) - holding + 0.5) / (holding + 0.5))
        total += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean_length))
    return total


def query(text: str, *judged: tuple[str, float], query_id: str = "q") -> Query:
    return Query(query_id=query_id, query=text, items=tuple(Judged(id=i, label=label) for i, label in judged))


@pytest.mark.parametrize(
    "text", ["Python developer", "the front-end developer", "developer developer", "unknown", "the of"]
)
def test_scores_equal_the_formula(text: str) -> None:
    words = [w for w in text.lower().replace("-", " ").split() if w not in {"the", "of"} and w != "unknown"]
    expected = [hand_bm25(words, TOKENS[item_id]) for item_id in ITEMS]
    np.testing.assert_allclose(Bm25(ITEMS).scores(text), expected, rtol=1e-12)


def test_search_is_sorted_and_breaks_ties_by_id() -> None:
    twins = {name: Item(id=name, text="python") for name in ("z", "m", "a", "k")}
    assert [item_id for item_id, _ in Bm25(twins).search("python", 3)] == ["a", "k", "m"]
    assert [item_id for item_id, _ in Bm25(ITEMS).search("python developer", 9)] == ["a", "b", "c"]


def test_judged_items_outside_the_top_keep_their_true_score() -> None:
    index = Bm25(ITEMS)
    (found,) = candidates([query("python developer", ("c", 1.0), ("b", 0.0))], ITEMS, k=1)
    assert found.ids == ("a", "b", "c")
    np.testing.assert_array_equal(found.bm25, index.scores("python developer"))
    assert found.bm25[1] > 0 == found.bm25[2]


def test_k_0_keeps_judged_items_only() -> None:
    (found,) = candidates([query("developer", ("c", 1.0), ("b", 0.0))], ITEMS, k=0)
    assert found.ids == ("b", "c")


def test_order_of_items_and_judgements_does_not_matter() -> None:
    generator = random.Random(0)
    words = [f"w{n}" for n in range(12)]
    items = {f"i{n}": Item(id=f"i{n}", text=" ".join(generator.choices(words, k=6))) for n in range(60)}
    judged = [(f"i{n}", 1.0) for n in (3, 50, 7)]
    (first,) = candidates([query("w1 w2 w9", *judged)], items, k=5)
    shuffled = list(items.items())
    for _ in range(5):
        generator.shuffle(shuffled)
        generator.shuffle(judged)
        (again,) = candidates([query("w1 w2 w9", *judged)], dict(shuffled), k=5)
        assert again.ids == first.ids
        np.testing.assert_array_equal(again.bm25, first.bm25)


def test_items_without_words() -> None:
    items = {"b": Item(id="b", text="..."), "a": Item(id="a", text="the")}
    assert Bm25(items).search("the", 2) == [("a", 0.0), ("b", 0.0)]


def test_bad_input_names_the_thing() -> None:
    with pytest.raises(InputError, match=r"query 'q': judged item 'x'"):
        candidates([query("nurse", ("x", 1.0))], ITEMS)
    with pytest.raises(InputError, match="k must be 0 or more"):
        candidates([query("nurse", ("a", 1.0))], ITEMS, k=-1)
    with pytest.raises(InputError, match="at least one item"):
        candidates([query("nurse", ("a", 1.0))], {})


def test_silent_and_the_same_in_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        "from jaxslm.data_files import Item\n"
        "from jaxslm.evaluate.candidates import Bm25\n"
        "from jaxslm.evaluate.metrics import ranked\n"
        "items = {str(n): Item(id=str(n), text=f'w{n % 3} w{n % 5} common') for n in range(40)}\n"
        "print(Bm25(items).search('w1 w4 common', 12), ranked('q', dict.fromkeys(items, 0.5)))\n"
    )
    exec(program, {})
    environment = {**os.environ, "PYTHONHASHSEED": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program]
    other = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    here = capsys.readouterr()
    assert here.err == other.stderr == ""
    assert here.out == other.stdout
