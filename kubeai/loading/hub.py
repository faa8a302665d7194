"""Hugging Face repositories, downloaded with huggingface_hub, which resumes and supports Xet."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from kubeai.loading.files import LoadError, RemoteFile, matches_source, together, write_out
from kubeai.loading.staging import Staging

CHECKS_AT_A_TIME = 4


class Repository:
    """A repository, pinned to its revision at listing time; see `load.Source`."""

    def __init__(self, url: str, parallel: int) -> None:
        """``parallel``: number of concurrent files."""
        self._url = url
        self._id = url.partition("://")[2]
        self._parallel = parallel
        self._api = HfApi(token=os.environ.get("HF_TOKEN") or None)
        self._revision = ""

    async def list_files(self) -> list[RemoteFile]:
        """The files of the current revision, smallest first."""
        disable_progress_bars()  # `kubeai load` has its own
        files = await self._call(self._list)
        if not files:
            raise LoadError(f"{self._url}: the repository is empty")
        return sorted(files, key=lambda file: (file.size, file.path))

    async def fetch(self, files: list[RemoteFile], staging: Staging) -> None:
        """Download and verify the files; those that fail are downloaded once more."""
        bad = await self._fetch(files, staging)
        for file in bad:
            (staging.files / file.path).unlink(missing_ok=True)
        if bad and (still := await self._fetch(files, staging)):
            raise LoadError(f"{self._url}: {still[0].path} does not match the hub's checksum")

    def _list(self) -> list[RemoteFile]:
        info = self._api.model_info(self._id)
        self._revision = info.sha or "main"
        tree = self._api.list_repo_tree(self._id, recursive=True, revision=self._revision)
        return [_remote(one) for one in tree if isinstance(one, RepoFile)]

    async def _fetch(self, files: list[RemoteFile], staging: Staging) -> list[RemoteFile]:
        """Download the files, and have the disk keep those that are whole; returns the others.

        A file whose source does not say what it contains counts as whole if its size is right.
        """
        await self._call(
            snapshot_download,
            self._id,
            revision=self._revision,
            local_dir=staging.files,
            max_workers=self._parallel,
            token=self._api.token,
        )
        bad: list[RemoteFile] = []
        at_a_time = asyncio.Semaphore(CHECKS_AT_A_TIME)

        async def check(file: RemoteFile) -> None:
            path = staging.files / file.path
            async with at_a_time:
                if (
                    not path.exists()
                    or await asyncio.to_thread(matches_source, file, path) is False
                ):
                    bad.append(file)
                else:
                    await asyncio.to_thread(write_out, path)

        await together(check(file) for file in files)
        return bad

    async def _call(self, function: Any, *args: Any, **options: Any) -> Any:
        try:
            return await asyncio.to_thread(function, *args, **options)
        except Exception as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> Exception:
        match error:
            case GatedRepoError():
                why = "access denied: the repository is gated; request access and set HF_TOKEN"
            case RepositoryNotFoundError():
                why = "no such repository, or HF_TOKEN has no access to it"
            case RevisionNotFoundError():
                why = "its revision was deleted during the load; run it again"
            case HFValidationError():
                why = "is not a repository name; use hf://<owner>/<name>"
            case HfHubHTTPError() if error.response.status_code in (401, 403):
                why = "access denied; check HF_TOKEN"
            case OSError() if error.errno is not None:
                return error  # a local disk error
            case _:
                why = " ".join(str(error).split())[:300] or type(error).__name__
        return LoadError(f"{self._url}: {why}")


def _remote(file: RepoFile) -> RemoteFile:
    if file.lfs is not None:
        return RemoteFile(file.path, file.size, file.lfs.sha256, "sha256")
    return RemoteFile(file.path, file.size, file.blob_id, "git-blob")
