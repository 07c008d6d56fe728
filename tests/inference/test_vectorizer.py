"""The encoder as a scikit-learn transformer."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import check_estimator
from sklearn.utils.validation import check_is_fitted, validate_data

import jepa3d
from jepa3d import CloudVectorizer
from jepa3d.models.encoder import PointEncoder

RNG = np.random.default_rng(0)
CLOUD = RNG.normal(size=(32, 3))


@pytest.fixture(autouse=True)
def encoder(tmp_path, monkeypatch) -> PointEncoder:
    """Replace the encoder of the package by a small one. Returns it."""
    torch.manual_seed(0)
    PointEncoder(16, 1, 2, 8, 8, 32, tokenizer_dim=8).save_pretrained(tmp_path / "encoder")
    monkeypatch.setattr("jepa3d.models.ready.DEFAULT", tmp_path / "encoder")
    return jepa3d.load(tmp_path / "encoder")


def test_a_pipeline_classifies_clouds(encoder):
    labels = np.arange(40) % 2
    clouds = RNG.normal(size=(40, 64, 3)) * np.array([[1, 1, 1], [1, 1, 9]])[labels][:, None]
    pipeline = make_pipeline(CloudVectorizer(), LogisticRegression(max_iter=1000))
    assert pipeline.fit(clouds[:20], labels[:20]).score(clouds[20:], labels[20:]) > 0.9
    pipeline.set_params(cloudvectorizer__pooling="max").fit(clouds, labels)
    assert list(pipeline[:1].get_feature_names_out())[-1] == "cloudvectorizer15"
    expected = jepa3d.embed(clouds, encoder, pooling="max")
    assert np.array_equal(pipeline[:1].transform(clouds), expected)
    assert np.array_equal(pipeline[:1].transform(list(clouds)), expected)


def test_parameters_are_kept_as_given_and_looked_at_by_fit(tmp_path):
    made = clone(CloudVectorizer(str(tmp_path / "encoder"), "none", 0, "mean"))
    assert list(made.get_params().values()) == [0, str(tmp_path / "encoder"), "mean", "none"]
    with pytest.raises(NotFittedError):
        made.transform([CLOUD])
    assert made.fit_transform([CLOUD]).shape == (1, 16)
    with pytest.raises(ValueError, match="layer 7: use 0"):
        made.set_params(layer=7).fit([CLOUD])


def test_a_cloud_that_cannot_be_used_is_a_row_of_nan():
    with pytest.warns(UserWarning, match="cloud 1: has NaN or infinite coordinates"):
        vectors = CloudVectorizer().fit_transform([CLOUD, np.where(CLOUD > 1, np.nan, CLOUD)])
    assert np.isfinite(vectors).all(1).tolist() == [True, False]


class OfRows(CloudVectorizer):
    """Takes tables, as scikit-learn's checks need: each row gives the scale of one fixed cloud."""

    def fit(self, X, y=None):
        return super().fit(self.clouds(validate_data(self, X)), y)

    def transform(self, X):
        check_is_fitted(self)
        return super().transform(self.clouds(validate_data(self, X, reset=False)))

    def clouds(self, rows):
        return CLOUD * (1 + 0.3 * np.sin(np.arange(3) + rows.sum(1)[:, None]))[:, None]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags


def test_it_passes_scikit_learn_s_checks_of_a_transformer():
    """It passes all checks except that of other array libraries. The checks use tables."""
    found = check_estimator(OfRows(), on_fail=None, on_skip=None)
    status = {check["check_name"]: check["status"] for check in found}
    assert len(status) > 40
    others = {name for name, how in status.items() if how != "passed"}
    assert others <= {"check_array_api_input"}
