"""Our conversation with the provider: ask, listen, ask again."""

__version__ = "0.1.0"
