"""Settings: environment variables (also from `.env`), every secret also as `NAME_FILE`. Read once, at the start."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from receiver.base import env_file, setting_faults
from receiver.base import sink_setting as sinks
from receiver.base.console_keys import ConsoleKey
from receiver.base.console_keys import parse as parse_console_keys
from receiver.base.retry_schedule import EVENT_RETRY_SECONDS
from receiver.base.setting_types import (
    Bucket,
    DatabaseUrl,
    Delays,
    Entries,
    Header,
    HostPorts,
    Hosts,
    HttpUrl,
    OptionalProxy,
    OptionalUrl,
    Origins,
    Prefix,
    Seconds,
    Secrets,
    Tags,
    check_text,
)
from storage.bucket.put_options import PutOptions, parse_tags
from storage.errors import UserError
from storage.fetch.addresses import AddressPolicy, host_of

PREFIX = setting_faults.PREFIX
OWN_BUCKET = "pictures"  # bucket of the store that we run ourselves, unless another is set

# What boto3 and OpenSSL read from the environment alone.
OF_LIBRARIES = re.compile(r"AWS_[A-Z0-9_]+|HTTPS?_PROXY|NO_PROXY|SSL_CERT_(FILE|DIR)")

PATHS = frozenset({"spool_dir", "store", "console_thumbnail_dir"})


class SettingsInvalid(UserError, ValueError):
    """One line per fault, each naming its variable. The start stops (exit 1)."""


class Settings(BaseSettings):
    """All settings, with their units in their names. infra/docs/settings.md says what each is for."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=env_file.NAME,
        env_file_encoding="utf-8-sig",  # Windows' editors begin a file with a byte order mark
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    database_url: DatabaseUrl = SecretStr("sqlite:///receiver.db")
    database_direct_url: DatabaseUrl | None = None
    migrate_on_start: bool | None = None

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65_535)
    public_url: OptionalUrl = None
    allow_http: bool = False
    callback_secrets: Secrets = ()

    kling_base_url: HttpUrl = "https://api-singapore.klingai.com"
    kling_api_key: SecretStr | None = None
    kling_access_key: str | None = Field(default=None, repr=False)
    kling_secret_key: SecretStr | None = None
    kling_webhook_secrets: Secrets = ()
    kling_slots: Annotated[int, Field(ge=1, le=100_000)] | None = None

    confirm: Literal["auto", "always", "never"] = "auto"
    poll_after_seconds: Seconds = Field(default=60, ge=0.1)
    poll_max_seconds: Seconds = Field(default=3_600, ge=0.1)
    result_lifetime_seconds: Seconds = Field(default=2_592_000, ge=60)
    result_hosts: Hosts = ()
    private_result_hosts: HostPorts = ()
    max_asset_bytes: int = Field(default=256 * 2**20, ge=1)
    spool_dir: Path | None = None
    fetch_user_agent: Annotated[str, Field(pattern=r"^[\x21-\x7e][\x20-\x7e]{0,199}$")] = "kling-receiver"
    egress_proxy: OptionalProxy = None

    store: Path | None = None
    s3_bucket: Bucket
    s3_endpoint_url: OptionalUrl = None
    s3_prefix: Prefix = ""
    s3_public_endpoint_url: OptionalUrl = None
    s3_checksums: Literal["when_supported", "when_required", "never"] = "when_supported"
    s3_addressing: Literal["auto", "path", "virtual"] = "auto"
    s3_storage_class: Header | None = None
    s3_sse: Literal["AES256", "aws:kms"] | None = None
    s3_kms_key_id: Header | None = None
    s3_lock_mode: Literal["GOVERNANCE", "COMPLIANCE"] | None = None
    s3_lock_days: Annotated[int, Field(ge=1, le=36_500)] | None = None
    s3_tags: Tags = ""
    s3_cache_control: Header | None = None

    api_keys: Secrets = ()
    gateway_results: Literal["archived", "provider"] = "archived"
    gateway_tasks: Literal["all", "own"] = "all"
    event_sinks: Entries = ()
    event_secrets: Secrets = ()
    private_event_hosts: HostPorts = ()
    private_callback_hosts: HostPorts = ()
    event_retry_seconds: Delays = EVENT_RETRY_SECONDS

    workers: int = Field(default=1, ge=0, le=64)
    worker_threads: int = Field(default=8, ge=1, le=256)
    lease_seconds: Seconds = Field(default=60, ge=1)
    grace_seconds: Seconds = Field(default=25, ge=0)

    audit_days: Annotated[float, Field(ge=0.01, le=3_650)] | None = None
    # 1.7 TB a day, and a sixth of a gigabit line, so that archiving and other reads are hardly slower.
    audit_bytes_per_second: int = Field(default=20_000_000, ge=1_000)

    console_keys: Secrets = ()
    console_thumbnail_dir: Path | None = None
    console_thumbnail_bytes: int = Field(default=256 * 2**20, ge=2**20)

    cors_origins: Origins = ()
    stream_assets: bool = False

    metrics_token: SecretStr | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _trimmed(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Trim a value: `echo` ends a secret with a line end, and compose passes an unset variable as an empty one."""
        trimmed = {name: value.strip("\r\n") if isinstance(value, str) else value for name, value in values.items()}
        given = {name: value for name, value in trimmed.items() if value != ""}
        return {"s3_bucket": OWN_BUCKET, **given} if "store" in given else given

    @field_validator("*", mode="before")
    @classmethod
    def _text(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            check_text(value, is_path=info.field_name in PATHS)
        return value

    @model_validator(mode="after")
    def _together(self) -> Settings:
        if found := list(setting_faults.contradictions(self)):
            raise ValueError("\n".join(found))
        return self

    @property
    def console_people(self) -> list[ConsoleKey]:
        """The people who may log in to the console. Raises ValueError, one line per fault."""
        return parse_console_keys(self.console_keys)

    @property
    def event_entries(self) -> list[sinks.Entry]:
        """The sinks of events. Raises ValueError, one line per fault."""
        return sinks.parse([entry.get_secret_value() for entry in self.event_sinks], self.event_policy)

    @property
    def event_policy(self) -> AddressPolicy:
        """The policy for addresses to which events may be posted."""
        return AddressPolicy(
            private_hosts=private_pairs(self.private_event_hosts), private_setting=f"{PREFIX}PRIVATE_EVENT_HOSTS"
        )

    @property
    def callback_policy(self) -> AddressPolicy:
        """The policy for client callbacks of the gateway: no host to which our own events go, whatever the port."""
        dialled = (entry.url for entry in self.event_entries if entry.kind in ("webhook", "sqs"))
        return AddressPolicy(
            private_hosts=private_pairs(self.private_callback_hosts),
            private_setting=f"{PREFIX}PRIVATE_CALLBACK_HOSTS",
            sinks=frozenset(map(host_of, dialled)),
        )

    @property
    def put_options(self) -> PutOptions:
        """The options of every put."""
        return PutOptions(
            storage_class=self.s3_storage_class,
            sse=self.s3_sse,
            kms_key_id=self.s3_kms_key_id,
            lock_mode=self.s3_lock_mode,
            lock_days=self.s3_lock_days,
            tags=parse_tags(self.s3_tags),
            cache_control=self.s3_cache_control,
        )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _SecretFiles(settings_cls), dotenv_settings

    @property
    def migrates_on_start(self) -> bool:
        """On for SQLite, off for PostgreSQL, where several hosts may run different versions for a while."""
        if self.migrate_on_start is not None:
            return self.migrate_on_start
        return self.database_url.get_secret_value().startswith("sqlite")


class _WithoutBucket(Settings):
    """The settings of a command that neither reads nor writes objects."""

    s3_bucket: Bucket = Field(default="", validate_default=False)


class _SecretFiles(PydanticBaseSettingsSource):
    """`RECEIVER_X_FILE=/run/secrets/x`, in `.env` as well: the file's text without its last line break."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls)
        self._dotenv = DotEnvSettingsSource(settings_cls).env_vars  # names in lower case

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        name = f"{PREFIX}{field_name.upper()}_FILE"
        path = os.environ.get(name) or self._dotenv.get(name.lower())
        if not path:
            return None, field_name, False
        try:
            return Path(path).read_text(encoding="utf-8").rstrip("\r\n"), field_name, False
        except (OSError, UnicodeDecodeError) as error:
            fault = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise SettingsInvalid(f"{PREFIX}{field_name.upper()}_FILE: cannot read {path}: {fault}") from error

    def __call__(self) -> dict[str, Any]:
        values = {name: self.get_field_value(field, name)[0] for name, field in self.settings_cls.model_fields.items()}
        return {name: value for name, value in values.items() if value is not None}


def private_pairs(entries: tuple[str, ...]) -> frozenset[tuple[str, int]]:
    """HOST:PORT entries as an `AddressPolicy` wants them."""
    parts = (entry.rpartition(":") for entry in entries)
    return frozenset((host.strip("[]").lower(), int(port)) for host, _, port in parts)


def load(*, needs_bucket: bool = True, **overrides: Any) -> Settings:
    """Read the settings; keyword arguments win over the environment.

    `needs_bucket`: if False, `s3_bucket` may be unset, and is empty then.
    Raises `SettingsInvalid` with one line per fault, each naming its variable. No line shows a value, which may be a
    secret.
    """
    if unknown := sorted(overrides.keys() - Settings.model_fields.keys()):
        raise SettingsInvalid("\n".join(map(_no_setting, unknown)))
    _check_env_file()
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        if not needs_bucket:
            with suppress(ValidationError):
                return _WithoutBucket(**given)
        raise SettingsInvalid("\n".join([*_lines(error), *_rest(error, given)])) from None


def secret_files() -> dict[str, Path]:
    """The files that `NAME_FILE` variables name, by the variable."""
    written = DotEnvSettingsSource(Settings).env_vars
    names = (f"{name}_FILE" for name in _variables())
    found = {name: os.environ.get(name) or written.get(name.lower()) for name in names}
    return {name: Path(path) for name, path in sorted(found.items()) if path}


def _check_env_file() -> None:
    if fault := env_file.fault():
        raise SettingsInvalid(fault)


def _missing(name: str) -> str:
    if name != f"{PREFIX}S3_BUCKET":
        return "required"
    if store := min((file.parent.name for file in Path().glob("*/store.json")), default=None):
        return f"required; or set {PREFIX}STORE={shlex.quote(store)}, which is a store in this folder"
    return f"required; or set {PREFIX}STORE=DIR for a store of your own"


def _rest(error: ValidationError, given: dict[str, Any]) -> list[str]:
    """The faults that pydantic finds only once each setting is valid by itself, without those of invalid settings."""
    wrong = {str(fault["loc"][0]) for fault in error.errors(include_input=False) if fault["loc"]}
    if not wrong:  # `error` contains these faults
        return []
    fields = {name: field for name, field in Settings.model_fields.items() if name in wrong}
    valid = {name: "-" if field.is_required() else field.get_default() for name, field in fields.items()}
    try:
        Settings(**{**given, **valid})
    except ValidationError as rest:
        lines = "\n".join(line for line in _lines(rest)).splitlines()
        return [line for line in lines if not any(re.search(rf"\b{PREFIX}{name.upper()}\b", line) for name in wrong)]
    return []


def _lines(error: ValidationError) -> Iterator[str]:
    for fault in error.errors(include_input=False, include_url=False):
        message = fault["msg"].removeprefix("Value error, ")
        if fault["loc"]:
            name = f"{PREFIX}{str(fault['loc'][0]).upper()}"
            message = _missing(name) if fault["type"] == "missing" else message
            yield f"{name}: {message[:1].lower()}{message[1:]}"
        else:
            yield message


def _no_setting(name: str) -> str:
    nearest = nearest_variable(f"{PREFIX}{name.upper()}")
    return f"{name}: no such setting" + (f"; {nearest.removeprefix(PREFIX).lower()} is the nearest" if nearest else "")


def unknown_variables() -> list[str]:
    """RECEIVER_… variables in the environment or in `.env` that no setting reads, most often misspelt."""
    names = (name for name in {*os.environ, *_env_file_lines()} if name.startswith(PREFIX))
    return sorted(name for name in names if name.removesuffix("_FILE") not in _variables())


def overridden_lines() -> list[str]:
    """The settings in `.env` for which the environment has another value. A `NAME_FILE` counts as another value."""
    found = []
    for name, value in _env_file_lines().items():
        setting = name.removesuffix("_FILE")
        wins = next((each for each in (setting, f"{setting}_FILE") if os.environ.get(each)), None)
        if value and wins and setting in _variables() and (wins, os.environ[wins]) != (name, value):
            found.append(name)
    return sorted(found)


def unexported_lines() -> list[str]:
    """The variables of libraries that are in `.env`, which these do not read, and not so in the environment."""
    lines = _env_file_lines().items()
    return sorted(name for name, value in lines if OF_LIBRARIES.fullmatch(name) and os.environ.get(name) != value)


def _env_file_lines() -> dict[str, str]:
    """The variables of `.env`; empty if it cannot be used."""
    if env_file.find() is None or env_file.fault():
        return {}
    return {name.upper(): value or "" for name, value in DotEnvSettingsSource(Settings).env_vars.items()}


def nearest_variable(name: str) -> str | None:
    """The setting that an unknown variable most likely means."""
    near = difflib.get_close_matches(name.removesuffix("_FILE"), _variables(), 1, 0.8)
    return near[0] + ("_FILE" if name.endswith("_FILE") else "") if near else None


def _variables() -> set[str]:
    return {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
