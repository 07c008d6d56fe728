"""Probe frozen features: fit simple classifiers to them, under the protocols of this table. The
test split is used once, after all choices have been made.

| protocol    | features     | classifier                              | chosen on                          |
|-------------|--------------|-----------------------------------------|------------------------------------|
| logistic    | standardised | logistic regression                     | C and layer: a fifth of train      |
| logistic_10 | standardised | logistic on 10 labels a class, 10 times | C and layer: 5 folds of the labels |
| knn         | standardised | 10 nearest neighbours by cosine         | layer: a fifth of train            |
| svc_linear  | unchanged    | SVC(linear, C=0.012) (Point-M2AE)       | layer: a fifth of train            |
| linear_svc  | unchanged    | LinearSVC(dual=auto) (Point-MAE)        | layer: a fifth of train            |
| mlp3        | standardised | 3-layer head (Point-MAE; ACT's MLP-3)   | layer: a fifth of train            |

Features are the tokens of a layer, pooled to one vector per shape; the result names the pooling.
Scores are overall accuracies in per cent. C is scikit-learn's inverse regularisation strength. If
the user fixes the layer, only C is chosen. The data set's own validation split, if there is one and
it is not itself scored, replaces the fifth of train. A quick probe chooses nothing: C is 0.1, and
the layer is the last one unless the user fixes it.
"""

import time
import warnings
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import numpy as np
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedKFold

from jepa3d.config import BOOKKEEPING
from jepa3d.data.datasets import PointClouds
from jepa3d.evaluation.classifiers import by_class, class_accuracy, predict, side_by_side
from jepa3d.evaluation.descriptors import baselines
from jepa3d.evaluation.features import layer_features, untrained_like
from jepa3d.evaluation.labelled import Labelled, LabelledSet, Part, check_pairs, fifth
from jepa3d.evaluation.protocol import moments, provenance
from jepa3d.evaluation.reconstruction import dvae_figures
from jepa3d.evaluation.tables import Sheet, mean_std
from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.ready import load as load_encoder
from jepa3d.models.teacher import load_module
from jepa3d.plain import differences
from jepa3d.run import Run

PROTOCOLS = ("logistic", "logistic_10", "knn", "svc_linear", "linear_svc", "mlp3")
# the values of C that `logistic` and `logistic_10` try
_C_GRID = (0.001, 0.01, 0.1, 1.0)
_FEW_C_GRID = (0.01, 0.1)
# the C that probes chose most often on the validation split of ModelNet10
QUICK_C = 0.1
# logistic_10: the number of labels per class in a sample, and the number of samples
_SHOTS, _DRAWS = 10, 10


def check_protocols(protocols: Iterable[str]) -> None:
    """Raise ValueError if a protocol is unknown; the message names the known protocols."""
    if unknown := set(protocols) - set(PROTOCOLS):
        raise ValueError(f"protocol {min(unknown)!r} is not one of {', '.join(PROTOCOLS)}")


def selection_rule(shapes: Labelled, quick: bool = False) -> str:
    """Return in words how layer and C are chosen, and which split is scored."""
    held, scored = "a held-out fifth of train", "test used once"
    if shapes.part == "validation":
        other = "another fifth of train"
        if shapes.has_validation:
            other = "the validation split"
        scored = f"scored on {other}, test not used"
    elif shapes.has_validation:
        held = "the validation split"
    if quick:
        return f"none, quick: layer and C are fixed (C {QUICK_C}); {scored}"
    return f"layer and C on {held} (5 folds of the labels for logistic_10); {scored}"


def _confusion(protocol: str, c: float, train, y, test, y_test, *, seed: int = 0) -> np.ndarray:
    """Fit a protocol's classifier to train and return its confusion matrix [K, K] on test. Rows are
    true classes, columns are predicted classes; both are sorted. K is the number of classes.
    """
    found = predict(protocol, c, train, y, test, seed)
    return confusion_matrix(y_test, found, labels=np.union1d(y, y_test))


def _overall(confusion: np.ndarray) -> float:
    return 100 * float(np.trace(confusion) / confusion.sum())


def run_protocol(
    protocol: str,
    train: np.ndarray,
    y: np.ndarray,
    test: np.ndarray,
    y_test: np.ndarray,
    layers: Iterable[int],
    seed: int = 0,
    held: tuple[np.ndarray, np.ndarray] | None = None,
    c: float | None = None,
) -> dict:
    """Fit one protocol's classifier to `train`, and score it on `test`.

    train, test: features of the shapes of each split, arrays [L, n, E] for L layers, n shapes and E
    channels. y, y_test: the labels [n] of these shapes. layers: the layers to choose from. held:
    features and labels on which layer and C are chosen; if it is None, a fifth of train is held out
    for this choice. c: a fixed C; if it is None, C is chosen. Returns accuracy, layer, C,
    mean_class_accuracy and confusion (see `_confusion`). C is None for a protocol other than
    `logistic` and `logistic_10`, since its classifier has no C to choose.

    The protocol logistic_10 ignores `held`: it draws ten samples of the labels, and it chooses
    layer and C for each sample, on folds of this sample. Its result has the mean and std of the
    accuracy over samples, and the layer and C that were chosen for each sample.
    """
    few = protocol == "logistic_10"
    grid = (0.0,)
    if protocol.startswith("logistic"):
        grid = (c,) if c is not None else _FEW_C_GRID if few else _C_GRID
    choices = list(product(layers, grid))
    draws = few_labels(y, seed) if few else [slice(None)]
    chosen = choices[:1] * len(draws)
    if len(choices) > 1:
        x, labels = train, y
        if held and not few:
            x = np.concatenate([train, held[0]], 1)
            labels = np.concatenate([y, held[1]])
        jobs = []
        for rows in draws:
            if few:
                folds = _folds(y[rows], seed)
            elif held:
                folds = [(np.arange(len(y)), np.arange(len(y), len(labels)))]
            else:
                folds = [fifth(y, seed)]
            common = labels[rows], folds, seed
            jobs += [(protocol, c, x[layer][rows], *common) for layer, c in choices]
        numbers = sum(len(folds) * features.size for _, _, features, _, folds, _ in jobs)
        validation = np.reshape(side_by_side(_validation, jobs, numbers), (len(draws), -1))
        chosen = [choices[best] for best in validation.argmax(1)]
    confusions = []
    for rows, (layer, c) in zip(draws, chosen, strict=True):
        arrays = train[layer][rows], y[rows], test[layer], y_test
        confusions.append(_confusion(protocol, c, *arrays, seed=seed))
    if few:
        mean, std = moments([*map(_overall, confusions)]).values()
        return {"accuracy": mean, "std_over_draws": std, "chosen": [*map(list, chosen)]}
    ((layer, c),) = chosen
    return {
        "accuracy": _overall(confusions[0]),
        "mean_class_accuracy": float(np.nanmean(class_accuracy(confusions[0]))),
        "layer": layer,
        "C": c or None,
        "confusion": confusions[0].tolist(),
    }


def _validation(
    protocol: str, c: float, x, y, folds: list[tuple[np.ndarray, np.ndarray]], seed: int
) -> float:
    """Return the accuracy on held-out rows for one choice of layer and C, summed over folds.

    x: features of the layer. folds: pairs (rows to fit, rows to score).
    """
    return sum(
        _overall(_confusion(protocol, c, x[fit], y[fit], x[held], y[held], seed=seed))
        for fit, held in folds
    )


def _folds(labels: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Split labels into five folds, or fewer if no class has five labels; returns pairs (rows to
    fit, rows to score). A fold that leaves only one class to fit is left out. Raises ValueError if
    no class has two labels.
    """
    check_pairs(labels)
    number = min(5, np.bincount(labels).max())
    with warnings.catch_warnings():
        # scikit-learn warns if the smallest class has fewer labels than there are folds
        warnings.simplefilter("ignore", UserWarning)
        folds = StratifiedKFold(number, shuffle=True, random_state=seed)
        pairs = list(folds.split(labels, labels))
    return [(fit, held) for fit, held in pairs if len(np.unique(labels[fit])) > 1]


def few_labels(y: np.ndarray, seed: int) -> list[np.ndarray]:
    """Sample 10 labels per class (all labels of a smaller class), ten times; returns ten arrays of
    indices into y.
    """
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(y == label) for label in np.unique(y)]
    return [
        np.concatenate([rng.permutation(members)[:_SHOTS] for members in classes])
        for _ in range(_DRAWS)
    ]


def probe(
    runs: list[Path],
    data: str,
    labels_key: str = "labels",
    up_axis: str = "z",
    layer: int | None = None,
    pooling: str = "mean_max",
    protocols: tuple[str, ...] = PROTOCOLS,
    part: Part = "test",
    quick: bool = False,
) -> dict:
    """Probe finished runs. For comparison, also probe each run's untrained encoder, its other
    networks such as a frozen teacher (`Run.teachers`), and the handcrafted vectors of
    descriptors.py.

    runs: folders of runs that differ only in their seed, or one encoder as in `jepa3d.load`. part:
    the split that is scored, see `Labelled.of`. layer: the layer to probe, where 0 is the
    tokenizer. If it is None, the best layer is chosen on validation, or, if `quick` is set, the
    last layer is probed. quick: choose nothing; C is fixed. Returns the result as a dictionary that
    can be written as JSON. Raises ValueError if runs, data, layer or protocols cannot be used.
    """
    started = time.perf_counter()
    check_protocols(protocols)
    networks = {run: _models(run) for run in runs}
    configs = {run: config for run, (config, _) in networks.items()}
    seeds, first = _seeds(runs, configs), configs[runs[0]]
    dataset = LabelledSet(data, labels_key, up_axis.replace("none", "z"))
    shapes = dataset.read(first["encoder"]["num_points"], part)
    subsets = shapes.subsets()[: 2 if quick else 3]
    by_rule, fixed = ("last", QUICK_C) if quick else ("best on validation", None)
    rows = []
    handcrafted: dict[str, list[np.ndarray]] = {}
    for run, (config, models) in networks.items():
        for model in models.values():
            if isinstance(model, PointEncoder):
                model.upright = up_axis != "none"
        if isinstance(given := models.get("pretrained"), PointEncoder):
            if "untrained" not in models:
                untrained = untrained_like(given, shapes.train, config["seed"])
                models = {"untrained": untrained, **models}
            # computed once, since these vectors are equal for all seeds
            handcrafted = handcrafted or _handcrafted(given, subsets)
        for name in (*models, *handcrafted):
            features, model = handcrafted.get(name, []), models.get(name)
            if model is not None:
                features = [layer_features(model, some, pooling) for some in subsets]
            depth = len(features[0]) - 1
            probed = depth if layer is None else layer
            if not 0 <= probed <= depth and isinstance(model, PointEncoder):
                known = f"{run} has layers 0 (tokenizer) to {depth}"
                raise ValueError(f"--layer {layer} does not exist: {known}")
            fixed_layer = quick or layer is not None
            layers = [min(probed, depth)] if fixed_layer else range(depth + 1)
            row = {"run": str(run), "model": name, "seed": config["seed"], "scores": {}}
            train, test, *others = zip(features, shapes.labels(), strict=False)
            choice = layers, config["seed"], others[0] if others else None, fixed
            for protocol in protocols:
                found = run_protocol(protocol, *train, *test, *choice)
                if confusion := found.get("confusion"):
                    found["per_class"] = by_class(confusion, shapes.class_names)
                row["scores"][protocol] = found
            if isinstance(model, DVAE):
                row["dvae"] = dvae_figures(model, shapes.train, shapes.test)
            rows.append(row)
    return provenance() | {
        "data": {
            "name": shapes.name,
            "fingerprint": shapes.fingerprint,
            "labels": labels_key,
            "part": part,
            "train": len(shapes.train),
            "test": len(shapes.test),
            "classes": len(shapes.class_names),
            "dropped_classes": list(shapes.dropped),
        },
        "pretraining": {
            str(run): _pretraining(run, c) for run, c in configs.items() if "task" in c
        },
        # This can be known only if the configs name the sources of the pretraining data. The config
        # of an encoder that is not a run names none; the value is then False.
        "seen_in_pretraining": any(was_seen(c, data, shapes) for c in configs.values()),
        "pooling": pooling,
        "layer": by_rule if layer is None else layer,
        "selection": selection_rule(shapes, quick),
        "seeds": sorted(seeds),
        "class_names": list(shapes.class_names),
        "rows": rows,
        "summary": summarise(rows, protocols),
        "wall_seconds": time.perf_counter() - started,
    }


def _seeds(runs: list[Path], configs: dict[Path, dict]) -> list[int]:
    """Return the seeds of the runs. Raises ValueError if two runs have the same seed, or differ in
    anything but their seed and the settings in `BOOKKEEPING`.
    """
    for run in runs:
        changed = differences(configs[run], configs[runs[0]]).keys()
        if changed := changed - {"seed", *BOOKKEEPING}:
            found = f"{run} and {runs[0]} differ in {min(changed)}"
            raise ValueError(f"{found}: runs to average may differ only in their seed")
    seeds = [configs[run]["seed"] for run in runs]
    if len(set(seeds)) < len(seeds):
        found = f"the seeds are {seeds}, but runs to average must have different seeds"
        raise ValueError(f"{found}; to probe models without averaging them, give one per command")
    return seeds


def _handcrafted(encoder: PointEncoder, subsets: list[PointClouds]) -> dict[str, list[np.ndarray]]:
    """Return name -> vectors of each subset, for each of the handcrafted `baselines`. The vectors
    are [1, n, E], like the features of a network with one layer.
    """
    prepared = [encoder.prepare(subset.points[:]) for subset in subsets]
    descriptors = baselines(encoder, prepared[0])
    return {name: [of(x)[None] for x in prepared] for name, (of, _) in descriptors.items()}


def was_seen(config: dict, data: str, shapes: Labelled) -> bool:
    """Return whether a run was pretrained on the scored shapes (without labels).

    data: the source of `shapes`. A source is recognised by its file name only.
    """
    same = Path(data).name in {Path(source).name for source in config["data"]}
    own = "test"
    if shapes.part == "validation":
        own = "val" if shapes.has_validation else "train"
    return same and config["split"] in ("all", own)


def _pretraining(run: Path, config: dict) -> dict:
    """Return the record of a run's pretraining: objective, teacher, split, data, cost, commit."""
    record = Run(run).record
    known = {key: config[key] for key in ("objective", "teacher", "split")}
    return known | {key: record.get(key) for key in ("data", "cost", "commit")}


def _models(folder: Path) -> tuple[dict, dict[str, PointEncoder | DVAE]]:
    """Load a finished run's config and, by name, the networks to compare.

    If `folder` is not a run but an encoder, as in `jepa3d.load`, the config has only the sizes of
    the encoder, seed 0 and no data. Raises ValueError if the folder is a run of another command
    than `jepa3d pretrain`, or an unfinished run.
    """
    if not Run.is_at(folder):
        encoder = load_encoder(str(folder))
        sizes = vars(encoder)["_hub_mixin_config"]
        return {"encoder": sizes, "seed": 0, "data": []}, {"pretrained": encoder}
    run = Run(folder)
    config = run.config
    if "task" in config:
        found = f"is a run of jepa3d {config['task']}"
        raise ValueError(f"{folder} {found}, but probe takes runs of jepa3d pretrain")
    export = "dvae" if config["objective"] == "dvae" else "encoder"
    if not (folder / export).is_dir():
        command = f"jepa3d pretrain --out {folder} --resume"
        raise ValueError(f"{folder} has no {export} yet; finish it with: {command}")
    if export == "dvae":
        return config, {"teacher": load_module(str(folder))}
    return config, {
        "untrained": PointEncoder.from_pretrained(run.untrained),
        **{name: load_module(str(path)) for name, path in run.teachers.items()},
        "pretrained": PointEncoder.from_pretrained(run.encoder),
    }


def summarise(rows: list[dict], protocols: tuple[str, ...]) -> dict:
    """Average over runs: returns model -> protocol -> mean and sample std of the overall accuracy.

    A protocol's entry "mean_class_accuracy" has the mean and std of that metric. If there are
    pretrained encoders, the result has a key "gain" besides the models. Its entries have the same
    form. Their mean and std are those of the gain of each run: the accuracy of the run's pretrained
    encoder minus that of its untrained encoder.
    """
    table: dict[str, dict] = {}
    for protocol, key in product(protocols, ("accuracy", "mean_class_accuracy")):
        values: dict[str, dict[str, float]] = {}  # model -> run -> accuracy
        for row in rows:
            if key in (scores := row["scores"][protocol]):
                values.setdefault(row["model"], {})[row["run"]] = scores[key]
        if after := values.get("pretrained"):
            before = values["untrained"]
            values["gain"] = {run: value - before[run] for run, value in after.items()}
        for model, found in values.items():
            statistics = moments([*found.values()]) | {"runs": len(found)}
            scores = table.setdefault(model, {})
            if key == "accuracy":
                scores[protocol] = statistics
            else:
                scores[protocol][key] = statistics
    return table


def check_per_class(protocol: str | None, protocols: Iterable[str]) -> None:
    """Raise ValueError unless `protocol` is None, or is one of `protocols` and has accuracies per
    class.
    """
    known = [name for name in protocols if name != "logistic_10"]
    if protocol is not None and protocol not in known:
        listed = f"{', '.join(known)} (logistic_10 has no accuracies per class)"
        raise ValueError(f"--per-class {protocol!r}: use one of the probed protocols: {listed}")


def sheets(result: dict, per_class: str | None = None) -> list[Sheet]:
    """Return the tables of a result: the summary and, if `per_class` is given, the accuracy per
    class.

    per_class: the protocol of the second table; `check_per_class` says which ones are allowed.
    """
    data, part = result["data"], result["data"].get("part", "test")
    title = (
        f"{data['name']} ({data['labels']}): {data['classes']} classes, {data['train']:,} train, "
        f"{data['test']:,} {part}; overall accuracy %, {result['pooling']}, "
        f"layer {result['layer']}, seeds {result['seeds']}"
    )
    notes = [
        f"teacher of {row['run']}: Chamfer-L1 {dvae['reconstruction']:.4f} (best constant patch: "
        f"{dvae['constant_patch']:.4f}), perplexity {dvae['perplexity']:.0f} of {dvae['num_codes']} codes"
        for row in result["rows"]
        if (dvae := row.get("dvae"))
    ]
    if result["seen_in_pretraining"]:
        notes.append(f"the {part} shapes were also used in pretraining, without labels")
    notes.append(f"selection: {result['selection']}")
    columns, rows = summary_table(result["summary"])
    found = [Sheet(title, columns, rows, notes)]
    return found if per_class is None else [*found, _class_sheet(result, per_class)]


def summary_table(summary: dict[str, dict]) -> tuple[list[str], list[list[str]]]:
    """Turn a summary into a table with a row per model and a column per protocol; returns the
    table's columns and rows.
    """
    rows = []
    for model, scores in summary.items():
        gain = model == "gain"
        name = "pretrained - untrained" if gain else model
        form = "+.1f" if gain else ".1f"
        rows.append([name, *(mean_std(found, form) for found in scores.values())])
    return ["", *next(iter(summary.values()))], rows


def _class_sheet(result: dict, protocol: str) -> Sheet:
    """Return a table of the accuracy per class, averaged over seeds. The last row is the mean over
    classes.
    """
    found: dict[str, list[np.ndarray]] = {}
    for row in result["rows"]:
        confusion = np.array(row["scores"][protocol]["confusion"])
        found.setdefault(row["model"], []).append(class_accuracy(confusion))
    counts = confusion.sum(1)  # the same for all rows
    columns = {model: np.mean(accuracies, 0) for model, accuracies in found.items()}
    if "pretrained" in columns:
        columns["gain"] = columns["pretrained"] - columns["untrained"]
    forms = ["+.1f" if model == "gain" else ".1f" for model in columns]
    table = np.stack(list(columns.values()), 1)  # [classes, models]
    names = [*result["class_names"], "mean class accuracy"]
    lines = zip(names, [*counts, counts.sum()], [*table, table.mean(0)], strict=True)
    rows = [[name, f"{count:,}", *map(format, row, forms)] for name, count, row in lines]
    return Sheet(f"{protocol}, accuracy %", ["class", "shapes", *columns], rows, [])
