"""A .nemo archive: a tar, compressed in old releases, of model_config.yaml, weights and tokenizer. Nothing in it is believed."""

from __future__ import annotations

import lzma
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from minitron_megatron.errors import ArchitectureError

SUFFIX = ".nemo"
LARGEST_READ = 1 << 28
"""Bytes of a file that is read into memory: a configuration, a tokenizer. A header of 512 bytes can promise any number."""


def is_nemo(path: str | Path) -> bool:
    """Whether a path names a .nemo archive, there or not."""
    return Path(path).suffix == SUFFIX and not Path(path).is_dir()


class NemoArchive:
    """The files of an archive by their names in it, `./` left out."""

    def __init__(self, path: str | Path) -> None:
        """Raises ArchitectureError for what is no whole tar, and for one with a member that is neither a file nor a folder inside it."""
        self.path = Path(path)
        with self._opened() as tar:
            members = {_inside(member, self.path): member for member in tar.getmembers()}
            _read_to_end(tar)
        self._members = {name: member for name, member in members.items() if member.isreg()}

    @property
    def names(self) -> list[str]:
        return sorted(self._members)

    def size(self, names: Iterable[str]) -> int:
        """Bytes of these files."""
        return sum(self._members[name].size for name in names)

    def below(self, *starts: str) -> list[str]:
        """The files of these names, and those in folders of these names."""
        return [name for name in self.names if name in starts or name.startswith(tuple(f"{start}/" for start in starts))]

    def read(self, name: str) -> bytes:
        """One file; raises ArchitectureError where it is not there, or larger than LARGEST_READ."""
        if name not in self._members:
            raise ArchitectureError(f"{self.path}: {name} is not in the archive; it holds {', '.join(self.names[:8])}")
        if self._members[name].size > LARGEST_READ:
            raise ArchitectureError(f"{self.path}: its {name} would have {self._members[name].size:,} bytes; do not use this file")
        with self._opened() as tar:
            file = tar.extractfile(self._members[name])
            return file.read() if file else b""

    def unpack(self, names: Iterable[str], folder: Path) -> None:
        """Writes these files below the folder, as plain files whatever the archive says of owners and rights."""
        with self._opened() as tar:
            # in the archive's order: a compressed one is read once, from its start to its end
            for name in sorted(names, key=lambda name: self._members[name].offset):
                target, content = folder / name, tar.extractfile(self._members[name])
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(content, file, 1 << 24)  # type: ignore[arg-type]  # a regular file has content

    @contextmanager
    def _opened(self) -> Iterator[tarfile.TarFile]:
        try:
            with tarfile.open(self.path) as tar:
                yield tar
        except FileNotFoundError:
            raise ArchitectureError(f"{self.path}: no such file; model.path must name a .nemo archive that is there") from None
        except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
            told = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
            raise ArchitectureError(f"{self.path}: not a whole .nemo archive ({told}); it may be truncated, copy it anew") from None


def pack(folder: Path, path: Path) -> None:
    """A folder into an archive as NeMo writes it: uncompressed, names below `./`; the owner's name and number stay here."""
    with tarfile.open(path, "w:") as tar:
        for file in [folder, *sorted(folder.rglob("*"))]:
            tar.add(file, arcname=f"./{file.relative_to(folder).as_posix()}" if file != folder else ".", recursive=False, filter=_of_nobody)


def _read_to_end(tar: tarfile.TarFile) -> None:
    """Behind the last member: a compressed archive's checksum stands there, and tarfile takes a damaged header for the end."""
    while tar.fileobj is not None and tar.fileobj.read(1 << 20):
        pass


def _of_nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _inside(member: tarfile.TarInfo, path: Path) -> str:
    """The member's name below the archive's root; raises ArchitectureError for one that leaves it or is no plain file or folder."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise ArchitectureError(f"{path}: its member {member.name!r} leaves the archive; do not use this file")
    if not (member.isreg() or member.isdir()):
        raise ArchitectureError(f"{path}: its member {member.name!r} is a link or a device, and NeMo writes none; do not use this file")
    return str(name)
