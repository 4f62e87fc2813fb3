"""The files of a data set as its authors publish it: a local folder, or a Hub repository at one revision."""

import hashlib
import os
import shlex
import shutil
import zlib
from fnmatch import fnmatch
from glob import glob
from pathlib import Path, PurePosixPath
from zipfile import BadZipFile, ZipFile

import datasets
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock, tqdm

HASH_DIGITS = 16


class MissingDataError(FileNotFoundError):
    """A data set, or a part of it, is not there; the message says what to get and where to put it."""


class SourceFiles:
    """Files of one data set.

    Args:
        location: a local folder, or the id of a data set on the Hub.
        remedy: what a user does to get the data; it ends every message about missing files.
        revision: of a Hub repository: branch, tag or commit; resolved to a commit at once.
        media: a local folder in which images and videos are looked for first, where they do not lie in `location`.

    Raises: [`MissingDataError`] if there is no such folder or repository, or it is gated.
    """

    def __init__(
        self,
        location: str | os.PathLike,
        remedy: str,
        revision: str | None = None,
        media: str | os.PathLike | None = None,
    ):
        self.location, self.remedy = str(location), remedy
        self.media_folder = None if media is None else Path(media)
        if media is not None and not os.path.isdir(media):
            raise MissingDataError(f"media={str(media)!r} is no folder here. {remedy}")
        self.folder = Path(location) if os.path.isdir(location) else None
        self._read: set[str] = set()
        self._archives: list[str] = []  # to be unpacked when a file is looked for that is nowhere else
        self._unpacked: dict[str, Path] = {}
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
        self.commit = info.sha
        self._names = dict.fromkeys(sorted(one.rfilename for one in info.siblings))  # asked once or more a row

    @property
    def revision(self) -> str:
        """The commit on the Hub; for a local folder `sha256:...` of the annotation files that were read so far."""
        if self.folder is None:
            return self.commit
        digest = hashlib.sha256()
        for name in sorted(self._read):
            with (self.folder / name).open("rb") as file:  # may be gigabytes
                digest.update(name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
        return f"sha256:{digest.hexdigest()[:HASH_DIGITS]}"

    @property
    def fingerprint(self) -> str:
        """Changes when any file does: the commit, or a hash of the names, sizes and times of the local files."""
        if self.folder is None and self.media_folder is None:
            return self.commit[:HASH_DIGITS]
        digest = hashlib.sha256()
        if self.folder is None:
            digest.update(self.commit.encode())
        for top in filter(None, (self.folder, self.media_folder)):
            digest.update(b"\0")
            for root, folders, files in os.walk(top, followlinks=True):
                folders.sort()
                for name in sorted(files):
                    path = os.path.join(root, name)
                    state = os.stat(path)
                    digest.update(f"{os.path.relpath(path, top)}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
        return digest.hexdigest()[:HASH_DIGITS]

    def names(self, pattern: str) -> list[str]:
        """Names of the files that match a glob pattern, sorted. `**/` stands for any folders, also for none; `*` does not
        match `/` in a local folder."""
        if self.folder is None:
            return [name for name in self._names if fnmatch(name, pattern) or fnmatch(name, pattern.replace("**/", ""))]
        found = glob(pattern, root_dir=self.folder, recursive=True)
        return sorted(Path(name).as_posix() for name in found if (self.folder / name).is_file())

    def has(self, name: str) -> bool:
        return name in self._names if self.folder is None else (self.folder / name).is_file()

    def annotations(self, *names: str) -> Path:
        """The first of these files that is there; it counts for `revision`. Raises `MissingDataError` if none is."""
        for name in names:
            path = self._find(name)
            if path is not None:
                self._read.add(name)
                return path
        raise MissingDataError(f"{self.location} has no {' or '.join(names)}. {self.remedy}")

    def media(self, *names: str) -> Path | None:
        """The first of these files that is there, or `None`. A Hub file is downloaded.

        A name that leads out of the data set's folder is none of its files: a row could otherwise have any file of this
        machine published with the data.
        """
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                continue
            if self.media_folder is not None and (self.media_folder / name).is_file():
                return self.media_folder / name
            path = self._find(name)
            if path is not None:
                return path
        return None

    def unpack(self, pattern: str, *folders: str) -> None:
        """Lets `annotations` and `media` find what is in the zip archives that match `pattern`.

        Archives of a Hub repository are extracted once, to the cache of `datasets`, when a file is asked for that lies
        nowhere else; their files are found by their name in the archive, with its uppermost folder or without. In a local
        folder they are to be unpacked already.
        Args:
            folders: names of which an unpacked local folder has at least one.
        Raises: [`MissingDataError`] if a local folder has such an archive but none of `folders`; later if an archive is
            damaged.
        """
        if self.folder is not None:
            archives = self.names(pattern)
            if archives and self.media_folder is None and not any((self.folder / name).is_dir() for name in folders):
                commands = "; ".join(f"unzip -n {shlex.quote(name)}" for name in archives)
                raise MissingDataError(
                    f"{self.location} has {', '.join(archives)}, but no folder {' or '.join(folders)}: unpack it there with "
                    f"`cd {shlex.quote(self.location)}; {commands}`."
                )
        else:
            self._archives += self.names(pattern)

    def _find(self, name: str) -> Path | None:
        if self.has(name):
            return self._path(name)
        while self._archives:
            folder = _extracted(self._path(self._archives[0]))
            for path in sorted(one for one in folder.rglob("*") if one.is_file()):
                inside = path.relative_to(folder).as_posix()
                self._unpacked[inside] = path
                if "/" in inside:
                    self._unpacked.setdefault(inside.partition("/")[2], path)
            self._archives.pop(0)
        return self._unpacked.get(name)

    def _path(self, name: str) -> Path:
        if self.folder is not None:
            return self.folder / name
        try:
            return Path(hf_hub_download(self.location, name, repo_type="dataset", revision=self.commit))
        except (EntryNotFoundError, GatedRepoError) as error:
            raise MissingDataError(
                f"{name} of {self.location} cannot be downloaded ({error}). {self.remedy}"
            ) from error


def _extracted(archive: Path) -> Path:
    """The folder in the cache with the content of a zip archive, extracted if it is not there yet.

    Every file and, at last, the folder get their names only when they are whole; what an interrupted run has extracted is
    kept. Raises: [`MissingDataError`] for a damaged archive, `ValueError` for one whose files would lie outside the folder.
    """
    # In the Hub's cache the resolved path is named by the content, so that a new commit does not extract it again.
    key = hashlib.sha256(str(archive.resolve()).encode()).hexdigest()[:HASH_DIGITS]
    folder = Path(datasets.config.EXTRACTED_DATASETS_PATH) / f"{archive.stem}-{key}"
    partial = folder.with_name(f"{folder.name}.partial")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f"{folder.name}.lock")):
        if folder.is_dir():
            return folder
        try:
            with ZipFile(archive) as opened:
                members = [member for member in opened.infolist() if not member.is_dir()]
                for member in members:
                    inside = PurePosixPath(member.filename)
                    if inside.is_absolute() or ".." in inside.parts or "\\" in member.filename:
                        raise ValueError(
                            f"{archive}: the file {member.filename!r} would lie outside the archive's folder."
                        )
                for member in tqdm(members, desc=f"Extracting {archive.name}", unit="file"):
                    path = partial / member.filename
                    if path.is_file() and path.stat().st_size == member.file_size:
                        continue
                    path.parent.mkdir(parents=True, exist_ok=True)
                    started = path.with_name(f".{path.name}.partial")
                    with opened.open(member) as source, started.open("wb") as copy:
                        shutil.copyfileobj(source, copy)
                    os.replace(started, path)
        except (BadZipFile, EOFError, zlib.error) as error:
            raise MissingDataError(
                f"{archive} is damaged ({error}): delete {archive.resolve()} and start again, which downloads it anew."
            ) from error
        partial.mkdir(exist_ok=True)  # an archive without files
        os.replace(partial, folder)
    return folder
