"""API keys, stored as hashes only, each with an optional limit in multiply-adds.

The secret is JSON in a file or in the environment of the ingress's node, never in a config:

    [{"name": "web", "sha256": "9f86d0...", "macs_per_second": 2e12, "burst_macs": 1e14}]

`jobs/make_api_key.py` makes a key and its entry. Keys are long and random, so a plain SHA-256 cannot be searched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from aptp_platform.serve.args import KeyArgs
from aptp_platform.serve.http.limits import MacsBucket, QuotaCharge, WrongKeys
from aptp_platform.serve.messages import ApiError

VARIABLE: Final = "APTP_API_KEYS"
_RELOAD_S: Final = 5.0  # a secret that was changed counts after this long
_BURST_S: Final = 60.0  # an unset burst is the limit's amount for this long
_LOG = logging.getLogger("ray.serve")


class ApiKey(BaseModel):
    """One entry of the secret. macs_per_second: unset: no limit. burst_macs: what may be asked at once."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(pattern=r"^[\w.@-]{1,64}$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    macs_per_second: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    burst_macs: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @property
    def burst(self) -> float:
        return self.burst_macs or _BURST_S * (self.macs_per_second or 0)


def make_key(name: str, macs_per_second: float | None = None) -> tuple[str, ApiKey]:
    """A new key, which nobody else will ever see, and its entry."""
    token = f"aptp-{secrets.token_urlsafe(32)}"
    return token, ApiKey(name=name, sha256=_digest(token), macs_per_second=macs_per_second)


def read_keys_file(path: Path) -> dict[str, ApiKey]:
    """Entries of a file, by hash.

    Raises:
        ValueError: as `read_keys`, or the file cannot be read.
    """
    try:
        return read_keys(path.read_text(encoding="utf-8"), f"keys.file: {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"keys.file: {path}: {type(error).__name__}: name a file that can be read") from None


def read_keys(text: str, place: str) -> dict[str, ApiKey]:
    """Entries by hash.

    Raises:
        ValueError: it names the place, the entry and the field, and never what stands there.
    """
    try:
        keys = TypeAdapter(list[ApiKey]).validate_python(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: line {error.lineno} is not JSON: write a list of objects") from None
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(
            f"{place}: {where}: {first['msg']}: write what jobs/make_api_key.py prints, counted from 0"
        ) from None
    if len({key.name for key in keys}) < len(keys):
        raise ValueError(f"{place}: two keys have one name: name them apart")
    return {key.sha256: key for key in keys}


class ApiKeyAuth:
    """Tells whose key a request carries, and charges it.

    Every replica of the ingress has one; `share` is the part of each limit that is this replica's, so that all of them
    together keep to it without asking each other.

    Args:
        listens_on_loopback: whether nobody but this machine can reach the server.

    Raises:
        ValueError: keys are demanded and there are none, or the secret cannot be read.
    """

    def __init__(
        self,
        args: KeyArgs,
        environment: Mapping[str, str],
        *,
        listens_on_loopback: bool,
        share: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._args, self._environment, self._share = args, environment, share
        self._version: object = None
        self._looked, self._wrong_keys = 0.0, WrongKeys()
        self._buckets: dict[str, tuple[ApiKey, MacsBucket]] = {}
        self.demanded = not listens_on_loopback if args.required == "auto" else args.required
        self._keys = self._read() if self.demanded else {}
        if self.demanded and not self._keys:
            raise ValueError(
                f"keys: the server would answer to other machines, and there are no API keys: put what "
                f"jobs/make_api_key.py prints into keys.file or the environment variable {VARIABLE}, or set "
                "keys.required to false"
            )

    async def admit(self, authorization: str | None) -> ApiKey | None:
        """The key of an `Authorization: Bearer ...` header; None where no keys are demanded.

        Raises:
            ApiError: 401, later the more wrong keys come; 429 for very many of them.
        """
        if not self.demanded:
            return None
        self._reload()
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            message = "You didn't provide an API key: send it in the header 'Authorization: Bearer KEY'."
            raise ApiError(401, message, code="invalid_api_key", retry=False)
        key = self._keys.get(_digest(token.strip()))
        if key is None:
            await self._wrong_keys.pause()
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key", retry=False)
        return key

    @contextmanager
    def charged(self, key: ApiKey | None, macs: float) -> Iterator[QuotaCharge]:
        """Charges the most that a request can cost before it runs; the caller corrects the charge once the model is
        known. A request that is refused costs nothing; one that ran out of time, or whose client hung up, does.

        Raises:
            ApiError: 429 when the key has nothing left.
        """
        bucket = self._bucket(key)
        charge = QuotaCharge(macs, bucket)
        if bucket is not None:
            wait_s = bucket.take(charge.macs, self._share())
            if wait_s:
                message = f"This key's limit of multiply-adds is used up; try again in {wait_s:.1f} s."
                raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)
        try:
            yield charge
        except Exception as error:
            if not (isinstance(error, ApiError) and error.status == 504):
                charge.correct(0.0)
            raise

    def headers(self, key: ApiKey | None) -> dict[str, str]:
        """What is left of a limited key's multiply-adds here, and how long until it is full again."""
        bucket = self._bucket(key)
        if key is None or bucket is None or key.macs_per_second is None:
            return {}
        share = self._share()
        level, burst = bucket.level(share), share * key.burst
        return {
            "x-ratelimit-limit-macs": f"{burst:.0f}",
            "x-ratelimit-remaining-macs": f"{max(level, 0.0):.0f}",
            "x-ratelimit-reset-macs": f"{(burst - level) / (share * key.macs_per_second):.3f}s",
        }

    def _bucket(self, key: ApiKey | None) -> MacsBucket | None:
        if key is None or key.macs_per_second is None:
            return None
        known = self._buckets.get(key.name)
        if known is None or known[0] != key:  # a changed limit starts with a full bucket
            known = self._buckets[key.name] = (key, MacsBucket(key.macs_per_second, key.burst))
        return known[1]

    def _read(self) -> dict[str, ApiKey]:
        if self._args.file is None:
            return read_keys(self._environment.get(VARIABLE, "[]"), VARIABLE)
        path = Path(self._args.file)
        keys = read_keys_file(path)
        self._version = path.stat().st_mtime_ns
        return keys

    def _reload(self) -> None:
        """Reads a file that was changed; one that is broken is reported, and the keys before it stay."""
        if self._args.file is None or time.monotonic() - self._looked < _RELOAD_S:
            return
        self._looked = time.monotonic()
        try:
            if Path(self._args.file).stat().st_mtime_ns != self._version:
                self._keys = self._read()
        except (OSError, ValueError) as error:
            _LOG.warning("the API keys were not read again: %s", error)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
