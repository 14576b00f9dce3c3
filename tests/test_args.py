"""Command lines: published names and defaults, --help, --config, and answers in one line."""

import argparse

import pytest
import yaml

import main_cache
import main_tokenbridge
import reconstruction
from demo import app
from tests.conftest import ROOT
from tests.runs import call, load, refused, use
from util import args as command_line
from util import doctor, fid_stats
from util.logging import settings_saved

BOTH = dict(vae_path="pretrained_models/vae/kl16.ckpt", vae_embed_dim=16, img_size=256)
BOTH |= dict(data_path="./data/imagenet", device="cuda", num_workers=10, pin_mem=True)
BOTH |= dict(world_size=1, local_rank=-1, dist_on_itp=False, dist_url="env://", cached_path="")
PUBLISHED = {
    main_tokenbridge: {
        **BOTH,
        **dict(batch_size=16, epochs=400, model="tokenbridge_large", vae_stride=16),
        **dict(patch_size=1, num_iter=[256], num_images=50000, cfg=[1.0], cfg_schedule="linear"),
        **dict(label_drop_prob=0.1, eval_freq=40, save_last_freq=5, online_eval=False),
        **dict(evaluate=False, eval_bsz=64, quant_bits=6, quant_min=-5.0, quant_max=5.0),
        **dict(use_quantized_value=False, weight_decay=0.02, grad_checkpointing=False),
        **dict(lr=None, blr=1e-4, min_lr=0.0, lr_schedule="cosine", warmup_epochs=100),
        **dict(ema_rate=[0.9999], mask_ratio_min=0.7, grad_clip=3.0, attn_dropout=0.1),
        **dict(proj_dropout=0.1, buffer_size=64, temperature=[1.0], class_num=1000),
        **dict(output_dir="./output_dir", seed=1, resume="", start_epoch=0, use_cached=False),
    },
    main_cache: BOTH | dict(batch_size=128, seed=0),
    reconstruction: {
        **dict(vae_path=BOTH["vae_path"], image_dir="./data/imagenet"),
        **dict(output_dir="quantization_results", bits=[6], range=5.0, images_per_class=50),
    },
}
SCRIPTS = pytest.mark.parametrize("script", PUBLISHED, ids=lambda script: script.__name__)
READY = sorted((ROOT / "configs").glob("*.yaml"))


def parse(*argv, script=main_tokenbridge):
    """The commands of the published README and all others: test_docs.py."""
    return script.make_parser().parse([str(word) for word in argv])


@pytest.fixture
def config(tmp_path):
    """Writes a file and returns its path."""
    path = tmp_path / "settings.yaml"
    return lambda text: path.write_text(text) and path


@SCRIPTS
def test_published_flags_have_the_published_defaults(script):
    args = parse(script=script)
    assert {name: command_line.value(args, name) for name in PUBLISHED[script]} == PUBLISHED[script]


@pytest.mark.parametrize("script", [*PUBLISHED, fid_stats, doctor], ids=lambda s: s.__name__)
def test_help_explains_every_flag_and_its_default(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        parse("--help", script=script)
    text = capsys.readouterr().out
    for action in script.make_parser()._actions:
        if action.help == argparse.SUPPRESS:
            assert action.option_strings[0] not in text.replace("or --no_pin_mem", "")
            continue
        assert action.option_strings[0] in text and action.help, action
        if action.nargs != 0 and action.default not in (None, ""):
            values = action.default if isinstance(action.default, list) else [action.default]
            assert f"[{' '.join(map(str, values))}]" in " ".join(text.split()), action
    assert not any(word in text for word in ("None", "True", "False", "()", "[[", "Letters:"))


def test_wrong_values_get_one_line(capsys):
    for argv, fragment in (
        (["--epoch", "3"], "did you mean --epochs?"),  # no abbreviations
        (["stray"], "stray"),
        (["--batch_size", "1.5"], "--batch_size"),
        (["--ema_rate", "1.1"], "--ema_rate"),
        (["--blr", "nan"], "--blr"),
        (["--quant_max", "inf"], "--quant_max"),
        (["--latent_scale", "big"], "--latent_scale"),
        (["--channel_order", "0,x"], "--channel_order"),
        (["--seed", str(2**63)], "--seed"),
        (["--head_input", "other"], "--head_input"),
        (["--resume", ""], "the value of --resume is empty"),
        (["--resume="], "the value of --resume is empty"),
    ):
        assert fragment in refused(capsys, main_tokenbridge.main, *argv)


# --- files of settings


def test_file_says_what_flags_say_and_flags_go_before_it(config):
    path = config(
        """
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
    )
    argv = "--model tokenbridge_base --epochs 7 --blr 5e-5 --use_cached --no_pin_mem --cfg 2 3.5"
    by_flags = parse(*argv.split(), "--num_iter", 64, "--channel_order", "1,0,2")
    assert vars(parse("--config", path)) == vars(by_flags) | {"config": str(path)}
    args = parse("--epochs", 9, "--config", path, "--no_use_cached", "--pin_mem", "--cfg", 1)
    assert (args.epochs, args.cfg, args.use_cached, args.pin_mem) == (9, [1.0], False, True)


def test_home_is_expanded_on_the_command_line_and_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for script, flag in ((main_tokenbridge, "resume"), (fid_stats, "output")):
        (tmp_path / "own.yaml").write_text("inception_weights: ~/in the file/~\n")
        args = parse("--config=~/own.yaml", f"--{flag}=~/flag", script=script)
        assert getattr(args, flag) == f"{tmp_path}/flag"
        assert args.inception_weights == f"{tmp_path}/in the file/~"
    (tmp_path / "own.yaml").write_text("resume: [~/a, b, ~/c]\n")
    found = parse("--config=~/own.yaml", script=app).resume
    assert found == [f"{tmp_path}/a", "b", f"{tmp_path}/c"]


def test_wrong_file_is_answered_in_one_line(config, capsys):
    for text, fragment in (
        ("epoch: 3", "epoch is no setting of main_tokenbridge.py; did you mean epochs?"),
        ("epochs: many", "epochs: "),
        ("epochs: 3.5", "epochs: "),
        ("epochs: true", "epochs: True"),
        ("epochs: {a: 1}", "epochs: "),
        ("epochs: 0", "epochs: 0 is not"),
        ("use_cached: 1", "use_cached: 1 is not what --use_cached takes"),
        ("cfg: []", "cfg: "),
        ("cfg: [1, x]", "cfg: "),
        ("model: tokenbridge_larg", "tokenbridge_larg"),
        ("config: other.yaml", "config is no setting"),
        ("- epochs", "has no lines of the form"),
        ("epochs: 3: 4", "mapping values are not allowed"),
        ("epochs: !!python/object/apply:os.getcwd []", "python/object"),
        ("[" * 5000, "settings.yaml"),
    ):
        line = refused(capsys, main_tokenbridge.main, "--config", str(path := config(text)))
        assert f"error: --config {path}" in line and fragment in line
    line = refused(capsys, main_tokenbridge.main, "--config", "/nowhere")
    assert "--config /nowhere" in line


@SCRIPTS
def test_saved_settings_are_the_same_call_again(script, tmp_path):
    own = {
        main_tokenbridge: "--channel_order 2,0,1 --cfg 1 2 --lr 0.5 --no_flip --no_pin_mem",
        main_cache: "--cached_path 007 --dtype float16",
        reconstruction: "--bits -1 4 --latent_scale 0.5",
    }
    first = parse("--seed", "1", "--img_size", "32", *own[script].split(), script=script)
    with settings_saved(first, tmp_path / "c.yaml", "a remark"):
        pass
    again = parse("--config", tmp_path / "c.yaml", script=script)
    assert vars(first) | {"config": 0} == vars(again) | {"config": 0}


def test_a_run_in_another_folder_leaves_the_files_of_the_first_alone(tmp_path, config):
    argv = ["--output_dir", "first", "--metrics_file", "first/f.jsonl", "--log_dir", "first/logs"]
    with settings_saved(parse(*argv), tmp_path / "c.yaml"):
        pass
    again = parse("--config", tmp_path / "c.yaml")
    elsewhere = parse("--config", tmp_path / "c.yaml", "--output_dir", "second")
    assert (again.metrics_file, again.log_dir) == ("first/f.jsonl", "first/logs")
    assert (elsewhere.metrics_file, elsewhere.log_dir) == (None, "")
    own = config("output_dir: first\nmetrics_file: mine.jsonl\n")  # written by hand, and meant
    assert parse("--config", own, "--output_dir", "second").metrics_file == "mine.jsonl"


def test_ready_configurations_are_understood_and_the_published_are_those_of_the_paper():
    """SPEC 4, 7 and 8: epochs, batch of 4 nodes x 8 GPUs x 64, guidance and temperature."""
    for path in READY:
        args = parse("--config", path)
        assert all(getattr(args, name) is not None for name in yaml.safe_load(path.read_text()))
    for size, epochs, cfg, temperature in (("large", 400, 3.1, 0.96), ("huge", 800, 3.45, 0.91)):
        args = parse("--config", ROOT / f"configs/tokenbridge_{size}.yaml")
        assert (args.model, args.epochs, args.warmup_epochs) == (f"tokenbridge_{size}", epochs, 100)
        assert (args.global_batch, args.batch_size, args.blr) == (2048, 64, 5e-5)
        args = parse("--config", ROOT / f"configs/tokenbridge_{size}_eval.yaml")
        assert args.evaluate and args.model == f"tokenbridge_{size}"
        assert (args.cfg, args.temperature, args.num_iter) == ([cfg], [temperature], [256])
        assert (args.cfg_schedule, args.num_images) == ("linear", 50000)


def test_training_and_evaluation_leave_their_settings(inputs, tmp_path, capsys, refusal):
    """The same call again: test_saved_settings_are_the_same_call_again."""
    first = tmp_path / "first"
    use("train", inputs, output_dir=first, epochs=1)
    out = capsys.readouterr().out
    assert "epochs=1" in out and "model=tokenbridge_tiny" in out and "quant_bits" not in out
    config = ["--config", str(first / "config.yaml")]
    call(main_tokenbridge.main, *config, "--resume", "auto", "--epochs", "2")
    assert yaml.safe_load((first / "config.yaml").read_text())["epochs"] == 2
    assert load(first)["step"] == 6
    settings = dict(output_dir=tmp_path / "out", num_images=3, no_metrics=True, resume=first)
    use("evaluate", inputs, **settings)
    saved = yaml.safe_load((tmp_path / "out" / "config-evaluation.yaml").read_text())
    assert saved["evaluate"] and saved["num_images"] == 3
    # The second point of a refused one, which leaves none, has the folder of other images.
    line = refusal("evaluate", inputs, **settings, cfg=[3, 2], head_input="published")
    assert "model.head_input trained (now published)" in line
