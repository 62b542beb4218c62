"""Which channels of a slide a model reads."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from segpipe.slide.slide import Slide
from segpipe.slide.source import printable, unusable

_LISTED_CHANNELS = 12


def select_channels(
    slide: Slide, wanted: Sequence[str | int] | None, needed: int
) -> tuple[int, ...]:
    """Numbers of the channels that a model of `needed` channels reads, in its order.

    Parameters
    ----------
    wanted
        Names or 0-based numbers, as `--channel` gives them. A name is matched first as it is, then
        regardless of case; a string that is no name and has only digits is a number. None takes
        all channels if there are as many as needed.

    Raises
    ------
    InputError
        When the channels do not fit the model, or one does not exist or is named twice over.
    """
    count = slide.shape[0]
    if wanted is not None:
        names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
        chosen = tuple(_find_channel(slide, name) for name in names)
        if len(chosen) == needed:
            return chosen
        what = f"the model reads {_channels(needed)} and --channel gives {len(chosen)}"
        raise unusable(slide.path, what, f"give --channel {needed} of {_listed(slide)}")
    if count == needed:
        return tuple(range(count))
    kind = "an RGB image" if slide.rgb else f"an image of {_channels(count)}"
    what = f"is {kind}, and the model reads {_channels(needed)}"
    if needed < count:
        times = "" if needed == 1 else f" {needed} times"
        raise unusable(slide.path, what, f"pick from {_listed(slide)} with --channel{times}")
    raise unusable(slide.path, what, f"choose a model of {_channels(count)} with -m")


def _find_channel(slide: Slide, wanted: str | int) -> int:
    names = slide.channel_names
    text = str(wanted)
    if isinstance(wanted, str):
        exact = [number for number, name in enumerate(names) if name == text]
        alike = [number for number, name in enumerate(names) if name.lower() == text.lower()]
        found = exact or alike
        if len(found) == 1:
            return found[0]
        if found:
            what = f"has {len(found)} channels named {printable(text)}"
            raise unusable(slide.path, what, f"give the number of one of {_listed(slide)}")
    if text.isdecimal() and len(text) < 10 and int(text) < len(names):
        return int(text)
    near = difflib.get_close_matches(text.lower(), [name.lower() for name in names], 1, 0.5)
    meant = [name for name in names if near and name.lower() == near[0]]
    hint = f"did you mean {printable(meant[0])}? " if meant else ""
    raise unusable(
        slide.path, f"has no channel {printable(text)}", f"{hint}it has {_listed(slide)}"
    )


def _channels(count: int) -> str:
    return "1 channel" if count == 1 else f"{count} channels"


def _listed(slide: Slide) -> str:
    return list_channels(slide.channel_names)


def list_channels(names: Sequence[str]) -> str:
    """Numbers and names of channels on one line; of many, the first.

    >>> list_channels(("DAPI", "1"))
    '0 (DAPI), 1'
    """
    listed = [
        str(number) if name == str(number) else f"{number} ({printable(name, 40)})"
        for number, name in enumerate(names[:_LISTED_CHANNELS])
    ]
    more = len(names) - len(listed)
    return ", ".join(listed) + (f" and {more} more" if more else "")
