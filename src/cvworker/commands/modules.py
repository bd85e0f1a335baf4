"""``cvworker modules``."""

from __future__ import annotations

from cvworker.loading import installed
from cvworker.settings import CommandLine


class Modules(CommandLine):
    """List the modules that installed packages offer (entry-point group cvworker.modules)."""

    def main(self) -> int:
        for name, entry in installed().items():
            package = entry.dist.name if entry.dist else "?"
            print(f"{name:<16} {entry.value:<44} ({package})")
        return 0
