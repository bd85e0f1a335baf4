"""The settings: one class behind every flag, environment variable, ``.env`` line and the reference in ``docs/``."""

from __future__ import annotations

import difflib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from cvworker.egress import PORTS, check_proxy, port_ranges, without_credentials

PREFIX = "CVWORKER_"
MIB = 1024 * 1024
AUTO = "auto"
SECRETS_VARIABLE = "CVWORKER_SECRETS_DIR"
SECRETS_DIR = Path("/run/secrets")
"""Where Docker and Podman put a container's secrets, a file for each."""


def _split(value: Any) -> Any:
    """Lists as JSON, comma-separated, or a single bare value."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    if re.match(r'\[\s*["\]]', text):  # and not [::1]:8080, a host
        return json.loads(text)
    return [item.strip() for item in re.split("[,\n]", text) if item.strip()]  # lines: in a secret's file


def _ports(entries: list[str]) -> list[str]:
    port_ranges(entries)
    return entries


def _proxy(url: SecretStr) -> SecretStr:
    check_proxy(url.get_secret_value())
    return url


def _namespace(name: str) -> str:
    """As CloudWatch takes it."""
    if not re.fullmatch(r"[A-Za-z0-9._/#:-]{1,255}", name) or name.startswith((":", "AWS/")):
        raise ValueError("takes letters, digits and . _ / # : - only, 255 at most, and neither AWS/ nor : in front")
    return name


def _batch_size(value: Any) -> Any:
    if value == AUTO or (isinstance(value, str) and value.startswith(f"{AUTO}:") and len(value) > len(AUTO) + 1):
        return value
    try:
        if not isinstance(value, bool) and (number := int(value)) >= 1 and number == float(value):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError("takes a whole number from 1, auto, or auto:FILE with a profile.json of 'cvworker profile'")


def setting(group: str, default: Any, description: str, unit: str = "", **constraints: Any) -> Any:
    """A field with the group and the unit that the reference in ``docs/`` shows."""
    text = f"{description} [{unit}]" if unit else description
    return Field(default, description=text, json_schema_extra={"group": group, "unit": unit}, **constraints)


BatchSize = Annotated[int | str, BeforeValidator(_batch_size)]
AutoInt = Literal["auto"] | Annotated[int, Field(ge=1)]
AutoCount = Literal["auto"] | Annotated[int, Field(ge=0)]
TextList = Annotated[list[str], NoDecode, BeforeValidator(_split)]
SecretList = Annotated[list[SecretStr], NoDecode, BeforeValidator(_split)]
PortList = Annotated[list[str], NoDecode, BeforeValidator(_split), AfterValidator(_ports)]
ProxyUrl = Annotated[SecretStr, AfterValidator(_proxy)]
Namespace = Annotated[str, AfterValidator(_namespace)]


def _secrets_dir() -> Path | None:
    """Where secrets lie as files: the directory that is named, or the usual one where it can be read.

    Raises OSError where the one named cannot.
    """
    if named := os.environ.get(SECRETS_VARIABLE):
        directory = Path(named).expanduser()
        os.scandir(directory).close()
        return directory
    usual = SECRETS_DIR.is_dir() and os.access(SECRETS_DIR, os.R_OK | os.X_OK)
    return SECRETS_DIR if usual else None


class _SecretFiles(SecretsSettingsSource):
    """Settings in files named like their variables; what cannot be read is told in one line."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        try:
            super().__init__(settings_cls, _secrets_dir())
        except OSError as error:
            raise SettingsError(f"{SECRETS_VARIABLE}: {error.filename}: {error.strerror}") from None

    def __call__(self) -> dict[str, Any]:
        try:
            return super().__call__()
        except (OSError, SettingsError) as error:  # it names the field, but neither the file nor a way out
            field = re.search(r'field "(\w+)"', str(error))
            place = f"{self.secrets_dir}/{PREFIX.lower()}{field[1]}" if field else self.secrets_dir
            raise SettingsError(f"{SECRETS_VARIABLE}: {place} cannot be read, or is not text") from None


class CommandLine(BaseSettings):
    """What every command has in common: flags, variables and ``.env`` lines of the same names."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=".env",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,  # a value may be a secret
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_show_env_vars=True,
        cli_exit_on_error=False,
    )


class Settings(CommandLine):
    """What a worker runs with."""

    queue_url: str | None = setting(
        "Queue", None, "SQS queue to consume; region, credentials and endpoint: boto3's chain"
    )
    visibility_timeout: int | None = setting(
        "Queue", None, "Asked for at each receive and extension; default: the queue's own", "seconds", ge=1, le=43200
    )
    receive_threads: int = setting("Queue", 3, "Threads that receive, up to 10 messages a call", ge=1, le=64)
    max_lease: float = setting("Queue", 900, "A message is held at most this long", "seconds", gt=0, le=43200)
    max_attempts: int = setting("Queue", 5, "Receives before giving up, where the queue has no redrive policy", ge=1)

    module: str | None = setting("Module", None, "An installed name, package.module:Class or path/file.py:Class")
    weights: str | None = setting(
        "Module", None, "safetensors: a path, s3:// or https://, with optional #sha256=..., or 'demo'"
    )
    device: str = setting("Module", "auto", "auto, cpu, cuda or cuda:N", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "Module", "auto", "Number format of process; auto keeps fp32 unless another is faster at unchanged answers"
    )
    optimize: Literal["off", "auto", "full"] = setting(
        "Module",
        "auto",
        "Forms of the module's self.model, each used only if measured faster at start with unchanged answers; "
        "auto: channels-last with folded batch norms; full: also torch.compile and CUDA graphs, which makes the start "
        "minutes longer",
    )
    batch_size: BatchSize = setting(
        "Module",
        8,
        "Samples in a batch at most; auto measures at start which number is best, within a few seconds; "
        "auto:FILE takes what a profile.json of 'cvworker profile' recommends",
        "images",
    )
    max_wait_ms: float = setting("Module", 20, "A batch leaves when its first sample has waited this long", "ms", ge=0)
    preprocess_workers: AutoCount = setting(
        "Module", "auto", "DataLoader processes; 0 decodes on threads, without isolation"
    )
    stall_timeout: float = setting("Module", 120, "A step may make no progress for this long", "seconds", gt=0)

    download_threads: AutoInt = setting("Images", "auto", "The thread pool that downloads")
    download_concurrency: AutoInt = setting(
        "Images", "auto", "Downloads under way at once; auto follows need, up to 256"
    )
    download_timeout: float = setting("Images", 20, "The whole download, whatever its pace", "seconds", gt=0)
    max_image_bytes: ByteSize = setting("Images", ByteSize(20 * MIB), "Larger images are refused", "bytes", ge=1)
    max_image_pixels: int = setting("Images", 50_000_000, "Larger images are refused", "pixels", ge=1)
    allowed_hosts: TextList = setting("Images", [], "host or host:port, exempt from the address check")
    allowed_buckets: TextList = setting(
        "Images", [], "Buckets that s3:// image URLs may name; the weights' bucket is always allowed"
    )
    allow_private_networks: bool = setting("Images", False, "Turn the address check off (development only)")
    allowed_ports: PortList = setting(
        "Images", list(PORTS), "Ports, or ranges such as 8000-8999, that URLs of images, callbacks and weights may name"
    )
    egress_proxy: ProxyUrl | None = setting(
        "Images",
        None,
        "http://[user:password@]host:port of a proxy that all downloads, callbacks and https weights go through; "
        "URLs and names are checked as without it. Not for S3 and SQS: boto3 has its own",
    )

    callback_url: str | None = setting("Callbacks", None, "Where answers go that name no callback_url of their own")
    callback_secret: SecretList = setting(
        "Callbacks",
        [],
        "Standard Webhooks signing secrets (whsec_...); several sign with each; never as a flag. Also read from the "
        f"file cvworker_callback_secret in the directory {SECRETS_VARIABLE}, by default /run/secrets",
    )
    callback_timeout: float = setting("Callbacks", 15, "One whole callback exchange", "seconds", gt=0)
    callback_concurrency: int = setting("Callbacks", 64, "Callbacks under way at once", ge=1)

    max_queue_size: AutoInt = setting(
        "Flow", "auto", "Bound of each queue between two steps; auto holds about 3 seconds of work", "images"
    )
    max_inflight_bytes: ByteSize = setting("Flow", ByteSize(512 * MIB), "Image bytes held in memory", "bytes", ge=1)
    processes: int = setting("Flow", 1, "Complete pipelines in this container", ge=1)
    shutdown_grace: float = setting("Flow", 25, "From SIGTERM to exit", "seconds", gt=0)
    exit_when_idle: float | None = setting(
        "Flow", None, "End with 0 after this long with nothing held, received or pending (batch jobs)", "seconds", gt=0
    )

    http_host: str = setting("Endpoints", "127.0.0.1", "Address of /livez, /readyz, /metrics, / and /status.json")
    http_port: int = setting("Endpoints", 8080, "Port of the same; 0 picks a free one", ge=0, le=65535)
    log_format: Literal["auto", "json", "console"] = setting(
        "Endpoints", "auto", "auto is json where stdout is no terminal"
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("Endpoints", "info", "Least severity logged")
    cloudwatch_namespace: Namespace | None = setting(
        "Endpoints",
        None,
        "Write a line of metrics a minute among the logs, from which CloudWatch Logs makes metrics of this namespace",
    )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_inflight_bytes < self.max_image_bytes:
            raise ValueError(
                f"max_inflight_bytes ({self.max_inflight_bytes}) must be at least max_image_bytes "
                f"({self.max_image_bytes}), or the largest image could never be downloaded"
            )
        if self.visibility_timeout and self.max_lease < self.visibility_timeout:
            raise ValueError(
                f"max_lease ({self.max_lease:g} s) must be at least visibility_timeout ({self.visibility_timeout} s)"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,  # not used: its directory is fixed with the class
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags win over variables, those over ``.env``, and that over files of secrets."""
        return init_settings, env_settings, dotenv_settings, _SecretFiles(settings_cls)

    @property
    def proxy(self) -> str | None:
        return self.egress_proxy.get_secret_value() if self.egress_proxy else None

    @property
    def secrets(self) -> list[str]:
        return [secret.get_secret_value() for secret in self.callback_secret]

    def shown(self) -> dict[str, Any]:
        """The settings in force, for people and logs: no secret, and no query string of a URL."""
        values = self.model_dump(mode="json")
        for name, field in Settings.model_fields.items():
            if name == "egress_proxy":
                values[name] = without_credentials(self.proxy) if self.proxy else None
            elif "SecretStr" in str(field.annotation):
                values[name] = ["***"] * len(values[name])
            elif name.endswith("_url") and values[name]:
                values[name] = re.sub(r"[?#].*", "", values[name])
            elif name == "weights" and values[name]:  # the digest stays
                values[name] = re.sub(r"^(https?:[^?]*)\?[^#]*", r"\1", values[name], flags=re.IGNORECASE)
        return {name: values[name] for name in Settings.model_fields}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def how_to_set(name: str) -> str:
    """Where a setting can be given, as error messages name it."""
    return f"{flag(name)} or {PREFIX}{name.upper()}"


def unknown_variables(known: set[str]) -> list[str]:
    """One line for each ``CVWORKER_`` variable that no setting reads: most are misspelt."""
    lines = []
    for variable in sorted(os.environ):
        name = variable.removeprefix(PREFIX).lower()
        if variable.startswith(PREFIX) and name not in known and variable != SECRETS_VARIABLE:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {PREFIX}{close[0].upper()}?" if close else ""
            lines.append(f"{variable} is not a setting and is ignored{hint}")
    return lines
