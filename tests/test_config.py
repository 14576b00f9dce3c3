"""--config: a file of settings says what flags would, and every run leaves one that repeats it."""

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main_cache
import main_tokenbridge
import reconstruction
from demo import app
from tests.conftest import ROOT
from tests.runs import EVALUATE_FLAGS, TRAIN_FLAGS, call, flags, load, refused, tensors
from util import config_file, fid_stats
from util.errors import EXIT_USER_ERROR

READY = sorted((ROOT / "configs").glob("*.yaml"))


def parse(*argv, script=main_tokenbridge):
    return script.make_parser().parse([str(word) for word in argv])


@pytest.fixture
def config(tmp_path):
    """Writes a file and returns its path."""

    def write(text: str) -> Path:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return write


def test_file_says_what_flags_say(config):
    text = """
        model: tokenbridge_base   # a comment
        epochs: 7
        blr: 5e-5                 # text to YAML 1.1, which wants 5.0e-5
        use_cached: true
        no_flip: false
        pin_mem: false
        cfg: [2, 3.5]
        num_iter: 64
        channel_order: 1,0,2
        lr: null
        cached_path: ''
    """
    by_file = parse("--config", config(text))
    argv = "--model tokenbridge_base --epochs 7 --blr 5e-5 --use_cached --no_pin_mem --cfg 2 3.5"
    by_flags = parse(*argv.split(), "--num_iter", 64, "--channel_order", "1,0,2")
    differing = {k for k, v in vars(by_flags).items() if getattr(by_file, k) != v}
    assert differing == {"config", "explicit"}
    assert by_file.explicit == by_flags.explicit | {"no_flip", "cached_path"}


@pytest.mark.parametrize(
    ("script", "flag", "name"),
    [
        (main_tokenbridge, "resume", "output_dir"),
        (main_cache, "cached_path", "data_path"),
        (reconstruction, "fid_stats", "image_dir"),
        (fid_stats, "output", "image_dir"),
    ],
)
def test_home_is_expanded_on_the_command_line_and_in_a_file(
    tmp_path, monkeypatch, script, flag, name
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text(f"{name}: ~/in the file/~\n")
    args = parse("--config=~/own.yaml", f"--{flag}=~/flag", script=script)
    assert getattr(args, flag) == f"{tmp_path}/flag"
    assert getattr(args, name) == f"{tmp_path}/in the file/~"


def test_several_paths_are_all_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.yaml").write_text("resume: [~/a, b, ~/c]\n")
    expected = [f"{tmp_path}/a", "b", f"{tmp_path}/c"]
    assert parse("--config=~/own.yaml", script=app).resume == expected
    assert parse("--resume", "~/a", "b", "~/c", script=app).resume == expected


def test_command_line_goes_before_the_file(config):
    path = config("epochs: 7\nbatch_size: 8\nuse_cached: true\npin_mem: true\ncfg: [2, 3]\n")
    args = parse("--epochs", 9, "--config", path, "--no_use_cached", "--no_pin_mem", "--cfg", 1)
    assert (args.epochs, args.batch_size, args.cfg) == (9, 8, [1.0])
    assert not args.use_cached and not args.pin_mem
    assert {"epochs", "batch_size", "use_cached", "pin_mem", "cfg"} <= args.explicit


def test_negated_switches_are_off_and_stay_out_of_help(capsys):
    args = parse("--no_evaluate", "--no_use_cached")
    assert not args.evaluate and args.explicit == {"evaluate", "use_cached"}
    with pytest.raises(SystemExit):
        parse("--help")
    assert "--no_evaluate" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("epoch: 3", ["line 1: epoch is no setting", "did you mean epochs?"]),
        ("a: 1\nnum_iter: 3", ["line 1: a is no setting"]),
        ("epochs: 3\nseed: 1\nepochs: 4", ["line 3: epochs is there twice"]),
        ("pin_mem: true\nno_pin_mem: true", ["line 2: no_pin_mem is there already as pin_mem"]),
        ("epochs: many", ["line 1: epochs: 'many' is not a positive int"]),
        ("epochs: 3.5", ["epochs: 3.5 is not a positive int"]),
        ("epochs: true", ["epochs: True is not a single value"]),
        ("epochs: [1, 2]", ["epochs: '1,2' is not"]),
        ("epochs: {a: 1}", ["epochs: one value or a list"]),
        ("epochs: 0", ["epochs: 0 is not at least 1"]),
        ("epochs:", ["epochs: a value is missing"]),
        ("use_cached: 1", ["use_cached: 1 is not true or false"]),
        ("cached_path: 7", ["cached_path: 7 is not text"]),
        ("data_path: 2024-01-01", ["data_path: ", "is not text"]),
        ("data_path: 2024-13-41", ["line 1: data_path: "]),
        ("cfg: []", ["cfg: an empty list"]),
        ("cfg: [[1]]", ["cfg: one value or a list"]),
        ("cfg: [1, x]", ["cfg: 'x' is not a non negative float"]),
        ("model: tokenbridge_larg", ["is none of", "did you mean tokenbridge_large?"]),
        ("config: other.yaml", ["config is no setting"]),
        ("given: [epochs]", ["given: the file has no epochs"]),
        ("- epochs", ["has no lines of the form"]),
        ("epochs", ["has no lines of the form"]),
        ("epochs: 3: 4", ["line 1: mapping values are not allowed"]),
        ("epochs: !!python/object/apply:os.getcwd []", ["line 1: epochs: ", "python/object"]),
        ("[" * 5000, [""]),
        ("a: &a [1]\nb: &b [*a, *a]\nepochs: *b", ["one value or a list"]),
        ("epochs: \x01", ["special characters are not allowed"]),
    ],
)
def test_wrong_file_is_answered_in_one_line(config, capsys, text, fragments):
    path = config(text)
    with pytest.raises(SystemExit) as stop:
        parse("--config", path)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == EXIT_USER_ERROR and len(lines) == 1
    assert f"error: --config {path}" in lines[0]
    for fragment in fragments:
        assert fragment in lines[0], lines[0]


def test_unreadable_file_is_named(tmp_path, capsys):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "long").write_bytes(b"#" * (config_file.MAX_BYTES + 1))
    for name in ("missing", "binary", "long", "."):
        with pytest.raises(SystemExit):
            parse("--config", tmp_path / name)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and f"--config {tmp_path / name}" in lines[0]


@pytest.mark.parametrize("script", [main_tokenbridge, main_cache, reconstruction])
def test_saved_settings_are_the_same_call_again(script, config):
    """All values of every script, and which were given."""
    shared = ["--seed", "1", "--img_size", "32"]
    own = {
        main_tokenbridge: [
            "--channel_order",
            "2,0,1",
            "--cfg",
            "1",
            "2",
            "--lr",
            "0.5",
            "--no_flip",
        ],
        main_cache: ["--cached_path", "007", "--dtype", "float16"],
        reconstruction: ["--bits", "-1", "4", "--latent_scale", "0.5"],
    }
    first = parse(*shared, *own[script], script=script)
    again = parse("--config", config(config_file.dump(first)), script=script)
    assert again.explicit == first.explicit
    assert vars(first) | {"config": 0, "explicit": 0} == vars(again) | {"config": 0, "explicit": 0}


def test_changed_value_of_a_saved_file_counts_as_given(config):
    """Else the checkpoint's batch size would go before it, without a word."""
    text = config_file.dump(parse("--epochs", 3))
    assert "batch_size: 16\n" in text
    args = parse("--config", config(text.replace("batch_size: 16\n", "batch_size: 8\n")))
    assert args.batch_size == 8 and args.explicit == {"epochs", "batch_size"}


def test_a_run_in_another_folder_leaves_the_files_of_the_first_alone(config):
    flags = ["--output_dir", "first", "--metrics_file", "first/f.tsv", "--log_dir", "first/logs"]
    path = config(config_file.dump(parse(*flags)))
    again, elsewhere = parse("--config", path), parse("--config", path, "--output_dir", "second")
    assert (again.metrics_file, again.log_dir) == ("first/f.tsv", "first/logs")
    default = parse()
    assert (elsewhere.metrics_file, elsewhere.log_dir) == (default.metrics_file, default.log_dir)
    assert elsewhere.explicit == {"output_dir"}
    own = config("output_dir: first\nmetrics_file: mine.tsv\n")  # written by hand, and meant
    assert parse("--config", own, "--output_dir", "second").metrics_file == "mine.tsv"


def test_other_settings_of_a_resumed_run_are_kept_as_those_before_it(tmp_path):
    def save(step: int, *argv: str) -> None:
        config_file.save(parse(*argv), tmp_path / "config.yaml", f"step {step}", step)

    def epochs() -> dict[str, int]:
        return {p.name: yaml.safe_load(p.read_text())["epochs"] for p in tmp_path.iterdir()}

    save(0, "--epochs", "1")
    save(0, "--epochs", "2")  # nothing was trained with the first
    assert epochs() == {"config.yaml": 2}
    save(5, "--epochs", "2")
    assert epochs() == {"config.yaml": 2}
    save(9, "--epochs", "3")
    save(9, "--epochs", "4")  # nothing was trained with 3
    assert epochs() == {"config.yaml": 4, "config-before-step00000009.yaml": 2}


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_ready_configuration_is_understood_and_full_of_choices(path):
    args = parse("--config", path)
    assert args.explicit == set(yaml.safe_load(path.read_text()))


def test_published_settings_are_those_of_the_paper():
    """SPEC 4, 7 and 8: epochs, batch of 4 nodes x 8 GPUs x 64, guidance and temperature."""
    for size, epochs, cfg, temperature in (("large", 400, 3.1, 0.96), ("huge", 800, 3.45, 0.91)):
        args = parse("--config", ROOT / f"configs/tokenbridge_{size}.yaml")
        assert (args.model, args.epochs, args.warmup_epochs) == (f"tokenbridge_{size}", epochs, 100)
        assert (args.global_batch, args.batch_size, args.blr) == (2048, 64, 5e-5)
        args = parse("--config", ROOT / f"configs/tokenbridge_{size}_eval.yaml")
        assert args.evaluate and args.model == f"tokenbridge_{size}"
        assert (args.cfg, args.temperature, args.num_iter) == ([cfg], [temperature], [256])
        assert (args.cfg_schedule, args.num_images) == ("linear", 50000)


def test_training_leaves_its_settings_and_repeats_itself_from_them(inputs, tmp_path, capsys):
    first, again = tmp_path / "first", tmp_path / "again"
    call(main_tokenbridge.main, *flags(inputs, TRAIN_FLAGS, output_dir=first, epochs=1))
    out = capsys.readouterr().out
    assert "epochs=1" in out and "model=tokenbridge_tiny" in out and "quant_bits" not in out
    saved = yaml.safe_load((first / "config.yaml").read_text())
    assert saved["epochs"] == 1 and saved["quant_bits"] == 6 and "epochs" in saved["given"]
    config = ["--config", str(first / "config.yaml"), "--output_dir", str(again)]
    call(main_tokenbridge.main, *config)
    one, other = tensors(load(first)), tensors(load(again))
    assert all((one[name] == other[name]).all() for name in one)
    call(main_tokenbridge.main, *config, "--resume", "auto", "--epochs", "2")
    assert yaml.safe_load((again / "config.yaml").read_text())["epochs"] == 2
    assert yaml.safe_load((again / "config-before-step00000003.yaml").read_text())["epochs"] == 1


def test_other_scripts_leave_their_settings_too(inputs, tmp_path):
    evaluation = flags(inputs, EVALUATE_FLAGS, output_dir=tmp_path / "run", num_images=3)
    call(main_tokenbridge.main, *flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "run", epochs=1))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    call(main_tokenbridge.main, *evaluation, "--resume", str(tmp_path / "run"), "--no_metrics")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before  # the training's
    saved = yaml.safe_load((tmp_path / "run" / "config-evaluation.yaml").read_text())
    assert saved["evaluate"] and saved["num_images"] == 3
    cache = yaml.safe_load((inputs / "cache" / "config.yaml").read_text())
    assert cache["shard_size"] == 9 and "shard_size" in cache["given"]
    argv = ["--config", str(inputs / "cache" / "config.yaml"), "--cached_path", str(tmp_path / "c")]
    call(main_cache.main, *argv)
    assert (tmp_path / "c" / "manifest.json").read_bytes() == (
        inputs / "cache" / "manifest.json"
    ).read_bytes()


def test_a_refused_evaluation_leaves_the_settings_of_the_one_before(inputs, tmp_path, capsys):
    """The second of its points has the folder of other images; the first is not begun."""
    call(main_tokenbridge.main, *flags(inputs, TRAIN_FLAGS, output_dir=tmp_path / "run", epochs=1))
    settings = dict(output_dir=tmp_path / "out", num_images=3, no_metrics=True)
    argv = flags(inputs, EVALUATE_FLAGS, resume=tmp_path / "run", **settings)
    call(main_tokenbridge.main, *argv)
    before = {path: path.read_bytes() for path in files(tmp_path / "out")}
    argv += ["--cfg", "3", "2", "--head_input", "published"]
    line = refused(capsys, main_tokenbridge.main, *argv)
    assert "model.head_input trained (now published)" in line
    assert {path: path.read_bytes() for path in files(tmp_path / "out")} == before


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_wrong_file_leaves_nothing(inputs, tmp_path, config, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, main_cache.main, "--config", str(config("epochs: 3")))
    assert "epochs is no setting of main_cache.py" in line
    assert [path.name for path in tmp_path.iterdir()] == ["settings.yaml"]


PARSER = main_tokenbridge.make_parser()
NAMES = st.sampled_from(["epochs", "cfg", "model", "use_cached", "given", "config", "<<", "x"])
SCALARS = st.sampled_from(
    ["1", "1e-4", "-1", "true", "~", "[1, 2]", "[]", "{}", "2024-01-01", "!!binary aGk=", "&a 1"]
    + ["*a", "'x'", "|\n  x", "0o17", ".nan", ".inf", "1_0", "190:20:30", "!!int x", "!!set {a}"]
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(NAMES, SCALARS), max_size=4) | st.binary(max_size=60))
def test_any_file_is_read_or_refused_with_its_name(tmp_path_factory, content):
    """Nothing but ValueError, in one line, whatever is in it."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    if isinstance(content, list):
        content = "".join(f"{name}: {value}\n" for name, value in content).encode()
    path.write_bytes(content)
    try:
        values, given = config_file.read(str(path), PARSER)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert given <= set(values) and set(values) <= {action.dest for action in PARSER._actions}
