"""A page to draw with a model and to look at its tokenizer, in the browser.

python demo/app.py
python demo/app.py --resume OUTPUT_DIR --vae_path VAE

Without flags it shows what `make demo`, a training in output_dir or the downloaded weights have
left. It answers on this machine alone (127.0.0.1), sends nothing anywhere and loads nothing from
elsewhere.
"""

import argparse
import ipaddress
import os
import socket
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # started as a file: its neighbours are in the folder above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from demo.app_models import Library
from util import stop
from util.args import add_device_flags, add_model_flags, add_vae_flags
from util.device import resolve_device
from util.dist import run
from util.errors import UserError, as_user_error
from util.parser import Parser

INSTALL = "pip install -c requirements.lock -e '.[app]'"


def port(text: str) -> int:
    value = int(text)
    if not 0 < value < 2**16:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 65535")
    return value


def make_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument_group("page").add_argument
    add(
        "--resume",
        nargs="+",
        metavar="PATH",
        help="checkpoints: .pth files, folders of a training or of util.export; default: those of "
        "the demo, of output_dir and of pretrained_models that are there",
    )
    add("--host", default="127.0.0.1", help="to answer at; 0.0.0.0: to all who can reach it")
    add("--port", type=port, default=7860, help="of that address")
    add_device_flags(parser)
    add_vae_flags(parser)
    add_model_flags(parser)
    return parser


def main() -> None:
    args = make_parser().parse()
    check_address(args.host, args.port)
    use_gradio_quietly(args.host)
    from demo.app_page import make_page, serve

    for path in args.resume or []:
        if not Path(path).exists():
            raise UserError(f"--resume {path} does not exist; name a checkpoint or its folder")
    library = Library(args, resolve_device(args.device), typed=is_loopback(args.host))
    with tempfile.TemporaryDirectory(prefix="tokenbridge-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # what visitors upload goes when the page does
        page = make_page(library, args.seed, Path(folder))
        with as_user_error(f"--host {args.host} --port {args.port}", (OSError, ValueError)):
            address = serve(page, args.host, args.port)
        if not library.typed:
            print(
                "warning: everybody who can reach this machine can use this page", file=sys.stderr
            )
        print(f"open {address} in a browser; Ctrl-C ends it", flush=True)
        try:
            page.block_thread()
        except stop.Stopped:
            page.close(verbose=False)


def check_address(host: str, port: int) -> None:
    """Raise UserError unless this machine can answer there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--host {host} --port {port}: cannot answer there ({error}); name an address of this "
            "machine and a port that is free"
        ) from error


def use_gradio_quietly(host: str) -> None:
    """No statistics about its use; its own requests to itself go through no proxy.

    Raises UserError if gradio is not there.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    for name in ("NO_PROXY", "no_proxy"):
        spared = [os.environ.get(name, ""), "127.0.0.1", "localhost", host]
        os.environ[name] = ",".join(filter(None, spared))
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise UserError(f"the page needs gradio ({error}): {INSTALL}") from error


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    run(main)
