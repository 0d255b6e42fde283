"""Events to an Amazon SQS queue or a compatible one. Credentials come from boto3's own chain."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.parsers import ResponseParserError

from receiver.base.cached_property import cached_property
from receiver.events.cloudevents import MEDIA_TYPE
from receiver.events.dispatcher import Message, NotTried, Outcome, SinkRefused, SinkSilent, SinkUnavailable, Unsure
from receiver.providers.base import plain
from storage.bucket.bounded_connections import bound

# The limit of SendMessageBatch (SQS API reference).
BATCH = 10
# The limit of a batch and of a message alike: 256 KiB, less some room for the attributes. SQS allows four times that
# since 2025, compatible queues do not.
MAX_BYTES = 250_000
THREADS = 2
# READ_SECONDS: until an answer begins, and of waiting for its body, which has to come at 13 kB/s then.
CONNECT_SECONDS, READ_SECONDS = 5.0, 10.0
MAX_CODE_CHARS = 80
# What boto3's parser raises of JSON of another form, of none, or in another character set: a page of a proxy.
NOT_OF_SQS = (ResponseParserError, AttributeError, TypeError, ValueError, RecursionError)
AWS_HOST = re.compile(r"(?:sqs|queue)\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?")


class Sqs:
    """A `dispatcher.Sink`. In a FIFO queue the task is the message group and the event's id deduplicates."""

    batch = BATCH
    threads = THREADS

    def __init__(self, queue_url: str) -> None:
        self._queue_url = queue_url
        self._is_fifo = urlsplit(queue_url).path.endswith(".fifo")

    @cached_property
    def _client(self) -> Any:
        parts = urlsplit(self._queue_url)
        aws = AWS_HOST.fullmatch(parts.hostname or "")
        once = {"total_max_attempts": 1}  # we have our own schedule
        options = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries=once)
        client = boto3.Session().client(  # boto3's default session is not thread-safe
            "sqs",
            endpoint_url=f"{parts.scheme}://{parts.netloc}",
            region_name=aws.group(1) if aws else None,
            config=options,
        )
        bound(client)
        return client

    def send(self, messages: Sequence[Message]) -> list[Outcome]:
        outcomes: list[Outcome] = []
        for group in _groups(messages):
            silent = bool(outcomes) and isinstance(outcomes[-1], SinkSilent)
            outcomes += [NotTried("not tried") for _ in group] if silent else self._send(group)
        return outcomes

    def _send(self, group: Sequence[Message]) -> list[Outcome]:
        if len(group[0].body) > MAX_BYTES:
            return [SinkRefused(f"{len(group[0].body)} bytes, SQS takes {MAX_BYTES}")]
        entries = [self._entry(str(place), message) for place, message in enumerate(group)]
        try:
            answer = self._client.send_message_batch(QueueUrl=self._queue_url, Entries=entries)
        except ClientError as error:
            failed: Outcome = SinkUnavailable(f"SQS: {_code(error.response.get('Error', {}))}")
        except BotoCoreError as error:
            failed = SinkSilent(f"SQS: {type(error).__name__}")
        except NOT_OF_SQS as error:
            failed = SinkUnavailable(f"SQS: the answer cannot be read ({type(error).__name__})")
        else:
            # A page of a proxy names neither: it is no queue that has the message.
            outcomes = {each.get("Id"): _fault(each) for each in answer.get("Failed", [])}
            outcomes |= {each.get("Id"): None for each in answer.get("Successful", [])}
            failed = SinkUnavailable("SQS: the answer does not name the message")
            return [outcomes.get(entry["Id"], failed) for entry in entries]
        return [failed] * len(group)

    def _entry(self, name: str, message: Message) -> dict[str, Any]:
        media_type = {"DataType": "String", "StringValue": MEDIA_TYPE}
        entry = {
            "Id": name,
            "MessageBody": message.body.decode(),
            "MessageAttributes": {"content-type": media_type},
        }
        if self._is_fifo:
            entry |= {"MessageGroupId": message.group, "MessageDeduplicationId": message.id}
        return entry

    def check(self) -> str:
        """Reach the queue. A sender needs no permission to read its attributes."""
        try:
            found = self._client.get_queue_attributes(QueueUrl=self._queue_url, AttributeNames=["QueueArn"])
        except ClientError as error:
            code = _code(error.response.get("Error", {}))
            raise (Unsure if "AccessDenied" in code else SinkUnavailable)(f"SQS: {code}") from error
        except BotoCoreError as error:
            raise SinkSilent(f"SQS: {type(error).__name__}") from error
        except NOT_OF_SQS as error:
            raise SinkUnavailable(f"SQS: the answer cannot be read ({type(error).__name__})") from error
        if not (name := found.get("Attributes", {}).get("QueueArn")):
            raise SinkUnavailable("SQS: the answer names no queue")
        return f"the queue {name} answers"

    def close(self) -> None:
        if "_client" in self.__dict__:
            self._client.close()


def _code(error: dict[str, Any]) -> str:
    """The error code, without what no row or terminal takes."""
    return plain(str(error.get("Code", "no code")), MAX_CODE_CHARS)


def _fault(fault: dict[str, Any]) -> Exception:
    words = f"SQS: {_code(fault)}"
    return SinkRefused(words) if fault.get("SenderFault") else SinkUnavailable(words)


def _groups(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """Messages in groups of at most one call. A message that is too large for a call is a group of its own."""
    group: list[Message] = []
    size = 0
    for message in messages:
        if group and (len(group) == BATCH or size + len(message.body) > MAX_BYTES):
            yield group
            group, size = [], 0
        group.append(message)
        size += len(message.body)
    if group:
        yield group
