"""The version of the package, for its parts and for whoever builds a wheel of it."""

__version__ = "0.1.0"
