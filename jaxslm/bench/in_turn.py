"""Times a function on a device: many calls in one program, which a thread compiles while others are being compiled."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import jax.typing

from jaxslm.score.ceiling import best_seconds

IN_TURN = 16
"""Calls of one measurement, each with inputs of its own: dispatch is spread over them, and caches hold none of them."""

_compilers = ThreadPoolExecutor(thread_name_prefix="compiler")
_started: list[Future[jax.stages.Compiled]] = []


class InTurn:
    """IN_TURN calls of a function one after another as one program, compiled in the background from now on."""

    def __init__(self, call: Callable[..., jax.Array], arguments: tuple[Any, ...]) -> None:
        self._arguments = arguments
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        self._program = _compilers.submit(_compile, call, shapes)
        _started.append(self._program)

    def run(self, repeats: int) -> tuple[jax.Array, float]:
        """Returns the result on the arguments and the best time of one call; raises what compiling raised."""
        wait(_started)  # compiling takes the cores that start the device's work
        program = self._program.result()
        sets = [tuple(_varied(argument, number) for argument in self._arguments) for number in range(IN_TURN)]
        result = program(sets)[0]
        return result, best_seconds(lambda: program(sets), repeats) / IN_TURN


def _compile(call: Callable[..., jax.Array], shapes: tuple[Any, ...]) -> jax.stages.Compiled:
    once = jax.jit(call)  # traced once, not IN_TURN times

    def in_turn(sets: Sequence[tuple[Any, ...]]) -> list[jax.Array]:
        results: list[jax.Array] = []
        for each in sets:
            # Ties a call to the result before it; else XLA could merge products or run them side by side.
            tied, _ = jax.lax.optimization_barrier((each, results[-1:]))
            results.append(once(*tied))
        return results

    return jax.jit(in_turn).lower([shapes] * IN_TURN).compile()


def _varied(argument: jax.Array, number: int) -> jax.Array:
    """Other numbers, the same shape; whole numbers and masks are places and stay."""
    return _rolled(argument, number) if jnp.issubdtype(argument.dtype, jnp.floating) else argument


@jax.jit  # `number` is traced: one program for all of a shape
def _rolled(argument: jax.Array, number: jax.typing.ArrayLike) -> jax.Array:
    return jnp.roll(argument, number, axis=0)
