"""A command line that answers in one line, with a --help that fits 80 columns and a --config.

The groups of flags are in util/args.py and util/training_args.py.
"""

import argparse
import os
import re
import sys
import textwrap

from util import config_file
from util.errors import EXIT_USER_ERROR, did_you_mean

COMMANDS = ("python ", "torchrun ")  # how a paragraph of examples begins


class HelpFormatter(argparse.HelpFormatter):
    """Defaults where there are any, one placeholder a flag, and no wall of flags on top."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Paragraphs are filled anew; of a paragraph of commands, each stays one."""
        filled = []
        for paragraph in text.strip().split("\n\n"):
            commands = paragraph.startswith(COMMANDS)
            parts = paragraph.splitlines() if commands else [" ".join(paragraph.split())]
            for part in parts:
                if commands:
                    part = re.sub(r"(--\w+) (?!-)", "\\1\0", part)  # a flag stays with its value
                lines = textwrap.wrap(part, width - len(indent) - 6, break_long_words=False)
                filled.append((" \\\n    " if commands else "\n").join(lines).replace("\0", " "))
            filled.append("")
        return textwrap.indent("\n".join(filled).rstrip(), indent)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if action.nargs == 0 or action.default in (None, "", argparse.SUPPRESS):
            return text  # a switch is off, a flag without a value says so itself
        default = action.default if isinstance(action.default, list) else [action.default]
        shown = " ".join(map(str, default)).replace("%", "%%")
        return f"{text} [{shown}]".strip()

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        kind = getattr(action.type, "__name__", "")
        if "int" in kind or isinstance(action.default, int):
            return "N"
        if "float" in kind or isinstance(action.default, float):
            return "X"
        return action.dest.upper()

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """As Python 3.13 does: the placeholder once, whatever the number of spellings."""
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {values}"

    def _format_usage(self, usage, actions, groups, prefix) -> str:
        """What must be given; all the rest is below, explained."""
        if usage is None:
            actions = list(actions)
            needed = [a for a in actions if a.required or not a.option_strings]
            flags = " [flags]" if len(needed) < len(actions) else ""
            text = super()._format_usage(None, needed, [], prefix)
            return f"{text.rstrip()}{flags}\n\n"
        return super()._format_usage(usage, actions, groups, prefix)


def expand_home(word: str) -> str:
    """~ and ~user in every value, as the shell does, but for --flag=~/folder, where it does not."""
    flag, equals, value = word.partition("=")
    if equals and flag.startswith("--"):
        return f"{flag}={os.path.expanduser(value)}"
    return os.path.expanduser(word)


class Parser(argparse.ArgumentParser):
    """--help shows defaults; a wrong flag gets one line and exit code 2.

    description: the script's docstring; what it says of letters is for readers of the code.
    """

    def __init__(self, description: str):
        super().__init__(
            description=description.partition("\nLetters:")[0],
            formatter_class=HelpFormatter,
            allow_abbrev=False,  # a prefix that works today is ambiguous tomorrow
        )
        self.add_argument(
            "--config",
            metavar="FILE",
            help="settings, as `name: value` in YAML, or the config.yaml of a run; flags go before "
            "them, and --no_NAME switches off what the file switches on",
        )

    def error(self, message: str):
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Like parse_args, with `explicit`: the names that were given, as flags or by --config."""
        self._add_negations()
        argv = [expand_home(word) for word in (sys.argv[1:] if argv is None else argv)]
        self._refuse_empty(argv)
        args, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(f"unknown: {' '.join(unknown)}{self._hint(unknown)}")
        args.explicit = self._given(argv)
        if args.config is not None:
            try:
                elsewhere = args.output_dir if "output_dir" in args.explicit else None
                values, given = config_file.read(args.config, self, elsewhere)
            except ValueError as error:
                self.error(f"--config {error}")
            vars(args).update((k, v) for k, v in values.items() if k not in args.explicit)
            args.explicit |= given
        return args

    def _refuse_empty(self, words: list[str]) -> None:
        """No flag has an empty value to mean: --resume "$RUN" has one where RUN is not set."""
        for before, word in zip(["", *words], words, strict=False):
            if word == "" or re.fullmatch(r"--\w+=", word):
                name = (word or before).rstrip("=")
                where = f"the value of {name}" if name.startswith("-") else "an argument"
                self.error(
                    f"{where} is empty: set the shell variable, or leave the flag out (and, to "
                    "undo what a file of settings says, remove its line there)"
                )

    def _add_negations(self) -> None:
        """--no_NAME for every switch, to turn off what a file turns on."""
        for action in list(self._actions):
            name = f"--no_{action.dest}"
            if (
                action.nargs == 0
                and action.const is True
                and name not in self._option_string_actions
            ):
                self.add_argument(
                    name,
                    dest=action.dest,
                    action="store_false",
                    default=argparse.SUPPRESS,
                    help=argparse.SUPPRESS,
                )

    def _given(self, argv: list[str]) -> set[str]:
        given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        for action in self._actions:
            if action.option_strings and action.dest not in ("help", "config"):
                kept = {"nargs": action.nargs} if action.nargs != 0 else {"action": "store_true"}
                given.add_argument(
                    *action.option_strings, dest=action.dest, default=argparse.SUPPRESS, **kept
                )
        return set(vars(given.parse_known_args(argv)[0]))

    def _hint(self, unknown: list[str]) -> str:
        """The flag that may have been meant."""
        flag = next((word.split("=")[0] for word in unknown if word.startswith("--")), None)
        return did_you_mean(flag, self._option_string_actions) if flag is not None else ""
