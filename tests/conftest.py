"""Settings of all tests: eight host devices on the CPU, no network."""

import os

# Before anything imports the Hugging Face libraries, which read it once.
os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs in pytest's cache folder: tests build the same small models again and again."""
    from jaxslm.score.warmup import use_compilation_cache  # not before the package's types are checked

    if config.cache is not None:
        use_compilation_cache(config.cache.mkdir("compiled"))


@pytest.fixture
def key() -> jax.Array:
    """The random key of a test: always the same."""
    return jax.random.key(0)
