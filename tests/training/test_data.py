"""What a job declares of its records is complete before anything is read (P11)."""

from __future__ import annotations

import pytest
from people import job_of

from cluster.errors import UsageError
from training import data
from training.sections import Data


def declared(**facts):
    return data.declared(Data(**{"source": "people.csv", **facts}))


def test_features_and_label_must_be_declared():
    label = {"column": "label", "categories": ("no", "yes")}
    with pytest.raises(UsageError, match=r"^data\.features: "):
        declared(label=label)
    with pytest.raises(UsageError, match=r"^data\.label: "):
        declared(features={"x": {"range": (0, 1)}})
    assert declared(text={"column": "note"}).features == {}


@pytest.mark.parametrize("image", [None, (1, 2, 2), (1, 8, 7), (1, 3, 4)])
def test_a_cnn_needs_an_image_of_the_record_s_width(image):
    job = job_of(features={f"p{i}": {"range": [0, 1]} for i in range(12 if image == (1, 3, 4) else 64)})
    model = job.model.model_copy(update={"kind": "cnn", "image": image})
    with pytest.raises(UsageError, match=r"^model\.image: "):
        data.image_of(model, job.data)
    assert data.image_of(job.model, job.data) is None


def test_digits_bring_their_columns_along():
    table = declared(source=data.DIGITS)
    assert table.width == 64
    assert len(table.label.categories) == 10
    job = job_of(data.DIGITS)
    assert data.image_of(job.model.model_copy(update={"kind": "cnn"}), table) == (1, 8, 8)
