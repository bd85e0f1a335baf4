"""``python -m cvworker``: the same as the command ``cvworker``."""

from __future__ import annotations

import sys

from cvworker.cli import main

if __name__ == "__main__":
    sys.exit(main())
