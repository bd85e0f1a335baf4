"""A request as Celery writes it into a queue; no other worker needs this."""

from __future__ import annotations

import base64
import json

TASK = "compare"


def celery(request: str, number: int) -> str:
    """The body of an SQS message with a call of the task, its one argument being the request, a JSON object."""
    name = f"00000000-0000-4000-8000-{number:012d}"
    arguments = f'[[{request}],{{}},{{"callbacks":null,"errbacks":null,"chain":null,"chord":null}}]'
    delivery = {"exchange": "", "routing_key": "images"}
    message = {
        "body": base64.b64encode(arguments.encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": {"lang": "py", "task": TASK, "id": name, "root_id": name, "parent_id": None, "group": None},
        "properties": {
            "correlation_id": name,
            "delivery_mode": 2,
            "delivery_info": delivery,
            "delivery_tag": name,
            "priority": 0,
            "body_encoding": "base64",
        },
    }
    return json.dumps(message)
