"""Signatures, checked against the scheme's known answer and by the verifier that receivers use."""

from __future__ import annotations

import base64
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from cvworker.signing import Signer

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_" + base64.b64encode(bytes(range(64))).decode()


def test_the_schemes_known_answer_comes_out():
    headers = Signer([SECRET]).headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=24, max_size=64), st.text(st.characters(codec="utf-8")))
def test_receivers_verify_what_is_signed(key, text):
    secret = "whsec_" + base64.b64encode(key).decode()
    body = text.encode()
    headers = Signer([secret]).headers("m-1", int(time.time()), body)
    Webhook(secret).verify(body, headers, json_parse=False)


def test_a_changed_body_is_not_verified():
    headers = Signer([SECRET]).headers("m", int(time.time()), b"{}")
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(b"{ }", headers, json_parse=False)


def test_while_secrets_rotate_receivers_with_either_verify():
    headers = Signer([SECRET, OTHER]).headers("m", int(time.time()), b"{}")
    assert len(headers["webhook-signature"].split(" ")) == 2
    for secret in (SECRET, OTHER):
        Webhook(secret).verify(b"{}", headers)


def test_a_secret_without_its_padding_is_the_same_secret():
    assert Signer([OTHER.rstrip("=")]).headers("m", 1, b"") == Signer([OTHER]).headers("m", 1, b"")


def test_secrets_of_24_to_64_bytes_are_accepted():
    for size in (24, 64):
        Signer(["whsec_" + base64.b64encode(bytes(size)).decode()])


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "whsec_",
        SECRET.removeprefix("whsec_"),
        SECRET.upper(),
        SECRET + "\n",
        SECRET + "*",
        SECRET + "A",
        "whsec_-_-_" + SECRET[6:],
        "whsec_ü" + SECRET[6:],
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        "whsec_" + base64.b64encode(bytes(65)).decode(),
    ],
)
def test_a_secret_that_cannot_be_used_is_refused_in_one_line_that_does_not_show_it(secret):
    with pytest.raises(ValueError, match="callback secret 2 of 2") as caught:
        Signer([SECRET, secret])
    text = str(caught.value)
    assert "\n" not in text
    assert SECRET[6:] not in text
    assert len(secret) < 10 or secret[6:] not in text
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("secrets", [[], (), SECRET])
def test_there_must_be_a_list_of_secrets(secrets):
    with pytest.raises(ValueError, match="at least one"):
        Signer(secrets)


def test_a_signer_never_shows_its_secrets():
    signer = Signer([SECRET, OTHER])
    key = base64.b64decode(SECRET[6:])
    for text in (repr(signer), str(signer), f"{[signer]}"):
        assert SECRET[6:] not in text
        assert repr(key)[2:-1] not in text
    assert "2" in repr(signer)
