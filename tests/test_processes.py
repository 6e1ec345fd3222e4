"""What several processes do on GPUs, which are not here: torch is asked what it would be told."""

import pytest
import torch
from torch import nn

from surestep import UserError, processes
from surestep.training import preparing

DEVICES = [("cuda:0", [0]), ("cuda:3", [3]), ("cpu", None), ("mps:0", None)]


@pytest.fixture(autouse=True)
def _second_of_two_shown_one_gpu_each(monkeypatch):
    """Local rank 1, whose only GPU is number 0, as SLURM binds it."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(processes, "world_size", lambda: 2)


@pytest.mark.parametrize("torch_has", ["forward_sync_buffers", "broadcast_buffers"])
@pytest.mark.parametrize(("device", "own"), DEVICES)
def test_gradients_are_shared_on_the_gpu_that_the_model_is_on(monkeypatch, device, own, torch_has):
    made = []

    def older(model, device_ids=None, broadcast_buffers=True):
        made.append((model, device_ids, broadcast_buffers))

    def newer(
        model,
        device_ids=None,
        broadcast_buffers=None,
        batched_grad_copy=False,
        forward_sync_buffers=None,
    ):
        assert batched_grad_copy
        assert broadcast_buffers is None, "deprecated"
        made.append((model, device_ids, forward_sync_buffers))

    known = newer if torch_has == "forward_sync_buffers" else older
    monkeypatch.setattr(preparing, "DistributedDataParallel", known)
    net = nn.Linear(2, 2)
    preparing._wrap_ddp(net, torch.device(device))
    assert made == [(net, own, False)]


class TestWhatTheFirstDoes:
    """Two processes, one after the other: what the first sends is kept for the second."""

    @pytest.fixture
    def ranks(self, monkeypatch):
        post = []

        def send(objects, source):
            assert source == 0
            if processes.rank() == 0:
                post[:] = objects
            objects[:] = post

        monkeypatch.setattr(processes.dist, "broadcast_object_list", send)

        def each(then):
            for rank in (0, 1):
                monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
                then()

        return each

    def test_all_get_its_result(self, ranks):
        did, got = [], []
        ranks(lambda: got.append(processes.by_first(lambda: did.append("once") or "found")))
        assert (did, got) == (["once"], ["found", "found"])

    def test_all_raise_its_error(self, ranks):
        def fails():
            raise UserError("no space left")

        def ask():
            with pytest.raises(UserError, match="no space left"):
                processes.by_first(fails)

        ranks(ask)

    def test_another_failure_of_it_ends_all(self, ranks):
        """The others would wait for hours for a process that has left."""

        def fails():
            raise PermissionError("not yours")

        raised = []

        def ask():
            with pytest.raises((UserError, PermissionError)) as info:
                processes.by_first(fails)
            raised.append((info.type, str(info.value)))

        ranks(ask)
        said = "the first process failed; its output says why"
        assert raised == [(PermissionError, "not yours"), (UserError, said)]

    def test_one_alone_sends_nothing(self, monkeypatch):
        monkeypatch.setattr(processes, "world_size", lambda: 1)
        assert processes.by_first(lambda: 3) == 3


@pytest.mark.parametrize(("device", "own"), DEVICES)
def test_processes_meet_on_their_own_gpus(monkeypatch, device, own):
    told = []
    monkeypatch.setattr(processes.dist, "barrier", lambda **named: told.append(named))
    processes.barrier(torch.device(device))
    assert told == [{"device_ids": own}]
    monkeypatch.setattr(processes, "world_size", lambda: 1)
    processes.barrier(torch.device(device))
    assert len(told) == 1
