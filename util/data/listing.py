"""Which images there are: root/CLASS/IMAGE, classes and files in the order of their names as text.

Hidden entries and what file managers leave behind are no data, and a file is listed once however
many links in its class lead to it.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util import dist
from util.data.images import FORMATS, read_image
from util.errors import UserError, as_user_error
from util.files import listed, shown

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff")
EXTENSIONS += (".webp", ".gif") + ((".jp2", ".j2k") if "JPEG2000" in FORMATS else ())
EXTENSIONS += (".avif",) if "AVIF" in FORMATS else ()
# Other images, which are counted. Texts beside images are no loss.
UNREAD = {".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".tga", ".exr", ".dng"}
# Besides all that begins with a dot, as .ipynb_checkpoints and AppleDouble's ._0.png do.
LEFT_BEHIND = {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}
ONE_CLASS = "all"  # the class folder of images without classes, which may hold folders of them
DARK = 16  # of 255: the brightest that 12 bits in 16 can be


@dataclass(frozen=True)
class ImageList:
    root: Path
    classes: list[str]
    samples: list[tuple[str, int]]  # (path, label)


def list_images(
    data_path: str | Path,
    split: str = "train",
    flag: str = "--data_path",
    extensions: tuple[str, ...] = EXTENSIONS,
) -> ImageList:
    """The images under data_path/split/CLASS/, or other files with those extensions.

    Raises UserError, naming the flag, if a folder is missing, holds no class, a class is empty, or
    the classes are a level deeper.
    """
    root, where, walk = Path(data_path) / split, f"{flag} {data_path}", _Walk(extensions)
    with as_user_error(where, (OSError,)):
        if not root.is_dir():
            remedy = _other_root(Path(data_path), split, flag)
            raise UserError(f"{where}: there is no folder {root}; {remedy}")
        above = _with_parents(root)
        folders = [entry.path for entry in visible(root) if os.path.isdir(entry.path)]
        walk.again = [path for path in folders if os.path.realpath(path) in above]
        folders = [path for path in folders if path not in walk.again]
        classes = {os.path.basename(path): walk.files(path, above) for path in folders}
    _check_level(root, classes, split, flag)
    empty = [name for name, files in classes.items() if not files]
    if empty or not classes:
        lacking = f"no images in {listed(empty)}" if empty else f"no class folder in {root}"
        remedy = f"put images into {root}/CLASS/, and remove folders without any"
        raise UserError(f"{where}: {lacking}; {remedy}{walk.unread_kinds()}")
    samples = [(path, k) for k, files in enumerate(classes.values()) for path in files]
    walk.print_notes(where, samples[0][0])
    return ImageList(root, list(classes), samples)


def list_files(folder: str | Path, flag: str) -> list[str]:
    """All images in a folder and the folders in it, sorted. Raises UserError if there are none."""
    where, walk = f"{flag} {folder}", _Walk(EXTENSIONS)
    with as_user_error(where, (OSError,)):
        files = walk.files(str(folder), set())
    if not files:
        raise UserError(f"{where}: no images in it{walk.unread_kinds()}")
    walk.print_notes(where, files[0])
    return files


def visible(folder: str | Path) -> list[os.DirEntry]:
    """The entries of a folder that can be data, by name."""
    with os.scandir(folder) as entries:
        kept = [e for e in entries if not e.name.startswith(".") and e.name not in LEFT_BEHIND]
    return sorted(kept, key=lambda entry: entry.name)


def _with_parents(folder: str | Path) -> set[str]:
    """A folder and what it is in, without links."""
    return set(map(str, Path(os.path.realpath(folder), "in").parents))


class _Walk:
    """Lists files with some extensions and remembers what it passes over."""

    def __init__(self, extensions: tuple[str, ...]):
        self.extensions = extensions
        self.again: list[str] = []  # names that lead to what is listed under another one
        self.unread: Counter[str] = Counter()  # images of other kinds, by extension

    def files(self, folder: str, entered: set[str]) -> list[str]:
        """Sorted by folder and name. entered: where no link may lead."""
        files = sorted(self._walk(folder, entered | _with_parents(folder)))
        return [os.path.join(*file) for file in files]

    def _walk(self, folder: str, known: set[str]) -> Iterator[tuple[str, str]]:
        """(folder, name) of each file once. known: real paths of all that was met, extended."""
        real = os.path.realpath(folder)
        # Links last, so that a folder goes by its own name.
        for entry in sorted(visible(folder), key=os.DirEntry.is_symlink):
            own = os.path.join(real, entry.name)
            own = os.path.realpath(own) if entry.is_symlink() else own
            if own in known or (entry.is_symlink() and os.path.islink(own)):  # a link to itself
                self.again.append(entry.path)
                continue
            known.add(own)
            if entry.is_dir():
                yield from self._walk(entry.path, known)
            elif entry.name.lower().endswith(self.extensions):
                yield folder, entry.name
            elif (kind := os.path.splitext(entry.name)[1].lower()) in UNREAD:
                self.unread[kind] += 1

    def unread_kinds(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.unread.items()))
        return f" ({kinds} are not read: convert them, as to .png)" if kinds else ""

    def print_notes(self, where: str, first: str) -> None:
        """first: the path of an image, which stands for the others."""
        notes = []
        if self.again:
            names = ", ".join(map(shown, self.again[:5]))
            notes.append(
                f"{len(self.again)} links lead to what is listed, which counts once: {names}"
            )
        if self.unread:
            notes.append(f"some images are left out{self.unread_kinds()}")
        with suppress(UserError):  # a damaged file is named when it is read for the work
            if self.extensions is EXTENSIONS and np.asarray(read_image(first)).max() <= DARK:
                notes.append(f"{first} is nearly black; if it is of 12 bits in 16, multiply by 16")
        for note in notes:
            dist.print_main(f"warning: {where}: {note}")


def _other_root(folder: Path, split: str, flag: str) -> str:
    """What helps where a folder has no split: the folder that has one, if it is near."""
    near = [folder.absolute().parent / split] if folder.absolute().name == split else []
    found = [place for place in (*near, *sorted(folder.glob(f"*/{split}"))) if place.is_dir()]
    return f"name {flag} {found[0].parent}" if found else "put the class folders there"


def _check_level(root: Path, classes: dict[str, list[str]], split: str, flag: str) -> None:
    """Raise UserError if the only class holds no images but folders of them: those are classes."""
    (name, files), *others = classes.items() or [("", [])]
    folders = sorted(set(map(os.path.dirname, files)))
    inner = Path(os.path.commonpath(folders or [root]))
    if others or name == ONE_CLASS or len(folders) < 2 or str(inner) in folders:
        return
    named = f"name {flag} {inner.parent if split else inner}, or "
    raise UserError(
        f"{flag}: the class folders ({listed(map(os.path.basename, folders))}) are in {inner}, not "
        f"in {root}; {named if split in ('', inner.name) else ''}move them there, or, if all is "
        f"one class, call its folder {ONE_CLASS}"
    )


def print_class_notes(classes: list[str]) -> None:
    """That labels follow the order of names as text, where numbers are in another order."""
    numbers = [name for name in classes if name.isdecimal()]
    if numbers != sorted(numbers, key=int):
        order = "labels follow the order of class names as text, not as numbers"
        dist.print_main(f"note: {order}: {listed(numbers)}")
