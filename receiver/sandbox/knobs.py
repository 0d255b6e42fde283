"""All knobs of the sandbox: constructor arguments, CLI options, or changed over HTTP while it runs."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from standardwebhooks.webhooks import EmptyWebhookSecretError, Webhook


def _signs(secret: str) -> str:
    """Refuse a secret that cannot sign. Raises ValueError."""
    try:
        Webhook(secret)
    except EmptyWebhookSecretError:
        raise ValueError("a webhook secret may not be empty") from None
    return secret


Rate = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
# A code of the API's table or a broken answer, before or after the task was created.
CreateFault = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    Field(pattern=r"^([1-5]\d{3}|html|broken|hang)(:created)?$"),
]
QueryFault = Annotated[
    str,
    BeforeValidator(lambda value: str(value) if isinstance(value, int) else value),
    Field(pattern=r"^([1-5]\d{3}|html|broken|hang)$"),
]
WebhookSecret = Annotated[str, AfterValidator(_signs)]
CdnFault = Literal["403", "503", "truncated", "truncated_chunked", "truncated_silent", "html", "empty", "self_redirect"]

# Addresses that the sandbox connects to and listens on are set at its start, never by a request.
STARTUP_ONLY = frozenset({"allow_remote_callbacks", "allow_remote_host"})


class Knobs(BaseModel):
    """The behaviour of the sandbox. The defaults are a quick provider without faults."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    seed: int = Field(
        default=1,
        description="Seed of every random choice, ids and pictures included; read at start and reset. "
        "`receiver sandbox` draws one at each start.",
    )
    allow_remote_host: bool = Field(default=False, description="Allow listening on an address outside loopback.")
    allow_remote_callbacks: bool = Field(default=False, description="Allow callback URLs whose host is not loopback.")

    # credentials
    api_keys: list[str] = Field(default=["sandbox-key"], min_length=1, description="API keys that are accepted.")
    access_key: str = Field(default="sandbox-access-key", description="Access key whose JWTs are accepted.")
    secret_key: str = Field(
        default="sandbox-secret-key-of-more-than-32-characters",
        min_length=32,
        description="Secret key of those JWTs (HS256).",
    )
    webhook_secrets: list[WebhookSecret] = Field(default=[], description="whsec_… secrets; each signs every callback.")

    # the life of a task
    submitted_seconds: Seconds = Field(default=0.1, description="Seconds a task stays submitted.")
    processing_seconds: Seconds = Field(default=0.2, description="Seconds a task stays processing.")
    delay_jitter: Rate = Field(default=0, description="Share by which both delays vary at random, 0…1.")
    fail_rate: Rate = Field(default=0, description="Share of tasks that fail, 0…1. A prompt with [fail] always does.")
    deliver_fewer: int = Field(default=0, ge=0, le=9, description="Pictures left out of every result.")
    series_supported: bool = Field(default=True, description="Whether result_type series is accepted.")
    models: list[str] = Field(default=[], description="Model names that exist; empty = any name is accepted.")
    concurrency_limit: int | None = Field(
        default=None,
        ge=1,
        description="Pictures in progress at once before creates are refused (429/1303); none = no limit.",
    )

    # answers of the API
    create_faults: list[CreateFault] = Field(
        default=[],
        description="How the next creates go wrong, one entry each: a code (5000), html, broken (cut off) or hang "
        "(answered late); with ':created' the task exists nevertheless.",
    )
    create_fault_rate: Rate = Field(
        default=0, description="Share of creates that go wrong, half of them after creating."
    )
    balance: int | None = Field(
        default=None,
        ge=0,
        description="Tasks that are created before every further create is refused 429/1102; none = no limit.",
    )
    query_faults: list[QueryFault] = Field(
        default=[], description="How the next queries go wrong, one entry each, as above."
    )
    query_503_rate: Rate = Field(default=0, description="Share of queries answered 503/5001.")
    query_lag_seconds: Seconds = Field(default=0, description="Seconds in which a new task is not found yet.")
    external_ids: bool = Field(
        default=True,
        description="Whether the provider knows tasks by external_task_id: queries find them, and a second create with "
        "it is refused.",
    )
    hang_seconds: Seconds = Field(default=30, description="Seconds before a hanging answer comes.")
    task_info: bool = Field(default=True, description="Whether answers and callbacks carry task_info at all.")
    gateway_ids: bool = Field(
        default=False, description="Create answers with another task_id than callbacks, as gateways do."
    )

    # callbacks
    callback_shape: Literal["old", "new", "wrapped", "no_task_info"] = Field(
        default="old",
        description="Body of callbacks: Kling's record, the /tasks record, inside data, or with empty task_info.",
    )
    callback_without_series: bool = Field(
        default=False, description="Leave series_images and watermark_url out of callbacks."
    )
    callback_delay_seconds: Seconds = Field(default=0, description="Seconds before a callback is sent.")
    callback_drop_rate: Rate = Field(
        default=0, description="Share of callbacks never sent. A prompt with [drop] gets none."
    )
    callback_empty_rate: Rate = Field(
        default=0, description="Share of callbacks that are sent with an empty body, as behind a proxy that drops it."
    )
    callback_offers_http2: bool = Field(
        default=False, description="Offer HTTP/2 in the clear with every callback, as Java's HttpClient does."
    )
    callback_duplicates: int = Field(default=0, ge=0, le=20, description="Further copies sent of every callback.")
    callback_reorder: bool = Field(
        default=False, description="Hold a task's callbacks until it ends, send the last one first."
    )
    callback_tries: int = Field(default=3, ge=1, le=20, description="Tries until a callback is answered 200.")
    callback_backoff_seconds: Seconds = Field(default=0.2, description="Seconds before the second try, doubling.")
    callback_timeout_seconds: float = Field(default=5, gt=0, le=600, description="Seconds a callback may take.")

    # result files
    picture_bytes: int | None = Field(
        default=None,
        ge=2_000,
        le=64_000_000,
        description="About how large a picture is, in bytes; none = as real ones are.",
    )
    result_lifetime_seconds: int = Field(
        default=2_592_000, ge=0, description="Seconds from the end of a task until its URLs answer 403."
    )
    first_urls_dead: bool = Field(
        default=False,
        description="The URLs of a callback answer 403 until the task is read. Also by a prompt with [expire].",
    )
    fresh_urls_on_read: bool = Field(
        default=False,
        description="Every read of a task brings new URLs, which live as long; old ones stay good.",
    )
    cdn_faults: list[CdnFault] = Field(default=[], description="How the next downloads go wrong, one entry each.")
    cdn_503_rate: Rate = Field(default=0, description="Share of downloads answered 503.")
    cdn_truncated_rate: Rate = Field(
        default=0, description="Share of downloads closed half-way, with the right Content-Length."
    )
    cdn_truncated_chunked_rate: Rate = Field(
        default=0, description="Share of chunked downloads that break off half-way."
    )
    cdn_truncated_silent_rate: Rate = Field(
        default=0, description="Share of downloads that end properly with half the file."
    )
    cdn_html_seconds: Seconds = Field(
        default=0, description="Seconds from the end of a task in which its files are an HTML page with status 200."
    )
    cdn_empty_seconds: Seconds = Field(
        default=0, description="Seconds from the end of a task in which its files are empty, with status 200."
    )
    cdn_self_redirect_seconds: Seconds = Field(
        default=0, description="Seconds from the end of a task in which its files redirect to their own links."
    )
    cdn_content_encoding: str | None = Field(
        default=None,
        pattern=r"^[\x21-\x7e]{1,40}$",
        description="A Content-Encoding that was not requested; of any but gzip only the header comes.",
    )
    cdn_junk_header: bool = Field(default=False, description="Send a line that is no header among a file's headers.")
    cdn_link_form: Literal["plain", "space", "blanks"] = Field(
        default="plain", description="Links to files with a space inside, or with blanks and a line end around them."
    )
    cdn_206_whole: bool = Field(default=False, description="Answer plain downloads 206 with the whole file as a part.")
    cdn_break_share: float | None = Field(
        default=None, gt=0, lt=1, description="Every connection breaks after this share of the file; none = no break."
    )
    cdn_break_seconds: Seconds | None = Field(
        default=None, description="Seconds from the end of a task in which they break; none = always."
    )
    cdn_ranges: bool = Field(default=False, description="Offer and serve ranges, by which a broken download resumes.")
    cdn_html_rate: Rate = Field(default=0, description="Share of downloads that are an HTML page with status 200.")
    cdn_empty_rate: Rate = Field(default=0, description="Share of downloads that are empty, with status 200.")
    cdn_self_redirect_rate: Rate = Field(default=0, description="Share of downloads that redirect to their own link.")
    cdn_seconds: Seconds = Field(default=0, description="Seconds a picture's body takes.")
    cdn_redirects: int = Field(default=0, ge=0, le=20, description="Redirects before a picture.")
    cdn_redirect_to: str | None = Field(
        default=None, description="Where every download is redirected to instead of a picture."
    )

    def merged(self, changes: dict[str, Any]) -> Knobs:
        """These knobs with `changes`. Raises pydantic.ValidationError for an unknown name or a value out of range."""
        return Knobs.model_validate({**self.model_dump(), **changes})


def faults_of(error: ValidationError) -> list[dict[str, Any]]:
    """The faults of knobs, one entry each: `loc`, `msg`, `type`. An unknown name gets the nearest known one."""
    faults: list[dict[str, Any]] = [{**each} for each in error.errors(include_url=False, include_context=False)]
    for fault in faults:
        if fault["type"] == "extra_forbidden":
            near = get_close_matches(str(fault["loc"][0]), Knobs.model_fields, 1)
            fault["msg"] = "no such knob" + (f"; did you mean {near[0]!r}?" if near else "")
    return faults
