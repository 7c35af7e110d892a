"""flashtalk: a portrait and a voice in, a live talking person out."""

__version__: str


def __getattr__(name: str) -> str:
    """`__version__`, looked up when asked for: reading package metadata would slow every command's start."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("flashtalk")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"
