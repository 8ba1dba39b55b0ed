"""The version of this package, below everything that names it."""

__version__ = "0.2.0"
