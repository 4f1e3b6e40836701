"""The made wheels of the demo's tests."""

import pytest

from tests.demo.made import fake_wheels


@pytest.fixture(scope="module")
def wheels() -> dict[str, bytes]:
    return fake_wheels()
