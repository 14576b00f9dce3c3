"""Which images there are: root/CLASS/IMAGE, classes and files in the order of their names as text.

Hidden entries and what file managers leave behind are no data, and a file is listed once however
many links in its class lead to it.
"""

import os
from collections import defaultdict
from collections.abc import Set
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
LINKS = "links to what is listed, left out"
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
    root, where, passed = Path(data_path) / split, f"{flag} {data_path}", defaultdict(list)
    with as_user_error(where, (OSError,)):
        if not root.is_dir():
            remedy = _other_root(Path(data_path), split, flag)
            raise UserError(f"{where}: there is no folder {root}; {remedy}")
        above = _with_parents(root)
        folders = [entry.path for entry in visible(root) if os.path.isdir(entry.path)]
        passed[LINKS] = [path for path in folders if os.path.realpath(path) in above]
        folders = [path for path in folders if path not in passed[LINKS]]
        files = [_files(path, extensions, passed, above) for path in folders]
    classes = [os.path.basename(path) for path in folders]
    images = [path for own in files for path in own]
    _print_notes(where, passed, images if extensions is EXTENSIONS else [])
    if len(classes) == 1 and classes != [ONE_CLASS]:
        _check_level(root, images, split, flag)
    empty = [name for name, own in zip(classes, files, strict=True) if not own]
    if empty or not classes:
        lacking = f"no images in {listed(empty)}" if empty else f"no class folder in {root}"
        remedy = f"put images into {root}/CLASS/, and remove folders without any"
        raise UserError(f"{where}: {lacking}; {remedy}")
    labels = [label for label, own in enumerate(files) for _ in own]
    return ImageList(root, classes, list(zip(images, labels, strict=True)))


def list_files(folder: str | Path, flag: str) -> list[str]:
    """All images in a folder and the folders in it, sorted. Raises UserError if there are none."""
    where, passed = f"{flag} {folder}", defaultdict(list)
    with as_user_error(where, (OSError,)):
        files = _files(str(folder), EXTENSIONS, passed)
    _print_notes(where, passed, files)
    if not files:
        raise UserError(f"{where}: no images in it")
    return files


def visible(folder: str | Path) -> list[os.DirEntry]:
    """The entries of a folder that can be data, by name."""
    with os.scandir(folder) as entries:
        kept = [e for e in entries if not e.name.startswith(".") and e.name not in LEFT_BEHIND]
    return sorted(kept, key=lambda entry: entry.name)


def _with_parents(folder: str | Path) -> set[str]:
    """A folder and what it is in, without links."""
    return set(map(str, Path(os.path.realpath(folder), "in").parents))


def _files(
    folder: str, extensions: tuple[str, ...], passed: dict[str, list[str]], above: Set[str] = set()
) -> list[str]:
    """Sorted by folder and name, each once. above: where no link may lead.

    passed: to which what is left out is added, by its kind.
    """
    found, known = [], above | _with_parents(folder)  # real paths

    def walk(folder: str) -> None:
        real = os.path.realpath(folder)
        # Links last, so that a folder goes by its own name.
        for entry in sorted(visible(folder), key=os.DirEntry.is_symlink):
            own = os.path.join(real, entry.name)
            own = os.path.realpath(own) if entry.is_symlink() else own
            if own in known or (entry.is_symlink() and os.path.islink(own)):  # a link to itself
                passed[LINKS].append(entry.path)
                continue
            known.add(own)
            if entry.is_dir():
                walk(entry.path)
            elif entry.name.lower().endswith(extensions):
                found.append((folder, entry.name))
            elif (kind := os.path.splitext(entry.name)[1].lower()) in UNREAD:
                passed[f"{kind} files, which are not read: convert them"].append(entry.path)

    walk(folder)
    return [os.path.join(*file) for file in sorted(found)]


def _print_notes(where: str, passed: dict[str, list[str]], images: list[str]) -> None:
    """What was left out, and that the first of the images is nearly black."""
    with suppress(UserError):  # a damaged file is named when it is read for the work
        if images and np.asarray(read_image(images[0])).max() <= DARK:
            passed["nearly black; if it holds 12 bits in 16, multiply by 16"].append(images[0])
    for kind, paths in passed.items():
        if paths:
            names = ", ".join(map(shown, paths[:5]))
            dist.print_main(f"warning: {where}: {len(paths)} {kind}: {names}")


def _other_root(folder: Path, split: str, flag: str) -> str:
    """What helps where a folder has no split: the folder that has one, if it is near."""
    near = [folder.absolute().parent / split] if folder.absolute().name == split else []
    found = [place for place in (*near, *sorted(folder.glob(f"*/{split}"))) if place.is_dir()]
    return f"name {flag} {found[0].parent}" if found else "put the class folders there"


def _check_level(root: Path, images: list[str], split: str, flag: str) -> None:
    """Raise UserError if the only class has no images but folders of them: those are classes."""
    folders = sorted(set(map(os.path.dirname, images)))
    inner = Path(os.path.commonpath(folders or [root]))
    if len(folders) < 2 or str(inner) in folders:
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
