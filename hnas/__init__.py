"""Rank the sub-networks of ResNet48 with one supernet: PiNAS on PaddlePaddle."""

__version__ = "1.0.0"
