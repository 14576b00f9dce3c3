"""Which images there are: root/CLASS/IMAGE, classes and files in the order of their names as text.

Hidden entries and what file managers leave behind are no data; links are followed.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from util import dist
from util.data.images import FORMATS
from util.errors import UserError, as_user_error

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff")
EXTENSIONS += (".webp", ".gif") + ((".jp2", ".j2k") if "JPEG2000" in FORMATS else ())
EXTENSIONS += (".avif",) if "AVIF" in FORMATS else ()
# Other images, which are counted. Texts beside images are no loss.
UNREAD = {".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".tga", ".exr", ".dng"}
# Besides all that begins with a dot, as .ipynb_checkpoints and AppleDouble's ._0.png do.
LEFT_BEHIND = {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}
ONE_CLASS = "all"  # the class folder of images without classes, which may hold folders of them


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
    if not root.is_dir():
        folder = f"with {split}/CLASS/" if split else "with CLASS/"
        raise UserError(f"{where}: there is no folder {root}; name the folder {folder} in it")
    with as_user_error(where, (OSError,)):
        classes = [name for name in sorted(os.listdir(root)) if is_data(name)]
        classes = [name for name in classes if (root / name).is_dir()]
    samples = []
    for label, name in enumerate(classes):
        files = _files(root / name, where, extensions)
        samples += [(path, label) for path in files]
        if not files:
            remedy = f"put images into {root}/CLASS/, and remove folders without any"
            raise UserError(f"{where}: no images in {root / name}; {remedy}")
        inner = sorted(set(map(os.path.dirname, files)))
        if len(classes) == 1 < len(inner) and name != ONE_CLASS and str(root / name) not in inner:
            raise UserError(
                f"{where}: the class folders are not in {root} but deeper, as {inner[0]}; move "
                f"them there, or, if all is one class, call its folder {ONE_CLASS}"
            )
    if not classes:
        raise UserError(f"{where}: no class folder in {root}; put images into {root}/CLASS/")
    return ImageList(root, classes, samples)


def list_files(folder: str | Path, flag: str) -> list[str]:
    """All images in a folder and the folders in it, sorted. Raises UserError if there are none."""
    if not (files := _files(folder, f"{flag} {folder}", EXTENSIONS)):
        raise UserError(f"{flag} {folder}: no images in it")
    return files


def is_data(name: str) -> bool:
    """Whether an entry of that name can be data."""
    return not name.startswith(".") and name not in LEFT_BEHIND


def _files(folder: str | Path, where: str, extensions: tuple[str, ...]) -> list[str]:
    """Sorted by folder and name, as torchvision's ImageFolder does."""
    found, unread = [], Counter()

    def refuse(error: OSError) -> None:
        raise UserError(f"{where}: {error}")

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = filter(is_data, folders)
        for name in filter(is_data, names):
            if name.lower().endswith(extensions):
                found.append((place, name))
            elif (kind := os.path.splitext(name)[1].lower()) in UNREAD:
                unread[kind] += 1
    for kind, count in unread.items():
        said = f"{count} {kind} files in {folder} are not read; convert them"
        dist.print_main(f"warning: {where}: {said}")
    return [os.path.join(*file) for file in sorted(found)]
