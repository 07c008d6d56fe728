"""`jepa3d.load`: the encoder that the package brings, a run's, or one of the Hub; fine-tuned networks; fingerprints."""

import hashlib
import json
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier, LinearClassifier, Segmenter

DEFAULT = Path(__file__).parents[1] / "weights"


def load(model: str | Path = "default", revision: str | None = None) -> PointEncoder:
    """A pretrained encoder, ready to embed: float32, in evaluation mode, on the CPU.

    model: "default" for the one in the package (its card: `jepa3d/weights/README.md`), the folder of a run or of an
    encoder, or a Hub id. revision: of a Hub repository. Raises ValueError for anything else.

    >>> encoder = load()
    >>> encoder.embed(torch.randn(1, 2048, 3)).shape[1] == 2 * encoder.width
    True
    """
    folder = DEFAULT if model == "default" else Path(model)
    folder = folder / "encoder" if (folder / "encoder" / "config.json").is_file() else folder
    if Path(model).exists() and not (folder / "config.json").is_file():
        raise ValueError(f"{model}: no encoder, and no run that has one: config.json is missing")
    try:
        return PointEncoder.from_pretrained(folder if folder.is_dir() else str(model), revision=revision)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{model}: neither a folder nor a repository of the Hub that can be had ({reason})") from error
    except (OSError, SafetensorError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(f"{model}: not a readable encoder ({(str(error).splitlines() or [''])[0]})") from error


def load_any(model: str | Path) -> PointEncoder | Classifier | LinearClassifier | Segmenter:
    """The fine-tuned network of a run or folder that has one, else the encoder, as of `load`. Raises ValueError."""
    file = _network_folder(Path(model)) / "config.json"
    return load_network(Path(model)) if file.is_file() and "class_names" in file.read_text() else load(model)


def load_network(run: Path) -> Classifier | LinearClassifier | Segmenter:
    """The network of a finished run of classify, segment or label, or in its model folder.

    Raises ValueError for anything else.
    """
    folder = _network_folder(run)
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = Segmenter if "parts_of" in config else LinearClassifier if "pooling" in config else Classifier
        return kind.from_pretrained(folder)
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{run}: no finished run of jepa3d classify, segment or label ({reason})") from error


def _network_folder(run: Path) -> Path:
    return run / "model" if (run / "model").is_dir() else run


def fingerprint(encoder: PointEncoder) -> str:
    """16 hexadecimal digits over the settings and weights of an encoder: equal for equal vectors."""
    digest = hashlib.sha256(json.dumps(vars(encoder)["_hub_mixin_config"], sort_keys=True).encode())
    for name, values in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
