"""The methods that are compared, as one table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightly.loss
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.representations import baselines
from benchmarks.representations.features import LABELLED, PURITIES, TOLD, clusters, generator
from benchmarks.representations.objectives import (
    DIM,
    Bootstrap,
    Classified,
    Grouped,
    Momentum,
    NearestNeighbour,
    Objective,
    Oracle,
    PartlyClassified,
    Plain,
    Regressed,
    Setup,
    Siamese,
    Supervised,
)
from slr_plugin import CosineConfidence, SLRLoss
from slr_plugin.presets import CIFAR10

# What a step costs, in passes of a batch through the encoder: a forward pass counts 1, its backward pass 2.
FORWARD, TRAINED = 1, 3
PLAIN = TRAINED + FORWARD
MIXED = 2 * TRAINED + FORWARD
TWO_VIEWS = 2 * TRAINED
BOOTSTRAP = TWO_VIEWS + 2 * FORWARD
COLD = 0.1  # lightly's temperature for DCL, half the paper's
CLUSTERS = 100  # of a teacher's features
KNOWN = (1, 5, 20)  # per cent of the images whose class is told

STRONG = ("query", "key", "strong")
WEAK = ("query", "weak")  # the key network sees weakly augmented images, as in ReSSL and SCE


FEATURE_WORDS = {
    "pixels": "pixels",
    "gradients": "histograms of gradients",
    "half-gradients": "histograms of gradients of the images with half of their pixels a side",
    "imagenet": "a network that was trained on ImageNet and sees 96 pixels",
    "guesses": f"the guesses of a classifier of these, from {LABELLED} labelled images",
    "drawn-guesses": f"the guesses of such a classifier, whose {LABELLED} images are drawn for every seed",
    "classes": "the classes",
    **{f"classes-{percent}": f"classes that are right for {percent} % of the pairs" for percent in PURITIES},
}
# Features that a budget's encoders do not see, and that are gone in use.
ABSENT_IN_USE = {"imagenet": "the teacher's features", "gradients": FEATURE_WORDS["gradients"]}


@dataclass(frozen=True)
class Method:
    """One entry of the comparison."""

    summary: str
    build: Callable[[Setup], Objective]
    passes: int  # per step, see FORWARD and TRAINED
    views: tuple[str, ...] = ("query", "key")  # see benchmarks.representations.data
    stretch: float = 1.0  # trains so many times the budget's epochs
    features: str = ""  # of benchmarks.representations.features: what labels are estimated from; "": the positives
    trains: bool = True  # otherwise these features themselves are judged
    teacher: str = ""  # or of a network that this method trained before, with the same seed, views and learning rate


def _method(summary: str, criterion: Callable[[Setup], nn.Module], mixed: bool, **options: Any) -> Method:
    """Queries against the keys of the momentum network; options are Momentum's or Method's."""
    how = {name: options.pop(name) for name in ("vanilla", "mixed_only") if name in options}
    return Method(
        summary,
        lambda setup: Momentum(
            criterion(setup), CIFAR10.mixup(setup.mixing) if mixed else None, estimator=setup.estimator, **how
        ),
        MIXED if mixed and not how.get("mixed_only") else PLAIN,
        **options,
    )


def _slr_loss(settings: dict[str, Any]) -> Callable[[Setup], nn.Module]:
    """The paper's CIFAR-10 settings, overridden."""

    def criterion(setup: Setup) -> nn.Module:
        overrides = {"memory_bank_size": setup.queue} | _scheduled(settings, setup.total_steps)
        if setup.estimators is not None and overrides["memory_bank_size"]:
            overrides["estimator_dim"] = setup.estimators.shape[1]
        return CIFAR10.loss(DIM, setup.total_steps, **overrides)

    return criterion


def _slr(summary: str, mixed: bool, settings: dict[str, Any], **options: Any) -> Method:
    """The method, or parts of it, as in the paper."""
    return _method(summary, _slr_loss(settings), mixed, **options)


def _soft(
    summary: str, mixed: bool, labeler: baselines.Labeler, settings: dict[str, Any] | None = None, **options: Any
) -> Method:
    """The same with other labels."""
    defaults = {
        "temperature": CIFAR10.temperature,
        "confidence": CIFAR10.confidence,
        "refined_weight": CIFAR10.refined_weight,
    }

    def criterion(setup: Setup) -> nn.Module:
        scheduled = _scheduled(defaults | (settings or {}), setup.total_steps)
        return baselines.SoftLabelLoss(setup.queue, labeler, **scheduled)

    return _method(summary, criterion, mixed, **options)


def _oracle(purity: float, sharpening: float, own_weight: float = 0.5) -> Method:
    """Labels that are told the classes."""
    temperature = CIFAR10.temperature * sharpening
    part = "half the label" if own_weight else "all of the label"
    return Method(
        f"{part} q's, tau' {sharpening}, {purity:.0%} of it on the own class",
        lambda setup: Oracle(setup, purity, temperature, own_weight),
        MIXED,
    )


def _scheduled(settings: dict[str, Any], total_steps: int) -> dict[str, Any]:
    """Settings with a pair (m1, m2) as the schedule of the confidence."""
    confidence = settings.get("confidence")
    if isinstance(confidence, tuple):
        return settings | {"confidence": CosineConfidence(*confidence, total_steps)}
    return settings


def _both(summary: str, criterion: Callable[[Setup], nn.Module], mixed: bool = False, **options: Any) -> Method:
    """Both views are trained, without a queue and a momentum network."""
    return Method(
        summary,
        lambda setup: Siamese(criterion(setup), CIFAR10.mixup(setup.mixing) if mixed else None, setup.estimator),
        TWO_VIEWS + TRAINED * mixed,
        **options,
    )


def _told(summary: str, build: Callable[[Tensor], Objective], features: str) -> Method:
    """Both views are trained on what is known of the images, (n, e)."""

    def told(setup: Setup) -> Objective:
        assert setup.estimators is not None
        return build(setup.estimators)

    return Method(summary, told, TWO_VIEWS, features=features)


def _alone(name: str) -> Method:
    return Method(f"untrained: {FEATURE_WORDS[name]}", _nothing, 0, features=name, trains=False)


def _nothing(setup: Setup) -> Objective:
    raise TypeError("nothing is trained")


def _is_told(share: float, known: Tensor) -> Tensor:
    return (torch.rand(len(known), generator=generator(0)) < share).to(known.device)


def _burst(summary: str, same_group: str) -> Method:
    """One-hot labels over batch and queue, told which images are copies of one."""

    def build(setup: Setup) -> Objective:
        assert setup.estimators is not None
        copied = setup.estimators.unique(dim=0, return_inverse=True)[1]  # (n,) the image that each is a copy of
        criterion = _slr_loss(ONE_HOT | {"same_group": same_group})(setup._replace(estimators=None))
        return Momentum(criterion, estimator=lambda batch: {"groups": copied[batch.index]})

    return Method(summary, build, PLAIN, features="copies")


def _partly_grouped(share: float, known: Tensor) -> Objective:
    return Grouped(SLRLoss(COLD, confidence=0.0), known.argmax(1).where(_is_told(share, known), -1))


def _partly_classified(share: float, known: Tensor) -> Objective:
    return PartlyClassified(lightly.loss.NTXentLoss(COLD), known * _is_told(share, known)[:, None])


def _cluster_targets(known: Tensor) -> Tensor:
    return F.one_hot(clusters(known, CLUSTERS)).float()


def _moco(summary: str, temperature: float = CIFAR10.temperature, **options: Any) -> Method:
    return _method(summary, lambda setup: lightly.loss.NTXentLoss(temperature, setup.queue), mixed=False, **options)


def _neighbour_loss(attracts: bool, setup: Setup) -> nn.Module:
    return baselines.NeighbourLoss(setup.queue, CIFAR10.temperature, attracts)


ONE_HOT: dict[str, Any] = {"confidence": 0.0}
COLD_BATCH: dict[str, Any] = {"memory_bank_size": 0, "temperature": COLD}
SHARP: dict[str, Any] = {"sharpening": 0.25, "confidence": (0.5, 10.0)}
# Labels that are the estimator's similarities alone, with no one-hot part but what p gives the positive.
WHOLE: dict[str, Any] = {"refined_weight": 1.0, "confidence": 1000.0, "sharpening": 0.5}
WHOLE_BATCH: dict[str, Any] = COLD_BATCH | WHOLE | {"sharpening": 1.0}
P, Q = (baselines.one_estimator(which, CIFAR10.temperature * CIFAR10.sharpening) for which in "pq")

METHODS: dict[str, Method] = {
    "moco": _moco("MoCo v2, lightly's NTXentLoss"),
    "moco-longer": _moco("the same, as many passes as SANE", stretch=MIXED / PLAIN),
    "simclr": _both("SimCLR, lightly's NTXentLoss", lambda setup: lightly.loss.NTXentLoss(0.5)),
    "dcl": _both("lightly's DCLLoss", lambda setup: lightly.loss.DCLLoss(COLD)),
    "nnclr": Method("NNCLR of lightly's parts", lambda setup: NearestNeighbour(setup.queue), TWO_VIEWS),
    "co2": _method(
        "InfoNCE and consistency", lambda setup: baselines.CO2Loss(setup.queue, CIFAR10.temperature), mixed=False
    ),
    "sce": _soft(
        "half one-hot, half similarities", False, baselines.sce(), {"temperature": 0.1, "refined_weight": 1.0}
    ),
    "one-hot": _slr("one-hot labels over batch and queue", False, ONE_HOT),
    "p": _soft("p alone", False, P),
    "q": _soft("q alone", False, Q),
    "p+q": _slr("refined labels", False, {}),
    "mm": _slr("momentum mixup, one-hot labels", True, ONE_HOT),
    "p+mm": _soft("p alone, momentum mixup", True, P),
    "q+mm": _soft("q alone, momentum mixup", True, Q),
    "sane": _slr("refined labels, momentum mixup", True, {}),
    "vanilla": _slr("vanilla mixup, one-hot labels", True, ONE_HOT, vanilla=True),
    "vanilla-strong": _slr("the same, strong views", True, ONE_HOT, vanilla=True, views=STRONG),
    "mm-strong": _slr("momentum mixup, strong views", True, ONE_HOT, views=STRONG),
    "sane-strong": _slr("SANE, strong views", True, {}, views=STRONG),
    **{f"sane-lambda-{weight}": _slr(f"lambda {weight}", True, {"refined_weight": weight}) for weight in (0.25, 0.75)},
    # At lambda 1 the queries that are not mixed need no pass: a step costs what MoCo's does.
    "sane-lambda-1.0": _slr("lambda 1.0", True, {"refined_weight": 1.0}, mixed_only=True),
    "sane-lambda-1.0-longer": _slr(
        "the same, as many passes as SANE", True, {"refined_weight": 1.0}, mixed_only=True, stretch=MIXED / PLAIN
    ),
    # What DCL has that MoCo has not: a temperature, two trained views, no positive in the denominator.
    "moco-cold": _moco("MoCo v2, temperature 0.1", temperature=COLD),
    "mm-cold": _slr("momentum mixup, temperature 0.1", True, ONE_HOT | {"temperature": COLD}),
    "sane-cold": _slr("SANE, temperature 0.1", True, {"temperature": COLD}),
    "simclr-cold": _both("SimCLR, temperature 0.1", lambda setup: lightly.loss.NTXentLoss(COLD)),
    "simclr-cold-p+q": _both("SimCLR, 0.1, refined labels", _slr_loss(COLD_BATCH)),
    "simclr-cold-mm": _both("SimCLR, 0.1, mixup, one-hot labels", _slr_loss(ONE_HOT | COLD_BATCH), mixed=True),
    "simclr-cold-sane": _both("SimCLR, 0.1, mixup, refined labels", _slr_loss(COLD_BATCH), mixed=True),
    "dcl-longer": _both(
        "DCLLoss, as many passes as with mixup", lambda setup: lightly.loss.DCLLoss(COLD), stretch=3 / 2
    ),
    # When does refinement add to momentum mixup?
    "sane-sharp": _slr("tau' 0.25, mu 0.5 to 10", True, SHARP),
    "mm-weak": _slr("momentum mixup, weak keys", True, ONE_HOT, views=WEAK),
    "sane-weak": _slr("SANE, weak keys", True, {}, views=WEAK),
    "sane-weak-sharp": _slr("weak keys, tau' 0.25, mu 0.5 to 10", True, SHARP, views=WEAK),
    "half-q+mm": _soft("q at tau' 0.25 has half the label", True, baselines.sce(0.05)),
    "half-q+mm-weak": _soft("the same, weak keys", True, baselines.sce(0.05), views=WEAK),
    **{f"oracle-{purity}": _oracle(purity, 0.25) for purity in (0.5, 1.0)},
    **{f"oracle-flat-{purity}": _oracle(purity, CIFAR10.sharpening) for purity in (0.25, 0.5, 1.0)},
    # Labels from what the trained views do not show.
    "whole": _slr("all of the label, from the positives", False, WHOLE),
    **{
        f"whole-{name}": _slr(f"all of the label, from {text}", False, WHOLE, features=name)
        for name, text in FEATURE_WORDS.items()
    },
    # The rivals that use the same knowledge, and the knowledge itself.
    **{f"alone-{name}": _alone(name) for name in ("gradients", "half-gradients", "guesses", "imagenet")},
    "guesses-cross-entropy": _told("cross-entropy with these guesses", Classified, "guesses"),
    **{
        f"supcon-{name}": _told(
            f"SupCon, 0.1, the groups are {text}",
            lambda known: Grouped(baselines.SupConLoss(COLD), known.argmax(1)),
            name,
        )
        for name, text in (("guesses", "the guessed classes"), ("classes", "the classes"))
    },
    "drawn-labels": _both(
        "NT-Xent, 0.1, all of the label from these guesses", _slr_loss(WHOLE_BATCH), features="drawn-guesses"
    ),
    "drawn-cross-entropy": _told("cross-entropy with these guesses", Classified, "drawn-guesses"),
    "drawn-supcon": _told(
        "SupCon, 0.1, the groups are the guessed classes",
        lambda known: Grouped(baselines.SupConLoss(COLD), known.argmax(1)),
        "drawn-guesses",
    ),
    "alone-drawn": _alone("drawn-guesses"),
    # Classes that are known for some of the images.
    **{
        f"groups-{percent}": _told(
            f"NT-Xent, 0.1, the class is the group of {percent} % of the images",
            functools.partial(_partly_grouped, percent / 100),
            "classes",
        )
        for percent in KNOWN
    },
    **{
        f"classified-{percent}": _told(
            f"NT-Xent, 0.1, and cross-entropy of {percent} % of the images",
            functools.partial(_partly_classified, percent / 100),
            "classes",
        )
        for percent in KNOWN
    },
    "imagenet-labels": _both(
        "NT-Xent, 0.1, all of the label from the teacher, tau' 0.1",
        _slr_loss(WHOLE_BATCH | {"sharpening": 0.1}),
        features="imagenet",
    ),
    **{f"{name}-regression": _told(f"{text} are predicted", Regressed, name) for name, text in ABSENT_IN_USE.items()},
    **{
        f"{name}-clusters": _told(
            f"cross-entropy with {CLUSTERS} clusters of {text}", lambda known: Classified(_cluster_targets(known)), name
        )
        for name, text in ABSENT_IN_USE.items()
    },
    "imagenet-supcon": _told(
        "SupCon, 0.1, the groups are these clusters",
        lambda known: Grouped(baselines.SupConLoss(COLD), clusters(known, CLUSTERS)),
        "imagenet",
    ),
    **{
        f"half-{name}": _slr(
            f"half of the label, from {FEATURE_WORDS[name]}", False, WHOLE | {"refined_weight": 0.5}, features=name
        )
        for name in TOLD
    },
    "sharp-gradients": _slr("the same, tau' 0.25", False, WHOLE | {"sharpening": 0.25}, features="gradients"),
    **{
        f"simclr-cold-whole-{name}": _both(
            f"SimCLR, 0.1, all of the label, from {text}", _slr_loss(WHOLE_BATCH), features=name
        )
        for name, text in FEATURE_WORDS.items()
    },
    "simclr-cold-sharp-gradients": _both(
        "SimCLR, 0.1, all of the label, from histograms of gradients, tau' 0.25",
        _slr_loss(WHOLE_BATCH | {"sharpening": 0.25}),
        features="gradients",
    ),
    "whole-plain": Method(
        "all of the label, from the images as they are",
        lambda setup: Plain(_slr_loss(WHOLE | {"estimator_dim": DIM})(setup)),
        PLAIN + FORWARD,
        views=("query", "key", "plain"),
    ),
    # The same losses as simclr-cold and dcl, in operations that a CUDA graph can repeat.
    "one-hot-batch": _both("NT-Xent, 0.1", _slr_loss(ONE_HOT | COLD_BATCH)),
    "decoupled": _both("DCL, 0.1", lambda setup: baselines.DecoupledLoss(COLD)),
    "decoupled-longer": _both(
        "the same, as many passes as with mixup", lambda setup: baselines.DecoupledLoss(COLD), stretch=3 / 2
    ),
    "one-hot-longer": _slr("one-hot labels, as many passes as SANE", False, ONE_HOT, stretch=MIXED / PLAIN),
    "whole-teacher": Method(
        "all of the label, from a network trained before with one-hot labels",
        lambda setup: Momentum(_slr_loss(WHOLE)(setup), estimator=setup.estimator),
        2 * PLAIN,
        teacher="one-hot",
    ),
    "one-hot-twice": _slr("one-hot labels, twice as long", False, ONE_HOT, stretch=2.0),
    # Labels for what is surely alike, and no others.
    **{
        name: _method(summary, functools.partial(_neighbour_loss, attracts), mixed=False)
        for name, attracts, summary in (
            ("eliminate", False, "keys surely alike are no negatives"),
            ("attract", True, "keys surely alike share the label"),
        )
    },
    # Where the queue holds the query's own earlier keys, or copies of its image.
    "one-hot-short": _slr("one-hot labels, a queue of 512", False, ONE_HOT | {"memory_bank_size": (512, DIM)}),
    "sharp-copies": _slr(
        "all of the label, from what is a copy of what", False, WHOLE | {"sharpening": 0.25}, features="copies"
    ),
    "burst-groups": _burst("copies are each other's positives", "positive"),
    "burst-apart": _burst("copies are left out of the negatives", "ignored"),
    "eager": _slr("refined labels, mu 0.5 to 10", False, {"confidence": (0.5, 10.0)}),
    "sharp": _slr("tau' 0.25, mu 0.5 to 10, lambda 1", False, SHARP | {"refined_weight": 1.0}),
    # Momentum mixup and a pull towards alike images in BYOL.
    "byol": Method("BYOL", lambda setup: Bootstrap(), BOOTSTRAP),
    "byol-longer": Method(
        "the same, as many passes as with mixup",
        lambda setup: Bootstrap(),
        BOOTSTRAP,
        stretch=(BOOTSTRAP + TRAINED) / BOOTSTRAP,
    ),
    "byol-mm": Method(
        "BYOL, momentum mixup", lambda setup: Bootstrap(CIFAR10.mixup(setup.mixing)), BOOTSTRAP + TRAINED
    ),
    "byol-alike": Method(
        "BYOL, alike images (cosine above 0.9) pulled together", lambda setup: Bootstrap(alike=0.9), BOOTSTRAP
    ),
    "byol-mm-alike": Method(
        "BYOL, both", lambda setup: Bootstrap(CIFAR10.mixup(setup.mixing), 0.9), BOOTSTRAP + TRAINED
    ),
    "supervised": Method("cross-entropy with the classes", lambda setup: Supervised(), TRAINED),
    "oracle-flat-1.0-all": _oracle(1.0, CIFAR10.sharpening, own_weight=0.0),
}
