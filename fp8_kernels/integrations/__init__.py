"""Engines that load FP8 through this package; each module is for one. Nothing here imports an engine by itself."""
