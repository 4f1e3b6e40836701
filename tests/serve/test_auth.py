"""Keys: who may call what, and that no route is left open."""

from pathlib import Path
from typing import Any

import pytest

from jaxslm.errors import InputError
from jaxslm.serve.auth import Authenticator
from jaxslm.serve.errors import ApiError
from jaxslm.serve.run import warn_if_open
from jaxslm.serve.settings import Keys, ServeSettings, read_keys

KEYS = Keys(api=frozenset({"first-key", "second-key"}), admin="admin-key")


def status(keys: Keys, path: str, headers: dict[str, str], *, admin: bool = False) -> int:
    try:
        Authenticator(keys).check(path, headers, admin=admin)
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"authorization": "Bearer first-key"}, 200),
        ({"authorization": "bearer second-key"}, 200),
        ({"x-api-key": "second-key"}, 200),
        ({"authorization": "Bearer admin-key"}, 200),
        ({}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer first-ke"}, 401),
        ({"authorization": "Bearer first-key2"}, 401),
        ({"authorization": "Basic first-key"}, 401),
        ({"authorization": "first-key"}, 401),
        ({"x-api-key": "schlüssel"}, 401),
    ],
)
def test_keys(headers: dict[str, str], expected: int) -> None:
    assert status(KEYS, "/v1/score", headers) == expected


@pytest.mark.parametrize(
    "path", ["/v1/score", "/metrics", "/docs", "/openapi.json", "/health/live/", "//health/live", "/x"]
)
def test_every_path_but_health_and_the_page_needs_a_key(path: str) -> None:
    assert status(KEYS, path, {}) == 401
    assert status(Keys(), path, {}) == 200
    assert {status(KEYS, open_path, {}) for open_path in ("/health/live", "/health/ready", "/")} == {200}


@pytest.mark.parametrize(
    ("keys", "key", "expected"),
    [
        (KEYS, "admin-key", 200),
        (KEYS, "first-key", 403),
        (KEYS, "wrong-key", 401),
        (Keys(), "", 403),
        (Keys(api=frozenset({"first-key"})), "first-key", 403),
        (Keys(api=frozenset({"first-key"})), "wrong-key", 401),
        (Keys(api=frozenset({"first-key"})), "", 401),
        (Keys(admin="admin-key"), "", 401),
    ],
)
def test_admin_routes_need_the_admin_key(keys: Keys, key: str, expected: int) -> None:
    assert status(keys, "/v1/items", {"authorization": f"Bearer {key}"}, admin=True) == expected


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nfile-key-1\n\n  file-key-2  \n")
    environment = {"JAXSLM_API_KEYS": "env-key-1, env-key-2", "JAXSLM_ADMIN_KEY": "admin-key"}
    keys = read_keys(str(file), environment)
    assert keys.api == {"file-key-1", "file-key-2", "env-key-1", "env-key-2"}
    assert keys.admin == "admin-key"
    assert read_keys(None, {}) == Keys()


@pytest.mark.parametrize("content", ["", "# nothing\n", "short\n", "with space inside\n", "schlüssel-lang\n"])
def test_bad_key_files_are_refused_without_printing_a_key(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(InputError) as refusal:
        read_keys(str(file), {})
    assert not content.strip() or content.startswith("#") or content.strip() not in str(refusal.value)


@pytest.mark.parametrize(
    ("keys", "host", "warns"),
    [
        (Keys(), "0.0.0.0", True),
        (Keys(admin="admin-key"), "::", True),
        (Keys(), "ranker.example", True),
        (KEYS, "0.0.0.0", False),
        (Keys(), "127.0.0.1", False),
        (Keys(), "::1", False),
        (Keys(), "localhost", False),
    ],
)
def test_serving_without_a_key_beyond_loopback_is_warned_of(
    caplog: pytest.LogCaptureFixture, keys: Keys, host: str, warns: bool
) -> None:
    warn_if_open(keys, host)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warns
    assert ServeSettings(model="m").host == "127.0.0.1"


def test_settings_are_checked() -> None:
    wrongs: list[dict[str, Any]] = [{"port": 70_000}, {"max_items": 0}, {"deadline_ms": 0.0}, {"x": 1}]
    wrongs += [{"cache": {"url": "http://x"}}, {"tracing": {}}, {"tracing": {"endpoint": "collector:4317"}}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="validation error"):
            ServeSettings.model_validate({"model": "m"} | wrong)
