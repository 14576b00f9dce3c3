"""Settings in a YAML file: --config reads one, every run leaves one.

    model: tokenbridge_large    # the names of the flags
    use_cached: true            # switches are true or false
    cfg: [2.5, 3.1]             # several values are a list
    data_path: ~/imagenet       # ~ is the home folder; variables as $HOME are not replaced

What a file says counts as given; the command line goes before it. A file that a run has left holds
all values and, under `given`, the names of those that were given: to be told that a value is the
default's is not the same as to be given it, where a checkpoint or a cache knows better.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from util import dist
from util.errors import as_user_error, did_you_mean
from util.files import LOCK, atomic_write

CONFIG, EVALUATION_CONFIG = "config.yaml", "config-evaluation.yaml"
GIVEN = "given"
# Of one call, or of one process, and not of what it does.
NOT_SAVED = ("explicit", "config", "dry_run", "world_size", "local_rank")
# Where a run writes besides its folder: a run in another folder leaves them alone.
OF_ONE_FOLDER = ("metrics_file", "log_dir")
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry:
    """One `name: value` of a file. where: file and line, for messages."""

    name: str
    value: object
    where: str


def read(
    path: str, parser: argparse.ArgumentParser, output_dir: str | None = None
) -> tuple[dict, set[str]]:
    """The values of a file, by the names in the parser's result, and which of them were given.

    output_dir: the one that the command line names. Of the file that a run in another folder has
    left, the names of that run's own files are not taken.
    Raises ValueError, with file, line and name, on whatever is not a value of one of its flags.
    """
    entries = {}
    for entry in read_entries(path):
        if entry.name in entries:
            raise ValueError(f"{entry.where}: {entry.name} is there twice")
        entries[entry.name] = entry
    saved = entries.pop(GIVEN, None)
    values, found = {}, {}
    for entry in entries.values():
        action, name = find_action(entry, parser)
        if name in found:
            raise ValueError(f"{entry.where}: {entry.name} is there already as {found[name]}")
        values[name], found[name] = convert(entry, action), entry.name
    given = given_names(saved, values, parser)
    if saved is not None and output_dir not in (None, values.get("output_dir")):
        given -= set(OF_ONE_FOLDER)
        values = {name: value for name, value in values.items() if name not in OF_ONE_FOLDER}
    return values, given


def read_entries(path: str) -> list[Entry]:
    """The entries of a file of plain values and flat lists of them; nothing else is read."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError("too long for a file of settings")
        loader = yaml.SafeLoader(content)
        node = loader.get_single_node()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {in_one_line(error)}") from error
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{path}: has no lines of the form 'name: value'")
    return [read_entry(path, loader, *pair) for pair in node.value]


def read_entry(path: str, loader: yaml.SafeLoader, key: yaml.Node, value: yaml.Node) -> Entry:
    where = f"{path}, line {key.start_mark.line + 1}"
    if not isinstance(key, yaml.ScalarNode):
        raise ValueError(f"{where}: a name is expected before the colon")
    parts = value.value if isinstance(value, yaml.SequenceNode) else [value]
    if not all(isinstance(part, yaml.ScalarNode) for part in parts):
        raise ValueError(f"{where}: {key.value}: one value or a list of values is expected")
    try:
        return Entry(key.value, loader.construct_object(value, deep=True), where)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{where}: {key.value}: {in_one_line(error)}") from error


def in_one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}: " if mark is not None else ""
        return f"{place}{error.problem or error.context}"
    return " ".join(str(error).split()) or "nested too deeply"


def find_action(entry: Entry, parser: argparse.ArgumentParser) -> tuple[argparse.Action, str]:
    """The flag that an entry names, and the name of its value."""
    flags = {
        option.lstrip("-"): action
        for action in parser._actions
        for option in action.option_strings
        if action.dest not in ("help", "config")
        if option.startswith("--") and action.help != argparse.SUPPRESS
    }
    if entry.name not in flags:
        hint = did_you_mean(entry.name, flags)
        raise ValueError(f"{entry.where}: {entry.name} is no setting of {parser.prog}{hint}")
    return flags[entry.name], flags[entry.name].dest


def convert(entry: Entry, action: argparse.Action):
    """The value as the flag would have it, by the flag's own type and choices."""
    value, place = entry.value, f"{entry.where}: {entry.name}"
    if value is None:
        if action.default is not None:
            raise ValueError(f"{place}: a value is missing")
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{place}: {value!r} is not true or false")
        return action.const if value else not action.const
    if action.nargs is not None:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise ValueError(f"{place}: an empty list")
        return [convert_one(place, part, action) for part in values]
    return convert_one(place, value, action)


def convert_one(place: str, value, action: argparse.Action):
    if isinstance(value, list) and action.type is not None:
        value = ",".join(map(str, value))  # --channel_order 8,1,10
    value = os.path.expanduser(value) if isinstance(value, str) else value
    allowed = str if action.type is None else (str, int, float)
    if isinstance(value, bool) or not isinstance(value, allowed):
        kind = "text (put it in quotes)" if action.type is None else "a single value"
        raise ValueError(f"{place}: {value!r} is not {kind}")
    try:
        converted = action.type(str(value)) if action.type is not None else value
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{place}: {error}") from error
    except (ValueError, OverflowError) as error:
        kind = getattr(action.type, "__name__", "value").replace("_", " ")
        raise ValueError(f"{place}: {value!r} is not a {kind}") from error
    if action.choices is not None and converted not in action.choices:
        hint = did_you_mean(str(converted), action.choices)
        choices = ", ".join(map(str, action.choices))
        raise ValueError(f"{place}: {value!r} is none of {choices}{hint}")
    return converted


def given_names(saved: Entry | None, values: dict, parser: argparse.ArgumentParser) -> set[str]:
    """Names of the values that count as given: all, or in a run's own file those it lists and
    those that are no longer what the flag would be."""
    if saved is None:
        return {name for name, value in values.items() if value is not None}
    if not isinstance(saved.value, list) or not all(isinstance(n, str) for n in saved.value):
        raise ValueError(f"{saved.where}: {GIVEN} is not a list of names")
    for name in saved.value:
        if name not in values:
            hint = did_you_mean(name, values)
            raise ValueError(f"{saved.where}: {GIVEN}: the file has no {name}{hint}")
    changed = {name for name, value in values.items() if value != parser.get_default(name)}
    return set(saved.value) | changed


def changed(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """What is not as by default, in one line, in the form of flags."""
    words = []
    for name, value in to_save(args).items():
        if value != plain(parser.get_default(name)):
            values = value if isinstance(value, list) else [value]
            words += [f"{name}={' '.join(map(str, values))}"]
    return f"settings: {', '.join(words) or 'the defaults'}"


def plain(value):
    """As YAML has it, and --channel_order as its flag."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def to_save(args: argparse.Namespace) -> dict:
    return {name: plain(v) for name, v in vars(args).items() if name not in NOT_SAVED}


def dump(args: argparse.Namespace, remarks: str = "") -> str:
    """A file that makes the same call again."""
    values = to_save(args)
    given = sorted(name for name in args.explicit if name in values)
    lines = [f"# {line}\n" for line in remarks.splitlines()]
    body = yaml.safe_dump(
        values | {GIVEN: given}, sort_keys=False, default_flow_style=None, allow_unicode=True
    )
    return "".join(lines) + body


@contextmanager
def saved(args: argparse.Namespace, path: Path, remarks: str = "", step: int = 0) -> Iterator[None]:
    """Leave the settings of a job beside what it makes, from the main process.

    A job that fails before it has left anything else leaves nothing at all. For the arguments, see
    `save`.
    """
    if not dist.is_main():
        yield
        return
    save(args, path, remarks, step)
    try:
        yield
    except BaseException:
        if all(other.name in (path.name, LOCK) for other in path.parent.iterdir()):
            path.unlink(missing_ok=True)
        raise


def save(args: argparse.Namespace, path: Path, remarks: str = "", step: int = 0) -> None:
    """remarks: what the settings led to, for comments. step: with which a training goes on; other
    settings than the last time are kept as those before it.
    """
    text = dump(args, remarks)
    with as_user_error(f"{path}: cannot write", (OSError,)):
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else None
        if before is not None and settings_of(before) == settings_of(text):
            return
        # A second change at one step has trained nothing with the first.
        earlier = path.with_name(f"{path.stem}-before-step{step:08d}{path.suffix}")
        if before is not None and step and not earlier.exists():
            write(earlier, before)
        write(path, text)


def settings_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith("#")]


def write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())
