"""One page about a run: curves, held-out loss, images, evaluations, configuration, environment.

python -m util.report OUTPUT_DIR

OUTPUT_DIR is what a training, an evaluation or a reconstruction has written, or a folder of them.
The page is one file that loads nothing from elsewhere. What the folder lacks is left out.
"""

from functools import partial
from html import escape
from pathlib import Path

from util.dist import run
from util.errors import UserError, as_user_error
from util.files import atomic_write, check_writable
from util.parser import Parser
from util.provenance import git_revision
from util.report import results as report_results
from util.report import training as report_training
from util.report.html import Section, cards, note, page
from util.report.run import Found, find
from util.training_args import training_parser

CARDS = 6


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("output_dir", metavar="OUTPUT_DIR", help="of a run, or of several")
    add = parser.add_argument_group("page").add_argument
    add("--output", metavar="FILE", help="to write; default: OUTPUT_DIR/report.html")
    add("--title", default="", help="default: the folder's name")
    return parser


def main() -> None:
    args = make_parser().parse()
    root = Path(args.output_dir)
    output = Path(args.output) if args.output else root / "report.html"
    with as_user_error(f"--output {output}", (OSError,)):
        if output.is_dir():
            raise UserError(f"--output {output} is a folder; name a file")
    found = find(root)
    check_writable(output.parent, "--output")
    write(output, render(found, args.title or root.resolve().name))


def write(output: Path, text: str) -> None:
    with as_user_error(f"--output {output}: cannot write", (OSError,)):
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(output) as file:
            file.write(text.encode())
    print(f"{output}: {len(text) // 1024} KiB, one file, open it in a browser")


def render(found: Found, title: str) -> str:
    figures = report_results.headline(found)
    for training in found.trainings:
        figures += report_training.headline(training)
    return page(title, "", cards(figures[:CARDS]), sections(found), foot(found))


def sections(found: Found) -> list[Section]:
    """All that the folder holds, in the order in which one looks at it."""
    named = len(found.trainings) > 1
    made = []
    for training in found.trainings:
        made += report_training.sections(training, found.name(training.folder) if named else "")
    made += report_results.evaluations(found)
    made += report_results.reconstructions(found)
    made += _settings(found, named)
    if found.left_out:
        made.append(Section("Left out", "".join(map(note, found.left_out))))
    return made


def _settings(found: Found, named: bool) -> list[Section]:
    defaults = vars(training_parser("").parse([])) if found.trainings else {}
    made = []
    for training in found.trainings:
        after = f": {found.name(training.folder)}" if named else ""
        made.append(
            Section(f"Configuration{after}", report_training.configuration(training, defaults))
        )
        known = report_training.environment(training)
        if known:
            made.append(Section(f"Environment{after}", known))
    return made


def foot(found: Found) -> str:
    revision = git_revision()
    by = f", revision {escape(revision[:12])}" if revision else ""
    return f"Made of <code>{escape(str(found.root))}</code> by <code>util.report</code>{by}."


cli = partial(run, main)

if __name__ == "__main__":
    cli()
