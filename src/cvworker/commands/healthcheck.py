"""``cvworker healthcheck``."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from typing import Literal

from pydantic import Field

from cvworker.settings import CommandLine, Settings


class Healthcheck(CommandLine):
    """Ask a running worker whether it is alive (or ready): exit code 0 if so, 1 if not. For container health checks.

    example: cvworker healthcheck --http-port 8080
    """

    http_host: str = Settings.model_fields["http_host"].default
    http_port: int = Field(Settings.model_fields["http_port"].default, ge=1, le=65535)
    probe: Literal["live", "ready"] = Field("live", description="Which question to ask")
    timeout: float = Field(3.0, gt=0, description="Seconds to wait for the answer")

    def main(self) -> int:
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.http_host, self.http_host)  # noqa: S104 - a comparison
        url = f"http://{host}:{self.http_port}/{self.probe}z"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy would not know this host
        try:
            with opener.open(url, timeout=self.timeout) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            print(f"{url}: {error.code}: {error.read(2000).decode(errors='replace').strip()}", file=sys.stderr)
            return 1
        except (OSError, ValueError) as error:
            print(f"{url}: no answer ({error})", file=sys.stderr)
            return 1
        return 0 if answer.get("ok") else 1
