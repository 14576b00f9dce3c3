"""The notebook runs from its first cell to its last, without a network."""

from pathlib import Path

import nbformat
import numpy as np
import torch
from nbclient import NotebookClient
from PIL import Image

from models.generate import generate
from models.tokenbridge import TokenBridge
from models.tokenizers.kl16 import AutoencoderKL
from tests.conftest import ROOT, tiny_model
from util.vae import save_vae

NOTEBOOK = ROOT / "demo" / "generate.ipynb"


def run(folder: Path, monkeypatch, **env: str) -> tuple[str, int]:
    """Execute it in that folder, without a network; all that is printed, and how many pictures."""
    offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    places = ("JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    for name, value in (env | offline | dict.fromkeys(places, str(folder / "jupyter"))).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    return "".join(output.get("text", "") for output in outputs), pictures


def test_it_runs_with_the_weights_of_a_folder(tmp_path, monkeypatch):
    """And what it saves is what the same calls give here."""
    model = tiny_model(latent_scale=0.5)
    vae = AutoencoderKL(6, (1, 1, 1), ch=32, num_res_blocks=1)
    model.save_pretrained(tmp_path / "exported")
    save_vae(tmp_path / "vae.ckpt", vae)
    env = {"TOKENBRIDGE_MODEL": "exported", "TOKENBRIDGE_VAE": "vae.ckpt"}
    printed, pictures = run(tmp_path, monkeypatch, **env)
    assert "random weights" not in printed and pictures == 5
    settings = dict(num_iter=16, cfg=2.0, temperature=0.5, seed=0)
    expected = generate(model, vae, [0, 1, 2], **settings).astype(int)
    saved = [Image.open(tmp_path / "output" / "notebook" / f"{i}.png") for i in range(3)]
    # Another number of threads may round differently.
    assert np.abs(np.stack(saved).astype(int) - expected).max() <= 2
    again = TokenBridge.from_pretrained(tmp_path / "output" / "notebook" / "model")
    assert torch.equal(again.backbone.fake_latent, model.backbone.fake_latent)


def test_it_runs_with_nothing_at_all(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENBRIDGE_MODEL", raising=False)
    printed, pictures = run(tmp_path, monkeypatch)
    assert "random weights, whose images are noise" in printed and pictures == 5
    assert "largest difference of a byte: 0" in printed
    cells = nbformat.read(NOTEBOOK, as_version=4).cells  # which are kept without outputs
    assert [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")] == []
