"""Buckets (s3://, gs:// and oss://), downloaded with obstore as parallel parts."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore import exceptions
from obstore.store import GCSStore, S3Store

from kubeai.loading.files import (
    LoadError,
    RemoteFile,
    digest,
    matches_source,
    together,
    write_out,
)
from kubeai.loading.staging import Staging

PART_BYTES = 16 << 20
TRIES_PER_PART = 4
PART_TIMEOUT_S = 300
REGION_TIMEOUT_S = 5
_CLIENT: Any = {
    "timeout": timedelta(seconds=PART_TIMEOUT_S),
    "connect_timeout": timedelta(seconds=10),
    "allow_http": True,
}
_RETRY: Any = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
# The environment variables with credentials, by scheme, for error messages.
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "oss": "OSS_ACCESS_KEY_ID and OSS_ACCESS_KEY_SECRET",
}
Store = S3Store | GCSStore
_STATUS = re.compile(r"status code: (\d{3})")
_MESSAGE = re.compile(r"<Message>([^<]{1,200})")


class Bucket:
    """The objects below a URL; see load.Source."""

    def __init__(self, url: str, parallel: int) -> None:
        """``parallel``: concurrent parts of up to `PART_BYTES`, each held in memory."""
        self._url = url
        self._scheme, _, rest = url.partition("://")
        self._bucket, _, path = rest.partition("/")
        self._prefix = path.strip("/")
        self._parts = asyncio.Semaphore(parallel)
        self._files = asyncio.Semaphore(parallel)
        for name in [name for name, value in os.environ.items() if not value]:
            del os.environ[name]  # an empty key of a Secret; obstore would use it
        self._etags_are_digests = True
        self._store: Store

    async def list_files(self) -> list[RemoteFile]:
        """The objects, smallest first; tries each kind of credentials."""
        self._store, metas = await self._open_and_list()
        start = len(self._prefix) + 1 if self._prefix else 0
        folders = {parent.as_posix() for meta in metas for parent in Path(meta["path"]).parents}
        files = [
            RemoteFile(meta["path"][start:], meta["size"], meta["e_tag"] or "", "md5")
            for meta in metas
            # Consoles create an empty object per folder; obstore strips its trailing slash.
            if meta["path"] not in folders and meta["path"] != self._prefix
        ]
        if not files:
            raise LoadError(f"{self._url}: no such key: no objects with this prefix")
        return sorted(files, key=lambda file: (file.size, file.path))

    async def fetch(self, files: list[RemoteFile], staging: Staging) -> None:
        """Download the files in parallel parts, recording completed parts in a journal."""
        await together(self._fetch_file(file, staging) for file in files)

    # -- credentials -----------------------------------------------------------------------------

    async def _open_and_list(self) -> tuple[Store, list[Any]]:
        """Without credentials in the environment: anonymous access, then the node's identity."""
        refused: LoadError | None = None
        for open_store in await self._stores():
            try:
                store = open_store()
                return store, await asyncio.to_thread(self._metas, store)
            except exceptions.BaseError as error:
                if refused or _status(error) not in (401, 403):
                    raise (refused or self._explain(error)) from None
                refused = self._explain(error)
        assert refused is not None
        raise refused

    def _metas(self, store: Store) -> list[Any]:
        # Without the slash, the key of the URL itself and its siblings would match.
        prefix = f"{self._prefix}/" if self._prefix else None
        return [meta for metas in store.list(prefix) for meta in metas]

    async def _stores(self) -> list[Callable[[], Store]]:
        match self._scheme:
            case "s3":
                return await self._s3()
            case "gs":
                return self._gs()
            case "oss":
                return [self._oss]
        raise LoadError(f"{self._url}: {self._scheme}:// is not a bucket scheme")

    async def _s3(self) -> list[Callable[[], Store]]:
        env = os.environ
        config: Any = {}  # obstore reads the rest from the environment
        if not any(key in env for key in ("AWS_REGION", "AWS_DEFAULT_REGION", *_ENDPOINTS)):
            config["aws_region"] = await asyncio.to_thread(_region_of, self._bucket)

        def store(**more: Any) -> Store:
            return S3Store(
                self._bucket, config=config | more, client_options=_CLIENT, retry_config=_RETRY
            )

        if any(key in env for key in _AWS_IDENTITIES):
            return [store]
        return [lambda: store(aws_skip_signature=True), store]

    def _gs(self) -> list[Callable[[], Store]]:
        key_file = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS", "")
        has_key = bool(key_file) and Path(key_file).is_file() and Path(key_file).stat().st_size > 0

        def store(**keys: Any) -> Store:
            config: Any = keys
            return GCSStore(
                self._bucket, config=config, client_options=_CLIENT, retry_config=_RETRY
            )

        if has_key:
            return [lambda: store(google_application_credentials=key_file)]
        os.environ.pop("GOOGLE_APPLICATION_CREDENTIALS", None)  # the optional Secret is missing
        return [lambda: store(google_skip_signature=True), store]

    def _oss(self) -> Store:
        """OSS through its S3-compatible API, which requires the bucket in the host name."""
        env = os.environ
        region = env.get("OSS_REGION", "")
        endpoint = env.get("OSS_ENDPOINT", "")
        if not (endpoint or region):
            raise LoadError(f"{self._url}: set OSS_REGION (such as cn-hangzhou) or OSS_ENDPOINT")
        endpoint = endpoint or f"https://s3.oss-{region}.aliyuncs.com"
        if "://" not in endpoint:
            endpoint = f"https://{endpoint}"
        address = urlsplit(endpoint)
        by_name = (address.hostname or "").endswith(".aliyuncs.com")
        if by_name and not address.netloc.startswith(f"{self._bucket}."):
            endpoint = f"{address.scheme}://{self._bucket}.{address.netloc}"
        config: Any = {
            "aws_endpoint": endpoint,
            "aws_region": region or "oss",
            "aws_virtual_hosted_style_request": by_name,
        }
        names = {
            "OSS_ACCESS_KEY_ID": "aws_access_key_id",
            "OSS_ACCESS_KEY_SECRET": "aws_secret_access_key",
            "OSS_SESSION_TOKEN": "aws_session_token",
        }
        config |= {names[key]: env[key] for key in names if key in env}
        config["aws_skip_signature"] = "OSS_ACCESS_KEY_ID" not in env
        return S3Store(self._bucket, config=config, client_options=_CLIENT, retry_config=_RETRY)

    # -- files -----------------------------------------------------------------------------------

    async def _fetch_file(self, file: RemoteFile, staging: Staging) -> None:
        path = staging.files / file.path
        journal = staging.parts / hashlib.sha256(file.path.encode()).hexdigest()
        async with self._files:
            if path.exists() and not journal.exists():
                return  # complete and verified
            if not path.exists():
                journal.unlink(missing_ok=True)
            await self._fetch_parts(file, path, journal)
            if not await self._is_good(file, path):
                await self._fetch_again(file, path, journal)
            await asyncio.to_thread(write_out, path)
            journal.unlink()

    async def _fetch_again(self, file: RemoteFile, path: Path, journal: Path) -> None:
        first = await asyncio.to_thread(digest, "md5", path)
        os.truncate(journal, 0)
        await self._fetch_parts(file, path, journal)
        if await self._is_good(file, path):
            return
        if await asyncio.to_thread(digest, "md5", path) != first:
            raise LoadError(f"{self._url}: {file.path}: two downloads differ")
        # In an encrypted bucket an ETag need not be a digest of the content.
        self._etags_are_digests = False

    async def _is_good(self, file: RemoteFile, path: Path) -> bool:
        if not self._etags_are_digests:
            return True
        return await asyncio.to_thread(matches_source, file, path) is not False

    async def _fetch_parts(self, file: RemoteFile, path: Path, journal: Path) -> None:
        """Download the parts that are not in the journal."""
        done = _begin(path, file.size, journal)
        count = -(-file.size // PART_BYTES)
        parts = (part for part in range(count) if part not in done)
        await together(self._fetch_part(file, part, path, journal) for part in parts)

    async def _fetch_part(self, file: RemoteFile, part: int, path: Path, journal: Path) -> None:
        async with self._parts:
            start = part * PART_BYTES
            data = await self._read(file, start, min(start + PART_BYTES, file.size))
            await asyncio.to_thread(_write_part, path, start, data, journal, part)

    async def _read(self, file: RemoteFile, start: int, end: int) -> Any:
        key = f"{self._prefix}/{file.path}" if self._prefix else file.path
        options: Any = {"range": (start, end)} | ({"if_match": file.etag} if file.etag else {})
        for tries_left in reversed(range(TRIES_PER_PART)):
            try:
                data = await asyncio.to_thread(self._read_once, key, options)
                if len(data) != end - start:
                    raise LoadError(
                        f"{self._url}: {file.path}: got {len(data)} bytes instead of {end - start}"
                    )
                return data
            except exceptions.GenericError as error:
                if not tries_left:
                    raise self._explain(error) from None
            except exceptions.BaseError as error:
                raise self._explain(error, file.path) from None
        raise AssertionError("unreachable")

    def _read_once(self, key: str, options: Any) -> Any:
        """Synchronous: the threads of obstore's coroutines may abort the process at its exit."""
        return obstore.get(self._store, key, options=options).bytes()

    def _explain(self, error: exceptions.BaseError, path: str = "") -> LoadError:
        what = f"{self._url}: {path}: " if path else f"{self._url}: "
        names = _CREDENTIALS[self._scheme]
        match _status(error):
            case 401 | 403:
                return LoadError(f"{what}access denied; check {names}{_reason(error)}")
            case 404:
                return LoadError(f"{what}no such bucket or key{_reason(error)}")
            case 412:
                return LoadError(f"{what}changed during the load; run it again")
        return LoadError(what + " ".join(str(error).split("\n\n")[0].split())[:300])


_ENDPOINTS = ("AWS_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")
_AWS_IDENTITIES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_SKIP_SIGNATURE",
)


def _region_of(bucket: str) -> str:
    """The region of an S3 bucket, which S3 returns without authentication."""
    request = urllib.request.Request(f"https://{bucket}.s3.amazonaws.com/", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=REGION_TIMEOUT_S) as response:
            region = response.headers["x-amz-bucket-region"]
    except urllib.error.HTTPError as error:
        region = error.headers["x-amz-bucket-region"]
    except OSError:
        region = None  # the load itself will report the problem
    return region or "us-east-1"


def _write_part(path: Path, start: int, data: Any, journal: Path, part: int) -> None:
    """Write and sync a part before adding it to the journal."""
    with path.open("r+b", buffering=0) as file:
        view = memoryview(data)
        while view:
            written = os.pwrite(file.fileno(), view, start)
            view, start = view[written:], start + written
        os.fdatasync(file.fileno())
    with journal.open("ab", buffering=0) as log:
        log.write(b"%d\n" % part)


def _begin(path: Path, size: int, journal: Path) -> set[int]:
    """Create both files; returns the parts in the journal, whose last line may be incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    journal.touch()
    path.touch()
    os.truncate(path, size)
    *lines, _ = journal.read_bytes().split(b"\n")
    return {int(line) for line in lines}


def _status(error: exceptions.BaseError) -> int:
    """The HTTP status, 0 if none. For a denied listing, obstore has it only in the message."""
    match error:
        case exceptions.UnauthenticatedError():
            return 401
        case exceptions.PermissionDeniedError():
            return 403
        case exceptions.NotFoundError():
            return 404
        case exceptions.PreconditionError():
            return 412
    found = _STATUS.search(str(error))
    return int(found[1]) if found else 0


def _reason(error: exceptions.BaseError) -> str:
    """The store's own error message, if any."""
    found = _MESSAGE.search(str(error))
    return f" ({found[1]})" if found else ""
