import hashlib

import torch

from fedray.seeds import generator, number


def test_a_seed_is_the_hash_of_its_key():
    digest = hashlib.sha256(b"(7, 'train', 2, 3)").digest()
    assert number(7, "train", 2, 3) == int.from_bytes(digest[:8], "little") // 2
    draws = {tuple(torch.rand(2, generator=generator(seed, "train", r)).tolist()) for seed in (0, 1) for r in (0, 1)}
    assert len(draws) == 4
