"""Objects in one S3 bucket: created once, verified, never overwritten.

The store's behaviour is probed, not assumed. A SHA-256 counts only if the store refuses a wrong one, then an MD5 by the
same rule. Otherwise `put_once` reads the object back and hashes it before it succeeds.
"""

from __future__ import annotations

import base64
import math
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import BinaryIO

import structlog

from storage.bucket import checksums, multipart
from storage.bucket.checksums import Evidence
from storage.bucket.http_connections import UNEXPECTED
from storage.bucket.probe import Capabilities, Probe
from storage.bucket.put_options import Put, PutOptions
from storage.bucket.signed_requests import ConditionFailed, TryAgain
from storage.bucket.store_connection import Addressing, ChecksumMode, without_checksums
from storage.bucket.store_errors import NoSuchObject
from storage.bucket.stored import StoredObjects
from storage.errors import ObjectConflict, StoreUnavailable
from storage.keys import header_text, normal_prefix

log = structlog.get_logger()

# A larger file is uploaded in parts. One part is in memory at a time.
MULTIPART_THRESHOLD_BYTES = 64 * 1024 * 1024
# Pauses before a put is repeated that the store answered with 409. After the last one the row backs off.
CONFLICT_PAUSES = (0.1, 0.5, 2.0)
PROBE_FOLDER = ".receiver-probe/"
# How long a probe is valid. A downgrade or a new proxy may change the store's capabilities.
PROBE_SECONDS = 3_600


class Bucket(StoredObjects):
    """One bucket. Thread-safe. Credentials and region come from boto3's own chain at the first use.

    Every method raises `StoreUnavailable` for faults that may pass or that an operator can repair: store down, request
    refused, bucket missing, no credentials. Its message names the fault and holds no secret.

    `prefix`: begins every key that callers make; normalised here. `public_endpoint_url`: the endpoint in presigned
    links. `checksum_mode`: whether boto3 adds its default checksums to other requests, which some stores refuse. The
    SHA-256 of an object is always sent, except with "never". An MD5 is sent with "never", and where it is the proof.
    `addressing`: bucket name in the path or in the host; "auto" = in the host at AWS, in the path elsewhere.
    `connections`: size of the pool, one per thread that uses it. `capabilities`: None = probed at the first put.
    `put_options`: storage class, encryption, lock, tags and cache header of every object. `keys`: access and secret
    key, in place of the chain.
    """

    def __init__(
        self,
        name: str,
        *,
        endpoint_url: str | None = None,
        prefix: str = "",
        public_endpoint_url: str | None = None,
        checksum_mode: ChecksumMode = "when_supported",
        addressing: Addressing = "auto",
        connections: int = 16,
        capabilities: Capabilities | None = None,
        put_options: PutOptions | None = None,
        keys: tuple[str, str] | None = None,
    ) -> None:
        super().__init__(name, endpoint_url, public_endpoint_url, checksum_mode, addressing, connections, keys)
        self.prefix = normal_prefix(prefix)
        self._capabilities = capabilities
        self._probe_again_at = math.inf  # monotonic seconds
        self._put_options = put_options or PutOptions()
        self._etags_are_md5 = True  # until an object with the right bytes has another ETag
        self._probe_lock = threading.Lock()

    def capabilities(self) -> Capabilities:
        """What the store can do. The first call probes it over the network, and one call an hour probes it again.

        Other threads wait for the first probe alone.
        """
        known = self._capabilities
        if known is not None and time.monotonic() < self._probe_again_at:
            return known
        return self._probed(known)

    def _probed(self, known: Capabilities | None) -> Capabilities:
        """Probe, unless another thread does or has. `known`: by the last probe."""
        if not self._probe_lock.acquire(blocking=known is None) and known is not None:
            return known
        try:
            if self._capabilities is known:
                self._capabilities = self.probe()
                self._probe_again_at = time.monotonic() + PROBE_SECONDS
            assert self._capabilities is not None
            return self._capabilities
        finally:
            self._probe_lock.release()

    def put_once(
        self, key: str, file: BinaryIO, *, sha256: str, size: int, media_type: str, metadata: Mapping[str, str]
    ) -> bool:
        """Create the object, or find the same bytes already there.

        An existing object is never overwritten. One exception: where the store's conditional write is missing or not
        atomic, two writers of *different* bytes at the same instant may both get True, and the later object remains.
        Asset keys contain the hash of the bytes, so both write the same there.
        On return the bytes under `key` are proven to be those of `file`. A crash half-way leaves the whole object or
        none; a repeated call finds out. `file`: seekable, `size` bytes with this `sha256` (hex). `metadata`: text
        values; `sha256` is added. Returns True when this call created the object, False when it existed. Raises
        `ObjectConflict` when another object exists under `key` (never retry), `StoreUnavailable`.
        """
        can = self.capabilities()
        in_parts = can.multipart and size > MULTIPART_THRESHOLD_BYTES
        conditional = can.conditional_multipart if in_parts else can.conditional_put
        described = {name: header_text(value) for name, value in metadata.items()} | {"sha256": sha256}
        own = {"Bucket": self.name, "Key": key, "ContentType": media_type, "Metadata": described}
        condition = {"IfNoneMatch": "*"} if conditional else {}
        put = Put(key, file, sha256, size, self._put_options.arguments() | own, condition)
        # The key is looked up first where the put alone does not decide: a store refuses a multipart upload only after
        # all parts have been sent. A store that loses its conditional writes after a probe overwrites until the next.
        is_certain = conditional and not in_parts
        decides = is_certain and can.believed
        if not decides and not self._is_missing(key) and self.holds(key, sha256=sha256, size=size):
            return False
        for pause in (*CONFLICT_PAUSES, None):
            try:
                evidence = self._put_in_parts(put) if in_parts else self._put_whole(put)
                break
            except ConditionFailed as error:
                if self.holds(key, sha256=sha256, size=size):
                    return False
                if pause is None or not isinstance(error, TryAgain):
                    words = f"the store answers {error} to each put of {key}, and has no such object; retrying"
                    raise StoreUnavailable(words) from None
                time.sleep(pause)
        if not (self._is_proof(evidence) and (is_certain or self._is_there(put, evidence))):
            self._verify_by_reading(put, evidence)
        return True

    def _is_there(self, put: Put, evidence: Evidence) -> bool:
        """Whether the object under the key is still the one that was put, by its ETag.

        Without a condition another writer may have replaced it. SeaweedFS 4.48 checks the condition and completes a
        multipart upload in two steps: two concurrent completions both succeeded in 21 of 40 rounds (single puts never
        did). `rclone serve s3` returns the MD5 of the whole file and not the ETag of its completion.
        """
        stored = self.head(put.key)
        etag = stored.etag.strip('"') if stored is not None and stored.size == put.size else ""
        return bool(etag) and (etag == evidence.etag.strip('"') or etag == checksums.md5_of(put.file))

    def holds(self, key: str, *, sha256: str, size: int) -> bool:
        """Whether the object under `key` has exactly these bytes; False when there is no object.

        The object is read and hashed, unless the store names its checksum and is trusted to. The checksum in the
        metadata and a checksum of parts do not count. Raises `ObjectConflict` for other bytes, `StoreUnavailable`.
        """
        stored = self.head(key)
        if stored is None:
            return False
        proven = stored.checksum == sha256 and self.capabilities().believed
        if stored.size == size and (proven or self.sha256(key) == sha256):
            return True
        raise ObjectConflict(f"another object of {stored.size} bytes is stored under {key}")

    def _is_missing(self, key: str) -> bool:
        """Whether there certainly is no object. Takes half the CPU of `head`."""
        with self._errors():
            signed = self._signed_requests()
            with suppress(*UNEXPECTED):
                return signed is not None and signed.is_missing(key)
        return False

    def probe(self, large_bytes: int = 0) -> Capabilities:
        """Find out what the store can do, with small objects under `{prefix}.receiver-probe/`, removed afterwards.

        `large_bytes`: one of them has this size, and must be listed. Raises `StoreUnavailable` when an object cannot be
        written, read or listed.
        """
        folder = f"{self.prefix}{PROBE_FOLDER}{secrets.token_hex(8)}"
        with self._errors(large_bytes or None):
            probe = Probe(self._client(), self.name, folder)
            try:
                return probe.run(large_bytes)
            finally:
                probe.clean_up()

    def _is_proof(self, evidence: Evidence) -> bool:
        """Whether the store's response proves that it stored our bytes. A contradiction is logged."""
        can = self.capabilities()
        if can.proof == "read":
            return False
        checksum_agrees, etag_agrees, etag = evidence
        # A missing checksum counts only from a store that sent none in the probe either. The 200 of a page in front of
        # the store has no ETag.
        may_lack_it = checksum_agrees is None and etag != "" and (can.proof == "md5" or not can.returns_checksum)
        is_proof = (checksum_agrees or may_lack_it) and (etag_agrees is not False or not self._etags_are_md5)
        if not is_proof:
            log.warning("store.doubted", bucket=self.name, checksum=checksum_agrees, etag=etag_agrees)
        return is_proof

    def _put_whole(self, put: Put) -> Evidence:
        """Send the file in one request of our own. boto3 repeats it after any response that is not plain success."""
        can = self.capabilities()
        is_proven = self._sends_checksums and can.proof == "sha256" and can.returns_checksum
        # an MD5 takes 4 ms of CPU for 3 MB
        md5 = None if is_proven else checksums.md5_of(put.file, put.sha256 if can.proof == "md5" else None)
        checksum = base64.b64encode(bytes.fromhex(put.sha256)).decode()
        md5_header = {} if md5 is None else self._md5_header(md5)
        arguments = {**put.options, **put.condition, **md5_header, "ChecksumSHA256": checksum}
        with self._errors(put.size, creates=True):
            signed = self._signed_requests()
            if signed is not None:
                sent = arguments if self._sends_checksums else without_checksums(arguments)
                with suppress(*UNEXPECTED):
                    answer = signed.put(sent, put.file, sha256=put.sha256, size=put.size)
                    return checksums.evidence_of(answer, checksum, md5)
            put.file.seek(0)
            answer = self._client().put_object(**arguments, Body=put.file, ContentLength=put.size)
            if signed is not None and signed.is_refused:
                log.warning("store.signature_refused", bucket=self.name)
                self._signed = None  # boto3 finds the difference, which is mostly the region
            return checksums.evidence_of(answer, checksum, md5)

    def _put_in_parts(self, put: Put) -> Evidence:
        """Send the file as a multipart upload, which is aborted on any failure."""
        with self._errors(put.size, creates=True):
            return multipart.upload(self._client(), self.name, put, self._md5_header)

    def _md5_header(self, md5: str) -> Mapping[str, str]:
        """The MD5, for a store that gets no SHA-256 or does not check it."""
        if self._sends_checksums and self.capabilities().proof != "md5":
            return {}
        return {"ContentMD5": base64.b64encode(bytes.fromhex(md5)).decode()}

    def _verify_by_reading(self, put: Put, evidence: Evidence) -> None:
        """Read back the new object. Remove it if its bytes are wrong, so that the next try can put it again."""
        try:
            if self.sha256(put.key) == put.sha256:
                self._etags_are_md5 = self._etags_are_md5 and evidence.etag_agrees is not False
                return
        except NoSuchObject:
            pass
        stored = self.head(put.key)  # after the read, because another writer may have replaced the object meanwhile
        if stored is None:
            raise StoreUnavailable("the store confirmed the put, but there is no object; retrying")
        if stored.etag != evidence.etag or stored.metadata.get("sha256") != put.sha256:
            raise ObjectConflict(f"another writer's object is stored under {put.key}")
        if self.capabilities().proof != "read":
            log.error("store.bytes_changed", bucket=self.name)
        # From now on every object is read back.
        self._capabilities = replace(self.capabilities(), refuses_wrong_checksum=False, refuses_wrong_md5=False)
        self.delete(put.key)
        raise StoreUnavailable("the store kept other bytes than it was sent; they were removed, retrying")
