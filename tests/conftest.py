"""Golden data and tiny models for all tests."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.correctness import (  # noqa: F401 - some of them for other tests
    GOLDEN,
    ROOT,
    formula_weight,
    golden,
    golden_json,
    golden_model,
    relative_error,
)
from engine_tokenbridge import Run, SkipVote
from models.tokenbridge import TokenBridge
from models.tokenizers.tokenizer import Tokenizer
from tests import runs
from tests.runs import environment  # noqa: F401 - for other tests
from util.data.batches import Batches, MicroBatchSampler
from util.device import resolve_precision
from util.errors import UserError
from util.optim import EMA, build_optimizer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Small tensors gain nothing from threads, and two test processes share two cores.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list) -> None:
    """The slowest files first: one of their tests would else run alone at the end."""
    slow = ("test_benchmarks", "test_compare", "test_compile", "test_faults")
    items.sort(key=lambda item: item.path.stem not in slow)


@pytest.fixture(scope="session", autouse=True)
def _no_network(tmp_path_factory) -> Iterator[None]:
    """No Inception weights, neither this machine's own nor those of the network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("torch")))
        patch.setenv("https_proxy", "http://127.0.0.1:9")  # the discard port, where nobody listens
        yield


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Iterator[Path]:
    """data/, vae.ckpt, cache/ and model/ of tests/runs.py, for all to read; not to be changed."""
    folder = runs.make_inputs(tmp_path_factory.mktemp("inputs") / "inputs")
    before = stamps(folder)
    yield folder
    assert stamps(folder) == before, "a test has changed what others read"


@pytest.fixture
def own(inputs, tmp_path) -> Path:
    """A copy of a module's inputs to spoil."""
    return shutil.copytree(inputs, tmp_path / "own")


@pytest.fixture
def refusal(capsys, tmp_path) -> Callable[..., str]:
    """Calls a script with small inputs; the line with which it refuses before it writes anything.

    Takes one of USES of tests/runs.py, the folder of inputs, and changes of the flags.
    """

    def line(use: str, inputs: Path, **changes) -> str:
        main, own_flags, target = runs.USES[use]
        settings = own_flags | {target: tmp_path / "new" / "output"} | changes
        output = Path(settings[target] or tmp_path / "new")
        before = runs.contents(output)
        said = runs.refused(capsys, main, *runs.flags(inputs, settings))
        assert runs.contents(output) == before and output.exists() == bool(before)
        return said

    return line


@pytest.fixture(scope="session")
def trained(inputs, tmp_path_factory) -> Iterator[Path]:
    """The output folder of two epochs in one process: six steps of two micro-batches."""
    output = tmp_path_factory.mktemp("trained") / "out"
    runs.train(inputs, output)
    before = stamps(output)
    yield output
    assert stamps(output) == before, "a test has changed what others read"


@pytest.fixture(scope="session")
def inception(tmp_path_factory) -> Path:
    """Random weights of Inception, in the form of torch-fidelity's own file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # slow

    torch.manual_seed(0)
    with (  # the constructor wants a file of weights
        mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"),
        mock.patch.object(torch, "load"),
    ):
        network = FeatureExtractorInceptionV3("random", ["2048"], "none")
    for parameter in network.parameters():
        if parameter.ndim > 1:  # the default initialisation forgets the image on its way
            torch.nn.init.kaiming_normal_(parameter)
    network.fc.weight.data.mul_(50)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return path


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def tiny_model(**changes) -> TokenBridge:
    """A few thousand random weights, for invariants; 16 positions, 6 channels, 3 classes."""
    torch.manual_seed(0)
    settings = {
        **dict(img_size=16, vae_stride=4, vae_embed_dim=6, class_num=3, buffer_size=2),
        **dict(encoder_embed_dim=16, encoder_depth=1, encoder_num_heads=2),
        **dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
        **dict(channel_embed_dim=16, channel_depth=2, channel_heads=2, quant_levels=8),
        **dict(attn_dropout=0.0, proj_dropout=0.0, label_drop_prob=0.0),
        **dict(channel_order=(3, 0, 5, 1, 4, 2)),
    }
    model = TokenBridge(**settings | changes)
    with torch.no_grad():  # adaLN starts at zero, where a head cannot tell its inputs apart
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def new_run(model: TokenBridge, ema_rate: float, precision: str = "fp32") -> Run:
    """What a step of training needs: no loader, no log, nothing that is written."""
    device = torch.device("cpu")
    chosen = resolve_precision(precision, device)
    run = Run(**dict.fromkeys(field.name for field in fields(Run)))
    run.model, run.device, run.precision = model, device, chosen
    run.averages = {str(ema_rate): EMA(model.published_parameters(), ema_rate)}
    run.optimizer = build_optimizer(model.published_parameters(), 1e-2, 0.02)
    run.scaler = torch.amp.GradScaler("cpu", enabled=chosen.name == "fp16")
    run.tokenizer, run.cached = Tokenizer(None, latent_scale=2.0), True
    run.skip_vote, run.facts, run.wrapped = SkipVote(device), {}, model
    run.batches = Batches(batch_size=2, micro_batches=1, images=100, seed=1)
    run.sampler = MicroBatchSampler(run.batches, range(1), rank=0, world_size=1)
    return run


def complaint(action: Callable, *args, **kwargs) -> str:
    """The one line of the UserError that a call raises."""
    with pytest.raises(UserError) as error:
        action(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


@contextmanager
def chromium() -> Iterator:
    """A headless browser of playwright. Where it is missing tests are skipped; in CI they fail."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium, which .ci/run installs: apt-get install chromium")
        pytest.skip("no chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
