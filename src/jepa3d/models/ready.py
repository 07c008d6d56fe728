"""Load pretrained encoders (`jepa3d.load`) and fine-tuned networks, and compute fingerprints of
encoders.
"""

import hashlib
import json
from pathlib import Path

from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier, LinearClassifier, Segmenter
from jepa3d.models.hub import DEFAULT, check_name, read_settings, similar

Network = Classifier | LinearClassifier | Segmenter  # an encoder with a head


def load(model: str | Path = "default", revision: str | None = None) -> PointEncoder:
    """Load a pretrained encoder in float32, in evaluation mode, on the CPU.

    model: the folder of a run or of an encoder, a Hub id, or "default" for the encoder in the
    package (model card: `jepa3d/weights/README.md`). revision: branch, tag or commit of a Hub
    repository. Raises ValueError if no encoder can be loaded.

    >>> encoder = load()
    >>> encoder.embed(torch.randn(1, 2048, 3)).shape[1] == 2 * encoder.width
    True
    """
    if model != "default" and not check_name(model, ("default",)):
        return PointEncoder.from_pretrained(model, revision=revision)
    folder = DEFAULT if model == "default" else Path(model)
    if (folder / "encoder" / "config.json").is_file():
        folder = folder / "encoder"
    if not (folder / "config.json").is_file():
        why = "neither an encoder nor a finished run: config.json is missing"
        raise ValueError(f"{model}: {why}")
    try:
        return PointEncoder.from_pretrained(folder)
    except ValueError as error:
        raise ValueError(f"{model}: the encoder cannot be read ({error})") from error


def load_any(model: str | Path) -> PointEncoder | Network:
    """Load a fine-tuned network if `model` is its folder or the folder of the run that made it;
    otherwise load an encoder as `load` does.

    Raises ValueError if neither can be loaded.
    """
    folder = _network_folder(Path(model))
    stored = model != "default" and (folder / "config.json").is_file()
    if stored and "class_names" in read_settings(folder):
        return load_network(model)
    return load(model)


def load_network(run: str | Path) -> Network:
    """Load the network of a finished run of `jepa3d classify`, `segment` or `label`.

    run: folder of the run, or the folder `model` in it. Raises ValueError for anything else.
    """
    folder = _network_folder(Path(run))
    try:
        if not folder.exists():
            raise ValueError(f"there is no such folder{similar(folder)}")
        settings = read_settings(folder)
        if "class_names" not in settings:
            raise ValueError(f"{folder}/config.json describes a network without classes")
        kind = LinearClassifier if "pooling" in settings else Classifier
        return (Segmenter if "parts_of" in settings else kind).from_pretrained(folder)
    except ValueError as error:
        expected = "not a finished run of jepa3d classify, segment or label"
        raise ValueError(f"{run}: {expected} ({error})") from error


def _network_folder(run: Path) -> Path:
    """Return the folder `model` in a run's folder, or `run` itself if it has no such folder."""
    return run / "model" if (run / "model").is_dir() else run


def fingerprint(encoder: PointEncoder) -> str:
    """Compute a hash (16 hexadecimal digits) of an encoder's settings and weights.

    Encoders with equal fingerprints give equal vectors if their attributes `upright` and
    `keep_strays` are equal too; these two attributes are not stored in config.json.
    """
    made = vars(encoder)["_hub_mixin_config"].items()
    settings = {name: value for name, value in made if name not in encoder.BEFORE}
    # The settings in `PointEncoder.BEFORE` are not hashed here, so that older encoders, whose
    # config.json lacks these settings, keep their fingerprints. These settings still change the
    # fingerprint, since they decide which weights exist, and the names of all weights are hashed
    # below.
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, values in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
