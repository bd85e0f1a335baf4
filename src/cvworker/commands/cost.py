"""``cvworker cost``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from pydantic_settings import CliPositionalArg

from cvworker.errors import StartupError
from cvworker.settings import CommandLine, TextList

if TYPE_CHECKING:
    from cvworker.lab.catalogue import Catalogue
    from cvworker.lab.cost import Row

PIPE_WIDTH = 220
"""Columns of the table where stdout is no terminal."""


class Cost(CommandLine):
    """What a million images cost on each machine of the catalogue, from one or more profiles: the device, decoding on
    the vCPUs and the network each set a limit. On machines that a profile was not measured on its numbers are scaled,
    and marked so. Writes a page with the table and a picture of cost against latency.

    Prices of your own, in a file for --prices (every field: 'cvworker cost --catalogue' prints the built-in one):

      date = 2026-11-01

      [machines."g5.xlarge"]

      spot = 0.41

    examples: cvworker cost build/profile-threat/profile.json

              cvworker cost t4/profile.json a10g/profile.json --machines g4dn.xlarge,g5.xlarge --latency-ms 100

              cvworker cost profile.json --prices prices.toml --spot --image-kb 250
    """

    profiles: CliPositionalArg[list[Path]] = Field([], description="Files of 'cvworker profile'")
    machines: TextList = Field([], description="Names in the catalogue; default: all of them")
    prices: Path | None = Field(None, description="TOML: machines and fields in the place of the built-in ones")
    spot: bool = Field(False, description="Ask EC2 for today's spot prices, with boto3's own credentials")
    factor: TextList = Field([], description="MACHINE=NUMBER: how much faster its device is than the profile's")
    latency_ms: float | None = Field(None, description="Batches take no longer (95 %) [ms]", gt=0)
    image_kb: float | None = Field(None, description="A picture's size; default: the one profiled [kB]", gt=0)
    out: Path | None = Field(None, description="The page to write; default: build/cost/cost.html")
    catalogue: bool = Field(False, description="Print the built-in catalogue, and do nothing else")

    def main(self) -> int:
        from cvworker.lab import catalogue, cost
        from cvworker.lab.results import Profile

        if self.catalogue:
            print(catalogue.BUILT_IN.read_text(encoding="utf-8"), end="")
            return 0
        if not self.profiles:
            raise StartupError("profiles: give the profile.json of one or more runs of 'cvworker profile'")
        known = catalogue.load(self.prices)
        profiles = [Profile.load(path) for path in self.profiles]
        factors = cost.parse_factors(self.factor)
        if self.spot:
            from cvworker.lab.spot import with_spot_prices

            known = with_spot_prices(known)
        found, left_out = cost.rows(
            profiles,
            known,
            machines=self.machines,
            factors=factors,
            latency_ms=self.latency_ms,
            image_bytes=round(self.image_kb * 1000) if self.image_kb else None,
        )
        if not found:
            raise StartupError(f"machines: no machine has a number: {'; '.join(left_out)}")
        out = self._write(found, left_out, known)
        _show(found, left_out, known)
        print(f"written to {out}")
        return 0

    def _write(self, found: list[Row], left_out: list[str], known: Catalogue) -> Path:
        from cvworker.lab.cost import page

        out = self.out or Path("build/cost/cost.html")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            page(found, left_out, known).write(out)
        except OSError as error:
            raise StartupError(f"out: {out} cannot be written ({error.strerror}); give another --out") from None
        return out


def _show(found: list[Row], left_out: list[str], known: Catalogue) -> None:
    from cvworker.lab import cost
    from cvworker.lab.terminal import console, print_table

    screen = console(PIPE_WIDTH)
    screen.print(f"prices: {known.title}", markup=False)
    print_table(screen, *cost.table(found), left=("machine", "profile", "basis", "precision", "bound by"))
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
