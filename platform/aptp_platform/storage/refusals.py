"""What a disk or a bucket refuses, as one line: which file, the server's own reason, what to change."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError, ProfileNotFound

from aptp_platform.storage.errors import MissingError, StoreError
from aptp_platform.storage.s3 import client_error, status_of

_REFUSED = (301, 400, 403)  # statuses whose reason is worth asking for


@contextmanager
def one_line(
    shown: str, local: bool, endpoint: str | None, profile: str | None, why: Callable[[], BaseException | None]
) -> Iterator[None]:
    """Turn what fsspec and botocore raise into a `StoreError`.

    Args:
        why: asks the server again for words, where it refused without any.
    """
    try:
        yield
    except StoreError:
        raise
    except FileNotFoundError:
        raise MissingError(f"{shown}: does not exist; check the name, and storage.endpoint for a bucket") from None
    except PermissionError as error:
        fix = "check its permissions"
        if not local:
            fix = "check the credentials, and that the bucket's policy lets them list, read and write"
        raise StoreError(f"{shown}: access denied ({_reason(error, why)}): {fix}") from None
    except (NoCredentialsError, PartialCredentialsError):
        raise StoreError(
            f"{shown}: no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.profile, or "
            "storage.anonymous for a public bucket"
        ) from None
    except ProfileNotFound:
        raise StoreError(f"storage.profile: {profile!r}: no such profile; name one that exists") from None
    except (BotoCoreError, ClientError, OSError, ValueError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or os.strerror(errno.ENOSPC) in str(error)  # of several files that were copied
        if local or full:
            fix = ": make room, or name another place" if full else ""
            raise StoreError(f"{shown}: {_reason(error, why)}{fix}") from None
        at = f" at storage.endpoint {endpoint}" if endpoint else ""
        reason = _reason(error, why)
        raise StoreError(f"{shown}: not reachable{at} ({reason}): check the endpoint and region") from None


def _reason(error: BaseException, why: Callable[[], BaseException | None]) -> str:
    """The server's own words where it has some, else the error's kind and first words; never all of them, since they
    may quote a request. HEAD, which is asked first of most files, is refused without words."""
    refusal = client_error(error)
    if refusal is not None and refusal.operation_name.startswith("Head") and status_of(error) in _REFUSED:
        refusal = client_error(why() or error)
    if refusal is not None:
        told = refusal.response["Error"]
        return f"{told.get('Code')}: {' '.join(str(told.get('Message')).split())[:200]}"
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
