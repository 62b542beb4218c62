"""How far a network looks: its context, and the halo that follows from it.

The *context* is the least number of pixels around a core that the network must see for the core's
output to be that of the whole image:

        context        core: `stride` pixels from a multiple       context
    |<------------>|   of the stride to just before the next   |<------------>|
    |..............|###########################################|..............|

It is measured, not given. On a copy of the network whose every path carries a positive weight the
gradient of the core's outputs with respect to the input is nonzero exactly where the network looks.
Max-pool is replaced by average pool: the maximum passes the gradient to one pixel of four and so
hides reach. Batch norm in eval mode and biases reach nowhere: identity and zero. What looks at the
whole window (`WholeWindow`) has no context, and its network is not exact; it is left out, so that
the context is that of the network's other operations.

For a U-Net of depth d with two 3x3 convolutions a level and 2x2 up-convolutions the context is
6 * 2^d - 2 (from d = 2 on; 8 at d = 1). Weaker measures are wrong: the best single output pixel
looks 6 * 2^d - 4 to each side, which is the 92 px of the paper at d = 4; the others look further.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from segpipe.errors import ModelError
from segpipe.geometry import ceil_to
from segpipe.models.geometry import ModelGeometry
from segpipe.models.network import Network, WholeWindow

LARGEST_INPUT = 256
"""Strides at which the search for the end of a network's reach gives up."""


def measure_geometry(network: Network) -> ModelGeometry:
    """Context, halo and the rest of a network; give it the narrow twin of a wide one."""
    reach = context(network)
    return ModelGeometry(
        context=reach,
        halo=halo(network, reach),
        stride=network.stride,
        margin=network.margin,
        smallest=next_admissible(network, 1),
        exact=network.exact,
    )


def context(network: Network) -> int:
    """Pixels that the network needs around a core; see the drawing at the top of the module.

    Give it the narrow twin of a wide network (`build_twin`): the answer is the same.

    Raises
    ------
    ModelError
        When the reach has no end, as with global pooling or attention.
    """
    twin = _carry_everywhere(network)
    return min(_context_at(twin, phase) for phase in _phases(network))


def halo(network: Network, context: int) -> int:
    """Pixels to read around a core: at least the context, so that every window is admissible.

    A padded network gets the context rounded up to the stride, so that windows, like cores, begin
    at multiples of it. An unpadded one gets the least number for which core + 2 halo is admissible
    and whose phase (where the core begins on the output's lattice of pooling cells) is one at
    which that many pixels are enough: 94 at depth 4, not 102.

    Raises
    ------
    ModelError
        When an unpadded network has no such halo.
    """
    if network.margin == 0:
        return ceil_to(context, network.stride)
    twin = _carry_everywhere(network)
    first = max(context, network.margin)
    for candidate in range(first, first + 2 * network.stride):
        phase = (candidate - network.margin) % network.stride
        if _takes_halo(network, candidate) and _context_at(twin, phase) <= candidate:
            return candidate
    raise ModelError(f"no halo from {first} pixels on gives windows that this network takes")


def next_admissible(network: Network, size: int) -> int:
    """The smallest admissible size that is at least `size`.

    Raises
    ------
    ModelError
        When there is none within the margin and two strides.
    """
    for candidate in range(size, size + 2 * (network.margin + network.stride) + 1):
        if network.admissible(candidate):
            return candidate
    raise ModelError(f"this network takes no input of about {size} pixels")


def _takes_halo(network: Network, halo: int) -> bool:
    """Whether core + 2 halo is admissible whatever multiple of the stride the core is."""
    return all(network.admissible(core * network.stride + 2 * halo) for core in (1, 2, 3, 64))


def _phases(network: Network) -> list[int]:
    """Where, modulo the stride, a core may begin in the output of an admissible window."""
    if network.margin == 0:
        return [0]
    halos = range(network.margin, network.margin + network.stride)
    phases = [halo - network.margin for halo in halos if _takes_halo(network, halo)]
    if not phases:
        raise ModelError("no core that is a multiple of the stride fits this network")
    return phases


def _context_at(twin: Network, phase: int) -> int:
    """Context of a core of one stride that begins at `phase` of the output's lattice."""
    size = next_admissible(twin, 16 * twin.stride)
    while size <= LARGEST_INPUT * twin.stride:
        lattice = (size - 2 * twin.margin) // twin.stride
        start = phase + twin.stride * (lattice // 2)
        core = start + twin.margin, start + twin.margin + twin.stride  # in the input's pixels
        seen = [_seen_along(twin, axis, size, start) for axis in (-2, -1)]
        first, last = min(first for first, _ in seen), max(last for _, last in seen)
        if first > 0 and last < size - 1:
            return max(core[0] - first, last + 1 - core[1])
        size = next_admissible(twin, 2 * size)
    raise ModelError(
        f"the network looks further than {LARGEST_INPUT // 2} strides; "
        "global pooling and attention have no context, and cannot be tiled exactly"
    )


def _seen_along(twin: Network, axis: int, size: int, start: int) -> tuple[int, int]:
    """First and last pixel along `axis` that outputs [start, start + stride) see."""
    shape = [1, twin.channels, *[next_admissible(twin, 1)] * 2]  # a strip: the reach is the same
    shape[axis] = size
    # tiny input: sums over residual paths stay below the bend of ReLU6 and the tails of SiLU
    image = torch.full(shape, 1e-6, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        output = twin(image).narrow(axis, start, twin.stride)
        (gradient,) = torch.autograd.grad(output.sum(), image)
    pixels = (gradient.movedim(axis, 0).flatten(1) != 0).any(dim=1).nonzero()
    return int(pixels.min()), int(pixels.max())


class _First(nn.Module):
    """Its first argument."""

    def forward(self, image: Tensor, *_: Tensor) -> Tensor:
        return image


def _carry_everywhere(network: Network) -> Network:
    """A float64 copy in which no path from input to output carries zero.

    Each kernel sums to at most a few, so that a path through 50 convolutions neither overflows nor
    vanishes: (1/9)^50 is 1e-48, far above the least double.
    """
    twin = copy.deepcopy(network).cpu().double().eval()
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                if child.dilation not in (1, (1, 1)):
                    raise ModelError("a dilated max-pool has no average to stand in for it")
                pool = nn.AvgPool2d(child.kernel_size, child.stride, child.padding, child.ceil_mode)
                setattr(module, name, pool)
            elif isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
            elif isinstance(child, WholeWindow) and not network.exact:
                setattr(module, name, _First())
    with torch.no_grad():
        for parameter in twin.parameters():
            kernel = parameter.dim() > 1
            parameter.fill_(parameter.shape[0] / parameter.numel() if kernel else 0)
    return twin
