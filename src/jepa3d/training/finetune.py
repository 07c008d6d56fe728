"""Supervised runs: train a classifier or part segmenter on labelled shapes, from a pretrained
encoder or from scratch, and write a run folder.

RUN/config.json       the settings, and the task's name
RUN/start/            the encoder before the first step
RUN/best/             the network of the best epoch so far; deleted when the run is finished
RUN/model/            the network of the selected epoch
RUN/results.json      the metrics of RUN/model on the test shapes
RUN/predictions.npz   the predictions of RUN/model for the test shapes

The folder also has run.json, metrics.jsonl and checkpoints/, as in pretraining (run.py).
"""

import io
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from jepa3d.config import EncoderConfig, FinetuneConfig, SegmentConfig
from jepa3d.data.datasets import PointClouds
from jepa3d.evaluation.classifiers import fit_head, set_head
from jepa3d.evaluation.features import layer_features
from jepa3d.evaluation.labelled import Labelled
from jepa3d.evaluation.supervised import Network, figures, predict, score
from jepa3d.models.encoder import PointEncoder, calibrate_batchnorm
from jepa3d.models.heads import Classifier, LinearClassifier, Segmenter, thirds
from jepa3d.models.teacher import load_module
from jepa3d.objectives.supervised import Supervised
from jepa3d.plain import log, to_dict, write_bytes
from jepa3d.run import Run
from jepa3d.training import checkpoint, runs
from jepa3d.training.engine import settle, tracker
from jepa3d.training.loop import Task, fit
from jepa3d.validate import validate

Config = TypeVar("Config", bound=FinetuneConfig)
TRAINED = {"all": "all weights", "head": "head only", "head_first": "head first"}
SELECTION = {"validation": "validation", "last": "last epoch", "best-on-test": "best on test"}
FEW = 100  # with fewer labelled shapes, none are held out to choose the epoch


@runs.exclusive
def finetune(
    config: FinetuneConfig,
    out: Path,
    resume: bool = False,
    stop_at: int | None = None,
    data: Labelled | None = None,
    encoder: PointEncoder | None = None,
    protocol: str | None = None,
) -> Path:
    """Train a classifier, or a part segmenter if `config` is a SegmentConfig. Then choose an epoch,
    and score the network of that epoch on the test shapes.

    stop_at: step at which the run stops early. data: the labelled shapes; None loads `config.data`.
    encoder: the encoder to start from; None loads `config.init`. protocol: the protocol's name in
    the result; None uses `protocol_name`. Returns the run's folder `out`. Raises ValueError for
    settings or data that cannot work, before anything is written, and if another command is writing
    to `out`. Raises the errors of `loop.py::fit` too, such as Interrupted if the run is stopped.
    """
    config, encoder, started = begin(config, out, resume, encoder)
    if started and runs.close_if_finished(out):
        return out
    segments = isinstance(config, SegmentConfig)
    num_points = config.num_points or config.encoder.num_points
    data = data or Labelled.load(config, num_points, parts=segments)
    select, held_out = selection(config, data)
    train, validation = data.divide(config.labels, held_out, config.seed)
    network = make_network(config, data, train, encoder)
    if started:
        runs.check_same_data(train, out)
    else:
        parameters = {"model": runs.count_parameters(network)}
        record = {"parameters": parameters, "pretraining": pretraining_of(config.init)}
        settings = {"task": "segment" if segments else "classify"} | to_dict(config)
        runs.create(out, settings, train, record, {"start": network.encoder})
    runs.wait_for_everyone()

    scored = {"validation": validation, "best-on-test": data.test, "last": None}[select]
    task = Task(
        Supervised(network, config.label_smoothing, config.trained),
        config,
        "model",
        network,
        targets=partial(_targets, train),
        scorer=None if scored is None else partial(score, network, scored),
        scored_split="test" if select == "best-on-test" else "validation",
        layer_decay=config.layer_decay,
        scores_first=config.trained == "head_first",
    )
    state = fit(task, train, config, out, stop_at)
    if scored is not None:
        network = type(network).from_pretrained(checkpoint.put_back(out / "best"))
    if runs.is_main():
        checkpoint.replace_folder(out / "model", network.save_pretrained)
        predicted = predict(network, data.test, config.votes, config.seed)
        _write_predictions(out / "predictions.npz", data, predicted)
        metrics, details = figures(network, data.test, predicted)
        val_metrics = None
        if validation is not None:
            val_metrics, _ = figures(network, validation, predict(network, validation))
        precision = {"mixed_precision": state["mixed_precision"]}
        result = {
            "protocol": protocol or protocol_name(config),
            "data": data.record(train, validation, config.labels),
            "selection": SELECTION[select],
            "metrics": metrics,
            "validation": val_metrics,
            "details": details,
            "settings": arm_settings(config) | precision,
        }
        runs.finish(out, runs.cost_of(out, state), state["metrics"], result)
        shutil.rmtree(out / "best", ignore_errors=True)
    runs.wait_for_everyone()
    return out


def begin(
    config: Config, out: Path, resume: bool, encoder: PointEncoder | None = None
) -> tuple[Config, PointEncoder | None, bool]:
    """Check the settings, and load the encoder.

    Returns the settings, the encoder, and whether `out` is a run to continue. The encoder is None
    if the run starts from scratch. Otherwise, the group `encoder` of the returned settings holds
    the settings of the returned encoder. Raises ValueError for settings that cannot work, or that
    differ from the settings of the run to continue.
    """
    started = runs.begin(out, resume)
    config = settle(config, out if started else None)
    copied = out / "start" if started and config.init else None
    encoder = encoder or start_encoder(config, copied)
    config = replace(config, encoder=encoder_config(encoder)) if encoder else config
    validate(config)
    tracker(config.track, None)
    runs.check_batch(config, "batch_size", config.batch_size)
    if started:
        runs.check_unchanged(config, out)
    return config, encoder, started


def _targets(clouds: PointClouds, index: np.ndarray) -> tuple[torch.Tensor, ...]:
    """Return the labels [B] of the shapes at `index`. If the data has part labels, also return the
    part labels [B, N] of the points of these shapes.
    """
    assert clouds.labels is not None
    labels = torch.from_numpy(clouds.labels[index])
    if clouds.parts is None:
        return (labels,)
    return labels, torch.from_numpy(clouds.parts[index].astype(np.int64))


def start_encoder(config: FinetuneConfig, copied: Path | None) -> PointEncoder | None:
    """Load the encoder that a run starts from, with the run's number of points and patches.

    Returns None for a run from scratch. copied: if the run is continued, the folder of its copy of
    the encoder, else None. The copy is read instead of `config.init`, since the network that
    `config.init` names may have changed. Raises ValueError if the network cannot be loaded or is
    not an encoder.
    """
    source = str(copied) if copied else config.init
    if source is None:
        return None
    loaded = load_module(source)
    if not isinstance(loaded, PointEncoder):
        raise ValueError(f"--init {source} is not an encoder")
    encoder = PointEncoder(**vars(encoder_config(loaded)) | size_overrides(config))
    encoder.load_weights(loaded)
    return encoder


def encoder_config(encoder: PointEncoder) -> EncoderConfig:
    """Return the arguments that an encoder was created with."""
    arguments = vars(encoder)["_hub_mixin_config"]
    names = vars(EncoderConfig()).keys() & arguments.keys()
    return EncoderConfig(**{name: arguments[name] for name in names})


def size_overrides(config: FinetuneConfig) -> dict[str, Any]:
    """Return the settings `num_points` and `num_groups`, each only if it is not None; they replace
    the encoder's own values.
    """
    found = {"num_points": config.num_points, "num_groups": config.num_groups}
    return {name: value for name, value in found.items() if value is not None}


def make_network(
    config: FinetuneConfig, data: Labelled, train: PointClouds, encoder: PointEncoder | None
) -> Network:
    """Create the network with random weights from the seed, then copy the weights of `encoder` to
    the network's encoder. If `encoder` is None, the weights stay random, and the statistics of the
    BatchNorms are computed from train shapes.

    If `config.trained` is "head_first", the head is fitted here to the encoder's vectors of the
    train shapes, before the run trains all weights.
    """
    arguments: dict[str, Any] = vars(config.encoder) | size_overrides(config)
    classes = list(data.class_names)
    torch.manual_seed(config.seed)
    if isinstance(config, SegmentConfig):
        layers = list(config.layers or thirds(config.encoder.depth))
        parts = list(data.part_names), data.parts_of
        network: Network = Segmenter(arguments, classes, *parts, layers, config.dropout)
    elif config.trained == "head_first":
        network = LinearClassifier(arguments, classes)
    else:
        network = Classifier(arguments, classes, config.dropout)
    if encoder is None:
        sample = np.random.default_rng(config.seed).permutation(len(train))[:512]
        calibrate_batchnorm(network.encoder, train.batch(sample))
    else:
        network.encoder.load_state_dict(encoder.state_dict())
    if isinstance(network, LinearClassifier):
        assert train.labels is not None
        vectors = layer_features(network.encoder, train)[-1]
        set_head(network, fit_head(vectors, train.labels)[0])
    return network


def selection(config: FinetuneConfig, data: Labelled) -> tuple[str, float]:
    """Return how the epoch is chosen, and the share of the labelled shapes held out for this
    choice.
    """
    if config.select != "validation":
        return config.select, 0.0
    if data.validation is not None and config.labels == 1:
        return "validation", 0.0
    labelled = len(data.labelled(config.labels, config.seed))
    if labelled < FEW or config.validation == 0:
        consequence = "none are held out for validation, and the last epoch is used"
        log.info(f"{labelled} labelled shapes: {consequence}")
        return "last", 0.0
    return "validation", config.validation


def protocol_name(config: FinetuneConfig) -> str:
    """Return the protocol's name: what is trained, in words."""
    if isinstance(config, SegmentConfig):
        return "part segmentation" + ("" if config.trained == "all" else ", head only")
    decay = "" if config.layer_decay == 1 else f", layer decay {config.layer_decay}"
    return f"fine-tuned, {TRAINED[config.trained]}{decay}"


ARM = (  # settings in which the arms (variants) of one comparison may differ
    "lr weight_decay epochs max_steps warmup_epochs batch_size labels trained layer_decay dropout "
    "label_smoothing scale rotate translate mixed_precision labels_key layers validation clip_grad "
    "min_lr up_axis accumulate compile"
).split()


def arm_settings(config: FinetuneConfig) -> dict[str, Any]:
    """Return the settings in which arms of one comparison may differ, with the encoder's."""
    known = to_dict(config)
    found = {name: known[name] for name in ARM if name in known}
    return found | known["encoder"] | size_overrides(config)


def pretraining_of(init: str | None) -> dict | None:
    """Return the settings, data, cost and commit of the pretraining run that `init` is part of.

    The result's key "encoder_of" says which of the run's encoders `init` is; "" means the final
    one. Returns None if `init` does not belong to a pretraining run, or if it is the untrained
    encoder of a run.
    """
    if init is None or Path(init).name == "untrained" or not Path(init).is_dir():
        return None
    # An `init` from a run is the run's folder, or one of its folders encoder and snapshots/step-N.
    folders = (Path(init), *Path(init).parents[:2])
    run = next((Run(folder) for folder in folders if Run.is_at(folder)), None)
    if run is None or run.task != "pretrain":
        return None
    which = Path(init).relative_to(run.folder).as_posix()
    which = "" if which in (".", "encoder") else which
    kept = {name: run.record.get(name) for name in ("data", "cost", "commit")}
    return run.config | {"encoder_of": which} | kept


def _write_predictions(path: Path, data: Labelled, predicted: Mapping[str, np.ndarray]) -> None:
    arrays: dict[str, Any] = {"label": data.test.labels} | dict(predicted)
    if "probability" not in arrays:
        assert data.test.parts is not None
        points = data.test.points[:].astype(np.float16)
        arrays |= {"points": points, "parts": data.test.parts[:]}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())
