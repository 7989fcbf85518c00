"""Features that lie side by side are looked up and joined together: equal to feature by feature, in a small graph."""

import numpy as np
import pytest
from mindspore import Tensor

from parallel.layers.parameter import initialize
from recsys.build import sample_batch
from recsys.data.features import Feature, assign_columns, expand
from recsys.layers.embedding import FeatureEmbedding, runs_of_numbers, runs_of_slots


def feature(name, side="user", **more):
    return Feature(name=name, side=side, **{"rows": 9, "values": "hash", **more})


def number(name, **more):
    return Feature(name=name, type="numeric", transform="value", **more)


FEATURES = [
    feature("user"), feature("profile", repeat=5), number("age", side="user", repeat=3),
    feature("wide", width=8, repeat=3),
    feature("item", "item"), feature("first", "item", repeat=2),
    feature("tags", "item", type="multi", length=3), feature("last", "item", repeat=2),
    feature("history", "cross", group="behaviour", type="sequence", target="item", pooling="mean", length=4, repeat=2),
    feature("cross", "cross", group="behaviour", width=8), number("rate", side="cross", group="behaviour", repeat=2),
    feature("whole", type="sequence", target="first_1", pooling="none", length=4),
]


@pytest.mark.parametrize("sliced", [False, True])
def test_groups_are_the_features_vectors_one_after_the_other(sliced):
    spec = assign_columns(expand(FEATURES), 4)
    embedding = FeatureEmbedding(spec, 0.1)
    initialize(embedding, 3)
    embedding.sliced = sliced
    ids, numbers, _ = sample_batch(spec, 6, 1, 0)
    groups, sequences = embedding(Tensor(ids), Tensor(numbers))
    tables = {width: table.table.asnumpy() for width, table in zip(spec.tables, embedding.tables, strict=True)}
    weight, bias = embedding.numbers.weight.asnumpy(), embedding.numbers.bias.asnumpy()

    def vector(item):
        if item.is_value:
            column = spec.numeric[item.name].column
            return numbers[:, column:column + 1] * weight[column] + bias[column]
        slot = spec.slots[item.name]
        own = ids[:, slot.start:slot.start + slot.length]
        rows = tables[slot.width][own]
        there = (own != slot.offset)[..., None]
        return (rows * there).sum(1) / np.maximum(there.sum(1), 1) if item.is_list else rows[:, 0]

    wanted = [np.concatenate([vector(item) for item in members if item.pooling != "none" or not item.is_list], 1)
              for members in spec.groups.values()]
    assert len(groups) == len(wanted) == 3
    for got, want in zip(groups, wanted, strict=True):
        np.testing.assert_allclose(got.asnumpy(), want, rtol=1e-6, atol=1e-7)
    slot = spec.slots["whole"]
    np.testing.assert_array_equal(sequences[0][0].asnumpy(), tables[4][ids[:, slot.start:slot.start + 4]])


def test_the_graph_grows_with_groups_and_lists_not_with_features():
    def sizes(repeat):
        spec = assign_columns(expand([feature("user", repeat=repeat), number("x", side="user", repeat=repeat),
                                      feature("item", "item"), feature("about", "item", repeat=repeat),
                                      feature("seen", "cross", type="sequence", target="item", length=4)]), 4)
        return ([[slot.feature.name for slot in run] for run in runs_of_slots(spec)], runs_of_numbers(spec),
                sum(1 for _ in FeatureEmbedding(spec, 0.1).cells_and_names()))

    few, many = sizes(2), sizes(200)
    assert few[0] == [["user_0", "user_1"], ["item"], ["about_0", "about_1"], ["seen"]]
    assert [len(run) for run in many[0]] == [200, 1, 200, 1] and [len(run) for run in many[1]] == [200]
    assert few[2] == many[2]
