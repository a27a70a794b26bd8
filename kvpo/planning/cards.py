"""Cards that `kvpo plan` knows, as their maker states them.

From NVIDIA's data sheets and architecture white papers, each per card: HGX and DGX B200 and B300,
GB200 NVL72, GH200, H200, H100, A100, L40S, RTX PRO 6000 Blackwell, RTX 6000 Ada, GeForce RTX 5090,
4090 and 3090.  Rates that a sheet states with sparsity only are halved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

GIB = 2**30


class Card(NamedTuple):
    """One kind of card."""

    tflops: float
    """Dense bf16 TFLOP/s with sums in float32."""
    room: float
    """GiB that a program can have."""
    bandwidth: float
    """Memory's bandwidth, TB/s."""


def sold_as(gigabytes: float) -> float:
    """GiB that a program can have of a card that is sold with so many GB.

    A GB is taken as 10^9 bytes, which some makers' are and none's is less, and 3 % of it as the
    driver's and the context's.
    """
    return gigabytes * 0.97 * 1e9 / GIB


CARDS: Mapping[str, Card] = {
    "b300": Card(2250, sold_as(270), 7.7),
    "gb200": Card(2500, sold_as(186), 8.0),
    "b200": Card(2250, sold_as(180), 7.7),
    "gh200": Card(990, sold_as(144), 4.9),
    "h200": Card(989, 139, 4.8),
    "h100": Card(989, 79, 3.35),
    "h100nvl": Card(835, sold_as(94), 3.9),
    "h100pcie": Card(756, 79, 2.0),
    "h20": Card(148, sold_as(96), 4.0),
    "a100": Card(312, 79, 2.04),
    "a100-40gb": Card(312, sold_as(40), 1.56),
    "l40s": Card(362, 44, 0.864),
    "rtxpro6000": Card(504, sold_as(96), 1.79),
    "rtx6000ada": Card(364, sold_as(48), 0.96),
    "rtx5090": Card(209, 31.5, 1.79),
    "rtx4090": Card(165, 23.5, 1.01),
    "rtx3090": Card(71, 23.5, 0.936),
}
"""gh200 is the one of 144 GB, and h100 the SXM module.

The time of a plan follows the rate alone; on cards whose bandwidth is small against it a run takes
longer.
"""
