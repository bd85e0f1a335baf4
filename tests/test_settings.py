"""Settings: one class behind flags, environment variables and ``.env``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from pydantic_settings import CliApp

from cvworker.settings import MIB, Settings, how_to_set, unknown_variables

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

CONTRACT = {
    "queue_url": None,
    "module": None,
    "weights": None,
    "device": "auto",
    "precision": "auto",
    "batch_size": 8,
    "max_wait_ms": 20,
    "receive_threads": 3,
    "callback_concurrency": 64,
    "download_threads": "auto",
    "download_concurrency": "auto",
    "preprocess_workers": "auto",
    "max_queue_size": "auto",
    "max_inflight_bytes": 512 * MIB,
    "visibility_timeout": None,
    "max_lease": 900,
    "stall_timeout": 120,
    "max_attempts": 5,
    "callback_url": None,
    "callback_secret": [],
    "callback_timeout": 15,
    "download_timeout": 20,
    "max_image_bytes": 20 * MIB,
    "max_image_pixels": 50_000_000,
    "allowed_hosts": [],
    "allowed_buckets": [],
    "allow_private_networks": False,
    "allowed_ports": ["80", "443", "1025-65535"],
    "egress_proxy": None,
    "http_host": "127.0.0.1",
    "http_port": 8080,
    "shutdown_grace": 25,
    "exit_when_idle": None,
    "processes": 1,
    "log_format": "auto",
    "log_level": "info",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without anybody's ``.env``."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(f"CVWORKER_{name.upper()}", value)
    return Settings()


def contracted(settings: Settings) -> dict[str, Any]:
    return {name: value for name, value in settings.model_dump().items() if name in CONTRACT}


def flags(*arguments: str) -> Settings:
    return CliApp.run(Settings, cli_args=list(arguments))


def test_the_defaults_are_those_of_the_contract() -> None:
    assert contracted(Settings()) == CONTRACT


def test_a_flag_wins_over_the_environment_and_that_over_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / ".env").write_text("CVWORKER_BATCH_SIZE=2\nCVWORKER_MAX_WAIT_MS=2\nCVWORKER_MAX_LEASE=222\n")
    monkeypatch.setenv("CVWORKER_BATCH_SIZE", "3")
    monkeypatch.setenv("CVWORKER_MAX_WAIT_MS", "3")
    settings = flags("--batch-size", "4")
    assert (settings.batch_size, settings.max_wait_ms, settings.max_lease) == (4, 3, 222)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("cdn.test", ["cdn.test"]),
        ("cdn.test:8080, images.test ,", ["cdn.test:8080", "images.test"]),
        ('["cdn.test", "images.test"]', ["cdn.test", "images.test"]),
        ("[]", []),
        ("[::1]", ["[::1]"]),
        ("[::1]:8080,cdn.test", ["[::1]:8080", "cdn.test"]),
        ("", []),
    ],
)
def test_a_list_is_json_or_comma_separated_or_one_bare_value(
    text: str, items: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert given(monkeypatch, allowed_hosts=text).allowed_hosts == items
    if text:
        monkeypatch.delenv("CVWORKER_ALLOWED_HOSTS")
        assert flags("--allowed-hosts", text).allowed_hosts == items


def test_a_list_that_begins_like_json_and_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="delimiter"):
        given(monkeypatch, allowed_hosts='["cdn.test"')


def test_sizes_are_read_with_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = given(monkeypatch, max_image_bytes="1MiB", max_inflight_bytes="64 MiB")
    assert (settings.max_image_bytes, settings.max_inflight_bytes) == (MIB, 64 * MIB)


@pytest.mark.parametrize("name", ["download_threads", "download_concurrency", "preprocess_workers", "max_queue_size"])
def test_what_can_be_auto_can_be_a_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert getattr(given(monkeypatch, **{name: "6"}), name) == 6
    assert getattr(given(monkeypatch, **{name: "auto"}), name) == "auto"


def test_preprocess_workers_may_be_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given(monkeypatch, preprocess_workers="0").preprocess_workers == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", "0"),
        ("batch_size", "many"),
        ("download_threads", "0"),
        ("download_threads", "fast"),
        ("device", "gpu"),
        ("device", "cuda:"),
        ("precision", "int8"),
        ("visibility_timeout", "43201"),
        ("max_lease", "0"),
        ("max_lease", "nan"),
        ("http_port", "65536"),
        ("exit_when_idle", "0"),
        ("log_level", "loud"),
        ("max_image_bytes", "5 bananas"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValidationError) as refused:
        given(monkeypatch, **{name: value})
    assert {str(error["loc"][0]) for error in refused.value.errors()} == {name}


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"max_inflight_bytes": "1MiB"}, "max_image_bytes"),
        ({"visibility_timeout": "60", "max_lease": "30"}, "visibility_timeout"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    values: dict[str, str], hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValidationError, match=hint):
        given(monkeypatch, **values)


def test_an_empty_variable_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert contracted(given(monkeypatch, callback_url="", batch_size="")) == CONTRACT


def test_several_secrets_are_a_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert given(monkeypatch, callback_secret=f"{SECRET},{SECRET[:-1]}A").secrets == [SECRET, f"{SECRET[:-1]}A"]


def test_no_secret_is_shown_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = given(
        monkeypatch,
        callback_secret=SECRET,
        callback_url="https://client.test/answers?token=geheim#geheim",
        queue_url="https://sqs.test/1/images?geheim",
    )
    shown = settings.shown()
    assert shown["callback_secret"] == ["***"]
    assert shown["callback_url"] == "https://client.test/answers"
    for text in (str(shown), repr(settings), str(settings.model_dump_json())):
        assert SECRET not in text
    assert "geheim" not in str(shown)
    assert set(shown) == set(Settings.model_fields)


@pytest.mark.parametrize("name", ["callback_secret", "batch_size"])
def test_no_error_shows_what_was_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value: Any = '["whsec_geheim", 5, {}]' if name == "callback_secret" else "geheim"
    with pytest.raises(ValidationError) as refused:
        given(monkeypatch, **{name: value})
    assert "geheim" not in str(refused.value)


def test_settings_do_not_change_while_a_worker_runs() -> None:
    with pytest.raises(ValidationError):
        Settings().batch_size = 3  # type: ignore[misc]


def test_a_misspelt_variable_is_told_with_what_may_have_been_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVWORKER_BATCHSIZE", "8")
    monkeypatch.setenv("CVWORKER_BATCH_SIZE", "8")
    monkeypatch.setenv("CVWORKER_XYLOPHONE", "1")
    assert unknown_variables(set(Settings.model_fields)) == [
        "CVWORKER_BATCHSIZE is not a setting and is ignored; did you mean CVWORKER_BATCH_SIZE?",
        "CVWORKER_XYLOPHONE is not a setting and is ignored",
    ]


def test_every_setting_says_what_it_is_and_how_it_is_set() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
    assert how_to_set("queue_url") == "--queue-url or CVWORKER_QUEUE_URL"
