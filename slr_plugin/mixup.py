"""Momentum mixup, equation (8): virtual queries from a query and another image's positive."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slr_plugin.checks import check_float_tensor, check_index_tensor, check_number, check_values


class Mix(NamedTuple):
    """How a minibatch was mixed: ``mixed[i] = theta[i] * queries[i] + (1 - theta[i]) * positives[partner[i]]``."""

    theta: Tensor  #: (s,) in [0, 1]
    partner: Tensor  #: (s,) int64 in [0, s)


class MomentumMixup:
    r"""Mixes each query with the positive view of another image of the minibatch.

    ::

        mixed[i] = θ[i] · queries[i] + (1 - θ[i]) · positives[partner[i]],     θ[i] ~ Beta(κ, κ)

    The partners are a random permutation of the minibatch, which may leave some samples in their place.
    Momentum mixup differs from vanilla mixup in that the second view is the *positive*, what the momentum network sees.
    Give ``mixed`` to the trained network, and its output together with ``mix`` to :class:`slr_plugin.SLRLoss`.

    Args:
        kappa: κ in [1e-8, 1e8]. At 2, most mixtures hold a good part of both; at 0.1, most are nearly one of the two.
            The paper takes 2 on CIFAR-10 and 0.1 on ImageNet.
        mode: ``"elem"`` draws one theta per sample, ``"batch"`` one per minibatch.
        generator: source of randomness; ``None`` is the global one of the samples' device. Another device's generator
            draws there and the draws are copied. Under DDP all processes often share their seed: give each its own
            generator, else all mix alike. The workers of a data loader get a copy each: there leave it out, since
            torch seeds every worker's global one.

    Raises:
        ValueError: ``kappa`` or ``mode`` is out of range.
        TypeError: ``kappa`` is not a number, or ``generator`` is not a ``torch.Generator``.

    >>> import torch
    >>> mixup = MomentumMixup(kappa=2.0)
    >>> x0, x1 = torch.zeros(4, 3, 8, 8), torch.ones(4, 3, 8, 8)
    >>> mixed, mix = mixup(x0, x1)
    >>> torch.allclose(mixed[:, 0, 0, 0], 1 - mix.theta)
    True
    """

    def __init__(self, kappa: float = 1.0, mode: str = "elem", generator: torch.Generator | None = None) -> None:
        self.kappa = kappa
        self.mode = mode
        self.generator = generator

    def __setattr__(self, name: str, value: Any) -> None:
        """Check a setting, here and wherever it is assigned later."""
        if name == "kappa":
            value = check_number("kappa", value, low=1e-8, high=1e8)
        elif name == "mode" and value not in ("elem", "batch"):
            raise ValueError(f'mode must be "elem" or "batch", got {value!r}')
        elif name == "generator" and not isinstance(value, torch.Generator | None):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(value).__name__}")
        super().__setattr__(name, value)

    def __call__(
        self,
        queries: Tensor,
        positives: Tensor,
        theta: Tensor | float | None = None,
        partner: Tensor | None = None,
    ) -> tuple[Tensor, Mix]:
        """Mix two views of the same minibatch. One sample alone is its own partner.

        Args:
            queries: (s, ...) floating point tensor of any kind: images, audio, EEG, tabular.
            positives: the other view, of the same shape, dtype and device.
            theta: instead of a draw: (s,), or one number for all, in [0, 1].
            partner: instead of a draw: (s,) int64 in [0, s).

        Returns:
            ``mixed`` of the inputs' shape and dtype, and the :class:`Mix` that made it. ``mix.theta`` has the inputs'
            dtype, so that it is exactly the weight applied.

        Raises:
            ValueError: shapes differ, the batch is empty, or ``theta`` or ``partner`` does not fit.
            TypeError: a tensor has the wrong dtype.
        """
        for name, view in (("queries", queries), ("positives", positives)):
            check_float_tensor(name, view, "call .float() on whole-number samples; class labels are not mixed")
        kinds = [(tuple(view.shape), view.dtype, str(view.device)) for view in (queries, positives)]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"queries and positives must have one shape, dtype and device, got {kinds[0]} and {kinds[1]}; crops of "
                "another size need a positive of that size"
            )
        if queries.ndim == 0 or len(queries) == 0:
            raise ValueError(f"queries must hold at least one sample, got shape {tuple(queries.shape)}")
        size = len(queries)
        mix = Mix(
            theta=(self._draw_theta(queries) if theta is None else _as_theta(theta, queries)).to(queries),
            partner=self._draw_partner(queries) if partner is None else partner,
        )
        check_mix(mix, size)
        weight = mix.theta.view(-1, *[1] * (queries.ndim - 1))
        mix = Mix(mix.theta, mix.partner.to(queries.device, torch.int64))
        return positives[mix.partner].lerp_(queries, weight), mix

    def _draw_theta(self, queries: Tensor) -> Tensor:
        count = len(queries) if self.mode == "elem" else 1
        device = queries.device if self.generator is None else self.generator.device
        dtype = torch.promote_types(queries.dtype, torch.float32)
        u, v = torch.rand(2, count, generator=self.generator, device=device, dtype=dtype)
        # With n = 2 kappa, T = sqrt(n (u^(-2/n) - 1)) cos(2 pi v) has Student's t distribution of n degrees of freedom
        # (Bailey, "Polar generation of random variates with the t-distribution", 1994). With x = T / sqrt(n),
        # (1 + x / sqrt(1 + x^2)) / 2 is then Beta(n/2, n/2), and its logit is 2 asinh(x). Where kappa is small, the
        # usual ratio of gamma variates is 0 / 0; here x becomes large, which makes theta 0 or 1.
        stretch = torch.expm1(-torch.log1p(-u) / self.kappa).clamp(max=torch.finfo(dtype).max)  # no inf * 0 below
        x = stretch.sqrt() * torch.cos(2 * math.pi * v)
        return torch.sigmoid(2 * torch.asinh(x)).expand(len(queries))

    def _draw_partner(self, queries: Tensor) -> Tensor:
        device = queries.device if self.generator is None else self.generator.device
        return torch.randperm(len(queries), generator=self.generator, device=device)

    def __repr__(self) -> str:
        return f"MomentumMixup(kappa={self.kappa}, mode={self.mode!r})"


def check_mix(mix: Mix, size: int, name: str = "") -> None:
    """Raise ValueError or TypeError, naming the field, unless ``mix`` describes a minibatch of ``size`` samples."""
    theta, partner = mix
    check_float_tensor(f"{name}theta", theta)
    check_index_tensor(f"{name}partner", partner)
    for field, value in zip(Mix._fields, mix, strict=True):
        if value.shape != (size,):
            raise ValueError(f"{name}{field} must have shape ({size},), one per sample, got {tuple(value.shape)}")
    check_values(f"{name}theta", theta, 0.0, 1.0)
    check_values(f"{name}partner", partner, 0, size - 1)


def _as_theta(theta: Tensor | float, queries: Tensor) -> Tensor:
    if not isinstance(theta, Tensor):
        theta = queries.new_full((), check_number("theta", theta, low=0.0, high=1.0))
    check_float_tensor("theta", theta)
    return theta.expand(len(queries)) if theta.ndim == 0 else theta
