"""The loss for open_clip, in the place of its ClipLoss: images against texts and texts against images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slr_plugin import SLRLoss, distributed, functional
from slr_plugin.checks import check_flag, check_integer
from slr_plugin.settings import Confidence

__all__ = ["SLRClipLoss"]

DIRECTIONS = ("image_to_text", "text_to_image")


class SLRClipLoss(nn.Module):
    r"""Contrastive loss of images and their texts, called as open_clip's ClipLoss is, which it equals by default.

    The mean of both directions: each image against all texts, each text against all images. With ``confidence=0``,
    value and gradients are ClipLoss's, that of the scale too, for each ``local_loss`` and ``gather_with_grad``. Logits
    are never stored, and with several processes each computes the rows of its own pairs only, whatever ``local_loss``
    says. Nothing of open_clip is imported.

    Features are normalised here, as open_clip's models have done already. The gradient of a feature then has no part
    along it, which ClipLoss leaves to the model's normalisation to drop.

    Args:
        local_loss: with several processes, return the loss of this process's pairs; else the mean over all processes.
        gather_with_grad: with several processes, the features of others get gradients too. Without it DDP's gradient is
            not that of one process with the whole batch, as in ClipLoss.
        cache_labels: not used: there are no labels to cache.
        rank: this process's number.
        world_size: the number of processes. Above 1 all bring equally many pairs.
        use_horovod: must be False.
        confidence: mu >= 0, a number or a schedule ``step -> mu`` that counts calls; each direction refines labels of
            its own, as :class:`slr_plugin.SLRLoss` does. 0 means one-hot labels, or those of the groups.
        sharpening: tau' in (0, 1].
        refined_weight: lambda in [0, 1], the share of the refined label.
        memory_bank_size: ``(n, d)``, a queue for each direction: features of past steps, which are further negatives.
            They lag behind towers that are both trained, open_clip's checkpoints do not hold them, and its
            ``accum_freq`` must be 1 then. 0 for none.

    Attributes:
        criteria: the :class:`slr_plugin.SLRLoss` of each direction, ``"image_to_text"`` and ``"text_to_image"``. Their
            settings may be assigned; their temperature is that of the last call. On one process, at ``confidence=0``
            and without a queue, both directions are computed in one pass, which leaves these alone.

    Raises:
        ValueError: an argument is out of range; ``use_horovod``.
        TypeError: an argument is of the wrong type.

    >>> import torch
    >>> loss = SLRClipLoss()
    >>> images, texts = torch.eye(2).requires_grad_(), torch.eye(2)
    >>> round(loss(images, texts, logit_scale=torch.tensor(1.0)).item(), 4)  # log(1 + 1/e)
    0.3133
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        confidence: Confidence = 0.0,
        sharpening: float = 1.0,
        refined_weight: float = 1.0,
        memory_bank_size: int | Sequence[int] = 0,
    ) -> None:
        super().__init__()
        if check_flag("use_horovod", use_horovod):
            raise ValueError("use_horovod must be False: features are gathered by torch.distributed only")
        self.local_loss = check_flag("local_loss", local_loss)
        self.gather_with_grad = check_flag("gather_with_grad", gather_with_grad)
        self.cache_labels = cache_labels
        self.rank = check_integer("rank", rank, low=0)
        self.world_size = check_integer("world_size", world_size, low=1)
        criteria = {
            direction: SLRLoss(
                1.0,
                memory_bank_size,
                self.world_size > 1,
                sharpening=sharpening,
                confidence=confidence,
                refined_weight=refined_weight,
                symmetric=False,
            )
            for direction in DIRECTIONS
        }
        self.criteria: Any = nn.ModuleDict(criteria)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        groups: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss, a scalar.

        Args:
            image_features: (s, d), normalised here.
            text_features: (s, d), row i belongs to image i.
            logit_scale: 1 / temperature, one value, such as the model's; it gets its gradient.
            logit_bias: must be None.
            output_dict: return ``{"contrastive_loss": loss}``.
            groups: (s,) int64, which pairs belong together, such as the number of the image of which there are several
                captions; negative: alone. Each image's label is then uniform over the texts of its group, and each
                text's over the images. Gathered over processes as the features are.

        Raises:
            ValueError: shapes do not fit, there is a ``logit_bias``, or a queue would meet the batch's own pairs.
            RuntimeError: the process group is not the one that ``rank`` and ``world_size`` say.
        """
        self._check(image_features, text_features, logit_bias)
        several = self.world_size > 1
        # The queues advance together, where one of the towers is not trained too.
        update = torch.is_grad_enabled() and (image_features.requires_grad or text_features.requires_grad)
        # A gathered feature gets the sum of all processes' gradients: that of the sum of their losses, world_size times
        # the mean loss. It is what ClipLoss gives with gather_with_grad, with local_loss or without.
        images, texts = image_features, text_features
        if several and not self.gather_with_grad and not self.local_loss:  # that of the mean loss itself
            images, texts = (torch.lerp(x.detach(), x, 1 / self.world_size) for x in (images, texts))
        image_keys, text_keys = images, texts
        if several and not self.gather_with_grad and self.local_loss:
            image_keys, text_keys = images.detach(), texts.detach()
        if several and not self.local_loss and isinstance(logit_scale, Tensor):
            logit_scale = _mean_over_processes(logit_scale)  # of its gradients: the value is the same everywhere
        temperature = 1 / (_at_least_float32(logit_scale) if isinstance(logit_scale, Tensor) else logit_scale)
        plain = all(
            c.confidence == 0 and c.same_group == "positive" and not len(c.memory_bank) for c in self.criteria.values()
        )
        if plain and not several:  # both directions in one pass
            loss = functional.clip_loss(image_features, text_features, temperature=temperature, groups=groups)
            return {"contrastive_loss": loss} if output_dict else loss
        losses = []
        for criterion, rows, keys in zip(self.criteria.values(), (images, texts), (text_keys, image_keys), strict=True):
            criterion.temperature = temperature
            losses.append(criterion(rows, keys, groups=groups, update=update))
            if isinstance(temperature, Tensor):  # the module keeps no graph alive
                criterion.temperature = temperature.detach()
        loss = (losses[0] + losses[1]) / 2
        if several and not self.local_loss:
            loss = _mean_over_processes(loss)
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        """What says how processes work together, for print(loss)."""
        names = ("local_loss", "gather_with_grad", "rank", "world_size")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _check(self, image_features: Tensor, text_features: Tensor, logit_bias: Tensor | None) -> None:
        if logit_bias is not None:
            raise ValueError(
                "logit_bias must be None: it is SigLIP's, and a softmax does not see it; build the model without "
                "init_logit_bias"
            )
        if image_features.shape != text_features.shape:
            raise ValueError(
                "image_features and text_features must have one shape, got "
                f"{tuple(image_features.shape)} and {tuple(text_features.shape)}"
            )
        if self.world_size > 1:
            here = distributed.rank(), distributed.world_size()
            if here != (self.rank, self.world_size):
                raise RuntimeError(
                    f"the loss has rank={self.rank} and world_size={self.world_size}, but this is process {here[0]} of "
                    f"{here[1]} of torch.distributed; call init_process_group first, or mend the arguments"
                )
        has_queue = len(self.criteria[DIRECTIONS[0]].memory_bank) > 0
        if has_queue and (_is_partly_constant(image_features) or _is_partly_constant(text_features)):
            raise ValueError(
                "memory_bank_size must be 0 where open_clip's accum_freq is above 1: the loss is then called several "
                "times with the same pairs, which would meet themselves in the queue as negatives"
            )


def _mean_over_processes(value: Tensor) -> Tensor:
    """The mean of one value over processes.

    Of losses it hands the gradient on as it came, since every process asks for that of the mean; of equal scales it
    averages the gradient.
    """
    return distributed.gather(value.reshape(1, 1)).mean()


def _at_least_float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _is_partly_constant(features: Tensor) -> bool:
    """Whether features were concatenated from some with a gradient and some without, as in open_clip's accumulation."""
    node = None if torch.compiler.is_compiling() else features.grad_fn
    return type(node).__name__ == "CatBackward0" and any(parent is None for parent, _ in node.next_functions)  # type: ignore[union-attr]
