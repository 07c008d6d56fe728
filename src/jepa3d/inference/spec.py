"""The specification of vectors, which says how they were computed. Vectors are comparable only if
their specifications are equal, apart from the name of the model.
"""

import copy
from dataclasses import asdict, dataclass
from pathlib import Path

from jepa3d.data.cloud import TO_Z_UP
from jepa3d.frame import FRAME
from jepa3d.models.encoder import POOLINGS, PointEncoder
from jepa3d.models.ready import fingerprint, load


@dataclass(frozen=True)
class EmbeddingSpec:
    """The encoder and the settings with which vectors were computed. Every file of vectors has this
    specification in its metadata.
    """

    model: str  # absolute path of a folder, or a Hub id, or "default"
    fingerprint: str  # hash of the encoder's weights
    layer: int
    pooling: str
    up_axis: str
    embed_dim: int  # width of the vectors
    # version of the rules in frame.py; 1 for old files, whose metadata lack this entry
    frame: int = 1
    # whether stray points, far from nearly all others, were kept
    keep_strays: bool = False

    @staticmethod
    def of(
        model: str, encoder: PointEncoder, up_axis: str, layer: int, pooling: str
    ) -> "EmbeddingSpec":
        """Create the specification of the vectors of `encoder`, which was loaded from `model`.

        The fingerprint takes time to compute. If `model` is "", it is not computed, and is "" too.
        Raises ValueError if there is no such up axis, layer or pooling.
        """
        if up_axis not in (*TO_Z_UP, "none"):
            raise ValueError(f"up axis {up_axis!r} is unknown: use x, y, z or none")
        if not -1 <= layer <= encoder.depth:
            allowed = f"0 (tokenizer) to {encoder.depth}, or -1 (last)"
            raise ValueError(f"layer {layer}: use {allowed}")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling {pooling!r}: use {', '.join(POOLINGS)}")
        folder = model not in ("", "default") and Path(model).exists()
        name = str(Path(model).absolute()) if folder else model
        weights = fingerprint(encoder) if model else ""
        layer, width = layer % (encoder.depth + 1), encoder.width
        settings = layer, pooling, up_axis, width * len(pooling.split("_"))
        return EmbeddingSpec(name, weights, *settings, FRAME, encoder.keep_strays)

    def applied(self, encoder: PointEncoder) -> PointEncoder:
        """Return a copy of the encoder that prepares clouds as this specification says. The copy
        and the encoder share their weights.
        """
        encoder = copy.copy(encoder)
        encoder.keep_strays = self.keep_strays
        encoder.upright = encoder.upright and self.up_axis != "none"
        return encoder

    def encoder(self, index: str | Path, model: str | None = None) -> PointEncoder:
        """Load the encoder with which the vectors of `index` were computed.

        model: path of the encoder, if it was moved. Raises ValueError if the encoder cannot be
        loaded or is a different one, or if the vectors were made by an incompatible version of
        jepa3d.
        """
        self.check_frame(index)
        encoder, name = load(model or self.model), model or self.model
        if fingerprint(encoder) != self.fingerprint:
            wrong = f"made by another encoder than {name}; embed again, or give --model"
            raise ValueError(f"{index}: {wrong}")
        return self.applied(encoder)

    def check_frame(self, index: str | Path) -> None:
        """Raise ValueError if the vectors were made by a version of jepa3d that prepares clouds
        differently.
        """
        if self.frame != FRAME:
            by = f"another version of jepa3d (frame {self.frame}, here {FRAME})"
            hint = "embed the clouds again, into another --out"
            raise ValueError(f"{index}: its vectors were made by {by}; {hint}")

    def check(self, other: "EmbeddingSpec", index: str | Path) -> None:
        """Raise ValueError if this specification differs from `other`, the specification of
        `index`, in anything but the name of the model. (One model can have several names.) The
        message names the first difference.
        """
        if self.frame != other.frame:
            other.check_frame(index)
        for name, value in asdict(self).items():
            if name == "model" or (theirs := getattr(other, name)) == value:
                continue
            difference = f"{name.replace('_', '-')} {theirs} (not {value})"
            if name == "fingerprint":
                difference = f"another model ({other.model}, not {self.model})"
            raise ValueError(f"{index}: its vectors were made with {difference}")
