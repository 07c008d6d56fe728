"""The name under which `jepa3d export` puts frame.py beside a model."""

from jepa3d.frame import farthest_point_sample, frame, group

__all__ = ["farthest_point_sample", "frame", "group"]
