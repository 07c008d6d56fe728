"""The report: the page has the expected content, needs no other file, and shows every name as text,
never as a tag.
"""

import base64
import html
import io
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from jepa3d import figures
from jepa3d.cli import main
from jepa3d.config import FewshotConfig, FinetuneConfig, SegmentConfig
from jepa3d.data.synthetic import make_shapes
from jepa3d.evaluation.protocol import provenance
from jepa3d.models.encoder import PointEncoder
from jepa3d.models.heads import Classifier
from jepa3d.page import Bar, facts, note, picture, show, table, tiles
from jepa3d.plain import to_dict
from jepa3d.report import report
from jepa3d.run import Run
from jepa3d.training.pretrain import pretrain

# Names that must not become a tag or a formula, or be missing from a legend.
NAMES = [
    "<b>&",
    "$x$ 'y'",
    "_cone",
]
ENCODER = {
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "num_groups": 8,
    "group_size": 8,
    "num_points": 64,
    "tokenizer_dim": 8,
}
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(HTMLParser):
    """Collect the headings, texts, tables and references of a page, and check that all tags are
    closed in order.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.references, self.rows, self.open = [], [], [], []
        self.words = {"h1": [], "h2": [], "p": [], "dd": [], "figcaption": [], "title": []}
        self.text = ""
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]
        if tag in self.words:
            self.words[tag].append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        for tag in self.open:
            if tag in self.words:
                self.words[tag][-1] += data
            if tag in ("td", "th"):
                self.rows[-1][-1] += data

    @property
    def pictures(self) -> list[np.ndarray]:
        pngs = [
            base64.b64decode(value.removeprefix("data:image/png;base64,"))
            for value in self.references
        ]
        return [matplotlib.image.imread(io.BytesIO(png)) for png in pngs]


def read(run: Path, **options) -> Page:
    page = Page(report(run, **options))
    assert not {"script", "link", "iframe", "object", "b>&"} & set(page.tags)
    assert all(value.startswith("data:image/png;base64,") for value in page.references)
    assert "url(" not in (run / "report.html").read_text()
    assert "@import" not in (run / "report.html").read_text()
    assert all(np.ptp(image) > 0.5 for image in page.pictures)
    assert not list(run.glob(".*partial"))
    return page


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def log(run: Path, lines: list[dict]) -> None:
    write(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


# ----------------------------------------------------------------------------------- runs to report
@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, tiny) -> Path:
    """Train a short run of 3D-JEPA with a stage I, and add a made-up result of a probe."""
    run = pretrain(
        tiny(teacher=["ema", "generative"], seed=5), tmp_path_factory.mktemp("runs") / "a <i> & run"
    )
    means = {
        "logistic": {"mean": 61.24, "std": 1.26, "runs": 3},
        "knn": {"mean": 50.0, "std": None, "runs": 1},
    }
    probe = {
        "data": {
            "name": "B&B.npz",
            "labels": "labels_coarse",
            "train": 40,
            "test": 20,
            "classes": 3,
        },
        "pooling": "mean_max",
        "layer": "best on validation",
        "selection": "C on validation",
        "seeds": [0, 1, 2],
        "seen_in_pretraining": True,
        "summary": {"untrained": means, "pretrained": means, "gain": means},
    }
    write(run / "probe-B.json", probe)
    return run


@pytest.fixture
def copied(pretrained, tmp_path) -> Path:
    """Return a copy of the pretraining run, which a test may damage."""
    return shutil.copytree(pretrained, tmp_path / "copy")


def downstream(run: Path, config: FinetuneConfig, task: str, **result) -> Path:
    """Write the files that every fine-tuning run has; `result` goes into results.json."""
    write(run / "config.json", {"task": task} | to_dict(config))
    record = provenance() | {
        "status": "finished",
        "data": {"name": "D & co", "fingerprint": "f00d", "shapes": 32},
    }
    cost = {"step": 9, "cpu_seconds": 90.0, "wall_seconds": 60.0, "peak_memory": 2**29}
    write(
        run / "run.json",
        record | {"command": "jepa3d <command>", "parameters": {"model": 1_500_000}, "cost": cost},
    )
    log(
        run,
        [
            {"step": i, "loss": 3 / i, "accuracy": 20.0 * i}
            | ({"validation": 9.0 * i} if i > 2 else {})
            for i in (1, 2, 3, 4)
        ],
    )
    common = {
        "task": task,
        "protocol": "fine-tuned, all weights",
        "init": "runs/<pre>",
        "seed": 7,
        "votes": 1,
        "pretraining": {
            "objective": "jepa",
            "teacher": ["ema"],
            "seed": 3,
            "data": {"name": "P&Q"},
            "cost": {},
        },
        "data": {
            "name": "D & co",
            "variant": "obj_bg",
            "classes": 3,
            "train": 20,
            "validation": 5,
            "test": 16,
            "labels": 0.5,
        },
        "selection": "validation",
        "validation": None,
        "cost": cost,
        "settings": {},
    }
    write(run / "results.json", common | result)
    return run


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> dict[str, np.ndarray]:
    """Write a bundle of 48 labelled shapes, 16 of them in the test split. Returns its path and
    arrays.
    """
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    arrays = {
        "points": make_shapes(48, 96, seed=1)["points"],
        "labels": np.arange(48) // 3 % 3,
        "split": np.tile([0, 0, 1], 16).astype(np.int8),
        "class_names": np.array(NAMES),
    }
    np.savez(path, **arrays)
    return {"path": str(path)} | arrays


@pytest.fixture
def classified(tmp_path, shapes) -> Path:
    torch.manual_seed(0)
    config = FinetuneConfig(data=shapes["path"], lr=0.123, init="runs/<pre>")
    per_class = {
        name: {"accuracy": 10.0 * i + 0.25, "count": 5 + i} for i, name in enumerate(NAMES)
    }
    details = {
        "per_class": per_class,
        "confusion": [[4, 1, 0], [0, 3, 3], [0, 0, 5]],
        "class_names": NAMES,
    }
    metrics = {"overall_accuracy": 75.0, "mean_class_accuracy": 71.5}
    validation = {"overall_accuracy": 80.5, "mean_class_accuracy": 79.5}
    run = downstream(
        tmp_path / "cls",
        config,
        "classify",
        metrics=metrics,
        details=details,
        validation=validation,
    )
    network = Classifier(ENCODER, NAMES).eval()
    network.save_pretrained(run / "model")
    PointEncoder(**ENCODER).save_pretrained(run / "start")
    label = shapes["labels"][shapes["split"] == 1]
    np.savez(run / "predictions.npz", label=label, predicted=label, probability=np.eye(3)[label])
    return run


@pytest.fixture
def segmented(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    details = {"per_category": {NAMES[0]: 61.25, NAMES[2]: 40.0}, "class_names": NAMES}
    metrics = {"instance_miou": 55.5, "category_miou": 50.6, "point_accuracy": 80.1}
    run = downstream(tmp_path / "seg", SegmentConfig(), "segment", metrics=metrics, details=details)
    parts = rng.integers(0, 4, (6, 50))
    predicted = np.where(np.arange(50) < 25, parts, 3 - parts)  # half of the points are correct
    points, label = rng.normal(size=(6, 50, 3)).astype(np.float16), np.array([0, 0, 0, 2, 2, 2])
    np.savez(run / "predictions.npz", points=points, parts=parts, predicted=predicted, label=label)
    return run


# -------------------------------------------------------------------------------------- pretraining
def test_a_pretraining_run_is_told_whole(pretrained):
    page, record = read(pretrained), json.loads((pretrained / "run.json").read_text())
    assert page.words["h1"] == ["a <i> & run finished"]
    assert page.words["h2"] == [
        "Frozen features on B&B.npz, labels_coarse",
        "Training",
        "Collapse",
        "Sampled blocks",
        "Departures from the paper",
        "Provenance",
        "Settings",
    ]
    assert len(page.pictures) == 3  # curves of the run, curves of its stage I, sampled blocks
    assert ["pretrained", "61.2 ± 1.3", "50.0"] in page.rows
    assert ["pretrained - untrained", "+61.2 ± 1.3", "+50.0"] in page.rows
    assert (
        "seeds 0, 1, 2. Selection: C on validation. Pretraining also used this test split"
        in page.text
    )
    assert {record["command"], record["data"]["fingerprint"]} <= set(page.words["dd"])
    assert any(f"torch {torch.__version__}" in value for value in page.words["dd"])
    assert any(
        "6 steps, " in value and "CPU-minutes before the first step (stage I" in value
        for value in page.words["dd"]
    )
    for name, (ours, paper) in record["departures"].items():
        assert [name, show(ours), show(paper)] in page.rows
    assert ["seed", "5", "0"] in page.rows  # no setting of the paper, but not the default
    assert ["log_every", "1", "50"] in page.rows
    assert ["decoder.depth", "2"] in page.rows  # a default appears only in the list of all settings
    assert ["decoder.depth", "2", "2"] not in page.rows


def test_collapse_figures_are_those_of_the_last_step(pretrained):
    last = Run(pretrained).metrics[-1]
    rows = {row[0]: row[1:] for row in read(pretrained).rows if len(row) == 4}
    for words, name in (
        ("predictions", "prediction"),
        ("targets", "target"),
        ("encoder's tokens", "encoded"),
    ):
        assert rows[words] == [
            f"{last[f'{name}_{figure}']:.3g}" for figure in ("std", "cosine", "rankme")
        ]


def test_data_that_went_away_costs_a_picture_only(copied, bundle):
    config = json.loads((copied / "config.json").read_text())
    write(copied / "config.json", config | {"data": ["/no/such/<file>.npz"]})
    page = read(copied)
    assert len(page.pictures) == 2
    assert any(
        text.startswith("Missing: /no/such/<file>.npz: no such file") for text in page.words["p"]
    )
    assert len(read(copied, data=bundle).pictures) == 3


def test_a_run_whose_name_is_not_utf_8_has_a_report(copied):
    run = copied.rename(copied.with_name(os.fsdecode(b"caf\xe9")))
    assert r"<h1>caf\udce9 " in report(run).read_text(encoding="utf-8")


def test_a_data_that_is_named_must_be_readable_and_the_old_report_stays(copied):
    before = report(copied).read_bytes()
    with pytest.raises(ValueError, match=r"missing\.npz: no such file"):
        report(copied, data="missing.npz")
    assert (copied / "report.html").read_bytes() == before
    assert not list(copied.glob(".*partial"))


@pytest.mark.parametrize("objective", ["generative", "invariance", "dvae"])
def test_other_objectives_have_no_blocks(copied, objective):
    config = json.loads((copied / "config.json").read_text())
    write(copied / "config.json", config | {"objective": objective})
    shutil.rmtree(copied / "stage1")
    figure = "perplexity" if objective == "dvae" else "encoded_rankme"
    log(copied, [{"step": i, "epoch": 0.1, "loss": 1.0 / i, figure: 5.0 + i} for i in (1, 2, 3)])
    page = read(copied)
    assert "Sampled blocks" not in page.words["h2"]
    assert len(page.pictures) == 1
    assert "8.0" in page.text  # the last value of that metric


def test_an_unfinished_run_has_a_report(copied):
    record = json.loads((copied / "run.json").read_text())
    write(
        copied / "run.json",
        {k: v for k, v in record.items() if k != "cost"} | {"status": "running"},
    )
    cost = {"step": 4, "cpu_seconds": 30, "wall_seconds": 60, "peak_memory": 2**30}
    write(copied / "checkpoints" / "step-0000004" / "state.json", cost)
    lines = (copied / "metrics.jsonl").read_text()
    write(copied / "metrics.jsonl", lines + '{"step": 7, "lo')  # a line that is still being written
    page = read(copied)
    assert page.words["h1"] == ["copy running"]
    assert (
        "4 steps, 0.5 CPU-minutes, 1.0 minutes, 1.00 GiB of memory at the peak" in page.words["dd"]
    )
    (copied / "metrics.jsonl").unlink()
    shutil.rmtree(copied / "stage1")
    assert "No step has been logged." in read(copied).words["p"]


# --------------------------------------------------------------------------------------- downstream
def test_a_classifier_is_told_whole(classified):
    page = read(classified)
    features = "Features before and after fine-tuning"
    assert page.words["h2"] == ["Result", "Classes", features, "Training", "Provenance", "Settings"]
    assert len(page.pictures) == 3  # confusion matrix, t-SNE, curves
    assert (
        "75.0 %16 test shapes, standard error 10.8; validation 80.5 %" in page.text
    )  # the standard error is sqrt(75 * 25 / 16)
    assert "71.5 %16 test shapes; validation 79.5 %" in page.text
    facts = {
        "fine-tuned, all weights",
        "the epoch was chosen on the validation split; the test split was used once",
        "runs/<pre>",
        "objective jepa; teacher ema; data P&Q; seed 3",
        "D & co, obj_bg",
        "20 train, 5 validation, 16 test",
        "50 %",
        "7",
        "9 steps, 1.5 CPU-minutes, 1.0 minutes, 0.50 GiB of memory at the peak",
        "model 1.50 M",
    }
    assert facts <= set(page.words["dd"])
    assert ["<b>&", "5", "0.2"] in page.rows
    assert [NAMES[1], NAMES[2], "3", "50 %"] in page.rows  # the most frequent mistake
    assert ["lr", "0.123", "0.0005"] in page.rows
    assert "jepa3d <command>" in page.words["dd"]
    assert "warning" not in (classified / "report.html").read_text().split("</style>")[1]


def test_a_choice_on_test_is_marked(classified):
    result = json.loads((classified / "results.json").read_text())
    write(classified / "results.json", result | {"selection": "best on test"})
    page = read(classified)
    assert any(
        text.startswith("The epoch was chosen on the test split: compare only")
        for text in page.words["p"]
    )
    assert "class='warning'" in (classified / "report.html").read_text()


def test_features_are_drawn_only_of_the_shapes_that_were_tested(
    classified, bundle, shapes, tmp_path
):
    moved = tmp_path / "moved.npz"
    shutil.copy(shapes["path"], moved)
    config = json.loads((classified / "config.json").read_text())
    write(classified / "config.json", config | {"data": bundle[:-4] + "-gone.npz"})
    page = read(classified)
    assert len(page.pictures) == 2
    assert any(text.startswith("Missing: ") and "no such file" in text for text in page.words["p"])
    assert len(read(classified, data=str(moved)).pictures) == 3
    np.savez(
        moved,
        **{name: shapes[name] for name in ("points", "labels", "class_names")},
        split=1 - shapes["split"],
    )
    with pytest.raises(ValueError, match="its test split differs from that of the run"):
        report(classified, data=str(moved))


def test_a_segmenter_shows_its_parts(segmented):
    page = read(segmented)
    parts = "True and predicted parts"
    assert page.words["h2"] == ["Result", "Categories", parts, "Training", "Provenance", "Settings"]
    assert len(page.pictures) == 2
    assert "instance mIoU55.5 %" in page.text
    assert ["<b>&", "61.2"] in page.rows
    caption = next(text for text in page.words["figcaption"] if "figure 6" in text)
    # First comes one shape of each category, then a second one.
    assert "<b>& 50 %, _cone 50 %, <b>& 50 %" in caption


def test_few_shot_shows_its_folds(tmp_path):
    metrics, details = {"overall_accuracy": 88.0, "std_over_folds": 2.5}, {"folds": [85.5, 90.5]}
    run = downstream(tmp_path / "few", FewshotConfig(), "fewshot", metrics=metrics, details=details)
    (run / "metrics.jsonl").rename(tmp_path / "lines")
    page = read(run)
    assert page.pictures == []
    assert "88.0 %± 2.5, standard deviation over folds" in page.text
    assert ["0", "85.5"] in page.rows
    assert ["1", "90.5"] in page.rows
    (run / "fold-0").mkdir()
    (tmp_path / "lines").rename(run / "fold-0" / "metrics.jsonl")
    assert len(read(run).pictures) == 1


def test_an_unfinished_fine_tuning_has_a_report(classified):
    (classified / "results.json").unlink()
    page = read(classified)
    assert "There is no result yet." in page.words["p"]
    assert len(page.pictures) == 1


# -------------------------------------------------------------------------------------- the command
def test_the_pictures_are_there_as_files_too(segmented, tmp_path):
    shown = report(segmented, figures_to=tmp_path / "figures").read_text().count("<img ")
    files = sorted((tmp_path / "figures").iterdir())
    assert [file.name for file in files] == [f"figure-{i}.png" for i in range(1, shown + 1)]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_the_command_writes_where_it_is_told(pretrained, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["report", str(pretrained), "--out", str(tmp_path / "page.html")])
    assert not stop.value.code
    assert capsys.readouterr().out == f"written: {tmp_path / 'page.html'}\n"
    assert Page(tmp_path / "page.html").words["h2"]


def test_mistakes_are_one_line(pretrained, tmp_path, capsys):
    for words, message in (
        ([tmp_path], "not a run folder: it has no config.json"),
        (
            [pretrained, "--out", tmp_path / "no" / "page.html"],
            "must be an .html file in a folder that exists",
        ),
        ([pretrained, "--out", tmp_path], "must be an .html file in a folder that exists"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["report", *map(str, words)])
        printed = capsys.readouterr().err
        assert stop.value.code == 2
        assert message in printed
        assert printed.count("\n") == 1


# ---------------------------------------------------------------------------------- parts of a page
def test_every_text_is_escaped():
    bad = "<script>&'\""
    made = [
        note(bad),
        tiles([(bad, bad, bad)]),
        facts({bad: bad, "list": [bad]}),
        table([bad], [[bad]], strong=bad),
        picture(lambda file: figures.draw_confusion(np.eye(2, dtype=int), [bad, bad], file), bad),
    ]
    for text in made:
        assert "<script" not in text
        assert html.escape(bad) in text


def test_values_and_bars():
    assert [show(value) for value in (None, "", True, 1e-06, 0.05, 300.0, [1, None], "x")] == [
        "-",
        "-",
        "yes",
        "1e-06",
        "0.05",
        "300",
        "1, -",
        "x",
    ]
    widths = re.findall(r"--at:([\d.]+)%", table([""], [[Bar(12.34)], [Bar(-1)], [Bar(101)]]))
    assert widths == ["12.3", "0.0", "100.0"]


def drawn(draw, *arguments) -> bytes:
    file = io.BytesIO()
    draw(*arguments, file)
    return file.getvalue()


def test_tsne_is_repeatable_and_takes_many_classes():
    rng = np.random.default_rng(0)
    before, after, labels = rng.normal(size=(90, 12)), rng.normal(size=(90, 12)), np.arange(90) % 45
    names = [f"class {i}" for i in range(45)]
    one, two = (drawn(figures.draw_tsne, before, after, labels, names) for _ in range(2))
    assert one == two
    assert one != drawn(figures.draw_tsne, before, before, labels, names)
    with pytest.raises(ValueError, match="t-SNE needs at least 5 shapes, but there are 4"):
        drawn(figures.draw_tsne, before[:4], after[:4], labels[:4], names)


def test_predicted_parts_are_drawn_as_predicted(tmp_path):
    points, parts = (
        np.random.default_rng(0).normal(size=(3, 60, 3)),
        np.arange(180).reshape(3, 60) % 3,
    )
    titles = ["$a$", "_b", "c"]
    same, other = (
        drawn(figures.draw_parts, points, parts, given, titles) for given in (parts, parts[:, ::-1])
    )
    assert same != other
    figures.draw_parts(points, parts, parts, titles, tmp_path / "parts.png")
    assert (tmp_path / "parts.png").read_bytes() == same


def test_curves_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no step has been logged"):
        figures.draw_curves(tmp_path, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------- a browser
@pytest.mark.skipif(
    BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH"
)
def test_a_browser_shows_the_page_on_a_screen_and_a_telephone(classified, tmp_path):
    page = report(classified)

    def browse(file: Path, *options: str) -> str:
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-sync",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={tmp_path / 'profile'}",
            *options,
            file.as_uri(),
        ]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=True
        ).stdout

    shown = browse(page, "--dump-dom")
    headings = [html.unescape(text) for text in re.findall(r"<h2>(.*?)</h2>", shown)]
    assert headings == Page(page).words["h2"]
    assert "<td>&lt;b&gt;&amp;</td>" in shown

    browse(page, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1000,1400")
    image = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert image.shape[1] == 1000
    # The many colours show that text, tiles, bars and pictures are visible.
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50

    # In a frame as wide as a telephone, the page must not scroll sideways. Pictures and tables in
    # the page may.
    frame = f'<iframe width=360 height=700 srcdoc="{html.escape(page.read_text())}"></iframe>'
    measure = "onload = () => document.title = document.querySelector('iframe').contentDocument.body.scrollWidth"
    write(tmp_path / "telephone.html", f"{frame}<script>{measure}</script>")
    width = re.search(r"<title>(\d+)</title>", browse(tmp_path / "telephone.html", "--dump-dom"))
    assert width is not None
    assert 300 <= int(width[1]) <= 360


def test_damaged_predictions_are_named(tmp_path):
    from jepa3d.data.cloud import ReadError
    from jepa3d.report import _predictions

    file = tmp_path / "predictions.npz"
    np.savez(file, label=np.arange(300))
    for content in (file.read_bytes()[:400], b"\0" + file.read_bytes()[1:], b""):
        file.write_bytes(content)
        with pytest.raises(ReadError, match=r"predictions\.npz: "):
            _predictions(tmp_path)
