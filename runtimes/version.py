"""The version of gemma3c: read by the build of the wheel, and written into every bundle."""

__version__ = "0.1.0"
