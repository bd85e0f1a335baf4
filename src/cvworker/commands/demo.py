"""``cvworker demo``."""

from __future__ import annotations

import base64
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from pydantic_settings import CliSuppress

from cvworker.commands.demo_view import Report, Stand, View
from cvworker.errors import StartupError, WorkerFailed
from cvworker.settings import Settings, TextList, SecretList, how_to_set, unknown_variables

KNOWN = "threat"
"""The module whose classes the pictures are drawn from."""
LOOK_S = 0.1
"""Seconds between two looks at what has changed."""
SETTLE_S = 15.0
"""Seconds for the queue to be empty after the last answer."""
GRACE_S = 5.0
"""The worker's own grace: nothing of value is lost with this queue, and a stop waits for a poll as long as that."""
OWN = ("queue_url", "callback_url", "callback_secret", "allowed_hosts", "allow_private_networks", "exit_when_idle")
