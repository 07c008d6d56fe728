"""Probes of frozen features under named protocols; the test part is used once, after every choice
is made.

| protocol    | features     | classifier                              | chosen on                          |
|-------------|--------------|-----------------------------------------|------------------------------------|
| logistic    | standardised | logistic regression                     | C and layer: a fifth of train      |
| logistic_10 | standardised | the same on 10 labels a class, 10 draws | C and layer: 5 folds of the labels |
| knn         | standardised | 10 nearest neighbours by cosine         | layer: a fifth of train            |
| svc_linear  | as they are  | SVC(linear, C=0.012) (Point-M2AE)       | layer: a fifth of train            |
| linear_svc  | as they are  | LinearSVC(dual=auto) (Point-MAE)        | layer: a fifth of train            |
| mlp3        | standardised | 3-layer head (Point-MAE; ACT's MLP-3)   | layer: a fifth of train            |

Features are the tokens of a layer, pooled to one vector a shape; the result names the pooling.
Figures are overall accuracies in per cent. With a fixed layer only C is chosen. A source's own
validation part takes the place of the fifth. A quick probe chooses nothing: the last layer, and C
0.1.
"""

import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedKFold

from jepa3d.config import BOOKKEEPING, differences
from jepa3d.data.datasets import PointClouds, load
from jepa3d.evaluation import descriptors
from jepa3d.evaluation.classifiers import by_class, class_accuracy, predict
from jepa3d.evaluation.features import layer_features, untrained_like
from jepa3d.evaluation.fitting import side_by_side
from jepa3d.evaluation.labelled import Part, chosen_on, fifth, has_validation, shared_classes
from jepa3d.evaluation.protocol import moments, provenance
from jepa3d.evaluation.reconstruction import dvae_figures
from jepa3d.models.dvae import DVAE
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.ready import load as load_encoder
from jepa3d.models.teacher import load_module
from jepa3d.run import Run

PROTOCOLS = ("logistic", "logistic_10", "knn", "svc_linear", "linear_svc", "mlp3")
_C_GRID = (0.001, 0.01, 0.1, 1.0)
_FEW_C_GRID = (0.01, 0.1)
QUICK_C = 0.1  # what was chosen most often on the validation part of ModelNet10
_SHOTS, _DRAWS = 10, 10


def selection_rule(part: Part, clouds: PointClouds, quick: bool = False) -> str:
    """How layer and C are chosen (a quick probe does not), and what `part` of the clouds is scored."""
    own = has_validation(clouds)
    held = "the validation part" if own and part == "test" else "a held-out fifth of train"
    other = "the validation part" if own else "another fifth of train"
    scored = "test used once" if part == "test" else f"scored on {other}, test not used"
    if quick:
        return f"none, quick: layer and C are fixed (C {QUICK_C}); {scored}"
    return f"layer and C on {held} (5 folds of the labels for logistic_10); {scored}"


def _confusion(protocol: str, c: float, train, y, test, y_test, *, seed: int = 0) -> np.ndarray:
    """Counts [K, K] of the tested, rows true, columns predicted, over the sorted classes of both
    halves.
    """
    found = predict(protocol, c, train, y, test, seed)
    return confusion_matrix(y_test, found, labels=np.union1d(y, y_test))


def _accuracy(protocol: str, c: float, train, y, test, y_test, *, seed: int = 0) -> float:
    return _overall(_confusion(protocol, c, train, y, test, y_test, seed=seed))


def _overall(confusion: np.ndarray) -> float:
    return 100 * float(np.trace(confusion) / confusion.sum())


def run_protocol(
    protocol: str,
    train: np.ndarray,
    y: np.ndarray,
    test: np.ndarray,
    y_test: np.ndarray,
    layers: list[int],
    seed: int = 0,
    held: tuple[np.ndarray, np.ndarray] | None = None,
    c: float | None = None,
) -> dict:
    """Accuracy of one protocol on features [L, n, E]; returns accuracy, layer and C (lists for
    logistic_10).

    held: features and labels to choose layer and C on; None: a fifth of train. c: the C to use
    instead of choosing it. All but logistic_10 also return mean_class_accuracy and confusion: rows
    true, columns predicted, sorted classes.
    """
    if protocol == "logistic_10":
        return _few_labels(train, y, test, y_test, layers, seed, _FEW_C_GRID if c is None else (c,))
    grid = (0.0,) if protocol != "logistic" else _C_GRID if c is None else (c,)
    choices = [(layer, c) for layer in layers for c in grid]
    layer, c = choices[0]
    if len(choices) > 1:
        x, labels, folds = train, y, [fifth(y, seed)]
        if held:
            x, labels = np.concatenate([train, held[0]], 1), np.concatenate([y, held[1]])
            folds = [(np.arange(len(y)), np.arange(len(y), len(labels)))]
        jobs = [(protocol, c, x[layer], labels, folds, {"seed": seed}) for layer, c in choices]
        validation = side_by_side(_validation, jobs, len(jobs) * x[0].size)
        layer, c = choices[int(np.argmax(validation))]
    confusion = _confusion(protocol, c, train[layer], y, test[layer], y_test, seed=seed)
    mean = float(np.nanmean(class_accuracy(confusion)))
    return {
        "accuracy": _overall(confusion),
        "mean_class_accuracy": mean,
        "layer": layer,
        "C": c or None,
        "confusion": confusion.tolist(),
    }


def _validation(
    protocol: str, c: float, x, y, folds: list[tuple[np.ndarray, np.ndarray]], options: dict
) -> float:
    """Sum over folds, (rows to fit, rows to score), of the accuracy of one choice; options of
    `_accuracy`.
    """
    return sum(
        _accuracy(protocol, c, x[fit], y[fit], x[held], y[held], **options) for fit, held in folds
    )


def _few_labels(train, y, test, y_test, layers, seed, grid: tuple[float, ...]) -> dict:
    """10 labels a class, mean over 10 draws."""
    draws, jobs = [(shots, y[shots]) for shots in few_labels(y, seed)], []
    choices = [(layer, c) for layer in layers for c in grid]
    for shots, labels in draws if len(choices) > 1 else ():
        number = min(5, np.bincount(labels).max())
        with warnings.catch_warnings():  # a class of fewer than 5 labels is missing from some folds
            warnings.simplefilter("ignore", UserWarning)
            folds = list(
                StratifiedKFold(number, shuffle=True, random_state=seed).split(shots, labels)
            )
        jobs += [("logistic", c, train[layer][shots], labels, folds, {}) for layer, c in choices]
    validation = np.array(
        side_by_side(_validation, jobs, sum(len(job[4]) * job[2].size for job in jobs))
    )
    chosen = (
        [choices[best] for best in validation.reshape(_DRAWS, -1).argmax(1)]
        if jobs
        else choices * _DRAWS
    )
    scores = [
        _accuracy("logistic", c, train[layer][shots], labels, test[layer], y_test)
        for (shots, labels), (layer, c) in zip(draws, chosen, strict=True)
    ]
    found = moments(scores)
    return {
        "accuracy": found["mean"],
        "std_over_draws": found["std"],
        "chosen": [list(choice) for choice in chosen],
    }


def few_labels(y: np.ndarray, seed: int) -> list[np.ndarray]:
    """Indices of 10 labels a class, all of a smaller class: of ten draws."""
    rng, classes = np.random.default_rng(seed), [np.flatnonzero(y == k) for k in np.unique(y)]
    return [
        np.concatenate([rng.permutation(own)[:_SHOTS] for own in classes]) for _ in range(_DRAWS)
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
    """Probe finished runs, each beside its untrained encoder, its frozen teacher and the vectors of
    descriptors.py.

    Returns the result record. runs: or one encoder, as of `jepa3d.load`, beside an untrained one of
    its settings. `part` is what is scored (see `shared_classes`). `layer` None chooses the best on
    validation, 0 is the tokenizer. `quick` chooses nothing: `layer` None is then the last, and C is
    fixed. Raises ValueError.
    """
    started = time.perf_counter()
    if unknown := set(protocols) - set(PROTOCOLS):
        raise ValueError(f"protocol {min(unknown)!r}: one of {', '.join(PROTOCOLS)}")
    found = {run: _models(run) for run in runs}
    first = found[runs[0]][0]
    for run, (config, _) in found.items():
        changed = {
            name for name in differences(config, first) if name not in ("seed", *BOOKKEEPING)
        }
        if changed:
            raise ValueError(
                f"{run}: differs in {min(changed)} from {runs[0]}; only seeds of one run can be averaged"
            )
    seeds = [config["seed"] for config, _ in found.values()]
    if len(set(seeds)) < len(runs):
        raise ValueError(
            f"runs of seeds {seeds}: only different seeds can be averaged; probe other models one by one"
        )
    clouds = load(
        [data], first["encoder"]["num_points"], "all", [up_axis.replace("none", "z")], labels_key
    )
    train, test, dropped = shared_classes(clouds, part)
    held = None if quick else chosen_on(clouds, train, part)
    y, y_test = train.labels, test.labels
    assert y is not None
    assert y_test is not None
    names, rows = [clouds.class_names[label] for label in np.unique(y)], []
    by_hand: dict[str, list[np.ndarray]] = {}
    for run, (config, models) in found.items():
        for model in models.values():
            if isinstance(model, PointEncoder):
                model.upright = up_axis != "none"
        if isinstance(given := models.get("pretrained"), PointEncoder):
            if "untrained" not in models:
                models = {"untrained": untrained_like(given, train, config["seed"]), **models}
            by_hand = by_hand or descriptors.features(
                given, train, test, held
            )  # the same for every seed
        for name in (*models, *by_hand):
            model = models.get(name)
            if model is None:
                x, x_test, features = by_hand[name]
            else:
                x, x_test = (layer_features(model, half, pooling) for half in (train, test))
                features = np.empty(0) if held is None else layer_features(model, held, pooling)
            x_held = None if held is None or held.labels is None else (features, held.labels)
            depth = len(x) - 1
            if layer is not None and not 0 <= layer <= depth and isinstance(model, PointEncoder):
                raise ValueError(f"--layer {layer}: {run} has layers 0 (tokenizer) to {depth}")
            layers = (
                [depth if layer is None else min(layer, depth)]
                if quick or layer is not None
                else range(depth + 1)
            )
            fixed = QUICK_C if quick else None
            scores = {
                protocol: run_protocol(
                    protocol, x, y, x_test, y_test, list(layers), config["seed"], x_held, fixed
                )
                for protocol in protocols
            }
            for score in scores.values():
                if "confusion" in score:
                    score["per_class"] = by_class(score["confusion"], names)
            row = {"run": str(run), "model": name, "seed": config["seed"], "scores": scores}
            if isinstance(model, DVAE):
                row["dvae"] = dvae_figures(model, train, test)
            rows.append(row)
    return provenance() | {
        "data": {
            "name": clouds.name,
            "fingerprint": clouds.fingerprint,
            "labels": labels_key,
            "part": part,
            "train": len(train),
            "test": len(test),
            "classes": len(np.unique(y)),
            "dropped_classes": dropped,
        },
        "pretraining": {
            str(run): _pretraining(run, c) for run, (c, _) in found.items() if "task" in c
        },
        "seen_in_pretraining": any(
            was_seen(config, data, part) for config, _ in found.values()
        ),  # as far as is known
        "pooling": pooling,
        "layer": layer if layer is not None else "last" if quick else "best on validation",
        "selection": selection_rule(part, clouds, quick),
        "seeds": sorted(seeds),
        "class_names": names,
        "rows": rows,
        "summary": summarise(rows, protocols),
        "wall_seconds": time.perf_counter() - started,
    }


def was_seen(config: dict, data: str, part: Part) -> bool:
    """Whether a run was pretrained (without labels) on what is scored."""
    same = Path(data).name in {Path(source).name for source in config["data"]}
    return same and config["split"] in ("all", "test" if part == "test" else "train")


def _pretraining(run: Path, config: dict) -> dict:
    """What a run was trained on and with, and what it cost."""
    record = Run(run).record
    return {key: config[key] for key in ("objective", "teacher", "split")} | {
        key: record.get(key) for key in ("data", "cost", "commit")
    }


def _models(run: Path) -> tuple[dict, dict[str, PointEncoder | DVAE]]:
    """A finished run's config and the networks to compare; of an encoder by itself, what is known
    of it.
    """
    if not (run / "run.json").is_file():
        encoder = load_encoder(str(run))
        return {"encoder": vars(encoder)["_hub_mixin_config"], "seed": 0, "data": []}, {
            "pretrained": encoder
        }
    config = Run(run).config
    if "task" in config:
        raise ValueError(
            f"{run}: a run of jepa3d {config['task']}; the probe takes runs of jepa3d pretrain"
        )
    export = "dvae" if config["objective"] == "dvae" else "encoder"
    if not (run / export).is_dir():
        raise ValueError(
            f"{run}: has no {export} yet; finish it with: jepa3d pretrain --out {run} --resume"
        )
    if export == "dvae":
        return config, {"teacher": load_module(str(run))}
    teachers = sorted([*run.glob("stage1/*"), *run.glob("given/*")])
    return config, {
        "untrained": PointEncoder.from_pretrained(run / "untrained"),
        **{f"{folder.parent.name} {folder.name}": load_module(str(folder)) for folder in teachers},
        "pretrained": PointEncoder.from_pretrained(run / "encoder"),
    }


def summarise(rows: list[dict], protocols: tuple[str, ...]) -> dict:
    """Mean and sample std over runs a model and protocol, and of the paired gain over the untrained
    encoder.

    These are of the overall accuracy; beside them stand those of the mean class accuracy where a
    protocol has one.
    """
    table: dict[str, dict] = {}
    for protocol in protocols:
        for key in ("accuracy", "mean_class_accuracy"):
            values: dict[str, dict[str, float]] = {}
            for row in rows:
                if key in row["scores"][protocol]:
                    values.setdefault(row["model"], {})[row["run"]] = row["scores"][protocol][key]
            if "pretrained" in values:
                untrained = values["untrained"]
                values["gain"] = {
                    run: score - untrained[run] for run, score in values["pretrained"].items()
                }
            for model, by_run in values.items():
                found = moments(list(by_run.values())) | {"runs": len(by_run)}
                of_model = table.setdefault(model, {})
                of_model[protocol] = (
                    found if key == "accuracy" else of_model[protocol] | {key: found}
                )
    return table


def check_per_class(protocol: str | None, protocols: Iterable[str]) -> None:
    """ValueError unless `protocol` is one of `protocols` and has figures of every class;

    None asks for none.
    """
    known = [name for name in protocols if name != "logistic_10"]
    if protocol is not None and protocol not in known:
        raise ValueError(
            f"per class {protocol!r}: one of the probed {', '.join(known)} (logistic_10 has none)"
        )


def show(result: dict, per_class: str | None = None) -> None:
    """Print the summary as a table, and the accuracy of every class under the protocol `per_class`.

    Raises ValueError, printing nothing, for a protocol without figures of classes.
    """
    check_per_class(per_class, result["rows"][0]["scores"])
    data = result["data"]
    title = (
        f"{data['name']} ({data['labels']}): {data['classes']} classes, {data['train']:,} train, "
        f"{data['test']:,} {data['part']}; overall accuracy %, {result['pooling']}, "
        f"layer {result['layer']}, seeds {result['seeds']}"
    )
    protocols = list(result["rows"][0]["scores"])
    table = Table("", *protocols)
    for model, scores in result["summary"].items():
        sign = "+" if model == "gain" else ""
        cells = [
            f"{s['mean']:{sign}.1f}" + (f" ± {s['std']:.1f}" if s["std"] is not None else "")
            for s in scores.values()
        ]
        table.add_row("pretrained - untrained" if model == "gain" else model, *cells)
    print(title)
    Console(width=max(Console().width, 100)).print(table)
    if per_class is not None:
        _show_classes(result, per_class)
    for row in result["rows"]:
        if "dvae" in row:
            print(
                "teacher of {run}: Chamfer-L1 {reconstruction:.4f}, best constant patch {constant_patch:.4f}; "
                "code perplexity {perplexity:.0f} of {num_codes}".format(
                    run=row["run"], **row["dvae"]
                )
            )
    if result["seen_in_pretraining"]:
        print(f"the {data['part']} part was among the (unlabelled) pretraining data")
    print(f"selection: {result['selection']}")


def _show_classes(result: dict, protocol: str) -> None:
    """Print each class's accuracy, mean over seeds, a column a model; the last row is their mean."""
    found: dict[str, list[np.ndarray]] = {}
    for row in result["rows"]:
        found.setdefault(row["model"], []).append(np.array(row["scores"][protocol]["confusion"]))
    counts = next(iter(found.values()))[0].sum(1)
    columns = {
        model: np.mean([class_accuracy(table) for table in tables], 0)
        for model, tables in found.items()
    }
    if "pretrained" in columns:
        columns["gain"] = columns["pretrained"] - columns["untrained"]
    table = Table(f"{protocol}, accuracy %", "shapes", *columns)

    def add(name: str, count: int, values: list[float]) -> None:
        cells = [
            f"{value:{'+' if column == 'gain' else ''}.1f}"
            for value, column in zip(values, columns, strict=True)
        ]
        table.add_row(escape(name), f"{count:,}", *cells)

    for name, count, *values in zip(result["class_names"], counts, *columns.values(), strict=True):
        add(name, count, values)
    table.add_section()
    add("mean class accuracy", counts.sum(), [values.mean() for values in columns.values()])
    Console(width=max(Console().width, 100)).print(table)
