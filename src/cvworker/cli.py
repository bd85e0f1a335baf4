"""``cvworker COMMAND``: what each command is, how it is called, and how its mistakes are told."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from cvworker import __version__
from cvworker.errors import StartupError, WorkerFailed

if TYPE_CHECKING:
    from pydantic import ValidationError


@dataclass(frozen=True, slots=True)
class Command:
    """A command: the settings class that is its command line, and one line of help."""

    settings: str
    summary: str


COMMANDS = {
    "run": Command("cvworker.commands.run:Run", "consume a queue: download, preprocess, run the model, call back"),
    "demo": Command(
        "cvworker.commands.demo:Demo", "the whole job on this machine: embedded queue, 200 pictures, a contact sheet"
    ),
    "send": Command("cvworker.commands.send:Send", "enqueue requests from a file, stdin or an s3:// prefix"),
    "bulk": Command("cvworker.commands.bulk:Bulk", "run a module over a manifest of stored images, on Ray Data"),
    "plan": Command(
        "cvworker.commands.plan:Plan",
        "how many of which machine: latency and price a month, from a profile and a day of traffic",
    ),
    "check": Command(
        "cvworker.commands.check:Check",
        "try settings, queue and module: each hook's shapes, types and time; touches no message",
    ),
    "new": Command("cvworker.commands.new:New", "write a package with a module, a test of it and a Dockerfile"),
    "pack": Command("cvworker.commands.pack:Pack", "turn a checkpoint into a weights file that describes itself"),
    "export": Command(
        "cvworker.commands.export:Export",
        "write a module's network as torch.export, ONNX, int8, AOTInductor or TensorRT",
    ),
    "verify": Command(
        "cvworker.commands.verify:Verify", "compare an exported or faster network with the original in fp32"
    ),
    "dlq": Command("cvworker.commands.dlq:Dlq", "look at what failed; send it back to the queue"),
    "top": Command("cvworker.commands.top:Top", "watch running workers in the terminal: what each does and lacks"),
    "profile": Command(
        "cvworker.commands.profile:Profile", "measure a module here: which batch size, which precision, what bounds it"
    ),
    "bench": Command(
        "cvworker.commands.bench:Bench", "sequential, threads, DataLoader, batches, everything: what each adds here"
    ),
    "cost": Command("cvworker.commands.cost:Cost", "what a million images cost on which machine, from profiles"),
    "modules": Command("cvworker.commands.modules:Modules", "list the modules that are installed"),
    "healthcheck": Command("cvworker.commands.healthcheck:Healthcheck", "ask a running worker whether it is alive"),
}

OVERVIEW = """usage: cvworker COMMAND [--help] [options]

A queue-driven batch worker for computer vision: SQS in, PyTorch in the middle, HTTP callbacks out.

{commands}

Every option is also an environment variable (CVWORKER_ and its name) or a line in .env.

examples:
  cvworker demo
  cvworker new my_module
  cvworker run --module threat --weights demo --queue-url https://sqs.eu-west-1.amazonaws.com/123456789012/images
  cvworker run --module my_package.models:Scene --weights s3://models/scene.safetensors --batch-size 16
  cvworker send requests.jsonl --queue-url ... --callback-url https://api.example.com/answers

Exit codes: 0 done or stopped as asked, 1 failed while running, 2 bad usage, settings or surroundings.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 2 and one line where the user can mend it."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW.format(commands="\n".join(f"  {name:<12} {c.summary}" for name, c in COMMANDS.items())), end="")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"cvworker {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _mistake("cvworker", f"there is no command {name!r}; the commands are: {', '.join(COMMANDS)}")
    try:
        return _run(name, rest)
    except StartupError as error:
        return _mistake(f"cvworker {name}", str(error))
    except WorkerFailed as error:
        print(f"cvworker {name}: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"cvworker {name}: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `cvworker modules | head`
        sys.stderr.close()
        return 1


def _let_threads_sleep() -> None:
    """Let PyTorch's threads that wait for one another sleep, unless the environment says how they shall wait.

    They share the cores with decoding and I/O, here and in the processes started from here. One that spins takes a
    core from the very thread it waits for (docs/performance.md). OpenMP reads this once, when torch is loaded.
    """
    if "GOMP_SPINCOUNT" not in os.environ:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _run(name: str, arguments: list[str]) -> int:
    from pydantic import ValidationError
    from pydantic_settings import CliApp, SettingsError

    from cvworker.settings import PREFIX, flag

    if name != "bench":  # whose simpler designs wait as most programs do
        _let_threads_sleep()
    place, _, attribute = COMMANDS[name].settings.partition(":")
    cls = getattr(import_module(place), attribute)
    for secret in ("callback_secret", "egress_proxy"):
        if any(argument.startswith(flag(secret)) for argument in arguments):
            raise StartupError(
                f"{secret}: a secret on the command line can be read by every user of the machine; "
                f"use {PREFIX}{secret.upper()} or .env"
            )
    cls.__doc__ = inspect.cleandoc(cls.__doc__ or "")
    cls.model_config["cli_prog_name"] = f"cvworker {name}"
    try:
        settings = CliApp.run(cls, cli_args=arguments)
    except ValidationError as error:
        raise StartupError(_explained(error)) from None
    except SettingsError as error:
        raise StartupError(f"{str(error).removeprefix('error parsing CLI: ')}; see 'cvworker {name} --help'") from None
    except ValueError as error:  # a list that begins like JSON and is none
        raise StartupError(str(error)) from None
    main_of: Callable[[], int] = settings.main
    return main_of()


def _explained(error: ValidationError) -> str:
    """Pydantic's findings on one line, each with the flag and the variable to mend."""
    from cvworker.settings import how_to_set

    found = []
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        name = str(each["loc"][0]) if each["loc"] else ""
        message = each["msg"].removeprefix("Value error, ")
        line = f"{name} ({how_to_set(name)}): {message}" if name else message
        if line not in found:
            found.append(line)
    return "; ".join(found)


def _mistake(who: str, line: str) -> int:
    print(f"{who}: {' '.join(line.split())}", file=sys.stderr)
    return 2
