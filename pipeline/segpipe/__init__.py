"""Exact instance masks of images too large for memory."""

from __future__ import annotations

__version__ = "0.1.0"
