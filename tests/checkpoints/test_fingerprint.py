"""Fingerprints: the same however a tensor is cut up, and the same as ever, since files hold them."""

from __future__ import annotations

import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.checkpoints.fingerprint import RunningFingerprint, fingerprint

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "scalar": torch.tensor(1.5).bfloat16(), "empty": torch.zeros(0, 3)}


def test_fingerprints_in_files_stay_valid() -> None:
    assert fingerprint(TENSORS.items()) == "xxh3:4f5631ab69350e9b33b0f4c9938c0139"


def test_what_is_hashed() -> None:
    data = {name: bytes(tensor.flatten().view(torch.uint8).tolist()) for name, tensor in TENSORS.items()}
    lines = [
        f"a.weight float32 2x3 {xxhash.xxh3_128_hexdigest(data['a.weight'])}",
        f"empty float32 0x3 {xxhash.xxh3_128_hexdigest(b'')}",
        f"scalar bfloat16  {xxhash.xxh3_128_hexdigest(data['scalar'])}",
    ]
    assert fingerprint(TENSORS.items()) == "xxh3:" + xxhash.xxh3_128_hexdigest("\n".join(lines).encode())


@given(sizes=st.lists(st.integers(1, 5), max_size=6), order=st.permutations(list(TENSORS)))
def test_pieces_and_their_order_do_not_matter(sizes: list[int], order: list[str]) -> None:
    running = RunningFingerprint()
    for name in order:
        tensor = TENSORS[name]
        running.begin(name, tensor.dtype, tuple(tensor.shape))
        flat = tensor.flatten()
        for size in sizes:
            running.update(flat[:size])
            flat = flat[size:]
        running.update(flat)
    assert running.digest() == running.digest() == fingerprint(TENSORS.items())
