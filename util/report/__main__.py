"""One page about a run: curves, validation loss, images, evaluations, configuration, environment.

python -m util.report OUTPUT_DIR

OUTPUT_DIR is what a training, an evaluation or a reconstruction has written, or a folder of them.
The page is one file that loads nothing from elsewhere. What the folder lacks is left out.
"""

from functools import partial
from pathlib import Path

from util import dist
from util.args import Parser
from util.errors import as_user_error
from util.files import atomic_write
from util.report.load import load


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="of a run, or of several")
    add = parser.add_argument_group("page").add_argument
    add("--output", metavar="FILE", help="to write; default: OUTPUT_DIR/report.html")
    add("--title", help="of the page; default: the folder's name")
    return parser


def main() -> None:
    args = make_parser().parse()
    from util.report.page import render  # after --help: these import matplotlib and jinja2
    from util.report.sections import sections

    root = Path(args.output_dir)
    page = render(args.title or root.resolve().name, sections(load(root)))
    write(Path(args.output or root / "report.html"), page)


def write(output: Path, page: str) -> None:
    """Raises UserError where the file cannot be written."""
    with as_user_error(f"--output {output}", (OSError,)):
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as file:
            file.write(page.encode())
    print(f"{output}: {len(page) // 1024} KiB, one file, open it in a browser")


cli = partial(dist.run, main)

if __name__ == "__main__":
    cli()
