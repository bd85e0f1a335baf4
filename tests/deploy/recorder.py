"""What stands between a worker and AWS in a test, and notes which actions the worker's calls would need."""

from __future__ import annotations

import json

import aiohttp
from aiohttp import web

from cvworker.embedded.server import ThreadServer

TASK_PROTECTION = "/task-protection/v1/state"


class Recorder(ThreadServer):
    """Passes calls on to ``endpoint`` and plays the ECS agent; ``actions`` are what IAM calls what it has seen."""

    def __init__(self, endpoint: str) -> None:
        super().__init__()
        self.endpoint = endpoint
        self.actions: set[str] = set()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        body = await request.read()
        self.actions.add(_action(request))
        if request.path == TASK_PROTECTION:
            return web.json_response({"protection": {"ProtectionEnabled": json.loads(body)["ProtectionEnabled"]}})
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(
                request.method, self.endpoint + request.path_qs, data=body, headers=request.headers
            ) as answer,
        ):
            passed = ("content-type", "content-length", "content-range", "accept-ranges", "etag", "last-modified")
            headers = {name: value for name, value in answer.headers.items() if name.lower() in passed}
            return web.Response(status=answer.status, body=await answer.read(), headers=headers)


def _action(request: web.BaseRequest) -> str:
    """IAM's name for a call: it knows no batches, and looking at an object's head is getting it."""
    if request.path == TASK_PROTECTION:
        return {"PUT": "ecs:UpdateTaskProtection", "GET": "ecs:GetTaskProtection"}[request.method]
    if target := request.headers.get("X-Amz-Target"):
        service, _, operation = target.partition(".")
        return f"{service.removeprefix('Amazon').lower()}:{operation.removesuffix('Batch')}"
    if request.method in ("GET", "HEAD") and request.path.strip("/").count("/") >= 1:
        return "s3:GetObject"
    return f"{request.method} {request.path}"
