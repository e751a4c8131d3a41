"""Steps that a CUDA graph repeats: small networks keep a GPU waiting for the next of a thousand launches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording, in which libraries and optimizers set themselves up


class Recorded:
    """A function of tensors on a GPU that is recorded in its fourth call and repeated from then on.

    All calls must be made in one stream, which is not the default one.

    Args:
        function: changes tensors in place, reads no value from the device, and takes tensors (or None) of equal shapes.
        generator: where its random numbers come from.
    """

    def __init__(self, function: Callable[..., Tensor], generator: torch.Generator) -> None:
        self.function = function
        self.generator = generator
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Call the function; returns a tensor of the caller's own."""
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.function(*inputs)
        if self.graph is None:
            self._record(inputs)
        for buffer, value in zip(self.inputs, inputs, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value)
        assert self.graph is not None
        self.graph.replay()
        return self.output.clone()

    def _record(self, inputs: tuple[Tensor | None, ...]) -> None:
        """Record a call, which computes nothing yet."""
        self.inputs = [None if value is None else value.clone() for value in inputs]
        self.graph = torch.cuda.CUDAGraph()
        self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self.output = self.function(*self.inputs)
