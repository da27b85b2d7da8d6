"""Which galore_optax this is."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("galore-optax")
except PackageNotFoundError:
    # Imported from where it lies, without having been installed.
    __version__ = "0+unknown"
