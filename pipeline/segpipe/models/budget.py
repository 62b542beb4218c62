"""The six architectures at one budget: each with about a million parameters."""

from __future__ import annotations

from collections.abc import Mapping

from segpipe.models.network import Parameter

MILLION: Mapping[str, Mapping[str, Parameter]] = {
    "unet": {"width": 12, "depth": 4, "padding": "same", "norm": "batch"},
    "unetplusplus": {"width": 11, "depth": 4, "norm": "batch"},
    "unet3plus": {"width": 12, "depth": 4},
    "resunet": {"width": 23, "depth": 3},
    "mobileunet": {"width": 16},
    "effunet": {"width": 10, "variant": "b1"},
}
"""Architecture -> parameters that give within 10 % of a million weights for 1 channel and 2 outputs.

Depths are the papers', widths what makes the number. All padded, and with batch norm, which the last
four have anyway.
"""
