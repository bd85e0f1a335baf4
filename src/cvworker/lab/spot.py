"""Today's spot prices, from EC2 itself."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import boto3
from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from cvworker.errors import StartupError
from cvworker.lab.catalogue import Catalogue

LINUX = "Linux/UNIX"


def with_spot_prices(catalogue: Catalogue) -> Catalogue:
    """The catalogue with what each machine costs now as a spot instance, in the cheapest zone of its region.

    Machines that EC2 has no price for keep the catalogue's. Credentials and endpoint are boto3's own. Raises
    StartupError where EC2 does not tell.
    """
    prices = spot_prices(list(catalogue.machines), catalogue.region)
    machines = {
        name: machine.model_copy(update={"spot": prices.get(name, machine.spot)})
        for name, machine in catalogue.machines.items()
    }
    return catalogue.model_copy(update={"machines": machines})


def spot_prices(types: Sequence[str], region: str) -> dict[str, float]:
    """Dollars an hour of each type, the lowest of the region's zones."""
    found: dict[str, float] = {}
    try:
        client = boto3.Session().client("ec2", region_name=region)
        pages = client.get_paginator("describe_spot_price_history").paginate(
            Filters=[{"Name": "instance-type", "Values": list(types)}],
            ProductDescriptions=[LINUX],
            StartTime=datetime.datetime.now(datetime.UTC),
        )
        for page in pages:
            for row in page["SpotPriceHistory"]:
                name, price = row["InstanceType"], float(row["SpotPrice"])
                found[name] = min(price, found.get(name, price))
    except (BotoCoreError, ClientError, Boto3Error, ValueError) as error:
        why = " ".join(str(error).split())
        raise StartupError(f"spot: EC2 in {region} did not tell its prices ({why}); leave --spot out") from None
    return found
