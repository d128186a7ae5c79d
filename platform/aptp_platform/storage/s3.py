"""An S3 file system that asks again for as long as the next answer may be another one, whatever the request.

This stands in the place of botocore's own retries: those do not know 408, 425, 429 without a body or 520 to 529, do not
read Retry-After, and end when a quota is used up. s3fs asks again on top if an answer breaks off in its body.
"""

import datetime
import email.utils
import random
import time
from collections.abc import Mapping
from typing import Any

from botocore.exceptions import ClientError, ConnectionError, HTTPClientError
from s3fs import S3FileSystem

_TRANSIENT = frozenset({408, 425, 429, *range(500, 600)} - {501, 505})
_TRANSIENT_CODES = frozenset({"RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "TooManyRequests"})
_REDIRECTS = (301, 302, 307)  # botocore asks HeadBucket where to, and of its own answer again, without end
_REGION = "x-amz-bucket-region"
_SKEW_SECONDS = 300  # a signature is good for 15 minutes; a clock that is farther off is why it is refused
_LONGEST_PAUSE = 20.0
_LONGEST_ASKED = 60.0  # of Retry-After
_BODIES_READ = 5  # times at most that s3fs asks for an answer that breaks off
_LISTINGS = ("ListObjectsV2", "ListObjects")


class PatientS3(S3FileSystem):
    """attempts: how often a request is made at most."""

    def __init__(self, *, attempts: int, **options: Any) -> None:
        super().__init__(config_kwargs={**options.pop("config_kwargs"), "retries": _NONE}, **options)
        self.attempts, self.retries = attempts, min(_BODIES_READ, attempts)
        self._patient: Any = None  # the client that asks again

    async def set_session(self, refresh: bool = False, kwargs: Any = {}) -> Any:  # noqa: B006  # as in s3fs
        """Every operation comes through here."""
        session = await super().set_session(refresh, kwargs)
        if self._s3 is not self._patient:
            self._s3.meta.events.register_first("needs-retry.s3", self._pause, unique_id="aptp")
            self._patient = self._s3
        return session

    async def _pause(
        self,
        attempts: int,
        operation: Any,
        request_dict: Mapping[str, Any],
        response: Any = None,
        caught_exception: Any = None,
        **_: Any,
    ) -> float | None:
        """Seconds to wait before the request is made again; None if it is not."""
        asked = 0.0
        if response is None:
            if not isinstance(caught_exception, (ConnectionError, HTTPClientError)):
                return None
        else:
            http, parsed = response
            code = parsed.get("Error", {}).get("Code")
            if operation.name == "HeadBucket" and http.status_code in _REDIRECTS and _REGION not in http.headers:
                raise ClientError(dict(parsed), operation.name)
            if http.status_code == 403:
                return 1.0 if attempts == 1 < self.attempts and _is_skewed(http.headers, code) else None
            empty = _lacks_its_body(operation.name, request_dict, http, parsed)
            if http.status_code not in _TRANSIENT and code not in _TRANSIENT_CODES and not empty:
                return None
            if empty and attempts >= self.attempts:
                told = f"{operation.name} was answered with {http.status_code} and no content"
                raise ClientError({"Error": {"Code": "EmptyAnswer", "Message": told}}, operation.name)
            asked = _retry_after(http.headers)
        if attempts >= self.attempts:
            return None
        return max(asked, random.uniform(0.5, 1.0) * min(_LONGEST_PAUSE, 2.0 ** (attempts - 1)))

    def why(self, path: str) -> BaseException | None:
        """What a server says of a request that it refused: HEAD, which is asked mostly, is answered without words."""
        bucket, _, key = path.partition("/")
        try:
            if key:
                self.call_s3("get_object", Bucket=bucket, Key=key, Range="bytes=0-0")
            else:
                self.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1)
        except Exception as error:
            return error
        return None


_NONE = {"mode": "standard", "total_max_attempts": 1}  # no retries of botocore's own


def client_error(error: BaseException) -> ClientError | None:
    """A server's refusal, which s3fs may have put into another error."""
    cause = error if isinstance(error, ClientError) else error.__cause__
    return cause if isinstance(cause, ClientError) else None


def status_of(error: BaseException) -> int | None:
    """The status that a server refused with."""
    refusal = client_error(error)
    return None if refusal is None else refusal.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _lacks_its_body(name: str, request: Mapping[str, Any], http: Any, parsed: Mapping[str, Any]) -> bool:
    """Whether a success says nothing where it must say something: an empty listing has a body too."""
    if http.status_code not in (200, 206):
        return False
    if name in _LISTINGS:
        return "Name" not in parsed and "IsTruncated" not in parsed
    return name == "GetObject" and "Range" in request["headers"] and http.headers.get("Content-Length") == "0"


def _is_skewed(headers: Mapping[str, str], code: str | None) -> bool:
    if code == "RequestTimeTooSkewed":
        return True
    if code != "403":  # with words, and others
        return False
    there = _time_of(headers.get("Date"))
    return there is not None and abs(there - time.time()) > _SKEW_SECONDS


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that the server asks to wait: a number of them, or a date."""
    asked = headers.get("Retry-After", "")
    if asked.isdecimal():
        return min(float(asked), _LONGEST_ASKED)
    until = _time_of(asked)
    return 0.0 if until is None else min(max(until - time.time(), 0.0), _LONGEST_ASKED)


def _time_of(text: str | None) -> float | None:
    try:
        when = email.utils.parsedate_to_datetime(text or "")
    except ValueError:
        return None
    return when.replace(tzinfo=when.tzinfo or datetime.UTC).timestamp()
