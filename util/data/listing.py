"""Which images there are: root/CLASS/IMAGE, classes and files in the order of their names as text.

Hidden entries and what file managers leave behind are no data; a file is listed once however many
links lead to it; what else is passed over is said in notes.
"""

import os
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from util import dist
from util.data.images import FORMATS, open_image, to_rgb
from util.errors import UserError, as_user_error
from util.files import listed, shown

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff")
EXTENSIONS += (".webp", ".gif") + ((".jp2", ".j2k") if "JPEG2000" in FORMATS else ())
EXTENSIONS += (".avif",) if "AVIF" in FORMATS else ()
# Other images, which are counted. Texts beside images are no loss.
UNREAD = {".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".tga", ".exr", ".dng"}
# Besides all that begins with a dot, as .ipynb_checkpoints and AppleDouble's ._0.png do.
LEFT_BEHIND = {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}
SPLITS = {"train", "training", "val", "valid", "validation", "test"}
ONE_CLASS = "all"  # the class folder of images without classes, which may hold folders of them
DARK_SAMPLE = 8  # files whose brightest pixel is looked up


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
    root, where = Path(data_path) / split, f"{flag} {data_path}"
    if not Path(data_path).is_dir():
        raise UserError(f"{where} is not a folder; name the one that holds CLASS/IMAGE in {split}/")
    walk = _Walk(extensions)
    with as_user_error(where, (OSError,)):
        if not root.is_dir():
            remedy = _other_root(Path(data_path), split, flag)
            raise UserError(f"{where} has no folder {split!r}; {remedy}")
        classes = walk.classes(root)
        loose = sum(entry.name.lower().endswith(extensions) for entry in visible(root))
    _check_level(root, classes, split, flag)
    remedy = f"put images in {root}/CLASS/ or remove folders without any{walk.unread_kinds()}"
    if not classes:
        raise UserError(f"{where} ({remedy}): {root} has no class folder, but {loose} images")
    if empty := [name for name, files in classes.items() if not files]:
        raise UserError(f"{where} ({remedy}): no images in {listed(empty)}")
    samples = [(path, k) for k, files in enumerate(classes.values()) for path in files]
    notes = [f"{loose} images in {root} itself are of no class and left out"] if loose else []
    walk.print_notes(where, notes + _dark_notes([path for path, _ in samples]))
    return ImageList(root, list(classes), samples)


def list_files(folder: str | Path, flag: str) -> list[str]:
    """All images in a folder and the folders in it, sorted. Raises UserError if there are none."""
    where, walk = f"{flag} {folder}", _Walk(EXTENSIONS)
    if not Path(folder).is_dir():
        raise UserError(f"{where}: no such folder")
    with as_user_error(where, (OSError,)):
        files = sorted(walk.files(str(Path(folder))))
    if not files:
        raise UserError(f"{where}: no images in it{walk.unread_kinds()}")
    walk.print_notes(where, _dark_notes(files))
    return files


def visible(folder: str | Path) -> list[os.DirEntry]:
    """The entries of a folder that can be data, by name."""
    with os.scandir(folder) as entries:
        kept = [e for e in entries if not e.name.startswith(".") and e.name not in LEFT_BEHIND]
    return sorted(kept, key=lambda entry: entry.name)


class _Walk:
    """Lists files with some extensions and remembers what it passes over."""

    def __init__(self, extensions: tuple[str, ...]):
        self.extensions = extensions
        self.again: list[str] = []  # names that lead to what is listed under another one
        self.unread: Counter[str] = Counter()  # images of other kinds, by extension

    def classes(self, root: Path) -> dict[str, list[str]]:
        names = [entry.name for entry in visible(root) if os.path.isdir(entry.path)]
        files = {name: self.files(os.path.join(root, name), root) for name in names}
        return {name: own for name, own in files.items() if own is not None}

    def files(self, folder: str, root: Path | None = None) -> list[str] | None:
        """Sorted by folder and name, each once; None of a link to the root or to what it is in."""
        above = set(map(str, Path(os.path.realpath(folder)).parents))
        if root is not None:  # which is not above a class folder that is a link
            above |= set(map(str, Path(os.path.realpath(root), "x").parents))
        found, entered, waiting = [], set(above), [folder]
        while waiting:
            parent = waiting.pop()
            real = os.path.realpath(parent)
            if real in entered:
                self.again.append(parent)
                continue
            entered.add(real)
            for entry in visible(parent):
                is_link, own = entry.is_symlink(), os.path.join(real, entry.name)
                own = os.path.realpath(own) if is_link else own
                if is_link and os.path.islink(own):  # to itself
                    self.again.append(entry.path)
                elif os.path.isdir(own) if is_link else entry.is_dir():
                    # links last, so that a folder goes by its own name
                    waiting.insert(0 if is_link else len(waiting), entry.path)
                elif entry.name.lower().endswith(self.extensions):
                    found.append((parent, entry.name, entry.path, own))
                elif (kind := os.path.splitext(entry.name)[1].lower()) in UNREAD:
                    self.unread[kind] += 1
        files: dict[str, str] = {}  # by where they are in truth
        for _, _, path, own in sorted(found):
            if files.setdefault(own, path) is not path:
                self.again.append(path)
        return list(files.values()) if entered != above else None

    def unread_kinds(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.unread.items()))
        return f" ({kinds} are not read: convert them, as to .png)" if kinds else ""

    def print_notes(self, where: str, others: list[str]) -> None:
        names = ", ".join(map(shown, sorted(self.again)[:5]))
        said = f"{len(self.again)} links lead to what is listed already, which counts once: {names}"
        notes = [said] if self.again else []
        notes += [f"some images are left out{self.unread_kinds()}"] if self.unread else []
        for note in notes + others:
            dist.print_main(f"warning: {where}: {note}")


def _other_root(folder: Path, split: str, flag: str) -> str:
    """What helps where a folder has no split: the folder that has one, if it is near."""
    parent = Path(os.path.normpath(folder / os.pardir))
    near = [parent] if folder.resolve().name in {*SPLITS, split} else []
    for place in (*near, *(folder / entry.name for entry in visible(folder))):
        if (place / split).is_dir():
            return f"name the folder that has it: {flag} {place}"
    return f"put its class folders into {folder / split}/"


def _check_level(root: Path, classes: dict[str, list[str]], split: str, flag: str) -> None:
    """Raise UserError if what seems to be a class is a folder of classes.

    This is sure only of a single class, and of classes that are called as splits.
    """
    folders = {name: {*map(os.path.dirname, files)} for name, files in classes.items() if files}
    if not folders or any(os.path.join(root, name) in own for name, own in folders.items()):
        return
    name = ([name for name in folders if name in SPLITS] or list(folders))[-1]
    inside = sorted(folders[name])
    inner = Path(os.path.commonpath(inside) if len(inside) > 1 else os.path.dirname(inside[0]))
    alone = len(folders) == 1 and name != ONE_CLASS and len(inside) > 1 and str(inner) not in inside
    if not alone and not SPLITS.issuperset(folders):
        return
    misnamed = split and inner.name != split
    place = inner.parent if split else inner
    remedy = f"move what is in it to {root}" if misnamed else f"name {flag} {place}"
    names = listed([os.path.basename(path) for path in inside])
    raise UserError(
        f"{flag}: the class folders ({names}) are not in {root} but in {inner}; {remedy}, or, if "
        f"all is one class, call its folder {ONE_CLASS}"
    )


def print_class_notes(classes: list[str]) -> None:
    """What may surprise in the names of classes, whose order decides the labels."""

    def by_number(name: str) -> list[str | int]:  # text, number, text, ...
        return [int(p) if k % 2 else p for k, p in enumerate(re.split(r"([0-9]+)", name))]

    pairs = enumerate(zip(classes, sorted(classes, key=by_number), strict=True))
    if (k := next((k for k, (own, other) in pairs if own != other), None)) is not None:
        names = ", ".join(map(shown, classes[max(0, k - 2) : k + 2]))
        dist.print_main(
            f"note: classes are in the order of their names as text: {names}, ...; the label of "
            f"{shown(classes[k])} is {k}"
        )
    spelled = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if spelled[name.casefold()] > 1]:
        dist.print_main(f"warning: classes differ only in upper and lower case: {listed(alike)}")


def _dark_notes(files: list[str]) -> list[str]:
    """That images of 16 bits seem to hold 12 bits or fewer, which come out nearly black."""
    brightest, chosen = [], files[:: max(1, len(files) // DARK_SAMPLE)][:DARK_SAMPLE]
    for path in (path for path in chosen if path.lower().endswith((".png", ".tif", ".tiff"))):
        # A damaged file is named when it is read for the work.
        with suppress(UserError), as_user_error(path, (Exception,)), open_image(path) as image:
            if ";16" in str(image.tile[:1]):  # Pillow's name of how the pixels are stored
                brightest.append(np.asarray(to_rgb(image)).max())
    said = (
        f"the {len(brightest)} images of 16 bits looked at have no value above 4095 of 65535, as "
        "if they held 12 bits, and come out nearly black; multiply their values by 16"
    )
    return [said] if brightest and max(brightest) <= 16 else []
