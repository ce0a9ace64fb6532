"""raysynth: synthetic medical images at scale on Ray.

Importing this package loads neither torch nor ray; each stage imports what it needs.
"""

__version__ = "0.1.0"
