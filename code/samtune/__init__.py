"""samtune: tune the Segment Anything Model on your own images."""

__version__ = "0.1.0"
