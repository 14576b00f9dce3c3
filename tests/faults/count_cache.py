"""main_cache.py, which also adds one byte to the file ENCODED for every image that it encodes."""

import os

import main_cache
from util.dist import run

encode = main_cache.encode


def counted(vae, images):
    with open(os.environ["ENCODED"], "ab") as file:
        file.write(b"." * len(images))
    return encode(vae, images)


main_cache.encode = counted

if __name__ == "__main__":
    run(main_cache.main)
