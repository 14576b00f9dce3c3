"""What the page answers: every function takes what the page holds and returns what it shows.

The work is in demo.app_models, demo.app_drawing, demo.app_reconstruction and demo.app_pictures.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from threading import Event

import gradio as gr
import torch

from demo.app_drawing import Frame, draw, labels_of, parse_seed, save
from demo.app_models import Library, class_labels
from demo.app_pictures import STATUS, histogram, image, stage, text
from demo.app_reconstruction import Reconstruction, quantizer_for, read_photo, reconstruct
from models.sampler import SamplingOptions
from util.errors import UserError, as_user_error
from util.evaluation.folder import file_label
from util.evaluation.settings import find_class

FIRST = 4  # images, and classes, to begin with
UNLIKE = 18.0  # dB of PSNR below which a VAE did not recognise much
UNKNOWN = "The VAE alone changes it much: it was probably trained on others."
EMPTY = (
    '<div class="tb-stage tb-empty"><p>Choose classes and press <b>Generate</b>. The image appears '
    "here position by position, beside the order in which they are filled and how sure the model "
    "is of each.</p></div>"
)
NO_PHOTO = (
    '<div class="tb-stage tb-empty"><p>Drop a photo to see what the VAE and the quantizer make of '
    "it.</p></div>"
)


def told(function: Callable) -> Callable:
    """What a user can mend is shown as one line in the page; the page goes on."""

    @wraps(function)
    def answer(*values):
        try:
            return function(*values)
        except UserError as error:
            raise gr.Error(text(error), title="Not possible", print_exception=False) from error
        except torch.OutOfMemoryError as error:
            message = "out of memory: ask for fewer images, or a smaller size"
            raise gr.Error(message, title="Not possible", print_exception=False) from error

    return answer


def told_on_the_way(function: Callable[..., Iterator]) -> Callable[..., Iterator]:
    """The same for a generator, of which every part may fail."""

    @wraps(function)
    def answer(*values):
        parts = function(*values)
        while True:
            part = told(next)(parts, None)
            if part is None:
                return
            yield part

    return answer


class Page:
    """Answers of one page. files: the folder for what can be downloaded."""

    def __init__(self, library: Library, files: Path):
        self.library, self.files = library, files
        self.running: dict[str, Event] = {}  # by visitor: set, it stops

    def choices(self):
        """The list of checkpoints, as the folders are now; the first is chosen."""
        found = self.library.choices()
        return gr.Dropdown(choices=found, value=found[0] if found else None)

    def opened(self, name: str | None, weights: str):
        """Facts and settings of the checkpoint that was picked."""
        if not name:
            note = "No checkpoint found. <code>make demo</code> trains one in about 5 minutes."
            return f'<p class="tb-facts">{note}</p>', *[gr.skip()] * 7
        loaded = self.library.load(name, weights)
        for warning in loaded.warnings:
            gr.Warning(text(warning), title="Another VAE")
        labels, usual = class_labels(loaded.classes), loaded.defaults
        config = loaded.model.config
        sizes = [
            size for k in (1, 2, 4, 8) if (size := k * config.img_size) <= max(512, config.img_size)
        ]
        return (
            f'<p class="tb-facts">{text(" · ".join(loaded.facts))}</p>',
            gr.Dropdown(choices=labels, value=labels[:: -(-len(labels) // FIRST)]),
            usual.cfg,
            gr.Slider(maximum=max(256, config.seq_len, usual.num_iter), value=usual.num_iter),
            usual.temperature,
            usual.cfg_schedule,
            (config.quant_levels - 1).bit_length(),
            gr.Dropdown(choices=[str(size) for size in sizes], value=str(config.img_size)),
        )

    def generate(
        self, request: gr.Request, name, weights, classes, images, watch, *settings
    ) -> Iterator[tuple]:
        """(stage, download) after every iteration; see `demo.app_drawing.draw`.

        settings: those of `options_of`.
        """
        loaded = self.library.load(name, weights)
        chosen = [find_class(str(part), loaded.classes) for part in classes or []]
        labels = labels_of(chosen, whole(images, "images"))
        options = options_of(*settings)
        names = [loaded.classes[label] for label in labels]
        began, shown = time.monotonic(), ""
        stop = self.running[request.session_hash] = Event()
        for frame in draw(loaded, labels, options, number(watch, "seconds"), stop):
            status = status_of(frame, time.monotonic() - began)
            below = recipe(labels, options) if frame.done else ""
            shown = stage(frame, names, loaded.model.config.quant_levels, status, below)
            yield shown, self.download(frame, names, options)
        self.running.pop(request.session_hash, None)
        if stop.is_set():
            yield stopped(shown), gr.skip()

    def stop(self, request: gr.Request) -> None:
        """Of this visitor's drawing; what is drawn until then stays."""
        if request.session_hash in self.running:
            self.running[request.session_hash].set()

    def download(self, frame: Frame, names: list[str], options: SamplingOptions):
        if not frame.done:
            return gr.DownloadButton(value=None, interactive=False)
        folder = Path(tempfile.mkdtemp(dir=self.files))
        classes = "-".join(file_label(name) for name in dict.fromkeys(names[:6]))
        path = folder / f"{classes[:80]}_seed{options.seed}.png"
        save(frame.pixels, path)
        return gr.DownloadButton(value=str(path), interactive=True)

    def reconstruct(self, name, weights, photo, bits, size, posterior) -> str:
        tokenizer, loaded = self.library.tokenizer(name, weights)
        picture = read_photo(photo)
        quantizer = quantizer_for(loaded, whole(bits, "bits")).to(self.library.device)
        pixels = whole(size, "pixels")
        found = reconstruct(picture, tokenizer, quantizer, pixels, posterior)
        return comparison(found, whole(bits, "bits"))

    def reconstruct_if_any(self, name, weights, photo, *rest) -> str:
        return self.reconstruct(name, weights, photo, *rest) if photo else NO_PHOTO


def number(value, what: str) -> float:
    """Raises UserError on what a page sends that is none."""
    try:
        found = float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} {str(value)[:40]!r} is not a number") from error
    if not abs(found) < 1e6:
        raise UserError(f"{what} {value} is not a number to draw with")
    return found


def whole(value, what: str) -> int:
    found = number(value, what)
    if found != int(found):
        raise UserError(f"{what} {value} is not a whole number")
    return int(found)


def options_of(cfg, schedule, temperature, num_iter, order, seed) -> SamplingOptions:
    """What the page holds as the sampler takes it. Raises UserError, naming the value."""
    with as_user_error():
        return SamplingOptions(
            num_iter=whole(num_iter, "iterations"),
            cfg=number(cfg, "guidance"),
            cfg_schedule=schedule,
            temperature=number(temperature, "temperature"),
            order=order,
            seed=parse_seed(seed),
        )


def status_of(frame: Frame, seconds: float) -> str:
    filled = int((frame.order[0] > 0).sum())
    done = "Done" if frame.done else f"Iteration {frame.step} of {frame.steps}"
    counted = f"{filled} of {frame.order.shape[1]} positions filled"
    if frame.done:
        counted = f"{frame.steps} iterations, {frame.order.shape[1]} positions"
    return f"{done} · {counted} · {seconds:.1f} s"


def recipe(labels: list[int], options: SamplingOptions) -> str:
    """The call of `models.generate.generate` that makes the same images."""
    call = (
        f"generate(model, vae, {labels}, num_iter={options.num_iter}, cfg={options.cfg:g}, "
        f"cfg_schedule={options.cfg_schedule!r}, temperature={options.temperature:g}, "
        f"order={options.order!r}, seed={options.seed})"
    )
    return (
        '<details class="tb-recipe"><summary>The same images from Python</summary>'
        f"<code>{text(call)}</code></details>"
    )


def comparison(found: Reconstruction, bits: int) -> str:
    """Three pictures side by side with their PSNR, and the histogram."""
    kilobytes = found.scalars * bits / 8 / 1024
    pictures = [
        ("Original", found.original, "the centre of the photo"),
        ("Continuous VAE", found.continuous, f"{found.psnr_continuous:.2f} dB PSNR"),
        (f"Quantized, {bits} bits", found.quantized, f"{found.psnr_quantized:.2f} dB PSNR"),
    ]
    figures = "".join(
        f'<figure><figcaption>{text(title)}</figcaption><div class="tb-tile">'
        f"<div>{image(pixels, title)}</div></div><p><b>{text(note)}</b></p></figure>"
        for title, pixels, note in pictures
    )
    unlike = "" if found.psnr_continuous > UNLIKE else f"<p class='tb-facts'>{UNKNOWN}</p>"
    facts = (
        f"{found.scalars:,} latent scalars of {bits} bits: {kilobytes:.1f} kB · "
        f"{found.entropy_bits:.2f} bits of entropy a scalar · "
        f"{found.outside:.2%} beyond the range of the levels"
    )
    return (
        f'<div class="tb-stage"><div class="tb-panels">{figures}</div>'
        f'<p class="tb-facts">{text(facts)}</p>{unlike}'
        f"{histogram(found.shares, found.expected, found.values)}</div>"
    )


def stopped(shown: str) -> str:
    """The stage that says so."""
    return shown.replace(f"{STATUS}Iteration", f"{STATUS}Stopped after iteration", 1)
