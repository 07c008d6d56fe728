"""Training objectives: 3D-JEPA, its rivals, the dVAE and supervised losses."""
