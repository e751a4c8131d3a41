"""Refined labels in sentence-transformers: a ranking loss, and a callback that keeps its queue and schedule."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slr_plugin import SLRLoss
from slr_plugin.adapters._require import require

require("sentence-transformers", "sentence_transformers", "accelerate", "datasets")

from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input  # noqa: E402
from sentence_transformers.base.losses.merged_forward import embed_columns  # noqa: E402
from sentence_transformers.util import similarity_fct_name  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

DIRECTIONS = ("query_to_doc", "doc_to_query")


class SelfLabelingRankingLoss(CachedLossMixin, nn.Module):  # type: ignore[misc]  # Any to the type checker
    r"""Ranks with in-batch negatives, as MultipleNegativesRankingLoss does, and refines its one-hot labels.

    Columns are anchor, positive and any number of negatives. The labels are those of :class:`slr_plugin.SLRLoss`: a
    share of each anchor's label moves from its positive to the documents that look like it, such as copies of the
    positive. With ``confidence=0`` and no queue, value and gradient are MultipleNegativesRankingLoss's.

    In ``SentenceTransformerTrainer``, add :class:`SelfLabelingCallback` if there is a queue or a schedule.

    Args:
        model: a SentenceTransformer.
        scale: 1 / temperature.
        similarity_fct: None or ``util.cos_sim``: the loss compares by cosine.
        sharpening: as in :class:`slr_plugin.SLRLoss`, and so are ``confidence`` and ``refined_weight``.
        memory_bank_size: the number of past documents that are further negatives, as wide as the first batch's, or
            ``(n, d)``. They are not trained. 0 in MatryoshkaLoss, which changes the width, and in AdaptiveLayerLoss and
            Matryoshka2dLoss, which would enqueue the documents of a batch several times.
        same_group: the data set's column ``label`` holds whole numbers, ids of documents (negative: unknown), and the
            other documents of a pair's id, in the batch and in the queue, are ``"positive"`` too or ``"ignored"``.
        estimator_dim: the column ``label`` holds vectors of this width, such as another model's embeddings of the
            documents, which estimate the labels in the place of the positives.
        gather_across_devices: compare with the documents of all processes: loss and gradient are then those of one
            process with the whole batch. Needs equally large batches: ``dataloader_drop_last=True``.
        directions: ``("query_to_doc",)``, or with ``"doc_to_query"`` the mean of both, each with labels and a queue of
            its own, as MultipleNegativesRankingLoss with ``partition_mode="per_direction"``.
        mini_batch_size: embed so many texts at a time and cache their gradients, as CachedMultipleNegativesRankingLoss.

    Attributes:
        criteria: the :class:`slr_plugin.SLRLoss` of each direction. Their settings may be assigned at any time.

    Raises:
        ValueError: an argument is out of its range, there is another similarity than the cosine, or no ``label``.
        TypeError: an argument is of the wrong type.
    """

    def __init__(
        self,
        model: Any,
        scale: float = 20.0,
        similarity_fct: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        sharpening: float = 1.0,
        confidence: float | Callable[[int], float] = 1.0,
        refined_weight: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        same_group: str | None = None,
        estimator_dim: int | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        mini_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if similarity_fct is not None and similarity_fct_name(similarity_fct) != "cos_sim":
            found = similarity_fct_name(similarity_fct)
            raise ValueError(f"similarity_fct must be None or cos_sim, got {found}: the loss compares by cosine")
        if tuple(directions) not in (DIRECTIONS[:1], DIRECTIONS):
            raise ValueError(f"directions must be {DIRECTIONS[:1]} or {DIRECTIONS}, got {directions!r}")
        if mini_batch_size is not None and has_static_embedding_input(model):
            raise ValueError("mini_batch_size must be None for a StaticEmbedding, whose batches cannot be split")
        if same_group is not None and estimator_dim is not None:
            raise ValueError("the column label holds either ids or features: pass same_group or estimator_dim")
        self.model = model
        self.knowledge = "estimator" if estimator_dim is not None else "groups" if same_group is not None else None
        self.uses_gradient_cache = mini_batch_size is not None
        self.mini_batch_size = mini_batch_size
        self.criteria: Any = nn.ModuleDict()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "memory_bank_size=.* leaves the dimension to the first batch")
            for direction in directions:
                self.criteria[direction] = SLRLoss(
                    1 / scale,
                    memory_bank_size,
                    gather_across_devices,
                    sharpening=sharpening,
                    confidence=confidence,
                    refined_weight=refined_weight,
                    symmetric=False,
                    estimator_dim=estimator_dim if memory_bank_size else None,
                    same_group=same_group or "positive",
                )

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """Embed the columns and compute the loss; ``labels`` is the column ``label``: see ``same_group``."""
        if self.uses_gradient_cache:
            cached: Tensor = self.forward_cached(sentence_features, labels)  # type: ignore[operator]
            return cached
        return self.compute_loss_from_embeddings(embed_columns(self.model, sentence_features), labels)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """Compute the loss of embedded columns; the losses of sparse encoders call it."""
        return self.calculate_loss([[column] for column in embeddings], labels)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """Compute the loss of embedded mini-batches, column by column; the gradient caching calls it."""
        if self.knowledge and labels is None:
            raise ValueError("same_group and estimator_dim need a column 'label' in the data set, of ids or features")
        known = {self.knowledge: labels} if self.knowledge else {}
        anchors, positives, *negatives = (torch.cat(column) for column in reps)
        further = torch.cat(negatives) if negatives else None
        losses = [self.criteria["query_to_doc"](anchors, positives, negatives=further, **known)]
        if "doc_to_query" in self.criteria:
            losses.append(self.criteria["doc_to_query"](positives, anchors, **known))
        loss = torch.stack(losses).mean()
        if with_backward:
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach() if with_backward else loss

    def get_config_dict(self) -> dict[str, Any]:
        """The settings, for the model card."""
        criterion = self.criteria["query_to_doc"]
        confidence = criterion.confidence
        return {
            "scale": 1 / float(criterion.temperature),
            "similarity_fct": "cos_sim",
            "sharpening": criterion.sharpening,
            "confidence": repr(confidence) if callable(confidence) else confidence,
            "refined_weight": criterion.refined_weight,
            "memory_bank_size": len(criterion.memory_bank),
            "same_group": criterion.same_group if self.knowledge == "groups" else None,
            "gather_across_devices": criterion.gather_distributed,
            "directions": tuple(self.criteria),
            "mini_batch_size": self.mini_batch_size,
        }

    @property
    def citation(self) -> str:
        """The paper, for the model card."""
        return """
@inproceedings{zhou2021theory,
    title={A Theory-Driven Self-Labeling Refinement Method for Contrastive Representation Learning},
    author={Zhou, Pan and Xiong, Caiming and Yuan, Xiao-Tong and Hoi, Steven},
    booktitle={Advances in Neural Information Processing Systems},
    year={2021}
}
"""


class SelfLabelingCallback(TrainerCallback):  # type: ignore[misc]  # Any to the type checker
    """Keeps the queue and the schedule of a trainer's losses in its checkpoints, and logs what the labels are like.

    ``trainer.add_callback(SelfLabelingCallback(trainer))`` is all. The losses' queues and steps, which the trainer does
    not save, go into ``checkpoint-N/slr_loss.pt``, and are read where training is resumed: from ``output_dir``, or from
    the training arguments' ``resume_from_checkpoint``. The schedule follows the trainer's ``global_step``, whatever the
    gradient accumulation. Means of :attr:`slr_plugin.SLRLoss.stats` are logged as ``slr/positive_weight`` and so on.

    Without ``gather_across_devices`` every process has a queue of its own; that of process 0 is saved.

    Args:
        trainer: a SentenceTransformerTrainer. Its loss may be one in a MatryoshkaLoss, or a dict of losses.

    Raises:
        ValueError: at the start of training there is no SLRLoss, or the checkpoint is of other losses.
    """

    FILE = "slr_loss.pt"

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._hooks: list[Any] = []

    def criteria(self) -> dict[str, SLRLoss]:
        """Every SLRLoss in the trainer's losses, by its path."""
        losses = self.trainer.loss if isinstance(self.trainer.loss, dict) else {"loss": self.trainer.loss}
        modules = ((f"{name}.{path}", module) for name, loss in losses.items() for path, module in loss.named_modules())
        return {path: module for path, module in modules if isinstance(module, SLRLoss)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the losses of a run that is resumed; follow their calls."""
        self.on_train_end(args, state, control)
        criteria = self.criteria()
        if not criteria:
            raise ValueError(f"{type(self.trainer.loss).__name__} has no slr_plugin.SLRLoss: remove the callback")
        if state.global_step:
            self._restore(criteria, args, state)
        for criterion in criteria.values():
            self._hooks.append(criterion.register_forward_pre_hook(self._place))
            self._hooks.append(criterion.register_forward_hook(self._track))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the losses into the checkpoint that the trainer has just written."""
        if args.should_save:
            states = {path: criterion.state_dict() for path, criterion in self.criteria().items()}
            torch.save(states, self._folder(args, state) / self.FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the losses."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _place(self, criterion: SLRLoss, inputs: Any) -> None:
        """Place the schedule at the trainer's step: calls do not count steps."""
        criterion.set_step(self.trainer.state.global_step)

    def _track(self, criterion: SLRLoss, inputs: Any, output: Any) -> None:
        self.trainer.track_loss_components({f"slr/{name}": value for name, value in criterion.stats.items()})

    def _restore(self, criteria: dict[str, SLRLoss], args: Any, state: Any) -> None:
        told = args.resume_from_checkpoint
        file = (Path(told) if isinstance(told, str) else self._folder(args, state)) / self.FILE
        if not file.is_file():
            warnings.warn(
                f"there is no {file}: the queue starts afresh; if the checkpoint lies elsewhere, set "
                "resume_from_checkpoint of the training arguments to its folder too",
                stacklevel=2,
            )
            return
        states = torch.load(file, map_location="cpu", weights_only=True)
        if states.keys() != criteria.keys():
            raise ValueError(f"{file} is of the losses {sorted(states)}, the trainer has {sorted(criteria)}")
        for path, criterion in criteria.items():
            criterion.load_state_dict(states[path])

    @staticmethod
    def _folder(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"
