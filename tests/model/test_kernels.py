"""The decoder with kernels: the spans it hands to attention, and the same scores as with XLA alone."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxslm.config import Bucket, BucketConfig
from jaxslm.model.layout import SharedPrefix
from jaxslm.score.compiled import make_score_fn
from jaxslm.score.forward import PackRequest
from jaxslm.score.packing import Packer
from pallas_kernels import dispatch
from pallas_kernels.dispatch import INTERPRETED, MOSAIC_GPU, XLA, explain
from pallas_kernels.prefix_item_attention import reference
from tests.tiny import tiny_config, tiny_params, tiny_ranker_config

BUCKET = Bucket(tokens=40, rows=4, prefix_tokens=6, items_per_row=2, item_tokens=9)
# Two rows share the first prefix; the second request has none; the pass has places left over.
REQUESTS = [PackRequest([7, 8, 9, 10], [[11, 12], [13, 14, 15], [16]]), PackRequest([], [[17, 18, 19, 20, 21]])]


def batch() -> dict[str, Any]:
    packer = Packer(BucketConfig(buckets=(BUCKET,)))
    ((forward,),) = packer.pack(REQUESTS)
    return dict(forward.batch)


def attention_by_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the named kernel compute what its spans say, without interpretation."""

    def by_spans(q: Any, k: Any, v: Any, spans: Any, **options: Any) -> jax.Array:
        return reference.attention(q, k, v, spans)

    monkeypatch.setattr("jaxslm.model.layout.packed.prefix_item_attention", by_spans)


def test_spans_are_the_keys_that_unfolded_attention_sees(monkeypatch: pytest.MonkeyPatch, key: jax.Array) -> None:
    arrays = batch()
    prefix, items = jnp.asarray(arrays["prefix"]), jnp.asarray(arrays["items"])
    M, (R, J, _) = BUCKET.tokens, items.shape
    q, k, v, answers = (
        jax.random.normal(each, shape)
        for each, shape in zip(
            jax.random.split(key, 4), [(M, 2, 3, 8), (M, 2, 8), (M, 2, 8), (R, J, 2, 3, 8)], strict=True
        )
    )
    attention_by_spans(monkeypatch)

    @partial(jax.jit, static_argnums=0)
    def attend(implementation: str, q: jax.Array, k: jax.Array, v: jax.Array, answers: jax.Array) -> Any:
        layout = SharedPrefix(prefix, items, M, implementation)
        return layout.attend(q, k, v), layout.attend_read(answers, k, v)

    (unfolded, unfolded_read), (flat, flat_read) = (
        map(np.asarray, attend(implementation, q, k, v, answers)) for implementation in (XLA, MOSAIC_GPU)
    )
    real = np.unique(np.concatenate([arrays["prefix"].ravel(), arrays["items"].ravel()]))[:-1]
    assert 0 < len(real) < M
    close: dict[str, Any] = {"rtol": 0, "atol": 1e-5}
    np.testing.assert_allclose(flat[real], unfolded[real], **close)
    assert np.isfinite(flat).all()
    held = np.asarray(items[..., 0] < M)
    np.testing.assert_allclose(flat_read[held], unfolded_read[held], **close)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="JAX 0.10 interprets no transposed operand of a product")
def test_scores_with_and_without_kernels_agree() -> None:
    config = tiny_ranker_config(tiny_config(width=64, head_dim=64, mlp_width=128, num_kv_heads=1, num_layers=2))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tiny_params(config.model))
    arrays = batch()
    logits = {
        implementation: np.asarray(
            make_score_fn(config, dtype=jnp.bfloat16, implementation=implementation)(params, arrays)
        )
        for implementation in (XLA, INTERPRETED)
    }
    held = arrays["items"][..., 0] < BUCKET.tokens
    odds = {name: (each[held, 1] - each[held, 0]) for name, each in logits.items()}
    assert np.ptp(odds[XLA]) > 0.1
    chances = {name: 1 / (1 + np.exp(-each)) for name, each in odds.items()}
    np.testing.assert_allclose(chances[INTERPRETED], chances[XLA], rtol=0, atol=0.01)
    ran = {(choice.op, choice.implementation) for choice in explain()}
    assert {("gated_mlp", INTERPRETED), ("prefix_item_attention", INTERPRETED)} <= ran


def test_xla_by_name_is_listed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_choices", {})
    config = tiny_ranker_config()
    params = tiny_params(config.model)
    make_score_fn(config, dtype=jnp.float32, implementation=XLA).lower(params, batch() | {"tokens": np.ones(40, int)})
    assert {(choice.op, choice.implementation, choice.reason) for choice in explain()} == {
        (op, XLA, "asked for by name") for op in ("gated_mlp", "prefix_item_attention")
    }


def test_a_kernel_that_cannot_run_is_an_error_before_anything_is_computed() -> None:
    config = tiny_ranker_config()
    with pytest.raises(ValueError, match=r"needs a Hopper GPU|takes bfloat16"):
        make_score_fn(config, implementation=MOSAIC_GPU).lower(tiny_params(config.model), batch())
