"""Which images there are: root/CLASS/IMAGE, classes and files in the order of their names as text.

Hidden entries and what file managers leave behind are no data; links are followed. ImageNet is also
found as Kaggle's archive and the hub's parquet files have it, with the same classes and labels.
"""

import os
import re
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
KAGGLE = ("", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")  # where its archive has train/ and val/
# Which image of a flat val/ is of which class; beside it or above it.
LABELS = ("LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt")
SYNSET = r"n\d{8}"
ONE_CLASS = "all"  # the class folder of images without classes, which may hold folders of them


@dataclass(frozen=True)
class ImageList:
    root: Path
    classes: list[str]
    samples: list[tuple[str, int]]  # (path, label)

    @property
    def names(self) -> list[str]:
        """CLASS/IMAGE of each, in other layouts too."""
        names = []
        for path, label in self.samples:
            name, start = os.path.relpath(path, self.root), f"{self.classes[label]}/"
            names.append(name if name.startswith(start) else start + name.replace("/", "-"))
        return names


def find_split(data_path: str | Path, split: str) -> tuple[Path | None, list[Path]]:
    """The folder data_path/split or Kaggle's, if it is there; the hub's data/train-*.parquet."""
    folders = [Path(data_path) / place / split for place in KAGGLE]
    pattern = {"": "*", "val": "val*-*"}.get(split, f"{split}-*") + ".parquet"
    files = [file for place in ("", "data") for file in (Path(data_path) / place).glob(pattern)]
    return next(filter(Path.is_dir, folders), None), sorted(files)


def list_images(
    data_path: str | Path,
    split: str = "train",
    flag: str = "--data_path",
    extensions: tuple[str, ...] = EXTENSIONS,
) -> ImageList:
    """The images under data_path/split/CLASS/, or other files with those extensions; of images also
    a flat val/, beside or below one of `LABELS`, and parquet files.

    Raises UserError, naming the flag, if a folder is missing, holds no class, a class is empty, or
    the classes are a level deeper.
    """
    (found, tables), where = find_split(data_path, split), f"{flag} {data_path}"
    root = found or Path(data_path) / split
    if extensions == EXTENSIONS and not any(map(os.path.isdir, root.glob("[!.]*"))):
        above = [root, *root.absolute().parents[:4]] if found else []
        labels = [file for folder in above for name in LABELS if (file := folder / name).is_file()]
        if tables or labels:
            return _list_tables(tables, where) if tables else _list_flat(root, labels[0], where)
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


def _list_flat(root: Path, labels: Path, where: str) -> ImageList:
    """Images whose synsets a file says: a table by their names, or a list in their order."""
    files, text = _files(root, where, EXTENSIONS), labels.read_text()
    names = [Path(file).stem for file in files]
    synsets = dict(re.findall(rf"^([^,\n]+),({SYNSET})\b", text, flags=re.MULTILINE))
    with as_user_error(f"{where}: {labels} is not of the images in {root}", (KeyError, ValueError)):
        synsets = synsets or dict(zip(names, re.findall(SYNSET, text), strict=True))
        classes = sorted({synsets[name] for name in names})
    dist.print_main(f"{where}: the classes of {len(files)} images in {root} are from {labels}")
    samples = [(classes.index(synsets[n]), file) for n, file in zip(names, files, strict=True)]
    return ImageList(root, classes, [(file, label) for label, file in sorted(samples)])


def _list_tables(files: list[Path], where: str) -> ImageList:
    """Rows image {bytes, path}, label. A class is the synset in its images' paths, or the label."""
    with as_user_error(
        f"{where}: pip install -c requirements.lock -e '.[parquet]'", (ImportError,)
    ):
        from pyarrow.parquet import ParquetFile
    samples, names = [], {}
    with as_user_error(f"{where}: no columns image and label", (Exception,)):
        for file, opened in ((file, ParquetFile(file)) for file in files):
            for group in range(opened.num_row_groups):
                rows = opened.read_row_group(group, columns=["image.path", "label"]).to_pylist()
                for row, (image, label) in enumerate((r["image"], r["label"]) for r in rows):
                    name = os.path.basename(image["path"] or "")
                    names.setdefault(label, (re.findall(SYNSET, name) or [f"{label:04d}"])[0])
                    samples.append((f"{file}/{group}/{row}/{name}", label))
    classes = sorted(set(names.values()))
    labels = {label: classes.index(name) for label, name in names.items()}
    dist.print_main(f"{where}: {len(samples)} images in {len(files)} parquet files")
    return ImageList(files[0].parent, classes, [(path, labels[own]) for path, own in samples])


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
