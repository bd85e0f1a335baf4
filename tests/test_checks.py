"""Full speed, in the world that speed is measured in; what is timed is in ``load/checks.py`` only."""

from __future__ import annotations

import pytest
from load import checks


@pytest.mark.timeout(240)
def test_5000_messages_at_full_speed_are_answered_once_and_none_expires() -> None:
    held, found = checks.full_speed()
    assert held, found
