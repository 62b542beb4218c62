"""The losses by the names that settings give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields

from segpipe.errors import SettingsError
from segpipe.models.card import nearest
from segpipe.training.losses import (
    CrossEntropy,
    Focal,
    InstanceLoss,
    Iou,
    Loss,
    MsSsim,
    SoftDice,
    UNet3PlusLoss,
    UNetPlusPlusLoss,
)

LOSSES: Mapping[str, Callable[..., Loss]] = {
    "instance": InstanceLoss,
    "cross_entropy": CrossEntropy,
    "soft_dice": SoftDice,
    "focal": Focal,
    "ms_ssim": MsSsim,
    "iou": Iou,
    "unetplusplus": UNetPlusPlusLoss,
    "unet3plus": UNet3PlusLoss,
}
"""Name in settings -> builder, whose parameters are the fields of the class."""
WEIGHING = ("instance", "cross_entropy", "unetplusplus")
"""Those that take the weights of pixels."""


def build_loss(name: str, parameters: Mapping[str, bool | float]) -> Loss:
    """The loss of this name.

    Raises
    ------
    SettingsError
        When there is no such loss or parameter, or a value is out of bounds.
    """
    if name not in LOSSES:
        raise SettingsError(
            f"loss.name is {name!r}{nearest(name, LOSSES)}; expected one of {', '.join(LOSSES)}"
        )
    known = {field.name: type(field.default) for field in fields(LOSSES[name])}  # type: ignore[arg-type]
    for key, value in parameters.items():
        if key not in known:
            raise SettingsError(
                f"loss {name} has no parameter {key!r}{nearest(key, known)}; "
                f"it has {', '.join(known) or 'none'}"
            )
        if isinstance(value, bool) != (known[key] is bool):
            wanted = "true or false" if known[key] is bool else "a number"
            raise SettingsError(f"loss.parameters.{key} is {value!r}; expected {wanted}")
    try:
        return LOSSES[name](**parameters)
    except ValueError as error:
        raise SettingsError(f"loss.parameters of {name}: {error}") from error
