"""Images as the models see them: which files there are, how one is read, in which order they come.

    list_images -> read_image -> center_crop -> ImageDataset[(index, flip)] -> uint8 [3, S, S]

All listing of images and published caches is here. Hidden entries and what file managers leave
behind are no data; a file is listed once however many links lead to it; what else is passed over is
told.

Datasets are pure functions of the key (index, flip); `util.data.batches` alone decides the keys.
Pixels stay bytes until they are on the device: a quarter of the memory between processes;
`models.tokenizers.tokenizer.from_uint8` makes numbers of them.
"""

import argparse
import errno
import io
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import dist, stop
from util.errors import UserError, as_user_error
from util.files import atomic_write, shown

Key = tuple[int, bool]  # (index of the sample, whether it is flipped left to right)

# What the extensions stand for, and what such files are in truth now and then. Pillow tries no
# other format: some of them start programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif")
if features.check("jpg_2000"):
    FORMATS, EXTENSIONS = (*FORMATS, "JPEG2000"), (*EXTENSIONS, ".jp2", ".j2k")
if "avif" in features.modules and features.check("avif"):
    FORMATS, EXTENSIONS = (*FORMATS, "AVIF"), (*EXTENSIONS, ".avif")
# Kinds of images that are counted where they are passed over. Texts beside images are no loss.
IMAGE_KINDS = {".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".eps", ".psd", ".tga"}
IMAGE_KINDS |= {".exr", ".hdr", ".ico", ".pcx", ".dcm", ".dng", ".cr2", ".cr3", ".nef", ".arw"}
# Besides all that begins with a dot, as .ipynb_checkpoints and AppleDouble's ._0.png do.
LEFT_BEHIND = {"__MACOSX", "__pycache__", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found"}
SPLITS = {"train", "training", "val", "valid", "validation", "test"}
ONE_CLASS = "all"  # the class folder of images without classes, which may hold folders of them
LOOKED_AT = 8  # files of 16 bits, of which the brightest pixel is looked at
MAX_PIXELS = 250_000_000  # of one image: 0.75 GB as RGB; cameras have up to 200 million
PILLOW_LIMIT = Image.MAX_IMAGE_PIXELS
# A progressive JPEG may come in any number of scans of a few bytes, each a pass over the whole
# image. Encoders make some ten; 100 is libtiff's limit, too.
MAX_SCANS = 100
JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # not a byte or restart of a scan
JPEG_START, JPEG_END, JPEG_SCAN = 0xD8, 0xD9, 0xDA
JPEG_SEQUENTIAL = (0xC0, 0xC1, 0xC9)  # of which every scan names every block


@dataclass(frozen=True)
class ImageList:
    """The images of one folder in the form root/CLASS/IMAGE, classes and files in sorted order."""

    root: Path
    classes: list[str]
    samples: list[tuple[str, int]]  # (path, label)


Tell = Callable[[str], None]  # what to do with a note for the user


def list_images(
    data_path: str | Path,
    split: str = "train",
    flag: str = "--data_path",
    extensions: tuple[str, ...] = EXTENSIONS,
    tell: Tell = dist.print_main,
) -> ImageList:
    """The images under data_path/split/CLASS/, or other files with those extensions.

    Raises UserError, naming the flag, if a folder is missing, holds no class, a class is empty, or
    the classes are a level deeper.
    """
    root, where = Path(data_path) / split, f"{flag} {data_path}"
    if not Path(data_path).is_dir():
        holds = os.path.join(split, "CLASS", "")
        raise UserError(f"{where} is not a folder; name the one that holds {holds}")
    walk = Walk(extensions)
    with as_user_error(where, (OSError,)):
        if not root.is_dir():
            remedy = _other_root(Path(data_path), split, flag)
            raise UserError(f"{where} has no folder {split!r}; {remedy}")
        by_class = walk.classes(root)
        loose = [entry for entry in visible(root) if walk.wants(entry.name)]
    check_level(root, by_class, split, flag, tell)
    what = "images" if extensions is EXTENSIONS else f"{extensions[0]} files"
    remedy = f"put {what} in {root}/CLASS/ or remove folders without any{walk.unread_kinds()}"
    if not by_class:
        flat = f"; its {len(loose)} {what} may go into {root / ONE_CLASS}/" if loose else ""
        raise UserError(f"{where} ({remedy}): {root} has no class folder{flat}")
    if empty := [name for name, files in by_class.items() if not files]:
        raise UserError(f"{where} ({remedy}): no {what} in {in_short(empty)}")
    if loose:
        tell(f"warning: {where}: {len(loose)} {what} in {root} itself are of no class and left out")
    samples = [(path, k) for k, files in enumerate(by_class.values()) for path in files]
    walk.tell_passed_over(where, tell)
    tell_if_dark(where, [path for path, _ in samples], tell)
    return ImageList(root, list(by_class), samples)


def list_files(folder: str | Path, flag: str, tell: Tell = dist.print_main) -> list[str]:
    """All images in a folder and the folders in it, sorted by their whole paths.

    Raises UserError, naming the flag, if there are none.
    """
    where, walk = f"{flag} {folder}", Walk(EXTENSIONS)
    if not Path(folder).is_dir():
        raise UserError(f"{where}: no such folder")
    with as_user_error(where, (OSError,)):
        files = sorted(walk.files(str(Path(folder))))
    if not files:
        raise UserError(f"{where}: no images in it{walk.unread_kinds()}")
    walk.tell_passed_over(where, tell)
    tell_if_dark(where, files, tell)
    return files


def visible(folder: str | Path) -> list[os.DirEntry]:
    """The entries of a folder that can be data, by name."""
    with os.scandir(folder) as entries:
        kept = [e for e in entries if not e.name.startswith(".") and e.name not in LEFT_BEHIND]
    return sorted(kept, key=lambda entry: entry.name)


class Walk:
    """Lists files with some extensions and remembers what was passed over."""

    def __init__(self, extensions: tuple[str, ...]):
        self.extensions = extensions
        self.again: list[str] = []  # names that lead to what is listed under another one
        self.unread: Counter[str] = Counter()  # other files, by extension

    def wants(self, name: str) -> bool:
        return name.lower().endswith(self.extensions)

    def classes(self, root: Path) -> dict[str, list[str]]:
        """The files of each class folder, by its name, in the order of names."""
        real = os.path.realpath(root)
        folders = [e for e in visible(root) if not self._leads_nowhere(e) and e.is_dir()]
        kept = [entry for entry in folders if not self._leads_back(entry, real)]
        return {entry.name: self.files(os.path.join(root, entry.name)) for entry in kept}

    def files(self, folder: str) -> list[str]:
        """In a folder and the folders in it, sorted by folder and name, each file once."""
        found, entered, waiting = [], set(), [folder]
        while waiting:
            place = waiting.pop()
            real = os.path.realpath(place)
            if real in entered:
                self.again.append(place)
                continue
            entered.add(real)
            for entry in visible(place):
                if self._leads_nowhere(entry):
                    continue
                if entry.is_dir():
                    if not self._leads_back(entry, real):
                        # links last, so that a folder goes by its own name
                        waiting.insert(0 if entry.is_symlink() else len(waiting), entry.path)
                elif self.wants(entry.name):
                    own = f"{real}{os.sep}{entry.name}"
                    own = os.path.realpath(own) if entry.is_symlink() else own
                    found.append((place, entry.name, entry.path, own))
                elif self.extensions is EXTENSIONS:
                    self.unread[os.path.splitext(entry.name)[1].lower()] += 1
        files: dict[str, str] = {}
        for _, _, path, own in sorted(found):
            if files.setdefault(own, path) is not path:
                self.again.append(path)
        return list(files.values())

    def _leads_nowhere(self, entry: os.DirEntry) -> bool:
        """Whether a link leads to itself, in the end; it is remembered."""
        try:
            entry.is_dir()
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            self.again.append(entry.path)
            return True
        return False

    def _leads_back(self, entry: os.DirEntry, folder: str) -> bool:
        """Whether a link leads to the folder it is in or to one above it; it is remembered."""
        target = os.path.join(os.path.realpath(entry.path), "") if entry.is_symlink() else None
        back = target is not None and os.path.join(folder, "").startswith(target)
        self.again += [entry.path] if back else []
        return back

    def unread_kinds(self) -> str:
        images = sorted((kind, n) for kind, n in self.unread.items() if kind in IMAGE_KINDS)
        kinds = ", ".join(f"{n} {kind}" for kind, n in images)
        return f" ({kinds} are not read: convert them, as to .png)" if kinds else ""

    def tell_passed_over(self, where: str, tell: Tell) -> None:
        if self.again:
            tell(
                f"warning: {where}: links lead to what is listed already, which counts once: "
                f"{in_short(sorted(self.again))}"
            )
        if kinds := self.unread_kinds():
            tell(f"warning: {where}: some images are left out{kinds}")


def in_short(names: list[str], most: int = 5) -> str:
    """The first of some names, each in one line, and how many there are."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def _other_root(own: Path, split: str, flag: str) -> str:
    """What helps where a folder has no split: the folder that has one, if it is near."""
    parent = Path(os.path.normpath(own / os.pardir))
    folders = [own / entry.name for entry in visible(own) if entry.is_dir()]
    if own.resolve().name in {*SPLITS, split} and (parent / split).is_dir():
        return f"name the folder above it: {flag} {parent}"
    for folder in folders:
        if (folder / split).is_dir():
            return f"name the folder in it: {flag} {folder}"
    if folders:
        return f"put its class folders into {own / split}/"
    return f"put images in {split}/CLASS/"


def check_level(
    root: Path, by_class: dict[str, list[str]], split: str, flag: str, tell: Tell
) -> None:
    """Raise UserError if what seems to be a class is a folder of classes.

    A class may hold its images in several folders, so this is sure only of a single class, and of
    classes that are called as the splits of a data set.
    """
    folders = {name: {*map(os.path.dirname, files)} for name, files in by_class.items() if files}
    if not folders or any(os.path.join(root, name) in found for name, found in folders.items()):
        return
    splits = [name for name in folders if name in SPLITS]
    name = splits[-1] if splits else next(iter(folders))
    inside = sorted(folders[name])
    inner = Path(os.path.commonpath(inside) if len(inside) > 1 else os.path.dirname(inside[0]))
    alone = len(folders) == 1 and name != ONE_CLASS and len(inside) > 1 and str(inner) not in inside
    if not alone and len(splits) < len(folders):
        if len(inside) > 1 and len(folders) > 1:
            tell(f"note: all folders in {root / name} are of one class, {name}")
        return
    if not split:
        remedy = f"name {flag} {inner}"
    elif inner.name == split:
        remedy = f"name {flag} {inner.parent}"
    else:
        remedy = f"move what is in it to {root}"
    names = in_short([os.path.basename(path) for path in inside], 3)
    raise UserError(
        f"{flag}: the class folders ({names}) are not in {root} but in {inner}; {remedy}, or, if "
        f"all is one class, call its folder {ONE_CLASS}"
    )


def class_notes(classes: list[str]) -> list[str]:
    """What may surprise in the names of classes, whose order decides the labels."""
    notes = []
    parts = {name: re.split(r"([0-9]+)", name) for name in classes}  # text, number, text, ...
    by_number = sorted(
        classes, key=lambda name: [int(p) if k % 2 else p for k, p in enumerate(parts[name])]
    )
    if by_number != classes:
        k = next(k for k in range(len(classes)) if classes[k] != by_number[k])
        some = classes[max(0, k - 2) : k + 2]
        names = ", ".join(map(shown, some)) + (", ..." if len(some) < len(classes) else "")
        notes.append(
            f"note: classes are in the order of their names as text: {names}; the label of "
            f"{shown(classes[k])} is {k}"
        )
    spelled = Counter(name.casefold() for name in classes)
    if alike := [name for name in classes if spelled[name.casefold()] > 1]:
        notes.append(f"warning: classes differ only in upper and lower case: {in_short(alike)}")
    return notes


def tell_names(classes: list[str]) -> None:
    """What may surprise in the names of classes, once, before they are trained on."""
    for note in class_notes(classes):
        dist.print_main(note)


def tell_if_dark(where: str, files: list[str], tell: Tell) -> None:
    """Say so if images of 16 bits seem to hold 12 bits or fewer, which come out nearly black."""
    chosen = files[:: max(1, len(files) // LOOKED_AT)][:LOOKED_AT]
    brightest = [value for path in chosen if (value := _brightest_of_16_bits(path)) is not None]
    if brightest and max(brightest) <= 16:
        tell(
            f"warning: {where}: the {len(brightest)} images of 16 bits looked at have no value "
            "above 4095 of 65535, as if they held 12 bits, and come out nearly black; multiply "
            "their values by 16"
        )


def _brightest_of_16_bits(path: str) -> int | None:
    """The largest value of an image as 8 bits; None of other images."""
    if not path.lower().endswith((".png", ".tif", ".tiff")):
        return None
    try:
        with open_image(path) as image:
            if ";16" not in str(image.tile[:1]):  # Pillow's name of how the pixels are stored
                return None
            return int(np.asarray(_to_rgb(image)).max())
    except stop.Stopped:
        raise
    except Exception:  # reading it for the work says what is wrong with it
        return None


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image in a file as 8-bit RGB, upright as its EXIF orientation says; the first of several.

    16-bit grey is scaled to 8 bits, transparent parts are laid on white, other modes are converted.
    Raises UserError, naming the file, if it is damaged, of more than max_pixels, of too many scans,
    no image, or holds numbers without a fixed range (32-bit pixels).
    """
    remedy = "mend or remove it, or pass --skip_bad_images"
    # Pillow's readers meet a damaged file with nearly any exception, so all of them count.
    told = as_user_error(f"cannot read image {shown(path)} ({remedy})", (Exception,))
    with told, open_image(path, max_pixels) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


@contextmanager
def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Iterator[Image.Image]:
    """An image of which no more than size and kind is read yet.

    Raises nearly any exception if the file is damaged, ValueError if it has more than max_pixels.
    """
    if not os.path.isfile(path):
        # Opening a pipe would wait for its other end.
        raise FileNotFoundError("there is no regular file of that name")
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at metadata that nobody needs
        with _no_limit_of_pillow(), Image.open(_checked(file), formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > max_pixels:
                raise ValueError(
                    f"{image.width} x {image.height} is {pixels} pixels, more than "
                    f"--max_image_pixels {max_pixels}; raise that if you trust the file"
                )
            yield image


@contextmanager
def _no_limit_of_pillow() -> Iterator[None]:
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = PILLOW_LIMIT


def _checked(file: BinaryIO) -> BinaryIO:
    """The file, from its start; of a JPEG its bytes, read once. Raises ValueError at MAX_SCANS."""
    is_jpeg = file.read(2) == bytes((0xFF, JPEG_START))
    file.seek(0)
    if not is_jpeg:
        return file
    content = file.read()
    _check_scans(content)
    return io.BytesIO(content)


def _check_scans(content: bytes) -> None:
    """Raise ValueError if a JPEG is of more scans than MAX_SCANS."""
    position, scans = 2, 0
    while found := JPEG_MARKER.search(content, position):
        marker, position = content[found.end() - 1], found.end()
        if marker == JPEG_END or marker in JPEG_SEQUENTIAL:
            return
        scans += marker == JPEG_SCAN
        if scans > MAX_SCANS:
            raise ValueError(f"a JPEG of more than {MAX_SCANS} scans would take minutes")
        if marker != JPEG_START:
            position += int.from_bytes(content[position : position + 2], "big")


def _to_rgb(image: Image.Image) -> Image.Image:
    # Pillow reads 16-bit PPM as 32-bit numbers, already scaled to 16 bits.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # Pillow's own conversion clips at 255 where it should divide by 257.
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of mode {image.mode} have no fixed range, save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square at size x size pixels.

    Halves with a box filter while the shorter side is at least twice the size, then bicubic.
    Raises ValueError if the image is so elongated that it would exceed MAX_PIXELS.
    Source: the centre crop of ADM (arXiv 2105.05233).
    """
    while min(image.size) >= 2 * size:
        image = _halve(image)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{image.width} x {image.height} is too elongated to be cropped to a square"
        )
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _halve(image: Image.Image) -> Image.Image:
    """resize() to half of both sides, rounded down, with a box filter, to the bit.

    It works on one axis after the other and rounds after each. Where a side is even, the mean of
    two neighbours is all there is to it, for which Pillow has a faster function.
    """
    width, height, box = image.width // 2, image.height // 2, Image.Resampling.BOX
    odd = image.width % 2
    image = image.resize((width, image.height), box) if odd else image.reduce((2, 1))
    return image.resize((width, height), box) if image.height % 2 else image.reduce((1, 2))


def parse_key(key: Key | int, length: int) -> Key:
    """(index, flip) of a dataset's key, where a plain index is not flipped.

    Raises IndexError if the index is outside a dataset of that length.
    """
    index, flip = key if isinstance(key, tuple) else (key, False)
    return range(length)[index], bool(flip)


@dataclass(frozen=True)
class Loading:
    """How the images of a folder are loaded, as the flags of `add_loader_flags` say."""

    num_workers: int = 0
    skip_bad: bool = False
    max_pixels: int = MAX_PIXELS

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Loading":
        return cls(args.num_workers, args.skip_bad_images, args.max_image_pixels)


LOADING = Loading()


class ImageDataset(Dataset):
    """dataset[(index, flip)] -> (image uint8 [3, S, S], label).

    A plain index is the key (index, False). on_bad says what an unreadable image does:
      "raise": a UserError naming the file.
      "next": the next readable image takes its place, its label with it, so that a micro-batch of
        training keeps its size whoever reads it.
      "drop": the item is None, which `collate_skipping` leaves out, so that nothing is cached or
        reconstructed twice.
    Each file passed over is named on stderr once and marked in `bad` [N], which all DataLoader
    workers share with the main process; `bad.sum()` counts them.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        size: int,
        on_bad: Literal["raise", "next", "drop"] = "raise",
        max_pixels: int = MAX_PIXELS,
    ):
        self.samples = samples
        self.size = size
        self.on_bad = on_bad
        self.max_pixels = max_pixels
        self.bad = torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: Key | int) -> tuple[Tensor, int] | None:
        index, flip = parse_key(key, len(self))
        if self.on_bad == "raise":
            return self._load(index, flip)
        item = self._try_load(index, flip)
        if item is not None or self.on_bad == "drop":
            return item
        for other in range(index + 1, index + len(self)):
            item = self._try_load(other % len(self), flip)
            if item is not None:
                return item
        raise UserError(f"none of the {len(self)} images can be read; see --data_path")

    def _load(self, index: int, flip: bool) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        image = read_image(path, self.max_pixels)
        with as_user_error(
            f"cannot use image {shown(path)} (remove it, or pass --skip_bad_images)"
        ):
            pixels = np.asarray(center_crop(image, self.size))  # [S, S, 3]
        own = np.array(pixels[:, ::-1] if flip else pixels)
        return torch.from_numpy(own).permute(2, 0, 1), label

    def _try_load(self, index: int, flip: bool) -> tuple[Tensor, int] | None:
        if self.bad[index]:
            return None
        try:
            return self._load(index, flip)
        except UserError as error:
            self.bad[index] = True
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            return None


def collate_skipping(items: list[tuple[Tensor, int] | None]) -> list[Tensor] | None:
    """[images uint8 [B, 3, S, S], labels] of the items that are not None; None if all are.

    In channels-last memory, as they were decoded: one plain copy, and what the VAE wants.
    """
    readable = [item for item in items if item is not None]
    if not readable:
        return None
    images, labels = zip(*readable, strict=True)
    stacked = torch.stack([image.permute(1, 2, 0) for image in images])
    return [stacked.permute(0, 3, 1, 2), torch.tensor(labels)]


def save_png(image: Tensor | np.ndarray, path: str | Path) -> None:
    """image: uint8 [3, H, W]. The file is whole or absent."""
    # Waiting for the disk 50,000 times would take longer than some of the images.
    with atomic_write(path, durable=False) as file:
        Image.fromarray(np.moveaxis(np.asarray(image), 0, -1)).save(file, format="PNG")


def grid(images: Tensor, columns: int) -> Tensor:
    """images: uint8 [N, 3, H, W] -> one uint8 [3, H', W'], row by row."""
    from torchvision.utils import make_grid  # slow to import

    return make_grid(images, nrow=columns, padding=2, pad_value=255)


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of uint8 images [N, 3, H, W] in dB: [N]; 100 where identical."""
    error = (images.double() - reference.double()).square().mean(dim=(1, 2, 3)) / 255**2
    return -10 * error.clamp_min(1e-10).log10()
