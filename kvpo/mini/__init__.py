"""The miniature: a small world with known truth, and a generator trained on it.

It is a size of the program, not another one.
"""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""Pipeline folder of the shipped start weights, made by `kvpo pretrain`."""
