"""The loss beside open_clip's ClipLoss: alone, in its training loop, in two processes; and beside the dense oracle."""

import copy
import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import multiprocessing

open_clip = pytest.importorskip("open_clip", reason='pip install "slr-plugin[open-clip]"')

from _open_clip import (
    BATCH,
    DIM,
    GROUPS,
    MODES,
    REFINED,
    Batches,
    Towers,
    run,
    small_clip,
    train,
    value_and_gradients,
)

from slr_plugin import CosineConfidence, SLRLoss, dense
from slr_plugin.adapters.open_clip import SLRClipLoss

pytestmark = pytest.mark.usefixtures("one_thread")
WORLD = 2


def both_directions(images, texts, scale, **settings):
    """The mean of the dense form's loss in both directions."""
    settings = {"temperature": 1 / scale, "symmetric": False, **settings}
    return (dense.slr_loss(images, texts, **settings) + dense.slr_loss(texts, images, **settings)) / 2


def model_output(dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    images, texts = torch.randn(2, 7, DIM, generator=generator, dtype=dtype)
    return [leaf.clone().requires_grad_() for leaf in (images, texts, torch.tensor(3.0, dtype=dtype))]


def test_it_takes_the_arguments_of_their_loss_in_their_order():
    theirs, ours = (inspect.signature(kind) for kind in (open_clip.ClipLoss, SLRClipLoss))
    names = [name for name in theirs.parameters if name in ours.parameters]
    assert list(ours.parameters)[: len(names)] == names == list(theirs.parameters)
    assert all(ours.parameters[name].default == theirs.parameters[name].default for name in names)
    call, our_call = (inspect.signature(kind.forward).parameters for kind in (open_clip.ClipLoss, SLRClipLoss))
    assert list(our_call)[: len(call)] == list(call)


@pytest.mark.parametrize("mode", MODES)
def test_in_one_process_it_is_their_loss(mode):
    ours, theirs = (value_and_gradients(kind(*mode), Towers()) for kind in (SLRClipLoss, open_clip.ClipLoss))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exponent", [0.0, math.log(100)])  # what open_clip clamps to
def test_in_float32_it_is_their_loss_at_every_scale(exponent):
    def in_float32(loss):
        return lambda **output: loss(**{name: value.float() for name, value in output.items()})

    model = Towers()
    torch.nn.init.constant_(model.logit_scale, exponent)
    ours, theirs = (value_and_gradients(in_float32(kind()), model) for kind in (SLRClipLoss, open_clip.ClipLoss))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    images, texts, scale = (leaf.detach().to(dtype).requires_grad_() for leaf in model_output())
    loss = SLRClipLoss()(images, texts, scale.exp())
    loss.backward()
    expected = SLRClipLoss()(images.detach().float(), texts.detach().float(), scale.detach().exp().float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), expected)
    assert all(leaf.grad.isfinite().all() and leaf.grad.dtype == dtype for leaf in (images, texts, scale))


def test_a_scale_may_be_a_number_or_have_one_axis():
    images, texts, scale = (leaf.detach() for leaf in model_output())
    loss, expected = SLRClipLoss(), SLRClipLoss()(images, texts, scale)
    torch.testing.assert_close(loss(images, texts, scale.item()), expected)
    torch.testing.assert_close(loss(images, texts, scale[None]), expected)
    assert list(loss(images, texts, scale, output_dict=True)) == ["contrastive_loss"]


def test_their_scripts_build_it_in_the_place_of_their_loss(monkeypatch):
    for module in (open_clip.factory, open_clip.loss):  # open_clip 3 and 4
        monkeypatch.setattr(module, "ClipLoss", SLRClipLoss)
    options = dict.fromkeys(("distill", "siglip", "horovod", "local_loss"), False) | {"gather_with_grad": True}
    loss = open_clip.create_loss(SimpleNamespace(**options, model="ViT-B-32", rank=1, world_size=2))
    assert isinstance(loss, SLRClipLoss)
    assert (loss.local_loss, loss.gather_with_grad, loss.rank, loss.world_size) == (False, True, 1, 2)


@pytest.mark.parametrize("accum_freq", [1, 3])
def test_their_loop_trains_as_with_their_loss(accum_freq):
    ours, theirs = (train(small_clip(), loss, accum_freq) for loss in (SLRClipLoss(), open_clip.ClipLoss()))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert not any(weight.equal(start) for weight, start in zip(ours, small_clip().parameters(), strict=True))


@pytest.mark.parametrize("accum_freq", [1, 3])
def test_the_scale_is_trained_and_clamped_as_with_their_loss(accum_freq):
    seen = {}
    for kind in (SLRClipLoss, open_clip.ClipLoss):
        loss, scales = kind(), []
        loss.register_forward_pre_hook(
            lambda module, args, output, scales=scales: scales.append(output["logit_scale"].item()), with_kwargs=True
        )
        train(small_clip(init_logit_scale=math.log(110)), loss, accum_freq, lr=1e-4)
        seen[kind] = scales
    assert seen[SLRClipLoss][0] == pytest.approx(110)
    assert max(seen[SLRClipLoss][accum_freq:]) == pytest.approx(100, abs=1e-3)
    assert seen[SLRClipLoss] == pytest.approx(seen[open_clip.ClipLoss], abs=1e-9)


@pytest.mark.parametrize("accum_freq", [1, 3])
def test_refined_labels_train_in_their_loop(accum_freq):
    one_hot, refined = (train(small_clip(), loss, accum_freq) for loss in (SLRClipLoss(), SLRClipLoss(**REFINED)))
    assert all(weight.isfinite().all() for weight in refined)
    assert not any(map(torch.equal, refined, one_hot))


def test_refined_labels_are_the_dense_ones():
    leaves = model_output()
    loss = SLRClipLoss(**REFINED)(leaves[0], leaves[1], leaves[2].exp())
    expected = both_directions(leaves[0], leaves[1], leaves[2].exp(), **REFINED)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in (loss, expected)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, REFINED])
def test_groups_are_those_of_the_dense_loss(settings):
    leaves, groups = model_output(), torch.tensor([3, -1, 3, 0, 0, -1, 3])
    loss = SLRClipLoss(**settings)(leaves[0], leaves[1], leaves[2].exp(), groups=groups)
    how = {"confidence": 0.0, "refined_weight": 1.0, **settings, "groups": groups}
    expected = both_directions(leaves[0], leaves[1], leaves[2].exp(), **how)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in (loss, expected)), rtol=0, atol=1e-12)


def test_several_captions_of_an_image_are_all_right():
    images, texts, scale = (leaf.detach() for leaf in model_output())
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 3])
    logits = scale * F.normalize(images) @ F.normalize(texts).T
    same = (groups[:, None] == groups).double()
    labels = same / same.sum(1, keepdim=True)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(SLRClipLoss()(images, texts, scale, groups=groups), expected)


@pytest.mark.parametrize("same_group", ["positive", "ignored"])
def test_a_toy_two_thirds_of_which_are_in_pairs(same_group):
    """Captions 0 to 3 are of two images, 4 and 5 alone. The same are then in the queue, after a checkpoint too."""
    ids, labels = torch.tensor([3, 3, 8, 8, 1, -1]), []
    images, texts = (side[:6].detach().requires_grad_() for side in model_output()[:2])
    state = None
    for _ in range(2):
        loss = SLRClipLoss(memory_bank_size=(9, DIM))
        if state is not None:
            loss.load_state_dict(state)
        for criterion in loss.criteria.values():
            criterion.same_group = same_group
            criterion.register_forward_pre_hook(
                lambda module, args, kwargs: labels.append(module.labels(*args, groups=kwargs["groups"])),
                with_kwargs=True,
            )
        loss(images, texts, 14.0, groups=ids).backward()
        state = loss.state_dict()
    same = ((ids[:, None] == ids) & (ids[:, None] >= 0)).double()
    expected = torch.zeros(2, 6, 15, dtype=torch.float64)
    expected[:, :, :6] = torch.eye(6)
    if same_group == "positive":
        expected[:, :, :6] = expected[:, :, :6].maximum(same)
        expected[1, :, 6:12] = same
    expected /= expected.sum(2, keepdim=True)
    torch.testing.assert_close(labels, [expected[0], expected[0], expected[1], expected[1]])
    for direction in ("image_to_text", "text_to_image"):
        assert state[f"criteria.{direction}.memory_bank.groups"].tolist() == [8, 1, -1, 8, 1, -1, 3, 3, 8]


@pytest.mark.parametrize("accum_freq", [1, 3])
def test_groups_pass_through_their_loop_among_what_the_model_returns(accum_freq):
    model, seen = small_clip(), []

    def with_groups(module, args, output):
        return output | {"groups": args[1][:, 0] if args else output["text_features"].new_zeros(4).long()}

    model.register_forward_hook(with_groups)
    loss = SLRClipLoss()
    loss.register_forward_pre_hook(lambda module, args, output: seen.append(output["groups"]), with_kwargs=True)
    train(model, loss, accum_freq)
    assert {len(groups) for groups in seen} == {4 * accum_freq}


def test_a_queue_holds_the_other_side_of_past_pairs():
    images, texts, exponent = model_output()
    scale = exponent.exp()
    loss = SLRClipLoss(memory_bank_size=(10, DIM), confidence=2.0)
    queues = {name: criterion.memory_bank.bank.double().clone() for name, criterion in loss.criteria.items()}
    settings = {"temperature": 1 / scale, "symmetric": False, "confidence": 2.0, "refined_weight": 1.0}
    expected = (
        dense.slr_loss(images, texts, queues["image_to_text"], **settings)
        + dense.slr_loss(texts, images, queues["text_to_image"], **settings)
    ) / 2
    torch.testing.assert_close(loss(images, texts, scale), expected, rtol=0, atol=1e-6)  # the queue is in float32
    for name, side in (("image_to_text", texts), ("text_to_image", images)):
        torch.testing.assert_close(loss.criteria[name].memory_bank.bank[:7], F.normalize(side.detach().float()))
    with torch.no_grad():
        loss(images, texts, scale)
    loss(images.detach(), texts, scale)  # one tower is locked
    assert [criterion.memory_bank.bank_ptr.item() for criterion in loss.criteria.values()] == [4, 4]


def test_their_loop_trains_with_a_queue_and_a_schedule():
    loss = SLRClipLoss(memory_bank_size=(10, DIM), confidence=CosineConfidence(0.0, 2.0, total_steps=6))
    train(small_clip(), loss, 1)
    for criterion in loss.criteria.values():
        assert criterion.memory_bank.bank_ptr == 24 % 10
        assert criterion.step == len(list(Batches()))


def test_it_can_be_copied_after_a_call_and_holds_no_graph():
    images, texts, exponent = model_output()
    loss = SLRClipLoss(memory_bank_size=(10, DIM))
    loss(images, texts, exponent.exp()).backward()
    copied = copy.deepcopy(loss)
    torch.testing.assert_close(copied(images, texts, exponent), loss(images, texts, exponent), rtol=0, atol=0)
    assert not any(criterion.temperature.requires_grad for criterion in loss.criteria.values())
    torch.testing.assert_close(copied.state_dict(), loss.state_dict(), rtol=0, atol=0)


def test_without_a_queue_it_adds_nothing_to_a_state_dict_but_the_step():
    assert set(SLRClipLoss().state_dict()) == {f"criteria.{name}.step" for name in ("image_to_text", "text_to_image")}


@pytest.mark.filterwarnings("ignore::UserWarning:torch")  # of the compiler about itself
def test_it_compiles_without_a_break():
    leaves = model_output()
    value = SLRClipLoss(confidence=1.0)(*leaves)
    compiled = torch.compile(SLRClipLoss(confidence=1.0), backend="aot_eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(compiled, value)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaves) for x in (compiled, value)))


def test_what_it_does_not_take_is_refused():
    images, texts, scale = model_output()
    with pytest.raises(ValueError, match="logit_bias must be None"):
        SLRClipLoss()(images, texts, scale, torch.tensor(-10.0))
    with pytest.raises(ValueError, match="use_horovod must be False"):
        SLRClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"\(7, 8\) and \(6, 8\)"):
        SLRClipLoss()(images, texts[:6], scale)
    with pytest.raises(ValueError, match="confidence"):
        SLRClipLoss(confidence=-1.0)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    multiprocessing.spawn(run, (folder, WORLD), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("mode", MODES)
def test_in_two_processes_it_is_their_loss_on_each(processes, mode):
    for results in processes:  # gradients of a process alone, and then averaged by DDP
        torch.testing.assert_close(results["ours", mode], results["theirs", mode], rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode[1]])
def test_with_gradients_gathered_two_processes_train_like_one(processes, mode):
    value, *gradients = value_and_gradients(SLRClipLoss(), Towers())
    together = [results["ours", mode][1] for results in processes]
    torch.testing.assert_close(sum(result[0] for result in together) / WORLD, value, rtol=0, atol=1e-12)
    for result in together:
        torch.testing.assert_close(result[1:], gradients, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "settings", "known"),
    [("refined", REFINED, {}), ("groups", {}, {"groups": GROUPS})],
)
def test_labels_of_two_processes_are_those_of_one(processes, name, settings, known):
    value, *gradients = value_and_gradients(SLRClipLoss(**settings), Towers(), **known)
    torch.testing.assert_close(sum(results[name][0] for results in processes) / WORLD, value, rtol=0, atol=1e-12)
    for results in processes:
        torch.testing.assert_close(results[name][1:], gradients, rtol=0, atol=1e-12)


def test_queues_of_processes_are_equal(processes):
    first, second = (results["queue"] for results in processes)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first["criteria.image_to_text.memory_bank.bank_ptr"] == WORLD * BATCH


def test_its_labels_are_there_to_look_at():
    images, texts, scale = (leaf.detach() for leaf in model_output())
    loss = SLRClipLoss(confidence=1.0)
    loss(images, texts, scale)
    criterion = loss.criteria["image_to_text"]
    assert isinstance(criterion, SLRLoss)
    assert criterion.labels(images, texts).shape == (7, 7)
    assert 0 < criterion.stats["positive_weight"] < 1
