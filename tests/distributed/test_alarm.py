"""Whoever fails first is heard, once, and everybody else ends."""

import threading
import time

import pytest
import torch

from spectrim.distributed import alarm as module
from spectrim.distributed.alarm import EXIT_FAILED, Alarm
from spectrim.distributed.launch import device_for, membership
from spectrim.distributed.placement import Placement, placement
from spectrim.errors import InputError


class Store:
    """A key-value store with the semantics of torch.distributed's."""

    def __init__(self):
        self.values, self.lock = {}, threading.Lock()

    def add(self, key, amount):
        with self.lock:
            self.values[key] = self.values.get(key, 0) + amount
            return self.values[key]

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)


class Gone:
    """A store whose process has ended."""

    def add(self, key, amount):
        raise RuntimeError("connection closed")

    def check(self, keys):
        raise RuntimeError("connection closed")

    def set(self, key, value):
        pass


class Ranks:
    """Several processes as threads: what was told, and who was ended."""

    def __init__(self, count, store=None):
        self.told, self.ended = [], {}
        store = store or Store()
        self.alarms = [
            Alarm(
                store,
                rank=rank,
                size=count,
                tell=lambda message, rank=rank: self.told.append((rank, message)),
                end=lambda code, rank=rank: self.ended.update({rank: code}),
            )
            for rank in range(count)
        ]
        for one in self.alarms:
            one.watch()

    def stop(self):
        for one in self.alarms:
            one.stop()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(module, "SECONDS_TO_BE_HEARD", 0.5)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


@pytest.mark.parametrize("failing", [0, 2])
def test_one_failure_is_told_once_by_the_leader_and_ends_the_others(failing):
    ranks = Ranks(3)
    ranks.alarms[failing].sound("it broke")
    wait_for(lambda: len(ranks.ended) == 2)
    ranks.stop()
    assert ranks.told == [(0, f"rank {failing} of 3: it broke")]
    assert ranks.ended == dict.fromkeys({0, 1, 2} - {failing}, EXIT_FAILED)


def test_errors_that_follow_are_not_told():
    ranks = Ranks(3)
    threads = [
        threading.Thread(target=one.sound, args=(f"error {rank}",))
        for rank, one in enumerate(ranks.alarms)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ranks.stop()
    assert len(ranks.told) == 1 and len(ranks.ended) == 2


def test_a_rank_that_nobody_hears_speaks_for_itself():
    ranks = Ranks(2, Gone())
    ranks.alarms[1].sound("the leader is gone")
    ranks.stop()
    assert ranks.told == [(1, "rank 1 of 2: the leader is gone")]


def test_silence_ends_nobody():
    ranks = Ranks(2)
    time.sleep(0.1)
    ranks.stop()
    assert not ranks.told and not ranks.ended


ENVIRONMENT = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_the_place_comes_from_torchrun():
    assert placement({}) == Placement(0, 1, 0)
    assert placement(ENVIRONMENT) == Placement(1, 4, 1)
    for name, value, words in (
        ("RANK", "4", r"outside 0\.\.3"),
        ("RANK", "one", "no number"),
        ("MASTER_PORT", None, "MASTER_PORT is not set"),
    ):
        changed = {k: v for k, v in {**ENVIRONMENT, name: value}.items() if v is not None}
        with pytest.raises(InputError, match=words):
            placement(changed)


CARD = torch.device("cuda")


def test_every_process_takes_the_device_of_its_number(monkeypatch):
    place = Placement(3, 4, 1)
    monkeypatch.setattr("spectrim.distributed.launch.accelerator", lambda: None)
    assert str(device_for(place)) == "cpu"
    monkeypatch.setattr("spectrim.distributed.launch.accelerator", lambda: CARD)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert str(device_for(place)) == "cuda:1"
    assert str(device_for(place, "cpu")) == "cpu"
    with pytest.raises(InputError, match="shared by 4 processes"):
        device_for(place, "cuda:0")
    with pytest.raises(InputError, match="not on 'mps'"):
        device_for(place, "mps")
    with pytest.raises(InputError, match="2 cuda devices"):
        device_for(Placement(3, 4, 3))


def test_without_torchrun_the_team_is_this_process(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    with membership() as team:
        assert (team.rank, team.size, team.leads) == (0, 1, True)
        assert team.share(7) == slice(0, 7)
        assert team.gather("x") == ["x"]
