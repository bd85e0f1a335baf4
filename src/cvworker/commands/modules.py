"""``cvworker modules``."""

from __future__ import annotations

from pydantic_settings import BaseSettings, SettingsConfigDict

from cvworker.loading import installed


class Modules(BaseSettings):
    """List the modules that installed packages offer (entry-point group cvworker.modules)."""

    model_config = SettingsConfigDict(cli_exit_on_error=False)

    def main(self) -> int:
        for name, entry in installed().items():
            package = entry.dist.name if entry.dist else "?"
            print(f"{name:<16} {entry.value:<44} ({package})")
        return 0
