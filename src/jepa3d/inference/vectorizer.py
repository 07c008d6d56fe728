"""`jepa3d.CloudVectorizer`: the encoder as a step of a scikit-learn pipeline."""

import numpy as np
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from jepa3d.inference.embedding import Clouds, embed
from jepa3d.inference.spec import EmbeddingSpec
from jepa3d.models.ready import load


class CloudVectorizer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """A step of a scikit-learn pipeline that turns clouds into vectors.

    Nothing is learned from the clouds: `fit` only loads the encoder, as the attribute `encoder_`.
    model: the folder of a run or of an encoder, a Hub id, or "default" for the encoder in the
    package. up_axis, layer and pooling: see `jepa3d.embed`.

    >>> make_pipeline(CloudVectorizer(), LogisticRegression()).fit(clouds, labels)
    """

    def __init__(
        self,
        model: str = "default",
        up_axis: str = "z",
        layer: int = -1,
        pooling: str = "mean_max",
    ):
        self.model = model
        self.up_axis = up_axis
        self.layer = layer
        self.pooling = pooling

    def fit(self, X: Clouds, y: object = None) -> "CloudVectorizer":
        """Load the encoder; X and y are ignored. Raises ValueError if a setting is unknown or the
        encoder cannot be loaded.
        """
        encoder = load(self.model)
        spec = EmbeddingSpec.of("", encoder, self.up_axis, self.layer, self.pooling)
        self.encoder_, self._n_features_out = encoder, spec.embed_dim
        return self

    def transform(self, X: Clouds) -> np.ndarray:
        """Compute the vectors [n, E] (float32) of n clouds, as `jepa3d.embed` does. X: an array
        [n, N, 3], a list of arrays, or a list of paths.

        A cloud that cannot be used gets a row of NaN, and a warning names the cloud. Raises
        ReadError if no cloud can be used.
        """
        check_is_fitted(self)
        return embed(X, self.encoder_, self.up_axis, self.layer, self.pooling)

    def __sklearn_tags__(self):  # called by scikit-learn 1.6 and newer
        tags = super().__sklearn_tags__()  # pyrefly: ignore[missing-attribute]
        tags.input_tags.two_d_array, tags.input_tags.three_d_array = False, True
        tags.transformer_tags.preserves_dtype = []  # always float32, not the type of the clouds
        return tags
