"""Run the pretraining steps of three peers (Point-MAE, Point-JEPA and point2vec) with their own
code, on a CPU in fp32. step.py compares these steps with the step of jepa3d.

Each public function takes the folder of a checkout, and returns the peer's model and a function
`step(points B N 3) -> loss`. A call of `step` is one step of the peer's training with its published
configuration: augmentation, grouping, masking, forward pass, loss, backward pass, AdamW and, if
there is a teacher, the update of its moving average. Work that is done once per epoch, or for
logging, is omitted.

The checkouts are not edited, and none of their code is copied here. Modules that need CUDA or do
not belong to the step are replaced by stand-ins in `sys.modules`, even if the real modules are
installed. Farthest point sampling and the neighbour search are computed by `jepa3d.ops`, in its
compiled version if there is one, so that no peer is slower than jepa3d in these two. The peers'
packages have clashing names, so each peer needs its own process. These commits are used:

    Point-MAE   github.com/Pang-Yatian/Point-MAE    7445a68
    Point-JEPA  github.com/Ayumu-J-S/Point-JEPA     c36b51c
    point2vec   github.com/kabouzeid/point2vec      17f8ad8
"""

import inspect
import logging
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import yaml
from torch import Tensor, nn

from jepa3d import ops

Step = Callable[[Tensor], Tensor]


def point_mae(folder: Path) -> tuple[nn.Module, Step]:
    """Make Point-MAE and its step: cfgs/pretrain.yaml, trained as tools/runner_pretrain.py does."""
    _timm()
    _stand_in("timm.scheduler", CosineLRScheduler=_nothing)
    _stand_in("easydict", EasyDict=_EasyDict)
    _stand_in("termcolor", colored=None)
    _stand_in("knn_cuda", KNN=_KNN)
    _stand_in(
        "pointnet2_ops",
        pointnet2_utils=SimpleNamespace(furthest_point_sample=_fps, gather_operation=_gather),
    )
    _stand_in("extensions.chamfer_dist", ChamferDistanceL1=None, ChamferDistanceL2=_ChamferL2)
    _stand_in(
        "datasets", folder / "datasets", build_dataset_from_cfg=None
    )  # a stand-in, since the real __init__ imports every reader
    _stand_in("tools", folder / "tools")
    torch.Tensor.cuda = nn.Module.cuda = lambda self, *arguments, **options: self
    logging.disable(logging.INFO)
    sys.path.insert(0, str(folder))

    read = yaml.safe_load((folder / "cfgs" / "pretrain.yaml").read_text())
    used = {name: read[name] for name in ("model", "optimizer", "scheduler")}
    config = import_module("utils.config").merge_new_config(_EasyDict(), used)
    builder = import_module("tools.builder")
    model = nn.DataParallel(builder.model_builder(config.model)).train()
    optimizer, _ = builder.build_opti_sche(model, config)
    augment = import_module("datasets.data_transforms").PointcloudScaleAndTranslate()

    def step(points: Tensor) -> Tensor:
        loss = model(augment(points.clone()))  # a copy, since `augment` writes into its argument
        loss.backward()
        optimizer.step()
        model.zero_grad()
        return loss.detach()

    return model, step


def point_jepa(folder: Path) -> tuple[nn.Module, Step]:
    """Make Point-JEPA and its step: configs/Point-JEPA/pretraining/shapenet.yaml."""
    # its forward pass converts tokens to half precision, but fp32 is compared
    torch.Tensor.half = torch.Tensor.float
    return _lightning(
        folder, "pointjepa", "point_jepa.PointJepa", "configs/Point-JEPA/pretraining/shapenet.yaml"
    )


def point2vec(folder: Path) -> tuple[nn.Module, Step]:
    """Make point2vec and its step: configs/pretraining/shapenet.yaml."""
    return _lightning(
        folder, "point2vec", "point2vec.Point2Vec", "configs/pretraining/shapenet.yaml"
    )


def _lightning(folder: Path, package: str, name: str, config: str) -> tuple[nn.Module, Step]:
    """Make a LightningModule and a step like that of its Trainer with automatic optimisation."""
    _timm()
    _stand_in("pytorch_lightning", LightningModule=_LightningModule, LightningDataModule=object)
    _stand_in("pytorch_lightning.loggers", WandbLogger=None)
    _stand_in("pl_bolts.optimizers.lr_scheduler", LinearWarmupCosineAnnealingLR=_nothing)
    _stand_in(
        "pytorch3d.ops",
        sample_farthest_points=_sample_farthest_points,
        knn_points=_knn_points,
        knn_gather=ops.gather_points,
        ball_query=None,  # no published configuration uses it
    )
    _stand_in("pytorch3d.ops.utils", masked_gather=ops.gather_points)
    _stand_in("pytorch3d.transforms", euler_angles_to_matrix=_euler_angles_to_matrix)
    _stand_in(
        f"{package}.models", folder / package / "models"
    )  # a stand-in, since the real __init__ imports every downstream task
    sys.path.insert(0, str(folder))

    read = yaml.safe_load((folder / config).read_text())
    settings, epochs = read["model"], read["trainer"]["max_epochs"]
    settings["svm_validation"] = {}
    module, _, cls = name.partition(".")
    make = getattr(import_module(f"{package}.models.{module}"), cls)
    for key, parameter in inspect.signature(make).parameters.items():
        if parameter.annotation is float and key in settings:
            settings[key] = float(
                settings[key]
            )  # YAML 1.1 reads 1e-3 as text, but Lightning's parser reads it as a number
    model = make(**settings)
    # 41,952 is the number of shapes in ShapeNet55's train split.
    batches = 41_952 // read["data"]["init_args"]["batch_size"]
    model.trainer = SimpleNamespace(max_epochs=epochs, estimated_stepping_batches=epochs * batches)
    model.setup("fit")  # creates the teacher
    model.on_fit_start()
    (optimizer,), _ = model.configure_optimizers()
    model.train()

    def step(points: Tensor) -> Tensor:
        loss = torch.empty(())

        def closure() -> Tensor:
            nonlocal loss
            loss = model.training_step(
                (points.clone(), None), 0
            )  # a copy, since training_step augments by writing into its argument
            optimizer.zero_grad()
            loss.backward()
            return loss

        model.optimizer_step(optimizer, closure)  # also updates the teacher
        return loss.detach()

    return model, step


def _stand_in(name: str, path: Path | None = None, **contents) -> None:
    """Install a stand-in module; with `path`, a package whose own __init__ is skipped."""
    module = ModuleType(name)
    module.__dict__.update(contents)
    if path:
        module.__path__ = [str(path)]
    sys.modules[name] = module


def _timm() -> None:
    _stand_in("timm")
    _stand_in("timm.models.layers", DropPath=_DropPath, trunc_normal_=nn.init.trunc_normal_)


def _nothing(*arguments, **options) -> None:
    """Stand in for a learning-rate schedule that changes once per epoch."""


class _DropPath(nn.Module):
    def __init__(self, rate: float):
        super().__init__()
        self.keep = 1 - rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty(len(x), *(x.ndim - 1) * [1]).bernoulli_(self.keep).div_(self.keep)


class _EasyDict(dict):
    __getattr__ = dict.__getitem__


class _LightningModule(nn.Module):
    device, loggers = torch.device("cpu"), ()

    def save_hyperparameters(self) -> None:
        caller = sys._getframe(1)  # its locals are the arguments of the module's __init__
        self.hparams = SimpleNamespace(**caller.f_locals)

    def on_fit_start(self) -> None: ...

    def log(self, *arguments, **options) -> None: ...

    def optimizer_step(self, optimizer: torch.optim.Optimizer, closure: Callable) -> None:
        optimizer.step(closure)


class _KNN:
    def __init__(self, k: int, transpose_mode: bool):
        self.k = k

    def __call__(self, points: Tensor, query: Tensor) -> tuple[None, Tensor]:
        return None, ops.knn(query, points, self.k)


class _ChamferL2(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return ops.chamfer_l2(a, b)


def _fps(points: Tensor, number: int) -> Tensor:
    return ops.farthest_point_sample(points, number)


def _gather(features: Tensor, index: Tensor) -> Tensor:
    return ops.gather_points(features.transpose(1, 2), index).transpose(1, 2)


def _sample_farthest_points(
    points: Tensor, K: int, random_start_point: bool
) -> tuple[Tensor, Tensor]:
    index = ops.farthest_point_sample(points, K, torch.default_generator)
    return ops.gather_points(points, index), index


def _knn_points(query: Tensor, points: Tensor, K: int, **options) -> tuple[None, Tensor, None]:
    return None, ops.knn(query, points, K), None


def _euler_angles_to_matrix(angles: Tensor, convention: str) -> Tensor:
    """Make rotation matrices about x, then y, then z; the peers use no other order of axes."""
    turn = torch.eye(3)
    for axis, (cos, sin) in enumerate(zip(angles.cos(), angles.sin(), strict=True)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        about = torch.eye(3)
        about[a, a], about[a, b], about[b, a], about[b, b] = cos, -sin, sin, cos
        turn = turn @ about
    return turn
