"""Real images for the gallery: 1,443 emoji in two free sets each, PNG files in eleven classes.

    --noto FONT --twemoji FOLDER: make the committed sheet from Debian's fonts-noto-color-emoji and
                                  npm's emoji-datasource-twitter (demo/emoji.md has their licences)
    otherwise: cut it into OUTPUT/{train,val}/CLASS/CODEPOINTS-{noto,twemoji}.png

A tenth of the code points is held out, with all variants of a person and in both sets: a copy in
other colours would be no test. Emoji that differ in nothing but skin are left out.
"""

import hashlib
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from util import dist
from util.args import Parser, positive_int
from util.errors import UserError, as_user_error
from util.files import check_writable

SHEET = Path(__file__).with_name("emoji.webp")
NAMES = Path(__file__).with_name("emoji.json")  # {class: its tiles' names, in the sheet's order}
SIDE = 64  # pixels of a tile
COLUMNS = 56
STRIKE, CELL = 109, 136  # of Noto's bitmaps: points to ask for, pixels along the longer side
UNICODE = 15.0  # the newest emoji of both packages' versions
# The beginnings of emoji.json's "category/subcategory" that make a class.
CLASSES = {
    "animal": ("Animals & Nature/animal",),
    "clothing": ("Objects/clothing",),
    "face": ("Smileys & Emotion/face", "Smileys & Emotion/cat", "Smileys & Emotion/monkey"),
    "flag": ("Flags/",),
    "food": ("Food & Drink/",),
    "hand": ("People & Body/hand",),
    "person": ("People & Body/person",),
    "place": ("Travel & Places/place", "Travel & Places/hotel"),
    "sign": ("Symbols/",),
    "sky-and-clock": ("Travel & Places/sky", "Travel & Places/time"),
    "vehicle": ("Travel & Places/transport",),
}
SYMBOLS = "People & Body/person-symbol"  # silhouettes, signs rather than persons
# Joiners, presentation and gender; man, woman, boy, girl, child and adult count as one.
VARIANTS = {"200D", "FE0F", "2640", "2642", "27A1"}
PEOPLE = {"1F468", "1F469", "1F466", "1F467", "1F9D1", "1F9D2"}


def is_held_out(name: str) -> bool:
    """name: of a tile, as 1F3C3-200D-2642-FE0F-noto."""
    points = [point for point in name.split("-")[:-1] if point not in VARIANTS]
    group = "-".join("person" if point in PEOPLE else point for point in points)
    return hashlib.sha256(group.encode()).digest()[0] < 256 / 10


def tile(image: Image.Image) -> Image.Image:
    """RGBA of any size -> SIDE x SIDE, centred on a transparent square."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def make_sheet(noto: Path, twemoji: Path) -> None:
    """Raises UserError if a file of the packages is missing."""
    with as_user_error("--noto, --twemoji", (OSError, ValueError)):
        font = ImageFont.truetype(noto, STRIKE)
        emoji = json.loads((twemoji / "emoji.json").read_text())
        names, tiles = {label: [] for label in CLASSES}, []
        for label, beginnings in CLASSES.items():
            for one in sorted(emoji, key=lambda one: one["unified"]):
                kind = f"{one['category']}/{one['subcategory']}"
                newer = float(one["added_in"]) > UNICODE
                if newer or kind == SYMBOLS or not kind.startswith(beginnings):
                    continue
                drawn = Image.new("RGBA", (CELL, CELL), (255, 255, 255, 0))
                text = "".join(chr(int(point, 16)) for point in one["unified"].split("-"))
                ImageDraw.Draw(drawn).text((0, 0), text, font=font, embedded_color=True)
                file = twemoji / "img" / "twitter" / "64" / one["image"]
                with Image.open(file) as other:
                    tiles += [tile(drawn.crop(drawn.getbbox())), tile(other.convert("RGBA"))]
                names[label] += [f"{one['unified']}-noto", f"{one['unified']}-twemoji"]
    sheet = Image.new("RGBA", (COLUMNS * SIDE, -(-len(tiles) // COLUMNS) * SIDE))
    for index, image in enumerate(tiles):
        sheet.paste(image, corner(index))
    sheet.save(SHEET, quality=80, method=6)
    NAMES.write_text(json.dumps(names, indent=0) + "\n")


def corner(index: int) -> tuple[int, int]:
    """The upper left pixel of a tile of the sheet."""
    return index % COLUMNS * SIDE, index // COLUMNS * SIDE


def cut(output: Path, every: int = 1) -> dict[str, int]:
    """Write the sheet's tiles, each `every`-th; returns how many are in train/ and val/."""
    names = json.loads(NAMES.read_text())
    counts = {"train": 0, "val": 0}
    with Image.open(SHEET) as sheet:
        for index, (label, name) in enumerate((k, n) for k in names for n in names[k]):
            if index % every:
                continue
            x, y = corner(index)
            part = "val" if is_held_out(name) else "train"
            counts[part] += 1
            path = output / part / label / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            sheet.crop((x, y, x + SIDE, y + SIDE)).save(path)
    return counts


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--output", type=Path, default=Path("output/gallery/data"), help="folder")
    add("--every", type=positive_int, default=1, help="take each such picture, to try something")
    add("--noto", type=Path, help="NotoColorEmoji.ttf: make the sheet, with --twemoji")
    add("--twemoji", type=Path, help="the unpacked npm package")
    args = parser.parse()
    if bool(args.noto) != bool(args.twemoji):
        raise UserError("--noto and --twemoji go together")
    if args.noto:
        make_sheet(args.noto, args.twemoji)
    check_writable(args.output, "--output")
    counts = cut(args.output, args.every)
    print(f"{args.output}: {counts['train']} training and {counts['val']} held-out emoji")


if __name__ == "__main__":
    dist.run(main)
