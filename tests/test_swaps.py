"""Where a page says that a loss "was" another one, both are built from its words and compared in value and gradient."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import torch

import slr_plugin

ROOT = Path(__file__).parent.parent
if not (ROOT / "README.md").is_file():
    pytest.skip("installed without the repository", allow_module_level=True)
OURS = ("SelfSupervisedLoss", "SelfLabelingRankingLoss", "SLRClipLoss", "SLRLoss")
PEER = re.compile(r"(Loss|_loss|criterion)\b")  # "was" names a loss, or calls of one


def swaps():
    """(page, their expression, our code) of every line that is marked ``was``, and of every diff."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]:
        text = page.read_text(encoding="utf-8")
        for code in [text] if page.suffix == ".py" else re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            for number, line in enumerate(code.splitlines(), 1):
                before, marked, theirs = line.partition("# was")
                if marked and PEER.search(theirs) and "import" not in theirs:
                    yield page.stem, theirs.strip(": "), at_line(code, number if before.strip() else number + 1)
        for theirs, ours in re.findall(r"^- criterion = (.*)\n\+ criterion = (.*)$", text, re.MULTILINE):
            yield page.stem, theirs, ours


def at_line(code, number):
    """Our call of a loss in the statement that begins at a line, or the statement if there is none."""
    statement = next(node for node in ast.walk(ast.parse(code)) if getattr(node, "lineno", 0) == number)
    calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    named = sorted((node for node in calls if node.func.id in OURS), key=lambda node: OURS.index(node.func.id))
    return ast.unparse(named[0] if named else statement)


SWAPS = sorted(set(swaps()))


def leaves(*sizes, dim=128):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(size, dim, generator=generator).requires_grad_() for size in sizes]


def check_equal(ours, theirs, inputs, atol=1e-6):
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=atol)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, theirs)), rtol=1e-5, atol=atol
    )


def of_two_views(page, theirs, ours):
    if page == "pytorch-metric-learning":
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        adapter = pytest.importorskip("slr_plugin.adapters.pytorch_metric_learning")
        names = vars(losses) | {"SLRLoss": adapter.SLRLoss}
    else:
        names = {"NTXentLoss": pytest.importorskip("lightly.loss").NTXentLoss, "SLRLoss": slr_plugin.SLRLoss}
    first, second = eval(ours, names), eval(theirs, names)
    has_queue = "128)" in theirs
    if has_queue:
        first.memory_bank.bank.copy_(second.memory_bank.bank)
    for _ in range(2):  # the second call sees the keys of the first
        queries, keys = leaves(16, 16)
        keys = keys.detach() if has_queue else keys
        inputs = [view for view in (queries, keys) if view.requires_grad]
        check_equal(first(queries, keys), second(queries, keys), inputs)


def of_calls(page, theirs, ours):
    """NNCLR's: the arguments change places."""
    lightly = pytest.importorskip("lightly.loss")
    names = dict(zip(("p0", "p1", "z0", "z1"), leaves(8, 8, 8, 8), strict=True))
    first = eval(ours.removeprefix("loss = "), names | {"criterion": slr_plugin.SLRLoss(confidence=0.0)})
    second = eval(theirs, names | {"criterion": lightly.NTXentLoss()})
    check_equal(first, second, [names["p0"], names["p1"]])


def of_texts(page, theirs, ours):
    for package in ("sentence_transformers", "accelerate", "datasets"):
        pytest.importorskip(package)
    from _sentences import features, static_model
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from slr_plugin.adapters.sentence_transformers import DIRECTIONS, SelfLabelingRankingLoss

    model = static_model()
    names = {
        "model": model,
        "both": DIRECTIONS,
        "MultipleNegativesRankingLoss": MultipleNegativesRankingLoss,
        "SelfLabelingRankingLoss": SelfLabelingRankingLoss,
    }
    batch = features(model, 3, 12)
    check_equal(eval(ours, names)(batch, None), eval(theirs, names)(batch, None), list(model.parameters()))


def of_clip(page, theirs, ours):
    open_clip = pytest.importorskip("open_clip")
    image, text = leaves(16, 16)
    scale = torch.tensor(14.0, requires_grad=True)
    unit = [torch.nn.functional.normalize(features, dim=1) for features in (image, text)]
    if "SLRClipLoss" in ours:
        adapter = importlib.import_module("slr_plugin.adapters.open_clip")
        first = eval(ours, {"SLRClipLoss": adapter.SLRClipLoss})(*unit, scale)
    else:
        criterion = eval(ours, {"SLRLoss": slr_plugin.SLRLoss})
        criterion.temperature = 1 / scale
        first = (criterion(image, text) + criterion(text, image)) / 2
    names = {"open_clip": open_clip, "ClipLoss": open_clip.ClipLoss}
    check_equal(first, eval(theirs, names)(*unit, scale), [image, text, scale], atol=1e-5)


def of_eeg(page, theirs, ours):
    selfeeg = pytest.importorskip("selfeeg")
    names = {"criterion": slr_plugin.SLRLoss(temperature=0.15, confidence=0.0)}
    exec(ours, names)
    (projections,) = leaves(12)
    check_equal(names["loss_function"](projections), eval(theirs, {"selfeeg": selfeeg})(projections), [projections])


WAYS = {
    "MultipleNegativesRankingLoss": of_texts,
    "NTXentLoss": of_two_views,
    "ClipLoss": of_clip,
    "simclr_loss": of_eeg,
    "criterion(": of_calls,
}


@pytest.mark.filterwarnings("ignore::UserWarning:(?!slr_plugin)")
@pytest.mark.parametrize(("page", "theirs", "ours"), SWAPS, ids=[f"{page}-{theirs}" for page, theirs, _ in SWAPS])
def test_a_loss_that_was_another_computes_the_same(page, theirs, ours):
    next(way for name, way in WAYS.items() if name in theirs)(page, theirs, ours)


def test_every_page_that_swaps_a_loss_is_found():
    pages = {page for page, _, _ in SWAPS}
    assert {
        "README",
        "pytorch",
        "pytorch-metric-learning",
        "sentence-transformers",
        "lightly",
        "lightly_simclr",
    } <= pages
