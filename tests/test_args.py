"""Flags have the published names and defaults, and every script answers --help."""

import pytest

import main_cache
import main_tokenbridge
import reconstruction
from util import doctor, fid_stats
from util.errors import EXIT_USER_ERROR

PUBLISHED = {
    main_tokenbridge: {
        **dict(batch_size=16, epochs=400, model="tokenbridge_large", img_size=256),
        **dict(vae_path="pretrained_models/vae/kl16.ckpt", vae_embed_dim=16, vae_stride=16),
        **dict(patch_size=1, num_iter=[256], num_images=50000, cfg=[1.0], cfg_schedule="linear"),
        **dict(label_drop_prob=0.1, eval_freq=40, save_last_freq=5, online_eval=False),
        **dict(evaluate=False, eval_bsz=64, quant_bits=6, quant_min=-5.0, quant_max=5.0),
        **dict(use_quantized_value=False, weight_decay=0.02, grad_checkpointing=False),
        **dict(lr=None, blr=1e-4, min_lr=0.0, lr_schedule="cosine", warmup_epochs=100),
        **dict(ema_rate=0.9999, mask_ratio_min=0.7, grad_clip=3.0, attn_dropout=0.1),
        **dict(proj_dropout=0.1, buffer_size=64, temperature=[1.0], data_path="./data/imagenet"),
        **dict(class_num=1000, output_dir="./output_dir", device="cuda", seed=1, resume=""),
        **dict(start_epoch=0, num_workers=10, pin_mem=True, world_size=1, local_rank=-1),
        **dict(dist_on_itp=False, dist_url="env://", use_cached=False, cached_path=""),
    },
    main_cache: {
        **dict(batch_size=128, img_size=256, vae_path="pretrained_models/vae/kl16.ckpt"),
        **dict(vae_embed_dim=16, data_path="./data/imagenet", device="cuda", seed=0),
        **dict(num_workers=10, pin_mem=True, world_size=1, local_rank=-1, dist_on_itp=False),
        **dict(dist_url="env://", cached_path=""),
    },
    reconstruction: {
        **dict(vae_path="pretrained_models/vae/kl16.ckpt", image_dir="./data/imagenet"),
        **dict(output_dir="quantization_results", bits=[6], range=5.0, images_per_class=50),
    },
}
SCRIPTS = pytest.mark.parametrize("script", PUBLISHED, ids=lambda script: script.__name__)


@SCRIPTS
def test_published_flags_have_the_published_defaults(script):
    args = vars(script.make_parser().parse([]))
    assert {name: args[name] for name in PUBLISHED[script]} == PUBLISHED[script]
    assert args["explicit"] == set()


HELPFUL = pytest.mark.parametrize(
    "tool", [*PUBLISHED, fid_stats, doctor], ids=lambda tool: tool.__name__
)


def help_of(tool, capsys, monkeypatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        tool.make_parser().parse(["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@HELPFUL
def test_help_explains_every_flag_in_80_columns(tool, capsys, monkeypatch):
    text = help_of(tool, capsys, monkeypatch)
    for action in tool.make_parser()._actions:
        assert action.option_strings[0] in text and action.help, action
    choices = [line for line in text.splitlines() if "{" in line]  # argparse does not break them
    assert max(len(line) for line in text.splitlines() if line not in choices) <= 80
    assert not any(word in text for word in ("None", "True", "False", "()", "[[", "Letters:"))


@HELPFUL
def test_help_puts_every_flag_into_a_group_with_its_default(tool, capsys, monkeypatch):
    text = " ".join(help_of(tool, capsys, monkeypatch).split())
    parser = tool.make_parser()
    ungrouped = parser._optionals._group_actions
    assert [action.dest for action in ungrouped] == ["help", "config"]
    for action in parser._actions:
        if action.nargs != 0 and action.default not in (None, ""):
            values = action.default if isinstance(action.default, list) else [action.default]
            shown = " ".join(map(str, values))
            assert f"{' '.join(action.help.split())} [{shown}]" in text, action


TRAINING = """
    --img_size 256 --vae_path pretrained_models/vae/kl16.ckpt --vae_embed_dim 16 --vae_stride 16
    --patch_size 1 --model tokenbridge_large --quant_bits 6 --quant_min -5.0 --quant_max 5.0
    --epochs 400 --warmup_epochs 100 --batch_size 64 --blr 5.0e-5 --output_dir OUT --resume OUT
    --data_path DATA --use_cached --cached_path CACHE --grad_checkpointing
"""
EVALUATION = """
    --model tokenbridge_huge --eval_bsz 256 --num_images 50000 --num_iter 256 --cfg 3.45
    --quant_bits 6 --cfg_schedule linear --temperature 0.91 --output_dir OUT
    --resume pretrained_models/tokenbridge/tokenbridge_huge --data_path DATA --evaluate
"""
RECONSTRUCTION = "--bits -1 4 6 --range 5.0 --image_dir DIR"


def test_commands_of_the_published_readme_are_understood():
    args = main_tokenbridge.make_parser().parse(TRAINING.split())
    assert (args.blr, args.quant_min, args.resume) == (5e-5, -5.0, "OUT")
    args = main_tokenbridge.make_parser().parse(EVALUATION.split())
    assert args.evaluate and args.cfg == [3.45]
    assert args.explicit == {
        *("model", "eval_bsz", "num_images", "num_iter", "cfg", "quant_bits", "cfg_schedule"),
        *("temperature", "output_dir", "resume", "data_path", "evaluate"),
    }
    args = reconstruction.make_parser().parse(RECONSTRUCTION.split())
    assert args.bits == [-1, 4, 6]


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["--cfg=2"], "cfg"),
        (["--quant_min", "-5"], "quant_min"),
        (["--seed", "1"], "seed"),  # the default, but given
        (["--no_pin_mem"], "pin_mem"),
        (["--use_cached"], "use_cached"),
        (["--local-rank=3"], "local_rank"),
    ],
)
def test_given_flags_are_known(argv, name):
    assert main_tokenbridge.make_parser().parse(argv).explicit == {name}


@pytest.mark.parametrize(
    "argv",
    [
        ["--epoch", "3"],  # no abbreviations
        ["stray"],
        ["--batch_size", "1.5"],
        ["--ema_rate", "1.1"],
        ["--blr", "nan"],
        ["--lr", "-1"],
        ["--quant_max", "inf"],
        ["--latent_scale", "big"],
        ["--channel_order", "0,x"],
        ["--seed", str(2**63)],
        ["--start_epoch", "-1"],
        ["--head_input", "other"],
    ],
)
def test_wrong_values_get_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main_tokenbridge.make_parser().parse(argv)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == EXIT_USER_ERROR
    assert len(lines) == 1 and " error: " in lines[0] and argv[0] in lines[0]


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--batchsize=3"], "did you mean --batch_size?"),
        (["--output-dir", "x"], "did you mean --output_dir?"),
    ],
)
def test_a_mistyped_flag_gets_the_one_that_was_meant(argv, hint, capsys):
    with pytest.raises(SystemExit):
        main_tokenbridge.make_parser().parse(argv)
    assert hint in capsys.readouterr().err
