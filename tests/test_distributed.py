"""Two and three real gloo processes under a default DDP wrapper against one process with the whole batch."""

import functools

import pytest
import torch
from _workers import BATCH, SCENARIOS, STEPS, WORLDS, run, train
from torch import multiprocessing

from slr_plugin.distributed import gather, rank, world_size

GATHERED = [name for name, scenario in SCENARIOS.items() if scenario.gather]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What all processes saw."""
    path = tmp_path_factory.mktemp("ddp")
    multiprocessing.spawn(run, (path,), nprocs=max(WORLDS))
    return path


@pytest.fixture(params=WORLDS)
def processes(request, folder):
    return [torch.load(folder / f"rank-{number}-of-{request.param}.pt") for number in range(request.param)]


@functools.cache
def train_alone(name, world):
    return train(SCENARIOS[name], rank=None, world=world)


@pytest.mark.parametrize("name", GATHERED)
def test_processes_train_like_one(processes, name):
    alone = train_alone(name, len(processes))
    together = [results[name] for results in processes]
    mean_loss = torch.stack([results["loss"] for results in together]).mean(0)
    torch.testing.assert_close(mean_loss, alone["loss"], rtol=0, atol=1e-10)
    for results in together:
        torch.testing.assert_close(results["gradient"], alone["gradient"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", GATHERED)
def test_processes_measure_the_labels_of_one(processes, name):
    alone = train_alone(name, len(processes))
    mean = torch.stack([results[name]["quality"] for results in processes]).mean(0)
    torch.testing.assert_close(mean, alone["quality"])
    for results in processes:
        assert torch.equal(results[name]["queue_classes"], alone["queue_classes"])


@pytest.mark.parametrize("name", [name for name in GATHERED if SCENARIOS[name].queue])
def test_gathered_queues_are_equal_and_those_of_one_process(processes, name):
    alone = train_alone(name, len(processes))
    for results in processes:
        for key in ("memory_bank.bank", "memory_bank.bank_ptr", "memory_bank.groups", "step"):
            torch.testing.assert_close(results[name][key], alone[key])


def test_without_gathering_every_queue_follows_process_0(processes):
    # DDP's default broadcast_buffers hands process 0's queue to all before each forward; the last batch is one's own.
    first, second = (results["queue, not gathered"] for results in processes[:2])
    pointer = first["memory_bank.bank_ptr"]
    assert torch.equal(pointer, second["memory_bank.bank_ptr"])
    newest = (pointer - 1 - torch.arange(BATCH)) % len(first["memory_bank.bank"])
    differs = (first["memory_bank.bank"] != second["memory_bank.bank"]).any(1)
    assert set(differs.nonzero().flatten().tolist()) == set(newest.tolist())
    assert first["step"] == second["step"] == STEPS


def test_unequal_batches_raise_everywhere_and_change_nothing(processes):
    sizes = [3 + number for number in range(len(processes))]
    for message in (message for results in processes for message in results["uneven"]):
        assert f"{sizes} rows" in message
        assert "drop_last=True" in message
        assert "unchanged: True" in message


def test_an_argument_of_one_process_alone_raises_in_all(processes):
    for name, message in ((name, message) for results in processes for name, message in results["alone"].items()):
        assert f"rows of {name}" in message
        assert "in all processes or in none" in message


def test_one_process_gathers_itself():
    local = torch.randn(3, 2)
    assert gather(local) is local
    assert (rank(), world_size()) == (0, 1)
