"""Dropout: its mask against the same hash in NumPy, its statistics, and that only training drops."""

import numpy as np
import pytest
from mindspore import Tensor, nn
from mindspore import dtype as mstype

from parallel.layers.dropout import Dropout, DropoutKeys, connect_dropout

SAMPLES, ROWS, COLUMNS, RATE, SEED = 3, 384, 256, 0.25, 11


class Two(nn.Cell):
    def __init__(self):
        super().__init__()
        self.keys, self.first, self.second = DropoutKeys(), Dropout(RATE), Dropout(RATE)

    def construct(self, x, rows):
        keys = self.keys(rows, ROWS // SAMPLES)
        return self.first(x, keys), self.second(x, keys)


@pytest.fixture(scope="module")
def masks():
    """`masks(numbers)`: which elements the two dropouts keep of samples with these numbers, as booleans."""
    network = Two()
    assert connect_dropout(network, SEED)
    network.set_train(True)
    x = Tensor(np.ones((ROWS, COLUMNS), np.float32))

    def masks(*numbers):
        outputs = [output.asnumpy().reshape(ROWS, COLUMNS) for output in network(x, Tensor(numbers, mstype.int32))]
        assert all(set(np.unique(output)) <= {0.0, np.float32(1 / (1 - RATE))} for output in outputs)
        return [output > 0 for output in outputs]

    masks.salts = network.keys.salt, network.first.salt
    return masks


def numpy_mix(h):
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x85EBCA6B)
    half = h ^ (h >> np.uint32(13))
    h = half * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16)), half


def numpy_mask(salts, numbers):
    """The documented hash with unsigned integers."""
    with np.errstate(over="ignore"):
        samples = np.array(numbers, np.int64).astype(np.uint32) * np.uint32(0x9E3779B1)
        salt, factor = np.array(salts, np.int32).view(np.uint32)
        places = np.arange(ROWS // SAMPLES, dtype=np.uint32) * np.uint32(0x85EBCA6B) + salt
        row, shift = numpy_mix((samples[:, None] + places[None, :]).reshape(-1, 1))
        columns = numpy_mix(np.arange(1, COLUMNS + 1, dtype=np.uint32))[0] | np.uint32(1)
        hashed = (row * factor * columns[None, :] + shift).view(np.int32)
    return hashed >= np.floor(-(2.0**31) + RATE * 2.0**32)


@pytest.mark.parametrize("numbers", [(0, 1, 2), (7, 3, 7), (123_456_789, 2**31 - 1, -(2**31))])
def test_mask_is_the_documented_hash(masks, numbers):
    assert np.array_equal(masks(*numbers)[0], numpy_mask(masks.salts, numbers))


def test_mask_looks_random(masks):
    first, second = masks(3, 4, 5)
    later, _ = masks(6, 7, 8)
    deviation = np.sqrt(RATE * (1 - RATE))
    assert abs(first.mean() - (1 - RATE)) < 5 * deviation / np.sqrt(first.size)
    for dim, count in ((0, ROWS), (1, COLUMNS)):
        spread = first.mean(dim).std() / (deviation / np.sqrt(count))
        assert 0.8 < spread < 1.2, "shares of rows and columns spread as independent draws do"
    limit = 5 / np.sqrt(first.size)
    pairs = {"step": (first, later), "layer": (first, second), "row": (first[1:], first[:-1]),
             "column": (first[:, 1:], first[:, :-1]), "diagonal": (first[1:, 1:], first[:-1, :-1])}
    for name, (one, other) in pairs.items():
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < limit, name
    centred = first - first.mean()
    corners = centred[:-1, :-1] * centred[1:, :-1] * centred[:-1, 1:] * centred[1:, 1:]
    assert abs(corners.mean()) < limit * deviation**4 * 1.5


def test_pairs_of_columns_are_independent_over_rows(masks):
    """Multiply-add hashing: any two columns drop together as often as two coins do, whatever their keys."""
    kept = np.concatenate([masks(*range(30 + 3 * i, 33 + 3 * i))[0] for i in range(20)])
    correlation = np.corrcoef(kept.T)[np.triu_indices(COLUMNS, 1)]
    assert abs(correlation).max() < 6 / np.sqrt(len(kept))
    assert 0.9 < correlation.std() * np.sqrt(len(kept)) < 1.1


def test_a_sample_keeps_its_mask_wherever_it_stands(masks):
    uninterrupted, moved = masks(7, 8, 9)[0].reshape(SAMPLES, -1), masks(9, 7, 8)[0].reshape(SAMPLES, -1)
    assert np.array_equal(moved, uninterrupted[[2, 0, 1]])
    other = Two()
    connect_dropout(other, SEED + 1)
    assert (other.keys.salt, other.first.salt) != masks.salts
    assert other.first.salt % 2 and other.first.salt != other.second.salt


def test_heads_have_masks_of_their_own():
    """In [B, H, S, S] heads count as columns: no two heads of a sample drop the same places."""
    dropout, keys = Dropout(RATE), DropoutKeys()
    dropout.set_train(True)
    x = Tensor(np.ones((2, 3, 32, 32), np.float32))
    kept = dropout(x, keys(Tensor([4, 9], mstype.int32), 32)).asnumpy().reshape(6, -1) > 0
    assert abs(np.corrcoef(kept)[np.triu_indices(6, 1)]).max() < 5 / np.sqrt(32 * 32)


def test_only_training_drops():
    cell, x = Dropout(0.9), Tensor(np.ones((4, 4), np.float32))
    cell.set_train(False)
    assert np.array_equal(cell(x).asnumpy(), x.asnumpy())
    with pytest.raises(ValueError, match="must be in"):
        Dropout(1.0)
