"""A page to draw with a model and to look at its tokenizer, in the browser.

python demo/app.py
python demo/app.py --resume OUTPUT_DIR --vae_path VAE

Without flags it shows what `make demo`, `make gallery`, a training in output_dir or the downloaded
weights have left. It answers on this machine alone, and neither sends nor loads anything elsewhere.
"""

import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__":  # started as a file: its neighbours are in the folder above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from demo.app_model import Library
from util import dist, stop
from util.args import DEVICE, MODEL, SEED, VAE, Flag, Parser, positive_int, value
from util.device import resolve_device
from util.doctor import sample_photos
from util.errors import UserError, as_user_error


def make_parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_flags(
        "page",
        Flag("resume", str, None, "checkpoints, instead of those found", nargs="+"),
        Flag("host", str, "127.0.0.1", "to answer at; 0.0.0.0: to all who can reach it"),
        Flag("port", positive_int, 7860, "of that address"),
    )
    parser.add_flags("device", DEVICE, SEED)
    parser.add_flags("tokenizer", *VAE)
    parser.add_flags("model", *MODEL)
    return parser


def main() -> None:
    args = make_parser().parse()
    remedy = "the page needs gradio: pip install -c requirements.lock -e '.[app]'"
    with as_user_error(remedy, (ImportError,)):
        from demo.app_page import make_page  # gradio's seconds, for which --help need not wait
    if path := next((path for path in args.resume or [] if not Path(path).exists()), None):
        raise UserError(f"--resume {path} does not exist; name a checkpoint or its folder")
    device = resolve_device(args.device)
    folder = tempfile.TemporaryDirectory(prefix="tokenbridge-page-")
    os.environ["GRADIO_TEMP_DIR"] = folder.name  # what visitors upload goes when the page does
    photos = sample_photos()
    page = make_page(Library(args, device), value(args, "seed"), photos)
    for name in ("NO_PROXY", "no_proxy"):  # gradio's requests to itself
        os.environ[name] = ",".join([os.environ.get(name, ""), "127.0.0.1", args.host]).strip(",")
    options = dict(quiet=True, prevent_thread_lock=True, ssr_mode=False, footer_links=[])
    options |= dict(server_name=args.host, server_port=args.port, max_file_size="64mb")
    options |= dict(allowed_paths=photos)
    with as_user_error(f"--host {args.host} --port {args.port}", (OSError, OverflowError)):
        page.queue(api_open=False, max_size=20).launch(**options)
    print(f"open {page.local_url} in a browser; Ctrl-C ends it", flush=True)
    with suppress(stop.Stopped):
        page.block_thread()
    page.close(verbose=False)


if __name__ == "__main__":
    dist.run(main)
