"""flashtalk: a portrait and a voice in, a live talking person out."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("flashtalk")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
