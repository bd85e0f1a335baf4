"""Imported once in the fork server, so that a DataLoader process starts in milliseconds and shares its memory."""

from __future__ import annotations

import json
import os
import sys

import torch.utils.data  # noqa: F401

import cvworker.images
import cvworker.model.preprocess  # noqa: F401
from cvworker import heap

VARIABLE = "CVWORKER_PRELOAD"

if VARIABLE in os.environ:
    wanted = json.loads(os.environ[VARIABLE])
    sys.path[:] = wanted["path"]
    try:
        from cvworker.loading import load

        load(wanted["module"])
    except Exception:  # noqa: S110 - the process that needs the module says what is wrong with it
        pass

heap.settle()  # or each child would write to, and so unshare, every page of it when it collects its own garbage
