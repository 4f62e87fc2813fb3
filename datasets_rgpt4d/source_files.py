"""The files of a data set as its authors publish it: a local folder, or a Hub repository at one revision."""

import hashlib
import os
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

HASH_DIGITS = 16


class MissingDataError(FileNotFoundError):
    """A data set, or a part of it, is not there; the message says what to get and where to put it."""


class SourceFiles:
    """Files of one data set.

    Args:
        location: a local folder, or the id of a data set on the Hub.
        remedy: what a user does to get the data; it ends every message about missing files.
        revision: of a Hub repository: branch, tag or commit; resolved to a commit at once.

    Raises: [`MissingDataError`] if there is no such folder or repository, or it is gated.
    """

    def __init__(self, location: str | os.PathLike, remedy: str, revision: str | None = None):
        self.location, self.remedy = str(location), remedy
        self.folder = Path(location) if os.path.isdir(location) else None
        self._read: set[str] = set()
        if self.folder is not None:
            if revision is not None:
                raise ValueError(f"{location} is a local folder; a revision names a commit of a Hub repository.")
            return
        try:
            info = HfApi().dataset_info(self.location, revision=revision)
        except GatedRepoError as error:
            raise MissingDataError(
                f"{location} is gated: accept its terms on its page on the Hub, then log in with `hf auth login`. {remedy}"
            ) from error
        except (RepositoryNotFoundError, HfHubHTTPError, ValueError, OSError) as error:
            raise MissingDataError(
                f"{location} is neither a folder here nor a data set on the Hub that can be reached ({error}). {remedy}"
            ) from error
        self.commit, self._names = info.sha, sorted(one.rfilename for one in info.siblings)

    @property
    def revision(self) -> str:
        """The commit on the Hub; for a local folder `sha256:...` of the annotation files that were read so far."""
        if self.folder is None:
            return self.commit
        digest = hashlib.sha256()
        for name in sorted(self._read):
            digest.update(name.encode() + b"\0" + hashlib.sha256((self.folder / name).read_bytes()).digest())
        return f"sha256:{digest.hexdigest()[:HASH_DIGITS]}"

    @property
    def fingerprint(self) -> str:
        """Changes when any file does: the commit, or a hash of the names, sizes and times of the local files."""
        if self.folder is None:
            return self.commit[:HASH_DIGITS]
        digest = hashlib.sha256()
        for root, folders, files in os.walk(self.folder, followlinks=True):
            folders.sort()
            for name in sorted(files):
                path = os.path.join(root, name)
                state = os.stat(path)
                digest.update(f"{os.path.relpath(path, self.folder)}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
        return digest.hexdigest()[:HASH_DIGITS]

    def names(self, pattern: str) -> list[str]:
        """Names of the files that match a glob pattern, sorted; `*` does not match `/` in a local folder."""
        if self.folder is None:
            return [name for name in self._names if fnmatch(name, pattern)]
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.glob(pattern) if path.is_file())

    def has(self, name: str) -> bool:
        return name in self._names if self.folder is None else (self.folder / name).is_file()

    def annotations(self, *names: str) -> Path:
        """The first of these files that is there; it counts for `revision`. Raises `MissingDataError` if none is."""
        for name in names:
            if self.has(name):
                self._read.add(name)
                return self._path(name)
        raise MissingDataError(f"{self.location} has no {' or '.join(names)}. {self.remedy}")

    def media(self, *names: str) -> Path | None:
        """The first of these files that is there, or `None`. A Hub file is downloaded."""
        return next((self._path(name) for name in names if self.has(name)), None)

    def _path(self, name: str) -> Path:
        if self.folder is not None:
            return self.folder / name
        try:
            return Path(hf_hub_download(self.location, name, repo_type="dataset", revision=self.commit))
        except (EntryNotFoundError, GatedRepoError) as error:
            raise MissingDataError(
                f"{name} of {self.location} cannot be downloaded ({error}). {self.remedy}"
            ) from error
