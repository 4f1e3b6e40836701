"""One update: a pure, jitted function over a 1-D mesh of devices.

Parameters and optimiser state are sharded along each array's largest axis that the number of devices divides (FSDP
style); each step gathers a copy in the compute dtype. A batch has one part per device, `[A, devices, ...]`, with A
micro-batches whose gradients are averaged. Losses see the logits of all devices at once, so what a step computes does
not depend on the number of devices that hold its parts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxslm.model.decoder import Decoder, Params
from jaxslm.model.layout import EveryToken, SharedPrefix
from jaxslm.score.parallel import processor_features
from jaxslm.train.partition import LABEL_ROWS, Frozen
from jaxslm.train.settings import OptimiserSettings

DATA = "data"
"""Name of the mesh axis."""

State = dict[str, Any]
"""`{"params": trainable parameters in float32, "optimiser": its state, "step": int32 []}`."""

Batch = Mapping[str, Array]
LossFn = Callable[[Params, Frozen, Batch], tuple[Array, dict[str, Array]]]
"""(trainable, frozen, one micro-batch [devices, ...]) -> (loss, its terms), all float32 scalars."""

StepFn = Callable[[State, Frozen, Batch], tuple[State, dict[str, Array]]]


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of the given devices, of all devices of all hosts if None."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), (DATA,), axis_types=(AxisType.Auto,))


def sharding_of(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Returns where an array of the state lies: split along its largest divisible axis, or copied."""
    divisible = [axis for axis, size in enumerate(shape) if size % mesh.size == 0 and size > 0]
    if mesh.size == 1 or not divisible:
        return NamedSharding(mesh, P())
    axis = max(divisible, key=lambda axis: shape[axis])
    return NamedSharding(mesh, P(*(None,) * axis, DATA))


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """Returns `sharding_of` each leaf."""
    return jax.tree.map(lambda leaf: sharding_of(leaf.shape, mesh), tree)


def learning_rates(settings: OptimiserSettings, steps: int) -> optax.Schedule:
    """Returns the schedule: linear from peak / (warm-up + 1), then cosine to `final_fraction` at the last update."""
    peak = settings.learning_rate
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (settings.warmup_steps + 1),
        peak_value=peak,
        warmup_steps=settings.warmup_steps,
        decay_steps=max(steps, settings.warmup_steps + 1),
        end_value=peak * settings.final_fraction,
    )


def make_optimiser(settings: OptimiserSettings, rates: optax.Schedule) -> optax.GradientTransformation:
    """Returns clipping, then AdamW (b1 0.9, b2 0.95); it decays layers' matrices, label rows have their own rate."""

    def decays(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: path[0].key.startswith("layers_") and leaf.ndim > 1, params
        )

    def label_rows(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == LABEL_ROWS, params)

    return optax.chain(
        optax.clip_by_global_norm(settings.clip_norm),
        optax.adamw(rates, b2=0.95, weight_decay=settings.weight_decay, mask=decays),
        optax.masked(optax.scale(settings.label_head_factor), label_rows),
    )


def init_state(params: Params, optimiser: optax.GradientTransformation, mesh: Mesh) -> State:
    """Returns the state before the first update, sharded; `params` are copied (float32)."""
    shardings = shardings_of(abstract_state(params, optimiser), mesh)
    return jax.jit(lambda tree: _fresh(tree, optimiser), out_shardings=shardings)(params)


def abstract_state(params: Params, optimiser: optax.GradientTransformation) -> State:
    """Returns the shapes and dtypes of `init_state`."""
    state: State = jax.eval_shape(lambda tree: _fresh(tree, optimiser), params)
    return state


def _fresh(params: Params, optimiser: optax.GradientTransformation) -> State:
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    return {"params": params, "optimiser": optimiser.init(params), "step": jnp.zeros((), jnp.int32)}


def make_step(loss_fn: LossFn, optimiser: optax.GradientTransformation, mesh: Mesh) -> StepFn:
    """Returns the jitted `step(state, frozen, batch) -> (state, metrics)`; the old state is given up.

    Metrics are float32 scalars: "loss", its terms, "gradient_norm" before clipping. When loss or gradient is not
    finite, the state comes back unchanged.
    """

    def step(state: State, frozen: Frozen, batch: Batch) -> tuple[State, dict[str, Array]]:
        gradient, metrics = _mean_gradient(loss_fn, state["params"], frozen, batch)
        gradient = jax.lax.with_sharding_constraint(gradient, shardings_of(gradient, mesh))
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        updates, optimiser_state = optimiser.update(gradient, state["optimiser"], state["params"])
        updated = {
            "params": optax.apply_updates(state["params"], updates),
            "optimiser": optimiser_state,
            "step": state["step"] + 1,
        }
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
        state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        return jax.lax.with_sharding_constraint(state, shardings_of(state, mesh)), metrics

    return jax.jit(step, donate_argnums=0, compiler_options=_compiler_options(mesh))


def _compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns what the compiler is told for a step on these devices.

    On processors with AVX2 alone XLA's YNNPACK products are slower than those of Eigen: 80 to 105 GFLOP/s for 120 to
    140 in a step's shapes, 4.4 s for 3.4 in a ranker's step (AMD EPYC, jax 0.11.2). Its sums are faster, and quicker to
    compile. With AVX-512 it stays with all of it.
    """
    features = processor_features()
    eigen = mesh.devices.flat[0].platform == "cpu" and "avx2" in features and "avx512f" not in features
    return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"} if eigen else {}


def _mean_gradient(loss_fn: LossFn, params: Params, frozen: Frozen, batch: Batch) -> tuple[Params, dict[str, Array]]:
    """Returns gradient and metrics averaged over the A micro-batches of `batch` [A, devices, ...]."""

    def of_one(micro: Batch) -> tuple[Params, dict[str, Array]]:
        (loss, terms), gradient = jax.value_and_grad(loss_fn, has_aux=True)(params, frozen, micro)
        return gradient, {"loss": loss, **terms}

    count = next(iter(batch.values())).shape[0]
    first = of_one({name: array[0] for name, array in batch.items()})
    if count == 1:
        return first
    rest = {name: array[1:] for name, array in batch.items()}
    total, _ = jax.lax.scan(lambda sums, micro: (jax.tree.map(jnp.add, sums, of_one(micro)), None), first, rest)
    return jax.tree.map(lambda leaf: leaf / count, total)


def put_batch(parts: Sequence[Mapping[str, np.ndarray]], accumulate: int, mesh: Mesh) -> dict[str, Array]:
    """Returns this host's `accumulate * local devices` batches as global arrays [accumulate, devices, ...]."""
    devices = len(parts) // accumulate
    sharding = NamedSharding(mesh, P(None, DATA))
    batch = {}
    for name in parts[0]:
        local = np.stack([part[name] for part in parts]).reshape(accumulate, devices, *parts[0][name].shape)
        batch[name] = jax.make_array_from_process_local_data(sharding, local)
    return batch


def gather(params: Params, dtype: DTypeLike, mesh: Mesh) -> Params:
    """Returns every parameter whole on every device, matrices in the compute dtype (norm scales keep theirs)."""
    whole = NamedSharding(mesh, P())
    return jax.tree.map(
        lambda leaf: jax.lax.with_sharding_constraint(leaf.astype(dtype) if leaf.ndim > 1 else leaf, whole), params
    )


class ItemStates(NamedTuple):
    """Normed final states of a batch, each device's part by itself.

    Attributes:
        last: of the items' last tokens, [devices, R, J, D].
        mean: means over the items' tokens, suffix included, [devices, R, J, D]; None unless every token was read.
        every: of every token, [devices, M, D]; None likewise.
    """

    last: Array
    mean: Array | None = None
    every: Array | None = None


def item_states(decoder: Decoder, params: Params, batch: Batch, mesh: Mesh, *, every: bool = False) -> ItemStates:
    """Returns the final states of a ranker's batch; each device decodes its own part.

    Args:
        every: read every token, at the cost of a whole last layer.
    """

    def local(params: Params, tokens: Array, prefix: Array, items: Array) -> ItemStates:
        x_MD = jnp.asarray(decoder.apply({"params": params}, tokens[0], method=Decoder.embed))
        return decode_items(decoder, params, x_MD, prefix[0], items[0], every=every)

    part = P(DATA)
    decode = jax.shard_map(local, mesh=mesh, in_specs=(P(), part, part, part), out_specs=part)
    states: ItemStates = decode(params, batch["tokens"], batch["prefix"], batch["items"])
    return states


def decode_items(
    decoder: Decoder, params: Params, x_MD: Array, prefix_RP: Array, items_RJT: Array, *, every: bool
) -> ItemStates:
    """Returns one device's part of `item_states`, from input embeddings."""
    layout = (EveryToken if every else SharedPrefix)(prefix_RP, items_RJT, x_MD.shape[0])
    states = jnp.asarray(decoder.apply({"params": params}, x_MD, layout, method=Decoder.decode))
    if not isinstance(layout, EveryToken):
        return ItemStates(states[None])
    return ItemStates(layout.read_last(states)[None], mean_of_items(states, items_RJT)[None], states[None])


def mean_of_items(states_MD: Array, items_RJT: Array) -> Array:
    """Returns the mean state of each item's tokens, indices [R, J, T] into [M, D]: [R, J, D], 0 for an empty item."""
    valid_RJT = (items_RJT < states_MD.shape[0]).astype(states_MD.dtype)
    states_RJTD = jnp.take(states_MD, items_RJT, axis=0, mode="clip")
    total_RJD = jnp.einsum("RJTD,RJT->RJD", states_RJTD, valid_RJT, preferred_element_type=jnp.float32)
    return (total_RJD / jnp.maximum(jnp.sum(valid_RJT, axis=2), 1)[..., None]).astype(states_MD.dtype)
