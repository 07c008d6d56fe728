"""What is minimised: 3D-JEPA, its rivals, supervised losses."""
