"""Tables of runs: they average over seeds, choose settings on validation only, pair gains by seed,
and state the rules.
"""

import json
import os
from copy import deepcopy

import pytest

from jepa3d.cli import main
from jepa3d.evaluation.published import PUBLISHED, benchmark_of, published_sheet
from jepa3d.evaluation.results import arms_of, choose, paired_gains, read_runs, tables
from jepa3d.evaluation.tables import markdown, show

RESULT = {
    "task": "classify",
    "protocol": "fine-tuned, all weights",
    "data": {
        "name": "shapes.npz",
        "fingerprint": "f",
        "classes": 10,
        "train": 80,
        "validation": 20,
        "test": 50,
        "labels": 1.0,
        "variant": None,
    },
    "init": "scratch",
    "pretraining": None,
    "seed": 0,
    "selection": "validation",
    "votes": 1,
    "metrics": {"overall_accuracy": 90.0, "mean_class_accuracy": 80.0},
    "validation": {"overall_accuracy": 91.0, "mean_class_accuracy": 81.0},
    "details": {},
    "settings": {"lr": 0.001, "epochs": 30, "labels": 1.0, "trained": "all", "num_points": 1024},
    "cost": {"step": 10, "cpu_seconds": 120.0},
}
PRETRAINING = {
    "objective": "jepa",
    "teacher": ["ema"],
    "data": {"fingerprint": "p"},
    "cost": {"step": 5},
}


@pytest.fixture
def make(tmp_path):
    """Return a function that writes a run folder with a test and a validation accuracy; other
    arguments change RESULT.
    """

    def write(name, test=90.0, validation=91.0, data=(), settings=(), **values):
        result = deepcopy(RESULT) | values
        if "metrics" not in values:
            result["metrics"] = {"overall_accuracy": test, "mean_class_accuracy": test - 10}
        result["validation"] = validation and {"overall_accuracy": validation}
        result["data"] |= dict(data)
        result["settings"] |= dict(settings)
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(result))
        return folder

    return write


def pretrained(seed, **values):
    """Return the fields of a run that started from runs/jepa-SEED, a folder that does not exist."""
    return {
        "init": f"runs/jepa-{seed}",
        "pretraining": PRETRAINING | {"seed": seed} | values,
        "seed": seed,
    }


def column(sheet, name):
    return [row[sheet.columns.index(name)] for row in sheet.rows]


def test_seeds_of_an_arm_are_averaged_and_one_seed_has_no_std(make, tmp_path):
    for seed, score in enumerate((90.0, 91.0, 92.5)):
        make(f"scratch-{seed}", score, seed=seed, cost={"cpu_seconds": 60.0 * (1 + seed)})
    make(
        "jepa-0",
        95.0,
        **pretrained(0, cost={"step": 5, "cpu_seconds": 300.0, "stage1_cpu_seconds": 60.0}),
    )
    (sheet, _) = tables([tmp_path])
    assert column(sheet, "init") == ["scratch", "jepa"]
    assert column(sheet, "seeds") == ["3", "1"]
    assert column(sheet, "overall_accuracy") == ["91.17 ± 1.26", "95.00"]  # sample std, not 1.03
    assert column(sheet, "mean_class_accuracy") == ["81.17 ± 1.26", "85.00"]
    assert column(sheet, "selection") == ["validation", "validation"]
    assert column(sheet, "votes") == ["1", "1"]
    assert column(sheet, "CPU-min") == ["2.0", "2.0"]
    assert column(sheet, "pretraining CPU-min") == ["-", "6.0"]
    assert "lr" not in sheet.columns
    assert any("lr 0.001" in note for note in sheet.notes)


def test_seeds_of_a_pretraining_are_one_arm_and_other_pretrainings_another(make, tmp_path):
    make("a", 90.0, **pretrained(0))
    make("b", 92.0, **pretrained(1))
    make("c", 80.0, **pretrained(2, objective="generative"))
    make("d", 81.0, **pretrained(3, teacher=["untrained"]))
    make("e", 82.0, **pretrained(4, data={"fingerprint": "other"}))
    make("f", 83.0, init="someone/encoder")
    make("g", 70.0, init="untrained")
    make("h", 72.0, init="untrained", seed=1)
    (sheet, *_) = tables([tmp_path])
    found = list(
        zip(
            column(sheet, "init"),
            column(sheet, "seeds"),
            column(sheet, "overall_accuracy"),
            strict=True,
        )
    )
    assert found[:2] == [("untrained", "2", "71.00 ± 1.41"), ("runs/jepa-0", "2", "91.00 ± 1.41")]
    assert [row[1:] for row in found[2:]] == [
        ("1", "80.00"),
        ("1", "81.00"),
        ("1", "82.00"),
        ("1", "83.00"),
    ]
    assert len({row[0] for row in found}) == 6  # arms of the same name have different rows


def test_a_pretraining_is_told_by_all_its_settings_but_seeds_and_bookkeeping(make, tmp_path):
    for i, (seed, ratio, which) in enumerate(
        [(0, 0.6, ""), (1, 0.6, ""), (2, 0.9, ""), (3, 0.6, "snapshots/step-9")]
    ):
        record = {
            "sampler": {"mask_ratio": ratio},
            "teacher": [f"runs/mae-{seed}"],
            "log_every": 10 + seed,
        }
        make(f"runs/{i}", **pretrained(seed, encoder_of=which, cost={"step": seed}, **record))
    assert [len(arm.runs) for arm in arms_of(read_runs([tmp_path / "runs"])[0])] == [2, 1, 1]


def test_different_settings_protocols_data_and_selection_are_not_averaged(make, tmp_path):
    make("a")
    make("b", seed=1, settings={"epochs": 60})
    make("c", seed=2, protocol="fine-tuned, head only")
    make("d", seed=3, votes=10)
    make("e", seed=4, selection="last epoch")
    make("f", seed=5, data={"train": 40})
    make("g", seed=6, data={"fingerprint": "other"})
    first, second = tables([tmp_path])
    assert column(first, "seeds") == ["1"] * 6
    assert {"protocol", "epochs", "train"} <= set(first.columns)
    assert column(second, "seeds") == ["1"]


def test_choose_looks_at_validation_even_where_test_disagrees(make, tmp_path):
    for seed in (0, 1):
        # This rate is the best on test.
        make(f"low-{seed}", 99.0, 80.0 + seed, seed=seed, settings={"lr": 0.0005})
        make(f"high-{seed}", 85.0, 83.0 + seed, seed=seed, settings={"lr": 0.002})
    # This rate has the best single validation score, but not the best mean.
    for seed, validation in ((0, 60.0), (1, 90.0)):
        make(f"mid-{seed}", 97.0, validation, seed=seed, settings={"lr": 0.001})
    (sheet,) = tables([tmp_path], "lr")
    assert column(sheet, "lr") == ["0.002"]
    assert column(sheet, "overall_accuracy") == ["85.00 ± 0.00"]
    assert any(
        "chosen by mean validation" in note and "0.0005: 80.50" in note for note in sheet.notes
    )
    assert len(tables([tmp_path])[0].rows) == 3


def test_choose_decides_for_each_init_and_keeps_what_has_no_validation(make, tmp_path):
    for lr, own, theirs in ((0.001, 70.0, 60.0), (0.01, 60.0, 70.0)):
        make(f"scratch-{lr}", 50.0, own, settings={"lr": lr})
        make(f"jepa-{lr}", 50.0, theirs, **pretrained(0), settings={"lr": lr})
        make(f"last-{lr}", 50.0, None, selection="last epoch", settings={"lr": lr})
    arms, notes = choose(arms_of(read_runs([tmp_path])[0]), "lr")
    kept = {(arm.result["selection"], arm.label(), arm.result["settings"]["lr"]) for arm in arms}
    last = {("last epoch", "scratch", 0.001), ("last epoch", "scratch", 0.01)}
    assert kept == {("validation", "scratch", 0.001), ("validation", "jepa", 0.01)} | last
    assert any("no validation metrics" in note and "last epoch" in note for note in notes)


@pytest.mark.parametrize(
    ("setting", "values", "words"),
    [
        ("layer_decay", (1.0, 0.5), ("all weights", "all weights, layer decay 0.5")),
        (
            "trained",
            ("all", "head"),
            ("all weights, layer decay 0.5", "head only, layer decay 0.5"),
        ),
    ],
)
def test_choose_of_a_setting_that_the_protocol_names(make, tmp_path, setting, values, words):
    for i, (value, text) in enumerate(zip(values, words, strict=True)):
        make(str(i), 90, 80.0 + i, protocol=f"fine-tuned, {text}", settings={setting: value})
    (sheet,) = tables([tmp_path], setting)
    assert column(sheet, setting) == [str(values[1])]


def test_choose_of_an_unknown_setting_names_the_known(make):
    with pytest.raises(ValueError, match=r"--choose rate is not .*epochs, labels, lr"):
        tables([make("a")], "rate")


def test_gains_are_paired_by_seed(make, tmp_path):
    for seed, base, ours in ((0, 80.0, 84.0), (1, 90.0, 91.0), (2, 70.0, 77.0)):
        make(f"scratch-{seed}", base, seed=seed)
        make(f"jepa-{seed}", ours, **pretrained(seed))
    make("jepa-3", 10.0, **pretrained(3))  # scratch has no run with this seed
    _, gain = tables([tmp_path])
    assert column(gain, "over") == ["scratch"]
    assert column(gain, "pairs") == ["3"]
    assert column(gain, "overall_accuracy") == ["+4.00 ± 3.00"]
    scratch, jepa = arms_of(read_runs([tmp_path])[0])
    assert paired_gains(jepa, scratch, "overall_accuracy") == [4.0, 1.0, 7.0]


def test_gains_of_arms_that_differ_in_more_than_init_only_after_choosing(make, tmp_path):
    make("scratch", 80.0, settings={"lr": 0.001})
    make("jepa", 85.0, **pretrained(0), settings={"lr": 0.01})
    make("other", 85.0, **pretrained(1, objective="generative"), settings={"lr": 0.001})
    _, gain = tables([tmp_path])
    assert gain.rows == []
    assert "no seed in common" in gain.notes[0]
    sheet, gain = tables([tmp_path], "lr")
    assert "scratch: lr 0.001 is the only one" in sheet.notes
    assert column(gain, "init") == ["runs/jepa-0"]
    assert column(gain, "overall_accuracy") == ["+5.00"]
    (tmp_path / "other" / "results.json").unlink()
    assert len(tables([tmp_path])) == 1


def test_selection_on_test_is_marked_and_mixtures_are_told(make, tmp_path, capsys):
    make("a")
    make("b", selection="best on test", validation=None)
    make("c", votes=10)
    sheets = tables([tmp_path])
    assert sorted(column(sheets[0], "selection")) == [
        "selected on TEST",
        "validation",
        "validation",
    ]
    assert any("different selection rules" in note for note in sheets[0].notes)
    assert any("different votes are not comparable: 1, 10" in note for note in sheets[0].notes)
    show(sheets)
    assert "selected on TEST" in capsys.readouterr().out
    assert "| **selected on TEST** |" in markdown(sheets, "jepa3d results")
    assert not any("comparable" in note for note in tables([tmp_path / "a"])[0].notes)


@pytest.mark.parametrize(
    ("task", "data", "protocol", "known"),
    [
        ("classify", {"name": "store", "variant": "ScanObjectNN obj_bg"}, "", "obj_bg"),
        ("classify", {"name": "store", "variant": "obj_only"}, "", "obj_only"),
        ("classify", {"name": "ScanObjectNN-PB_T50_RS", "variant": None}, "", "pb_t50_rs"),
        ("classify", {"name": "store", "variant": "ScanObjectNN pb_t50_rs_nobg"}, "", None),
        ("classify", {"name": "scans_obj_only", "variant": None}, "", None),
        (
            "classify",
            {"name": "modelnet40", "variant": "ModelNet40 normals", "classes": 40},
            "",
            "modelnet40",
        ),
        ("classify", {"name": "modelnet40_partial.npz", "variant": None, "classes": 39}, "", None),
        ("classify", {"name": "modelnet10_1024.npz", "variant": None, "classes": 10}, "", None),
        (
            "fewshot",
            {"name": "x", "variant": "ModelNetFewshot", "classes": 5},
            "5-way 10-shot, fine-tuned",
            "5w10s",
        ),
        (
            "fewshot",
            {"name": "x", "variant": "ModelNet40 few-shot"},
            "10-way 20-shot, frozen",
            "10w20s",
        ),
        (
            "fewshot",
            {"name": "x", "variant": "ModelNet40 few-shot"},
            "3-way 1-shot, fine-tuned",
            None,
        ),
        ("fewshot", {"name": "modelnet40", "variant": None}, "5-way 10-shot, fine-tuned", None),
        ("fewshot", {"name": "modelnet10", "classes": 10}, "5-way 10-shot, fine-tuned", None),
        ("segment", {"name": "s", "variant": "ShapeNetPart"}, "part segmentation", "shapenetpart"),
    ],
)
def test_benchmarks_are_recognised(task, data, protocol, known):
    assert benchmark_of({"task": task, "data": data, "protocol": protocol}) == known


def test_published_rows_stand_beside_their_benchmark_with_what_departs_from_it(make):
    whole = {"variant": "ScanObjectNN obj_bg", "test": 581, "classes": 15}
    run = make("bg", data=whole, settings={"num_points": 2048})
    _, published = tables([run])
    assert ["3D-JEPA", "300", "94.49", "no", "best test epoch"] in published.rows
    assert len(published.rows) == 10
    assert any("voting no, selection validation" in note for note in published.notes)
    assert not any("depart" in note for note in published.notes)
    part = make(
        "part",
        data=whole | {"test": 20, "labels": 0.1},
        settings={"num_points": 1024, "trained": "head"},
    )
    (told,) = [note for note in tables([part])[1].notes if "depart" in note]
    assert told.endswith(
        "20 test shapes, not 581; 1,024 points, not 2,048; 10 % of the labels; frozen encoder"
    )


def test_no_published_rows_beside_other_data(make):
    assert "published" not in str(tables([make("a", data={"name": "modelnet10_1024.npz"})]))


def test_published_numbers_are_those_of_the_method_notes():
    forty = PUBLISHED["modelnet40"].rows
    assert ["point2vec", "800", "no", "94.7"] in forty
    assert ["point2vec", "800", "yes", "94.8"] in forty
    assert ["3D-JEPA", "300", "not stated", "94.0"] in forty
    voted = ("Point-BERT", "Point-MAE", "Point-M2AE")
    assert {voting for name, _, voting, _ in forty if name in voted} == {"yes"}
    last = {key: benchmark.rows[-1][3:] for key, benchmark in PUBLISHED.items()}
    whole = [last[key] for key in ("obj_bg", "obj_only", "pb_t50_rs")]
    assert whole == [["95.52"], ["94.32"], ["90.35"]]
    few = [last[key] for key in ("5w10s", "5w20s", "10w10s", "10w20s")]
    assert few == [["97.6 ± 2.0"], ["98.8 ± 0.4"], ["94.3 ± 3.6"], ["96.3 ± 2.4"]]
    assert last["shapenetpart"] == ["84.93", "86.41"]
    sheets = [published_sheet(benchmark) for benchmark in PUBLISHED.values()]
    assert len(sheets) == 12
    assert all(len(row) == len(sheet.columns) for sheet in sheets for row in sheet.rows)


def test_few_shot_and_segmentation_have_their_own_tables(make, tmp_path):
    few = {
        "task": "fewshot",
        "protocol": "5-way 10-shot, fine-tuned",
        "selection": "last epoch",
        "validation": None,
    }
    few["details"] = {"folds": [94.0, 95.0, 96.0]}
    data = {"variant": "ModelNetFewshot", "fingerprint": "few", "classes": 5}
    metrics = {"overall_accuracy": 95.0, "std_over_folds": 3.0}
    for seed in (0, 1):
        make(f"few-{seed}", seed=seed, data=data, metrics=metrics, **few)
        make(f"jepa-{seed}", data=data, metrics=metrics, **few, **pretrained(seed))
    parts = {"instance_miou": 84.0, "category_miou": 82.0}
    make("parts", task="segment", protocol="part segmentation", metrics=parts)
    first, gain, published, second = tables([tmp_path])
    assert column(first, "std_over_folds") == ["3.00 ± 0.00"] * 2
    assert "std_over_folds" not in gain.columns
    assert "5-way 10-shot" in published.title
    assert any("3 folds, not 10" in note for note in published.notes)
    assert column(second, "instance_miou") == ["84.00"]


def test_a_few_shot_run_is_counted_once_and_a_run_given_twice_too(make, tmp_path):
    run = make("few", protocol="5-way 10-shot, fine-tuned", task="fewshot", validation=None)
    make("few/fold-0")
    assert len(read_runs([tmp_path, run, tmp_path / "few" / ".." / "few"])[0]) == 1


def unfinished(folder, task="classify"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"task": task} if task else {"objective": "jepa"})
    )
    (folder / "run.json").write_text('{"status": "running"}')
    return folder


def test_unfinished_runs_below_are_told_and_left_out(make, tmp_path):
    make("done")
    unfinished(tmp_path / "going")
    unfinished(tmp_path / "pretraining", task=None)
    make("going/fold-0", 10.0)  # a fold is not a run of its own
    (sheet,) = tables([tmp_path])
    assert column(sheet, "overall_accuracy") == ["90.00"]
    assert [note for note in sheet.notes if "unfinished" in note] == [
        f"left out, since it is unfinished: {tmp_path / 'going'}"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "damaged or cut off"),
        ("\xff", "damaged or cut off"),
        ("[1]", "it is not a JSON object"),
        ('{"task": ["classify"]}', "is not a result of jepa3d"),
        ('{"task": "classify"}', "protocol is None, not of type str"),
        (
            json.dumps(RESULT | {"metrics": {"overall_accuracy": float("nan")}}),
            "overall_accuracy is nan",
        ),
        (json.dumps(RESULT | {"metrics": {"overall_accuracy": "90"}}), "overall_accuracy is '90'"),
        (json.dumps(RESULT | {"validation": 3}), "validation is 3"),
    ],
)
def test_a_foreign_or_damaged_result_is_one_line(tmp_path, capsys, text, said):
    (tmp_path / "results.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit) as stop:
        main(["results", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert str(tmp_path / "results.json") in error
    assert error.count("\n") == 1


def test_no_run_an_unfinished_run_and_one_seed_twice_are_errors(make, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"no results\.json"):
        read_runs([tmp_path])
    going = unfinished(tmp_path / "sweep" / "going")
    with pytest.raises(ValueError, match=r"going contains no results\.json .*unfinished.*going"):
        read_runs([going])
    with pytest.raises(ValueError, match=r"sweep contains no results\.json .*unfinished: .*going"):
        read_runs([tmp_path / "sweep"])
    make("a")
    make("b")
    with pytest.raises(ValueError, match=r"a and .*b have the same settings and the same seed 0"):
        tables([tmp_path])


def test_the_command_prints_and_writes_markdown(make, tmp_path, capsys):
    make("runs/a", data={"variant": "ScanObjectNN obj_bg"}, settings={"scale": [0.8, 1.2]})
    # [red] must not be read as markup of the terminal.
    make("runs/b", data={"variant": "ScanObjectNN obj_bg"}, settings={"scale": ["red"]})
    out = tmp_path / "table.md"
    with pytest.raises(SystemExit) as stop:
        main(["results", str(tmp_path / "runs"), "--choose", "scale", "--out", str(out)])
    assert not stop.value.code
    printed, written = capsys.readouterr().out, out.read_text(encoding="utf-8")
    assert all(words in text for text in (printed, written) for words in ("[0.8, 1.2]", "94.49"))
    assert "| init | train | scale | seeds | overall_accuracy |" in written
    assert "Made by `" in written


def test_a_path_that_is_not_utf_8_is_written_escaped(make, tmp_path):
    make("a", init=os.fsdecode(b"runs/caf\xe9"))
    with pytest.raises(SystemExit) as stop:
        main(["results", str(tmp_path / "a"), "--out", str(tmp_path / "table.md")])
    assert not stop.value.code
    assert r"runs/caf\udce9 |" in (tmp_path / "table.md").read_text(encoding="utf-8")


def test_published_tables_need_no_run(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["results", "--published"])
    assert not stop.value.code
    printed = capsys.readouterr().out
    for number in ("94.49", "97.6 ± 2.0", "84.93", "91.57", "92.77", "93.7 ± 0.2"):
        assert number in printed
    with pytest.raises(SystemExit) as stop:
        main(["results"])
    assert stop.value.code == 2
