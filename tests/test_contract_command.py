"""The command line: settings and their sources, exit codes, and one clear line for what is wrong at the start."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest

from cvworker.embedded.sqs import EmbeddedSqs
from modules.contract_peers import closed_port
from modules.contract_refusals import REFUSED, SECRET_PART
from world import BIN, MEAN, MODULES, World, picture

DEFAULTS = {  # of the contract's table; None: none, or described in words
    "queue_url": None,
    "module": None,
    "weights": None,
    "device": "auto",
    "precision": "auto",
    "batch_size": "8",
    "max_wait_ms": "20",
    "receive_threads": "3",
    "callback_concurrency": "64",
    "download_threads": "auto",
    "download_concurrency": "auto",
    "preprocess_workers": "auto",
    "max_queue_size": "auto",
    "max_inflight_bytes": str(512 * 2**20),
    "visibility_timeout": None,
    "max_lease": "900",
    "stall_timeout": "120",
    "max_attempts": "5",
    "callback_url": None,
    "callback_secret": None,
    "callback_timeout": "15",
    "download_timeout": "20",
    "max_image_bytes": str(20 * 2**20),
    "max_image_pixels": "50000000",
    "allowed_hosts": None,
    "allowed_buckets": None,
    "allow_private_networks": "False",
    "http_host": "127.0.0.1",
    "http_port": "8080",
    "shutdown_grace": "25",
    "exit_when_idle": None,
    "processes": "1",
    "log_format": "auto",
    "log_level": "info",
}


def command(
    *arguments: str | Path, folder: Path, environment: dict[str, str] | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [BIN / "cvworker", *arguments],
        env={**os.environ, **(environment or {})},
        cwd=folder,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=90,
    )


def one_line(result: subprocess.CompletedProcess[str], mentions: str) -> str:
    """What a start that cannot be says: one line, exit code 2, no traceback."""
    text = result.stdout + result.stderr
    assert result.returncode == 2, text
    assert "Traceback" not in text, text
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, text
    assert re.search(mentions, lines[0], re.IGNORECASE), lines[0]
    return lines[0]


# What cannot start


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, ministack: Any) -> Iterator[dict[str, Future]]:
    """All of them at once, four at a time: most of their time is spent importing torch."""
    queue, fifo = ministack.create_queue("command"), "command.fifo"
    fifo = ministack.client().create_queue(QueueName=fifo, Attributes={"FifoQueue": "true"})["QueueUrl"]
    closed = f"http://127.0.0.1:{closed_port()}"
    with socket.create_server(("127.0.0.1", 0)) as taken, ThreadPoolExecutor(4) as pool:
        known = {"taken": str(taken.getsockname()[1]), "endpoint": ministack.endpoint, "fifo": fifo, "closed": closed}

        def fill(text: str) -> str:
            for name, value in known.items():
                text = text.replace("{" + name + "}", value)
            return text

        def start(name: str) -> tuple[subprocess.CompletedProcess[str], str]:
            flags, variables, mentions = REFUSED[name]
            folder = tmp_path_factory.mktemp("refused")
            (folder / "import_fails.py").write_text("import no_such_package\n")
            (folder / "import_raises.py").write_text("raise RuntimeError('no luck')\n")
            (folder / "syntax_error.py").write_text("class Model(:\n")
            (folder / "file.safetensors").write_bytes(b"rubbish, not tensors")
            if flags and flags[0].startswith("{dotenv:"):
                (folder / ".env").write_text(flags[0][8:-1] + "\n")
                flags = []
            environment = {
                **ministack.environment(),
                "CVWORKER_QUEUE_URL": queue,
                "CVWORKER_MODULE": MEAN,
                "CVWORKER_HTTP_PORT": "0",
                "CVWORKER_PREPROCESS_WORKERS": "0",  # half the imports of torch
                "AWS_MAX_ATTEMPTS": "1",
                "AWS_CONFIG_FILE": "/dev/null",
                "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
                **{key: fill(value) for key, value in variables.items()},
            }
            environment = {key: value for key, value in environment.items() if value}
            return command("run", *map(fill, flags), folder=folder, environment=environment), fill(mentions)

        tmp_path_factory.getbasetemp()  # made at its first use, and not to be made by four threads at once
        yield {name: pool.submit(start, name) for name in REFUSED}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_start_says_why_in_one_line_and_ends_with_2(refused: dict[str, Future], name: str) -> None:
    result, mentions = refused[name].result(120)
    one_line(result, mentions)
    assert SECRET_PART[:8] not in result.stdout + result.stderr


# Sources of settings


def test_a_flag_wins_over_a_variable_and_a_variable_over_a_line_in_dotenv(tmp_path: Path) -> None:
    def module_named(*flags: str, **variables: str) -> str:
        return one_line(command("run", *flags, folder=tmp_path, environment=variables), "module")

    base = {"CVWORKER_QUEUE_URL": "http://127.0.0.1:1/1/images", "AWS_DEFAULT_REGION": "us-east-1"}
    (tmp_path / ".env").write_text("CVWORKER_MODULE=from_dotenv\n")
    assert "from_dotenv" in module_named(**base)
    assert "from_variable" in module_named(**base, CVWORKER_MODULE="from_variable")
    assert "from_flag" in module_named("--module", "from_flag", **base, CVWORKER_MODULE="from_variable")


def test_help_mentions_every_setting_with_its_variable_and_default_and_no_secret(tmp_path: Path) -> None:
    secret = {"CVWORKER_CALLBACK_SECRET": "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"}
    result = command("run", "--help", folder=tmp_path, environment={**secret, "COLUMNS": "80"})
    assert result.returncode == 0
    text = " ".join(result.stdout.split()).replace("- ", "-")
    for name, default in DEFAULTS.items():
        flag, variable = f"--{name.replace('_', '-')}", f"CVWORKER_{name.upper()}"
        entries = re.findall(rf"{flag}(?![\w-])(?:(?!\[env:).)*\[env: {variable}\]", text)
        assert entries, f"{flag} with {variable}"
        if default is not None:
            assert f"(default: {default})" in entries[-1], entries[-1]
    assert "MfKQ9r8G" not in result.stdout


def test_help_and_modules_take_less_than_half_a_second_of_cpu(tmp_path: Path) -> None:
    for arguments in (["--help"], ["run", "--help"], ["modules"]):
        process = subprocess.Popen([BIN / "cvworker", *arguments], stdout=subprocess.DEVNULL, cwd=tmp_path)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        if arguments == ["--help"]:
            assert usage.ru_utime + usage.ru_stime < 0.5


def test_an_unknown_command_ends_with_2_and_help_with_0(tmp_path: Path) -> None:
    one_line(command("fly", folder=tmp_path), "fly")
    assert command("--help", folder=tmp_path).returncode == 0
    text = command("--help", folder=tmp_path).stdout
    commands = re.findall(r"^  ([a-z]+)  +\S", text, re.MULTILINE)
    assert {"run", "demo", "send", "check", "modules", "healthcheck"} <= set(commands)
    for name in commands:
        result = command(name, "--help", folder=tmp_path)
        assert (result.returncode, result.stderr) == (0, "")
        assert f"cvworker {name}" in result.stdout


def test_modules_lists_what_is_installed(tmp_path: Path) -> None:
    result = command("modules", folder=tmp_path)
    assert result.returncode == 0
    assert "threat" in result.stdout


# check and send


def test_check_tries_everything_and_touches_no_message(fast_world: World, tmp_path: Path) -> None:
    here = fast_world
    here.send(here.request(1))
    flags = ["--queue-url", here.queue_url, "--module", MEAN]
    result = command("check", *flags, folder=tmp_path, environment=here.sqs.environment())
    assert result.returncode == 0, result.stdout + result.stderr
    received = here.client.receive_message(
        QueueUrl=here.queue_url, MessageSystemAttributeNames=["ApproximateReceiveCount"]
    )
    assert received["Messages"][0]["Attributes"]["ApproximateReceiveCount"] == "1"
    assert not here.receiver.received


@pytest.mark.parametrize(("name", "code"), [("TooFew", (1, 2)), ("NoProcess", (2,))])
def test_check_fails_for_a_module_that_fails(fast_world: World, tmp_path: Path, name: str, code: tuple) -> None:
    flags = ["--queue-url", fast_world.queue_url, "--module", f"{MODULES / 'mean.py'}:{name}"]
    result = command("check", *flags, folder=tmp_path, environment=fast_world.sqs.environment())
    assert result.returncode in code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def drained(client: Any, queue: str) -> list[dict[str, Any]]:
    bodies: list[dict[str, Any]] = []
    while messages := client.receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages"):
        bodies += [json.loads(each["Body"]) for each in messages]
    return sorted(bodies, key=lambda body: str(body["image_url"]))


def test_send_enqueues_from_a_file_and_from_stdin(fast_world: World, tmp_path: Path) -> None:
    here = fast_world
    environment = {**here.sqs.environment(), "CVWORKER_QUEUE_URL": here.queue_url}
    requests = [{"id": f"r{n}", "image_url": f"http://host/{n}.png", "metadata": {"é": n}} for n in range(12, 25)]
    (tmp_path / "requests.jsonl").write_text("".join(json.dumps(each) + "\n" for each in requests))
    result = command("send", "requests.jsonl", folder=tmp_path, environment=environment)
    assert result.returncode == 0, result.stderr
    assert drained(here.client, here.queue_url) == requests
    flags = ["--callback-url", "http://host/answers", "--task", "mean", "--metadata", '{"a": 1}']
    result = command("send", *flags, folder=tmp_path, environment=environment, stdin="http://host/1.png\n")
    assert result.returncode == 0, result.stderr
    [body] = drained(here.client, here.queue_url)
    filled = {"callback_url": "http://host/answers", "task": "mean", "metadata": {"a": 1}}
    assert {key: body[key] for key in ("image_url", *filled)} == {"image_url": "http://host/1.png", **filled}


def test_send_refuses_what_is_no_request_and_names_its_line(fast_world: World, tmp_path: Path) -> None:
    environment = {**fast_world.sqs.environment(), "CVWORKER_QUEUE_URL": fast_world.queue_url}
    lines = '{"image_url": "http://host/1.png"}\n{"image_url": 5}\n'
    result = command("send", "-", folder=tmp_path, environment=environment, stdin=lines)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    assert re.search(r"\b2\b", result.stderr), result.stderr


def test_send_makes_a_request_of_each_picture_below_a_prefix(tmp_path: Path) -> None:
    with EmbeddedSqs() as sqs:
        queue = sqs.create_queue("prefix")
        s3 = boto3.Session().client(
            "s3", endpoint_url=sqs.endpoint, aws_access_key_id="t", aws_secret_access_key="t", region_name="us-east-1"
        )
        s3.create_bucket(Bucket="pictures")
        for key in ("in/1.png", "in/2 é.jpg", "in/notes.txt", "out/3.png"):
            s3.put_object(Bucket="pictures", Key=key, Body=picture(1))
        environment = {**sqs.environment(), "CVWORKER_QUEUE_URL": queue}
        result = command("send", "s3://pictures/in/", folder=tmp_path, environment=environment)
        assert result.returncode == 0, result.stderr
        urls = [each["image_url"] for each in drained(sqs.client(), queue)]
        assert urls == ["s3://pictures/in/1.png", "s3://pictures/in/2 é.jpg"]
