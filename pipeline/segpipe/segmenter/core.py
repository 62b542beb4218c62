"""A network of torch that gives what is wanted of a window."""

from __future__ import annotations

from torch import Tensor, nn

from segpipe.models.network import Network


class Core(nn.Module):
    """A network that gives the logits of a window's core, and not of its halo."""

    def __init__(self, network: Network, halo: int) -> None:
        super().__init__()
        self.network = network
        self.halo = halo

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, H, W) -> logits (N, K, H - 2 halo, W - 2 halo)."""
        return self.network.forward_core(image, self.halo)
