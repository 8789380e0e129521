"""Images in folders and zip archives.

torchvision's ImageFolder is the reference: whatever it reads is read here, through symbolic links
too. Hidden files and folders and the `__MACOSX` folders of macOS archives are skipped. A file that
looks like an image but cannot be read is an error, never left out silently.
"""

import io
import os
import shutil
import stat
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from PIL import Image

from ..utils.errors import HovitError, one_line
from ..utils.files import alone, digest, file_digest, remove_parts
from .decode import SUFFIXES, looks_like_image, open_image

MAX_BYTES = 64 * 2**20  # of one unpacked file, because a zip header can state any size
Load = Callable[[], Image.Image]


def list_images(path: Path) -> Iterator[tuple[str, Load]]:
    """Yield (member, load) for each image of a folder or zip, sorted; member uses `/`.

    Raises:
        HovitError: naming a file that looks like an image and is not read, a broken link, or a
            folder that cannot be read.
    """
    return _list_zip(path) if path.is_file() else _list_folder(path)


def printable(path: str) -> str:
    """A path for a message of one line: with escapes if it has unprintable characters."""
    return path if path.isprintable() else ascii(path)


def is_hidden(member: str) -> bool:
    """Whether a file belongs to the system rather than to the data set."""
    parts = PurePosixPath(member).parts
    return any(part.startswith(".") or part == "__MACOSX" for part in parts)


def _list_folder(root: Path) -> Iterator[tuple[str, Load]]:
    for member, path in sorted(_walk(root, "", frozenset())):
        if _is_image(printable(str(path)), member, lambda p=path: _start_of(p)):  # type: ignore[misc]
            yield member, lambda p=path: open_image(p)  # type: ignore[misc]


def _walk(folder: Path, prefix: str, ancestors: frozenset[tuple[int, int]]) -> Iterator[
    tuple[str, Path]
]:  # fmt: skip
    """Yield (member, path) of all files that are not hidden, following symbolic links."""
    try:
        status = folder.stat()
        names = os.listdir(folder)
    except OSError as error:
        where = printable(str(folder))
        raise HovitError(f"{where}: cannot be read: {error.strerror}") from None
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:  # a link to a folder above: nothing new is in it
        return
    for name in names:
        path = folder / name
        if is_hidden(name):
            continue
        if path.is_dir():
            yield from _walk(path, f"{prefix}{name}/", ancestors | {identity})
        elif path.is_file():
            yield f"{prefix}{name}", path
        elif path.is_symlink() or path.suffix.lower() in SUFFIXES:
            raise HovitError(f"{printable(str(path))}: not a file (a broken link?)")


def _start_of(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(16)
    except OSError:
        return b""


def _is_image(where: str, member: str, start: Callable[[], bytes]) -> bool:
    suffix = PurePosixPath(member).suffix.lower()
    if suffix in SUFFIXES:
        return True
    if looks_like_image(suffix, start()):
        raise HovitError(
            f"{where}: looks like an image, but its suffix is not supported "
            f"({' '.join(sorted(SUFFIXES))}); convert or rename it, or remove it"
        )
    return False


def _list_zip(path: Path) -> Iterator[tuple[str, Load]]:
    archive = open_zip(path)
    for member, info in sorted((member_name(info), info.filename) for info in archive.infolist()):
        if is_hidden(member) or member.endswith("/"):
            continue
        where = printable(f"{path}: {member}")
        if _is_image(where, member, lambda n=info: _start_of_member(archive, n)):  # type: ignore[misc]
            yield member, lambda n=info: open_image(io.BytesIO(archive.read(n)))  # type: ignore[misc]


def _start_of_member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        with archive.open(name) as file:
            return file.read(16)
    except Exception:  # damaged or encrypted; only images need to be readable
        return b""


def member_name(info: zipfile.ZipInfo) -> str:
    """Name of a zip member with `/`; some programs on Windows write backslashes."""
    return info.filename.replace("\\", "/")


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip whose members all lie inside its folder and are of a plausible size.

    Raises:
        HovitError: naming the archive and the member that is not.
    """
    try:
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises errors of many types on broken archives
        raise HovitError(
            f"{path}: not a readable zip ({one_line(error)}); fetch it again"
        ) from None
    for info in archive.infolist():
        member, where = PurePosixPath(member_name(info)), printable(f"{path}: {info.filename}")
        if member.is_absolute() or ".." in member.parts:
            raise HovitError(f"{where}: a member outside the archive's folder")
        if info.file_size > MAX_BYTES:
            raise HovitError(f"{where}: {info.file_size:,} bytes unpacked, too large")
        if stat.S_ISLNK(info.external_attr >> 16) and not is_hidden(str(member)):
            raise HovitError(f"{where}: a symbolic link; zip the files themselves")
    return archive


def extract(paths: Sequence[Path], folder: Path) -> Path:
    """Unpack zips next to `folder`, completely or not at all; once for the same archives.

    Returns:
        `folder` with a digest of the archives added to its name.

    Raises:
        HovitError: for a broken archive, or if the folder cannot be written.
    """
    folder = folder.with_name(f"{folder.name}-{digest([file_digest(p) for p in paths])[:12]}")
    if folder.is_dir():
        return folder
    with alone(folder, wait=True) as locked:
        if folder.is_dir():  # another process has unpacked it
            return folder
        if locked:
            remove_parts(folder)
        part = folder.with_name(f".{folder.name}.{uuid.uuid4().int}.part")
        try:
            for path in paths:
                _extract_all(path, part, folder)
            part.rename(folder)
        except OSError as error:
            if not folder.is_dir():  # without locks, another process can be faster
                reason = error.strerror or error
                raise HovitError(f"{folder}: cannot be written: {reason}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _extract_all(path: Path, part: Path, folder: Path) -> None:
    with open_zip(path) as archive:
        try:
            for info in archive.infolist():
                info.filename = member_name(info)
                if not is_hidden(info.filename):
                    archive.extract(info, part)
        except Exception as error:  # as in open_zip
            raise HovitError(
                f"{path}: cannot be unpacked into {folder} ({one_line(error)})"
            ) from None
