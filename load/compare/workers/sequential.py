"""One after the other: receive, download, decode, model, callback, delete. Nothing overlaps."""

from __future__ import annotations

import json

import requests
import torch
from load.compare.task import decode, make_model, preprocess
from load.compare.workers import answer, client, options


def main() -> None:
    """Work until the process is ended."""
    given = options(__doc__)
    sqs, http, model = client(), requests.Session(), make_model(given.load)
    while True:
        found = sqs.receive_message(QueueUrl=given.queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=20)
        for message in found.get("Messages", []):
            request = json.loads(message["Body"])
            image = http.get(request["image_url"], timeout=20)
            image.raise_for_status()
            sample = preprocess(decode(image.content))
            (result,) = model(torch.unsqueeze(sample, 0))
            http.post(request["callback_url"], json=answer(request, result), timeout=15).raise_for_status()
            sqs.delete_message(QueueUrl=given.queue_url, ReceiptHandle=message["ReceiptHandle"])


if __name__ == "__main__":
    main()
