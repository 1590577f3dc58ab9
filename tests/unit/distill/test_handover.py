"""Where states wait: each comes out once, the device holds no more than its budget."""

from __future__ import annotations

import pytest
import torch

from minitron_megatron.distill.handover import HandoverStore, Held

CPU = torch.device("cpu")


def held(value: float) -> Held:
    return Held(torch.full((4, 2, 8), float(value)), sharded=False)  # 256 bytes


def test_each_state_comes_out_once_in_any_order() -> None:
    store = HandoverStore(1e9, CPU)
    for number in range(5):
        store.put(number, held(number))
    for number in (3, 0, 4, 1, 2):
        assert number in store
        assert store.take(number).states[0, 0, 0] == number
        assert number not in store
    with pytest.raises(KeyError):
        store.take(3)
    assert (store.device_bytes, store.host_bytes) == (0, 0)


def test_the_device_holds_its_budget_and_the_rest_waits_on_the_host() -> None:
    store = HandoverStore(2.5 * 256, CPU)
    for number in range(5):
        store.put(number, held(number))
    assert (store.device_bytes, store.host_bytes) == (2 * 256, 3 * 256)
    assert [float(store.take(number).states.mean()) for number in range(5)] == [0, 1, 2, 3, 4]
    assert (store.device_bytes, store.host_bytes) == (0, 0)


def test_room_on_the_device_is_used_again() -> None:
    store = HandoverStore(256, CPU)
    store.put("a", held(1))
    store.take("a")
    store.put("b", held(2))
    assert (store.device_bytes, store.host_bytes) == (256, 0)


def test_on_a_cpu_nothing_is_copied() -> None:
    store, state = HandoverStore(0, CPU), held(1)
    store.put("a", state)
    assert store.take("a").states.data_ptr() == state.states.data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: spilling to pinned memory needs one")
def test_on_a_gpu_spilled_states_wait_in_pinned_memory_and_come_back() -> None:
    device = torch.device("cuda")
    store, states = HandoverStore(0, device), [torch.randn(4, 2, 8, device=device) for _ in range(4)]
    for number, state in enumerate(states):
        store.put(number, Held(state, sharded=False))
    assert (store.device_bytes, store.host_bytes) == (0, 4 * 256)
    for number, state in enumerate(states):
        assert torch.equal(store.take(number).states, state)
