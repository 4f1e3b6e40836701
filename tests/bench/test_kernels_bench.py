"""The benchmark of kernels: what it compares computes the same, and it says where there is nothing to time."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.bench import in_turn, kernels
from jaxslm.bench.device import Ceilings
from jaxslm.errors import InputError
from pallas_kernels.gated_mlp.specs import SMALL as GATED
from pallas_kernels.prefix_item_attention import specs as attention
from pallas_kernels.specs import Spec

CEILINGS = Ceilings("a device", "bfloat16", 1e12, 1e11)
HEADS = 2, 1, 64
REQUESTS = [(6, [5, 5, 5]), (6, [5, 5, 5])]


def attention_spec(*, last_only: bool) -> Spec:
    return attention._spec("equal items", HEADS, REQUESTS, last_only=last_only)


def by_xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="xla")


@pytest.mark.parametrize("last_only", [False, True])
def test_attention_by_the_layout_and_by_rows_is_that_of_the_spec(last_only: bool) -> None:
    spec = attention_spec(last_only=last_only)
    arguments = tuple(map(jnp.asarray, spec.make(0)))
    exact = spec.exact(*map(np.asarray, arguments))
    attend, laid_out = kernels._by_layout(spec, arguments)
    error = kernels.relative_error(np.asarray(jax.jit(attend)(*laid_out), np.float64), exact)
    assert error is not None
    assert error < 0.01
    rows, laid_out = kernels._by_rows(arguments, by_xla)
    of_items = exact[np.asarray(arguments[4] > arguments[3])].reshape(6, -1, *exact.shape[1:])
    error = kernels.relative_error(np.asarray(jax.jit(rows)(*laid_out), np.float64), of_items)
    assert error is not None
    assert error < 0.01


@pytest.mark.parametrize("spec", [GATED[1], attention_spec(last_only=False)], ids=str)
def test_a_row_has_its_figures_or_why_there_are_none(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_turn, "IN_TURN", 2)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    rows = {row["implementation"]: row for row in kernels.Contest(spec).rows(CEILINGS, 1)}
    assert rows["xla"]["seconds"] > 0
    assert rows["xla"]["speedup"] == 1
    assert rows["xla"]["error"] < 0.01
    assert "needs a Hopper GPU" in rows["mosaic_gpu"]["failed"]
    assert rows["tokamax"]["failed"] == "ImportError: tokamax is not installed"
    text = kernels.table(list(rows.values()))
    assert len(text.splitlines()) == 1 + len(rows)
    assert "needs a Hopper GPU" in text


def test_padding_counts_in_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's layout leaves padding tokens undefined; every one of these is its own only key."""
    monkeypatch.setattr(in_turn, "IN_TURN", 1)
    spec = attention._spec("padded", HEADS, REQUESTS, 8)
    assert spec.padding == 8
    (xla,) = (row for row in kernels.Contest(spec).rows(CEILINGS, 1) if row["implementation"] == "xla")
    assert xla["error"] < 0.01


def test_the_report_has_the_keys_of_all_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "is_hopper", lambda device: True)
    monkeypatch.setattr(kernels, "measure_ceilings", lambda dtype: CEILINGS)
    monkeypatch.setattr(kernels, "Contest", lambda spec: SimpleNamespace(rows=lambda ceilings, repeats: []))
    result = kernels.bench_kernels(["gated_mlp"])
    keys = "workload", "dtype", "device", "ceiling_tflops"
    assert [result[key] for key in keys] == ["gated_mlp", "bfloat16", "a device", 1.0]


def test_without_a_gpu_there_is_nothing_to_time() -> None:
    with pytest.raises(InputError, match="nothing to time"):
        kernels.bench_kernels()
    with pytest.raises(InputError, match="--op softmax: must be one of gated_mlp"):
        kernels.bench_kernels(["softmax"])
