"""`jepa3d demo`: pretrains on built-in shapes for some minutes, probes the encoder and draws
pictures.
"""

from pathlib import Path

from jepa3d import config as settings
from jepa3d.data.datasets import load
from jepa3d.evaluation.probe import probe, sheets
from jepa3d.evaluation.protocol import write_json
from jepa3d.evaluation.tables import show
from jepa3d.figures import draw_blocks, draw_curves
from jepa3d.training.pretrain import check, pretrain

# settings in which the demo differs from preset tiny
DEMO = {"max_steps": 2000, "log_every": 100, "checkpoint_every": 200}


def run_demo(out: Path, max_steps: int | None = None, shapes: int = 4000) -> None:
    """Run the demo, and write blocks.png, run/, curves.png and probe.json to the folder `out`.

    If a demo in `out` was interrupted, it is continued. max_steps: number of training steps; None
    means 2,000. shapes: number of generated shapes. Raises ValueError if `out` contains files but
    no demo, or if the demo in `out` was started with other arguments.
    """
    run, blocks, source = out / "run", out / "blocks.png", f"synthetic:{shapes}"
    # a demo that is interrupted early leaves only this picture
    others = {file for file in out.iterdir() if file != blocks} if out.exists() else set()
    if others and not (run / "config.json").exists():
        raise ValueError(f"{out}: contains files but no demo; choose another --out")
    changes = {"data": [source]} | ({} if max_steps is None else {"max_steps": max_steps})
    config = settings.resolve(settings.preset("tiny"), DEMO, changes)
    check(config)
    print(f"making {shapes:,} shapes of {config.encoder.num_points} points", flush=True)
    clouds = load([source], config.encoder.num_points)
    out.mkdir(parents=True, exist_ok=True)
    if not (run.exists() and blocks.exists()):
        draw_blocks(clouds, config, blocks)
    pretrain(config, run, resume=run.exists(), clouds=clouds)
    draw_curves(run, out / "curves.png")
    print("probing; pretraining has not seen the test split", flush=True)
    result = probe([run], source, protocols=("logistic", "logistic_10", "knn"))
    show(sheets(result))
    write_json(out / "probe.json", result)
    files = "blocks.png, curves.png, probe.json"
    print(f"written: {out}: {files}; the encoder: {run / 'encoder'}")
