"""The loss for open_clip, in the place of its ClipLoss: images against texts and texts against images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slr_plugin import SLRLoss, distributed, functional
from slr_plugin.settings import Confidence

__all__ = ["SLRClipLoss"]


class SLRClipLoss(nn.Module):
    r"""Contrastive loss of images and their texts, called as open_clip's ClipLoss is, which it equals by default.

    The mean of both directions: each image against all texts, each text against all images. With ``confidence=0``,
    value and gradients are ClipLoss's, that of the scale too, for each ``local_loss`` and ``gather_with_grad``. Logits
    are never stored, and each process computes the rows of its own pairs only. Nothing of open_clip is imported.

    Features are normalised here too, so their gradient has no part along them, which the model's normalisation drops.

    Args:
        local_loss: with several processes, return the loss of this process's pairs; else the mean over all processes.
        gather_with_grad: with several processes, the features of others get gradients too. Without it DDP's gradient is
            not that of one process with the whole batch, as in ClipLoss.
        cache_labels: not used, and neither is ``rank``.
        rank: see there.
        world_size: the number of processes. Above 1 all bring equally many pairs.
        use_horovod: must be False.
        confidence: as in :class:`slr_plugin.SLRLoss`, for each direction, and so are ``sharpening`` and
            ``refined_weight``. 0 means one-hot labels, or those of the groups.
        memory_bank_size: ``(n, d)``, a queue for each direction, whose features lag behind towers that are both
            trained. open_clip's checkpoints do not hold it, and its ``accum_freq`` must be 1: the loss is else called
            several times with the same pairs, which meet themselves in the queue.

    Attributes:
        criteria: the :class:`slr_plugin.SLRLoss` of each direction, ``"image_to_text"`` and ``"text_to_image"``, whose
            settings may be assigned. On one process, at ``confidence=0`` and without a queue, they are not called.

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
        if use_horovod:
            raise ValueError("use_horovod must be False: features are gathered by torch.distributed only")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.rank = rank
        self.world_size = world_size
        self.criteria: Any = nn.ModuleDict()
        for direction in ("image_to_text", "text_to_image"):
            self.criteria[direction] = SLRLoss(
                1.0,
                memory_bank_size,
                world_size > 1,
                sharpening=sharpening,
                confidence=confidence,
                refined_weight=refined_weight,
                symmetric=False,
            )

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
            image_features: (s, d)
            text_features: (s, d), row i belongs to image i.
            logit_scale: 1 / temperature, one value, such as the model's; it gets its gradient.
            logit_bias: must be None.
            output_dict: return ``{"contrastive_loss": loss}``.
            groups: (s,) int64, which pairs belong together, such as the number of the image of which there are several
                captions; negative: alone. Labels are then uniform over the group, in all processes.

        Raises:
            ValueError: shapes do not fit, or there is a ``logit_bias``.
        """
        if logit_bias is not None:
            raise ValueError("logit_bias must be None: it is SigLIP's; build the model without init_logit_bias")
        if isinstance(logit_scale, Tensor):
            logit_scale = logit_scale.to(torch.promote_types(logit_scale.dtype, torch.float32))
        several, criteria = self.world_size > 1, self.criteria.values()
        if not several and all(_is_plain(criterion) for criterion in criteria):
            loss = functional.clip_loss(image_features, text_features, temperature=1 / logit_scale, groups=groups)
            return {"contrastive_loss": loss} if output_dict else loss

        # The queues advance together, where one of the towers is not trained too.
        update = torch.is_grad_enabled() and (image_features.requires_grad or text_features.requires_grad)
        # A gathered feature gets the sum of all processes' gradients: that of the sum of their losses, world_size times
        # the mean loss. It is what ClipLoss gives with gather_with_grad, with local_loss or without.
        rows = keys = [image_features, text_features]
        if several and not self.gather_with_grad and self.local_loss:
            keys = [features.detach() for features in rows]
        elif several and not self.gather_with_grad:  # that of the mean loss itself
            rows = keys = [torch.lerp(features.detach(), features, 1 / self.world_size) for features in rows]
        is_mean = several and not self.local_loss
        if is_mean and isinstance(logit_scale, Tensor):
            logit_scale = _mean_over_processes(logit_scale)  # of its gradients: the value is the same everywhere
        losses = []
        for criterion, of_one_side, of_the_other in zip(criteria, rows, reversed(keys), strict=True):
            criterion.temperature = 1 / logit_scale
            losses.append(criterion(of_one_side, of_the_other, groups=groups, update=update))
            if isinstance(logit_scale, Tensor):  # the module keeps no graph alive
                criterion.temperature = criterion.temperature.detach()
        loss = torch.stack(losses).mean()
        if is_mean:
            loss = _mean_over_processes(loss)
        return {"contrastive_loss": loss} if output_dict else loss


def _is_plain(criterion: SLRLoss) -> bool:
    """Whether labels are one-hot or those of groups, over the batch alone."""
    return criterion.confidence == 0 and criterion.same_group == "positive" and not len(criterion.memory_bank)


def _mean_over_processes(value: Tensor) -> Tensor:
    """The mean over processes; hands the gradient of a mean loss on as it came, and averages that of equal scales."""
    return distributed.gather(value.reshape(1, 1)).mean()
